//! Connections that end at the worst moment: whoever asks again with the same id finds out what was done.

use std::time::{Duration, Instant};
use testkit::{At, Mode, Proxy, TestCluster};
use therev::generate::Plan;
use therev::{Actor, Config, Database, Error, NewPost, NewThread, NewUser, PostId, ShardNo, Therev, ThreadId, UserId};

/// In what is sent to the shard behind the proxy, and nowhere else.
const SIGN: &str = "cut-in-here";

fn operator() -> Actor {
    Actor::Operator("test".into())
}

/// A cluster with a proxy in front of shard 1, and a node that does not spare it for long.
async fn behind_proxy() -> (TestCluster, Proxy, Therev) {
    let cluster = TestCluster::colocated().await;
    let proxy = cluster.proxy(1).await;
    let mut config = cluster.config();
    config.breaker_ms = 20;
    config.delivery_ms = 100;
    let node = therev::connect(config).await.expect("a node");
    (cluster, proxy, node)
}

/// A new id of a user whose bucket is on this shard.
fn id_on(shard: u16) -> UserId {
    std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % 4 == shard).expect("one of four")
}

async fn register(node: &Therev, id: UserId, name: &str) -> Result<UserId, Error> {
    let new = NewUser { user_id: Some(id), user_name: name.into(), ..NewUser::default() };
    node.register(new, &operator()).await.map(|user| user.user_id)
}

