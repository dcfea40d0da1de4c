//! Threads: open, read, change, delete. Writes table `threads`.

use crate::audit::{Actor, audited};
use crate::authors::{Author, author_columns, author_joined};
use crate::columns::Columns;
use crate::community::{Community, Written};
use crate::error::{Error, Result};
use crate::text::{Format, Moderation, TITLE_CHARS_MAX, check_body, check_chars, check_object};
use crate::users::{Passes, word};
use chrono::{DateTime, Utc};
use placement::{Bucket, Group, ThreadId, UserId};
use serde::Serialize;
use serde_json::{Value, json};
use shards::{BucketSet, Read, Write};
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// A thread's head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thread {
    /// Its id, which carries its author's bucket.
    pub thread_id: ThreadId,
    /// Its owner.
    pub author_id: UserId,
    /// What it is about.
    pub title: String,
    /// The first text.
    pub body: String,
    /// How the body is written.
    pub format: Format,
    /// Shown first.
    pub is_pinned: bool,
    /// Takes no replies.
    pub is_locked: bool,
    /// What a moderator decided.
    pub moderation: Moderation,
    /// What others think of it.
    pub score: i32,
    /// Whatever else is known.
    pub metadata: Value,
    /// How many posts can be read in it, as far as their authors' shards have told.
    pub post_count: i64,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

/// A thread's head with who opened it, where this is known on its shard, and the buckets whose authors wrote in it, but for those
/// that were known.
pub(crate) struct Head {
    pub(crate) thread: Thread,
    pub(crate) author: Option<Author>,
    /// With how many posts each, some more than once.
    pub(crate) more_buckets: Vec<(Bucket, usize)>,
}

/// A thread to be opened.
#[derive(Debug, Clone)]
pub struct NewThread {
    /// Chosen by the caller ([`ThreadId::new`]), so that a retry is the same thread; made when absent.
    pub thread_id: Option<ThreadId>,
    /// Its owner.
    pub author_id: UserId,
    /// 1 to 500 characters.
    pub title: String,
    /// At most 1 MiB; may be empty.
    pub body: String,
    /// How the body is written.
    pub format: Format,
    /// Whatever else is known.
    pub metadata: Option<Value>,
}

impl NewThread {
    /// A thread of plain text.
    pub fn new(author_id: UserId, title: impl Into<String>, body: impl Into<String>) -> NewThread {
        NewThread {
            thread_id: None,
            author_id,
            title: title.into(),
            body: body.into(),
            format: Format::Plain,
            metadata: None,
        }
    }
}

/// What to change of a thread: absent fields stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ThreadChange {
    /// Another title.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Another text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Shown first, or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_pinned: Option<bool>,
    /// Takes no replies, or does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_locked: Option<bool>,
    /// A moderator's decision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation: Option<Moderation>,
}

macro_rules! thread_columns {
    () => {
        "t.thread_id, t.author_id, t.title, t.body, t.format, t.is_pinned, t.is_locked, t.moderation, t.score,
         t.metadata, t.created_at, t.updated_at, t.deleted_at, t.version"
    };
}

/// The head, the number of posts, and which buckets' authors wrote, except those of `$3`: the one statement that a page begins
/// with. A bucket may be named more than once, each time in one number with how many posts somebody has written: those are its lower half.
static HEAD: Read = Read::by_id(
    Group::Content,
    "author_id",
    concat!(
        "SELECT ",
        thread_columns!(),
        ", p.post_count, p.buckets, ",
        author_columns!(),
        " FROM threads AS t",
        author_joined!("t"),
        "CROSS JOIN
                LATERAL (SELECT coalesce(sum(p.posts), 0) AS post_count,
                                array_agg(therev.bucket_of(p.participant_id)::bigint << 32 | (p.posts + p.deleted))
                                    FILTER (WHERE p.posts + p.deleted > 0
                                              AND get_bit($3::varbit, therev.bucket_of(p.participant_id)) = 0) AS buckets
                           FROM therev.thread_participants AS p
                          WHERE p.bucket = t.bucket AND p.author_id = t.author_id AND p.thread_id = t.thread_id) AS p
          WHERE t.bucket = $1 AND t.thread_id = $2"
    ),
)
.long();

