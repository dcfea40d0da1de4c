//! `kill -9` of the process that moves rows, at every fail point of the sources, while authors write: their writes go on by
//! themselves, and the relocation is carried on or undone by another process, with nothing lost and nothing left.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;
use testkit::{TestCluster, Writing, nothing_left};
use therev::relocation::{Error, Goal, Mover, Options, Relocation, Request, State};
use therev::{Actor, Bucket, Config, Group, Layout, NewThread, NewUser, ShardNo, Therev, UserId};
use tokio::process::{Child, Command};

/// A switch that nobody carries on any more holds writes up no longer.
const WRITES_WAIT: Duration = Duration::from_secs(5);
/// How long it may take altogether until a step of a test is done.
const LIMIT: Duration = Duration::from_secs(120);
/// A machine that is busy with tests takes longer than the product's budget.
const BUDGET: Duration = Duration::from_secs(1);

/// Points that only an abort passes.
pub(crate) const OF_ABORTS: [&str; 3] =
    ["relocation.undone_at_source", "relocation.undone_streams", "relocation.undone_rows"];
/// Points that are passed in several steps, and the passes that are worth a death: those between any two states, those at
/// the end, and those where an earlier copy is cleared away. First those where no other point finds the same; the full tier
/// goes through the others.
const PASSED_OFTEN: [(&str, &[u32], &[u32]); 4] = [
    ("relocation.stepped", &[1, 3, 5], &[2, 4, 6]),
    ("relocation.before_advance", &[2, 7], &[1, 5]),
    ("relocation.unsubscribed", &[3], &[1]),
    ("relocation.slots_dropped", &[4], &[1]),
];

/// The files of the crate that have fail points.
pub(crate) const FILES: [&str; 5] = ["work.rs", "copy.rs", "objects.rs", "switch.rs", "finish.rs"];

/// The fail points in a file of the crate, in its order.
pub(crate) fn points(file: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../relocation/src");
    let text = std::fs::read_to_string(folder.join(file)).expect("the sources are there");
    let after = text.split("fail_point!(\"").skip(1);
    after.map(|rest| rest.split('"').next().expect("a name").to_owned()).collect()
}

/// A cluster of two shards whose authors write all the while.
struct Scene {
    cluster: TestCluster,
    node: Therev,
    mover: Mover,
    writers: Vec<Writing>,
}

/// Some buckets, with an author's among them, that go to and fro; two lots of them at a time.
struct Lot {
    buckets: Vec<Bucket>,
    here: ShardNo,
}

impl Lot {
    fn there(&self) -> ShardNo {
        ShardNo(1 - self.here.0)
    }
}

/// An id whose bucket is on this shard of two, in a part of the buckets of its own.
fn id_in(shard: u16, part: u16) -> UserId {
    let fits = |id: &UserId| id.bucket().number() % 2 == shard && id.bucket().number() / 1_024 == part;
    std::iter::repeat_with(UserId::new).find(fits).expect("one of many")
}

impl Scene {
    async fn new() -> (Scene, Lot, Lot) {
        let cluster = TestCluster::new(Layout::Colocated, 2).await;
        let node = therev::connect(Config { relay_ms: 100, ..cluster.config() }).await.expect("a node");
        let authors = [id_in(0, 0), id_in(0, 1), id_in(1, 2)];
        for (n, id) in authors.into_iter().enumerate() {
            let new = NewUser { user_id: Some(id), user_name: format!("user-{n}"), ..NewUser::default() };
            node.register(new, &Actor::Operator("test".into())).await.expect("registered");
        }
        let mut writers = Vec::new();
        for (author, at) in [(0, 2), (1, 0), (2, 1)] {
            let open = node.create_thread(NewThread::new(authors[at], "A thread", "text")).await.expect("a thread");
            writers.push(Writing::begin(node.clone(), authors[author], open.thread_id));
        }
        let mover = Mover::new(node.shards().clone(), Options { budget: BUDGET, ..Options::default() });
        let lot = |author: UserId| {
            let last = (author.bucket().number() ^ 2).try_into().expect("a bucket");
            Lot { buckets: BTreeSet::from([author.bucket(), last]).into_iter().collect(), here: ShardNo(0) }
        };
        (Scene { cluster, node, mover, writers }, lot(authors[0]), lot(authors[1]))
    }

