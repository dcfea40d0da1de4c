//! `therev generate`: synthetic communities.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::progress::Shown;
use crate::tables::{count, load_end, per_shard};
use therev::generate::{GenerateReport, Generated, Plan, generate};

/// Write a synthetic community, the same one for the same seed at any number of shards
///
/// Authors and threads follow Zipf's law, texts are as long as people's, times cover two years. The same command again
/// changes nothing, and one that was interrupted continues.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  therev generate --users 10000 --threads 50000 --posts 1000000 --seed 1")]
pub(crate) struct Args {
    /// How many people
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    users: u32,
    /// How many threads
    #[arg(long, value_name = "M")]
    threads: u32,
    /// How many posts
    #[arg(long, value_name = "P")]
    posts: u32,
    /// Which community of this size
    #[arg(long, value_name = "S")]
    seed: u64,
    /// Zipf's exponent of authors and threads; 0 is even
    #[arg(long, value_name = "S", default_value_t = 1.1, value_parser = exponent)]
    zipf: f64,
}

fn exponent(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=10.0).contains(&value) => Ok(value),
        _ => Err("a number from 0 to 10 is wanted".into()),
    }
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let Args { users, threads, posts, seed, zipf } = args;
    let plan = Plan { users, threads, posts, seed, zipf };
    let therev = app.open().await?;
    let mut shown = Shown::new("{prefix:9} {bar:40} {human_pos}/{human_len} rows {per_sec} {msg} {eta}");
    let mut show = |p: Generated| shown.show(p.phase, p.made, p.total, &format!("{} rows made", p.made));
    let outcome = generate(&therev, plan, &mut show).await;
    shown.end();
    let noted = |report: &GenerateReport| serde_json::json!({ "plan": plan, "written": report.written, "seconds": report.seconds });
    let report =
        app.noted(&therev, "generate", &format!("seed {seed}"), outcome.map_err(CliError::from), noted).await?;
    app.out.fact(&report, || said(&report, &app.out))
}

fn said(report: &GenerateReport, out: &Output) -> String {
    let existing: u64 = report.existing.values().sum();
    let mut lines = vec![per_shard(out.width, &report.per_shard), String::new()];
    if existing > 0 {
        let rows = count(i64::try_from(existing).unwrap_or(i64::MAX), "row");
        lines.push(format!("There already: {rows}."));
    }
    lines.extend(load_end(report.undelivered, report.written.values().sum(), report.seconds));
    lines.join("\n")
}
