//! A pool of connections to one database, which knows whether it reached the right one.

use crate::admin::not_connected;
use crate::breaker::Leave;
use crate::bulk;
use crate::doubt::Doubt;
use crate::error::{Database, Error, has_missed_publication};
use crate::lanes::{Lanes, Seat};
use crate::life::{Life, Lives};
use crate::reach::{Reached, reach};
use deadpool::managed::QueueMode;
use deadpool_postgres::{
    Connect, Hook, HookError, Manager, ManagerConfig, Object, PoolError, RecyclingMethod, Runtime, TimeoutType,
    Timeouts,
};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

/// How long a closed database is not asked again.
const CLOSED_REST: Duration = Duration::from_millis(500);

/// Between two looks for a connection of a server that has none left.
const FULL_LOOK: Duration = Duration::from_millis(50);

/// Parameters of a statement.
pub(crate) type Params<'a> = [&'a (dyn ToSql + Sync)];

/// How many bulk writes one database gets at a time. Each connection costs it a process that learns its catalogue anew.
const BULK_MAX: usize = 2;

/// How long somebody waits beside others, before asking again on a connection alone: no longer than a quarter of the deadline.
const PATIENCE: Duration = Duration::from_millis(250);

/// What a statement is to its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errand {
    /// It writes: never sent twice, and without its answer nobody knows what it did.
    Write,
    /// It reads.
    Read,
    /// It reads a few rows by key: over at once, so that it may share a connection with others of its kind.
    ReadByKey,
}

/// Whether a server that works refuses a connection because all that it may have are in use.
fn is_full(source: &tokio_postgres::Error) -> bool {
    source.code() == Some(&SqlState::TOO_MANY_CONNECTIONS)
}

/// One who waits, counted until the end of it.
struct Waits<'a>(&'a AtomicUsize);

impl Waits<'_> {
    fn begin(waiting: &AtomicUsize) -> Waits<'_> {
        waiting.fetch_add(1, Ordering::Relaxed);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connections to one database.
pub struct Pool {
    database: Database,
    connections: deadpool_postgres::Pool,
    lanes: Lanes<Object>,
    patience: Duration,
    /// How many wait for a connection of their own, other than to read by key: nobody shares one meanwhile, so that it comes back.
    waiting: AtomicUsize,
    doubt: Arc<Doubt>,
    /// Bulk writes take turns.
    bulk: Arc<Semaphore>,
    statements: AtomicU64,
    life: Arc<LifeInForce>,
    lives: Option<Arc<Lives>>,
    /// When it was closed last, and why: it is not asked again at once. Held while a life is settled.
    closed: Arc<tokio::sync::Mutex<Option<(Instant, String)>>>,
    /// What the last new connection found instead of the database that was meant.
    stranger: Arc<Mutex<Option<Stranger>>>,
}

/// What is at the other end instead of the database that was meant.
#[derive(Debug, Clone)]
enum Stranger {
    /// Another database.
    Wrong(String),
    /// The right one, with a schema that this program does not know.
    Newer { found: i32, known: i32 },
    /// The right one, in a life that this node does not know.
    OtherLife,
    /// Nobody who answers in time.
    Silent,
}

/// The life of a database that this node trusts, and since when.
pub(crate) struct LifeInForce {
    life: Mutex<Option<Life>>,
    /// Connections that are older than this are given up; in milliseconds since `start`.
    since_ms: AtomicU64,
    start: Instant,
}

