//! The handle on a cluster: which shard to ask, and what to do when it says that it is not the one.

use crate::address::{LIBRARY_ROLE, Login};
use crate::catalog::{Catalog, FoundPlacement, remove_leftovers};
use crate::config::Config;
use crate::directory::Directory;
use crate::error::{Database, Error};
use crate::life::Lives;
use crate::load::{Load, TELL_EVERY};
use crate::looks::Looks;
use crate::pool::{Errand, Expected, Limits, Params, Pool};
use crate::statement::{By, Read, Unfenced, Write};
use crate::together::Together;
use arc_swap::ArcSwap;
use futures_util::future::join_all;
use placement::{Bucket, Group, Map, Ownership, Place, ShardNo, UserId, Whose};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

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
    pub(crate) together: Together,
    pub(crate) lives: Arc<Lives>,
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

/// A user's own place counts before the bucket's.
const OWNERSHIP: &str = "
    SELECT coalesce(p.state, o.state)::text AS state, CASE WHEN p.user_id IS NULL THEN o.peer ELSE p.peer END AS peer,
           coalesce(p.epoch, o.epoch) AS epoch, p.user_id IS NOT NULL AS is_pin
      FROM unnest($2::smallint[], $3::uuid[]) WITH ORDINALITY AS k (bucket, owner, at)
      JOIN therev.ownership AS o ON o.colocation_group = $1::text::therev.colocation_group AND o.bucket = k.bucket
      LEFT JOIN therev.pins AS p ON p.colocation_group = $1::text::therev.colocation_group AND p.user_id = k.owner
     ORDER BY k.at";

/// What a shard says of somebody's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// What it may do with them.
    pub ownership: Ownership,
    /// Whether that is said of the user alone, and not of the bucket.
    pub is_pin: bool,
}

