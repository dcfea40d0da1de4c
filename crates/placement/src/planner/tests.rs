//! What holds of every plan, and how near plans come to the best there are.

use super::*;
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};

#[derive(Debug, Clone)]
struct Given {
    shards: Vec<Shard>,
    items: Vec<Item>,
    pins: Vec<Pin>,
    by: By,
}

impl Given {
    fn plan(&self, moves_max: Option<usize>) -> Plan {
        plan(&self.shards, &self.items, &self.pins, self.by, moves_max).unwrap()
    }

    /// The same cluster when a plan's moves are done.
    fn after(&self, plan: &Plan) -> Given {
        let to: BTreeMap<Bucket, ShardNo> = plan.moves.iter().map(|it| (it.bucket, it.to)).collect();
        let item = |it: &Item| Item { shard: to.get(&it.bucket).copied().unwrap_or(it.shard), ..*it };
        Given { items: self.items.iter().map(item).collect(), ..self.clone() }
    }

    fn measure(&self, item: &Item) -> u64 {
        if self.by == By::Size { item.bytes.max(1) } else { item.load.max(1) }
    }

    fn drained(&self) -> impl Iterator<Item = &Item> {
        let weight = |shard| self.shards.iter().find(|it| it.shard == shard).unwrap().weight;
        self.items.iter().filter(move |item| weight(item.shard) == 0)
    }
}

fn bucket(number: usize) -> Bucket {
    Bucket::try_from(u16::try_from(number).unwrap()).unwrap()
}

fn shards(weights: &[u32]) -> Vec<Shard> {
    weights.iter().zip(0..).map(|(&weight, number)| Shard { shard: ShardNo(number), weight }).collect()
}

fn by() -> impl Strategy<Value = By> {
    prop_oneof![Just(By::Size), Just(By::Load)]
}

/// Clusters of any shape; amounts below `most`, some far below it.
fn given(most: u64) -> impl Strategy<Value = Given> {
    let amount = move || prop_oneof![0..=most, 0..=most / 50];
    let weights =
        vec(prop_oneof![3 => 1_u32..5, 1 => Just(0)], 1..9).prop_filter("some room", |it| it.iter().any(|&w| w > 0));
    (weights, by()).prop_flat_map(move |(weights, by)| {
        let shards = shards(&weights);
        let on = 0..i16::try_from(shards.len()).unwrap();
        let items = hash_map(0_usize..4_096, (on.clone(), amount(), amount()), 0..80);
        let pins = vec((0_usize..4_096, on, amount(), amount()), 0..4);
        (items, pins).prop_map(move |(items, pins)| {
            let mut items: Vec<Item> = items
                .into_iter()
                .map(|(at, (shard, bytes, load))| Item { bucket: bucket(at), shard: ShardNo(shard), bytes, load })
                .collect();
            items.sort_by_key(|it| it.bucket);
            let pin = |(at, shard, bytes, load)| Pin { bucket: bucket(at), shard: ShardNo(shard), bytes, load };
            Given { shards: shards.clone(), items, pins: pins.into_iter().map(pin).collect(), by }
        })
    })
}

