//! `therev shard`: shards that come and go.

mod here;

use crate::app::App;
use crate::commands::rebalance::{self, Pace};
use crate::error::{CliError, Result};
use crate::output::talk;
use crate::passfile::Passwords;
use crate::tables::{bytes, count, number, table};
use clap::Subcommand;
use std::time::Duration;
use therev::{AddPlan, Added, RolePasswords, SecretString, ShardListing, ShardNo, Therev};

/// Add shards to a cluster that runs, empty and remove them
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev shard add --url postgresql://postgres@c/shard_4 && therev rebalance
  therev shard add --local --plan
  therev shard drain 4 && therev shard remove 4")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the shards: where they are, what they own, how much they should
    List,
    Add(Add),
    /// Have a shard give all its buckets to the others
    ///
    /// Its weight becomes 0, so that nothing is moved to it any more; `therev shard weight` takes that back. An interrupted
    /// run is gone on with by the same command.
    Drain {
        /// Which shard
        #[arg(value_name = "SHARD", value_parser = shard)]
        shard: ShardNo,
        /// Only say what would move, how long it takes, and what stands in the way
        #[arg(long)]
        plan: bool,
        #[command(flatten)]
        pace: Pace,
    },
    /// Take a shard that owns nothing out of the cluster
    ///
    /// Its database stays as it is; of a local cluster the server is stopped and removed, too.
    Remove {
        /// Which shard
        #[arg(value_name = "SHARD", value_parser = shard)]
        shard: ShardNo,
        /// Only say what would be removed, and what stands in the way
        #[arg(long)]
        plan: bool,
    },
    /// Say how much a shard should hold beside the others; `therev rebalance` brings it about
    Weight {
        /// Which shard
        #[arg(value_name = "SHARD", value_parser = shard)]
        shard: ShardNo,
        /// 1 is what every shard has at first; 0: nothing
        #[arg(value_name = "WEIGHT", value_parser = weight)]
        weight: f32,
    },
}

/// Make an empty database one more shard
///
/// Roles, schema and identity are made, and it learns who owns what; only then does the cluster hear of it. It holds nothing
/// until `therev rebalance`. What an interrupted run left is finished by the same command. The passwords of therev's roles are
/// taken from the passfile.
#[derive(Debug, clap::Args)]
struct Add {
    /// The empty database, with a role that may create roles
    #[arg(long, value_name = "URL", required_unless_present = "local", conflicts_with = "local")]
    url: Option<String>,
    /// A new server of the local cluster
    #[arg(long)]
    local: bool,
    /// How much it should hold beside the others
    #[arg(long, default_value_t = 1.0, value_parser = first_weight)]
    weight: f32,
    /// Only say which number it would get, and what stands in the way
    #[arg(long)]
    plan: bool,
}

fn shard(text: &str) -> std::result::Result<ShardNo, String> {
    let number = text.parse::<i16>().ok().filter(|number| *number >= 0);
    number.map(ShardNo).ok_or_else(|| format!("`{text}` is no shard's number"))
}

fn weight(text: &str) -> std::result::Result<f32, String> {
    let weight = text.parse::<f32>().ok().filter(|weight| *weight == 0.0 || WEIGHTS.contains(weight));
    weight.ok_or_else(|| format!("`{text}` is no weight: it is 0, or goes from 0.001 to 1000"))
}

/// A shard that comes is to hold something.
fn first_weight(text: &str) -> std::result::Result<f32, String> {
    let weight = text.parse::<f32>().ok().filter(|weight| WEIGHTS.contains(weight));
    weight.ok_or_else(|| format!("`{text}` is no weight for a new shard: it goes from 0.001 to 1000"))
}

/// What the cluster takes for a shard that is to hold something.
const WEIGHTS: std::ops::RangeInclusive<f32> = 0.001..=1_000.0;

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    match args.command {
        Command::List => {
            let found = app.open().await?.shards().listing().await?;
            app.out.fact(&found, || listed(app, &found))
        }
        Command::Add(args) => add(app, args).await,
        Command::Drain { shard, plan, pace } => drain(app, shard, plan, pace).await,
        Command::Remove { shard, plan: true } => look_at_leaving(app, shard).await,
        Command::Remove { shard, plan: false } => remove(app, shard).await,
        Command::Weight { shard, weight } => {
            let therev = app.open().await?;
            therev::set_weight(therev.shards(), shard, weight).await?;
            note(app, &therev, "shard weight", shard, serde_json::json!({ "weight": weight })).await;
            app.out.fact(&serde_json::json!({ "shard": shard, "weight": weight }), || {
                format!("Shard {shard} has weight {weight} now.\nNext: therev rebalance --plan")
            })
        }
    }
}

async fn note(app: &App, therev: &Therev, action: &str, shard: ShardNo, after: serde_json::Value) {
    app.note(therev, action, &format!("shard {shard}"), after).await;
}

/// The passwords that the other servers' roles have.
fn passwords(app: &App) -> Result<RolePasswords> {
    use therev::ExposeSecret;
    let config = app.found()?.config;
    if let Some(one) = config.password.as_ref().map(SecretString::expose_secret) {
        return Ok(RolePasswords { library: one.into(), admin: one.into(), mover: one.into() });
    }
    let lacking = || {
        CliError::new(
            "config",
            "the passwords of therev's roles are not known here: a new server's roles get those that the others have",
            "name the passfile that `therev init` wrote, in therev.toml or by THEREV_PASSFILE (docs/config.md)",
        )
    };
    let passwords = Passwords::read_or_make(&config.passfile.ok_or_else(lacking)?)?;
    if passwords.made().next().is_some() {
        return Err(lacking());
    }
    Ok(RolePasswords { library: passwords.library, admin: passwords.admin, mover: passwords.mover })
}

