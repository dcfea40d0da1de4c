//! Rows by an id that names only the bucket: of whoever lives there, or of a user of that bucket who is placed apart.
//!
//! The shard that owns the bucket says who is away, and each shard that has one of those whether it does. *Nothing* means that
//! all of them answered as owners; where one did not, a user is just changing places.

use crate::error::Error;
use crate::pool::{Errand, Params};
use crate::store::{Route, Shards, found};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use placement::{Bucket, Group, Place, ShardNo, UserId, Whose};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Row;
use uuid::Uuid;

/// What a shard said of an id's row.
enum Verdict {
    /// It has the row.
    Found(Vec<Row>),
    /// It does not own the bucket, and has these users' rows.
    NotHome(Vec<Uuid>),
    /// It owns the bucket, and has these users' rows; these others of the bucket are elsewhere, or just changing places.
    Home(Vec<Uuid>, Vec<(UserId, Option<ShardNo>)>),
}

impl Verdict {
    fn of(rows: Vec<Row>) -> Verdict {
        let Some(first) = rows.first() else { return Verdict::NotHome(Vec::new()) };
        if first.get::<_, Option<bool>>("present").is_some() {
            return Verdict::Found(found(rows));
        }
        let here = first.get::<_, Vec<Uuid>>("here");
        if !first.get::<_, bool>("is_home") {
            return Verdict::NotHome(here);
        }
        let users = first.get::<_, Option<Vec<Uuid>>>("apart_user_id").unwrap_or_default();
        let peers = first.get::<_, Option<Vec<Option<i16>>>>("apart_peer").unwrap_or_default();
        let apart = users.into_iter().zip(peers).map(|(user, peer)| (UserId(user), peer.map(ShardNo)));
        Verdict::Home(here, apart.collect())
    }

    fn here(&self) -> &[Uuid] {
        match self {
            Verdict::Found(_) => &[],
            Verdict::NotHome(here) | Verdict::Home(here, _) => here,
        }
    }
}

impl Shards {
    /// The rows that an id names, from whichever shard has them. `all` begins with the bucket.
    pub(crate) async fn by_id(
        &self,
        group: Group,
        bucket: Bucket,
        (quick, sql): (Option<&str>, &str),
        errand: Errand,
        all: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let mut route = Route::new(self, group, bucket.into());
        loop {
            let home = route.place.shard;
            if let Some(quick) = quick
                && let Some(rows) = route.within(self.quick_by_id(group, bucket, home, (quick, errand), all)).await?
            {
                return Ok(rows);
            }
            let ask = |shard| async move { self.pool(shard).await?.answer(sql, all, errand).await };
            let apart = match Verdict::of(route.within(ask(home)).await?) {
                Verdict::Found(rows) => return Ok(rows),
                Verdict::NotHome(_) => {
                    Box::pin(route.follow()).await?;
                    continue;
                }
                Verdict::Home(_, apart) => apart,
            };
            if apart.is_empty() {
                return Ok(Vec::new());
            }
            let mut by_shard: BTreeMap<ShardNo, Vec<Uuid>> = BTreeMap::new();
            let mut all_answered = true;
            for (user, peer) in apart {
                match peer {
                    Some(peer) => by_shard.entry(peer).or_default().push(user.0),
                    None => all_answered = false,
                }
            }
            for (shard, users) in by_shard {
                for whose in users.iter().map(|user| Whose::from(UserId(*user))) {
                    if self.place(group, whose).shard != shard {
                        self.learn(group, whose, Place { shard, epoch: 0 }, true);
                    }
                }
                match Verdict::of(route.within(ask(shard)).await?) {
                    Verdict::Found(rows) => return Ok(rows),
                    verdict => all_answered &= users.iter().all(|user| verdict.here().contains(user)),
                }
            }
            if all_answered {
                return Ok(Vec::new());
            }
            route.wait().await?;
        }
    }

    /// One round of everybody who may have the row, as far as this node knows; `None`: nobody shows it.
    async fn quick_by_id(
        &self,
        group: Group,
        bucket: Bucket,
        home: ShardNo,
        (quick, errand): (&str, Errand),
        all: &Params<'_>,
    ) -> Result<Option<Vec<Row>>, Error> {
        let map = self.map();
        if !map.has_pins() {
            let rows = self.pool(home).await?.answer(quick, all, errand).await?;
            return Ok(Some(rows).filter(|rows| !rows.is_empty()));
        }
        let shards: BTreeSet<ShardNo> =
            map.pins_of(group, bucket).map(|(_, place)| place.shard).chain([home]).collect();
        let ask = |shard| async move { self.pool(shard).await?.answer(quick, all, errand).await };
        let mut asked: FuturesUnordered<_> = shards.into_iter().map(ask).collect();
        // Whoever has the row ends it: a shard that does not answer matters only where nobody has, and is asked again then.
        while let Some(answer) = asked.next().await {
            if let Some(rows) = answer.ok().filter(|rows: &Vec<Row>| !rows.is_empty()) {
                return Ok(Some(rows));
            }
        }
        Ok(None)
    }
}
