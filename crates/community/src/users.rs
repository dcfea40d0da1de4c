//! Users: register, look up, change, deactivate, delete. Writes table `users`.

use crate::audit::{Actor, audited};
use crate::columns::Columns;
use crate::community::{Community, Written};
use crate::error::{Error, Result};
use crate::names::{Name, NameKind, Taken, normalized_email, normalized_user_name};
use crate::passwords::{hash_password, verify_password};
use crate::text::{check_chars, check_object};
use crate::words;
use chrono::{DateTime, Utc};
use placement::{Group, SessionId, ShardNo, UserId};
use secrecy::SecretString;
use serde::Serialize;
use serde_json::{Value, json};
use shards::{Many, Read, ReadMany, Write};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;
use tokio_postgres::Row;
use uuid::Uuid;

words! {
    /// What a user may do.
    Role {
        /// Reads and writes.
        Standard = "STANDARD",
        /// Also moderates content.
        Moderator = "MODERATOR",
        /// Also manages users.
        Admin = "ADMIN",
        /// Also manages administrators.
        SuperAdmin = "SUPER_ADMIN",
    }
}

/// A user, without secrets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct User {
    /// The owner of everything the user has.
    pub user_id: UserId,
    /// Unique, normalized.
    pub user_name: String,
    /// First name, or the whole display name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// Unique, normalized.
    pub email: Option<String>,
    /// What the user says of itself.
    pub bio: Option<String>,
    /// What the user stands for.
    pub ideology: Option<String>,
    /// A picture's address.
    pub profile_pic_url: Option<String>,
    /// What the user may do.
    pub role: Role,
    /// Whether the user may log in.
    pub is_active: bool,
    /// Whether it has a password to log in with.
    pub has_password: bool,
    /// Whatever else is known.
    pub metadata: Value,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

impl User {
    /// First and last name, or the user name.
    pub fn display_name(&self) -> String {
        let parts: Vec<&str> = [&self.first_name, &self.last_name].into_iter().flatten().map(String::as_str).collect();
        if parts.is_empty() { self.user_name.clone() } else { parts.join(" ") }
    }
}

/// A user to be registered.
#[derive(Debug, Clone, Default)]
pub struct NewUser {
    /// Chosen by the caller, so that a retry is the same registration; made when absent.
    pub user_id: Option<UserId>,
    /// Unique across the community.
    pub user_name: String,
    /// First name, or the whole display name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// Unique across the community.
    pub email: Option<String>,
    /// Without one there is no log-in.
    pub password: Option<SecretString>,
    /// What the user says of itself.
    pub bio: Option<String>,
    /// What the user stands for.
    pub ideology: Option<String>,
    /// A picture's address.
    pub profile_pic_url: Option<String>,
    /// Whatever else is known.
    pub metadata: Option<Value>,
}

/// What to change of a user: absent fields stay. `Some(None)` empties a field.
#[derive(Debug, Clone, Default, Serialize)]
pub struct UserChange {
    /// Another user name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_name: Option<String>,
    /// Another e-mail address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<Option<String>>,
    /// Another first name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_name: Option<Option<String>>,
    /// Another last name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_name: Option<Option<String>>,
    /// Another text about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bio: Option<Option<String>>,
    /// Another stand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ideology: Option<Option<String>>,
    /// Another picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile_pic_url: Option<Option<String>>,
    /// Another role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Deactivated or active.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_active: Option<bool>,
    /// Another password.
    #[serde(skip)]
    pub password: Option<SecretString>,
    /// The session that a new password, or that the user may log in no more, leaves open: its own, as a rule.
    #[serde(skip)]
    pub keep_session: Option<SessionId>,
}

/// Many users at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UserList {
    /// The users, in no order, without those that do not exist.
    pub users: Vec<User>,
    /// Shards that gave no answer: their users are missing here.
    pub missing: Vec<ShardNo>,
    /// Whether anything is missing.
    pub partial: bool,
}

