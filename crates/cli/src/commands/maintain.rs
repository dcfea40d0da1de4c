//! `therev maintain`: what is done by a schedule.

use crate::app::App;
use crate::commands::unless_wrong;
use crate::error::Result;
use crate::output::{talk, write_line};
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;
use therev::Maintained;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Make partitions three months ahead, refresh the views and drop delivered events, until stopped
///
/// Any number may run.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev maintain --once
  therev maintain --every 60")]
pub(crate) struct Args {
    /// Do it once; exit 1 if a shard could not be served
    #[arg(long)]
    once: bool,
    /// Seconds between two rounds
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    every: u64,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<ExitCode> {
    let therev = app.open().await?;
    if args.once {
        // Whoever ends it now ends a statement at the most.
        let done = therev.maintain_once().await?;
        app.out.fact(&done, || said(&done))?;
        return Ok(unless_wrong(done.shards_down.is_empty()));
    }
    talk(&format!("One round every {} s until stopped (Ctrl-C).", args.every));
    let mut stop = Stop::listen()?;
    loop {
        let done = tokio::select! {
            done = therev.maintain_once() => done?,
            // A view may wait for somebody's lock.
            () = stop.said() => return Ok(ExitCode::SUCCESS),
        };
        write_line(&if app.out.json { serde_json::to_string(&done)? } else { said(&done) })?;
        if stop.within(Duration::from_secs(args.every)).await {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn said(done: &Maintained) -> String {
    let mut text = format!(
        "Partitions made: {}; views refreshed: {}; events dropped: {}; sessions removed: {}",
        done.partitions_made, done.views_refreshed, done.events_dropped, done.sessions_removed
    );
    for shard in &done.shards_down {
        let _ = write!(text, "; shard {shard} could not be served (see with -v)");
    }
    text.push('.');
    text
}

/// Ctrl-C, or what a service manager sends.
pub(crate) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    pub(crate) fn listen() -> Result<Stop> {
        Ok(Stop { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits until it is time to stop.
    pub(crate) async fn said(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Waits; whether it is time to stop.
    pub(crate) async fn within(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.said()).await.is_ok()
    }
}
