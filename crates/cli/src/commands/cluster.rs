//! `therev cluster`: PostgreSQL servers on this machine.

mod up;

use crate::app::App;
use crate::commands::unless_wrong;
use crate::config::LOCAL_FOLDER;
use crate::error::{CliError, Result};
use crate::input::confirmed;
use crate::output::talk;
use crate::tables::{number, table};
use clap::Subcommand;
use local::{Cluster, ServerId, ServerState, ServerStatus};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// PostgreSQL servers on this machine: one per shard, and a replica for the directory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev cluster up
  therev cluster up --dir /tmp/split --layout split
  eval \"$(therev cluster env)\" && psql \"$THEREV_SHARD_0_URL\"
  therev cluster destroy --yes")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    /// The cluster's folder
    #[arg(long, global = true, value_name = "DIR", default_value = LOCAL_FOLDER)]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make what is missing, start what is down, and return when everything answers
    Up(up::Up),
    /// Stop every server; the data stays
    Down,
    /// Show the servers; exit 1 if one is down
    Status,
    /// Stop every server and remove its data
    Destroy {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Make a shard's standby its primary, and the old primary its standby
    ///
    /// An old primary that still runs is stopped first, in order, so that nothing is lost. Nodes follow by themselves.
    Promote {
        /// Which shard
        shard: u16,
    },
    /// Print addresses for a shell, with a superuser's role
    Env,
    /// Show the ends of the servers' logs
    Logs {
        /// Only this server: shard-0, replica-1
        server: Option<String>,
        /// How many lines of each
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        lines: u16,
    },
}

