//! `therev rebalance`: every shard holds its weight's share again.

use crate::app::App;
use crate::commands::move_rows::{count_buckets, planned};
use crate::commands::relocation::Shown;
use crate::error::{CliError, Result};
use crate::output::{Output, talk};
use crate::tables::{bytes, count, table};
use clap::ValueEnum;
use serde::Serialize;
use std::sync::Mutex;
use std::time::Duration;
use therev::planner::{By, Reached, ShardShare, Why};
use therev::relocation::{Aim, Mover, Options, Part, Plan, Rebalance, Relocation, State, Step};
use therev::{ShardNo, Therev};

/// Move buckets until every shard holds its weight's share, within 10 %
///
/// Relocations run one after the other, so that one goes in and one comes out of a shard at a time; everybody goes on
/// reading and writing. What an interrupted run left under way is carried through first, then it is planned anew. In the
/// split layout accounts stay where they are, and content is spread over the shards without accounts.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev rebalance --plan
  therev rebalance
  therev rebalance --by load --max-moves 100")]
pub(crate) struct Args {
    /// What is balanced: bytes, or rows written in the last day (reads are not counted)
    #[arg(long, value_enum, default_value_t = Measure::Size)]
    by: Measure,
    /// How many buckets may move at the most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    max_moves: Option<u16>,
    /// Only say what would move, how long it takes, and what stands in the way
    #[arg(long)]
    plan: bool,
    #[command(flatten)]
    pace: Pace,
}

/// How relocations go.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Pace {
    /// How long a try of a switch may have writes wait, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    budget_ms: u64,
}

impl Pace {
    pub(crate) fn mover(self, therev: &Therev) -> Mover {
        Mover::new(
            therev.shards().clone(),
            Options { budget: Duration::from_millis(self.budget_ms), ..Options::default() },
        )
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Measure {
    Size,
    Load,
}

/// What a rebalancing did.
#[derive(Serialize)]
struct Done<'a> {
    relocations: &'a [Relocation],
    parts: &'a [Part],
}

/// What one would do.
#[derive(Serialize)]
struct Planned<'a> {
    relocations: &'a [Plan],
    parts: &'a [Part],
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let by = match args.by {
        Measure::Size => By::Size,
        Measure::Load => By::Load,
    };
    let therev = app.open_relaying().await?;
    let aim = Aim::Balance { by, moves_max: args.max_moves.map(usize::from) };
    if args.plan {
        return show_plan(app, &args.pace.mover(&therev), aim).await;
    }
    let mover = args.pace.mover(&therev);
    let ended = moved(app, &therev, &mover, aim, ("rebalance", "cluster")).await?;
    let now = mover.plan_rebalance(aim).await?;
    app.out.fact(&Done { relocations: &ended, parts: &now.parts }, || {
        let done = moving(&ended);
        let first = if done.is_empty() {
            "Nothing had to move.".to_owned()
        } else {
            let moved = done.iter().map(|one| one.buckets.len()).sum();
            format!("Moved {} in {}.", count_buckets(moved), relocations(done.len()))
        };
        let mut lines = vec![first];
        for part in &now.parts {
            lines.extend([String::new(), shares(part, &app.out), String::new()]);
            lines.push(match part.plan.moves.len() {
                0 => app.out.word(&reached(part), is_well(part)),
                left => app.out.word(&format!("{} would have to move yet; run it again.", count_buckets(left)), false),
            });
        }
        lines.join("\n")
    })
}

/// Says what an aim would move.
async fn show_plan(app: &App, mover: &Mover, aim: Aim) -> Result<()> {
    let open = mover.list(true).await?;
    let rebalance = mover.plan_rebalance(aim).await?;
    let plans = mover.plan_each(&rebalance).await?;
    app.out.fact(&Planned { relocations: &plans, parts: &rebalance.parts }, || {
        let mut lines = Vec::new();
        for one in &open {
            let number = one.relocation;
            let next = if one.rests() {
                "nothing is moved until it has ended: resume, finish or abort it"
            } else {
                "it is carried through first"
            };
            lines.push(format!(
                "Relocation {number} is {}; {next}.",
                if one.is_paused { "paused" } else { one.state.name() }
            ));
        }
        lines.push(said(aim, &rebalance, &plans, &app.out));
        lines.join("\n")
    })
}

