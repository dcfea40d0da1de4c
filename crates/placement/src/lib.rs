//! Where a row lives: hash, buckets, ids, the states of ownership, and the planner.
//!
//! Everything here is pure: no I/O, and no clock but for the order of new ids. The rules come from the design:
//! `shard = placement[group][bucket]` and `bucket = hash(owner) mod 4096`, with PostgreSQL's own hash-partition
//! function, so that PostgreSQL, `postgres_fdw` and this crate agree without asking each other.

mod bucket;
mod id;
mod map;
mod ownership;
mod parts;
pub mod planner;

pub use bucket::{BUCKETS, Bucket, InvalidBucket, bucket_of};
pub use id::{AccountId, PostId, SessionId, TaskId, ThreadId, UserId, bucket_in, derived_id, new_id, tell_time};
pub use map::{Group, Layout, Map, Pins, Place, ShardNo, UnknownName, Whose};
pub use ownership::{Hint, Ownership, State};
pub use parts::in_parts;
