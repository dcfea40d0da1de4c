//! Synthetic communities: as many users, threads and posts as wanted, the same ones for the same seed at any number of
//! shards.
//!
//! Who writes, and where, follows Zipf's law; lengths of texts are log-normal, as in forums; times cover the two years
//! from [`BEGIN`]. Rows go the way of every bulk write. In memory: some 120 bytes per thread.

use crate::bulk::{BATCH, BulkPost, BulkThread, BulkUser, BulkWriter, Copied};
use crate::community::Community;
use crate::error::{Error, Result};
use crate::text::Format;
use crate::{Parent, import::ShardRows};
use chrono::{DateTime, TimeDelta, Utc};
use placement::{Bucket, PostId, ThreadId, UserId, derived_id};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, LogNormal, Zipf};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Instant;
use uuid::Builder;

/// When the first thread is opened: 1 January 2024, in seconds since 1970.
pub const BEGIN: i64 = 1_704_067_200;
/// How long people write.
const SPAN_MS: i64 = 2 * 365 * 24 * 3_600 * 1_000;
/// The steepest law that is allowed: the first author has nearly everything.
const ZIPF_MAX: f64 = 10.0;
/// Text that everybody quotes from.
const CORPUS_BYTES: usize = 1 << 18;
/// The longest text.
const TEXT_BYTES_MAX: usize = 20_000;

/// How large a community, and which one of that size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Plan {
    /// How many people.
    pub users: u32,
    /// How many threads.
    pub threads: u32,
    /// How many posts.
    pub posts: u32,
    /// Which one.
    pub seed: u64,
    /// Zipf's exponent of authors and of threads: from 0, which is even, to 10.
    pub zipf: f64,
}

/// How far a generation has come.
#[derive(Debug, Clone, Copy)]
pub struct Generated {
    /// What is being written: `users`, `threads`, `posts`; at the end `deliver`.
    pub phase: &'static str,
    /// Rows made so far.
    pub made: u64,
    /// Rows in all.
    pub total: u64,
}

/// What a generation did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GenerateReport {
    /// Rows written, by what they are: `users`, `threads`, `posts`.
    pub written: BTreeMap<&'static str, u64>,
    /// Rows that were there already, likewise.
    pub existing: BTreeMap<&'static str, u64>,
    /// Rows written, by shard.
    pub per_shard: Vec<ShardRows>,
    /// Events that found their database down; a relay delivers them.
    pub undelivered: u64,
    /// How long it took.
    pub seconds: f64,
}

/// What posts must know of their thread, and the post that the next one may answer.
struct Opened {
    thread_id: ThreadId,
    author_id: UserId,
    at_ms: i64,
    last: Option<(Parent, i64)>,
}

/// A community in the making.
struct Maker {
    plan: Plan,
    random: ChaCha8Rng,
    author_rank: Zipf<f64>,
    thread_rank: Zipf<f64>,
    length: LogNormal<f64>,
    corpus: String,
}

const KINDS: [&str; 3] = ["users", "threads", "posts"];

