//! Many rows at once: binary COPY per shard, side by side, each batch locked, checked and short.
//!
//! Rows that are there already are left as they are, so that a bulk write which was cut off is repeated whole. What
//! others must hear, the writer tells them itself, by COPY or in arrays; the event in the outbox only names the rows, so that a
//! relay tells what a crash left untold.

mod names;
mod rows;
pub(crate) mod tell;

pub use rows::{BulkPost, BulkThread, BulkUser, Copied};

use crate::community::Community;
use crate::error::{Error, Result};
use futures_util::FutureExt;
use futures_util::future::{Shared, join_all, try_join_all};
use placement::{Group, ShardNo, ThreadId, UserId, Whose};
use rows::{BulkRow, NamedUser};
use shards::Bulk;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// How often a batch is tried again after somebody else wrote the same rows, or a connection broke.
const TRIES: u32 = 5;
/// How many rows make a batch: enough for a COPY, short enough not to hold a switch up.
pub(crate) const BATCH: usize = 5_000;
/// Threads whose totals wait, and how long they and the marks of what was told do at the most: a relay takes what it finds
/// unmarked for a while, and `check` names it.
const TOTALS_MAX: usize = 50_000;
const MARKS_WAIT: Duration = Duration::from_secs(10);
/// How many rows of a shard's batch are looked for before all of them are.
const SAMPLE: usize = 16;
/// How many rows are on their way at once: the servers work on some while the next are made.
const UNDER_WAY_MAX: usize = 3 * BATCH;

/// Brings rows in by the thousand, several batches at a time. Ends with [`BulkWriter::finish`].
///
/// A batch is on its way when the call returns; what became of it is told by [`BulkWriter::copied`], and an error by the
/// next call.
pub struct BulkWriter {
    community: Community,
    /// Batches on their way, and how many rows they have.
    under_way: JoinSet<(usize, Result<Batch>)>,
    rows_under_way: usize,
    /// Whether a batch was not written: those after it wait for it in vain.
    has_failed: bool,
    copied: BTreeMap<&'static str, Copied>,
    /// Threads that have new posts, and their authors.
    touched: BTreeMap<ThreadId, UserId>,
    /// Events that ask for the totals of touched threads, until those are told.
    totals: Vec<(ShardNo, i64)>,
    marked_at: Instant,
    /// What it has written so far of each: what it has not is new.
    contributions: Arc<tell::WrittenBefore>,
    participants: Arc<tell::WrittenBefore>,
    /// The order of the batches decides who gets a name.
    names_taken: Steps,
    /// Nobody shall find a post without its thread.
    threads_written: Steps,
}

/// Steps of batches that are done one after the other, or waited for.
#[derive(Default)]
struct Steps {
    last: Option<Step>,
}

type Step = Shared<oneshot::Receiver<()>>;

impl Steps {
    /// What comes before a new step, and how to say that the new one is done; unsaid, those that wait for it end.
    fn add(&mut self) -> (Option<Step>, oneshot::Sender<()>) {
        let (done, step) = oneshot::channel();
        (self.last.replace(step.shared()), done)
    }
}

/// Whether a step and all before it are done. If not, their error is the one that counts.
async fn is_done(step: Option<Step>) -> bool {
    match step {
        Some(step) => step.await.is_ok(),
        None => true,
    }
}

/// What became of a batch.
#[derive(Default)]
struct Batch {
    kind: &'static str,
    copied: Copied,
    touched: Vec<(ThreadId, UserId)>,
    totals: Vec<(ShardNo, i64)>,
}

/// Rows as they lie on one shard now, and what their transaction said.
pub(crate) struct Part<T, R> {
    shard: ShardNo,
    rows: Vec<T>,
    pub(crate) said: R,
}

/// What a COPY did.
struct Landed {
    version_floor: i64,
    /// Rows that were there before.
    known: HashSet<Uuid>,
    /// The event about the new ones.
    event: Option<i64>,
}

pub(crate) type Done<T> = std::result::Result<T, shards::Error>;

impl Community {
    /// Begins to bring rows in.
    pub fn bulk_writer(&self) -> BulkWriter {
        BulkWriter {
            community: self.clone(),
            under_way: JoinSet::new(),
            rows_under_way: 0,
            has_failed: false,
            copied: BTreeMap::new(),
            touched: BTreeMap::new(),
            totals: Vec::new(),
            marked_at: Instant::now(),
            contributions: Arc::default(),
            participants: Arc::default(),
            names_taken: Steps::default(),
            threads_written: Steps::default(),
        }
    }

