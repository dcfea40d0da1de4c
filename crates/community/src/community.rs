//! The handle on the community, and what every write of it has in common.

use crate::delivery::Acks;
use crate::eager::Eager;
use crate::error::{Error, Result};
use crate::names::ClaimsLookedAt;
use crate::page::Remembered;
use placement::{Bucket, Group, ShardNo, UserId, Whose, bucket_in};
use serde::Serialize;
use shards::{Read, Shards, Token};
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::Semaphore;
use uuid::Uuid;

/// How many sessions' last uses a node notes at once.
const TOUCHES_MAX: usize = 4;

/// The community in one cluster, as one node sees it. Cheap to clone.
#[derive(Clone)]
pub struct Community {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) shards: Shards,
    pub(crate) acks: Acks,
    pub(crate) eager: Eager,
    pub(crate) remembered: Remembered,
    pub(crate) claims_looked_at: ClaimsLookedAt,
    /// Sessions whose last use is being noted.
    pub(crate) touches: Arc<Semaphore>,
}

/// A value, and what a reader must have seen to find it in the directory.
#[derive(Debug, Clone, Serialize)]
pub struct Written<T> {
    /// What was written.
    #[serde(flatten)]
    pub value: T,
    /// Give it to the directory's lists to see your own write there.
    pub seen: Seen,
}

impl<T> Deref for Written<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// What a reader has written or seen: opaque in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The directory had come this far.
    Position(Token),
    /// The write had not reached the directory in time; it waits among the events of this bucket in the outbox of the shard that had the
    /// bucket then.
    Pending(Group, Bucket, ShardNo),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seen::Position(token) => token.fmt(f),
            Seen::Pending(group, bucket, shard) => write!(f, "{group}-{bucket}-{shard}"),
        }
    }
}

impl FromStr for Seen {
    type Err = shards::InvalidToken;

    fn from_str(text: &str) -> std::result::Result<Self, shards::InvalidToken> {
        let Some((group, place)) = text.split_once('-') else { return text.parse().map(Seen::Position) };
        let (bucket, shard) = place.split_once('-').ok_or(shards::InvalidToken)?;
        let bucket = bucket.parse::<u16>().ok().and_then(|number| Bucket::try_from(number).ok());
        let shard = shard.parse::<i16>().ok().filter(|number| *number >= 0).map(ShardNo);
        match (group.parse(), bucket, shard) {
            (Ok(group), Some(bucket), Some(shard)) => Ok(Seen::Pending(group, bucket, shard)),
            _ => Err(shards::InvalidToken),
        }
    }
}

impl Serialize for Seen {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The owner of an id that another system made.
static ID_ROUTE: Read =
    Read::new(Group::Account, "SELECT r.owner_id FROM therev.id_routes AS r WHERE r.bucket = $1 AND r.id = $2");

crate::fenced_list! { ID_ROUTE }

impl Community {
    /// Opens the community of a cluster. With `relay_ms` in the configuration this node also delivers what others left
    /// behind, for as long as a clone of the handle lives.
    pub fn new(shards: Shards) -> Community {
        let inner = Inner {
            shards,
            acks: Acks::default(),
            eager: Eager::default(),
            remembered: Remembered::default(),
            claims_looked_at: ClaimsLookedAt::default(),
            touches: Arc::new(Semaphore::new(TOUCHES_MAX)),
        };
        let community = Community { inner: Arc::new(inner) };
        community.start_relay();
        community
    }

    /// The shards below.
    pub fn shards(&self) -> &Shards {
        &self.inner.shards
    }

    /// The bucket of a row by its id alone: the id says it, or the route of an id that another system made does.
    pub async fn route(&self, what: &'static str, id: Uuid) -> Result<Bucket> {
        if let Some(bucket) = bucket_in(id) {
            return Ok(bucket);
        }
        self.routed_owner(id).await?.map(UserId::bucket).ok_or_else(|| Error::not_found(what, id))
    }

    /// The owner that `id_routes` names for an id.
    pub(crate) async fn routed_owner(&self, id: Uuid) -> Result<Option<UserId>> {
        let rows = self.shards().read(&ID_ROUTE, placement::bucket_of(id), &[&id]).await?;
        Ok(rows.first().map(|row| UserId(row.get("owner_id"))))
    }

    /// The shard that somebody's rows were found on last.
    pub(crate) fn shard_of(&self, group: Group, whose: impl Into<Whose>) -> ShardNo {
        self.shards().believed_shard(group, whose)
    }

    /// An id that the caller chose must carry its owner's bucket, or nobody would find the row again.
    pub fn check_id(id: Uuid, owner: UserId) -> Result<()> {
        if bucket_in(id) == Some(owner.bucket()) {
            Ok(())
        } else {
            Err(Error::invalid("id", format!("{id} does not carry the bucket of user {owner}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_seen_survives_text(
            text in "[0-9a-f]{48}", content: bool, bucket in 0_u16..4096, shard in 0_i16..256,
        ) {
            let group = if content { Group::Content } else { Group::Account };
            let pending = Seen::Pending(group, Bucket::try_from(bucket).unwrap(), ShardNo(shard));
            prop_assert_eq!(pending.to_string().parse::<Seen>().unwrap(), pending);
            let position: Seen = text.parse().unwrap();
            prop_assert_eq!(position.to_string(), text);
        }

        #[test]
        fn any_text_is_something_seen_or_an_error(
            text in prop_oneof![any::<String>(), "(account|content)-[0-9]{0,6}(-[0-9]{0,6})?", "[0-9a-fA-F-]{30,60}"],
        ) {
            if let Ok(seen) = text.parse::<Seen>() {
                prop_assert_eq!(seen.to_string().parse::<Seen>().unwrap(), seen);
            }
        }
    }
}
