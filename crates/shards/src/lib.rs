//! Reach the right server: pools, the placement in force, fenced statements, fan-out, breakers.
//!
//! Nothing above this crate makes a connection. A statement on owned rows is a [`Read`], a [`Write`], a
//! [`ReadMany`], a [`ReadBuckets`] or a [`WriteMany`], each of which carries the fence in its SQL; bulk rows go through
//! [`Bulk`], which locks, checks, then copies. What touches only machinery is [`Unfenced`] and says why.

mod add_shard;
mod address;
mod admin;
mod breaker;
mod bucket_set;
mod bulk;
mod by_id;
mod catalog;
mod config;
mod directory;
mod doubt;
mod error;
mod fan_out;
mod fresh;
mod gathering;
mod init;
mod lanes;
mod late;
mod life;
mod listing;
mod load;
mod looks;
mod other_primaries;
mod owners;
mod pool;
mod reach;
mod remove_shard;
mod slot;
mod statement;
mod store;
mod together;

pub use add_shard::{AddPlan, Added, add_shard, look_at_shard, set_weight};
pub use address::{Hosts, passfile_line};
pub use admin::Admin;
pub use bucket_set::BucketSet;
pub use bulk::Bulk;
pub use catalog::{Catalog, FoundPlacement, ShardEntry};
pub use config::Config;
pub use directory::{Directory, InvalidToken, Token};
pub use error::{Database, Error, has_missed_publication};
pub use fan_out::{Item, Key, Many, Part};
pub use fresh::RolePasswords;
pub use gathering::Gathering;
pub use init::{InitPlan, Initialized, init};
pub use life::Life;
pub use listing::ShardListing;
pub use load::{HotUser, HotUsers};
pub use pool::Pool;
pub use remove_shard::{Gone, Removed, is_left_over, look_at_leaving, remove_shard, stay_gone};
pub use slot::SlotSnapshot;
#[doc(hidden)]
pub use statement::AnyFenced;
pub use statement::{Read, ReadBuckets, ReadMany, Unfenced, Write, WriteMany};
pub use store::{Said, Shards};

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;
