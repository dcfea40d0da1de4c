//! What others must hear of rows that were brought in, by COPY or in arrays: the same states that a relay would tell.

use super::rows::{BulkPost, BulkRow, BulkThread, NamedUser};
use super::{Done, Landed, Part};
use crate::community::Community;
use crate::error::Result;
use crate::newest::{added_contribution, changed_totals, kept_totals, newer_participant, summed};
use chrono::{DateTime, Utc};
use placement::{Group, ShardNo, ThreadId, UserId, Whose};
use shards::{Bulk, Database, Unfenced};
use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OwnedMutexGuard;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

/// How many threads are summed at once.
const TOTALS_BATCH: usize = 5_000;

/// An author's contribution to a thread, as it is now.
pub(super) struct Contribution {
    pub(super) author_id: UserId,
    pub(super) thread_id: ThreadId,
    pub(super) thread_author_id: UserId,
    posts: i32,
    deleted: i32,
    last_post_at: DateTime<Utc>,
    version: i64,
    /// Whether it begins with this batch, as far as the writer knows.
    is_new: bool,
}

/// What the posts of a batch add up to.
type Sums = BTreeMap<(UserId, ThreadId), Contribution>;

const LEAVE_EVENT: &str = "
    INSERT INTO therev.outbox (colocation_group, bucket, kind, owners, ids)
    SELECT $1::text::therev.colocation_group, -1, $2::text::therev.event_kind, $3, $4
    RETURNING outbox_id";

/// Contributions that begin with a batch. Should one be there, the batch is refused and all of it goes the longer way.
const COPY_CONTRIBUTIONS: &str = "
    COPY therev.thread_contributions (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
    FROM STDIN (FORMAT binary)";

/// What the posts of a batch add to their authors' contributions. Answers with those that were there before.
const CONTRIBUTE: &str = concat!(
    "WITH contribution AS (
        INSERT INTO therev.thread_contributions AS c
               (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
        SELECT n.bucket, n.author_id, n.thread_id, n.thread_author_id, n.posts, n.last_post_at, $7::bigint
          FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::uuid[], $5::integer[], $6::timestamptz[])
                   AS n (bucket, author_id, thread_id, thread_author_id, posts, last_post_at)",
    added_contribution!(),
    "
        RETURNING c.author_id, c.thread_id, c.posts, c.deleted, c.last_post_at, c.version, c.xmax <> 0 AS was_there)
    SELECT c.author_id, c.thread_id, c.posts, c.deleted, c.last_post_at, c.version
      FROM contribution AS c WHERE c.was_there"
);

/// Participants that their threads have not heard of, likewise.
const COPY_PARTICIPANTS: &str = "
    COPY therev.thread_participants
         (bucket, author_id, thread_id, participant_id, posts, deleted, last_post_at, version)
    FROM STDIN (FORMAT binary)";

const TELL_PARTICIPANTS: &str = concat!(
    "INSERT INTO therev.thread_participants AS p
            (bucket, author_id, thread_id, participant_id, posts, deleted, last_post_at, version)
     SELECT *
       FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::uuid[], $5::integer[], $6::integer[],
                   $7::timestamptz[], $8::bigint[])",
    newer_participant!()
);

const SUM_TOTALS: &str = concat!(
    "WITH ",
    summed!("SELECT * FROM unnest($1::smallint[], $2::uuid[], $3::uuid[])"),
    ", ",
    kept_totals!(),
    " SELECT s.thread_id, s.posts, s.last_post_at, s.version::text AS version, s.is_there FROM summed AS s"
);

/// Should the directory know one of the users already, the relay tells all of the batch.
const COPY_USERS: &str = "
    COPY user_directory (user_id, user_name, display_name, profile_pic_url, role, is_active, created_at, is_deleted, version)
    FROM STDIN (FORMAT binary)";

/// Likewise of threads.
const COPY_THREADS: &str = "
    COPY thread_directory (thread_id, author_id, title, is_pinned, is_locked, moderation, created_at, last_activity_at,
                           is_deleted, version)
    FROM STDIN (FORMAT binary)";

/// Answers with the threads that the directory knows.
static TELL_TOTALS: Unfenced = Unfenced::write(concat!(
    "WITH told AS (
         SELECT t.thread_id, t.posts, t.last_post_at, t.version::numeric AS version
           FROM unnest($1::uuid[], $2::integer[], $3::timestamptz[], $4::text[])
                    AS t (thread_id, posts, last_post_at, version)),
     ",
    changed_totals!()
));

