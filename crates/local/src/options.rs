//! What the caller wants to have running.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::Error;

/// More servers than this do not fit one machine: each keeps 64 MB of buffers and eight processes.
const SERVERS_MAX: u16 = 64;
/// Of each shard.
const STANDBYS_MAX: u16 = 4;

/// What [`crate::Cluster::up`] is to bring about.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's folder; made when it is missing.
    pub dir: PathBuf,
    /// How many shards, each with a server of its own. Fixed when the cluster is made.
    pub shards: u16,
    /// How many streaming replicas of shard 0's server. May be another number at each `up`.
    pub replicas: u16,
    /// How many streaming standbys each shard's server has. May be another number at each `up`.
    pub standbys: u16,
    /// Whether a commit waits until a standby has it, so that a promotion loses none. Needs a standby to run.
    pub synchronous: bool,
    /// Where `postgres` and its tools are, instead of looking for them.
    pub pg_bin: Option<PathBuf>,
    /// The search path for programs (`PATH`), looked through before the usual places.
    pub search_path: Option<OsString>,
    /// Whether commits survive a crash of the machine. Off only for servers that a test run throws away. Fixed when
    /// the cluster is made.
    pub durable: bool,
}

impl Options {
    /// Four shards and one replica in this folder: what a community begins with.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            shards: 4,
            replicas: 1,
            standbys: 0,
            synchronous: false,
            pg_bin: None,
            search_path: None,
            durable: true,
        }
    }

    /// Refuses numbers that cannot be meant.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !(1..=SERVERS_MAX).contains(&self.shards) {
            return Err(Error::ShardsOutOfRange { asked: self.shards, max: SERVERS_MAX });
        }
        if self.replicas > SERVERS_MAX {
            return Err(Error::ReplicasOutOfRange { asked: self.replicas, max: SERVERS_MAX });
        }
        if self.standbys > STANDBYS_MAX {
            return Err(Error::StandbysOutOfRange { asked: self.standbys, max: STANDBYS_MAX });
        }
        if self.synchronous && self.standbys == 0 {
            return Err(Error::NothingToWaitFor);
        }
        Ok(())
    }
}