/// What a deletion did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Deleted {
    /// Threads that went with the user.
    pub threads: u64,
    /// Posts that went with the user.
    pub posts: u64,
}

/// How often what somebody wrote is gone through to delete it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passes {
    /// Past what comes meanwhile: its author may be quicker.
    Once,
    /// From the start again for what came meanwhile, until nothing did.
    UntilNothingIsLeft,
}

macro_rules! user_columns {
    () => {
        "u.user_id, u.user_name, u.first_name, u.last_name, u.email, u.bio, u.ideology, u.profile_pic_url, u.role,
         u.is_active, u.password_hash IS NOT NULL AS has_password, u.metadata, u.created_at, u.updated_at,
         u.deleted_at, u.was_registered, u.version"
    };
}

static GET: Read = Read::of_owner(
    Group::Account,
    concat!("SELECT ", user_columns!(), " FROM users AS u WHERE u.bucket = $1 AND u.user_id = $2"),
);

static GET_MANY: ReadMany = ReadMany::new(
    Group::Account,
    concat!(
        "SELECT ",
        user_columns!(),
        " FROM asked AS a JOIN users AS u ON u.bucket = a.bucket AND u.user_id = a.key WHERE u.deleted_at IS NULL"
    ),
);

static KNOWN: ReadMany = ReadMany::new(
    Group::Account,
    "SELECT u.user_id, u.was_registered, u.version FROM asked AS a JOIN users AS u ON u.bucket = a.bucket AND u.user_id = a.key",
);

static PASSWORD: Read = Read::of_owner(
    Group::Account,
    "SELECT u.password_hash, u.is_active FROM users AS u
      WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL",
);

/// The row if it is new, else the one that is there.
static REGISTER: Write = Write::of_owner(
    Group::Account,
    concat!(
        "created AS (
             INSERT INTO users (bucket, user_id, user_name, first_name, last_name, email, password_hash, bio, ideology,
                                profile_pic_url, metadata, version)
             SELECT $1, $2, n.user_name, n.first_name, n.last_name, n.email, n.password_hash, n.bio, n.ideology,
                    n.profile_pic_url, n.metadata, fence.version_floor
               FROM fence, jsonb_populate_record(NULL::users, $3) AS n
             ON CONFLICT (bucket, user_id) DO NOTHING
             RETURNING *),
         change AS (
             SELECT c.bucket, c.user_id, 'user ' || c.user_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('user_name', c.user_name, 'role', c.role) AS after
               FROM created AS c),
         ",
        audited!("change", "$4"),
        ", result AS (
             SELECT true AS is_new, ",
        user_columns!(),
        " FROM created AS u
             UNION ALL
             SELECT false, ",
        user_columns!(),
        " FROM users AS u, fence WHERE u.bucket = $1 AND u.user_id = $2)"
    ),
);

/// Registers an id that was buried before it was registered, if it still has that version.
static RAISE: Write = Write::of_owner(
    Group::Account,
    concat!(
        "raised AS (
             UPDATE users AS u
                SET (user_name, first_name, last_name, email, password_hash, bio, ideology, profile_pic_url, metadata)
                  = (SELECT n.user_name, n.first_name, n.last_name, n.email, n.password_hash, n.bio, n.ideology,
                            n.profile_pic_url, n.metadata
                       FROM jsonb_populate_record(NULL::users, $3) AS n),
                    is_active = true, deleted_at = NULL, was_registered = true, created_at = now(), updated_at = now(),
                    version = greatest(u.version + 1, fence.version_floor)
               FROM fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND NOT u.was_registered AND u.version = $4
             RETURNING u.*),
         change AS (
             SELECT r.bucket, r.user_id, 'user ' || r.user_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('user_name', r.user_name, 'role', r.role) AS after
               FROM raised AS r),
         ",
        audited!("change", "$5"),
        ", result AS (SELECT ",
        user_columns!(),
        " FROM raised AS u)"
    ),
);

