//! `therev relay`: delivers what was left behind.

use crate::app::App;
use crate::commands::maintain::Stop;
use crate::commands::unless_wrong;
use crate::error::Result;
use crate::output::{talk, write_line};
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use therev::planner::HotUsers;
use therev::relocation::{Mover, Options};
use therev::{Community, Relayed, relay_rest};

/// Deliver the outbox, sum the threads' totals, settle pending names and carry relocations on, until stopped
///
/// Any number may run. How often is `relay_ms` of the configuration. Relocations whose process died are carried on where the
/// passfile has the password of `therev_mover`. With `hot_users = "apply"` it also places users apart who are too much for their
/// shard.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev relay --once
  therev relay -v")]
pub(crate) struct Args {
    /// Do it once; exit 1 if something could not be delivered
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<ExitCode> {
    let found = app.found()?;
    let period = Duration::from_millis(if found.config.relay_ms == 0 { 1_000 } else { found.config.relay_ms });
    let therev = app.open_found(found).await?;
    if args.once {
        let relayed = therev.relay_once().await?;
        app.out.fact(&relayed, || said(&relayed))?;
        return Ok(unless_wrong(relayed.waiting == 0 && relayed.shards_down.is_empty()));
    }
    talk("Delivering until stopped (Ctrl-C).");
    let mut stop = Stop::listen()?;
    let mover = Arc::new(Mover::new(therev.shards().clone(), Options::default()));
    let isolating = async {
        if therev.shards().config().hot_users == HotUsers::Apply {
            Box::pin(mover.isolate_hot()).await;
        }
        std::future::pending::<()>().await;
    };
    let passes = async {
        loop {
            let started = Instant::now();
            pass(app, &therev).await?;
            if stop.within(relay_rest(period, started.elapsed())).await {
                return Ok(ExitCode::SUCCESS);
            }
        }
    };
    tokio::select! {
        ended = passes => ended,
        () = Box::pin(mover.carry_on()) => Ok(ExitCode::SUCCESS),
        () = isolating => Ok(ExitCode::SUCCESS),
        // Beside the deliveries: a repair reads whole tables.
        () = Box::pin(therev.look_after(period)) => Ok(ExitCode::SUCCESS),
    }
}

/// One pass; only what was done is told.
async fn pass(app: &App, community: &Community) -> Result<()> {
    match community.deliver_once().await {
        Ok(relayed) if relayed == Relayed::default() => Ok(()),
        Ok(relayed) if app.out.json => write_line(&serde_json::to_string(&relayed)?),
        Ok(relayed) => write_line(&said(&relayed)),
        Err(error) => {
            tracing::warn!(%error, "a pass of the relay failed; the next one tries again");
            Ok(())
        }
    }
}

fn said(relayed: &Relayed) -> String {
    let mut parts: Vec<String> = relayed.delivered.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    if parts.is_empty() {
        parts.push("nothing".to_owned());
    }
    let mut text = format!("Delivered {}", parts.join(", "));
    if relayed.claims_settled > 0 {
        let _ = write!(text, "; settled {} names", relayed.claims_settled);
    }
    if relayed.waiting > 0 {
        let _ = write!(text, "; {} wait for a database that is down", relayed.waiting);
    }
    if let Some(reason) = &relayed.waiting_for {
        let _ = write!(text, " ({reason})");
    }
    for shard in &relayed.shards_down {
        let _ = write!(text, "; shard {shard} gave no answer");
    }
    text.push('.');
    text
}
