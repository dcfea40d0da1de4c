//! Brings faults about, heals them, and keeps the writers alive.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::{Cluster, ServerId};
use testkit::{Frozen, Mode};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::fault::Fault;
use crate::journal::Journals;
use crate::settle;
use crate::world::{MOVERS, World};
use crate::writer::History;

/// How long anything may take to be as it was after a fault was healed.
const HEALS_WITHIN: Duration = Duration::from_secs(60);
/// How long all writers may take to begin.
const BEGINS_WITHIN: Duration = Duration::from_secs(180);
/// How long a full disk waits for somebody who wants to write on it.
const DISK_IS_MET_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// After a fault: the lease of a dead mover runs out, and a switch that it left is ended.
const CALMS_WITHIN: Duration = Duration::from_secs(7);

/// What all journals say, shared with the readers.
#[derive(Clone)]
pub(crate) struct Known(Arc<Mutex<Journals>>);

impl Known {
    pub(crate) fn new(journals: Journals) -> Known {
        Known(Arc::new(Mutex::new(journals)))
    }

    /// What was written until now.
    pub(crate) fn now(&self) -> std::io::Result<MutexGuard<'_, Journals>> {
        let mut journals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        journals.read_on()?;
        Ok(journals)
    }
}

pub(crate) struct Saboteur<'a> {
    world: &'a mut World,
    known: Known,
    /// Writers, then movers.
    writers: Vec<Child>,
    /// Movers that sleep, with who wakes them.
    sleepers: BTreeMap<usize, JoinHandle<()>>,
    /// How many reads failed.
    pub(crate) failed_reads: Arc<AtomicU64>,
    /// Calls that failed while nothing was broken.
    pub(crate) disturbed: Vec<String>,
    /// Writers that ended by themselves: a panic, or an error that they cannot go on with.
    pub(crate) crashed: Vec<String>,
    /// Histories that did not go on after a fault was healed.
    pub(crate) stuck: Vec<String>,
    /// What `check` named between two faults: a promotion later, a repair would have put it right.
    pub(crate) wrong: Vec<String>,
    /// Faults that could not be brought about here, and why.
    pub(crate) skipped: Vec<String>,
}

