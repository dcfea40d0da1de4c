//! `kill -9` while shards come, go and are balanced: the same command goes on, and the cluster is as it was or as it should
//! be.

use crate::cut_off::cut_off;
use std::time::Duration;
use testkit::{PASSWORD, TestCluster};
use therev::generate::Plan;
use therev::planner::By;
use therev::relocation::{Aim, Mover, Options};
use therev::{AddPlan, Layout, RolePasswords, ShardNo, add_shard, look_at_leaving, remove_shard};

fn plan(address: &str) -> AddPlan {
    let word = || PASSWORD.to_owned();
    let passwords = RolePasswords { library: word(), admin: word(), mover: word() };
    AddPlan { address: address.to_owned(), weight: 1.0, passwords }
}

#[tokio::test]
async fn adding_a_shard() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let address = cluster.empty_database("shard_4").await;
        let points = [
            "fresh.roles_made",
            "fresh.schema_applied",
            "add_shard.identified",
            "add_shard.points",
            "add_shard.before_commit",
        ];
        for point in points {
            assert!(cut_off(&cluster, point, 1, &["add-shard", &address]), "{point}");
            // Up to the last step the cluster does not know it.
            assert_eq!(cluster.node().await.shards().numbers().len(), 4, "{point}");
            cluster.prove().await;
        }
        let node = cluster.node().await;
        let added = add_shard(node.shards(), &plan(&address)).await.expect("it goes on");
        assert_eq!(added.shard, ShardNo(4));
        assert_eq!(node.shards().numbers().len(), 5);
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn balancing_and_removing() {
    let cluster = TestCluster::new(Layout::Colocated, 1).await;
    let node = cluster.node().await;
    let people = Plan { users: 400, threads: 40, posts: 1_000, seed: 3, zipf: 0.2 };
    therev::generate::generate(&node, people, &mut |_| {}).await.expect("a community");
    cluster.prove().await;
    let address = cluster.empty_database("shard_1").await;
    add_shard(node.shards(), &plan(&address)).await.expect("a shard");
    for point in ["rebalance.begun", "relocation.copied_some", "relocation.recorded", "relocation.streams_dropped"] {
        assert!(cut_off(&cluster, point, 1, &["rebalance"]), "{point}");
    }
    let mover = Mover::new(node.shards().clone(), Options { budget: Duration::from_secs(2), ..Options::default() });
    let aim = Aim::Balance { by: By::Size, moves_max: None };
    let ended = Box::pin(mover.rebalance(aim, "test", &|_| {})).await.expect("it goes on");
    assert_eq!(ended.len(), 1, "what was under way, and nothing besides: {ended:?}");
    assert!(mover.plan_rebalance(aim).await.expect("a plan").requests().is_empty());
    cluster.prove().await;

    therev::set_weight(node.shards(), ShardNo(1), 0.0).await.expect("a weight");
    Box::pin(mover.rebalance(Aim::Empty(ShardNo(1)), "test", &|_| {})).await.expect("it is emptied");
    assert!(cut_off(&cluster, "remove_shard.pointed_past", 1, &["remove-shard", "1"]));
    cluster.prove().await;
    let seen = look_at_leaving(node.shards(), ShardNo(1)).await.expect("nothing is in the way");
    let removed = remove_shard(node.shards(), ShardNo(1)).await.expect("it goes on");
    assert_eq!((seen.shard, removed.shard), (ShardNo(1), ShardNo(1)));
    assert_eq!(node.shards().numbers(), [ShardNo(0)]);
    drop((mover, node));
    cluster.finish().await;
}
