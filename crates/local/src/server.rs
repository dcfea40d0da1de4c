//! One server: made, started, looked at.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use rustix::process::Signal;

use crate::account::remove;
use crate::cluster::Cluster;
use crate::process::{self, wait_for};
use crate::running::{Running, cluster_name};
use crate::settings::Settings;
use crate::side_by_side::{Tell, tell};
use crate::sql::{self, last_line};
use crate::{Error, ServerId, replica};

/// How long a server may take until it answers; after a crash it reads its log first.
pub(crate) const START_WAIT: Duration = Duration::from_secs(60);
/// A log longer than this is put aside at the next start.
const LOG_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// What a server is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerState {
    /// Answers.
    Running,
    /// Has a process that does not answer yet.
    Starting,
    /// Has a process that is about to end.
    Stopping,
    /// Has no process.
    Down,
}

impl fmt::Display for ServerState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Down => "down",
        })
    }
}

/// What can be said of a server without asking it.
#[derive(Debug, Clone)]
pub struct ServerStatus {
    /// Which one.
    pub server: ServerId,
    /// The server that it receives from; `None` for a primary.
    pub follows: Option<ServerId>,
    /// Where it listens on 127.0.0.1, or will.
    pub port: u16,
    /// What it is doing.
    pub state: ServerState,
    /// Its first process.
    pub pid: Option<i32>,
    /// Its data.
    pub data: PathBuf,
    /// Its log.
    pub log: PathBuf,
}

/// A server of a cluster.
pub(crate) struct Server<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) id: ServerId,
}

