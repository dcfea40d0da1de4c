//! Delivery: twice, late, out of order, or not at all for a while.

use crate::outages::reachable;
use crate::things::{operator, post, thread, user, user_per_shard};
use futures_util::future::join_all;
use std::time::Duration;
use testkit::{TestCluster, drive};
use therev::relocation::{Goal, Mover, Options, Request, State};
use therev::{Config, Group, NewThread, PostId, Seen, ShardNo, ThreadId, ThreadOrder, UserChange};

/// The oldest event of everything that single events are about.
const FIRST_OF_EACH: &str = "outbox_id IN (
    SELECT min(outbox_id) FROM therev.outbox
     GROUP BY kind, facts -> 0 ->> 'thread_id', facts -> 0 ->> 'author_id', facts -> 0 ->> 'user_id',
              facts -> 0 ->> 'claim_key')";

/// Makes events undelivered again.
async fn again(cluster: &TestCluster, which: &str) {
    for n in 0..cluster.shards() {
        let client = cluster.stranger(&format!("shard_{n}")).await;
        client
            .batch_execute(&format!("UPDATE therev.outbox SET delivered_at = NULL WHERE {which}"))
            .await
            .expect("events wait again");
    }
}

/// Invariant 6.
#[tokio::test]
async fn twice_and_out_of_order_changes_nothing() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let authors = user_per_shard(&node).await;
        let open = thread(&node, authors[0], "first title").await;
        for n in 0..6 {
            post(&node, authors[n % 4], &open, "text").await;
        }
        for name in ["renamed", "renamed-again", "user-2"] {
            let change = UserChange { user_name: Some(name.into()), ..UserChange::default() };
            node.change_user(authors[2], change, &operator()).await.expect("a change of name");
        }
        let title = therev::ThreadChange { title: Some("second title".into()), ..Default::default() };
        node.change_thread(open.thread_id, title, &operator()).await.expect("a change");
        node.relay_once().await.expect("the relay runs");

        again(&cluster, "true").await;
        node.relay_once().await.expect("everything once more");
        cluster.prove().await;

        // The oldest state of every key alone, after the newest has been delivered.
        again(&cluster, FIRST_OF_EACH).await;
        node.relay_once().await.expect("the oldest once more");
        assert_eq!(node.user_named("user-2").await.expect("an answer"), Some(authors[2]));
        assert_eq!(node.user_named("renamed").await.expect("an answer"), None);
        drop(node);
        cluster.finish().await;
    }
}

/// Invariant 7.
#[tokio::test]
async fn an_event_held_back_until_its_row_was_deleted_raises_nothing() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await;
    let open = thread(&node, ada.user_id, "Short-lived").await;
    let written = post(&node, ada.user_id, &open, "text").await;
    node.delete_post(written.post_id, &operator()).await.expect("the post goes");
    node.delete_user(ada.user_id, true, &operator()).await.expect("everything goes");
    node.relay_once().await.expect("the relay runs");
    again(&cluster, FIRST_OF_EACH).await;
    node.relay_once().await.expect("the first events arrive now");
    let listed = node.threads(ThreadOrder::Newest, None, 9, Some(&open.seen)).await.expect("the list");
    assert!(listed.items.is_empty());
    assert!(node.users_by_prefix("", None, 9, Some(&open.seen)).await.expect("the list").items.is_empty());
    assert_eq!(node.user_named("ada").await.expect("an answer"), None);
    drop(node);
    cluster.finish().await;
}

/// What the directory holds of a user and of a thread: whether each is deleted.
const LISTED_AS_DELETED: &str = "
    SELECT (SELECT d.is_deleted FROM user_directory AS d WHERE d.user_id = $1) AS a_user,
           (SELECT d.is_deleted FROM thread_directory AS d WHERE d.thread_id = $2) AS a_thread";

