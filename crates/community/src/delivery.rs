//! What the outbox holds, and how it reaches other databases.
//!
//! Events carry states with versions: delivering one twice, late or out of order changes nothing. The writer of a change
//! delivers its own events at once and waits for that a bounded time; what it leaves behind, a relay delivers.

use crate::audit;
use crate::community::{Community, Seen};
use crate::error::Result;
use crate::names::{self, Name, NameKind};
use futures_util::future::join_all;
use placement::{Bucket, Group, ShardNo, UserId, bucket_of};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use shards::{Item, Token, Unfenced, WriteMany};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio_postgres::Row;
use uuid::Uuid;

/// One undelivered row of a shard's outbox.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) outbox_id: i64,
    pub(crate) kind: String,
    pub(crate) key: Uuid,
    pub(crate) member: Uuid,
    pub(crate) version: i64,
    pub(crate) payload: Value,
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
}

static OF_BUCKET: Unfenced = Unfenced::read(
    "SELECT o.outbox_id, o.kind, o.key, o.member, o.version, o.payload
       FROM therev.outbox AS o
      WHERE o.bucket = $1 AND o.delivered_at IS NULL AND o.kind <> 'totals'
      ORDER BY o.outbox_id LIMIT 1000",
);

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
            is_deleted = excluded.is_deleted, version = excluded.version
      WHERE d.version < excluded.version",
);

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
        SET title = excluded.title, is_pinned = excluded.is_pinned, is_locked = excluded.is_locked,
            moderation = excluded.moderation, is_deleted = excluded.is_deleted, version = excluded.version
      WHERE d.version < excluded.version",
);

/// The threads that the directory knows are answered, changed or not: those that it does not know yet stay pending.
static UPDATE_TOTALS: Unfenced = Unfenced::write(
    "WITH told AS (
         SELECT t.thread_id, t.posts, t.last_post_at, t.version
           FROM jsonb_to_recordset($1) AS t (thread_id uuid, posts integer, last_post_at timestamptz, version numeric)),
     changed AS (
         UPDATE thread_directory AS d
            SET post_count = t.posts, last_activity_at = greatest(d.created_at, t.last_post_at),
                totals_version = t.version
           FROM told AS t
          WHERE d.thread_id = t.thread_id AND d.totals_version < t.version)
     SELECT d.thread_id FROM thread_directory AS d JOIN told AS t USING (thread_id)",
);

static UPSERT_PARTICIPANTS: WriteMany = WriteMany::new(
    Group::Content,
    "changed AS (
         INSERT INTO therev.thread_participants AS p
                (bucket, author_id, thread_id, participant_id, posts, deleted, last_post_at, version)
         SELECT o.bucket, c.thread_author_id, c.thread_id, c.author_id, c.posts, c.deleted, c.last_post_at, c.version
           FROM owned AS o,
                jsonb_to_record(o.item) AS c (author_id uuid, thread_id uuid, thread_author_id uuid, posts integer,
                                              deleted integer, last_post_at timestamptz, version bigint)
          ORDER BY c.thread_id, c.author_id
         ON CONFLICT (bucket, author_id, thread_id, participant_id) DO UPDATE
            SET posts = excluded.posts, deleted = excluded.deleted, last_post_at = excluded.last_post_at,
                version = excluded.version
          WHERE p.version < excluded.version
         RETURNING p.bucket, p.author_id, p.thread_id),
     told AS (
         INSERT INTO therev.outbox (colocation_group, bucket, kind, key, version, payload)
         SELECT DISTINCT 'content'::therev.colocation_group, c.bucket, 'totals', c.thread_id, 1::bigint,
                jsonb_build_object('thread_id', c.thread_id, 'author_id', c.author_id)
           FROM changed AS c),
     result AS (SELECT c.thread_id FROM changed AS c)",
);

/// The totals' version is the sum of the participants' versions: the later sum is the greater one, whoever made it.
static SUM_TOTALS: WriteMany = WriteMany::new(
    Group::Content,
    "summed AS (
         SELECT o.bucket, t.author_id, t.thread_id, coalesce(sum(p.posts), 0)::integer AS posts,
                (count(*) FILTER (WHERE p.posts > 0))::integer AS participants, max(p.last_post_at) AS last_post_at,
                coalesce(sum(p.version), 1) AS version
           FROM owned AS o
          CROSS JOIN jsonb_to_record(o.item) AS t (thread_id uuid, author_id uuid)
           LEFT JOIN therev.thread_participants AS p
             ON p.bucket = o.bucket AND p.author_id = t.author_id AND p.thread_id = t.thread_id
          GROUP BY o.bucket, t.author_id, t.thread_id),
     kept AS (
         INSERT INTO therev.thread_totals AS t
                (bucket, author_id, thread_id, posts, participants, last_post_at, version)
         SELECT s.bucket, s.author_id, s.thread_id, s.posts, s.participants, s.last_post_at, s.version
           FROM summed AS s
          ORDER BY s.thread_id
         ON CONFLICT (bucket, author_id, thread_id) DO UPDATE
            SET posts = excluded.posts, participants = excluded.participants, last_post_at = excluded.last_post_at,
                version = excluded.version
          WHERE t.version < excluded.version),
     result AS (
         SELECT jsonb_build_object('thread_id', s.thread_id, 'posts', s.posts, 'last_post_at', s.last_post_at,
                                   'version', s.version::text) AS totals
           FROM summed AS s)",
);