    /// Does some work on rows, on the shards that have their owners, side by side, until all of it is done somewhere.
    /// The work must be one that can be repeated; it hears whether it is. What it needs besides is `given` to it: were it borrowed by
    /// the closure, the compiler would not believe that the batch may run on any thread.
    pub(crate) async fn in_bulk<T, R, G>(
        &self,
        group: Group,
        rows: Vec<T>,
        whose: impl Fn(&T) -> Whose,
        given: &G,
        work: impl AsyncFn(&Bulk, &[T], &G, bool) -> Done<R>,
    ) -> Result<Vec<Part<T, R>>> {
        let mut done = Vec::new();
        let mut open = rows;
        // A shard that has not all of the owners any more is no failure: a switch is going on.
        let (mut rounds, mut failures) = (0_u32, 0);
        while !open.is_empty() {
            let mut by_shard: BTreeMap<ShardNo, (BTreeSet<Whose>, Vec<T>)> = BTreeMap::new();
            for row in open.drain(..) {
                let whose = whose(&row);
                let part = by_shard.entry(self.shard_of(group, whose)).or_default();
                part.0.insert(whose);
                part.1.push(row);
            }
            let work = &work;
            let parts = by_shard.into_iter().map(|(shard, (owners, rows))| async move {
                let said =
                    self.on_shard(group, shard, &owners, async |bulk| work(bulk, &rows, given, rounds > 0).await).await;
                (shard, rows, said)
            });
            let mut has_failed = false;
            for (shard, rows, said) in join_all(parts).await {
                match said {
                    Ok(Some(said)) => done.push(Part { shard, rows, said }),
                    Ok(None) => open.extend(rows),
                    Err(error) if failures < TRIES && is_worth_another_try(&error) => {
                        has_failed = true;
                        open.extend(rows);
                    }
                    Err(error) => return Err(Error::of_constraint(error)),
                }
            }
            rounds = rounds.saturating_add(1);
            failures += u32::from(has_failed);
        }
        Ok(done)
    }

    /// One transaction on one shard. `None`: the shard does not have all of these owners (any more).
    async fn on_shard<R>(
        &self,
        group: Group,
        shard: ShardNo,
        owners: &BTreeSet<Whose>,
        work: impl AsyncFnOnce(&Bulk) -> Done<R>,
    ) -> Done<Option<R>> {
        let Some(bulk) = self.shards().bulk(group, shard, owners).await? else { return Ok(None) };
        let said = work(&bulk).await?;
        fail::fail_point!("bulk.before_commit");
        bulk.commit().await?;
        fail::fail_point!("bulk.committed");
        Ok(Some(said))
    }

    /// That the rows of users who were found are where commits have to be.
    async fn confirm_users(&self, found: impl Iterator<Item = UserId>) -> Result<()> {
        let by_shard: BTreeMap<ShardNo, UserId> =
            found.map(|user| (self.shard_of(Group::Account, user), user)).collect();
        let confirmed = by_shard.into_values().map(|user| self.shards().confirm(Group::Account, user));
        try_join_all(confirmed).await?;
        Ok(())
    }

    /// The events of what was told are delivered; the others wait for a relay.
    fn settle_events<R>(&self, kind: &str, told: Result<()>, parts: &[Part<R, Landed>]) {
        if let Err(error) = told {
            tracing::debug!(%error, "what others must hear of new {kind} is left to a relay");
            return;
        }
        fail::fail_point!("bulk.told");
        for part in parts {
            self.inner.acks.add(part.shard, part.said.event);
        }
    }
}

impl BulkWriter {
    /// Brings users in, counted as `kind`. Names are taken first, each user's first free one: the order of the batches
    /// decides.
    pub async fn users(&mut self, kind: &'static str, users: Vec<BulkUser>) -> Result<()> {
        let community = self.community.clone();
        let (before, names_taken) = self.names_taken.add();
        self.begin(kind, users.len(), async move {
            let keys = || users.iter().map(|u| (u.user_id.into(), u.user_id.0)).collect();
            let (mut known, mut buried) = community.known_users(keys()).await?;
            if !known.is_empty() {
                // Found there is not yet there for good: read once more when it is.
                let found = users.iter().map(|user| user.user_id).filter(|user| known.contains(&user.0));
                community.confirm_users(found).await?;
                (known, buried) = community.known_users(keys()).await?;
            }
            let (old, new): (Vec<_>, Vec<_>) = users.into_iter().partition(|u| known.contains(&u.user_id.0));
            if !is_done(before).await {
                return Ok(Batch::default());
            }
            let (named, taken) = community.name_users(new, &buried).await?;
            // Where nobody waits for it, nobody hears it.
            let _ = names_taken.send(());
            let write = async |bulk: &Bulk, users: &[NamedUser], (): &(), again| {
                names::unbury(bulk, users).await?;
                copy(bulk, users, again).await
            };
            let parts = community.in_bulk(Group::Account, named, NamedUser::whose, &(), write).await?;
            fail::fail_point!("bulk.users_written");
            let written: HashSet<Uuid> = parts.iter().flat_map(Part::new_rows).map(BulkRow::id).collect();
            let shards = taken.iter().map(|(shard, _)| *shard).collect();
            Box::pin(community.settle_doubted(&shards, &written)).await;
            for (shard, event) in taken {
                community.inner.acks.add(shard, [event]);
            }
            let mut copied = copied(&parts);
            copied.existing += u64::try_from(old.len()).unwrap_or(0);
            community.settle_events(kind, community.tell_of_users(&parts).await, &parts);
            Ok(Batch { copied, ..Batch::default() })
        })
        .await
    }

