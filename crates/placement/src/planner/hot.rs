//! Hot users: who is to be placed apart from its bucket.
//!
//! Whole buckets balance a cluster as long as none is heavier than a tenth of the smallest share (see the planner). A
//! user with more load than that makes its bucket heavier by itself, and moving the bucket takes thousands of other
//! users along. So a user is isolated when all of this holds:
//! 1. its own load is above [`HOT_PERCENT`] of the smallest shard's share of the load;
//! 2. its shard is above what balance allows;
//! 3. the shard that is least full with it has room for it; or its bucket is by itself more than its shard may hold, so
//!    that nothing else helps, and another shard can make room, a bucket at a time.
//!
//! A user stays where it is who is by itself more than a shard may hold, or whose shard can be relieved by moving its
//! neighbours: the planner does that.

use super::cluster::{At, Cluster};
use super::{By, Item, Pin, PlanError, Shard, TOLERANCE_PERCENT};
use crate::{BUCKETS, Bucket, ShardNo, UnknownName, UserId};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

/// From how much load on a user is hot, in percent of the smallest shard's share.
pub const HOT_PERCENT: u8 = TOLERANCE_PERCENT;

/// Of how many of the busiest users the load is told by name.
pub const BUSIEST: usize = 200;
/// How many users are isolated at a time: what that did is seen before it is gone on with.
pub const AT_A_TIME: usize = 4;

/// What is done about hot users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HotUsers {
    /// Nothing.
    Off,
    /// It is said who should be isolated; somebody decides.
    #[default]
    Plan,
    /// They are isolated.
    Apply,
}

impl HotUsers {
    /// Its name on the command line and in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            HotUsers::Off => "off",
            HotUsers::Plan => "plan",
            HotUsers::Apply => "apply",
        }
    }
}

impl fmt::Display for HotUsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HotUsers {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        let all = [HotUsers::Off, HotUsers::Plan, HotUsers::Apply];
        all.into_iter().find(|policy| policy.name() == text).ok_or_else(|| UnknownName(text.to_owned()))
    }
}

/// A user and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserLoad {
    /// Who.
    pub user: UserId,
    /// The user's bucket.
    pub bucket: Bucket,
    /// Where the user is: with its bucket, or where it is pinned.
    pub shard: ShardNo,
    /// The user's bytes.
    pub bytes: u64,
    /// The user's operations, in the span of [`Item::load`].
    pub load: u64,
}

/// A user that should be placed apart from its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Isolation {
    /// Who.
    pub user: UserId,
    /// The user's bucket.
    pub bucket: Bucket,
    /// Where the user is.
    pub from: ShardNo,
    /// Where the user should be.
    pub to: ShardNo,
    /// What goes over the wire.
    pub bytes: u64,
    /// What goes to the other shard.
    pub load: u64,
}

/// Says which of the busiest users should be isolated, and where: see the module's three conditions.
///
/// What the users do is contained in `items`, or in `pins` for those that are pinned already. The fullest shards come
/// first, and on each the hottest users, until it is in balance; `pins_max` bounds how many are named. Planning with
/// the new pins comes after it. Errors are mistakes in what was given.
pub fn isolate(
    shards: &[Shard],
    items: &[Item],
    pins: &[Pin],
    users: &[UserLoad],
    pins_max: usize,
) -> Result<Vec<Isolation>, PlanError> {
    let mut cluster = Cluster::new(shards, items, pins, By::Load)?;
    let mut hot = hot(&cluster, shards, items, users);
    // A user that is put where room is still to be made makes that shard a full one, with hot users of its own.
    while relieve(&mut cluster, &mut hot, pins_max) {}
    let away = hot.iter().filter(|it| it.now != it.home);
    let isolation = |it: &Hot| {
        let UserLoad { user, bucket, shard, bytes, load } = *it.user;
        Isolation { user, bucket, from: shard, to: shards[it.now].shard, bytes, load }
    };
    Ok(away.map(isolation).collect())
}

/// The same by what is told of a cluster's load: that of the busiest users by name, `users`, and that of everybody, `load`.
/// What is left of it lies evenly over the buckets, which is how a hash spreads the many. `places` says where each bucket
/// is; a user who is not there is pinned. Names [`AT_A_TIME`] at the most.
pub fn isolate_told(
    shards: &[Shard],
    places: impl Iterator<Item = (Bucket, ShardNo)>,
    users: &[UserLoad],
    load: u64,
) -> Result<Vec<Isolation>, PlanError> {
    let busiest = users.iter().map(|user| user.load).fold(0, u64::saturating_add);
    let rest = load.saturating_sub(busiest) / u64::from(BUCKETS);
    let mut items: BTreeMap<Bucket, Item> =
        places.map(|(bucket, shard)| (bucket, Item { bucket, shard, bytes: 0, load: rest })).collect();
    let mut pins = Vec::new();
    for &UserLoad { bucket, shard, bytes, load, .. } in users {
        match items.get_mut(&bucket).filter(|item| item.shard == shard) {
            Some(item) => item.load = item.load.saturating_add(load),
            None => pins.push(Pin { bucket, shard, bytes, load }),
        }
    }
    let items: Vec<Item> = items.into_values().collect();
    isolate(shards, &items, &pins, users, AT_A_TIME)
}

