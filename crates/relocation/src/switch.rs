//! The switch: the buckets change hands in a few milliseconds, or nothing happened.
//!
//! Each effect is a function of one shard's database and a compare-and-set on its part (`schema/shard/08_relocation.sql`);
//! `tests/runner/model` goes through all their interleavings.

use crate::error::{Error, Result};
use crate::objects::{self, Stream};
use crate::record::Relocation;
use crate::side::{Pair, Part, PartState, Side};
use crate::throttle::Progress;
use crate::verify;
use std::time::{Duration, Instant};
use tokio_postgres::Statement;

/// How long a sentinel may take on its way before a switch is tried: a part of the budget, in fifths.
const PROBE_ROUND_TRIP: u32 = 2;
/// A transaction that holds the tables for this part of the budget would hold a switch up too.
const PROBE_HOLD: u32 = 4;
/// How often is looked whether it has ended.
const PROBE_LOOK: Duration = Duration::from_millis(5);
/// The waits between two tries: the first, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// A sentinel that is longer on its way means that the stream does not get on.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);
/// From then on the stream's errors are looked at; one that comes again does not pass.
const ERRORS_LOOK: Duration = Duration::from_millis(500);

/// Sends the sentinel of the direction that feeds the taking side, and sees it arrive.
pub(crate) struct Beats<'a> {
    relocation: i64,
    stream: String,
    from: &'a Side,
    to: &'a Side,
    send: Statement,
    seen: Statement,
}

impl<'a> Beats<'a> {
    /// From source to target.
    pub(crate) async fn new(relocation: &Relocation, pair: &'a Pair) -> Result<Beats<'a>> {
        Beats::between(relocation, &pair.source, &pair.target).await
    }

    async fn between(relocation: &Relocation, from: &'a Side, to: &'a Side) -> Result<Beats<'a>> {
        let send = "UPDATE therev.sentinels SET attempt = $3, beat = beat + 1
                     WHERE relocation = $1 AND side = $2 RETURNING beat";
        let seen = "SELECT coalesce(bool_and(s.beat >= $3), false)
                      FROM therev.sentinels AS s WHERE s.relocation = $1 AND s.side = $2";
        let (send, seen) = (from.prepare(send).await?, to.prepare(seen).await?);
        let stream = Stream::from(from.which).name(relocation);
        Ok(Beats { relocation: relocation.relocation, stream, from, to, send, seen })
    }

    async fn send(&self, attempt: i32) -> Result<i64> {
        let side = self.from.which.name();
        let rows = self.from.client.query_opt(&self.send, &[&self.relocation, &side, &attempt]).await;
        let row = rows.map_err(|e| self.from.sql(e))?.ok_or(Error::Taken(self.relocation))?;
        Ok(row.get(0))
    }

    async fn is_seen(&self, beat: i64) -> Result<bool> {
        self.to.says(&self.seen, &[&self.relocation, &self.from.which.name(), &beat]).await
    }

