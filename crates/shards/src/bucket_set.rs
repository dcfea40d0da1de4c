//! Some of the 4096 buckets, as SQL takes and gives them: a bit each.

use bytes::{BufMut, BytesMut};
use placement::Bucket;
use std::error::Error;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

const BYTES: usize = 4096 / 8;

/// A set of buckets; in SQL `bit(4096)` or `varbit`.
#[derive(Clone, PartialEq, Eq)]
pub struct BucketSet(Box<[u8; BYTES]>);

impl Default for BucketSet {
    fn default() -> BucketSet {
        BucketSet::empty()
    }
}

impl BucketSet {
    /// No bucket.
    pub fn empty() -> BucketSet {
        BucketSet(Box::new([0; BYTES]))
    }

    /// Every bucket.
    pub fn all() -> BucketSet {
        BucketSet(Box::new([u8::MAX; BYTES]))
    }

    /// Adds a bucket.
    pub fn insert(&mut self, bucket: Bucket) {
        let (byte, bit) = place(bucket);
        self.0[byte] |= bit;
    }

    /// Whether a bucket is in it.
    pub fn contains(&self, bucket: Bucket) -> bool {
        let (byte, bit) = place(bucket);
        self.0[byte] & bit != 0
    }

    /// The buckets in it, least first.
    pub fn iter(&self) -> impl Iterator<Item = Bucket> + '_ {
        // Mostly a few of them, or all: what eight at a time are none of is passed over at once.
        let eights = self.0.iter().zip(0_i16..).filter(|(byte, _)| **byte != 0);
        let buckets =
            eights.flat_map(|(_, eight)| (8 * eight..8 * eight + 8).filter_map(|it| Bucket::try_from(it).ok()));
        buckets.filter(|bucket| self.contains(*bucket))
    }
}

/// PostgreSQL counts bits from the left.
fn place(bucket: Bucket) -> (usize, u8) {
    (bucket.index() / 8, 0b1000_0000 >> (bucket.index() % 8))
}

impl Extend<Bucket> for BucketSet {
    fn extend<T: IntoIterator<Item = Bucket>>(&mut self, buckets: T) {
        buckets.into_iter().for_each(|bucket| self.insert(bucket));
    }
}

impl FromIterator<Bucket> for BucketSet {
    fn from_iter<T: IntoIterator<Item = Bucket>>(buckets: T) -> BucketSet {
        let mut set = BucketSet::empty();
        set.extend(buckets);
        set
    }
}

impl std::fmt::Debug for BucketSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl ToSql for BucketSet {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i32(i32::try_from(BYTES * 8)?);
        out.put_slice(&*self.0);
        Ok(IsNull::No)
    }

    fn accepts(of: &Type) -> bool {
        matches!(*of, Type::BIT | Type::VARBIT)
    }

    to_sql_checked!();
}

impl FromSql<'_> for BucketSet {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<BucketSet, Box<dyn Error + Sync + Send>> {
        let bits = raw.strip_prefix(&i32::try_from(BYTES * 8)?.to_be_bytes()).ok_or("these are not 4096 bits")?;
        Ok(BucketSet(Box::new(bits.try_into()?)))
    }

    fn accepts(of: &Type) -> bool {
        <BucketSet as ToSql>::accepts(of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_holds_what_was_put_in_and_survives_the_way_to_sql(numbers: BTreeSet<[u8; 2]>) {
            let buckets: BTreeSet<Bucket> = numbers.iter().map(|n| u16::from_be_bytes(*n) % 4096)
                .map(|n| Bucket::try_from(n).unwrap()).collect();
            let set: BucketSet = buckets.iter().copied().collect();
            prop_assert!(set.iter().eq(buckets.iter().copied()));
            prop_assert!(Bucket::all().all(|bucket| set.contains(bucket) == buckets.contains(&bucket)));
            let mut sent = BytesMut::new();
            set.to_sql(&Type::VARBIT, &mut sent).unwrap();
            prop_assert_eq!(BucketSet::from_sql(&Type::BIT, &sent).unwrap(), set);
        }

        #[test]
        fn any_bytes_are_a_set_or_an_error(count in prop_oneof![Just(4096_u32), any::<u32>()], length in 510_usize..515) {
            let sent = [count.to_be_bytes().as_slice(), &vec![7; length]].concat();
            prop_assert_eq!(BucketSet::from_sql(&Type::BIT, &sent).is_ok(), (count, length) == (4096, 512));
        }
    }

    #[test]
    fn all_are_in_the_whole_set() {
        assert_eq!(BucketSet::all(), Bucket::all().collect());
        assert_eq!(BucketSet::empty().iter().count(), 0);
    }
}
