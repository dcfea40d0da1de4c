//! The copy: rows of these buckets, from the snapshot at which the forward stream begins, in PostgreSQL's binary form.

use crate::error::{Error, Result};
use crate::objects;
use crate::record::Relocation;
use crate::side::{KEEP_PART, Pair, PartState, Side, Which};
use crate::throttle::{self, Progress, REST_MAX};
use bytes::BytesMut;
use futures_util::future::{try_join, try_join_all};
use futures_util::{SinkExt, StreamExt};
use shards::Admin;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How many rows of different buckets go side by side.
const SIDE_BY_SIDE: usize = 2;
/// How many rows one COPY takes, roughly: enough that beginning and ending it is not what takes the time.
const ROWS_A_COPY: usize = 8_000;
/// How many buckets a batch of deletes looks at.
const BUCKETS_A_DELETE: usize = 32;
/// How many bytes go out at once: the driver hands over a message for each row.
const PIECE: usize = 1 << 18;
/// How many rows a batch of deletes takes.
const DELETE_BATCH: i64 = 5_000;

/// A table whose rows belong to owners, with its columns.
struct Table {
    name: String,
    columns: String,
    /// Which of its buckets' rows move.
    whose: String,
}

const TABLES: &str = "
    SELECT t.table_name, t.colocation_group::text, t.owner_column,
           string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns
      FROM therev.owned_tables AS t
      JOIN pg_attribute AS a ON a.attrelid = t.table_name::regclass
     WHERE t.colocation_group::text = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
     GROUP BY t.table_name
     ORDER BY t.table_name";

/// Copies everything, and starts the forward stream behind it. What an earlier copy left is removed first.
pub(crate) async fn run(relocation: &Relocation, pair: &Pair, admin: &Admin, progress: &Progress) -> Result<()> {
    begin_round(relocation, pair).await?;
    objects::drop_all(relocation, pair).await?;
    delete_rows(relocation, &pair.target, &["incoming", "ready"], relocation.copy_round).await?;
    fail::fail_point!("relocation.emptied");
    set_sentinels(relocation, pair).await?;
    make_months(pair).await?;
    let slot = objects::make_forward(relocation, pair, admin).await?;
    fail::fail_point!("relocation.subscribed");
    copy_rows(relocation, pair, admin, &slot.snapshot, progress).await?;
    drop(slot);
    fail::fail_point!("relocation.copied");
    objects::make_reverse(relocation, pair, admin).await?;
    fail::fail_point!("relocation.reverse_made");
    objects::start_forward(relocation, pair).await
}

/// More than there are tries of the switch in a round. Those of each round are later ones than all before it, also where the source's part
/// was ended and begun anew meanwhile: a step of somebody who slept finds none of its own number.
pub(crate) const TRIES_A_ROUND: i32 = 10_000;

/// From now on nothing of an earlier copy gets in: its writers check the round. Nor does a try of the switch go on that somebody
/// else is at, as may be where the control database was put back: the source's attempt is a later one, so that nothing is
/// decided, and the target has no sentinel, so that it does not get ready.
async fn begin_round(relocation: &Relocation, pair: &Pair) -> Result<()> {
    pair.target.must_have_part(relocation.relocation).await?;
    // Whoever has slept while another round began leaves the source alone.
    let is_last = "SELECT FROM therev.relocation_parts WHERE relocation = $1 AND copy_round <= $2";
    if pair.target.query(is_last, &[&relocation.relocation, &relocation.copy_round]).await?.is_empty() {
        return Err(Error::Taken(relocation.relocation));
    }
    pair.source.end_keepers(relocation.relocation).await?;
    pair.target.end_keepers(relocation.relocation).await?;
    let gives = pair.source.must_have_part(relocation.relocation).await?;
    if gives.state == PartState::Draining {
        pair.source.query("SELECT therev.back_out($1, $2)", &[&relocation.relocation, &gives.attempt]).await?;
    }
    let first_try = relocation.copy_round.saturating_mul(TRIES_A_ROUND);
    let end_tries = "UPDATE therev.relocation_parts SET attempt = greatest(attempt + 1, $2)
                      WHERE relocation = $1 AND state = 'owned'";
    let has_ended = pair.source.execute(end_tries, &[&relocation.relocation, &first_try]).await? == 1;
    let begun = has_ended && take_round(relocation, &pair.target, relocation.copy_round).await?;
    if begun { Ok(()) } else { Err(Error::Taken(relocation.relocation)) }
}

