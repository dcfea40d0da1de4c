//! Moves as relocations, one in and one out of a shard at a time.

use super::Move;
use crate::{Bucket, ShardNo};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

/// Buckets that move together, from one shard to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relocation {
    /// Where they are.
    pub from: ShardNo,
    /// Where they should be.
    pub to: ShardNo,
    /// By number.
    pub buckets: Vec<Bucket>,
    /// What goes over the wire.
    pub bytes: u64,
}

/// A round that is being filled.
#[derive(Debug, Default)]
struct Round {
    relocations: Vec<Relocation>,
    sources: HashSet<ShardNo>,
    targets: HashSet<ShardNo>,
}

/// Groups moves by source and target, and puts each relocation, the heaviest first, into the first round that has room.
///
/// Needs fewer rounds than twice the relocations of the busiest shard, and those of a round take about as long.
pub(super) fn of(moves: &[Move]) -> Vec<Vec<Relocation>> {
    let mut pairs: BTreeMap<(ShardNo, ShardNo), Relocation> = BTreeMap::new();
    for &Move { bucket, from, to, bytes } in moves {
        let pair = pairs.entry((from, to)).or_insert(Relocation { from, to, buckets: Vec::new(), bytes: 0 });
        pair.buckets.push(bucket);
        pair.bytes = pair.bytes.saturating_add(bytes);
    }
    let mut relocations: Vec<Relocation> = pairs.into_values().collect();
    relocations.sort_by_key(|it| Reverse(it.bytes));
    let mut rounds: Vec<Round> = Vec::new();
    for relocation in relocations {
        let has_room = |it: &Round| !it.sources.contains(&relocation.from) && !it.targets.contains(&relocation.to);
        let at = rounds.iter().position(has_room).unwrap_or(rounds.len());
        if at == rounds.len() {
            rounds.push(Round::default());
        }
        let round = &mut rounds[at];
        round.sources.insert(relocation.from);
        round.targets.insert(relocation.to);
        round.relocations.push(relocation);
    }
    rounds.into_iter().map(|it| it.relocations).collect()
}