    fn shards(&self) -> Vec<String> {
        (0..self.cluster.shards()).map(|n| self.cluster.url(&format!("shard_{n}"))).collect()
    }

    async fn begin(&self, lot: &Lot, goal: Goal) -> i64 {
        let (groups, buckets) = (Group::ALL.to_vec(), lot.buckets.clone());
        let request = Request { groups, buckets, pin: None, source: lot.here, target: lot.there() };
        let plan = self.mover.plan(&request).await.expect("a plan");
        assert_eq!(plan.obstacles, []);
        self.mover.begin(&plan, goal, "test").await.expect("it begins").relocation
    }

    /// Everybody writes something more, with nobody to help them.
    async fn writers_go_on(&self) {
        futures_util::future::join_all(self.writers.iter().map(|writer| writer.goes_on(WRITES_WAIT))).await;
    }

    /// A process that carries the relocation on until it comes to a point.
    fn process(&self, number: i64, point: &str, when: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_cut-off"))
            .args([point, when, &self.cluster.config().control, testkit::PASSWORD])
            .args(["relocate", &number.to_string()])
            .kill_on_drop(true)
            .spawn()
            .expect("the process starts")
    }

    /// The lease of a process that is dead or stopped runs out by itself; here that is not waited for.
    async fn end_lease(&self, number: i64) {
        let lapse = "UPDATE therev.relocations SET leased_until = now() WHERE relocation = $1";
        self.cluster.stranger("control").await.execute(lapse, &[&number]).await.expect("the lease ends");
    }

    /// A process carries the relocation on and is killed at the nth pass of a point.
    async fn cut_off(&self, number: i64, point: &str, nth: u32) {
        let mut child = self.process(number, point, &nth.to_string());
        let status = tokio::time::timeout(LIMIT, child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("{point} {nth} is not reached")).expect("it ends");
        assert_eq!(status.signal(), Some(9), "{point} {nth}: {status}");
        self.writers_go_on().await;
        self.end_lease(number).await;
    }

