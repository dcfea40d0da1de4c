//! A server of a relocation is promoted in the middle of it: before the switch it begins anew by itself, after the switch the
//! way back is closed and says so. Authors write all the while, and lose nothing.

use crate::things::operator;
use std::sync::Arc;
use std::time::Duration;
use testkit::{Frozen, OwnServers, Writing, connect, nothing_left};
use therev::relocation::{Error, Goal, Mover, Options, Relocation, Request, Result, State};
use therev::{Config, Group, NewThread, NewUser, ShardNo, Therev, UserId};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

const LIMIT: Duration = Duration::from_secs(120);
/// Shard 0 has the control database, the directory, and nothing that moves.
const SHARDS: u16 = 3;
const SOURCE: u16 = 1;
const TARGET: u16 = 2;

struct Scene {
    servers: OwnServers,
    node: Therev,
    mover: Arc<Mover>,
    moving: UserId,
    writers: Vec<Writing>,
}

impl Scene {
    async fn new() -> Scene {
        let mut servers = OwnServers::up(SHARDS, 1).await;
        let config = Config { connect_timeout_ms: 10_000, relay_ms: 50, ..servers.config() };
        let node = therev::connect(config).await.expect("a node");
        let mut authors = Vec::new();
        for shard in [SOURCE, TARGET] {
            let id = std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % SHARDS == shard);
            let id = id.expect("one of many");
            let new = NewUser { user_id: Some(id), user_name: format!("user-{shard}"), ..NewUser::default() };
            node.register(new, &operator()).await.expect("registered");
            authors.push(id);
        }
        let mut writers = Vec::new();
        for (author, at) in [(0, 1), (1, 0)] {
            let open = node.create_thread(NewThread::new(authors[at], "A thread", "text")).await.expect("a thread");
            writers.push(Writing::begin(node.clone(), authors[author], open.thread_id));
        }
        let mover = Mover::new(node.shards().clone(), Options { budget: Duration::from_secs(1), ..Options::default() });
        Scene { servers, node, mover: mover.into(), moving: authors[0], writers }
    }

    async fn begin(&self, goal: Goal) -> i64 {
        let (source, target) = (ShardNo(SOURCE.cast_signed()), ShardNo(TARGET.cast_signed()));
        let request =
            Request { groups: Group::ALL.to_vec(), buckets: vec![self.moving.bucket()], pin: None, source, target };
        let plan = self.mover.plan(&request).await.expect("a plan");
        self.mover.begin(&plan, goal, "test").await.expect("it begins").relocation
    }

    /// Until a transaction of the source lets go, a relocation comes to its switch and no further.
    async fn until_before_its_switch(&mut self, number: i64) -> (JoinHandle<Result<Relocation>>, Client) {
        let brake = connect(&self.servers.shards()[usize::from(SOURCE)]).await;
        brake.batch_execute("BEGIN; LOCK TABLE therev.id_routes IN ROW EXCLUSIVE MODE").await.expect("the brake is on");
        let driven = self.drive(number);
        let switching = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while self.mover.show(number).await.expect("the relocation").state != State::Switching {
                ticks.tick().await;
            }
        };
        tokio::time::timeout(LIMIT, switching).await.expect("it comes to its switch");
        (driven, brake)
    }

    /// How often the rows were copied, and what had come undone.
    async fn rounds(&mut self) -> i32 {
        let control = connect(&self.servers.servers().control_url().expect("an address")).await;
        let rounds = "SELECT copy_round FROM therev.relocations";
        control.query_one(rounds, &[]).await.expect("a relocation").get(0)
    }

    fn drive(&self, number: i64) -> JoinHandle<Result<Relocation>> {
        let (mover, runtime) = (self.mover.clone(), tokio::runtime::Handle::current());
        tokio::task::spawn_blocking(move || runtime.block_on(Box::pin(mover.drive(number, &|_| {}))))
    }

    /// A standby takes a shard's place.
    fn promote(&mut self, shard: u16) {
        let servers = self.servers.servers();
        tokio::task::block_in_place(|| servers.promote(shard, &mut |_| {})).expect("promoted");
    }

    async fn writers_go_on(&self) {
        for writer in &self.writers {
            writer.goes_on(LIMIT).await;
        }
    }

    async fn finish(mut self) {
        let shards = self.servers.shards();
        nothing_left(&shards).await;
        for writer in self.writers {
            println!("{} posts were acknowledged, and are there", writer.prove(&shards).await);
        }
        let agrees = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            while !self.node.check().await.is_ok_and(|report| report.ok) {
                ticks.tick().await;
            }
        };
        tokio::time::timeout(LIMIT, agrees).await.expect("everything agrees in the end");
    }
}

async fn rests(driven: JoinHandle<Result<Relocation>>, state: State) {
    let ended = tokio::time::timeout(LIMIT, driven).await.expect("it comes to an end").expect("no panic");
    let ended = ended.expect("it goes on");
    assert_eq!(ended.state, state, "{ended:?}");
}

