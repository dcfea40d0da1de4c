//! The switch: the buckets change hands in a few milliseconds, or nothing happened.
//!
//! Each effect is a function of one shard's database and a compare-and-set on its part (`schema/shard/08_relocation.sql`);
//! `tests/runner/model` goes through all their interleavings.

use crate::beats::Beats;
use crate::copy::TRIES_A_ROUND;
use crate::error::{Error, Result};
use crate::finish;
use crate::mover::Mover;
use crate::objects::{self, Stream};
use crate::record::Relocation;
use crate::side::{Pair, Part, PartState, Side};
use crate::throttle::Progress;
use crate::tries::Try;
use crate::verify;
use crate::work::{Heard, unless_called_off};
use futures_util::future::{try_join, try_join3};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

/// How long a sentinel may take on its way before a switch is tried: a part of the budget, in fifths.
const PROBE_ROUND_TRIP: u32 = 2;
/// A transaction that holds the tables for this part of the budget would hold a switch up too.
const PROBE_HOLD: u32 = 4;
/// Within this part of the budget the standbys of a side must have what it has, and the side that takes must have a commit on its
/// disk and on them: reads and writes wait for that, and once it is decided, however long it takes.
const PROBE_STANDBYS: u32 = 2;
/// Fifths of the budget that a try may have taken when it still waits for a transaction, for the stream, and when it is decided:
/// giving up takes time too, and so does what follows a decision, while writers wait.
const WAIT_FOR_WRITERS: u32 = 2;
const WAIT_FOR_STREAM: u32 = 3;
const DECIDE: u32 = 4;
/// How often what the steps of a switch take by themselves goes into its budget.
const OWN_WORK: u32 = 2;
/// How often is looked whether it has ended.
const PROBE_LOOK: Duration = Duration::from_millis(5);
/// How often a standby is asked whether it has what it must, where nobody waits for that.
pub(crate) const STANDBY_LOOK: Duration = Duration::from_millis(20);
/// The waits between two tries: the first, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// How long the mover keeps still before the first try, so that what it did before does not delay it, and after a switch, so that
/// what follows does not compete with the calls that have waited.
const LULL: Duration = Duration::from_millis(50);

/// How much longer than the budget a step may lie ready before the server takes it back: its mover was stopped, or cut off.
const GRACE: Duration = Duration::from_millis(250);