/// Writes a community. The same plan again changes nothing, and one that was cut off continues.
pub async fn generate(
    community: &Community,
    plan: Plan,
    progress: &mut (dyn FnMut(Generated) + Send),
) -> Result<GenerateReport> {
    let started = Instant::now();
    let mut maker = Maker::new(plan)?;
    let mut writer = community.bulk_writer();
    let written = write(&mut maker, &mut writer, progress).await;
    progress(Generated { phase: "deliver", made: plan.total(), total: plan.total() });
    let finished = writer.finish().await;
    let left = community.relay_what_is_left().await;
    written.and(finished)?;
    let mut report = report(writer.copied(), &community.shards().numbers());
    report.undelivered = left?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

async fn write(maker: &mut Maker, writer: &mut BulkWriter, progress: &mut (dyn FnMut(Generated) + Send)) -> Result<()> {
    let plan = maker.plan;
    let mut made = 0;
    let mut say = |phase, rows: usize| {
        made += u64::try_from(rows).unwrap_or(0);
        progress(Generated { phase, made, total: plan.total() });
    };
    for range in batches(plan.users) {
        let users: Vec<BulkUser> = range.map(|n| maker.user(n)).collect();
        say("users", users.len());
        writer.users("users", users).await?;
    }
    let mut opened = Vec::new();
    for range in batches(plan.threads) {
        let threads: Vec<BulkThread> = range.map(|n| maker.thread(n)).collect();
        opened.extend(threads.iter().map(Opened::new));
        say("threads", threads.len());
        writer.threads("threads", threads).await?;
    }
    for range in batches(plan.posts) {
        let posts: Vec<BulkPost> = range.map(|n| maker.post(n, &mut opened)).collect();
        say("posts", posts.len());
        writer.posts("posts", posts).await?;
    }
    Ok(())
}

fn batches(count: u32) -> impl Iterator<Item = std::ops::Range<u32>> {
    let size = u32::try_from(BATCH).unwrap_or(u32::MAX);
    (0..count.div_ceil(size)).map(move |batch| batch * size..count.min(batch.saturating_add(1).saturating_mul(size)))
}

fn report(copied: &BTreeMap<&'static str, Copied>, shards: &[placement::ShardNo]) -> GenerateReport {
    let on = |kind, shard| copied.get(kind).and_then(|c: &Copied| c.written.get(shard)).copied().unwrap_or(0);
    GenerateReport {
        written: KINDS.map(|kind| (kind, copied.get(kind).map_or(0, Copied::total))).into(),
        existing: KINDS.map(|kind| (kind, copied.get(kind).map_or(0, |c| c.existing))).into(),
        per_shard: shards
            .iter()
            .map(|shard| ShardRows {
                shard: *shard,
                users: on("users", shard),
                threads: on("threads", shard),
                posts: on("posts", shard),
            })
            .collect(),
        ..GenerateReport::default()
    }
}

impl Plan {
    fn total(&self) -> u64 {
        u64::from(self.users) + u64::from(self.threads) + u64::from(self.posts)
    }
}

impl Opened {
    fn new(thread: &BulkThread) -> Opened {
        Opened {
            thread_id: thread.thread_id,
            author_id: thread.author_id,
            at_ms: thread.created_at.timestamp_millis(),
            last: None,
        }
    }
}

impl Maker {
    fn new(plan: Plan) -> Result<Maker> {
        if plan.users == 0 {
            return Err(Error::invalid("users", "somebody must write: at least 1"));
        }
        if plan.threads == 0 && plan.posts > 0 {
            return Err(Error::invalid("threads", "posts need a thread: at least 1"));
        }
        if !(0.0..=ZIPF_MAX).contains(&plan.zipf) {
            return Err(Error::invalid("zipf", format!("{} is not from 0 to {ZIPF_MAX}", plan.zipf)));
        }
        let ranks = |count: u32| {
            Zipf::new(f64::from(count.max(1)), plan.zipf)
                .map_err(|error| Error::invalid("zipf", format!("{} is no exponent: {error}", plan.zipf)))
        };
        let mut random = ChaCha8Rng::seed_from_u64(plan.seed);
        Ok(Maker {
            author_rank: ranks(plan.users)?,
            thread_rank: ranks(plan.threads)?,
            // Half of the posts of a forum have less than 250 bytes, one in twenty more than 1,700.
            length: LogNormal::new(5.5, 1.15).map_err(|error| Error::invalid("length", error.to_string()))?,
            corpus: corpus(&mut random),
            random,
            plan,
        })
    }

    fn user(&mut self, number: u32) -> BulkUser {
        let Plan { seed, .. } = self.plan;
        let name = format!("{}{}", syllables(number), number);
        let registered = millis(BEGIN * 1_000 - i64::from(self.random.random_range(0..31_536_000_u32)) * 1_000);
        BulkUser {
            user_id: self.user_id(number),
            user_names: vec![name.clone(), format!("{name}-{seed}"), format!("generated-{seed:x}-{number}")],
            first_name: Some(capital(&syllables(number))),
            bio: number.is_multiple_of(3).then(|| self.text(60)),
            profile_pic_url: None,
            metadata: json!({ "generated": seed }),
            created_at: registered,
        }
    }

    fn thread(&mut self, number: u32) -> BulkThread {
        let author_id = self.author();
        let share = f64::from(number) / f64::from(self.plan.threads.max(1));
        let at_ms = BEGIN * 1_000 + whole(share * as_f64(SPAN_MS) * 0.95);
        let created_at = millis(at_ms);
        let title = self.text(50);
        BulkThread {
            thread_id: ThreadId(content_id(self.plan.seed, "thread", number, author_id.bucket(), created_at)),
            author_id,
            title: capital(&title),
            body: self.any_text(),
            format: Format::Plain,
            score: self.random.random_range(0..20),
            metadata: json!({}),
            created_at,
        }
    }

    fn post(&mut self, number: u32, threads: &mut [Opened]) -> BulkPost {
        let author_id = self.author();
        let place = scattered(rank(&self.thread_rank, &mut self.random), self.plan.threads, self.plan.seed ^ 0x7468);
        let thread = &mut threads[usize::try_from(place).unwrap_or(0)];
        // Most is said soon after the opening; an answer comes after what it answers.
        let soon = self.random.random::<f64>().powi(4);
        let answers = thread.last.filter(|_| self.random.random_bool(0.3));
        let after = answers.map_or(thread.at_ms, |(_, at_ms)| at_ms);
        let at_ms = after + 1 + whole(soon * as_f64((BEGIN * 1_000 + SPAN_MS - after).max(0)));
        let created_at = millis(at_ms);
        let post_id = PostId(content_id(self.plan.seed, "post", number, author_id.bucket(), created_at));
        let (thread_id, thread_author_id) = (thread.thread_id, thread.author_id);
        thread.last = Some((Parent { post_id, author_id }, at_ms));
        BulkPost {
            post_id,
            author_id,
            thread_id,
            thread_author_id,
            parent: answers.map(|(parent, _)| parent),
            body: self.any_text(),
            format: Format::Plain,
            score: self.random.random_range(0..10),
            metadata: json!({}),
            created_at,
        }
    }

    fn author(&mut self) -> UserId {
        let number = scattered(rank(&self.author_rank, &mut self.random), self.plan.users, self.plan.seed);
        self.user_id(number)
    }

    fn user_id(&self, number: u32) -> UserId {
        let low = mixed(self.plan.seed, "user", number);
        let high = mixed(self.plan.seed, "user again", number);
        UserId(Builder::from_random_bytes(((u128::from(high) << 64) | u128::from(low)).to_be_bytes()).into_uuid())
    }

    /// A text as long as people's are.
    fn any_text(&mut self) -> String {
        let bytes = self.length.sample(&mut self.random).clamp(10.0, as_f64(TEXT_BYTES_MAX));
        self.text(usize::try_from(whole(bytes)).unwrap_or(10))
    }

    /// Whole words, of some bytes or a few more.
    fn text(&mut self, bytes: usize) -> String {
        let start = self.random.random_range(0..self.corpus.len() - TEXT_BYTES_MAX - 64);
        let rest = &self.corpus[start..];
        let rest = rest.split_once(' ').map_or(rest, |(_, rest)| rest);
        let end = rest[bytes..].find(' ').map_or(bytes, |more| bytes + more);
        rest[..end].to_owned()
    }
}

/// A number from 0 of a rank from 1, as Zipf's law has it.
fn rank(law: &Zipf<f64>, random: &mut ChaCha8Rng) -> u32 {
    u32::try_from(whole(law.sample(random))).unwrap_or(1).saturating_sub(1)
}

/// The rank's place among `count`: neighbours in rank are not neighbours in number.
fn scattered(rank: u32, count: u32, seed: u64) -> u32 {
    let count = u64::from(count.max(1));
    // A step without a common divisor reaches every place once.
    let step = (0x9E37_79B1 + (seed & 0xFFFF) * 2..).step_by(2).find(|step| divisor(*step, count) == 1).unwrap_or(1);
    u32::try_from(u64::from(rank) % count * (step % count) % count).unwrap_or(0)
}

fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}