impl Event {
    pub(crate) fn from_row(row: &Row) -> Event {
        Event {
            outbox_id: row.get("outbox_id"),
            kind: row.get("kind"),
            key: row.get("key"),
            member: row.get("member"),
            version: row.get("version"),
            payload: row.get("payload"),
        }
    }

    /// A field of the payload; an event that lacks it is never delivered, and `check` names it by its age.
    fn field<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_value(self.payload.get(name)?.clone()).ok()
    }

    /// The bucket that owns the row it is for, where that is on a shard.
    fn target(&self) -> Option<Bucket> {
        match self.kind.as_str() {
            "claim" => Some(bucket_of(self.key)),
            "contribution" => self.field::<UserId>("thread_author_id").map(UserId::bucket),
            "totals" => self.field::<UserId>("author_id").map(UserId::bucket),
            "audit" => self.field::<UserId>("user_id").map(UserId::bucket),
            _ => None,
        }
    }
}

/// The newest event per key; older ones are delivered with it.
fn newest(events: &[Event]) -> Vec<&Event> {
    let mut by_key: BTreeMap<(&str, Uuid, Uuid), &Event> = BTreeMap::new();
    for event in events {
        let known = by_key.entry((&event.kind, event.key, event.member)).or_insert(event);
        if event.version > known.version {
            *known = event;
        }
    }
    by_key.into_values().collect()
}

crate::fenced_list! { UPSERT_PARTICIPANTS SUM_TOTALS }

impl Community {
    /// Delivers the events of one bucket, waits for that a bounded time, and says what a reader must have seen.
    pub(crate) async fn deliver_bucket(&self, group: Group, bucket: Bucket) -> Seen {
        let community = self.clone();
        let work = async move {
            let shard = community.shard_of(group, bucket);
            let rows = community.shards().unfenced(shard, &OF_BUCKET, &[&bucket.sql()]).await?;
            let events: Vec<Event> = rows.iter().map(Event::from_row).collect();
            let all = events.len();
            if community.deliver(shard, events).await? < all {
                return Ok(None);
            }
            community.shards().directory().token().await.map(Some).map_err(Into::into)
        };
        match self.within_delivery_time(work).await {
            Some(token) => Seen::Position(token),
            None => Seen::Pending(group, bucket),
        }
    }

    /// Delivers events that a statement has just returned; nobody reads them in the directory.
    pub(crate) async fn deliver_now(&self, shard: ShardNo, events: Vec<Event>) {
        let community = self.clone();
        let work = async move { community.deliver(shard, events).await.map(|_| None) };
        self.within_delivery_time(work).await;
    }