    /// A process that carries the relocation on, stopped at a point.
    async fn stopped(&self, number: i64, point: &str) -> (Child, Pid) {
        let child = self.process(number, point, "stop");
        let pid = Pid::from_raw(child.id().and_then(|id| id.try_into().ok()).expect("it lives")).expect("a number");
        let is_stopped = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            loop {
                ticks.tick().await;
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).expect("it lives");
                if stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')) {
                    return;
                }
            }
        };
        tokio::time::timeout(LIMIT, is_stopped).await.unwrap_or_else(|_| panic!("{point} is not reached"));
        self.writers_go_on().await;
        self.end_lease(number).await;
        (child, pid)
    }

    /// A process that was stopped wakes, and ends.
    async fn woken((mut child, pid): (Child, Pid), point: &str) {
        kill_process(pid, Signal::CONT).expect("it goes on");
        let status = tokio::time::timeout(LIMIT, child.wait()).await.expect("it ends").expect("it ends");
        println!("{point}, stopped: {status}");
    }

    /// A process is stopped at a point; writers and another mover go on without it, and it ends when it wakes.
    async fn stopped_and_overtaken(&self, lot: &mut Lot, point: &str) {
        let number = self.begin(lot, Goal::Done).await;
        let sleeper = self.stopped(number, point).await;
        assert_eq!(self.resume(number).await.state, State::Done, "{point}");
        Scene::woken(sleeper, point).await;
        lot.here = lot.there();
    }

    /// A process is stopped at a point; another mover undoes what it did, and it ends when it wakes.
    async fn stopped_and_undone(&self, lot: &Lot, point: &str) {
        let number = self.begin(lot, Goal::Done).await;
        let sleeper = self.stopped(number, point).await;
        self.mover.want(number, Goal::Aborted).await.expect("it can be undone");
        assert_eq!(self.resume(number).await.state, State::Aborted, "{point}");
        Scene::woken(sleeper, point).await;
    }

    /// A process is stopped while it undoes a copy. Another one undoes it, too, copies anew and compares: whatever the first one still
    /// meant to take is not there for it when it wakes.
    async fn stopped_undoing(&self, lot: &mut Lot, point: &str) {
        let number = self.begin(lot, Goal::Done).await;
        self.cut_off(number, "relocation.caught_up", 1).await;
        self.mover.want(number, Goal::Aborted).await.expect("it can be undone");
        let sleeper = self.stopped(number, point).await;
        self.mover.want(number, Goal::Done).await.expect("it is wanted again");
        // From the beginning: planned, copied, caught up, verified.
        self.cut_off(number, "relocation.stepped", 4).await;
        Scene::woken(sleeper, point).await;
        self.mover.verify(number, false).await.unwrap_or_else(|error| panic!("{point}: {error:?}"));
        self.end_lease(number).await;
        assert_eq!(self.resume(number).await.state, State::Done, "{point}");
        lot.here = lot.there();
    }

    /// Killed on the way back, which is called off then: where it was decided it is carried through, else everything stays.
    async fn killed_going_back_and_aborted(&self, lot: &mut Lot, point: &str) {
        let number = self.begin(lot, Goal::Switched).await;
        assert_eq!(self.resume(number).await.state, State::Switched);
        self.mover.want(number, Goal::Reversed).await.expect("the way back is open");
        let mut child = self.process(number, point, "1");
        let status = tokio::time::timeout(LIMIT, child.wait()).await.expect("it is reached").expect("it ends");
        assert_eq!(status.signal(), Some(9), "{point}: {status}");
        self.end_lease(number).await;
        let ended = match self.mover.want(number, Goal::Aborted).await {
            Ok(_) => self.resume(number).await.state,
            Err(error) => panic!("{point}: {error:?}"),
        };
        println!("{point} on the way back, aborted: {}", ended.name());
        if ended == State::Switched {
            self.mover.want(number, Goal::Done).await.expect("it can be finished");
            assert_eq!(self.resume(number).await.state, State::Done, "{point}");
            lot.here = lot.there();
        } else {
            assert_eq!(ended, State::Reversed, "{point}");
        }
    }

    /// Another process carries it on as far as it goes.
    async fn resume(&self, number: i64) -> Relocation {
        let mover = Mover::new(self.node.shards().clone(), Options { budget: BUDGET, ..Options::default() });
        let driven = Box::pin(mover.drive(number, &|_| {}));
        let ended = tokio::time::timeout(LIMIT, driven).await;
        assert!(ended.is_ok(), "it comes to no end: {:?}", mover.show(number).await);
        ended.expect("in time").expect("it goes on")
    }

    /// Whether the shards have decided that the buckets are the target's.
    async fn is_decided(&self, lot: &Lot) -> bool {
        let source = self.cluster.stranger(&format!("shard_{}", lot.here)).await;
        let sql = "SELECT bool_and(state IN ('owned', 'draining')) FROM therev.ownership WHERE bucket = $1";
        !source.query_one(sql, &[&lot.buckets[0].sql()]).await.expect("an answer").get::<_, bool>(0)
    }

    /// Killed, then resumed.
    async fn killed_and_resumed(&self, lot: &mut Lot, point: &str, nth: u32) {
        let number = self.begin(lot, Goal::Done).await;
        self.cut_off(number, point, nth).await;
        assert_eq!(self.resume(number).await.state, State::Done, "{point} {nth}");
        println!("{point} {nth}, resumed: done");
        lot.here = lot.there();
    }

    /// Killed, then aborted: undone where it was not decided, carried through where it was.
    async fn killed_and_aborted(&self, lot: &mut Lot, point: &str, nth: u32) {
        let number = self.begin(lot, Goal::Done).await;
        self.cut_off(number, point, nth).await;
        let is_decided = self.is_decided(lot).await;
        let ended = match self.mover.want(number, Goal::Aborted).await {
            Ok(_) => self.resume(number).await,
            Err(Error::Refused { .. }) if is_decided => self.mover.show(number).await.expect("the relocation"),
            Err(error) => panic!("{point} {nth}: {error:?}"),
        };
        println!("{point} {nth}, aborted: {}", ended.state.name());
        assert_eq!(ended.state == State::Aborted, !is_decided, "{point} {nth}: {ended:?}");
        if is_decided {
            if ended.state == State::Switched {
                self.mover.want(number, Goal::Done).await.expect("it can be finished");
            }
            assert_eq!(self.resume(number).await.state, State::Done, "{point} {nth}");
            lot.here = lot.there();
        }
    }

    /// Killed while it is undone, then undone to the end.
    async fn killed_aborting(&self, lot: &Lot, point: &str) {
        let number = self.begin(lot, Goal::Done).await;
        self.cut_off(number, "relocation.caught_up", 1).await;
        self.mover.want(number, Goal::Aborted).await.expect("it can be undone");
        self.cut_off(number, point, 1).await;
        assert_eq!(self.resume(number).await.state, State::Aborted, "{point}");
    }

    /// Killed on the way back, then brought back.
    async fn killed_going_back(&self, lot: &Lot, point: &str) {
        let number = self.begin(lot, Goal::Switched).await;
        assert_eq!(self.resume(number).await.state, State::Switched);
        self.writers_go_on().await;
        self.mover.want(number, Goal::Reversed).await.expect("the way back is open");
        self.cut_off(number, point, 1).await;
        assert_eq!(self.resume(number).await.state, State::Reversed, "{point}");
    }

    async fn rests(&self) {
        nothing_left(&self.shards()).await;
        self.writers_go_on().await;
    }

    async fn finish(self) {
        let shards = self.shards();
        let mut written = 0;
        for writer in self.writers {
            written += writer.prove(&shards).await;
        }
        println!("{written} posts were acknowledged, and are there");
        drop((self.mover, self.node));
        self.cluster.finish().await;
    }
}

