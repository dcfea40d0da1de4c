//! After a promotion: what other databases hold of the promoted one is made to agree with it again.
//!
//! A standby that was behind has lost its last commits; others were told of them. Which ones, nobody knows any more, so
//! that everything is compared, once, by whichever relay comes first.

use crate::check::NAMES;
use crate::community::Community;
use crate::error::Result;
use crate::repair::Report;
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

/// What differs after a repair is looked at again after a rest of so many seconds (`$4`): each look reads the whole cluster.
static GIVE_BACK: Unfenced = Unfenced::write(
    "UPDATE therev.incarnations
        SET is_settled = $3, settling_until = now() + make_interval(secs => $4)
      WHERE (database, incarnation) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))",
);

/// The rest after a repair that left something, and after one that failed, in seconds.
const REST_S: f64 = 60.0;
const REST_AFTER_ERROR_S: f64 = 5.0;

impl Community {
    /// Repairs what differs after a promotion, if there was one. What a repair did not mend is tried again after a minute, and one that
    /// failed, since a database is down, sooner. What no repair can mend is not waited for: `check` names it.
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
            repaired = self.repair_in_rounds() => repaired,
            () = keep => unreachable!("it has no end"),
        };
        let agrees = repaired.as_ref().is_ok_and(|(report, for_people)| is_mended(report, *for_people));
        let rest_s = if repaired.is_ok() { REST_S } else { REST_AFTER_ERROR_S };
        self.shards().control(&GIVE_BACK, &[&databases, &lives, &agrees, &rest_s]).await?;
        let databases = databases.join(", ");
        match repaired {
            Ok((report, _)) if agrees => {
                let changed: u64 = report.repaired.iter().map(|proof| proof.repaired).sum();
                tracing::warn!(databases, changed, "after a promotion everything agrees again that a repair can mend");
                if !report.ok {
                    tracing::error!(databases, "something else is wrong; `therev check` names it");
                }
            }
            Ok(_) => tracing::error!(databases, "after a promotion something differs still; `therev check` names it"),
            Err(error) => tracing::warn!(databases, %error, "what a promotion left is not repaired yet"),
        }
        Ok(())
    }
}

/// Whether every proof holds that a repair is for. The others (a partition is missing, rows lie where nobody owns them) fail
/// whatever it does; and so does that of names for those that are left to people.
fn is_mended(report: &Report, for_people: u64) -> bool {
    let mends = |name: &str| report.repaired.iter().any(|repaired| repaired.name == name);
    let may_be = |name: &str| if name == NAMES { for_people } else { 0 };
    report.checks.iter().all(|check| check.wrong <= may_be(&check.name) || !mends(&check.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Check;
    use crate::repair::Repaired;

    #[test]
    fn what_no_repair_can_mend_is_not_waited_for() {
        let check = |name: &str, wrong| Check { name: name.into(), wrong, ..Check::default() };
        let repaired = ["totals", NAMES].map(|name| Repaired { name, repaired: 0, examples: Vec::new() }).to_vec();
        let report = |checks| Report { ok: false, repaired: repaired.clone(), checks };
        assert!(is_mended(&report(vec![check("totals", 0), check("partitions", 3)]), 0));
        assert!(!is_mended(&report(vec![check("totals", 1), check("partitions", 0)]), 0));
        let two_users_of_a_name = report(vec![check(NAMES, 1)]);
        assert!(is_mended(&two_users_of_a_name, 1) && !is_mended(&two_users_of_a_name, 0));
    }
}