/// The name by which somebody was registered, as the audit has it.
static REGISTERED_AS: Read = Read::of_owner(
    Group::Account,
    "SELECT a.after ->> 'user_name' AS user_name
       FROM audit_log AS a
      WHERE a.bucket = $1 AND a.user_id = $2 AND a.action = 'register'",
)
.long();

/// `$3` is the change by column, `$4` the version that the caller read. A new password ends all sessions but `$6`, and so does the end
/// of being active. The audit outlives the user: it holds what is public, and of
/// everything else only that it was changed.
static CHANGE: Write = Write::of_owner(
    Group::Account,
    concat!(
        "old AS (
             SELECT u.* FROM users AS u, fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL AND u.version = $4),
         changed AS (
             UPDATE users AS u
                SET (user_name, first_name, last_name, email, password_hash, bio, ideology, profile_pic_url, role,
                     is_active)
                  = (SELECT n.user_name, n.first_name, n.last_name, n.email, n.password_hash, n.bio, n.ideology,
                            n.profile_pic_url, n.role, n.is_active
                       FROM jsonb_populate_record(u, $3) AS n),
                    version = greatest(u.version + 1, fence.version_floor),
                    updated_at = now()
               FROM fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL AND u.version = $4
             RETURNING u.*),
         ended AS (
             UPDATE user_sessions AS s
                SET status = 'revoked', updated_at = now(), version = greatest(s.version + 1, fence.version_floor)
               FROM fence, changed AS c
              WHERE s.bucket = $1 AND s.user_id = c.user_id AND s.session_id <> $6
                AND s.status IN ('active', 'suspended') AND s.expires_at > now()
                AND ($3::jsonb ? 'password_hash' OR $3::jsonb -> 'is_active' = 'false')
             RETURNING s.session_id),
         fields AS (
             SELECT k.key, k.key IN ('user_name', 'role', 'is_active') AS is_public FROM jsonb_object_keys($3) AS k (key)),
         public AS (SELECT f.key FROM fields AS f WHERE f.is_public),
         personal AS (SELECT jsonb_agg(f.key ORDER BY f.key) AS keys FROM fields AS f WHERE NOT f.is_public),
         change AS (
             SELECT o.bucket, o.user_id, 'user ' || o.user_id AS target,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(o) -> f.key), '{}') FROM public AS f) AS before,
                    (SELECT coalesce(jsonb_object_agg(f.key, to_jsonb(c) -> f.key), '{}') FROM public AS f)
                        || CASE WHEN p.keys IS NULL THEN '{}' ELSE jsonb_build_object('changed', p.keys) END
                        || CASE WHEN e.ended = 0 THEN '{}' ELSE jsonb_build_object('sessions_revoked', e.ended) END
                        AS after
               FROM old AS o, changed AS c, personal AS p, (SELECT count(*) AS ended FROM ended) AS e),
         ",
        audited!("change", "$5"),
        ", result AS (SELECT ",
        user_columns!(),
        " FROM changed AS u)"
    ),
);

/// What belongs to the user that CTE `old` holds, if it holds one.
macro_rules! belongings_deleted {
    () => {
        "sessions AS (
             DELETE FROM user_sessions AS s USING old WHERE s.bucket = $1 AND s.user_id = old.user_id),
         logs AS (
             DELETE FROM ai_task_logs AS l USING old WHERE l.bucket = $1 AND l.user_id = old.user_id),
         tasks AS (
             DELETE FROM ai_tasks AS t USING old WHERE t.bucket = $1 AND t.user_id = old.user_id),
         accounts AS (
             DELETE FROM user_ai_accounts AS a USING old WHERE a.bucket = $1 AND a.user_id = old.user_id)"
    };
}

