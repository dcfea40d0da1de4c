//! Ids that route themselves.
//!
//! Every id that therev makes, other than a user's, is a UUID of version 8: 48 bits of milliseconds, then the owner's
//! bucket in the 12 bits after the version, then 62 random bits. It sorts by time, and its bucket needs no look-up.

use crate::bucket::{Bucket, bucket_of};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};
use std::time::{Instant, SystemTime};
use uuid::{Builder, Uuid, Variant};

/// The latest time that an id holds, in the year 10889.
const MILLIS_MAX: u64 = (1 << 48) - 1;

/// A new id for a row of an owner in `bucket`, made now.
pub fn new_id(bucket: Bucket) -> Uuid {
    compose(bucket, millis_now(), rand::random())
}

/// The id of a row that another system made: the same for the same digest and time, whoever computes it.
pub fn derived_id(bucket: Bucket, created_at: DateTime<Utc>, digest: u64) -> Uuid {
    // Times before 1970 sort first: an id can hold no negative time.
    compose(bucket, u64::try_from(created_at.timestamp_millis()).unwrap_or(0), digest)
}

/// What the clock of the servers said last, in milliseconds since 1970, and when that was.
static TOLD: RwLock<Option<(u64, Instant)>> = RwLock::new(None);

/// Tells what time it is by the servers: new ids go by that from now on. This node's own clock may be wrong by years, or
/// jump; rows would be listed in another order than the one in which they were made.
pub fn tell_time(now: DateTime<Utc>) {
    let millis = u64::try_from(now.timestamp_millis()).unwrap_or(0);
    *TOLD.write().unwrap_or_else(PoisonError::into_inner) = Some((millis, Instant::now()));
}

fn millis_now() -> u64 {
    let told = *TOLD.read().unwrap_or_else(PoisonError::into_inner);
    match told {
        Some((millis, at)) => millis.saturating_add(u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)),
        None => millis_by_own_clock(),
    }
}

/// Nothing but the order of ids hangs on it: where no server has been asked yet, it will do. The clocks of `uuid` and
/// `chrono` panic before 1970, where a board without a battery begins.
#[expect(clippy::disallowed_methods, reason = "the one place that asks this clock")]
fn millis_by_own_clock() -> u64 {
    millis_since_1970(SystemTime::now())
}

fn millis_since_1970(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn compose(bucket: Bucket, millis: u64, low: u64) -> Uuid {
    let millis = millis.min(MILLIS_MAX);
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
                $name(new_id(owner.bucket()))
            }
        }
    )*};
}

owned_ids! { ThreadId PostId SessionId AccountId TaskId }

impl UserId {
    /// A new user's id (version 7: sorts by time; it routes by its hash).
    #[expect(clippy::new_without_default, reason = "each call makes another id; a default would be one value")]
    pub fn new() -> Self {
        UserId(Builder::from_unix_timestamp_millis(millis_now().min(MILLIS_MAX), &rand::random()).into_uuid())
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
    use std::time::Duration;

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
            let at = |millis| derived_id(bucket, DateTime::from_timestamp_millis(millis).unwrap(), rand::random());
            prop_assert!(at(a) < at(b));
        }

        #[test]
        fn any_clock_has_a_time_for_an_id(seconds: i64, nanos in 0_u32..1_000_000_000, bucket in 0_u16..4096) {
            let bucket = Bucket::try_from(bucket).unwrap();
            let (since, epoch) = (Duration::new(seconds.unsigned_abs(), nanos), SystemTime::UNIX_EPOCH);
            let at = if seconds < 0 { epoch.checked_sub(since) } else { epoch.checked_add(since) };
            let millis = at.map_or(0, millis_since_1970);
            prop_assert!(seconds >= 0 || millis == 0);
            let id = compose(bucket, millis, 0);
            prop_assert_eq!(bucket_in(id), Some(bucket));
            prop_assert_eq!(u64::try_from(id.as_u128() >> 80).unwrap(), millis.min(MILLIS_MAX));
        }

        #[test]
        fn other_systems_ids_carry_no_bucket(bits: u128) {
            let v4 = Builder::from_random_bytes(bits.to_be_bytes()).into_uuid();
            prop_assert_eq!(bucket_in(v4), None);
        }
    }
}
