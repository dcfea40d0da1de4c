//! Nodes whose placement is wrong, and ownership that changes under writers.

use crate::things::{operator, post, thread, user_per_shard};
use futures_util::future::join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use testkit::TestCluster;
use therev::{Actor, Bucket, Error, Group, Map, NewPost, Place, PostChange, ShardNo, Therev, ThreadOrder};

/// A node that believes every bucket to be on a shard where it is not.
fn all_wrong(node: &Therev) -> Map {
    let mut map = Map::clone(&node.shards().map());
    for group in Group::ALL {
        for bucket in Bucket::all() {
            let place = map.place(group, bucket);
            let wrong = Place { shard: ShardNo((place.shard.0 + 1) % 4), epoch: place.epoch };
            map.learn(group, bucket, wrong);
        }
    }
    map
}

#[tokio::test]
async fn a_wrong_or_empty_placement_answers_everything_rightly() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let authors = user_per_shard(&node).await;
        let open = thread(&node, authors[0], "Found all the same").await;
        for author in authors {
            post(&node, author, &open, "a post").await;
        }
        // None: what a node of another shard count would guess first. Wrong: everything one shard off.
        for map in [Map::first(layout, 2), all_wrong(&node)] {
            let lost = cluster.node().await;
            lost.shards().forget_placement(map.clone());
            assert_eq!(lost.user(authors[2]).await.expect("found").user_id, authors[2]);
            assert_eq!(lost.users(&authors).await.expect("all are found").len(), 4);
            let page = lost.thread_page(open.thread_id, None, 50).await.expect("the page");
            assert!(!page.partial);
            let before = page.posts.len();
            lost.shards().forget_placement(map.clone());
            let written = post(&lost, authors[3], &open, "by a lost node").await;
            lost.shards().forget_placement(map.clone());
            lost.change_post(
                written.post_id,
                PostChange { is_pinned: Some(true), ..PostChange::default() },
                &operator(),
            )
            .await
            .expect("a change");
            lost.shards().forget_placement(map.clone());
            assert_eq!(lost.thread_page(open.thread_id, None, 50).await.expect("the page").posts.len(), before + 1);
            lost.shards().forget_placement(map.clone());
            assert!(lost.where_name("user-1").await.expect("found").exists);
            assert!(matches!(lost.user(therev::UserId::new()).await, Err(Error::NotFound { .. })));
            lost.shards().forget_placement(map);
            let rows = (0..40).map(|n| bulk_post(&open, authors[n % 4])).collect();
            let mut writer = lost.bulk_writer();
            writer.posts("posts", rows).await.expect("a bulk write");
            writer.finish().await.expect("a bulk write");
            assert_eq!(writer.written(), 40);
        }
        drop(node);
        cluster.finish().await;
    }
}

/// Invariant 4.
#[tokio::test]
async fn an_epoch_never_falls() {
    let cluster = TestCluster::colocated().await;
    let mut shard = cluster.stranger("shard_0").await;
    let changed = shard.transaction().await.expect("a transaction");
    let set = "UPDATE therev.ownership SET epoch = $1 WHERE colocation_group = 'content' AND bucket = 8";
    assert_eq!(changed.execute(set, &[&7_i64]).await.expect("it grows"), 1);
    let refused = changed.execute(set, &[&6_i64]).await.expect_err("it does not fall");
    assert!(refused.as_db_error().is_some_and(|e| e.message().contains("may not fall from 7 to 6")), "{refused:?}");
    changed.rollback().await.expect("as it was");
    drop(shard);
    cluster.finish().await;
}

fn bulk_post(thread: &therev::Thread, author: therev::UserId) -> therev::bulk::BulkPost {
    therev::bulk::BulkPost {
        post_id: therev::PostId::new(author),
        author_id: author,
        thread_id: thread.thread_id,
        thread_author_id: thread.author_id,
        parent: None,
        body: "one of many".into(),
        format: therev::Format::Plain,
        score: 0,
        metadata: serde_json::json!({}),
        created_at: chrono::DateTime::UNIX_EPOCH,
    }
}