    /// Everything that was written before this call is on the other side when it returns.
    pub(crate) async fn arrive(&self) -> Result<Duration> {
        let (began, beat) = (Instant::now(), self.send(0).await?);
        let (mut wait, mut errors_at_first) = (Duration::from_millis(1), None);
        while !self.is_seen(beat).await? {
            let does_not_get_on = |reason| Err(Error::Stream { database: self.to.database(), reason });
            if began.elapsed() > ARRIVAL_LIMIT {
                return does_not_get_on(format!("a sentinel did not arrive within {} s", ARRIVAL_LIMIT.as_secs()));
            }
            if began.elapsed() > ERRORS_LOOK {
                let errors = verify::stream_errors(self.to, &self.stream).await?;
                if errors > *errors_at_first.get_or_insert(errors) + 1 {
                    return does_not_get_on("a change cannot be applied there; its server's log says which".to_owned());
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(100));
        }
        Ok(began.elapsed())
    }
}

/// What became of one try.
enum Outcome {
    /// The buckets changed hands; writes to them waited so long.
    Switched(Duration),
    /// Given up, and why: nothing happened.
    BackedOut(&'static str),
}

/// The two sides of one switch with what is said to them, prepared.
struct Switch<'a> {
    relocation: &'a Relocation,
    giver: &'a Side,
    taker: &'a Side,
    beats: Beats<'a>,
    budget: Duration,
    drain: Statement,
    back_out: Statement,
    writers: Statement,
    get_ready: Statement,
    decide: Statement,
    take_over: Statement,
    flushed: [Statement; 2],
    have: [Statement; 2],
}

const FLUSHED: &str = "SELECT pg_current_wal_flush_lsn()::text";
const HAVE: &str = "SELECT therev.standbys_have($1::text::pg_lsn)";

impl<'a> Switch<'a> {
    async fn new(relocation: &'a Relocation, giver: &'a Side, taker: &'a Side, budget: Duration) -> Result<Switch<'a>> {
        Ok(Switch {
            relocation,
            giver,
            taker,
            beats: Beats::between(relocation, giver, taker).await?,
            budget,
            drain: giver.prepare("SELECT therev.drain($1, $2)").await?,
            back_out: giver.prepare("SELECT therev.back_out($1, $2)").await?,
            writers: giver.prepare("SELECT therev.writers($1)").await?,
            get_ready: taker.prepare("SELECT therev.get_ready($1, $2)").await?,
            decide: giver.prepare("SELECT therev.decide($1, $2)").await?,
            take_over: taker.prepare("SELECT therev.take_over($1, $2)").await?,
            flushed: [giver.prepare(FLUSHED).await?, taker.prepare(FLUSHED).await?],
            have: [giver.prepare(HAVE).await?, taker.prepare(HAVE).await?],
        })
    }

    async fn writers(&self) -> Result<Vec<String>> {
        let row = self.giver.client.query_one(&self.writers, &[&self.relocation.group_names()]).await;
        Ok(row.map_err(|e| self.giver.sql(e))?.get(0))
    }

    /// Whether a switch would be quick now; else why not.
    async fn probe(&self) -> Result<Option<&'static str>> {
        if self.beats.arrive().await? > self.budget * PROBE_ROUND_TRIP / 5 {
            return Ok(Some("the stream is slow"));
        }
        let (began, mut left) = (Instant::now(), self.writers().await?);
        while !left.is_empty() {
            if began.elapsed() > self.budget * PROBE_HOLD / 5 {
                return Ok(Some("a long transaction holds the tables"));
            }
            tokio::time::sleep(PROBE_LOOK).await;
            let now = self.writers().await?;
            left.retain(|one| now.contains(one));
        }
        Ok(None)
    }

    /// One try. Before the decision an error is a way out too: whoever comes next gives up what was begun.
    async fn attempt(&self, attempt: i32) -> Result<Outcome> {
        let (number, began) = (self.relocation.relocation, Instant::now());
        let is_late = || began.elapsed() > self.budget;
        if !self.giver.says(&self.drain, &[&number, &attempt]).await? {
            return Ok(Outcome::BackedOut("another process was quicker"));
        }
        fail::fail_point!("relocation.drained");
        let writers = self.writers().await?;
        let mut left = writers.clone();
        while !left.is_empty() {
            if is_late() {
                return self.give_up(attempt, "a transaction held the tables for longer than the budget").await;
            }
            let now = self.writers().await?;
            left.retain(|one| now.contains(one));
        }
        fail::fail_point!("relocation.writers_gone");
        let beat = self.beats.send(attempt).await?;
        fail::fail_point!("relocation.sentinel_sent");
        while !self.beats.is_seen(beat).await? {
            if is_late() {
                return self.give_up(attempt, "the stream took longer than the budget").await;
            }
        }
        if !self.taker.says(&self.get_ready, &[&number, &attempt]).await? {
            return self.give_up(attempt, "the other side did not get ready").await;
        }
        if !self.is_on_standbys(1, &is_late).await? {
            return self.give_up(attempt, "a standby took longer than the budget").await;
        }
        fail::fail_point!("relocation.ready");
        if is_late() {
            return self.give_up(attempt, "the budget is spent").await;
        }
        if !self.giver.says(&self.decide, &[&number, &attempt]).await? {
            return Ok(Outcome::BackedOut("another process gave this try up"));
        }
        fail::fail_point!("relocation.decided");
        self.complete(attempt).await?;
        Ok(Outcome::Switched(began.elapsed()))
    }

    async fn give_up(&self, attempt: i32, reason: &'static str) -> Result<Outcome> {
        self.giver.says(&self.back_out, &[&self.relocation.relocation, &attempt]).await?;
        Ok(Outcome::BackedOut(reason))
    }

    /// After the decision: on the standbys first, so that no promotion undoes it; then the other side takes over.
    async fn complete(&self, attempt: i32) -> Result<()> {
        while !self.is_on_standbys(0, &|| false).await? {}
        self.taker.says(&self.take_over, &[&self.relocation.relocation, &attempt]).await?;
        fail::fail_point!("relocation.taken_over");
        Ok(())
    }

