//! The handle on a cluster: which shard to ask, and what to do when it says that it is not the one.

use crate::address::{LIBRARY_ROLE, Login};
use crate::catalog::{Catalog, FoundPlacement};
use crate::config::Config;
use crate::directory::Directory;
use crate::error::{Database, Error};
use crate::late::LATE;
use crate::life::Lives;
use crate::load::{Load, TELL_EVERY};
use crate::looks::Looks;
use crate::pool::{Expected, Limits, Params, Pool};
use crate::statement::{Read, Unfenced, Write};
use arc_swap::ArcSwap;
use placement::{Bucket, Group, Hint, Map, Ownership, Place, ShardNo};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

/// A cluster as one node sees it. Cheap to clone; all clones share pools and placement.
#[derive(Clone)]
pub struct Shards {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) control: Arc<Pool>,
    pub(crate) load: Load,
    pub(crate) looks: Looks,
    lives: Arc<Lives>,
    found: FoundPlacement,
    catalog: ArcSwap<Catalog>,
    map: ArcSwap<Map>,
    shards: ArcSwap<BTreeMap<ShardNo, Arc<Pool>>>,
    directory: Directory,
}

/// A short wait while a switch is decided elsewhere; doubled each time up to the second value once it takes longer than one
/// should.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(8));
/// How long a switch takes at most, budget included, unless something is wrong.
const SWITCH: Duration = Duration::from_millis(40);
/// Through how many shards a call is sent without a pause.
const HOPS: u32 = 3;

const OWNERSHIP: &str = "
    SELECT o.bucket, o.state::text, o.peer, o.epoch
      FROM therev.ownership AS o
     WHERE o.colocation_group = $1::text::therev.colocation_group AND o.bucket = ANY ($2::smallint[])";

impl Shards {
    /// Connects to a cluster: asks its control database where everything is, or the state file while that is down.
    ///
    /// Keeps the placement fresh in the background for as long as a clone of it lives.
    pub async fn connect(config: Config) -> Result<Shards, Error> {
        config.check()?;
        let login = Login::new(&config, LIBRARY_ROLE)?;
        let anyone = Expected { cluster_id: None, kind: schema::Kind::Control, life: None };
        let control = Arc::new(Pool::new(Database::Control, login.control()?, anyone, limits(&config, 4), None)?);
        let lives = Arc::new(Lives { login: login.clone(), control: control.clone() });
        let (catalog, found) = match (Catalog::read(&control).await, &config.state_file) {
            (Ok(catalog), _) => (catalog, FoundPlacement::Control),
            (Err(error @ (Error::Down { .. } | Error::Deadline { .. })), Some(path)) => {
                (Catalog::load(path).ok_or(error)?, FoundPlacement::StateFile)
            }
            (Err(error), _) => return Err(error),
        };
        let count = u16::try_from(catalog.shards.len()).unwrap_or(u16::MAX);
        let mut map = Map::first(catalog.layout, count);
        catalog.teach(&mut map);
        let directory = Directory::new(&catalog, &login, &config, &lives)?;
        let shards = Shards {
            inner: Arc::new(Inner {
                shards: ArcSwap::from_pointee(pools(&catalog, &lives, &config, &BTreeMap::new())?),
                catalog: ArcSwap::from_pointee(catalog),
                map: ArcSwap::from_pointee(map),
                config,
                control,
                load: Load::new(),
                looks: Looks::default(),
                lives,
                found,
                directory,
            }),
        };
        if found == FoundPlacement::Control {
            shards.inner.remember();
        }
        tokio::spawn(keep_fresh(Arc::downgrade(&shards.inner)));
        tokio::spawn(keep_told(Arc::downgrade(&shards.inner)));
        Ok(shards)
    }

    /// The configuration it was connected with.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Where the placement came from at the start.
    pub fn found_placement(&self) -> FoundPlacement {
        self.inner.found
    }

