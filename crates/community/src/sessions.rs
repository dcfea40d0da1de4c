//! Sessions: log in, verify, list, revoke. Writes table `user_sessions`.
//!
//! A token is the id of its session and 32 random bytes, as text. The id carries its owner's bucket, so that a token
//! routes without a look-up; of the token itself only the SHA-256 is kept.

use crate::audit::{Actor, audited};
use crate::community::Community;
use crate::error::{Error, Result};
use crate::text::check_object;
use crate::users::word;
use crate::words;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use placement::{Group, SessionId, UserId, bucket_in};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shards::{Read, Write};
use std::net::IpAddr;
use std::time::Duration;
use tokio_postgres::Row;
use uuid::Uuid;

words! {
    /// Whether a session can be used.
    SessionStatus {
        /// It can.
        Active = "active",
        /// Its time is over.
        Expired = "expired",
        /// It was ended.
        Revoked = "revoked",
        /// It is stopped for now.
        Suspended = "suspended",
    }
}

/// A session of a user, without its token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Session {
    /// Its id, which carries its owner's bucket.
    pub session_id: SessionId,
    /// Whose it is.
    pub user_id: UserId,
    /// What the device said of itself.
    pub device_info: Value,
    /// Where it was opened from.
    pub ip_address: Option<IpAddr>,
    /// Whether it can be used; one whose time is over is expired, whoever noticed it.
    pub status: SessionStatus,
    /// When its time is over.
    pub expires_at: DateTime<Utc>,
    /// When it was last used, to the minute.
    pub last_seen_at: DateTime<Utc>,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

/// What is known of a session that is to be opened.
#[derive(Debug, Clone, Default)]
pub struct NewSession {
    /// Made by the caller ([`NewSession::token_for`]), so that a retry is the same session; made when absent.
    pub token: Option<SecretString>,
    /// What the device says of itself: an object of at most 16 KiB.
    pub device_info: Option<Value>,
    /// Where the request came from.
    pub ip_address: Option<IpAddr>,
}

impl NewSession {
    /// A token for one new session of this user: it carries the session's id.
    pub fn token_for(user: UserId) -> SecretString {
        issue(SessionId::new(user)).0
    }
}

/// A session that was just opened, and the only copy of its token.
#[derive(Debug, Clone)]
pub struct OpenSession {
    /// The session.
    pub session: Session,
    /// What its owner shows from now on.
    pub token: SecretString,
}

/// The longest description of a device, in bytes of JSON.
const DEVICE_BYTES_MAX: usize = 16_384;
/// The longest life of a session: what the clock of the database can add in any case.
const LIFETIME_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
/// The most sessions in a list.
const LISTED_MAX: i64 = 1_000;

const ID_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;
const TOKEN_BYTES: usize = ID_BYTES + SECRET_BYTES;

/// What is kept of a token.
type TokenHash = [u8; 32];

macro_rules! session_columns {
    () => {
        "s.session_id, s.user_id, s.device_info, host(s.ip_address) AS ip_address,
         CASE WHEN s.status = 'active' AND s.expires_at <= now() THEN 'expired' ELSE s.status END AS status,
         s.expires_at, s.last_seen_at, s.created_at, s.version"
    };
}

/// The lock on the owner's row makes a deletion, a deactivation or a change of the password that is under way be waited for, and
/// seen. `$8` is the hash that a password was found to fit, null where none was asked for: whoever knows only the password before
/// the last one opens no session after the others have been ended.
static OPEN: Write = Write::of_owner(
    Group::Account,
    concat!(
        "owner AS (
             SELECT u.user_id FROM users AS u, fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL AND u.is_active
                AND ($8::text IS NULL OR u.password_hash = $8::text)
                FOR SHARE OF u),
         created AS (
             INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, device_info, ip_address, expires_at,
                                        version)
             SELECT $1, o.user_id, $3, $4, $5, $6::text::inet, now() + make_interval(secs => $7), fence.version_floor
               FROM owner AS o, fence
             ON CONFLICT (bucket, user_id, session_id) DO NOTHING
             RETURNING *),
         result AS (
             SELECT true AS is_same, ",
        session_columns!(),
        " FROM created AS s
             UNION ALL
             SELECT s.token_hash = $4, ",
        session_columns!(),
        " FROM user_sessions AS s, fence WHERE s.bucket = $1 AND s.user_id = $2 AND s.session_id = $3)"
    ),
);

