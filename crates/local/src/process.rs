//! Processes of this machine, and waiting for what they do.
//!
//! A server is recognized by its command line, never by a number alone: a `postmaster.pid` outlives `kill -9` and a
//! restart of the machine, after which its number may be anyone's.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a condition rests between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A running process.
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Its arguments, joined by spaces; PostgreSQL's children write what they do here.
    pub(crate) command: String,
}

/// All processes that can be seen. Dead ones that nobody has reaped have no command line and are left out.
pub(crate) fn all() -> Vec<Process> {
    match fs::read_dir("/proc") {
        Ok(entries) if Path::new("/proc/self/cmdline").exists() => entries
            .filter_map(|entry| {
                let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
                command_of(pid).map(|command| Process { pid, command })
            })
            .collect(),
        _ => listed_by_ps(),
    }
}

fn command_of(pid: i32) -> Option<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned();
    (!command.is_empty()).then_some(command)
}

/// Where there is no `/proc`, as on macOS.
fn listed_by_ps() -> Vec<Process> {
    let Ok(output) = Command::new("ps").args(["-axww", "-o", "pid=,args="]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let (pid, command) = line.trim_start().split_once(' ')?;
            Some(Process { pid: pid.parse().ok()?, command: command.trim().to_owned() })
        })
        .collect()
}

/// Sends a signal. A process that is gone already is what the caller wanted.
pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        kill_process(pid, signal).ok();
    }
}

/// Waits until the condition holds; false when it still does not after this long.
#[expect(clippy::disallowed_methods, reason = "the one place that rests between two looks at a condition")]
pub(crate) fn wait_for(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if begin.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
