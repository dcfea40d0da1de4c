//! `therev relocation`: what is being moved, and what is wanted of it.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::progress;
use crate::tables::{bytes, minute, number, table};
use clap::Subcommand;
use std::sync::Mutex;
use std::time::Instant;
use therev::relocation::{Ending, Goal, Mover, Obstacle, Options, Relocation, State};

/// Show relocations, and pause, resume, abort, reverse or finish one
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev relocation list
  therev relocation show 3
  therev relocation abort 3")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Command {
    /// List relocations, the newest first
    List {
        /// Those that have ended, too
        #[arg(long)]
        all: bool,
    },
    /// Show one
    Show(Which),
    /// Have one rest where it is
    Pause(Which),
    /// Carry one on to its goal, here and now
    Resume(Which),
    /// Undo one that has not switched: rows that were copied go, nothing else changes
    Abort(End),
    /// Go back after the switch: the buckets return to where they came from, with all that was written since
    Reverse(End),
    /// Give up the way back of one that is switched: what is left at the source goes
    Finish(End),
    /// Compare both sides of one between its copy and its switch; exit 1 if rows differ
    Verify {
        #[command(flatten)]
        which: Which,
        /// Copy anew what differs
        #[arg(long)]
        repair: bool,
    },
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Which {
    /// Its number
    #[arg(value_name = "N")]
    relocation: i64,
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct End {
    #[command(flatten)]
    which: Which,
    /// Only say which rows would go, how long it takes, and what stands in the way
    #[arg(long)]
    plan: bool,
}

impl Command {
    /// The end that it only asks about.
    fn planned(self) -> Option<(i64, Goal)> {
        let (end, goal) = match self {
            Command::Abort(end) => (end, Goal::Aborted),
            Command::Reverse(end) => (end, Goal::Reversed),
            Command::Finish(end) => (end, Goal::Done),
            _ => return None,
        };
        end.plan.then_some((end.which.relocation, goal))
    }
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let therev = app.open_relaying().await?;
    let mover = Mover::new(therev.shards().clone(), Options::default());
    if let Some((number, goal)) = args.command.planned() {
        let found = mover.plan_ending(number, goal).await?;
        return app.out.fact(&found, || said_of(&found, &app.out));
    }
    let (what, which) = match args.command {
        Command::List { all } => {
            mover.find_lost().await?;
            let found = mover.list(!all).await?;
            return app.out.fact(&found, || listed(&found, &app.out));
        }
        Command::Show(which) => {
            let found = mover.show(which.relocation).await?;
            return app.out.fact(&found, || said(&found, &app.out));
        }
        Command::Verify { which, repair } => {
            let outcome = mover.verify(which.relocation, repair).await.map_err(CliError::from);
            let compared = if repair {
                let target = format!("relocation {}", which.relocation);
                let after = |rows: &i64| serde_json::json!({ "rows": rows });
                app.noted(&therev, "repair", &target, outcome, after).await?
            } else {
                outcome?
            };
            return app.out.fact(&serde_json::json!({ "rows": compared }), || {
                format!("Both sides hold the same {compared} rows.")
            });
        }
        Command::Pause(which) => ("pause", which),
        Command::Resume(which) => ("resume", which),
        Command::Abort(end) => ("abort", end.which),
        Command::Reverse(end) => ("reverse", end.which),
        Command::Finish(end) => ("finish", end.which),
    };
    let wanted = match args.command {
        Command::Pause(_) => mover.pause(which.relocation, true).await?,
        Command::Abort(_) => mover.want(which.relocation, Goal::Aborted).await?,
        Command::Reverse(_) => mover.want(which.relocation, Goal::Reversed).await?,
        Command::Finish(_) => mover.finish(which.relocation).await?,
        _ => mover.pause(which.relocation, false).await?,
    };
    let target = format!("relocation {}", which.relocation);
    app.note(&therev, what, &target, serde_json::json!({ "state": wanted.state.name() })).await;
    let goal = wanted.goal;
    let ended = if wanted.is_paused {
        wanted
    } else {
        reached(driven(&mover, which.relocation, &mut Shown::new()).await?, goal)?
    };
    app.out.fact(&ended, || said(&ended, &app.out))
}

/// A relocation that rests where a command wanted it. Meanwhile somebody else may have wanted something else of it: then that is
/// where it rests, and the command has not done what it was for.
pub(crate) fn reached(ended: Relocation, goal: Goal) -> Result<Relocation> {
    missed(ended.relocation, ended.state, ended.is_paused, goal).map_or(Ok(ended), Err)
}

/// Why a relocation that rests has not reached a goal, and what to do; nothing where it has.
fn missed(number: i64, state: State, is_paused: bool, goal: Goal) -> Option<CliError> {
    let is_reached = match goal {
        Goal::Done => state == State::Done,
        Goal::Switched => matches!(state, State::Switched | State::Done),
        Goal::Aborted => state == State::Aborted,
        Goal::Reversed => state == State::Reversed,
    };
    if is_reached {
        return None;
    }
    let (how, next) = if state.is_over() {
        (format!("ended as {}, not as {}", state.name(), goal.name()), "`therev move` moves what is to be moved".into())
    } else if is_paused {
        let next = format!("`therev relocation resume {number}` goes on");
        (format!("was paused meanwhile, it is {}", state.name()), next)
    } else {
        let next =
            format!("`therev relocation finish {number}` ends it, `therev relocation reverse {number}` goes back");
        (format!("rests, it is {}", state.name()), next)
    };
    Some(CliError::new("stopped", format!("relocation {number} {how}"), next))
}

/// Carries a relocation on and shows how far it is. Where another process works at it, looks on.
pub(crate) async fn driven(mover: &Mover, number: i64, shown: &mut Shown) -> Result<Relocation> {
    let shown = Mutex::new(shown);
    let show = |now: &Relocation| shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).show(now);
    let outcome = mover.see_through(number, &show).await;
    shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner).end();
    outcome.map_err(|error| {
        CliError::from(error).also(&format!(
            "the relocation stays where it is: `therev relocation resume {number}` goes on, \
             `therev relocation abort {number}` undoes it"
        ))
    })
}

