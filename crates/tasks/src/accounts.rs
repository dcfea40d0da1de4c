//! AI accounts of a user, without their credentials. Writes table `user_ai_accounts`.

use crate::Tasks;
use crate::audit::audited;
use crate::check::{check_object, check_priority, check_text, word};
use chrono::{DateTime, Utc};
use community::{Actor, Community, Error, Result, words};
use placement::{AccountId, Group, UserId};
use serde::Serialize;
use serde_json::{Value, json};
use shards::{Read, Write};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

words! {
    /// Whose AI it is.
    Provider {
        /// OpenAI.
        ChatGpt = "chatgpt",
        /// Anthropic.
        Claude = "claude",
        /// Google.
        Gemini = "gemini",
        /// Perplexity.
        Perplexity = "perplexity",
        /// A model whose weights are public, wherever it runs.
        OpenSource = "open_source",
        /// Rules, no model.
        Deterministic = "deterministic",
    }
}

words! {
    /// How an account is used.
    AccountType {
        /// By the provider's interface for programs.
        Api = "api",
        /// By its web pages.
        WebAutomation = "web_automation",
        /// By a server on the same host.
        LocalModel = "local_model",
    }
}

words! {
    /// Whether an account can be used.
    AccountStatus {
        /// It can.
        Active = "active",
        /// Its credentials are too old.
        Expired = "expired",
        /// Not before its limits are reset.
        RateLimited = "rate_limited",
        /// The provider refuses its credentials.
        InvalidCredentials = "invalid_credentials",
        /// It is stopped for now.
        Suspended = "suspended",
        /// Not yet: nobody has tried it.
        Pending = "pending",
    }
}

/// An AI account, without secrets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Account {
    /// Its id, which carries its owner's bucket.
    pub account_id: AccountId,
    /// Whose it is.
    pub user_id: UserId,
    /// Whose AI it is.
    pub provider: Provider,
    /// How it is used.
    pub account_type: AccountType,
    /// What its owner calls it.
    pub label: String,
    /// Whether it has credentials.
    pub has_credentials: bool,
    /// Whether it can be used.
    pub status: AccountStatus,
    /// Whether its owner wants it before the others; at most one of a user's.
    pub is_default: bool,
    /// 1 (first) to 10.
    pub priority: i16,
    /// What it may be asked to do in which time.
    pub limits: Value,
    /// How many requests it has left, as far as is known.
    pub requests_remaining: Option<i32>,
    /// How many tokens it has left, as far as is known.
    pub tokens_remaining: Option<i64>,
    /// When its limits are reset.
    pub limits_reset_at: Option<DateTime<Utc>>,
    /// When it was last used.
    pub last_used_at: Option<DateTime<Utc>>,
    /// What its owner prefers.
    pub preferences: Value,
    /// When it was created.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

/// An AI account to be created.
#[derive(Debug, Clone)]
pub struct NewAccount {
    /// Chosen by the caller ([`AccountId::new`]), so that a retry is the same account; made when absent.
    pub account_id: Option<AccountId>,
    /// Whose it is.
    pub user_id: UserId,
    /// Whose AI it is.
    pub provider: Provider,
    /// How it is used.
    pub account_type: AccountType,
    /// 1 to 100 characters.
    pub label: String,
    /// Takes the mark from the account that has it.
    pub is_default: bool,
    /// 1 (first) to 10.
    pub priority: i16,
    /// What it may be asked to do in which time: an object.
    pub limits: Option<Value>,
    /// What its owner prefers: an object.
    pub preferences: Option<Value>,
}

impl NewAccount {
    /// An account of middle priority, not the default one.
    pub fn new(user_id: UserId, provider: Provider, account_type: AccountType, label: impl Into<String>) -> NewAccount {
        NewAccount {
            account_id: None,
            user_id,
            provider,
            account_type,
            label: label.into(),
            is_default: false,
            priority: 5,
            limits: None,
            preferences: None,
        }
    }
}

/// The longest label, in characters.
const LABEL_CHARS_MAX: usize = 100;

macro_rules! account_columns {
    () => {
        "a.account_id, a.user_id, a.provider, a.account_type, a.label, a.credentials IS NOT NULL AS has_credentials,
         a.status, a.is_default, a.priority, a.limits, a.requests_remaining, a.tokens_remaining, a.limits_reset_at,
         a.last_used_at, a.preferences, a.created_at, a.updated_at, a.version"
    };
}

