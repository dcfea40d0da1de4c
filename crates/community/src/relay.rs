//! The relay: delivers what writers left behind, sums threads' totals, settles claims. Any number may run.

use crate::community::{Community, Inner};
use crate::delivery::Event;
use crate::error::{Error, Result};
use futures_util::future::join_all;
use placement::ShardNo;
use serde::Serialize;
use shards::Unfenced;
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio_postgres::types::ToSql;

/// What a pass of the relay did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Relayed {
    /// Events delivered, by kind.
    pub delivered: BTreeMap<String, u64>,
    /// Events that found their database down; they wait.
    pub waiting: u64,
    /// Why, of the last of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// Pending claims settled.
    pub claims_settled: u64,
    /// Shards that could not be asked.
    pub shards_down: Vec<ShardNo>,
}

impl Relayed {
    /// Adds what was done on another shard in the same round.
    fn merge(&mut self, other: Relayed) {
        self.waiting += other.waiting;
        self.waiting_for = other.waiting_for.or_else(|| self.waiting_for.take());
        self.shards_down.extend(other.shards_down);
        self.count(other.delivered, other.claims_settled);
    }

    fn count(&mut self, delivered: BTreeMap<String, u64>, claims_settled: u64) {
        for (kind, count) in delivered {
            *self.delivered.entry(kind).or_default() += count;
        }
        self.claims_settled += claims_settled;
    }
}

/// A later round: what it found waiting or down is what counts.
impl AddAssign for Relayed {
    fn add_assign(&mut self, other: Relayed) {
        self.waiting = other.waiting;
        self.waiting_for = other.waiting_for;
        self.shards_down = other.shards_down;
        self.count(other.delivered, other.claims_settled);
    }
}

/// How many events are marked in one transaction: a relocation's stream waits for each.
const MARKED_AT_ONCE: usize = 250;
/// How many facts one pass takes from a shard, or one event more.
const BATCH: i64 = 2_000;
/// Events younger than this are their writer's to deliver; those of a bulk write, which marks them from time to time,
/// twenty times as long. `check` names what is older than a minute.
const WRITERS_TURN_S: f64 = 2.0;

/// The longest rest of a relay.
const REST_MAX: Duration = Duration::from_secs(5);

/// No event without a fact, so that so many facts are in so many events at the most: no more are looked at.
static PENDING: Unfenced = Unfenced::read(
    "SELECT p.bucket, p.outbox_id, p.kind::text, therev.facts_of(p.event) AS facts
       FROM (SELECT n.bucket, n.outbox_id, n.kind, n.event,
                    sum(n.facts) OVER (ORDER BY n.bucket, n.outbox_id) - n.facts AS facts_before
               FROM (SELECT o.bucket, o.outbox_id, o.kind, o AS event,
                            coalesce(jsonb_array_length(o.facts), cardinality(o.owners)) AS facts
                       FROM therev.outbox AS o
                      WHERE o.delivered_at IS NULL AND (o.bucket, o.outbox_id) > ($1, $2)
                        AND o.kind <> ALL ($5::text[]::therev.event_kind[])
                        AND CASE WHEN o.owners IS NOT NULL
                                 THEN o.created_at <= now() - make_interval(secs => 20 * $3::float8)
                                 ELSE o.kind = 'totals' OR o.created_at <= now() - make_interval(secs => $3) END
                      ORDER BY o.bucket, o.outbox_id LIMIT $4) AS n) AS p
      WHERE p.facts_before < $4
      ORDER BY p.bucket, p.outbox_id",
);

/// How many events of a kind wait behind one.
static LEFT_OUT: Unfenced = Unfenced::read(
    "SELECT count(*) FROM therev.outbox AS o
      WHERE o.delivered_at IS NULL AND (o.bucket, o.outbox_id) > ($1, $2)
        AND o.kind = $3::text::therev.event_kind",
);

static IS_PENDING: Unfenced = Unfenced::read("SELECT FROM therev.outbox AS o WHERE o.delivered_at IS NULL LIMIT 1");

static MARK: Unfenced = Unfenced::write(
    "UPDATE therev.outbox AS o SET delivered_at = now(), first_delivered_at = coalesce(o.first_delivered_at, now())
      WHERE o.outbox_id = ANY ($1) AND o.delivered_at IS NULL",
);