/// Nothing of an earlier round gets in at the target any more, and it gets ready for none. `false`: a later one has begun, or it is not
/// about to take anything.
pub(crate) async fn take_round(relocation: &Relocation, target: &Side, round: i32) -> Result<bool> {
    let sql = "WITH begun AS (
                   UPDATE therev.relocation_parts SET copy_round = $2, state = 'incoming'
                    WHERE relocation = $1 AND state IN ('incoming', 'ready') AND copy_round <= $2
                    RETURNING relocation),
               unsent AS (
                   DELETE FROM therev.sentinels AS s USING begun AS b WHERE s.relocation = b.relocation)
               SELECT FROM begun";
    Ok(target.execute(sql, &[&relocation.relocation, &round]).await? == 1)
}

/// Removes a side's rows of these buckets in small batches, as long as its part is in one of these states and in this round.
pub(crate) async fn delete_rows(relocation: &Relocation, side: &Side, states: &[&str], round: i32) -> Result<()> {
    let leaves = side
        .query(
            "SELECT r.relation::text AS leaf, r.colocation_group, r.owner_column
               FROM therev.relations_of($1) AS r WHERE r.holds_rows",
            &[&relocation.group_names()],
        )
        .await?;
    let mut rested = Instant::now();
    for row in &leaves {
        let leaf: &str = row.get("leaf");
        let whose = relocation.whose(row.get("colocation_group"), row.get("owner_column"));
        // Most have none: months, and tables of what few people use.
        let any = format!("SELECT EXISTS (SELECT FROM ONLY {leaf} AS t WHERE t.bucket = ANY ($1){whose})");
        if !side.one(&any, &[&relocation.bucket_numbers()]).await?.get::<_, bool>(0) {
            continue;
        }
        let sql = format!(
            "WITH mine AS MATERIALIZED (
                 SELECT FROM therev.relocation_parts AS p
                  WHERE p.relocation = $1 AND p.state = ANY ($2) AND p.copy_round = $3 FOR SHARE),
             doomed AS MATERIALIZED (
                 SELECT t.ctid FROM ONLY {leaf} AS t
                  WHERE t.bucket = ANY ($4){whose} AND EXISTS (SELECT FROM mine) LIMIT {DELETE_BATCH})
             DELETE FROM ONLY {leaf} AS t USING doomed AS d WHERE t.ctid = d.ctid"
        );
        let delete = side.prepare(&sql).await?;
        for buckets in relocation.bucket_numbers().chunks(BUCKETS_A_DELETE) {
            loop {
                let gone = side
                    .client
                    .execute(&delete, &[&relocation.relocation, &states, &round, &buckets])
                    .await
                    .map_err(|e| side.sql(e))?;
                fail::fail_point!("relocation.deleted_some");
                if gone == 0 {
                    break;
                }
                if rested.elapsed() > WORK {
                    throttle::rest_after(rested.elapsed(), side).await?;
                    rested = Instant::now();
                }
            }
        }
    }
    Ok(())
}

/// Within a transaction of the target: its part must still await rows, those of this round, and does until the transaction ends.
/// Whoever slept finds that another copy has begun or that a switch was quicker, and writes nothing.
pub(crate) async fn hold_round(relocation: &Relocation, target: &Side) -> Result<()> {
    let mine = format!("{KEEP_PART} WHERE p.relocation = $1 AND p.copy_round = $2 AND p.state = 'incoming' FOR SHARE");
    let round = target.query(&mine, &[&relocation.relocation, &relocation.copy_round]).await?;
    if round.is_empty() { Err(Error::Taken(relocation.relocation)) } else { Ok(()) }
}