/// A hot user on its way.
struct Hot<'a> {
    user: &'a UserLoad,
    load: u128,
    /// Its bucket's place among the items, while it is there.
    item: Option<usize>,
    home: At,
    now: At,
}

/// The users that meet the first condition, the hottest first.
fn hot<'a>(cluster: &Cluster, shards: &[Shard], items: &[Item], users: &'a [UserLoad]) -> Vec<Hot<'a>> {
    let limit = cluster.smallest_share() * u128::from(HOT_PERCENT);
    let place: HashMap<ShardNo, At> = shards.iter().enumerate().map(|(at, it)| (it.shard, at)).collect();
    let among: HashMap<Bucket, usize> = items.iter().enumerate().map(|(at, it)| (it.bucket, at)).collect();
    let of = |user: &'a UserLoad| {
        let (load, home) = (u128::from(user.load), *place.get(&user.shard)?);
        let with_bucket = |item: &usize| items[*item].shard == user.shard;
        let item = among.get(&user.bucket).copied().filter(with_bucket);
        (load * 100 > limit).then_some(Hot { user, load, item, home, now: home })
    };
    let mut hot: Vec<Hot> = users.iter().filter_map(of).collect();
    hot.sort_by_key(|it| (Reverse(it.load), it.user.user));
    hot
}

/// Relieves every shard that holds too much, the fullest first; `false` if there was nothing to be done.
fn relieve(cluster: &mut Cluster, hot: &mut [Hot], pins_max: usize) -> bool {
    let mut has_changed = false;
    let fullest: Vec<At> = cluster.emptiest_first().rev().collect();
    for from in fullest {
        for at in 0..hot.len() {
            let away = hot.iter().filter(|it| it.now != it.home).count();
            let user = &mut hot[at];
            if !cluster.is_over(from) || user.now != from || (user.now == user.home && away >= pins_max) {
                continue;
            }
            let Some(to) = place_for(cluster, user, from) else { continue };
            cluster.shift_pin(user.item.take(), from, to, user.load);
            user.now = to;
            has_changed = true;
        }
    }
    has_changed
}

/// Where a user should go by the third condition.
fn place_for(cluster: &Cluster, user: &Hot, from: At) -> Option<At> {
    // What is known of users is estimated: it may be more than there is to move.
    let there = user.item.map_or(cluster.sides[from].pinned, |item| cluster.items[item].measure);
    if user.load > there {
        return None;
    }
    let has_room = |at: At| cluster.sides[at].held + user.load <= cluster.sides[at].high;
    let least_full = cluster.least_full_with(user.load, |_| true);
    if let Some(to) = least_full.filter(|&to| to != from && has_room(to)) {
        return Some(to);
    }
    let is_too_heavy = cluster.items[user.item?].measure > cluster.sides[from].high;
    let can_make_room = |at: At| at != from && cluster.sides[at].pinned + user.load <= cluster.sides[at].high;
    cluster.least_full_with(user.load, can_make_room).filter(|_| is_too_heavy)
}

#[cfg(test)]
mod tests {
    use super::super::{Reached, plan};
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn shards(count: i16) -> Vec<Shard> {
        (0..count).map(|number| Shard { shard: ShardNo(number), weight: 1 }).collect()
    }

    /// Ten buckets on each of four shards, each with 100 operations, so that a share is 1,000.
    fn items() -> Vec<Item> {
        let item =
            |at: i16| Item { bucket: Bucket::try_from(at).unwrap(), shard: ShardNo(at % 4), bytes: 1_000, load: 100 };
        (0..40).map(item).collect()
    }

    fn user(number: u128, at: &Item, load: u64) -> UserLoad {
        let user = UserId::from(Uuid::from_u128(number));
        UserLoad { user, bucket: at.bucket, shard: at.shard, bytes: 10, load }
    }

    /// The items with a user's load among them.
    fn with(mut items: Vec<Item>, users: &[UserLoad]) -> Vec<Item> {
        for user in users {
            items.iter_mut().filter(|it| it.bucket == user.bucket).for_each(|it| it.load += user.load);
        }
        items
    }

