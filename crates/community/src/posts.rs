//! Posts: write, read, change, delete. Writes tables `posts` and `thread_contributions`.

use crate::audit::{Actor, audited};
use crate::columns::Columns;
use crate::community::Community;
use crate::delivery::Event;
use crate::error::{Error, Result};
use crate::newest::added_contribution;
use crate::text::{Format, Moderation, bounded, check_body, check_object};
use crate::users::{Passes, word};
use crate::words;
use chrono::{DateTime, Utc};
use placement::{Group, PostId, ShardNo, ThreadId, UserId};
use serde::Serialize;
use serde_json::{Value, json};
use shards::{Read, Write, WriteMany};
use tokio_postgres::Row;
use uuid::Uuid;

words! {
    /// What a post is.
    PostType {
        /// Words.
        Text = "TEXT",
        /// A picture.
        Image = "IMAGE",
        /// A film.
        Video = "VIDEO",
        /// An address.
        Link = "LINK",
        /// A question with answers to choose.
        Poll = "POLL",
        /// Written by somebody's AI.
        AiGenerated = "AI_GENERATED",
    }
}

/// A post. One that was deleted keeps its place and has no body.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Post {
    /// Its id, which carries its author's bucket.
    pub post_id: PostId,
    /// Its owner.
    pub author_id: UserId,
    /// The thread it is in.
    pub thread_id: ThreadId,
    /// That thread's owner.
    pub thread_author_id: UserId,
    /// The post it answers; absent: the thread.
    pub parent_post_id: Option<PostId>,
    /// What it is.
    #[serde(rename = "type")]
    pub post_type: PostType,
    /// Its text; absent: it was deleted.
    pub body: Option<String>,
    /// How the body is written.
    pub format: Format,
    /// Shown first.
    pub is_pinned: bool,
    /// What a moderator decided.
    pub moderation: Moderation,
    /// What others think of it.
    pub score: i32,
    /// Whatever else is known.
    pub metadata: Value,
    /// When it was written.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

/// The post that another one answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The post.
    pub post_id: PostId,
    /// Its author.
    pub author_id: UserId,
}

/// A post to be written.
#[derive(Debug, Clone)]
pub struct NewPost {
    /// Chosen by the caller ([`PostId::new`]), so that a retry is the same post; made when absent.
    pub post_id: Option<PostId>,
    /// Its owner.
    pub author_id: UserId,
    /// The thread it goes to.
    pub thread_id: ThreadId,
    /// The post it answers; absent: the thread.
    pub parent: Option<Parent>,
    /// What it is.
    pub post_type: PostType,
    /// 1 byte to 1 MiB.
    pub body: String,
    /// How the body is written.
    pub format: Format,
    /// Whatever else is known.
    pub metadata: Option<Value>,
}

impl NewPost {
    /// A reply of plain text to a thread.
    pub fn new(author_id: UserId, thread_id: ThreadId, body: impl Into<String>) -> NewPost {
        NewPost {
            post_id: None,
            author_id,
            thread_id,
            parent: None,
            post_type: PostType::Text,
            body: body.into(),
            format: Format::Plain,
            metadata: None,
        }
    }

    /// As the statement for many takes it.
    fn item(&self, id: PostId, thread_author: UserId, metadata: &Value) -> Value {
        json!({
            "author_id": self.author_id, "post_id": id, "thread_id": self.thread_id, "thread_author_id": thread_author,
            "parent_post_id": self.parent.map(|parent| parent.post_id),
            "parent_author_id": self.parent.map(|parent| parent.author_id),
            "type": self.post_type.name(), "body": self.body, "format": self.format.name(), "metadata": metadata,
        })
    }
}

/// What to change of a post: absent fields stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PostChange {
    /// Another text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Shown first, or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_pinned: Option<bool>,
    /// A moderator's decision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moderation: Option<Moderation>,
}

macro_rules! post_columns {
    () => {
        "p.post_id, p.author_id, p.thread_id, p.thread_author_id, p.parent_post_id, p.type, p.body, p.format,
         p.is_pinned, p.moderation, p.score, p.metadata, p.created_at, p.updated_at, p.version"
    };
}
pub(crate) use post_columns;

/// What an author's contribution became, for the thread's owner: goes with the statement that changed it.
macro_rules! contribution_sent {
    () => {
        "sent AS (
             INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
             SELECT 'content', c.bucket, 'contribution', jsonb_build_array(to_jsonb(c))
               FROM contribution AS c
             RETURNING outbox_id, kind::text, facts)"
    };
}