/// Leaves an event that names rows; says its number.
pub(crate) async fn leave_event(
    bulk: &Bulk,
    group: Group,
    kind: &str,
    owners: &Vec<Uuid>,
    ids: Option<&Vec<Uuid>>,
) -> Done<i64> {
    let rows = bulk.query(LEAVE_EVENT, &[&group.name(), &kind, owners, &ids]).await?;
    Ok(rows.iter().map(|row| row.get::<_, i64>("outbox_id")).sum())
}

/// Whose contribution to which thread a writer has written, by shard: of all others there are no rows yet, unless somebody else
/// writes there. A hash of each: one that is wrong costs no more than the longer way.
#[derive(Default)]
pub(super) struct WrittenBefore(Mutex<BTreeMap<Database, Arc<Turn>>>);

type Turn = tokio::sync::Mutex<HashSet<u64>>;

impl WrittenBefore {
    /// What was written on a shard. Whoever has it is the only one of the writer's batches that locks such rows there: no two of
    /// them wait for each other.
    async fn on(&self, shard: Database) -> OwnedMutexGuard<HashSet<u64>> {
        let turn = self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(shard).or_default().clone();
        turn.lock_owned().await
    }
}

fn hashed(author: UserId, thread: ThreadId) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one((author.0, thread.0))
}

/// One contribution per author and thread, whatever the batch holds of them, and the event about them. Answers with the
/// contributions as they are now.
pub(super) async fn contribute(
    bulk: &Bulk,
    posts: &[BulkPost],
    landed: &Landed,
    before: &WrittenBefore,
    again: bool,
) -> Done<(Option<i64>, Vec<Contribution>)> {
    let (old, new): (Vec<_>, Vec<_>) = posts.iter().partition(|post| landed.known.contains(&post.post_id.0));
    let mut sums = Sums::new();
    for post in new {
        let sum = sums.entry((post.author_id, post.thread_id)).or_insert_with(|| Contribution {
            author_id: post.author_id,
            thread_id: post.thread_id,
            thread_author_id: post.thread_author_id,
            posts: 0,
            deleted: 0,
            last_post_at: post.created_at,
            version: landed.version_floor,
            is_new: false,
        });
        sum.posts += 1;
        sum.last_post_at = sum.last_post_at.max(post.created_at);
    }
    let mut before = before.on(bulk.database()).await;
    before.extend(old.iter().map(|post| hashed(post.author_id, post.thread_id)));
    if sums.is_empty() {
        return Ok((None, Vec::new()));
    }
    for sum in sums.values_mut() {
        sum.is_new = before.insert(hashed(sum.author_id, sum.thread_id)) && !again;
    }
    copy_contributions(bulk, &sums).await?;
    add_contributions(bulk, &mut sums, landed.version_floor).await?;
    drop(before);
    let authors: Vec<Uuid> = sums.values().map(|sum| sum.author_id.0).collect();
    let threads: Vec<Uuid> = sums.values().map(|sum| sum.thread_id.0).collect();
    let event = leave_event(bulk, Group::Content, "contribution", &authors, Some(&threads)).await?;
    Ok((Some(event), sums.into_values().collect()))
}

async fn copy_contributions(bulk: &Bulk, sums: &Sums) -> Done<()> {
    let new = sums.values().filter(|sum| sum.is_new);
    let new: Vec<(i16, &Contribution)> = new.map(|sum| (sum.author_id.bucket().sql(), sum)).collect();
    if new.is_empty() {
        return Ok(());
    }
    let types = [Type::INT2, Type::UUID, Type::UUID, Type::UUID, Type::INT4, Type::TIMESTAMPTZ, Type::INT8];
    let rows = new.iter().map(|(bucket, sum)| -> Vec<&(dyn ToSql + Sync)> {
        let Contribution { author_id, thread_id, thread_author_id, posts, last_post_at, version, .. } = sum;
        vec![bucket, &author_id.0, &thread_id.0, &thread_author_id.0, posts, last_post_at, version]
    });
    bulk.copy(COPY_CONTRIBUTIONS, &types, rows).await?;
    Ok(())
}

