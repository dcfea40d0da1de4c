//! Servers of a test's own, killed and promoted while nodes go on.

use crate::things::{operator, post, thread, user_per_shard};
use std::time::{Duration, Instant};
use testkit::OwnServers;
use therev::{Config, Error, InitPlan, Layout, NewPost, NewThread, NewUser, Therev, UserId};

/// Two shards with a standby each, in a folder of their own.
struct OwnCluster {
    cluster: Option<local::Cluster>,
    folder: tempfile::TempDir,
}

impl OwnCluster {
    async fn up(synchronous: bool) -> OwnCluster {
        let folder = tempfile::tempdir().expect("a folder");
        let mut options = local::Options::new(folder.path().join("cluster"));
        (options.shards, options.replicas, options.standbys) = (2, 0, 1);
        (options.synchronous, options.durable) = (synchronous, false);
        options.pg_bin = Some(testkit::test_servers().pg_bin.clone());
        let cluster = local::Cluster::up(&options, &mut |_| {}).expect("servers");
        let plan = InitPlan {
            control: cluster.control_url().expect("an address"),
            directory: cluster.directory_url().expect("an address"),
            replicas: Vec::new(),
            shards: cluster.shard_urls(),
            layout: Layout::Colocated,
            password: "test".into(),
            admin_password: "test".into(),
            mover_password: "test".into(),
        };
        therev::init(&plan).await.expect("a cluster");
        std::fs::write(folder.path().join("passfile"), plan.passfile()).expect("a passfile");
        OwnCluster { cluster: Some(cluster), folder }
    }

    fn servers(&mut self) -> &mut local::Cluster {
        self.cluster.as_mut().expect("it is up")
    }

    /// A node with a relay, as `serve` is one.
    async fn node(&mut self) -> Therev {
        self.node_that(100).await
    }

    /// One whose relay runs so often; 0: it has none.
    async fn node_that(&mut self, relay_ms: u64) -> Therev {
        let control = self.servers().control_url().expect("an address");
        let (_, place) = control.rsplit_once('@').expect("an address with a role");
        let passfile = Some(self.folder.path().join("passfile"));
        let config = Config { passfile, relay_ms, breaker_ms: 100, ..Config::new(format!("postgresql://{place}")) };
        therev::connect(config).await.expect("a node")
    }

    /// A superuser's connection to a database of one server.
    async fn superuser(&mut self, server: local::ServerId, database: &str) -> tokio_postgres::Client {
        testkit::connect(&self.servers().url(server, database).expect("an address")).await
    }
}

impl Drop for OwnCluster {
    fn drop(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.destroy(&mut |_| {}).expect("nothing is left");
        }
    }
}

/// Writes posts one after the other, with ids of its own, until it has written so many after it was told to end. Says
/// which were acknowledged, and the longest time without one.
async fn write(
    node: Therev,
    author: UserId,
    thread: therev::ThreadId,
    end: tokio::sync::watch::Receiver<bool>,
) -> (Vec<therev::PostId>, Duration) {
    let (mut acknowledged, mut longest, mut last, mut after) = (Vec::new(), Duration::ZERO, Instant::now(), 0);
    while after < 20 {
        let post_id = therev::PostId::new(author);
        loop {
            let new = NewPost { post_id: Some(post_id), ..NewPost::new(author, thread, "on and on") };
            match node.create_post(new).await {
                Ok(_) => break,
                Err(Error::Store(_)) => tokio::task::yield_now().await,
                Err(other) => panic!("{other}"),
            }
        }
        acknowledged.push(post_id);
        longest = longest.max(last.elapsed());
        last = Instant::now();
        after += u32::from(*end.borrow());
    }
    (acknowledged, longest)
}

