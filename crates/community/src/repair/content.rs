//! Contributions, counted anew from posts; their copies with the threads; the threads' totals.

use super::{BATCH, LOOK};
use crate::bulk::Done;
use crate::bulk::tell::leave_event;
use crate::check::Databases;
use crate::community::Community;
use crate::error::Result;
use placement::{Group, UserId};
use serde_json::json;
use shards::{Bulk, Item, Unfenced, WriteMany};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Row;
use uuid::Uuid;

/// The copies of some contributions, wherever they lie.
const COPIES: &str = "
    SELECT p.author_id, p.thread_id, p.participant_id, p.version
      FROM therev.fence AS f
      JOIN therev.thread_participants AS p ON therev.may_read(f, p.bucket, p.author_id)
      JOIN unnest($1::uuid[], $2::uuid[]) AS k (participant_id, thread_id) USING (participant_id, thread_id)
     WHERE f.colocation_group = 'content'";

/// Sets copies back to a version below every real one. They are locked in the order in which deliveries write them.
static OPEN_COPIES: WriteMany = WriteMany::new(
    Group::Content,
    "wrong AS (
         SELECT p.bucket, p.author_id, p.thread_id, p.participant_id
           FROM owned AS o,
                jsonb_to_record(o.item) AS k (author_id uuid, thread_id uuid, participant_id uuid),
                therev.thread_participants AS p
          WHERE p.bucket = o.bucket AND p.author_id = k.author_id AND p.thread_id = k.thread_id
            AND p.participant_id = k.participant_id
          ORDER BY p.thread_id, p.participant_id
            FOR UPDATE OF p),
     result AS (
         UPDATE therev.thread_participants AS p SET version = 1
           FROM wrong AS w
          WHERE p.bucket = w.bucket AND p.author_id = w.author_id AND p.thread_id = w.thread_id
            AND p.participant_id = w.participant_id
         RETURNING p.thread_id)",
);

/// Copies of nothing, unless something was delivered to them since they were set back.
static DROP_COPIES: WriteMany = WriteMany::new(
    Group::Content,
    "result AS (
         DELETE FROM therev.thread_participants AS p
          USING owned AS o, jsonb_to_record(o.item) AS k (author_id uuid, thread_id uuid, participant_id uuid)
          WHERE p.bucket = o.bucket AND p.author_id = k.author_id AND p.thread_id = k.thread_id
            AND p.participant_id = k.participant_id AND p.version = 1
         RETURNING p.thread_id)",
);

/// Likewise a thread's totals.
static OPEN_TOTALS: WriteMany = WriteMany::new(
    Group::Content,
    "wrong AS (
         SELECT t.bucket, t.author_id, t.thread_id
           FROM owned AS o, jsonb_to_record(o.item) AS k (author_id uuid, thread_id uuid), therev.thread_totals AS t
          WHERE t.bucket = o.bucket AND t.author_id = k.author_id AND t.thread_id = k.thread_id
          ORDER BY t.thread_id
            FOR UPDATE OF t),
     result AS (
         UPDATE therev.thread_totals AS t SET version = 0
           FROM wrong AS w
          WHERE t.bucket = w.bucket AND t.author_id = w.author_id AND t.thread_id = w.thread_id
         RETURNING t.thread_id)",
);

/// Likewise the directory's totals.
static OPEN_LISTED_TOTALS: Unfenced = Unfenced::write(
    "UPDATE thread_directory AS d SET totals_version = 0
       FROM (SELECT w.thread_id FROM thread_directory AS w
              WHERE w.thread_id = ANY ($1) ORDER BY w.thread_id FOR UPDATE) AS w
      WHERE d.thread_id = w.thread_id",
);

