//! Many rows at once: binary COPY per shard, side by side, each batch locked, checked and short.
//!
//! Rows that are there already are left as they are, so that a bulk write which was cut off is repeated whole.

use crate::community::Community;
use crate::error::{Error, Result};
use crate::names::{Name, NameKind};
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use placement::{Bucket, Group, PostId, ShardNo, ThreadId, UserId};
use serde_json::Value;
use shards::Bulk;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use tokio_postgres::error::SqlState;
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
    /// Ids of the rows written.
    pub new_ids: Vec<Uuid>,
}

impl Copied {
    /// Rows written on all shards.
    pub fn total(&self) -> u64 {
        self.written.values().sum()
    }

    fn add(&mut self, shard: ShardNo, part: Copied) {
        *self.written.entry(shard).or_default() += part.total();
        self.existing += part.existing;
        self.new_ids.extend(part.new_ids);
    }
}

/// What the tables that are copied into have in common.
trait BulkRow: Sync {
    const GROUP: Group;
    const COPY: &'static str;
    /// `$1` buckets and `$2` ids side by side: the ids that are there.
    const KNOWN: &'static str;
    const TYPES: &'static [Type];

    fn owner(&self) -> UserId;
    fn id(&self) -> Uuid;
    fn columns<'a>(&'a self, shared: &'a Shared) -> Vec<&'a (dyn ToSql + Sync)>;

    fn shared(&self, version: i64) -> Shared;

    /// The version of a buried row in this one's place.
    fn buried(&self) -> Option<i64> {
        None
    }
}

/// Columns that are computed from a row: held here while it is encoded.
struct Shared {
    bucket: i16,
    version: i64,
    parent: (Option<Uuid>, Option<Uuid>),
    format: &'static str,
}

/// A user with the name that was taken for it.
struct NamedUser {
    user: BulkUser,
    user_name: String,
    /// The version of the row that an earlier try left, which was given up before it was written.
    buried: Option<i64>,
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

    fn owner(&self) -> UserId {
        self.user.user_id
    }

    fn id(&self) -> Uuid {
        self.user.user_id.0
    }

    fn buried(&self) -> Option<i64> {
        self.buried
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

/// What the posts of a batch add to their authors' contributions, and the event about them, in the same transaction.
const CONTRIBUTE: &str = "
    WITH contribution AS (
        INSERT INTO therev.thread_contributions AS c
               (bucket, author_id, thread_id, thread_author_id, posts, last_post_at, version)
        SELECT n.bucket, n.author_id, n.thread_id, n.thread_author_id, n.posts, n.last_post_at, $7
          FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::uuid[], $5::integer[], $6::timestamptz[])
                   AS n (bucket, author_id, thread_id, thread_author_id, posts, last_post_at)
         ORDER BY n.author_id, n.thread_id
        ON CONFLICT (bucket, author_id, thread_id) DO UPDATE
           SET posts = c.posts + excluded.posts, last_post_at = greatest(c.last_post_at, excluded.last_post_at),
               version = greatest(c.version + 1, excluded.version)
        RETURNING c.*)
    INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
    SELECT 'content', therev.common_bucket(min(c.bucket), max(c.bucket)), 'contribution', jsonb_agg(to_jsonb(c))
      FROM contribution AS c
    HAVING count(*) > 0";

/// Clears the way for users whose earlier registration was given up, unless something was settled about them since: then
/// the row that stays refuses the copy.
const UNBURY: &str = "
    DELETE FROM users AS u
     USING unnest($1::smallint[], $2::uuid[], $3::bigint[]) AS k (bucket, id, version)
     WHERE u.bucket = k.bucket AND u.user_id = k.id AND NOT u.was_registered AND u.version = k.version";

/// How often a batch is tried again after somebody else wrote the same rows, or a connection broke.
const TRIES: u32 = 5;

impl Community {
    /// Brings users in. Names are taken first, each user's first free one.
    pub async fn bulk_users(&self, users: Vec<BulkUser>) -> Result<Copied> {
        let keys = users.iter().map(|u| (u.user_id.bucket(), u.user_id.0)).collect();
        let (known, buried) = self.known_users(keys).await?;
        let (old, new): (Vec<_>, Vec<_>) = users.into_iter().partition(|u| known.contains(&u.user_id.0));
        let named = self.name_users(new, &buried).await?;
        let mut copied = self.copy_rows(named, no_more).await?;
        copied.existing += u64::try_from(old.len()).unwrap_or(0);
        Ok(copied)
    }

