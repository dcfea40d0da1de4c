//! Day by day: the community lives, the policy isolates, the planner plans, and everything planned is done at once.

use super::community::Community;
use serde::Serialize;
use therev::planner::{By, HotUsers, PlanError, Reached, Shard, ShardShare, isolate_told, plan, skew};
use therev::{Bucket, Group, Layout, Map, Place, ShardNo};

/// How often in a day it is looked whether somebody should be isolated, while somebody is.
const LOOKS_PER_DAY: usize = 100;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Setting {
    pub(super) shards: u16,
    /// From the second day on.
    pub(super) shards_after: u16,
    pub(super) users: f64,
    pub(super) zipf: f64,
    pub(super) days: u16,
    pub(super) seed: u64,
    pub(super) by: By,
    pub(super) hot_users: HotUsers,
    pub(super) max_moves: Option<usize>,
}

/// What became of a day.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Day {
    #[serde(rename = "day")]
    pub(super) number: u16,
    pub(super) users: u64,
    /// Shards that are to hold something.
    pub(super) shards: u16,
    /// The fullest shard's part of its share, before and after.
    pub(super) skew_before: f64,
    pub(super) skew_after: f64,
    /// Shards that are not in balance, before and after.
    pub(super) out_before: usize,
    pub(super) out_after: usize,
    /// Buckets that move.
    pub(super) moves: usize,
    /// What goes over the wire, pinned users included.
    pub(super) bytes: u64,
    /// Everything there is.
    pub(super) bytes_all: u64,
    pub(super) rounds: usize,
    /// The busiest user's load, in shards' mean load: where that is above 1, skew is no less.
    pub(super) busiest: f64,
    /// Users that are isolated today, or would be.
    pub(super) isolated: usize,
    /// Users that are pinned by now.
    pub(super) pins: usize,
    /// How near the day's plan came.
    pub(super) reached: Reached,
}

/// Lives through all days.
pub(super) fn simulate(setting: Setting) -> Result<Vec<Day>, PlanError> {
    let mut community = Community::new(setting.users, setting.zipf, setting.seed);
    let mut map = Map::first(Layout::Colocated, setting.shards);
    (1..=setting.days).map(|day| one(setting, day, &mut community, &mut map)).collect()
}

fn one(setting: Setting, day: u16, community: &mut Community, map: &mut Map) -> Result<Day, PlanError> {
    let Setting { by, hot_users, .. } = setting;
    community.live_a_day();
    let wanted = if day == 1 { setting.shards } else { setting.shards_after };
    let shards: Vec<Shard> = (0..setting.shards.max(wanted))
        .map(|number| Shard { shard: ShardNo(number.cast_signed()), weight: u32::from(number < wanted) })
        .collect();
    let shard_of = |map: &Map, bucket| map.place(Group::Account, bucket).shard;
    let (items, pins) = community.items(|bucket| shard_of(map, bucket));
    let before = plan(&shards, &items, &pins, by, Some(0))?.before;
    let (mut isolated, mut bytes) = (0, 0);
    let looks = match hot_users {
        HotUsers::Off => 0,
        HotUsers::Plan => 1,
        HotUsers::Apply => LOOKS_PER_DAY,
    };
    let (mut told, load) = community.told(|bucket| shard_of(map, bucket));
    for _ in 0..looks {
        let places = Bucket::all().map(|bucket| (bucket, shard_of(map, bucket)));
        let isolations = isolate_told(&shards, places, &told, load)?;
        isolated += isolations.len();
        if hot_users == HotUsers::Plan || isolations.is_empty() {
            break;
        }
        for it in &isolations {
            community.pin(it.user, it.to, shard_of(map, it.bucket));
            told.iter_mut().filter(|one| one.user == it.user).for_each(|one| one.shard = it.to);
            bytes = it.bytes.saturating_add(bytes);
        }
    }
    let (items, pins) = community.items(|bucket| shard_of(map, bucket));
    let plan = plan(&shards, &items, &pins, by, setting.max_moves)?;
    for it in &plan.moves {
        let epoch = map.place(Group::Account, it.bucket).epoch + 1;
        map.learn(Group::Account, it.bucket, Place { shard: it.to, epoch });
    }
    let out = |shares: &[ShardShare]| shares.iter().filter(|it| !it.within).count();
    Ok(Day {
        number: day,
        users: super::community::whole(community.users()),
        shards: wanted,
        skew_before: skew(&before),
        skew_after: skew(&plan.after),
        out_before: out(&before),
        out_after: out(&plan.after),
        moves: plan.moves.len(),
        bytes: plan.bytes().saturating_add(bytes),
        bytes_all: before.iter().map(|it| it.bytes).fold(0, u64::saturating_add),
        rounds: plan.rounds().len(),
        busiest: community.busiest_part() * f64::from(wanted),
        isolated,
        pins: community.pinned(),
        reached: plan.reached,
    })
}
