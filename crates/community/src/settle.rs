//! After a promotion: what other databases hold of the promoted one is made to agree with it again.
//!
//! A standby that was behind has lost its last commits; others were told of them. Which ones, nobody knows any more, so
//! that everything is compared, once, by whichever relay comes first.

use crate::community::Community;
use crate::error::Result;
use shards::Unfenced;
use std::time::Duration;
use uuid::Uuid;

/// For so long the others leave it to the relay that took it, unless that says again that it is at it.
static TAKE: Unfenced = Unfenced::write(
    "UPDATE therev.incarnations
        SET settling_until = now() + interval '20 seconds'
      WHERE NOT is_settled AND coalesce(settling_until < now(), true)
     RETURNING database, incarnation",
);

static KEEP: Unfenced = Unfenced::write(
    "UPDATE therev.incarnations
        SET settling_until = now() + interval '20 seconds'
      WHERE (database, incarnation) IN (SELECT * FROM unnest($1::text[], $2::uuid[])) AND NOT is_settled",
);

/// How often it says so.
const KEEP_EVERY: Duration = Duration::from_secs(5);

static GIVE_BACK: Unfenced = Unfenced::write(
    "UPDATE therev.incarnations
        SET is_settled = $3, settling_until = NULL
      WHERE (database, incarnation) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))",
);

impl Community {
    /// Repairs what differs after a promotion, if there was one; while a database is down, it waits for the next pass.
    pub(crate) async fn settle_lives(&self) -> Result<()> {
        let taken = self.shards().control(&TAKE, &[]).await?;
        if taken.is_empty() {
            return Ok(());
        }
        let databases: Vec<String> = taken.iter().map(|row| row.get("database")).collect();
        let lives: Vec<Uuid> = taken.iter().map(|row| row.get("incarnation")).collect();
        let keep = async {
            loop {
                tokio::time::sleep(KEEP_EVERY).await;
                if let Err(error) = self.shards().control(&KEEP, &[&databases, &lives]).await {
                    tracing::debug!(%error, "the control database does not hear of a repair");
                }
            }
        };
        let repaired = tokio::select! {
            repaired = self.repair() => repaired,
            () = keep => unreachable!("it has no end"),
        };
        let agrees = repaired.as_ref().is_ok_and(|report| report.ok);
        self.shards().control(&GIVE_BACK, &[&databases, &lives, &agrees]).await?;
        let databases = databases.join(", ");
        match repaired {
            Ok(report) if report.ok => {
                let changed: u64 = report.repaired.iter().map(|proof| proof.repaired).sum();
                tracing::warn!(databases, changed, "after a promotion everything agrees again");
            }
            Ok(_) => tracing::error!(databases, "after a promotion something differs still; `therev check` names it"),
            Err(error) => tracing::warn!(databases, %error, "what a promotion left is not repaired yet"),
        }
        Ok(())
    }
}
