//! The comparison: both sides hold the same rows, whole, by count and hash of each table and bucket. Users write meanwhile, so
//! what differs is looked at again until it agrees or is named.

use crate::beats::Beats;
use crate::copy::hold_round;
use crate::error::{Error, Result};
use crate::record::Relocation;
use crate::side::{Pair, Side, Which};
use crate::throttle::Progress;
use futures_util::future::try_join;
use futures_util::{SinkExt, StreamExt};
use placement::in_parts;
use serde::Serialize;
use shards::Admin;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How often whole buckets are compared before their rows are looked at one by one.
const LOOKS_AT_BUCKETS: u32 = 4;
/// How often a row is looked at before it is named.
const LOOKS_AT_ROWS: u32 = 5;
/// More rows than this do not merely change more quickly than they can be looked at.
const HELD_ROWS: usize = 100;
/// How long such a row is held at the source while what was written before arrives: at first, and how often twice as long.
const HOLD: (Duration, u32) = (Duration::from_millis(100), 5);
/// How many rows of both sides are held at once, unless one bucket has more: some hundred bytes each.
const ROWS_AT_ONCE: u64 = 500_000;
/// How many differences are told.
const EXAMPLES: usize = 5;

/// A row that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// Its table.
    pub table: String,
    /// Its primary key's values, separated by commas.
    pub key: String,
}

/// A table with the columns of its primary key.
struct Keyed {
    table: String,
    key: String,
    columns: String,
    /// Which of its buckets' rows move.
    whose: String,
}

const TABLES: &str = "
    SELECT t.table_name, t.colocation_group::text, t.owner_column,
           (SELECT string_agg('t.' || quote_ident(a.attname), ', ' ORDER BY k.at)
              FROM pg_index AS i, unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, at)
              JOIN pg_attribute AS a ON a.attrelid = t.table_name::regclass AND a.attnum = k.attnum
             WHERE i.indrelid = t.table_name::regclass AND i.indisprimary) AS key,
           (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
              FROM pg_attribute AS a
             WHERE a.attrelid = t.table_name::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '')
               AS columns
      FROM therev.owned_tables AS t
     WHERE t.colocation_group::text = ANY ($1)
     ORDER BY t.table_name";

/// Count and hash of each bucket.
type Sums = BTreeMap<i16, (i64, String)>;
/// Hash of each row, by key.
type Hashes = BTreeMap<String, i64>;

