//! The effects of the switch, each one transaction on one server, named as they are in the code.

use super::state::{Change, Flow, Is, Mover, SOURCE, Shard, State, TARGET, Way};
use super::{Rule, Switch};

/// Whether the sender of an effect gets an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It committed, on the standbys too, and the sender knows.
    Given,
    /// The wait for the standbys was cut short: visible, not durable, and the sender knows nothing.
    CutShort,
}

impl Switch {
    /// The mover sends what it is about to send; says what it is about to send then.
    pub(super) fn act(&self, state: &mut State, mover: Mover, answer: Answer) -> Mover {
        match mover {
            Mover::Looking | Mover::Waiting(..) => mover,
            Mover::Drain(way, k) => self.drain(state, way, k, answer),
            Mover::WaitForWriters(way, k) => wait_for_writers(state, way, k),
            Mover::SendSentinel(way, k) => send_sentinel(state, way, k, answer),
            Mover::GetReady(way, k) => self.get_ready(state, way, k, answer),
            Mover::Decide(way, k) => self.decide(state, way, k, answer),
            Mover::TakeOver(way, k) => self.take_over(state, way, k, answer),
            Mover::RecordPlacement(way) => self.record_placement(state, way),
            Mover::StopForward => stop_forward(state),
            Mover::StartReverse => self.start_reverse(state),
        }
    }

    fn drain(&self, state: &mut State, way: Way, k: u8, answer: Answer) -> Mover {
        let part = state.part(way.from());
        let attempt = part.attempt == k - 1 || !self.keeps(Rule::DrainComparesAttempt);
        if part.is != Is::Owned || !attempt {
            return Mover::Looking;
        }
        // It waits for no disk: whatever commits next on this server takes it there, and to the standbys.
        let part = state.change_softly(way.from());
        part.is = Is::Draining;
        part.attempt = k;
        match answer {
            Answer::CutShort => Mover::Looking,
            Answer::Given if self.keeps(Rule::WaitForWriters) => Mover::WaitForWriters(way, k),
            Answer::Given => Mover::SendSentinel(way, k),
        }
    }

    fn get_ready(&self, state: &mut State, way: Way, k: u8, answer: Answer) -> Mover {
        let server = &mut state.servers[way.to()];
        let refused = server.another_life && self.keeps(Rule::ReadyInOneLife);
        let part = &mut server.now.part;
        if refused || part.is == Is::Owned || part.attempt > k {
            return Mover::Looking;
        }
        let next = Mover::Decide(way, k);
        if part.reads(Is::Ready, k) {
            return if self.keeps(Rule::ReadyFoundIsMadeDurable) { end(state, way.to(), answer, next) } else { next };
        }
        let streamed = server.now.sentinel == k || !self.keeps(Rule::SentinelBeforeReady);
        // In a reversal the part that gets ready is the one that says *moved*.
        let awaits = matches!(part.is, Is::Incoming | Is::Ready | Is::Moved) && part.attempt < k;
        if !(streamed && awaits) {
            return Mover::GetReady(way, k);
        }
        part.is = Is::Ready;
        part.attempt = k;
        if self.keeps(Rule::ReadyIsDurable) { end(state, way.to(), answer, next) } else { next }
    }

    fn decide(&self, state: &mut State, way: Way, k: u8, answer: Answer) -> Mover {
        let server = &mut state.servers[way.from()];
        let refused = server.another_life && self.keeps(Rule::DecideInOneLife);
        let part = &mut server.now.part;
        let attempt = part.attempt == k || !self.keeps(Rule::DecideComparesAttempt);
        let drained = part.is == Is::Draining || (part.is == Is::Owned && !self.keeps(Rule::DecideComparesState));
        if refused || !(attempt && drained) {
            return Mover::Looking;
        }
        part.is = Is::Moved;
        part.attempt = k;
        part.epoch += 1;
        let next = Mover::TakeOver(way, k);
        if self.keeps(Rule::MovedIsDurable) { end(state, way.from(), answer, next) } else { next }
    }

    /// By a mover whose budget is spent, or by anybody.
    pub(super) fn can_back_out(&self, state: &State, shard: Shard) -> bool {
        let is = state.part(shard).is;
        is == Is::Draining || (is == Is::Moved && !self.keeps(Rule::BackOutComparesState))
    }

    /// What a mover that just read a part may be about to send.
    pub(super) fn plans(&self, state: &State, shard: Shard) -> Vec<Mover> {
        let part = state.part(shard);
        let (way, k) = (Way::out_of(shard), part.attempt);
        match part.is {
            Is::Incoming | Is::Ready => vec![],
            Is::Draining => vec![Mover::WaitForWriters(way, k), Mover::GetReady(way, k)],
            Is::Moved => vec![Mover::TakeOver(way, k)],
            Is::Owned => {
                let asked =
                    shard == SOURCE || (self.bounds.reversal && state.streams[way as usize].flow == Flow::Running);
                let drain = (asked && k < self.bounds.attempts).then_some(Mover::Drain(way, k + 1));
                let came_by = if shard == SOURCE { Way::Reverse } else { Way::Forward };
                let record = (part.epoch == came_by.epoch()).then_some(Mover::RecordPlacement(came_by));
                drain.into_iter().chain(record).collect()
            }
        }
    }

