//! A community that was never there: who is in which bucket, and what they do day by day.
//!
//! Activity follows Zipf's law over all users. The busiest are held one by one; all others only as what they come to in
//! each bucket, drawn from the mean and the variance of so many users thrown into 4,096 buckets at random.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use therev::planner::{self, Item, Pin, UserLoad};
use therev::{Bucket, ShardNo, UserId, bucket_of};
use uuid::Uuid;

/// How many users are held one by one.
const BUSIEST: usize = 100_000;
/// What a user does in a day, on average.
const OPERATIONS_PER_USER: f64 = 10.0;
/// What an operation leaves behind, on average: most of them only read.
const BYTES_PER_OPERATION: f64 = 100.0;
/// How many days of it there are to begin with.
const DAYS_BEFORE: f64 = 365.0;
/// By how much the community grows in a day.
const GROWTH: f64 = 1.005;
/// How much of yesterday's mood is left, and how much is new every day; as logarithms of a user's activity.
const MOOD_KEPT: f64 = 0.8;
const MOOD_NEW: f64 = 0.3;
/// How many users a day change places with one of the busiest.
const RISING: usize = 3;

/// One of the busiest users.
struct User {
    id: UserId,
    bucket: Bucket,
    /// Its part of all activity, in a usual mood.
    part: f64,
    mood: f64,
    bytes: f64,
    /// Today's operations.
    load: f64,
    /// Where it is pinned.
    pinned: Option<ShardNo>,
}

/// All others in a bucket.
struct Rest {
    part: f64,
    bytes: f64,
    load: f64,
}

/// Everybody.
pub(super) struct Community {
    users: f64,
    busiest: Vec<User>,
    rest: Vec<Rest>,
    random: ChaCha8Rng,
}

impl Community {
    /// A community of so many users (at least one) by Zipf's exponent, the same one for the same seed.
    pub(super) fn new(users: f64, zipf: f64, seed: u64) -> Community {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let held = BUSIEST.min(whole_usize(users));
        let all = sum_of_powers(users, zipf);
        let busiest = (1..=held).map(|rank| {
            let id = Uuid::from_u128(u128::from(random.next_u64()) << 64 | u128::from(random.next_u64()));
            let part = float(rank).powf(-zipf) / all;
            let bytes = part * users * OPERATIONS_PER_USER * BYTES_PER_OPERATION * DAYS_BEFORE;
            User { id: UserId::from(id), bucket: bucket_of(id), part, mood: 0.0, bytes, load: 0.0, pinned: None }
        });
        let busiest: Vec<User> = busiest.collect();
        let buckets = float(Bucket::all().count());
        let beyond = |power: f64| (sum_of_powers(users, power) - sum_of_powers(float(held), power)).max(0.0);
        let mean = beyond(zipf) / all / buckets;
        let deviation = (beyond(2.0 * zipf) / (all * all) / buckets * (1.0 - 1.0 / buckets)).sqrt();
        let rest = Bucket::all().map(|_| {
            let part = (mean + deviation * normal(&mut random)).max(0.0);
            let bytes = part * users * OPERATIONS_PER_USER * BYTES_PER_OPERATION * DAYS_BEFORE;
            Rest { part, bytes, load: 0.0 }
        });
        let rest = rest.collect();
        Community { users, busiest, rest, random }
    }

    /// How many users there are by now.
    pub(super) fn users(&self) -> f64 {
        self.users
    }

    /// Everybody does what they do in a day, and leaves something behind.
    pub(super) fn live_a_day(&mut self) {
        self.users *= GROWTH;
        let operations = self.users * OPERATIONS_PER_USER;
        for _ in 0..RISING.min(self.busiest.len()) {
            self.rise();
        }
        for user in &mut self.busiest {
            user.mood = user.mood * MOOD_KEPT + MOOD_NEW * normal(&mut self.random);
            user.load = operations * user.part * user.mood.exp();
            user.bytes += user.load * BYTES_PER_OPERATION;
        }
        for rest in &mut self.rest {
            rest.load = operations * rest.part;
            rest.bytes += rest.load * BYTES_PER_OPERATION;
        }
    }

    /// Somebody becomes as busy as somebody else was; the higher a place, the rarer it changes hands.
    fn rise(&mut self) {
        let count = float(self.busiest.len());
        let any = whole_usize(self.even() * count).min(self.busiest.len() - 1);
        let high = whole_usize(count.powf(self.even())).clamp(1, self.busiest.len()) - 1;
        let parts = (self.busiest[any].part, self.busiest[high].part);
        (self.busiest[high].part, self.busiest[any].part) = parts;
    }

    /// A number from 0 to 1.
    fn even(&mut self) -> f64 {
        f64::from(self.random.next_u32()) / f64::from(u32::MAX)
    }

