//! Many owners at once: one statement per shard, side by side; what a shard refuses is asked again elsewhere.

use crate::bucket_set::BucketSet;
use crate::error::Error;
use crate::pool::{Params, Pool};
use crate::statement::{ReadBuckets, ReadMany, WriteMany};
use crate::store::Shards;
use futures_util::future::join_all;
use placement::{Bucket, Group, Map, Place, ShardNo, UserId, Whose};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// One of many things to write: whose it is, and the row as JSON.
#[derive(Debug, Clone)]
pub struct Item {
    /// Whose rows must be owned where it is written: a user's, or those of a bucket that are no user's.
    pub whose: Whose,
    /// What the statement finds in `owned.item`.
    pub value: serde_json::Value,
}

/// The answer of many shards.
#[derive(Debug)]
pub struct Many {
    /// What each of them answered.
    pub parts: Vec<Part>,
    /// The shards that gave no answer, and why; what they hold is missing in `rows`.
    pub missing: Vec<(ShardNo, Error)>,
    /// The buckets that got no answer.
    pub unanswered: BTreeSet<Bucket>,
}

/// One shard's answer.
#[derive(Debug)]
pub struct Part {
    /// Which shard it is.
    pub shard: ShardNo,
    /// For whose rows it was asked; what it refused of these is in another part.
    pub whose: Vec<Whose>,
    /// The rows, as the statement orders them.
    pub rows: Vec<Row>,
}

/// One of many rows to read: whose it is, and its key. Where only the bucket is known, it may be of anybody there.
pub type Key = (Whose, Uuid);

/// How a shard is asked: for whole buckets, for keys or with items, always side by side with whose they are.
trait Payload: Clone {
    fn whose(&self) -> Whose;
    /// The same asked of a user of that bucket who is placed apart; `None`: it is nobody else's.
    fn of(&self, user: UserId) -> Option<Self>;
}

impl Payload for Whose {
    fn whose(&self) -> Whose {
        *self
    }

    fn of(&self, user: UserId) -> Option<Whose> {
        self.user.is_none().then(|| user.into())
    }
}

impl Payload for Key {
    fn whose(&self) -> Whose {
        self.0
    }

    fn of(&self, user: UserId) -> Option<Key> {
        self.0.user.is_none().then(|| (user.into(), self.1))
    }
}

impl Payload for Item {
    fn whose(&self) -> Whose {
        self.whose
    }

    fn of(&self, _: UserId) -> Option<Item> {
        None
    }
}

/// Buckets and users side by side, for SQL.
fn columns<P: Payload>(payloads: &[P]) -> (Vec<i16>, Vec<Option<Uuid>>) {
    payloads.iter().map(|payload| (payload.whose().bucket.sql(), payload.whose().user.map(|user| user.0))).unzip()
}

impl Shards {
    /// Reads rows of many owners. `params` begin at `$4`.
    pub async fn read_many(&self, statement: &ReadMany, keys: Vec<Key>, params: &Params<'_>) -> Many {
        let ask = |shard, asked: Vec<Key>| async move {
            let (buckets, users) = columns(&asked);
            let keys: Vec<Uuid> = asked.iter().map(|(_, key)| *key).collect();
            let mut all: Vec<&(dyn ToSql + Sync)> = vec![&buckets, &keys, &users];
            all.extend_from_slice(params);
            self.pool(shard).await?.query(statement.sql(), &all, false).await.map(Told::by_place)
        };
        self.fan_out(statement.group, keys, ask).await
    }

    /// Reads rows of whole buckets. `params` begin at `$3`; after the last of them comes how many rows a shard is asked for.
    pub async fn read_buckets(
        &self,
        statement: &ReadBuckets,
        buckets: Vec<Whose>,
        params: &Params<'_>,
        limit: impl Fn(ShardNo) -> usize,
    ) -> Many {
        let ask = |shard, asked: Vec<Whose>| {
            let limit = i64::try_from(limit(shard)).unwrap_or(i64::MAX);
            async move {
                let users: Vec<Uuid> = asked.iter().filter_map(|whose| whose.user).map(|user| user.0).collect();
                let whole = asked.iter().filter(|whose| whose.user.is_none()).map(|whose| whose.bucket);
                let buckets: BucketSet = whole.collect();
                let mut all: Vec<&(dyn ToSql + Sync)> = vec![&buckets, &users];
                all.extend_from_slice(params);
                all.push(&limit);
                let rows = self.pool(shard).await?.query(statement.sql(), &all, false).await?;
                Ok(Told::by_bucket(&asked, rows))
            }
        };
        self.fan_out(statement.group, buckets, ask).await
    }

