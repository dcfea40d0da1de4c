//! The planner: which buckets move where, so that each shard holds its weight's share.
//!
//! A shard's *share* is its weight's part of everything; it is in balance when what it holds is within
//! [`TOLERANCE_PERCENT`] of that. [`plan`] brings every shard into balance while few bytes move, or as near as it can,
//! and says which, and why. Balance is wanted of bytes or of load; what is saved is bytes moved either way.
//!
//! The search is greedy and deterministic. Shards of weight 0 are emptied first. Then the shard that is furthest out is
//! helped by the bucket that puts most in order for its bytes, given to the emptiest shard or taken from the fullest;
//! where no bucket helps any more, by an exchange of two. What turns out not to be needed goes back. So a plan is not
//! the best of all, but no single move and no exchange would bring it nearer; where no bucket is heavier than a tenth of
//! the smallest share and pins leave room, every shard comes into balance: the emptiest shard has room for any bucket.
//!
//! Everything is counted in whole numbers, so that a plan made again after its moves is empty.

mod cluster;
mod hot;
mod rounds;
mod search;

#[cfg(test)]
mod tests;

pub use hot::{AT_A_TIME, BUSIEST, HOT_PERCENT, HotUsers, Isolation, UserLoad, isolate, isolate_told};
pub use rounds::Relocation;

use crate::{Bucket, ShardNo, UnknownName};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How far from its share a shard may be, in percent of the share.
pub const TOLERANCE_PERCENT: u8 = 10;

/// What is to be balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Bytes.
    Size,
    /// Load.
    Load,
}

impl By {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            By::Size => "size",
            By::Load => "load",
        }
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for By {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        [By::Size, By::Load].into_iter().find(|by| by.name() == text).ok_or_else(|| UnknownName(text.to_owned()))
    }
}

/// A shard that may hold buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which one.
    pub shard: ShardNo,
    /// How much it should hold beside the others; 0: nothing, it is being drained.
    pub weight: u32,
}

/// A bucket, without its users that are pinned elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Which one.
    pub bucket: Bucket,
    /// Where it is.
    pub shard: ShardNo,
    /// What moving it costs. Whatever is 0 counts as 1, so that empty buckets are spread, too.
    pub bytes: u64,
    /// Operations in some span of time, the same span for all. Whatever is 0 counts as 1.
    pub load: u64,
}

/// A user that is placed apart from its bucket. The planner counts it where it is, and leaves it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The user's bucket.
    pub bucket: Bucket,
    /// Where the user is.
    pub shard: ShardNo,
    /// The user's bytes.
    pub bytes: u64,
    /// The user's operations, in the span of [`Item::load`].
    pub load: u64,
}

/// A bucket that is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Which one.
    pub bucket: Bucket,
    /// Where it is.
    pub from: ShardNo,
    /// Where it should be.
    pub to: ShardNo,
    /// What goes over the wire.
    pub bytes: u64,
}

/// What a shard holds beside what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardShare {
    /// Which one.
    pub shard: ShardNo,
    /// Its weight.
    pub weight: u32,
    /// How many buckets are on it.
    pub buckets: u32,
    /// Bytes of its buckets and pinned users.
    pub bytes: u64,
    /// Load of its buckets and pinned users.
    pub load: u64,
    /// What it holds of what is balanced.
    pub held: u64,
    /// Its weight's share of what is balanced.
    pub share: u64,
    /// Whether that is near enough.
    pub within: bool,
}

impl ShardShare {
    /// How full it is: 1 is exactly its share. `None` for a shard that has no share.
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people: 53 bits are more than they read")]
    pub fn fill(&self) -> Option<f64> {
        (self.share > 0).then(|| self.held as f64 / self.share as f64)
    }
}

/// How near a plan comes to balance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reached {
    /// Every shard is within [`TOLERANCE_PERCENT`] of its share.
    Within,
    /// These are not, and no move of a bucket and no exchange of two would bring them nearer.
    AsNearAsPossible(Vec<OutOfBand>),
    /// There is more to do than the plan may move: planning again after it goes on.
    MaxMoves,
}

/// A shard that stays out of balance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfBand {
    /// Which one.
    pub shard: ShardNo,
    /// What keeps it there.
    pub why: Why,
}

/// What keeps a shard out of balance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The users that are pinned to it are too much by themselves.
    Pins,
    /// This bucket, with the pinned users, is too much by itself.
    Bucket(Bucket),
    /// Whole buckets do not come out even.
    WholeBuckets,
    /// Only what has to leave a drained shard moves.
    Stays,
}

/// What should move, and what comes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What is balanced.
    pub by: By,
    /// By bucket; each at most once.
    pub moves: Vec<Move>,
    /// The shards as they are, in the order that they were given in.
    pub before: Vec<ShardShare>,
    /// The shards as they will be.
    pub after: Vec<ShardShare>,
    /// How near that is.
    pub reached: Reached,
}

impl Plan {
    /// What goes over the wire in all.
    pub fn bytes(&self) -> u64 {
        self.moves.iter().fold(0, |sum, it| sum.saturating_add(it.bytes))
    }

    /// The moves as relocations, in rounds: in each, a shard is the source of at most one and the target of at most one.
    ///
    /// A round begins when the one before it has ended. The heaviest relocations go first, side by side.
    pub fn rounds(&self) -> Vec<Vec<Relocation>> {
        rounds::of(&self.moves)
    }
}

/// The fullest shard's part of its share: 1 is even. Shards without a share do not count; 1 where there is none.
pub fn skew(shares: &[ShardShare]) -> f64 {
    shares.iter().filter_map(ShardShare::fill).reduce(f64::max).unwrap_or(1.0)
}

/// Why nothing can be planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No shard has a weight.
    #[error("every shard has weight 0: there is nowhere to put a bucket")]
    NoRoom,
    /// A shard is named twice.
    #[error("shard {0} is named twice")]
    ShardTwice(ShardNo),
    /// Something is on a shard that was not named.
    #[error("bucket {bucket} has something on shard {shard}, which is not among the shards to plan for")]
    UnknownShard {
        /// The bucket.
        bucket: Bucket,
        /// Where it is, or a user of it.
        shard: ShardNo,
    },
    /// A bucket is named twice.
    #[error("bucket {0} is named twice")]
    BucketTwice(Bucket),
}

/// Plans the moves of one colocation group, or of both where they lie together.
///
/// `moves_max` bounds how many buckets move; where it binds, [`Reached::MaxMoves`] says so, and drained shards come
/// first. Takes time with buckets moved × (shards + buckets of a shard). Errors are mistakes in what was given.
pub fn plan(
    shards: &[Shard],
    items: &[Item],
    pins: &[Pin],
    by: By,
    moves_max: Option<usize>,
) -> Result<Plan, PlanError> {
    let mut cluster = cluster::Cluster::new(shards, items, pins, by)?;
    let before = cluster.shares();
    let is_complete = search::balance(&mut cluster, moves_max.unwrap_or(usize::MAX));
    let out = cluster.out_of_band();
    let reached = match (is_complete, out.is_empty()) {
        (false, _) => Reached::MaxMoves,
        (true, true) => Reached::Within,
        (true, false) => Reached::AsNearAsPossible(out),
    };
    Ok(Plan { by, moves: cluster.moves(), before, after: cluster.shares(), reached })
}
