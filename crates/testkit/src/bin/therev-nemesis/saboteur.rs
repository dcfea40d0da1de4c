//! Brings faults about, heals them, and keeps the writers alive.

use std::error::Error;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use testkit::{Frozen, Mode};
use tokio::process::{Child, Command};

use crate::fault::Fault;
use crate::journal::Journals;
use crate::world::World;
use crate::writer::{History, Kind};

/// How long anything may take to be as it was after a fault was healed.
const HEALS_WITHIN: Duration = Duration::from_secs(60);
/// How long a full disk waits for somebody who wants to write on it.
const DISK_IS_MET_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
    writers: Vec<Child>,
    /// Writers that ended by themselves: a panic, or an error that they cannot go on with.
    pub(crate) crashed: Vec<String>,
    /// Histories that did not go on after a fault was healed.
    pub(crate) stuck: Vec<String>,
    /// Faults that could not be brought about here, and why.
    pub(crate) skipped: Vec<String>,
}

impl<'a> Saboteur<'a> {
    /// Starts the writers.
    pub(crate) fn new(world: &'a mut World, known: Known) -> Result<Saboteur<'a>, Box<dyn Error>> {
        let mut saboteur =
            Saboteur { world, known, writers: Vec::new(), crashed: Vec::new(), stuck: Vec::new(), skipped: Vec::new() };
        for number in 0..saboteur.world.specs.len() {
            let writer = saboteur.start_writer(number)?;
            saboteur.writers.push(writer);
        }
        Ok(saboteur)
    }

    /// How many writers there are.
    pub(crate) fn writers(&self) -> usize {
        self.writers.len()
    }

    fn start_writer(&self, number: usize) -> Result<Child, Box<dyn Error>> {
        let spec = serde_json::to_string(&self.world.specs[number])?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("writer").arg(spec).stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
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
            Fault::KillServer { shard } => {
                let cluster = self.world.cluster()?;
                tokio::task::block_in_place(|| cluster.kill(cluster.primary(shard)))?;
            }
            Fault::Promote { shard } => {
                let cluster = self.world.cluster.as_mut().ok_or("the cluster is gone")?;
                tokio::task::block_in_place(|| {
                    cluster.kill(cluster.primary(shard))?;
                    cluster.put_first(shard, &mut |_| {})
                })?;
                self.world.lead_proxies()?;
            }
            Fault::LoseControl { writer, time } => {
                self.world.control.set(Mode::Cut);
                self.kill_writer(writer).await?;
                tokio::time::sleep(time).await;
            }
            Fault::Network { shard, mode, time } => {
                self.world.servers[usize::from(shard)].set(mode);
                tokio::time::sleep(time).await;
            }
            Fault::Freeze { shard, time } => {
                let cluster = self.world.cluster()?;
                let primary = cluster.primary(shard);
                let server = cluster.status().into_iter().find(|it| it.server == primary);
                let frozen = Frozen::server(server.and_then(|it| it.pid).ok_or("it does not run")?)?;
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
            Fault::KillWriter { .. } | Fault::Freeze { .. } => {}
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
            Fault::Network { shard, .. } => self.world.servers[usize::from(shard)].set(Mode::Pass),
            Fault::FillDisk => {
                if let Ok(disk) = &self.world.disk {
                    disk.empty()?;
                }
            }
        }
        Ok(())
    }

    async fn kill_writer(&mut self, number: usize) -> Result<(), Box<dyn Error>> {
        self.revive_crashed()?;
        self.writers[number].kill().await?;
        self.writers[number] = self.start_writer(number)?;
        Ok(())
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
        let specs = self.world.specs.iter().filter(|spec| spec.kind != Kind::Intruder);
        let histories: Vec<&History> = specs.flat_map(|spec| &spec.histories).collect();
        let begin: Vec<u64> = {
            let known = self.known.now()?;
            histories.iter().map(|history| known.acknowledged(history.user)).collect()
        };
        let mut waiting = Vec::new();
        let all = || {
            let known = self.known.now()?;
            let pairs = histories.iter().zip(&begin);
            waiting = pairs.filter(|(h, begin)| known.acknowledged(h.user) <= **begin).map(|(h, _)| h.user).collect();
            Ok(waiting.is_empty())
        };
        if !wait_for(HEALS_WITHIN, all).await? {
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
        Ok(Outcome { crashed: self.crashed, stuck: self.stuck, skipped: self.skipped })
    }
}

/// What a saboteur found while it was at work.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) crashed: Vec<String>,
    pub(crate) stuck: Vec<String>,
    pub(crate) skipped: Vec<String>,
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