/// Nobody has heard of the row at all until it is deleted: its first event is told for the first time after its last one.
/// Invariant 7.
#[tokio::test]
async fn an_event_first_told_after_that_of_the_deletion_raises_nothing() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { breaker_ms: 50, ..cluster.config() }).await.expect("a node");
    let [bob, ..] = user_per_shard(&node).await;
    let kept = thread(&node, bob, "It stays").await;
    node.relay_once().await.expect("the relay runs");

    reachable(&cluster, "directory", false).await;
    let ada = user(&node, "ada").await;
    let open = thread(&node, ada.user_id, "Short-lived").await;
    assert!(matches!((ada.seen, open.seen), (Seen::Pending(..), Seen::Pending(..))));
    // By hand, so that nobody tells the thread's shard of it either.
    let by_hand = "INSERT INTO posts (author_id, post_id, thread_id, thread_author_id, body)
                   VALUES ($1, $2, $3, $4, 'by hand')";
    let written = PostId::new(ada.user_id);
    let part = format!("shard_{}", ada.user_id.bucket().number() % 4);
    let (shard, other) = (cluster.stranger(&part).await, cluster.stranger("shard_0").await);
    shard.execute(by_hand, &[&ada.user_id.0, &written.0, &kept.thread_id.0, &bob.0]).await.expect("a post");
    // Of each the first event, and nobody has ever been told of it.
    let held_back = format!(
        "UPDATE therev.outbox SET delivered_at = now()
          WHERE kind IN ('user', 'thread', 'contribution') AND first_delivered_at IS NULL AND {FIRST_OF_EACH}"
    );
    assert_eq!(shard.execute(&held_back, &[]).await.expect("they are held back"), 3);
    let participants = "SELECT posts, deleted FROM therev.thread_participants WHERE participant_id = $1";
    assert!(other.query(participants, &[&ada.user_id.0]).await.expect("an answer").is_empty());
    node.delete_post(written, &operator()).await.expect("the post goes");
    node.delete_user(ada.user_id, true, &operator()).await.expect("everything goes");

    reachable(&cluster, "directory", true).await;
    let directory = cluster.stranger("directory").await;
    let until_told = async || {
        while node.relay_once().await.expect("the relay runs").waiting > 0 {
            tokio::task::yield_now().await;
        }
        let listed = directory.query_one(LISTED_AS_DELETED, &[&ada.user_id.0, &open.thread_id.0]).await;
        let listed = listed.expect("an answer");
        let participant = other.query_one(participants, &[&ada.user_id.0]).await.expect("she has taken part");
        let listed: (Option<bool>, Option<bool>) = (listed.get("a_user"), listed.get("a_thread"));
        let participant: (i32, i32) = (participant.get("posts"), participant.get("deleted"));
        (listed, participant)
    };
    let limit = Duration::from_secs(30);
    let deleted = ((Some(true), Some(true)), (0, 1));
    assert_eq!(tokio::time::timeout(limit, until_told()).await.expect("the directory is found"), deleted);
    let never_told = "first_delivered_at IS NULL AND delivered_at IS NOT NULL";
    again(&cluster, never_told).await;
    assert_eq!(tokio::time::timeout(limit, until_told()).await.expect("the first events arrive now"), deleted);
    assert_eq!(node.user_named("ada").await.expect("an answer"), None);
    drop((shard, other, directory, node));
    cluster.finish().await;
}

#[tokio::test]
async fn own_writes_are_visible_while_the_replica_is_behind() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let replica = testkit::connect(&testkit::test_servers().replica).await;
    replica.batch_execute("SELECT pg_wal_replay_pause()").await.expect("the replica stands still");
    let ada = user(&node, "ada").await;
    let open = thread(&node, ada.user_id, "Mine").await;
    assert!(matches!(open.seen, Seen::Position(_)));
    let seen: Seen = open.seen.to_string().parse().expect("a token survives text");
    let own = node.threads(ThreadOrder::Newest, None, 9, Some(&seen)).await;
    let names = node.users_by_prefix("ada", None, 9, Some(&ada.seen)).await;
    replica.batch_execute("SELECT pg_wal_replay_resume()").await.expect("the replica goes on");
    assert_eq!(own.expect("the list").items[0].thread_id, open.thread_id);
    assert_eq!(names.expect("the list").items[0].user_id, ada.user_id);
    drop((node, replica));
    cluster.finish().await;
}

/// Invariant 9.
#[tokio::test]
async fn any_number_of_relays_at_once() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Busy").await;
    let mut config = cluster.config();
    config.delivery_ms = 0;
    let hasty = therev::connect(config).await.expect("a node");
    for n in 0..40 {
        post(&hasty, authors[n % 4], &open, "text").await;
    }
    let relays = (0..4).map(|_| {
        let node = node.clone();
        tokio::spawn(async move { node.relay_once().await })
    });
    for outcome in futures_util::future::join_all(relays).await {
        outcome.expect("no panic").expect("the relay runs");
    }
    node.relay_once().await.expect("what was made meanwhile");
    let listed = node.threads(ThreadOrder::MostActive, None, 1, Some(&open.seen)).await.expect("the list");
    assert_eq!(listed.items[0].post_count, 40);
    drop((node, hasty));
    cluster.finish().await;
}

