//! Posts and threads, created again and deleted by the hundred.

use crate::things::{bulk_post, operator, post, thread, user_per_shard};
use futures_util::future::join_all;
use serde_json::{Value, json};
use testkit::TestCluster;
use therev::{Error, NewPost, NewThread, NewUser, Parent, PostChange, PostId, ThreadChange, ThreadId, UserId};

/// Of two unique indexes the older one is looked at first: which that is, a REINDEX changes.
#[tokio::test]
async fn a_create_again_is_the_same_whichever_index_refuses_it() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let opened = NewThread { thread_id: Some(ThreadId::new(ada)), ..NewThread::new(ada, "Once", "body") };
    let open = node.create_thread(opened.clone()).await.expect("a thread");
    let written = NewPost { post_id: Some(PostId::new(ada)), ..NewPost::new(ada, open.thread_id, "once") };
    let first = node.create_post(written.clone()).await.expect("a post");
    let shard = cluster.stranger("shard_0").await;
    for index in ["posts_pkey", "threads_pkey"] {
        shard.batch_execute(&format!("REINDEX INDEX CONCURRENTLY {index}")).await.expect("a new index");
    }
    assert_eq!(node.create_post(written).await.expect("the same post"), first);
    assert_eq!(node.create_thread(opened).await.expect("the same thread").thread_id, open.thread_id);
    // The same id with the same text by somebody else of her bucket is not her post.
    let neighbour = std::iter::repeat_with(UserId::new).find(|id| id.bucket() == ada.bucket()).expect("one of many");
    let new = NewUser { user_id: Some(neighbour), user_name: "neighbour".into(), ..NewUser::default() };
    node.register(new, &operator()).await.expect("registered");
    // Nor is it the same under another post, whatever has become of it since.
    let moderated = PostChange { is_pinned: Some(true), ..PostChange::default() };
    node.change_post(first.post_id, moderated, &operator()).await.expect("pinned");
    let parent = Some(Parent { post_id: PostId::new(ada), author_id: ada });
    let elsewhere = NewPost { post_id: Some(first.post_id), parent, ..NewPost::new(ada, open.thread_id, "once") };
    assert!(matches!(node.create_post(elsewhere).await, Err(Error::Conflict { .. })));
    let hers = NewPost { post_id: Some(first.post_id), ..NewPost::new(neighbour, open.thread_id, "once") };
    assert!(matches!(node.create_post(hers).await, Err(Error::Conflict { .. })));
    drop((shard, node));
    cluster.finish().await;
}

/// More than one look at an author's content shows.
#[tokio::test]
async fn a_user_goes_with_hundreds_of_posts() {
    const POSTS: usize = 520;
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Flooded").await;
    for _ in 0..POSTS / 40 {
        join_all((0..40).map(|_| post(&node, bob, &open, "text"))).await;
    }
    post(&node, ada, &open, "stays").await;
    let gone = node.delete_user(bob, true, &operator()).await.expect("deleted");
    assert_eq!((gone.posts, gone.threads), (520, 0));
    assert_eq!(node.posts_by_author(bob, None, 9).await.expect("a list"), []);
    drop(node);
    cluster.finish().await;
}

/// Contributions that others have begun, that an earlier batch has, and that begin with a batch, of posts some of which are there
/// already: all of them add up.
#[tokio::test]
async fn posts_in_bulk_add_to_what_is_there() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Half full").await;
    for author in &authors[..2] {
        post(&node, *author, &open, "by hand").await;
    }
    let batch = || authors.map(|author| bulk_post(&open, author)).to_vec();
    let (first, second) = (batch(), batch());
    for rows in [vec![&first], vec![&first, &second], vec![&second, &batch()]] {
        let mut writer = node.bulk_writer();
        for rows in rows {
            writer.posts("posts", rows.clone()).await.expect("they are on their way");
        }
        writer.finish().await.expect("they are written");
        assert_eq!(writer.written(), 4, "of each author one that was not there");
    }
    let page = node.thread_page(open.thread_id, None, 50).await.expect("the page");
    assert_eq!((page.posts.len(), page.partial), (14, false));
    drop(node);
    cluster.finish().await;
}

