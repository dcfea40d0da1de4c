//! The nemesis: breaks a cluster of its own again and again while writers write, and then proves that nothing was lost,
//! nothing doubled, and nothing left over.
//!
//! `therev-nemesis --faults N | --minutes N [--seed S]` ends with one line of JSON on standard output; what happens
//! meanwhile is told on standard error. The seed repeats the faults, not the writers' progress. Told to end (`SIGINT`,
//! `SIGTERM`), it breaks nothing more and proves what it did till then; told again, it leaves at once.

mod fault;
mod history;
mod journal;
mod mover;
mod reader;
mod saboteur;
mod settle;
mod verify;
mod world;
mod writer;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::fault::Schedule;
use crate::journal::Journals;
use crate::reader::Seen;
use crate::saboteur::{Known, Outcome, Saboteur};
use crate::settle::Switches;
use crate::verify::Verdict;
use crate::world::{MOVERS, World};
use crate::writer::{Kind, Spec};

/// How many examples of a kind are named.
const EXAMPLES: usize = 10;

#[derive(Parser)]
#[command(about = "Breaks a cluster of its own while writers write, and proves that nothing was lost")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Role>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand)]
enum Role {
    /// A writer; started by the nemesis itself.
    #[command(hide = true)]
    Writer { spec: String },
}

#[derive(Args)]
struct Run {
    /// How many faults to bring about
    #[arg(long)]
    faults: Option<u64>,
    /// How long to bring faults about
    #[arg(long, conflicts_with = "faults")]
    minutes: Option<u64>,
    /// Repeats the faults of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// Where PostgreSQL's programs are, instead of looking for them
    #[arg(long)]
    pg_bin: Option<PathBuf>,
}