/// Everything personal goes in one transaction; the id and the version stay.
static DELETE: Write = Write::of_owner(
    Group::Account,
    concat!(
        "old AS (
             SELECT u.* FROM users AS u, fence WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL),
         ",
        belongings_deleted!(),
        ",
         deleted AS (
             UPDATE users AS u
                SET user_name = NULL, first_name = NULL, last_name = NULL, email = NULL, password_hash = NULL,
                    bio = NULL, ideology = NULL, profile_pic_url = NULL, metadata = '{}', role = 'STANDARD',
                    is_active = false, deleted_at = now(), updated_at = now(),
                    version = greatest(u.version + 1, fence.version_floor)
               FROM fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL
             RETURNING u.bucket, u.user_id),
         change AS (
             SELECT d.bucket, d.user_id, 'user ' || d.user_id AS target,
                    jsonb_build_object('role', o.role, 'is_active', o.is_active) AS before, '{}'::jsonb AS after
               FROM deleted AS d, old AS o),
         ",
        audited!("change", "$3"),
        ", result AS (SELECT d.user_id FROM deleted AS d)"
    ),
);

/// What a create that ran beside the deletion left: it was committed after the deletion's snapshot.
static SWEEP: Write = Write::of_owner(
    Group::Account,
    concat!(
        "old AS (
             SELECT u.* FROM users AS u, fence WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NOT NULL),
         ",
        belongings_deleted!(),
        ", result AS (SELECT o.user_id FROM old AS o)"
    ),
);

crate::fenced_list! { REGISTERED_AS GET GET_MANY KNOWN PASSWORD REGISTER RAISE CHANGE DELETE SWEEP }

impl Community {
    /// Registers a user: takes the names, writes the row, confirms the names.
    ///
    /// The same id with the same user name again is the same registration, and no proof of who asks: an id that comes from outside is
    /// none to register. Cut off at any point it leaves at most a pending name, which a relay settles.
    pub async fn register(&self, new: NewUser, actor: &Actor) -> Result<Written<User>> {
        let user = new.user_id.unwrap_or_else(UserId::new);
        let (columns, names) = checked(&new, self.shards().config().deadline()).await?;
        let mut taken = self.take_all(&names, user, 1).await?;
        let mut written = self.register_once(user, &columns, actor, &taken).await?;
        if is_buried(&written) {
            // An earlier try of this registration was given up, and its names are being freed. They are taken anew, for
            // a version that the freeing does not reach, and only then the id is raised, if nobody settled anything
            // about it since.
            let version: i64 = written.get("version");
            taken = self.take_all(&names, user, version + 1).await?;
            let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
                [&user.0, &columns, &version, &actor.note("register")];
            let raised = self.shards().write(&RAISE, user.bucket(), &params).await.map_err(Error::of_constraint)?;
            let changed = || Error::Changed { what: "user", id: user.to_string() };
            written = raised.into_iter().next().ok_or_else(changed)?;
        }
        if written.get::<_, Option<DateTime<Utc>>>("deleted_at").is_some() {
            self.give_back(&taken, user).await;
            return Err(Error::gone("user", user));
        }
        let registered = user_from(&written)?;
        let has = |name: &Name| match name.kind {
            NameKind::UserName => registered.user_name == name.value,
            NameKind::Email => registered.email.as_ref() == Some(&name.value),
        };
        let others: Vec<Taken> = taken.into_iter().filter(|taken| !has(&taken.name)).collect();
        self.give_back(&others, user).await;
        // A registration that was changed since is still the same; one that never looked like this is another.
        if !names.iter().all(has) {
            let is_as_it_was = registered.updated_at == registered.created_at;
            if is_as_it_was || !self.was_registered_as(user, &names).await? {
                return Err(Error::Conflict { what: "id", value: user.to_string() });
            }
        }
        let seen = self.deliver_bucket(Group::Account, user).await;
        Ok(Written { value: registered, seen })
    }