/// A contribution is there wherever posts are, so that it can be locked.
const MAKE: &str = "
    INSERT INTO therev.thread_contributions
           (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
    SELECT k.bucket, k.author_id, k.thread_id, p.thread_author_id, 0, p.created_at, $4::bigint
      FROM unnest($1::smallint[], $2::uuid[], $3::uuid[]) AS k (bucket, author_id, thread_id),
           LATERAL (SELECT p.thread_author_id, p.created_at FROM posts AS p
                     WHERE p.bucket = k.bucket AND p.author_id = k.author_id AND p.thread_id = k.thread_id
                     LIMIT 1) AS p
     ORDER BY k.author_id, k.thread_id
    ON CONFLICT (bucket, author_id, thread_id) DO NOTHING";

/// Whoever writes or deletes a post now has changed the contribution before, and is counted, or waits for it.
const LOCK: &str = "
    SELECT FROM therev.thread_contributions AS c
      JOIN unnest($1::smallint[], $2::uuid[], $3::uuid[]) AS k (bucket, author_id, thread_id)
     USING (bucket, author_id, thread_id)
     ORDER BY c.author_id, c.thread_id
       FOR UPDATE OF c";

/// Counts what the lock's successors cannot change: a statement of its own, whose snapshot is younger than the lock.
///
/// The version rises above the copies' ($4), so that the events of an earlier row of which only the copies tell are old;
/// but no further than counting gets ($6). Where no post was ever written, nobody contributed.
const COUNT: &str = "
    WITH counted AS (
        SELECT k.bucket, k.author_id, k.thread_id, p.*, least(greatest(c.version, k.copied, $5), $6) + 1 AS version
          FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::bigint[]) AS k (bucket, author_id, thread_id, copied)
          JOIN therev.thread_contributions AS c USING (bucket, author_id, thread_id),
               LATERAL (SELECT (count(*) FILTER (WHERE p.deleted_at IS NULL))::integer AS posts,
                               (count(*) FILTER (WHERE p.deleted_at IS NOT NULL))::integer AS deleted,
                               max(p.created_at) AS last_post_at,
                               (array_agg(p.thread_author_id ORDER BY p.post_id))[1] AS thread_author_id
                          FROM posts AS p
                         WHERE p.bucket = k.bucket AND p.author_id = k.author_id AND p.thread_id = k.thread_id) AS p),
    dropped AS (
        DELETE FROM therev.thread_contributions AS c USING counted AS n
         WHERE c.bucket = n.bucket AND c.author_id = n.author_id AND c.thread_id = n.thread_id
           AND n.posts + n.deleted = 0)
    UPDATE therev.thread_contributions AS c
       SET thread_author_id = n.thread_author_id, posts = n.posts, deleted = n.deleted,
           last_post_at = n.last_post_at, version = n.version
      FROM counted AS n
     WHERE c.bucket = n.bucket AND c.author_id = n.author_id AND c.thread_id = n.thread_id
       AND n.posts + n.deleted > 0
    RETURNING c.author_id, c.thread_id, c.thread_author_id, c.version";

/// How far a row's own count gets above the floor of versions: half of what one life of a server has.
const COUNTED_MAX: i64 = 1 << 39;

crate::fenced_list! { OPEN_COPIES DROP_COPIES OPEN_TOTALS }

/// A contribution to be counted anew, and the greatest version of its copies.
#[derive(Clone)]
struct Wrong {
    author: UserId,
    thread: Uuid,
    copied: i64,
}

/// A copy of a contribution: thread and its author, and who contributed.
#[derive(Clone, Copy)]
struct Copied {
    thread: Uuid,
    thread_author: UserId,
    participant: Uuid,
    version: i64,
}

/// A contribution: author, thread and the thread's author.
type Contributed = (Uuid, Uuid, Uuid);

impl Copied {
    fn item(&self) -> Item {
        let value =
            json!({ "author_id": self.thread_author, "thread_id": self.thread, "participant_id": self.participant });
        Item { whose: self.thread_author.into(), value }
    }
}

