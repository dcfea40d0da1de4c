//! `therev completions`: what a shell needs to complete commands.

use crate::cli::Cli;
use crate::error::Result;
use crate::output::write_text;
use clap::CommandFactory;
use clap_complete::Shell;

/// Print completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  therev completions bash > ~/.local/share/bash-completion/completions/therev")]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

pub(crate) fn run(args: Args) -> Result<()> {
    // By way of memory: a pipe that was closed is no reason to panic.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "therev", &mut script);
    write_text(&String::from_utf8_lossy(&script))
}
