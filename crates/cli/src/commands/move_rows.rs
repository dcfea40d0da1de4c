//! `therev move`: rows to another shard.

use crate::app::App;
use crate::commands::rebalance::Pace;
use crate::commands::relocation::{Shown, driven, in_the_way, reached};
use crate::error::{CliError, Result};
use crate::output::{Output, talk};
use crate::tables::{bytes, count, table};
use clap::{Subcommand, ValueEnum};
use std::collections::BTreeMap;
use therev::relocation::{Goal, Mover, Plan, Relocation, Request};
use therev::{Bucket, Group, Layout, ShardNo, Therev};

/// Move rows to another shard, while everybody goes on reading and writing
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Buckets(Buckets),
    User(Person),
}

/// Move buckets, with all rows of all their owners
///
/// Copies, catches up, compares both sides row by row, switches in some milliseconds, then removes what is left. One
/// relocation for each shard that the buckets are on now, one after the other. A command that is interrupted leaves its
/// relocation where it is: `therev relocation resume` carries it on, `abort` undoes it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev move buckets 10-25,77 --to 2 --plan
  therev move buckets 10-25,77 --to 2
  therev move buckets 7 --group content --to 3 --hold")]
struct Buckets {
    /// Numbers from 0 to 4095, and ranges of them
    #[arg(value_name = "BUCKETS", value_parser = buckets)]
    numbers: BucketList,
    /// The shard that gets them
    #[arg(long, value_name = "SHARD")]
    to: u16,
    /// Which colocation groups; in the colocated layout they move together
    #[arg(long, value_enum, default_value_t = GroupName::Both)]
    group: GroupName,
    #[command(flatten)]
    how: How,
}

/// Place a user apart from the bucket, with everything that is the user's
///
/// For somebody who is too much for a shard: the user's rows go to the other shard and stay there wherever the bucket goes, until
/// `therev user unpin` brings them back to it. Like any relocation it copies, compares, switches and removes what is left.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev move user @ada --to 3 --plan
  therev move user @ada --to 3")]
struct Person {
    /// Who
    #[arg(value_name = "ID|@NAME")]
    who: String,
    /// The shard that gets the user
    #[arg(long, value_name = "SHARD")]
    to: u16,
    #[command(flatten)]
    how: How,
}

/// How to go about a move.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// Only say what would move, how long it takes, and what stands in the way
    #[arg(long)]
    plan: bool,
    /// Stop after the switch, where `therev relocation reverse` goes back without loss
    #[arg(long)]
    hold: bool,
    #[command(flatten)]
    pub(crate) pace: Pace,
}