/// What a reply asks of a thread: whose it is, and whether it takes replies. It costs the same however many it has.
static OPEN: Read = Read::by_id(
    Group::Content,
    "author_id",
    "SELECT t.author_id, t.is_locked, t.deleted_at IS NOT NULL AS is_deleted
       FROM threads AS t WHERE t.bucket = $1 AND t.thread_id = $2",
);

static CREATE: Write = Write::of_owner(
    Group::Content,
    concat!(
        "created AS (
             INSERT INTO threads (bucket, author_id, thread_id, title, body, format, metadata, version)
             SELECT $1, $2, $3, $4, $5, $6, $7, version_floor FROM fence
             ON CONFLICT (bucket, author_id, thread_id) DO NOTHING
             RETURNING *),
         result AS (
             SELECT 0::bigint AS post_count, ",
        thread_columns!(),
        " FROM created AS t
             UNION ALL
             SELECT 0, ",
        thread_columns!(),
        " FROM threads AS t, fence WHERE t.bucket = $1 AND t.author_id = $2 AND t.thread_id = $3)"
    ),
);

/// The audit outlives what was written: of words it holds only that they were changed.
static CHANGE: Write = Write::by_id(
    Group::Content,
    concat!(
        "old AS (
             SELECT t.* FROM threads AS t, fence
              WHERE t.bucket = $1 AND t.thread_id = $2 AND t.deleted_at IS NULL
                AND therev.may_write(fence.here, t.bucket, t.author_id)),
         changed AS (
             UPDATE threads AS t
                SET (title, body, is_pinned, is_locked, moderation)
                  = (SELECT n.title, n.body, n.is_pinned, n.is_locked, n.moderation
                       FROM jsonb_populate_record(t, $3) AS n),
                    version = greatest(t.version + 1, fence.version_floor), updated_at = now()
               FROM fence
              WHERE t.bucket = $1 AND t.thread_id = $2 AND t.deleted_at IS NULL
                AND therev.may_write(fence.here, t.bucket, t.author_id)
             RETURNING t.*),
         fields AS (SELECT k.key, k.key IN ('is_pinned', 'is_locked', 'moderation') AS is_decided FROM jsonb_object_keys($3) AS k (key)),
         decided AS (SELECT f.key FROM fields AS f WHERE f.is_decided),
         worded AS (SELECT jsonb_agg(f.key ORDER BY f.key) AS keys FROM fields AS f WHERE NOT f.is_decided),
         change AS (
             SELECT o.bucket, o.author_id AS user_id, 'thread ' || o.thread_id AS target,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(o) -> f.key), '{}') FROM decided AS f) AS before,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(c) -> f.key), '{}') FROM decided AS f)
                        || CASE WHEN w.keys IS NULL THEN '{}' ELSE jsonb_build_object('changed', w.keys) END AS after
               FROM old AS o, changed AS c, worded AS w),
         ",
        audited!("change", "$4"),
        ", result AS (SELECT 0::bigint AS post_count, ",
        thread_columns!(),
        " FROM changed AS t)"
    ),
);

static DELETE: Write = Write::by_id(
    Group::Content,
    concat!(
        "deleted AS (
             UPDATE threads AS t
                SET title = NULL, body = NULL, metadata = '{}', deleted_at = now(), updated_at = now(),
                    version = greatest(t.version + 1, fence.version_floor)
               FROM fence
              WHERE t.bucket = $1 AND t.thread_id = $2 AND t.deleted_at IS NULL
                AND therev.may_write(fence.here, t.bucket, t.author_id)
             RETURNING t.*),
         change AS (
             SELECT d.bucket, d.author_id AS user_id, 'thread ' || d.thread_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('deleted', true) AS after
               FROM deleted AS d),
         ",
        audited!("change", "$3"),
        ", result AS (SELECT d.thread_id FROM deleted AS d)"
    ),
);

