//! What can go wrong, each with the next step.

use std::io;
use std::path::{Path, PathBuf};

use crate::ServerId;

/// Why the local cluster could not do what was asked. Every sentence ends with what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no `cluster.json` in the folder.
    #[error("there is no local cluster in {}; make one with `therev cluster up`", dir.display())]
    NoCluster {
        /// The folder looked into.
        dir: PathBuf,
    },
    /// The machine has no PostgreSQL server programs.
    #[error(
        "no PostgreSQL server was found on this machine; install it (Debian and Ubuntu: `sudo apt-get install \
         postgresql`, Fedora: `sudo dnf install postgresql-server`, macOS: `brew install postgresql@17`), or set \
         THEREV_PG_BIN to the folder that holds `postgres`"
    )]
    NoPostgres,
    /// A named folder lacks a program.
    #[error(
        "{} holds no `{tool}`; set THEREV_PG_BIN to a folder that holds `postgres`, `initdb`, `pg_ctl`, \
         `pg_basebackup` and `psql`, or unset it to use what the machine has", bin.display()
    )]
    NoTool {
        /// The folder looked into.
        bin: PathBuf,
        /// The program that is missing.
        tool: &'static str,
    },
    /// All that was found is older than version 15.
    #[error(
        "PostgreSQL {found} in {} is too old; install version 15 or later, or set THEREV_PG_BIN to where it is",
        bin.display()
    )]
    TooOld {
        /// Where it is.
        bin: PathBuf,
        /// Its major version.
        found: u32,
    },
    /// The data was written by another major version than the programs found.
    #[error(
        "the servers in {} were made by PostgreSQL {made_by}, and only version {found} is here; install version \
         {made_by} again, or remove the cluster with `therev cluster destroy`", dir.display()
    )]
    OtherVersion {
        /// The cluster's folder.
        dir: PathBuf,
        /// The major version that made the data.
        made_by: u32,
        /// The major version found.
        found: u32,
    },
    /// The cluster exists with another number of shards.
    #[error(
        "the cluster in {} has {has} shards, not {asked}; leave out --shards, or name another folder with --dir",
        dir.display()
    )]
    OtherShards {
        /// The cluster's folder.
        dir: PathBuf,
        /// How many it has.
        has: usize,
        /// How many were asked for.
        asked: u16,
    },
    /// A number of shards that cannot be meant.
    #[error("a local cluster has 1 to {max} shards, not {asked}; give another --shards")]
    ShardsOutOfRange {
        /// What was asked for.
        asked: u16,
        /// The most there can be.
        max: u16,
    },
    /// A number of replicas that cannot be meant.
    #[error("a local cluster has 0 to {max} replicas, not {asked}; give another --replicas")]
    ReplicasOutOfRange {
        /// What was asked for.
        asked: u16,
        /// The most there can be.
        max: u16,
    },
    /// A number of standbys that cannot be meant.
    #[error("each shard of a local cluster has 0 to {max} standbys, not {asked}; give another --standbys")]
    StandbysOutOfRange {
        /// What was asked for.
        asked: u16,
        /// The most there can be.
        max: u16,
    },
    /// Synchronous commits without a standby.
    #[error("synchronous commits need a standby to wait for; give --standbys 1 as well")]
    NothingToWaitFor,
    /// A promotion without a server to promote.
    #[error(
        "shard {shard} has no standby that runs; `therev cluster up --standbys 1` makes one as long as the shard's data \
         is there"
    )]
    NoStandby {
        /// The shard.
        shard: u16,
    },
    /// A promotion that would lose what a primary has which works.
    #[error(
        "{primary}, the primary of shard {shard}, works, and no standby receives what it writes: a promotion would lose that; \
         `therev cluster up` brings its standbys up to date"
    )]
    NoneFollows {
        /// The shard.
        shard: u16,
        /// Its primary.
        primary: ServerId,
    },
    /// Commits may have waited for a standby alone that runs and does not answer.
    #[error(
        "{standby} runs and does not answer, and it may be the only one that has what shard {shard} acknowledged last; \
         promote again when it answers, or end its process to do without it"
    )]
    Silent {
        /// The shard.
        shard: u16,
        /// The standby.
        standby: ServerId,
    },
    /// A shard's data was made and is there no more. Nothing is made in its place: that would cost the last copy of it.
    #[error("shard {shard}'s data in {} is gone; {}", data.display(), after_loss(*shard, *standby, copy.as_deref()))]
    DataGone {
        /// The shard.
        shard: u16,
        /// Where its data was.
        data: PathBuf,
        /// A standby that has a copy, and can take its place.
        standby: Option<ServerId>,
        /// Where a replica has a copy.
        copy: Option<PathBuf>,
    },
    /// A standby did not become the primary.
    #[error("{server} did not end its recovery; look into its log at {}, then promote again", log.display())]
    NotPromoted {
        /// Which one.
        server: ServerId,
        /// Its log.
        log: PathBuf,
    },
    /// The name of no server of this cluster.
    #[error("`{server}` is no server of this cluster; `therev cluster status` lists them")]
    UnknownServer {
        /// What was asked for.
        server: String,
    },
    /// Another process works on the cluster, longer than one should.
    #[error("another process has been working on the cluster in {} for two minutes; end it, then try again", dir.display())]
    Busy {
        /// The cluster's folder.
        dir: PathBuf,
    },
    /// Root needs an account to run servers as, and there is none.
    #[error(
        "PostgreSQL does not run as root, and this machine has no account `postgres`; make one with `adduser \
         --system --group postgres`, or run this as an ordinary user"
    )]
    NoAccount,
    /// Something that is not the cluster's lies where its servers should be.
    #[error("{} is in the way and was not made by this cluster; move it away, then try again", path.display())]
    InTheWay {
        /// What is in the way.
        path: PathBuf,
    },
    /// Servers of a cluster whose folder was here lie elsewhere, and it is gone from here.
    #[error(
        "{} has the servers of a cluster whose folder was here; move that folder back, or remove them with \
         `therev cluster destroy --yes` here", home.display()
    )]
    Orphaned {
        /// Where they are.
        home: PathBuf,
    },
    /// Servers of a cluster in another folder, of which this one is a copy, or which was moved from here.
    #[error("the servers in {} belong to the cluster in {}; use that one, or another folder", home.display(), dir.display())]
    OthersServers {
        /// Where the servers are.
        home: PathBuf,
        /// The folder of their cluster.
        dir: PathBuf,
    },
    /// A path that PostgreSQL's tools cannot be told.
    #[error("{} holds a character that PostgreSQL's tools do not take in a path; choose another folder", dir.display())]
    OddPath {
        /// The folder.
        dir: PathBuf,
    },
    /// `cluster.json` cannot be understood.
    #[error("{} cannot be read as a cluster's state; restore it, or remove the folder to begin anew", path.display())]
    BadState {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// `cluster.json` was written by a later version.
    #[error("{} was written by a newer therev (format {format}); use that version", path.display())]
    NewerState {
        /// The file.
        path: PathBuf,
        /// Its format's number.
        format: u32,
    },
    /// A file or folder could not be used.
    #[error("could not {action} {}; see the reason, put it right and try again", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No port could be had on the loopback address.
    #[error("no free port could be had on 127.0.0.1; see the reason, put it right and try again")]
    NoPort {
        /// The system's reason.
        source: io::Error,
    },
    /// A program could not be run at all.
    #[error("could not run {}; see the reason, put it right and try again", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// One of PostgreSQL's tools failed.
    #[error("{tool} failed for {server}: {reason}; put it right and run `therev cluster up` again")]
    Tool {
        /// The program's name.
        tool: &'static str,
        /// The server it worked for.
        server: ServerId,
        /// The last thing it said.
        reason: String,
    },
    /// A server did not start.
    #[error("{server} did not start: {reason}; its log is {}", log.display())]
    NotStarted {
        /// The server.
        server: ServerId,
        /// The last thing it said.
        reason: String,
        /// Where the rest is.
        log: PathBuf,
    },
    /// A server's processes outlived everything that ends them.
    #[error("{server} (process {pid}) does not stop; end that process, then try again")]
    NotStopped {
        /// The server.
        server: ServerId,
        /// One of its processes.
        pid: i32,
    },
    /// A replica or a standby runs and receives nothing.
    #[error("{server} does not receive from {source_server}, not even made anew; its log is {}", log.display())]
    NotStreaming {
        /// The replica or standby.
        server: ServerId,
        /// The server that it should receive from.
        source_server: ServerId,
        /// Where the reason is.
        log: PathBuf,
    },
    /// A list of addresses that another process left cannot be understood.
    #[error("the addresses of the servers cannot be read; start the program that passes them on again")]
    BadAddresses {
        /// What is wrong with them.
        source: serde_json::Error,
    },
}

/// What to do about data that is gone.
fn after_loss(shard: u16, standby: Option<ServerId>, copy: Option<&Path>) -> String {
    let otherwise = "restore it, or remove the cluster with `therev cluster destroy`";
    match (standby, copy) {
        (Some(standby), _) => format!("`therev cluster promote {shard}` puts {standby} in its place"),
        (None, Some(copy)) => format!("{otherwise} (a replica's copy is in {})", copy.display()),
        (None, None) => otherwise.to_owned(),
    }
}

impl Error {
    /// Whether a server did not start because somebody else listens on its port.
    pub(crate) fn is_lost_port(&self) -> bool {
        matches!(self, Error::NotStarted { reason, .. } if reason.contains("TCP/IP socket"))
    }

    /// For `map_err` on file operations: `.map_err(Error::file("make", &path))`.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