    async fn was_registered_as(&self, user: UserId, names: &[Name]) -> Result<bool> {
        let rows = self.shards().read(&REGISTERED_AS, user.bucket(), &[&user.0]).await?;
        let was = |name: &Name| rows.iter().any(|row| row.get::<_, Option<&str>>("user_name") == Some(&name.value));
        Ok(names.iter().any(|name| name.kind == NameKind::UserName && was(name)))
    }

    /// Writes the row, or finds the one that is there. Names are given back when nothing was written for sure.
    async fn register_once(&self, user: UserId, columns: &Value, actor: &Actor, taken: &[Taken]) -> Result<Row> {
        let note = actor.note("register");
        let written = self.create_once(&REGISTER, user.bucket(), &[&user.0, columns, &note], "user", user.0).await;
        fail::fail_point!("register.written");
        let unknown = |error: &Error| {
            let late =
                matches!(error, Error::Store(shards::Error::OutcomeUnknown { .. } | shards::Error::Deadline { .. }));
            late || matches!(error, Error::Changed { .. })
        };
        if written.as_ref().err().is_some_and(|error| !unknown(error)) {
            self.give_back(taken, user).await;
        }
        written
    }

    /// A user.
    pub async fn user(&self, id: UserId) -> Result<User> {
        let rows = self.shards().read(&GET, id.bucket(), &[&id.0]).await?;
        user_from_found(&rows, id)
    }

    /// Many users, one statement per shard; in no order, without those that do not exist. A shard that is down is the error; see
    /// [`Community::list_users`].
    pub async fn users(&self, ids: &[UserId]) -> Result<Vec<User>> {
        let rows = self.many_users(ids).await.whole()?;
        rows.iter().map(user_from).collect()
    }

    /// The same of the shards that answer: one that is down leaves the list marked `partial`.
    pub async fn list_users(&self, ids: &[UserId]) -> Result<UserList> {
        let answer = self.many_users(ids).await;
        let users = answer.rows().map(user_from).collect::<Result<Vec<User>>>()?;
        let missing: BTreeSet<ShardNo> = answer.missing.iter().map(|(shard, _)| *shard).collect();
        Ok(UserList { users, partial: !missing.is_empty(), missing: missing.into_iter().collect() })
    }

    async fn many_users(&self, ids: &[UserId]) -> Many {
        let keys = ids.iter().map(|id| ((*id).into(), id.0)).collect();
        self.shards().read_many(&GET_MANY, keys, &[]).await
    }

    /// Which of these users' ids are in use, deleted ones included; and which were buried before they were registered,
    /// with their versions.
    pub(crate) async fn known_users(&self, keys: Vec<shards::Key>) -> Result<(HashSet<Uuid>, HashMap<Uuid, i64>)> {
        let rows = self.shards().read_many(&KNOWN, keys, &[]).await.whole()?;
        let (lived, buried): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(|row| row.get("was_registered"));
        let lived = lived.iter().map(|row| row.get("user_id")).collect();
        Ok((lived, buried.iter().map(|row| (row.get("user_id"), row.get("version"))).collect()))
    }