static IDS_OF_AUTHOR: Read = Read::of_owner(
    Group::Content,
    "SELECT t.thread_id FROM threads AS t
      WHERE t.bucket = $1 AND t.author_id = $2 AND t.thread_id > $3 AND t.deleted_at IS NULL
      ORDER BY t.thread_id LIMIT 500",
)
.long();

crate::fenced_list! { HEAD OPEN CREATE CHANGE DELETE IDS_OF_AUTHOR }

impl Community {
    /// Opens a thread. The same id with the same title and text again is the same thread.
    pub async fn create_thread(&self, new: NewThread) -> Result<Written<Thread>> {
        check_chars("title", &new.title, 1, TITLE_CHARS_MAX)?;
        check_body(&new.body, true)?;
        let metadata = new.metadata.clone().unwrap_or_else(|| json!({}));
        check_object("metadata", &metadata)?;
        let id = new.thread_id.unwrap_or_else(|| ThreadId::new(new.author_id));
        Self::check_id(id.0, new.author_id)?;
        self.user(new.author_id).await?;
        let bucket = new.author_id.bucket();
        let format = new.format.name();
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&new.author_id.0, &id.0, &new.title, &new.body, &format, &metadata];
        let row = self.create_once(&CREATE, bucket, &params, "thread", id.0).await?;
        let thread = living(&row, id)?;
        // A thread that was changed since is still the same create; one that never looked like this is another.
        let differs = thread.title != new.title || thread.body != new.body;
        if thread.format != new.format || (differs && thread.updated_at == thread.created_at) {
            return Err(Error::Conflict { what: "id", value: id.to_string() });
        }
        let seen = self.deliver_bucket(Group::Content, new.author_id).await;
        Ok(Written { value: thread, seen })
    }

    /// A thread's head.
    pub async fn thread(&self, id: ThreadId) -> Result<Thread> {
        self.head(id, &BucketSet::all()).await.map(|head| head.thread)
    }

    pub(crate) async fn head(&self, id: ThreadId, known: &BucketSet) -> Result<Head> {
        let bucket = self.route("thread", id.0).await?;
        let rows = self.shards().read(&HEAD, bucket, &[&id.0, known]).await?;
        let row = rows.first().ok_or_else(|| Error::not_found("thread", id))?;
        let numbers: Option<Vec<i64>> = row.get("buckets");
        let with_posts = |both: i64| {
            let bucket = Bucket::try_from(i16::try_from(both >> 32).ok()?).ok()?;
            Some((bucket, usize::try_from(both & i64::from(u32::MAX)).ok()?))
        };
        let more_buckets = numbers.unwrap_or_default().into_iter().filter_map(with_posts).collect();
        Ok(Head { thread: living(row, id)?, author: Author::with_row(row), more_buckets })
    }

    /// Who opened a thread that takes replies.
    pub(crate) async fn author_of_open_thread(&self, id: ThreadId) -> Result<UserId> {
        let bucket = self.route("thread", id.0).await?;
        let rows = self.shards().read(&OPEN, bucket, &[&id.0]).await?;
        let row = rows.first().ok_or_else(|| Error::not_found("thread", id))?;
        if row.get("is_deleted") {
            return Err(Error::gone("thread", id));
        }
        if row.get("is_locked") {
            return Err(Error::Locked(id));
        }
        Ok(UserId(row.get("author_id")))
    }

    /// Changes a thread: its author its text, a moderator its state. What somebody else does is audited.
    pub async fn change_thread(&self, id: ThreadId, change: ThreadChange, actor: &Actor) -> Result<Written<Thread>> {
        if let Some(title) = &change.title {
            check_chars("title", title, 1, TITLE_CHARS_MAX)?;
        }
        if let Some(body) = &change.body {
            check_body(body, true)?;
        }
        let head = self.thread(id).await?;
        let note = actor.note_unless(head.author_id, "change thread");
        let fields = serde_json::to_value(&change).map_err(|e| Error::invalid("change", e.to_string()))?;
        let bucket = head.author_id.bucket();
        let rows = self.shards().write(&CHANGE, bucket, &[&id.0, &fields, &note]).await;
        let rows = rows.map_err(Error::of_constraint)?;
        let thread = living(rows.first().ok_or_else(|| Error::gone("thread", id))?, id)?;
        let seen = self.deliver_bucket(Group::Content, head.author_id).await;
        Ok(Written { value: Thread { post_count: head.post_count, ..thread }, seen })
    }

    /// Deletes a thread: it answers as gone, its text is lost, and other people's posts in it stay theirs.
    pub async fn delete_thread(&self, id: ThreadId, actor: &Actor) -> Result<Written<ThreadId>> {
        let head = self.thread(id).await?;
        let note = actor.note_unless(head.author_id, "delete thread");
        let bucket = head.author_id.bucket();
        let rows = self.shards().write(&DELETE, bucket, &[&id.0, &note]).await?;
        if rows.is_empty() {
            return Err(Error::gone("thread", id));
        }
        let seen = self.deliver_bucket(Group::Content, head.author_id).await;
        Ok(Written { value: id, seen })
    }

    /// Deletes all threads of an author, each by itself; says how many.
    pub(crate) async fn delete_threads_of(&self, author: UserId, actor: &Actor, passes: Passes) -> Result<u64> {
        let (mut count, mut after) = (0, Uuid::nil());
        loop {
            let ids = self.shards().read(&IDS_OF_AUTHOR, author.bucket(), &[&author.0, &after]).await?;
            let Some(last) = ids.last() else {
                if after.is_nil() || passes == Passes::Once {
                    return Ok(count);
                }
                after = Uuid::nil();
                continue;
            };
            after = last.get("thread_id");
            for row in ids {
                let id: Uuid = row.get("thread_id");
                let note = actor.note_unless(author, "delete thread");
                let deleted = self.shards().write(&DELETE, author.bucket(), &[&id, &note]).await?;
                count += u64::from(!deleted.is_empty());
            }
            self.deliver_bucket(Group::Content, author).await;
        }
    }

    /// Runs the create of a row whose id makes a second try the same create.
    pub(crate) async fn create_once(
        &self,
        statement: &Write,
        bucket: Bucket,
        params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
        what: &'static str,
        id: Uuid,
    ) -> Result<Row> {
        let mut unknown = None;
        for is_last in [false, true] {
            match self.shards().write(statement, bucket, params).await {
                Ok(mut rows) if !rows.is_empty() => return Ok(rows.swap_remove(0)),
                // The same create was just being committed by somebody else: ask again.
                Ok(_) => {}
                // The connection broke: ask again.
                Err(error @ shards::Error::OutcomeUnknown { .. }) => unknown = Some(error),
                // Likewise where another unique index than the statement's own was the first to see somebody else's: after a
                // REINDEX CONCURRENTLY it may come before it. An id that is another row's is refused again.
                Err(error) if !is_last && is_in_use(&error) => {}
                // A second try that failed does not say what became of the first: a server that crashed after the
                // commit is down now.
                Err(error) => return Err(unknown.map_or_else(|| Error::of_constraint(error), Error::Store)),
            }
        }
        Err(unknown.map_or_else(|| Error::Changed { what, id: id.to_string() }, Error::Store))
    }
}

/// Whether a unique index refused the row.
fn is_in_use(error: &shards::Error) -> bool {
    error.sql_error().is_some_and(|refused| *refused.code() == SqlState::UNIQUE_VIOLATION)
}

fn living(row: &Row, id: ThreadId) -> Result<Thread> {
    if row.get::<_, Option<DateTime<Utc>>>("deleted_at").is_some() {
        return Err(Error::gone("thread", id));
    }
    let mut columns = Columns::of(row);
    Ok(Thread {
        thread_id: ThreadId(columns.get("thread_id")),
        author_id: UserId(columns.get("author_id")),
        title: columns.get("title"),
        body: columns.get("body"),
        format: word(columns.get("format"))?,
        is_pinned: columns.get("is_pinned"),
        is_locked: columns.get("is_locked"),
        moderation: word(columns.get("moderation"))?,
        score: columns.get("score"),
        metadata: columns.json("metadata")?,
        post_count: columns.get("post_count"),
        created_at: columns.get("created_at"),
        updated_at: columns.get("updated_at"),
        version: columns.get("version"),
    })
}
