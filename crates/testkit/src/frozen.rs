//! A server that is frozen: the worst that it can do to its callers.

use rustix::process::{Pid, Signal, kill_process};
use std::io;

/// The processes of a server on this machine, stopped where they are: connections stay open, and nothing is answered.
/// They go on when this is dropped. Linux only.
pub struct Frozen {
    processes: Vec<Pid>,
}

impl Frozen {
    /// Stops the server with this main process, and all its others.
    pub fn server(postmaster: i32) -> io::Result<Frozen> {
        let mut frozen = Frozen { processes: Vec::new() };
        // The main process first: it begins no other then.
        frozen.stop(postmaster)?;
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"))?;
        for pid in children.split_whitespace() {
            frozen.stop(pid.parse().map_err(io::Error::other)?)?;
        }
        Ok(frozen)
    }

    /// Stops one process.
    pub fn process(pid: i32) -> io::Result<Frozen> {
        let mut frozen = Frozen { processes: Vec::new() };
        frozen.stop(pid)?;
        Ok(frozen)
    }

    fn stop(&mut self, pid: i32) -> io::Result<()> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("0 is no process"))?;
        match kill_process(pid, Signal::STOP) {
            // One that ends just now needs no stop.
            Err(rustix::io::Errno::SRCH) => Ok(()),
            stopped => {
                stopped?;
                self.processes.push(pid);
                Ok(())
            }
        }
    }

    /// Ends them all instead. Those beside the main one would not see its end.
    pub fn kill(mut self) {
        for pid in self.processes.drain(..) {
            // Who is gone already is what was wanted.
            kill_process(pid, Signal::KILL).ok();
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in self.processes.drain(..) {
            kill_process(pid, Signal::CONT).ok();
        }
    }
}
