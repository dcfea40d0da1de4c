//! Who causes the load: a sketch of the owners whose rows this node asks for most, told to the control database every few
//! seconds. Its memory is bounded whatever the number of users; one call in eight is counted, for eight.

use crate::error::Error;
use crate::store::Shards;
use bytes::BytesMut;
use datasketches::frequencies::{ErrorType, FrequentItemsSketch};
use placement::planner::BUSIEST;
use placement::{Group, Layout, UserId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

/// How many owners the sketch keeps apart, at the most: some 200 kB.
const OWNERS_MAX: usize = 4_096;
/// One call in so many is counted.
const SAMPLE: u64 = 8;
/// How long a window of counting is. What is told covers the last one and the present one.
const WINDOW: Duration = Duration::from_secs(30);
/// How often it is told.
pub(crate) const TELL_EVERY: Duration = Duration::from_secs(5);
/// What was told counts for so long, in seconds: a process that has ended, and another one in its place, would count twice.
const COUNTS_S: f64 = 15.0;

/// The operations of a node, by owner.
pub(crate) struct Load {
    node: Uuid,
    layout: Layout,
    calls: AtomicU64,
    told: AtomicU64,
    windows: Mutex<Windows>,
}

struct Windows {
    began: Instant,
    now: FrequentItemsSketch<u128>,
    before: Option<(FrequentItemsSketch<u128>, Duration)>,
}

/// A user whose rows are asked for often.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HotUser {
    /// Who.
    pub user_id: Uuid,
    /// How many operations a second name this user as the owner, on all nodes; one in eight was counted.
    pub operations_per_s: f64,
}

/// The load of all nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HotUsers {
    /// How many nodes have told theirs lately.
    pub nodes: usize,
    /// Operations a second with a known owner, on all of them.
    pub operations_per_s: f64,
    /// The busiest users, the busiest first.
    pub users: Vec<HotUser>,
}

const TELL: &str = "
    INSERT INTO therev.nodes AS n (node, window_s, operations, users, user_operations)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (node) DO UPDATE
       SET told_at = now(), window_s = excluded.window_s, operations = excluded.operations, users = excluded.users,
           user_operations = excluded.user_operations";

/// What nobody has told for so long is of a process that is gone.
const FORGET: &str = "DELETE FROM therev.nodes AS n WHERE n.told_at < now() - interval '1 hour'";

const HOT: &str = "
    SELECT n.window_s, n.operations, n.users, n.user_operations
      FROM therev.nodes AS n WHERE n.told_at > now() - $1 * interval '1 second'";

impl Load {
    pub(crate) fn new(layout: Layout) -> Load {
        let windows = Mutex::new(Windows { began: Instant::now(), now: sketch(), before: None });
        Load { node: Uuid::new_v4(), layout, calls: AtomicU64::new(0), told: AtomicU64::new(0), windows }
    }

    /// Counts a call for the owner that its first parameter names.
    pub(crate) fn count(&self, group: Group, owner: Option<&&(dyn ToSql + Sync)>) -> Option<UserId> {
        let mut bytes = BytesMut::with_capacity(16);
        owner?.to_sql_checked(&Type::UUID, &mut bytes).ok()?;
        let id = Uuid::from_slice(&bytes).ok()?;
        self.count_owner(group, id);
        Some(UserId(id))
    }

    /// Counts a call for an owner. In the split layout not what is done with accounts: to place somebody's content apart would not help
    /// the shard that has them.
    pub(crate) fn count_owner(&self, group: Group, owner: Uuid) {
        if self.layout == Layout::Split && group == Group::Account {
            return;
        }
        // Mixed, so that calls that come in rhythm are not missed in rhythm.
        let call = self.calls.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        if (call >> 32).is_multiple_of(SAMPLE) {
            self.note(owner, SAMPLE);
        }
    }

    fn note(&self, owner: Uuid, operations: u64) {
        let mut windows = self.windows.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        windows.turn(Instant::now());
        windows.now.update_with_count(owner.as_u128(), operations);
    }

    /// The busiest owners, how many operations there were, and in how many seconds.
    fn told(&self) -> (Vec<(Uuid, i64)>, i64, f64) {
        let mut windows = self.windows.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        windows.turn(Instant::now());
        let mut all = windows.now.clone();
        let mut time = windows.began.elapsed();
        if let Some((before, lasted)) = &windows.before {
            all.merge(before);
            time += *lasted;
        }
        drop(windows);
        let mut rows = all.frequent_items_with_threshold(ErrorType::NoFalseNegatives, 1);
        rows.sort_by_key(|row| std::cmp::Reverse(row.estimate()));
        rows.truncate(BUSIEST);
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let busiest = rows.iter().map(|row| (Uuid::from_u128(*row.item()), number(row.estimate()))).collect();
        (busiest, number(all.total_weight()), time.as_secs_f64().max(1.0))
    }
}

impl Windows {
    /// Begins a new window where the present one is over.
    fn turn(&mut self, now: Instant) {
        let lasted = now.duration_since(self.began);
        if lasted >= WINDOW {
            let over = std::mem::replace(&mut self.now, sketch());
            self.before = (lasted < 2 * WINDOW).then_some((over, lasted));
            self.began = now;
        }
    }
}

