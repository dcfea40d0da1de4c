//! Short reads that share connections.

use crate::things::{until_somebody_waits, user};
use futures_util::future::{join, join_all};
use testkit::TestCluster;
use therev::{Config, Layout, Therev, UserId};

/// Users of one shard.
const USERS: usize = 24;

/// One shard, a node with few connections to it, and users who are there.
async fn one_busy_shard() -> (TestCluster, Therev, Vec<UserId>) {
    let cluster = TestCluster::new(Layout::Colocated, 1).await;
    let node = therev::connect(Config { pool_size: Some(8), ..cluster.config() }).await.expect("connected");
    let mut users = Vec::new();
    for n in 0..USERS {
        users.push(user(&node, &format!("user-{n}")).await.user_id);
    }
    (cluster, node, users)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_callers_gets_the_own_answer() {
    const READS: usize = 100;
    let (cluster, node, users) = one_busy_shard().await;
    let callers = users.iter().map(|&user| {
        let node = node.clone();
        tokio::spawn(async move {
            for _ in 0..READS {
                assert_eq!(node.user(user).await.expect("the user").user_id, user);
                assert_eq!(node.sessions(user).await.expect("the user's sessions"), []);
            }
        })
    });
    for caller in join_all(callers).await {
        caller.expect("all answers are right");
    }
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn a_read_that_waits_for_a_lock_holds_nobody_else_up() {
    let (cluster, node, users) = one_busy_shard().await;
    // So many connections are open that nobody waits for one.
    join_all(users.iter().map(|user| node.user(*user))).await;
    let (mut holder, watcher) = (cluster.stranger("shard_0").await, cluster.stranger("shard_0").await);
    let held = holder.transaction().await.expect("a transaction");
    held.batch_execute("LOCK TABLE user_sessions IN ACCESS EXCLUSIVE MODE").await.expect("the lock");
    let waiting = join_all(users[..4].iter().map(|user| node.sessions(*user)));
    let others = async {
        // Those who come in the same moment may sit beside one who waits; those who come later do not.
        let at_once = join_all(users.iter().map(|user| node.user(*user))).await;
        until_somebody_waits(&watcher).await;
        let later = join_all(users.iter().map(|user| node.user(*user))).await;
        assert!(at_once.iter().chain(&later).all(Result::is_ok), "{at_once:?} {later:?}");
        held.rollback().await.expect("the lock is gone");
    };
    let (waited, ()) = join(waiting, others).await;
    assert!(waited.iter().all(Result::is_ok), "{waited:?}");
    drop(node);
    drop((holder, watcher));
    cluster.finish().await;
}

#[tokio::test]
async fn callers_who_leave_take_nobodys_answer_along() {
    let (cluster, node, users) = one_busy_shard().await;
    for _ in 0..20 {
        let leaves = async {
            let all = join_all(users.iter().map(|user| node.user(*user)));
            tokio::select! {
                biased;
                _ = all => (),
                () = tokio::task::yield_now() => (),
            }
        };
        let ((), stay) = join(leaves, join_all(users.iter().map(|user| node.user(*user)))).await;
        for (user, found) in users.iter().zip(stay) {
            assert_eq!(found.expect("the user").user_id, *user);
        }
    }
    drop(node);
    cluster.finish().await;
}