impl How {
    pub(crate) fn is_plan(&self) -> bool {
        self.plan
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum GroupName {
    Account,
    Content,
    Both,
}

impl GroupName {
    fn groups(self) -> Vec<Group> {
        match self {
            GroupName::Account => vec![Group::Account],
            GroupName::Content => vec![Group::Content],
            GroupName::Both => Group::ALL.to_vec(),
        }
    }
}

#[derive(Debug, Clone)]
struct BucketList(Vec<Bucket>);

/// `10-25,77`.
fn buckets(text: &str) -> std::result::Result<BucketList, String> {
    let one = |text: &str| {
        let number = text.trim().parse::<u16>().ok().and_then(|number| Bucket::try_from(number).ok());
        number.ok_or_else(|| format!("`{text}` is no bucket: they go from 0 to 4095"))
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (one(first)?, one(last)?);
        if first > last {
            return Err(format!("`{part}` goes backwards"));
        }
        all.extend(Bucket::all().filter(|bucket| (first..=last).contains(bucket)));
    }
    all.sort_unstable();
    all.dedup();
    Ok(BucketList(all))
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    match args.command {
        Command::Buckets(args) => move_buckets(app, args).await,
        Command::User(args) => move_user(app, args).await,
    }
}

fn shard(number: u16) -> ShardNo {
    ShardNo(i16::try_from(number).unwrap_or(i16::MAX))
}

async fn move_user(app: &App, args: Person) -> Result<()> {
    let therev = app.open_relaying().await?;
    let user = crate::input::user(&therev, &args.who).await?;
    // Nobody is placed apart who does not exist.
    therev.user(user).await?;
    let mover = args.how.pace.mover(&therev);
    let requests = mover.pin_requests(user, shard(args.to)).await?;
    carry_out(app, &therev, &mover, &requests, &args.how).await
}

async fn move_buckets(app: &App, args: Buckets) -> Result<()> {
    let therev = app.open_relaying().await?;
    let mover = args.how.pace.mover(&therev);
    let open = mover.list(true).await?;
    let requests = requests(&therev, &args.numbers.0, &args.group.groups(), shard(args.to), &open)?;
    carry_out(app, &therev, &mover, &requests, &args.how).await
}

/// Plans, and unless that is all, moves one after the other. What a process that died has left of the same goes on.
pub(crate) async fn carry_out(
    app: &App,
    therev: &Therev,
    mover: &Mover,
    requests: &[Request],
    how: &How,
) -> Result<()> {
    let (mut left, mut plans) = (Vec::new(), Vec::new());
    for request in requests {
        let found = if how.plan { None } else { mover.left_of(request).await? };
        match found {
            Some(one) => left.push(one),
            None => plans.push(mover.plan(request).await?),
        }
    }
    if how.plan {
        return app.out.fact(&plans, || planned(&plans, &app.out));
    }
    if let Some(refusal) = plans.iter().find_map(Plan::refusal) {
        return Err(refusal.into());
    }
    let goal = if how.hold { Goal::Switched } else { Goal::Done };
    let mut ended: Vec<Relocation> = Vec::new();
    for one in &left {
        ended.push(gone_on(app, therev, mover, one, goal).await?);
    }
    for plan in &plans {
        let begun = mover.begin(plan, goal, &app.operator().to_string()).await?;
        let to = format!("relocation {} of {}", begun.relocation, what_moves(plan));
        app.note(therev, "move", &to, serde_json::json!({ "from": plan.source, "to": plan.target })).await;
        talk(&format!(
            "Relocation {} began: {} from shard {} to {}.",
            begun.relocation,
            what_moves(plan),
            plan.source,
            plan.target
        ));
        ended.push(reached(driven(mover, begun.relocation, &mut Shown::new()).await?, goal)?);
    }
    app.out.fact(&ended, || crate::commands::relocation::said_all(&ended, &app.out))
}

/// Carries on what was begun for the same and nobody works at.
async fn gone_on(app: &App, therev: &Therev, mover: &Mover, left: &Relocation, goal: Goal) -> Result<Relocation> {
    let (number, state) = (left.relocation, left.state.name());
    if left.goal != goal {
        mover.want(number, goal).await?;
    }
    let target = format!("relocation {number}");
    app.note(therev, "resume", &target, serde_json::json!({ "state": state })).await;
    talk(&format!("Relocation {number} of the same is {state}, and nobody works at it: it goes on."));
    reached(driven(mover, number, &mut Shown::new()).await?, goal)
}

/// One request for each shard that the buckets are on now; of those that an open relocation has brought to the target already,
/// the request that it was begun for. Others that are there already need nothing, unless all of them are.
fn requests(
    therev: &Therev,
    buckets: &[Bucket],
    groups: &[Group],
    target: ShardNo,
    open: &[Relocation],
) -> Result<Vec<Request>> {
    let map = therev.shards().map();
    let colocated = therev.shards().catalog().layout == Layout::Colocated;
    // In the colocated layout the groups of a bucket are one; in the split one each has a source of its own.
    let together: Vec<Vec<Group>> =
        if colocated { vec![groups.to_vec()] } else { groups.iter().map(|group| vec![*group]).collect() };
    let mut all = Vec::new();
    let mut there = Vec::new();
    for groups in together {
        let mut by_source: BTreeMap<ShardNo, Vec<Bucket>> = BTreeMap::new();
        for bucket in buckets {
            by_source.entry(map.place(groups[0], *bucket).shard).or_default().push(*bucket);
        }
        let mut brought = by_source.remove(&target).unwrap_or_default();
        for one in open.iter().filter(|one| one.target == target && one.pin.is_none() && one.groups == groups) {
            if one.buckets.iter().all(|bucket| brought.contains(bucket)) {
                brought.retain(|bucket| !one.buckets.contains(bucket));
                let (groups, buckets) = (groups.clone(), one.buckets.clone());
                all.push(Request { groups, buckets, pin: None, source: one.source, target });
            }
        }
        there.extend(brought);
        let request = |(source, buckets)| Request { groups: groups.clone(), buckets, pin: None, source, target };
        all.extend(by_source.into_iter().map(request));
    }
    if !there.is_empty() {
        let some: Vec<String> = there.iter().take(8).map(|bucket| bucket.number().to_string()).collect();
        let more = if there.len() > some.len() { " and more" } else { "" };
        let those = format!("{}{more}", some.join(", "));
        if all.is_empty() {
            let said = format!("shard {target} has buckets {those} already");
            return Err(CliError::invalid(said, "name buckets of other shards, or another shard"));
        }
        talk(&format!("Buckets {those} are on shard {target} already: only the others move."));
    }
    Ok(all)
}

/// `user 01a2…`, or how many buckets.
fn what_moves(plan: &Plan) -> String {
    plan.pin.map_or_else(|| count_buckets(plan.buckets.len()), |user| format!("user {user}"))
}

pub(crate) fn count_buckets(number: usize) -> String {
    count(i64::try_from(number).unwrap_or(i64::MAX), "bucket")
}

pub(crate) fn planned(plans: &[Plan], out: &Output) -> String {
    let rows = plans.iter().map(|plan| {
        vec![
            plan.source.to_string(),
            plan.target.to_string(),
            if plan.pin.is_some() { "1 user".to_owned() } else { plan.buckets.len().to_string() },
            plan.rows.to_string(),
            bytes(Some(plan.bytes)),
            format!("{:.0} s", plan.seconds.max(1.0)),
            bytes(Some(plan.log_bytes_per_minute)),
            bytes(Some(plan.log_bytes_held)),
        ]
    });
    let header = ["from", "to", "buckets", "rows", "bytes", "about", "log/min", "log held"];
    let mut lines = vec![table(out.width, &header, &header, rows)];
    for plan in plans {
        for obstacle in &plan.obstacles {
            lines.extend([String::new(), in_the_way(obstacle, out)]);
        }
    }
    if plans.iter().all(|plan| plan.obstacles.is_empty()) {
        lines.extend([String::new(), "Nothing stands in the way.".to_owned()]);
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_read_as_they_are_typed() {
        let numbers = |text| buckets(text).map(|list| list.0.iter().map(|b| b.number()).collect::<Vec<_>>());
        assert_eq!(numbers("10-12,77, 11"), Ok(vec![10, 11, 12, 77]));
        for wrong in ["", "4096", "3-2", "1-", "a", "1,,2", "-1"] {
            assert!(numbers(wrong).is_err(), "{wrong}");
        }
    }
}
