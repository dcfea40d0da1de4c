//! The one way rows move from shard to shard.
//!
//! A relocation is a row in the control database and a part on each of its two shards. It goes through these states, each
//! of which any process may carry on after another one died:
//!
//! `planned → copying → catching_up → verified → switching → switched → finishing → done` (or `aborted`, `reversed`)
//!
//! What a shard may do with the buckets is decided on that shard alone (`schema/shard/08_relocation.sql`): a worker that
//! only slept finds that its step changes nothing. The lease in the control database merely keeps two workers from doing the
//! same work.

mod beats;
mod copy;
mod ending;
mod error;
mod finish;
mod lost;
mod mover;
mod objects;
mod pins;
mod plan;
mod rebalance;
mod record;
mod side;
mod survey;
mod switch;
mod throttle;
mod tries;
mod verify;
mod work;

pub use ending::Ending;
pub use error::{Error, Result};
pub use mover::{Mover, Options};
pub use plan::{Obstacle, Plan, Request};
pub use rebalance::{Aim, Part, Rebalance, Step};
pub use record::{Goal, Relocation, State};
pub use tries::Try;
pub use verify::Difference;
