//! Proofs across databases: the same facts in two places.

use super::{BETWEEN_LOOKS, Check, Databases, LOOKS, NAMES, PARTICIPANTS, THREADS, USERS};
use futures_util::future::try_join_all;
use shards::{Database, Error};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Client;

/// Two views of the same facts. Each gives `class` (a bucket), `key` and `digest` (a hash of everything that must agree).
struct Pair {
    name: &'static str,
    left: Side,
    right: Side,
}

/// Rows of all shards, where they are owned, or of the directory.
enum Side {
    Shards(&'static str),
    Directory(&'static str),
}

const PAIRS: &[Pair] = &[
    Pair {
        name: NAMES,
        left: Side::Shards(
            "SELECT therev.bucket_of(therev.claim_key(n.kind, n.value)) AS class, n.kind || ' ' || n.value AS key,
                    hashtextextended(u.user_id::text, 0) AS digest
               FROM therev.fence AS f
               JOIN users AS u ON therev.may_read(f, u.bucket, u.user_id), therev.names_of(u) AS n
              WHERE f.colocation_group = 'account' AND u.deleted_at IS NULL",
        ),
        right: Side::Shards(
            "SELECT c.bucket AS class, c.kind || ' ' || c.value AS key, hashtextextended(c.user_id::text, 0) AS digest
               FROM therev.fence AS f
               JOIN therev.claims AS c ON get_bit(f.readable, c.bucket) = 1
              WHERE f.colocation_group = 'account' AND c.state = 'held'",
        ),
    },
    Pair {
        name: USERS,
        left: Side::Shards(
            "SELECT u.bucket AS class, 'user ' || u.user_id AS key,
                    hashtextextended(concat_ws('|', u.user_name, nullif(concat_ws(' ', u.first_name, u.last_name), ''),
                                               u.profile_pic_url, u.role, u.is_active, u.created_at, u.version), 0)
                        AS digest
               FROM therev.fence AS f
               JOIN users AS u ON therev.may_read(f, u.bucket, u.user_id)
              WHERE f.colocation_group = 'account' AND u.deleted_at IS NULL",
        ),
        right: Side::Directory(
            "SELECT therev.bucket_of(d.user_id) AS class, 'user ' || d.user_id AS key,
                    hashtextextended(concat_ws('|', d.user_name, d.display_name, d.profile_pic_url, d.role, d.is_active,
                                               d.created_at, d.version), 0) AS digest
               FROM user_directory AS d
              WHERE NOT d.is_deleted",
        ),
    },
    Pair {
        name: THREADS,
        left: Side::Shards(
            "SELECT t.bucket AS class, 'thread ' || t.thread_id AS key,
                    hashtextextended(concat_ws('|', t.author_id, t.title, t.is_pinned, t.is_locked, t.moderation,
                                               t.created_at, t.version, coalesce(s.posts, 0),
                                               greatest(t.created_at, s.last_post_at)), 0) AS digest
               FROM therev.fence AS f
               JOIN threads AS t ON therev.may_read(f, t.bucket, t.author_id)
               LEFT JOIN therev.thread_totals AS s
                 ON s.bucket = t.bucket AND s.author_id = t.author_id AND s.thread_id = t.thread_id
              WHERE f.colocation_group = 'content' AND t.deleted_at IS NULL",
        ),
        right: Side::Directory(
            "SELECT therev.bucket_of(d.author_id) AS class, 'thread ' || d.thread_id AS key,
                    hashtextextended(concat_ws('|', d.author_id, d.title, d.is_pinned, d.is_locked, d.moderation,
                                               d.created_at, d.version, d.post_count, d.last_activity_at), 0) AS digest
               FROM thread_directory AS d
              WHERE NOT d.is_deleted",
        ),
    },
    Pair {
        name: PARTICIPANTS,
        left: Side::Shards(
            "SELECT c.bucket AS class, 'author ' || c.author_id || ' in thread ' || c.thread_id AS key,
                    hashtextextended(concat_ws('|', c.thread_author_id, c.posts, c.deleted, c.last_post_at, c.version),
                                     0) AS digest
               FROM therev.fence AS f
               JOIN therev.thread_contributions AS c ON therev.may_read(f, c.bucket, c.author_id)
              WHERE f.colocation_group = 'content'",
        ),
        right: Side::Shards(
            "SELECT therev.bucket_of(p.participant_id) AS class,
                    'author ' || p.participant_id || ' in thread ' || p.thread_id AS key,
                    hashtextextended(concat_ws('|', p.author_id, p.posts, p.deleted, p.last_post_at, p.version), 0)
                        AS digest
               FROM therev.fence AS f
               JOIN therev.thread_participants AS p ON therev.may_read(f, p.bucket, p.author_id)
              WHERE f.colocation_group = 'content'",
        ),
    },
];

/// Rows and an order-independent hash of them, by class.
type Classes = BTreeMap<i16, (i64, i64)>;
/// The rows of some classes: class and digest of every key.
type Rows = BTreeMap<String, Vec<(i16, i64)>>;

/// A key that every look found different.
pub(crate) struct Differing {
    /// How.
    what: &'static str,
    /// The classes in which the side that counts has it.
    pub(crate) classes: BTreeSet<i16>,
}

pub(super) async fn checks(databases: &Databases) -> Result<Vec<Check>, Error> {
    let mut checks = Vec::new();
    for pair in PAIRS {
        checks.push(compare(databases, pair).await?);
    }
    Ok(checks)
}

async fn compare(databases: &Databases, pair: &Pair) -> Result<Check, Error> {
    let mut check = Check::named(pair.name);
    let (checked, differing) = look(databases, pair).await?;
    check.checked = checked;
    for (key, differing) in differing {
        check.wrong(format!("{key}: {}", differing.what));
    }
    Ok(check)
}

/// The keys of the proof `name` that differ, as its check finds them.
pub(crate) async fn differing(databases: &Databases, name: &str) -> Result<BTreeMap<String, Differing>, Error> {
    match PAIRS.iter().find(|pair| pair.name == name) {
        Some(pair) => Ok(look(databases, pair).await?.1),
        None => Ok(BTreeMap::new()),
    }
}

/// How many rows there are, and the keys that differ in every look.
async fn look(databases: &Databases, pair: &Pair) -> Result<(u64, BTreeMap<String, Differing>), Error> {
    let (left, right) = (classes(databases, &pair.left).await?, classes(databases, &pair.right).await?);
    let checked = left.values().map(|(rows, _)| u64::try_from(*rows).unwrap_or(0)).sum();
    let all: BTreeSet<i16> = left.keys().chain(right.keys()).copied().collect();
    let suspects: Vec<i16> = all.into_iter().filter(|class| left.get(class) != right.get(class)).collect();
    let mut wrong: Option<BTreeMap<String, Differing>> = None;
    for look in 0..LOOKS {
        if suspects.is_empty() || wrong.as_ref().is_some_and(BTreeMap::is_empty) {
            break;
        }
        if look > 0 {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let (left, right) =
            (rows(databases, &pair.left, &suspects).await?, rows(databases, &pair.right, &suspects).await?);
        let mut still = differences(&left, &right);
        if let Some(before) = wrong.take() {
            still.retain(|key, _| before.contains_key(key));
            for (key, earlier) in before {
                if let Some(differing) = still.get_mut(&key) {
                    differing.classes.extend(earlier.classes);
                }
            }
        }
        wrong = Some(still);
    }
    Ok((checked, wrong.unwrap_or_default()))
}

fn differences(left: &Rows, right: &Rows) -> BTreeMap<String, Differing> {
    let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let judge = |key: &String| match (left.get(key).map(Vec::as_slice), right.get(key).map(Vec::as_slice)) {
        (Some([(_, l)]), Some([(_, r)])) if l == r => None,
        (Some([_]), Some([_])) => Some("the two sides differ"),
        (Some([_]), None) => Some("missing on the derived side"),
        (None, Some([_])) => Some("on the derived side only"),
        _ => Some("more than once"),
    };
    let differing = |key: &String| {
        let classes = left.get(key).into_iter().flatten().map(|(class, _)| *class).collect();
        judge(key).map(|what| (key.clone(), Differing { what, classes }))
    };
    keys.into_iter().filter_map(differing).collect()
}

async fn classes(databases: &Databases, side: &Side) -> Result<Classes, Error> {
    // With the key, or rows that only changed their keys would look the same.
    let summed = |sql: &str| {
        format!(
            "SELECT s.class, count(*), bit_xor(hashtextextended(s.key, s.digest)) FROM ({sql}) AS s GROUP BY s.class"
        )
    };
    let mut all = Classes::new();
    for rows in ask(databases, side, summed, None).await? {
        for row in rows {
            let known = all.entry(row.get(0)).or_default();
            known.0 += row.get::<_, i64>(1);
            known.1 ^= row.get::<_, i64>(2);
        }
    }
    Ok(all)
}

async fn rows(databases: &Databases, side: &Side, classes: &[i16]) -> Result<Rows, Error> {
    let single = |sql: &str| format!("SELECT s.class, s.key, s.digest FROM ({sql}) AS s WHERE s.class = ANY ($1)");
    let mut all = Rows::new();
    for rows in ask(databases, side, single, Some(classes)).await? {
        for row in rows {
            all.entry(row.get(1)).or_default().push((row.get(0), row.get(2)));
        }
    }
    Ok(all)
}

/// Asks every database of a side, side by side.
async fn ask(
    databases: &Databases,
    side: &Side,
    wrap: impl Fn(&str) -> String,
    classes: Option<&[i16]>,
) -> Result<Vec<Vec<tokio_postgres::Row>>, Error> {
    let (sql, asked): (String, Vec<(Database, &Client)>) = match side {
        Side::Shards(sql) => (wrap(sql), databases.shards.iter().map(|(database, c)| (*database, c)).collect()),
        Side::Directory(sql) => (wrap(sql), vec![(Database::Directory, &databases.directory)]),
    };
    try_join_all(asked.into_iter().map(|(database, client)| {
        let sql = &sql;
        async move {
            let answer = match &classes {
                Some(classes) => client.query(sql.as_str(), &[classes]).await,
                None => client.query(sql.as_str(), &[]).await,
            };
            answer.map_err(|source| Error::Sql { database, source })
        }
    }))
    .await
}