    /// Brings threads in, counted as `kind`.
    pub async fn threads(&mut self, kind: &'static str, threads: Vec<BulkThread>) -> Result<()> {
        let community = self.community.clone();
        let (before, written) = self.threads_written.add();
        self.begin(kind, threads.len(), async move {
            let write = async |bulk: &Bulk, threads: &[BulkThread], (): &(), again| copy(bulk, threads, again).await;
            let parts = community.in_bulk(Group::Content, threads, BulkThread::whose, &(), write).await?;
            if is_done(before).await {
                let _ = written.send(());
            }
            community.settle_events(kind, community.tell_of_threads(&parts).await, &parts);
            Ok(Batch { copied: copied(&parts), ..Batch::default() })
        })
        .await
    }

    /// Brings posts in, counted as `kind`, with their authors' contributions. Totals of their threads are told by
    /// `finish`.
    pub async fn posts(&mut self, kind: &'static str, posts: Vec<BulkPost>) -> Result<()> {
        let community = self.community.clone();
        let threads = self.threads_written.last.clone();
        let (contributions, participants) = (self.contributions.clone(), self.participants.clone());
        self.begin(kind, posts.len(), async move {
            if !is_done(threads).await {
                return Ok(Batch::default());
            }
            let write = async |bulk: &Bulk, posts: &[BulkPost], before: &tell::WrittenBefore, again| {
                let mut landed = copy(bulk, posts, again).await?;
                let (event, sums) = tell::contribute(bulk, posts, &landed, before, again).await?;
                landed.event = event;
                Ok((landed, sums))
            };
            let parts = community.in_bulk(Group::Content, posts, BulkPost::whose, &*contributions, write).await?;
            let (mut landed, mut sums) = (Vec::new(), Vec::new());
            for Part { shard, rows, said } in parts {
                landed.push(Part { shard, rows, said: said.0 });
                sums.extend(said.1);
            }
            let mut batch = Batch { copied: copied(&landed), ..Batch::default() };
            batch.touched = sums.iter().map(|sum| (sum.thread_id, sum.thread_author_id)).collect();
            let told = community.tell_participants(sums, &participants).await.map(|events| batch.totals = events);
            community.settle_events(kind, told, &landed);
            Ok(batch)
        })
        .await
    }