/// The relocation stands before its switch, held up by a transaction, when a server of it is promoted.
async fn before_the_switch(promoted: u16) {
    let mut scene = Scene::new().await;
    let number = scene.begin(Goal::Done).await;
    let (driven, brake) = scene.until_before_its_switch(number).await;
    scene.promote(promoted);
    drop(brake);
    rests(driven, State::Done).await;
    assert!(scene.rounds().await >= 3, "it was undone and copied anew");
    let place = scene.moving.bucket();
    assert_eq!(scene.node.shards().believed_shard(Group::Content, place), ShardNo(TARGET.cast_signed()));
    scene.writers_go_on().await;
    scene.finish().await;
}

/// Invariant 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_of_the_source_before_the_switch_copies_anew() {
    before_the_switch(SOURCE).await;
}

/// Invariant 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_of_the_target_before_the_switch_copies_anew() {
    before_the_switch(TARGET).await;
}

/// The relocation is switched, and stands where the way back is open, when a server of it is promoted.
async fn after_the_switch(promoted: u16) {
    let mut scene = Scene::new().await;
    let number = scene.begin(Goal::Switched).await;
    rests(scene.drive(number), State::Switched).await;
    scene.promote(promoted);
    scene.writers_go_on().await;
    match scene.mover.want(number, Goal::Reversed).await {
        Err(Error::Refused { reason, next }) => {
            let said = format!("the way back is closed: shard {promoted} was promoted since the switch");
            assert_eq!(reason, said);
            assert!(next.contains("finish this relocation"), "{next}");
        }
        other => panic!("the way back is a stream, which is gone: {other:?}"),
    }
    assert_eq!(scene.mover.show(number).await.expect("the relocation").state, State::Switched);
    scene.mover.finish(number).await.expect("it can be finished");
    rests(scene.drive(number), State::Done).await;
    scene.writers_go_on().await;
    scene.finish().await;
}

/// Invariant 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_of_the_source_after_the_switch_closes_the_way_back() {
    after_the_switch(SOURCE).await;
}

/// Invariant 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_of_the_target_after_the_switch_closes_the_way_back() {
    after_the_switch(TARGET).await;
}

/// Once a switch is decided reads and writes wait for the standbys of the shard that gives: with one that is behind none is tried.
/// Invariant 16.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_is_behind_is_waited_for_before_the_switch() {
    let mut scene = Scene::new().await;
    let source = connect(&scene.servers.shards()[usize::from(SOURCE)]).await;
    // No commit waits for it, so that it can be behind.
    source.batch_execute("ALTER SYSTEM SET synchronous_standby_names = ''").await.expect("another setting");
    source.batch_execute("SELECT pg_reload_conf()").await.expect("it is read");
    let sender = "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'";
    let sender: i32 = source.query_one(sender, &[]).await.expect("one standby follows").get(0);
    let behind = Frozen::process(sender).expect("nothing is sent to it");
    scene.writers_go_on().await;

    let number = scene.begin(Goal::Done).await;
    let driven = scene.drive(number);
    let held_up = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let is_so = |now: &Relocation| now.note.contains("a standby of the shard that gives is behind");
        while !is_so(&scene.mover.show(number).await.expect("the relocation")) {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, held_up).await.expect("it says what it waits for");
    scene.writers_go_on().await;
    assert_eq!(scene.mover.show(number).await.expect("the relocation").state, State::Switching);
    drop((behind, source));
    rests(driven, State::Done).await;
    scene.writers_go_on().await;
    scene.finish().await;
}

/// A server keeps no log for ever: what it has dropped of a stream's is copied anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_log_is_dropped_begins_anew() {
    let mut scene = Scene::new().await;
    let number = scene.begin(Goal::Done).await;
    let (driven, brake) = scene.until_before_its_switch(number).await;
    scene.mover.pause(number, true).await.expect("it can rest");
    rests(driven, State::Switching).await;
    drop(brake);
    // As it rests that was paused before it had caught up.
    let control = connect(&scene.servers.servers().control_url().expect("an address")).await;
    control.batch_execute("UPDATE therev.relocations SET state = 'catching_up'").await.expect("it catches up");

    let [source, target] = [SOURCE, TARGET].map(|shard| scene.servers.shards()[usize::from(shard)].clone());
    let (source, target) = (connect(&source).await, connect(&target).await);
    let stream = "SELECT subname::text FROM pg_subscription WHERE subenabled";
    let stream: String = target.query_one(stream, &[]).await.expect("the stream runs").get(0);
    target.batch_execute(&format!("ALTER SUBSCRIPTION {stream} DISABLE")).await.expect("it reads no more");
    let keep = |size: &str| format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{size}'");
    source.batch_execute(&keep("1MB")).await.expect("another setting");
    source.batch_execute("SELECT pg_reload_conf()").await.expect("it is read");
    let dropped = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        let lost = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND wal_status = 'lost'";
        while source.query_opt(lost, &[&stream]).await.expect("slots").is_none() {
            source.batch_execute("SELECT pg_switch_wal()").await.expect("another file");
            source.batch_execute("CHECKPOINT").await.expect("old files go");
            ticks.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, dropped).await.expect("the log is dropped");
    source.batch_execute(&keep("-1")).await.expect("another setting");
    source.batch_execute("SELECT pg_reload_conf()").await.expect("it is read");

    scene.mover.pause(number, false).await.expect("it goes on");
    rests(scene.drive(number), State::Done).await;
    assert_eq!(scene.rounds().await, 3, "a copy, its end, and another copy");
    scene.writers_go_on().await;
    drop((source, target, control));
    scene.finish().await;
}
