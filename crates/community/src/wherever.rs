//! Where something is, and how that was found.

use crate::community::Community;
use crate::error::{Error, Result};
use placement::{Group, ShardNo, UserId, Whose, bucket_in};
use serde::Serialize;
use shards::Read;
use uuid::Uuid;

/// What was found of an id or a name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Whereabouts {
    /// The owner; absent for an id that nobody has and that is no user's.
    pub owner: Option<UserId>,
    /// The bucket.
    pub bucket: u16,
    /// The colocation group.
    pub group: Group,
    /// The shard that owns the bucket.
    pub shard: ShardNo,
    /// How it was found.
    pub via: Found,
    /// Whether anything has this id.
    pub exists: bool,
    /// What it is: `user`, `thread`, `post`, `session`, `account`, `task`; for people, programs have `group`.
    #[serde(skip)]
    pub what: &'static str,
}

/// How a bucket was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// By the hash of a user's id.
    Hash,
    /// The id carries it.
    Id,
    /// By `id_routes`.
    Route,
    /// By the claim of a user name.
    Name,
}

static USER: Read = Read::of_owner(
    Group::Account,
    "SELECT u.user_id FROM users AS u WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL",
);

static OF_CONTENT: Read = Read::by_id(
    Group::Content,
    "owner",
    "SELECT t.author_id AS owner, 'thread' AS what FROM threads AS t WHERE t.bucket = $1 AND t.thread_id = $2
     UNION ALL
     SELECT p.author_id, 'post' FROM posts AS p WHERE p.bucket = $1 AND p.post_id = $2",
);

static OF_ACCOUNT: Read = Read::by_id(
    Group::Account,
    "owner",
    "SELECT s.user_id AS owner, 'session' AS what FROM user_sessions AS s WHERE s.bucket = $1 AND s.session_id = $2
     UNION ALL
     SELECT a.user_id, 'account' FROM user_ai_accounts AS a WHERE a.bucket = $1 AND a.account_id = $2
     UNION ALL
     SELECT t.user_id, 'task' FROM ai_tasks AS t WHERE t.bucket = $1 AND t.task_id = $2",
);

crate::fenced_list! { USER OF_CONTENT OF_ACCOUNT }

impl Community {
    /// Where the user of this name is.
    pub async fn where_name(&self, user_name: &str) -> Result<Whereabouts> {
        let user =
            self.user_named(user_name).await?.ok_or_else(|| Error::not_found("user", format!("@{user_name}")))?;
        let found = self.where_user(user).await?;
        Ok(Whereabouts { via: Found::Name, ..found })
    }

    /// Where an id is. A well-formed id that nobody has yet is placed all the same.
    pub async fn where_id(&self, id: Uuid) -> Result<Whereabouts> {
        let as_user = self.where_user(UserId(id)).await?;
        if as_user.exists {
            return Ok(as_user);
        }
        let (bucket, via) = match (bucket_in(id), self.routed_owner_unless_ours(id).await?) {
            (Some(bucket), _) => (bucket, Found::Id),
            (None, Some(owner)) => (owner.bucket(), Found::Route),
            (None, None) => return Ok(as_user),
        };
        for (group, statement) in [(Group::Content, &OF_CONTENT), (Group::Account, &OF_ACCOUNT)] {
            let rows = self.shards().read(statement, bucket, &[&id]).await?;
            if let Some(row) = rows.first() {
                let what = ["thread", "post", "session", "account", "task"];
                let word: &str = row.get("what");
                return Ok(Whereabouts {
                    what: what.into_iter().find(|w| *w == word).unwrap_or("row"),
                    owner: Some(UserId(row.get("owner"))),
                    ..self.placed(group, UserId(row.get("owner")).into(), via)
                });
            }
        }
        Ok(Whereabouts { exists: false, ..self.placed(Group::Content, bucket.into(), via) })
    }

    async fn routed_owner_unless_ours(&self, id: Uuid) -> Result<Option<UserId>> {
        if bucket_in(id).is_some() { Ok(None) } else { self.routed_owner(id).await }
    }

    async fn where_user(&self, user: UserId) -> Result<Whereabouts> {
        let rows = self.shards().read(&USER, user.bucket(), &[&user.0]).await?;
        let placed = self.placed(Group::Account, user.into(), Found::Hash);
        Ok(Whereabouts { owner: Some(user), exists: !rows.is_empty(), what: "user", ..placed })
    }

    /// The place of rows that a read has just been answered for: the map holds what the shard said.
    fn placed(&self, group: Group, whose: Whose, via: Found) -> Whereabouts {
        let shard = self.shard_of(group, whose);
        Whereabouts { owner: None, bucket: whose.bucket.number(), group, shard, via, exists: true, what: "row" }
    }
}