impl LifeInForce {
    pub(crate) fn get(&self) -> Option<Life> {
        *self.life.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn set(&self, life: Life) {
        let before = self.life.lock().unwrap_or_else(std::sync::PoisonError::into_inner).replace(life);
        if before.is_some_and(|before| before != life) {
            let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.since_ms.store(now, Ordering::Relaxed);
        }
    }

    fn is_older(&self, connected: Instant) -> bool {
        let since = self.since_ms.load(Ordering::Relaxed);
        since > 0 && connected < self.start + Duration::from_millis(since)
    }
}

/// New connections go to the host that is in the life that is trusted.
struct Reach(Arc<LifeInForce>);

impl Connect for Reach {
    fn connect(
        &self,
        login: &tokio_postgres::Config,
    ) -> Pin<Box<dyn Future<Output = Result<Reached, tokio_postgres::Error>> + Send + '_>> {
        let login = login.clone();
        Box::pin(async move { reach(&login, self.0.get()).await })
    }
}

/// What a database must say of itself before it is used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    pub(crate) cluster_id: Option<Uuid>,
    pub(crate) kind: schema::Kind,
    /// The life that counts, of a shard and of the directory's writer. Of the control database it is the latest seen.
    pub(crate) life: Option<Life>,
}

/// How a pool is made; the same for all databases of a node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) size: usize,
    pub(crate) wait: Duration,
    /// For a new connection, from its first byte to the server's word on what it is.
    pub(crate) connect: Duration,
    pub(crate) rest: Duration,
}

