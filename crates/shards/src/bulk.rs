//! Bulk writes: lock, check, then copy, in one short transaction of one shard.

use crate::bucket_set::BucketSet;
use crate::error::{Database, Error};
use crate::pool::{CONFIRM, Params, Pool};
use crate::store::Shards;
use bytes::{BufMut, BytesMut};
use deadpool_postgres::Object;
use futures_util::SinkExt;
use placement::{Group, ShardNo, Whose};
use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio_postgres::Row;
use tokio_postgres::types::{IsNull, ToSql, Type};
use uuid::Uuid;

/// A transaction in which the checked buckets may be written freely: a switch waits for its locks.
pub struct Bulk {
    /// `None` once the transaction has ended.
    client: Option<Object>,
    database: Database,
    pool: Arc<Pool>,
    /// How long each step may take: the server minds it too, but a network that lost its way says nothing.
    deadline: Duration,
    /// Held until the end.
    _turn: OwnedSemaphorePermit,
    /// The least version that a row written here may have.
    pub version_floor: i64,
}

/// Where all rows were there, they may be of a commit whose wait for a standby was cut off: this one always has something to wait for.
const COMMIT: &str = "SELECT pg_logical_emit_message(true, 'therev', ''); COMMIT";
/// How a binary COPY begins: signature, flags, no extension.
const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// How many bytes go out at once: the driver's own writer sends every 4 KiB, each of which wakes somebody.
const PIECE: usize = 1 << 18;

/// The lock comes before the check and in a statement of its own, so that the check's snapshot is younger than it:
/// whoever marks a bucket later waits for this transaction.
fn lock(group: Group) -> &'static str {
    match group {
        Group::Account => "BEGIN; SET LOCAL therev.bulk = 'on'; LOCK TABLE users, therev.claims IN ROW EXCLUSIVE MODE",
        Group::Content => {
            "BEGIN; SET LOCAL therev.bulk = 'on'; LOCK TABLE threads, posts, therev.thread_contributions,
                 therev.thread_participants, therev.thread_totals IN ROW EXCLUSIVE MODE"
        }
    }
}

/// Whether all is as the buckets say, which is nearly always so: it goes without naming the owners one by one.
const CHECK_BUCKETS: &str = "
    SELECT f.version_floor
      FROM therev.fence AS f
     WHERE f.colocation_group = $1::text::therev.colocation_group
       AND f.pinned = '{}' AND f.writable & $2::bit(4096) = $2::bit(4096)";

const CHECK: &str = "
    SELECT f.version_floor,
           (SELECT array_agg(k.at) FROM unnest($2::smallint[], $3::uuid[]) WITH ORDINALITY AS k (bucket, owner, at)
             WHERE CASE WHEN k.owner IS NULL THEN get_bit(f.writable, k.bucket) = 0
                        ELSE NOT therev.may_write(f, k.bucket, k.owner) END) AS refused
      FROM therev.fence AS f
     WHERE f.colocation_group = $1::text::therev.colocation_group";

impl Shards {
    /// The shard that this node believes to have somebody's rows: how bulk rows are grouped.
    pub fn believed_shard(&self, group: Group, whose: impl Into<Whose>) -> ShardNo {
        self.place(group, whose.into()).shard
    }

    /// Begins a bulk write of some owners' rows on a shard.
    ///
    /// `None`: the shard does not own all of them. The node has learned where they are; the rows are to be grouped anew.
    pub async fn bulk(&self, group: Group, shard: ShardNo, whose: &BTreeSet<Whose>) -> Result<Option<Bulk>, Error> {
        let pool = self.pool(shard).await?;
        let database = pool.database();
        let turn = pool.bulk_turn().await?;
        let client = pool.get().await?;
        let deadline = self.inner.config.deadline();
        let mut bulk = Bulk { client: Some(client), database, pool, deadline, _turn: turn, version_floor: 0 };
        bulk.in_time(bulk.client()?.batch_execute(lock(group))).await?.map_err(|e| bulk.error(e))?;
        let buckets: BucketSet = whose.iter().map(|whose| whose.bucket).collect();
        if let Some(row) = bulk.query(CHECK_BUCKETS, &[&group.name(), &buckets]).await?.first() {
            bulk.version_floor = row.get("version_floor");
            return Ok(Some(bulk));
        }
        let numbers: Vec<i16> = whose.iter().map(|whose| whose.bucket.sql()).collect();
        let users: Vec<Option<Uuid>> = whose.iter().map(|whose| whose.user.map(|user| user.0)).collect();
        let rows = bulk.query(CHECK, &[&group.name(), &numbers, &users]).await?;
        let row = rows.first().ok_or_else(|| Error::Answer { database, reason: "it has no fence".into() })?;
        bulk.version_floor = row.get("version_floor");
        let refused: Vec<i64> = row.get::<_, Option<_>>("refused").unwrap_or_default();
        if refused.is_empty() {
            return Ok(Some(bulk));
        }
        bulk.end("ROLLBACK").await?;
        let asked: Vec<Whose> = whose.iter().copied().collect();
        let refused = refused.into_iter().filter_map(|at| asked.get(usize::try_from(at - 1).ok()?).copied());
        let refused: Vec<Whose> = refused.collect();
        let mut waits = None;
        for (whose, said) in refused.iter().zip(self.ownership(shard, group, &refused).await?) {
            match said.ownership.hint(self.place(group, *whose).epoch).place(shard) {
                Some(place) => self.learn_refusal(group, *whose, shard, place, said.is_pin),
                None => waits = Some(*whose),
            }
        }
        if let Some(whose) = waits {
            if let Some((owner, is_pin)) = Box::pin(self.end_late_switch(shard, group, whose)).await {
                self.learn_refusal(group, whose, shard, owner, is_pin);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(None)
    }
}

impl Bulk {
    /// Where it writes.
    pub fn database(&self) -> Database {
        self.database
    }

    /// Runs a statement in the transaction, prepared once per connection.
    pub async fn query(&self, sql: &str, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let client = self.client()?;
        let answer = async { client.query(&client.prepare_cached(sql).await?, params).await };
        self.in_time(answer).await?.map_err(|e| self.error(e))
    }

    /// Copies rows in PostgreSQL's binary form; `copy` is a `COPY … FROM STDIN (FORMAT binary)` of columns of these
    /// types. Says how many.
    pub async fn copy<'a>(
        &self,
        copy: &str,
        types: &[Type],
        rows: impl Iterator<Item = Vec<&'a (dyn ToSql + Sync)>>,
    ) -> Result<u64, Error> {
        self.in_time(send(self.client()?, self.database, copy, types, rows)).await?
    }

    /// Makes it all true.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.end(COMMIT).await
    }