static VERIFY: Read = Read::by_id(
    Group::Account,
    "user_id",
    concat!(
        "SELECT s.token_hash, u.is_active AND u.deleted_at IS NULL AS has_user,
                s.last_seen_at <= now() - interval '1 minute' AS is_unseen, ",
        session_columns!(),
        " FROM user_sessions AS s JOIN users AS u ON u.bucket = s.bucket AND u.user_id = s.user_id
         WHERE s.bucket = $1 AND s.session_id = $2"
    ),
);

/// At most once a minute, whoever else just did it or is about to: nobody waits for it.
static TOUCH: Write = Write::by_id(
    Group::Account,
    "unseen AS (
         SELECT s.user_id FROM user_sessions AS s, fence
          WHERE s.bucket = $1 AND s.session_id = $2 AND s.status = 'active'
            AND s.last_seen_at <= now() - interval '1 minute'
            AND therev.may_write(fence.here, s.bucket, s.user_id)
            FOR NO KEY UPDATE OF s SKIP LOCKED),
     touched AS (
         UPDATE user_sessions AS s
            SET last_seen_at = now(), updated_at = now(), version = greatest(s.version + 1, fence.version_floor)
           FROM fence, unseen AS u
          WHERE s.bucket = $1 AND s.user_id = u.user_id AND s.session_id = $2
         RETURNING s.last_seen_at, s.version),
     result AS (SELECT t.last_seen_at, t.version FROM touched AS t)",
);

/// `$4` is the user who does it, null for an operator: ending one's own session is not audited. `result` holds the
/// session whether it was ended now or before.
static REVOKE: Write = Write::by_id(
    Group::Account,
    concat!(
        "old AS (
             SELECT s.* FROM user_sessions AS s, fence
              WHERE s.bucket = $1 AND s.session_id = $2 AND therev.may_write(fence.here, s.bucket, s.user_id)
                FOR UPDATE OF s),
         revoked AS (
             UPDATE user_sessions AS s
                SET status = 'revoked', updated_at = now(), version = greatest(s.version + 1, fence.version_floor)
               FROM fence, old AS o
              WHERE s.bucket = $1 AND s.user_id = o.user_id AND s.session_id = o.session_id
                AND o.status IN ('active', 'suspended')
             RETURNING s.bucket, s.user_id, s.session_id),
         change AS (
             SELECT r.bucket, r.user_id, 'session ' || r.session_id AS target,
                    jsonb_build_object('status', o.status) AS before, '{\"status\": \"revoked\"}'::jsonb AS after
               FROM revoked AS r, old AS o
              WHERE r.user_id IS DISTINCT FROM $4::uuid),
         ",
        audited!("change", "$3"),
        ", result AS (SELECT o.session_id FROM old AS o)"
    ),
);

/// Every session of `$2` that can still be used, but `$3`: one audit entry for all of them.
static REVOKE_OTHERS: Write = Write::of_owner(
    Group::Account,
    concat!(
        "revoked AS (
             UPDATE user_sessions AS s
                SET status = 'revoked', updated_at = now(), version = greatest(s.version + 1, fence.version_floor)
               FROM fence
              WHERE s.bucket = $1 AND s.user_id = $2 AND s.session_id <> $3
                AND s.status IN ('active', 'suspended') AND s.expires_at > now()
             RETURNING s.bucket, s.user_id),
         change AS (
             SELECT r.bucket, r.user_id, 'user ' || r.user_id AS target, '{}'::jsonb AS before,
                    jsonb_build_object('sessions_revoked', count(*)) AS after
               FROM revoked AS r
              WHERE r.user_id IS DISTINCT FROM $5::uuid
              GROUP BY r.bucket, r.user_id),
         ",
        audited!("change", "$4"),
        ", result AS (SELECT count(*) AS revoked FROM revoked AS r)"
    ),
);

