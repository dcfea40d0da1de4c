//! `therev man`: the manual.

use crate::cli::Cli;
use crate::error::{CliError, Result};
use crate::output::{talk, write_text};
use clap::CommandFactory;
use clap_mangen::Man;
use std::path::PathBuf;

/// Print the manual page, or write one page per command
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev man | man -l -
  therev man --dir ~/.local/share/man/man1")]
pub(crate) struct Args {
    /// Write a page for every command into this folder instead
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let Some(folder) = args.dir else {
        let mut page = Vec::new();
        Man::new(Cli::command()).render(&mut page)?;
        return write_text(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(&folder).map_err(|e| CliError::file("make", &folder, &e))?;
    clap_mangen::generate_to(Cli::command(), &folder).map_err(|e| CliError::file("write into", &folder, &e))?;
    talk(&format!("The manual is in {}; `man therev` shows it when MANPATH leads there.", folder.display()));
    Ok(())
}