impl Pool {
    pub(crate) fn new(
        database: Database,
        login: tokio_postgres::Config,
        expected: Expected,
        limits: Limits,
        lives: Option<Arc<Lives>>,
    ) -> Result<Pool, Error> {
        let asks = login.clone();
        let stranger = Arc::new(Mutex::new(None));
        let noted = stranger.clone();
        let start = Instant::now();
        let life = Arc::new(LifeInForce { life: Mutex::new(expected.life), since_ms: AtomicU64::new(0), start });
        let (trusted, in_force) = (life.clone(), life.clone());
        let fast = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(login, Reach(life.clone()), fast);
        let check = Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
            let (noted, trusted) = (noted.clone(), trusted.clone());
            Box::pin(async move {
                let met = tokio::time::timeout(limits.connect, meet(client, database, expected, &trusted)).await;
                let found = met.unwrap_or(Ok(Some(Stranger::Silent)))?;
                noted.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone_from(&found);
                found.map_or(Ok(()), |_| Err(HookError::message("not the database that was meant")))
            })
        });
        let pool = deadpool_postgres::Pool::builder(manager)
            .max_size(limits.size)
            // The one that was in use last is the one whose server process has the most at hand.
            .queue_mode(QueueMode::Lifo)
            .wait_timeout(Some(limits.wait))
            // The driver's own limit ends with the first packet: a server that takes it and says nothing is down, too.
            .create_timeout(Some(limits.connect))
            .runtime(Runtime::Tokio1)
            .post_create(check)
            .pre_recycle(Hook::sync_fn(move |_, metrics| {
                let old = in_force.is_older(metrics.created);
                if old { Err(HookError::message("of an earlier life")) } else { Ok(()) }
            }))
            .build()
            .map_err(|e| Error::Config(e.to_string()))?;
        Ok(Pool {
            database,
            doubt: Doubt::new(pool.clone(), asks, limits, life.clone()),
            connections: pool,
            lanes: Lanes::new(limits.size / 2),
            patience: PATIENCE.min(limits.wait / 4),
            waiting: AtomicUsize::new(0),
            bulk: Arc::new(Semaphore::new(BULK_MAX)),
            statements: AtomicU64::new(0),
            life,
            lives,
            closed: Arc::default(),
            stranger,
        })
    }

    /// Which database this is.
    pub fn database(&self) -> Database {
        self.database
    }

    /// How many statements were sent to it so far.
    pub fn statements(&self) -> u64 {
        self.statements.load(Ordering::Relaxed)
    }

    pub(crate) fn count_statement(&self) {
        self.statements.fetch_add(1, Ordering::Relaxed);
    }

    /// A turn to write in bulk.
    pub(crate) async fn bulk_turn(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.bulk
            .clone()
            .acquire_owned()
            .await
            .map_err(|e| Error::Answer { database: self.database, reason: e.to_string() })
    }

    /// Somebody waited for an answer of the server in vain.
    pub(crate) fn doubt(&self) {
        self.doubt.raise();
    }

    /// Trusts a later life, and no connection of an earlier one any more.
    pub(crate) fn know(&self, life: Life) {
        if self.life.get().is_none_or(|known| known.counter < life.counter) {
            self.life.set(life);
        }
    }

    /// A connection for whatever takes a while.
    pub(crate) async fn get(&self) -> Result<Object, Error> {
        self.get_for(Errand::Read).await
    }

    async fn get_for(&self, errand: Errand) -> Result<Object, Error> {
        match self.get_once(errand).await {
            Err(Error::Closed { .. }) => {
                // Others wait for it, too.
                let settled = tokio::time::timeout(self.deadline(), Box::pin(self.settle())).await;
                settled.map_err(|_| self.late("the life of"))??;
                self.get_once(errand).await
            }
            Err(Error::Down { source: Some(source), .. }) if is_full(&source) => {
                Box::pin(self.get_from_full(errand)).await
            }
            got => got,
        }
    }

    /// A connection of a server that has none left for anybody: one of this pool's that comes back, or one that somebody else
    /// gives up. It works, so that nobody is kept from it.
    async fn get_from_full(&self, errand: Errand) -> Result<Object, Error> {
        let begin = Instant::now();
        loop {
            tokio::time::sleep(FULL_LOOK).await;
            match self.get_once(errand).await {
                Err(Error::Down { source: Some(source), .. })
                    if is_full(&source) && begin.elapsed() < self.deadline() / 2 => {}
                got => return got,
            }
        }
    }

    /// Settles which life of the database counts; of many calls that wait for it, one does, and to the end, also where that call has no
    /// more time: on a busy machine none might have enough.
    async fn settle(&self) -> Result<(), Error> {
        let Some(lives) = self.lives.clone() else { return Ok(()) };
        let before = self.life.get();
        let mut closed = self.closed.clone().lock_owned().await;
        if self.life.get() != before {
            return Ok(());
        }
        if let Some((_, reason)) = closed.as_ref().filter(|(at, _)| at.elapsed() < CLOSED_REST) {
            return Err(Error::Closed { database: self.database, reason: reason.clone() });
        }
        *closed = None;
        let (database, in_force, deadline) = (self.database, self.life.clone(), self.deadline());
        let late = self.late("the life of");
        let settled = tokio::spawn(async move {
            // A server that takes a question and never answers must not keep everybody waiting for good.
            let settled = tokio::time::timeout(2 * deadline, lives.settle(database, deadline / 4));
            let settled = settled.await.unwrap_or(Err(late)).map(|life| in_force.set(life));
            if let Err(Error::Closed { reason, .. }) = &settled {
                *closed = Some((Instant::now(), reason.clone()));
            }
            settled
        });
        settled.await.unwrap_or_else(|_| Err(self.late("the life of")))
    }

    async fn get_once(&self, errand: Errand) -> Result<Object, Error> {
        let Some(leave) = self.doubt.breaker.admits(Instant::now()) else {
            return Err(Error::Down { database: self.database, source: None });
        };
        let asking = self.doubt.ask();
        // Mostly one is free, and a wait that is none needs no timer.
        let at_once = Timeouts { wait: Some(Duration::ZERO), ..self.connections.timeouts() };
        let got = match self.connections.timeout_get(&at_once).await {
            Err(PoolError::Timeout(TimeoutType::Wait)) => {
                let _waits = (errand != Errand::ReadByKey).then(|| Waits::begin(&self.waiting));
                Box::pin(self.connections.get()).await
            }
            got => got,
        };
        asking.end();
        match got {
            Ok(client) => {
                self.doubt.breaker.reached(leave);
                Ok(client)
            }
            Err(error) => Err(self.sort(error, leave)),
        }
    }

    fn sort(&self, error: PoolError, leave: Leave) -> Error {
        let database = self.database;
        match error {
            PoolError::Backend(source) | PoolError::PostCreateHook(HookError::Backend(source)) => {
                let error = not_connected(database, source);
                match &error {
                    Error::Down { source: Some(source), .. } if is_full(source) => self.doubt.breaker.reached(leave),
                    Error::Down { .. } => drop(self.doubt.breaker.failed(leave, Instant::now())),
                    _ => {}
                }
                error
            }
            PoolError::Timeout(TimeoutType::Create) => {
                self.doubt.is_silent(leave);
                Error::Down { database, source: None }
            }
            PoolError::Timeout(_) => self.late("a connection to"),
            other => {
                let noted = self.stranger.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
                if !matches!(noted, None | Some(Stranger::Silent)) {
                    // Whatever it is, it answers.
                    self.doubt.breaker.reached(leave);
                }
                match noted {
                    Some(Stranger::Newer { found, known }) => {
                        Error::Schema { database, source: schema::Error::TooNew { found, known } }
                    }
                    Some(Stranger::Silent) => {
                        self.doubt.is_silent(leave);
                        Error::Down { database, source: None }
                    }
                    Some(Stranger::Wrong(reason)) => Error::WrongDatabase { database, reason },
                    Some(Stranger::OtherLife) => {
                        let reason = "its server is of another life than the one that counts".into();
                        Error::Closed { database, reason }
                    }
                    None => Error::WrongDatabase { database, reason: other.to_string() },
                }
            }
        }
    }

    /// One statement within the deadline: none waits longer, whatever the server does; what a write did then is not known.
    pub(crate) async fn query(&self, sql: &str, params: &Params<'_>, writes: bool) -> Result<Vec<Row>, Error> {
        let errand = if writes { Errand::Write } else { Errand::Read };
        let answer = tokio::time::timeout(self.deadline(), self.answer(sql, params, errand)).await;
        answer.unwrap_or_else(|_| Err(self.late("an answer from")))
    }

    /// One statement, prepared once per connection, for a caller who minds the deadline. A read is tried again once when
    /// its connection turns out to be broken: a restarted server costs its first callers nothing. So is what a relocation's end has
    /// made fail.
    pub(crate) async fn answer(&self, sql: &str, params: &Params<'_>, errand: Errand) -> Result<Vec<Row>, Error> {
        let beside = match self.join(errand) {
            Some(seat) => tokio::time::timeout(self.patience, self.ask(seat, sql, params, errand)).await.ok(),
            None => None,
        };
        let answer = match beside {
            Some(answer) => answer,
            None => self.ask_alone(sql, params, errand).await,
        };
        match answer {
            Err(Error::Down { source: Some(_), .. }) if errand != Errand::Write => {
                Box::pin(self.ask_alone(sql, params, errand)).await
            }
            Err(error) if error.sql_error().is_some_and(has_missed_publication) => {
                Box::pin(self.ask_alone(sql, params, errand)).await
            }
            outcome => outcome,
        }
    }

    /// Waits until all that was committed before is where commits have to be, on standbys too, by a commit of its own.
    pub(crate) async fn confirm(&self) -> Result<(), Error> {
        self.answer(CONFIRM, &[], Errand::Write).await.map(drop)
    }

    /// A COPY by itself: all of its rows, or none.
    pub(crate) async fn copy<'a>(
        &self,
        copy: &str,
        types: &[Type],
        rows: impl Iterator<Item = Vec<&'a (dyn ToSql + Sync)>>,
    ) -> Result<u64, Error> {
        let got = self.get().await?;
        let mut lent = self.doubt.lend(false);
        let client = lent.seat.insert(Seat::alone(got));
        self.count_statement();
        let sent = tokio::time::timeout(self.deadline(), bulk::send(client, self.database, copy, types, rows)).await;
        let copied = sent.map_err(|_| self.late("an answer from"))?;
        lent.give_back();
        copied
    }

    /// The answer to a question where another one, asked before it on the same connection, has rows; `None` where it has none.
    pub(crate) async fn query_if(
        &self,
        condition: (&str, &Params<'_>),
        question: (&str, &Params<'_>),
    ) -> Result<Option<Vec<Row>>, Error> {
        let got = self.get().await?;
        let mut lent = self.doubt.lend(false);
        let client = lent.seat.insert(Seat::alone(got));
        let ask = async |(sql, params): (&str, &Params<'_>)| {
            self.count_statement();
            client.query(&client.prepare_cached(sql).await?, params).await
        };
        let asked = async { if ask(condition).await?.is_empty() { Ok(None) } else { ask(question).await.map(Some) } };
        let answer = tokio::time::timeout(self.deadline(), asked).await.map_err(|_| self.late("an answer from"))?;
        lent.give_back();
        answer.map_err(|error| Error::of_statement(self.database, false, error))
    }

    pub(crate) fn late(&self, waiting_for: &str) -> Error {
        Error::Deadline {
            limit_ms: self.deadline().as_millis(),
            waiting_for: format!("{waiting_for} {}", self.database),
        }
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.connections.timeouts().wait.unwrap_or_default()
    }

    /// A seat beside others, where as many short reads are on their way as there may be lanes.
    fn join(&self, errand: Errand) -> Option<Seat<'_, Object>> {
        if errand != Errand::ReadByKey || self.waiting.load(Ordering::Relaxed) > 0 || !self.doubt.breaker.is_closed() {
            return None;
        }
        let will_do = |client: &Object| !client.is_closed() && !self.life.is_older(Object::metrics(client).created);
        self.lanes.join(Instant::now(), will_do)
    }

    /// What happens seldom is boxed on this way, so that a call's future stays small: it is moved several times.
    async fn ask_alone(&self, sql: &str, params: &Params<'_>, errand: Errand) -> Result<Vec<Row>, Error> {
        let got = self.get_for(errand).await?;
        self.ask(Seat::alone(got), sql, params, errand).await
    }

    /// One statement on this seat, which is lent as soon as this is polled.
    async fn ask<'a>(
        &'a self,
        seat: Seat<'a, Object>,
        sql: &str,
        params: &Params<'_>,
        errand: Errand,
    ) -> Result<Vec<Row>, Error> {
        let mut lent = self.doubt.lend(seat.is_shared());
        let seat = lent.seat.insert(seat);
        // Nothing has been sent before the statement is prepared, so that a failure here is never an unknown outcome.
        let answer = match seat.prepare_cached(sql).await {
            Ok(statement) => {
                self.count_statement();
                if errand == Errand::ReadByKey {
                    self.lanes.open(seat, Instant::now());
                }
                let sent = match seat.query(&statement, params).await {
                    // On this very connection: by the next call another server may have taken the place of this one.
                    Ok(rows) if errand == Errand::Write && is_done_before(&rows) => {
                        self.count_statement();
                        seat.batch_execute(CONFIRM).await.map(|()| rows)
                    }
                    sent => sent,
                };
                sent.map_err(|e| Error::of_statement(self.database, errand == Errand::Write, e))
            }
            Err(e) => Err(Error::of_statement(self.database, false, e)),
        };
        lent.give_back();
        answer
    }
}