    /// What became of the rows of each kind so far.
    pub fn copied(&self) -> &BTreeMap<&'static str, Copied> {
        &self.copied
    }

    /// How many rows are written.
    pub fn written(&self) -> u64 {
        self.copied.values().map(Copied::total).sum()
    }

    /// Waits until every batch is written and told, the totals of the threads that have new posts too. What cannot be
    /// told now, a relay tells.
    pub async fn finish(&mut self) -> Result<()> {
        let written = self.land(0).await;
        let touched: Vec<(ThreadId, UserId)> = std::mem::take(&mut self.touched).into_iter().collect();
        let events = std::mem::take(&mut self.totals);
        self.marked_at = Instant::now();
        let r = self.community.tell_totals(touched).await;
        match r {
            Ok(true) => {
                for (shard, event) in events {
                    self.community.inner.acks.add(shard, [event]);
                }
            }
            Ok(false) => tracing::debug!("totals of threads that the directory does not know are left to a relay"),
            Err(error) => tracing::debug!(%error, "totals of threads are left to a relay"),
        }
        self.community.mark_delivered().await;
        written.and_then(|()| self.goes_on())
    }

    /// After an error nothing more is written: whoever goes on does so with a writer that begins anew.
    fn goes_on(&self) -> Result<()> {
        let failed = || Err(Error::invalid("batch", "an earlier one was not written; begin anew, with another writer"));
        if self.has_failed { failed() } else { Ok(()) }
    }

    /// Sends a batch on its way when there is room for it.
    async fn begin(
        &mut self,
        kind: &'static str,
        rows: usize,
        batch: impl Future<Output = Result<Batch>> + Send + 'static,
    ) -> Result<()> {
        self.goes_on()?;
        // An empty batch is one that is waited for, too.
        let rows = rows.max(1);
        self.land(UNDER_WAY_MAX.saturating_sub(rows)).await?;
        if self.touched.len() >= TOTALS_MAX || self.marked_at.elapsed() > MARKS_WAIT {
            self.finish().await?;
        }
        self.rows_under_way += rows;
        self.under_way.spawn(async move { (rows, batch.await.map(|batch| Batch { kind, ..batch })) });
        Ok(())
    }

    /// Waits until no more than so many rows are under way. Of several errors the first one counts.
    async fn land(&mut self, most: usize) -> Result<()> {
        let mut all = Ok(());
        while self.rows_under_way > most {
            let Some(landed) = self.under_way.join_next().await else { break };
            let (rows, landed) = landed.unwrap_or_else(|failure| std::panic::resume_unwind(failure.into_panic()));
            self.rows_under_way -= rows;
            match landed {
                Ok(batch) => {
                    self.copied.entry(batch.kind).or_default().add(batch.copied);
                    self.touched.extend(batch.touched);
                    self.totals.extend(batch.totals);
                }
                Err(error) => {
                    self.has_failed = true;
                    all = all.and(Err(error));
                }
            }
        }
        all
    }
}

/// Copies the rows that are not there yet, and leaves the event about them.
async fn copy<R: BulkRow>(bulk: &Bulk, rows: &[R], again: bool) -> Done<Landed> {
    let known = known(bulk, rows, again).await?;
    let new: Vec<&R> = rows.iter().filter(|row| !known.contains(&row.id())).collect();
    let version_floor = bulk.version_floor;
    if new.is_empty() {
        bulk.confirm().await?;
        return Ok(Landed { version_floor, known, event: None });
    }
    let shared: Vec<_> = new.iter().map(|row| row.shared(version_floor)).collect();
    let encoded = new.iter().zip(&shared).map(|(row, shared)| row.columns(shared));
    bulk.copy(R::COPY, R::TYPES, encoded).await?;
    let event = match R::EVENT {
        Some(kind) => {
            let owners: Vec<Uuid> = new.iter().map(|row| row.owner().0).collect();
            let ids: Vec<Uuid> = new.iter().map(|row| row.id()).collect();
            Some(tell::leave_event(bulk, R::GROUP, kind, &owners, (kind != "user").then_some(&ids)).await?)
        }
        None => None,
    };
    Ok(Landed { version_floor, known, event })
}

/// Which rows are there. A batch is written whole, so a few of its rows tell of all; should they not, the COPY is refused
/// and all are looked for `again`.
async fn known<R: BulkRow>(bulk: &Bulk, rows: &[R], again: bool) -> Done<HashSet<Uuid>> {
    let look = async |step: usize| {
        let keys: (Vec<i16>, Vec<Uuid>) =
            rows.iter().step_by(step).map(|row| (row.owner().bucket().sql(), row.id())).unzip();
        let known = bulk.query(R::KNOWN, &[&keys.0, &keys.1]).await?;
        Done::Ok(known.iter().map(|row| row.get(0)).collect::<HashSet<Uuid>>())
    };
    let step = rows.len() / SAMPLE;
    if step > 1 && !again && look(step).await?.is_empty() {
        return Ok(HashSet::new());
    }
    look(1).await
}

fn copied<R: BulkRow>(parts: &[Part<R, Landed>]) -> Copied {
    let mut total = Copied::default();
    for part in parts {
        let new = part.new_rows().count();
        *total.written.entry(part.shard).or_default() += u64::try_from(new).unwrap_or(0);
        total.existing += u64::try_from(part.rows.len() - new).unwrap_or(0);
    }
    total
}

impl<T: BulkRow> Part<T, Landed> {
    /// The rows that were not there before.
    fn new_rows(&self) -> impl Iterator<Item = &T> {
        self.rows.iter().filter(|row| !self.said.known.contains(&row.id()))
    }
}

/// A connection that broke says nothing of the server: it may have been promoted. One that is down is named at once again.
fn is_worth_another_try(error: &shards::Error) -> bool {
    matches!(error, shards::Error::OutcomeUnknown { .. } | shards::Error::Down { .. })
        || error.sql_error().is_some_and(|refused| {
            matches!(*refused.code(), SqlState::UNIQUE_VIOLATION | SqlState::T_R_DEADLOCK_DETECTED)
        })
}
