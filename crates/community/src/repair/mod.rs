//! Repair: makes what is derived anew where `check` finds that it differs from what the shards hold.
//!
//! Never writes what is a user's own. Safe beside live traffic, by one order of steps: what differs (in every look) is
//! set back to a version below every real one, so that any state replaces it; only then is the truth read, on the shard
//! that owns it; and it is delivered by the same statements as an event. A newer state that comes in between stays. A count
//! of posts need not be set back: it is counted anew for a version above what differs.

pub(crate) mod claims;
pub(crate) mod content;
pub(crate) mod directory;
mod placement;

use crate::check::{
    self, CLAIMS, CONTRIBUTIONS, Check, Databases, EXAMPLES, NAMES, OUTBOX, OWNERS, PARTICIPANTS, THREADS, TOTALS,
    USERS,
};
use crate::community::Community;
use crate::error::Result;
use futures_util::future::try_join;
use serde::Serialize;
use shards::{Item, WriteMany};
use std::collections::BTreeSet;
use tokio_postgres::Row;
use uuid::Uuid;

/// What a repair changed, and what `check` found after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is wrong now.
    pub ok: bool,
    /// What was changed, by the proof that it was for.
    pub repaired: Vec<Repaired>,
    /// Each proof, after the repair.
    pub checks: Vec<Check>,
}

/// What was changed for one proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// The name of the proof.
    pub name: &'static str,
    /// How many keys were made anew (events delivered, claims settled); one that took two rounds counts twice.
    pub repaired: u64,
    /// Some of them.
    pub examples: Vec<String>,
}

/// How often it is tried: one repair can uncover another, and live traffic can get in its way.
const ROUNDS: u32 = 3;
/// How many keys one look takes, which reads whole tables, and how many one statement that writes.
const LOOK: usize = 10_000;
const BATCH: usize = 200;

impl Report {
    fn new() -> Report {
        // In the order in which they are repaired: each rests on those before it.
        let names = [OWNERS, OUTBOX, CLAIMS, NAMES, CONTRIBUTIONS, PARTICIPANTS, TOTALS, USERS, THREADS];
        let repaired = names.map(|name| Repaired { name, repaired: 0, examples: Vec::new() }).to_vec();
        Report { ok: false, repaired, checks: Vec::new() }
    }

    fn note(&mut self, name: &str, count: u64, examples: impl IntoIterator<Item = String>) {
        if let Some(noted) = self.repaired.iter_mut().find(|repaired| repaired.name == name) {
            noted.repaired += count;
            noted.examples.extend(examples);
            noted.examples.truncate(EXAMPLES);
        }
    }

    fn note_keys<'a>(&mut self, name: &str, keys: impl ExactSizeIterator<Item = &'a String>) {
        self.note(name, u64::try_from(keys.len()).unwrap_or(u64::MAX), keys.take(EXAMPLES).cloned());
    }
}

impl Community {
    /// Makes anew what differs from what the shards hold: the placement, claims, contributions, participants, totals, the directory;
    /// delivers the outbox. Then checks everything. Needs every database; one that is down is the error, and what was
    /// repaired until then stays so.
    pub async fn repair(&self) -> Result<Report> {
        Ok(self.repair_in_rounds().await?.0)
    }

    /// The same, and how many names that differ still are left to people.
    pub(crate) async fn repair_in_rounds(&self) -> Result<(Report, u64)> {
        let mut report = Report::new();
        let mut for_people = 0;
        for _ in 0..ROUNDS {
            // A shard that is added meanwhile has its part in the next round.
            let databases = Databases::of(self.shards()).await?;
            for_people = self.repair_once(&databases, &mut report).await?;
            report.checks = databases.prove().await?;
            report.ok = report.checks.iter().all(|check| check.wrong == 0);
            if report.ok {
                break;
            }
        }
        Ok((report, for_people))
    }

    /// Says how many names it leaves to people.
    async fn repair_once(&self, databases: &Databases, report: &mut Report) -> Result<u64> {
        report.note(OWNERS, placement::record(databases).await?, []);
        // What only waits is no difference; and no old event is left that could come after a repair.
        let relayed = self.relay_pass(0.0).await?;
        for (kind, count) in relayed.delivered {
            report.note(OUTBOX, count, [format!("{kind}: {count}")]);
        }
        report.note(CLAIMS, relayed.claims_settled, []);

        // A bulk write has taken names whose users' rows come next: its event says so.
        let mut names = check::across::differing(databases, NAMES).await?;
        names.retain(|_, differing| !(differing.is_late && differing.classes.is_empty()));
        let (settled, for_people) = self.repair_names(databases, names.into_keys().collect()).await?;
        report.note_keys(NAMES, settled.iter());

        let counts = check::within::wrong_keys(databases, CONTRIBUTIONS);
        let (counts, copies) = try_join(counts, check::across::differing(databases, PARTICIPANTS)).await?;
        report.note_keys(CONTRIBUTIONS, counts.iter());
        report.note_keys(PARTICIPANTS, copies.keys());
        let wrong: BTreeSet<(Uuid, Uuid)> = counts.iter().chain(copies.keys()).filter_map(|key| pair_in(key)).collect();
        self.repair_contributions(databases, wrong.into_iter().collect()).await?;

        let totals = check::within::wrong_keys(databases, TOTALS).await?;
        report.note_keys(TOTALS, totals.iter());
        self.sum_again(totals.iter().filter_map(|key| pair_in(key)).collect()).await?;

        let users = check::across::differing(databases, USERS).await?;
        report.note_keys(USERS, users.keys());
        self.repair_users(users.keys().flat_map(|key| ids_in(key)).collect()).await?;
        let threads = check::across::differing(databases, THREADS).await?;
        report.note_keys(THREADS, threads.keys());
        self.repair_threads(threads.iter().flat_map(|(key, d)| ids_in(key).map(|id| (id, &d.classes))).collect())
            .await?;
        Ok(for_people)
    }

    /// A fenced write of many items, a batch at a time.
    async fn write_all(&self, statement: &WriteMany, items: Vec<Item>) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for batch in items.chunks(BATCH) {
            rows.extend(self.shards().write_many(statement, batch.to_vec()).await.whole()?);
        }
        Ok(rows)
    }
}

/// The ids that a proof's key names, in its order.
fn ids_in(key: &str) -> impl Iterator<Item = Uuid> {
    key.split(' ').filter_map(|word| word.parse().ok())
}

fn pair_in(key: &str) -> Option<(Uuid, Uuid)> {
    let mut ids = ids_in(key);
    Some((ids.next()?, ids.next()?))
}