/// Adds to those that may be there, and notes what they are now.
async fn add_contributions(bulk: &Bulk, sums: &mut Sums, floor: i64) -> Done<()> {
    let added: Vec<&Contribution> = sums.values().filter(|sum| !sum.is_new).collect();
    if added.is_empty() {
        return Ok(());
    }
    let buckets: Vec<i16> = added.iter().map(|sum| sum.author_id.bucket().sql()).collect();
    let authors: Vec<Uuid> = added.iter().map(|sum| sum.author_id.0).collect();
    let threads: Vec<Uuid> = added.iter().map(|sum| sum.thread_id.0).collect();
    let thread_authors: Vec<Uuid> = added.iter().map(|sum| sum.thread_author_id.0).collect();
    let counts: Vec<i32> = added.iter().map(|sum| sum.posts).collect();
    let times: Vec<DateTime<Utc>> = added.iter().map(|sum| sum.last_post_at).collect();
    let there =
        bulk.query(CONTRIBUTE, &[&buckets, &authors, &threads, &thread_authors, &counts, &times, &floor]).await?;
    for row in there {
        let key = (UserId(row.get("author_id")), ThreadId(row.get("thread_id")));
        if let Some(sum) = sums.get_mut(&key) {
            sum.posts = row.get("posts");
            sum.deleted = row.get("deleted");
            sum.last_post_at = row.get("last_post_at");
            sum.version = row.get("version");
        }
    }
    Ok(())
}

async fn copy_participants(bulk: &Bulk, new: &[&Contribution]) -> Done<()> {
    if new.is_empty() {
        return Ok(());
    }
    let new: Vec<(i16, &Contribution)> = new.iter().map(|sum| (sum.thread_author_id.bucket().sql(), *sum)).collect();
    let types = [Type::INT2, Type::UUID, Type::UUID, Type::UUID, Type::INT4, Type::INT4, Type::TIMESTAMPTZ, Type::INT8];
    let rows = new.iter().map(|(bucket, sum)| -> Vec<&(dyn ToSql + Sync)> {
        let Contribution { author_id, thread_id, thread_author_id, posts, deleted, last_post_at, version, .. } = sum;
        vec![bucket, &thread_author_id.0, &thread_id.0, &author_id.0, posts, deleted, last_post_at, version]
    });
    bulk.copy(COPY_PARTICIPANTS, &types, rows).await?;
    Ok(())
}

/// Tells of those that the thread may have heard of.
async fn add_participants(bulk: &Bulk, told: &[&Contribution]) -> Done<()> {
    if told.is_empty() {
        return Ok(());
    }
    let buckets: Vec<i16> = told.iter().map(|sum| sum.thread_author_id.bucket().sql()).collect();
    let owners: Vec<Uuid> = told.iter().map(|sum| sum.thread_author_id.0).collect();
    let threads: Vec<Uuid> = told.iter().map(|sum| sum.thread_id.0).collect();
    let participants: Vec<Uuid> = told.iter().map(|sum| sum.author_id.0).collect();
    let posts: Vec<i32> = told.iter().map(|sum| sum.posts).collect();
    let deleted: Vec<i32> = told.iter().map(|sum| sum.deleted).collect();
    let times: Vec<DateTime<Utc>> = told.iter().map(|sum| sum.last_post_at).collect();
    let versions: Vec<i64> = told.iter().map(|sum| sum.version).collect();
    let params: [&(dyn ToSql + Sync); 8] =
        [&buckets, &owners, &threads, &participants, &posts, &deleted, &times, &versions];
    bulk.query(TELL_PARTICIPANTS, &params).await?;
    Ok(())
}

impl Community {
    /// Tells the directory of new users.
    pub(super) async fn tell_of_users(&self, parts: &[Part<NamedUser, Landed>]) -> Result<()> {
        let version = |part: &Part<NamedUser, Landed>, user: &NamedUser| user.shared(part.said.version_floor).version;
        let mut new: Vec<(&NamedUser, i64)> =
            parts.iter().flat_map(|part| part.new_rows().map(|user| (user, version(part, user)))).collect();
        if new.is_empty() {
            return Ok(());
        }
        new.sort_unstable_by_key(|(user, _)| user.user.user_id);
        let types = [
            Type::UUID,
            Type::TEXT,
            Type::TEXT,
            Type::TEXT,
            Type::TEXT,
            Type::BOOL,
            Type::TIMESTAMPTZ,
            Type::BOOL,
            Type::INT8,
        ];
        let rows = new.iter().map(|(NamedUser { user, user_name, .. }, version)| -> Vec<&(dyn ToSql + Sync)> {
            let shown = if user.first_name.as_deref() == Some("") { &None } else { &user.first_name };
            vec![
                &user.user_id.0,
                user_name,
                shown,
                &user.profile_pic_url,
                &"STANDARD",
                &true,
                &user.created_at,
                &false,
                version,
            ]
        });
        self.shards().directory().copy(COPY_USERS, &types, rows).await?;
        Ok(())
    }