impl<'a> Saboteur<'a> {
    /// Starts the writers.
    pub(crate) fn new(world: &'a mut World, known: Known) -> Result<Saboteur<'a>, Box<dyn Error>> {
        let mut saboteur = Saboteur {
            world,
            known,
            writers: Vec::new(),
            sleepers: BTreeMap::new(),
            failed_reads: Arc::default(),
            disturbed: Vec::new(),
            crashed: Vec::new(),
            stuck: Vec::new(),
            wrong: Vec::new(),
            skipped: Vec::new(),
        };
        for number in 0..saboteur.world.specs.len() {
            let writer = saboteur.start_writer(number)?;
            saboteur.writers.push(writer);
        }
        Ok(saboteur)
    }

    /// Waits until every history has begun: on a busy machine that takes longer than anything after a fault.
    pub(crate) async fn all_begin(&mut self) -> Result<(), Box<dyn Error>> {
        let specs = self.world.specs.iter().filter(|spec| spec.kind.appends());
        let users: Vec<_> = specs.flat_map(|spec| spec.histories.iter().map(|history| history.user)).collect();
        let all = || {
            let known = self.known.now()?;
            Ok(users.iter().all(|user| known.acknowledged(*user) > 0))
        };
        if wait_for(BEGINS_WITHIN, all).await? { Ok(()) } else { Err("not every history has begun".into()) }
    }

    /// How many writers there are.
    pub(crate) fn writers(&self) -> usize {
        self.writers.len() - MOVERS
    }

    fn start_writer(&self, number: usize) -> Result<Child, Box<dyn Error>> {
        let spec = serde_json::to_string(&self.world.specs[number])?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("writer").arg(spec).stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
        // Ctrl-C at a terminal is meant for the nemesis, whose writers write on until it is done.
        command.process_group(0);
        Ok(command.spawn()?)
    }

    /// One fault from its beginning until every history goes on.
    pub(crate) async fn strike(&mut self, fault: Fault) -> Result<(), Box<dyn Error>> {
        if let (Fault::FillDisk, Err(reason)) = (fault, &self.world.disk) {
            self.skipped.push(format!("{fault}: {reason}"));
            return Ok(());
        }
        self.bring_about(fault).await?;
        self.heal(fault)?;
        self.revive_crashed()?;
        self.all_go_on(fault).await
    }

    async fn bring_about(&mut self, fault: Fault) -> Result<(), Box<dyn Error>> {
        match fault {
            Fault::KillWriter { writer } => self.kill_writer(writer).await?,
            Fault::KillMover { mover } => self.kill_writer(self.writers() + mover).await?,
            Fault::SleepMover { mover, time } => self.put_to_sleep(self.writers() + mover, time)?,
            Fault::Quiet { time } => self.be_quiet(time).await?,
            Fault::KillServer { shard } => {
                let cluster = self.world.cluster()?;
                tokio::task::block_in_place(|| cluster.kill(cluster.primary(shard)))?;
            }
            Fault::Promote { shard } => {
                let cluster = self.world.cluster.as_mut().ok_or("the cluster is gone")?;
                let primary = cluster.primary(shard);
                // All processes at once, as a machine ends that loses its power: those that outlive the first one for a moment would show
                // commits that no standby has.
                let frozen = freeze(cluster, primary)?;
                tokio::task::block_in_place(|| {
                    cluster.kill(primary)?;
                    frozen.kill();
                    cluster.put_first(shard, &mut |_| {})
                })?;
                self.world.lead_proxies()?;
            }
            Fault::LoseControl { writer, time } => {
                self.world.control.set(Mode::Cut);
                self.kill_writer(writer).await?;
                tokio::time::sleep(time).await;
            }
            Fault::LoseDirectory { time } => {
                self.world.directory.set(Mode::Cut);
                tokio::time::sleep(time).await;
            }
            Fault::Network { shard, mode, time } => {
                self.world.servers[usize::from(shard)].set(mode);
                tokio::time::sleep(time).await;
            }
            Fault::Freeze { shard, time } => {
                let cluster = self.world.cluster()?;
                let frozen = freeze(cluster, cluster.primary(shard))?;
                tokio::time::sleep(time).await;
                drop(frozen);
            }
            Fault::FreezeStandby { shard, time } => {
                let cluster = self.world.cluster()?;
                let follows = |it: &local::ServerStatus| it.follows == Some(cluster.primary(shard));
                let standby = cluster.status().into_iter().find(follows).ok_or("it has no standby")?;
                let frozen = freeze(cluster, standby.server)?;
                tokio::time::sleep(time).await;
                drop(frozen);
            }
            Fault::FillDisk => {
                if let Ok(disk) = &self.world.disk {
                    let before = self.disk_was_full()?;
                    disk.fill()?;
                    if !wait_for(DISK_IS_MET_WITHIN, || Ok(self.disk_was_full()? > before)).await? {
                        eprintln!("therev-nemesis: nobody noticed the full disk");
                    }
                }
            }
        }
        Ok(())
    }

    fn heal(&mut self, fault: Fault) -> Result<(), Box<dyn Error>> {
        match fault {
            Fault::KillWriter { .. }
            | Fault::KillMover { .. }
            | Fault::SleepMover { .. }
            | Fault::Quiet { .. }
            | Fault::Freeze { .. }
            | Fault::FreezeStandby { .. } => {}
            Fault::KillServer { shard } => {
                let cluster = self.world.cluster.as_mut().ok_or("the cluster is gone")?;
                let primary = cluster.primary(shard);
                tokio::task::block_in_place(|| cluster.start_server(primary, &mut |_| {}))?;
                self.world.lead_proxies()?;
            }
            Fault::Promote { shard } => {
                let cluster = self.world.cluster()?;
                tokio::task::block_in_place(|| cluster.follow(shard, &mut |_| {}))?;
            }
            Fault::LoseControl { .. } => self.world.control.set(Mode::Pass),
            Fault::LoseDirectory { .. } => self.world.directory.set(Mode::Pass),
            Fault::Network { shard, .. } => self.world.servers[usize::from(shard)].set(Mode::Pass),
            Fault::FillDisk => {
                if let Ok(disk) = &self.world.disk {
                    disk.empty()?;
                }
            }
        }
        Ok(())
    }

    /// A fault could not be brought about or ended: says so at once, with what the servers have logged last, since they are
    /// removed in the end.
    pub(crate) fn fails(&mut self, fault: &Fault, error: &dyn Error) {
        let mut said = format!("{fault}: {error}");
        let mut source = error.source();
        while let Some(reason) = source {
            said = format!("{said}: {reason}");
            source = reason.source();
        }
        eprintln!("therev-nemesis: {said}");
        self.world.tell_logs();
        self.stuck.push(said);
    }

    async fn kill_writer(&mut self, number: usize) -> Result<(), Box<dyn Error>> {
        self.revive_crashed()?;
        if let Some(waker) = self.sleepers.remove(&number) {
            waker.abort();
        }
        self.writers[number].kill().await?;
        self.writers[number] = self.start_writer(number)?;
        Ok(())
    }

    fn put_to_sleep(&mut self, number: usize, time: Duration) -> Result<(), Box<dyn Error>> {
        self.revive_crashed()?;
        if self.sleepers.get(&number).is_some_and(|waker| !waker.is_finished()) {
            return Ok(());
        }
        let pid = self.writers[number].id().ok_or("it has ended")?;
        let asleep = Frozen::process(i32::try_from(pid)?)?;
        let waker = tokio::spawn(async move {
            tokio::time::sleep(time).await;
            drop(asleep);
        });
        self.sleepers.insert(number, waker);
        Ok(())
    }

    /// Only relocations go on. What is counted begins after who was killed or asleep has nothing in its hands any more.
    async fn be_quiet(&mut self, time: Duration) -> Result<(), Box<dyn Error>> {
        for (_, waker) in std::mem::take(&mut self.sleepers) {
            waker.await?;
        }
        let (vacuumed, ()) = tokio::join!(self.world.vacuum(), tokio::time::sleep(CALMS_WITHIN));
        vacuumed?;
        let before = self.failures()?;
        tokio::time::sleep(time).await;
        let after = self.failures()?;
        let more = after.iter().filter(|(kind, count)| **count > before.get(*kind).copied().unwrap_or(0));
        self.disturbed.extend(more.map(|(kind, count)| format!("{kind}: {count} after {:?}", before.get(kind))));
        self.prove().await
    }

    /// All databases agree, beside writers and movers.
    async fn prove(&mut self) -> Result<(), Box<dyn Error>> {
        let node = self.world.node().await?;
        self.stuck.extend(settle::lives(self.world, &node).await?);
        self.wrong.extend(settle::check(&node).await?);
        Ok(())
    }

    /// How many calls of writers and readers failed.
    fn failures(&self) -> std::io::Result<BTreeMap<String, u64>> {
        let mut failures = self.known.now()?.failed.clone();
        failures.retain(|kind, _| !kind.starts_with("mover"));
        failures.insert("reads".into(), self.failed_reads.load(Ordering::Relaxed));
        Ok(failures)
    }

    /// A writer that ended by itself is noted and lives on.
    fn revive_crashed(&mut self) -> Result<(), Box<dyn Error>> {
        for number in 0..self.writers.len() {
            if let Some(status) = self.writers[number].try_wait()? {
                self.crashed.push(format!("writer {number} ended by itself: {status}"));
                self.writers[number] = self.start_writer(number)?;
            }
        }
        Ok(())
    }

    /// Waits until something new is acknowledged in every history.
    async fn all_go_on(&mut self, fault: Fault) -> Result<(), Box<dyn Error>> {
        let specs = self.world.specs.iter().filter(|spec| spec.kind.appends());
        let histories: Vec<&History> = specs.flat_map(|spec| &spec.histories).collect();
        let (begin, failed_before): (Vec<u64>, BTreeMap<String, u64>) = {
            let known = self.known.now()?;
            (histories.iter().map(|history| known.acknowledged(history.user)).collect(), known.failed.clone())
        };
        let mut waiting = Vec::new();
        let all = || {
            let known = self.known.now()?;
            let pairs = histories.iter().zip(&begin);
            waiting = pairs.filter(|(h, begin)| known.acknowledged(h.user) <= **begin).map(|(h, _)| h.user).collect();
            Ok(waiting.is_empty())
        };
        if !wait_for(HEALS_WITHIN, all).await? {
            if let Err(error) = self.world.tell_of(&waiting).await {
                eprintln!("therev-nemesis: nothing is known of those who wait: {error}");
            }
            self.world.tell_logs();
            let mut failed = self.known.now()?.failed.clone();
            for (kind, count) in &mut failed {
                *count -= failed_before.get(kind).copied().unwrap_or(0);
            }
            eprintln!("therev-nemesis: calls that failed meanwhile: {failed:?}");
            self.stuck.push(format!("after `{fault}`, {HEALS_WITHIN:?} long: {waiting:?}"));
        }
        Ok(())
    }

    fn disk_was_full(&self) -> std::io::Result<u64> {
        let known = self.known.now()?;
        Ok(known.failed.iter().filter(|(kind, _)| kind.contains("53100")).map(|(_, count)| count).sum())
    }

    /// Tells the writers to end and waits for that; they try their last appends to the end.
    pub(crate) async fn end_writers(mut self) -> Result<Outcome, Box<dyn Error>> {
        for (_, waker) in std::mem::take(&mut self.sleepers) {
            waker.await?;
        }
        let end = Instant::now() + HEALS_WITHIN;
        self.writers.iter_mut().for_each(|writer| drop(writer.stdin.take()));
        for (number, writer) in self.writers.iter_mut().enumerate() {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(status) = tokio::time::timeout(left, writer.wait()).await else {
                self.stuck.push(format!("writer {number} did not end"));
                writer.kill().await?;
                continue;
            };
            let status = status?;
            if !status.success() {
                self.crashed.push(format!("writer {number} ended by itself: {status}"));
            }
        }
        let Saboteur { disturbed, crashed, stuck, wrong, skipped, .. } = self;
        Ok(Outcome { disturbed, crashed, stuck, wrong, skipped })
    }
}

/// What a saboteur found while it was at work.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) disturbed: Vec<String>,
    pub(crate) crashed: Vec<String>,
    pub(crate) stuck: Vec<String>,
    pub(crate) wrong: Vec<String>,
    pub(crate) skipped: Vec<String>,
}

/// Stops every process of a server where it is.
fn freeze(cluster: &Cluster, server: ServerId) -> Result<Frozen, Box<dyn Error>> {
    let status = cluster.status().into_iter().find(|it| it.server == server);
    Ok(Frozen::server(status.and_then(|it| it.pid).ok_or("it does not run")?)?)
}

/// Waits until a condition holds; false when it still does not after this long.
pub(crate) async fn wait_for(
    limit: Duration,
    mut condition: impl FnMut() -> std::io::Result<bool>,
) -> std::io::Result<bool> {
    let begin = Instant::now();
    while !condition()? {
        if begin.elapsed() >= limit {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(true)
}
