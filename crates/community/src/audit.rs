//! Who changed what of whom.

use crate::community::Community;
use crate::error::Result;
use crate::text::bounded;
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use placement::{Group, ShardNo, UserId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shards::{Read, Unfenced, WriteMany};
use std::fmt;
use uuid::Uuid;

/// Who does something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actor {
    /// A user of the community.
    User(UserId),
    /// Somebody at the command line.
    Operator(String),
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::User(id) => write!(f, "user {id}"),
            Actor::Operator(name) => write!(f, "operator {name}"),
        }
    }
}

impl Actor {
    fn is(&self, user: UserId) -> bool {
        *self == Actor::User(user)
    }

    /// What the `noted` CTE of a statement takes: an entry's id, actor and action.
    #[doc(hidden)]
    pub fn note(&self, action: &str) -> Value {
        json!({ "audit_id": Uuid::new_v4(), "actor": self.to_string(), "action": action })
    }

    /// The same for somebody else's content; what an owner does with its own is not audited.
    pub(crate) fn note_unless(&self, owner: UserId, action: &str) -> Option<Value> {
        if self.is(owner) { None } else { Some(self.note(action)) }
    }
}

/// One line of the audit log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditEntry {
    /// When.
    pub created_at: DateTime<Utc>,
    /// Who did it.
    pub actor: String,
    /// What was done.
    pub action: String,
    /// To what.
    pub target: String,
    /// What was there before, without secrets.
    pub before: Value,
    /// What is there now.
    pub after: Value,
}

/// Lines of the audit log.
#[derive(Debug, Clone, Serialize)]
pub struct AuditList {
    /// The entries, newest first.
    pub entries: Vec<AuditEntry>,
    /// Shards that gave no answer: what was noted there is missing here.
    pub missing: Vec<ShardNo>,
    /// Whether anything is missing.
    pub partial: bool,
}

/// The CTEs that leave an audit entry in the transaction of a statement.
///
/// `$change` names a CTE with `bucket, user_id, target, before, after`, of one row or none; `$note` is the parameter
/// with [`Actor::note`], null for no entry. Where this shard does not own the user's account (split layout), the
/// outbox takes the entry there.
macro_rules! audited {
    ($change:literal, $note:literal) => {
        concat!(
            "noted AS (
                 SELECT c.bucket, c.user_id, c.target, c.before, c.after, now() AS created_at,
                        n.audit_id, n.actor, n.action
                   FROM ", $change, " AS c,
                        jsonb_to_record(", $note, "::jsonb) AS n (audit_id uuid, actor text, action text)
                  WHERE n.audit_id IS NOT NULL),
             audited AS (
                 INSERT INTO audit_log (bucket, user_id, created_at, audit_id, actor, action, target, before, after)
                 SELECT n.bucket, n.user_id, n.created_at, n.audit_id, n.actor, n.action, n.target, n.before, n.after
                   FROM noted AS n
                   JOIN therev.fence AS f
                     ON f.colocation_group = 'account' AND therev.may_write(f, n.bucket, n.user_id)
                 RETURNING audit_id),
             audit_sent AS (
                 INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
                 SELECT 'content', n.bucket, 'audit', jsonb_build_array(to_jsonb(n))
                   FROM noted AS n
                  WHERE NOT EXISTS (SELECT FROM audited))"
        )
    };
}
pub(crate) use audited;

/// Entries that came by outbox, once each.
pub(crate) static RECEIVE: WriteMany = WriteMany::new(
    Group::Account,
    "received AS (
         INSERT INTO audit_log (bucket, user_id, created_at, audit_id, actor, action, target, before, after)
         SELECT o.bucket, e.user_id, e.created_at, e.audit_id, e.actor, e.action, e.target, e.before, e.after
           FROM owned AS o,
                jsonb_to_record(o.item) AS e (user_id uuid, created_at timestamptz, audit_id uuid, actor text,
                                              action text, target text, before jsonb, after jsonb)
         ON CONFLICT DO NOTHING
         RETURNING audit_id),
     result AS (SELECT r.audit_id FROM received AS r)",
);

static OF_USER: Read = Read::of_owner(
    Group::Account,
    "SELECT a.created_at, a.actor, a.action, a.target, a.before, a.after
       FROM audit_log AS a
      WHERE a.bucket = $1 AND a.user_id = $2
      ORDER BY a.created_at DESC LIMIT $3",
);

static OF_SHARD: Unfenced = Unfenced::read(
    "SELECT a.created_at, a.actor, a.action, a.target, a.before, a.after
       FROM audit_log AS a
       JOIN therev.fence AS f ON f.colocation_group = 'account' AND therev.may_read(f, a.bucket, a.user_id)
      ORDER BY a.created_at DESC LIMIT $1",
);

static OF_OPERATORS: Unfenced = Unfenced::read(
    "SELECT o.created_at, o.actor, o.action, o.target, o.before, o.after
       FROM therev.operator_log AS o
      ORDER BY o.created_at DESC LIMIT $1",
);

static NOTE_OPERATOR: Unfenced = Unfenced::write(
    "INSERT INTO therev.operator_log (actor, action, target, before, after) VALUES ($1, $2, $3, $4, $5)",
);

crate::fenced_list! { RECEIVE OF_USER }

impl Community {
    /// The newest entries, 1,000 at most: of one user's account and content, or of everybody and the operators. A shard that
    /// is down leaves the list of everybody marked `partial`; of one user it is the error.
    pub async fn audit(&self, of: Option<UserId>, limit: i64) -> Result<AuditList> {
        let most = bounded(limit)?;
        let limit = i64::try_from(most).unwrap_or(i64::MAX);
        let (mut rows, mut missing) = (Vec::new(), Vec::new());
        if let Some(user) = of {
            rows.extend(self.shards().read(&OF_USER, user.bucket(), &[&user.0, &limit]).await?);
        } else {
            let ask = async |shard| (shard, self.shards().unfenced(shard, &OF_SHARD, &[&limit]).await);
            for (shard, found) in join_all(self.shards().numbers().into_iter().map(ask)).await {
                match found {
                    Ok(found) => rows.extend(found),
                    Err(error) => {
                        tracing::warn!(%shard, %error, "the entries of a shard are missing");
                        missing.push(shard);
                    }
                }
            }
            rows.extend(self.shards().control(&OF_OPERATORS, &[&limit]).await?);
        }
        let mut entries: Vec<AuditEntry> = rows
            .iter()
            .map(|row| AuditEntry {
                created_at: row.get("created_at"),
                actor: row.get("actor"),
                action: row.get("action"),
                target: row.get("target"),
                before: row.get("before"),
                after: row.get("after"),
            })
            .collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.created_at));
        entries.truncate(most);
        Ok(AuditList { entries, partial: !missing.is_empty(), missing })
    }

    /// Leaves an operator's command in the control database.
    pub async fn note_operator(&self, actor: &Actor, action: &str, target: &str, after: Value) -> Result<()> {
        let nothing = json!({});
        self.shards().control(&NOTE_OPERATOR, &[&actor.to_string(), &action, &target, &nothing, &after]).await?;
        Ok(())
    }
}