/// As it was written it is read, and what nobody could read or show is refused.
#[tokio::test]
async fn metadata_comes_back_as_it_was_given() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Numbers").await.thread_id;
    let with = |metadata: &Value| NewPost { metadata: Some(metadata.clone()), ..NewPost::new(ada, open, "text") };
    let deep = |levels: usize| (1..levels).fold(json!({}), |inner, _| json!({ "in": inner }));
    for metadata in [
        json!({ "big": [f64::MAX, f64::MIN, 1.797_693_134_862_315_5e308], "small": [f64::MIN_POSITIVE, 5e-324, -0.1] }),
        json!({ "whole": [u64::MAX, i64::MIN, 0] }),
        deep(127),
    ] {
        let post = node.create_post(with(&metadata)).await.expect("a post");
        assert_eq!(node.post(post.post_id).await.expect("it is read").metadata, metadata);
    }
    assert_eq!(node.thread_page(open, None, 50).await.expect("a page").posts.len(), 3);
    for metadata in [deep(128), json!({ "long": "x".repeat(70_000) }), json!({ "nul": "\0" }), json!([])] {
        let refused = node.create_post(with(&metadata)).await;
        assert!(matches!(refused, Err(Error::Invalid { field: "metadata", .. })), "{refused:?}");
    }
    for refused in [
        node.thread_page(open, None, 0).await.map(drop),
        node.posts_by_author(ada, None, -1).await.map(drop),
        node.audit(None, 0).await.map(drop),
    ] {
        assert!(matches!(refused, Err(Error::Invalid { field: "limit", .. })), "{refused:?}");
    }
    drop(node);
    cluster.finish().await;
}

/// The audit outlives what was written, and holds none of it.
#[tokio::test]
async fn the_audit_holds_no_words() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user_per_shard(&node).await[1];
        let open = thread(&node, ada, "Before").await;
        let written = post(&node, ada, &open, "before").await;
        let change = ThreadChange { title: Some("secret".into()), is_locked: Some(true), ..ThreadChange::default() };
        node.change_thread(open.thread_id, change, &operator()).await.expect("changed");
        let change = PostChange { body: Some("secret".into()), is_pinned: Some(true), ..PostChange::default() };
        node.change_post(written.post_id, change, &operator()).await.expect("changed");
        node.relay_once().await.expect("the relay runs");
        let noted: Vec<(Value, Value)> = node
            .audit(Some(ada), 9)
            .await
            .expect("the audit")
            .entries
            .into_iter()
            .filter(|entry| entry.action.starts_with("change "))
            .map(|entry| (entry.before, entry.after))
            .collect();
        let of_post = (json!({ "is_pinned": false }), json!({ "is_pinned": true, "changed": ["body"] }));
        let of_thread = (json!({ "is_locked": false }), json!({ "is_locked": true, "changed": ["title"] }));
        assert_eq!(noted, [of_post, of_thread]);
        drop(node);
        cluster.finish().await;
    }
}

/// A month without its partition is the operator's affair, no fault of the value; a node sees to the months to come.
#[tokio::test]
async fn a_month_without_partition_is_no_bad_input() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let on_shard_0 = || std::iter::repeat_with(UserId::new).find(|id| id.bucket().number().is_multiple_of(4));
    let new = |name: &str| NewUser { user_id: on_shard_0(), user_name: name.into(), ..NewUser::default() };
    let shard = cluster.stranger("shard_0").await;
    let month = "SELECT 'audit_log' || to_char(now() AT TIME ZONE 'UTC', '_YYYY_MM')";
    let month: String = shard.query_one(month, &[]).await.expect("a name").get(0);
    shard.batch_execute(&format!("DROP TABLE {month}")).await.expect("it is gone");
    let refused = node.register(new("ada"), &operator()).await;
    assert!(matches!(refused, Err(Error::Store(_))), "{refused:?}");
    shard.batch_execute("SET ROLE therev; SELECT therev.make_partitions(3)").await.expect("any node may");
    node.register(new("bob"), &operator()).await.expect("registered");
    drop((shard, node));
    cluster.finish().await;
}
