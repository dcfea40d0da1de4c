//! The one test binary of the command line; every file beside it is a module of it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod desk;
mod exit_codes;
mod help;
mod json_page;
mod moving;
mod on_a_cluster;
mod promotion;
mod shards;

use std::process::{Command, Output, Stdio};

/// Runs the program in an empty folder.
fn therev(args: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    command(args).current_dir(folder.path()).output().unwrap()
}

/// The program without the caller's environment.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_therev"));
    command.env_clear().env("COLUMNS", "100").args(args).stdin(Stdio::null());
    command
}

#[test]
fn no_file_is_forgotten() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let modules = include_str!("runner.rs");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "runner") {
            assert!(modules.contains(&format!("\nmod {module};")), "tests/{name} is not part of tests/runner.rs");
        }
    }
}
