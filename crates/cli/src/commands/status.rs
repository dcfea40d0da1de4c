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
    lines.push(out.fitted(&format!("Found by {found_by}.")));
    if from_file {
        lines.push("The placement is the last known one: the control database gave no answer.".to_owned());
    }
    let reasons = overview.shards.iter().filter_map(|shard| shard.reason.as_deref());
    lines.extend(reasons.map(|reason| out.fitted(&readable::line(reason))));
    for shard in &overview.shards {
        lines.extend(shard.other_primaries.iter().map(|host| {
            let number = shard.shard;
            out.fitted(&format!(
                "shard {number}: {host} takes writes, too, and is not its primary. Nobody reads what is written there: stop it, and \
                 make it a standby anew."
            ))
        }));
    }
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

/// `3 (0, 13 ms, 1 down)`: how many are to follow, and how far they are behind.
fn lags(lags_ms: impl Iterator<Item = Option<f64>>) -> String {
    let (up, down): (Vec<_>, Vec<_>) = lags_ms.partition(Option::is_some);
    let lags: Vec<String> = up.iter().flatten().map(|ms| format!("{ms:.0}")).collect();
    match (up.len(), down.len()) {
        (0, 0) => "-".to_owned(),
        (0, all) => format!("{all} (down)"),
        (all, 0) => format!("{all} ({} ms)", lags.join(", ")),
        (some, down) => format!("{} ({} ms, {down} down)", some + down, lags.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn followers_are_told_in_a_few_words() {
        let said = |lags_ms: &[Option<f64>]| lags(lags_ms.iter().copied());
        assert_eq!(said(&[]), "-");
        assert_eq!(said(&[Some(0.2), Some(13.0)]), "2 (0, 13 ms)");
        assert_eq!(said(&[None, None]), "2 (down)");
        assert_eq!(said(&[Some(0.0), None]), "2 (0 ms, 1 down)");
    }
}
