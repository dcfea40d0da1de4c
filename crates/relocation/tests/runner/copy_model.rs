//! A model of the copy and of its undoing: every interleaving of two workers of whom one is thought dead but only slept.
//!
//! One relocation, two rows at the source, nobody writes. A worker that has the lease looks at what is wanted and at the parts, and is
//! about to send the first effect of a step; from then on it sleeps between two effects as long as anything else takes, whoever has the
//! lease by then, and may crash. An effect is one transaction on one database, named as in the crate. What is wanted changes:
//! undone, then carried through after all. The model of the switch has what is left out here of that: here it only ends, and tries of
//! it meet a copy that begins anew, as after an older state of the control database.

use stateright::{Checker, HasDiscoveries, Model, Property};

/// The rows at the source.
const ROWS: [u8; 2] = [1, 2];
const ALL: u8 = 3;

/// More than there are tries in a round.
const TRIES_A_ROUND: u8 = 16;

/// One rule of the protocol, which can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// The undoing of a copy has a round of its own.
    UndoingHasARound,
    /// `take_round` takes none that is earlier than the part's.
    RoundsOnlyGrow,
    /// A part that was begun anew is not drained for a copy from before that.
    DrainAfterCopy,
    /// A copied row is written in a transaction that finds the part in this round.
    InsertComparesRound,
    /// A row is removed in a transaction that finds the part in this round.
    DeleteComparesRound,
    /// The target's part is ended by whoever finds it in this round.
    EndComparesRound,
    /// The target has no sentinel from the beginning of a round until its rows are about to come: none arrives.
    RoundUnsendsSentinel,
    /// A round's tries are later ones than those of every round before it, also where the part was begun anew meanwhile.
    TriesGrowWithRounds,
    /// The source's part goes before anything is removed.
    SourceEndsFirst,
}

const RULES: [Rule; 9] = [
    Rule::UndoingHasARound,
    Rule::RoundsOnlyGrow,
    Rule::DrainAfterCopy,
    Rule::InsertComparesRound,
    Rule::DeleteComparesRound,
    Rule::EndComparesRound,
    Rule::RoundUnsendsSentinel,
    Rule::TriesGrowWithRounds,
    Rule::SourceEndsFirst,
];

/// A row of `therev.relocation_parts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    None,
    Owned,
    Draining,
    Moved,
    Incoming,
    Ready,
}

/// What the control database says of how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Phase {
    Planned,
    Copying,
    Verified,
    Aborted,
}