/// Compares everything; with `repair`, rows that differ are copied anew. Says how many rows were compared.
pub(crate) async fn run(
    relocation: &Relocation,
    pair: &Pair,
    admin: &Admin,
    progress: &Progress,
    repair: bool,
) -> Result<i64> {
    let beats = Beats::new(relocation, pair).await?;
    let tables = pair.source.query(TABLES, &[&relocation.group_names()]).await?;
    let (mut compared, mut differences) = (0, BTreeSet::new());
    for row in &tables {
        let table = Keyed {
            table: row.get("table_name"),
            key: row.get("key"),
            columns: row.get("columns"),
            whose: relocation.whose(row.get("colocation_group"), row.get("owner_column")),
        };
        progress.say(format!("comparing {}", table.table));
        let (mut rows, differing) = buckets(&table, relocation, pair, &beats).await?;
        let mut is_repaired = false;
        for some in in_parts(&differing, ROWS_AT_ONCE, |(_, rows)| *rows) {
            let some: Vec<i16> = some.iter().map(|(bucket, _)| *bucket).collect();
            let mut found = rows_of(&table, &some, pair, admin, &beats).await?;
            if repair && !found.is_empty() {
                copy_anew(relocation, &table, &found, &some, pair).await?;
                is_repaired = true;
                found = rows_of(&table, &some, pair, admin, &beats).await?;
            }
            differences.extend(found.into_iter().map(|key| Difference { table: table.table.clone(), key }));
        }
        if is_repaired {
            (rows, _) = buckets(&table, relocation, pair, &beats).await?;
        }
        compared += rows;
    }
    progress.say("");
    if differences.is_empty() {
        return Ok(compared);
    }
    let told = differences.iter().take(EXAMPLES).map(|d| format!("{} ({})", d.table, d.key)).collect::<Vec<_>>();
    let more = differences.len().saturating_sub(EXAMPLES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Err(Error::Differs { relocation: relocation.relocation, examples: format!("{}{more}", told.join(", ")) })
}

/// Compares whole buckets; says how many rows there are, and which buckets do not come to agree, with the rows of both sides.
async fn buckets(
    table: &Keyed,
    relocation: &Relocation,
    pair: &Pair,
    beats: &Beats<'_>,
) -> Result<(i64, Vec<(i16, u64)>)> {
    let sql = format!(
        "SELECT t.bucket, count(*) AS rows, sum(hash_record_extended(t, 0)::numeric)::text AS hash
           FROM {} AS t WHERE t.bucket = ANY ($1){} GROUP BY t.bucket",
        table.table, table.whose
    );
    let mut differing = relocation.bucket_numbers();
    let (mut total, mut rows) = (0, Vec::new());
    for look in 0..LOOKS_AT_BUCKETS {
        let here = sums(&pair.source, &sql, &differing).await?;
        beats.arrive().await?;
        let there = sums(&pair.target, &sql, &differing).await?;
        if look == 0 {
            total = there.values().map(|(rows, _)| rows).sum();
        }
        differing.retain(|bucket| here.get(bucket) != there.get(bucket));
        let held = |bucket: &i16| {
            [&here, &there].iter().filter_map(|side| side.get(bucket)).map(|(rows, _)| *rows).sum::<i64>()
        };
        rows = differing.iter().map(|bucket| (*bucket, u64::try_from(held(bucket)).unwrap_or(0))).collect();
        if rows.is_empty() {
            break;
        }
    }
    Ok((total, rows))
}

async fn sums(side: &Side, sql: &str, buckets: &[i16]) -> Result<Sums> {
    let rows = side.query(sql, &[&buckets]).await?;
    Ok(rows.iter().map(|row| (row.get("bucket"), (row.get("rows"), row.get("hash")))).collect())
}

/// Looks at single rows: one is named when the other side never comes to hold anything that this side held.
async fn rows_of(
    table: &Keyed,
    buckets: &[i16],
    pair: &Pair,
    admin: &Admin,
    beats: &Beats<'_>,
) -> Result<BTreeSet<String>> {
    let sql = format!(
        "SELECT concat_ws(', ', {}) AS key, hash_record_extended(t, 0) AS hash FROM {} AS t WHERE t.bucket = ANY ($1){}",
        table.key, table.table, table.whose
    );
    let mut seen: BTreeMap<String, BTreeSet<Option<i64>>> = BTreeMap::new();
    let mut suspects: Option<BTreeSet<String>> = None;
    for _ in 0..LOOKS_AT_ROWS {
        let here = hashes(&pair.source, &sql, buckets).await?;
        beats.arrive().await?;
        let there = hashes(&pair.target, &sql, buckets).await?;
        let keys: BTreeSet<String> = match suspects.take() {
            Some(suspects) => suspects,
            None => here.keys().chain(there.keys()).cloned().collect(),
        };
        let mut differing = BTreeSet::new();
        for key in keys {
            let held = seen.entry(key.clone()).or_default();
            held.insert(here.get(&key).copied());
            if !held.contains(&there.get(&key).copied()) {
                differing.insert(key);
            }
        }
        if differing.is_empty() {
            return Ok(differing);
        }
        suspects = Some(differing);
    }
    hold(table, suspects.unwrap_or_default(), buckets, pair, admin, beats).await
}

/// A row that is written all the time is never the same on both sides when they are looked at one after the other. Each
/// suspect is held still at the source until what was written before has arrived. Says which differ all the same.
async fn hold(
    table: &Keyed,
    mut suspects: BTreeSet<String>,
    buckets: &[i16],
    pair: &Pair,
    admin: &Admin,
    beats: &Beats<'_>,
) -> Result<BTreeSet<String>> {
    if suspects.len() > HELD_ROWS {
        return Ok(suspects);
    }
    let holder = Side::connect(admin, Which::Source, pair.source.shard).await?;
    let look = format!(
        "SELECT hash_record_extended(t, 0) AS hash FROM {} AS t WHERE t.bucket = ANY ($1) AND concat_ws(', ', {}) = $2",
        table.table, table.key
    );
    let lock = format!("{look} FOR SHARE");
    let mut limit = HOLD.0;
    for _ in 0..HOLD.1 {
        let mut differing = BTreeSet::new();
        for key in suspects {
            holder.batch("BEGIN").await?;
            let here = holder.query(&lock, &[&buckets, &key]).await?;
            let arrived = tokio::time::timeout(limit, beats.arrive()).await.ok().transpose()?;
            let there = pair.target.query(&look, &[&buckets, &key]).await?;
            holder.batch("COMMIT").await?;
            let hash = |rows: &[tokio_postgres::Row]| rows.first().map(|row| row.get::<_, i64>("hash"));
            if arrived.is_none() || hash(&here) != hash(&there) {
                differing.insert(key);
            }
        }
        suspects = differing;
        if suspects.is_empty() {
            break;
        }
        limit *= 2;
    }
    Ok(suspects)
}

async fn hashes(side: &Side, sql: &str, buckets: &[i16]) -> Result<Hashes> {
    let rows = side.query(sql, &[&buckets]).await?;
    Ok(rows.iter().map(|row| (row.get("key"), row.get("hash"))).collect())
}

/// Puts the source's rows in the place of those that differ. What the stream brings meanwhile it brings again, in order; and no
/// switch comes in between, for after it the target has newer rows than the source.
async fn copy_anew(
    relocation: &Relocation,
    table: &Keyed,
    keys: &BTreeSet<String>,
    buckets: &[i16],
    pair: &Pair,
) -> Result<()> {
    let Keyed { table, key, columns, whose } = table;
    let list: Vec<&str> = keys.iter().map(String::as_str).collect();
    let quoted = list.iter().map(|key| format!("'{}'", key.replace('\'', "''"))).collect::<Vec<_>>().join(", ");
    let numbers = buckets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let (source, target) = (&pair.source, &pair.target);
    target.batch("BEGIN").await?;
    hold_round(relocation, target).await?;
    // The buckets lead to the rows by the primary key's index: the key in words alone has the whole table read.
    let delete =
        format!("DELETE FROM {table} AS t WHERE t.bucket = ANY ($1) AND concat_ws(', ', {key}) = ANY ($2){whose}");
    target.execute(&delete, &[&buckets, &list]).await?;
    let out = format!(
        "COPY (SELECT {columns} FROM {table} AS t
                WHERE t.bucket = ANY ('{{{numbers}}}') AND concat_ws(', ', {key}) IN ({quoted}){whose})
             TO STDOUT (FORMAT binary)"
    );
    let rows = source.client.copy_out(&out).await.map_err(|e| source.sql(e))?;
    let into = format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)");
    let sink = target.client.copy_in(&into).await.map_err(|e| target.sql(e))?;
    futures_util::pin_mut!(rows, sink);
    while let Some(row) = rows.next().await {
        sink.send(row.map_err(|e| source.sql(e))?).await.map_err(|e| target.sql(e))?;
    }
    sink.finish().await.map_err(|e| target.sql(e))?;
    target.batch("COMMIT").await
}

