//! The placement: which shard holds which bucket of which group, as far as one node knows.

use crate::bucket::Bucket;
use crate::id::UserId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The number of a shard, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardNo(pub i16);

impl fmt::Display for ShardNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A word that is none of a closed list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not known here")]
pub struct UnknownName(pub String);

/// Tables that always move together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Users, their sessions, AI accounts and tasks with their logs, the audit log; names and routes too.
    Account,
    /// Threads, posts and what is counted of them.
    Content,
}

impl Group {
    /// Both groups.
    pub const ALL: [Group; 2] = [Group::Account, Group::Content];

    /// Its name in SQL and everywhere else.
    pub const fn name(self) -> &'static str {
        match self {
            Group::Account => "account",
            Group::Content => "content",
        }
    }

    fn index(self) -> usize {
        match self {
            Group::Account => 0,
            Group::Content => 1,
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Group {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        Group::ALL.into_iter().find(|g| g.name() == text).ok_or_else(|| UnknownName(text.to_owned()))
    }
}

/// How the groups lie on the shards at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// A user's rows of every kind on one shard, over all shards.
    Colocated,
    /// `account` on shard 0, `content` on the others by author.
    Split,
}

impl Layout {
    /// Its name in SQL and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Colocated => "colocated",
            Layout::Split => "split",
        }
    }

    /// The shard that holds a bucket before anything was ever moved.
    ///
    /// With 4 shards, colocated, this is exactly `hash(key) % shard_count`.
    pub fn first_shard(self, group: Group, bucket: Bucket, shards: u16) -> ShardNo {
        let number = match (self, group) {
            (Layout::Colocated, _) => bucket.number() % shards.max(1),
            (Layout::Split, Group::Account) => 0,
            (Layout::Split, Group::Content) => 1 + bucket.number() % shards.saturating_sub(1).max(1),
        };
        ShardNo(number.cast_signed())
    }
}

impl FromStr for Layout {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        match text {
            "colocated" => Ok(Layout::Colocated),
            "split" => Ok(Layout::Split),
            other => Err(UnknownName(other.to_owned())),
        }
    }
}

/// Where a bucket is believed to be, and since which epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The shard.
    pub shard: ShardNo,
    /// The epoch in which it became the owner; 0 for a guess.
    pub epoch: i64,
}

/// Whose rows are meant: a user's, or those of a bucket whoever they are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Whose {
    /// The bucket.
    pub bucket: Bucket,
    /// The user; absent where only the bucket is known, and of rows that are no user's.
    pub user: Option<UserId>,
}

impl From<Bucket> for Whose {
    fn from(bucket: Bucket) -> Whose {
        Whose { bucket, user: None }
    }
}

impl From<UserId> for Whose {
    fn from(user: UserId) -> Whose {
        Whose { bucket: user.bucket(), user: Some(user) }
    }
}

/// Users placed apart from their buckets, by group and bucket.
pub type Pins = BTreeMap<(Group, Bucket), BTreeMap<UserId, Place>>;

/// A node's belief of where every bucket is, and who is placed apart. It may be wrong: the shards decide, and their hints mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    places: [Vec<Place>; 2],
    pins: Pins,
}

impl Map {
    /// The placement before anything was moved, held as a guess (epoch 0) that every hint outranks.
    pub fn first(layout: Layout, shards: u16) -> Map {
        let guess =
            |group| Bucket::all().map(|b| Place { shard: layout.first_shard(group, b, shards), epoch: 0 }).collect();
        Map { places: Group::ALL.map(guess), pins: Pins::new() }
    }

    /// Where this node believes a bucket to be.
    pub fn place(&self, group: Group, bucket: Bucket) -> Place {
        self.places[group.index()][bucket.index()]
    }

    /// Where this node believes somebody's rows to be.
    pub fn place_of(&self, group: Group, whose: Whose) -> Place {
        let pin = whose.user.and_then(|user| self.pins.get(&(group, whose.bucket))?.get(&user));
        pin.copied().unwrap_or_else(|| self.place(group, whose.bucket))
    }

    /// Whether anybody is placed apart, as far as this node knows.
    pub fn has_pins(&self) -> bool {
        !self.pins.is_empty()
    }

    /// Whether anybody of this bucket is.
    pub fn has_pins_of(&self, group: Group, bucket: Bucket) -> bool {
        self.has_pins() && self.pins.contains_key(&(group, bucket))
    }

