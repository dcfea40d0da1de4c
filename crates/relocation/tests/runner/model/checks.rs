//! The checks: the whole protocol holds within several bounds, and each rule is missed when it is left out.

use super::{Bounds, Rule, Switch};
use stateright::{Checker, HasDiscoveries, Model};

/// Two movers, two attempts, the way back, a control database that fails.
const THERE_AND_BACK: Bounds =
    Bounds { appends: 2, writers: 1, attempts: 2, held: 3, promotions: 0, cuts: false, outages: true, reversal: true };
/// Two attempts, and a promotion of either server at any point, with waits for standbys that were cut short.
const ANOTHER_LIFE: Bounds =
    Bounds { appends: 1, promotions: 1, cuts: true, outages: false, reversal: false, ..THERE_AND_BACK };
/// Two writes open at once.
const TWO_WRITERS: Bounds =
    Bounds { writers: 2, attempts: 1, promotions: 1, cuts: true, outages: false, reversal: false, ..THERE_AND_BACK };
/// Three attempts: there after two back-outs, or back and an attempt to go there once more.
const THREE_ATTEMPTS: Bounds = Bounds { appends: 1, attempts: 3, outages: false, ..THERE_AND_BACK };
/// All that may break at once: 16 million states.
const EVERYTHING: Bounds = Bounds { promotions: 2, cuts: true, outages: false, ..THERE_AND_BACK };
/// More of everybody, while no server is promoted: 14 million states.
const MORE_OF_EVERYBODY: Bounds = Bounds { writers: 2, attempts: 3, outages: false, ..THERE_AND_BACK };

/// In every reachable state.
fn holds(bounds: Bounds) {
    let switch = Switch { bounds, without: None };
    // Depth first: what waits to be visited is little.
    let checker = switch.checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    println!("{} states, {} steps, {} deep", checker.unique_state_count(), checker.state_count(), checker.max_depth());
    checker.assert_properties();
}

/// Invariants 1, 14, 15, 17, 19 and 21.
#[test]
fn the_switch_holds_there_and_back() {
    holds(THERE_AND_BACK);
}

/// Invariants 16 and 18.
#[test]
fn the_switch_holds_in_another_life() {
    holds(ANOTHER_LIFE);
}

#[test]
fn the_switch_holds_with_two_writers() {
    holds(TWO_WRITERS);
}

/// Invariant 15.
#[test]
fn the_switch_holds_over_three_attempts() {
    holds(THREE_ATTEMPTS);
}

#[test]
#[ignore = "a minute and 320 MB; the full tier runs it"]
fn the_switch_holds_with_everything_at_once() {
    holds(EVERYTHING);
}

#[test]
#[ignore = "a minute and 170 MB; the full tier runs it"]
fn the_switch_holds_with_more_of_everybody() {
    holds(MORE_OF_EVERYBODY);
}

/// What breaks when a rule is left out, and where that is seen soonest.
fn breaks(rule: Rule) -> (&'static str, Bounds) {
    const TWO_SLEEPERS: Bounds = Bounds { outages: false, ..THERE_AND_BACK };
    const LOSES_WRITES: &str = "the owner has every write once and in order";
    const STUCK: &str = "somebody can end it";
    match rule {
        Rule::DrainedRefusesWrites
        | Rule::LockBeforeFence
        | Rule::DrainComparesAttempt
        | Rule::TakeOverComparesState
        | Rule::WaitForWriters
        | Rule::SentinelBeforeReady
        | Rule::DecideComparesAttempt
        | Rule::DecideComparesState => (LOSES_WRITES, TWO_SLEEPERS),
        Rule::ReadyInOneLife => (LOSES_WRITES, ANOTHER_LIFE),
        Rule::DecideAfterReady => (STUCK, TWO_SLEEPERS),
        Rule::ReadyIsDurable | Rule::ReadyFoundIsMadeDurable | Rule::DecideInOneLife => (STUCK, ANOTHER_LIFE),
        // Where nobody writes, it is found before long.
        Rule::OwnedFoundIsMadeDurable => (STUCK, Bounds { appends: 0, reversal: true, ..ANOTHER_LIFE }),
        Rule::BackOutComparesState | Rule::TakeOverAfterMoved => ("one owner", TWO_SLEEPERS),
        Rule::MovedIsDurable | Rule::MovedFoundIsMadeDurable => ("one owner", ANOTHER_LIFE),
        Rule::HigherEpochInControl => ("the control database never goes back by itself", TWO_SLEEPERS),
        Rule::HigherEpochInNodes => ("hints lead to the owner", TWO_SLEEPERS),
        Rule::OwnerIsBelieved => ("hints lead to the owner", ANOTHER_LIFE),
        Rule::ForwardStopped | Rule::ReverseBeginsAtSince | Rule::ReverseStartsOnce => ("no echo", TWO_SLEEPERS),
    }
}

/// Invariants 14, 15, 16, 17, 18, 19 and 21.
#[test]
fn every_rule_is_needed() {
    for rule in Rule::ALL {
        let (property, bounds) = breaks(rule);
        let switch = Switch { bounds, without: Some(rule) };
        let finish = HasDiscoveries::AnyOf([property].into());
        let checker = switch.checker().finish_when(finish).spawn_bfs().join();
        let path = checker.assert_any_discovery(property).into_actions();
        println!("without {rule:?}, not \"{property}\" ({} states):\n    {path:?}", checker.unique_state_count());
    }
}
