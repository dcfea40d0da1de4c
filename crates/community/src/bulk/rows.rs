//! The rows that are brought in, and how each is copied.

use chrono::{DateTime, Utc};
use placement::{Group, PostId, ShardNo, ThreadId, UserId, Whose};
use serde_json::Value;
use std::collections::BTreeMap;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

/// A user as it is brought in: no e-mail address, no password, so no log-in until somebody claims it.
#[derive(Debug, Clone)]
pub struct BulkUser {
    /// Its id.
    pub user_id: UserId,
    /// The user names that will do, best first; the first free one is taken.
    pub user_names: Vec<String>,
    /// The display name.
    pub first_name: Option<String>,
    /// What the user says of itself.
    pub bio: Option<String>,
    /// A picture's address.
    pub profile_pic_url: Option<String>,
    /// Whatever else is known.
    pub metadata: Value,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
}

/// A thread as it is brought in.
#[derive(Debug, Clone)]
pub struct BulkThread {
    /// Its id, which carries its author's bucket.
    pub thread_id: ThreadId,
    /// Its owner.
    pub author_id: UserId,
    /// What it is about.
    pub title: String,
    /// The first text.
    pub body: String,
    /// How the body is written.
    pub format: crate::Format,
    /// What others think of it.
    pub score: i32,
    /// Whatever else is known.
    pub metadata: Value,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
}

/// A post as it is brought in.
#[derive(Debug, Clone)]
pub struct BulkPost {
    /// Its id, which carries its author's bucket.
    pub post_id: PostId,
    /// Its owner.
    pub author_id: UserId,
    /// The thread it is in.
    pub thread_id: ThreadId,
    /// That thread's owner.
    pub thread_author_id: UserId,
    /// The post it answers.
    pub parent: Option<crate::Parent>,
    /// The text.
    pub body: String,
    /// How the body is written.
    pub format: crate::Format,
    /// What others think of it.
    pub score: i32,
    /// Whatever else is known.
    pub metadata: Value,
    /// When it was written.
    pub created_at: DateTime<Utc>,
}

/// What a bulk write did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Rows written, by shard.
    pub written: BTreeMap<ShardNo, u64>,
    /// Rows that were there already.
    pub existing: u64,
}

impl Copied {
    /// Rows written on all shards.
    pub fn total(&self) -> u64 {
        self.written.values().sum()
    }

    pub(super) fn add(&mut self, part: Copied) {
        for (shard, rows) in part.written {
            *self.written.entry(shard).or_default() += rows;
        }
        self.existing += part.existing;
    }
}

/// What the tables that are copied into have in common.
pub(super) trait BulkRow: Sync {
    const GROUP: Group;
    const COPY: &'static str;
    /// `$1` buckets and `$2` ids side by side: the ids that are there.
    const KNOWN: &'static str;
    const TYPES: &'static [Type];
    /// The kind of the event that names the new rows.
    const EVENT: Option<&'static str>;

    fn owner(&self) -> UserId;
    fn id(&self) -> Uuid;
    fn columns<'a>(&'a self, shared: &'a Shared) -> Vec<&'a (dyn ToSql + Sync)>;

    fn shared(&self, version: i64) -> Shared;

    fn whose(&self) -> Whose {
        self.owner().into()
    }
}

/// Columns that are computed from a row: held here while it is encoded.
pub(super) struct Shared {
    bucket: i16,
    pub(super) version: i64,
    parent: (Option<Uuid>, Option<Uuid>),
    format: &'static str,
}

/// A user with the name that was taken for it.
pub(super) struct NamedUser {
    pub(super) user: BulkUser,
    pub(super) user_name: String,
    /// The version of the row that an earlier try left, which was given up before it was written.
    pub(super) buried: Option<i64>,
}