/// The post, its author's contribution and the event about it: one statement, one round trip. It answers with what the
/// caller does not know (a tenth of its cost would be to hand all columns back). An id in use is refused by a unique index: to
/// look for it first (`ON CONFLICT`) would cost every post something for the sake of a few.
static CREATE: Write = Write::of_owner(
    Group::Content,
    concat!(
        "created AS (
             INSERT INTO posts (bucket, author_id, post_id, thread_id, thread_author_id, parent_post_id,
                                parent_author_id, type, body, format, metadata, version)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, version_floor FROM fence
             RETURNING bucket, author_id, thread_id, thread_author_id, is_pinned, moderation, score, created_at,
                       updated_at, version),
         contribution AS (
             INSERT INTO therev.thread_contributions AS c
                    (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
             SELECT p.bucket, p.author_id, p.thread_id, p.thread_author_id, 1, p.created_at, p.version
               FROM created AS p",
        added_contribution!(),
        "
             RETURNING c.*),
         ",
        contribution_sent!(),
        ", result AS (
             SELECT s.outbox_id, s.kind, s.facts, p.is_pinned, p.moderation, p.score, p.created_at, p.updated_at,
                    p.version
               FROM created AS p, sent AS s)"
    ),
);

/// The same for posts of several authors that come at once. Who holds on to a contribution of one of them is not waited for by the
/// others: those then go each for itself. An id that is there is left out, so that one of many that comes again is not refused with
/// all of them; whoever has it goes alone. Two such statements lock contributions in the same order.
static CREATE_TOGETHER: WriteMany = WriteMany::new(
    Group::Content,
    concat!(
        "hurried AS MATERIALIZED (SELECT set_config('lock_timeout', '100ms', true)),
         created AS (
             INSERT INTO posts (bucket, author_id, post_id, thread_id, thread_author_id, parent_post_id,
                                parent_author_id, type, body, format, metadata, version)
             SELECT o.bucket, i.author_id, i.post_id, i.thread_id, i.thread_author_id, i.parent_post_id,
                    i.parent_author_id, i.type, i.body, i.format, i.metadata, o.version_floor
               FROM hurried CROSS JOIN owned AS o
              CROSS JOIN jsonb_to_record(o.item) AS i (author_id uuid, post_id uuid, thread_id uuid,
                                                       thread_author_id uuid, parent_post_id uuid,
                                                       parent_author_id uuid, type text, body text, format text,
                                                       metadata jsonb)
              WHERE NOT EXISTS (SELECT FROM posts AS p WHERE p.bucket = o.bucket AND p.post_id = i.post_id)
             RETURNING bucket, author_id, post_id, thread_id, thread_author_id, is_pinned, moderation, score,
                       created_at, updated_at, version),
         contribution AS (
             INSERT INTO therev.thread_contributions AS c
                    (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
             SELECT p.bucket, p.author_id, p.thread_id, p.thread_author_id, count(*), max(p.created_at),
                    max(p.version)
               FROM created AS p
              GROUP BY p.bucket, p.author_id, p.thread_id, p.thread_author_id
              ORDER BY p.author_id, p.thread_id",
        added_contribution!(),
        "
             RETURNING c.*),
         ",
        contribution_sent!(),
        ", result AS (
             SELECT p.post_id AS key, s.outbox_id, s.kind, s.facts, p.is_pinned, p.moderation, p.score, p.created_at,
                    p.updated_at, p.version
               FROM created AS p
               JOIN sent AS s
                 ON (s.facts #>> '{0,author_id}')::uuid = p.author_id
                AND (s.facts #>> '{0,thread_id}')::uuid = p.thread_id)"
    ),
);

/// A longer post goes alone: nobody shall wait for its bytes.
const TOGETHER_BYTES: usize = 4 * 1_024;

static GET: Read = Read::by_id(
    Group::Content,
    "author_id",
    concat!("SELECT ", post_columns!(), " FROM posts AS p WHERE p.bucket = $1 AND p.post_id = $2"),
);

/// An author's posts, newest first: ids sort by time.
static BY_AUTHOR: Read = Read::of_owner(
    Group::Content,
    concat!(
        "SELECT ",
        post_columns!(),
        " FROM posts AS p
          WHERE p.bucket = $1 AND p.author_id = $2 AND p.post_id < $3 AND p.deleted_at IS NULL
          ORDER BY p.post_id DESC LIMIT $4"
    ),
);

/// Ids alone: the bodies of 500 posts may be 500 MiB.
static IDS_OF_AUTHOR: Read = Read::of_owner(
    Group::Content,
    "SELECT p.post_id, p.thread_author_id FROM posts AS p
      WHERE p.bucket = $1 AND p.author_id = $2 AND p.post_id > $3 AND p.deleted_at IS NULL
      ORDER BY p.post_id LIMIT 500",
)
.long();

/// The audit outlives what was written: of words it holds only that they were changed.
static CHANGE: Write = Write::by_id(
    Group::Content,
    concat!(
        "old AS (
             SELECT p.* FROM posts AS p, fence
              WHERE p.bucket = $1 AND p.post_id = $2 AND p.deleted_at IS NULL
                AND therev.may_write(fence.here, p.bucket, p.author_id)),
         changed AS (
             UPDATE posts AS p
                SET (body, is_pinned, moderation)
                  = (SELECT n.body, n.is_pinned, n.moderation FROM jsonb_populate_record(p, $3) AS n),
                    version = greatest(p.version + 1, fence.version_floor), updated_at = now()
               FROM fence
              WHERE p.bucket = $1 AND p.post_id = $2 AND p.deleted_at IS NULL
                AND therev.may_write(fence.here, p.bucket, p.author_id)
             RETURNING p.*),
         fields AS (SELECT k.key, k.key IN ('is_pinned', 'moderation') AS is_decided FROM jsonb_object_keys($3) AS k (key)),
         decided AS (SELECT f.key FROM fields AS f WHERE f.is_decided),
         worded AS (SELECT jsonb_agg(f.key ORDER BY f.key) AS keys FROM fields AS f WHERE NOT f.is_decided),
         change AS (
             SELECT o.bucket, o.author_id AS user_id, 'post ' || o.post_id AS target,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(o) -> f.key), '{}') FROM decided AS f) AS before,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(c) -> f.key), '{}') FROM decided AS f)
                        || CASE WHEN w.keys IS NULL THEN '{}' ELSE jsonb_build_object('changed', w.keys) END AS after
               FROM old AS o, changed AS c, worded AS w),
         ",
        audited!("change", "$4"),
        ", result AS (SELECT ",
        post_columns!(),
        " FROM changed AS p)"
    ),
);