    #[test]
    fn who_is_too_much_for_its_shard_goes_where_there_is_room() {
        let mut users = vec![user(1, &items()[0], 400), user(2, &items()[0], 30), user(3, &items()[1], 50)];
        let mut items = with(items(), &users);
        items.iter_mut().filter(|it| it.shard == ShardNo(3)).for_each(|it| it.load = 60);
        let isolations = isolate(&shards(4), &items, &[], &users, 9).unwrap();
        let [one] = isolations[..] else { panic!("{isolations:?}") };
        assert_eq!((one.user, one.from, one.load, one.bytes), (users[0].user, ShardNo(0), 400, 10));
        assert_eq!(one.to, ShardNo(3));
        assert!(isolate(&shards(4), &items, &[], &users, 0).unwrap().is_empty());
        // The least of those who are hot stays below the limit.
        users.remove(0);
        assert!(isolate(&shards(4), &items, &[], &users, 9).unwrap().is_empty());
    }

    #[test]
    fn who_is_more_than_a_share_stays() {
        let users = [user(1, &items()[0], 5_000)];
        let items = with(items(), &users);
        assert!(isolate(&shards(4), &items, &[], &users, 9).unwrap().is_empty());
    }

    #[test]
    fn two_hot_users_of_one_bucket_are_parted_though_no_shard_has_room() {
        let users = [user(1, &items()[0], 900), user(2, &items()[0], 800)];
        let items = with(items(), &users);
        let isolations = isolate(&shards(4), &items, &[], &users, 9).unwrap();
        let [one] = isolations[..] else { panic!("{isolations:?}") };
        assert_eq!((one.user, one.from), (users[0].user, ShardNo(0)));
        // Whole buckets do the rest.
        let left = |it: &Item| Item { load: if it.bucket == one.bucket { it.load - one.load } else { it.load }, ..*it };
        let left: Vec<Item> = items.iter().map(left).collect();
        let pin = Pin { bucket: one.bucket, shard: one.to, bytes: one.bytes, load: one.load };
        assert_eq!(plan(&shards(4), &left, &[pin], By::Load, None).unwrap().reached, Reached::Within);
        assert_ne!(plan(&shards(4), &items, &[], By::Load, None).unwrap().reached, Reached::Within);
    }

    proptest! {
        #[test]
        fn what_is_known_of_users_may_be_wrong(users in proptest::collection::vec((0_usize..40, 0_u64..9_000), 0..12)) {
            let number = |(at, &(item, load)): (usize, &(usize, u64))| user(at as u128, &items()[item], load);
            let users: Vec<UserLoad> = users.iter().enumerate().map(number).collect();
            let items = with(items(), &users[..users.len() / 2]);
            isolate(&shards(6), &items, &[], &users, 99).unwrap();
        }

        #[test]
        fn nobody_is_isolated_twice_and_doing_it_again_does_nothing(
            loads in proptest::collection::vec((0_usize..40, 0_u64..900), 0..12),
        ) {
            let number = |(at, &(item, load)): (usize, &(usize, u64))| user(at as u128, &items()[item], load);
            let mut users: Vec<UserLoad> = loads.iter().enumerate().map(number).collect();
            let mut items = with(items(), &users);
            let isolations = isolate(&shards(4), &items, &[], &users, 99).unwrap();
            let mut pins = Vec::new();
            for it in &isolations {
                let user = users.iter_mut().find(|user| user.user == it.user).unwrap();
                prop_assert!(user.shard == it.from && it.from != it.to && user.load > 100);
                user.shard = it.to;
                items.iter_mut().filter(|item| item.bucket == it.bucket).for_each(|item| item.load -= it.load);
                pins.push(Pin { bucket: it.bucket, shard: it.to, bytes: it.bytes, load: it.load });
            }
            let mut who: Vec<UserId> = isolations.iter().map(|it| it.user).collect();
            who.sort();
            who.dedup();
            prop_assert_eq!(who.len(), isolations.len());
            prop_assert!(isolate(&shards(4), &items, &pins, &users, 99).unwrap().is_empty());
        }
    }

    #[test]
    fn what_is_told_is_the_busiest_by_name_and_the_rest_evenly() {
        let places = || Bucket::all().map(|bucket| (bucket, ShardNo(bucket.sql() % 4)));
        let at =
            |number: i16| Item { bucket: number.try_into().unwrap(), shard: ShardNo(number % 4), bytes: 0, load: 0 };
        // A share is 250,000: both are hot, and the first shard has both of them.
        let mut users = [user(1, &at(0), 45_000), user(2, &at(4), 40_000)];
        let [one] = isolate_told(&shards(4), places(), &users, 1_000_000).unwrap()[..] else { panic!("one goes") };
        assert_eq!((one.user, one.from), (users[0].user, ShardNo(0)));
        // Apart, there is nothing more to do; and nobody is hot beside a load that makes their part a small one.
        users[0].shard = one.to;
        assert!(isolate_told(&shards(4), places(), &users, 1_000_000).unwrap().is_empty());
        users[0].shard = one.from;
        assert!(isolate_told(&shards(4), places(), &users, 100_000_000).unwrap().is_empty());
    }

    #[test]
    fn policies_have_names() {
        for policy in [HotUsers::Off, HotUsers::Plan, HotUsers::Apply] {
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        assert!("on".parse::<HotUsers>().is_err());
    }
}
