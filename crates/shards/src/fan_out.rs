//! Many owners at once: one statement per shard, side by side; what a shard refuses is asked again elsewhere.

use crate::error::Error;
use crate::late::LATE;
use crate::pool::Params;
use crate::statement::{ReadMany, WriteMany};
use crate::store::Shards;
use futures_util::future::join_all;
use placement::{Bucket, Group, Hint, Place, ShardNo};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// One of many things to write: the bucket it belongs to, and the row as JSON.
#[derive(Debug, Clone)]
pub struct Item {
    /// The bucket that must be owned where it is written.
    pub bucket: Bucket,
    /// What the statement finds in `owned.item`.
    pub value: serde_json::Value,
}

/// The answer of many shards.
#[derive(Debug)]
pub struct Many {
    /// The rows of all shards, in no order.
    pub rows: Vec<Row>,
    /// The shards that gave no answer, and why; what they hold is missing in `rows`.
    pub missing: Vec<(ShardNo, Error)>,
    /// The buckets that got no answer.
    pub unanswered: BTreeSet<Bucket>,
}

/// How a shard is asked: for keys or with items, always side by side with their buckets.
trait Payload: Clone {
    fn bucket(&self) -> Bucket;
}

impl Payload for (Bucket, Uuid) {
    fn bucket(&self) -> Bucket {
        self.0
    }
}

impl Payload for Item {
    fn bucket(&self) -> Bucket {
        self.bucket
    }
}

impl Shards {
    /// Reads rows of many owners. `params` begin at `$3`.
    pub async fn read_many(&self, statement: &ReadMany, keys: Vec<(Bucket, Uuid)>, params: &Params<'_>) -> Many {
        let ask = |shard, asked: Vec<(Bucket, Uuid)>| async move {
            let (buckets, keys): (Vec<i16>, Vec<Uuid>) = asked.iter().map(|(b, key)| (b.sql(), *key)).unzip();
            let mut all: Vec<&(dyn ToSql + Sync)> = vec![&buckets, &keys];
            all.extend_from_slice(params);
            self.pool(shard).await?.query(statement.sql(), &all, false).await
        };
        self.fan_out(statement.group, keys, ask).await
    }

    /// Writes rows of many owners, each checked by itself; those of one shard in one transaction.
    pub async fn write_many(&self, statement: &WriteMany, items: Vec<Item>) -> Many {
        let ask = |shard, items: Vec<Item>| async move {
            let buckets: Vec<i16> = items.iter().map(|item| item.bucket.sql()).collect();
            let values: Vec<&serde_json::Value> = items.iter().map(|item| &item.value).collect();
            self.pool(shard).await?.query(statement.sql(), &[&buckets, &values], true).await
        };
        self.fan_out(statement.group, items, ask).await
    }

    async fn fan_out<P: Payload, F: Future<Output = Result<Vec<Row>, Error>>>(
        &self,
        group: Group,
        payloads: Vec<P>,
        ask: impl Fn(ShardNo, Vec<P>) -> F,
    ) -> Many {
        let started = Instant::now();
        let deadline = self.inner.config.deadline();
        let mut answer = Many { rows: Vec::new(), missing: Vec::new(), unanswered: BTreeSet::new() };
        // Where a hint sent a bucket, for this call: the map may be taught otherwise by others meanwhile.
        let mut sent: BTreeMap<Bucket, Place> = BTreeMap::new();
        let mut open = payloads;
        let mut rounds = 0_u32;
        while !open.is_empty() {
            let mut by_shard: BTreeMap<ShardNo, Vec<P>> = BTreeMap::new();
            for payload in open.drain(..) {
                let place = *sent.entry(payload.bucket()).or_insert_with(|| self.place(group, payload.bucket()));
                by_shard.entry(place.shard).or_default().push(payload);
            }
            let left = deadline.saturating_sub(started.elapsed());
            let asked = by_shard.into_iter().map(|(shard, part)| {
                let reply = ask(shard, part.clone());
                async move {
                    let late =
                        || Error::Deadline { limit_ms: deadline.as_millis(), waiting_for: format!("shard {shard}") };
                    (shard, part, tokio::time::timeout(left, reply).await.unwrap_or_else(|_| Err(late())))
                }
            });
            let mut pause = false;
            for (shard, part, reply) in join_all(asked).await {
                let refused = match reply.map(|rows| answer.take(rows)) {
                    Ok(refused) if refused.is_empty() => continue,
                    Ok(refused) => refused,
                    Err(error) => {
                        answer.give_up(shard, &part, error);
                        continue;
                    }
                };
                let again: Vec<P> = part.into_iter().filter(|p| refused.contains(&p.bucket())).collect();
                match self.redirect(group, shard, &refused, &mut sent, started).await {
                    Ok(waits) => {
                        pause |= waits;
                        open.extend(again);
                    }
                    Err(error) => answer.give_up(shard, &again, error),
                }
            }
            rounds += 1;
            if !open.is_empty() && (pause || rounds > 3) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        answer
    }

    /// Learns where refused buckets are; says whether one of them is just being switched.
    async fn redirect(
        &self,
        group: Group,
        shard: ShardNo,
        refused: &BTreeSet<Bucket>,
        sent: &mut BTreeMap<Bucket, Place>,
        started: Instant,
    ) -> Result<bool, Error> {
        let buckets: Vec<Bucket> = refused.iter().copied().collect();
        let owned = self.ownership(shard, group, &buckets).await?;
        let mut waits = false;
        for bucket in buckets {
            let came_with = sent.get(&bucket).map_or(0, |place| place.epoch);
            let hint = owned.get(&bucket).map_or(Hint::Wait, |o| o.hint(came_with));
            let Some(place) = hint.place(shard) else {
                if !waits
                    && started.elapsed() > LATE
                    && let Some(owner) = Box::pin(self.end_late_switch(shard, group, bucket)).await
                {
                    let place = Place { shard: owner, epoch: came_with };
                    sent.insert(bucket, place);
                    self.learn(group, bucket, place);
                }
                waits = true;
                continue;
            };
            sent.insert(bucket, place);
            self.learn(group, bucket, place);
        }
        Ok(waits)
    }
}

impl Many {
    /// Takes the rows that hold something and says which buckets were refused.
    fn take(&mut self, rows: Vec<Row>) -> BTreeSet<Bucket> {
        let refused = rows.first().and_then(|row| row.get::<_, Option<Vec<i16>>>("refused")).unwrap_or_default();
        self.rows.extend(rows.into_iter().filter(|row| row.get::<_, Option<bool>>("present").is_some()));
        refused.into_iter().filter_map(|number| Bucket::try_from(number).ok()).collect()
    }

    fn give_up<P: Payload>(&mut self, shard: ShardNo, part: &[P], error: Error) {
        self.unanswered.extend(part.iter().map(Payload::bucket));
        self.missing.push((shard, error));
    }

    /// The rows, or the first error when a shard gave no answer.
    pub fn whole(self) -> Result<Vec<Row>, Error> {
        match self.missing.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(self.rows),
        }
    }
}
