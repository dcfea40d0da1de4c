//! What the outbox holds, and how it reaches other databases.
//!
//! Events carry states with versions: delivering one twice, late or out of order changes nothing. The writer of a change
//! delivers its own events at once and waits for that a bounded time; what it leaves behind, a relay delivers.

use crate::audit;
use crate::community::{Community, Seen};
use crate::error::{Error, Result};
use crate::names::{self, Name, NameKind};
use crate::newest::{changed_totals, kept_totals, newer_participant, summed};
use futures_util::future::join_all;
use placement::{Bucket, Group, ShardNo, UserId, Whose, bucket_of};
use serde::de::DeserializeOwned;
use serde_json::Value;
use shards::{Item, Token, Unfenced, WriteMany};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// One undelivered row of a shard's outbox: what one statement made true.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Whose outbox it is in. `None`: that is not known for sure; a relay, which finds it there, marks it.
    pub(crate) shard: Option<ShardNo>,
    pub(crate) outbox_id: i64,
    pub(crate) kind: String,
    pub(crate) facts: Vec<Value>,
}

/// What a fact is about: an id, and a second one where it takes two (the participant of a thread, the user of a claim).
type Key = (Uuid, Uuid);

/// One state with its version.
#[derive(Debug)]
struct Fact<'a> {
    key: Key,
    version: i64,
    value: &'a Value,
}

/// What became of some events: how many of each kind are delivered, and why of others none is. Of a kind that did not fail the
/// directory has heard all there is for it, also of users whose names could not be confirmed, and who are therefore not delivered.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) delivered: BTreeMap<&'static str, usize>,
    pub(crate) failed: Vec<(&'static str, Error)>,
}

/// Delivered rows whose marks have not been written yet: one statement a shard and relay pass, not one an event.
#[derive(Default)]
pub(crate) struct Acks {
    waiting: Mutex<BTreeMap<ShardNo, Vec<i64>>>,
}

impl Acks {
    pub(crate) fn add(&self, shard: ShardNo, ids: impl IntoIterator<Item = i64>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.entry(shard).or_default().extend(ids);
    }

    pub(crate) fn take(&self) -> BTreeMap<ShardNo, Vec<i64>> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes those of the shards for which so many wait.
    pub(crate) fn take_many(&self, many: usize) -> BTreeMap<ShardNo, Vec<i64>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let full: Vec<ShardNo> = waiting.iter().filter(|(_, ids)| ids.len() >= many).map(|(shard, _)| *shard).collect();
        full.into_iter().filter_map(|shard| waiting.remove_entry(&shard)).collect()
    }
}

/// How many events of a bucket are taken at once.
const OF_BUCKET_MAX: u16 = 1_000;

static OF_BUCKET: Unfenced = Unfenced::read(
    "SELECT o.outbox_id, o.kind::text, therev.facts_of(o) AS facts
       FROM therev.outbox AS o
      WHERE o.bucket = $1 AND o.delivered_at IS NULL AND o.kind <> 'totals' AND o.outbox_id > $2
      ORDER BY o.outbox_id LIMIT $3",
);

/// The newer state of a user replaces the older one, whoever tells it.
static UPSERT_USERS: Unfenced = Unfenced::write(
    "INSERT INTO user_directory AS d
            (user_id, user_name, display_name, profile_pic_url, role, is_active, created_at, is_deleted, version)
     SELECT u.user_id, u.user_name, u.display_name, u.profile_pic_url, u.role, u.is_active, u.created_at, u.deleted,
            u.version
       FROM jsonb_to_recordset($1) AS u (user_id uuid, user_name text, display_name text, profile_pic_url text,
                                         role text, is_active boolean, created_at timestamptz, deleted boolean,
                                         version bigint)
      ORDER BY u.user_id
     ON CONFLICT (user_id) DO UPDATE
        SET user_name = excluded.user_name, display_name = excluded.display_name,
            profile_pic_url = excluded.profile_pic_url, role = excluded.role, is_active = excluded.is_active,
            created_at = excluded.created_at, is_deleted = excluded.is_deleted, version = excluded.version
      WHERE d.version < excluded.version",
);

