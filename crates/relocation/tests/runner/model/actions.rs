//! Everything that may happen in a state, in any order: that is what interleaves.

use super::state::{Mover, SOURCE, Shard, State, TARGET, Way, Writer};
use super::{Rule, Switch};

/// What may happen next; movers and writers by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// A mover that knows nothing reads a part, and is about to send this.
    Look(usize, Shard, Mover),
    /// A mover sends what it is about to send, and has its answer.
    Send(usize),
    /// The same, but its wait for the standbys ends early and without an answer.
    SendCutShort(usize),
    /// A mover knows what it would not by the rules, and skips to this.
    Skip(usize, Mover),
    /// A mover crashes, or its last answer was lost: it knows nothing.
    Forget(usize),
    BackOut(Shard),
    Begin(usize, Shard),
    Fence(usize),
    Commit(usize),
    Abort(usize),
    Apply(Way),
    /// The disk and the standbys of a server catch up.
    Persist(Shard),
    Crash(Shard),
    Promote(Shard),
    ControlDown,
    ControlUp,
    /// The control database is put back to what it was before the switch.
    ControlRestored,
}

impl Switch {
    pub(super) fn movers_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (index, mover) in state.movers.into_iter().enumerate() {
            if index > 0 && mover == state.movers[0] {
                continue;
            }
            match mover {
                Mover::Looking => {
                    for shard in [SOURCE, TARGET] {
                        actions
                            .extend(self.plans(state, shard).into_iter().map(|plan| Action::Look(index, shard, plan)));
                    }
                    continue;
                }
                Mover::Waiting(..) => {}
                Mover::SendSentinel(way, _) if !state.can_hold(way.from(), self.bounds.held) => {}
                _ => actions.push(Action::Send(index)),
            }
            let with_standbys = matches!(
                mover,
                Mover::Drain(..)
                    | Mover::SendSentinel(..)
                    | Mover::GetReady(..)
                    | Mover::Decide(..)
                    | Mover::TakeOver(..)
            );
            if self.bounds.cuts && with_standbys {
                actions.push(Action::SendCutShort(index));
            }
            match mover {
                Mover::GetReady(way, k) if !self.keeps(Rule::DecideAfterReady) => {
                    actions.push(Action::Skip(index, Mover::Decide(way, k)));
                }
                Mover::Decide(way, k) if !self.keeps(Rule::TakeOverAfterMoved) => {
                    actions.push(Action::Skip(index, Mover::TakeOver(way, k)));
                }
                _ => {}
            }
            actions.push(Action::Forget(index));
        }
    }

    pub(super) fn writers_actions(&self, state: &State, actions: &mut Vec<Action>) {
        let open = state.writers.iter().filter(|w| matches!(w, Writer::Passed(_) | Writer::PassedUnlocked(_))).count();
        for (index, writer) in state.writers.into_iter().enumerate().take(self.bounds.writers) {
            match writer {
                Writer::Idle => {
                    if usize::from(state.commits) + open < usize::from(self.bounds.appends) {
                        actions.extend([SOURCE, TARGET].map(|shard| Action::Begin(index, shard)));
                    }
                }
                Writer::Locked(_) => actions.push(Action::Fence(index)),
                Writer::Passed(_) | Writer::PassedUnlocked(_) => {
                    if state.commits < self.bounds.appends {
                        actions.push(Action::Commit(index));
                    }
                    actions.push(Action::Abort(index));
                }
            }
        }
    }

    pub(super) fn servers_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for shard in [SOURCE, TARGET] {
            let way = Way::out_of(1 - shard);
            if self.can_back_out(state, shard) {
                actions.push(Action::BackOut(shard));
            }
            if state.next_to_apply(way).is_some() {
                actions.push(Action::Apply(way));
            }
            let server = &state.servers[shard];
            if server.now != server.durable {
                actions.push(Action::Persist(shard));
            }
            if state.can_crash(shard) {
                actions.push(Action::Crash(shard));
            }
            let promoted = state.servers.iter().filter(|server| server.another_life).count();
            if promoted < self.bounds.promotions && !server.another_life {
                actions.push(Action::Promote(shard));
            }
        }
        if self.bounds.outages {
            actions.push(if state.control_is_up { Action::ControlDown } else { Action::ControlUp });
            if state.control > 0 {
                actions.push(Action::ControlRestored);
            }
        }
    }
}