    /// Who is placed apart.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Who of a bucket is placed apart, and where.
    pub fn pins_of(&self, group: Group, bucket: Bucket) -> impl Iterator<Item = (UserId, Place)> + '_ {
        self.pins.get(&(group, bucket)).into_iter().flatten().map(|(user, place)| (*user, *place))
    }

    /// Notes where a user is, if placed apart. The last word counts: not everybody who tells of it knows the epoch.
    pub fn learn_pin(&mut self, group: Group, user: UserId, place: Option<Place>) {
        let users = self.pins.entry((group, user.bucket())).or_default();
        match place {
            Some(place) => users.insert(user, place),
            None => users.remove(&user),
        };
        self.pins.retain(|_, users| !users.is_empty());
    }

    /// Notes who is placed apart, all of them.
    pub fn learn_pins(&mut self, pins: Pins) {
        self.pins = pins;
    }

    /// Notes what a shard or the control database said; an older epoch changes nothing.
    ///
    /// The same epoch does: one epoch has one owner, so a different shard in the same epoch means that this belief was
    /// wrong from the start. Says whether anything changed.
    pub fn learn(&mut self, group: Group, bucket: Bucket, place: Place) -> bool {
        let known = &mut self.places[group.index()][bucket.index()];
        let news = place.epoch >= known.epoch && *known != place;
        if news {
            *known = place;
        }
        news
    }

    /// Notes where the shard `by` that refused sends its callers.
    ///
    /// Where it was this belief that led there, the word of that shard counts, however old: a decision that a promotion has lost leaves
    /// an epoch behind that no shard knows of any more.
    pub fn learn_refusal(&mut self, group: Group, bucket: Bucket, by: ShardNo, place: Place) -> bool {
        let known = self.place(group, bucket);
        let led_there = known.shard == by && place.shard != by;
        let epoch = if led_there { place.epoch.max(known.epoch) } else { place.epoch };
        self.learn(group, bucket, Place { epoch, ..place })
    }

    /// One group's places, by bucket.
    pub fn places(&self, group: Group) -> impl Iterator<Item = (Bucket, Place)> + '_ {
        Bucket::all().zip(self.places[group.index()].iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn first_placement_is_the_remainder(bucket in 0_u16..4096, shards in 2_u16..256) {
            let b = Bucket::try_from(bucket).unwrap();
            for group in Group::ALL {
                let at = Layout::Colocated.first_shard(group, b, shards);
                prop_assert_eq!(at.0.cast_unsigned(), bucket % shards);
            }
            prop_assert_eq!(Layout::Split.first_shard(Group::Account, b, shards), ShardNo(0));
            let content = Layout::Split.first_shard(Group::Content, b, shards).0.cast_unsigned();
            prop_assert_eq!(content, 1 + bucket % (shards - 1));
            prop_assert!(content < shards);
        }

        #[test]
        fn a_pin_goes_before_the_bucket_and_concerns_nobody_else(bytes in any::<[u8; 16]>(), shard in 0_i16..9) {
            let user = UserId(uuid::Uuid::from_bytes(bytes));
            let neighbour = Whose { bucket: user.bucket(), user: Some(UserId(uuid::Uuid::nil())) };
            let mut map = Map::first(Layout::Colocated, 4);
            let home = map.place(Group::Account, user.bucket());
            let place = Place { shard: ShardNo(shard), epoch: 3 };
            map.learn_pin(Group::Account, user, Some(place));
            prop_assert_eq!(map.place_of(Group::Account, user.into()), place);
            prop_assert_eq!(map.place_of(Group::Content, user.into()), home);
            prop_assert_eq!(map.place_of(Group::Account, user.bucket().into()), home);
            if user != UserId(uuid::Uuid::nil()) {
                prop_assert_eq!(map.place_of(Group::Account, neighbour), home);
            }
            map.learn_pin(Group::Account, user, None);
            prop_assert_eq!(map.place_of(Group::Account, user.into()), home);
            prop_assert!(!map.has_pins());
        }

        /// Invariant 4.
        #[test]
        fn what_is_learned_never_goes_back(news in proptest::collection::vec((0_i16..4, 1_i64..9), 1..40)) {
            let mut map = Map::first(Layout::Colocated, 4);
            let bucket = Bucket::try_from(7_u16).unwrap();
            let mut highest = 0;
            for (shard, epoch) in news {
                map.learn(Group::Content, bucket, Place { shard: ShardNo(shard), epoch });
                let now = map.place(Group::Content, bucket).epoch;
                prop_assert!(now >= highest);
                highest = now;
            }
        }
    }

    /// A decision for shard 2 in epoch 6 was lost: shard 1 owns in epoch 5, and whoever believes in shard 2 hears so there.
    #[test]
    fn a_belief_that_no_shard_shares_any_more_gives_way() {
        let bucket = Bucket::try_from(7_u16).unwrap();
        let place = |shard, epoch| Place { shard: ShardNo(shard), epoch };
        let mut map = Map::first(Layout::Colocated, 4);
        map.learn(Group::Content, bucket, place(2, 6));
        assert!(!map.learn(Group::Content, bucket, place(1, 5)), "an older word by itself is no news");
        assert!(!map.learn_refusal(Group::Content, bucket, ShardNo(3), place(1, 5)), "nor that of any shard");
        assert!(map.learn_refusal(Group::Content, bucket, ShardNo(2), place(1, 5)));
        assert_eq!(map.place(Group::Content, bucket), place(1, 6));
        map.learn(Group::Content, bucket, place(3, 6));
        assert_eq!(map.place(Group::Content, bucket), place(3, 6), "the next move counts");
    }
}