    /// Brings threads in.
    pub async fn bulk_threads(&self, threads: Vec<BulkThread>) -> Result<Copied> {
        self.copy_rows(threads, no_more).await
    }

    /// Brings posts in, with their authors' contributions.
    pub async fn bulk_posts(&self, posts: Vec<BulkPost>) -> Result<Copied> {
        self.copy_rows(posts, contribute).await
    }

    /// Takes a name for each user: all first choices at once, then the second choices of those who came too late.
    /// Whoever was buried gets its name for a version above the burial's.
    async fn name_users(&self, users: Vec<BulkUser>, buried: &HashMap<Uuid, i64>) -> Result<Vec<NamedUser>> {
        let mut named = Vec::with_capacity(users.len());
        let mut open = users;
        for choice in 0.. {
            if open.is_empty() {
                break;
            }
            let mut asked: HashMap<Uuid, UserId> = HashMap::new();
            let mut wanted = Vec::new();
            for user in &open {
                let value = user.user_names.get(choice).ok_or_else(|| no_name_left(user))?.clone();
                let name = Name { kind: NameKind::UserName, value };
                // Of two in one batch the first is served.
                if let std::collections::hash_map::Entry::Vacant(free) = asked.entry(name.key()) {
                    free.insert(user.user_id);
                    wanted.push((name, user.user_id, buried.get(&user.user_id.0).map_or(1, |version| version + 1)));
                }
            }
            let won = self.take_names(&wanted).await?;
            fail::fail_point!("bulk.names_taken");
            let mut late = Vec::new();
            for user in open {
                let user_name = user.user_names[choice].clone();
                let key = Name { kind: NameKind::UserName, value: user_name.clone() }.key();
                if won.contains(&key) && asked.get(&key) == Some(&user.user_id) {
                    let buried = buried.get(&user.user_id.0).copied();
                    named.push(NamedUser { user, user_name, buried });
                } else {
                    late.push(user);
                }
            }
            open = late;
        }
        Ok(named)
    }

    /// Copies rows to the shards that own them, all shards side by side, until every row is somewhere.
    async fn copy_rows<R: BulkRow>(
        &self,
        rows: Vec<R>,
        more: impl AsyncFn(&Bulk, &[&R]) -> std::result::Result<(), shards::Error>,
    ) -> Result<Copied> {
        let mut total = Copied::default();
        let mut open = rows;
        let mut tries = 0;
        while !open.is_empty() {
            let mut by_shard: BTreeMap<ShardNo, Vec<R>> = BTreeMap::new();
            for row in open.drain(..) {
                by_shard.entry(self.shard_of(R::GROUP, row.owner().bucket())).or_default().push(row);
            }
            let parts = by_shard.into_iter().map(|(shard, rows)| {
                let more = &more;
                async move {
                    let outcome = self.copy_to_shard(shard, &rows, more).await;
                    (shard, rows, outcome)
                }
            });
            for (shard, rows, outcome) in join_all(parts).await {
                match outcome {
                    Ok(Some(copied)) => total.add(shard, copied),
                    Ok(None) => open.extend(rows),
                    Err(error) if tries < TRIES && is_worth_another_try(&error) => open.extend(rows),
                    Err(error) => return Err(Error::of_constraint(error)),
                }
            }
            tries += 1;
        }
        Ok(total)
    }

