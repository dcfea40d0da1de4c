//! AI accounts and AI tasks of a user, on the user's shard.

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