/// The post keeps its place for the replies under it and loses its text. Who has only its id does not know which shard answers,
/// so that it says so.
static DELETE: Write = Write::by_id(
    Group::Content,
    concat!(
        "deleted AS (
             UPDATE posts AS p
                SET body = NULL, metadata = '{}', is_pinned = false, deleted_at = now(), updated_at = now(),
                    version = greatest(p.version + 1, fence.version_floor)
               FROM fence
              WHERE p.bucket = $1 AND p.post_id = $2 AND p.deleted_at IS NULL
                AND therev.may_write(fence.here, p.bucket, p.author_id)
             RETURNING p.*),
         contribution AS (
             UPDATE therev.thread_contributions AS c
                SET posts = c.posts - 1, deleted = c.deleted + 1, version = greatest(c.version + 1, f.version_floor)
               FROM deleted AS d, fence AS f
              WHERE c.bucket = d.bucket AND c.author_id = d.author_id AND c.thread_id = d.thread_id
             RETURNING c.*),
         change AS (
             SELECT d.bucket, d.author_id AS user_id, 'post ' || d.post_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('deleted', true) AS after
               FROM deleted AS d),
         ",
        audited!("change", "$3"),
        ", ",
        contribution_sent!(),
        ", result AS (
             SELECT s.outbox_id, s.kind, s.facts, i.shard FROM deleted AS d, sent AS s, therev.identity AS i)"
    ),
);

crate::fenced_list! { CREATE CREATE_TOGETHER GET BY_AUTHOR IDS_OF_AUTHOR CHANGE DELETE }

/// The unique indexes that refuse a post whose id is in use: whichever is looked at first. That is the older one, and after a
/// REINDEX CONCURRENTLY the other.
const INDEXES_OF_IDS: [&str; 2] = ["posts_pkey", "posts_by_id"];