/// Newest first, for ids sort by time; of more than are shown those that can still be used.
static OF_USER: Read = Read::of_owner(
    Group::Account,
    concat!(
        "SELECT ",
        session_columns!(),
        " FROM (SELECT s.* FROM user_sessions AS s
                 WHERE s.bucket = $1 AND s.user_id = $2
                 ORDER BY s.status IN ('active', 'suspended') AND s.expires_at > now() DESC, s.session_id DESC
                 LIMIT $3) AS s
          ORDER BY s.session_id DESC"
    ),
);

crate::fenced_list! { OPEN VERIFY TOUCH REVOKE REVOKE_OTHERS OF_USER }

impl Community {
    /// Opens a session for whoever knows the password of a user.
    ///
    /// Whether the name, the password or the state of the user stood in the way, is not said. A password that was changed meanwhile
    /// is a wrong one. A name that is not found while the shard of its claim is down is answered with that: somebody may have it.
    pub async fn log_in(&self, user_name: &str, password: &SecretString, new: NewSession) -> Result<OpenSession> {
        let (user, password_hash) = self.authenticate(user_name, password).await?;
        self.open(user, Some(&password_hash), new).await.map_err(|error| match error {
            Error::NotFound { .. } | Error::Gone { .. } | Error::State { .. } => Error::Credentials,
            other => other,
        })
    }

    /// Opens a session for a user who was recognized by other means. The user must be active. With the token of a session
    /// that is there the session is that one, as it is now.
    pub async fn open_session(&self, user: UserId, new: NewSession) -> Result<OpenSession> {
        self.open(user, None, new).await
    }

    /// Opens a session, if the user still has this hash of a password.
    async fn open(&self, user: UserId, password_hash: Option<&str>, new: NewSession) -> Result<OpenSession> {
        let device_info = new.device_info.unwrap_or_else(|| json!({}));
        check_object("device_info", &device_info)?;
        if device_info.to_string().len() > DEVICE_BYTES_MAX {
            return Err(Error::invalid("device_info", format!("more than {DEVICE_BYTES_MAX} bytes of JSON")));
        }
        let ip_address = new.ip_address.map(|address| address.to_string());
        let lifetime = Duration::from_secs(self.shards().config().session_s).min(LIFETIME_MAX).as_secs_f64();
        let token = new.token.unwrap_or_else(|| NewSession::token_for(user));
        let read = read_token(token.expose_secret());
        let (id, hash) = read.ok_or_else(|| Error::invalid("token", "it is none of a session"))?;
        Community::check_id(id.0, user)?;
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
            [&user.0, &id.0, &hash.as_slice(), &device_info, &ip_address, &lifetime, &password_hash];
        let row = match self.create_once(&OPEN, user.bucket(), &params, "session", id.0).await {
            Ok(row) => row,
            // Nothing was written: the user says why.
            Err(Error::Changed { .. }) => {
                let state = if self.user(user).await?.is_active { "just being changed" } else { "inactive" };
                return Err(Error::State { what: "user", id: user.to_string(), state: state.to_owned() });
            }
            Err(error) => return Err(error),
        };
        if row.get("is_same") {
            Ok(OpenSession { session: session_from(&row)?, token })
        } else {
            Err(Error::Conflict { what: "id", value: id.to_string() })
        }
    }

