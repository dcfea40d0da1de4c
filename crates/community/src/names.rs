//! Names that are unique across shards: user names and e-mail addresses, as claims.
//!
//! A claim is a row sharded by the hash of the normalized value. It is taken first (`pending`), then the user's row is
//! written, then the claim is confirmed (`held`) by the user's outbox. A claim whose user's write never came is settled
//! by a *write* that the slow writer would conflict with; asking alone would prove nothing.
//!
//! A bulk write holds at once what it takes, which saves writing each claim twice. With the names it leaves an event, which
//! it marks once the users' rows are written; a relay that finds it makes the names pending whose users have not come.

use crate::community::Community;
use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use placement::{Bucket, Group, ShardNo, UserId, bucket_of};
use serde::Serialize;
use sha2::{Digest, Sha256};
use shards::{Item, Read, ReadMany, Unfenced, Write, WriteMany};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio_postgres::Row;
use unicode_normalization::UnicodeNormalization;
use uuid::Uuid;

/// What a claim is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NameKind {
    UserName,
    Email,
}

impl NameKind {
    pub(crate) const ALL: [NameKind; 2] = [NameKind::UserName, NameKind::Email];

    pub(crate) fn sql(self) -> &'static str {
        match self {
            NameKind::UserName => "user_name",
            NameKind::Email => "email",
        }
    }

    fn words(self) -> &'static str {
        match self {
            NameKind::UserName => "user name",
            NameKind::Email => "e-mail address",
        }
    }
}

/// One name as it is claimed: its value is normalized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) kind: NameKind,
    pub(crate) value: String,
}

impl Name {
    /// The first 16 bytes of SHA-256 over kind and value; `therev.claim_key` in SQL.
    pub(crate) fn key(&self) -> Uuid {
        let digest = Sha256::digest(format!("{}:{}", self.kind.sql(), self.value));
        let mut key = [0; 16];
        key.copy_from_slice(&digest[..16]);
        Uuid::from_bytes(key)
    }

    pub(crate) fn bucket(&self) -> Bucket {
        bucket_of(self.key())
    }

    /// What [`CONFIRM`] is told of it: that a user's row of this version has it, or has it no more.
    pub(crate) fn told(&self, user: UserId, version: i64, held: bool) -> Item {
        let value = serde_json::json!({
            "claim_key": self.key(), "user_id": user.0, "held": held, "version": version
        });
        Item { whose: self.bucket().into(), value }
    }

    pub(crate) fn taken(&self) -> Error {
        Error::Conflict { what: self.kind.words(), value: self.value.clone() }
    }
}

/// A name that a call has taken, new.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) name: Name,
    /// The transaction that wrote the claim. Whoever takes the name after it, for the same user, leaves another one there.
    by: String,
}

/// A user name as it is kept and compared: one spelling (NFKC), lower case; letters and digits of any script, `_`, `-`
/// and `.` between them, 1 to 40 characters.
pub fn normalized_user_name(text: &str) -> Result<String> {
    let name: String = text.trim().nfkc().collect::<String>().to_lowercase().nfkc().collect();
    let length = name.chars().count();
    let inner = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    let ends = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    if length == 0 || length > 40 {
        return Err(Error::invalid("user_name", format!("it has {length} characters, 1 to 40 are allowed")));
    }
    if !name.chars().all(inner) || !ends(name.chars().next()) || !ends(name.chars().next_back()) {
        let rule = "letters and digits, with _ - . between them, are allowed";
        return Err(Error::invalid("user_name", rule));
    }
    Ok(name)
}

/// An e-mail address as it is kept and compared: trimmed, lower case. Whether it exists, only a message can tell.
pub(crate) fn normalized_email(text: &str) -> Result<String> {
    let email = text.trim().to_lowercase();
    let plain = !email.chars().any(|c| c.is_whitespace() || c.is_control());
    let parts = email.split_once('@').is_some_and(|(local, host)| !local.is_empty() && host.len() > 1);
    if plain && parts && email.chars().count() <= 254 {
        Ok(email)
    } else {
        Err(Error::invalid("email", "it is no e-mail address"))
    }
}

