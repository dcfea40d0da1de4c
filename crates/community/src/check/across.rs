//! Proofs across databases: the same facts in two places.

use super::{BETWEEN_LOOKS, Check, Databases, LOOKS, NAMES, PARTICIPANTS, THREADS, USERS};
use futures_util::future::try_join_all;
use placement::in_parts;
use shards::{Database, Error};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Client;

/// Two views of the same facts. Each gives `class` (a bucket), `key`, `digest` (a hash of everything that must agree) and
/// `sums` (another one, of what a relay has summed).
struct Pair {
    name: &'static str,
    /// The kinds of events that tell the right side of the left one; `totals` only its sums.
    told_by: &'static [&'static str],
    /// Which of the keys `$2` the events of the kinds `$1` are about that are on their way.
    on_the_way: &'static str,
    left: Side,
    right: Side,
}

/// Rows of all shards, where they are owned, or of the directory.
enum Side {
    Shards(&'static str),
    Directory(&'static str),
}

/// The kind of event that asks for sums.
const SUMMED: &str = "totals";

const PAIRS: &[Pair] = &[
    Pair {
        name: NAMES,
        told_by: &["user", "claim", "taken"],
        on_the_way: NAMES_ON_THE_WAY,
        left: Side::Shards(
            "SELECT therev.bucket_of(therev.claim_key(n.kind, n.value)) AS class, n.kind || ' ' || n.value AS key,
                    hashtextextended(u.user_id::text, 0) AS digest, 0::bigint AS sums
               FROM therev.fence AS f
               JOIN users AS u ON therev.may_read(f, u.bucket, u.user_id), therev.names_of(u) AS n
              WHERE f.colocation_group = 'account' AND u.deleted_at IS NULL",
        ),
        right: Side::Shards(
            // One that stands where another name's belongs is found by nobody.
            "SELECT c.bucket AS class, c.kind || ' ' || c.value AS key,
                    CASE WHEN c.claim_key = therev.claim_key(c.kind, c.value)
                         THEN hashtextextended(c.user_id::text, 0) ELSE 0 END AS digest, 0::bigint AS sums
               FROM therev.fence AS f
               JOIN therev.claims AS c ON get_bit(f.readable, c.bucket) = 1
              WHERE f.colocation_group = 'account' AND c.state = 'held'",
        ),
    },
    Pair {
        name: USERS,
        told_by: &["user"],
        on_the_way: ON_THE_WAY,
        left: Side::Shards(
            "SELECT u.bucket AS class, 'user ' || u.user_id AS key,
                    hashtextextended(concat_ws('|', u.user_name, nullif(concat_ws(' ', u.first_name, u.last_name), ''),
                                               u.profile_pic_url, u.role, u.is_active, u.created_at, u.version), 0)
                        AS digest, 0::bigint AS sums
               FROM therev.fence AS f
               JOIN users AS u ON therev.may_read(f, u.bucket, u.user_id)
              WHERE f.colocation_group = 'account' AND u.deleted_at IS NULL",
        ),
        right: Side::Directory(
            "SELECT therev.bucket_of(d.user_id) AS class, 'user ' || d.user_id AS key,
                    hashtextextended(concat_ws('|', d.user_name, d.display_name, d.profile_pic_url, d.role, d.is_active,
                                               d.created_at, d.version), 0) AS digest, 0::bigint AS sums
               FROM user_directory AS d
              WHERE NOT d.is_deleted",
        ),
    },
    Pair {
        name: THREADS,
        told_by: &["thread", SUMMED],
        on_the_way: ON_THE_WAY,
        left: Side::Shards(
            "SELECT t.bucket AS class, 'thread ' || t.thread_id AS key,
                    hashtextextended(concat_ws('|', t.author_id, t.title, t.is_pinned, t.is_locked, t.moderation,
                                               t.created_at, t.version), 0) AS digest,
                    hashtextextended(concat_ws('|', coalesce(s.posts, 0), greatest(t.created_at, s.last_post_at)), 0)
                        AS sums
               FROM therev.fence AS f
               JOIN threads AS t ON therev.may_read(f, t.bucket, t.author_id)
               LEFT JOIN therev.thread_totals AS s
                 ON s.bucket = t.bucket AND s.author_id = t.author_id AND s.thread_id = t.thread_id
              WHERE f.colocation_group = 'content' AND t.deleted_at IS NULL",
        ),
        right: Side::Directory(
            "SELECT therev.bucket_of(d.author_id) AS class, 'thread ' || d.thread_id AS key,
                    hashtextextended(concat_ws('|', d.author_id, d.title, d.is_pinned, d.is_locked, d.moderation,
                                               d.created_at, d.version), 0) AS digest,
                    hashtextextended(concat_ws('|', d.post_count, d.last_activity_at), 0) AS sums
               FROM thread_directory AS d
              WHERE NOT d.is_deleted",
        ),
    },
    Pair {
        name: PARTICIPANTS,
        told_by: &["contribution"],
        on_the_way: ON_THE_WAY,
        left: Side::Shards(
            "SELECT c.bucket AS class, 'author ' || c.author_id || ' in thread ' || c.thread_id AS key,
                    hashtextextended(concat_ws('|', c.thread_author_id, c.posts, c.deleted, c.last_post_at, c.version),
                                     0) AS digest, 0::bigint AS sums
               FROM therev.fence AS f
               JOIN therev.thread_contributions AS c ON therev.may_read(f, c.bucket, c.author_id)
              WHERE f.colocation_group = 'content'",
        ),
        right: Side::Shards(
            "SELECT therev.bucket_of(p.participant_id) AS class,
                    'author ' || p.participant_id || ' in thread ' || p.thread_id AS key,
                    hashtextextended(concat_ws('|', p.author_id, p.posts, p.deleted, p.last_post_at, p.version), 0)
                        AS digest, 0::bigint AS sums
               FROM therev.fence AS f
               JOIN therev.thread_participants AS p ON therev.may_read(f, p.bucket, p.author_id)
              WHERE f.colocation_group = 'content'",
        ),
    },
];

/// The keys that events on their way are about, of these keys. What is on its way for longer than a minute, the proof of the
/// outbox names.
const ON_THE_WAY: &str = "
    SELECT DISTINCT e.key, e.kind
      FROM (SELECT o.kind::text AS kind,
                   CASE o.kind WHEN 'user' THEN 'user ' || (f.fact ->> 'user_id')
                               WHEN 'contribution'
                               THEN 'author ' || (f.fact ->> 'author_id') || ' in thread ' || (f.fact ->> 'thread_id')
                               ELSE 'thread ' || (f.fact ->> 'thread_id') END AS key
              FROM therev.outbox AS o, jsonb_array_elements(therev.facts_of(o)) AS f (fact)
             WHERE o.delivered_at IS NULL AND o.created_at >= now() - interval '1 minute'
               AND o.kind = ANY ($1::text[]::therev.event_kind[])) AS e
     WHERE e.key = ANY ($2)";

/// The same of names: a user's event is about all of its names, the others are about the keys of claims. A registration that was
/// cut off before it confirmed its names has left the one, a bulk write whose users are not copied yet the other.
const NAMES_ON_THE_WAY: &str = "
    SELECT DISTINCT k.key, e.kind
      FROM (SELECT o.kind::text AS kind, f.fact
              FROM therev.outbox AS o, jsonb_array_elements(therev.facts_of(o)) AS f (fact)
             WHERE o.delivered_at IS NULL AND o.created_at >= now() - interval '1 minute'
               AND o.kind = ANY ($1::text[]::therev.event_kind[])) AS e
     CROSS JOIN LATERAL (
            VALUES (therev.claim_key('user_name', e.fact ->> 'user_name')::text),
                   (therev.claim_key('email', e.fact ->> 'email')::text),
                   (e.fact ->> 'claim_key')) AS about (claim_key)
      JOIN (SELECT d.key,
                   therev.claim_key(split_part(d.key, ' ', 1), substr(d.key, strpos(d.key, ' ') + 1))::text AS claim_key
              FROM unnest($2::text[]) AS d (key)) AS k ON k.claim_key = about.claim_key";

/// Rows and an order-independent hash of them, by class.
type Classes = BTreeMap<i16, (i64, i64)>;
/// The rows of some classes, by key.
type Rows = BTreeMap<String, Vec<Hashed>>;
/// The kinds of events on their way, by the keys that they are about.
type Events = BTreeMap<String, BTreeSet<String>>;

/// A row of one side.
struct Hashed {
    class: i16,
    digest: i64,
    sums: i64,
}

/// A key that every look found different.
pub(crate) struct Differing {
    /// How.
    what: &'static str,
    /// Whether an event is on its way that may be all it takes.
    pub(crate) is_late: bool,
    /// The classes in which the side that counts has it.
    pub(crate) classes: BTreeSet<i16>,
    /// What the derived side had of it.
    derived: Vec<(i64, i64)>,
}

/// How many rows of both sides are held at once, unless one class has more: some hundred bytes each.
const ROWS_AT_ONCE: u64 = 500_000;

/// How a key differs of which only the sums do.
const SUMS_DIFFER: &str = "the sums of the two sides differ";

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
    for (key, differing) in differing.into_iter().filter(|(_, differing)| !differing.is_late) {
        check.wrong(format!("{key}: {}", differing.what));
    }
    Ok(check)
}

/// The keys of the proof `name` that differ, as its check finds them; those that are only late among them.
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
    let rows_of = |class: &i16| {
        let rows = [&left, &right].map(|side| side.get(class).map_or(0, |(rows, _)| *rows));
        u64::try_from(rows.iter().sum::<i64>()).unwrap_or(0)
    };
    let mut wrong: BTreeMap<String, Differing> = BTreeMap::new();
    for some in in_parts(&suspects, ROWS_AT_ONCE, rows_of) {
        for (key, found) in look_closely(databases, pair, some).await? {
            match wrong.entry(key) {
                Entry::Vacant(free) => drop(free.insert(found)),
                Entry::Occupied(mut known) => known.get_mut().classes.extend(found.classes),
            }
        }
    }
    Ok((checked, wrong))
}

