//! A cluster while it is planned for: what is where, how full each shard is, and what a change would make of it.

use super::{By, Item, Move, OutOfBand, Pin, PlanError, Shard, ShardShare, TOLERANCE_PERCENT, Why};
use crate::{BUCKETS, ShardNo};
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};

/// A shard by its place among those that were given.
pub(super) type At = usize;

/// A bucket on its way.
#[derive(Debug)]
pub(super) struct Held {
    item: Item,
    /// What it counts for where balance is wanted; never 0.
    pub(super) measure: u128,
    /// What moving it costs; never 0.
    pub(super) cost: u128,
    /// Where it really is.
    pub(super) home: At,
    /// Where it is by now in the plan.
    pub(super) now: At,
}

/// What a shard holds by now, and may hold.
#[derive(Debug)]
pub(super) struct Side {
    given: Shard,
    /// Of the measure, pinned users included.
    pub(super) held: u128,
    /// Of that, pinned users.
    pub(super) pinned: u128,
    /// Its weight's part of everything, rounded.
    share: u128,
    /// The least that is near enough, and the most.
    pub(super) low: u128,
    pub(super) high: u128,
    pinned_bytes: u64,
    pinned_load: u64,
    /// Its buckets, as places in [`Cluster::items`].
    pub(super) items: Vec<usize>,
}

impl Side {
    pub(super) fn weight(&self) -> u32 {
        self.given.weight
    }

    /// How far it would be out of balance, holding so much.
    ///
    /// Of a shard that is to be emptied its pinned users are not: they go back to their buckets.
    pub(super) fn off(&self, held: u128) -> u128 {
        let held = if self.weight() == 0 { held.saturating_sub(self.pinned) } else { held };
        if held > self.high { held - self.high } else { self.low.saturating_sub(held) }
    }

    /// The same beside its weight, so that shards can be compared.
    fn off_by_weight(&self, held: u128) -> Off {
        Off { by: self.off(held), weight: self.given.weight.into() }
    }

    /// What orders shards by how full they would be. Only for shards with a weight.
    pub(super) fn fill(&self, held: u128) -> u128 {
        // A total is below 2^78: 4,096 buckets and as many pins of 2^64 at the most.
        (held << 32) / u128::from(self.given.weight.max(1))
    }
}

/// How far a shard is out of balance beside its weight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Off {
    by: u128,
    weight: u128,
}

impl Off {
    pub(super) fn is_none(self) -> bool {
        self.by == 0
    }

    pub(super) fn compare(self, other: Off) -> Ordering {
        (self.by * other.weight).cmp(&(other.by * self.weight))
    }

    fn worse(self, other: Off) -> Off {
        if other.compare(self) == Ordering::Greater { other } else { self }
    }
}

/// What a change between two shards would make of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effect {
    /// How far out the worse of the two would be.
    pub(super) worst: Off,
    /// By how much both together come nearer.
    pub(super) gain: i128,
}

/// All shards and buckets.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) sides: Vec<Side>,
    pub(super) items: Vec<Held>,
    /// Shards with a weight, the emptiest first.
    by_fill: BTreeSet<(u128, At)>,
    /// How many buckets are not at home.
    pub(super) displaced: usize,
}