impl Community {
    /// Writes a post: one read of the thread's head, one statement on the author's shard, one delivery to the thread's.
    ///
    /// A thread that is missing, deleted or locked takes none. The same id again is the same post, whatever has become of the
    /// thread since.
    pub async fn create_post(&self, new: NewPost) -> Result<Post> {
        check_body(&new.body, false)?;
        let metadata = new.metadata.clone().unwrap_or_else(|| json!({}));
        check_object("metadata", &metadata)?;
        let id = new.post_id.unwrap_or_else(|| PostId::new(new.author_id));
        Self::check_id(id.0, new.author_id)?;
        let thread_author = match self.author_of_open_thread(new.thread_id).await {
            Err(refused @ (Error::Locked(_) | Error::Gone { .. })) => return self.created_before(&new, refused).await,
            answer => answer?,
        };
        fail::fail_point!("post.thread_read");
        let bucket = new.author_id.bucket();
        let (post_type, format) = (new.post_type.name(), new.format.name());
        let parent = new.parent.map(|p| p.post_id.0);
        let parent_author = new.parent.map(|p| p.author_id.0);
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 10] = [
            &new.author_id.0,
            &id.0,
            &new.thread_id.0,
            &thread_author.0,
            &parent,
            &parent_author,
            &post_type,
            &new.body,
            &format,
            &metadata,
        ];
        let is_long = new.body.len() + metadata.to_string().len() > TOGETHER_BYTES;
        let mut unknown = None;
        for _ in 0..2 {
            let is_alone = unknown.is_some() || is_long;
            let written = if is_alone {
                Box::pin(self.shards().write_on(&CREATE, bucket, &params)).await
            } else {
                let item = || new.item(id, thread_author, &metadata);
                Box::pin(self.shards().write_together(&CREATE, &CREATE_TOGETHER, bucket, &params, (id.0, item))).await
            };
            match written {
                Ok((shard, rows)) => {
                    fail::fail_point!("post.written");
                    let Some(row) = rows.first() else { break };
                    self.deliver_contribution(shard, thread_author, row).await;
                    return created(id, new, thread_author, metadata, row);
                }
                // It is there; and where nothing more is heard of it, that is no word on what became of the first try.
                Err(error) if is_id_in_use(&error) => {
                    let same = self.same_post(id, &new).await;
                    return same.map_err(|error| match (error, unknown) {
                        (Error::Store(_), Some(unknown)) => Error::Store(unknown),
                        (error, _) => error,
                    });
                }
                // Whether it was written, the same create tells; one that fails does not.
                Err(error @ shards::Error::OutcomeUnknown { .. }) => unknown = Some(error),
                Err(error) => return Err(unknown.map_or_else(|| Error::of_constraint(error), Error::Store)),
            }
        }
        Err(unknown.map_or_else(|| Error::Changed { what: "post", id: id.to_string() }, Error::Store))
    }

    /// The post of a create whose answer was lost, and whose thread takes none any more; a new one is refused.
    async fn created_before(&self, new: &NewPost, refused: Error) -> Result<Post> {
        let Some(id) = new.post_id else { return Err(refused) };
        match self.same_post(id, new).await {
            Err(Error::NotFound { .. }) => Err(refused),
            found => found,
        }
    }

    /// The post whose id is in use, if it is the one that was to be created.
    async fn same_post(&self, id: PostId, new: &NewPost) -> Result<Post> {
        // An id that is nowhere costs no wait for a disk. One that is there is read once more when its commit is safe.
        self.post(id).await?;
        self.shards().confirm(Group::Content, new.author_id).await?;
        let post = self.post(id).await?;
        let Some(body) = &post.body else { return Err(Error::gone("post", id)) };
        // One that was changed since is still the same create; one that never looked like this is another.
        let differs = *body != new.body && post.updated_at == post.created_at;
        let parent = new.parent.map(|parent| parent.post_id);
        let stays = (post.author_id, post.thread_id, post.parent_post_id, post.post_type, post.format);
        if stays != (new.author_id, new.thread_id, parent, new.post_type, new.format) || differs {
            return Err(Error::Conflict { what: "id", value: id.to_string() });
        }
        Ok(post)
    }

    /// Answers a post: looks up where it is, then writes under it.
    pub async fn reply(&self, author_id: UserId, to: PostId, body: impl Into<String>) -> Result<Post> {
        let parent = self.post(to).await?;
        if parent.body.is_none() {
            return Err(Error::gone("post", to));
        }
        let answers = Parent { post_id: to, author_id: parent.author_id };
        self.create_post(NewPost { parent: Some(answers), ..NewPost::new(author_id, parent.thread_id, body) }).await
    }

    /// A post; one that was deleted is answered as its place, without text.
    pub async fn post(&self, id: PostId) -> Result<Post> {
        let bucket = self.route("post", id.0).await?;
        let rows = self.shards().read(&GET, bucket, &[&id.0]).await?;
        post_from(rows.first().ok_or_else(|| Error::not_found("post", id))?)
    }

    /// An author's posts, newest first, before `before` when it is given; 1,000 at most.
    pub async fn posts_by_author(&self, author: UserId, before: Option<PostId>, limit: i64) -> Result<Vec<Post>> {
        let limit = i64::try_from(bounded(limit)?).unwrap_or(i64::MAX);
        let before = before.map_or(Uuid::max(), |id| id.0);
        let rows = self.shards().read(&BY_AUTHOR, author.bucket(), &[&author.0, &before, &limit]).await?;
        rows.iter().map(post_from).collect()
    }

    /// Changes a post: its author its text, a moderator its state. What somebody else does is audited.
    pub async fn change_post(&self, id: PostId, change: PostChange, actor: &Actor) -> Result<Post> {
        if let Some(body) = &change.body {
            check_body(body, false)?;
        }
        let post = self.post(id).await?;
        let note = actor.note_unless(post.author_id, "change post");
        let fields = serde_json::to_value(&change).map_err(|e| Error::invalid("change", e.to_string()))?;
        let rows = self.shards().write(&CHANGE, post.author_id.bucket(), &[&id.0, &fields, &note]).await;
        let rows = rows.map_err(Error::of_constraint)?;
        post_from(rows.first().ok_or_else(|| Error::gone("post", id))?)
    }

    /// Deletes a post: it keeps its place and loses its text.
    pub async fn delete_post(&self, id: PostId, actor: &Actor) -> Result<()> {
        let post = self.post(id).await?;
        let is_deleted = self.delete_one(id, post.author_id, post.thread_author_id, actor).await?;
        if is_deleted { Ok(()) } else { Err(Error::gone("post", id)) }
    }

    /// Deletes all posts of an author, each by itself and past what is deleted already; says how many.
    pub(crate) async fn delete_posts_of(&self, author: UserId, actor: &Actor, passes: Passes) -> Result<u64> {
        let (mut count, mut after) = (0, Uuid::nil());
        loop {
            let posts = self.shards().read(&IDS_OF_AUTHOR, author.bucket(), &[&author.0, &after]).await?;
            let Some(last) = posts.last() else {
                if after.is_nil() || passes == Passes::Once {
                    return Ok(count);
                }
                after = Uuid::nil();
                continue;
            };
            after = last.get("post_id");
            for row in posts {
                let (id, thread_author) = (PostId(row.get("post_id")), UserId(row.get("thread_author_id")));
                count += u64::from(self.delete_one(id, author, thread_author, actor).await?);
            }
        }
    }

    async fn delete_one(&self, id: PostId, author: UserId, thread_author: UserId, actor: &Actor) -> Result<bool> {
        let note = actor.note_unless(author, "delete post");
        let rows = self.shards().write(&DELETE, author.bucket(), &[&id.0, &note]).await?;
        if let Some(row) = rows.first() {
            self.deliver_contribution(ShardNo(row.get("shard")), thread_author, row).await;
        }
        Ok(!rows.is_empty())
    }

    /// Delivers the contribution that a statement returned with its row; `shard`: whose outbox the event is in.
    async fn deliver_contribution(&self, shard: ShardNo, thread_author: UserId, row: &Row) {
        let event = Event::from_row(Some(shard), row);
        self.deliver_now(self.shard_of(Group::Content, thread_author), event).await;
        self.mark_many();
    }
}