impl BulkRow for NamedUser {
    const GROUP: Group = Group::Account;
    const COPY: &'static str = "
        COPY users (bucket, user_id, user_name, first_name, bio, profile_pic_url, metadata, created_at, updated_at,
                    version)
        FROM STDIN (FORMAT binary)";
    const KNOWN: &'static str = "
        SELECT u.user_id FROM unnest($1::smallint[], $2::uuid[]) AS k (bucket, id)
          JOIN users AS u ON u.bucket = k.bucket AND u.user_id = k.id AND u.was_registered";
    const TYPES: &'static [Type] = &[
        Type::INT2,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::JSONB,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::INT8,
    ];
    const EVENT: Option<&'static str> = Some("user");

    fn owner(&self) -> UserId {
        self.user.user_id
    }

    fn id(&self) -> Uuid {
        self.user.user_id.0
    }

    fn shared(&self, version: i64) -> Shared {
        // Above the version under which the directory hears of the buried row's end.
        let version = self.buried.map_or(version, |buried| version.max(buried + 2));
        Shared { bucket: self.owner().bucket().sql(), version, parent: (None, None), format: "" }
    }

    fn columns<'a>(&'a self, shared: &'a Shared) -> Vec<&'a (dyn ToSql + Sync)> {
        let user = &self.user;
        vec![
            &shared.bucket,
            &user.user_id.0,
            &self.user_name,
            &user.first_name,
            &user.bio,
            &user.profile_pic_url,
            &user.metadata,
            &user.created_at,
            &user.created_at,
            &shared.version,
        ]
    }
}

impl BulkRow for BulkThread {
    const GROUP: Group = Group::Content;
    const COPY: &'static str = "
        COPY threads (bucket, author_id, thread_id, title, body, format, score, metadata, created_at, updated_at,
                      version)
        FROM STDIN (FORMAT binary)";
    const KNOWN: &'static str = "
        SELECT t.thread_id FROM unnest($1::smallint[], $2::uuid[]) AS k (bucket, id)
          JOIN threads AS t ON t.bucket = k.bucket AND t.thread_id = k.id";
    const TYPES: &'static [Type] = &[
        Type::INT2,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::INT4,
        Type::JSONB,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::INT8,
    ];
    const EVENT: Option<&'static str> = Some("thread");

    fn owner(&self) -> UserId {
        self.author_id
    }

    fn id(&self) -> Uuid {
        self.thread_id.0
    }

    fn shared(&self, version: i64) -> Shared {
        let bucket = self.author_id.bucket().sql();
        Shared { bucket, version, parent: (None, None), format: self.format.name() }
    }

    fn columns<'a>(&'a self, shared: &'a Shared) -> Vec<&'a (dyn ToSql + Sync)> {
        vec![
            &shared.bucket,
            &self.author_id.0,
            &self.thread_id.0,
            &self.title,
            &self.body,
            &shared.format,
            &self.score,
            &self.metadata,
            &self.created_at,
            &self.created_at,
            &shared.version,
        ]
    }
}

impl BulkRow for BulkPost {
    const GROUP: Group = Group::Content;
    const COPY: &'static str = "
        COPY posts (bucket, author_id, post_id, thread_id, thread_author_id, parent_post_id, parent_author_id, body,
                    format, score, metadata, created_at, updated_at, version)
        FROM STDIN (FORMAT binary)";
    const KNOWN: &'static str = "
        SELECT p.post_id FROM unnest($1::smallint[], $2::uuid[]) AS k (bucket, id)
          JOIN posts AS p ON p.bucket = k.bucket AND p.post_id = k.id";
    const TYPES: &'static [Type] = &[
        Type::INT2,
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::INT4,
        Type::JSONB,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::INT8,
    ];
    const EVENT: Option<&'static str> = None;

    fn owner(&self) -> UserId {
        self.author_id
    }

    fn id(&self) -> Uuid {
        self.post_id.0
    }

    fn shared(&self, version: i64) -> Shared {
        let parent = (self.parent.map(|p| p.post_id.0), self.parent.map(|p| p.author_id.0));
        Shared { bucket: self.author_id.bucket().sql(), version, parent, format: self.format.name() }
    }

    fn columns<'a>(&'a self, shared: &'a Shared) -> Vec<&'a (dyn ToSql + Sync)> {
        vec![
            &shared.bucket,
            &self.author_id.0,
            &self.post_id.0,
            &self.thread_id.0,
            &self.thread_author_id.0,
            &shared.parent.0,
            &shared.parent.1,
            &self.body,
            &shared.format,
            &self.score,
            &self.metadata,
            &self.created_at,
            &self.created_at,
            &shared.version,
        ]
    }
}
