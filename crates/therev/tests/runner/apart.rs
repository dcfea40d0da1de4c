//! A shard's failure leaves the others alone, measured: their users' calls before, during and after it.

use crate::things::{operator, post, thread};
use futures_util::future::join_all;
use local::{Cluster, Options, ServerId};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::{Frozen, PASSWORD, test_servers};
use therev::{Config, InitPlan, Layout, NewPost, NewUser, Therev, Thread, UserId};

const SHARDS: u16 = 3;
/// Whose server fails. Shard 0's holds the control database and the directory too.
const FAILS: u16 = 1;
/// Calls of the other shards' users in each phase, and how many of them go on at once.
const CALLS: usize = 1_000;
const CALLERS: usize = 4;
/// Callers of the failed shard's users, all the while: as many as it has connections, so that they take all there are.
const CALLERS_THERE: usize = 8;
/// How often each of those calls.
const CALL_EVERY: Duration = Duration::from_millis(50);
const DEADLINE: Duration = Duration::from_secs(2);
/// What a busy machine adds to anything.
const SLACK: Duration = Duration::from_millis(100);

/// Servers of its own, for they are killed.
struct Servers {
    cluster: Option<Cluster>,
    _folder: tempfile::TempDir,
}

impl Servers {
    fn start() -> Servers {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("its mode");
        let options = Options {
            shards: SHARDS,
            replicas: 0,
            pg_bin: Some(test_servers().pg_bin.clone()),
            durable: false,
            ..Options::new(folder.path().join("cluster"))
        };
        let cluster = Cluster::up(&options, &mut |_| {}).expect("the servers start");
        Servers { cluster: Some(cluster), _folder: folder }
    }

    fn cluster(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect("it is there until the end")
    }

    /// Makes the cluster, and says how a node finds it.
    async fn init(&mut self) -> Config {
        let cluster = self.cluster();
        let control = cluster.control_url().expect("an address");
        let plan = InitPlan {
            control: control.clone(),
            directory: cluster.directory_url().expect("an address"),
            replicas: Vec::new(),
            shards: cluster.shard_urls(),
            layout: Layout::Colocated,
            password: PASSWORD.into(),
            admin_password: PASSWORD.into(),
            mover_password: PASSWORD.into(),
        };
        therev::init(&plan).await.expect("the cluster is made");
        let (_, host) = control.rsplit_once('@').expect("an address with a role");
        Config {
            password: Some(PASSWORD.into()),
            pool_size: Some(CALLERS_THERE),
            breaker_ms: 200,
            relay_ms: 0,
            claim_timeout_s: 0,
            ..Config::new(format!("postgresql://therev@{host}"))
        }
    }

    /// Stops every process of the failing server where it is.
    fn freeze(&mut self) -> Frozen {
        let postmaster = self.cluster().status()[usize::from(FAILS)].pid.expect("it runs");
        Frozen::server(postmaster).expect("it stops")
    }

    /// Ends the failing server, and those of its processes that were stopped.
    fn kill(&mut self, frozen: Frozen) {
        self.cluster().kill(ServerId::Shard(FAILS)).expect("killed");
        frozen.kill();
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.destroy(&mut |_| {}).expect("the servers are removed");
        }
    }
}

/// A user on each shard, with a thread.
async fn users(node: &Therev) -> Vec<(UserId, Thread)> {
    let mut all = Vec::new();
    for shard in 0..SHARDS {
        let id = std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % SHARDS == shard);
        let user = id.expect("one of many");
        let new = NewUser { user_id: Some(user), user_name: format!("user-{shard}"), ..NewUser::default() };
        node.register(new, &operator()).await.expect("the user is registered");
        all.push((user, thread(node, user, "Own").await.value));
    }
    all
}

/// What the calls of one phase came to.
#[derive(Debug)]
struct Phase {
    /// Of the other shards' users: 99 of 100 took no longer.
    p99: Duration,
    /// Of the failing shard's users: the slowest, and how many failed of how many.
    slowest_there: Duration,
    failed_there: usize,
    calls_there: usize,
}