/// The line that a run ends with.
#[derive(Debug, Default, Serialize)]
struct Summary {
    seed: u64,
    faults: u64,
    /// Of which kinds.
    kinds: BTreeMap<&'static str, u64>,
    acknowledged: u64,
    reads: u64,
    lost: usize,
    doubled: usize,
    left_over: usize,
    relocations: usize,
    switches: Switches,
    seconds: u64,
    /// Faults that could not be brought about here.
    #[serde(skip_serializing_if = "is_none")]
    skipped: usize,
    /// What else went wrong: reads that went back, proofs of `check`, writers that ended, calls without end.
    #[serde(skip_serializing_if = "is_none")]
    wrong: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_none(count: &usize) -> bool {
    *count == 0
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.command {
        Some(Role::Writer { spec }) => write(&spec).await,
        None => run(arguments.run).await,
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("therev-nemesis: {error}");
            let mut source = error.source();
            while let Some(reason) = source {
                eprintln!("  because: {reason}");
                source = reason.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn write(spec: &str) -> Result<ExitCode, Box<dyn Error>> {
    let spec: Spec = serde_json::from_str(spec)?;
    match spec.kind {
        Kind::Mover => Box::pin(mover::live(spec)).await?,
        _ => writer::live(spec).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn run(run: Run) -> Result<ExitCode, Box<dyn Error>> {
    let begin = Instant::now();
    let (tell_enough, told_enough) = watch::channel(false);
    let told_twice = told_twice(tell_enough)?;
    let seed = run.seed.unwrap_or_else(rand::random);
    eprintln!("therev-nemesis: seed {seed}");
    let torment = async {
        let mut world = World::make(run.pg_bin.clone()).await?;
        let summary = torment(&mut world, &run, seed, &told_enough).await?;
        Ok::<_, Box<dyn Error>>((world, summary))
    };
    let (world, mut summary) = tokio::select! {
        done = torment => done?,
        // Dropped where it is, the world clears up after itself.
        () = told_twice => return Err("told to end, twice".into()),
    };
    let left = world.clear();
    summary.left_over += named("left over", &left);
    summary.seconds = begin.elapsed().as_secs();
    println!("{}", serde_json::to_string(&summary)?);
    let clean = summary.lost + summary.doubled + summary.left_over + summary.wrong == 0;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Over when told to end twice; being told once is passed on.
fn told_twice(tell_enough: watch::Sender<bool>) -> Result<impl Future<Output = ()>, Box<dyn Error>> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    Ok(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminated.recv() => {}
                _ = interrupted.recv() => {}
            }
            eprintln!("therev-nemesis: told to end");
            tell_enough.send_replace(true);
        }
    })
}

/// Writers, readers and faults; then the proof.
async fn torment(
    world: &mut World,
    run: &Run,
    seed: u64,
    told_enough: &watch::Receiver<bool>,
) -> Result<Summary, Box<dyn Error>> {
    let known = Known::new(Journals::of(world.specs.iter().map(|spec| spec.journal.clone())));
    let (tell_end, end) = watch::channel(false);
    let (users, threads) = reader::what(world);
    let nodes = [(world.node().await?, false), (world.node().await?, true)];
    let mut saboteur = Saboteur::new(world, known.clone())?;
    let readers = nodes.map(|(node, is_stale)| {
        let (users, threads, failures) = (users.clone(), threads.clone(), saboteur.failed_reads.clone());
        tokio::spawn(reader::read(node, is_stale, failures, users, threads, end.clone()))
    });
    saboteur.all_begin().await?;
    let (faults, kinds) = strike_all(&mut saboteur, run, seed, told_enough).await;
    let outcome = saboteur.end_writers().await?;
    tell_end.send_replace(true);
    let mut seen = Seen::default();
    for reader in readers {
        seen.join(reader.await?);
    }
    let journals = std::mem::take(&mut *known.now()?);
    eprintln!("therev-nemesis: failed calls: {:?}, {} rows refused", journals.failed, journals.refused);
    eprintln!("therev-nemesis: movers' relocations: {:?}", journals.brought);
    world.raise()?;
    let verdict = verify::verify(world, &journals).await?;
    let Outcome { disturbed, crashed, stuck, wrong, skipped } = outcome;
    let Verdict { acknowledged, lost, doubled, check, left_over, relocations, switches, stuck: open } = verdict;
    seen.judge(&journals);
    let never_refused = (journals.refused == 0).then(|| "no row was ever refused".to_owned());
    let wrong = named("read back in time", &seen.back)
        + named("odd", &[seen.odd, journals.odd.clone()].concat())
        + named("hung", &[seen.hung, journals.hung.clone()].concat())
        + named("ended", &crashed)
        + named("stuck", &[stuck, open].concat())
        + named("failed with nothing broken", &disturbed)
        + named("wrong", &[wrong, check].concat())
        + named("wrong", never_refused.as_slice());
    Ok(Summary {
        seed,
        faults: faults - skipped.len() as u64,
        kinds,
        acknowledged,
        reads: seen.reads,
        lost: named("lost", &lost),
        doubled: named("doubled", &doubled),
        left_over: named("left over", &left_over),
        relocations,
        switches,
        seconds: 0,
        skipped: named("skipped", &skipped),
        wrong,
    })
}

/// Fault after fault, until there were enough, or something stands still. Says how many, and of which kinds.
async fn strike_all(
    saboteur: &mut Saboteur<'_>,
    run: &Run,
    seed: u64,
    told_enough: &watch::Receiver<bool>,
) -> (u64, BTreeMap<&'static str, u64>) {
    let begin = Instant::now();
    let enough = |faults: u64| match (run.faults, run.minutes) {
        (Some(wanted), _) => faults >= wanted,
        (None, minutes) => begin.elapsed() >= Duration::from_secs(60 * minutes.unwrap_or(1)),
    };
    let (mut faults, mut kinds) = (0, BTreeMap::<_, u64>::new());
    for fault in Schedule::new(seed, saboteur.writers(), MOVERS) {
        if enough(faults) || *told_enough.borrow() {
            break;
        }
        faults += 1;
        let (struck, skipped) = (Instant::now(), saboteur.skipped.len());
        if let Err(error) = saboteur.strike(fault).await {
            saboteur.fails(&fault, error.as_ref());
        }
        if saboteur.skipped.len() == skipped {
            *kinds.entry(fault.kind()).or_default() += 1;
        }
        eprintln!("therev-nemesis: {faults}: {fault}, over after {:.1?}", struck.elapsed());
        // What does not go on now will not do so after the next fault.
        if !saboteur.stuck.is_empty() {
            break;
        }
    }
    (faults, kinds)
}

/// Tells some of what was found, and says how much it is.
fn named(kind: &str, found: &[String]) -> usize {
    for example in found.iter().take(EXAMPLES) {
        eprintln!("therev-nemesis: {kind}: {example}");
    }
    if found.len() > EXAMPLES {
        eprintln!("therev-nemesis: {kind}: {} more", found.len() - EXAMPLES);
    }
    found.len()
}