    /// The session that a token stands for. Notes that it was seen, at most once a minute.
    ///
    /// What is wrong with a token that is not accepted, is not said.
    pub async fn verify_session(&self, token: &str) -> Result<Session> {
        let (id, hash) = read_token(token).ok_or(Error::Credentials)?;
        let bucket = bucket_in(id.0).ok_or(Error::Credentials)?;
        let rows = self.shards().read(&VERIFY, bucket, &[&id.0]).await?;
        let row = rows.first().ok_or(Error::Credentials)?;
        let mut session = session_from(row)?;
        let fits = same(row.get("token_hash"), &hash);
        if !fits || session.status != SessionStatus::Active || !row.get::<_, bool>("has_user") {
            return Err(Error::Credentials);
        }
        if row.get("is_unseen") {
            self.touch(&mut session).await;
        }
        Ok(session)
    }

    /// Notes that a session was seen. A shard that does not write just now costs the caller a bounded wait, and the node a few
    /// connections: the next call notes it.
    async fn touch(&self, session: &mut Session) {
        let Ok(turn) = self.inner.touches.clone().try_acquire_owned() else { return };
        let wait = Duration::from_millis(self.shards().config().delivery_ms);
        let (shards, bucket, id) = (self.shards().clone(), session.user_id.bucket(), session.session_id.0);
        // It goes on by itself: given up, it would cost its connection.
        let write = tokio::spawn(async move {
            let _turn = turn;
            shards.write(&TOUCH, bucket, &[&id]).await
        });
        match tokio::time::timeout(wait, write).await {
            Ok(Ok(Ok(rows))) => {
                if let Some(row) = rows.first() {
                    session.last_seen_at = row.get("last_seen_at");
                    session.version = row.get("version");
                }
            }
            Ok(Ok(Err(error))) => tracing::debug!(%error, "a session's last use could not be noted"),
            Ok(Err(_)) | Err(_) => tracing::debug!("a session's last use was not noted in time"),
        }
    }

    /// Ends a session; one that has ended stays so. Ending somebody else's is audited.
    pub async fn revoke_session(&self, id: SessionId, actor: &Actor) -> Result<()> {
        let bucket = self.route("session", id.0).await?;
        let note = actor.note("revoke session");
        let rows = self.shards().write(&REVOKE, bucket, &[&id.0, &note, &acting_user(actor)]).await?;
        if rows.is_empty() { Err(Error::not_found("session", id)) } else { Ok(()) }
    }

    /// Ends all sessions of a user but one; says how many. Ending somebody else's is audited.
    pub async fn revoke_other_sessions(&self, user: UserId, keep: SessionId, actor: &Actor) -> Result<u64> {
        let note = actor.note("revoke other sessions");
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&user.0, &keep.0, &note, &acting_user(actor)];
        let rows = self.shards().write(&REVOKE_OTHERS, user.bucket(), &params).await?;
        let count = rows.first().map_or(0, |row| row.get::<_, i64>("revoked"));
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// A user's sessions, opened last first, ended ones included, which maintenance removes after a month; 1,000 at most.
    pub async fn sessions(&self, user: UserId) -> Result<Vec<Session>> {
        let rows = self.shards().read(&OF_USER, user.bucket(), &[&user.0, &LISTED_MAX]).await?;
        rows.iter().map(session_from).collect()
    }
}

fn session_from(row: &Row) -> Result<Session> {
    let ip_address: Option<&str> = row.get("ip_address");
    Ok(Session {
        session_id: SessionId(row.get("session_id")),
        user_id: UserId(row.get("user_id")),
        device_info: row.get("device_info"),
        ip_address: ip_address.map(word).transpose()?,
        status: word(row.get("status"))?,
        expires_at: row.get("expires_at"),
        last_seen_at: row.get("last_seen_at"),
        created_at: row.get("created_at"),
        version: row.get("version"),
    })
}

fn acting_user(actor: &Actor) -> Option<Uuid> {
    match actor {
        Actor::User(id) => Some(id.0),
        Actor::Operator(_) => None,
    }
}