    /// Changes a user. What changes names takes the new ones first and frees the old ones after. A new password ends all sessions but
    /// `keep_session`, and so does the end of being active.
    pub async fn change_user(&self, id: UserId, change: UserChange, actor: &Actor) -> Result<Written<User>> {
        let mut fields = checked_change(&change)?;
        if let Some(password) = &change.password {
            fields["password_hash"] = json!(hash_password(password.clone(), self.shards().config().deadline()).await?);
        }
        let before = self.user(id).await?;
        let version = before.version + 1;
        let mut names = Vec::new();
        for (kind, old) in [(NameKind::UserName, Some(&before.user_name)), (NameKind::Email, before.email.as_ref())] {
            let value = fields.get(kind.sql()).and_then(Value::as_str).filter(|new| old.is_none_or(|old| old != new));
            names.extend(value.map(|value| Name { kind, value: value.to_owned() }));
        }
        self.take_all(&names, id, version).await?;
        let note = actor.note("change user");
        let kept = change.keep_session.unwrap_or(SessionId(Uuid::nil()));
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 5] = [&id.0, &fields, &before.version, &note, &kept.0];
        let changed = self.shards().write(&CHANGE, id.bucket(), &params).await.map_err(Error::of_constraint);
        let Some(row) = changed.as_ref().ok().and_then(|rows| rows.first()) else {
            for name in &names {
                // Whether the change came after all (in another call) is decided on the user's shard.
                if let Err(error) = self.settle_name(name, id, version).await {
                    tracing::debug!(%error, "a name could not be settled at once; the relay does it");
                }
            }
            changed?;
            return Err(Error::Changed { what: "user", id: id.to_string() });
        };
        fail::fail_point!("user.changed");
        // Once more in a statement of its own: whoever logged in beside the change was waited for by it, but is not in what it saw.
        if change.password.is_some() || change.is_active == Some(false) {
            self.revoke_other_sessions(id, kept, actor).await?;
        }
        let seen = self.deliver_bucket(Group::Account, id).await;
        Ok(Written { value: user_from(row)?, seen })
    }

    /// Lets a user log in no more, or again.
    pub async fn set_active(&self, id: UserId, is_active: bool, actor: &Actor) -> Result<Written<User>> {
        self.change_user(id, UserChange { is_active: Some(is_active), ..UserChange::default() }, actor).await
    }

    /// Deletes a user: the account, its sessions, AI accounts and tasks go, and the names are free again. What the user
    /// wrote stays under a deleted author, or goes too `with_content`.
    ///
    /// Content goes first and in steps of its own; what its author wrote meanwhile goes after the account. Asked again after
    /// it was cut off, a deletion repeats its steps; so does one that is asked for content only after the account is gone. Who
    /// is gone is answered as gone, unless there was content to delete.
    pub async fn delete_user(&self, id: UserId, with_content: bool, actor: &Actor) -> Result<Written<Deleted>> {
        match self.user(id).await {
            Ok(_) | Err(Error::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
        let mut gone = Deleted::default();
        if with_content {
            self.delete_content_of(id, actor, Passes::Once, &mut gone).await?;
        }
        let deleted = self.shards().write(&DELETE, id.bucket(), &[&id.0, &actor.note("delete user")]).await?;
        self.shards().write(&SWEEP, id.bucket(), &[&id.0]).await?;
        if with_content {
            self.delete_content_of(id, actor, Passes::UntilNothingIsLeft, &mut gone).await?;
        }
        if deleted.is_empty() && gone == Deleted::default() {
            return Err(Error::gone("user", id));
        }
        let seen = self.deliver_bucket(Group::Account, id).await;
        Ok(Written { value: gone, seen })
    }

    /// Deletes what a user wrote, and counts it.
    async fn delete_content_of(&self, id: UserId, actor: &Actor, passes: Passes, gone: &mut Deleted) -> Result<()> {
        gone.threads += self.delete_threads_of(id, actor, passes).await?;
        gone.posts += self.delete_posts_of(id, actor, passes).await?;
        Ok(())
    }

    /// The user whose name and password these are, and the hash that the password fits. It takes as long for a name that nobody
    /// has, unless the shard of its claim is down: that is the answer then.
    pub(crate) async fn authenticate(&self, user_name: &str, password: &SecretString) -> Result<(UserId, String)> {
        let user = match self.user_named(user_name).await {
            // A name that nobody can have.
            Err(Error::Invalid { .. }) => None,
            named => named?,
        };
        let mut hash = None;
        if let Some(id) = user {
            let rows = self.shards().read(&PASSWORD, id.bucket(), &[&id.0]).await?;
            let usable = rows.first().filter(|row| row.get::<_, bool>("is_active"));
            hash = usable.and_then(|row| row.get::<_, Option<String>>("password_hash"));
        }
        let fits = verify_password(password.clone(), hash.clone(), self.shards().config().deadline()).await?;
        user.zip(hash).filter(|_| fits).ok_or(Error::Credentials)
    }
}

pub(crate) fn user_from_found(rows: &[Row], id: UserId) -> Result<User> {
    let row = rows.first().ok_or_else(|| Error::not_found("user", id))?;
    if row.get::<_, Option<DateTime<Utc>>>("deleted_at").is_some() {
        return Err(Error::gone("user", id));
    }
    user_from(row)
}

fn user_from(row: &Row) -> Result<User> {
    let mut columns = Columns::of(row);
    Ok(User {
        user_id: UserId(columns.get("user_id")),
        user_name: columns.get("user_name"),
        first_name: columns.get("first_name"),
        last_name: columns.get("last_name"),
        email: columns.get("email"),
        bio: columns.get("bio"),
        ideology: columns.get("ideology"),
        profile_pic_url: columns.get("profile_pic_url"),
        role: word(columns.get("role"))?,
        is_active: columns.get("is_active"),
        has_password: columns.get("has_password"),
        metadata: columns.json("metadata")?,
        created_at: columns.get("created_at"),
        updated_at: columns.get("updated_at"),
        version: columns.get("version"),
    })
}

/// Whether an id was given up before it was registered.
fn is_buried(row: &Row) -> bool {
    !row.get::<_, bool>("was_registered")
}

/// A word of a closed list, which the schema has checked.
pub(crate) fn word<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::invalid("row", format!("`{text}` is a word that this program does not know")))
}