impl Cluster {
    pub(super) fn new(shards: &[Shard], items: &[Item], pins: &[Pin], by: By) -> Result<Cluster, PlanError> {
        let places = places(shards)?;
        let place = |bucket, shard| places.get(&shard).copied().ok_or(PlanError::UnknownShard { bucket, shard });
        let mut sides: Vec<Side> = shards.iter().map(|&given| empty(given)).collect();
        let measure = |bytes: u64, load: u64| u128::from(if by == By::Size { bytes } else { load });
        for pin in pins {
            let side = &mut sides[place(pin.bucket, pin.shard)?];
            side.pinned += measure(pin.bytes, pin.load);
            side.pinned_bytes = side.pinned_bytes.saturating_add(pin.bytes);
            side.pinned_load = side.pinned_load.saturating_add(pin.load);
        }
        let mut seen = vec![false; BUCKETS.into()];
        let mut held = Vec::with_capacity(items.len());
        for (at, &item) in items.iter().enumerate() {
            if std::mem::replace(&mut seen[item.bucket.index()], true) {
                return Err(PlanError::BucketTwice(item.bucket));
            }
            let home = place(item.bucket, item.shard)?;
            let measure = measure(item.bytes, item.load).max(1);
            sides[home].items.push(at);
            sides[home].held += measure;
            held.push(Held { item, measure, cost: item.bytes.max(1).into(), home, now: home });
        }
        share_out(&mut sides);
        let mut cluster = Cluster { sides, items: held, by_fill: BTreeSet::new(), displaced: 0 };
        cluster.by_fill = cluster.weighted().map(|at| cluster.fill_key(at)).collect();
        Ok(cluster)
    }

    fn weighted(&self) -> impl Iterator<Item = At> + '_ {
        (0..self.sides.len()).filter(|&at| self.sides[at].weight() > 0)
    }

    fn fill_key(&self, at: At) -> (u128, At) {
        (self.sides[at].fill(self.sides[at].held), at)
    }

    /// Shards with a weight, the emptiest first.
    pub(super) fn emptiest_first(&self) -> impl DoubleEndedIterator<Item = At> + '_ {
        self.by_fill.iter().map(|&(_, at)| at)
    }

    pub(super) fn off(&self, at: At) -> Off {
        self.sides[at].off_by_weight(self.sides[at].held)
    }

    pub(super) fn is_over(&self, at: At) -> bool {
        self.sides[at].held > self.sides[at].high
    }

    /// What becomes of two shards if `out` goes from one to the other and `back` the other way; `None` if the worse of
    /// them would be no better than the worse of them is.
    pub(super) fn effect(&self, from: At, to: At, out: u128, back: u128) -> Option<Effect> {
        let (source, target) = (&self.sides[from], &self.sides[to]);
        let (left, grown) = (source.held + back - out, target.held + out - back);
        let worst = source.off_by_weight(left).worse(target.off_by_weight(grown));
        if worst.compare(self.off(from).worse(self.off(to))) != Ordering::Less {
            return None;
        }
        let signed = |off: u128| i128::try_from(off).unwrap_or(i128::MAX);
        let was = signed(source.off(source.held)) + signed(target.off(target.held));
        Some(Effect { worst, gain: was - signed(source.off(left)) - signed(target.off(grown)) })
    }

    /// Puts a bucket on another shard.
    pub(super) fn put(&mut self, item: usize, to: At) {
        let from = self.items[item].now;
        let held = &mut self.items[item];
        self.displaced -= usize::from(held.now != held.home);
        held.now = to;
        self.displaced += usize::from(held.now != held.home);
        let measure = held.measure;
        self.sides[from].items.retain(|&other| other != item);
        self.sides[to].items.push(item);
        self.shift(from, to, measure);
    }

    /// Counts so much of the measure on another shard.
    pub(super) fn shift(&mut self, from: At, to: At, measure: u128) {
        for at in [from, to] {
            let key = self.fill_key(at);
            self.by_fill.remove(&key);
        }
        self.sides[from].held -= measure;
        self.sides[to].held += measure;
        for at in [from, to].into_iter().filter(|&at| self.sides[at].weight() > 0) {
            let key = self.fill_key(at);
            self.by_fill.insert(key);
        }
    }

    /// Pins a user to another shard: out of its bucket, or from where it was pinned.
    pub(super) fn shift_pin(&mut self, item: Option<usize>, from: At, to: At, measure: u128) {
        match item {
            Some(item) => self.items[item].measure -= measure,
            None => self.sides[from].pinned -= measure,
        }
        self.sides[to].pinned += measure;
        self.shift(from, to, measure);
    }

    /// The shard that would be least full, given so much more, among those with a weight that `may` have it.
    pub(super) fn least_full_with(&self, measure: u128, may: impl Fn(At) -> bool) -> Option<At> {
        self.emptiest_first().filter(|&at| may(at)).min_by_key(|&at| self.sides[at].fill(self.sides[at].held + measure))
    }

    /// The share of the shard with the least weight.
    pub(super) fn smallest_share(&self) -> u128 {
        self.weighted().map(|at| self.sides[at].share).min().unwrap_or(0)
    }

    /// The buckets that are not where they were, by number.
    pub(super) fn moves(&self) -> Vec<Move> {
        let shard = |at: At| self.sides[at].given.shard;
        let away = self.items.iter().filter(|held| held.now != held.home);
        let mut moves: Vec<Move> = away
            .map(|held| Move {
                bucket: held.item.bucket,
                from: shard(held.home),
                to: shard(held.now),
                bytes: held.item.bytes,
            })
            .collect();
        moves.sort_unstable_by_key(|it| it.bucket);
        moves
    }

    pub(super) fn shares(&self) -> Vec<ShardShare> {
        let sum = |first: u64, side: &Side, value: fn(&Item) -> u64| {
            side.items.iter().fold(first, |sum, &item| sum.saturating_add(value(&self.items[item].item)))
        };
        let share = |side: &Side| ShardShare {
            shard: side.given.shard,
            weight: side.weight(),
            buckets: u32::try_from(side.items.len()).unwrap_or(u32::MAX),
            bytes: sum(side.pinned_bytes, side, |item| item.bytes),
            load: sum(side.pinned_load, side, |item| item.load),
            held: u64::try_from(side.held).unwrap_or(u64::MAX),
            share: u64::try_from(side.share).unwrap_or(u64::MAX),
            within: side.off(side.held) == 0,
        };
        self.sides.iter().map(share).collect()
    }

    /// The shards that are not in balance, and what keeps each there, as far as it can be said.
    pub(super) fn out_of_band(&self) -> Vec<OutOfBand> {
        let out = self.sides.iter().filter(|side| side.off(side.held) > 0);
        out.map(|side| OutOfBand { shard: side.given.shard, why: self.why(side) }).collect()
    }

    fn why(&self, side: &Side) -> Why {
        if side.pinned > side.high {
            return Why::Pins;
        }
        let heaviest = side.items.iter().map(|&item| &self.items[item]).max_by_key(|held| held.measure);
        match heaviest {
            Some(held) if side.pinned + held.measure > side.high => Why::Bucket(held.item.bucket),
            _ => Why::WholeBuckets,
        }
    }
}