    /// One batch on one shard. `None`: the shard does not own all of it (any more).
    async fn copy_to_shard<R: BulkRow>(
        &self,
        shard: ShardNo,
        rows: &[R],
        more: impl AsyncFn(&Bulk, &[&R]) -> std::result::Result<(), shards::Error>,
    ) -> std::result::Result<Option<Copied>, shards::Error> {
        let buckets: BTreeSet<Bucket> = rows.iter().map(|row| row.owner().bucket()).collect();
        let Some(bulk) = self.shards().bulk(R::GROUP, shard, &buckets).await? else { return Ok(None) };
        let buried: Vec<(&R, i64)> = rows.iter().filter_map(|row| row.buried().map(|version| (row, version))).collect();
        if !buried.is_empty() {
            let buckets: Vec<i16> = buried.iter().map(|(row, _)| row.owner().bucket().sql()).collect();
            let ids: Vec<Uuid> = buried.iter().map(|(row, _)| row.id()).collect();
            let versions: Vec<i64> = buried.iter().map(|(_, version)| *version).collect();
            bulk.query(UNBURY, &[&buckets, &ids, &versions]).await?;
        }
        let keys: (Vec<i16>, Vec<Uuid>) = rows.iter().map(|row| (row.owner().bucket().sql(), row.id())).unzip();
        let known: HashSet<Uuid> =
            bulk.query(R::KNOWN, &[&keys.0, &keys.1]).await?.iter().map(|row| row.get(0)).collect();
        let new: Vec<&R> = rows.iter().filter(|row| !known.contains(&row.id())).collect();
        if !new.is_empty() {
            let shared: Vec<Shared> = new.iter().map(|row| row.shared(bulk.version_floor)).collect();
            let encoded = new.iter().zip(&shared).map(|(row, shared)| row.columns(shared));
            bulk.copy(R::COPY, R::TYPES, encoded).await?;
            more(&bulk, &new).await?;
        }
        fail::fail_point!("bulk.before_commit");
        bulk.commit().await?;
        fail::fail_point!("bulk.committed");
        let count = u64::try_from(new.len()).unwrap_or(0);
        Ok(Some(Copied {
            written: BTreeMap::from([(shard, count)]),
            existing: u64::try_from(known.len()).unwrap_or(0),
            new_ids: new.iter().map(|row| row.id()).collect(),
        }))
    }
}

async fn no_more<R>(_: &Bulk, _: &[&R]) -> std::result::Result<(), shards::Error> {
    Ok(())
}

/// One row per author and thread, whatever the batch holds of them.
async fn contribute(bulk: &Bulk, posts: &[&BulkPost]) -> std::result::Result<(), shards::Error> {
    let mut sums: BTreeMap<(UserId, ThreadId), (UserId, i32, DateTime<Utc>)> = BTreeMap::new();
    for post in posts {
        let sum = sums.entry((post.author_id, post.thread_id)).or_insert((post.thread_author_id, 0, post.created_at));
        sum.1 += 1;
        sum.2 = sum.2.max(post.created_at);
    }
    let buckets: Vec<i16> = sums.keys().map(|(author, _)| author.bucket().sql()).collect();
    let authors: Vec<Uuid> = sums.keys().map(|(author, _)| author.0).collect();
    let threads: Vec<Uuid> = sums.keys().map(|(_, thread)| thread.0).collect();
    let thread_authors: Vec<Uuid> = sums.values().map(|sum| sum.0.0).collect();
    let counts: Vec<i32> = sums.values().map(|sum| sum.1).collect();
    let times: Vec<DateTime<Utc>> = sums.values().map(|sum| sum.2).collect();
    let version = bulk.version_floor;
    bulk.query(CONTRIBUTE, &[&buckets, &authors, &threads, &thread_authors, &counts, &times, &version]).await?;
    Ok(())
}

fn is_worth_another_try(error: &shards::Error) -> bool {
    matches!(error, shards::Error::OutcomeUnknown { .. })
        || error.sql_error().is_some_and(|refused| {
            matches!(*refused.code(), SqlState::UNIQUE_VIOLATION | SqlState::T_R_DEADLOCK_DETECTED)
        })
}

fn no_name_left(user: &BulkUser) -> Error {
    Error::Conflict { what: "user name", value: user.user_names.join("`, `") }
}