/// Waits until everything agrees, without a hand.
async fn agrees(node: &Therev) {
    let clean = async {
        loop {
            if let Ok(report) = node.check().await
                && report.ok
            {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), clean).await.expect("everything agrees in the end");
}

/// A commit whose wait for its standby is cut off is to be seen all the same. The same write again finds it done, and is acknowledged
/// only once the standby has it.
/// Invariant 23.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_standby_has_is_not_acknowledged_by_a_second_try() {
    let mut servers = OwnServers::up(2, 1).await;
    let config = Config { deadline_ms: 1_000, relay_ms: 0, ..servers.config() };
    let node = therev::connect(config).await.expect("a node");
    let author = user_per_shard(&node).await[1];
    let open = thread(&node, author, "Beside a standby").await.thread_id;
    let primary = testkit::connect(&servers.shards()[1]).await;
    let sender = "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'";
    let sender: i32 = primary.query_one(sender, &[]).await.expect("a standby follows").get(0);
    let (post_id, thread_id) = (therev::PostId::new(author), therev::ThreadId::new(author));
    let post = || NewPost { post_id: Some(post_id), ..NewPost::new(author, open, "once") };
    let opened = || NewThread { thread_id: Some(thread_id), ..NewThread::new(author, "Once", "text") };

    let stalled = testkit::Frozen::process(sender).expect("nothing is sent to it");
    node.create_post(post()).await.expect_err("the standby does not answer");
    node.create_thread(opened()).await.expect_err("the standby does not answer");
    let there =
        "SELECT (SELECT count(*) FROM posts WHERE post_id = $1) + (SELECT count(*) FROM threads WHERE thread_id = $2)";
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    while primary.query_one(there, &[&post_id.0, &thread_id.0]).await.expect("the rows").get::<_, i64>(0) < 2 {
        looks.tick().await;
    }
    node.create_post(post()).await.expect_err("it is nowhere else");
    node.create_thread(opened()).await.expect_err("it is nowhere else");

    drop(stalled);
    node.create_post(post()).await.expect("the standby has it");
    node.create_thread(opened()).await.expect("the standby has it");
    assert_eq!(node.posts_by_author(author, None, 9).await.expect("an answer").len(), 1);
}