/// The size is a power of two, which is all that could be wrong with it.
fn sketch() -> FrequentItemsSketch<u128> {
    FrequentItemsSketch::new(OWNERS_MAX).unwrap_or_else(|error| unreachable!("a sketch of {OWNERS_MAX}: {error}"))
}

impl Shards {
    /// Tells the control database this node's load, if there was any since it was told last.
    pub(crate) async fn tell_load(&self) -> Result<(), Error> {
        let load = &self.inner.load;
        let calls = load.calls.load(Ordering::Relaxed);
        if load.told.swap(calls, Ordering::Relaxed) == calls {
            return Ok(());
        }
        let (busiest, operations, window_s) = load.told();
        let (users, counts): (Vec<Uuid>, Vec<i64>) = busiest.into_iter().unzip();
        let params: [&(dyn ToSql + Sync); 5] = [&load.node, &window_s, &operations, &users, &counts];
        self.inner.control.query(TELL, &params, true).await?;
        self.inner.control.query(FORGET, &[], true).await.map(drop)
    }

    /// The users whose rows all nodes ask for most, of what each has told lately: that covers the last half minute, or the last minute.
    pub async fn hot_users(&self, top: usize) -> Result<HotUsers, Error> {
        let rows = self.inner.control.query(HOT, &[&COUNTS_S], false).await?;
        let told = rows.iter().map(|row| {
            let (users, counts): (Vec<Uuid>, Vec<i64>) = (row.get("users"), row.get("user_operations"));
            (users.into_iter().zip(counts).collect(), row.get("operations"), row.get("window_s"))
        });
        Ok(merged(told, top))
    }
}

/// What several nodes have told: the busiest owners, how many operations there were, and in how many seconds.
fn merged(told: impl Iterator<Item = (Vec<(Uuid, i64)>, i64, f64)>, top: usize) -> HotUsers {
    let mut hot = HotUsers::default();
    let mut by_user: BTreeMap<Uuid, f64> = BTreeMap::new();
    for (users, operations, window_s) in told {
        hot.nodes += 1;
        hot.operations_per_s += per_second(operations, window_s);
        for (user, count) in users {
            *by_user.entry(user).or_default() += per_second(count, window_s);
        }
    }
    hot.users = by_user.into_iter().map(|(user_id, operations_per_s)| HotUser { user_id, operations_per_s }).collect();
    hot.users.sort_by(|a, b| b.operations_per_s.total_cmp(&a.operations_per_s));
    hot.users.truncate(top);
    hot
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn per_second(count: i64, window_s: f64) -> f64 {
    count as f64 / window_s.max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_distr::{Distribution, Zipf};

    const SPREAD: u128 = 0x9E37_79B9_7F4A_7C15;

    /// So many calls for 100,000 users by Zipf's law, whose ids say their ranks.
    fn lived(load: &Load, calls: usize, seed: u64) {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let zipf = Zipf::new(100_000.0, 1.1).unwrap();
        for _ in 0..calls {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
            let rank = zipf.sample(&mut random) as u128;
            let id = Uuid::from_u128(rank * SPREAD);
            load.count(Group::Account, Some(&(&id as &(dyn ToSql + Sync))));
        }
    }

    /// How many of the busiest twenty are among those named.
    fn found(named: impl Iterator<Item = Uuid>) -> usize {
        named.take(20).filter(|id| (1..=20).contains(&(id.as_u128() / SPREAD))).count()
    }

    #[test]
    fn the_busiest_twenty_of_a_hundred_thousand_are_found() {
        let load = Load::new(Layout::Colocated);
        lived(&load, 1_000_000, 1);
        let (busiest, operations, _) = load.told();
        assert!(operations.abs_diff(1_000_000) < 20_000, "{operations}");
        assert!(busiest.len() <= BUSIEST);
        assert!(found(busiest.iter().map(|(id, _)| *id)) >= 19, "{busiest:?}");
    }

    #[test]
    fn the_busiest_twenty_are_found_among_what_eight_nodes_tell() {
        let nodes: Vec<Load> = std::iter::repeat_with(|| Load::new(Layout::Colocated)).take(8).collect();
        for (load, seed) in nodes.iter().zip(1..) {
            lived(load, 125_000, seed);
        }
        let hot = merged(nodes.iter().map(Load::told), 20);
        assert_eq!((hot.nodes, hot.users.len()), (8, 20));
        assert!(found(hot.users.iter().map(|user| user.user_id)) >= 19, "{hot:?}");
    }

    #[test]
    fn what_is_long_past_is_forgotten() {
        let mut windows = Windows { began: Instant::now(), now: sketch(), before: None };
        windows.now.update_with_count(7, 3);
        let later = windows.began + WINDOW;
        windows.turn(later);
        assert!(windows.now.is_empty() && windows.before.is_some());
        windows.turn(later + 2 * WINDOW);
        assert!(windows.before.is_none());
    }
}