/// A bucket's outbox is delivered some at a time; the writer's own event is the last one of it.
#[tokio::test]
async fn own_writes_are_visible_behind_many_that_waited() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { delivery_ms: 30_000, ..cluster.config() }).await.expect("a node");
    let [ada, ..] = user_per_shard(&node).await;
    let shard = cluster.stranger("shard_0").await;
    // Names that nobody has are given up, again and again.
    let before = "INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
                  SELECT 'account', $1::smallint, 'claim',
                         jsonb_build_array(jsonb_build_object('claim_key', $2::uuid, 'user_id', $2::uuid,
                                                              'held', false, 'version', 1))
                    FROM generate_series(1, 2500)";
    shard.execute(before, &[&ada.bucket().sql(), &ada.0]).await.expect("events");
    let open = thread(&node, ada, "Behind all of them").await;
    assert!(matches!(open.seen, Seen::Position(_)), "{:?}", open.seen);
    let listed = node.threads(ThreadOrder::Newest, None, 9, Some(&open.seen)).await.expect("the list");
    assert_eq!(listed.items.first().map(|card| card.thread_id), Some(open.thread_id));
    drop((shard, node));
    cluster.finish().await;
}

#[tokio::test]
async fn what_writers_have_delivered_is_marked_without_a_relay() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    // An event for each post: of one thread several would be one.
    let open = join_all((0..30).map(|_| thread(&node, ada, "Busy"))).await;
    for _ in 0..10 {
        join_all(open.iter().map(|open| post(&node, bob, open, "text"))).await;
    }
    let shard = cluster.stranger("shard_1").await;
    let marked = "SELECT count(*) FROM therev.outbox WHERE kind = 'contribution' AND delivered_at IS NOT NULL";
    let wait = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while shard.query_one(marked, &[]).await.expect("a count").get::<_, i64>(0) < 200 {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("they are marked");
    drop((shard, node));
    cluster.finish().await;
}

/// A post by hand may name a thread that is nowhere: of that nobody will ever tell the directory, and nothing waits for it.
#[tokio::test]
async fn totals_of_a_thread_that_is_nowhere_are_delivered() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let (nowhere, id) = (ThreadId::new(ada), PostId::new(bob));
    let shard = cluster.stranger("shard_1").await;
    let by_hand = "INSERT INTO posts (author_id, post_id, thread_id, thread_author_id, body)
                   VALUES ($1, $2, $3, $4, 'by hand')";
    shard.execute(by_hand, &[&bob.0, &id.0, &nowhere.0, &ada.0]).await.expect("a post");
    let relayed = node.relay_once().await.expect("the relay runs");
    assert_eq!((relayed.waiting, relayed.delivered.get("totals")), (0, Some(&1)), "{relayed:?}");
    // Should it come to be after all (somebody restores posts before threads), the directory hears what it has.
    let open = NewThread { thread_id: Some(nowhere), ..NewThread::new(ada, "late", "here by now") };
    node.create_thread(open).await.expect("a thread");
    node.relay_once().await.expect("the relay runs");
    assert_eq!(node.thread(nowhere).await.expect("the thread").post_count, 1);
    drop((shard, node));
    cluster.finish().await;
}

/// A write's events stay where it was written: a reader who has its token sees it, also when the bucket has moved since.
#[tokio::test]
async fn what_is_pending_is_found_after_a_move() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { breaker_ms: 50, ..cluster.config() }).await.expect("a node");
    let [ada, ..] = user_per_shard(&node).await;
    reachable(&cluster, "directory", false).await;
    let open = thread(&node, ada, "Pending").await;
    assert!(matches!(open.seen, Seen::Pending(..)), "{:?}", open.seen);
    // Held at its switch: the events are told before anything is removed.
    let mover = Mover::new(node.shards().clone(), Options { budget: Duration::from_secs(1), ..Options::default() });
    let (groups, buckets) = (Group::ALL.to_vec(), vec![ada.bucket()]);
    let there = Request { groups, buckets, pin: None, source: ShardNo(0), target: ShardNo(1) };
    let plan = mover.plan(&there).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(mover.drive(begun, &|_| {})).await.expect("it moves").state, State::Switched);
    assert_eq!(node.thread(open.thread_id).await.expect("it is found").title, "Pending");
    reachable(&cluster, "directory", true).await;
    let found = async {
        loop {
            match node.threads(ThreadOrder::Newest, None, 9, Some(&open.seen)).await {
                Ok(list) => return list.items,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(30), found).await.expect("the directory is found");
    assert_eq!(found.iter().map(|card| card.thread_id).collect::<Vec<_>>(), [open.thread_id]);
    mover.want(begun, Goal::Done).await.expect("it can be finished");
    assert_eq!(Box::pin(drive(&node, &mover, begun)).await.state, State::Done);
    drop((mover, node));
    cluster.finish().await;
}