/// Kills two movers at each of these passes of points, one to be resumed and one to be aborted.
async fn at_passes(passes: &[(&str, u32)]) {
    let (scene, mut one, mut other) = Scene::new().await;
    for (point, nth) in passes {
        let resumed = Box::pin(scene.killed_and_resumed(&mut one, point, *nth));
        let aborted = Box::pin(scene.killed_and_aborted(&mut other, point, *nth));
        tokio::join!(resumed, aborted);
        scene.rests().await;
    }
    scene.finish().await;
}

/// The same at each of these points.
async fn at_each(points: &[String]) {
    let mut all = Vec::new();
    for point in points.iter().map(String::as_str).filter(|point| !OF_ABORTS.contains(point)) {
        let passes = PASSED_OFTEN.iter().find(|(often, ..)| *often == point).map_or(&[1][..], |(_, passes, _)| passes);
        all.extend(passes.iter().map(|nth| (point, *nth)));
    }
    at_passes(&all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_states() {
    let of_states = |point: &String| PASSED_OFTEN.iter().any(|(often, ..)| often == point);
    at_each(&points("work.rs").into_iter().filter(of_states).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "they find what other points found; the full tier runs it"]
async fn at_passes_that_resemble_others() {
    let all = PASSED_OFTEN.iter().flat_map(|(point, _, more)| more.iter().map(move |nth| (*point, *nth)));
    at_passes(&all.collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn within_states() {
    let of_states = |point: &String| PASSED_OFTEN.iter().any(|(often, ..)| often == point);
    at_each(&points("work.rs").into_iter().filter(|point| !of_states(point)).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_copy() {
    at_each(&points("copy.rs")).await;
}

/// Invariant 20.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn among_slots_and_subscriptions() {
    at_each(&points("objects.rs")).await;
}

/// Invariants 14 and 15.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_switch() {
    at_each(&points("switch.rs")).await;
}

/// Invariants 15 and 19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_in_the_switch_nobody_waits_for_what_lies_ready() {
    let (scene, mut one, mut other) = Scene::new().await;
    let decision = Box::pin(scene.stopped_and_overtaken(&mut one, "relocation.ready"));
    let ownership = Box::pin(scene.stopped_and_overtaken(&mut other, "relocation.decided"));
    tokio::join!(decision, ownership);
    scene.rests().await;
    scene.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_end() {
    at_each(&points("finish.rs")).await;
}

/// Invariant 19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_in_the_copy_it_holds_nobody_up() {
    let (scene, mut one, other) = Scene::new().await;
    let carried_on = Box::pin(scene.stopped_and_overtaken(&mut one, "relocation.copying_some"));
    let undone = Box::pin(scene.stopped_and_undone(&other, "relocation.copying_some"));
    tokio::join!(carried_on, undone);
    scene.rests().await;
    scene.finish().await;
}

/// Invariant 20.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_it_is_undone() {
    let (scene, one, other) = Scene::new().await;
    let [first, second, third] = OF_ABORTS;
    tokio::join!(Box::pin(scene.killed_aborting(&one, first)), Box::pin(scene.killed_aborting(&other, second)));
    Box::pin(scene.killed_aborting(&one, third)).await;
    scene.rests().await;
    scene.finish().await;
}

/// Invariant 19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_while_it_is_undone() {
    let (scene, mut one, mut other) = Scene::new().await;
    let in_the_middle = Box::pin(scene.stopped_undoing(&mut one, "relocation.deleted_some"));
    let at_the_end = Box::pin(scene.stopped_undoing(&mut other, "relocation.undone_rows"));
    tokio::join!(in_the_middle, at_the_end);
    scene.rests().await;
    Box::pin(scene.stopped_undoing(&mut one, "relocation.undone_streams")).await;
    scene.rests().await;
    scene.finish().await;
}

/// Invariants 15 and 17.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_that_was_broken_off_is_called_off() {
    let (scene, mut one, mut other) = Scene::new().await;
    let given_up = Box::pin(scene.killed_going_back_and_aborted(&mut one, "relocation.ready"));
    let carried_through = Box::pin(scene.killed_going_back_and_aborted(&mut other, "relocation.decided"));
    tokio::join!(given_up, carried_through);
    scene.rests().await;
    scene.finish().await;
}

/// Invariant 17.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_the_way_back() {
    let (scene, one, other) = Scene::new().await;
    let all = points("switch.rs").into_iter().chain(points("finish.rs"));
    let all: Vec<String> = all.filter(|point| !OF_ABORTS.contains(&point.as_str())).collect();
    for pair in all.chunks(2) {
        let first = Box::pin(scene.killed_going_back(&one, &pair[0]));
        let second = async {
            if let Some(point) = pair.get(1) {
                Box::pin(scene.killed_going_back(&other, point)).await;
            }
        };
        tokio::join!(first, second);
        scene.rests().await;
    }
    scene.finish().await;
}

/// A point in another file, or a second one of the same name, would be in none of the tests above.
#[test]
fn no_point_is_forgotten() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../relocation/src");
    let mut names = BTreeSet::new();
    for file in std::fs::read_dir(folder).expect("the sources are there").flatten() {
        let file = file.file_name().into_string().expect("a name in UTF-8");
        let found = points(&file);
        // What stands on relocations has tests of its own, in `cut_off_shards`.
        let known = FILES.contains(&file.as_str()) || file == "rebalance.rs";
        assert!(known || found.is_empty(), "{file} has fail points that no test here goes through");
        for point in found.into_iter().filter(|point| point.starts_with("relocation.")) {
            assert!(names.insert(point.clone()), "{point} is there twice");
        }
    }
    let of_aborts = OF_ABORTS.iter().all(|point| names.contains(*point));
    assert!(of_aborts && PASSED_OFTEN.iter().all(|(point, ..)| names.contains(*point)), "{names:?}");
    assert!(names.len() >= 29, "{names:?}");
}