/// What became of one try.
enum Outcome {
    /// The buckets changed hands; writes to them waited so long.
    Switched(Duration),
    /// Given up, and why: nothing happened.
    BackedOut(&'static str),
}

impl Outcome {
    fn of(given_up: &mut Try, reason: &'static str) -> Outcome {
        given_up.backed_out = Some(reason);
        Outcome::BackedOut(reason)
    }
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
    send_sentinel: Statement,
    get_ready: Statement,
    decide: Statement,
    take_over: Statement,
    standbys: [Statement; 2],
    have: [Statement; 2],
}

const STANDBYS: &str = "
    SELECT at.lsn::text AS lsn, therev.standbys_have(at.lsn) AS have FROM pg_current_wal_flush_lsn() AS at (lsn)";
/// Whether a server's standbys have its log up to a position.
pub(crate) const HAVE: &str = "SELECT therev.standbys_have($1::text::pg_lsn)";

impl<'a> Switch<'a> {
    async fn new(relocation: &'a Relocation, giver: &'a Side, taker: &'a Side, budget: Duration) -> Result<Switch<'a>> {
        Ok(Switch {
            relocation,
            giver,
            taker,
            beats: Beats::between(relocation, giver, taker).await?,
            budget,
            drain: giver.prepare("SELECT therev.drain($1, $2, $3)").await?,
            back_out: giver.prepare("SELECT therev.back_out($1, $2)").await?,
            writers: giver.prepare("SELECT therev.writers($1)").await?,
            send_sentinel: giver.prepare("SELECT therev.send_sentinel($1, $2, $3)").await?,
            get_ready: taker.prepare("SELECT therev.get_ready($1, $2)").await?,
            decide: giver.prepare("SELECT therev.decide($1, $2)").await?,
            take_over: taker.prepare("SELECT therev.take_over($1, $2)").await?,
            standbys: [giver.prepare(STANDBYS).await?, taker.prepare(STANDBYS).await?],
            have: [giver.prepare(HAVE).await?, taker.prepare(HAVE).await?],
        })
    }

    /// Goes through its statements beforehand: the first time a session calls a function takes several times as long as the second.
    ///
    /// The budget is for waiting. Where the steps alone are too much for it, since the machine is slow or the buckets are many, no
    /// try would ever get through: it is `OWN_WORK` times what they take then, by the quicker of two rehearsals, for in one of
    /// them a server may have stood still.
    async fn rehearse(&mut self) -> Result<()> {
        self.go_through().await?;
        let mut own_work = Duration::MAX;
        for _ in 0..2 {
            let began = Instant::now();
            self.go_through().await?;
            own_work = own_work.min(began.elapsed());
        }
        self.budget = self.budget.max(own_work * OWN_WORK);
        Ok(())
    }

    /// All its statements on both sides, taken back at once, so that the switch finds everything compiled, planned and read.
    async fn go_through(&self) -> Result<()> {
        let number = self.relocation.relocation;
        let last = i32::MAX;
        // Each goes out whole: a mover that sleeps in between holds nothing.
        let giver = format!(
            "BEGIN; SELECT therev.drain({number}, 1, {last}); SELECT therev.send_sentinel({number}, {last}, NULL);
                    SELECT therev.decide({number}, {last}); ROLLBACK;
             BEGIN; SELECT therev.drain({number}, 1, {last}); SELECT therev.back_out({number}, {last}); ROLLBACK"
        );
        let taker = format!(
            "BEGIN; SELECT therev.get_ready({number}, {last});
             UPDATE therev.relocation_parts SET state = 'ready', attempt = {last}
              WHERE relocation = {number} AND state IN ('incoming', 'ready');
             SELECT therev.take_over({number}, {last}); ROLLBACK"
        );
        try_join(self.giver.batch(&giver), self.taker.batch(&taker)).await?;
        try_join(self.standbys(0), self.standbys(1)).await.map(drop)
    }

    async fn writers(&self) -> Result<Vec<String>> {
        let row = self.giver.client.query_one(&self.writers, &[&self.relocation.group_names()]).await;
        Ok(row.map_err(|e| self.giver.sql(e))?.get(0))
    }

    /// Sends the sentinel if nobody is left who may write without knowing of the draining; see the function.
    async fn send_sentinel(&self, attempt: i32, seen: Option<Vec<String>>) -> Result<Option<Vec<String>>> {
        let row =
            self.giver.client.query_one(&self.send_sentinel, &[&self.relocation.relocation, &attempt, &seen]).await;
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
        let (began, standbys) = (Instant::now(), self.standbys(0).await?);
        if !self.have(0, &standbys, &|| began.elapsed() > self.budget * PROBE_STANDBYS / 5).await? {
            return Ok(Some("a standby of the shard that gives is behind"));
        }
        let began = Instant::now();
        let is_late = || began.elapsed() > self.budget * PROBE_STANDBYS / 5;
        self.taker.query("SELECT therev.make_durable($1)", &[&self.relocation.relocation]).await?;
        let standbys = self.standbys(1).await?;
        let have = !is_late() && self.have(1, &standbys, &is_late).await?;
        Ok((!have).then_some("a commit on the shard that takes is slow"))
    }

    /// One try. Before the decision an error is a way out too: whoever comes next gives up what was begun.
    ///
    /// Deciding and taking over change the ownership of every bucket while callers wait. Both lie ready, each in a transaction, by
    /// the time that what they wait for has come; they are in force with their commits.
    async fn attempt(&self, seen: i32, attempt: i32, tried: &mut Try) -> Result<Outcome> {
        if let Some(outcome) = self.stop_writers(seen, attempt, tried).await? {
            return Ok(outcome);
        }
        let began = tried.began;
        let is_late = || began.elapsed() > self.budget * DECIDE / 5;
        let decides = self.lay_ready(self.giver, &self.decide, attempt);
        // A disk or a standby that stands still must not hold writers up for longer than what lies ready would; sooner than that, so that
        // this session is there to give it up.
        let ready =
            tokio::time::timeout(self.budget + GRACE / 2, try_join(decides, self.wait_for_stream(attempt, began)));
        let (is_decided, standbys) = ready.await.map_err(|_| self.is_late())??;
        let reason = match standbys {
            Some(standbys) if self.have(1, &standbys, &is_late).await? => {
                tried.done("ready");
                fail::fail_point!("relocation.ready");
                is_late().then_some("too much of the budget is spent")
            }
            Some(_) => Some("a standby took longer than the budget"),
            None => Some("the stream took longer than the budget allows"),
        };
        if !is_decided || reason.is_some() {
            self.giver.batch("ROLLBACK").await?;
            return match reason {
                Some(reason) if is_decided => self.give_up(attempt, tried, reason).await,
                _ => Ok(Outcome::of(tried, "another process gave this try up")),
            };
        }
        let takes_over = self.lay_ready(self.taker, &self.take_over, attempt);
        let ((), standbys, takes) = try_join3(self.giver.batch("COMMIT"), self.standbys(0), takes_over).await?;
        fail::fail_point!("relocation.decided");
        // On the standbys first, so that no promotion undoes the decision.
        self.have(0, &standbys, &|| false).await?;
        tried.done("decide");
        self.take_over().await?;
        if !takes {
            self.must_have_taken_over().await?;
        }
        tried.done("take over");
        Ok(Outcome::Switched(began.elapsed()))
    }

    /// What a step of a try that never comes back is to its worker: tried again later, on connections of its own.
    fn is_late(&self) -> Error {
        let waiting_for = format!("an answer from {}, while writers wait", self.taker.database());
        shards::Error::Deadline { limit_ms: (self.budget + GRACE / 2).as_millis(), waiting_for }.into()
    }

    /// The same, and where it fails writers go on at once, as far as its connection serves.
    async fn attempt_or_back_out(&self, seen: i32, attempt: i32, tried: &mut Try) -> Result<Outcome> {
        let outcome = self.attempt(seen, attempt, tried).await;
        if outcome.is_err() {
            let gives_up = async {
                self.giver.batch("ROLLBACK").await?;
                self.back_out(attempt).await
            };
            // Once it is decided there is nothing to give up; and where nobody answers, whoever waits gives it up.
            if let Err(error) = tokio::time::timeout(GRACE, gives_up).await.unwrap_or_else(|_| Err(self.is_late())) {
                tracing::debug!(%error, "a try that failed is left to whoever comes next");
            }
        }
        outcome
    }

    /// Drains, and sends the sentinel once nobody is left who may not know of it. `None`: the try goes on.
    async fn stop_writers(&self, seen: i32, attempt: i32, tried: &mut Try) -> Result<Option<Outcome>> {
        // What belongs together goes out together, and is done in this order: each pair costs one round trip.
        let params: [&(dyn ToSql + Sync); 3] = [&self.relocation.relocation, &seen, &attempt];
        let drains = self.giver.says(&self.drain, &params);
        let (is_draining, mut left) = try_join(drains, self.send_sentinel(attempt, None)).await?;
        if !is_draining {
            return Ok(Some(Outcome::of(tried, "another process was quicker")));
        }
        tried.done("drain");
        fail::fail_point!("relocation.drained");
        while let Some(writers) = left.take_if(|writers| !writers.is_empty()) {
            if tried.began.elapsed() > self.budget * WAIT_FOR_WRITERS / 5 {
                let reason = "a transaction held the tables for longer than the budget allows";
                return self.give_up(attempt, tried, reason).await.map(Some);
            }
            left = self.send_sentinel(attempt, Some(writers)).await?;
        }
        if left.is_none() {
            return Ok(Some(Outcome::of(tried, "another process gave this try up")));
        }
        tried.done("writers");
        fail::fail_point!("relocation.sentinel_sent");
        Ok(None)
    }

    /// Until the taking side is ready; `None`: that takes too long.
    async fn wait_for_stream(&self, attempt: i32, began: Instant) -> Result<Option<Standbys>> {
        loop {
            let gets_ready = self.step(self.taker, &self.get_ready, attempt);
            let (is_ready, standbys) = try_join(gets_ready, self.standbys(1)).await?;
            if is_ready {
                return Ok(Some(standbys));
            }
            if began.elapsed() > self.budget * WAIT_FOR_STREAM / 5 {
                return Ok(None);
            }
        }
    }

    /// Goes through a step in a transaction of its own: what it says is in force when that is committed. Nobody waits for long
    /// where it never is.
    async fn lay_ready(&self, side: &Side, step: &Statement, attempt: i32) -> Result<bool> {
        let at_most = (self.budget + GRACE).as_millis();
        let begin = format!("BEGIN; SET LOCAL idle_in_transaction_session_timeout = {at_most}");
        let ((), is_done) = try_join(side.batch(&begin), self.step(side, step, attempt)).await?;
        Ok(is_done)
    }

    /// One step of a try, by its shard's word; `false`: it found nothing to do.
    async fn step(&self, side: &Side, step: &Statement, attempt: i32) -> Result<bool> {
        side.says(step, &[&self.relocation.relocation, &attempt]).await
    }

    async fn give_up(&self, attempt: i32, tried: &mut Try, reason: &'static str) -> Result<Outcome> {
        tried.done("late");
        self.back_out(attempt).await?;
        tried.done("back out");
        Ok(Outcome::of(tried, reason))
    }

    async fn back_out(&self, attempt: i32) -> Result<()> {
        self.step(self.giver, &self.back_out, attempt).await.map(drop)
    }

    /// After a decision that somebody else made: durable first; then the other side takes over. It was ready before anybody could
    /// decide: what is not any more, a promotion has taken back.
    async fn complete(&self, attempt: i32) -> Result<()> {
        self.is_durable(0).await?;
        self.lay_ready(self.taker, &self.take_over, attempt).await?;
        self.take_over().await?;
        self.must_have_taken_over().await
    }

    /// Whoever took over, this one or a call that waited: the other side owns what was decided.
    async fn must_have_taken_over(&self) -> Result<()> {
        match self.taker.must_have_part(self.relocation.relocation).await?.state {
            PartState::Incoming | PartState::Ready => Err(finish::lost_at(self.relocation, self.giver, self.taker)),
            PartState::Owned | PartState::Draining | PartState::Moved => Ok(()),
        }
    }

    /// What lies ready at the taking side is in force.
    async fn take_over(&self) -> Result<()> {
        self.taker.batch("COMMIT").await?;
        fail::fail_point!("relocation.taken_over");
        Ok(())
    }

    /// Waits until what the part of a side (0 the giving, 1 the taking one) says is on its disk and on all its standbys.
    async fn is_durable(&self, side: usize) -> Result<()> {
        let at = [self.giver, self.taker][side];
        at.query("SELECT therev.make_durable($1)", &[&self.relocation.relocation]).await?;
        self.have(side, &self.standbys(side).await?, &|| false).await.map(drop)
    }

    /// Up to where a side's log is written now, and whether all its standbys have it.
    async fn standbys(&self, side: usize) -> Result<Standbys> {
        let at = [self.giver, self.taker][side];
        let row = at.client.query_one(&self.standbys[side], &[]).await.map_err(|e| at.sql(e))?;
        Ok(Standbys { lsn: row.get("lsn"), have: row.get("have") })
    }

    /// Waits until the standbys have a position, or it is late.
    async fn have(&self, side: usize, standbys: &Standbys, is_late: &(dyn Fn() -> bool + Sync)) -> Result<bool> {
        let at = [self.giver, self.taker][side];
        let (mut have, began) = (standbys.have, Instant::now());
        while !have {
            if is_late() {
                return Ok(false);
            }
            if began.elapsed() > self.budget {
                tokio::time::sleep(STANDBY_LOOK).await;
            }
            have = at.says(&self.have[side], &[&standbys.lsn]).await?;
        }
        Ok(true)
    }
}

/// A position of a server's log, and whether its standbys have it.
struct Standbys {
    lsn: String,
    have: bool,
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

/// Tries until the buckets have changed hands, as long as that is wanted.
pub(crate) async fn run(
    relocation: &Relocation,
    pair: &Pair,
    budget: Duration,
    progress: &Progress,
    (mover, heard): (&Mover, &Heard),
    told: &(dyn Fn(&Try) + Sync),
) -> Result<Option<Switched>> {
    let (giver, taker) = hands(relocation, pair);
    let mut switch = Switch::new(relocation, giver, taker, budget).await?;
    let (mut pause, mut attempts, mut is_rehearsed) = (BACK_OFF.0, 0, false);
    loop {
        let (gives, takes) =
            (giver.must_have_part(relocation.relocation).await?, taker.must_have_part(relocation.relocation).await?);
        match (gives.state, takes.state) {
            (PartState::Moved, PartState::Owned) => {
                // Found, not done here: what follows counts on it.
                switch.is_durable(1).await?;
                return Ok(Some(Switched { attempts, pause: None }));
            }
            // A try to go back that nobody wants any more.
            (PartState::Moved | PartState::Incoming | PartState::Ready, PartState::Draining) => {
                taker.query("SELECT therev.back_out($1, $2)", &[&relocation.relocation, &takes.attempt]).await?;
            }
            // Decided by somebody who did not come to the end.
            (PartState::Moved, _) => switch.complete(gives.attempt).await?,
            (PartState::Draining, _) => switch.back_out(gives.attempt).await?,
            (PartState::Owned, PartState::Moved) => {
                // Nobody takes it back who does not know of it: who cannot ask does not go on.
                if mover.show(relocation.relocation).await?.aim() != relocation.aim() {
                    return Ok(None);
                }
                taker.query("SELECT therev.await_return($1)", &[&relocation.relocation]).await?;
            }
            (PartState::Owned, PartState::Incoming | PartState::Ready) => {
                counts_still(relocation, [(giver, &gives), (taker, &takes)])?;
                if !is_rehearsed {
                    switch.rehearse().await?;
                    is_rehearsed = true;
                    tokio::time::sleep(LULL).await;
                }
                let probed = unless_called_off(relocation, heard, switch.probe()).await?;
                let Some(mut reason) = probed else { return Ok(None) };
                if reason.is_none() {
                    attempts += 1;
                    let attempt = gives.attempt.max(takes.attempt) + 1;
                    let mut tried = Try::begin(relocation.relocation, attempt);
                    let outcome = switch.attempt_or_back_out(gives.attempt, attempt, &mut tried).await?;
                    told(&tried);
                    match outcome {
                        Outcome::Switched(took) => {
                            tokio::time::sleep(LULL).await;
                            switch.is_durable(1).await?;
                            return Ok(Some(Switched { attempts, pause: Some(took) }));
                        }
                        Outcome::BackedOut(why) => reason = Some(why),
                    }
                }
                say_why(relocation, (giver, taker), reason.unwrap_or_default(), progress).await?;
                if !mover.is_still_wanted(relocation).await {
                    return Ok(None);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACK_OFF.1);
            }
            // Something else is wanted before the buckets went back. The other side was looked at last; a promotion of it has ended
            // every try.
            (PartState::Incoming | PartState::Ready, PartState::Owned)
                if giver.shard == relocation.source && (takes.attempt >= gives.attempt || !takes.is_same_life) =>
            {
                let tried = takes.is_same_life.then_some(gives.attempt);
                let call_off = "SELECT therev.call_off_return($1, $2)";
                giver.query(call_off, &[&relocation.relocation, &tried]).await?;
            }
            // A way back that is decided: whoever looks again wants the end of it.
            (PartState::Ready, PartState::Moved) if giver.shard == relocation.source => return Ok(None),
            (gives, takes) => {
                let reason = format!("its part is {gives:?} while the other side's is {takes:?}");
                return Err(shards::Error::Answer { database: giver.database(), reason }.into());
            }
        }
    }
}

/// Why the switch waits, and how far its stream is behind.
async fn say_why(
    relocation: &Relocation,
    (giver, taker): (&Side, &Side),
    reason: &str,
    progress: &Progress,
) -> Result<()> {
    progress.say(format!("the switch waits: {reason}"));
    if let Some(lag) = verify::lag_bytes(giver, taker, &Stream::from(giver.which).name(relocation)).await? {
        progress.lag_bytes.store(lag, Ordering::Relaxed);
    }
    Ok(())
}

/// What is counted on between two tries of a switch is lost with a promotion of either side, and where somebody who slept has begun the
/// source's part anew since the copy that the target has.
fn counts_still(relocation: &Relocation, sides: [(&Side, &Part); 2]) -> Result<()> {
    let [(giver, gives), (_, takes)] = sides;
    let is_there = giver.shard == relocation.source;
    if gives.attempt < if is_there { takes.round.saturating_mul(TRIES_A_ROUND) } else { 1 } {
        return Err(Error::PartGone { relocation: relocation.relocation, database: giver.database() });
    }
    let other = sides.into_iter().find(|(_, part)| !part.is_same_life);
    other.map_or(Ok(()), |(side, _)| Err(Error::OtherLife { database: side.database() }))
}

/// After a promotion of either side there is no way back: the buckets stay where they went. `false`: they are not there, or
/// no promotion was seen.
pub(crate) async fn stay(relocation: &Relocation, pair: &Pair) -> Result<bool> {
    let (former, owner) = (&pair.source, &pair.target);
    // In this order: both connections are older than the owner's word.
    let (owns, awaits) =
        (owner.must_have_part(relocation.relocation).await?, former.must_have_part(relocation.relocation).await?);
    if owns.state != PartState::Owned || (owns.is_same_life && awaits.is_same_life) {
        return Ok(false);
    }
    former.query("SELECT therev.call_off_return($1, NULL)", &[&relocation.relocation]).await?;
    Ok(former.must_have_part(relocation.relocation).await?.state == PartState::Moved)
}

/// After the switch: the stream that fed the new owner ends; the other one begins behind it, where the way back is kept.
pub(crate) async fn turn_streams(relocation: &Relocation, pair: &Pair) -> Result<()> {
    let (giver, taker) = hands(relocation, pair);
    objects::drop_stream(relocation, Stream::from(giver.which), pair).await?;
    fail::fail_point!("relocation.forward_stopped");
    if giver.shard == relocation.target {
        return Ok(());
    }
    let since = taker.must_have_part(relocation.relocation).await?.since;
    // A promotion took over what had been decided: nothing tells from where to stream back.
    let Some(since) = since else { return Ok(()) };
    objects::start_behind(relocation, Stream::from(taker.which), pair, &since).await
}
