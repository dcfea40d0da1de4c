//! The directory's rows, as the shards hold them; of what no shard has, a mark that it is deleted.

use super::BATCH;
use crate::community::Community;
use crate::error::Result;
use placement::{Bucket, Group, UserId, Whose};
use serde_json::Value;
use shards::{ReadMany, Unfenced};
use std::collections::BTreeSet;
use tokio_postgres::Row;
use uuid::Uuid;

/// Sets rows back to a version below every real one. Answers with what to tell of each if no shard has such a user: it
/// keeps the version that it had, so that no event up to that raises it.
static OPEN_USERS: Unfenced = Unfenced::write(
    "UPDATE user_directory AS d SET version = 0
       FROM (SELECT w.user_id, w.version FROM user_directory AS w
              WHERE w.user_id = ANY ($1) ORDER BY w.user_id FOR UPDATE) AS w
      WHERE d.user_id = w.user_id
     RETURNING d.user_id AS id,
               jsonb_build_object('user_id', d.user_id, 'role', 'STANDARD', 'is_active', false,
                                  'created_at', d.created_at, 'deleted', true, 'version', greatest(w.version, 1))
                   AS gone",
);

/// Likewise of threads.
static OPEN_THREADS: Unfenced = Unfenced::write(
    "UPDATE thread_directory AS d SET version = 0
       FROM (SELECT w.thread_id, w.version FROM thread_directory AS w
              WHERE w.thread_id = ANY ($1) ORDER BY w.thread_id FOR UPDATE) AS w
      WHERE d.thread_id = w.thread_id
     RETURNING d.thread_id AS id, d.author_id,
               jsonb_build_object('thread_id', d.thread_id, 'author_id', d.author_id, 'is_pinned', false,
                                  'is_locked', false, 'moderation', d.moderation, 'created_at', d.created_at,
                                  'deleted', true, 'version', greatest(w.version, 1)) AS gone",
);

static USER_STATES: ReadMany = ReadMany::new(
    Group::Account,
    "SELECT u.user_id AS id, therev.user_state(u) AS state
       FROM asked AS a JOIN users AS u ON u.bucket = a.bucket AND u.user_id = a.key",
);

static THREAD_STATES: ReadMany = ReadMany::new(
    Group::Content,
    "SELECT t.thread_id AS id, t.author_id, therev.thread_state(t) AS state
       FROM asked AS a JOIN threads AS t ON t.bucket = a.bucket AND t.thread_id = a.key, therev.fence AS f
      WHERE f.colocation_group = 'content' AND therev.may_read(f, t.bucket, t.author_id)",
);

crate::fenced_list! { USER_STATES THREAD_STATES }

impl Community {
    /// Makes users' rows of the directory anew.
    pub(super) async fn repair_users(&self, users: Vec<Uuid>) -> Result<()> {
        for batch in users.chunks(BATCH) {
            let opened = self.shards().directory().writer(&OPEN_USERS, &[&batch]).await?;
            let keys = batch.iter().map(|id| (UserId(*id).into(), *id)).collect();
            let found = self.shards().read_many(&USER_STATES, keys, &[]).await.whole()?;
            self.deliver_facts("user", facts(&opened, &found)).await?;
        }
        Ok(())
    }

    /// Makes threads' rows of the directory anew, totals too. A thread comes with the buckets in which it was seen.
    pub(super) async fn repair_threads(&self, threads: Vec<(Uuid, &BTreeSet<i16>)>) -> Result<()> {
        for batch in threads.chunks(BATCH) {
            let ids: Vec<Uuid> = batch.iter().map(|(id, _)| *id).collect();
            let opened = self.shards().directory().writer(&OPEN_THREADS, &[&ids]).await?;
            // Its id need not tell the bucket, and the directory's row may be wrong about the author.
            let seen = |(id, buckets): &(Uuid, &BTreeSet<i16>)| {
                let number = |bucket: &i16| Bucket::try_from(*bucket).ok();
                buckets.iter().filter_map(number).map(|bucket| (bucket.into(), *id)).collect::<Vec<_>>()
            };
            let mut keys: BTreeSet<(Whose, Uuid)> = batch.iter().flat_map(seen).collect();
            keys.extend(opened.iter().map(|row| (UserId(row.get("author_id")).bucket().into(), row.get("id"))));
            let keys = keys.into_iter().collect();
            let found = self.shards().read_many(&THREAD_STATES, keys, &[]).await.whole()?;
            self.deliver_facts("thread", facts(&opened, &found)).await?;
            self.sum_again(found.iter().map(|row| (row.get("id"), row.get("author_id"))).collect()).await?;
        }
        Ok(())
    }
}

/// The states of what was found, and that the rest of what was opened is deleted.
fn facts(opened: &[Row], found: &[Row]) -> Vec<Value> {
    let there: BTreeSet<Uuid> = found.iter().map(|row| row.get("id")).collect();
    let gone = opened.iter().filter(|row| !there.contains(&row.get("id"))).map(|row| row.get("gone"));
    found.iter().map(|row| row.get("state")).chain(gone).collect()
}