/// Ownership is taken away and given back, as by switches that are backed out, while writers update rows: a row that
/// exists is never «not found», and no acknowledged update is lost.
/// Invariant 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_exists_is_never_not_found() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[1], "Contended").await;
    let target = post(&node, authors[0], &open, "0").await;
    let stop = Arc::new(AtomicBool::new(false));
    let flips = Arc::new(AtomicU64::new(0));

    let saboteur = {
        let (stop, flips, client) = (stop.clone(), flips.clone(), cluster.stranger("shard_0").await);
        let bucket = authors[0].bucket().sql();
        tokio::spawn(async move {
            let mark = "UPDATE therev.ownership SET state = $2::text::therev.ownership_state
                         WHERE colocation_group = 'content' AND bucket = $1";
            let mark = client.prepare(mark).await.expect("the mark is prepared");
            while !stop.load(Ordering::Relaxed) {
                for state in ["draining", "owned"] {
                    client.execute(&mark, &[&bucket, &state]).await.expect("the state changes");
                }
                flips.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let writers = (0..4).map(|writer| {
        let node = node.clone();
        let (actor, id, flips) = (Actor::User(authors[0]), target.post_id, flips.clone());
        tokio::spawn(async move {
            let mut acknowledged = 0;
            while flips.load(Ordering::Relaxed) < 100 {
                let change = PostChange { body: Some(format!("{writer}-{acknowledged}")), ..PostChange::default() };
                node.change_post(id, change, &actor).await.expect("the row exists");
                node.post(id).await.expect("the row exists");
                acknowledged += 1;
            }
            acknowledged
        })
    });
    let acknowledged: i64 = join_all(writers).await.into_iter().map(|n| n.expect("no writer failed")).sum();
    stop.store(true, Ordering::Relaxed);
    saboteur.await.expect("the saboteur ends");
    let version = node.post(target.post_id).await.expect("the row exists").version;
    assert_eq!(version - target.version, acknowledged, "every acknowledged update counted once");
    drop(node);
    cluster.finish().await;
}

/// A bucket that has moved: the old owner points the way, and lists, pages and batches follow.
#[tokio::test]
async fn a_moved_bucket_is_followed() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let bucket = authors[0].bucket();
    // Nothing of this bucket exists yet but the user, so that moving it is a matter of marks and one row.
    let (old, new) = (cluster.stranger("shard_0").await, cluster.stranger("shard_2").await);
    let row = old
        .query_one("SELECT to_jsonb(u) FROM users AS u WHERE user_id = $1", &[&authors[0].0])
        .await
        .expect("the user's row");
    let user: serde_json::Value = row.get(0);
    new.execute(
        "INSERT INTO therev.ownership (colocation_group, bucket, state, epoch) VALUES ('account', $1, 'owned', 2)
         ON CONFLICT (colocation_group, bucket) DO UPDATE SET state = 'owned', peer = NULL, epoch = 2",
        &[&bucket.sql()],
    )
    .await
    .expect("the new owner");
    new.batch_execute("SET session_replication_role = replica").await.expect("rows that only change their place");
    new.execute("INSERT INTO users SELECT * FROM jsonb_populate_record(NULL::users, $1)", &[&user])
        .await
        .expect("the row at its new place");
    old.batch_execute("SET session_replication_role = replica").await.expect("rows that only change their place");
    old.execute("DELETE FROM users WHERE user_id = $1", &[&authors[0].0]).await.expect("the old row goes");
    old.execute("DELETE FROM audit_log WHERE user_id = $1", &[&authors[0].0]).await.expect("its audit too");
    old.batch_execute("SET session_replication_role = origin").await.expect("back to normal");
    old.execute(
        "UPDATE therev.ownership SET state = 'moved', peer = 2, epoch = 2
          WHERE colocation_group = 'account' AND bucket = $1",
        &[&bucket.sql()],
    )
    .await
    .expect("the old owner points the way");

    assert_eq!(node.user(authors[0]).await.expect("followed").user_id, authors[0]);
    assert_eq!(node.users(&authors).await.expect("followed").len(), 4);
    assert_eq!(node.where_id(authors[0].0).await.expect("followed").shard, ShardNo(2));
    let open = node.create_thread(therev::NewThread::new(authors[0], "Elsewhere", "text")).await.expect("followed");
    node.create_post(NewPost::new(authors[0], open.thread_id, "text")).await.expect("content stayed");
    node.threads(ThreadOrder::Newest, None, 5, Some(&open.seen)).await.expect("the list");
    let control = cluster.stranger("control").await;
    control
        .execute(
            "UPDATE therev.placement SET shard = 2, epoch = 2 WHERE colocation_group = 'account' AND bucket = $1",
            &[&bucket.sql()],
        )
        .await
        .expect("the control database hears of it");
    drop((node, old, new, control));
    cluster.finish().await;
}