/// A standby is promoted by mistake while its primary lives: nobody goes there, and whoever looks hears of it.
/// Invariant 12.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_promoted_by_mistake_is_named() {
    let mut cluster = OwnCluster::up(false).await;
    let node = cluster.node().await;
    let author = user_per_shard(&node).await[1];
    let open = thread(&node, author, "On the primary").await;
    let overview = node.overview().await.expect("an overview");
    assert!(overview.is_up() && overview.shards.iter().all(|shard| shard.other_primaries.is_empty()), "{overview:?}");

    let mistake = local::ServerId::Standby(1, 1);
    let standby = cluster.superuser(mistake, "postgres").await;
    assert!(standby.query_one("SELECT pg_promote()", &[]).await.expect("promoted").get::<_, bool>(0));
    let port = cluster.servers().status().into_iter().find(|it| it.server == mistake).expect("it runs").port;
    let overview = node.overview().await.expect("an overview");
    assert_eq!(overview.shards[1].other_primaries, [format!("127.0.0.1:{port}")]);
    assert!(!overview.is_up() && overview.shards[0].other_primaries.is_empty(), "{overview:?}");
    let fresh = cluster.node().await;
    let written = post(&fresh, author, &open, "to the primary").await.post_id.0;
    let primary = cluster.superuser(local::ServerId::Shard(1), "therev_shard_1").await;
    primary.query_one("SELECT FROM posts WHERE post_id = $1", &[&written]).await.expect("the primary has it");

    // Nor does it take the place of a primary that only needs a second to answer.
    let status = cluster.servers().status().into_iter().find(|it| it.server == local::ServerId::Shard(1));
    let pid = status.and_then(|it| it.pid).expect("it runs");
    let late = cluster.node_that(0).await;
    let slow = testkit::Frozen::process(pid).expect("it takes nobody in");
    let reads = tokio::spawn(async move { late.user(author).await });
    let is_asked = "SELECT FROM pg_stat_activity
                     WHERE query LIKE '%i.incarnation_counter, i.timeline%' AND pid <> pg_backend_pid() LIMIT 1";
    let met = async {
        let mut looks = tokio::time::interval(Duration::from_millis(10));
        while standby.query_opt(is_asked, &[]).await.expect("an answer").is_none() {
            looks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), met).await.expect("the other one is met");
    drop(slow);
    reads.await.expect("no panic").expect("the primary answers");
    assert_eq!(node.overview().await.expect("an overview").shards[1].other_primaries, [format!("127.0.0.1:{port}")]);
    drop((node, fresh));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_synchronous_standbys_a_promotion_loses_nothing_and_nodes_follow() {
    let mut cluster = OwnCluster::up(true).await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Goes on").await.thread_id;
    let (end, ended) = tokio::sync::watch::channel(false);
    let writers: Vec<_> = authors.map(|author| tokio::spawn(write(node.clone(), author, open, ended.clone()))).into();
    // Shard 1 alone, then the server that also has the control database and the directory.
    for shard in [1, 0] {
        cluster.servers().kill(local::ServerId::Shard(shard)).expect("killed");
        let servers = cluster.servers();
        tokio::task::block_in_place(|| servers.put_first(shard, &mut |_| {})).expect("promoted");
        let promoted = Instant::now();
        let on_it = authors[usize::from(shard)];
        while node.user(on_it).await.is_err() {
            tokio::task::yield_now().await;
        }
        assert!(promoted.elapsed() < Duration::from_secs(3), "shard {shard}: {:?}", promoted.elapsed());
        let servers = cluster.servers();
        tokio::task::block_in_place(|| servers.follow(shard, &mut |_| {})).expect("the old primary follows");
    }
    end.send(true).expect("writers listen");
    for (author, writer) in authors.into_iter().zip(writers) {
        let (acknowledged, longest) = writer.await.expect("a writer");
        eprintln!("{} posts, the longest wait {longest:?}", acknowledged.len());
        for post_id in acknowledged {
            assert_eq!(node.post(post_id).await.expect("it is there").author_id, author);
        }
    }
    agrees(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_asynchronous_standby_lost_leaves_no_contradiction() {
    let mut cluster = OwnCluster::up(false).await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "On shard 0").await;
    post(&node, authors[1], &open, "kept").await;
    agrees(&node).await;
    // Everything so far is on the standby, and nothing comes after.
    let standby = cluster.superuser(local::ServerId::Standby(1, 1), "postgres").await;
    let primary = cluster.superuser(local::ServerId::Shard(1), "postgres").await;
    let position = "SELECT pg_current_wal_flush_lsn()::text";
    let position: String = primary.query_one(position, &[]).await.expect("a position").get(0);
    let until = async |sql: &str, params: &[&(dyn tokio_postgres::types::ToSql + Sync)]| {
        while !standby.query_one(sql, params).await.expect("the standby answers").get::<_, bool>(0) {
            tokio::task::yield_now().await;
        }
    };
    until("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", &[&position]).await;
    standby.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.expect("cut off");
    standby.batch_execute("SELECT pg_reload_conf()").await.expect("reloaded");
    until("SELECT count(*) = 0 FROM pg_stat_wal_receiver", &[]).await;

    let lost = NewUser { user_id: Some(on_shard_1()), user_name: "lost".into(), ..NewUser::default() };
    let lost = node.register(lost, &operator()).await.expect("registered").user_id;
    post(&node, lost, &open, "lost with its author").await;
    for _ in 0..3 {
        post(&node, authors[1], &open, "lost").await;
    }
    let theirs = thread(&node, authors[1], "lost as well").await;
    post(&node, authors[0], &theirs, "a reply that stays, to a thread that is gone").await;
    assert_eq!(node.thread_page(open.thread_id, None, 50).await.expect("a page").posts.len(), 5);

    cluster.servers().kill(local::ServerId::Shard(1)).expect("killed");
    let servers = cluster.servers();
    tokio::task::block_in_place(|| servers.put_first(1, &mut |_| {})).expect("promoted");
    let back = async {
        while node.user(authors[1]).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(3), back).await.expect("the node follows");
    agrees(&node).await;
    assert!(matches!(node.user(lost).await, Err(Error::NotFound { .. })));
    assert_eq!(node.thread_page(open.thread_id, None, 50).await.expect("a page").posts.len(), 1);
    // The name is free again, and what is written now counts although older states were told under higher numbers.
    node.register(NewUser { user_name: "lost".into(), ..NewUser::default() }, &operator()).await.expect("a free name");
    post(&node, authors[1], &open, "after").await;
    assert_eq!(node.thread_page(open.thread_id, None, 50).await.expect("a page").posts.len(), 2);
    agrees(&node).await;
}

fn on_shard_1() -> UserId {
    loop {
        let id = UserId::new();
        if id.bucket().number() % 2 == 1 {
            return id;
        }
    }
}

/// A primary stands still with connections of a node open, and its standby takes its place: one call finds that out for all of them.
#[tokio::test(flavor = "multi_thread")]
async fn connections_to_a_frozen_primary_are_given_up_together() {
    let mut cluster = OwnCluster::up(false).await;
    let node = cluster.node_that(0).await;
    let registers = |n: usize| {
        let new = NewUser { user_id: Some(on_shard_1()), user_name: format!("user-{n}"), ..NewUser::default() };
        let node = node.clone();
        async move { node.register(new, &operator()).await.expect("registered").user_id }
    };
    let users = futures_util::future::join_all((0..16).map(registers)).await;
    let primary = cluster.superuser(local::ServerId::Shard(1), "postgres").await;
    let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'therev'";
    let open: i64 = primary.query_one(open, &[]).await.expect("the activity").get(0);
    assert!(open >= 4, "{open} connections are open");

    let postmaster = cluster.servers().status()[1].pid.expect("it runs");
    let frozen = testkit::Frozen::server(postmaster).expect("it stands still");
    let standby = cluster.superuser(local::ServerId::Standby(1, 1), "postgres").await;
    let promoted: bool = standby.query_one("SELECT pg_promote()", &[]).await.expect("an answer").get(0);
    assert!(promoted);
    let mut failed = 0;
    while let Err(error) = node.user(users[0]).await {
        failed += 1;
        assert!(failed < 4, "call after call waits for the server that stands still: {error}");
    }
    println!("{failed} calls failed, {open} connections were open");
    frozen.kill();
}