/// The keys of some classes that differ in every look.
async fn look_closely(
    databases: &Databases,
    pair: &Pair,
    suspects: &[i16],
) -> Result<BTreeMap<String, Differing>, Error> {
    let mut wrong: Option<BTreeMap<String, Differing>> = None;
    let mut on_the_way = Events::new();
    for look in 0..LOOKS {
        if wrong.as_ref().is_some_and(BTreeMap::is_empty) {
            break;
        }
        if look > 0 {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        if look + 1 == LOOKS
            && let Some(wrong) = &wrong
        {
            // Asked before the last look, in which agrees what is told meanwhile.
            on_the_way = events(databases, pair, wrong).await?;
        }
        let (left, right) =
            (rows(databases, &pair.left, suspects).await?, rows(databases, &pair.right, suspects).await?);
        let mut still = differences(&left, &right);
        if let Some(before) = wrong.take() {
            // The sides are asked one after the other, and what is written all the time differs each time. It is being told: what
            // is stuck stays as it was.
            still.retain(|key, now| before.get(key).is_some_and(|earlier| earlier.derived == now.derived));
            for (key, earlier) in before {
                if let Some(differing) = still.get_mut(&key) {
                    differing.classes.extend(earlier.classes);
                }
            }
        }
        wrong = Some(still);
    }
    let mut wrong = wrong.unwrap_or_default();
    for (key, differing) in &mut wrong {
        let tells = |kind: &String| kind != SUMMED || differing.what == SUMS_DIFFER;
        differing.is_late = on_the_way.get(key).is_some_and(|kinds| kinds.iter().any(tells));
    }
    Ok(wrong)
}

/// The events on their way about keys that differ.
async fn events(databases: &Databases, pair: &Pair, differing: &BTreeMap<String, Differing>) -> Result<Events, Error> {
    let keys: Vec<&str> = differing.keys().map(String::as_str).collect();
    let mut all = Events::new();
    for row in databases.ask_shards(pair.on_the_way, &[&pair.told_by, &keys]).await? {
        all.entry(row.get("key")).or_default().insert(row.get("kind"));
    }
    Ok(all)
}

fn differences(left: &Rows, right: &Rows) -> BTreeMap<String, Differing> {
    let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let judge = |key: &String| match (left.get(key).map(Vec::as_slice), right.get(key).map(Vec::as_slice)) {
        (Some([l]), Some([r])) if l.digest != r.digest => Some("the two sides differ"),
        (Some([l]), Some([r])) if l.sums != r.sums => Some(SUMS_DIFFER),
        (Some([_]), Some([_])) => None,
        (Some([_]), None) => Some("missing on the derived side"),
        (None, Some([_])) => Some("on the derived side only"),
        _ => Some("more than once"),
    };
    let differing = |key: &String| {
        let classes = left.get(key).into_iter().flatten().map(|row| row.class).collect();
        let mut derived: Vec<(i64, i64)> = right.get(key).into_iter().flatten().map(|r| (r.digest, r.sums)).collect();
        derived.sort_unstable();
        judge(key).map(|what| (key.clone(), Differing { what, is_late: false, classes, derived }))
    };
    keys.into_iter().filter_map(differing).collect()
}

async fn classes(databases: &Databases, side: &Side) -> Result<Classes, Error> {
    // With the key, or rows that only changed their keys would look the same.
    let summed = |sql: &str| {
        format!(
            "SELECT s.class, count(*), bit_xor(hashtextextended(s.key, s.digest # s.sums))
               FROM ({sql}) AS s GROUP BY s.class"
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
    let single =
        |sql: &str| format!("SELECT s.class, s.key, s.digest, s.sums FROM ({sql}) AS s WHERE s.class = ANY ($1)");
    let mut all = Rows::new();
    for rows in ask(databases, side, single, Some(classes)).await? {
        for row in rows {
            let hashed = Hashed { class: row.get(0), digest: row.get(2), sums: row.get(3) };
            all.entry(row.get(1)).or_default().push(hashed);
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
