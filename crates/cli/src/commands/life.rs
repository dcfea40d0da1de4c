//! `therev life`: which server of a database counts.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::input::confirmed;
use clap::Subcommand;
use therev::{Database, ShardNo};

/// Say which server counts, where two were promoted apart
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev life grant 2
  therev life grant directory --yes")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Let the server count that is at a database's address now, in the place of one that is lost for good
    ///
    /// A standby that is promoted counts by itself. One that was promoted beside another one is refused, and so is an old primary:
    /// to be used when the one that counts will never come back. What only that one had is lost, also that it had placed users apart;
    /// what other databases hold of its rows is put right by the repair that follows. An interrupted run is gone on with by the same command.
    Grant {
        /// The number of a shard, or `directory`
        #[arg(value_name = "SHARD|directory", value_parser = database)]
        database: Database,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

fn database(text: &str) -> std::result::Result<Database, String> {
    let shard = || text.parse().ok().filter(|number| *number >= 0).map(|number| Database::Shard(ShardNo(number)));
    let named = if text == "directory" { Some(Database::Directory) } else { shard() };
    named.ok_or_else(|| "it is neither a shard's number nor `directory`".to_owned())
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let Command::Grant { database, yes } = args.command;
    let what = format!("what {database} has lost with the server that counted until now");
    if !yes {
        confirmed(&format!("This gives up, for good, {what}"), "no life was granted")?;
    }
    let therev = app.open().await?;
    let granted = therev.shards().grant_life(database).await.map_err(CliError::from);
    let granted = granted.map(|life| {
        serde_json::json!({
            "database": database.to_string(), "incarnation": life.incarnation, "incarnation_counter": life.counter,
        })
    });
    let granted = app.noted(&therev, "life grant", &database.to_string(), granted, Clone::clone).await?;
    app.out
        .fact(&granted, || format!("The server at the address of {database} counts now.\nNext: therev check --repair"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_are_named_by_number_or_word() {
        assert_eq!(database("2"), Ok(Database::Shard(ShardNo(2))));
        assert_eq!(database("directory"), Ok(Database::Directory));
        for text in ["", "-1", "control", "99999", "shard 2"] {
            assert!(database(text).is_err(), "{text}");
        }
    }
}