/// Reads, pages and posts of the other shards' users, any of which must succeed; reads of the failing one's meanwhile.
async fn measure(node: &Therev, users: &[(UserId, Thread)]) -> Phase {
    let (there, others): (Vec<_>, Vec<_>) =
        users.iter().partition(|(user, _)| user.bucket().number() % SHARDS == FAILS);
    let over = AtomicBool::new(false);
    let caller = async |first: usize| {
        let mut times = Vec::new();
        for call in (first..CALLS).step_by(CALLERS) {
            let (user, thread) = others[call / CALLERS % others.len()];
            let start = Instant::now();
            match call / CALLERS % 3 {
                0 => drop(node.user(*user).await.expect("another shard's user")),
                1 => {
                    let page = node.thread_page(thread.thread_id, None, 20).await.expect("another shard's page");
                    assert!(!page.partial);
                }
                _ => drop(post(node, *user, thread, "text").await),
            }
            times.push(start.elapsed());
        }
        times
    };
    let caller_there = async || {
        let mut outcomes = Vec::new();
        let mut ticks = tokio::time::interval(CALL_EVERY);
        while !over.load(Ordering::Relaxed) || outcomes.is_empty() {
            ticks.tick().await;
            let start = Instant::now();
            let failed = node.user(there[0].0).await.is_err();
            outcomes.push((start.elapsed(), failed));
        }
        outcomes
    };
    let calls = async {
        let times = join_all((0..CALLERS).map(caller)).await.concat();
        over.store(true, Ordering::Relaxed);
        times
    };
    let (mut times, there) = tokio::join!(calls, join_all((0..CALLERS_THERE).map(|_| caller_there())));
    let there = there.concat();
    times.sort_unstable();
    Phase {
        p99: times[CALLS * 99 / 100],
        slowest_there: there.iter().map(|(time, _)| *time).max().expect("a call"),
        failed_there: there.iter().filter(|(_, failed)| *failed).count(),
        calls_there: there.len(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shards_failure_leaves_the_others_alone() {
    let mut servers = Servers::start();
    let config = servers.init().await;
    let deadline_ms = u64::try_from(DEADLINE.as_millis()).expect("a short time");
    let node = therev::connect(Config { deadline_ms, ..config.clone() }).await.expect("the cluster answers");
    let users = users(&node).await;
    let shards: BTreeSet<_> =
        users.iter().map(|(user, _)| node.shards().believed_shard(therev::Group::Account, user.bucket())).collect();
    assert_eq!(shards.len(), usize::from(SHARDS), "a user on each shard");

    // Opening connections costs this process more than all else, in a build without optimization: it is not measured.
    measure(&node, &users).await;
    let before = measure(&node, &users).await;
    assert_eq!(before.failed_there, 0, "{before:?}");
    let as_before = |phase: &Phase| phase.p99 <= (5 * before.p99).max(SLACK);

    // It hangs, the worst that it can do: whoever calls there waits, no longer than the deadline.
    let stopped = servers.freeze();
    let frozen = measure(&node, &users).await;
    assert!(as_before(&frozen), "{before:?}, then {frozen:?}");
    assert!(frozen.failed_there == frozen.calls_there && frozen.slowest_there <= DEADLINE + SLACK, "{frozen:?}");

    // It is gone: whoever calls there is told at once.
    servers.kill(stopped);
    let dead = measure(&node, &users).await;
    assert!(as_before(&dead), "{before:?}, then {dead:?}");
    assert!(dead.failed_there == dead.calls_there && dead.slowest_there <= SLACK, "{dead:?}");

    servers.cluster().start_server(ServerId::Shard(FAILS), &mut |_| {}).expect("it starts");
    let back = async {
        while node.user(users[usize::from(FAILS)].0).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), back).await.expect("the shard is found again by itself");
    measure(&node, &users).await;
    let after = measure(&node, &users).await;
    assert!(as_before(&after) && after.failed_there == 0, "{before:?}, then {after:?}");
    println!("before {before:?}\nfrozen {frozen:?}\ndead {dead:?}\nafter {after:?}");

    // All of it fits together, for a node that has more time.
    let node = therev::connect(config).await.expect("the cluster answers");
    assert_eq!(node.relay_once().await.expect("the relay runs").waiting, 0);
    assert!(node.check().await.expect("check runs").ok);
}

/// Nothing ends, nothing is refused: only that no answer comes says that the server is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_is_found_out_and_forgiven() {
    let mut servers = Servers::start();
    let config = servers.init().await;
    let deadline_ms = u64::try_from(DEADLINE.as_millis()).expect("a short time");
    let config = Config { deadline_ms, connect_timeout_ms: deadline_ms, breaker_ms: 3 * deadline_ms, ..config };
    let node = therev::connect(config).await.expect("the cluster answers");
    let users = users(&node).await;
    let (there, elsewhere) = (users[usize::from(FAILS)].0, users[0].0);
    let post_there = async || node.create_post(NewPost::new(there, users[0].1.thread_id, "text")).await;
    let read_by_many = async || join_all((0..CALLERS_THERE).map(|_| node.user(there))).await;
    // As many connections as there may be, all of them idle then: each would be a trap of its own.
    assert!(read_by_many().await.iter().all(Result::is_ok));

    let frozen = servers.freeze();
    assert_eq!(node.user(there).await.expect_err("no answer").kind(), "deadline");
    let found_out = async { while node.user(there).await.expect_err("no answer").kind() != "down" {} };
    tokio::time::timeout(3 * DEADLINE, found_out).await.expect("one caller's wait is enough for all");
    let begin = Instant::now();
    for _ in 0..20 {
        assert!(read_by_many().await.iter().all(|read| read.as_ref().is_err_and(|error| error.kind() == "down")));
        let error = post_there().await.expect_err("no write either");
        assert!(error.kind() == "down" && error.to_string().contains("shard 1 is down"), "{error:?}");
        node.user(elsewhere).await.expect("another shard's user");
    }
    let page = node.thread_page(users[0].1.thread_id, None, 9).await.expect("another shard's page");
    assert!(!page.partial, "nobody of the frozen shard has written there");
    assert!(begin.elapsed() < DEADLINE, "{:?}", begin.elapsed());

    // It goes on by itself, on both sides.
    drop(frozen);
    let back = async {
        while node.user(there).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), back).await.expect("the shard is found again by itself");
    assert!(read_by_many().await.iter().all(Result::is_ok));
    post_there().await.expect("a post");
    assert_eq!(node.relay_once().await.expect("the relay runs").waiting, 0);
    assert!(node.check().await.expect("check runs").ok);
}