    /// What the control database said last.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.inner.catalog.load_full()
    }

    /// The placement in force at this node.
    pub fn map(&self) -> Arc<Map> {
        self.inner.map.load_full()
    }

    /// Replaces the placement in force, as a node that knows nothing or the wrong thing would have it. The shards'
    /// hints mend it call by call.
    pub fn forget_placement(&self, map: Map) {
        self.inner.map.store(Arc::new(map));
    }

    /// Reads the control database anew, now.
    pub async fn refresh(&self) -> Result<(), Error> {
        self.inner.refresh().await
    }

    /// The numbers of all shards.
    pub fn numbers(&self) -> Vec<ShardNo> {
        self.inner.catalog.load().shards.iter().map(|entry| entry.shard).collect()
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.inner.directory
    }

    /// How many statements were sent so far, by database.
    pub fn statements(&self) -> BTreeMap<Database, u64> {
        let shards = self.inner.shards.load_full();
        let pools =
            shards.values().map(AsRef::as_ref).chain(self.inner.directory.pools()).chain([self.inner.control.as_ref()]);
        pools.map(|pool| (pool.database(), pool.statements())).collect()
    }

    /// Reads one owner's rows: fenced, from whichever shard owns the bucket.
    ///
    /// `params` begin at `$2`. No rows: the bucket's owner has none.
    pub async fn read(&self, statement: &Read, bucket: Bucket, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        if statement.names_owner {
            self.inner.load.count(params.first());
        }
        self.fenced(statement.group, bucket, Some(statement.quick()), statement.sql(), params).await
    }

    /// Writes one owner's rows: fenced, on whichever shard owns the bucket.
    ///
    /// `params` begin at `$2`. No rows: the bucket is owned, and the statement found nothing to write.
    pub async fn write(&self, statement: &Write, bucket: Bucket, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        if statement.names_owner {
            self.inner.load.count(params.first());
        }
        self.fenced(statement.group, bucket, None, statement.sql(), params).await
    }

    async fn fenced(
        &self,
        group: Group,
        bucket: Bucket,
        quick: Option<&str>,
        sql: &str,
        params: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let number = bucket.sql();
        let mut all: Vec<&(dyn ToSql + Sync)> = vec![&number];
        all.extend_from_slice(params);
        let mut route = Route::new(self, group, bucket);
        loop {
            let pool = self.pool(route.place.shard).await?;
            for (form, has_verdict) in quick.map(|quick| (quick, false)).into_iter().chain([(sql, true)]) {
                let rows = route.within(pool.answer(form, &all, quick.is_none())).await?;
                if !rows.is_empty() {
                    return Ok(if has_verdict { found(rows) } else { rows });
                }
            }
            Box::pin(route.follow()).await?;
        }
    }

    /// Asks a shard what it says of some buckets.
    pub async fn ownership(
        &self,
        shard: ShardNo,
        group: Group,
        buckets: &[Bucket],
    ) -> Result<BTreeMap<Bucket, Ownership>, Error> {
        let numbers: Vec<i16> = buckets.iter().map(|b| b.sql()).collect();
        let pool = self.pool(shard).await?;
        let rows = pool.query(OWNERSHIP, &[&group.name(), &numbers], false).await?;
        let odd =
            || Error::Answer { database: Database::Shard(shard), reason: "an ownership that makes no sense".into() };
        rows.iter()
            .map(|row| {
                let bucket = Bucket::try_from(row.get::<_, i16>("bucket")).map_err(|_| odd())?;
                let state = row.get::<_, &str>("state").parse().map_err(|_| odd())?;
                let peer = row.get::<_, Option<i16>>("peer").map(ShardNo);
                Ok((bucket, Ownership { state, peer, epoch: row.get("epoch") }))
            })
            .collect()
    }

    /// Runs a statement on a shard's machinery.
    pub async fn unfenced(&self, shard: ShardNo, statement: &Unfenced, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        self.pool(shard).await?.query(statement.sql, params, statement.writes).await
    }

    /// Runs a statement on the control database.
    pub async fn control(&self, statement: &Unfenced, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        self.inner.control.query(statement.sql, params, statement.writes).await
    }

    /// The pool of a shard; a shard that this node has not heard of is looked up in the control database first.
    pub(crate) async fn pool(&self, shard: ShardNo) -> Result<Arc<Pool>, Error> {
        if let Some(pool) = self.inner.shards.load().get(&shard) {
            return Ok(pool.clone());
        }
        Box::pin(self.inner.refresh()).await?;
        self.inner.shards.load().get(&shard).cloned().ok_or_else(|| Error::Answer {
            database: Database::Control,
            reason: format!("a shard points to shard {shard}, which the control database does not know"),
        })
    }

    /// Where this node believes a bucket to be.
    pub(crate) fn place(&self, group: Group, bucket: Bucket) -> Place {
        self.inner.map.load().place(group, bucket)
    }

    /// Notes what a shard said.
    pub(crate) fn learn(&self, group: Group, bucket: Bucket, place: Place) {
        self.inner.map.rcu(|map| {
            let mut map = Map::clone(map);
            map.learn(group, bucket, place);
            map
        });
    }
}