    /// Whether what a side (0 the giving, 1 the taking one) has committed is on all its standbys; waits until it is late.
    async fn is_on_standbys(&self, side: usize, is_late: &(dyn Fn() -> bool + Sync)) -> Result<bool> {
        let at = [self.giver, self.taker][side];
        let row = at.client.query_one(&self.flushed[side], &[]).await.map_err(|e| at.sql(e))?;
        let lsn: &str = row.get(0);
        while !at.says(&self.have[side], &[&lsn]).await? {
            if is_late() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What a switch came to.
pub(crate) struct Switched {
    pub(crate) attempts: i32,
    /// `None`: another process had done it.
    pub(crate) pause: Option<Duration>,
}

/// Which side gives the buckets away for the goal, and which takes them.
pub(crate) fn hands<'a>(relocation: &Relocation, pair: &'a Pair) -> (&'a Side, &'a Side) {
    if relocation.owner_wanted() == relocation.target {
        (&pair.source, &pair.target)
    } else {
        (&pair.target, &pair.source)
    }
}

/// Tries until the buckets have changed hands. `is_wanted` says whether to go on trying.
pub(crate) async fn run(
    relocation: &Relocation,
    pair: &Pair,
    budget: Duration,
    progress: &Progress,
    is_wanted: impl AsyncFn() -> bool,
) -> Result<Option<Switched>> {
    let (giver, taker) = hands(relocation, pair);
    let switch = Switch::new(relocation, giver, taker, budget).await?;
    let (mut pause, mut attempts) = (BACK_OFF.0, 0);
    loop {
        let (gives, takes) = (part(giver, relocation).await?, part(taker, relocation).await?);
        match (gives.state, takes.state) {
            (PartState::Moved, PartState::Owned) => {
                // Found, not done here: what follows counts on it.
                while !switch.is_on_standbys(1, &|| false).await? {}
                return Ok(Some(Switched { attempts, pause: None }));
            }
            // Decided by somebody who did not come to the end.
            (PartState::Moved, _) => {
                switch.complete(gives.attempt).await?;
                tokio::time::sleep(BACK_OFF.0).await;
            }
            (PartState::Draining, _) => {
                switch.give_up(gives.attempt, "").await?;
            }
            (PartState::Owned, PartState::Moved) => {
                taker.query("SELECT therev.await_return($1)", &[&relocation.relocation]).await?;
            }
            (PartState::Owned, PartState::Incoming | PartState::Ready) => {
                for (side, part) in [(giver, &gives), (taker, &takes)] {
                    if !part.is_same_life {
                        return Err(Error::OtherLife { database: side.database() });
                    }
                }
                let mut reason = switch.probe().await?;
                if reason.is_none() {
                    attempts += 1;
                    match switch.attempt(gives.attempt.max(takes.attempt) + 1).await? {
                        Outcome::Switched(took) => {
                            while !switch.is_on_standbys(1, &|| false).await? {}
                            return Ok(Some(Switched { attempts, pause: Some(took) }));
                        }
                        Outcome::BackedOut(why) => reason = Some(why),
                    }
                }
                progress.say(format!("the switch waits: {}", reason.unwrap_or_default()));
                if !is_wanted().await {
                    return Ok(None);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACK_OFF.1);
            }
            (gives, takes) => {
                let reason = format!("its part is {gives:?} while the other side's is {takes:?}");
                return Err(shards::Error::Answer { database: giver.database(), reason }.into());
            }
        }
    }
}

async fn part(side: &Side, relocation: &Relocation) -> Result<Part> {
    let gone = || shards::Error::Answer {
        database: side.database(),
        reason: format!("its part in relocation {} is gone", relocation.relocation),
    };
    Ok(side.part(relocation.relocation).await?.ok_or_else(gone)?)
}

/// After the switch: the stream that fed the new owner ends; the other one begins behind it, where the way back is kept.
pub(crate) async fn turn_streams(relocation: &Relocation, pair: &Pair) -> Result<()> {
    let (giver, taker) = hands(relocation, pair);
    objects::stop(relocation, Stream::from(giver.which), pair).await?;
    fail::fail_point!("relocation.forward_stopped");
    if giver.shard == relocation.target {
        return Ok(());
    }
    let since = part(taker, relocation).await?.since;
    // A promotion took over what had been decided: nothing tells from where to stream back.
    let Some(since) = since else { return Ok(()) };
    objects::start_behind(relocation, Stream::from(taker.which), pair, &since).await
}