/// A claim that the same user had taken for an older version becomes pending for this one, and as young: it may be held although
/// the user has given the name up, in an event that is still on its way and does not reach the new version. Should the write that
/// it is taken for not come, it is settled as any other; and where the user does have the name, settling holds it again.
static TAKE: Write = Write::new(
    Group::Account,
    "taken AS (
         INSERT INTO therev.claims AS c (bucket, claim_key, kind, value, user_id, state, version)
         SELECT $1, $2, $3, $4, $5, 'pending', greatest($6::bigint, 1) FROM fence
         ON CONFLICT (bucket, claim_key) DO UPDATE
            SET version = greatest(c.version, excluded.version),
                state = CASE WHEN c.version < excluded.version THEN excluded.state ELSE c.state END,
                created_at = CASE WHEN c.version < excluded.version THEN excluded.created_at ELSE c.created_at END
          WHERE c.user_id = excluded.user_id
         RETURNING c.xmax = 0 AS is_new, c.xmin::text AS taken_by),
     result AS (SELECT t.is_new, t.taken_by FROM taken AS t)",
);

/// Gives back what was taken for a write that did not happen; never what is held, nor what another call has taken since: that
/// may have written its user's row by now.
static GIVE_BACK: Write = Write::new(
    Group::Account,
    "result AS (
         DELETE FROM therev.claims AS c USING fence
          WHERE c.bucket = $1 AND c.claim_key = $2 AND c.user_id = $3 AND c.state = 'pending' AND c.xmin::text = $4
         RETURNING c.user_id)",
);

static FIND: Read = Read::new(
    Group::Account,
    "SELECT c.user_id, c.state FROM therev.claims AS c WHERE c.bucket = $1 AND c.claim_key = $2",
);

static HAS_NAME: Read = Read::of_owner(
    Group::Account,
    "SELECT u.user_id FROM users AS u WHERE u.bucket = $1 AND u.user_id = $2 AND u.user_name = $3",
);

/// Whom the directory knows by a name: more than one while it has not heard of all changes. The index of names by prefix serves
/// equality, too.
static KNOWN_AS: Unfenced =
    Unfenced::read("SELECT d.user_id FROM user_directory AS d WHERE NOT d.is_deleted AND d.user_name = $1");

/// Confirms and releases, as the users' outboxes say. A claim is never made here: it was taken before the user's row was
/// written, so a late event cannot bring back a name that was given up since.
pub(crate) static CONFIRM: WriteMany = WriteMany::new(
    Group::Account,
    "told AS (
         SELECT o.bucket, n.claim_key, n.user_id, n.held, n.version
           FROM owned AS o,
                jsonb_to_record(o.item) AS n (claim_key uuid, user_id uuid, held boolean, version bigint)),
     released AS (
         DELETE FROM therev.claims AS c USING told AS t
          WHERE NOT t.held AND c.bucket = t.bucket AND c.claim_key = t.claim_key AND c.user_id = t.user_id
            AND c.version <= t.version
         RETURNING c.claim_key),
     held AS (
         UPDATE therev.claims AS c SET state = 'held', version = t.version FROM told AS t
          WHERE t.held AND c.bucket = t.bucket AND c.claim_key = t.claim_key AND c.user_id = t.user_id
            AND c.version <= t.version
         RETURNING c.claim_key),
     result AS (SELECT r.claim_key FROM released AS r UNION ALL SELECT h.claim_key FROM held AS h)",
);

/// What [`DOUBT`] is told of a name.
pub(crate) fn doubt(claim_key: Uuid, user_id: Uuid) -> Item {
    let value = serde_json::json!({ "claim_key": claim_key, "user_id": user_id });
    Item { whose: bucket_of(claim_key).into(), value }
}

/// The names of these users' rows, as keys.
static NAMES_OF: ReadMany = ReadMany::new(
    Group::Account,
    "SELECT u.user_id, therev.claim_key(n.kind, n.value) AS claim_key
       FROM asked AS a
       JOIN users AS u ON u.bucket = a.bucket AND u.user_id = a.key, therev.names_of(u) AS n",
);

/// Makes claims pending again that are held for users whose rows do not have the name (yet): what becomes of them is then
/// settled as of any other.
pub(crate) static DOUBT: WriteMany = WriteMany::new(
    Group::Account,
    "result AS (
         UPDATE therev.claims AS c SET state = 'pending'
           FROM owned AS o, jsonb_to_record(o.item) AS n (claim_key uuid, user_id uuid)
          WHERE c.bucket = o.bucket AND c.claim_key = n.claim_key AND c.user_id = n.user_id AND c.state = 'held'
         RETURNING c.claim_key)",
);

