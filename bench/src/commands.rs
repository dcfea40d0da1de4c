//! What somebody at a terminal waits for, the start of the process included.
//!
//! By the program `therev` beside this one, on a local cluster of its own in a temporary folder.

use crate::Anyhow;
use crate::figure::{Figure, median};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tempfile::TempDir;

/// How often a command is given of which one takes no time.
const SHORT_RUNS: usize = 21;
/// How many posts the page of a thread has.
const PAGE: &str = "50";
/// As many users, threads and posts as the community has that a dump is expected to hold.
const SMALL: [&str; 8] = ["--users", "3462", "--threads", "612", "--posts", "4473", "--seed", "1"];

/// A folder in which `therev` is called. What runs there goes with it.
struct Desk {
    home: TempDir,
    program: PathBuf,
}

impl Desk {
    fn new() -> Anyhow<Desk> {
        let program = std::env::current_exe()?.with_file_name("therev");
        if !program.exists() {
            return Err(format!("{} is not there: `cargo build --release -p therev-cli`", program.display()).into());
        }
        Ok(Desk { home: tempfile::tempdir()?, program })
    }

    /// What a command prints; an error with its words where it fails.
    fn run(&self, args: &[&str]) -> Anyhow<String> {
        let mut command = Command::new(&self.program);
        // The cluster of this folder, whatever the environment says.
        command.args(args).current_dir(self.home.path()).env_remove("THEREV_CONTROL_URL");
        let output = command.output()?;
        if output.status.success() {
            return Ok(String::from_utf8(output.stdout)?);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("`therev {}` failed: {}", args.join(" "), said.trim()).into())
    }

    /// How long a command takes, in seconds.
    fn seconds(&self, args: &[&str]) -> Anyhow<f64> {
        let started = Instant::now();
        self.run(args)?;
        Ok(started.elapsed().as_secs_f64())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // Where nothing was started, there is nothing to end, and no cluster either.
        if self.home.path().join(".therev").exists()
            && let Err(error) = self.run(&["cluster", "destroy", "--yes"])
        {
            eprintln!("The cluster in {} could not be removed: {error}", self.home.path().display());
        }
    }
}

/// The local cluster cold and warm, and on a community of a few thousand people a check and the page of a thread.
pub(crate) async fn commands(runs: usize, dump: Option<&Path>) -> Anyhow<Vec<Figure>> {
    let desk = Desk::new()?;
    let cold = desk.seconds(&["cluster", "up"])?;
    let mut warm = Vec::new();
    for _ in 0..runs {
        // Between two commands an interruption is heard.
        tokio::task::yield_now().await;
        desk.run(&["cluster", "down"])?;
        warm.push(desk.seconds(&["cluster", "up"])?);
    }
    match dump.map(Path::canonicalize).transpose()? {
        Some(dump) => desk.run(&["import", "stackexchange", &dump.to_string_lossy(), "--site", "bench"])?,
        None => desk.run(&[&["generate"][..], &SMALL].concat())?,
    };
    desk.run(&["relay", "--once"])?;
    let mut check = Vec::new();
    for _ in 0..runs {
        tokio::task::yield_now().await;
        check.push(desk.seconds(&["check"])?);
    }
    let threads: serde_json::Value =
        serde_json::from_str(&desk.run(&["thread", "list", "--most-active", "--limit", "1", "--json"])?)?;
    let thread = threads["items"][0]["thread_id"].as_str().ok_or("the community has no thread")?;
    let mut page = Vec::new();
    for _ in 0..SHORT_RUNS {
        tokio::task::yield_now().await;
        page.push(1_000.0 * desk.seconds(&["thread", "show", thread, "--page-size", PAGE])?);
    }
    let community = if dump.is_some() { "the dump's community" } else { "3,462 users and 4,473 posts" };
    Ok(vec![
        Figure::at_most("cluster_up_cold", cold, Some(15.0), "s", 1)
            .note("`cluster up` where nothing is: 4 servers and a replica"),
        Figure::at_most("cluster_up_warm", median(warm), Some(4.0), "s", runs).note("the same after `cluster down`"),
        Figure::at_most("command_check", median(check), Some(3.0), "s", runs).note(format!("`check` of {community}")),
        Figure::at_most("command_thread", median(page), Some(100.0), "ms", SHORT_RUNS)
            .note(format!("`thread show` of the busiest thread of {community}, {PAGE} posts on 4 shards")),
    ])
}