/// Where each shard stands in the list.
fn places(shards: &[Shard]) -> Result<HashMap<ShardNo, At>, PlanError> {
    let mut places = HashMap::new();
    for (at, given) in shards.iter().enumerate() {
        if places.insert(given.shard, at).is_some() {
            return Err(PlanError::ShardTwice(given.shard));
        }
    }
    if shards.iter().all(|given| given.weight == 0) {
        return Err(PlanError::NoRoom);
    }
    Ok(places)
}

fn empty(given: Shard) -> Side {
    Side { given, held: 0, pinned: 0, share: 0, low: 0, high: 0, pinned_bytes: 0, pinned_load: 0, items: Vec::new() }
}

/// Adds the pinned users to what is held, and says how much each shard should hold.
fn share_out(sides: &mut [Side]) {
    for side in sides.iter_mut() {
        side.held += side.pinned;
    }
    // Users on a drained shard are nobody's to make up for: they go back to their buckets.
    let leaving: u128 = sides.iter().filter(|side| side.weight() == 0).map(|side| side.pinned).sum();
    let total: u128 = sides.iter().map(|side| side.held).sum::<u128>() - leaving;
    let weights: u128 = sides.iter().map(|side| u128::from(side.weight())).sum();
    let tolerance = u128::from(TOLERANCE_PERCENT);
    for side in sides {
        let part = total * u128::from(side.weight());
        side.share = (part + weights / 2) / weights;
        side.low = (part * (100 - tolerance)).div_ceil(weights * 100);
        side.high = part * (100 + tolerance) / (weights * 100);
    }
}
