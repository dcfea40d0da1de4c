//! `kill -9` of the source's, the target's or the control database's server, at every fail point of a relocation, while
//! authors write: when the server is back the relocation comes to its end, with nothing lost and nothing left. Once it goes on, once it
//! is called off.

use crate::movers_killed::{OF_ABORTS, points};
use local::ServerId;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::{OwnServers, Writing, nothing_left};
use therev::relocation::{Error, Goal, Mover, Options, Request, State};
use therev::{Actor, Config, Group, NewThread, NewUser, ShardNo, Therev, UserId};
use tokio::sync::mpsc;

/// Shard 0's server has the control database, and nothing that moves.
const CONTROL: u16 = 0;
const LIMIT: Duration = Duration::from_secs(180);
const BUDGET: Duration = Duration::from_secs(1);
/// How often a relocation may have to be resumed by hand after one fault.
const RESUMES: u32 = 3;

type Servers = Arc<Mutex<OwnServers>>;

struct Scene {
    servers: Servers,
    node: Therev,
    moving: UserId,
    here: ShardNo,
    there: ShardNo,
}

/// The server is killed at the first pass of the point. Says so once it has happened.
fn kill_at(point: &str, victim: u16, servers: &Servers) -> mpsc::UnboundedReceiver<()> {
    let (told, killed) = mpsc::unbounded_channel();
    let (servers, done) = (servers.clone(), AtomicBool::new(false));
    fail::cfg_callback(point, move || {
        if !done.swap(true, Ordering::SeqCst) {
            servers.lock().expect("no panic").servers().kill(ServerId::Shard(victim)).expect("killed");
            told.send(()).expect("somebody waits");
        }
    })
    .expect("fail points are compiled in");
    killed
}

/// Where a copy is complete, and its stream has caught up.
const COPIED: &str = "relocation.caught_up";