    /// Tells the directory of new threads.
    pub(super) async fn tell_of_threads(&self, parts: &[Part<BulkThread, Landed>]) -> Result<()> {
        let mut new: Vec<(&BulkThread, i64)> =
            parts.iter().flat_map(|part| part.new_rows().map(|thread| (thread, part.said.version_floor))).collect();
        if new.is_empty() {
            return Ok(());
        }
        new.sort_unstable_by_key(|(thread, _)| thread.thread_id);
        let types = [
            Type::UUID,
            Type::UUID,
            Type::TEXT,
            Type::BOOL,
            Type::BOOL,
            Type::TEXT,
            Type::TIMESTAMPTZ,
            Type::TIMESTAMPTZ,
            Type::BOOL,
            Type::INT8,
        ];
        let rows = new.iter().map(|(thread, version)| -> Vec<&(dyn ToSql + Sync)> {
            vec![
                &thread.thread_id.0,
                &thread.author_id.0,
                &thread.title,
                &false,
                &false,
                &"approved",
                &thread.created_at,
                &thread.created_at,
                &false,
                version,
            ]
        });
        self.shards().directory().copy(COPY_THREADS, &types, rows).await?;
        Ok(())
    }

    /// Tells the threads' shards who wrote in them. Answers with the events that ask for the threads' totals.
    pub(super) async fn tell_participants(
        &self,
        mut sums: Vec<Contribution>,
        before: &WrittenBefore,
    ) -> Result<Vec<(ShardNo, i64)>> {
        sums.sort_unstable_by_key(|sum| (sum.thread_id, sum.author_id));
        let tell = async |bulk: &Bulk, sums: &[Contribution], before: &WrittenBefore, again: bool| {
            let mut before = before.on(bulk.database()).await;
            let (new, told): (Vec<_>, Vec<_>) = sums.iter().partition(|sum| {
                let first = before.insert(hashed(sum.author_id, sum.thread_id));
                first && sum.is_new && !again
            });
            copy_participants(bulk, &new).await?;
            add_participants(bulk, &told).await?;
            drop(before);
            let mut touched: Vec<(Uuid, Uuid)> =
                sums.iter().map(|sum| (sum.thread_author_id.0, sum.thread_id.0)).collect();
            touched.dedup();
            let (owners, threads) = touched.into_iter().unzip();
            leave_event(bulk, Group::Content, "totals", &owners, Some(&threads)).await
        };
        let whose = |sum: &Contribution| Whose::from(sum.thread_author_id);
        let parts = self.in_bulk(Group::Content, sums, whose, before, tell).await?;
        Ok(parts.iter().map(|part| (part.shard, part.said)).collect())
    }

    /// Sums threads' totals and tells the directory. Says whether it knows all of the threads that there are.
    pub(super) async fn tell_totals(&self, threads: Vec<(ThreadId, UserId)>) -> Result<bool> {
        let mut all_known = true;
        for batch in threads.chunks(TOTALS_BATCH) {
            let sum = async |bulk: &Bulk, threads: &[(ThreadId, UserId)], (): &(), _| {
                let buckets: Vec<i16> = threads.iter().map(|(_, author)| author.bucket().sql()).collect();
                let authors: Vec<Uuid> = threads.iter().map(|(_, author)| author.0).collect();
                let ids: Vec<Uuid> = threads.iter().map(|(thread, _)| thread.0).collect();
                bulk.query(SUM_TOTALS, &[&buckets, &authors, &ids]).await
            };
            let whose = |thread: &(ThreadId, UserId)| Whose::from(thread.1);
            let parts = self.in_bulk(Group::Content, batch.to_vec(), whose, &(), sum).await?;
            let mut rows: Vec<_> = parts.iter().flat_map(|part| &part.said).collect();
            rows.sort_unstable_by_key(|row| row.get::<_, Uuid>("thread_id"));
            let ids: Vec<Uuid> = rows.iter().map(|row| row.get("thread_id")).collect();
            let posts: Vec<i32> = rows.iter().map(|row| row.get("posts")).collect();
            let times: Vec<Option<DateTime<Utc>>> = rows.iter().map(|row| row.get("last_post_at")).collect();
            let versions: Vec<&str> = rows.iter().map(|row| row.get("version")).collect();
            let directory = self.shards().directory();
            let known = directory.writer(&TELL_TOTALS, &[&ids, &posts, &times, &versions]).await?;
            let known: HashSet<Uuid> = known.iter().map(|row| row.get("thread_id")).collect();
            let mut there = rows.iter().filter(|row| row.get("is_there")).map(|row| row.get::<_, Uuid>("thread_id"));
            all_known &= there.all(|thread| known.contains(&thread));
        }
        Ok(all_known)
    }
}