    /// A read of a part. Who builds upon what he found has written the row anew, as it is, and so waited for the
    /// standbys.
    pub(super) fn look(&self, state: &mut State, plan: Mover) -> Mover {
        match plan {
            Mover::TakeOver(way, _) if self.keeps(Rule::MovedFoundIsMadeDurable) => state.persist(way.from()),
            Mover::RecordPlacement(way) if self.keeps(Rule::OwnedFoundIsMadeDurable) => state.persist(way.to()),
            _ => {}
        }
        plan
    }

    fn take_over(&self, state: &mut State, way: Way, k: u8, answer: Answer) -> Mover {
        let part = state.part(way.to());
        if part.reads(Is::Ready, k) {
            // It waits for no disk either, then finds itself there.
            let part = state.change_softly(way.to());
            part.is = Is::Owned;
            part.epoch += 1;
            note_since(state, way);
            return if answer == Answer::Given { Mover::TakeOver(way, k) } else { Mover::Looking };
        }
        let taken_over = part.is == Is::Owned && part.epoch == way.epoch();
        if taken_over && !self.keeps(Rule::TakeOverComparesState) {
            note_since(state, way);
        }
        if taken_over { self.look(state, Mover::RecordPlacement(way)) } else { Mover::Looking }
    }

    fn record_placement(&self, state: &mut State, way: Way) -> Mover {
        if state.control_is_up {
            if way.epoch() > state.control || !self.keeps(Rule::HigherEpochInControl) {
                state.control = way.epoch();
            }
            state.recorded = state.recorded.max(way.epoch());
        }
        match way {
            Way::Forward if self.keeps(Rule::ForwardStopped) => Mover::StopForward,
            Way::Forward => Mover::StartReverse,
            Way::Reverse => Mover::Looking,
        }
    }

    fn start_reverse(&self, state: &mut State) -> Mover {
        let mut rows = state.servers[TARGET].durable.rows;
        let stream = &mut state.streams[Way::Reverse as usize];
        match stream.flow {
            Flow::NotStarted => {
                stream.flow = Flow::Running;
                if !self.keeps(Rule::ReverseBeginsAtSince) {
                    stream.held = rows;
                }
            }
            Flow::Running if !self.keeps(Rule::ReverseStartsOnce) => {
                rows.drop_first(state.since);
                stream.held = rows;
                stream.applied = 0;
            }
            Flow::Running | Flow::Stopped | Flow::Lost => {}
        }
        Mover::Looking
    }
}

/// From here on the way back streams what is written.
fn note_since(state: &mut State, way: Way) {
    let back = &mut state.streams[Way::Reverse as usize];
    if way == Way::Forward && back.flow == Flow::NotStarted {
        back.held = super::state::Changes::default();
        state.since = state.servers[way.to()].now.rows.len();
    }
}

fn wait_for_writers(state: &State, way: Way, k: u8) -> Mover {
    Mover::Waiting(way, k, state.lock_holders(way.from())).seen_gone(usize::MAX)
}

fn send_sentinel(state: &mut State, way: Way, k: u8, answer: Answer) -> Mover {
    state.servers[way.from()].now.sentinel = k;
    let held = state.streams[way as usize].held;
    let next = end(state, way.from(), answer, Mover::GetReady(way, k));
    // A second one behind the first says nothing new.
    if held.len().checked_sub(1).and_then(|last| held.get(last)) != Some(Change::Sentinel(k)) {
        state.hold(way.from(), Change::Sentinel(k));
    }
    next
}

/// draining, k → owned; it waits for no disk.
pub(super) fn back_out(state: &mut State, shard: Shard) {
    state.change_softly(shard).is = Is::Owned;
}

/// The subscription is disabled and its worker was seen gone.
fn stop_forward(state: &mut State) -> Mover {
    let stream = &mut state.streams[Way::Forward as usize];
    if stream.flow == Flow::Running {
        stream.flow = Flow::Stopped;
        stream.held = super::state::Changes::default();
        stream.applied = 0;
    }
    Mover::StartReverse
}

fn end(state: &mut State, shard: Shard, answer: Answer, next: Mover) -> Mover {
    match answer {
        Answer::Given => {
            state.persist(shard);
            next
        }
        // It is on this disk, with everything before it.
        Answer::CutShort => {
            state.servers[shard].is_soft = false;
            Mover::Looking
        }
    }
}

impl Mover {
    /// A transaction has ended; the last one that was waited for lets the mover go on.
    pub(super) fn seen_gone(self, index: usize) -> Self {
        let Mover::Waiting(way, k, before) = self else { return self };
        let left = if index < 8 { before & !(1 << index) } else { before };
        if left == 0 { Mover::SendSentinel(way, k) } else { Mover::Waiting(way, k, left) }
    }
}