/// Likewise of a thread; its totals come by events of their own.
static UPSERT_THREADS: Unfenced = Unfenced::write(
    "INSERT INTO thread_directory AS d
            (thread_id, author_id, title, is_pinned, is_locked, moderation, created_at, last_activity_at, is_deleted,
             version)
     SELECT t.thread_id, t.author_id, t.title, t.is_pinned, t.is_locked, t.moderation, t.created_at, t.created_at,
            t.deleted, t.version
       FROM jsonb_to_recordset($1) AS t (thread_id uuid, author_id uuid, title text, is_pinned boolean,
                                         is_locked boolean, moderation text, created_at timestamptz, deleted boolean,
                                         version bigint)
      ORDER BY t.thread_id
     ON CONFLICT (thread_id) DO UPDATE
        SET author_id = excluded.author_id, title = excluded.title, is_pinned = excluded.is_pinned,
            is_locked = excluded.is_locked, moderation = excluded.moderation, created_at = excluded.created_at,
            is_deleted = excluded.is_deleted, version = excluded.version
      WHERE d.version < excluded.version",
);

/// The threads that the directory knows are answered, changed or not: those that it does not know yet stay pending.
static UPDATE_TOTALS: Unfenced = Unfenced::write(concat!(
    "WITH told AS (
         SELECT t.thread_id, t.posts, t.last_post_at, t.version
           FROM jsonb_to_recordset($1) AS t (thread_id uuid, posts integer, last_post_at timestamptz, version numeric)),
     ",
    changed_totals!(),
));

static UPSERT_PARTICIPANTS: WriteMany = WriteMany::new(
    Group::Content,
    concat!(
        "changed AS (
         INSERT INTO therev.thread_participants AS p
                (bucket, author_id, thread_id, participant_id, posts, deleted, last_post_at, version)
         SELECT o.bucket, c.thread_author_id, c.thread_id, c.author_id, c.posts, c.deleted, c.last_post_at, c.version
           FROM owned AS o,
                jsonb_to_record(o.item) AS c (author_id uuid, thread_id uuid, thread_author_id uuid, posts integer,
                                              deleted integer, last_post_at timestamptz, version bigint)
          ORDER BY c.thread_id, c.author_id",
        newer_participant!(),
        "
         RETURNING p.bucket, p.author_id, p.thread_id),
     told AS (
         INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
         SELECT 'content', therev.common_bucket(min(c.bucket), max(c.bucket)), 'totals',
                jsonb_agg(DISTINCT jsonb_build_object('thread_id', c.thread_id, 'author_id', c.author_id))
           FROM changed AS c
         HAVING count(*) > 0),
     result AS (SELECT c.thread_id FROM changed AS c)",
    ),
);

static SUM_TOTALS: WriteMany = WriteMany::new(
    Group::Content,
    concat!(
        summed!(
            "SELECT o.bucket, i.author_id, i.thread_id
                   FROM owned AS o CROSS JOIN jsonb_to_record(o.item) AS i (thread_id uuid, author_id uuid)"
        ),
        ", ",
        kept_totals!(),
        ",
     result AS (
         SELECT jsonb_build_object('thread_id', s.thread_id, 'posts', s.posts, 'last_post_at', s.last_post_at,
                                   'version', s.version::text, 'is_there', s.is_there) AS totals
           FROM summed AS s)",
    ),
);

/// Whether events of this kind tell the directory of a user or a thread.
fn is_for_directory(kind: &str) -> bool {
    matches!(kind, "user" | "thread")
}

impl Event {
    pub(crate) fn from_row(shard: Option<ShardNo>, row: &Row) -> Event {
        let facts = match row.get("facts") {
            Value::Array(facts) => facts,
            other => vec![other],
        };
        Event { shard, outbox_id: row.get("outbox_id"), kind: row.get("kind"), facts }
    }
}

impl Fact<'_> {
    /// Reads what a fact of this kind is about; one that does not say is never delivered, and `check` names it by its
    /// age.
    fn read<'a>(kind: &str, value: &'a Value) -> Option<Fact<'a>> {
        let (first, second) = match kind {
            "user" => ("user_id", None),
            "thread" | "totals" => ("thread_id", None),
            "claim" | "taken" => ("claim_key", Some("user_id")),
            "contribution" => ("thread_id", Some("author_id")),
            "audit" => ("audit_id", None),
            _ => return None,
        };
        let second = second.map_or(Some(Uuid::nil()), |name| field(value, name))?;
        let version = value.get("version").and_then(Value::as_i64).unwrap_or(0);
        Some(Fact { key: (field(value, first)?, second), version, value })
    }

    /// Whose the row is that it is for, where that is on a shard.
    fn target(&self, kind: &str) -> Option<Whose> {
        let owner = match kind {
            "claim" | "taken" => return Some(bucket_of(self.key.0).into()),
            "contribution" => "thread_author_id",
            "totals" => "author_id",
            _ => "user_id",
        };
        field::<UserId>(self.value, owner).map(Whose::from)
    }
}

