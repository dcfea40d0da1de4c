//! `therev check`: proves that all databases agree.

use crate::app::App;
use crate::commands::unless_wrong;
use crate::error::Result;
use crate::output::Output;
use crate::readable;
use crate::tables::table;
use std::process::ExitCode;
use therev::check::Report;

/// Prove that all databases agree, with counts; exit 1 when anything is wrong
///
/// Every row is on the shard that owns it, names and users fit, the directory and the outbox follow, partitions and
/// schema versions are there. Safe beside live traffic: what differs is looked at again before it is named.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev check
  therev check --json | jq '.checks[] | select(.wrong > 0)'")]
pub(crate) struct Args {}

pub(crate) async fn run(app: &App, _: Args) -> Result<ExitCode> {
    let report = app.open().await?.check().await?;
    app.out.fact(&report, || said(&report, &app.out))?;
    Ok(unless_wrong(report.ok))
}

fn said(report: &Report, out: &Output) -> String {
    let rows = report.checks.iter().map(|check| {
        let wrong = if check.wrong == 0 { "-".to_owned() } else { check.wrong.to_string() };
        vec![check.name.clone(), check.checked.to_string(), wrong]
    });
    let mut lines = vec![table(out.width, &["check", "checked", "wrong"], &["checked", "wrong"], rows)];
    for check in report.checks.iter().filter(|check| check.wrong > 0) {
        lines.push(String::new());
        lines.push(format!("{}:", check.name));
        lines.extend(check.examples.iter().map(|example| format!("  {}", readable::line(example))));
        let named = u64::try_from(check.examples.len()).unwrap_or(0);
        if check.wrong > named {
            lines.push(format!("  and {} more", check.wrong - named));
        }
    }
    lines.push(String::new());
    lines.push(if report.ok {
        out.word("Nothing is wrong.", true)
    } else {
        out.word("Something is wrong; `therev relay --once` delivers what only waits.", false)
    });
    lines.join("\n")
}