    /// What the planner is given of buckets, and of pinned users.
    pub(super) fn items(&self, shard_of: impl Fn(Bucket) -> ShardNo) -> (Vec<Item>, Vec<Pin>) {
        let mut held: Vec<(f64, f64)> = self.rest.iter().map(|rest| (rest.bytes, rest.load)).collect();
        let mut pins = Vec::new();
        for user in &self.busiest {
            if let Some(shard) = user.pinned {
                pins.push(Pin { bucket: user.bucket, shard, bytes: whole(user.bytes), load: whole(user.load) });
            } else {
                let sum = &mut held[user.bucket.index()];
                *sum = (sum.0 + user.bytes, sum.1 + user.load);
            }
        }
        let item = |(bucket, (bytes, load)): (Bucket, (f64, f64))| Item {
            bucket,
            shard: shard_of(bucket),
            bytes: whole(bytes),
            load: whole(load),
        };
        (Bucket::all().zip(held).map(item).collect(), pins)
    }

    /// What nodes would tell of the load: that of the busiest users of today by name, and that of everybody.
    pub(super) fn told(&self, shard_of: impl Fn(Bucket) -> ShardNo) -> (Vec<UserLoad>, u64) {
        let mut order: Vec<&User> = self.busiest.iter().collect();
        order.sort_by(|a, b| b.load.total_cmp(&a.load));
        let told = order.into_iter().take(planner::BUSIEST).map(|user| UserLoad {
            user: user.id,
            bucket: user.bucket,
            shard: user.pinned.unwrap_or_else(|| shard_of(user.bucket)),
            bytes: whole(user.bytes),
            load: whole(user.load),
        });
        (told.collect(), whole(self.load()))
    }

    /// Everybody's operations today.
    fn load(&self) -> f64 {
        self.busiest.iter().map(|user| user.load).chain(self.rest.iter().map(|rest| rest.load)).sum()
    }

    /// Pins a user to a shard; back to its bucket's is no pin.
    pub(super) fn pin(&mut self, user: UserId, shard: ShardNo, home: ShardNo) {
        let found = self.busiest.iter_mut().filter(|it| it.id == user);
        found.for_each(|it| it.pinned = (shard != home).then_some(shard));
    }

    /// The busiest user's part of today's load.
    pub(super) fn busiest_part(&self) -> f64 {
        self.busiest.iter().map(|user| user.load).fold(0.0, f64::max) / self.load().max(f64::MIN_POSITIVE)
    }

    /// How many users are pinned.
    pub(super) fn pinned(&self) -> usize {
        self.busiest.iter().filter(|user| user.pinned.is_some()).count()
    }
}

/// The sum of `rank^-power` over so many ranks: the first ones by adding, the others by the integral (Euler and
/// Maclaurin), which is exact to more digits than anything here needs.
fn sum_of_powers(ranks: f64, power: f64) -> f64 {
    let added = ranks.min(1_000.0);
    let first: f64 = (1..=whole_usize(added)).map(|rank| float(rank).powf(-power)).sum();
    let integral = if (power - 1.0).abs() < 1e-9 {
        (ranks / added).ln()
    } else {
        (ranks.powf(1.0 - power) - added.powf(1.0 - power)) / (1.0 - power)
    };
    first + integral + f64::midpoint(ranks.powf(-power), -added.powf(-power))
}

fn normal(random: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(random)
}

/// Bytes and operations, to the nearest whole.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and saturating")]
pub(super) fn whole(value: f64) -> u64 {
    value.round() as u64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and saturating")]
fn whole_usize(value: f64) -> usize {
    value as usize
}

#[expect(clippy::cast_precision_loss, reason = "ranks and counts: far below 2^52")]
fn float(value: usize) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_that_adding_gives() {
        for power in [0.0, 0.5, 0.9, 1.0, 1.8] {
            let added: f64 = (1..=200_000).map(|rank| f64::from(rank).powf(-power)).sum();
            let close = sum_of_powers(200_000.0, power);
            assert!((added - close).abs() < added * 1e-6, "{power}: {added} {close}");
        }
    }

    #[test]
    fn everybody_is_somewhere_once() {
        for (users, zipf) in [(1.0, 0.9), (50_000.0, 1.1), (1e9, 0.9), (1e9, 0.0)] {
            let mut community = Community::new(users, zipf, 1);
            let parts = community.busiest.iter().map(|it| it.part).chain(community.rest.iter().map(|it| it.part));
            let all: f64 = parts.sum();
            assert!((all - 1.0).abs() < 0.01, "{users} {zipf}: {all}");
            community.live_a_day();
            let (items, pins) = community.items(|_| ShardNo(0));
            assert_eq!((items.len(), pins.len()), (4_096, 0));
            let whole: u64 = items.iter().map(|it| it.load).sum();
            let (told, load) = community.told(|_| ShardNo(0));
            let first = told[0];
            assert!(told.iter().all(|it| it.load <= first.load) && load.abs_diff(whole) <= 2_048, "{load} {whole}");
            community.pin(first.user, ShardNo(1), ShardNo(0));
            let (items, pins) = community.items(|_| ShardNo(0));
            let parts = items.iter().map(|it| it.load).sum::<u64>() + pins[0].load;
            assert!(community.pinned() == 1 && whole.abs_diff(parts) <= 1, "{whole} {parts}");
            community.pin(first.user, ShardNo(0), ShardNo(0));
            assert_eq!(community.pinned(), 0);
        }
    }
}
