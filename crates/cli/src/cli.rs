//! The command line as a whole: the flags that every command takes.

use crate::commands::Command;
use clap::{Args, Parser, ValueEnum};

/// Plain PostgreSQL servers as one store.
#[derive(Debug, Parser)]
#[command(
    name = "therev",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  therev cluster up                      four servers on this machine, ready to use
  therev import stackexchange DIR --site quantumcomputing
  therev thread list --most-active
  therev check                           proves that all databases agree

The cluster is the one of --control, else of THEREV_CONTROL_URL, else of the nearest therev.toml,
else of the nearest .therev/therev.toml, in this folder or one above; `therev status` says which.

Exit codes: 0 done; 1 not done, or something is wrong; 2 the command line cannot be understood."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    /// The control database: postgresql://role@host:port/database
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) control: Option<String>,
    /// Print JSON for programs; errors too
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more on stderr; twice: every step
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// How the log on stderr is written: for people, or one object a line
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    // No docs on the values: they would make every command's help three times as long.
    Text,
    Json,
}