/// A new token of a session, and what is kept of it.
fn issue(id: SessionId) -> (SecretString, TokenHash) {
    let mut bytes = [0; TOKEN_BYTES];
    bytes[..ID_BYTES].copy_from_slice(id.0.as_bytes());
    bytes[ID_BYTES..].copy_from_slice(&rand::random::<[u8; SECRET_BYTES]>());
    (SecretString::from(URL_SAFE_NO_PAD.encode(bytes)), Sha256::digest(bytes).into())
}

/// The session that a token names, and the hash that it must have; `None` for what is no token.
fn read_token(text: &str) -> Option<(SessionId, TokenHash)> {
    let mut bytes = [0; TOKEN_BYTES];
    // The decoder takes one spelling of the bytes only, and refuses what does not fit; what is shorter is no token.
    if URL_SAFE_NO_PAD.decode_slice(text, &mut bytes).ok()? != TOKEN_BYTES {
        return None;
    }
    let mut id = [0; ID_BYTES];
    id.copy_from_slice(&bytes[..ID_BYTES]);
    Some((SessionId(Uuid::from_bytes(id)), Sha256::digest(bytes).into()))
}

/// Compares in a time that does not tell where the difference is.
fn same(kept: &[u8], shown: &TokenHash) -> bool {
    let difference = kept.iter().zip(shown).fold(0_u8, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    kept.len() == shown.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_names_its_session_and_owner() {
        let user = UserId::new();
        let id = SessionId::new(user);
        let (token, hash) = issue(id);
        assert_eq!(token.expose_secret().len(), 64);
        let (named, shown) = read_token(token.expose_secret()).unwrap();
        assert_eq!(named, id);
        assert_eq!(bucket_in(named.0), Some(user.bucket()));
        assert!(same(&hash, &shown));
        assert_ne!(token.expose_secret(), issue(id).0.expose_secret());
    }

    #[test]
    fn any_other_token_has_another_hash() {
        let (token, hash) = issue(SessionId::new(UserId::new()));
        for at in 0..token.expose_secret().len() {
            let mut bytes = token.expose_secret().as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let (_, shown) = read_token(std::str::from_utf8(&bytes).unwrap()).unwrap();
            assert!(!same(&hash, &shown), "position {at}");
        }
    }

    #[test]
    fn what_is_no_token_is_none_and_never_a_panic() {
        let (token, _) = issue(SessionId::new(UserId::new()));
        let token = token.expose_secret();
        for end in 0..token.len() {
            assert_eq!(read_token(&token[..end]), None);
        }
        for wrong in ["", "=", "é", "\0", &format!("{token}A"), &format!("{token}="), &format!(" {token}")] {
            assert_eq!(read_token(wrong), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let text = String::from_utf8_lossy(&bytes);
            prop_assert!(read_token(&text).is_none() || text.len() == 64);
        }

        #[test]
        fn any_letters_of_a_token_are_one_only_at_its_length(text in "[A-Za-z0-9_-]{0,130}") {
            prop_assert_eq!(read_token(&text).is_some(), text.len() == 64);
        }

        #[test]
        fn any_48_bytes_name_a_session_and_no_two_have_one_hash(a: [u8; 16], b: [u8; 32], c: [u8; 32]) {
            let token = |secret: [u8; 32]| URL_SAFE_NO_PAD.encode([a.as_slice(), secret.as_slice()].concat());
            let ((id, first), (_, second)) = (read_token(&token(b)).unwrap(), read_token(&token(c)).unwrap());
            prop_assert_eq!(id.0.into_bytes(), a);
            prop_assert_eq!(same(&first, &second), b == c);
        }
    }

    #[test]
    fn hashes_of_another_length_never_fit() {
        assert!(!same(&[], &[0; 32]));
        assert!(!same(&[0; 31], &[0; 32]));
        assert!(same(&[7; 32], &[7; 32]));
    }
}