    /// Has the commit wait for standbys though nothing was written: what was found written may be the doing of one whose wait was cut
    /// off.
    pub async fn confirm(&self) -> Result<(), Error> {
        self.query(CONFIRM, &[]).await.map(drop)
    }

    async fn end(&mut self, how: &str) -> Result<(), Error> {
        let ended = self.in_time(self.client()?.batch_execute(how)).await?;
        if ended.is_ok() {
            self.client = None;
        }
        ended.map_err(|e| Error::of_statement(self.database, how == COMMIT, e))
    }

    /// Waits for a step no longer than a call may take.
    async fn in_time<T>(&self, step: impl Future<Output = T>) -> Result<T, Error> {
        tokio::time::timeout(self.deadline, step).await.map_err(|_| {
            self.pool.doubt();
            Error::Deadline {
                limit_ms: self.deadline.as_millis(),
                waiting_for: format!("an answer from {}", self.database),
            }
        })
    }

    fn client(&self) -> Result<&Object, Error> {
        self.client
            .as_ref()
            .ok_or_else(|| Error::Answer { database: self.database, reason: "the transaction has ended".into() })
    }

    /// Before the commit nothing is done, whatever broke.
    fn error(&self, source: tokio_postgres::Error) -> Error {
        Error::of_statement(self.database, false, source)
    }
}

/// A whole COPY. Before its end nothing is done, whatever broke.
pub(crate) async fn send<'a>(
    client: &Object,
    database: Database,
    copy: &str,
    types: &[Type],
    rows: impl Iterator<Item = Vec<&'a (dyn ToSql + Sync)>>,
) -> Result<u64, Error> {
    let error = |source| Error::of_statement(database, false, source);
    let sink = client.copy_in(copy).await.map_err(error)?;
    futures_util::pin_mut!(sink);
    let mut piece = BytesMut::with_capacity(PIECE + PIECE / 8);
    piece.put_slice(COPY_HEADER);
    for row in rows {
        encode(&row, types, &mut piece).map_err(|reason| Error::Answer { database, reason: reason.to_string() })?;
        if piece.len() >= PIECE {
            let full = std::mem::replace(&mut piece, BytesMut::with_capacity(PIECE + PIECE / 8));
            sink.send(full.freeze()).await.map_err(error)?;
        }
    }
    piece.put_i16(-1);
    sink.send(piece.freeze()).await.map_err(error)?;
    sink.finish().await.map_err(error)
}

/// One row as binary COPY has it: the number of fields, then each with its length, -1 for null.
fn encode(
    row: &[&(dyn ToSql + Sync)],
    types: &[Type],
    piece: &mut BytesMut,
) -> Result<(), Box<dyn StdError + Sync + Send>> {
    piece.put_i16(i16::try_from(row.len())?);
    for (field, type_) in row.iter().zip(types) {
        let at = piece.len();
        piece.put_i32(-1);
        if let IsNull::No = field.to_sql_checked(type_, piece)? {
            let length = i32::try_from(piece.len() - at - 4)?;
            piece[at..at + 4].copy_from_slice(&length.to_be_bytes());
        }
    }
    Ok(())
}

impl Drop for Bulk {
    /// A transaction that was not ended does not go back into the pool: its connection is closed, which undoes it.
    fn drop(&mut self) {
        drop(self.client.take().map(Object::take));
    }
}
