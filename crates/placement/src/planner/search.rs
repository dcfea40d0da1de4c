//! The search: empty what is drained, help whoever is furthest out, take back what was not needed.

use super::cluster::{At, Cluster, Effect};
use std::cmp::{Ordering, Reverse};

/// How many changes a search makes at the most, for each bucket and shard; far more than it ever needed.
const STEPS_PER_PART: usize = 4;

/// A change that helps.
#[derive(Debug, Clone, Copy)]
struct Change {
    effect: Effect,
    /// The bucket that goes out, where to, and what comes back for it.
    out: usize,
    to: At,
    back: Option<usize>,
    /// What moving them costs.
    cost: u128,
    /// What they weigh together, to prefer few large ones among equals.
    measure: u128,
}

impl Change {
    /// More put in order for each byte comes first; then the heavier one, then the one that was listed first.
    fn is_better(&self, other: &Change) -> bool {
        let cost = |change: &Change| i128::try_from(change.cost).unwrap_or(i128::MAX);
        let mine = self.effect.gain.saturating_mul(cost(other));
        let theirs = other.effect.gain.saturating_mul(cost(self));
        match mine.cmp(&theirs).then(self.measure.cmp(&other.measure)) {
            Ordering::Equal => other.effect.worst.compare(self.effect.worst) == Ordering::Greater,
            order => order == Ordering::Greater,
        }
    }

    /// Whether something that gains at the most so much, at such a cost, may be better.
    fn may_be_beaten(&self, gain: u128, cost: u128, measure: u128) -> bool {
        let Ok(mine) = u128::try_from(self.effect.gain) else { return true };
        match gain.saturating_mul(self.cost).cmp(&mine.saturating_mul(cost)) {
            Ordering::Equal => measure >= self.measure,
            order => order == Ordering::Greater,
        }
    }
}

/// Balances; `false` if more than `moves_max` buckets would have to move for that.
pub(super) fn balance(cluster: &mut Cluster, moves_max: usize) -> bool {
    if !drain(cluster, moves_max) || !help_all(cluster, moves_max) {
        return false;
    }
    if (0..cluster.sides.len()).all(|at| cluster.off(at).is_none()) {
        take_back(cluster);
    }
    true
}

/// Empties the shards of weight 0, the heaviest buckets first, each onto the shard that is least full with it.
fn drain(cluster: &mut Cluster, moves_max: usize) -> bool {
    let drained = cluster.sides.iter().filter(|side| side.weight() == 0);
    let mut leaving: Vec<usize> = drained.flat_map(|side| side.items.iter().copied()).collect();
    leaving.sort_by_key(|&item| Reverse(cluster.items[item].measure));
    for item in leaving {
        if cluster.displaced >= moves_max {
            return false;
        }
        let measure = cluster.items[item].measure;
        if let Some(to) = cluster.least_full_with(measure, |_| true) {
            cluster.put(item, to);
        }
    }
    true
}

/// Helps one shard after the other, the one that is furthest out first, until nothing helps any more.
fn help_all(cluster: &mut Cluster, moves_max: usize) -> bool {
    let mut steps = STEPS_PER_PART * (cluster.items.len() + cluster.sides.len());
    // Whom nothing helps is asked again when all others are done, since their changes may have made room.
    let mut is_stuck = vec![false; cluster.sides.len()];
    let mut has_changed = false;
    while steps > 0 {
        let waiting = (0..cluster.sides.len()).filter(|&at| !is_stuck[at] && cluster.sides[at].weight() > 0);
        let out = waiting.filter(|&at| !cluster.off(at).is_none());
        let Some(at) = out.max_by(|&one, &other| cluster.off(one).compare(cluster.off(other))) else {
            if !has_changed {
                return true;
            }
            has_changed = false;
            is_stuck.fill(false);
            continue;
        };
        // Where one bucket is all that may move, an exchange would wait for ever.
        let exchange = || if moves_max > 1 { best_exchange(cluster, at) } else { None };
        let Some(change) = best_move(cluster, at).or_else(exchange) else {
            is_stuck[at] = true;
            continue;
        };
        let away = |item: usize| usize::from(cluster.items[item].now == cluster.items[item].home);
        if cluster.displaced + away(change.out) + change.back.map_or(0, away) > moves_max {
            return false;
        }
        let (from, to) = (cluster.items[change.out].now, change.to);
        cluster.put(change.out, to);
        if let Some(back) = change.back {
            cluster.put(back, from);
        }
        has_changed = true;
        steps -= 1;
    }
    true
}