pub(crate) async fn run(app: &App, args: Args) -> Result<ExitCode> {
    // Without the dots that somebody typed.
    let dir: PathBuf = app.folder.join(&args.dir).components().collect();
    match args.command {
        Command::Up(wanted) => up::run(app, &dir, &wanted).await?,
        Command::Down => {
            Cluster::open(&dir)?.down(&mut |line| talk(line))?;
            app.out
                .fact(&serde_json::json!({ "down": dir }), || "Every server is stopped; the data stays.".to_owned())?;
        }
        Command::Status => return status(app, &Cluster::open(&dir)?),
        Command::Destroy { yes } => destroy(app, &dir, yes)?,
        Command::Promote { shard } => promote(app, &mut Cluster::open(&dir)?, shard)?,
        Command::Env => env(app, &Cluster::open(&dir)?)?,
        Command::Logs { server, lines } => logs(app, &Cluster::open(&dir)?, server.as_deref(), lines.into())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn status(app: &App, cluster: &Cluster) -> Result<ExitCode> {
    let servers = cluster.status();
    let all_run = servers.iter().all(|server| server.state == ServerState::Running);
    let fact = |server: &ServerStatus| {
        serde_json::json!({
            "server": server.server.to_string(), "state": server.state.to_string(), "port": server.port,
            "follows": server.follows.map(|primary| primary.to_string()),
            "pid": server.pid, "data": server.data, "log": server.log,
        })
    };
    let facts = serde_json::json!({
        "dir": cluster.dir(), "servers": servers.iter().map(fact).collect::<Vec<_>>()
    });
    app.out.fact(&facts, || {
        let row = |server: &ServerStatus| {
            vec![
                server.server.to_string(),
                server.state.to_string(),
                server.follows.map_or_else(|| "-".to_owned(), |primary| primary.to_string()),
                server.port.to_string(),
                number(server.pid),
                server.data.display().to_string(),
            ]
        };
        let header = ["server", "state", "follows", "port", "process", "data"];
        let table = table(app.out.width, &header, &["port", "process"], servers.iter().map(row));
        let last = if all_run { "All servers run." } else { "Not all run; `therev cluster up` repairs that." };
        format!("{table}\n\n{}", app.out.word(last, all_run))
    })?;
    Ok(unless_wrong(all_run))
}

fn promote(app: &App, cluster: &mut Cluster, shard: u16) -> Result<()> {
    let local::Promoted { primary, may_be_lost } = cluster.promote(shard, &mut |line| talk(line))?;
    let said = serde_json::json!({ "shard": shard, "primary": primary.to_string(), "may_be_lost": may_be_lost });
    app.out.fact(&said, || {
        let lost = may_be_lost.map(|lost| format!("{}\n", app.out.word(&lost, false))).unwrap_or_default();
        format!("{lost}Shard {shard}'s primary is {primary} now; its other servers follow it.\nNext: therev status")
    })
}

fn destroy(app: &App, dir: &Path, yes: bool) -> Result<()> {
    let cluster = match Cluster::open(dir) {
        // Its folder may be gone, and its servers not.
        Err(local::Error::NoCluster { .. }) if yes => return destroy_orphaned(app, dir),
        cluster => cluster?,
    };
    if !yes {
        confirmed(&format!("This removes {} with all its data, for good", dir.display()), "nothing was destroyed")?;
    }
    // While a server runs, the passwords are needed.
    cluster.down(&mut |line| talk(line))?;
    up::forget(dir)?;
    cluster.destroy(&mut |line| talk(line))?;
    app.out.fact(&serde_json::json!({ "destroyed": dir.to_string_lossy() }), || format!("{} is gone.", dir.display()))
}

/// Removes the servers of a cluster whose folder was deleted.
fn destroy_orphaned(app: &App, dir: &Path) -> Result<()> {
    let Some(home) = Cluster::destroy_orphaned(dir, &mut |line| talk(line))? else {
        return Err(local::Error::NoCluster { dir: dir.to_owned() }.into());
    };
    let said = || format!("{} is gone, with the servers that were left in {}.", dir.display(), home.display());
    app.out.fact(&serde_json::json!({ "destroyed": dir.to_string_lossy() }), said)
}

fn env(app: &App, cluster: &Cluster) -> Result<()> {
    let mut addresses = vec![("THEREV_CONTROL_URL".to_owned(), cluster.control_url()?)];
    let shards = cluster.shard_urls().into_iter().enumerate();
    addresses.extend(shards.map(|(number, url)| (format!("THEREV_SHARD_{number}_URL"), url)));
    addresses.push(("THEREV_DIRECTORY_URL".to_owned(), cluster.directory_url()?));
    let replica = cluster.directory_replica_urls().into_iter().next();
    addresses.extend(replica.map(|url| ("THEREV_DIRECTORY_REPLICA_URL".to_owned(), url)));
    let facts: serde_json::Map<_, _> = addresses.iter().map(|(name, url)| (name.clone(), url.clone().into())).collect();
    app.out.fact(&facts, || {
        let line = |(name, url): &(String, String)| format!("export {name}={}", quoted(url));
        addresses.iter().map(line).collect::<Vec<_>>().join("\n")
    })
}

/// One word for a shell, whatever it holds.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn logs(app: &App, cluster: &Cluster, server: Option<&str>, lines: usize) -> Result<()> {
    let servers: Vec<ServerId> = match server {
        Some(name) => vec![name.parse()?],
        None => cluster.status().iter().map(|server| server.server).collect(),
    };
    let mut text = String::new();
    let mut facts = serde_json::Map::new();
    for server in servers {
        let log = cluster.logs(server)?;
        let tail = last_lines(&log, lines)?;
        let _ = writeln!(text, "{}", app.out.bold(&format!("{server}: {}", log.display())));
        for line in &tail {
            let _ = writeln!(text, "{}", crate::readable::line(line));
        }
        facts.insert(server.to_string(), tail.into());
    }
    app.out.fact(&facts, || text.trim_end().to_owned())
}

/// The last lines of a file, of its last megabyte at most. A server that never started has none.
fn last_lines(path: &Path, lines: usize) -> Result<Vec<String>> {
    let failed = |e: std::io::Error| CliError::file("read", path, &e);
    let mut file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened.map_err(failed)?,
    };
    let length = file.metadata().map_err(failed)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(1_048_576))).map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        assert_eq!(quoted("postgresql://a:b@c/d"), "'postgresql://a:b@c/d'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn the_end_of_a_file_is_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        assert!(last_lines(&path, 3).unwrap().is_empty());
        std::fs::write(&path, "a\nb\nc\nd\n").unwrap();
        assert_eq!(last_lines(&path, 3).unwrap(), ["b", "c", "d"]);
        assert_eq!(last_lines(&path, 9).unwrap().len(), 4);
    }
}
