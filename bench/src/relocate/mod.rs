//! Moving rows: how long calls wait for a switch, and what a copy costs those who do not move.

mod copy;
mod scene;
mod traffic;

use crate::figure::{Figure, Pairs, count, median, percentile};
use crate::ground::Ground;
use crate::{Anyhow, Arguments};
use scene::{Done, Scene};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use therev::relocation::{Goal, Mover, Options, State, Try};

/// How many buckets change hands at once.
const BUCKETS: usize = 64;
/// How many connections a node has to each shard.
const CONNECTIONS: usize = 16;
/// How long everybody is at work before anything moves: what calls usually take.
const CALM: Duration = Duration::from_millis(500);
/// How long a transaction holds the tables where switches are to be given up, and how long there is none.
const HOLD: (Duration, Duration) = (Duration::from_millis(45), Duration::from_millis(1));
/// So many tries given up, or so long, is enough.
const GIVEN_UP: (usize, Duration) = (10, Duration::from_secs(40));

/// All tries of a mover.
type Tries = Arc<Mutex<Vec<Try>>>;

/// What calls took, in milliseconds.
#[derive(Default)]
struct Waits {
    writes: Vec<f64>,
    reads: Vec<f64>,
    others: Vec<f64>,
    usual_writes: Vec<f64>,
    usual_others: Vec<f64>,
    given_up: Vec<f64>,
    failed: u64,
    switches: usize,
    tries_given_up: usize,
    /// Given up for a transaction that was there for that.
    tries_held_up: usize,
    steps: BTreeMap<usize, (&'static str, Vec<f64>)>,
    /// From the end of a switch to the answer of a write that met it.
    answered: Vec<f64>,
}

/// Everything about relocations.
pub(crate) async fn relocate(ground: &Ground<'_>, arguments: &Arguments) -> Anyhow<Vec<Figure>> {
    let node = ground.relaying_node(CONNECTIONS).await?;
    let tries = Tries::default();
    let mover = {
        let tries = tries.clone();
        Mover::new(node.shards().clone(), Options::default()).on_try(move |one| lock(&tries).push(one.clone()))
    };
    let before = copy::statements(&Scene::new(ground, &node, 0, BUCKETS).await?, &node).await?;
    let mut waits = Waits::default();
    let switches = usize::try_from(arguments.switches)?;
    for number in 0..switches.div_ceil(2) {
        eprintln!("switches {} and {} of {switches}", number * 2 + 1, number * 2 + 2);
        let scene = Scene::new(ground, &node, number, BUCKETS).await?;
        Box::pin(there_and_back(&scene, &mover, &tries, &mut waits)).await?;
    }
    let giving_up = Instant::now();
    // A try that finds the moment between two of these transactions gets through.
    while waits.tries_held_up < GIVEN_UP.0 && giving_up.elapsed() < GIVEN_UP.1 {
        eprintln!("giving up, {} of {}", waits.tries_held_up, GIVEN_UP.0);
        Box::pin(give_up(ground, &Scene::new(ground, &node, 0, BUCKETS).await?, &mover, &tries, &mut waits)).await?;
    }
    let after = copy::statements(&Scene::new(ground, &node, 0, BUCKETS).await?, &node).await?;
    waits.say_steps();
    let mut figures = waits.figures();
    figures.extend(Box::pin(copy::copies(ground, &node, &mover)).await?);
    let note = format!("statements of a read and a reply, before anything moved: {before}, after: {after}");
    figures.push(
        Figure::at_most("extra_statements", count(after.abs_diff(before)), Some(0.0), "statements", 1).note(note),
    );
    Ok(figures)
}

fn lock(tries: &Tries) -> std::sync::MutexGuard<'_, Vec<Try>> {
    tries.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A relocation that is switched, then goes back: two switches, each under everybody's calls.
async fn there_and_back(scene: &Scene, mover: &Mover, tries: &Tries, waits: &mut Waits) -> Anyhow<()> {
    let everybody = scene.everybody();
    let calm = Instant::now();
    tokio::time::sleep(CALM).await;
    let calm = (calm, Instant::now());
    let moved = async {
        let begun = mover.begin(&mover.plan(&scene.request()).await?, Goal::Switched, "bench").await?.relocation;
        let there = mover.drive(begun, &|_| {}).await?.state;
        mover.want(begun, Goal::Reversed).await?;
        let back = mover.drive(begun, &|_| {}).await?.state;
        Anyhow::Ok((there, back))
    };
    let moved = Box::pin(moved).await;
    let done = everybody.end().await?;
    let ended = moved?;
    if ended != (State::Switched, State::Reversed) {
        return Err(format!("a relocation ended as {ended:?}").into());
    }
    waits.add(&done, calm, std::mem::take(&mut *lock(tries)));
    Ok(())
}

/// Tries of a switch that come upon a transaction which began after they had looked for one, and holds on.
async fn give_up(ground: &Ground<'_>, scene: &Scene, mover: &Mover, tries: &Tries, waits: &mut Waits) -> Anyhow<()> {
    let holder = ground.databases.shard(u16::try_from(scene.source.0)?).await?;
    let everybody = scene.everybody();
    let began = Instant::now();
    let begun = mover.begin(&mover.plan(&scene.request()).await?, Goal::Switched, "bench").await?.relocation;
    let holding = async {
        let given_up = || lock(tries).iter().filter(|one| one.backed_out.is_some()).count();
        let is_through = || lock(tries).iter().any(|one| one.backed_out.is_none());
        while !is_through() && given_up() < GIVEN_UP.0 && began.elapsed() < GIVEN_UP.1 {
            holder.batch_execute("BEGIN; LOCK TABLE posts IN ROW EXCLUSIVE MODE").await?;
            tokio::time::sleep(HOLD.0).await;
            holder.batch_execute("COMMIT").await?;
            tokio::time::sleep(HOLD.1).await;
        }
        mover.want(begun, Goal::Aborted).await.ok();
        Anyhow::Ok(())
    };
    let (driven, held) = tokio::join!(mover.drive(begun, &|_| {}), holding);
    let done = everybody.end().await?;
    held?;
    if driven?.state == State::Switched {
        mover.want(begun, Goal::Reversed).await?;
        mover.drive(begun, &|_| {}).await?;
    }
    waits.failed += done.failed();
    for one in std::mem::take(&mut *lock(tries)) {
        if let Some(late) = one.at("late") {
            waits.tries_held_up += 1;
            waits.given_up.extend(done.writers.met(late, one.ended()));
        }
    }
    Ok(())
}

impl Done {
    fn failed(&self) -> u64 {
        self.writers.failed + self.readers.failed + self.others.failed
    }
}

impl Waits {
    fn add(&mut self, done: &Done, calm: (Instant, Instant), tries: Vec<Try>) {
        self.failed += done.failed();
        self.usual_writes.extend(done.writers.met(calm.0, calm.1));
        self.usual_others.extend(done.others.met(calm.0, calm.1));
        for one in tries {
            let ended = one.ended();
            if one.backed_out.is_some() {
                self.tries_given_up += 1;
                // Who waited for one that came to nothing has waited all the same.
                self.writes.extend(one.at("late").into_iter().flat_map(|late| done.writers.met(late, ended)));
            } else if let Some(ready) = one.at("ready") {
                self.switches += 1;
                // Nobody writes between draining and the end: whoever is under way so late has waited or will.
                self.writes.extend(done.writers.met(ready, ended));
                self.answered.extend(done.writers.answers(ready, ended));
                self.reads.extend(done.readers.met(ready, ended));
                self.others.extend(done.others.met(one.began, ended));
                for (at, (name, took)) in one.durations().enumerate() {
                    self.steps.entry(at).or_insert((name, Vec::new())).1.push(took.as_secs_f64() * 1_000.0);
                }
            }
        }
    }

