//! A pool of connections to one database, which knows whether it reached the right one.

use crate::breaker::Breaker;
use crate::error::{Database, Error};
use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Object, PoolError, RecyclingMethod, Runtime, TimeoutType, Timeouts,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::types::ToSql;
use tokio_postgres::{NoTls, Row};
use uuid::Uuid;

/// Parameters of a statement.
pub(crate) type Params<'a> = [&'a (dyn ToSql + Sync)];

/// How many bulk writes one database gets at a time. Each connection costs it a process that learns its catalogue anew.
const BULK_MAX: usize = 2;

/// Connections to one database.
pub struct Pool {
    database: Database,
    connections: deadpool_postgres::Pool,
    breaker: Breaker,
    /// Bulk writes take turns.
    bulk: Arc<Semaphore>,
    statements: AtomicU64,
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
    /// Nobody who answers in time.
    Silent,
}

/// What a database must say of itself before it is used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    pub(crate) cluster_id: Option<Uuid>,
    pub(crate) kind: schema::Kind,
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
    ) -> Result<Pool, Error> {
        let manager = Manager::from_config(login, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let stranger = Arc::new(Mutex::new(None));
        let noted = stranger.clone();
        let check = Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
            let noted = noted.clone();
            Box::pin(async move {
                let met = tokio::time::timeout(limits.connect, meet(client, database, expected)).await;
                let found = met.unwrap_or(Ok(Some(Stranger::Silent)))?;
                noted.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone_from(&found);
                found.map_or(Ok(()), |_| Err(HookError::message("not the database that was meant")))
            })
        });
        let pool = deadpool_postgres::Pool::builder(manager)
            .max_size(limits.size)
            .wait_timeout(Some(limits.wait))
            // The driver's own limit ends with the first packet: a server that takes it and says nothing is down, too.
            .create_timeout(Some(limits.connect))
            .runtime(Runtime::Tokio1)
            .post_create(check)
            .build()
            .map_err(|e| Error::Config(e.to_string()))?;
        Ok(Pool {
            database,
            connections: pool,
            breaker: Breaker::new(limits.rest),
            bulk: Arc::new(Semaphore::new(BULK_MAX)),
            statements: AtomicU64::new(0),
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

    pub(crate) async fn get(&self) -> Result<Object, Error> {
        if !self.breaker.admits(Instant::now()) {
            return Err(Error::Down { database: self.database, source: None });
        }
        // Mostly one is free, and a wait that is none needs no timer.
        let at_once = Timeouts { wait: Some(Duration::ZERO), ..self.connections.timeouts() };
        let got = match self.connections.timeout_get(&at_once).await {
            Err(PoolError::Timeout(TimeoutType::Wait)) => Box::pin(self.connections.get()).await,
            got => got,
        };
        match got {
            Ok(client) => {
                self.breaker.reached();
                Ok(client)
            }
            Err(error) => Err(self.sort(error)),
        }
    }

    fn sort(&self, error: PoolError) -> Error {
        let database = self.database;
        match error {
            PoolError::Backend(source) | PoolError::PostCreateHook(HookError::Backend(source)) => {
                let class = source.code().map_or("", |code| &code.code()[..2]);
                if class == "3D" {
                    let reason = "the server has no such database".into();
                    return Error::WrongDatabase { database, reason };
                }
                if class == "28" || source.to_string().contains("password missing") {
                    return Error::Refused { database, source };
                }
                self.breaker.failed(Instant::now());
                Error::Down { database, source: Some(source) }
            }
            PoolError::Timeout(TimeoutType::Create) => {
                self.breaker.failed(Instant::now());
                Error::Down { database, source: None }
            }
            PoolError::Timeout(_) => Error::Deadline {
                limit_ms: self.deadline().as_millis(),
                waiting_for: format!("a connection to {database}"),
            },
            other => {
                let noted = self.stranger.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
                match noted {
                    Some(Stranger::Newer { found, known }) => {
                        Error::Schema { database, source: schema::Error::TooNew { found, known } }
                    }
                    Some(Stranger::Silent) => {
                        self.breaker.failed(Instant::now());
                        Error::Down { database, source: None }
                    }
                    Some(Stranger::Wrong(reason)) => Error::WrongDatabase { database, reason },
                    None => Error::WrongDatabase { database, reason: other.to_string() },
                }
            }
        }
    }

    /// One statement within the deadline: none waits longer, whatever the server does; what a write did then is not known.
    pub(crate) async fn query(&self, sql: &str, params: &Params<'_>, writes: bool) -> Result<Vec<Row>, Error> {
        tokio::time::timeout(self.deadline(), self.answer(sql, params, writes)).await.unwrap_or_else(|_| {
            Err(Error::Deadline {
                limit_ms: self.deadline().as_millis(),
                waiting_for: format!("an answer from {}", self.database),
            })
        })
    }

    /// One statement, prepared once per connection, for a caller who minds the deadline. A read is tried again once when
    /// its connection turns out to be broken: a restarted server costs its first callers nothing.
    pub(crate) async fn answer(&self, sql: &str, params: &Params<'_>, writes: bool) -> Result<Vec<Row>, Error> {
        match self.query_once(sql, params, writes).await {
            Err(Error::Down { source: Some(_), .. }) if !writes => Box::pin(self.query_once(sql, params, writes)).await,
            outcome => outcome,
        }
    }

    fn deadline(&self) -> Duration {
        self.connections.timeouts().wait.unwrap_or_default()
    }

    /// What happens seldom is boxed on this way, so that a call's future stays small: it is moved several times.
    async fn query_once(&self, sql: &str, params: &Params<'_>, writes: bool) -> Result<Vec<Row>, Error> {
        let client = self.get().await?;
        // Nothing has been sent before the statement is prepared, so that a failure here is never an unknown outcome.
        let statement = client.prepare_cached(sql).await.map_err(|e| Error::of_statement(self.database, false, e))?;
        self.count_statement();
        client.query(&statement, params).await.map_err(|e| Error::of_statement(self.database, writes, e))
    }
}

/// What is at the other end, if it is not the database that was meant.
async fn meet(
    client: &deadpool_postgres::ClientWrapper,
    database: Database,
    expected: Expected,
) -> Result<Option<Stranger>, HookError> {
    let wrong = |reason: &str| Ok(Some(Stranger::Wrong(reason.to_owned())));
    let known = client
        .query_opt("SELECT FROM pg_class WHERE oid = to_regclass('therev.identity')", &[])
        .await
        .map_err(HookError::Backend)?;
    if known.is_none() {
        return wrong("it is no database of therev, or its schema is missing");
    }
    let row = client
        .query_opt(
            "SELECT cluster_id, kind, shard, (SELECT max(version) FROM therev.schema_versions) AS version
               FROM therev.identity",
            &[],
        )
        .await
        .map_err(HookError::Backend)?;
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
    Ok((version > known).then_some(Stranger::Newer { found: version, known }))
}
