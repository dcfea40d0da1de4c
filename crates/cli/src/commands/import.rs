//! `therev import`: communities of other sites.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::progress::Shown;
use crate::tables::{count, table};
use clap::Subcommand;
use std::path::PathBuf;
use therev::import::{ImportReport, Progress, stackexchange};

/// Bring in a community of another site
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Import a Stack Exchange data dump: Users.xml, Posts.xml, Comments.xml, Votes.xml
    ///
    /// A second import of the same dump changes nothing, and one that was interrupted continues.
    #[command(after_help = "\
Example:
  therev import stackexchange ~/dumps/quantumcomputing --site quantumcomputing")]
    Stackexchange {
        /// The folder with the files
        dir: PathBuf,
        /// The site's name: part of every id, so always the same one for the same site
        #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        site: String,
    },
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let Command::Stackexchange { dir, site } = args.command;
    let therev = app.open().await?;
    let mut shown = Shown::new("{prefix:9} {bar:40} {bytes}/{total_bytes} {msg} {elapsed}");
    let mut show = |p: Progress| shown.show(p.phase, p.bytes, p.bytes_total, &format!("{} rows written", p.written));
    let outcome = stackexchange(&therev, &dir, &site, &mut show).await;
    shown.end();
    let target = format!("site {site}");
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            let error = CliError::from(error);
            let after = serde_json::json!({ "stopped": error.json() });
            if let Err(unnoted) = therev.note_operator(&app.operator(), "import", &target, after).await {
                tracing::warn!(error = %unnoted, "the import could not be noted in the control database");
            }
            return Err(error);
        }
    };
    let noted = serde_json::json!({ "read": report.read, "written": report.written, "seconds": report.seconds });
    therev.note_operator(&app.operator(), "import", &target, noted).await?;
    app.out.fact(&report, || said(&report, &app.out))
}

fn said(report: &ImportReport, out: &Output) -> String {
    let rows = |what: &str, counts: &std::collections::BTreeMap<&'static str, u64>| {
        let row = |(kind, count): (&&str, &u64)| vec![what.to_owned(), kind.replace('_', " "), count.to_string()];
        counts.iter().map(row).collect::<Vec<_>>()
    };
    let skipped = report.skipped.iter().map(|skipped| {
        vec!["skipped".to_owned(), format!("{}: {}", skipped.kind, skipped.reason), skipped.count.to_string()]
    });
    let all = rows("read", &report.read).into_iter().chain(rows("written", &report.written)).chain(skipped);
    let shards = report.per_shard.iter().map(|shard| {
        [format!("shard {}", shard.shard), shard.users.to_string(), shard.threads.to_string(), shard.posts.to_string()]
            .into()
    });
    let written: u64 = report.written.values().sum();
    let speed = u32::try_from(written).map_or(f64::INFINITY, f64::from) / report.seconds.max(0.001);
    let votes = &report.votes;
    let mut lines = vec![
        table(out.width, &["", "what", "rows"], &["rows"], all),
        String::new(),
        table(out.width, &["", "users", "threads", "posts"], &["users", "threads", "posts"], shards),
        String::new(),
        format!("{} of {} scores differ from the votes of the dump.", votes.differing, votes.compared),
    ];
    lines.extend(votes.examples.iter().map(|example| format!("  {}", crate::readable::line(example))));
    if report.undelivered > 0 {
        let events = count(i64::try_from(report.undelivered).unwrap_or(i64::MAX), "event");
        lines.push(format!("A database is down: {events} wait. `therev relay --once` delivers them when it is back."));
    }
    let rows = count(i64::try_from(written).unwrap_or(i64::MAX), "row");
    lines.push(format!("Wrote {rows} in {:.1} s: {speed:.0} rows/s.", report.seconds));
    lines.join("\n")
}
