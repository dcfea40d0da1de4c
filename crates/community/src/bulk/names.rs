//! Names of many users at once.

use super::Done;
use super::rows::{BulkRow, BulkUser, NamedUser};
use crate::community::Community;
use crate::error::{Error, Result};
use crate::names::{Name, NameKind};
use placement::{Bucket, Group, ShardNo, UserId};
use shards::Bulk;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use uuid::Uuid;

/// A name as it is wanted: for whom, and for which version of its row at least.
struct Wanted {
    bucket: Bucket,
    key: Uuid,
    value: String,
    user_id: UserId,
    version: i64,
}

/// Holds names, unless somebody else has them: confirming each one later would write each row twice. Whoever is cut off
/// before the users' rows are written has left the event by which a relay doubts the names.
///
/// A name that the same user had taken before counts as taken; its version rises, so that a settling of the earlier
/// taking, which may still be under way, leaves it alone.
///
/// Answers with the keys that were taken only if that was not all of them: it nearly always is.
const TAKE: &str = "
    WITH taken AS (
        INSERT INTO therev.claims AS c (bucket, claim_key, kind, value, user_id, state, version)
        SELECT n.bucket, n.claim_key, 'user_name', n.value, n.user_id, 'held', n.version
          FROM unnest($1::smallint[], $2::uuid[], $3::text[], $4::uuid[], $5::bigint[])
                   AS n (bucket, claim_key, value, user_id, version)
        ON CONFLICT (bucket, claim_key) DO UPDATE
           SET state = 'held', version = greatest(c.version + 1, excluded.version), created_at = now()
         WHERE c.user_id = excluded.user_id
        RETURNING c.claim_key, c.user_id),
    told AS (
        INSERT INTO therev.outbox (colocation_group, bucket, kind, owners, ids)
        SELECT 'account', -1, 'taken', array_agg(t.user_id), array_agg(t.claim_key)
          FROM taken AS t
        HAVING count(*) > 0
        RETURNING outbox_id, ids)
    SELECT e.outbox_id, CASE WHEN cardinality(e.ids) < cardinality($2) THEN e.ids END AS won FROM told AS e";

/// Clears the way for users whose earlier registration was given up, unless something was settled about them since: then
/// the row that stays refuses the copy.
const UNBURY: &str = "
    DELETE FROM users AS u
     USING unnest($1::smallint[], $2::uuid[], $3::bigint[]) AS k (bucket, id, version)
     WHERE u.bucket = k.bucket AND u.user_id = k.id AND NOT u.was_registered AND u.version = k.version";

pub(super) async fn unbury(bulk: &Bulk, users: &[NamedUser]) -> Done<()> {
    let buried = users.iter().filter_map(|user| user.buried.map(|version| (user, version)));
    let (mut buckets, mut ids, mut versions) = (Vec::new(), Vec::new(), Vec::new());
    for (user, version) in buried {
        buckets.push(user.owner().bucket().sql());
        ids.push(user.id());
        versions.push(version);
    }
    if !ids.is_empty() {
        bulk.query(UNBURY, &[&buckets, &ids, &versions]).await?;
    }
    Ok(())
}

impl Community {
    /// Takes a name for each user: all first choices at once, then the second choices of those who came too late.
    /// Whoever was buried gets its name for a version above the burial's. Answers with the users, and the events that are
    /// delivered once their rows are written.
    pub(super) async fn name_users(
        &self,
        users: Vec<BulkUser>,
        buried: &HashMap<Uuid, i64>,
    ) -> Result<(Vec<NamedUser>, BTreeSet<(ShardNo, i64)>)> {
        let mut named = Vec::with_capacity(users.len());
        let mut events = BTreeSet::new();
        let mut open = users;
        for choice in 0.. {
            if open.is_empty() {
                break;
            }
            let mut asked: HashMap<Uuid, UserId> = HashMap::with_capacity(open.len());
            let mut wanted = Vec::with_capacity(open.len());
            let mut keys = Vec::with_capacity(open.len());
            for user in &open {
                let value = user.user_names.get(choice).ok_or_else(|| no_name_left(user))?.clone();
                let name = Name { kind: NameKind::UserName, value };
                let key = name.key();
                keys.push(key);
                // Of two in one batch the first is served.
                if let Entry::Vacant(free) = asked.entry(key) {
                    free.insert(user.user_id);
                    let version = buried.get(&user.user_id.0).map_or(1, |version| version + 1);
                    let (bucket, user_id) = (name.bucket(), user.user_id);
                    wanted.push(Wanted { bucket, key, value: name.value, user_id, version });
                }
            }
            let won = self.take_names(wanted, &mut events).await?;
            fail::fail_point!("bulk.names_taken");
            let mut late = Vec::new();
            for (user, name_key) in open.into_iter().zip(keys) {
                if won.contains(&name_key) && asked.get(&name_key) == Some(&user.user_id) {
                    let buried = buried.get(&user.user_id.0).copied();
                    let user_name = user.user_names[choice].clone();
                    named.push(NamedUser { user, user_name, buried });
                } else {
                    late.push(user);
                }
            }
            open = late;
        }
        Ok((named, events))
    }

    /// Takes many names at once, no name twice. Says which keys are theirs now, and adds the events about them.
    async fn take_names(
        &self,
        mut wanted: Vec<Wanted>,
        events: &mut BTreeSet<(ShardNo, i64)>,
    ) -> Result<HashSet<Uuid>> {
        // In the order in which everybody takes them.
        wanted.sort_unstable_by_key(|name| name.key);
        let parts = self
            .in_bulk(
                Group::Account,
                wanted,
                |name| name.bucket.into(),
                &(),
                async |bulk: &Bulk, names: &[Wanted], (): &(), _| {
                    let buckets: Vec<i16> = names.iter().map(|n| n.bucket.sql()).collect();
                    let keys: Vec<Uuid> = names.iter().map(|n| n.key).collect();
                    let values: Vec<&str> = names.iter().map(|n| n.value.as_str()).collect();
                    let users: Vec<Uuid> = names.iter().map(|n| n.user_id.0).collect();
                    let versions: Vec<i64> = names.iter().map(|n| n.version).collect();
                    let told = bulk.query(TAKE, &[&buckets, &keys, &values, &users, &versions]).await?;
                    Done::Ok(told.first().map(|row| {
                        let won: Option<Vec<Uuid>> = row.get("won");
                        (row.get::<_, i64>("outbox_id"), won.unwrap_or(keys))
                    }))
                },
            )
            .await?;
        let mut won = HashSet::new();
        for part in parts {
            if let Some((event, keys)) = part.said {
                events.insert((part.shard, event));
                won.extend(keys);
            }
        }
        Ok(won)
    }
}

fn no_name_left(user: &BulkUser) -> Error {
    Error::Conflict { what: "user name", value: user.user_names.join("`, `") }
}