impl Community {
    /// Makes contributions (author, thread) and their copies anew, and the totals of the threads that they touch.
    pub(super) async fn repair_contributions(&self, databases: &Databases, wrong: Vec<(Uuid, Uuid)>) -> Result<()> {
        let mut touched = BTreeSet::new();
        for keys in wrong.chunks(LOOK) {
            let (authors, threads): (Vec<Uuid>, Vec<Uuid>) = keys.iter().copied().unzip();
            let rows = databases.ask_shards(COPIES, &[&authors, &threads]).await?;
            let mut versions: BTreeMap<(Uuid, Uuid), i64> = BTreeMap::new();
            let mut copies = Vec::new();
            for row in &rows {
                let copy = Copied {
                    thread: row.get("thread_id"),
                    thread_author: UserId(row.get("author_id")),
                    participant: row.get("participant_id"),
                    version: row.get("version"),
                };
                let greatest = versions.entry((copy.participant, copy.thread)).or_default();
                *greatest = copy.version.max(*greatest);
                copies.push(copy);
            }

            let wrong = keys.iter().map(|(author, thread)| Wrong {
                author: UserId(*author),
                thread: *thread,
                copied: versions.get(&(*author, *thread)).copied().unwrap_or(0),
            });
            let mut there = BTreeMap::new();
            for batch in wrong.collect::<Vec<_>>().chunks(BATCH) {
                there.extend(self.count_again(batch.to_vec()).await?);
            }
            // What was counted is newer than its copies, and comes to replace them. Only copies of nothing are set back, and those
            // of a version that counting does not reach: until the truth comes any old event could replace such a one.
            let counted = |copy: &Copied| there.get(&(copy.participant, copy.thread, copy.thread_author.0)).copied();
            let set_back: Vec<&Copied> =
                copies.iter().filter(|copy| counted(copy).is_none_or(|version| version <= copy.version)).collect();
            self.write_all(&OPEN_COPIES, set_back.iter().map(|copy| copy.item()).collect()).await?;
            let of_nothing = copies.iter().filter(|copy| counted(copy).is_none());
            self.write_all(&DROP_COPIES, of_nothing.map(Copied::item).collect()).await?;
            // The event about these may have come before they were set back, also of one that was nothing when it was counted.
            let told = |copy: &&Copied| Wrong { author: UserId(copy.participant), thread: copy.thread, copied: 0 };
            for batch in set_back.iter().map(told).collect::<Vec<_>>().chunks(BATCH) {
                self.count_again(batch.to_vec()).await?;
            }
            touched.extend(copies.iter().map(|copy| (copy.thread, copy.thread_author.0)));
            touched.extend(there.into_keys().map(|(_, thread, author)| (thread, author)));
        }
        if touched.is_empty() {
            return Ok(());
        }
        self.deliver_all(0.0).await;
        // Without the copies that are gone the sums are smaller, and so are their versions.
        self.sum_again(touched.into_iter().collect()).await
    }

    /// Counts contributions from posts and leaves the event about them. Answers with those that are there, with their versions.
    async fn count_again(&self, wrong: Vec<Wrong>) -> Result<Vec<(Contributed, i64)>> {
        let count = async |bulk: &Bulk, wrong: &[Wrong], (): &(), _| {
            let buckets: Vec<i16> = wrong.iter().map(|one| one.author.bucket().sql()).collect();
            let authors: Vec<Uuid> = wrong.iter().map(|one| one.author.0).collect();
            let threads: Vec<Uuid> = wrong.iter().map(|one| one.thread).collect();
            let copied: Vec<i64> = wrong.iter().map(|one| one.copied).collect();
            let floor = bulk.version_floor;
            bulk.query(MAKE, &[&buckets, &authors, &threads, &floor]).await?;
            bulk.query(LOCK, &[&buckets, &authors, &threads]).await?;
            let most = floor + COUNTED_MAX;
            let counted = bulk.query(COUNT, &[&buckets, &authors, &threads, &copied, &floor, &most]).await?;
            let key = |row: &Row| (row.get("author_id"), row.get("thread_id"), row.get("thread_author_id"));
            let there: Vec<(Contributed, i64)> = counted.iter().map(|row| (key(row), row.get("version"))).collect();
            if !there.is_empty() {
                let (owners, ids) = there.iter().map(|((author, thread, _), _)| (*author, *thread)).unzip();
                leave_event(bulk, Group::Content, "contribution", &owners, Some(&ids)).await?;
            }
            Done::Ok(there)
        };
        let parts = self.in_bulk(Group::Content, wrong, |one| one.author.into(), &(), count).await?;
        Ok(parts.into_iter().flat_map(|part| part.said).collect())
    }

    /// Makes the totals of threads (with their authors) anew, and tells the directory.
    pub(super) async fn sum_again(&self, threads: Vec<(Uuid, Uuid)>) -> Result<()> {
        for batch in threads.chunks(BATCH) {
            let fact = |(thread, author): &(Uuid, Uuid)| json!({ "thread_id": thread, "author_id": author });
            let item = |key: &(Uuid, Uuid)| Item { whose: UserId(key.1).into(), value: fact(key) };
            self.write_all(&OPEN_TOTALS, batch.iter().map(item).collect()).await?;
            let ids: Vec<Uuid> = batch.iter().map(|(thread, _)| *thread).collect();
            self.shards().directory().writer(&OPEN_LISTED_TOTALS, &[&ids]).await?;
            self.deliver_facts("totals", batch.iter().map(fact).collect()).await?;
        }
        Ok(())
    }
}