/// Repeats a call until the shard is no longer spared.
async fn in_the_end<T>(call: impl AsyncFn() -> Result<T, Error>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match call().await {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

async fn open_thread(node: &Therev) -> (UserId, ThreadId) {
    let (opener, author) = (id_on(0), id_on(1));
    register(node, opener, "opener").await.expect("a user");
    register(node, author, "author").await.expect("a user");
    (author, node.create_thread(NewThread::new(opener, "Cut", "connections")).await.expect("a thread").thread_id)
}

#[tokio::test]
async fn while_a_post_is_committed() {
    let (cluster, proxy, node) = behind_proxy().await;
    let (author, thread) = open_thread(&node).await;
    let post = |id| NewPost { post_id: Some(id), ..NewPost::new(author, thread, SIGN) };
    for (count, at) in (1..).zip([At::HalfRequest, At::NoAnswer, At::HalfAnswer, At::Panic, At::Crash]) {
        let id = PostId::new(author);
        proxy.set(Mode::Break(SIGN.as_bytes(), at));
        let error = node.create_post(post(id)).await.expect_err("no answer");
        assert_eq!(error.kind(), "outcome_unknown", "{at:?}: {error:?}");
        assert!(error.to_string().contains("shard 1"), "{error}");
        proxy.set(Mode::Pass);
        // It is there or not; the same create makes it so.
        in_the_end(async || node.create_post(post(id)).await).await;
        node.relay_once().await.expect("the relay runs");
        assert_eq!(node.thread(thread).await.expect("the thread").post_count, count, "{at:?}");
    }
    drop(node);
    cluster.finish().await;
}

/// The server crashes after the commit: the retry within the call finds it down, which says nothing of the first try.
/// Had its name been given back then, somebody else could take it.
#[tokio::test]
async fn while_a_user_is_committed() {
    let (cluster, proxy, node) = behind_proxy().await;
    for at in [At::HalfRequest, At::NoAnswer, At::HalfAnswer, At::Panic, At::Crash] {
        let (id, other) = (id_on(1), id_on(0));
        let name = format!("name-{}", id.0.simple());
        // The names are on any shard; the first name is only in the row.
        let row = NewUser { user_id: Some(id), first_name: Some(SIGN.into()), ..NewUser::default() };
        let row = NewUser { user_name: name.clone(), ..row };
        proxy.set(Mode::Break(SIGN.as_bytes(), at));
        let error = node.register(row.clone(), &operator()).await.expect_err("no answer");
        assert_eq!(error.kind(), "outcome_unknown", "{at:?}: {error:?}");
        proxy.set(Mode::Pass);
        let taken = in_the_end(async || match register(&node, other, &name).await {
            Err(Error::Conflict { .. }) => Ok(true),
            outcome => outcome.map(|_| false),
        });
        assert!(taken.await, "{at:?}: the name is still the first one's");
        in_the_end(async || node.register(row.clone(), &operator()).await.map(drop)).await;
        cluster.prove().await;
    }
    drop(node);
    cluster.finish().await;
}

/// A COPY, the statements after it and the commit of a bulk write: a batch is written whole or not at all.
#[tokio::test]
async fn while_rows_are_written_in_bulk() {
    let (cluster, proxy, node) = behind_proxy().await;
    let plan = Plan { users: 60, threads: 10, posts: 600, seed: 7, zipf: 1.0 };
    let moments: [(&'static [u8], At); 8] = [
        (b"LOCK TABLE", At::NoAnswer),
        (b"PGCOPY", At::HalfRequest),
        (b"PGCOPY", At::NoAnswer),
        (b"COPY posts", At::NoAnswer),
        (b"COMMIT", At::HalfRequest),
        (b"COMMIT", At::NoAnswer),
        (b"COMMIT", At::HalfAnswer),
        (b"COMMIT", At::Crash),
    ];
    for (sign, at) in moments {
        proxy.set(Mode::Break(sign, at));
        let error = therev::generate::generate(&node, plan, &mut |_| {}).await.expect_err("it is cut off");
        let Error::Store(error) = &error else { panic!("{at:?}: {error:?}") };
        assert_eq!(error.database(), Some(Database::Shard(ShardNo(1))), "{at:?}: {error}");
        proxy.set(Mode::Pass);
        in_the_end(async || node.user(id_on(1)).await.map(drop).or_else(is_absent)).await;
        cluster.prove().await;
    }
    therev::generate::generate(&node, plan, &mut |_| {}).await.expect("it goes on where it was cut off");
    let held = node.overview().await.expect("an overview");
    assert_eq!(held.shards.iter().filter_map(|shard| shard.posts).sum::<i64>(), 600);
    drop(node);
    cluster.finish().await;
}

/// A network that lost its way ends no connection: deadlines do, in a bulk write too.
#[tokio::test]
async fn that_fall_silent() {
    let cluster = TestCluster::colocated().await;
    let proxy = cluster.proxy(1).await;
    let patient = Config { connect_timeout_ms: 1_000, deadline_ms: 15_000, breaker_ms: 60_000, ..cluster.config() };
    let node = therev::connect(patient).await.expect("a node");
    let begin = Instant::now();

    // No connection yet: the server takes the first packet, and says nothing.
    proxy.set(Mode::Stall);
    let error = node.user(id_on(1)).await.expect_err("nobody answers");
    assert_eq!(error.kind(), "down", "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(10), "after the time to connect, not the deadline");
    let again = Instant::now();
    assert_eq!(node.user(id_on(1)).await.expect_err("it is spared").kind(), "down");
    assert!(again.elapsed() < Duration::from_millis(500), "and its callers are told at once");
    assert_eq!(node.user(id_on(0)).await.expect_err("another shard answers").kind(), "not_found");
    let admin = node.check().await.expect_err("nor to its owner");
    assert_eq!(admin.kind(), "down", "{admin:?}");
    proxy.set(Mode::Cut);
    proxy.set(Mode::Pass);

    // Claims are settled later: behind a silent COPY, which no time-out of the server ends, each would wait a deadline.
    let hasty = Config { deadline_ms: 3_000, breaker_ms: 20, claim_timeout_s: 3_600, ..cluster.config() };
    let node = therev::connect(hasty).await.expect("a node");
    let plan = Plan { users: 60, threads: 10, posts: 600, seed: 7, zipf: 1.0 };
    for sign in [&b"LOCK TABLE"[..], b"PGCOPY", b"COMMIT"] {
        proxy.set(Mode::Break(sign, At::Silence));
        let mut silent = |_| {};
        let generated = therev::generate::generate(&node, plan, &mut silent);
        let generated = tokio::time::timeout(Duration::from_secs(60), generated).await.expect("it ends");
        assert_eq!(generated.expect_err("nobody answers").kind(), "deadline");
        proxy.set(Mode::Cut);
        proxy.set(Mode::Pass);
        in_the_end(async || node.user(id_on(1)).await.map(drop).or_else(is_absent)).await;
        cluster.prove().await;
    }
    drop(node);
    cluster.finish().await;
}

fn is_absent(error: Error) -> Result<(), Error> {
    if matches!(error, Error::NotFound { .. }) { Ok(()) } else { Err(error) }
}
