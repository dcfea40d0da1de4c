//! PostgreSQL servers on this machine: start, look after, stop.
//!
//! [`Cluster::up`] compares what should run with what runs, and makes, starts or rebuilds what is missing, so it
//! needs no memory of what went wrong before: a first start, a second one and one after `kill -9` are the same call.
//!
//! - One server per shard, with the database `therev_shard_<n>`; server 0 also has `therev_control` and
//!   `therev_directory`, and streams to any number of replicas.
//! - Each shard may have standbys. [`Cluster::promote`] puts one of them in its primary's place; which one it is now is
//!   remembered in `cluster.json`, and addresses name all of a shard's servers, so that they stay the same.
//! - Everything lies in one folder: `cluster.json` (mode 0600: it holds the superuser's password), `lock`, and
//!   `servers/` with data, logs and sockets. Servers never run as root: started by root they run as `postgres`, and
//!   where `postgres` may not enter the folder, `servers/` is `/var/lib/therev-<hash>` instead.
//! - Nothing here knows what is in the databases, and nothing else knows that servers are local.
//!
//! The crate reads no environment, prints nothing and is synchronous: starting servers is waiting for processes.

mod account;
mod addresses;
mod binaries;
mod cluster;
mod error;
mod id;
mod options;
mod place;
mod ports;
mod process;
mod replica;
mod running;
mod server;
mod settings;
mod side_by_side;
mod sql;
mod state;

pub use addresses::Addresses;
pub use cluster::{Cluster, Promoted};
pub use error::Error;
pub use id::ServerId;
pub use options::Options;
pub use server::{ServerState, ServerStatus};