/// The rows that the statement found: one of nulls alone says that the bucket is owned and nothing was.
fn found(mut rows: Vec<Row>) -> Vec<Row> {
    if rows.len() == 1 && rows[0].get::<_, Option<bool>>("present").is_none() {
        rows.clear();
    }
    rows
}

/// One call's way to the owner of a bucket, within its deadline.
pub(crate) struct Route<'a> {
    shards: &'a Shards,
    group: Group,
    bucket: Bucket,
    pub(crate) place: Place,
    started: Instant,
    pause: Duration,
    hops: u32,
}

impl<'a> Route<'a> {
    pub(crate) fn new(shards: &'a Shards, group: Group, bucket: Bucket) -> Route<'a> {
        let place = shards.place(group, bucket);
        Route { shards, group, bucket, place, started: Instant::now(), pause: PAUSE.0, hops: 0 }
    }

    /// Waits for a step of this call, no longer than its deadline.
    pub(crate) async fn within<T>(&self, step: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let deadline = self.shards.inner.config.deadline();
        let left = deadline.saturating_sub(self.started.elapsed());
        tokio::time::timeout(left, step).await.unwrap_or_else(|_| {
            Err(Error::Deadline { limit_ms: deadline.as_millis(), waiting_for: format!("shard {}", self.place.shard) })
        })
    }

    /// Was refused: asks the shard where to go, and waits until that is known.
    pub(crate) async fn follow(&mut self) -> Result<(), Error> {
        let mut pause = Duration::ZERO;
        loop {
            let asked = self.place.shard;
            let owned = self.within(self.shards.look(asked, self.group, self.bucket, pause)).await?;
            let hint = owned.map_or(Hint::Wait, |o| o.hint(self.place.epoch));
            if let Some(place) = hint.place(asked) {
                self.place = place;
                self.shards.learn(self.group, self.bucket, place);
                self.hops = if pause.is_zero() { self.hops + 1 } else { 1 };
                // Nobody is sent around through more than a few shards without a pause: a switch is going on then. And whoever
                // has waited for one looks at the other side first, together with the others, whether it has taken over.
                if self.hops <= HOPS && (pause.is_zero() || place.shard == asked) {
                    return Ok(());
                }
            }
            if self.started.elapsed() > LATE && self.end_late_switch(asked).await {
                return Ok(());
            }
            pause = self.next_pause();
        }
    }

    /// Looks after a switch that takes too long; `true`: it is known now who owns the bucket.
    async fn end_late_switch(&mut self, asked: ShardNo) -> bool {
        let Some(owner) = Box::pin(self.shards.end_late_switch(asked, self.group, self.bucket)).await else {
            return false;
        };
        self.place = Place { shard: owner, ..self.place };
        self.shards.learn(self.group, self.bucket, self.place);
        true
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        if self.started.elapsed() > SWITCH {
            self.pause = (pause * 2).min(PAUSE.1);
        }
        pause
    }
}

impl Inner {
    /// Reads the catalog anew, opens pools to new shards, and keeps what was learned.
    pub(crate) async fn refresh(&self) -> Result<(), Error> {
        let catalog = Catalog::read(&self.control).await?;
        let (before, mut known) = (self.catalog.load_full(), BTreeMap::clone(&self.shards.load()));
        // A number that another database has by now begins anew.
        known.retain(|shard, _| !before.is_another(&catalog, *shard));
        let mut pools = pools(&catalog, &self.lives, &self.config, &known)?;
        // Calls that are on their way to a shard that was removed are sent on by it; the next refresh lets it go.
        let leaving = before.shards.iter().filter_map(|entry| Some((entry.shard, known.get(&entry.shard)?.clone())));
        leaving.for_each(|(shard, pool)| {
            pools.entry(shard).or_insert(pool);
        });
        self.shards.store(Arc::new(pools));
        for entry in &catalog.shards {
            if let Some(pool) = known.get(&entry.shard) {
                pool.know(entry.life);
            }
        }
        self.directory.know(catalog.directory_life);
        self.map.rcu(|map| {
            let mut map = Map::clone(map);
            catalog.teach(&mut map);
            map
        });
        self.catalog.store(Arc::new(catalog));
        self.remember();
        Ok(())
    }