fn field<T: DeserializeOwned>(value: &Value, name: &str) -> Option<T> {
    serde_json::from_value(value.get(name)?.clone()).ok()
}

/// The newest fact per kind and key; older ones are delivered with it.
fn newest<'a>(facts: impl Iterator<Item = (&'a str, &'a Value)>) -> BTreeMap<&'a str, BTreeMap<Key, Fact<'a>>> {
    let mut by_kind: BTreeMap<&str, BTreeMap<Key, Fact<'_>>> = BTreeMap::new();
    for (kind, value) in facts {
        let Some(fact) = Fact::read(kind, value) else { continue };
        let known = by_kind.entry(kind).or_default();
        if known.get(&fact.key).is_none_or(|older| older.version < fact.version) {
            known.insert(fact.key, fact);
        }
    }
    by_kind
}

crate::fenced_list! { UPSERT_PARTICIPANTS SUM_TOTALS }

impl Community {
    /// Delivers the events of a user's bucket, wherever its users are, waits for that a bounded time, and says what a reader must have
    /// seen. What fails is left to the relay.
    pub(crate) async fn deliver_bucket(&self, group: Group, user: UserId) -> Seen {
        let bucket = user.bucket();
        let limit = Duration::from_millis(self.shards().config().delivery_ms);
        // Where it was written: events stay there, also when the bucket has moved.
        let shard = self.shard_of(group, user);
        match self.directory_told(group, bucket, Some(shard), limit).await {
            Ok(token) => Seen::Position(token),
            Err(error) => {
                tracing::debug!(%error, "events stay in the outbox for the relay");
                Seen::Pending(group, bucket, shard)
            }
        }
    }

    /// Delivers the events of one bucket to the end, but waits for it so long only. Answers with how far the directory has come
    /// once it has heard all of them. What waits for a shard (a name to be confirmed) is nothing that the directory lacks. Besides those
    /// that have the bucket now a shard that had it (`also`) may have some.
    pub(crate) async fn directory_told(
        &self,
        group: Group,
        bucket: Bucket,
        also: Option<ShardNo>,
        limit: Duration,
    ) -> Result<Token> {
        self.mark_many();
        let community = self.clone();
        let work = tokio::spawn(async move {
            let map = community.shards().map();
            let apart = map.pins_of(group, bucket).map(|(_, place)| place.shard);
            let had = also.filter(|shard| community.shards().numbers().contains(shard));
            let shards: BTreeSet<ShardNo> = apart.chain([map.place(group, bucket).shard]).chain(had).collect();
            for shard in shards {
                community.deliver_bucket_from(shard, bucket).await?;
            }
            community.shards().directory().token().await.map_err(Error::from)
        });
        match tokio::time::timeout(limit, work).await {
            Ok(Ok(told)) => told,
            // Given up in its middle, which only a defect can do; a relay has the events.
            Ok(Err(_)) => {
                let reason = "a delivery ended without an answer".to_owned();
                Err(Error::Store(shards::Error::Answer { database: shards::Database::Directory, reason }))
            }
            Err(_) => Err(not_told_within(limit)),
        }
    }

    /// Delivers what one shard's outbox has of a bucket, to its end: the caller's own event may be the last of many. An error
    /// where the directory has not heard all of it.
    async fn deliver_bucket_from(&self, shard: ShardNo, bucket: Bucket) -> Result<()> {
        let (started, deadline) = (Instant::now(), Duration::from_millis(self.shards().config().deadline_ms));
        let mut after = 0_i64;
        while started.elapsed() < deadline {
            let params: [&(dyn ToSql + Sync); 3] = [&bucket.sql(), &after, &i64::from(OF_BUCKET_MAX)];
            let rows = self.shards().unfenced(shard, &OF_BUCKET, &params).await?;
            let events: Vec<Event> = rows.iter().map(|row| Event::from_row(Some(shard), row)).collect();
            let all = events.len();
            after = events.last().map_or(after, |event| event.outbox_id);
            let failed = self.deliver(events).await.failed;
            if let Some((_, error)) = failed.into_iter().find(|(kind, _)| is_for_directory(kind)) {
                return Err(error);
            }
            if all < usize::from(OF_BUCKET_MAX) {
                return Ok(());
            }
        }
        Err(not_told_within(deadline))
    }