/// The pending claims of a shard that `$which`.
macro_rules! pending {
    ($which:literal) => {
        concat!(
            "SELECT c.kind, c.value, c.user_id, c.version, c.created_at, c.claim_key
               FROM therev.claims AS c
               JOIN therev.fence AS f ON f.colocation_group = 'account' AND get_bit(f.writable, c.bucket) = 1
              WHERE c.state = 'pending' AND ",
            $which
        )
    };
}

/// How far the stale claims of each shard have been looked at, where there are more of them than are looked at together: when they
/// were made, and their keys.
#[derive(Default)]
pub(crate) struct ClaimsLookedAt(Mutex<BTreeMap<ShardNo, (DateTime<Utc>, Uuid)>>);

impl ClaimsLookedAt {
    fn all(&self) -> MutexGuard<'_, BTreeMap<ShardNo, (DateTime<Utc>, Uuid)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many of them are looked at together.
const STALE_AT_ONCE: u16 = 1_000;

static STALE: Unfenced = Unfenced::read(pending!(
    "c.created_at < now() - make_interval(secs => $1) AND (c.created_at, c.claim_key) > ($2, $3)
      ORDER BY c.created_at, c.claim_key LIMIT $4"
));

/// The latest. There are few at any time: to look for those of some users by their ids would cost more than they all.
static LATEST: Unfenced = Unfenced::read(pending!("true ORDER BY c.created_at DESC LIMIT $1"));

/// The write on the user's shard that decides what becomes of a pending claim.
///
/// No user yet: the id becomes a deleted user's, so that a slow registration finds it taken. A user without this name:
/// its version grows, so that a slow change of name, which expects the old one, finds nothing to change.
static SETTLE: Write = Write::of_owner(
    Group::Account,
    "known AS (
         SELECT u.user_id, coalesce($3 IN (u.user_name, u.email), false) AS has_name
           FROM users AS u, fence
          WHERE u.bucket = $1 AND u.user_id = $2),
     buried AS (
         INSERT INTO users (bucket, user_id, is_active, deleted_at, was_registered, version)
         SELECT $1, $2, false, now(), false, version_floor FROM fence
          WHERE NOT EXISTS (SELECT FROM known)
         ON CONFLICT (bucket, user_id) DO NOTHING
         RETURNING user_id),
     passed AS (
         UPDATE users AS u SET version = greatest(u.version + 1, f.version_floor), updated_at = now()
           FROM known AS k, fence AS f
          WHERE NOT k.has_name AND u.bucket = $1 AND u.user_id = k.user_id
            -- Looked at again in the row as it is now: the change may just have come.
            AND $3 IS DISTINCT FROM u.user_name AND $3 IS DISTINCT FROM u.email
         RETURNING u.user_id),
     result AS (
         SELECT k.has_name FROM known AS k WHERE k.has_name OR EXISTS (SELECT FROM passed)
         UNION ALL
         SELECT false FROM buried)",
);

crate::fenced_list! { TAKE GIVE_BACK FIND HAS_NAME CONFIRM NAMES_OF DOUBT SETTLE }