/// What a worker is about to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Does {
    Looking,
    BeginSource,
    BeginTarget,
    NextRound { undoing: bool },
    IsLast(u8),
    EndTries(u8),
    TakeRound { round: u8, undoing: bool },
    DropStream { round: u8, undoing: bool },
    Delete { round: u8, row: usize, undoing: bool },
    SetSentinel(u8),
    Insert { round: u8, row: usize },
    StartStream(u8),
    Compare,
    EndSource,
    EndTarget(u8),
    Advance { from: Phase, to: Phase },
    Drain { seen: u8, k: u8 },
    Send(u8),
    GetReady(u8),
    Decide(u8),
    TakeOver(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    phase: Phase,
    wants_undone: bool,
    wishes: u8,
    /// Who has the lease.
    holder: usize,
    round: u8,
    source: Part,
    source_attempt: u8,
    target: Part,
    target_attempt: u8,
    target_round: u8,
    /// The sentinel row at the target, and whether what is sent to it arrives.
    sentinel: Option<u8>,
    stream: bool,
    rows: u8,
    workers: [Does; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Lease(usize),
    Wish,
    Look(usize),
    Send(usize),
    Forget(usize),
}

/// The protocol, with one rule left out or none.
struct Copy {
    without: Option<Rule>,
}

impl Copy {
    /// Rounds, tries of the switch, and how often something else is wanted.
    const BOUNDS: (u8, u8, u8) = (4, 2, 2);

    fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// The number from which on a round's tries count.
    fn first_try(&self, round: u8) -> u8 {
        if self.keeps(Rule::TriesGrowWithRounds) { round * TRIES_A_ROUND } else { 1 }
    }

    /// The first effect of the step that is next by what the holder reads.
    fn plan(&self, state: &State) -> Does {
        if state.phase == Phase::Aborted || state.source == Part::Moved {
            return if state.target == Part::Ready { Does::TakeOver(state.source_attempt) } else { Does::Looking };
        }
        let undone =
            || if self.keeps(Rule::SourceEndsFirst) { Does::EndSource } else { Does::NextRound { undoing: true } };
        let is_whole = state.source != Part::None && state.target != Part::None;
        match state.phase {
            _ if state.wants_undone => undone(),
            Phase::Planned => Does::BeginSource,
            // What was begun to be undone is undone to the end, and planned anew.
            _ if !is_whole => undone(),
            Phase::Copying => Does::NextRound { undoing: false },
            // What was compared was of another part.
            _ if state.source_attempt < self.first_try(state.target_round) && self.keeps(Rule::DrainAfterCopy) => {
                undone()
            }
            _ => {
                let seen = if self.keeps(Rule::DrainAfterCopy) { state.source_attempt } else { 0 };
                Does::Drain { seen, k: state.source_attempt.max(state.target_attempt) + 1 }
            }
        }
    }

    /// Sends what a worker is about to send; answers with what it is about to send then.
    fn act(&self, state: &mut State, worker: usize, does: Does) -> Does {
        match does {
            Does::Looking => Does::Looking,
            Does::Advance { from, to } => {
                if state.holder == worker && state.phase == from {
                    state.phase = to;
                }
                Does::Looking
            }
            Does::BeginSource | Does::BeginTarget => begin(state, does),
            Does::NextRound { .. }
            | Does::IsLast(_)
            | Does::EndTries(_)
            | Does::TakeRound { .. }
            | Does::DropStream { .. }
            | Does::Delete { .. }
            | Does::SetSentinel(_)
            | Does::Insert { .. }
            | Does::StartStream(_)
            | Does::Compare => self.round(state, worker, does),
            Does::EndSource => match state.source {
                // A try that is under way is given up first.
                Part::Draining => {
                    state.source = Part::Owned;
                    Does::EndSource
                }
                Part::Moved => Does::Looking,
                _ => {
                    state.source = Part::None;
                    if self.keeps(Rule::SourceEndsFirst) { Does::NextRound { undoing: true } } else { undone(state) }
                }
            },
            Does::EndTarget(round) => {
                let is_mine = state.target_round == round || !self.keeps(Rule::EndComparesRound);
                if state.target == Part::Incoming && is_mine {
                    (state.target, state.sentinel) = (Part::None, None);
                }
                if self.keeps(Rule::SourceEndsFirst) { undone(state) } else { Does::EndSource }
            }
            Does::Drain { .. } | Does::Send(_) | Does::GetReady(_) | Does::Decide(_) | Does::TakeOver(_) => {
                switch(state, does)
            }
        }
    }

    /// Who is to write at the target from now on.
    fn round(&self, state: &mut State, worker: usize, does: Does) -> Does {
        let awaits = matches!(state.target, Part::Incoming | Part::Ready);
        match does {
            Does::NextRound { undoing } => {
                if undoing && !awaits {
                    return if self.keeps(Rule::SourceEndsFirst) { undone(state) } else { Does::EndSource };
                }
                if undoing && !self.keeps(Rule::UndoingHasARound) {
                    return Does::Delete { round: state.target_round, row: 0, undoing };
                }
                if state.holder != worker {
                    return Does::Looking;
                }
                let round = state.round.max(state.target_round) + 1;
                state.round = round;
                if undoing { Does::TakeRound { round, undoing } } else { Does::IsLast(round) }
            }
            Does::IsLast(round) => {
                if state.target_round > round {
                    Does::Looking
                } else {
                    Does::EndTries(round)
                }
            }
            Does::EndTries(round) => {
                if !matches!(state.source, Part::Owned | Part::Draining) {
                    return Does::Looking;
                }
                state.source = Part::Owned;
                state.source_attempt += 1;
                state.source_attempt = state.source_attempt.max(self.first_try(round));
                Does::TakeRound { round, undoing: false }
            }
            Does::TakeRound { round, undoing } => {
                if !awaits || (state.target_round > round && self.keeps(Rule::RoundsOnlyGrow)) {
                    return Does::Looking;
                }
                (state.target, state.target_round) = (Part::Incoming, round);
                if self.keeps(Rule::RoundUnsendsSentinel) {
                    state.sentinel = None;
                }
                Does::DropStream { round, undoing }
            }
            _ => self.rows(state, does),
        }
    }

    /// The rows at the target, and the stream that follows them.
    fn rows(&self, state: &mut State, does: Does) -> Does {
        let awaits = matches!(state.target, Part::Incoming | Part::Ready);
        match does {
            Does::DropStream { round, undoing } => {
                state.stream = false;
                Does::Delete { round, row: 0, undoing }
            }
            Does::Delete { round, row, undoing } => {
                let is_mine = state.target_round == round || !self.keeps(Rule::DeleteComparesRound);
                let may = if undoing { state.target == Part::Incoming } else { awaits };
                if is_mine && may {
                    state.rows &= !ROWS[row];
                }
                match (row + 1 < ROWS.len(), undoing) {
                    (true, _) => Does::Delete { round, row: row + 1, undoing },
                    (false, true) => Does::EndTarget(round),
                    (false, false) => Does::SetSentinel(round),
                }
            }
            Does::SetSentinel(round) => {
                if state.target != Part::Incoming || state.target_round != round {
                    return Does::Looking;
                }
                state.sentinel = Some(0);
                Does::Insert { round, row: 0 }
            }
            Does::Insert { round, row } => {
                let is_mine = state.target_round == round || !self.keeps(Rule::InsertComparesRound);
                if !is_mine || state.target != Part::Incoming {
                    return Does::Looking;
                }
                state.rows |= ROWS[row];
                if row + 1 < ROWS.len() { Does::Insert { round, row: row + 1 } } else { Does::StartStream(round) }
            }
            Does::StartStream(round) => {
                if state.target != Part::Incoming || state.target_round != round {
                    return Does::Looking;
                }
                state.stream = true;
                Does::Compare
            }
            _ => {
                let is_same = state.rows == ALL;
                if is_same { Does::Advance { from: Phase::Copying, to: Phase::Verified } } else { Does::Looking }
            }
        }
    }
}

/// After everything was taken back: it has ended, or is planned anew.
fn undone(state: &State) -> Does {
    let to = if state.wants_undone { Phase::Aborted } else { Phase::Planned };
    Does::Advance { from: state.phase, to }
}

fn begin(state: &mut State, does: Does) -> Does {
    if does == Does::BeginSource {
        if state.source == Part::None {
            (state.source, state.source_attempt) = (Part::Owned, 0);
        }
        return Does::BeginTarget;
    }
    if state.target == Part::None {
        (state.target, state.target_attempt, state.target_round) = (Part::Incoming, 0, 0);
    }
    Does::Advance { from: Phase::Planned, to: Phase::Copying }
}

/// The effects of the switch, as in its own model; the stream brings a sentinel at once, or never.
fn switch(state: &mut State, does: Does) -> Does {
    match does {
        Does::Drain { seen, k } if state.source == Part::Owned && (seen..k).contains(&state.source_attempt) => {
            (state.source, state.source_attempt) = (Part::Draining, k);
            Does::Send(k)
        }
        Does::Send(k) if state.source == Part::Draining && state.source_attempt == k => {
            if state.stream {
                state.sentinel = state.sentinel.map(|_| k);
            }
            Does::GetReady(k)
        }
        Does::GetReady(k)
            if matches!(state.target, Part::Incoming | Part::Ready)
                && state.target_attempt <= k
                && state.sentinel == Some(k) =>
        {
            (state.target, state.target_attempt) = (Part::Ready, k);
            Does::Decide(k)
        }
        Does::Decide(k) if state.source == Part::Draining && state.source_attempt == k => {
            state.source = Part::Moved;
            Does::TakeOver(k)
        }
        Does::TakeOver(k) if state.target == Part::Ready && state.target_attempt == k => {
            state.target = Part::Owned;
            Does::Looking
        }
        _ => Does::Looking,
    }
}

impl Model for Copy {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            phase: Phase::Planned,
            wants_undone: false,
            wishes: 0,
            holder: 0,
            round: 0,
            source: Part::None,
            source_attempt: 0,
            target: Part::None,
            target_attempt: 0,
            target_round: 0,
            sentinel: None,
            stream: false,
            rows: 0,
            workers: [Does::Looking; 2],
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let (rounds, attempts, wishes) = Copy::BOUNDS;
        actions.push(Action::Lease(1 - state.holder));
        if state.wishes < wishes && state.phase != Phase::Aborted {
            actions.push(Action::Wish);
        }
        for (worker, does) in state.workers.into_iter().enumerate() {
            match does {
                Does::Looking if state.holder == worker => actions.push(Action::Look(worker)),
                Does::Looking => {}
                Does::NextRound { .. } if state.round.max(state.target_round) >= rounds => {
                    actions.push(Action::Forget(worker));
                }
                Does::Drain { k, .. } if k % TRIES_A_ROUND > attempts => actions.push(Action::Forget(worker)),
                _ => actions.extend([Action::Send(worker), Action::Forget(worker)]),
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            // Whoever has it again begins anew: what it was at is another worker's by now.
            Action::Lease(worker) => (state.holder, state.workers[worker]) = (worker, Does::Looking),
            Action::Wish => (state.wants_undone, state.wishes) = (!state.wants_undone, state.wishes + 1),
            Action::Look(worker) => state.workers[worker] = self.plan(&state),
            Action::Send(worker) => state.workers[worker] = self.act(&mut state, worker, last.workers[worker]),
            Action::Forget(worker) => state.workers[worker] = Does::Looking,
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(WHOLE, |_, s: &State| s.target != Part::Owned || s.rows == ALL),
            Property::always(NOTHING_LEFT, |_, s: &State| s.target != Part::None || s.rows == 0),
            Property::always(WRITABLE, |_, s: &State| {
                s.source != Part::Moved || matches!(s.target, Part::Ready | Part::Owned)
            }),
            Property::sometimes("it is carried through", |_, s: &State| s.target == Part::Owned),
            Property::sometimes("it is undone", |_, s: &State| s.phase == Phase::Aborted && s.rows == 0),
            Property::sometimes("it is carried through after it was to be undone", |_, s: &State| {
                s.target == Part::Owned && s.wishes == 2
            }),
            Property::sometimes("one who slept wakes in another's round", |_, s: &State| {
                let sleeps =
                    |does: &Does| matches!(does, Does::Delete { round, undoing: true, .. } if *round < s.target_round);
                s.workers.iter().any(sleeps) && s.rows == ALL
            }),
        ]
    }
}

const WHOLE: &str = "whoever owns has every row";
const NOTHING_LEFT: &str = "no row is left without a part";
const WRITABLE: &str = "what was given away is taken";

/// Invariants 19 and 20.
#[test]
fn the_copy_and_its_undoing_hold() {
    let finish = HasDiscoveries::AnyFailures;
    let checker = Copy { without: None }.checker().finish_when(finish).spawn_dfs().join();
    println!("{} states, {} deep", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

/// Invariants 19 and 20.
#[test]
fn every_rule_of_the_copy_is_needed() {
    for rule in RULES {
        let finish = HasDiscoveries::AnyFailures;
        let checker = Copy { without: Some(rule) }.checker().finish_when(finish).spawn_bfs().join();
        let broken =
            [WHOLE, NOTHING_LEFT, WRITABLE].into_iter().find_map(|name| Some((name, checker.discovery(name)?)));
        let (name, path) = broken.unwrap_or_else(|| panic!("nothing breaks without {rule:?}"));
        println!("without {rule:?}, not \"{name}\":\n    {:?}", path.into_actions());
    }
}