    /// Delivers events, the newest fact per key, and notes which are delivered.
    ///
    /// A database that is down keeps only its own events back.
    pub(crate) async fn deliver(&self, events: Vec<Event>) -> Outcome {
        let facts = events.iter().flat_map(|event| event.facts.iter().map(|fact| (event.kind.as_str(), fact)));
        let by_kind = newest(facts);
        // Each kind has databases of its own; but the directory takes totals only of a thread that it knows.
        let side_by_side = ["user", "thread", "claim", "taken", "audit", "contribution"];
        let mut outcomes = join_all(side_by_side.map(|kind| self.deliver_kind(kind, by_kind.get(kind)))).await;
        outcomes.push(self.deliver_kind("totals", by_kind.get("totals")).await);
        let mut all = Outcome::default();
        for (kind, outcome) in side_by_side.into_iter().chain(["totals"]).zip(outcomes) {
            match outcome {
                Ok(done) => {
                    let is_done = |value| Fact::read(kind, value).is_some_and(|fact| done.contains(&fact.key));
                    let whole = events.iter().filter(|e| e.kind == kind && e.facts.iter().all(is_done));
                    let mut count = 0;
                    for event in whole {
                        if let Some(shard) = event.shard {
                            self.inner.acks.add(shard, [event.outbox_id]);
                        }
                        count += 1;
                    }
                    if count > 0 {
                        all.delivered.insert(kind, count);
                    }
                }
                Err(error) => all.failed.push((kind, error)),
            }
        }
        all
    }

    /// Delivers facts that no event holds, as if one did.
    pub(crate) async fn deliver_facts(&self, kind: &'static str, facts: Vec<Value>) -> Result<()> {
        let by_kind = newest(facts.iter().map(|fact| (kind, fact)));
        self.deliver_kind(kind, by_kind.get(kind)).await?;
        Ok(())
    }

    /// Delivers facts of one kind, each key once; says which keys are delivered.
    async fn deliver_kind(&self, kind: &str, facts: Option<&BTreeMap<Key, Fact<'_>>>) -> Result<HashSet<Key>> {
        let Some(facts) = facts else { return Ok(HashSet::new()) };
        let delivered = match kind {
            "user" => {
                // The names first: a user whose names cannot be confirmed now stays pending as a whole.
                let confirmed = self.confirm_names(facts).await;
                self.tell_directory(&UPSERT_USERS, facts).await?;
                confirmed
            }
            "thread" => {
                self.tell_directory(&UPSERT_THREADS, facts).await?;
                facts.keys().copied().collect()
            }
            "totals" => self.deliver_totals(facts).await?,
            "taken" => self.deliver_taken(facts).await,
            "claim" => self.deliver_to_shards(kind, &names::CONFIRM, facts).await,
            "audit" => self.deliver_to_shards(kind, &audit::RECEIVE, facts).await,
            _ => self.deliver_to_shards(kind, &UPSERT_PARTICIPANTS, facts).await,
        };
        fail::fail_point!("deliver.kind_delivered");
        Ok(delivered)
    }

    async fn tell_directory(&self, upsert: &Unfenced, facts: &BTreeMap<Key, Fact<'_>>) -> Result<()> {
        let states: Value = facts.values().map(|fact| fact.value.clone()).collect();
        self.shards().directory().writer(upsert, &[&states]).await?;
        Ok(())
    }

    /// Confirms the claims of users' names; says whose are all confirmed.
    async fn confirm_names(&self, facts: &BTreeMap<Key, Fact<'_>>) -> HashSet<Key> {
        let mut items = Vec::new();
        let mut buckets_of: BTreeMap<Key, Vec<Bucket>> = BTreeMap::new();
        for fact in facts.values() {
            let buckets = buckets_of.entry(fact.key).or_default();
            for kind in NameKind::ALL {
                let Some(value) = field::<String>(fact.value, kind.sql()) else { continue };
                let name = Name { kind, value };
                buckets.push(name.bucket());
                items.push(name.told(UserId(fact.key.0), fact.version, true));
            }
        }
        let answer = self.shards().write_many(&names::CONFIRM, items).await;
        fail::fail_point!("deliver.names_confirmed");
        let reached = |(_, buckets): &(_, Vec<Bucket>)| buckets.iter().all(|b| !answer.unanswered.contains(b));
        buckets_of.into_iter().filter(reached).map(|(key, _)| key).collect()
    }

