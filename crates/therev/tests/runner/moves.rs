//! Relocation: what is moved is whole, on one shard, and nothing of the move is left.

use crate::things::{post, thread, user_per_shard};
use std::time::Duration;
use testkit::TestCluster;
use therev::relocation::{Goal, Mover, Options, Relocation, Request, State};
use therev::{Group, Layout, ShardNo, Therev};

/// A request for all buckets of these owners' shard that hold something.
fn request(source: ShardNo, target: ShardNo, buckets: Vec<therev::Bucket>) -> Request {
    Request { groups: Group::ALL.to_vec(), buckets, source, target }
}

/// Nothing of any relocation is left on the servers of a cluster.
async fn nothing_left(cluster: &TestCluster) {
    let shards: Vec<String> = (0..cluster.shards()).map(|n| cluster.url(&format!("shard_{n}"))).collect();
    testkit::nothing_left(&shards).await;
}

/// Carries a relocation on as far as it goes, while a relay delivers what the former owner has to tell.
async fn drive(node: &Therev, mover: &Mover, number: i64) -> Relocation {
    let relaying = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            node.relay_once().await.expect("the relay runs");
        }
    };
    tokio::select! {
        driven = Box::pin(mover.drive(number, &|_| {})) => driven.expect("the relocation goes on"),
        () = relaying => unreachable!("the relay has no end"),
    }
}

async fn some_content(node: &Therev) -> Vec<therev::UserId> {
    let authors = user_per_shard(node).await;
    for author in &authors {
        let open = thread(node, *author, "A thread").await;
        for other in &authors {
            post(node, *other, &open, "a post").await;
        }
    }
    node.relay_once().await.expect("the relay runs");
    authors.to_vec()
}

#[tokio::test]
async fn a_user_moves_with_everything_and_comes_back() {
    let cluster = TestCluster::new(Layout::Colocated, 4).await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let bucket = authors[0].bucket();

    let there = request(ShardNo(0), ShardNo(2), vec![bucket]);
    let plan = mover.plan(&there).await.expect("a plan");
    assert!(plan.obstacles.is_empty() && plan.rows > 5, "{plan:?}");
    let begun = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins");
    let held = Box::pin(drive(&node, &mover, begun.relocation)).await;
    assert_eq!(held.state, State::Switched);
    assert_eq!(node.user(authors[0]).await.expect("an answer").user_id, authors[0]);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    let open = thread(&node, authors[0], "After the switch").await;
    post(&node, authors[0], &open, "written there").await;

    mover.want(begun.relocation, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Reversed);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    nothing_left(&cluster).await;
    cluster.prove().await;

    let plan = mover.plan(&there).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Done, "test").await.expect("it begins");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Done);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}
