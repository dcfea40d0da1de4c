//! What is broken, in which order. The same seed breaks the same things; how far writers are by then is chance.

use std::fmt;
use std::time::Duration;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use testkit::{At, Mode};

use crate::world::{DISK_SHARD, SHARDS};

/// One fault. Each is healed before the next one.
///
/// Another kind is a variant here, an arm in `Saboteur::bring_about`, and one in `Saboteur::heal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A writer is killed, and lives again at once.
    KillWriter { writer: usize },
    /// A mover is killed, and another one takes its place.
    KillMover { mover: usize },
    /// A mover stands still for longer than its work is its own, while other faults go on; then it finds itself overtaken.
    SleepMover { mover: usize, time: Duration },
    /// Nothing is broken for a while, and relocations go on: no call may fail.
    Quiet { time: Duration },
    /// A shard's server crashes, and is started again.
    KillServer { shard: u16 },
    /// A shard's primary crashes, all of it at once, and its standby takes its place.
    Promote { shard: u16 },
    /// The control database is away. A writer that is killed meanwhile starts without it.
    LoseControl { writer: usize, time: Duration },
    /// The directory is away, and what is on the same server is there.
    LoseDirectory { time: Duration },
    /// The network in front of a shard's server does this for a while.
    Network { shard: u16, mode: Mode, time: Duration },
    /// A shard's server, and what else is on it, stands still for a while, as one whose machine swaps.
    Freeze { shard: u16, time: Duration },
    /// A shard's standby stands still for a while: commits wait for it, and callers give up waiting and try again.
    FreezeStandby { shard: u16, time: Duration },
    /// A disk is full until a writer has met with it.
    FillDisk,
}

impl Fault {
    /// What it is counted as.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Fault::KillWriter { .. } => "writer_killed",
            Fault::KillMover { .. } => "mover_killed",
            Fault::SleepMover { .. } => "mover_asleep",
            Fault::Quiet { .. } => "quiet",
            Fault::KillServer { .. } => "server_killed",
            Fault::Promote { .. } => "promoted",
            Fault::LoseControl { .. } => "control_away",
            Fault::LoseDirectory { .. } => "directory_away",
            Fault::Network { .. } => "network",
            Fault::Freeze { .. } => "server_frozen",
            Fault::FreezeStandby { .. } => "standby_frozen",
            Fault::FillDisk => "disk_full",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillWriter { writer } => write!(out, "writer {writer} is killed"),
            Fault::KillMover { mover } => write!(out, "mover {mover} is killed"),
            Fault::SleepMover { mover, time } => write!(out, "mover {mover} begins to sleep for {time:?}"),
            Fault::Quiet { time } => write!(out, "nothing for {time:?}"),
            Fault::KillServer { shard } => write!(out, "the server of shard {shard} is killed"),
            Fault::Promote { shard } => write!(out, "the primary of shard {shard} is killed, and its standby promoted"),
            Fault::LoseControl { writer, time } => {
                write!(out, "the control database is away for {time:?}, and writer {writer} is killed")
            }
            Fault::LoseDirectory { time } => write!(out, "the directory is away for {time:?}"),
            Fault::Network { shard, mode, time } => write!(out, "the network of shard {shard}: {mode:?} for {time:?}"),
            Fault::Freeze { shard, time } => write!(out, "the server of shard {shard} is frozen for {time:?}"),
            Fault::FreezeStandby { shard, time } => write!(out, "the standby of shard {shard} is frozen for {time:?}"),
            Fault::FillDisk => out.write_str("a disk is full"),
        }
    }
}

/// The faults of a seed, without end.
pub(crate) struct Schedule {
    random: ChaCha8Rng,
    writers: usize,
    movers: usize,
}

impl Schedule {
    pub(crate) fn new(seed: u64, writers: usize, movers: usize) -> Schedule {
        Schedule { random: ChaCha8Rng::seed_from_u64(seed), writers, movers }
    }
}

impl Iterator for Schedule {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        let random = &mut self.random;
        // All are drawn for every fault, so that a new kind of fault changes only what it replaces.
        let kind = random.random_range(0..100_u32);
        let writer = random.random_range(0..self.writers);
        let shard = random.random_range(0..SHARDS);
        let drawn = Duration::from_millis(random.random_range(100..700));
        let mode = match random.random_range(0..8_u32) {
            0 => Mode::Cut,
            1 => Mode::Refuse,
            2 => Mode::Stall,
            3 | 4 => Mode::Delay(Duration::from_millis(random.random_range(5..120))),
            5 => Mode::Break(b"", At::HalfRequest),
            6 => Mode::Break(b"", At::NoAnswer),
            _ => Mode::Break(b"", At::HalfAnswer),
        };
        // Some stalls outlast the writers' deadline.
        let time = if mode == Mode::Stall { 2 * drawn } else { drawn };
        let mover = random.random_range(0..self.movers);
        // A standby on this machine cannot have a disk at the same path.
        let with_standby = if shard == DISK_SHARD { 0 } else { shard };
        Some(match kind {
            0..10 => Fault::KillWriter { writer },
            10..18 => Fault::KillMover { mover },
            // The work is its own for 5 seconds.
            18..22 => Fault::SleepMover { mover, time: Duration::from_secs(5) + 4 * drawn },
            22..30 => Fault::KillServer { shard },
            30..38 => Fault::Promote { shard: with_standby },
            38..46 => Fault::LoseControl { writer, time },
            46..83 => Fault::Network { shard, mode, time },
            // Some outlast the writers' deadline and the time for a new connection.
            83..87 => Fault::Freeze { shard, time: 4 * drawn },
            87..89 => Fault::FreezeStandby { shard: with_standby, time: 4 * drawn },
            89..92 => Fault::Quiet { time: 2 * drawn },
            92..96 => Fault::LoseDirectory { time },
            _ => Fault::FillDisk,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_faults() {
        let faults = |seed| Schedule::new(seed, 5, 2).take(200).collect::<Vec<_>>();
        assert_eq!(faults(1), faults(1));
        assert_ne!(faults(1), faults(2));
    }
}