    /// Names that a bulk write holds: those which their users' rows have are theirs, the others are doubted.
    async fn deliver_taken(&self, facts: &BTreeMap<Key, Fact<'_>>) -> HashSet<Key> {
        let (doubted, unanswered) = self.names_without_users(facts.keys().copied().collect()).await;
        let items: Vec<Item> = doubted.iter().map(|(name, user)| names::doubt(*name, *user)).collect();
        let answer = self.shards().write_many(&names::DOUBT, items).await;
        let is_missed = |(name, user): &Key| {
            unanswered.contains(&UserId(*user).bucket())
                || (doubted.contains(&(*name, *user)) && answer.unanswered.contains(&bucket_of(*name)))
        };
        facts.keys().copied().filter(|key| !is_missed(key)).collect()
    }

    async fn deliver_to_shards(
        &self,
        kind: &str,
        statement: &WriteMany,
        facts: &BTreeMap<Key, Fact<'_>>,
    ) -> HashSet<Key> {
        let mut unanswered = BTreeSet::new();
        for part in items(kind, facts).chunks(TOLD_AT_ONCE) {
            let answer = self.shards().write_many(statement, part.to_vec()).await;
            for (shard, error) in &answer.missing {
                tracing::debug!(%shard, %error, "facts for a shard stay in the outbox");
            }
            unanswered.extend(answer.unanswered);
        }
        let reached = |fact: &&Fact<'_>| fact.target(kind).is_some_and(|whose| !unanswered.contains(&whose.bucket));
        facts.values().filter(reached).map(|fact| fact.key).collect()
    }

    /// Sums threads and tells the directory; says of which that is done. Of one that its owner's shard does not have (a stranger
    /// invented it, or a promotion lost it) nobody will ever tell the directory, so that there is nothing left to deliver.
    async fn deliver_totals(&self, facts: &BTreeMap<Key, Fact<'_>>) -> Result<HashSet<Key>> {
        let mut delivered = HashSet::new();
        for part in items("totals", facts).chunks(SUMMED_AT_ONCE) {
            let answer = self.shards().write_many(&SUM_TOTALS, part.to_vec()).await;
            let summed: Vec<Value> = answer.rows().map(|row| row.get("totals")).collect();
            let is_nowhere = |totals: &&Value| field::<bool>(totals, "is_there") == Some(false);
            let nowhere = summed.iter().filter(is_nowhere).filter_map(|totals| field::<Uuid>(totals, "thread_id"));
            delivered.extend(nowhere.map(|thread| (thread, Uuid::nil())));
            let known = self.shards().directory().writer(&UPDATE_TOTALS, &[&Value::from(summed)]).await?;
            delivered.extend(known.iter().map(|row| (row.get("thread_id"), Uuid::nil())));
        }
        Ok(delivered)
    }
}

/// The directory has not heard of a write in time.
fn not_told_within(limit: Duration) -> Error {
    let waiting_for = "the directory to hear of a write".to_owned();
    Error::Store(shards::Error::Deadline { limit_ms: limit.as_millis(), waiting_for })
}

/// How many facts one statement tells a shard, and how many threads one sums. Both are short, for a relocation that is about to be
/// switched waits for them, and its stream for all that a shard has written.
const TOLD_AT_ONCE: usize = 250;
const SUMMED_AT_ONCE: usize = 25;

/// Facts as a statement on many owners takes them.
fn items(kind: &str, facts: &BTreeMap<Key, Fact<'_>>) -> Vec<Item> {
    let item = |fact: &Fact<'_>| fact.target(kind).map(|whose| Item { whose, value: fact.value.clone() });
    facts.values().filter_map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_newest_fact_per_key_stands_for_the_older_ones() {
        let fact = |id: u128, version: i64| json!({ "user_id": Uuid::from_u128(id), "version": version });
        let facts = [fact(7, 3), fact(8, 1), fact(7, 5), fact(7, 4), json!({ "version": 9 })];
        let by_kind = newest(facts.iter().map(|fact| ("user", fact)));
        let versions: Vec<i64> = by_kind["user"].values().map(|fact| fact.version).collect();
        assert_eq!(versions, [5, 1], "one that does not say what it is about is left out");
    }
}