/// Brings an aim about, and shows how far it is.
async fn moved(
    app: &App,
    therev: &Therev,
    mover: &Mover,
    aim: Aim,
    (action, target): (&str, &str),
) -> Result<Vec<Relocation>> {
    let shown = Mutex::new((0, Shown::new()));
    let seen = |step: &Step<'_>| {
        let mut shown = shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let one = step.relocation;
        if shown.0 != one.relocation {
            shown.1.end();
            let (buckets, number) = (count_buckets(one.buckets.len()), one.relocation);
            let at = format!("{} of {}", step.at, step.of);
            talk(&format!("{at}: relocation {number}, {buckets} from shard {} to shard {}", one.source, one.target));
            *shown = (number, Shown::new());
        }
        shown.1.show(one);
    };
    let operator = app.operator();
    let outcome = mover.rebalance(aim, &operator.to_string(), &seen).await;
    shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).1.end();
    let outcome = outcome.map_err(|error| CliError::from(error).also("the same command goes on from there"));
    let after = |ended: &Vec<Relocation>| serde_json::json!({ "relocations": ended.len() });
    app.noted(therev, action, target, outcome, after).await
}

/// Empties a shard, or says what that would take: then nothing.
pub(crate) async fn drain(
    app: &App,
    therev: &Therev,
    shard: ShardNo,
    plan: bool,
    pace: Pace,
) -> Result<Option<Vec<Relocation>>> {
    let (mover, aim) = (pace.mover(therev), Aim::Empty(shard));
    if plan {
        return show_plan(app, &mover, aim).await.map(|()| None);
    }
    // Refused before anything is changed: a weight of 0 would stay.
    mover.may_empty(shard).await?;
    therev::set_weight(therev.shards(), shard, 0.0).await?;
    moved(app, therev, &mover, aim, ("shard drain", &format!("shard {shard}"))).await.map(Some)
}

/// Of the relocations that have ended those that moved buckets: others were undone, or moved a user.
pub(crate) fn moving(ended: &[Relocation]) -> Vec<&Relocation> {
    ended.iter().filter(|one| one.state == State::Done && one.pin.is_none()).collect()
}

fn relocations(number: usize) -> String {
    count(i64::try_from(number).unwrap_or(i64::MAX), "relocation")
}

fn said(aim: Aim, rebalance: &Rebalance, plans: &[Plan], out: &Output) -> String {
    let mut lines = Vec::new();
    for part in &rebalance.parts {
        lines.extend([shares(part, out), String::new()]);
        // What is emptied is not balanced.
        if matches!(aim, Aim::Balance { .. }) {
            lines.extend([out.word(&reached(part), is_well(part)), String::new()]);
        }
    }
    if plans.is_empty() {
        lines.push("Nothing has to move.".to_owned());
    } else {
        lines.push(planned(plans, out));
        let (rows, size): (i64, i64) = (plans.iter().map(|p| p.rows).sum(), plans.iter().map(|p| p.bytes).sum());
        let seconds: f64 = plans.iter().map(|plan| plan.seconds.max(1.0)).sum();
        let all =
            format!("In all {}: {rows} rows, {}, about {seconds:.0} s.", relocations(plans.len()), bytes(Some(size)));
        lines.extend([String::new(), all]);
    }
    lines.join("\n")
}

/// What each shard holds, before and after.
fn shares(part: &Part, out: &Output) -> String {
    let percent =
        |share: &ShardShare| share.fill().map_or_else(|| "-".to_owned(), |fill| format!("{:.0} %", fill * 100.0));
    let held = |share: &ShardShare| match part.plan.by {
        By::Size => bytes(i64::try_from(share.held).ok()),
        By::Load => share.held.to_string(),
    };
    let rows = part.plan.before.iter().zip(&part.plan.after).map(|(before, after)| {
        vec![
            before.shard.to_string(),
            format!("{}", f64::from(before.weight) / 1_000.0),
            before.buckets.to_string(),
            held(before),
            percent(before),
            after.buckets.to_string(),
            held(after),
            percent(after),
        ]
    });
    let groups: Vec<&str> = part.groups.iter().map(|group| group.name()).collect();
    let header = ["shard", "weight", "buckets", "holds", "of share", "buckets then", "holds then", "of share then"];
    format!("{}, by {}\n{}", groups.join(" and "), part.plan.by, table(out.width, &header, &header, rows))
}

fn is_well(part: &Part) -> bool {
    part.plan.reached == Reached::Within
}

fn reached(part: &Part) -> String {
    match &part.plan.reached {
        Reached::Within => "Every shard is within 10 % of its share then.".to_owned(),
        Reached::MaxMoves => "There is more to move than may move at once; run it again to go on.".to_owned(),
        Reached::AsNearAsPossible(out) => {
            let one = |it: &therev::planner::OutOfBand| match it.why {
                Why::Pins => format!("shard {} (its pinned users are too much)", it.shard),
                Why::Bucket(bucket) => format!("shard {} (bucket {} is too much)", it.shard, bucket.number()),
                Why::Stays => format!("shard {} (what is not drained stays where it is)", it.shard),
                Why::WholeBuckets => format!("shard {} (whole buckets do not come out even)", it.shard),
            };
            let all: Vec<String> = out.iter().map(one).collect();
            format!("As near as whole buckets come; not within 10 %: {}.", all.join(", "))
        }
    }
}