fn content_id(seed: u64, kind: &str, number: u32, bucket: Bucket, at: DateTime<Utc>) -> uuid::Uuid {
    derived_id(bucket, at, mixed(seed, kind, number))
}

/// 64 bits of a seed, a kind and a number: the finalizer of `SplitMix64`, twice.
fn mixed(seed: u64, kind: &str, number: u32) -> u64 {
    let finish = |mut bits: u64| {
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    };
    let kind = kind.bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(257).wrapping_add(u64::from(byte)));
    finish(finish(seed ^ kind.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_add(u64::from(number)))
}

const SYLLABLES: [&str; 16] =
    ["ba", "den", "fi", "gor", "ha", "kel", "lu", "mi", "no", "pra", "qui", "ra", "sto", "ti", "vu", "zem"];

/// A word that looks like a name or a noun.
fn syllables(number: u32) -> String {
    let mut rest = mixed(0, "syllables", number);
    let mut word = String::new();
    for _ in 0..2 + rest % 3 {
        rest /= 16;
        word.push_str(SYLLABLES[usize::try_from(rest % 16).unwrap_or(0)]);
    }
    word
}

fn capital(text: &str) -> String {
    let mut all = text.chars();
    all.next().map_or_else(String::new, |first| first.to_uppercase().chain(all).collect())
}