impl Shards {
    /// Connects to a cluster: asks its control database where everything is, or the state file while that is down.
    ///
    /// Keeps the placement fresh in the background for as long as a clone of it lives.
    pub async fn connect(config: Config) -> Result<Shards, Error> {
        config.check()?;
        let login = Login::new(&config, LIBRARY_ROLE)?;
        let anyone = Expected { cluster_id: None, kind: schema::Kind::Control, life: None };
        let control = Arc::new(Pool::new(Database::Control, login.control()?, anyone, limits(&config, 4), None)?);
        let lives = Arc::new(Lives { login, control: control.clone() });
        if let Some(path) = &config.state_file {
            remove_leftovers(path);
        }
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
        let directory = Directory::new(&catalog, &config, &lives)?;
        let load = Load::new(catalog.layout);
        let shards = Shards {
            inner: Arc::new(Inner {
                shards: ArcSwap::from_pointee(pools(&catalog, &lives, &config, &BTreeMap::new())?),
                catalog: ArcSwap::from_pointee(catalog),
                map: ArcSwap::from_pointee(map),
                config,
                control,
                load,
                looks: Looks::default(),
                together: Together::default(),
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
        let (shards, directory) = (self.inner.shards.load_full(), self.inner.directory.pools());
        let pools = shards.values().map(AsRef::as_ref).chain(directory.all()).chain([self.inner.control.as_ref()]);
        pools.map(|pool| (pool.database(), pool.statements())).collect()
    }

    /// Opens a connection to every shard and to a reader of the directory, side by side: for a program that starts and asks all of
    /// them once, where it would else wait for one after the other. What cannot be reached is left to the call that needs it.
    pub async fn reach_all(&self) {
        let (shards, directory) = (self.inner.shards.load_full(), self.inner.directory.pools());
        let pools = shards.values().map(AsRef::as_ref).chain([directory.first_reader()]);
        join_all(pools.map(Pool::get)).await;
    }

    /// Reads one owner's rows: fenced, from whichever shard owns them.
    ///
    /// `params` begin at `$2`. No rows: the owner has none.
    pub async fn read(&self, statement: &Read, bucket: Bucket, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let is_whole = !self.inner.map.load().has_pins_of(statement.group, bucket);
        let forms = (Some(statement.quick(is_whole)), statement.sql());
        self.fenced(statement.group, statement.by, bucket, forms, statement.errand, params).await
    }

    /// Writes one owner's rows: fenced, on whichever shard owns them.
    ///
    /// `params` begin at `$2`. No rows: they are owned, and the statement found nothing to write.
    pub async fn write(&self, statement: &Write, bucket: Bucket, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        self.fenced(statement.group, statement.by, bucket, (None, statement.sql()), Errand::Write, params).await
    }

    /// As [`Shards::write`] of rows that are named by their owner; also says which shard it was.
    pub async fn write_on(
        &self,
        statement: &Write,
        bucket: Bucket,
        params: &Params<'_>,
    ) -> Result<(ShardNo, Vec<Row>), Error> {
        let number = bucket.sql();
        let mut all: Vec<&(dyn ToSql + Sync)> = vec![&number];
        all.extend_from_slice(params);
        let whose = Whose { bucket, user: self.inner.load.count(statement.group, params.first()) };
        self.of_owner(statement.group, whose, (None, statement.sql()), Errand::Write, &all).await
    }

    /// Waits until what an owner's shard has committed is where commits have to be, on synchronous standbys too: before that is read for
    /// whose sake a write turned out to be done already, for its own wait may have been cut off.
    pub async fn confirm(&self, group: Group, whose: impl Into<Whose>) -> Result<(), Error> {
        let mut route = Route::new(self, group, whose.into());
        loop {
            let shard = route.place.shard;
            let pool = self.pool(shard).await?;
            route.within(pool.confirm()).await?;
            // Nothing refuses who only waits: whether it was the owner's shard that was waited for, it says itself.
            Box::pin(route.follow()).await?;
            if route.place.shard == shard {
                return Ok(());
            }
        }
    }

    async fn fenced(
        &self,
        group: Group,
        by: By,
        bucket: Bucket,
        (quick, sql): (Option<&str>, &str),
        errand: Errand,
        params: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let number = bucket.sql();
        let mut all: Vec<&(dyn ToSql + Sync)> = vec![&number];
        all.extend_from_slice(params);
        let user = match by {
            By::Owner => self.inner.load.count(group, params.first()),
            By::Bucket => None,
            By::Id(owner) => {
                let rows = Box::pin(self.by_id(group, bucket, (quick, sql), errand, &all)).await?;
                // Whose it was shows in what was read; a write names no column.
                if let Some(Ok(owner)) = rows.first().filter(|_| !owner.is_empty()).map(|row| row.try_get(owner)) {
                    self.inner.load.count_owner(group, owner);
                }
                return Ok(rows);
            }
        };
        let (_, rows) = self.of_owner(group, Whose { bucket, user }, (quick, sql), errand, &all).await?;
        Ok(rows)
    }

    /// The answer of whichever shard owns a user's rows, or a bucket's that are no user's. `all` begins with the bucket.
    async fn of_owner(
        &self,
        group: Group,
        whose: Whose,
        (quick, sql): (Option<&str>, &str),
        errand: Errand,
        all: &Params<'_>,
    ) -> Result<(ShardNo, Vec<Row>), Error> {
        let mut route = Route::new(self, group, whose);
        loop {
            let shard = route.place.shard;
            let pool = self.pool(shard).await?;
            for (form, has_verdict) in quick.map(|quick| (quick, false)).into_iter().chain([(sql, true)]) {
                let rows = route.within(pool.answer(form, all, errand)).await?;
                if !rows.is_empty() {
                    return Ok((shard, if has_verdict { found(rows) } else { rows }));
                }
            }
            Box::pin(route.follow()).await?;
        }
    }

    /// Asks a shard what it says of somebody's rows, one answer for each.
    pub async fn ownership(&self, shard: ShardNo, group: Group, of: &[Whose]) -> Result<Vec<Said>, Error> {
        let numbers: Vec<i16> = of.iter().map(|whose| whose.bucket.sql()).collect();
        let users: Vec<Option<Uuid>> = of.iter().map(|whose| whose.user.map(|user| user.0)).collect();
        let pool = self.pool(shard).await?;
        let rows = pool.query(OWNERSHIP, &[&group.name(), &numbers, &users], false).await?;
        let odd =
            || Error::Answer { database: Database::Shard(shard), reason: "an ownership that makes no sense".into() };
        if rows.len() != of.len() {
            return Err(odd());
        }
        rows.iter()
            .map(|row| {
                let state = row.get::<_, &str>("state").parse().map_err(|_| odd())?;
                let peer = row.get::<_, Option<i16>>("peer").map(ShardNo);
                let ownership = Ownership { state, peer, epoch: row.get("epoch") };
                Ok(Said { ownership, is_pin: row.get("is_pin") })
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

    /// Where this node believes somebody's rows to be.
    pub(crate) fn place(&self, group: Group, whose: Whose) -> Place {
        self.inner.map.load().place_of(group, whose)
    }

    /// Notes what a shard said: of the user where it is placed apart, else of the bucket.
    pub(crate) fn learn(&self, group: Group, whose: Whose, place: Place, is_pin: bool) {
        self.note(group, whose, place, is_pin, |map| map.learn(group, whose.bucket, place));
    }

    /// The same of a shard that refused and said where to go.
    pub(crate) fn learn_refusal(&self, group: Group, whose: Whose, by: ShardNo, place: Place, is_pin: bool) {
        self.note(group, whose, place, is_pin, |map| map.learn_refusal(group, whose.bucket, by, place));
    }

    fn note(&self, group: Group, whose: Whose, place: Place, is_pin: bool, of_bucket: impl Fn(&mut Map) -> bool) {
        self.inner.map.rcu(|map| {
            let mut map = Map::clone(map);
            if let Some(user) = whose.user {
                map.learn_pin(group, user, is_pin.then_some(place));
            }
            if !is_pin {
                of_bucket(&mut map);
            }
            map
        });
    }
}

/// The rows that the statement found: one of nulls alone says that the bucket is owned and nothing was.
pub(crate) fn found(mut rows: Vec<Row>) -> Vec<Row> {
    if rows.len() == 1 && rows[0].get::<_, Option<bool>>("present").is_none() {
        rows.clear();
    }
    rows
}

/// One call's way to whoever has the rows, within its deadline.
pub(crate) struct Route<'a> {
    shards: &'a Shards,
    group: Group,
    whose: Whose,
    pub(crate) place: Place,
    started: Instant,
    pause: Duration,
    hops: u32,
}

impl<'a> Route<'a> {
    pub(crate) fn new(shards: &'a Shards, group: Group, whose: Whose) -> Route<'a> {
        let place = shards.place(group, whose);
        Route { shards, group, whose, place, started: Instant::now(), pause: PAUSE.0, hops: 0 }
    }

    pub(crate) fn group(&self) -> Group {
        self.group
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
        let (mut pause, mut has_waited) = (Duration::ZERO, false);
        loop {
            let asked = self.place.shard;
            let said = self.within(self.shards.look(asked, self.group, self.whose, pause)).await?;
            let place = said.ownership.hint(self.place.epoch).place(asked);
            if let Some(place) = place {
                self.place = place;
                self.shards.learn_refusal(self.group, self.whose, asked, place, said.is_pin);
                self.hops = if has_waited { 1 } else { self.hops + 1 };
                // Nobody is sent around through more than a few shards without a pause: a switch is going on then. And whoever
                // has waited for one looks at the other side first, together with the others, whether it has taken over.
                if self.hops <= HOPS && (!has_waited || place.shard == asked) {
                    return Ok(());
                }
            }
            if self.started.elapsed() > self.shards.late() && self.end_late_switch(asked).await {
                return Ok(());
            }
            // The other side of a switch takes over as soon as it is decided.
            let is_decided = has_waited && place.is_some() && !pause.is_zero();
            pause = if is_decided { Duration::ZERO } else { self.next_pause() };
            has_waited = true;
        }
    }

    /// Waits a little for users who are just changing places, as these shards say, and looks after their switches when that takes too
    /// long.
    pub(crate) async fn wait_for(&mut self, on_their_way: &[(ShardNo, UserId)]) -> Result<(), Error> {
        for (shard, user) in on_their_way.iter().filter(|_| self.started.elapsed() > self.shards.late()) {
            let ended = Box::pin(self.shards.end_late_switch(*shard, self.group, (*user).into()));
            // Where it did not take over after all, home points there again: each try asks home first.
            self.within(async { Ok(ended.await) }).await?;
        }
        let pause = self.next_pause();
        self.within(async {
            tokio::time::sleep(pause).await;
            Ok(())
        })
        .await
    }

    /// Looks after a switch that takes too long; `true`: it is known now who owns the bucket.
    async fn end_late_switch(&mut self, asked: ShardNo) -> bool {
        let ended = Box::pin(self.shards.end_late_switch(asked, self.group, self.whose));
        // Not for longer than the call itself may take.
        let Ok(Some((owner, is_pin))) = self.within(async { Ok(ended.await) }).await else { return false };
        self.place.shard = owner.shard;
        self.shards.learn_refusal(self.group, self.whose, asked, owner, is_pin);
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
        if catalog.cluster_id != before.cluster_id {
            // The state file was another cluster's, or the address has come to lead to another one.
            let reason = format!("it is of cluster {}, this node works in {}", catalog.cluster_id, before.cluster_id);
            return Err(Error::WrongDatabase { database: Database::Control, reason });
        }
        known.retain(|shard, _| !before.is_elsewhere(&catalog, *shard));
        let mut pools = pools(&catalog, &self.lives, &self.config, &known)?;
        self.directory.follow(&catalog, &self.config, &self.lives)?;
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
        match inner.refresh().await {
            Ok(()) => {}
            Err(error @ Error::WrongDatabase { .. }) => tracing::error!(%error, "start this process anew"),
            Err(error) => {
                tracing::debug!(%error, "the placement could not be refreshed; the last known one stays in force");
            }
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
        let mut login = lives.login.to(&entry.at, true)?;
        // A shard is asked by key. For a list of keys a plan for the values at hand looks better to the server and is not: it
        // would be made anew for each call.
        let options = format!("{} -c plan_cache_mode=force_generic_plan", login.get_options().unwrap_or_default());
        login.options(options);
        let pool = Pool::new(database, login, expected, limits(config, entry.pool_size), Some(lives.clone()))?;
        Ok((entry.shard, Arc::new(pool)))
    };
    catalog.shards.iter().map(open).collect()
}
