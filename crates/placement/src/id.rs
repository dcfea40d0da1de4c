//! Ids that route themselves.
//!
//! Every id that therev makes, other than a user's, is a UUID of version 8: 48 bits of milliseconds, then the owner's
//! bucket in the 12 bits after the version, then 62 random bits. It sorts by time, and its bucket needs no look-up.

use crate::bucket::{Bucket, bucket_of};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::{Builder, Uuid, Variant};

/// A new id for a row of an owner in `bucket`, made at `now`.
pub fn new_id(bucket: Bucket, now: DateTime<Utc>) -> Uuid {
    compose(bucket, now, rand::random())
}

/// The id of a row that another system made: the same for the same digest and time, whoever computes it.
pub fn derived_id(bucket: Bucket, created_at: DateTime<Utc>, digest: u64) -> Uuid {
    compose(bucket, created_at, digest)
}

fn compose(bucket: Bucket, at: DateTime<Utc>, low: u64) -> Uuid {
    // Times before 1970 sort first: an id can hold no negative time.
    let millis = u64::try_from(at.timestamp_millis()).unwrap_or(0);
    let mut bytes = [0_u8; 16];
    bytes[..6].copy_from_slice(&millis.to_be_bytes()[2..]);
    bytes[6..8].copy_from_slice(&bucket.number().to_be_bytes());
    bytes[8..].copy_from_slice(&low.to_be_bytes());
    Builder::from_custom_bytes(bytes).into_uuid()
}

/// The owner's bucket that a version 8 id carries; `None` for an id that some other system made.
pub fn bucket_in(id: Uuid) -> Option<Bucket> {
    let bytes = id.as_bytes();
    let ours = id.get_version_num() == 8 && id.get_variant() == Variant::RFC4122;
    ours.then(|| Bucket::low_bits(u64::from(u16::from_be_bytes([bytes[6], bytes[7]]) & 0x0fff)))
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse().map($name)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                $name(id)
            }
        }
    )*};
}

ids! {
    /// A user: the owner, whose bucket is the hash of this id.
    UserId
    /// A thread, owned by its author.
    ThreadId
    /// A post, owned by its author.
    PostId
    /// A session of a user.
    SessionId
    /// An AI account of a user.
    AccountId
    /// An AI task of a user.
    TaskId
}

macro_rules! owned_ids {
    ($($name:ident)*) => {$(
        impl $name {
            /// A new id for a row of `owner`, made now.
            pub fn new(owner: UserId) -> Self {
                $name(new_id(owner.bucket(), Utc::now()))
            }
        }
    )*};
}

owned_ids! { ThreadId PostId SessionId AccountId TaskId }

impl UserId {
    /// A new user's id (version 7: sorts by time; it routes by its hash).
    #[expect(clippy::new_without_default, reason = "each call makes another id; a default would be one value")]
    pub fn new() -> Self {
        UserId(Uuid::now_v7())
    }

    /// The bucket of this user and of everything that it owns.
    pub fn bucket(self) -> Bucket {
        bucket_of(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_carries_its_owners_bucket_and_time(owner: u128, millis in 0_i64..281_474_976_710_655, low: u64) {
            let owner = UserId(Uuid::from_u128(owner));
            let at = DateTime::from_timestamp_millis(millis).unwrap();
            let id = derived_id(owner.bucket(), at, low);
            prop_assert_eq!(bucket_in(id), Some(owner.bucket()));
            prop_assert_eq!(i64::try_from(id.as_u128() >> 80).unwrap(), millis);
            prop_assert_eq!(id, derived_id(owner.bucket(), at, low));
        }

        #[test]
        fn an_id_of_any_time_carries_its_bucket(bucket in 0_u16..4096, seconds: i64, low: u64) {
            let bucket = Bucket::try_from(bucket).unwrap();
            if let Some(at) = DateTime::from_timestamp(seconds % 10_000_000_000_000, 0) {
                prop_assert_eq!(bucket_in(derived_id(bucket, at, low)), Some(bucket));
            }
        }

        #[test]
        fn any_text_is_an_id_or_an_error(
            text in prop_oneof![any::<String>(), "[0-9a-fA-F]{30,34}", "(urn:uuid:|\\{)?([0-9a-f]{4,8}-?){4,8}\\}?"],
        ) {
            if let Ok(id) = text.parse::<PostId>() {
                prop_assert_eq!(id.to_string().parse::<PostId>().unwrap(), id);
                let bucket = bucket_in(id.0).unwrap_or_else(|| bucket_of(id.0));
                prop_assert!(Bucket::try_from(bucket.sql()) == Ok(bucket));
            }
        }

        #[test]
        fn ids_sort_by_time(bucket in 0_u16..4096, a in 0_i64..1 << 46, later in 1_i64..1 << 46) {
            let b = a + later;
            let bucket = Bucket::try_from(bucket).unwrap();
            let at = |millis| new_id(bucket, DateTime::from_timestamp_millis(millis).unwrap());
            prop_assert!(at(a) < at(b));
        }

        #[test]
        fn other_systems_ids_carry_no_bucket(bits: u128) {
            let v4 = Builder::from_random_bytes(bits.to_be_bytes()).into_uuid();
            prop_assert_eq!(bucket_in(v4), None);
        }
    }
}
