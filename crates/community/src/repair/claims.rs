//! Claims: one for each name that a user's row has, none for any other.

use super::LOOK;
use crate::check::Databases;
use crate::community::Community;
use crate::error::{Error, Result};
use crate::names::{self, Name, NameKind};
use futures_util::future::join_all;
use placement::{Group, UserId, bucket_of};
use serde_json::json;
use shards::{Item, ReadMany, WriteMany};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Row;
use uuid::Uuid;

/// How many names are worked on at once.
const AT_ONCE: usize = 16;

/// The claims that stand where these names' claims belong ($1), and those that say these names ($2), wherever they stand.
const CLAIMS: &str = "
    SELECT c.claim_key, c.kind || ' ' || c.value AS name, c.user_id, c.state = 'pending' AS pending,
           c.version
      FROM therev.fence AS f
      JOIN therev.claims AS c ON get_bit(f.readable, c.bucket) = 1
     WHERE f.colocation_group = 'account' AND (c.claim_key = ANY ($1) OR c.kind || ' ' || c.value = ANY ($2))";

/// Whose rows have these names, of the users whom a shard reads.
const HOLDERS: &str = "
    SELECT n.kind || ' ' || n.value AS name, u.user_id, u.version
      FROM therev.fence AS f
      JOIN users AS u ON therev.may_read(f, u.bucket, u.user_id), therev.names_of(u) AS n
     WHERE f.colocation_group = 'account' AND u.deleted_at IS NULL AND n.kind || ' ' || n.value = ANY ($1)";

/// The rows of the claims' users as they are now, wherever these are: the shards were asked for names one by one, and a user who
/// changed places meanwhile was seen on none.
static CLAIMANTS: ReadMany = ReadMany::new(
    Group::Account,
    "SELECT u.user_id, u.version, n.kind || ' ' || n.value AS name
       FROM asked AS a
       JOIN users AS u ON u.bucket = a.bucket AND u.user_id = a.key
       LEFT JOIN therev.names_of(u) AS n ON u.deleted_at IS NULL",
);

/// Makes a claim, if it is still what was seen, a pending one of this name and user.
static HAND_OVER: WriteMany = WriteMany::new(
    Group::Account,
    "result AS (
         UPDATE therev.claims AS c
            SET kind = n.kind, value = n.value, user_id = n.user_id, state = 'pending', version = n.version,
                created_at = now()
           FROM owned AS o,
                jsonb_to_record(o.item) AS n (claim_key uuid, kind text, value text, user_id uuid, version bigint,
                                              seen_user_id uuid, seen_version bigint)
          WHERE c.bucket = o.bucket AND c.claim_key = n.claim_key AND c.user_id = n.seen_user_id
            AND c.version = n.seen_version
         RETURNING c.claim_key)",
);

/// Removes a claim that stands where another name's belongs.
static REMOVE: WriteMany = WriteMany::new(
    Group::Account,
    "result AS (
         DELETE FROM therev.claims AS c
          USING owned AS o, jsonb_to_record(o.item) AS n (claim_key uuid, kind text, value text)
          WHERE c.bucket = o.bucket AND c.claim_key = n.claim_key AND c.kind = n.kind AND c.value = n.value
         RETURNING c.kind || ' ' || c.value AS name)",
);

crate::fenced_list! { CLAIMANTS HAND_OVER REMOVE }

/// A claim as it was seen.
struct Claim {
    key: Uuid,
    name: String,
    user: UserId,
    is_pending: bool,
    version: i64,
}

/// What is known of a name. Of the claims' users the rows were read after the claims.
struct Case {
    name: Name,
    /// The claim that stands where this name's belongs, and the version of its user's row.
    claim: Option<(Claim, Option<i64>)>,
    /// Claims that say this name where another one's belongs.
    misplaced: Vec<Uuid>,
    /// The users whose rows have it, with their versions.
    holders: Vec<(UserId, i64)>,
}

