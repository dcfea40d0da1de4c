//! The processes of one server, found by what they are called.
//!
//! Needs none of PostgreSQL's programs, so a cluster can be stopped and removed after they were uninstalled.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::account::remove;
use crate::place::Place;
use crate::process::{self, Process, wait_for};
use crate::{Error, ServerId};

/// How long a server may take to write what it holds and end.
const STOP_WAIT: Duration = Duration::from_secs(60);
/// How long the children of a dead server may take to notice.
const ORPHANS_WAIT: Duration = Duration::from_secs(2);
/// How long anything may take to end at once.
const QUIT_WAIT: Duration = Duration::from_secs(5);

/// One server, as far as its processes go.
pub(crate) struct Running {
    server: ServerId,
    data: PathBuf,
    cluster_name: String,
    sockets: PathBuf,
}

impl Running {
    /// The server of this name with its data in this place.
    pub(crate) fn new(place: &Place, server: ServerId) -> Self {
        Self {
            server,
            data: place.data(server),
            cluster_name: cluster_name(place, server),
            sockets: place.sockets.clone(),
        }
    }

    /// The server's first process, while it lives.
    pub(crate) fn postmaster(&self) -> Option<i32> {
        let first: Vec<i32> = process::all().into_iter().filter(|it| self.is_postmaster(it)).map(|it| it.pid).collect();
        // A child looks like its parent until it has named itself.
        let recorded = self.recorded_pid().filter(|pid| first.contains(pid));
        recorded.or_else(|| first.into_iter().min())
    }

    /// What the server says of itself: `ready`, `standby`, `starting` or `stopping`.
    pub(crate) fn phase(&self) -> Option<String> {
        Some(self.pid_file()?.lines().nth(7)?.trim().to_owned())
    }

    /// Ends the server as `pg_ctl stop -m fast` does, harder when it does not end, and leaves nothing of it behind.
    pub(crate) fn stop(&self) -> Result<(), Error> {
        for (signal, limit) in [(Signal::INT, STOP_WAIT), (Signal::QUIT, QUIT_WAIT)] {
            let Some(postmaster) = self.postmaster() else { break };
            process::signal(postmaster, signal);
            if wait_for(limit, || self.postmaster().is_none()) {
                break;
            }
        }
        if let Some(postmaster) = self.postmaster() {
            self.kill(postmaster);
        }
        self.tidy()
    }

    /// Ends the first process the hard way, as a crash would: its children find out by themselves.
    pub(crate) fn kill(&self, postmaster: i32) {
        process::signal(postmaster, Signal::KILL);
        wait_for(QUIT_WAIT, || self.postmaster().is_none());
    }

    /// Clears up after a server that does not run: children that outlived it, its sockets, and a `postmaster.pid`
    /// whose number has come to someone else, which would keep PostgreSQL from starting.
    pub(crate) fn tidy(&self) -> Result<(), Error> {
        if self.postmaster().is_some() {
            return Ok(());
        }
        // Two servers on one folder would ruin it, so the last child must have gone before anything is removed.
        let gone = wait_for(ORPHANS_WAIT, || self.is_gone())
            || [Signal::QUIT, Signal::KILL].into_iter().any(|signal| {
                self.processes().iter().for_each(|it| process::signal(it.pid, signal));
                wait_for(QUIT_WAIT, || self.is_gone())
            });
        if !gone && let Some(process) = self.processes().first() {
            return Err(Error::NotStopped { server: self.server, pid: process.pid });
        }
        self.remove_stale_files()
    }

    /// Whether no process is left. One that is about to end has no name any more, and holds the server's memory for a moment:
    /// PostgreSQL does not start beside it.
    fn is_gone(&self) -> bool {
        self.processes().is_empty() && self.block().is_none_or(|block| !block.is_attached)
    }

    /// The block of shared memory by which PostgreSQL knows whether a process of a server lives.
    fn block(&self) -> Option<Block> {
        let text = self.pid_file()?;
        let recorded = |line: usize, word: usize| text.lines().nth(line)?.split_whitespace().nth(word);
        let (postmaster, number) = (recorded(0, 0)?, recorded(6, 1)?);
        let blocks = fs::read_to_string("/proc/sysvipc/shm").ok()?;
        blocks.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields[..] {
                [_, found, _, _, made_by, _, attached, ..] if found == number && made_by == postmaster => {
                    Some(Block { number: number.to_owned(), is_attached: attached != "0" })
                }
                _ => None,
            }
        })
    }

    fn remove_stale_files(&self) -> Result<(), Error> {
        let Some(text) = self.pid_file() else { return Ok(()) };
        let recorded = self.recorded_pid();
        // Another PostgreSQL with this number may be this server after its folder was moved: PostgreSQL decides then.
        if process::all().iter().any(|it| Some(it.pid) == recorded && is_postgres(&it.command)) {
            return Ok(());
        }
        // PostgreSQL would find it only when it starts on the same folder, which may be removed instead; and systems have room
        // for a few thousand.
        if let Some(block) = self.block().filter(|block| !block.is_attached) {
            // Where the tool is missing, the block stays: some bytes.
            Command::new("ipcrm").args(["-m", &block.number]).output().ok();
        }
        // A number: the file is the servers' account's, who may be somebody else.
        if let Some(port) = text.lines().nth(3).and_then(|line| line.trim().parse::<u16>().ok()) {
            remove(&self.sockets.join(format!(".s.PGSQL.{port}")))?;
            remove(&self.sockets.join(format!(".s.PGSQL.{port}.lock")))?;
        }
        remove(&self.data.join("postmaster.pid"))
    }

    fn processes(&self) -> Vec<Process> {
        let title = format!("postgres: {}: ", self.cluster_name);
        process::all().into_iter().filter(|it| self.is_postmaster(it) || it.command.starts_with(&title)).collect()
    }

    /// `/usr/lib/…/postgres -D DATA`, and neither `pg_ctl … -D DATA` nor the shell that it starts the server with.
    fn is_postmaster(&self, process: &Process) -> bool {
        let Some((program, rest)) = process.command.split_once(" -D ") else { return false };
        let data = self.data.to_string_lossy();
        let after = rest.strip_prefix(data.as_ref());
        program.ends_with("/postgres") && after.is_some_and(|it| it.is_empty() || it.starts_with(' '))
    }

    fn pid_file(&self) -> Option<String> {
        fs::read_to_string(self.data.join("postmaster.pid")).ok()
    }

    fn recorded_pid(&self) -> Option<i32> {
        self.pid_file()?.lines().next()?.trim().parse().ok()
    }
}

/// A block of shared memory, as the system lists it.
struct Block {
    number: String,
    is_attached: bool,
}

/// The title in front of each of the server's processes.
pub(crate) fn cluster_name(place: &Place, server: ServerId) -> String {
    format!("{}-{}", place.name, server.file_name())
}

fn is_postgres(command: &str) -> bool {
    command.starts_with("postgres: ") || command.split(" -D ").next().is_some_and(|it| it.ends_with("/postgres"))
}