async fn add(app: &App, args: Add) -> Result<()> {
    let therev = app.open().await?;
    let passwords = passwords(app)?;
    let address = match args.url {
        Some(url) => url,
        None if args.plan => {
            let found = here::look(app, &therev)?;
            return app
                .out
                .fact(&found, || format!("It would be a new server of {}, shard {}.", found.dir, found.shard));
        }
        None => here::add(app, &therev)?,
    };
    let plan = AddPlan { address, weight: args.weight, passwords };
    if args.plan {
        let found = therev::look_at_shard(therev.shards(), &plan).await?;
        return app.out.fact(&found, || {
            format!(
                "{} would be shard {}, with weight {}.\nNothing stands in the way.",
                found.at, found.shard, found.weight
            )
        });
    }
    talk("Setting the shard up: roles, schema, who owns what");
    let added = therev::add_shard(therev.shards(), &plan).await.map_err(|error| {
        CliError::from(error).also("the cluster is as it was, and the same command goes on from there")
    })?;
    note(app, &therev, "shard add", added.shard, serde_json::to_value(&added)?).await;
    app.out.fact(&added, || said(&added))
}

fn said(added: &Added) -> String {
    format!(
        "{} is shard {} now, with weight {}; it holds nothing yet.\nNext: therev rebalance --plan",
        added.at, added.shard, added.weight
    )
}

async fn drain(app: &App, shard: ShardNo, plan: bool, pace: Pace) -> Result<()> {
    let therev = app.open_relaying().await?;
    let Some(ended) = rebalance::drain(app, &therev, shard, plan, pace).await? else { return Ok(()) };
    app.out.fact(&serde_json::json!({ "shard": shard, "relocations": ended }), || {
        let moved: usize = rebalance::moving(&ended).iter().map(|one| one.buckets.len()).sum();
        let moved = count(i64::try_from(moved).unwrap_or(i64::MAX), "bucket");
        format!("Shard {shard} owns nothing any more; {moved} moved.\nNext: therev shard remove {shard}")
    })
}

async fn look_at_leaving(app: &App, shard: ShardNo) -> Result<()> {
    let therev = app.open().await?;
    let is_server_removed = here::server_of(app, &therev, shard)?.is_some();
    // Of an interrupted run only the server may be left.
    if therev.shards().numbers().contains(&shard) || !is_server_removed {
        therev::look_at_leaving(therev.shards(), shard).await?;
    }
    app.out.fact(&serde_json::json!({ "shard": shard, "server_removed": is_server_removed }), || {
        let database =
            if is_server_removed { "its server would be removed" } else { "its database would stay as it is" };
        format!("Shard {shard} would leave this cluster; {database}.\nNothing stands in the way.")
    })
}

async fn remove(app: &App, shard: ShardNo) -> Result<()> {
    let therev = app.open_relaying().await?;
    let mut server = here::server_of(app, &therev, shard)?;
    let is_member = therev.shards().numbers().contains(&shard);
    // An interrupted run may have got as far as the server; when rows left it nobody knows any more.
    let empty_for = if let (false, Some(server)) = (is_member, &mut server) {
        server.is_left_over(&therev).await?;
        Some(Duration::ZERO)
    } else {
        // What it has to tell others is told before it goes.
        app.settle(&therev).await;
        let removed = therev::remove_shard(therev.shards(), shard).await?;
        note(app, &therev, "shard remove", shard, serde_json::json!({})).await;
        removed.empty_for
    };
    let is_server_removed = server.is_some();
    if let Some(server) = server {
        server.remove(app, &therev, empty_for).await?;
    }
    app.out.fact(&serde_json::json!({ "shard": shard, "server_removed": is_server_removed }), || {
        let database = if is_server_removed { "its server is removed" } else { "its database stays as it is" };
        format!("Shard {shard} is no longer of this cluster; {database}.")
    })
}

fn listed(app: &App, found: &[ShardListing]) -> String {
    let rows = found.iter().map(|one| {
        let state = match (&one.reason, one.weight == 0.0) {
            (Some(reason), _) => reason.clone(),
            (None, true) => "draining".to_owned(),
            (None, false) => "-".to_owned(),
        };
        vec![
            one.shard.to_string(),
            one.weight.to_string(),
            one.at.to_string(),
            number(one.account_buckets),
            number(one.content_buckets),
            bytes(one.bytes),
            state,
        ]
    });
    let header = ["shard", "weight", "address", "account", "content", "bytes", "state"];
    table(app.out.width, &header, &["shard", "weight", "account", "content", "bytes"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_weights_are_read_as_they_are_typed() {
        assert_eq!(shard("4"), Ok(ShardNo(4)));
        assert_eq!(weight("0.5"), Ok(0.5));
        for wrong in ["-1", "x", "99999", ""] {
            assert!(shard(wrong).is_err(), "{wrong}");
        }
        assert_eq!((weight("0"), weight("0.001"), first_weight("0.001")), (Ok(0.0), Ok(0.001), Ok(0.001)));
        for wrong in ["-1", "nan", "inf", "1001", "x", "0.0005"] {
            assert!(weight(wrong).is_err() && first_weight(wrong).is_err(), "{wrong}");
        }
        assert!(first_weight("0").is_err());
    }
}