impl Community {
    /// Takes a name for a user, unless somebody else has it. `version`: the one that the user's row will have at least.
    /// `None`: the same user had taken it before, in a call that may still be under way.
    pub(crate) async fn take_name(&self, name: &Name, user: UserId, version: i64) -> Result<Option<Taken>> {
        let (kind, value) = (name.kind.sql(), &name.value);
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 5] = [&name.key(), &kind, value, &user.0, &version];
        // Both outcomes are the same create: whoever is cut off asks again.
        let taken = match self.shards().write(&TAKE, name.bucket(), &params).await {
            Err(shards::Error::OutcomeUnknown { .. }) => self.shards().write(&TAKE, name.bucket(), &params).await?,
            outcome => outcome?,
        };
        let row = taken.first().ok_or_else(|| name.taken())?;
        let is_new: bool = row.get("is_new");
        Ok(is_new.then(|| Taken { name: name.clone(), by: row.get("taken_by") }))
    }

    /// Takes all of some names, or none of them. Answers with those that were free.
    pub(crate) async fn take_all(&self, names: &[Name], user: UserId, version: i64) -> Result<Vec<Taken>> {
        let mut new = Vec::new();
        for name in names {
            match self.take_name(name, user, version).await {
                Ok(taken) => new.extend(taken),
                Err(error) => {
                    self.give_back(&new, user).await;
                    return Err(error);
                }
            }
            fail::fail_point!("register.name_taken");
        }
        Ok(new)
    }

    /// Gives names back that this call took new, after the write they were taken for was not done. A failure here is
    /// mended by the relay.
    pub(crate) async fn give_back(&self, taken: &[Taken], user: UserId) {
        for Taken { name, by } in taken {
            if let Err(error) = self.shards().write(&GIVE_BACK, name.bucket(), &[&name.key(), &user.0, by]).await {
                tracing::debug!(%error, "a name could not be given back at once; the relay settles it");
            }
        }
    }

    /// The user who has a name; `None` also while a registration or a change of name is not done. What a bulk write has taken
    /// is its users' already.
    ///
    /// Where the claim's shard gives no answer, the user is found whose own row has the name. If none is, the claim could say
    /// otherwise: the answer is the shard's error then, never `None`.
    pub async fn user_named(&self, user_name: &str) -> Result<Option<UserId>> {
        use shards::Error::{Closed, Deadline, Down};
        let name = Name { kind: NameKind::UserName, value: normalized_user_name(user_name)? };
        let rows = match self.shards().read(&FIND, name.bucket(), &[&name.key()]).await {
            Err(silent @ (Down { .. } | Deadline { .. } | Closed { .. })) => {
                return Box::pin(self.named_by_row(&name)).await.map(Some).ok_or(Error::Store(silent));
            }
            found => found?,
        };
        let Some(claim) = rows.first() else { return Ok(None) };
        let user = UserId(claim.get("user_id"));
        // Taken and not confirmed: the user's row says whether it came to that.
        let is_pending = claim.get::<_, &str>("state") == "pending";
        if is_pending && self.shards().read(&HAS_NAME, user.bucket(), &[&user.0, &name.value]).await?.is_empty() {
            return Ok(None);
        }
        Ok(Some(user))
    }

    /// The user whose row has a user name, of those whom the directory knows by it. It may be late, so the row has the last
    /// word: whoever was renamed or deleted since is not found.
    async fn named_by_row(&self, name: &Name) -> Option<UserId> {
        let known = self.shards().directory().read(&KNOWN_AS, &[&name.value], None).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "a name is not found without its claim: the directory gave no answer");
            Vec::new()
        });
        let keys = known.iter().map(|row| UserId(row.get("user_id"))).map(|user| (user.into(), user.0)).collect();
        let answer = self.shards().read_many(&NAMES_OF, keys, &[]).await;
        let is_meant = |row: &&Row| row.get::<_, Uuid>("claim_key") == name.key();
        answer.rows().find(is_meant).map(|row| UserId(row.get("user_id")))
    }

    /// Settles the claims whose user's write did not come within `older_than_s` seconds, some of each shard at a time: events wait
    /// meanwhile. Says how many. What is on a shard that is down, or belongs to a user there, waits.
    pub(crate) async fn settle_claims(&self, older_than_s: f64) -> u64 {
        let mut settled = 0;
        for shard in self.shards().numbers() {
            if let Err(error) = self.settle_claims_of(shard, older_than_s, &mut settled).await {
                tracing::debug!(%shard, %error, "the claims of a shard could not be looked at");
            }
        }
        settled
    }

    /// Those of one shard, from where the last look ended, and at the end of the list from its beginning: many that cannot be settled
    /// now keep no later ones back.
    async fn settle_claims_of(&self, shard: ShardNo, older_than_s: f64, settled: &mut u64) -> Result<()> {
        let begin = (DateTime::<Utc>::UNIX_EPOCH, Uuid::nil());
        let after = self.inner.claims_looked_at.all().remove(&shard).unwrap_or(begin);
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
            [&older_than_s, &after.0, &after.1, &i64::from(STALE_AT_ONCE)];
        let stale = self.shards().unfenced(shard, &STALE, &params).await?;
        if let Some(last) = stale.last().filter(|_| stale.len() == usize::from(STALE_AT_ONCE)) {
            let last = (last.get("created_at"), last.get("claim_key"));
            self.inner.claims_looked_at.all().insert(shard, last);
        }
        *settled += self.settle_rows(&stale).await;
        Ok(())
    }

    /// Settles what is pending of some users' claims on some shards: a relay has doubted them while the users' rows were on
    /// their way. What cannot be asked now, a relay settles in its time.
    pub(crate) async fn settle_doubted(&self, shards: &BTreeSet<ShardNo>, users: &HashSet<Uuid>) {
        let most = i64::from(STALE_AT_ONCE);
        let look = async |shard: &ShardNo| self.shards().unfenced(*shard, &LATEST, &[&most]).await;
        for mut pending in join_all(shards.iter().map(look)).await.into_iter().flatten() {
            pending.retain(|row| users.contains(&row.get("user_id")));
            self.settle_rows(&pending).await;
        }
    }

    /// Settles pending claims; says how many.
    async fn settle_rows(&self, pending: &[Row]) -> u64 {
        let mut settled = 0;
        for row in pending {
            let kind = if row.get::<_, &str>("kind") == "email" { NameKind::Email } else { NameKind::UserName };
            let name = Name { kind, value: row.get("value") };
            let user = UserId(row.get("user_id"));
            match self.settle_name(&name, user, row.get("version")).await {
                Ok(()) => settled += 1,
                Err(error) => tracing::debug!(%user, %error, "a claim could not be settled"),
            }
        }
        settled
    }

    /// Of claims and users side by side those whose user's row does not have the name, and the buckets of users that gave
    /// no answer. A row that comes a moment later is missed: a doubt too many, which settling ends.
    pub(crate) async fn names_without_users(
        &self,
        taken: Vec<(Uuid, Uuid)>,
    ) -> (HashSet<(Uuid, Uuid)>, BTreeSet<Bucket>) {
        let users: BTreeSet<Uuid> = taken.iter().map(|(_, user)| *user).collect();
        let keys = users.into_iter().map(|user| (UserId(user).into(), user)).collect();
        let answer = self.shards().read_many(&NAMES_OF, keys, &[]).await;
        let had: HashSet<(Uuid, Uuid)> = answer.rows().map(|row| (row.get("claim_key"), row.get("user_id"))).collect();
        let is_without = |(name, user): &(Uuid, Uuid)| {
            !had.contains(&(*name, *user)) && !answer.unanswered.contains(&UserId(*user).bucket())
        };
        (taken.into_iter().filter(is_without).collect(), answer.unanswered)
    }

    /// Settles one claim, taken for `version` of its user: the decision is a write on the user's shard; what it means for
    /// the claim follows, and is repeated if it is cut off in between.
    pub(crate) async fn settle_name(&self, name: &Name, user: UserId, version: i64) -> Result<()> {
        let decided = self.shards().write(&SETTLE, user.bucket(), &[&user.0, &name.value]).await?;
        let Some(decision) = decided.first() else { return Ok(()) };
        fail::fail_point!("settle.decided");
        let told = name.told(user, version, decision.get("has_name"));
        self.shards().write_many(&CONFIRM, vec![told]).await.whole()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_kept_name_or_address_is_its_own_spelling(text in prop_oneof![any::<String>(), "\\PC{1,12}", "\\w{1,9}@\\w{2,9}"]) {
            if let Ok(name) = normalized_user_name(&text) {
                prop_assert_eq!(normalized_user_name(&name).unwrap(), name);
            }
            if let Ok(email) = normalized_email(&text) {
                prop_assert_eq!(normalized_email(&email).unwrap(), email);
            }
        }
    }

    #[test]
    fn one_name_in_many_spellings() {
        for spelling in ["Ada", " ada ", "ＡＤＡ", "aDa"] {
            assert_eq!(normalized_user_name(spelling).unwrap(), "ada");
        }
        assert_eq!(normalized_user_name("Müller.2").unwrap(), "müller.2");
        for bad in ["", " ", "a b", "@a", "a.", "_a", "a\0b", &"x".repeat(41)] {
            assert!(normalized_user_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert_eq!(normalized_email(" A@B.org ").unwrap(), "a@b.org");
        for bad in ["", "a", "@b.org", "a@", "a b@c.d", "a@b\0c"] {
            assert!(normalized_email(bad).is_err(), "{bad:?}");
        }
    }
}