    fn say_steps(&self) {
        for (name, took) in self.steps.values().chain([&("answered", self.answered.clone())]) {
            let p = |hundredths| percentile(took.iter().copied(), hundredths);
            eprintln!("{name:10} p50 {:6.2}  p90 {:6.2}  p99 {:6.2} ms", p(50), p(90), p(99));
        }
    }

    fn figures(&self) -> Vec<Figure> {
        let ms = |name: &str, all: &[f64], hundredths, goal| {
            Figure::at_most(name, percentile(all.iter().copied(), hundredths), Some(goal), "ms", all.len())
        };
        let usual = median(self.usual_writes.iter().copied());
        let note = format!(
            "a whole reply of a caller whose write met one of {} switches; usually it takes {usual:.1} ms (p99 {:.1})",
            self.switches,
            percentile(self.usual_writes.iter().copied(), 99)
        );
        let mut others = Pairs::default();
        let others_p99 = |all: &[f64]| percentile(all.iter().copied(), 99);
        others.add(others_p99(&self.others), others_p99(&self.usual_others));
        let of = "calls of users who do not move, on the same two shards: during a switch beside before anything moved";
        let given_up = format!(
            "p99 of {} tries given up by a transaction that held on: a whole reply that met one; {} of the others were",
            self.tries_held_up, self.tries_given_up
        );
        vec![
            ms("pause_p50_ms", &self.writes, 50, 8.0).note(note.clone()),
            ms("pause_p99_ms", &self.writes, 99, 25.0).note(note),
            ms("reads_p99_ms", &self.reads, 99, 10.0).note("a read of what moves, met between decision and owned"),
            Figure::at_most("failed_calls", count(self.failed), Some(0.0), "calls", self.switches),
            others.time("others_p99", Some(1.5), "ms").note(of),
            ms("back_out_ms", &self.given_up, 99, 25.0 + usual).note(given_up),
        ]
    }
}
