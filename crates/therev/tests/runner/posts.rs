//! Posts and threads, created again and deleted by the hundred.

use crate::things::{bulk_post, operator, post, thread, user_per_shard};
use futures_util::future::join_all;
use testkit::TestCluster;
use therev::{Error, NewPost, NewThread, NewUser, PostId, ThreadId, UserId};

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
