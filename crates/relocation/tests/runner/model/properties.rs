//! What must hold in every state, and what must come to pass in some.

use super::state::{Change, Is, Mover, SOURCE, Shard, State, TARGET, Way};
use super::{Rule, Switch};
use stateright::Property;

/// Invariants, then what shows that the model is not empty.
pub(super) fn all(switch: &Switch) -> Vec<Property<Switch>> {
    let mut all = vec![
        Property::always("one owner", |_, s: &State| !(owns(s, SOURCE) && owns(s, TARGET))),
        Property::always("the owner has every write once and in order", |_, s: &State| {
            [SOURCE, TARGET].into_iter().all(|shard| !owns(s, shard) || has_everything(s, shard))
        }),
        Property::always("a read misses no write", |_, s: &State| {
            [SOURCE, TARGET].into_iter().all(|shard| !s.part(shard).readable() || has_everything(s, shard))
        }),
        Property::always("no echo", |_, s: &State| [SOURCE, TARGET].into_iter().all(|shard| !has_echo(s, shard))),
        Property::always("somebody can end it", |_, s: &State| can_be_ended(s)),
        Property::always("the owner has the highest epoch", |_, s: &State| {
            [SOURCE, TARGET].into_iter().all(|shard| !owns(s, shard) || s.part(shard).epoch >= s.part(1 - shard).epoch)
        }),
        Property::always("the control database never goes back by itself", |_, s: &State| s.control == s.recorded),
        Property::always("hints lead to the owner", hints_lead_to_the_owner),
        Property::sometimes("a switch succeeds", |_, s: &State| owns(s, TARGET) && s.commits > 0),
        Property::sometimes("both movers are dead after the decision", |_, s: &State| {
            s.part(SOURCE).is == Is::Moved && s.part(TARGET).is == Is::Ready && s.movers == [Mover::Looking; 2]
        }),
    ];
    if switch.bounds.attempts > 1 {
        all.push(Property::sometimes("one who slept wakes in the middle of another's attempt", |_, s: &State| {
            s.movers.contains(&Mover::Decide(Way::Forward, 1)) && s.part(SOURCE).reads(Is::Draining, 2)
        }));
        all.push(Property::sometimes("a back-out, then success", |_, s: &State| s.part(TARGET).reads(Is::Owned, 2)));
    }
    if switch.bounds.promotions > 0 {
        all.push(Property::sometimes("a switch succeeds in spite of a promotion", |_, s: &State| {
            owns(s, TARGET) && s.servers[TARGET].another_life
        }));
    }
    if switch.bounds.outages {
        all.push(Property::sometimes("a switch ends without the control database", |_, s: &State| {
            owns(s, TARGET) && !s.control_is_up && s.control == 0
        }));
    }
    if switch.bounds.reversal {
        all.push(Property::sometimes("a reversal brings back what was written meanwhile", |_, s: &State| {
            owns(s, SOURCE) && s.part(SOURCE).epoch == Way::Reverse.epoch() && u32::from(s.commits) > s.since
        }));
    }
    all
}

fn owns(state: &State, shard: Shard) -> bool {
    state.part(shard).is == Is::Owned
}

fn has_everything(state: &State, shard: Shard) -> bool {
    state.servers[shard].now.rows.are_all_up_to(state.commits)
}

/// Whether a value came twice, or behind a later one.
fn has_echo(state: &State, shard: Shard) -> bool {
    let mut last = 0;
    state.servers[shard].now.rows.iter().any(|change| {
        let Change::Append(n) = change else { return true };
        std::mem::replace(&mut last, n) >= n
    })
}

/// There is an owner, or a process that knows nothing and reads the parts has an effect that makes one: `back_out` of
/// what is draining, `take_over` of what was moved and is ready. Neither needs the control database.
fn can_be_ended(state: &State) -> bool {
    let ended = [SOURCE, TARGET].into_iter().any(|shard| state.part(shard).readable());
    let decided = |way: Way| {
        let moved = state.part(way.from());
        moved.is == Is::Moved && state.part(way.to()).reads(Is::Ready, moved.attempt)
    };
    ended || decided(Way::Forward) || decided(Way::Reverse)
}

/// From whatever a node may have been told, hints lead to a shard that answers or on which to wait: never round in a
/// circle, and it never waits for a switch that was undone.
fn hints_lead_to_the_owner(switch: &Switch, state: &State) -> bool {
    (0..=state.shown).all(|epoch| {
        let mut believed = (usize::from(epoch % 2), epoch);
        for _ in 0..4 {
            let (shard, epoch) = believed;
            let part = state.part(shard);
            let waits = switch.keeps(Rule::HigherEpochInNodes) && epoch > part.epoch;
            match part.is {
                Is::Owned | Is::Draining => return true,
                Is::Incoming | Is::Ready if waits => {
                    let undone = state.part(1 - shard).readable();
                    return !undone || switch.keeps(Rule::OwnerIsBelieved);
                }
                Is::Moved | Is::Incoming | Is::Ready => believed = (1 - shard, part.epoch),
            }
        }
        false
    })
}