/// The sentinels of both directions on both sides, so that the streams carry updates of them alone. Not by a worker that slept
/// while another one went on or came to the end.
async fn set_sentinels(relocation: &Relocation, pair: &Pair) -> Result<()> {
    for side in [&pair.source, &pair.target] {
        for which in [Which::Source, Which::Target] {
            let set = side
                .execute(
                    "INSERT INTO therev.sentinels (relocation, side)
                     SELECT p.relocation, $2
                       FROM therev.relocation_parts AS p
                      WHERE p.relocation = $1 AND (p.state = 'owned' OR (p.state = 'incoming' AND p.copy_round = $3))
                        FOR SHARE
                     ON CONFLICT (relocation, side) DO UPDATE SET attempt = 0, beat = 0",
                    &[&relocation.relocation, &which.name(), &relocation.copy_round],
                )
                .await?;
            if set == 0 {
                return Err(Error::Taken(relocation.relocation));
            }
        }
    }
    Ok(())
}

/// Months whose rows the source has get their partitions at the target too: a shard that was added later lacks those before.
async fn make_months(pair: &Pair) -> Result<()> {
    let months = pair
        .source
        .query(
            "SELECT i.inhparent::regclass::text AS parent, to_date(right(c.relname, 7), 'YYYY_MM')::text AS month
               FROM therev.owned_tables AS t
               JOIN pg_inherits AS i ON i.inhparent = t.table_name::regclass
               JOIN pg_class AS c ON c.oid = i.inhrelid",
            &[],
        )
        .await?;
    for month in months {
        let (parent, month): (&str, &str) = (month.get("parent"), month.get("month"));
        pair.target.query("SELECT therev.make_partition($1, $2::text::date)", &[&parent, &month]).await?;
    }
    Ok(())
}

async fn copy_rows(
    relocation: &Relocation,
    pair: &Pair,
    admin: &Admin,
    snapshot: &str,
    progress: &Progress,
) -> Result<()> {
    let tables: Vec<Table> = pair
        .source
        .query(TABLES, &[&relocation.group_names()])
        .await?
        .iter()
        .map(|row| Table {
            name: row.get("table_name"),
            columns: row.get("columns"),
            whose: relocation.whose(row.get("colocation_group"), row.get("owner_column")),
        })
        .collect();
    let parts: Vec<(&str, &str)> = tables.iter().map(|table| (table.name.as_str(), table.whose.as_str())).collect();
    let buckets = relocation.bucket_numbers();
    let rows = count_each(&pair.source, &parts, &buckets).await?;
    progress.reset(rows.iter().sum());
    let queue = Mutex::new(Vec::new());
    for (table, rows) in tables.iter().zip(rows).rev() {
        let rows = usize::try_from(rows).unwrap_or(0).max(1);
        let chunk = (buckets.len() * ROWS_A_COPY).div_ceil(rows).max(1);
        queue_of(&queue).extend(buckets.chunks(chunk).map(|chunk| (table, chunk)));
    }
    let lanes: Vec<_> = (0..SIDE_BY_SIDE).map(|_| Lane::run(relocation, admin, snapshot, &queue, progress)).collect();
    let copied = try_join_all(lanes);
    let watched = throttle::watch(relocation, [&pair.source, &pair.target], progress);
    tokio::select! {
        done = copied => { done?; }
        stopped = watched => stopped?,
    }
    progress.say("");
    Ok(())
}

/// What is left to copy: tables with some buckets each.
type Queue<'a> = Mutex<Vec<(&'a Table, &'a [i16])>>;

fn queue_of<'q, 'a>(queue: &'q Queue<'a>) -> MutexGuard<'q, Vec<(&'a Table, &'a [i16])>> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How many rows of these buckets the tables hold, each with the condition that says which of them are meant.
pub(crate) async fn count_rows(side: &Side, tables: &[(&str, &str)], buckets: &[i16]) -> Result<i64> {
    Ok(count_each(side, tables, buckets).await?.iter().sum())
}

/// The same, table by table.
async fn count_each(side: &Side, tables: &[(&str, &str)], buckets: &[i16]) -> Result<Vec<i64>> {
    let mut rows = Vec::with_capacity(tables.len());
    for (table, whose) in tables {
        let sql = format!("SELECT count(*) FROM {table} WHERE bucket = ANY ($1){whose}");
        rows.push(side.one(&sql, &[&buckets]).await?.get(0));
    }
    Ok(rows)
}

/// A pair of connections through which rows go.
struct Lane {
    from: Side,
    to: Side,
}

