//! Runs a command with PostgreSQL servers that are thrown away: `with-test-servers COMMAND [ARGUMENT …]`.
//!
//! Two servers and a replica of the first, their addresses in `THEREV_TEST_SERVERS`. Several runs may go on side by
//! side: each takes the first folder `target/testkit/servers-<n>` whose lock nobody holds. A lock goes with its process,
//! so a folder that has servers and a free lock was left by a run that was killed, and is cleared by the next one.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use local::{Cluster, Options};
use rustix::process::{Pid, Signal, kill_process};
use testkit::TestServers;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as Incoming, SignalKind, signal};

/// How long a command may take to end after it was told to.
const END_WAIT: Duration = Duration::from_secs(30);
/// More runs than this at once do not fit one machine.
const RUNS_MAX: usize = 32;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: with-test-servers COMMAND [ARGUMENT …]");
        return ExitCode::from(2);
    };
    match run(&program, arguments).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("with-test-servers: {error}");
            let mut source = error.source();
            while let Some(reason) = source {
                eprintln!("  because: {reason}");
                source = reason.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(program: &OsStr, arguments: impl Iterator<Item = OsString>) -> Result<ExitCode, Box<dyn Error>> {
    // Before anything is started, so that no signal ends this process and leaves servers behind.
    let mut told = Told::listen()?;
    let program_file = std::env::current_exe()?;
    let target = program_file.parent().and_then(Path::parent).ok_or("this program lies in no target folder")?;
    let base = target.join("testkit");
    fs::create_dir_all(&base)?;
    let (dir, _lock) = take_folder(&base)?;
    clear_left_ones(&base);
    let servers = Servers { dir };
    let addresses = servers.start().await?;
    let child = Command::new(program).args(arguments).env(TestServers::VARIABLE, addresses).spawn();
    let status = match child {
        Ok(mut child) => told.wait(&mut child).await,
        Err(error) => Err(error),
    };
    servers.remove()?;
    let status = status.map_err(|error| format!("could not run {}: {error}", program.display()))?;
    Ok(code_of(status))
}

/// What a shell would say.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// The first folder that no other run has, with its lock. What a killed run left in it is cleared.
fn take_folder(base: &Path) -> Result<(PathBuf, File), Box<dyn Error>> {
    for number in 1..=RUNS_MAX {
        let dir = base.join(format!("servers-{number}"));
        let lock = File::options().create(true).truncate(false).write(true).open(dir.with_extension("lock"))?;
        if lock.try_lock().is_ok() {
            Servers { dir: dir.clone() }.remove()?;
            return Ok((dir, lock));
        }
    }
    Err(format!("{RUNS_MAX} runs hold the folders in {}; end some, then try again", base.display()).into())
}

/// Clears the other folders whose run was killed. One that cannot be cleared is the concern of who takes it next.
fn clear_left_ones(base: &Path) {
    for number in 1..=RUNS_MAX {
        let dir = base.join(format!("servers-{number}"));
        let Ok(lock) = File::options().write(true).open(dir.with_extension("lock")) else { continue };
        if lock.try_lock().is_ok() {
            Servers { dir }.remove().ok();
        }
    }
}

/// The servers of this run; gone when this is dropped, whatever happened before.
struct Servers {
    dir: PathBuf,
}

impl Servers {
    /// Starts them, and returns their addresses.
    async fn start(&self) -> Result<String, Box<dyn Error>> {
        let mut options = Options { shards: 2, replicas: 1, durable: false, ..Options::new(&self.dir) };
        #[expect(clippy::disallowed_methods, reason = "this is a program, whose environment says where to look")]
        {
            options.search_path = std::env::var_os("PATH");
            options.pg_bin = std::env::var_os("THEREV_PG_BIN").map(PathBuf::from);
        }
        let up = tokio::task::spawn_blocking(move || Cluster::up(&options, &mut |_| {}));
        Ok(up.await??.addresses().to_string())
    }

    /// Stops and removes them; that there are none is fine.
    fn remove(&self) -> Result<(), local::Error> {
        match Cluster::open(&self.dir) {
            Ok(cluster) => cluster.destroy(&mut |_| {}),
            Err(local::Error::NoCluster { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("with-test-servers: {error}");
        }
    }
}

/// The signals that ask this program to end.
struct Told {
    interrupt: Incoming,
    terminate: Incoming,
    hang_up: Incoming,
}

impl Told {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the command's end, which a signal brings about.
    async fn wait(&mut self, child: &mut Child) -> std::io::Result<ExitStatus> {
        let signal = tokio::select! {
            status = child.wait() => return status,
            // A terminal sends it to the command too, and a second one means more than the first.
            _ = self.interrupt.recv() => (!std::io::stdin().is_terminal()).then_some(Signal::INT),
            _ = self.terminate.recv() => Some(Signal::TERM),
            _ = self.hang_up.recv() => Some(Signal::HUP),
        };
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let (Some(pid), Some(signal)) = (pid, signal) {
            kill_process(pid, signal).ok();
        }
        if let Ok(status) = tokio::time::timeout(END_WAIT, child.wait()).await {
            return status;
        }
        child.start_kill()?;
        child.wait().await
    }
}
