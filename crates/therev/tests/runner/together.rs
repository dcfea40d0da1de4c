//! Posts that come at once and are written together.

use crate::things::{thread, until_somebody_waits, user};
use futures_util::future::{join, join_all};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use testkit::{At, Mode, TestCluster};
use therev::{Config, Error, Layout, Map, NewPost, Post, PostId, Therev, Thread, UserId};
use tokio::sync::Notify;
use tokio_postgres::Client;

/// Who writes at once, more than go together.
const AUTHORS: usize = 60;

struct Busy {
    cluster: TestCluster,
    node: Therev,
    authors: Vec<UserId>,
    open: Thread,
}

impl Busy {
    async fn new(cluster: TestCluster) -> Busy {
        let node = cluster.node().await;
        let mut authors = Vec::new();
        for n in 0..AUTHORS {
            authors.push(user(&node, &format!("user-{n}")).await.user_id);
        }
        let open = thread(&node, authors[0], "All at once").await.value;
        Busy { cluster, node, authors, open }
    }

    async fn one_shard() -> Busy {
        Busy::new(TestCluster::new(Layout::Colocated, 1).await).await
    }

    /// A post of each author, each of a text of its own.
    fn new_posts(&self) -> Vec<NewPost> {
        let of = |(n, author): (usize, &UserId)| NewPost {
            post_id: Some(PostId::new(*author)),
            ..NewPost::new(*author, self.open.thread_id, format!("text {n}"))
        };
        self.authors.iter().enumerate().map(of).collect()
    }

    /// Everybody has the own post, once; the thread shows all of them, and nothing contradicts itself.
    async fn finish(self, written: Vec<Post>) {
        let Busy { cluster, node, open, .. } = self;
        // Whose answer was lost has delivered nothing.
        node.relay_once().await.expect("the relay runs");
        let page = node.thread_page(open.thread_id, None, 200).await.expect("the page");
        assert_eq!((page.posts.len(), page.partial), (written.len(), false));
        for post in written {
            assert_eq!(node.post(post.post_id).await.expect("it is there"), post);
        }
        drop(node);
        cluster.finish().await;
    }
}

async fn write_all(node: &Therev, posts: &[NewPost]) -> Vec<Result<Post, Error>> {
    join_all(posts.iter().map(|new| node.create_post(new.clone()))).await
}

fn all_written(posts: &[NewPost], written: Vec<Result<Post, Error>>) -> Vec<Post> {
    let written: Vec<Post> = written.into_iter().map(|post| post.expect("the post is written")).collect();
    for (new, post) in posts.iter().zip(&written) {
        assert_eq!((Some(post.post_id), post.body.as_ref()), (new.post_id, Some(&new.body)));
    }
    written
}