/// Sentences of invented words, the frequent ones short.
fn corpus(random: &mut ChaCha8Rng) -> String {
    const LITTLE: [&str; 12] = ["the", "of", "a", "to", "and", "in", "is", "it", "you", "that", "for", "not"];
    let mut text = String::with_capacity(CORPUS_BYTES + 32);
    while text.len() < CORPUS_BYTES {
        match random.random_range(0..10_u32) {
            0..4 => text.push_str(LITTLE[random.random_range(0..LITTLE.len())]),
            _ => text.push_str(&syllables(random.random_range(0..4_000))),
        }
        text.push_str(if random.random_range(0..12_u32) == 0 { ". " } else { " " });
    }
    text
}

fn millis(since_1970: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::milliseconds(since_1970)
}

#[expect(clippy::cast_possible_truncation, reason = "milliseconds of two years, ranks and lengths: far below 2^52")]
fn whole(value: f64) -> i64 {
    value as i64
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of two years and lengths: far below 2^52")]
fn as_f64<T: TryInto<i64>>(value: T) -> f64 {
    value.try_into().unwrap_or(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    fn plan(seed: u64) -> Plan {
        Plan { users: 200, threads: 50, posts: 3_000, seed, zipf: 1.1 }
    }

    fn posts(plan: Plan) -> Vec<BulkPost> {
        let mut maker = Maker::new(plan).unwrap();
        let mut opened: Vec<Opened> = (0..plan.threads).map(|n| Opened::new(&maker.thread(n))).collect();
        (0..plan.posts).map(|n| maker.post(n, &mut opened)).collect()
    }

    #[test]
    fn the_same_for_the_same_seed() {
        let told = |seed| posts(plan(seed)).into_iter().map(|post| (post.post_id, post.body)).collect::<Vec<_>>();
        assert_eq!(told(7), told(7));
        assert_ne!(told(7), told(8));
    }

    #[test]
    fn authors_follow_zipf_and_everything_is_in_order() {
        let posts = posts(plan(3));
        let ids: HashSet<PostId> = posts.iter().map(|post| post.post_id).collect();
        assert_eq!(ids.len(), posts.len());
        let at: HashMap<PostId, DateTime<Utc>> = posts.iter().map(|post| (post.post_id, post.created_at)).collect();
        let end = millis(BEGIN * 1_000 + SPAN_MS) + TimeDelta::seconds(1);
        let mut by_author: HashMap<UserId, u32> = HashMap::new();
        for post in &posts {
            assert!(post.created_at < end && !post.body.is_empty());
            assert!(post.parent.is_none_or(|parent| at[&parent.post_id] < post.created_at));
            *by_author.entry(post.author_id).or_default() += 1;
        }
        let mut counts: Vec<u32> = by_author.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let share = f64::from(counts[0]) / f64::from(plan(3).posts);
        assert!((0.17..0.27).contains(&share), "the first of 200 at 1.1 has 0.22 of all: {share}");
    }

    #[test]
    fn every_rank_has_a_place_of_its_own() {
        for count in [1, 2, 10, 97, 1_000] {
            let places: HashSet<u32> = (0..count).map(|rank| scattered(rank, count, 5)).collect();
            assert_eq!(places.len(), usize::try_from(count).unwrap());
        }
    }

    #[test]
    fn a_plan_that_cannot_be_is_refused() {
        assert!(Maker::new(Plan { users: 0, ..plan(1) }).is_err());
        assert!(Maker::new(Plan { threads: 0, ..plan(1) }).is_err());
        assert!(Maker::new(Plan { zipf: f64::NAN, ..plan(1) }).is_err());
        assert!(Maker::new(Plan { zipf: -1.0, ..plan(1) }).is_err());
        assert!(Maker::new(Plan { zipf: f64::INFINITY, ..plan(1) }).is_err());
    }
}