/// How far a stream is behind the side that it comes from, in bytes of log; `None` where it has no slot. An error where that has
/// dropped what the stream has not read: it will never get on.
pub(crate) async fn lag_bytes(from: &Side, to: &Side, slot: &str) -> Result<Option<i64>> {
    let sql = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::bigint AS lag,
                      coalesce(s.wal_status = 'lost', false) AS is_lost
                 FROM pg_replication_slots AS s WHERE s.slot_name = $1";
    let rows = from.query(sql, &[&slot]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    if row.get("is_lost") {
        let from = from.shard;
        let reason =
            format!("shard {from}'s server has dropped log that it had not read; raise max_slot_wal_keep_size there");
        return Err(Error::Stream { database: to.database(), reason });
    }
    Ok(row.get("lag"))
}

/// How often the stream's worker gave up on a change.
pub(crate) async fn stream_errors(target: &Side, subscription: &str) -> Result<i64> {
    let sql = "SELECT coalesce(sum(apply_error_count), 0)::bigint AS errors
                 FROM pg_stat_subscription_stats WHERE subname = $1";
    Ok(target.one(sql, &[&subscription]).await?.get("errors"))
}

/// The lives of both servers.
pub(crate) async fn lives(pair: &Pair) -> Result<(uuid::Uuid, uuid::Uuid)> {
    try_join(pair.source.life(), pair.target.life()).await
}