    /// Writes the state file; a node that cannot write it goes on, it only starts less easily next time.
    fn remember(&self) {
        if let Some(path) = &self.config.state_file {
            let catalog = self.catalog.load().with_places(&self.map.load());
            if let Err(error) = catalog.save(path) {
                tracing::warn!(path = %path.display(), %error, "the placement could not be written to the state file");
            }
        }
    }
}

async fn keep_fresh(inner: Weak<Inner>) {
    loop {
        let Some(period) = inner.upgrade().map(|inner| Duration::from_millis(inner.config.refresh_ms.max(100))) else {
            return;
        };
        tokio::time::sleep(period).await;
        let Some(inner) = inner.upgrade() else { return };
        if let Err(error) = inner.refresh().await {
            tracing::debug!(%error, "the placement could not be refreshed; the last known one stays in force");
        }
    }
}

async fn keep_told(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        let Some(inner) = inner.upgrade() else { return };
        if let Err(error) = (Shards { inner }).tell_load().await {
            tracing::debug!(%error, "the control database was not told of this node's load");
        }
    }
}

pub(crate) fn limits(config: &Config, size: usize) -> Limits {
    Limits {
        size: config.pool_size.unwrap_or(size).max(1),
        wait: config.deadline(),
        connect: Duration::from_millis(config.connect_timeout_ms),
        rest: Duration::from_millis(config.breaker_ms),
    }
}

fn pools(
    catalog: &Catalog,
    lives: &Arc<Lives>,
    config: &Config,
    known: &BTreeMap<ShardNo, Arc<Pool>>,
) -> Result<BTreeMap<ShardNo, Arc<Pool>>, Error> {
    let open = |entry: &crate::catalog::ShardEntry| {
        if let Some(pool) = known.get(&entry.shard) {
            return Ok((entry.shard, pool.clone()));
        }
        let database = Database::Shard(entry.shard);
        let (cluster_id, kind) = (Some(catalog.cluster_id), schema::Kind::Shard);
        let expected = Expected { cluster_id, kind, life: Some(entry.life) };
        let login = lives.login.to(&entry.at, true)?;
        let pool = Pool::new(database, login, expected, limits(config, entry.pool_size), Some(lives.clone()))?;
        Ok((entry.shard, Arc::new(pool)))
    };
    catalog.shards.iter().map(open).collect()
}