    /// Runs a delivery to its end, but waits for it a bounded time only. What fails is left to the relay.
    async fn within_delivery_time(
        &self,
        work: impl Future<Output = Result<Option<Token>>> + Send + 'static,
    ) -> Option<Token> {
        let limit = Duration::from_millis(self.shards().config().delivery_ms);
        match tokio::time::timeout(limit, tokio::spawn(work)).await {
            Ok(Ok(Ok(token))) => token,
            Ok(Ok(Err(error))) => {
                tracing::debug!(%error, "events stay in the outbox for the relay");
                None
            }
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// Delivers events of one shard's outbox, the newest state per key, and notes which are delivered. Says how many.
    ///
    /// A database that is down keeps only its own events back; its error is returned after the others are served.
    pub(crate) async fn deliver(&self, shard: ShardNo, events: Vec<Event>) -> Result<usize> {
        let mut by_kind: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
        let newest = newest(&events);
        for event in newest {
            by_kind.entry(&event.kind).or_default().push(event);
        }
        // Each kind has databases of its own; but the directory takes totals only of a thread that it knows.
        let side_by_side = ["user", "thread", "claim", "audit", "contribution"];
        let mut outcomes = join_all(side_by_side.map(|kind| self.deliver_kind(kind, by_kind.get(kind)))).await;
        outcomes.push(self.deliver_kind("totals", by_kind.get("totals")).await);
        let mut delivered = 0;
        let mut failed = None;
        for (kind, outcome) in side_by_side.into_iter().chain(["totals"]).zip(outcomes) {
            match outcome {
                Ok(done) => {
                    let ids: Vec<i64> = events
                        .iter()
                        .filter(|e| e.kind == kind && done.contains(&(e.key, e.member)))
                        .map(|e| e.outbox_id)
                        .collect();
                    delivered += ids.len();
                    self.inner.acks.add(shard, ids);
                }
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(delivered), Err)
    }

    /// Delivers events of one kind, each key once; says which keys are delivered.
    async fn deliver_kind(&self, kind: &str, events: Option<&Vec<&Event>>) -> Result<HashSet<(Uuid, Uuid)>> {
        let Some(events) = events else { return Ok(HashSet::new()) };
        let delivered = match kind {
            "user" => {
                // The names first: a user whose names cannot be confirmed now stays pending as a whole.
                let confirmed = self.confirm_names(events).await;
                self.tell_directory(&UPSERT_USERS, events).await?;
                confirmed
            }
            "thread" => {
                self.tell_directory(&UPSERT_THREADS, events).await?;
                events.iter().map(|e| (e.key, e.member)).collect()
            }
            "totals" => self.deliver_totals(events).await?,
            "claim" => self.deliver_to_shards(&names::CONFIRM, events).await,
            "audit" => self.deliver_to_shards(&audit::RECEIVE, events).await,
            _ => self.deliver_to_shards(&UPSERT_PARTICIPANTS, events).await,
        };
        fail::fail_point!("deliver.kind_delivered");
        Ok(delivered)
    }

    async fn tell_directory(&self, upsert: &Unfenced, events: &[&Event]) -> Result<()> {
        let states: Value = events.iter().map(|e| e.payload.clone()).collect();
        self.shards().directory().writer(upsert, &[&states]).await?;
        Ok(())
    }

    /// Confirms the claims of users' names; says whose are all confirmed.
    async fn confirm_names(&self, events: &[&Event]) -> HashSet<(Uuid, Uuid)> {
        let mut items = Vec::new();
        let mut buckets_of: BTreeMap<(Uuid, Uuid), Vec<Bucket>> = BTreeMap::new();
        for event in events {
            let buckets = buckets_of.entry((event.key, event.member)).or_default();
            for kind in NameKind::ALL {
                let Some(value) = event.field::<String>(kind.sql()) else { continue };
                let name = Name { kind, value };
                buckets.push(name.bucket());
                items.push(name.told(UserId(event.key), event.version, true));
            }
        }
        let answer = self.shards().write_many(&names::CONFIRM, items).await;
        fail::fail_point!("deliver.names_confirmed");
        let reached = |(_, buckets): &(_, Vec<Bucket>)| buckets.iter().all(|b| !answer.unanswered.contains(b));
        buckets_of.into_iter().filter(reached).map(|(key, _)| key).collect()
    }

    async fn deliver_to_shards(&self, statement: &WriteMany, events: &[&Event]) -> HashSet<(Uuid, Uuid)> {
        let item = |event: &&Event| {
            let mut value = event.payload.clone();
            if event.kind == "claim" {
                // A name that was given up.
                value["claim_key"] = json!(event.key);
                value["held"] = json!(false);
            }
            event.target().map(|bucket| Item { bucket, value })
        };
        let answer = self.shards().write_many(statement, events.iter().filter_map(item).collect()).await;
        for (shard, error) in &answer.missing {
            tracing::debug!(%shard, %error, "events for a shard stay in the outbox");
        }
        let reached = |e: &&&Event| e.target().is_some_and(|bucket| !answer.unanswered.contains(&bucket));
        events.iter().filter(reached).map(|e| (e.key, e.member)).collect()
    }

    async fn deliver_totals(&self, events: &[&Event]) -> Result<HashSet<(Uuid, Uuid)>> {
        let item = |e: &&Event| e.target().map(|bucket| Item { bucket, value: e.payload.clone() });
        let rows = self.shards().write_many(&SUM_TOTALS, events.iter().filter_map(item).collect()).await.rows;
        let totals: Value = rows.iter().map(|row| row.get::<_, Value>("totals")).collect();
        let known = self.shards().directory().writer(&UPDATE_TOTALS, &[&totals]).await?;
        Ok(known.iter().map(|row| (row.get("thread_id"), Uuid::nil())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_state_per_key_is_delivered_and_stands_for_the_older_ones() {
        let event = |outbox_id, key, version| Event {
            outbox_id,
            kind: "user".into(),
            key: Uuid::from_u128(key),
            member: Uuid::nil(),
            version,
            payload: json!({}),
        };
        let events = [event(1, 7, 3), event(2, 8, 1), event(3, 7, 5), event(4, 7, 4)];
        let ids: Vec<i64> = newest(&events).iter().map(|e| e.outbox_id).collect();
        assert_eq!(ids, [3, 2]);
    }
}
