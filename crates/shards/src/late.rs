//! Ends a switch that somebody began and did not end: a write that has waited long enough gives it up where it was not
//! decided, and a call that was sent on completes it where it was. By compare-and-set, so that a mover who only slept
//! finds its step done or void.

use crate::error::Error;
use crate::statement::Unfenced;
use crate::store::Shards;
use placement::{Group, Place, ShardNo, Whose};
use std::time::Duration;

/// How long a call waits for a switch before it looks after it. A mover gives up by itself after a few hundredths of that.
const LATE: Duration = Duration::from_secs(1);
/// The least that a call waits, however little time it has: sooner, it might give up switches that are getting on.
const LATE_MIN: Duration = Duration::from_millis(250);

static PART: Unfenced = Unfenced::read(
    "SELECT p.relocation, p.state, p.attempt, p.peer
       FROM therev.relocation_parts AS p
      WHERE $1::text::therev.colocation_group = ANY (p.groups) AND $2 = ANY (p.buckets)",
);

static BACK_OUT: Unfenced =
    Unfenced::write("SELECT therev.back_out_late($1::text::therev.colocation_group, $2, $3) AS done");

static TAKE_OVER: Unfenced = Unfenced::write("SELECT therev.take_over($1, $2) AS done");

static FLUSHED: Unfenced = Unfenced::read("SELECT pg_current_wal_flush_lsn()::text AS lsn");

static GIVEN_AWAY: Unfenced = Unfenced::read("SELECT therev.given_away($1, $2::text::pg_lsn) AS attempt");

impl Shards {
    /// When a call of this node is late: not only as its time is over, or a switch whose mover is gone would be nobody's.
    pub(crate) fn late(&self) -> Duration {
        (self.inner.config.deadline() / 2).clamp(LATE_MIN, LATE)
    }

    /// Looks after a switch that these rows wait for at a shard. What it cannot end it leaves to the next call.
    ///
    /// Answers with where they are after all, where that is not the shard that was asked, and whether that is said of the user
    /// alone.
    pub(crate) async fn end_late_switch(&self, shard: ShardNo, group: Group, whose: Whose) -> Option<(Place, bool)> {
        self.try_to_end(shard, group, whose).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "a switch at shard {shard} could not be ended");
            None
        })
    }

    async fn try_to_end(&self, shard: ShardNo, group: Group, whose: Whose) -> Result<Option<(Place, bool)>, Error> {
        let bucket = whose.bucket;
        let Some(part) = self.unfenced(shard, &PART, &[&group.name(), &bucket.sql()]).await?.pop() else {
            return Ok(None);
        };
        let (relocation, peer) = (part.get::<_, i64>("relocation"), ShardNo(part.get("peer")));
        match part.get::<_, &str>("state") {
            "draining" => {
                let late_ms = i32::try_from(self.late().as_millis()).unwrap_or(i32::MAX);
                let ended = self.unfenced(shard, &BACK_OUT, &[&group.name(), &bucket.sql(), &late_ms]).await?;
                if ended.first().is_some_and(|row| row.get("done")) {
                    tracing::warn!(relocation, "a switch at shard {shard} was given up: its mover did not end it");
                }
            }
            "incoming" | "ready" => {
                // A promotion may have undone the decision that sent this call here: then the peer owns the bucket still.
                let said = self.ownership(peer, group, &[whose]).await?;
                if let Some(said) = said.first().filter(|said| said.ownership.state.readable()) {
                    return Ok(Some((Place { shard: peer, epoch: said.ownership.epoch }, said.is_pin)));
                }
                self.complete(shard, peer, relocation).await?;
            }
            _ => {}
        }
        Ok(None)
    }

    /// The decision must survive a promotion before anybody acts on it: it is asked for where it was made, with its standbys.
    async fn complete(&self, shard: ShardNo, peer: ShardNo, relocation: i64) -> Result<(), Error> {
        let at = self.unfenced(peer, &FLUSHED, &[]).await?;
        let Some(lsn) = at.first().map(|row| row.get::<_, String>("lsn")) else { return Ok(()) };
        let given = self.unfenced(peer, &GIVEN_AWAY, &[&relocation, &lsn]).await?;
        let Some(attempt) = given.first().and_then(|row| row.get::<_, Option<i32>>("attempt")) else { return Ok(()) };
        let taken = self.unfenced(shard, &TAKE_OVER, &[&relocation, &attempt]).await?;
        if taken.first().is_some_and(|row| row.get("done")) {
            tracing::warn!(relocation, "a switch to shard {shard} was completed: its mover did not end it");
        }
        Ok(())
    }
}