/// The row if it is new, else the one that is there; `is_same`: whether that is what was asked for. An account that was removed,
/// which its owner's audit log says, is not made again by a retry that comes late.
///
/// The lock on the owner's row lets one statement at a time hand the default mark around. One that waited for it has an
/// older snapshot, and may leave two marks: then the constraint refuses it whole, and it is sent again.
static CREATE: Write = Write::of_owner(
    Group::Account,
    concat!(
        "owner AS (
             SELECT u.user_id FROM users AS u, fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL
                FOR NO KEY UPDATE OF u),
         wanted AS (
             SELECT o.user_id FROM owner AS o
              WHERE NOT EXISTS (SELECT FROM user_ai_accounts AS a
                                 WHERE a.bucket = $1 AND a.user_id = $2 AND a.account_id = $3)
                AND NOT EXISTS (SELECT FROM audit_log AS l
                                 WHERE l.bucket = $1 AND l.user_id = $2 AND l.action = 'remove account'
                                   AND l.target = 'account ' || $3::uuid)),
         unmarked AS (
             UPDATE user_ai_accounts AS a
                SET is_default = false, updated_at = now(), version = greatest(a.version + 1, fence.version_floor)
               FROM wanted AS w, fence
              WHERE a.bucket = $1 AND a.user_id = w.user_id AND a.is_default AND $7),
         created AS (
             INSERT INTO user_ai_accounts (bucket, user_id, account_id, provider, account_type, label, is_default,
                                           priority, limits, preferences, version)
             SELECT $1, w.user_id, $3, $4, $5, $6, $7, $8, $9, $10, fence.version_floor FROM wanted AS w, fence
             ON CONFLICT (bucket, user_id, account_id) DO NOTHING
             RETURNING *),
         change AS (
             SELECT c.bucket, c.user_id, 'account ' || c.account_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('provider', c.provider, 'account_type', c.account_type) AS after
               FROM created AS c),
         ",
        audited!("change", "$11"),
        ", result AS (
             SELECT true AS is_same, ",
        account_columns!(),
        " FROM created AS a
             UNION ALL
             SELECT (a.provider, a.account_type, a.label) = ($4, $5, $6), ",
        account_columns!(),
        " FROM user_ai_accounts AS a, fence WHERE a.bucket = $1 AND a.user_id = $2 AND a.account_id = $3)"
    ),
);

static GET: Read = Read::by_id(
    Group::Account,
    "user_id",
    concat!("SELECT ", account_columns!(), " FROM user_ai_accounts AS a WHERE a.bucket = $1 AND a.account_id = $2"),
);

/// In the order in which they are to be used.
static OF_USER: Read = Read::of_owner(
    Group::Account,
    concat!(
        "SELECT ",
        account_columns!(),
        " FROM user_ai_accounts AS a
          WHERE a.bucket = $1 AND a.user_id = $2
          ORDER BY a.is_default DESC, a.priority, a.account_id LIMIT 1000"
    ),
);

/// Hands the mark over. `accounts` locks them and holds what they are now, also when the snapshot is older: what it does
/// not show is an account that was just created as the default one, and for that see [`CREATE`].
static SET_DEFAULT: Write = Write::of_owner(
    Group::Account,
    concat!(
        "owner AS (
             SELECT u.user_id FROM users AS u, fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL
                FOR NO KEY UPDATE OF u),
         accounts AS (
             SELECT a.account_id, a.is_default
               FROM owner AS o JOIN user_ai_accounts AS a ON a.bucket = $1 AND a.user_id = o.user_id
                FOR UPDATE OF a),
         changed AS (
             UPDATE user_ai_accounts AS a
                SET is_default = (a.account_id = $3), updated_at = now(),
                    version = greatest(a.version + 1, fence.version_floor)
               FROM accounts AS l, fence
              WHERE a.bucket = $1 AND a.user_id = $2 AND a.account_id = l.account_id
                AND (l.is_default OR l.account_id = $3)
                AND EXISTS (SELECT FROM accounts AS wanted WHERE wanted.account_id = $3)
             RETURNING a.*),
         change AS (
             SELECT c.bucket, c.user_id, 'account ' || c.account_id AS target, '{\"is_default\": false}'::jsonb AS before,
                    '{\"is_default\": true}'::jsonb AS after
               FROM changed AS c JOIN accounts AS l ON l.account_id = c.account_id
              WHERE c.account_id = $3 AND NOT l.is_default),
         ",
        audited!("change", "$4"),
        ", result AS (SELECT ",
        account_columns!(),
        " FROM changed AS a WHERE a.account_id = $3)"
    ),
);

static IS_REMOVED: Read = Read::of_owner(
    Group::Account,
    "SELECT l.audit_id FROM audit_log AS l
      WHERE l.bucket = $1 AND l.user_id = $2 AND l.action = 'remove account' AND l.target = 'account ' || $3::uuid
      LIMIT 1",
)
.long();