/// Writes a post whose connection broke before, as its caller would.
async fn again(node: &Therev, new: NewPost) -> Post {
    let written = async {
        loop {
            if let Ok(post) = node.create_post(new.clone()).await {
                return post;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), written).await.expect("the shard is there")
}

/// How many transactions wrote the posts of a shard.
async fn transactions(client: &Client) -> i64 {
    let row = client.query_one("SELECT count(DISTINCT xmin::text) FROM posts", &[]).await;
    row.expect("posts are counted").get(0)
}

#[tokio::test]
async fn each_of_many_writers_gets_the_own_post() {
    let busy = Busy::one_shard().await;
    let posts = busy.new_posts();
    let written = all_written(&posts, write_all(&busy.node, &posts).await);
    let shard = busy.cluster.stranger("shard_0").await;
    let transactions = transactions(&shard).await;
    assert!(transactions < 40, "{transactions} transactions for {AUTHORS} posts");
    assert_eq!(all_written(&posts, write_all(&busy.node, &posts).await), written, "the same again");
    drop(shard);
    busy.finish(written).await;
}

/// Two posts of one author in one thread are one contribution, whether they go together or not.
#[tokio::test]
async fn what_one_author_writes_at_once_adds_up() {
    let busy = Busy::one_shard().await;
    let ada = busy.authors[0];
    let posts: Vec<NewPost> = (0..AUTHORS)
        .map(|n| NewPost {
            post_id: Some(PostId::new(ada)),
            ..NewPost::new(ada, busy.open.thread_id, format!("text {n}"))
        })
        .collect();
    let written = all_written(&posts, write_all(&busy.node, &posts).await);
    let shard = busy.cluster.stranger("shard_0").await;
    let told = shard.query_one("SELECT posts::bigint FROM therev.thread_contributions", &[]).await.expect("one");
    assert_eq!(told.get::<_, i64>(0), 60);
    drop(shard);
    busy.finish(written).await;
}

/// Invariants 3 and 5.
#[tokio::test]
async fn a_lost_node_finds_the_way_for_all_of_them() {
    let busy = Busy::new(TestCluster::colocated().await).await;
    let mut written = Vec::new();
    for map in [Map::first(Layout::Colocated, 2), Map::first(Layout::Colocated, 1)] {
        busy.node.shards().forget_placement(map);
        let posts = busy.new_posts();
        written.extend(all_written(&posts, write_all(&busy.node, &posts).await));
    }
    busy.finish(written).await;
}

#[tokio::test]
async fn one_that_cannot_be_written_takes_nobody_along() {
    let busy = Busy::one_shard().await;
    let mut posts = busy.new_posts();
    let taken = busy.node.create_post(posts[7].clone()).await.expect("the first of this id");
    posts[7].body = "another text".into();
    posts[9].body = "a NUL \0 is no text".into();
    // The same twice in one statement.
    posts.push(posts[AUTHORS - 1].clone());
    let (mut rest, mut refused) = (Vec::new(), Vec::new());
    for (at, answer) in write_all(&busy.node, &posts).await.into_iter().enumerate() {
        match answer {
            Ok(post) => rest.push(post),
            Err(error) => refused.push((at, error)),
        }
    }
    let [(7, Error::Conflict { .. }), (9, _)] = refused[..] else { panic!("{refused:?}") };
    assert_eq!(rest.len(), AUTHORS - 1);
    assert_eq!(rest.pop().as_ref(), rest.last(), "both have the same post");
    rest.push(taken);
    let shard = busy.cluster.stranger("shard_0").await;
    let transactions = transactions(&shard).await;
    assert!(transactions < 40, "{transactions} transactions for {AUTHORS} posts");
    drop(shard);
    busy.finish(rest).await;
}

/// Of callers who leave, those whose post has not been sent yet leave no trace, and no place is kept for any of them.
#[tokio::test]
async fn callers_who_leave_keep_nobody_waiting() {
    let busy = Busy::one_shard().await;
    for moments in 0..20 {
        let left = busy.new_posts();
        let leaves = async {
            for _ in 0..moments * 4 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            _ = write_all(&busy.node, &left) => (),
            () = leaves => (),
        }
    }
    let posts = busy.new_posts();
    all_written(&posts, write_all(&busy.node, &posts).await);
    let Busy { cluster, node, .. } = busy;
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn a_writer_who_waits_for_a_lock_holds_nobody_else_up() {
    let busy = Busy::one_shard().await;
    let (ada, open) = (busy.authors[0], busy.open.thread_id);
    let first = busy.node.create_post(NewPost::new(ada, open, "hers")).await.expect("her contribution");
    let (mut holder, watcher) = (busy.cluster.stranger("shard_0").await, busy.cluster.stranger("shard_0").await);
    let held = holder.transaction().await.expect("a transaction");
    held.execute("SELECT FROM therev.thread_contributions FOR UPDATE", &[]).await.expect("the lock");
    // Some of hers go alone, as many as may be under way before others gather, and some with others' in one statement. Fewer than the
    // node has connections: each of them waits on one.
    let mut posts = busy.new_posts();
    for n in 0..3 {
        posts.insert(n * 12, NewPost { post_id: Some(PostId::new(ada)), ..posts[0].clone() });
    }
    let (left, others_are_done) = (AtomicUsize::new(AUTHORS - 1), Notify::new());
    let written = join_all(posts.iter().map(async |new| {
        let post = busy.node.create_post(new.clone()).await;
        if new.author_id != ada && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            others_are_done.notify_one();
        }
        post
    }));
    let freed = async {
        others_are_done.notified().await;
        until_somebody_waits(&watcher).await;
        held.rollback().await.expect("the lock is gone");
    };
    let (written, ()) = join(written, freed).await;
    let mut written = all_written(&posts, written);
    written.push(first);
    drop((holder, watcher));
    busy.finish(written).await;
}

/// Whether they were written nobody has heard; each finds out by its own id.
#[tokio::test]
async fn a_connection_that_breaks_under_many_posts_doubles_and_loses_none() {
    let busy = Busy::one_shard().await;
    let proxy = busy.cluster.proxy(0).await;
    let node = therev::connect(Config { breaker_ms: 20, ..busy.cluster.config() }).await.expect("a node");
    let mut written = Vec::new();
    for at in [At::HalfRequest, At::NoAnswer, At::HalfAnswer] {
        let posts = busy.new_posts();
        // What only the statement of many says of a post.
        proxy.set(Mode::Break(b"\"thread_author_id\"", at));
        let answers = write_all(&node, &posts).await;
        proxy.set(Mode::Pass);
        let mut lost = 0;
        for (new, answer) in posts.into_iter().zip(answers) {
            written.push(match answer {
                Ok(post) => post,
                Err(error) => {
                    lost += 1;
                    assert!(matches!(error, Error::Store(_)), "{error}");
                    again(&node, new).await
                }
            });
        }
        assert!(lost < AUTHORS / 2, "{lost} did not find out by themselves");
    }
    drop(node);
    busy.finish(written).await;
    drop(proxy);
}