/// Has undone what rests there: there is something to undo.
async fn abort_copied(mover: &Mover, number: i64) {
    let copied = async {
        while mover.show(number).await.expect("it is known").state != State::CatchingUp {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, copied).await.expect("it is copied");
    mover.want(number, Goal::Aborted).await.expect("it can be undone");
    fail::remove(COPIED);
}

impl Scene {
    /// `wish` is what is wanted of it once the server is back; what was decided by then is carried through all the same.
    async fn at(&mut self, point: &str, victim: u16, wish: Goal) {
        let request = Request {
            groups: Group::ALL.to_vec(),
            buckets: vec![self.moving.bucket()],
            pin: None,
            source: self.here,
            target: self.there,
        };
        let mover = Arc::new(Mover::new(self.node.shards().clone(), Options { budget: BUDGET, ..Options::default() }));
        let plan = mover.plan(&request).await.expect("a plan");
        let number = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
        let is_undone = OF_ABORTS.contains(&point);
        if is_undone {
            fail::cfg(COPIED, "pause").expect("fail points are compiled in");
        }
        let mut killed = kill_at(point, victim, &self.servers);
        let (runtime, driver) = (tokio::runtime::Handle::current(), mover.clone());
        let mut driven = tokio::task::spawn_blocking(move || {
            let mut resumed = 0;
            loop {
                match runtime.block_on(Box::pin(driver.drive(number, &|_| {}))) {
                    Ok(ended) if ended.state.is_over() => return (ended, resumed),
                    // It was decided before it was called off.
                    Ok(kept) if wish == Goal::Aborted && kept.state == State::Switched => {
                        runtime.block_on(driver.want(number, Goal::Done)).expect("it can be finished");
                    }
                    Ok(other) => panic!("it rests: {other:?}"),
                    // A server that is down for a start, or in the middle of what is not tried again.
                    Err(Error::Taken(_) | Error::Store(_) | Error::Sql { .. }) if resumed < 500 => resumed += 1,
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        if is_undone {
            abort_copied(&mover, number).await;
        }
        let up_again = async {
            killed.recv().await.expect("the point is reached");
            let servers = self.servers.clone();
            let start = move || {
                let mut servers = servers.lock().expect("no panic");
                servers.servers().start_server(ServerId::Shard(victim), &mut |_| {}).expect("it starts");
            };
            tokio::task::spawn_blocking(start).await.expect("no panic");
        };
        tokio::time::timeout(LIMIT, up_again).await.unwrap_or_else(|_| panic!("{point} is not reached"));
        if wish == Goal::Aborted {
            match mover.want(number, wish).await {
                Ok(_) | Err(Error::Refused { .. }) => {}
                Err(error) => panic!("{point}, {victim}: {error:?}"),
            }
        }
        let ended = tokio::time::timeout(LIMIT, &mut driven).await;
        let (ended, resumed) = ended.unwrap_or_else(|_| panic!("{point}, {victim} killed: no end")).expect("no panic");
        fail::remove(point);
        let (wanted, state) = (wish.name(), ended.state);
        println!("{point}, server {victim} killed, then {wanted}: {}, resumed {resumed} times", state.name());
        match wish {
            Goal::Aborted => assert!(matches!(state, State::Aborted | State::Done), "{point}, {victim}: {state:?}"),
            _ => assert_eq!(state, if is_undone { State::Aborted } else { State::Done }, "{point}, {victim}"),
        }
        assert!(resumed <= RESUMES, "{point}, {victim}: resumed {resumed} times");
        if state == State::Done {
            std::mem::swap(&mut self.here, &mut self.there);
        }
    }
}

async fn at_each_point_of(file: &str) {
    let mut servers = OwnServers::up(3, 0).await;
    let (config, shards) = (servers.config(), servers.shards());
    let config = Config { relay_ms: 50, connect_timeout_ms: 10_000, ..config };
    let node = therev::connect(config).await.expect("a node");
    let mut authors = Vec::new();
    for shard in [1, 2] {
        let id = std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % 3 == shard);
        let id = id.expect("one of many");
        let new = NewUser { user_id: Some(id), user_name: format!("user-{shard}"), ..NewUser::default() };
        node.register(new, &Actor::Operator("test".into())).await.expect("registered");
        authors.push(id);
    }
    let mut writers = Vec::new();
    for (author, at) in [(0, 1), (1, 0)] {
        let open = node.create_thread(NewThread::new(authors[at], "A thread", "text")).await.expect("a thread");
        writers.push(Writing::begin(node.clone(), authors[author], open.thread_id));
    }
    let servers = Arc::new(Mutex::new(servers));
    let mut scene =
        Scene { servers: servers.clone(), node: node.clone(), moving: authors[0], here: ShardNo(1), there: ShardNo(2) };
    for point in points(file) {
        let wishes: &[Goal] =
            if OF_ABORTS.contains(&point.as_str()) { &[Goal::Done] } else { &[Goal::Done, Goal::Aborted] };
        let victims = |scene: &Scene| [scene.here.0.unsigned_abs(), scene.there.0.unsigned_abs(), CONTROL];
        let all = wishes.iter().flat_map(|wish| (0..3).map(move |at| (*wish, at)));
        for (wish, at) in all {
            scene.at(&point, victims(&scene)[at], wish).await;
            for writer in &writers {
                writer.goes_on(LIMIT).await;
            }
            nothing_left(&shards).await;
        }
    }
    for writer in writers {
        println!("{} posts were acknowledged, and are there", writer.prove(&shards).await);
    }
    let agrees = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while !node.check().await.is_ok_and(|report| report.ok) {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, agrees).await.expect("everything agrees in the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "some minutes; the full tier runs it"]
async fn between_and_within_states() {
    at_each_point_of("work.rs").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "some minutes; the full tier runs it"]
async fn in_the_copy() {
    at_each_point_of("copy.rs").await;
}

/// Invariant 20.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "some minutes; the full tier runs it"]
async fn among_slots_and_subscriptions() {
    at_each_point_of("objects.rs").await;
}

/// Invariant 16.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "some minutes; the full tier runs it"]
async fn in_the_switch() {
    at_each_point_of("switch.rs").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "some minutes; the full tier runs it"]
async fn at_the_end() {
    at_each_point_of("finish.rs").await;
}