/// A commit of its own, for which standbys are waited for as for any.
pub(crate) const CONFIRM: &str = "SELECT pg_logical_emit_message(true, 'therev', '')";

/// Whether a fenced write found everything as it was to be. That may be a commit whose wait for a standby was cut off: nobody hears
/// that it is done before the standbys have it. Where an id found nothing here, it is whoever asks all that may have it who knows.
fn is_done_before(rows: &[Row]) -> bool {
    let Some(row) = rows.first().filter(|row| row.try_get("wrote_nothing").unwrap_or(false)) else { return false };
    let is_by_id = row.columns().iter().any(|column| column.name() == "is_home");
    !is_by_id || row.get::<_, Option<bool>>("present").is_some()
}

const IDENTITY: &str = "
    SELECT i.cluster_id, i.kind, i.shard, i.incarnation, i.incarnation_counter,
           i.timeline = therev.current_timeline() AS is_known,
           (SELECT max(v.version) FROM therev.schema_versions AS v) AS version
      FROM therev.identity AS i";

/// What is at the other end, if it is not the database that was meant.
async fn meet(
    client: &deadpool_postgres::ClientWrapper,
    database: Database,
    expected: Expected,
    trusted: &LifeInForce,
) -> Result<Option<Stranger>, HookError> {
    let wrong = |reason: &str| Ok(Some(Stranger::Wrong(reason.to_owned())));
    // In one round: each new connection waits for it.
    let identity = client.query_typed_opt(IDENTITY, &[]).await;
    let row = match identity {
        Err(e)
            if e.code()
                .is_some_and(|code| [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME].contains(code)) =>
        {
            return wrong("it is no database of therev, or its schema is missing");
        }
        row => row.map_err(HookError::Backend)?,
    };
    let Some(row) = row else { return wrong("its initialization was never finished: run `therev init` again") };
    let kind: &str = row.get("kind");
    let shard: Option<i16> = row.get("shard");
    let version: i32 = row.get("version");
    let wanted_shard = match database {
        Database::Shard(number) => Some(number.0),
        _ => None,
    };
    if kind != expected.kind.name() || shard != wanted_shard {
        let number = shard.map_or(String::new(), |n| format!(" {n}"));
        return wrong(&format!("it is the {kind}{number} database"));
    }
    if expected.cluster_id.is_some_and(|id| id != row.get::<_, Uuid>("cluster_id")) {
        return wrong("it belongs to another cluster");
    }
    let known = expected.kind.newest_version();
    if version > known {
        return Ok(Some(Stranger::Newer { found: version, known }));
    }
    let (found, is_known) = (Life::of(&row), row.get::<_, Option<bool>>("is_known").unwrap_or(false));
    match database {
        // Whoever reads from a replica says itself which life it has seen.
        Database::Replica(_) => Ok(None),
        Database::Control => meet_control(client, found, is_known, trusted).await,
        _ if is_known && trusted.get().is_none_or(|life| life.incarnation == found.incarnation) => Ok(None),
        _ => Ok(Some(Stranger::OtherLife)),
    }
}

