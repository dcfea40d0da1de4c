//! Writes of one kind that come at once go to their shard together: one statement, one commit, one wait for the disk.
//!
//! A caller who finds nobody under way writes alone, at once. What comes while enough are gathers, and goes as one statement on
//! many owners, each fenced by itself. Whatever becomes of it, nobody suffers for another: what the shard refused is sent on by
//! itself, and of a statement that failed everybody tries alone.

use crate::error::{Database, Error};
use crate::fan_out::{Item, Told, tell};
use crate::gathering::Gathering;
use crate::pool::{Errand, Params};
use crate::statement::{Write, WriteMany};
use crate::store::{Route, Shards, found};
use futures_util::future::join_all;
use placement::{Bucket, ShardNo, Whose};
use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How many statements of one kind are under way to a shard before others gather: with a single one, a caller would wait for
/// almost all of another's.
const UNDER_WAY: usize = 2;
/// How many wait at the most; whoever comes then goes alone.
const GATHERED: usize = 500;
/// How many go at once: a relocation's switch waits for each statement.
const AT_ONCE: usize = 32;

/// How long a statement keeps others gathering: one that takes longer waits for something that is not theirs.
const SHORT: Duration = Duration::from_millis(20);

/// Where a statement goes, and which it is.
type To = (ShardNo, &'static str);

/// What waits to go together.
pub(crate) struct Together(Gathering<To, Waiting>);

struct Waiting {
    key: Uuid,
    item: Item,
    caller: oneshot::Sender<Outcome>,
}

/// What became of one of many.
enum Outcome {
    Written(Row),
    /// Its owner's rows are not written there.
    Refused,
    /// Nothing was done for it: it goes alone.
    Alone,
    /// It may have been done.
    Unknown,
}

impl Default for Together {
    fn default() -> Together {
        Together(Gathering::new(UNDER_WAY, GATHERED, AT_ONCE))
    }
}

/// A place under way.
struct Place {
    shards: Shards,
    to: To,
    many: &'static WriteMany,
    runtime: Handle,
    held: Held,
}

/// For what a place is held, and so what becomes of what has gathered when it is left.
enum Held {
    /// A statement that goes alone: it is carried then.
    Alone,
    /// To carry it: nobody does any more.
    Carries,
    /// It was given back.
    Nothing,
}

impl Place {
    fn new(shards: &Shards, to: To, many: &'static WriteMany, held: Held) -> Place {
        Place { shards: shards.clone(), to, many, runtime: Handle::current(), held }
    }

    /// What is to be carried next; the place is given back with the last look.
    fn next(&mut self) -> Vec<Waiting> {
        let next = self.shards.inner.together.0.next(self.to);
        if next.is_empty() {
            self.held = Held::Nothing;
        }
        next
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let together = &self.shards.inner.together.0;
        match self.held {
            Held::Alone if together.end(self.to) => {
                let (shards, runtime) = (self.shards.clone(), self.runtime.clone());
                let carries = Place { shards, to: self.to, many: self.many, runtime, held: Held::Carries };
                self.runtime.spawn(carry(carries));
            }
            Held::Carries => together.abandon(self.to),
            Held::Alone | Held::Nothing => {}
        }
    }
}

impl Shards {
    /// As [`Shards::write_on`], for a statement that always writes, and of which many may come at once: what would wait goes with
    /// others as one of `many`. `item` is what that finds in `owned.item`; its result names each row by `key`.
    pub async fn write_together(
        &self,
        alone: &Write,
        many: &'static WriteMany,
        bucket: Bucket,
        params: &Params<'_>,
        (key, item): (Uuid, impl Fn() -> serde_json::Value),
    ) -> Result<(ShardNo, Vec<Row>), Error> {
        let number = bucket.sql();
        let mut all: Vec<&(dyn ToSql + Sync)> = vec![&number];
        all.extend_from_slice(params);
        let whose = Whose { bucket, user: self.inner.load.count(alone.group, params.first()) };
        let mut route = Route::new(self, alone.group, whose);
        loop {
            let to = (route.place.shard, many.sql());
            let pool = self.pool(to.0).await?;
            let together = &self.inner.together.0;
            let place = together.begin(to).then(|| Place::new(self, to, many, Held::Alone));
            let outcome = if place.is_some() {
                Outcome::Alone
            } else {
                let (caller, outcome) = oneshot::channel();
                match together.add(to, Waiting { key, item: Item { whose, value: item() }, caller }) {
                    Err(_) => Outcome::Alone,
                    Ok(is_wanted) => {
                        if is_wanted {
                            tokio::spawn(carry(Place::new(self, to, many, Held::Carries)));
                        }
                        route.within(async { Ok(outcome.await.unwrap_or(Outcome::Unknown)) }).await?
                    }
                }
            };
            let rows = match outcome {
                Outcome::Written(row) => vec![row],
                Outcome::Refused => Vec::new(),
                Outcome::Alone => route.within(ended(place, pool.answer(alone.sql(), &all, Errand::Write))).await?,
                Outcome::Unknown => {
                    return Err(Error::OutcomeUnknown { database: Database::Shard(to.0), source: None });
                }
            };
            if !rows.is_empty() {
                return Ok((to.0, found(rows)));
            }
            Box::pin(route.follow()).await?;
        }
    }

    async fn send(&self, shard: ShardNo, many: &WriteMany, waiting: Vec<Waiting>) {
        let (mut items, mut keys, mut callers) = (Vec::new(), Vec::new(), Vec::new());
        for Waiting { key, item, caller } in waiting {
            // Who waits no longer is not written for, and of two of one key the second goes alone: it would be refused.
            if caller.is_closed() {
                continue;
            }
            if keys.contains(&key) {
                let _ = caller.send(Outcome::Alone);
                continue;
            }
            items.push(item);
            keys.push(key);
            callers.push(caller);
        }
        if items.is_empty() {
            return;
        }
        let told = async { tell(self.pool(shard).await?.as_ref(), many, &items).await };
        let answer = tokio::select! {
            biased;
            answer = told => answer,
            // Given up with its last caller, as any statement.
            _ = join_all(callers.iter_mut().map(oneshot::Sender::closed)) => return,
        };
        let outcomes = match answer {
            Ok(told) => each(told, &keys),
            Err(error) => {
                tracing::debug!(%shard, %error, "a statement of many did not succeed");
                let is_unknown = matches!(error, Error::OutcomeUnknown { .. } | Error::Deadline { .. });
                keys.iter().map(|_| if is_unknown { Outcome::Unknown } else { Outcome::Alone }).collect()
            }
        };
        for (caller, outcome) in callers.into_iter().zip(outcomes) {
            // Who waits no longer was late.
            let _ = caller.send(outcome);
        }
    }
}

/// Sends what has gathered until nothing has.
async fn carry(mut place: Place) {
    loop {
        let waiting = place.next();
        if waiting.is_empty() {
            return;
        }
        let (shards, shard, many) = (place.shards.clone(), place.to.0, place.many);
        // Of its own, so that whatever becomes of it the next ones are carried.
        let sent = tokio::spawn(async move { shards.send(shard, many, waiting).await });
        let _ = tokio::time::timeout(SHORT, sent).await;
    }
}

/// Waits for a statement that goes alone, and keeps its place no longer than it is short.
async fn ended<T>(place: Option<Place>, statement: impl Future<Output = T>) -> T {
    let mut statement = pin!(statement);
    if let Some(place) = place {
        let answer = tokio::time::timeout(SHORT, &mut statement).await;
        drop(place);
        if let Ok(answer) = answer {
            return answer;
        }
    }
    statement.await
}

/// What became of each of those that a shard was told of.
fn each(told: Told, keys: &[Uuid]) -> Vec<Outcome> {
    let mut rows: BTreeMap<Uuid, Row> = told.rows.into_iter().map(|row| (row.get("key"), row)).collect();
    let of = |(at, key): (usize, &Uuid)| {
        if told.refused.contains(&at) {
            Outcome::Refused
        } else {
            rows.remove(key).map_or(Outcome::Alone, Outcome::Written)
        }
    };
    keys.iter().enumerate().map(of).collect()
}