/// Clusters in which no bucket is heavier than a tenth of the smallest share, and pins leave room.
fn easy() -> impl Strategy<Value = Given> {
    (vec(1_u32..4, 1..7), vec(0_u32..2, 0..2), 400_usize..900, by(), any::<u64>()).prop_map(
        |(weights, drained, buckets, by, seed)| {
            let shards = shards(&[weights.clone(), drained.into_iter().map(|_| 0).collect()].concat());
            let mut random = Random(seed | 1);
            // Sometimes everything is in one place, sometimes everywhere.
            let spread = random.below(shards.len() as u64) + 1;
            let items = (0..buckets).map(|at| Item {
                bucket: bucket(at),
                shard: ShardNo(i16::try_from(random.below(spread)).unwrap()),
                bytes: 500 + random.below(500),
                load: 500 + random.below(500),
            });
            Given { items: items.collect(), shards, pins: Vec::new(), by }
        },
    )
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// How far the worst shard with a weight is out, in shares.
fn worst(shares: &[ShardShare]) -> f64 {
    let off = |it: &ShardShare| it.fill().map_or(0.0, |fill| if it.within { 0.0 } else { (fill - 1.0).abs() });
    shares.iter().map(off).fold(0.0, f64::max)
}

/// Who is placed apart on a shard that is to be emptied goes back to the bucket, wherever that is: the shard is in nobody's way.
#[test]
fn pins_on_a_drained_shard_keep_no_plan_from_its_end() {
    let item = |at: usize, shard| Item { bucket: bucket(at), shard: ShardNo(shard), bytes: 100, load: 1 };
    let pins = vec![Pin { bucket: bucket(0), shard: ShardNo(2), bytes: 50, load: 1 }];
    let items = (0..10).map(|at| item(at, i16::try_from(at % 2).unwrap())).collect();
    let plan = Given { shards: shards(&[1, 1, 0]), items, pins, by: By::Size }.plan(None);
    assert_eq!((plan.moves.len(), plan.reached), (0, Reached::Within));
}

proptest! {
    #[test]
    fn every_bucket_stays_once_and_goes_where_there_is_room(given in given(10_000)) {
        let plan = given.plan(None);
        let mut seen = HashSet::new();
        for it in &plan.moves {
            let item = given.items.iter().find(|item| item.bucket == it.bucket).unwrap();
            let to = given.shards.iter().find(|shard| shard.shard == it.to).unwrap();
            prop_assert!(seen.insert(it.bucket) && it.from != it.to && to.weight > 0);
            prop_assert_eq!((it.from, it.bytes), (item.shard, item.bytes));
        }
        let buckets = |shares: &[ShardShare]| shares.iter().map(|it| it.buckets).sum::<u32>();
        prop_assert_eq!(buckets(&plan.before), buckets(&plan.after));
        prop_assert_eq!(&given.after(&plan).plan(Some(0)).before, &plan.after);
        prop_assert_eq!(given.plan(None), plan, "the same is planned for the same");
    }

    #[test]
    fn planning_again_after_a_plan_plans_nothing(given in given(10_000)) {
        let plan = given.plan(None);
        let again = given.after(&plan).plan(None);
        prop_assert!(again.moves.is_empty(), "{:?}", again.moves);
        prop_assert_eq!(again.reached, plan.reached);
    }

    #[test]
    fn no_shard_ends_worse_than_the_worst_was(given in given(10_000)) {
        let mut given = given;
        given.shards.iter_mut().for_each(|it| it.weight = it.weight.max(1));
        let plan = given.plan(None);
        prop_assert!(worst(&plan.after) <= worst(&plan.before) + 0.001);
    }

    #[test]
    fn a_drained_shard_ends_empty_and_a_plan_says_what_it_reached(given in given(10_000)) {
        let plan = given.plan(None);
        for it in plan.after.iter().filter(|it| it.weight == 0) {
            prop_assert_eq!(it.buckets, 0);
        }
        let out: Vec<ShardNo> = plan.after.iter().filter(|it| !it.within).map(|it| it.shard).collect();
        match plan.reached {
            Reached::Within => prop_assert!(out.is_empty()),
            Reached::AsNearAsPossible(said) => {
                prop_assert_eq!(said.iter().map(|it| it.shard).collect::<Vec<_>>(), out);
            }
            Reached::MaxMoves => prop_assert!(false, "no bound was given"),
        }
    }

    #[test]
    fn small_buckets_come_into_balance_for_few_bytes(given in easy()) {
        let plan = given.plan(None);
        let share = plan.before.iter().filter(|it| it.weight > 0).map(|it| it.share).min().unwrap();
        let largest = given.items.iter().map(|item| given.measure(item)).max().unwrap();
        prop_assume!(largest * 10 <= share);
        prop_assert_eq!(&plan.reached, &Reached::Within);
        // What is too much must go, what is too little must come, and what is drained must go anyway.
        let weighted = || plan.before.iter().filter(|it| it.weight > 0);
        let over: u64 = weighted().map(|it| it.held.saturating_sub(it.share * 11 / 10)).sum();
        let under: u64 = weighted().map(|it| (it.share * 9 / 10).saturating_sub(it.held)).sum();
        let drained: u64 = given.drained().map(|item| given.measure(item)).sum();
        let least = drained + over.max(under.saturating_sub(drained));
        let moved = |it: &Move| given.items.iter().filter(|item| item.bucket == it.bucket).map(|item| given.measure(item)).sum::<u64>();
        let moved: u64 = plan.moves.iter().map(moved).sum();
        let rounding = largest * given.shards.len() as u64;
        prop_assert!(moved <= least + least / 2 + rounding, "{moved} moved, {least} must");
    }

    #[test]
    fn a_round_uses_no_shard_twice(given in given(10_000)) {
        let plan = given.plan(None);
        let rounds = plan.rounds();
        for round in &rounds {
            let sources: HashSet<ShardNo> = round.iter().map(|it| it.from).collect();
            let targets: HashSet<ShardNo> = round.iter().map(|it| it.to).collect();
            prop_assert_eq!((sources.len(), targets.len()), (round.len(), round.len()));
        }
        let mut told: Vec<(Bucket, ShardNo, ShardNo)> = rounds.iter().flatten()
            .flat_map(|it| it.buckets.iter().map(|&bucket| (bucket, it.from, it.to))).collect();
        told.sort();
        prop_assert_eq!(told, plan.moves.iter().map(|it| (it.bucket, it.from, it.to)).collect::<Vec<_>>());
        prop_assert_eq!(rounds.iter().flatten().map(|it| it.bytes).sum::<u64>(), plan.bytes());
    }

    #[test]
    fn a_bounded_plan_keeps_its_bound_and_its_successors_end(given in given(10_000), moves_max in 1_usize..9) {
        let mut now = given.clone();
        for _ in 0..1_000 {
            let plan = now.plan(Some(moves_max));
            prop_assert!(plan.moves.len() <= moves_max);
            if plan.reached != Reached::MaxMoves {
                prop_assert_eq!(now.after(&plan).drained().count(), 0);
                return Ok(());
            }
            now = now.after(&plan);
        }
        prop_assert!(false, "it goes on for ever");
    }

    #[test]
    fn any_amount_can_be_planned(given in given(u64::MAX)) {
        given.plan(None);
    }
}

/// A cluster of 256 shards with every bucket, where everything has its own size.
fn large(shard_of: impl Fn(u64, &mut Random) -> u64, weights: &[u32; 256], by: By) -> Given {
    let mut random = Random(7);
    let items = (0..4_096).map(|at| Item {
        bucket: bucket(at),
        shard: ShardNo(i16::try_from(shard_of(at as u64, &mut random)).unwrap()),
        bytes: (10 << 30) + random.below(20 << 30),
        load: 500_000 + random.below(1_000_000),
    });
    Given { shards: shards(weights), items: items.collect(), pins: Vec::new(), by }
}

#[test]
fn a_large_cluster_is_planned_within_a_second() {
    let mut half = [1; 256];
    half[128..].fill(0);
    let mut mixed = [1; 256];
    mixed.iter_mut().step_by(3).for_each(|weight| *weight = 3);
    for by in [By::Size, By::Load] {
        for (name, given) in [
            ("in order", large(|at, _| at % 256, &[1; 256], by)),
            ("at random", large(|_, random| random.below(256), &[1; 256], by)),
            ("all on one", large(|_, _| 0, &[1; 256], by)),
            ("on four, to be spread", large(|at, _| at % 4, &[1; 256], by)),
            ("half of them drained", large(|at, _| at % 256, &half, by)),
            ("of two sizes", large(|at, _| at % 256, &mixed, by)),
        ] {
            let begun = std::time::Instant::now();
            let plan = given.plan(None);
            let took = begun.elapsed();
            assert_eq!(plan.reached, Reached::Within, "{by} {name}");
            // Without optimisation it may take ten times as long.
            let limit_s = if cfg!(debug_assertions) { 10 } else { 1 };
            assert!(took.as_secs() < limit_s, "{by} {name}: {took:?}");
        }
    }
}

/// The fewest bytes that bring all shards into balance, of every way to place the buckets.
fn fewest(given: &Given) -> Option<u64> {
    let count = given.shards.len();
    let shares = given.plan(Some(0)).before;
    let total: u64 = shares.iter().map(|it| it.held).sum();
    let weights: u64 = given.shards.iter().map(|it| u64::from(it.weight)).sum();
    let ways = count.pow(u32::try_from(given.items.len()).unwrap());
    let bytes = |way: usize| {
        let (mut way, mut held, mut bytes) = (way, vec![0; count], 0);
        for item in &given.items {
            held[way % count] += given.measure(item);
            bytes += if ShardNo(i16::try_from(way % count).unwrap()) == item.shard { 0 } else { item.bytes };
            way /= count;
        }
        let is_within = |(shard, held): (&Shard, &u64)| {
            (10 * weights * held).abs_diff(10 * total * u64::from(shard.weight)) <= total * u64::from(shard.weight)
        };
        given.shards.iter().zip(&held).all(is_within).then_some(bytes)
    };
    (0..ways).filter_map(bytes).min()
}

#[test]
fn plans_come_near_to_the_best_there_are() {
    for by in [By::Size, By::Load] {
        let mut random = Random(3);
        let (mut possible, mut reached, mut bytes, mut least) = (0, 0, 0, 0);
        for _ in 0..60 {
            let items = (0..9).map(|at| Item {
                bucket: bucket(at),
                shard: ShardNo(i16::try_from(random.below(3)).unwrap()),
                bytes: 100 + random.below(900),
                load: 100 + random.below(900),
            });
            let given = Given { items: items.collect(), shards: shards(&[1, 1, 2]), pins: Vec::new(), by };
            let Some(fewest) = fewest(&given) else { continue };
            possible += 1;
            let plan = given.plan(None);
            if plan.reached == Reached::Within {
                reached += 1;
                bytes += plan.bytes();
                least += fewest;
            }
        }
        assert!(possible > 50 && reached * 20 >= possible * 19, "{by}: {reached} of {possible} were reached");
        assert!(bytes * 20 <= least * 27, "{by}: {bytes} bytes move, {least} would do");
    }
}
