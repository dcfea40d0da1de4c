//! The hash: PostgreSQL's hash-partition function over a UUID, reduced to 4096 classes.

use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// How many buckets there are; the unit of placement is one of them.
pub const BUCKETS: u16 = 4096;

/// `HASH_PARTITION_SEED` of PostgreSQL.
const SEED: u64 = 0x7A5B_2236_7996_DCFD;
/// What PostgreSQL's `hash_combine64` adds for the first (and here only) key column, starting from zero.
const COMBINE: u64 = 0x49a0_f4dd_15e5_a8e3;

/// One of the 4096 hash classes of an owner's id; first column of every owned table's key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Bucket(u16);

/// A number that is no bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no bucket: they go from 0 to 4095")]
pub struct InvalidBucket(pub i64);

impl Bucket {
    /// The bucket's number, 0 to 4095.
    pub fn number(self) -> u16 {
        self.0
    }

    /// As PostgreSQL's `smallint`.
    pub fn sql(self) -> i16 {
        self.0.cast_signed()
    }

    /// As an index into a table of 4096.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All buckets in order.
    pub fn all() -> impl Iterator<Item = Bucket> {
        (0..BUCKETS).map(Bucket)
    }

    pub(crate) fn low_bits(bits: u64) -> Bucket {
        Bucket(u16::try_from(bits % u64::from(BUCKETS)).unwrap_or(0))
    }
}

impl TryFrom<i16> for Bucket {
    type Error = InvalidBucket;

    fn try_from(number: i16) -> Result<Self, InvalidBucket> {
        match u16::try_from(number) {
            Ok(n) if n < BUCKETS => Ok(Bucket(n)),
            _ => Err(InvalidBucket(number.into())),
        }
    }
}

impl TryFrom<u16> for Bucket {
    type Error = InvalidBucket;

    fn try_from(number: u16) -> Result<Self, InvalidBucket> {
        if number < BUCKETS { Ok(Bucket(number)) } else { Err(InvalidBucket(number.into())) }
    }
}

impl From<Bucket> for u16 {
    fn from(bucket: Bucket) -> u16 {
        bucket.0
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bucket {}", self.0)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The bucket of a key: the remainder of PostgreSQL's hash partitioning with modulus 4096.
///
/// The same as `therev.bucket_of(uuid)` in SQL.
pub fn bucket_of(key: Uuid) -> Bucket {
    Bucket::low_bits(hash_bytes_extended(key.as_bytes(), SEED).wrapping_add(COMBINE))
}

/// Bob Jenkins' lookup3 as PostgreSQL's `hash_bytes_extended` computes it, for exactly 16 bytes.
fn hash_bytes_extended(key: &[u8; 16], seed: u64) -> u64 {
    let word = |at: usize| u32::from_le_bytes([key[at], key[at + 1], key[at + 2], key[at + 3]]);
    let start = 0x9e37_79b9_u32.wrapping_add(16).wrapping_add(3_923_095);
    let mut state = [start; 3];
    if seed != 0 {
        // The seed is mixed in as if it were two words of data.
        state[0] = state[0].wrapping_add(high_half(seed));
        state[1] = state[1].wrapping_add(low_half(seed));
        mix(&mut state);
    }
    for (part, at) in state.iter_mut().zip([0, 4, 8]) {
        *part = part.wrapping_add(word(at));
    }
    mix(&mut state);
    state[0] = state[0].wrapping_add(word(12));
    finish(&mut state);
    (u64::from(state[1]) << 32) | u64::from(state[2])
}

fn high_half(value: u64) -> u32 {
    u32::try_from(value >> 32).unwrap_or(0)
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// lookup3's `mix`: reversible, so that no information of earlier words is lost.
fn mix([a, b, c]: &mut [u32; 3]) {
    *a = a.wrapping_sub(*c) ^ c.rotate_left(4);
    *c = c.wrapping_add(*b);
    *b = b.wrapping_sub(*a) ^ a.rotate_left(6);
    *a = a.wrapping_add(*c);
    *c = c.wrapping_sub(*b) ^ b.rotate_left(8);
    *b = b.wrapping_add(*a);
    *a = a.wrapping_sub(*c) ^ c.rotate_left(16);
    *c = c.wrapping_add(*b);
    *b = b.wrapping_sub(*a) ^ a.rotate_left(19);
    *a = a.wrapping_add(*c);
    *c = c.wrapping_sub(*b) ^ b.rotate_left(4);
    *b = b.wrapping_add(*a);
}

/// lookup3's `final`: every bit of the input reaches every bit of the result.
fn finish([a, b, c]: &mut [u32; 3]) {
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(14));
    *a = (*a ^ *c).wrapping_sub(c.rotate_left(11));
    *b = (*b ^ *a).wrapping_sub(a.rotate_left(25));
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(16));
    *a = (*a ^ *c).wrapping_sub(c.rotate_left(4));
    *b = (*b ^ *a).wrapping_sub(a.rotate_left(14));
    *c = (*c ^ *b).wrapping_sub(b.rotate_left(24));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_key_has_a_bucket_and_its_numbers_lead_back(key: u128) {
            let bucket = bucket_of(Uuid::from_u128(key));
            prop_assert_eq!(Bucket::try_from(bucket.number()), Ok(bucket));
            prop_assert_eq!(Bucket::try_from(bucket.sql()), Ok(bucket));
        }

        #[test]
        fn any_number_is_a_bucket_or_an_error(number: i16) {
            let read = Bucket::try_from(number).map(Bucket::sql);
            prop_assert_eq!(read.ok(), (0..4096).contains(&number).then_some(number));
        }
    }

    #[test]
    fn vectors_of_the_design() {
        for (key, bucket) in [
            ("00000000-0000-4000-8000-000000000001", 2609),
            ("018f3c5e-7b2a-7000-8000-00000000abcd", 3483),
            ("ffffffff-ffff-ffff-ffff-ffffffffffff", 3457),
        ] {
            assert_eq!(bucket_of(key.parse().unwrap()).number(), bucket, "{key}");
        }
    }

    #[test]
    fn only_4096_numbers_are_buckets() {
        assert!(Bucket::try_from(4095_i16).is_ok());
        assert_eq!(Bucket::try_from(4096_i16), Err(InvalidBucket(4096)));
        assert_eq!(Bucket::try_from(-1_i16), Err(InvalidBucket(-1)));
        assert_eq!(Bucket::all().count(), 4096);
    }
}
