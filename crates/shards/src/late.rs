//! Ends a switch that somebody began and did not end: a write that has waited long enough gives it up where it was not
//! decided, and a call that was sent on completes it where it was. By compare-and-set, so that a mover who only slept
//! finds its step done or void.

use crate::error::Error;
use crate::statement::Unfenced;
use crate::store::Shards;
use placement::{Bucket, Group, ShardNo};
use std::time::Duration;

/// How long a call waits for a switch before it looks after it. A mover gives up by itself after a few hundredths of that.
pub(crate) const LATE: Duration = Duration::from_secs(1);

static PART: Unfenced = Unfenced::read(
    "SELECT p.relocation, p.state, p.attempt, p.peer
       FROM therev.relocation_parts AS p
      WHERE $1::text::therev.colocation_group = ANY (p.groups) AND $2 = ANY (p.buckets)",
);

static BACK_OUT: Unfenced =
    Unfenced::write("SELECT therev.back_out_late($1::text::therev.colocation_group, $2, $3) AS done");

static TAKE_OVER: Unfenced = Unfenced::write("SELECT therev.take_over($1, $2) AS done");

static FLUSHED: Unfenced = Unfenced::read("SELECT pg_current_wal_flush_lsn()::text AS lsn");

static STANDBYS_HAVE: Unfenced = Unfenced::read("SELECT therev.standbys_have($1::text::pg_lsn) AS done");

impl Shards {
    /// Looks after a switch that this bucket waits for at a shard. What it cannot end it leaves to the next call.
    pub(crate) async fn end_late_switch(&self, shard: ShardNo, group: Group, bucket: Bucket) {
        if let Err(error) = self.try_to_end(shard, group, bucket).await {
            tracing::debug!(%error, "a switch at shard {shard} could not be ended");
        }
    }

    async fn try_to_end(&self, shard: ShardNo, group: Group, bucket: Bucket) -> Result<(), Error> {
        let Some(part) = self.unfenced(shard, &PART, &[&group.name(), &bucket.sql()]).await?.pop() else {
            return Ok(());
        };
        let late_ms = i32::try_from(LATE.as_millis()).unwrap_or(i32::MAX);
        let relocation: i64 = part.get("relocation");
        match part.get::<_, &str>("state") {
            "draining" => {
                let ended = self.unfenced(shard, &BACK_OUT, &[&group.name(), &bucket.sql(), &late_ms]).await?;
                if ended.first().is_some_and(|row| row.get("done")) {
                    tracing::warn!(relocation, "a switch at shard {shard} was given up: its mover did not end it");
                }
            }
            "ready" => {
                let peer = ShardNo(part.get("peer"));
                let rows = self.unfenced(peer, &PART, &[&group.name(), &bucket.sql()]).await?;
                let decided = rows.first().filter(|row| {
                    row.get::<_, i64>("relocation") == relocation && row.get::<_, &str>("state") == "moved"
                });
                let Some(decided) = decided else { return Ok(()) };
                // The decision must survive a promotion before anybody acts on it.
                let at = self.unfenced(peer, &FLUSHED, &[]).await?;
                let Some(lsn) = at.first().map(|row| row.get::<_, String>("lsn")) else { return Ok(()) };
                let safe = self.unfenced(peer, &STANDBYS_HAVE, &[&lsn]).await?;
                if safe.first().is_some_and(|row| row.get("done")) {
                    let attempt: i32 = decided.get("attempt");
                    self.unfenced(shard, &TAKE_OVER, &[&relocation, &attempt]).await?;
                    tracing::warn!(relocation, "a switch to shard {shard} was completed: its mover did not end it");
                }
            }
            _ => {}
        }
        Ok(())
    }
}