/// The row of a new user as JSON by column, and the names to take for it.
async fn checked(new: &NewUser, within: Duration) -> Result<(Value, Vec<Name>)> {
    let user_name = normalized_user_name(&new.user_name)?;
    let email = new.email.as_deref().map(normalized_email).transpose()?;
    check_person(&[("first_name", &new.first_name, 200), ("last_name", &new.last_name, 200)])?;
    check_person(&[("bio", &new.bio, 100_000), ("ideology", &new.ideology, 200)])?;
    check_person(&[("profile_pic_url", &new.profile_pic_url, 2_000)])?;
    let metadata = new.metadata.clone().unwrap_or_else(|| json!({}));
    check_object("metadata", &metadata)?;
    let password_hash = match &new.password {
        Some(password) => Some(hash_password(password.clone(), within).await?),
        None => None,
    };
    let mut names = vec![Name { kind: NameKind::UserName, value: user_name.clone() }];
    names.extend(email.iter().map(|value| Name { kind: NameKind::Email, value: value.clone() }));
    let row = json!({
        "user_name": user_name, "first_name": new.first_name, "last_name": new.last_name, "email": email,
        "password_hash": password_hash, "bio": new.bio, "ideology": new.ideology,
        "profile_pic_url": new.profile_pic_url, "metadata": metadata,
    });
    Ok((row, names))
}

fn check_person(fields: &[(&'static str, &Option<String>, usize)]) -> Result<()> {
    for (field, text, most) in fields {
        if let Some(text) = text {
            check_chars(field, text, 0, *most)?;
        }
    }
    Ok(())
}

fn checked_change(change: &UserChange) -> Result<Value> {
    let mut change = change.clone();
    if let Some(name) = &mut change.user_name {
        *name = normalized_user_name(name)?;
    }
    if let Some(Some(email)) = &mut change.email {
        *email = normalized_email(email)?;
    }
    let flat = |field: &Option<Option<String>>| field.clone().flatten();
    check_person(&[("first_name", &flat(&change.first_name), 200), ("last_name", &flat(&change.last_name), 200)])?;
    check_person(&[("bio", &flat(&change.bio), 100_000), ("ideology", &flat(&change.ideology), 200)])?;
    check_person(&[("profile_pic_url", &flat(&change.profile_pic_url), 2_000)])?;
    serde_json::to_value(&change).map_err(|e| Error::invalid("change", e.to_string()))
}