fn is_id_in_use(error: &shards::Error) -> bool {
    error.sql_error().is_some_and(|refused| refused.constraint().is_some_and(|name| INDEXES_OF_IDS.contains(&name)))
}

/// A new post: what was asked for, and what the schema added.
fn created(id: PostId, new: NewPost, thread_author_id: UserId, metadata: Value, row: &Row) -> Result<Post> {
    Ok(Post {
        post_id: id,
        author_id: new.author_id,
        thread_id: new.thread_id,
        thread_author_id,
        parent_post_id: new.parent.map(|parent| parent.post_id),
        post_type: new.post_type,
        body: Some(new.body),
        format: new.format,
        is_pinned: row.get("is_pinned"),
        moderation: word(row.get("moderation"))?,
        score: row.get("score"),
        metadata,
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
        version: row.get("version"),
    })
}

pub(crate) fn post_from(row: &Row) -> Result<Post> {
    let mut columns = Columns::of(row);
    Ok(Post {
        post_id: PostId(columns.get("post_id")),
        author_id: UserId(columns.get("author_id")),
        thread_id: ThreadId(columns.get("thread_id")),
        thread_author_id: UserId(columns.get("thread_author_id")),
        parent_post_id: columns.get::<Option<Uuid>>("parent_post_id").map(PostId),
        post_type: word(columns.get("type"))?,
        body: columns.get("body"),
        format: word(columns.get("format"))?,
        is_pinned: columns.get("is_pinned"),
        moderation: word(columns.get("moderation"))?,
        score: columns.get("score"),
        metadata: columns.json("metadata")?,
        created_at: columns.get("created_at"),
        updated_at: columns.get("updated_at"),
        version: columns.get("version"),
    })
}