impl Case {
    /// Its claims in wrong places, for [`REMOVE`].
    fn misplaced(&self) -> impl Iterator<Item = Item> {
        self.misplaced.iter().map(|key| {
            let value = json!({ "claim_key": key, "kind": self.name.kind, "value": self.name.value });
            Item { whose: bucket_of(*key).into(), value }
        })
    }
}

impl Community {
    /// Makes the claims of these names (kind and value) what the users' rows say. Answers with those for which something
    /// was done, and how many are left to people: a name that two users' rows have is nobody's to decide here.
    pub(super) async fn repair_names(&self, databases: &Databases, keys: Vec<String>) -> Result<(Vec<String>, u64)> {
        let (mut done, mut for_people) = (Vec::new(), 0);
        for keys in keys.chunks(LOOK) {
            // First every name gets its claim, also one that says another name now; what is then still in a wrong place
            // goes, and no name was free in between.
            let (held, free): (Vec<Case>, Vec<Case>) =
                self.cases(databases, keys).await?.into_iter().partition(|case| !case.holders.is_empty());
            for_people += held.iter().map(|case| u64::from(case.holders.len() > 1)).sum::<u64>();
            let misplaced: Vec<Item> = held.iter().chain(&free).flat_map(Case::misplaced).collect();
            done.extend(self.settle_cases(&held).await?);
            let removed = self.write_all(&REMOVE, misplaced).await?;
            done.extend(removed.iter().map(|row| row.get::<_, String>("name")));
            done.extend(self.settle_cases(&free).await?);
        }
        Ok((done, for_people))
    }

