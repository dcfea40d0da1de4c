//! What tests make again and again.

use std::time::Duration;
use testkit::TestCluster;
use therev::relocation::Mover;
use therev::{Actor, Bucket, NewPost, NewThread, NewUser, Post, Therev, Thread, User, UserId, Written};
use tokio_postgres::Client;

/// Somebody at the command line.
pub(crate) fn operator() -> Actor {
    Actor::Operator("test".into())
}

/// A user of this name, whose id is on any shard.
pub(crate) async fn user(node: &Therev, name: &str) -> Written<User> {
    let new = NewUser { user_name: name.into(), first_name: Some(name.to_uppercase()), ..NewUser::default() };
    node.register(new, &operator()).await.expect("the user is registered")
}

/// Users whose buckets are on four different shards of four (`bucket mod 4`), in the order of the shards.
pub(crate) async fn user_per_shard(node: &Therev) -> [UserId; 4] {
    let mut ids = [None; 4];
    while ids.iter().any(Option::is_none) {
        let id = UserId::new();
        ids[usize::from(id.bucket().number()) % 4].get_or_insert(id);
    }
    let ids = ids.map(|id| id.expect("all are found"));
    for (n, id) in ids.iter().enumerate() {
        let new = NewUser { user_id: Some(*id), user_name: format!("user-{n}"), ..NewUser::default() };
        node.register(new, &operator()).await.expect("the user is registered");
    }
    ids
}

/// A thread of an author.
pub(crate) async fn thread(node: &Therev, author: UserId, title: &str) -> Written<Thread> {
    node.create_thread(NewThread::new(author, title, "body")).await.expect("the thread is opened")
}

/// A reply to a thread.
pub(crate) async fn post(node: &Therev, author: UserId, thread: &Thread, body: &str) -> Post {
    node.create_post(NewPost::new(author, thread.thread_id, body)).await.expect("the post is written")
}

/// The same, to be brought in with many others.
pub(crate) fn bulk_post(thread: &therev::Thread, author: therev::UserId) -> therev::bulk::BulkPost {
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

/// Waits until somebody waits for a lock in this database.
///
/// Not asked through a transaction of its own: that would see the same activity all the while.
pub(crate) async fn until_somebody_waits(client: &Client) {
    let waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database() LIMIT 1";
    let wait = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while client.query_opt(waits, &[]).await.expect("the activity is read").is_none() {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("somebody waits");
}

/// A worker that slept in the first step until a relocation of this bucket from shard 0 to 2 was over begins it.
pub(crate) async fn begun_by_a_sleeper(cluster: &TestCluster, mover: &Mover, number: i64, bucket: Bucket) {
    let tag = mover.show(number).await.expect("it is known").tag;
    let source = "SELECT therev.begin_part($1, $2, 'source', 2::smallint, '{account,content}', ARRAY[$3::smallint], '{}', NULL, '[]')";
    let target = "SELECT therev.begin_part($1, $2, 'target', 0::smallint, '{account,content}', ARRAY[$3::smallint], '{1,1}', NULL, $4)";
    let apart = cluster.stranger("shard_0").await.query_one(source, &[&number, &tag, &bucket.sql()]).await;
    let apart: serde_json::Value = apart.expect("a part begins").get(0);
    let begun = cluster.stranger("shard_2").await.query(target, &[&number, &tag, &bucket.sql(), &apart]).await;
    begun.expect("a part begins");
}
