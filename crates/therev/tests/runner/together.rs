//! Posts that come at once and are written together.

use crate::things::{thread, until_somebody_waits, user};
use futures_util::future::{join, join_all};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use testkit::{At, Mode, TestCluster, drive};
use therev::relocation::{Goal, Mover, Options, Relocation, Request, State};
use therev::{Bucket, Config, Error, Group, Layout, Map, NewPost, Post, PostId, ShardNo, Therev, Thread, UserId};
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
        let (mut shown, mut after) = (0, None);
        loop {
            let page = node.thread_page(open.thread_id, after, 1_000).await.expect("the page");
            assert!(!page.partial);
            shown += page.posts.len();
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        assert_eq!(shown, written.len());
        for some in written.chunks(64) {
            let found = join_all(some.iter().map(|post| node.post(post.post_id))).await;
            for (post, found) in some.iter().zip(found) {
                assert_eq!(found.expect("it is there"), *post);
            }
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
    for at in [At::HalfRequest, At::NoAnswer, At::HalfAnswer, At::Panic] {
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

/// Moves everything of some buckets, or of one user of them, by a node of its own.
async fn moved(cluster: &TestCluster, request: &Request, goal: Goal) -> (Therev, Mover, Relocation) {
    let node = cluster.node().await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let plan = mover.plan(request).await.expect("a plan");
    let number = mover.begin(&plan, goal, "test").await.expect("it begins").relocation;
    let moved = Box::pin(drive(&node, &mover, number)).await;
    (node, mover, moved)
}

/// A node that has not heard who is placed apart, and then not that he is back: that one's post goes after its author, the others'
/// where they were sent. Invariants 10 and 22.
#[tokio::test]
async fn one_who_is_placed_apart_goes_elsewhere() {
    let busy = Busy::new(TestCluster::colocated().await).await;
    // The last of a shard, for which two are under way by then.
    let pinned = busy.authors[AUTHORS - 1];
    let home = Layout::Colocated.first_shard(Group::Content, pinned.bucket(), 4);
    let away = ShardNo((home.0 + 1) % 4);
    let mut written = Vec::new();
    for (source, target) in [(home, away), (away, home)] {
        let (groups, buckets) = (Group::ALL.to_vec(), vec![pinned.bucket()]);
        let request = Request { groups, buckets, pin: Some(pinned), source, target };
        let (_, _, moved) = Box::pin(moved(&busy.cluster, &request, Goal::Done)).await;
        assert_eq!(moved.state, State::Done);
        let posts = busy.new_posts();
        written.extend(all_written(&posts, write_all(&busy.node, &posts).await));
        let last = written.last().expect("his").post_id;
        assert_eq!(busy.node.where_id(last.0).await.expect("a place").shard, target);
    }
    busy.finish(written).await;
}

/// What goes together is written while the buckets of half of its authors change their shard: nobody is told of it, and nothing is
/// lost or doubled. Invariants 10, 14 and 15.
#[tokio::test]
async fn a_switch_under_many_posts_loses_and_doubles_none() {
    let busy = Busy::new(TestCluster::new(Layout::Colocated, 2).await).await;
    let is_on_0 = |bucket: &Bucket| Layout::Colocated.first_shard(Group::Content, *bucket, 2) == ShardNo(0);
    let mut buckets: Vec<Bucket> = busy.authors.iter().map(|author| author.bucket()).filter(is_on_0).collect();
    buckets.sort_unstable();
    buckets.dedup();
    let (groups, source, target) = (Group::ALL.to_vec(), ShardNo(0), ShardNo(1));
    let request = Request { groups, buckets, pin: None, source, target };
    let over = AtomicBool::new(false);
    let moving = async {
        let moved = Box::pin(moved(&busy.cluster, &request, Goal::Switched)).await;
        over.store(true, Ordering::Relaxed);
        moved
    };
    let writing = async {
        let mut written = Vec::new();
        // In bursts: whoever moves the rows has a turn on a busy machine, too.
        let mut bursts = tokio::time::interval(Duration::from_millis(50));
        while !over.load(Ordering::Relaxed) {
            bursts.tick().await;
            let posts = busy.new_posts();
            written.extend(all_written(&posts, write_all(&busy.node, &posts).await));
        }
        written
    };
    let ((node, mover, moved), written) = join(moving, writing).await;
    assert_eq!(moved.state, State::Switched);
    mover.finish(moved.relocation).await.expect("no way back is wanted");
    assert_eq!(Box::pin(drive(&node, &mover, moved.relocation)).await.state, State::Done);
    drop((mover, node));
    busy.finish(written).await;
}
