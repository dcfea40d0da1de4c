//! A model of the switch: every interleaving of two movers, the writers, the streams and what breaks, checked.
//!
//! One bucket, two shards, and the protocol of the crate with its names: `drain`, `wait_for_writers`,
//! `send_sentinel`, `get_ready`, `decide`, `back_out`, `take_over`, `record_placement`, `stop_forward`,
//! `start_reverse`, and the way back, which is the same with the sides swapped. An action of the model is one
//! transaction on one server.
//!
//! What happens in between, at any point:
//! - **Movers.** Two, alike, each knowing only what it is about to send. Between two effects a mover may sleep as long
//!   as anything else takes, and forget: it crashed, before or after the effect, or the answer was lost. It then reads
//!   a part and begins from there. Anybody may back out at any time, as a node does whose write has waited too long.
//! - **Servers.** What is visible is not yet durable: a stream applies asynchronously, and the wait for standbys may
//!   end early (a cancelled statement), so that a change is seen by all and lost by a promotion. A crash loses what was
//!   only applied, and it is streamed again. A promotion falls back to what the standbys have, is another incarnation
//!   and has lost its slots; what had been applied and confirmed to the other side's slot is in no stream any more.
//! - **Writers.** A write may begin on either shard at any time: so does a node whose placement is stale, or that was
//!   asleep. It takes the table's lock, then looks at the part, then commits or aborts whenever it likes.
//! - **Readers** are an invariant: whatever shard would let them read must have everything.
//! - **Nodes** are one too: from whatever a node may have been told, the hints must lead to the owner.
//! - **The control database** goes down and comes back, or is put back to what it said before the switch.
//!
//! The bounds of each check ([`Bounds`]) stand in `checks.rs`. Not in the model: the copy; two promotions of the same
//! server; a commit of a user's write that is visible and lost with a promotion (nobody was told that it was there);
//! what a promoted server learns when it is reconciled (here it opens at once, with what it has); `finish`.

#[path = "model/actions.rs"]
mod actions;
#[path = "model/checks.rs"]
mod checks;
#[path = "model/effects.rs"]
mod effects;
#[path = "model/properties.rs"]
mod properties;
#[path = "model/rules.rs"]
mod rules;
#[path = "model/servers.rs"]
mod servers;
#[path = "model/state.rs"]
mod state;

use actions::Action;
use effects::Answer;
use rules::Rule;
use state::{Mover, State};
use stateright::{Model, Property};

/// How much of everything there is. Attempts, appends and what a slot holds are bounded, nothing else is: how often a
/// mover forgets, a server crashes or the control database is put back is not counted.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Writes that commit.
    appends: u8,
    /// Write transactions open at a time.
    writers: usize,
    /// Attempts, there and back together.
    attempts: u8,
    /// Changes that a slot may hold when one more sentinel is sent.
    held: u32,
    /// How many of the two servers may be promoted, each once.
    promotions: usize,
    /// Whether waits for standbys may be cut short; it shows when there are promotions.
    cuts: bool,
    /// Whether the control database may fail.
    outages: bool,
    /// Whether the way back is gone as well.
    reversal: bool,
}

/// The protocol, with one rule left out or none.
#[derive(Clone, Copy, Debug)]
struct Switch {
    bounds: Bounds,
    without: Option<Rule>,
}

impl Switch {
    fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

impl Model for Switch {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::caught_up()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.movers_actions(state, actions);
        self.writers_actions(state, actions);
        self.servers_actions(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Look(mover, _, plan) => state.movers[mover] = self.look(&mut state, plan),
            Action::Send(mover) => state.movers[mover] = self.act(&mut state, last.movers[mover], Answer::Given),
            Action::SendCutShort(mover) => {
                state.movers[mover] = self.act(&mut state, last.movers[mover], Answer::CutShort);
            }
            Action::Skip(mover, next) => state.movers[mover] = next,
            Action::Forget(mover) => state.movers[mover] = Mover::Looking,
            Action::BackOut(shard) => effects::back_out(&mut state, shard),
            Action::Begin(writer, shard) => self.begin(&mut state, writer, shard),
            Action::Fence(writer) => self.fence(&mut state, writer),
            Action::Commit(writer) => state.commit(writer),
            Action::Abort(writer) => state.end_writer(writer),
            Action::Apply(way) => state.apply(way),
            Action::Persist(shard) => state.persist(shard),
            Action::Crash(shard) => state.crash(shard),
            Action::Promote(shard) => state.promote(shard),
            Action::ControlDown => state.control_is_up = false,
            Action::ControlUp => state.control_is_up = true,
            Action::ControlRestored => (state.control, state.recorded) = (0, 0),
        }
        state.shown = state.servers.iter().map(|server| server.now.part.epoch).fold(state.shown, u8::max);
        state.movers.sort_unstable();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all(self)
    }
}