/// The bar, or the lines.
pub(crate) struct Shown {
    shown: progress::Shown,
    began: Option<(Instant, i64)>,
}

impl Shown {
    pub(crate) fn new() -> Shown {
        let template = "{prefix:11} {bar:30} {human_pos}/{human_len} rows {msg}";
        Shown { shown: progress::Shown::new(template), began: None }
    }

    pub(crate) fn show(&mut self, now: &Relocation) {
        let mut parts = Vec::new();
        if now.state == State::Copying && now.bytes_copied > 0 {
            let (began, at_first) = *self.began.get_or_insert((Instant::now(), now.bytes_copied));
            let seconds = began.elapsed().as_secs().max(1);
            let rate = (now.bytes_copied - at_first) / i64::try_from(seconds).unwrap_or(i64::MAX);
            parts.push(format!("{}/s", bytes(Some(rate))));
            let per_row = now.bytes_copied / now.rows_copied.max(1);
            if rate > 0 {
                parts.push(format!("{} s left", (now.rows_total - now.rows_copied).max(0) * per_row / rate));
            }
        }
        if let Some(lag) = now.lag_bytes {
            parts.push(format!("{} behind", bytes(Some(lag))));
        }
        if !now.note.is_empty() {
            parts.push(now.note.clone());
        }
        let row = |rows: i64| u64::try_from(rows).unwrap_or(0);
        self.shown.show(now.state.name(), row(now.rows_copied), row(now.rows_total), &parts.join(", "));
    }

    pub(crate) fn end(&self) {
        self.shown.end();
    }
}

fn listed(found: &[Relocation], out: &Output) -> String {
    if found.is_empty() {
        return "No relocation is under way. `therev relocation list --all` lists those that have ended.".to_owned();
    }
    let rows = found.iter().map(|one| {
        vec![
            one.relocation.to_string(),
            one.state.name().to_owned(),
            if one.is_paused { "paused".to_owned() } else { one.goal.name().to_owned() },
            one.source.to_string(),
            one.target.to_string(),
            if one.pin.is_some() { "1 user".to_owned() } else { one.buckets.len().to_string() },
            one.rows_copied.to_string(),
            number(one.pause_ms.map(|ms| format!("{ms:.1}"))),
            minute(one.updated_at),
        ]
    });
    let header = ["n", "state", "goal", "from", "to", "buckets", "rows", "pause ms", "last heard of"];
    table(out.width, &header, &["n", "from", "to", "buckets", "rows", "pause ms"], rows)
}

