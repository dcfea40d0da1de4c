//! `therev hot`: who causes the load.

use crate::app::App;
use crate::error::Result;
use crate::output::Output;
use crate::tables::table;
use serde::Serialize;
use therev::planner::{self, Isolation};
use therev::relocation::{Mover, Options};
use therev::{Group, ShardNo, UserId};

/// Show the users whose rows are asked for most, on all nodes, in the last minute
///
/// Each node counts one operation in eight, for eight, of those that name their user; it tells the busiest two hundred every five
/// seconds. Says too who is more than a shard should have and better placed apart (unless `hot_users` is `off`).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev hot
  therev hot --top 5 --json")]
pub(crate) struct Args {
    /// How many
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    top: u16,
}

#[derive(Serialize)]
struct Hot {
    nodes: usize,
    operations_per_s: f64,
    users: Vec<HotUser>,
    /// Who should be placed apart from the bucket, and where; empty where `hot_users` is `off`.
    isolate: Vec<Isolation>,
}

#[derive(Serialize)]
struct HotUser {
    user_id: UserId,
    user_name: Option<String>,
    bucket: u16,
    /// Of the account's rows; the content's may be elsewhere in the split layout.
    shard: ShardNo,
    operations_per_s: f64,
    /// Of all operations.
    share: f64,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let therev = app.open().await?;
    let told = therev.shards().hot_users(usize::from(args.top)).await.map_err(therev::Error::from)?;
    let ids: Vec<UserId> = told.users.iter().map(|user| UserId(user.user_id)).collect();
    let map = therev.shards().map();
    let shard_of = |id: UserId| map.place_of(Group::Account, id.into()).shard;
    // Without those of a shard that is down: names are a courtesy.
    let known = therev.list_users(&ids).await?.users;
    let users = told.users.iter().map(|user| {
        let id = UserId(user.user_id);
        HotUser {
            user_id: id,
            user_name: known.iter().find(|known| known.user_id == id).map(|known| known.user_name.clone()),
            bucket: id.bucket().number(),
            shard: shard_of(id),
            operations_per_s: user.operations_per_s,
            share: user.operations_per_s / told.operations_per_s.max(f64::MIN_POSITIVE),
        }
    });
    let isolate = if therev.shards().config().hot_users == planner::HotUsers::Off {
        Vec::new()
    } else {
        Mover::new(therev.shards().clone(), Options::default()).plan_isolation().await?
    };
    let hot = Hot { nodes: told.nodes, operations_per_s: told.operations_per_s, users: users.collect(), isolate };
    app.out.fact(&hot, || said(&hot, &app.out))
}

fn said(hot: &Hot, out: &Output) -> String {
    if hot.users.is_empty() {
        return "No node has told of any load lately.".to_owned();
    }
    let rows = hot.users.iter().map(|user| {
        vec![
            user.user_id.to_string(),
            user.user_name.clone().unwrap_or_else(|| "-".to_owned()),
            user.bucket.to_string(),
            user.shard.to_string(),
            format!("{:.1}", user.operations_per_s),
            format!("{:.1} %", user.share * 100.0),
        ]
    });
    let header = ["id", "name", "bucket", "shard", "operations/s", "share"];
    let table = table(out.width, &header, &["bucket", "shard", "operations/s", "share"], rows);
    let mut lines =
        vec![table, String::new(), format!("{:.1} operations/s on {} nodes.", hot.operations_per_s, hot.nodes)];
    for Isolation { user, from, to, .. } in &hot.isolate {
        let advice = format!("Too much for shard {from}: `therev move user {user} --to {to}` places this user apart.");
        lines.push(out.fitted(&advice));
    }
    lines.join("\n")
}