/// Whom a shard can help, or be helped by: who gives and who takes, the likeliest pair first.
fn pairs(cluster: &Cluster, at: At) -> impl Iterator<Item = (At, At)> + '_ {
    let (takers, givers) = if cluster.is_over(at) {
        (Some(cluster.emptiest_first()), None)
    } else {
        (None, Some(cluster.emptiest_first().rev()))
    };
    let takes = takers.into_iter().flatten().map(move |to| (at, to));
    let gives = givers.into_iter().flatten().map(move |from| (from, at));
    takes.chain(gives).filter(|(from, to)| from != to)
}

/// The best single move for a shard that is out of balance, with the first partner that any move helps with.
fn best_move(cluster: &Cluster, at: At) -> Option<Change> {
    pairs(cluster, at).find_map(|(from, to)| {
        let off = |at: At| cluster.sides[at].off(cluster.sides[at].held);
        let off = off(from) + off(to);
        let mut best: Option<Change> = None;
        for &out in &cluster.sides[from].items {
            let held = &cluster.items[out];
            // Most buckets are passed over here: whatever they do, the best so far does more.
            let most = off.min(2 * held.measure);
            if best.is_some_and(|best| !best.may_be_beaten(most, held.cost, held.measure)) {
                continue;
            }
            let Some(effect) = cluster.effect(from, to, held.measure, 0) else { continue };
            let change = Change { effect, out, to, back: None, cost: held.cost, measure: held.measure };
            if best.is_none_or(|best| change.is_better(&best)) {
                best = Some(change);
            }
        }
        best
    })
}

/// The best exchange of two buckets, with the first partner that any exchange helps with.
fn best_exchange(cluster: &Cluster, at: At) -> Option<Change> {
    pairs(cluster, at).find_map(|(from, to)| {
        let measure = |item: &usize| cluster.items[*item].measure;
        let mut backs = cluster.sides[to].items.clone();
        backs.sort_by_key(measure);
        let (source, target) = (&cluster.sides[from], &cluster.sides[to]);
        let need = source.held.saturating_sub(source.high).max(target.low.saturating_sub(target.held));
        let changes = cluster.sides[from].items.iter().flat_map(|&out| {
            // What comes back should leave just what is needed; its two neighbours by weight are nearest to that.
            let wanted = measure(&out).saturating_sub(need);
            let next = backs.partition_point(|back| measure(back) <= wanted);
            let near = &backs[next.saturating_sub(1)..backs.len().min(next + 1)];
            near.iter().filter_map(move |&back| exchange(cluster, (from, to), out, back))
        });
        changes.reduce(|best, change| if change.is_better(&best) { change } else { best })
    })
}

fn exchange(cluster: &Cluster, (from, to): (At, At), out: usize, back: usize) -> Option<Change> {
    let (gone, come) = (&cluster.items[out], &cluster.items[back]);
    let effect = cluster.effect(from, to, gone.measure, come.measure)?;
    let (cost, measure) = (gone.cost + come.cost, gone.measure + come.measure);
    Some(Change { effect, out, to, back: Some(back), cost, measure })
}

/// Takes back the moves that balance does not need, the dearest first.
fn take_back(cluster: &mut Cluster) {
    let mut away: Vec<usize> = (0..cluster.items.len())
        .filter(|&item| cluster.items[item].now != cluster.items[item].home)
        .filter(|&item| cluster.sides[cluster.items[item].home].weight() > 0)
        .collect();
    away.sort_by_key(|&item| Reverse(cluster.items[item].cost));
    for item in away {
        let held = &cluster.items[item];
        let (home, now) = (&cluster.sides[held.home], &cluster.sides[held.now]);
        if home.held + held.measure <= home.high && now.held - held.measure >= now.low {
            cluster.put(item, held.home);
        }
    }
}