    async fn settle_cases(&self, cases: &[Case]) -> Result<Vec<String>> {
        let mut done = Vec::new();
        for some in cases.chunks(AT_ONCE) {
            for (case, settled) in some.iter().zip(join_all(some.iter().map(|case| self.settle_case(case))).await) {
                match settled {
                    Ok(true) => done.push(said(&case.name)),
                    // Somebody took the name meanwhile: what differs then, the next look finds.
                    Ok(false) | Err(Error::Conflict { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(done)
    }

    async fn cases(&self, databases: &Databases, keys: &[String]) -> Result<Vec<Case>> {
        let names: Vec<Name> = keys.iter().filter_map(|key| name_in(key)).collect();
        let claim_keys: Vec<Uuid> = names.iter().map(Name::key).collect();
        let claims: Vec<Claim> =
            databases.ask_shards(CLAIMS, &[&claim_keys, &keys]).await?.iter().map(Claim::from).collect();
        let users: BTreeSet<UserId> = claims.iter().map(|claim| claim.user).collect();
        let asked = users.into_iter().map(|user| (user.into(), user.0)).collect();
        let rows = self.shards().read_many(&CLAIMANTS, asked, &[]).await.whole()?;
        let versions: BTreeMap<Uuid, i64> = rows.iter().map(|row| (row.get("user_id"), row.get("version"))).collect();
        let mut holders: BTreeMap<String, Vec<(UserId, i64)>> = BTreeMap::new();
        for row in databases.ask_shards(HOLDERS, &[&keys]).await? {
            holders.entry(row.get("name")).or_default().push((UserId(row.get("user_id")), row.get("version")));
        }
        for row in &rows {
            let (Some(name), user) = (row.get::<_, Option<String>>("name"), UserId(row.get("user_id"))) else {
                continue;
            };
            let known = holders.entry(name).or_default();
            if known.iter().all(|(holder, _)| *holder != user) {
                known.push((user, row.get("version")));
            }
        }
        let mut misplaced: BTreeMap<String, Vec<Uuid>> = BTreeMap::new();
        let mut at: BTreeMap<Uuid, Claim> = BTreeMap::new();
        for claim in claims {
            if name_in(&claim.name).is_none_or(|name| name.key() != claim.key) {
                misplaced.entry(claim.name.clone()).or_default().push(claim.key);
            }
            at.insert(claim.key, claim);
        }
        let case = |name: Name| {
            let claim = at.remove(&name.key());
            let key = said(&name);
            Case {
                claim: claim.map(|claim| {
                    let version = versions.get(&claim.user.0).copied();
                    (claim, version)
                }),
                misplaced: misplaced.remove(&key).unwrap_or_default(),
                holders: holders.remove(&key).unwrap_or_default(),
                name,
            }
        };
        Ok(names.into_iter().map(case).collect())
    }

    /// Says whether something was done.
    async fn settle_case(&self, case: &Case) -> Result<bool> {
        match (case.holders.as_slice(), &case.claim) {
            ([(user, version)], claim) => {
                let claim = claim.as_ref().map(|(claim, _)| claim);
                self.give_name(&case.name, *user, *version, claim).await
            }
            ([], Some((claim, user_version))) if !claim.is_pending && claim.name == said(&case.name) => {
                self.free_name(&case.name, claim, *user_version).await
            }
            _ => Ok(false),
        }
    }

    /// The claim of a name that one user's row has: taken as by a change of name, and decided as any that is pending, so
    /// that a change which runs beside it loses nothing.
    async fn give_name(&self, name: &Name, user: UserId, version: i64, claim: Option<&Claim>) -> Result<bool> {
        let mut taken_for = version;
        match claim {
            Some(claim) if claim.user == user && claim.name == said(name) => taken_for = version.max(claim.version),
            // Somebody else is taking it now, or has left off: the relay settles that after its time-out.
            Some(claim) if claim.is_pending => return Ok(false),
            // Somebody else's, whose row does not have it.
            Some(claim) => {
                if !self.hand_over(name, claim, user, version).await? {
                    return Ok(false);
                }
            }
            None => {
                self.take_name(name, user, version).await?;
            }
        }
        self.settle_name(name, user, taken_for).await?;
        Ok(true)
    }

    /// A claim of a name that no user's row has.
    async fn free_name(&self, name: &Name, claim: &Claim, user_version: Option<i64>) -> Result<bool> {
        match user_version {
            // A change that took the name for a row of this version or a later one has raised the claim above it.
            Some(version) if claim.version <= version => {
                let told = name.told(claim.user, version, false);
                let freed = self.shards().write_many(&names::CONFIRM, vec![told]).await.whole()?;
                Ok(!freed.is_empty())
            }
            // A change of name may be under way: left to be settled after its time-out, as any that did not come.
            Some(_) => self.hand_over(name, claim, claim.user, claim.version).await,
            // No such user was ever written: the id is buried.
            None => {
                self.settle_name(name, claim.user, claim.version).await?;
                Ok(true)
            }
        }
    }

    async fn hand_over(&self, name: &Name, claim: &Claim, user: UserId, version: i64) -> Result<bool> {
        let value = json!({
            "claim_key": claim.key, "kind": name.kind, "value": name.value, "user_id": user, "version": version,
            "seen_user_id": claim.user, "seen_version": claim.version
        });
        let item = Item { whose: bucket_of(claim.key).into(), value };
        Ok(!self.write_all(&HAND_OVER, vec![item]).await?.is_empty())
    }
}

impl From<&Row> for Claim {
    fn from(row: &Row) -> Claim {
        Claim {
            key: row.get("claim_key"),
            name: row.get("name"),
            user: UserId(row.get("user_id")),
            is_pending: row.get("pending"),
            version: row.get("version"),
        }
    }
}

/// A name as proofs say it.
fn said(name: &Name) -> String {
    format!("{} {}", name.kind.sql(), name.value)
}

fn name_in(key: &str) -> Option<Name> {
    let (kind, value) = key.split_once(' ')?;
    let kind = NameKind::ALL.into_iter().find(|known| known.sql() == kind)?;
    Some(Name { kind, value: value.to_owned() })
}