/// Where others are at work, a copy, or a removal, works so long at a time and rests three times as long after it: users come first, and the
/// brake only looks now and then. Shorter, and a server would not notice: it had enough under way to go on with.
const WORK: Duration = Duration::from_millis(100);

/// When a lane has rested last.
struct Pace(Instant);

impl Pace {
    async fn rest(&mut self, progress: &Progress) {
        let worked = self.0.elapsed();
        if worked > WORK {
            if progress.has_company() {
                tokio::time::sleep((worked * 3).min(REST_MAX)).await;
            }
            self.0 = Instant::now();
        }
    }
}

impl Lane {
    /// Copies what is left, one after the other, until nothing is.
    async fn run(
        relocation: &Relocation,
        admin: &Admin,
        snapshot: &str,
        queue: &Queue<'_>,
        progress: &Progress,
    ) -> Result<()> {
        let lane = Lane::open(relocation, admin, snapshot).await?;
        let mut pace = Pace(Instant::now());
        loop {
            let next = queue_of(queue).pop();
            let Some((table, buckets)) = next else { return Ok(()) };
            lane.copy(relocation, table, buckets, progress, &mut pace).await?;
            fail::fail_point!("relocation.copied_some");
        }
    }

    async fn open(relocation: &Relocation, admin: &Admin, snapshot: &str) -> Result<Lane> {
        let from = Side::connect(admin, Which::Source, relocation.source);
        let to = Side::connect(admin, Which::Target, relocation.target);
        let (from, to) = try_join(from, to).await?;
        from.batch(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'"))
            .await?;
        // Made durable by the synchronous commit of `get_ready`, which comes after it.
        to.batch("SET synchronous_commit = off").await?;
        Ok(Lane { from, to })
    }

    /// Copies some buckets of a table in one transaction of the target, in which the round is checked.
    async fn copy(
        &self,
        relocation: &Relocation,
        table: &Table,
        buckets: &[i16],
        progress: &Progress,
        pace: &mut Pace,
    ) -> Result<()> {
        let list = buckets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let Table { name, columns, whose } = table;
        let out = format!(
            "COPY (SELECT {columns} FROM {name} WHERE bucket = ANY ('{{{list}}}'){whose}) TO STDOUT (FORMAT binary)"
        );
        self.to.batch("BEGIN").await?;
        hold_round(relocation, &self.to).await?;
        let rows = self.from.client.copy_out(&out).await.map_err(|e| self.from.sql(e))?;
        let into = format!("COPY {name} ({columns}) FROM STDIN (FORMAT binary)");
        let sink = self.to.client.copy_in(&into).await.map_err(|e| self.to.sql(e))?;
        futures_util::pin_mut!(rows, sink);
        let mut piece = BytesMut::with_capacity(PIECE * 2);
        // Each message is a row, but for the first and the last one.
        let (mut messages, mut told) = (0, 0);
        while let Some(row) = rows.next().await {
            piece.extend_from_slice(&row.map_err(|e| self.from.sql(e))?);
            messages += 1;
            if piece.len() >= PIECE {
                progress.make_way().await;
                self.send(&mut sink, &mut piece, progress).await?;
                progress.rows.fetch_add(messages - told, Ordering::Relaxed);
                told = messages;
                pace.rest(progress).await;
            }
        }
        fail::fail_point!("relocation.copying_some");
        self.send(&mut sink, &mut piece, progress).await?;
        let copied = sink.finish().await.map_err(|e| self.to.sql(e))?;
        self.to.batch("COMMIT").await?;
        progress.rows.fetch_add(i64::try_from(copied).unwrap_or(0) - told, Ordering::Relaxed);
        pace.rest(progress).await;
        Ok(())
    }

    async fn send(
        &self,
        sink: &mut (impl SinkExt<bytes::Bytes, Error = tokio_postgres::Error> + Unpin),
        piece: &mut BytesMut,
        progress: &Progress,
    ) -> Result<()> {
        progress.bytes.fetch_add(i64::try_from(piece.len()).unwrap_or(0), Ordering::Relaxed);
        let full = std::mem::replace(piece, BytesMut::with_capacity(PIECE * 2));
        sink.send(full.freeze()).await.map_err(|e| self.to.sql(e))
    }
}