/// `$3` is never null: a removal is always noted, and [`CREATE`] looks for that by action and target.
static REMOVE: Write = Write::by_id(
    Group::Account,
    concat!(
        "removed AS (
             DELETE FROM user_ai_accounts AS a USING fence
              WHERE a.bucket = $1 AND a.account_id = $2 AND therev.may_write(fence.here, a.bucket, a.user_id)
             RETURNING a.bucket, a.user_id, a.account_id, a.provider, a.account_type),
         change AS (
             SELECT r.bucket, r.user_id, 'account ' || r.account_id AS target,
                    jsonb_build_object('provider', r.provider, 'account_type', r.account_type) AS before,
                    '{}'::jsonb AS after
               FROM removed AS r),
         ",
        audited!("change", "$3"),
        ", result AS (SELECT r.account_id FROM removed AS r)"
    ),
);

/// What a removal is noted as.
const REMOVAL: &str = "remove account";

community::fenced_list! { CREATE GET OF_USER SET_DEFAULT IS_REMOVED REMOVE }

impl Tasks {
    /// Creates an AI account without credentials: pending until it has been tried. The same id with the same provider,
    /// type and label again is the same account, as it is now; one that was removed meanwhile is gone. Audited.
    pub async fn create_account(&self, new: NewAccount, actor: &Actor) -> Result<Account> {
        check_text("label", &new.label, LABEL_CHARS_MAX)?;
        check_priority(new.priority)?;
        let limits = new.limits.unwrap_or_else(|| json!({}));
        check_object("limits", &limits)?;
        let preferences = new.preferences.unwrap_or_else(|| json!({}));
        check_object("preferences", &preferences)?;
        let id = new.account_id.unwrap_or_else(|| AccountId::new(new.user_id));
        Community::check_id(id.0, new.user_id)?;
        let (provider, account_type) = (new.provider.name(), new.account_type.name());
        let note = actor.note("create account");
        let params: [&(dyn ToSql + Sync); 10] = [
            &new.user_id.0,
            &id.0,
            &provider,
            &account_type,
            &new.label,
            &new.is_default,
            &new.priority,
            &limits,
            &preferences,
            &note,
        ];
        let Some(row) = self.write_again(&CREATE, new.user_id.bucket(), &params).await? else {
            let shards = self.community.shards();
            let removed = shards.read(&IS_REMOVED, new.user_id.bucket(), &[&new.user_id.0, &id.0]).await?;
            let gone = || Error::Gone { what: "account", id: id.to_string() };
            return Err(if removed.is_empty() { self.no_owner(new.user_id).await } else { gone() });
        };
        if row.get("is_same") { account_from(&row) } else { Err(Error::Conflict { what: "id", value: id.to_string() }) }
    }

    /// An AI account.
    pub async fn account(&self, id: AccountId) -> Result<Account> {
        let bucket = self.community.route("account", id.0).await?;
        let rows = self.community.shards().read(&GET, bucket, &[&id.0]).await?;
        account_from(rows.first().ok_or_else(|| no_account(id))?)
    }

    /// A user's AI accounts in the order in which they are to be used: the default one, then by priority; 1,000 at most.
    pub async fn accounts(&self, user: UserId) -> Result<Vec<Account>> {
        let rows = self.community.shards().read(&OF_USER, user.bucket(), &[&user.0]).await?;
        rows.iter().map(account_from).collect()
    }

    /// Makes one of a user's AI accounts the default one, and no other. Audited.
    pub async fn set_default_account(&self, user: UserId, id: AccountId, actor: &Actor) -> Result<Account> {
        let note = actor.note("set default account");
        let row = self.write_again(&SET_DEFAULT, user.bucket(), &[&user.0, &id.0, &note]).await?;
        account_from(&row.ok_or_else(|| no_account(id))?)
    }

    /// Removes an AI account. What its tasks say of it stays.
    pub async fn remove_account(&self, id: AccountId, actor: &Actor) -> Result<()> {
        let bucket = self.community.route("account", id.0).await?;
        let note = actor.note(REMOVAL);
        let rows = self.community.shards().write(&REMOVE, bucket, &[&id.0, &note]).await?;
        if rows.is_empty() { Err(no_account(id)) } else { Ok(()) }
    }
}

fn no_account(id: AccountId) -> Error {
    Error::NotFound { what: "account", id: id.to_string() }
}

fn account_from(row: &Row) -> Result<Account> {
    Ok(Account {
        account_id: AccountId(row.get("account_id")),
        user_id: UserId(row.get("user_id")),
        provider: word(row.get("provider"))?,
        account_type: word(row.get("account_type"))?,
        label: row.get("label"),
        has_credentials: row.get("has_credentials"),
        status: word(row.get("status"))?,
        is_default: row.get("is_default"),
        priority: row.get("priority"),
        limits: row.get("limits"),
        requests_remaining: row.get("requests_remaining"),
        tokens_remaining: row.get("tokens_remaining"),
        limits_reset_at: row.get("limits_reset_at"),
        last_used_at: row.get("last_used_at"),
        preferences: row.get("preferences"),
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
        version: row.get("version"),
    })
}