/// What became of several.
pub(crate) fn said_all(ended: &[Relocation], out: &Output) -> String {
    if let [one] = ended { said(one, out) } else { listed(ended, out) }
}

fn said(one: &Relocation, out: &Output) -> String {
    let groups: Vec<&str> = one.groups.iter().map(|group| group.name()).collect();
    let mut lines = vec![
        format!("relocation  {}", one.relocation),
        format!("state       {}", one.state.name()),
        format!("goal        {}{}", one.goal.name(), if one.is_paused { ", paused" } else { "" }),
        out.indented(
            "moves       ",
            &format!("{} of {} from shard {} to {}", spans(one), groups.join(" and "), one.source, one.target),
        ),
        format!("copied      {} of {} rows, {}", one.rows_copied, one.rows_total, bytes(Some(one.bytes_copied))),
    ];
    if let Some(pause) = one.pause_ms {
        lines.push(format!("switch      writes waited {pause:.1} ms, at try {}", one.attempts));
    }
    if !one.note.is_empty() {
        lines.push(out.indented("note        ", &one.note));
    }
    if one.has_worker {
        lines.push("worker      a process is at it".to_owned());
    }
    if one.state == State::Switched {
        let number = one.relocation;
        let next = format!("`therev relocation finish {number}`, or back with `therev relocation reverse {number}`");
        lines.push(out.indented("next        ", &next));
    }
    lines.join("\n")
}

/// What an end would take.
fn said_of(ending: &Ending, out: &Output) -> String {
    let Ending { relocation, state, goal, owner, former, .. } = ending;
    let mut lines = vec![format!("relocation  {relocation}"), format!("state       {}", state.name())];
    if ending.obstacles.is_empty() {
        lines.push(format!("end         {}: shard {owner} has the buckets", goal.name()));
        lines.push(match (ending.rows, ending.seconds) {
            (Some(0), _) => "removed     nothing".to_owned(),
            (Some(rows), Some(seconds)) => {
                let (size, seconds) = (bytes(ending.bytes), seconds.max(1.0));
                format!("removed     {rows} rows of shard {former}, {size}, about {seconds:.0} s")
            }
            _ => format!("removed     what shard {former} has, which gives no answer now; when it is back"),
        });
        lines.extend([String::new(), "Nothing stands in the way.".to_owned()]);
    }
    for obstacle in &ending.obstacles {
        lines.extend([String::new(), in_the_way(obstacle, out)]);
    }
    lines.join("\n")
}

/// What stands in the way, and what to do about it.
pub(crate) fn in_the_way(obstacle: &Obstacle, out: &Output) -> String {
    out.word(&format!("In the way: {}; {}.", obstacle.reason, obstacle.next), false)
}

/// `buckets 10-25, 77`, no longer than a line; or `user 01a2…`.
fn spans(one: &Relocation) -> String {
    if let Some(user) = one.pin {
        return format!("user {user}");
    }
    let mut spans: Vec<(u16, u16)> = Vec::new();
    for bucket in &one.buckets {
        match spans.last_mut() {
            Some((_, last)) if *last + 1 == bucket.number() => *last += 1,
            _ => spans.push((bucket.number(), bucket.number())),
        }
    }
    let text = |(first, last): &(u16, u16)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    if spans.len() > 6 {
        let first: Vec<String> = spans.iter().take(5).map(text).collect();
        return format!("{} buckets ({} …)", one.buckets.len(), first.join(", "));
    }
    format!("buckets {}", spans.iter().map(text).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wanted_meanwhile_is_no_success() {
        let said = |state, is_paused, goal| missed(3, state, is_paused, goal).map(|error| error.to_string());
        for (state, goal) in [
            (State::Done, Goal::Done),
            (State::Switched, Goal::Switched),
            (State::Done, Goal::Switched),
            (State::Aborted, Goal::Aborted),
            (State::Reversed, Goal::Reversed),
        ] {
            assert_eq!(said(state, false, goal), None);
        }
        let aborted = said(State::Aborted, false, Goal::Done).unwrap();
        assert!(aborted.contains("ended as aborted, not as done"), "{aborted}");
        let paused = said(State::Copying, true, Goal::Done).unwrap();
        assert!(paused.contains("it is copying") && paused.contains("`therev relocation resume 3`"), "{paused}");
        let held = said(State::Switched, false, Goal::Done).unwrap();
        assert!(held.contains("`therev relocation finish 3`"), "{held}");
    }
}