    /// Writes rows of many owners, each checked by itself; those of one shard in one transaction.
    pub async fn write_many(&self, statement: &WriteMany, items: Vec<Item>) -> Many {
        let ask =
            |shard, items: Vec<Item>| async move { tell(self.pool(shard).await?.as_ref(), statement, &items).await };
        self.fan_out(statement.group, items, ask).await
    }

    async fn fan_out<P: Payload, F: Future<Output = Result<Told, Error>>>(
        &self,
        group: Group,
        payloads: Vec<P>,
        ask: impl Fn(ShardNo, Vec<P>) -> F,
    ) -> Many {
        let started = Instant::now();
        let deadline = self.inner.config.deadline();
        let late =
            |shard: ShardNo| Error::Deadline { limit_ms: deadline.as_millis(), waiting_for: format!("shard {shard}") };
        let mut answer = Many { parts: Vec::new(), missing: Vec::new(), unanswered: BTreeSet::new() };
        // Where they were asked for, or a hint sent them, in this call: the map may be taught otherwise by others meanwhile.
        let mut sent: BTreeMap<Whose, Place> = BTreeMap::new();
        let mut open = self.with_pins(group, payloads);
        let mut rounds = 0_u32;
        while !open.is_empty() {
            let mut by_shard: BTreeMap<ShardNo, Vec<P>> = BTreeMap::new();
            let map = self.map();
            for payload in open.drain(..) {
                let whose = payload.whose();
                let place = sent.get(&whose).copied().unwrap_or_else(|| map.place_of(group, whose));
                // Whole buckets may be many, and only of those that are refused it matters where they were asked for.
                if whose.user.is_some() {
                    sent.insert(whose, place);
                }
                by_shard.entry(place.shard).or_default().push(payload);
            }
            let left = deadline.saturating_sub(started.elapsed());
            let asked =
                by_shard.into_iter().map(|(shard, part)| {
                    let reply = ask(shard, part.clone());
                    async move {
                        (shard, part, tokio::time::timeout(left, reply).await.unwrap_or_else(|_| Err(late(shard))))
                    }
                });
            let mut pause = false;
            for (shard, part, reply) in join_all(asked).await {
                let Told { refused, apart, rows } = match reply {
                    Ok(told) => told,
                    Err(error) => {
                        answer.give_up(shard, &part, error);
                        continue;
                    }
                };
                answer.parts.push(Part { shard, whose: part.iter().map(Payload::whose).collect(), rows });
                // Those of a bucket who are elsewhere, and were not asked for yet, are.
                for (user, peer) in apart {
                    let whose = Whose::from(user);
                    if let Entry::Vacant(unasked) = sent.entry(whose) {
                        let place = *unasked.insert(Place { shard: peer, epoch: 0 });
                        self.learn(group, whose, place, true);
                        let theirs = part.iter().filter(|payload| payload.whose() == whose.bucket.into());
                        open.extend(theirs.filter_map(|payload| payload.of(user)));
                    }
                }
                let again: Vec<P> = refused.into_iter().filter_map(|at| part.get(at).cloned()).collect();
                if again.is_empty() {
                    continue;
                }
                let left = deadline.saturating_sub(started.elapsed());
                let redirected =
                    tokio::time::timeout(left, self.redirect(group, shard, &again, &map, &mut sent, started));
                match redirected.await.unwrap_or_else(|_| Err(late(shard))) {
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

    /// Asks at once for everybody who may have a row, as far as this node knows.
    fn with_pins<P: Payload>(&self, group: Group, mut payloads: Vec<P>) -> Vec<P> {
        let map = self.map();
        if map.has_pins() {
            let apart = payloads.iter().flat_map(|payload| {
                map.pins_of(group, payload.whose().bucket).filter_map(|(user, _)| payload.of(user)).collect::<Vec<_>>()
            });
            let apart: Vec<P> = apart.collect();
            payloads.extend(apart);
        }
        payloads
    }

    /// Learns where refused rows are that were asked for by `map`, or where `sent` says; says whether some of them are just being
    /// switched.
    async fn redirect<P: Payload>(
        &self,
        group: Group,
        shard: ShardNo,
        refused: &[P],
        map: &Map,
        sent: &mut BTreeMap<Whose, Place>,
        started: Instant,
    ) -> Result<bool, Error> {
        let whose: BTreeSet<Whose> = refused.iter().map(Payload::whose).collect();
        let whose: Vec<Whose> = whose.into_iter().collect();
        let said = self.ownership(shard, group, &whose).await?;
        let mut waits = false;
        for (whose, said) in whose.into_iter().zip(said) {
            let came_with = sent.entry(whose).or_insert_with(|| map.place_of(group, whose)).epoch;
            let Some(place) = said.ownership.hint(came_with).place(shard) else {
                if !waits
                    && started.elapsed() > self.late()
                    && let Some((owner, is_pin)) = Box::pin(self.end_late_switch(shard, group, whose)).await
                {
                    sent.insert(whose, Place { epoch: came_with, ..owner });
                    self.learn_refusal(group, whose, shard, owner, is_pin);
                }
                waits = true;
                continue;
            };
            sent.insert(whose, place);
            self.learn_refusal(group, whose, shard, place, said.is_pin);
        }
        Ok(waits)
    }
}

/// Writes rows of many owners on one shard, as far as that owns them.
pub(crate) async fn tell(pool: &Pool, statement: &WriteMany, items: &[Item]) -> Result<Told, Error> {
    let (buckets, users) = columns(items);
    let values: Vec<&serde_json::Value> = items.iter().map(|item| &item.value).collect();
    pool.query(statement.sql(), &[&buckets, &values, &users], true).await.map(Told::by_place)
}

/// What a shard said.
#[derive(Default)]
pub(crate) struct Told {
    /// What it refused, by its place in what it was asked for.
    pub(crate) refused: Vec<usize>,
    /// Who of the buckets is to be had elsewhere.
    apart: Vec<(UserId, ShardNo)>,
    /// The rows that hold something.
    pub(crate) rows: Vec<Row>,
}

impl Told {
    /// An answer that names the refused by their places in the lists.
    fn by_place(rows: Vec<Row>) -> Told {
        let refused = rows.first().and_then(|row| row.get::<_, Option<Vec<i64>>>("refused")).unwrap_or_default();
        let refused = refused.into_iter().filter_map(|at| usize::try_from(at - 1).ok()).collect();
        Told { refused, ..Told::of(rows) }
    }

    /// An answer that names the refused buckets as bits.
    fn by_bucket(asked: &[Whose], rows: Vec<Row>) -> Told {
        let buckets: Option<BucketSet> = rows.first().and_then(|row| row.get("refused_buckets"));
        let users: Option<Vec<Uuid>> = rows.first().and_then(|row| row.get("refused_users"));
        if buckets.is_none() && users.is_none() {
            return Told::of(rows);
        }
        let (buckets, users) = (buckets.unwrap_or_else(BucketSet::empty), users.unwrap_or_default());
        let is_refused = |whose: &Whose| match whose.user {
            Some(user) => users.contains(&user.0),
            None => buckets.contains(whose.bucket),
        };
        let refused = asked.iter().enumerate().filter(|(_, whose)| is_refused(whose)).map(|(at, _)| at).collect();
        Told { refused, ..Told::of(rows) }
    }

    /// What all answers have in common.
    fn of(rows: Vec<Row>) -> Told {
        let Some(first) = rows.first() else { return Told::default() };
        let users = first.try_get::<_, Option<Vec<Uuid>>>("apart_user_id").ok().flatten().unwrap_or_default();
        let peers = first.try_get::<_, Option<Vec<Option<i16>>>>("apart_peer").ok().flatten().unwrap_or_default();
        let apart = users.into_iter().zip(peers).filter_map(|(user, peer)| Some((UserId(user), ShardNo(peer?))));
        let apart = apart.collect();
        let present = |row: &Row| row.get::<_, Option<bool>>("present").is_some();
        Told { refused: Vec::new(), apart, rows: rows.into_iter().filter(present).collect() }
    }
}

impl Many {
    /// The rows of all shards, in no order.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.parts.iter().flat_map(|part| &part.rows)
    }

    fn give_up<P: Payload>(&mut self, shard: ShardNo, part: &[P], error: Error) {
        self.unanswered.extend(part.iter().map(|payload| payload.whose().bucket));
        self.missing.push((shard, error));
    }

    /// The rows, or the first error when a shard gave no answer.
    pub fn whole(self) -> Result<Vec<Row>, Error> {
        match self.missing.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(self.parts.into_iter().flat_map(|part| part.rows).collect()),
        }
    }
}
