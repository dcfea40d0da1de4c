//! The `therev` command: one file per command below `commands`, named as it is typed.
//!
//! Data goes to stdout, talk to stderr. Exit code 0: done; 1: not done, or something is wrong; 2: the command line
//! could not be understood.

mod app;
mod cli;
mod commands;
mod config;
mod error;
mod input;
mod logging;
mod output;
mod page;
mod passfile;
mod progress;
mod readable;
mod tables;

use clap::Parser;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let env = config::Environment::read();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => return error::report_usage(&usage),
    };
    let json = cli.global.json;
    if json {
        output::only_errors();
    }
    logging::start(&cli.global, env.no_color);
    match run(cli, env) {
        Ok(code) => code,
        Err(error) => error.report(json),
    }
}

/// Runs a command to its end on a small runtime.
fn run(cli: cli::Cli, env: config::Environment) -> Result<ExitCode, error::CliError> {
    let app = app::App::new(cli.global, env)?;
    // An import keeps every core busy; whatever else is asked needs two.
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let outcome = runtime.block_on(commands::run(&app, cli.command));
    // Nothing that still runs in the background has anything left to tell.
    runtime.shutdown_background();
    outcome
}
