//! `therev bench`: the figures, measured by a program of its own.

use crate::error::{CliError, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// The program beside this one.
const PROGRAM: &str = "therev-bench";

/// Measure what therev costs beside bare PostgreSQL, on servers of its own that are removed afterwards
///
/// Exit code 1 unless every goal is reached.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev bench --list
  therev bench --only point_read --json
  therev bench --dump ~/dumps/quantumcomputing
  therev bench relocate --switches 100")]
pub(crate) struct Args {
    /// Measure what moving rows costs, and nothing else
    #[arg(value_parser = ["relocate"], conflicts_with_all = ["only", "list", "dump", "chart"])]
    what: Option<String>,
    /// How many switches are measured, for `relocate`
    #[arg(long, value_name = "N", requires = "what")]
    switches: Option<u32>,
    /// Print what there is to measure
    #[arg(long)]
    list: bool,
    /// Measure only this; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// How often each side is measured
    #[arg(long, value_name = "N")]
    runs: Option<u32>,
    /// How many posts the community has
    #[arg(long, value_name = "N")]
    posts: Option<u32>,
    /// A folder with a Stack Exchange data dump, for the import
    #[arg(long)]
    dump: Option<PathBuf>,
    /// Write the chart of growth to this file, as SVG
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
}

pub(crate) fn run(args: Args, json: bool) -> Result<ExitCode> {
    let here = std::env::current_exe().ok().and_then(|program| program.parent().map(|dir| dir.join(PROGRAM)));
    let Some(program) = here.filter(|program| program.is_file()) else {
        let message = format!("the program `{PROGRAM}` is not beside this one");
        return Err(CliError::new("bench", message, "build it: `cargo build --release -p bench`"));
    };
    let mut command = Command::new(program);
    command.args(args.what).args(args.list.then_some("--list")).args(json.then_some("--json"));
    command.args(args.only.iter().flat_map(|name| ["--only", name]));
    for (option, value) in [("--runs", args.runs), ("--posts", args.posts), ("--switches", args.switches)] {
        if let Some(value) = value {
            command.args([option, &value.to_string()]);
        }
    }
    for (option, path) in [("--dump", args.dump), ("--chart", args.chart)] {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    }
    // In this one's place, so that a signal to it ends the measurement, which then removes its servers.
    let source = command.exec();
    Err(CliError::new(
        "bench",
        format!("`{PROGRAM}` could not be started: {source}"),
        "build it anew: `cargo build --release -p bench`",
    ))
}
