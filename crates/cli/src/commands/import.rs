//! `therev import`: communities of other sites.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::progress::Shown;
use crate::tables::{load_end, per_shard, table};
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
    let noted = |report: &ImportReport| serde_json::json!({ "read": report.read, "written": report.written, "seconds": report.seconds });
    let report = app.noted(&therev, "import", &format!("site {site}"), outcome.map_err(CliError::from), noted).await?;
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
    let votes = &report.votes;
    let mut lines = vec![
        table(out.width, &["", "what", "rows"], &["rows"], all),
        String::new(),
        per_shard(out.width, &report.per_shard),
        String::new(),
        format!("{} of {} scores differ from the votes of the dump.", votes.differing, votes.compared),
    ];
    lines.extend(votes.examples.iter().map(|example| format!("  {}", crate::readable::line(example))));
    lines.extend(load_end(report.undelivered, report.written.values().sum(), report.seconds));
    lines.join("\n")
}