impl Community {
    /// As [`Community::deliver_once`], and what a promotion has left is repaired.
    pub async fn relay_once(&self) -> Result<Relayed> {
        let relayed = self.deliver_once().await?;
        self.settle_after_promotions().await;
        Ok(relayed)
    }

    /// Delivers everything that is undelivered now, and settles the claims that are older than the configured time-out.
    ///
    /// What finds its database down stays for the next pass.
    pub async fn deliver_once(&self) -> Result<Relayed> {
        self.relay_pass(0.0).await
    }

    /// As [`Community::relay_once`], after a bulk write, which has mostly told everything itself. Says how many events found
    /// their database down.
    pub(crate) async fn relay_what_is_left(&self) -> Result<u64> {
        let shards = self.shards().numbers();
        let looks = join_all(shards.iter().map(|shard| self.shards().unfenced(*shard, &IS_PENDING, &[]))).await;
        if looks.iter().all(|look| look.as_ref().is_ok_and(Vec::is_empty)) {
            return Ok(0);
        }
        Ok(self.relay_once().await?.waiting)
    }

    /// With the control database down there is none to settle.
    async fn settle_after_promotions(&self) {
        if let Err(error) = self.settle_lives().await {
            tracing::debug!(%error, "the control database does not say whether a server was promoted");
        }
    }

    pub(crate) async fn relay_pass(&self, writers_turn_s: f64) -> Result<Relayed> {
        let mut total = self.deliver_all(writers_turn_s).await;
        let timeout = self.shards().config().claim_timeout_s;
        total.claims_settled += self.settle_claims(seconds(timeout)).await;
        if total.claims_settled > 0 {
            // Settling wrote users' rows, whose events are younger than anybody's turn.
            total += self.deliver_all(0.0).await;
        }
        Ok(total)
    }

    /// Delivers what is undelivered on all shards.
    pub(crate) async fn deliver_all(&self, writers_turn_s: f64) -> Relayed {
        let mut total = Relayed::default();
        // Participants that were delivered make totals, which may be on a shard that was already passed.
        for _ in 0..3 {
            let mut round = Relayed::default();
            // Two at a time: each delivers to several databases at once already.
            let shards = self.shards().numbers();
            for pair in shards.chunks(2) {
                let passes = pair.iter().map(|shard| async move {
                    let mut done = Relayed::default();
                    if let Err(error) = self.relay_shard(*shard, writers_turn_s, &mut done).await {
                        tracing::warn!(%shard, %error, "the relay could not serve a shard");
                        done.shards_down.push(*shard);
                    }
                    done
                });
                for done in join_all(passes).await {
                    round.merge(done);
                }
            }
            let idle = round.delivered.is_empty();
            total += round;
            if idle {
                break;
            }
        }
        self.mark_delivered().await;
        total
    }

    /// One shard's outbox, from its beginning to its end. Kinds whose one database is down are read no further: what waits
    /// for it may be much.
    async fn relay_shard(&self, shard: ShardNo, writers_turn_s: f64, done: &mut Relayed) -> Result<()> {
        self.mark_delivered().await;
        let mut after = (-2_i16, 0_i64);
        let mut left_out: Vec<&str> = Vec::new();
        loop {
            let from: [&(dyn ToSql + Sync); 5] = [&after.0, &after.1, &writers_turn_s, &BATCH, &left_out];
            let rows = self.shards().unfenced(shard, &PENDING, &from).await?;
            let events: Vec<Event> = rows.iter().map(|row| Event::from_row(Some(shard), row)).collect();
            let Some(last) = rows.last() else { return Ok(()) };
            after = (last.get("bucket"), last.get("outbox_id"));
            let all = events.len();
            let outcome = self.deliver(events).await;
            self.mark_delivered().await;
            let count = outcome.delivered.values().sum::<usize>();
            for (kind, number) in outcome.delivered {
                *done.delivered.entry(kind.to_owned()).or_default() += u64::try_from(number).unwrap_or(0);
            }
            done.waiting += u64::try_from(all - count).unwrap_or(0);
            for (kind, error) in outcome.failed {
                tracing::debug!(%shard, kind, %error, "events find their database down");
                done.waiting_for = Some(error.to_string());
                if !is_down(&error) {
                    continue;
                }
                let rows = self.shards().unfenced(shard, &LEFT_OUT, &[&after.0, &after.1, &kind]).await?;
                done.waiting += rows.first().map_or(0, |row| row.get::<_, i64>(0)).unsigned_abs();
                left_out.push(kind);
            }
        }
    }

