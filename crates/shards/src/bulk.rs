//! Bulk writes: lock, check, then copy, in one short transaction of one shard.

use crate::error::{Database, Error};
use crate::pool::Params;
use crate::store::Shards;
use deadpool_postgres::Object;
use placement::{Bucket, Group, ShardNo};
use std::collections::BTreeSet;
use tokio_postgres::Row;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::types::{ToSql, Type};

/// A transaction in which the checked buckets may be written freely: a switch waits for its locks.
pub struct Bulk {
    /// `None` once the transaction has ended.
    client: Option<Object>,
    database: Database,
    /// The least version that a row written here may have.
    pub version_floor: i64,
}

/// The lock comes before the check and in a statement of its own, so that the check's snapshot is younger than it:
/// whoever marks a bucket later waits for this transaction.
fn lock(group: Group) -> &'static str {
    match group {
        Group::Account => "BEGIN; LOCK TABLE users, therev.claims IN ROW EXCLUSIVE MODE",
        Group::Content => "BEGIN; LOCK TABLE threads, posts, therev.thread_contributions IN ROW EXCLUSIVE MODE",
    }
}

const CHECK: &str = "
    SELECT f.version_floor,
           (SELECT array_agg(b.bucket) FROM unnest($2::smallint[]) AS b (bucket)
             WHERE get_bit(f.writable, b.bucket) = 0) AS refused
      FROM therev.fence AS f
     WHERE f.colocation_group = $1::text::therev.colocation_group";

impl Shards {
    /// The shard that this node believes to own a bucket: how bulk rows are grouped.
    pub fn believed_shard(&self, group: Group, bucket: Bucket) -> ShardNo {
        self.place(group, bucket).shard
    }

    /// Begins a bulk write of some buckets on a shard.
    ///
    /// `None`: the shard does not own all of them. The node has learned where they are; the rows are to be grouped anew.
    pub async fn bulk(&self, group: Group, shard: ShardNo, buckets: &BTreeSet<Bucket>) -> Result<Option<Bulk>, Error> {
        let pool = self.pool(shard).await?;
        let database = pool.database();
        let client = pool.get().await?;
        let mut bulk = Bulk { client: Some(client), database, version_floor: 0 };
        bulk.client()?.batch_execute(lock(group)).await.map_err(|e| bulk.error(e))?;
        let numbers: Vec<i16> = buckets.iter().map(|b| b.sql()).collect();
        let rows = bulk.query(CHECK, &[&group.name(), &numbers]).await?;
        let row = rows.first().ok_or_else(|| Error::Answer { database, reason: "it has no fence".into() })?;
        bulk.version_floor = row.get("version_floor");
        let refused: Vec<i16> = row.get::<_, Option<_>>("refused").unwrap_or_default();
        if refused.is_empty() {
            return Ok(Some(bulk));
        }
        bulk.end("ROLLBACK").await?;
        let refused: Vec<Bucket> = refused.into_iter().filter_map(|n| Bucket::try_from(n).ok()).collect();
        let mut waits = false;
        for (bucket, owned) in self.ownership(shard, group, &refused).await? {
            match owned.hint(self.place(group, bucket).epoch).place(shard) {
                Some(place) => self.learn(group, bucket, place),
                None => waits = true,
            }
        }
        if waits {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        Ok(None)
    }
}

impl Bulk {
    /// Runs a statement in the transaction, prepared once per connection.
    pub async fn query(&self, sql: &str, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let client = self.client()?;
        let statement = client.prepare_cached(sql).await.map_err(|e| self.error(e))?;
        client.query(&statement, params).await.map_err(|e| self.error(e))
    }

    /// Copies rows in PostgreSQL's binary form; `copy` is a `COPY … FROM STDIN (FORMAT binary)` of columns of these
    /// types. Says how many.
    pub async fn copy<'a>(
        &self,
        copy: &str,
        types: &[Type],
        rows: impl Iterator<Item = Vec<&'a (dyn ToSql + Sync)>>,
    ) -> Result<u64, Error> {
        let sink = self.client()?.copy_in(copy).await.map_err(|e| self.error(e))?;
        let writer = BinaryCopyInWriter::new(sink, types);
        futures_util::pin_mut!(writer);
        for row in rows {
            writer.as_mut().write(&row).await.map_err(|e| self.error(e))?;
        }
        writer.finish().await.map_err(|e| self.error(e))
    }

    /// Makes it all true.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.end("COMMIT").await
    }

    async fn end(&mut self, how: &str) -> Result<(), Error> {
        let ended = self.client()?.batch_execute(how).await;
        if ended.is_ok() {
            self.client = None;
        }
        ended.map_err(|e| Error::of_statement(self.database, how == "COMMIT", e))
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

impl Drop for Bulk {
    /// A transaction that was not ended does not go back into the pool: its connection is closed, which undoes it.
    fn drop(&mut self) {
        drop(self.client.take().map(Object::take));
    }
}
