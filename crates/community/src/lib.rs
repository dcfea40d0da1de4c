//! The community: users, names, sessions, threads and posts; what other databases hear of them; the directory.
//!
//! Every operation is a method of [`Community`]. A write is one fenced statement on its owner's shard; what it means for
//! other databases is in the same transaction's outbox, and is delivered at once, within a bounded wait, or by a relay.

mod audit;
mod authors;
pub mod bulk;
pub mod check;
mod columns;
mod community;
mod delivery;
mod eager;
mod error;
pub mod generate;
pub mod import;
mod lists;
mod maintenance;
mod names;
mod newest;
mod overview;
mod page;
mod passwords;
mod posts;
mod relay;
pub mod repair;
mod sessions;
mod settle;
mod text;
mod threads;
mod users;
mod wherever;
mod words;

pub use audit::{Actor, AuditEntry, AuditList};
pub use authors::Author;
pub use community::{Community, Seen, Written};
pub use error::{Error, Result};
pub use lists::{Listed, ThreadCard, ThreadOrder, UserCard};
pub use maintenance::Maintained;
pub use names::normalized_user_name;
pub use overview::{DirectoryStatus, OutboxStatus, Overview, ShardStatus, Standby, State};
pub use page::{Cursor, PagePost, ThreadPage};
pub use posts::{NewPost, Parent, Post, PostChange, PostType};
pub use relay::{Relayed, relay_rest};
pub use sessions::{NewSession, OpenSession, Session, SessionStatus};
pub use text::{Format, Moderation, json_fault};
pub use threads::{NewThread, Thread, ThreadChange};
pub use users::{Deleted, NewUser, Role, User, UserChange, UserList};
pub use wherever::{Found, Whereabouts};

/// Every statement of this crate on owned rows, by name.
#[doc(hidden)]
pub fn fenced_statements() -> Vec<(&'static str, shards::AnyFenced)> {
    [
        audit::fenced(),
        community::fenced(),
        delivery::fenced(),
        names::fenced(),
        page::fenced(),
        posts::fenced(),
        repair::claims::fenced(),
        repair::content::fenced(),
        repair::directory::fenced(),
        sessions::fenced(),
        threads::fenced(),
        users::fenced(),
        wherever::fenced(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