    /// Writes the marks of what was delivered. A mark that is lost means one more delivery, which changes nothing.
    pub(crate) async fn mark_delivered(&self) {
        self.mark(self.inner.acks.take()).await;
    }

    /// Writes marks beside the caller, of shards for which many wait: a node may have writers and no relay.
    pub(crate) fn mark_many(&self) {
        let many = self.inner.acks.take_many(MARKED_AT_ONCE);
        if !many.is_empty() {
            let community = self.clone();
            tokio::spawn(async move { community.mark(many).await });
        }
    }

    async fn mark(&self, delivered: BTreeMap<ShardNo, Vec<i64>>) {
        let mark = async |(shard, ids): (ShardNo, Vec<i64>)| {
            fail::fail_point!("relay.before_mark");
            for part in ids.chunks(MARKED_AT_ONCE) {
                if let Err(error) = self.shards().unfenced(shard, &MARK, &[&part]).await {
                    tracing::debug!(%shard, %error, "delivered events could not be marked; they will be delivered again");
                }
            }
        };
        join_all(delivered.into_iter().map(mark)).await;
    }

    /// Has every shard make the partitions of the months to come, where they are missing.
    async fn make_months(&self) {
        for shard in self.shards().numbers() {
            if let Err(error) = self.shards().unfenced(shard, &MAKE_MONTHS, &[]).await {
                tracing::warn!(%shard, %error, "the months to come have no partitions yet");
            }
        }
    }

    /// Sees to what is no delivery, for as long as it is polled: what a promotion has left, looked for every so often, and the months to
    /// come.
    pub async fn look_after(&self, period: Duration) {
        look_after_while_alive(Arc::downgrade(&self.inner), period).await;
    }

    /// Runs the relay for as long as the handle lives, every `relay_ms`. What a promotion left is repaired beside it: that reads
    /// whole tables, and meanwhile nobody's events shall wait.
    pub(crate) fn start_relay(&self) {
        let period = Duration::from_millis(self.shards().config().relay_ms);
        if !period.is_zero() {
            tokio::spawn(relay_while_alive(Arc::downgrade(&self.inner), period));
            tokio::spawn(look_after_while_alive(Arc::downgrade(&self.inner), period));
        }
    }
}

async fn relay_while_alive(inner: Weak<Inner>, period: Duration) {
    let mut took = Duration::ZERO;
    loop {
        tokio::time::sleep(relay_rest(period, took)).await;
        let Some(inner) = inner.upgrade() else { return };
        let community = Community { inner };
        let started = Instant::now();
        if let Err(error) = community.relay_pass(WRITERS_TURN_S).await {
            tracing::warn!(%error, "a pass of the relay failed");
        }
        took = started.elapsed();
    }
}

async fn look_after_while_alive(inner: Weak<Inner>, period: Duration) {
    tokio::join!(settle_while_alive(inner.clone(), period), make_months_while_alive(inner));
}

async fn settle_while_alive(inner: Weak<Inner>, period: Duration) {
    loop {
        tokio::time::sleep(period).await;
        let Some(inner) = inner.upgrade() else { return };
        Community { inner }.settle_after_promotions().await;
    }
}

/// Months have to be there three months ahead, whether or not somebody runs the maintenance: without theirs nothing is written.
static MAKE_MONTHS: Unfenced = Unfenced::write("SELECT therev.make_partitions(3)");
/// When that is looked after first, and how often.
const MONTHS: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));

async fn make_months_while_alive(inner: Weak<Inner>) {
    let mut rest = MONTHS.0;
    loop {
        tokio::time::sleep(rest).await;
        let Some(inner) = inner.upgrade() else { return };
        let community = Community { inner };
        community.make_months().await;
        rest = MONTHS.1;
    }
}

/// How long a relay rests after a pass that took so long: three times that, so that at a busy time threads are summed less often
/// rather than be what keeps the shards busy.
pub fn relay_rest(period: Duration, took: Duration) -> Duration {
    period.max((took * 3).min(REST_MAX))
}

/// Whether the next event will fare no better.
fn is_down(error: &Error) -> bool {
    matches!(error, Error::Store(shards::Error::Down { .. } | shards::Error::Closed { .. }))
}

fn seconds(whole: u64) -> f64 {
    f64::from(u32::try_from(whole).unwrap_or(u32::MAX))
}
