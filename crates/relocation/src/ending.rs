//! What it takes to end a relocation under way: asked before anything is changed.

use crate::error::{Error, Result};
use crate::mover::Mover;
use crate::plan::{Obstacle, held, seconds_for};
use crate::record::{Goal, Relocation, State, over};
use crate::side::{Side, Which};
use placement::ShardNo;
use serde::Serialize;

/// What it takes to bring a relocation to an end: which rows go, and what stands in the way.
#[derive(Debug, Clone, Serialize)]
pub struct Ending {
    /// Which relocation.
    pub relocation: i64,
    /// How far it is.
    pub state: State,
    /// What is to be wanted of it; *switched* where a way back is called off.
    pub goal: Goal,
    /// The shard that has the buckets then.
    pub owner: ShardNo,
    /// The shard whose rows of these buckets are removed.
    pub former: ShardNo,
    /// How many rows it has of them; none are counted where something stands in the way. `None`: it cannot be asked now.
    pub rows: Option<i64>,
    /// How many bytes they take, indexes included: their share of their tables.
    pub bytes: Option<i64>,
    /// How long the removal takes, roughly, in seconds.
    pub seconds: Option<f64>,
    /// What stands in the way, with what to do about it; empty: nothing.
    pub obstacles: Vec<Obstacle>,
}

impl Mover {
    /// What it takes to abort, reverse or finish a relocation: [`Goal::Aborted`], [`Goal::Reversed`], [`Goal::Done`].
    pub async fn plan_ending(&self, number: i64, goal: Goal) -> Result<Ending> {
        let found = self.show(number).await?;
        let may = if goal == Goal::Done { may_finish(&found) } else { self.may_want(&found, goal).await };
        let obstacles = match may {
            Ok(()) => Vec::new(),
            Err(Error::Refused { reason, next }) => vec![Obstacle { reason, next }],
            Err(other) => return Err(other),
        };
        // A way back that is called off: what was switched stays so, and nothing goes.
        let stays = goal == Goal::Aborted && found.goal == Goal::Reversed;
        let goal = if stays { Goal::Switched } else { goal };
        let (former, owner) = match goal {
            Goal::Aborted | Goal::Reversed => (found.target, found.source),
            Goal::Done | Goal::Switched => (found.source, found.target),
        };
        let held = if stays || !obstacles.is_empty() {
            Some((0, 0))
        } else {
            match self.held_by(former, &found).await {
                Ok(held) => Some(held),
                // The source is freed at once, and the target's rows go when it is back.
                Err(error) if goal == Goal::Aborted && error.is_passing() => None,
                Err(error) => return Err(error),
            }
        };
        let (rows, bytes) = held.unzip();
        let (relocation, state, seconds) = (found.relocation, found.state, bytes.map(seconds_for));
        Ok(Ending { relocation, state, goal, owner, former, rows, bytes, seconds, obstacles })
    }

    /// How many rows a shard has of what a relocation moves, and how many bytes they take.
    async fn held_by(&self, shard: ShardNo, found: &Relocation) -> Result<(i64, i64)> {
        let side = Side::connect(&self.admin()?, Which::Source, shard).await?;
        held(&side, &found.group_names(), found.pin, &found.apart, &found.bucket_numbers()).await
    }
}

/// `finish` before the switch would take what is not there yet.
pub(crate) fn may_finish(found: &Relocation) -> Result<()> {
    if found.state == State::Switched {
        return Ok(());
    }
    if found.state.is_over() {
        return Err(over(found));
    }
    let (number, state) = (found.relocation, found.state.name());
    Err(Error::refused(
        format!("relocation {number} is {state}, it can be finished when it is switched"),
        "`therev relocation resume` brings it there",
    ))
}

/// The states in which something can be wanted of a relocation, and what to do about it in another one.
pub(crate) fn wanted_in(goal: Goal) -> (&'static [State], &'static str) {
    use State::{CatchingUp, Copying, Planned, Switched, Switching, Verified};
    let before_switch: &[State] = &[Planned, Copying, CatchingUp, Verified, Switching];
    match goal {
        Goal::Aborted => (before_switch, "after the switch `therev relocation reverse` goes back"),
        Goal::Reversed => (&[Switched], "only what is switched and not yet finishing can go back"),
        Goal::Switched => (before_switch, "it is past the switch already"),
        Goal::Done => (&[Planned, Copying, CatchingUp, Verified, Switching, Switched], "it is on its way already"),
    }
}

/// Why this cannot be wanted of a relocation in the state that it has.
pub(crate) fn not_now(found: &Relocation, goal: Goal) -> Error {
    let (_, next) = wanted_in(goal);
    if found.state.is_over() {
        return over(found);
    }
    Error::refused(format!("relocation {} is {}", found.relocation, found.state.name()), next)
}
