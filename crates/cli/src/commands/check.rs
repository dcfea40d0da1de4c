//! `therev check`: proves that all databases agree, and makes anew what does not.

use crate::app::App;
use crate::commands::unless_wrong;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::readable;
use crate::tables::table;
use std::process::ExitCode;
use therev::check::Check;
use therev::repair::{Repaired, Report};

/// Prove that all databases agree, with counts; exit 1 when anything is wrong
///
/// Every row is on the shard that owns it, names and users fit, the directory and the outbox follow, partitions and
/// schema versions are there. Safe beside live traffic: what differs is looked at again before it is named.
///
/// A repair makes anew what is derived and differs: claims of names, counts of posts, the directory. It never writes what
/// is a user's own, and ends with the proof.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev check
  therev check --repair
  therev check --json | jq '.checks[] | select(.wrong > 0)'")]
pub(crate) struct Args {
    /// Make what differs anew from what the shards hold, and deliver the outbox, first
    #[arg(long)]
    repair: bool,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<ExitCode> {
    let therev = app.open().await?;
    if !args.repair {
        let report = therev.check().await?;
        app.out.fact(&report, || proved(&report.checks, report.ok, &app.out).join("\n"))?;
        return Ok(unless_wrong(report.ok));
    }
    let outcome = therev.repair().await.map_err(CliError::from);
    let noted = |report: &Report| serde_json::json!({ "ok": report.ok, "repaired": report.repaired });
    let report = app.noted(&therev, "repair", "cluster", outcome, noted).await?;
    app.out.fact(&report, || said(&report, &app.out))?;
    Ok(unless_wrong(report.ok))
}

fn said(report: &Report, out: &Output) -> String {
    let done: Vec<&Repaired> = report.repaired.iter().filter(|one| one.repaired > 0).collect();
    let mut lines = Vec::new();
    if done.is_empty() {
        lines.push("Nothing was to be repaired.".to_owned());
    } else {
        let rows = done.iter().map(|one| vec![one.name.to_owned(), one.repaired.to_string()]);
        lines.push(table(out.width, &["repaired for", "count"], &["count"], rows));
        for one in done {
            lines.extend(named(one.name, &one.examples, one.repaired, out));
        }
    }
    lines.push(String::new());
    lines.extend(proved(&report.checks, report.ok, out));
    lines.join("\n")
}

fn proved(checks: &[Check], ok: bool, out: &Output) -> Vec<String> {
    let rows = checks.iter().map(|check| {
        let wrong = if check.wrong == 0 { "-".to_owned() } else { check.wrong.to_string() };
        vec![check.name.clone(), check.checked.to_string(), wrong]
    });
    let mut lines = vec![table(out.width, &["check", "checked", "wrong"], &["checked", "wrong"], rows)];
    for check in checks.iter().filter(|check| check.wrong > 0) {
        lines.extend(named(&check.name, &check.examples, check.wrong, out));
    }
    lines.push(String::new());
    lines.push(if ok {
        out.word("Nothing is wrong.", true)
    } else {
        let next = "`therev relay --once` delivers what only waits, `therev check --repair` makes anew what differs.";
        out.word(&format!("Something is wrong; {next}"), false)
    });
    lines
}

/// Some of the keys of a check.
fn named(name: &str, examples: &[String], all: u64, out: &Output) -> Vec<String> {
    let mut lines = Vec::new();
    if !examples.is_empty() {
        lines.extend([String::new(), out.fitted(&format!("{name}:"))]);
        lines.extend(examples.iter().map(|example| out.indented("  ", &readable::line(example))));
        let named = u64::try_from(examples.len()).unwrap_or(0);
        if all > named {
            lines.push(format!("  and {} more", all - named));
        }
    }
    lines
}