/// The control database has nobody to ask: promoted, it begins a life by itself, and of two this node takes the later one.
async fn meet_control(
    client: &deadpool_postgres::ClientWrapper,
    found: Life,
    is_known: bool,
    trusted: &LifeInForce,
) -> Result<Option<Stranger>, HookError> {
    let mut found = found;
    if !is_known {
        // Whoever follows a promoted one and is promoted itself, without having heard of its life, is on a later timeline: its number
        // is a later one, too.
        let begin = "SELECT therev.begin_life(a.candidate, n.counter), a.candidate AS incarnation,
                            n.counter AS incarnation_counter
                       FROM therev.ask_for_life() AS a, therev.identity AS i,
                            LATERAL (SELECT greatest(i.incarnation_counter + 1, therev.current_timeline())) AS n (counter)";
        let begun = client.query_opt(begin, &[]).await.map_err(HookError::Backend)?;
        // No row: another node was quicker.
        let there = "SELECT incarnation, incarnation_counter FROM therev.identity";
        found = Life::of(&match begun {
            Some(begun) => begun,
            None => client.query_one(there, &[]).await.map_err(HookError::Backend)?,
        });
    }
    match trusted.get() {
        Some(known) if known == found => Ok(None),
        // Of two that were promoted apart, each has begun a life of the same number: the one that this node met first is its own.
        Some(known) if found.counter <= known.counter => {
            Ok(Some(Stranger::Wrong("another server was promoted in its place".into())))
        }
        _ => {
            trusted.set(found);
            Ok(None)
        }
    }
}
