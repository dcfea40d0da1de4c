//! `therev status`: which databases answer, and what they hold.

use crate::app::App;
use crate::commands::unless_wrong;
use crate::error::Result;
use crate::output::Output;
use crate::readable;
use crate::tables::{bytes, count, number, table};
use serde::Serialize;
use std::process::ExitCode;
use therev::{FoundPlacement, Overview};

/// Show what every database holds and whether it answers; exit 1 if one is down
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev status
  therev status --json | jq '.shards[] | {shard, users}'")]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Status<'a> {
    #[serde(flatten)]
    overview: &'a Overview,
    found_by: &'a str,
}

pub(crate) async fn run(app: &App, _: Args) -> Result<ExitCode> {
    let found = app.found()?;
    let found_by = found.by.to_string();
    let therev = app.open_found(found).await?;
    let overview = therev.overview().await?;
    let status = Status { overview: &overview, found_by: &found_by };
    let from_file = therev.shards().found_placement() == FoundPlacement::StateFile;
    app.out.fact(&status, || said(&overview, &found_by, from_file, &app.out))?;
    Ok(unless_wrong(overview.is_up()))
}

fn said(overview: &Overview, found_by: &str, from_file: bool, out: &Output) -> String {
    let header = ["database", "state", "version", "users", "threads", "posts", "tasks", "size", "standbys"];
    let right = ["users", "threads", "posts", "tasks", "size"];
    let shards = overview.shards.iter().map(|shard| {
        vec![
            format!("shard {}", shard.shard),
            state(shard.state),
            number(shard.version.as_ref()),
            number(shard.users),
            number(shard.threads),
            number(shard.posts),
            number(shard.tasks),
            bytes(shard.bytes),
            lags(shard.standbys.iter().map(|standby| standby.lag_ms)),
        ]
    });
    let dash = || "-".to_owned();
    let directory = &overview.directory;
    let others = [
        vec![
            "directory".to_owned(),
            state(directory.state),
            dash(),
            number(directory.users),
            number(directory.threads),
            dash(),
            dash(),
            dash(),
            lags(directory.replicas.iter().map(|replica| replica.lag_ms)),
        ],
        ["control".to_owned(), state(overview.control)].into_iter().chain((0..7).map(|_| dash())).collect(),
    ];
    let mut lines = vec![table(out.width, &header, &right, shards.chain(others)), String::new()];
    let outbox = &overview.outbox;
    lines.push(match outbox.pending {
        None => "No shard says what waits to be delivered.".to_owned(),
        Some(0) if overview.shards.iter().any(|shard| shard.version.is_none()) => {
            "Nothing waits to be delivered on the shards that answer.".to_owned()
        }
        Some(0) => "Nothing waits to be delivered.".to_owned(),
        Some(n) => {
            let oldest_s = outbox.oldest_ms.unwrap_or_default() / 1_000.0;
            format!("{} to be delivered, the oldest for {oldest_s:.1} s.", waiting(n))
        }
    });
    lines.push(format!("Found by {found_by}."));
    if from_file {
        lines.push("The placement is the last known one: the control database gave no answer.".to_owned());
    }
    lines.extend(overview.shards.iter().filter_map(|shard| shard.reason.as_deref()).map(readable::line));
    lines.push(if overview.is_up() {
        out.word("Everything is up.", true)
    } else {
        out.word("Something is down; a local cluster is repaired by `therev cluster up`.", false)
    });
    lines.join("\n")
}

fn waiting(events: i64) -> String {
    format!("{} {}", count(events, "event"), if events == 1 { "waits" } else { "wait" })
}

/// A state's word.
fn state(state: impl Serialize) -> String {
    let word = serde_json::to_value(state).unwrap_or_default();
    word.as_str().unwrap_or("unknown").to_owned()
}

/// `2 (0, 13 ms)`: how many follow, and how far they are behind.
fn lags(lags_ms: impl Iterator<Item = Option<f64>>) -> String {
    let all: Vec<String> = lags_ms.map(|lag| lag.map_or_else(|| "down".to_owned(), |ms| format!("{ms:.0}"))).collect();
    match all.as_slice() {
        [] => "-".to_owned(),
        down if down.iter().all(|lag| lag == "down") => format!("{} (down)", down.len()),
        some => format!("{} ({} ms)", some.len(), some.join(", ")),
    }
}
