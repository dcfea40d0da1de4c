//! What therev costs beside bare PostgreSQL.
//!
//! On servers of its own (four shards and a replica, fsync on), made in a temporary folder and removed afterwards. Both
//! sides of a figure are measured in the same run, alternating; the figures are medians.

mod bare;
mod chart;
mod cluster;
mod commands;
mod figure;
mod ground;
mod growth;
mod loads;
mod reads;
mod relocate;
mod writes;

use clap::Parser;
use cluster::Servers;
use figure::Figure;
use ground::Ground;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

// As the command has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long a run of throughput takes.
const PERIOD: Duration = Duration::from_secs(2);

/// The community that the goals are set for.
const POSTS: u32 = 1_000_000;

type Anyhow<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What is measured, by the name that `--only` takes.
const NAMES: [(&str, &str); 12] = [
    ("point_read", "a user by key ÷ the same statement without fence and library"),
    ("author_page", "50 posts of one author ÷ the same statement without fence and library"),
    ("thread_page", "50 posts of a thread on 4 shards ÷ the slowest of its shards' queries for them, side by side"),
    ("one_of_sixteen", "shards asked for a thread whose posts are on one of sixteen"),
    ("growth", "reads, pages and writes with 10 × the data, and on 1, 2, 4, 8 and 16 shards"),
    ("insert", "a post with fence, contribution and event ÷ its bare row, ÷ the same rows"),
    ("post", "whole posts, delivered"),
    ("waits", "register, reply, own writes seen: what one person waits for"),
    ("check", "check of the whole cluster"),
    ("import", "an import ÷ COPY of the same rows (with --dump)"),
    ("generate", "a generation ÷ COPY of the same rows, and one of 1,000,000 posts"),
    ("commands", "what somebody at a terminal waits for: cluster up, check, thread show"),
];

/// Measures therev beside bare PostgreSQL; exit code 1 unless every goal is reached
#[derive(Parser)]
#[command(name = "therev-bench")]
struct Arguments {
    /// Measure what moving rows costs, and nothing else
    #[arg(value_parser = ["relocate"], conflicts_with_all = ["only", "list", "dump", "chart"])]
    what: Option<String>,
    /// How many switches are measured, for `relocate`
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..), requires = "what")]
    switches: u32,
    /// Print what there is to measure
    #[arg(long)]
    list: bool,
    /// Measure only this; may be given several times
    #[arg(long, value_name = "NAME", value_parser = NAMES.map(|(name, _)| name))]
    only: Vec<String>,
    /// How often each side is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..100))]
    runs: u32,
    /// How many posts the community has
    #[arg(long, default_value_t = POSTS, value_parser = clap::value_parser!(u32).range(20_000..))]
    posts: u32,
    /// A folder with a Stack Exchange data dump, for the import
    #[arg(long)]
    dump: Option<PathBuf>,
    /// Write the chart of growth to this file, as SVG
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    /// What is made first, and whether its figures are those that the goals are set for.
    fn community(&self) -> String {
        let less = if self.posts < POSTS { format!("; the goals are set for {POSTS}") } else { String::new() };
        format!("making a community of {} posts{less}", self.posts)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for (name, what) in NAMES {
            println!("{name:16} {what}");
        }
        return ExitCode::SUCCESS;
    }
    if arguments.dump.is_none() && arguments.only.iter().any(|only| only == "import") {
        eprintln!("The import needs a dump: give its folder with --dump.");
        return ExitCode::from(2);
    }
    if arguments.chart.is_some() && !arguments.wants("growth") {
        eprintln!("The chart shows growth: measure it, too, with --only growth.");
        return ExitCode::from(2);
    }
    match run(&arguments).await {
        Ok(figures) if figures.iter().all(|figure| figure.ok) => ExitCode::SUCCESS,
        Ok(_) => {
            eprintln!("A goal was missed.");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("The measurement ended early: {error}");
            let mut cause = error.source();
            while let Some(inner) = cause {
                eprintln!("  because {inner}");
                cause = inner.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Anyhow<Vec<Figure>> {
    // From here on a signal is kept until it is looked at: servers that are being started must be there to be removed.
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut hung_up = signal(SignalKind::hangup())?;
    let servers = Servers::start()?;
    let measured = tokio::select! {
        biased;
        _ = interrupted.recv() => Err("it was interrupted".into()),
        _ = terminated.recv() => Err("it was terminated".into()),
        _ = hung_up.recv() => Err("its terminal was closed".into()),
        measured = measure(arguments, &servers) => measured,
    };
    drop(servers);
    let figures = measured?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        println!("{}", figure::table(&figures));
    }
    Ok(figures)
}

async fn measure(arguments: &Arguments, servers: &Servers) -> Anyhow<Vec<Figure>> {
    let wanted = |name: &str| arguments.wants(name);
    let runs = usize::try_from(arguments.runs)?;
    if arguments.what.is_some() {
        eprintln!("{}", arguments.community());
        let ground = Ground::new(servers, "ground", 4, arguments.posts, runs).await?;
        return Box::pin(relocate::relocate(&ground, arguments)).await;
    }
    let mut figures = Vec::new();
    // The bare inserts leave no contributions: what proves the community comes before them.
    let on_ground =
        ["check", "point_read", "author_page", "thread_page", "one_of_sixteen", "growth", "waits", "post", "insert"];
    if on_ground.into_iter().any(wanted) {
        eprintln!("{}", arguments.community());
        let ground = Ground::new(servers, "ground", 4, arguments.posts, runs).await?;
        for name in on_ground.into_iter().filter(|name| wanted(name)) {
            eprintln!("measuring {name}");
            figures.extend(match name {
                "point_read" => reads::point_read(&ground).await?,
                "author_page" => reads::author_page(&ground).await?,
                "thread_page" => reads::thread_page(&ground).await?,
                "one_of_sixteen" => reads::one_of_sixteen(&ground).await?,
                "growth" => growth::growth(&ground, arguments.chart.as_deref()).await?,
                "insert" => writes::insert(&ground).await?,
                "post" => writes::post(&ground).await?,
                "waits" => writes::waits(&ground).await?,
                _ => loads::check(&ground).await?,
            });
        }
        ground.databases.remove().await?;
    }
    match &arguments.dump {
        Some(dump) if wanted("import") => {
            eprintln!("measuring import");
            figures.extend(loads::import(servers, runs, dump).await?);
        }
        None if wanted("import") => eprintln!("import is left out: --dump names no folder"),
        _ => {}
    }
    if wanted("generate") {
        eprintln!("measuring generate");
        figures.extend(loads::generate(servers, runs).await?);
    }
    if wanted("commands") {
        eprintln!("measuring commands");
        figures.extend(commands::commands(runs, arguments.dump.as_deref()).await?);
    }
    Ok(figures)
}