impl Server<'_> {
    pub(crate) fn data(&self) -> PathBuf {
        self.cluster.place.data(self.id)
    }

    /// Whether it has data, and takes no writes when it starts.
    pub(crate) fn is_standby(&self) -> bool {
        self.data().join(replica::STANDBY_SIGNAL).exists()
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.cluster.place.logs().join(format!("{}.log", self.id.file_name()))
    }

    pub(crate) fn running(&self) -> Running {
        Running::new(&self.cluster.place, self.id)
    }

    pub(crate) fn status(&self) -> Result<ServerStatus, Error> {
        let port = self.cluster.port(self.id)?;
        let running = self.running();
        let pid = running.postmaster();
        let state = match (pid, running.phase().as_deref()) {
            (None, _) => ServerState::Down,
            (_, Some("ready" | "standby")) => ServerState::Running,
            (_, Some("stopping")) => ServerState::Stopping,
            _ => ServerState::Starting,
        };
        let follows = self.cluster.state.source(self.id);
        Ok(ServerStatus { server: self.id, follows, port, state, pid, data: self.data(), log: self.log() })
    }

    /// Makes a shard's server if there is none. A half-made one never has the final name.
    pub(crate) fn make(&self, to: &Tell) -> Result<(), Error> {
        if self.data().exists() {
            return Ok(());
        }
        tell(to, self.id, "making");
        let new = self.data().with_extension("new");
        let password_file = self.cluster.place.home.join(format!("password-{}", self.id.file_name()));
        self.cluster.account.write(&password_file, &self.cluster.state.password)?;
        let made = ["C.UTF-8", "C"].into_iter().find_map(|locale| {
            match self.initdb(&new, &password_file, locale) {
                // Not every system has the first one; both sort by code point.
                Err(Error::Tool { reason, .. }) if reason.contains("locale") && locale != "C" => None,
                result => Some(result),
            }
        });
        remove(&password_file)?;
        made.unwrap_or(Ok(()))?;
        let conf = new.join("postgresql.conf");
        let written = fs::read_to_string(&conf).map_err(Error::file("read", &conf))?;
        self.cluster.account.write(&conf, &format!("{written}\ninclude 'therev.conf'\n"))?;
        fs::rename(&new, self.data()).map_err(Error::file("rename", &new))
    }

    fn initdb(&self, new: &Path, password_file: &Path, locale: &str) -> Result<(), Error> {
        remove(new)?;
        let mut initdb = self.tool("initdb");
        initdb.args(["--auth=scram-sha-256", "--encoding=UTF8", "-U", &self.cluster.state.superuser]);
        initdb.arg(format!("--locale={locale}")).arg("--pwfile").arg(password_file).arg("-D").arg(new);
        if !self.cluster.state.durable {
            initdb.arg("--no-sync");
        }
        self.run("initdb", initdb).map(drop)
    }

    /// Starts the server if it does not run, and waits until it answers.
    pub(crate) fn start(&self, to: &Tell) -> Result<(), Error> {
        self.configure_running()?;
        let running = self.running();
        if running.postmaster().is_some() {
            let answers = wait_for(START_WAIT, || self.status().is_ok_and(|it| it.state == ServerState::Running));
            return if answers { Ok(()) } else { Err(self.not_started("it does not answer".to_owned())) };
        }
        running.tidy()?;
        self.put_log_aside()?;
        let said_before = fs::metadata(self.log()).map_or(0, |it| it.len());
        let mut pg_ctl = self.tool("pg_ctl");
        // `pg_ctl` gives the server a session of its own, so Ctrl-C in this terminal does not reach it.
        pg_ctl.args(["start", "-w", "-s", "-t", &START_WAIT.as_secs().to_string()]);
        pg_ctl.arg("-D").arg(self.data()).arg("-l").arg(self.log());
        match self.run("pg_ctl", pg_ctl) {
            Ok(_) => {}
            Err(Error::Tool { reason, .. }) => {
                return Err(self.not_started(self.logged_reason(said_before).unwrap_or(reason)));
            }
            Err(other) => return Err(other),
        }
        tell(to, self.id, &format!("started on port {}", self.cluster.port(self.id)?));
        Ok(())
    }

    /// Has a server that runs take its settings. It is told of them also where they are as before: whoever wrote them may have ended
    /// before that.
    pub(crate) fn configure_running(&self) -> Result<(), Error> {
        self.configure()?;
        if let Some(postmaster) = self.running().postmaster() {
            process::signal(postmaster, Signal::HUP);
        }
        Ok(())
    }

    /// Makes the databases of a shard's server that are missing.
    pub(crate) fn make_databases(&self) -> Result<(), Error> {
        let names = Cluster::databases(self.id).iter().map(|it| format!("'{it}'")).collect::<Vec<_>>().join(", ");
        sql::run(
            self.cluster,
            self.id,
            &format!(
                "SELECT format('CREATE DATABASE %I', name) FROM unnest(ARRAY[{names}]) AS name \
                 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \\gexec\n"
            ),
        )
        .map(drop)
    }

    /// Whether each commit here waited until one of its standbys had it, all of which are among these: the furthest of them has all then.
    pub(crate) fn waited_for(&self, standbys: &[ServerId]) -> bool {
        let settings = fs::read_to_string(self.data().join("therev.conf")).unwrap_or_default();
        let line = settings.lines().find(|line| line.starts_with("synchronous_standby_names"));
        let Some((_, names)) = line.and_then(|line| line.split_once('(')) else { return false };
        let names = names.split_once(')').map_or(names, |(names, _)| names);
        names.split(',').all(|name| standbys.iter().any(|it| replica::slot(*it) == name.trim()))
    }

    /// Writes the settings, where they are others.
    pub(crate) fn configure(&self) -> Result<(), Error> {
        let path = self.data().join("therev.conf");
        let state = &self.cluster.state;
        let primary = match state.source(self.id) {
            None => None,
            Some(source) => Some((replica::conninfo(self, source)?, replica::slot(self.id))),
        };
        let waits_for = match self.id {
            ServerId::Shard(shard) | ServerId::Standby(shard, _) if state.synchronous && primary.is_none() => {
                let others = state.members(shard).filter(|member| *member != self.id);
                // One that is down would hold up every commit until it is back.
                let up = others.filter(|member| Running::new(&self.cluster.place, *member).postmaster().is_some());
                up.map(replica::slot).collect()
            }
            _ => Vec::new(),
        };
        let text = Settings {
            port: self.cluster.port(self.id)?,
            sockets: &self.cluster.place.sockets,
            cluster_name: &cluster_name(&self.cluster.place, self.id),
            durable: self.cluster.state.durable,
            primary,
            waits_for,
        }
        .text();
        if fs::read_to_string(&path).is_ok_and(|before| before == text) {
            return Ok(());
        }
        self.cluster.account.write(&path, &text)
    }

    /// One of PostgreSQL's programs, as the account that owns the data.
    pub(crate) fn tool(&self, name: &str) -> Command {
        self.cluster.account.command(&self.cluster.state.pg_bin.join(name), &self.cluster.place.home)
    }

    /// Runs a program to its end; its last words are the reason when it fails.
    pub(crate) fn run(&self, tool: &'static str, mut command: Command) -> Result<Output, Error> {
        let output =
            command.output().map_err(|source| Error::Program { program: command.get_program().into(), source })?;
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().find(|line| line.contains("error:")).map_or_else(|| last_line(&said), str::to_owned);
        Err(Error::Tool { tool, server: self.id, reason })
    }

    fn not_started(&self, reason: String) -> Error {
        Error::NotStarted { server: self.id, reason, log: self.log() }
    }

    /// The first thing in the log after this many bytes that explains why there is no server.
    fn logged_reason(&self, from: u64) -> Option<String> {
        let log = fs::read(self.log()).ok()?;
        let new = String::from_utf8_lossy(log.get(usize::try_from(from).ok()?..)?).into_owned();
        // What callers are told who came too early explains nothing.
        let explains = |line: &&str| {
            (line.contains("FATAL:") || line.contains("PANIC:")) && !line.contains("the database system is ")
        };
        let fatal = new.lines().find(explains)?;
        Some(fatal.split_once(":  ").map_or(fatal, |(_, reason)| reason).to_owned())
    }

    fn put_log_aside(&self) -> Result<(), Error> {
        let log = self.log();
        if fs::metadata(&log).is_ok_and(|it| it.len() > LOG_MAX_BYTES) {
            fs::rename(&log, log.with_extension("log.old")).map_err(Error::file("rename", &log))?;
        }
        Ok(())
    }
}
