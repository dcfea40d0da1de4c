//! **therev**: plain PostgreSQL servers as one store for a community in which every person owns several AI accounts.
//!
//! [`connect`] opens a cluster; everything else is a method of what it returns. Every call goes to the shard that owns the
//! rows, has a deadline, and fails with a typed [`Error`]. A create takes an id that the caller may choose, so that a
//! retry is the same create.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use therev::{Actor, Config, NewPost, NewThread, NewUser};
//!
//! // Connect: the control database says where everything else is.
//! let therev = therev::connect(Config::new("postgresql://therev:secret@127.0.0.1:5432/therev_control")).await?;
//!
//! // Register: the name is unique across all shards.
//! let ada = NewUser { user_name: "ada".into(), ..NewUser::default() };
//! let ada = therev.register(ada, &Actor::Operator("example".into())).await?;
//!
//! // Post: the thread lies on its author's shard, each reply on its own author's.
//! let thread = therev.create_thread(NewThread::new(ada.user_id, "First thread", "Hello.")).await?;
//! therev.create_post(NewPost::new(ada.user_id, thread.thread_id, "And a reply.")).await?;
//!
//! // Read a page: only the shards that hold posts of this thread are asked.
//! let page = therev.thread_page(thread.thread_id, None, 50).await?;
//! for item in &page.posts {
//!     println!("{}: {}", item.author.user_name.as_deref().unwrap_or("?"), item.post.body.as_deref().unwrap_or(""));
//! }
//!
//! // See your own write in the directory's lists, on a replica or not.
//! let newest = therev.threads(therev::ThreadOrder::Newest, None, 10, Some(&thread.seen)).await?;
//! assert_eq!(newest.items[0].thread_id, thread.thread_id);
//! # Ok(())
//! # }
//! ```
//!
//! The same as programs that run: `examples/` of this crate.

pub use community::*;
pub use placement::{
    AccountId, Bucket, Group, Layout, Map, Place, PostId, SessionId, ShardNo, TaskId, ThreadId, UserId, bucket_of,
    planner,
};
pub use schema::Kind as DatabaseKind;
pub use secrecy::{ExposeSecret, SecretString};
pub use shards::{
    AddPlan, Added, Admin, AnyFenced, BucketSet, Config, Database, Error as StoreError, FoundPlacement, Hosts,
    InitPlan, Initialized, Removed, RolePasswords, ShardListing, Shards, Token, add_shard, init, is_left_over,
    look_at_leaving, look_at_shard, passfile_line, remove_shard, set_weight, stay_gone,
};
pub use tasks::*;

/// Moving rows between shards: the operator's, by role `therev_mover`.
pub use relocation;

use std::ops::Deref;

/// A cluster, opened: the community's operations by dereference, the AI accounts' and tasks' by [`Therev::tasks`].
#[derive(Clone)]
pub struct Therev {
    community: Community,
    tasks: Tasks,
}

/// Opens a cluster.
pub async fn connect(config: Config) -> Result<Therev> {
    let community = Community::new(Shards::connect(config).await?);
    Ok(Therev { tasks: Tasks::new(community.clone()), community })
}

impl Therev {
    /// AI accounts and AI tasks.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }
}

impl Deref for Therev {
    type Target = Community;

    fn deref(&self) -> &Community {
        &self.community
    }
}
