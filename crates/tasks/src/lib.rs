//! AI accounts and AI tasks of a user, on the user's shard.
//!
//! Every operation is a method of [`Tasks`]. Everything of a user is on one shard, so each is one fenced statement,
//! the task's log row and the audit's entry included.

mod accounts;
mod audit;
mod check;
mod tasks;
mod write;

pub use accounts::{Account, AccountStatus, AccountType, NewAccount, Provider};
pub use tasks::{LogLevel, NewTask, Task, TaskLogEntry, TaskStatus, TaskType};

use community::Community;

/// AI accounts and AI tasks in one cluster. Cheap to clone.
#[derive(Clone)]
pub struct Tasks {
    community: Community,
}

impl Tasks {
    /// Opens them beside the community of the same cluster.
    pub fn new(community: Community) -> Tasks {
        Tasks { community }
    }
}

/// Every statement of this crate on owned rows, by name.
#[doc(hidden)]
pub fn fenced_task_statements() -> Vec<(&'static str, shards::AnyFenced)> {
    [accounts::fenced(), tasks::fenced()].into_iter().flatten().collect()
}
