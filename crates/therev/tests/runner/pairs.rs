//! What may begin while something else is under way: it works, or is refused with the reason.

use crate::things::{operator, post, thread, user_per_shard};
use testkit::{TestCluster, drive};
use therev::relocation::{Aim, Error, Goal, Mover, Options, Request, State};
use therev::{Group, ShardNo, Therev, UserId, remove_shard};

fn buckets_of(user: UserId, source: i16, target: i16) -> Request {
    let (source, target) = (ShardNo(source), ShardNo(target));
    Request { groups: Group::ALL.to_vec(), buckets: vec![user.bucket()], pin: None, source, target }
}

/// Why a request is refused, in its plan or when it is to begin.
async fn refusal(mover: &Mover, request: &Request) -> String {
    let plan = mover.plan(request).await.expect("a plan");
    match mover.begin(&plan, Goal::Done, "test").await {
        Err(error @ Error::Refused { .. }) => error.to_string(),
        outcome => panic!("{request:?} was not refused: {outcome:?}"),
    }
}

async fn moved(node: &Therev, mover: &Mover, request: &Request) {
    let plan = mover.plan(request).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Done, "test").await.expect("it begins");
    assert_eq!(Box::pin(drive(node, mover, begun.relocation)).await.state, State::Done);
}

#[tokio::test]
async fn while_a_relocation_rests_at_its_switch() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let users = user_per_shard(&node).await;
    for user in users {
        let open = thread(&node, user, "A thread").await;
        post(&node, users[0], &open, "a post").await;
    }
    node.relay_once().await.expect("the relay runs");
    let mover = Mover::new(node.shards().clone(), Options::default());
    let held = mover.plan(&buckets_of(users[0], 0, 1)).await.expect("a plan");
    let held = mover.begin(&held, Goal::Switched, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, held)).await.state, State::Switched);

    // The same bucket, and a user of it, are in a relocation already.
    let in_another = "in another relocation";
    assert!(refusal(&mover, &buckets_of(users[0], 1, 2)).await.contains(in_another));
    let pins = mover.pin_requests(users[0], ShardNo(3)).await.expect("a request");
    assert!(refusal(&mover, &pins[0]).await.contains(in_another));
    // Everybody else moves as ever: a bucket between the same two shards, a user apart and back.
    moved(&node, &mover, &buckets_of(users[1], 1, 0)).await;
    moved(&node, &mover, &mover.pin_requests(users[2], ShardNo(1)).await.expect("a request")[0]).await;
    // While a user is apart its bucket may move; while its bucket is on the way the user may not.
    let bucket = mover.plan(&buckets_of(users[2], 2, 3)).await.expect("a plan");
    let bucket = mover.begin(&bucket, Goal::Switched, "test").await.expect("it begins").relocation;
    let back = mover.unpin_requests(users[2]).await.expect("a request");
    assert!(refusal(&mover, &back[0]).await.contains(in_another));
    mover.want(bucket, Goal::Aborted).await.expect("it can be undone");
    assert_eq!(Box::pin(drive(&node, &mover, bucket)).await.state, State::Aborted);
    moved(&node, &mover, &mover.unpin_requests(users[2]).await.expect("a request")[0]).await;
    // What moves many waits for people to decide; a shard that takes part stays.
    let drained = Box::pin(mover.rebalance(Aim::Empty(ShardNo(3)), "test", &|_| {})).await;
    let drained = drained.expect_err("it is refused");
    assert!(drained.to_string().contains("is held after its switch"), "{drained:?}");
    let removed = remove_shard(node.shards(), ShardNo(1)).await.expect_err("it is refused");
    assert!(removed.to_string().contains("takes part in 1 relocations"), "{removed:?}");
    // Users go on: names change, rows are deleted, and everything agrees.
    node.delete_user(users[3], true, &operator()).await.expect("a user leaves");
    node.relay_once().await.expect("the relay runs");
    cluster.prove().await;

    mover.want(held, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(drive(&node, &mover, held)).await.state, State::Reversed);
    drop((mover, node));
    cluster.finish().await;
}
