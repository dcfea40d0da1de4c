//! Connections as the schema's owner or as the mover, for the few who need them: `init`, `schema`, `maintain`, `check`,
//! relocation.

use crate::address::{ADMIN_ROLE, Hosts, Login, MOVER_ROLE};
use crate::catalog::Catalog;
use crate::config::Config;
use crate::error::{Database, Error};
use crate::life::Life;
use crate::reach::reach;
use crate::slot::{self, SlotSnapshot};
use secrecy::SecretString;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::Client;

/// The databases of a cluster, for its owner or for the mover.
pub struct Admin {
    login: Login,
    catalog: Arc<Catalog>,
}

impl Admin {
    /// Takes the owner's login from the same configuration: role `therev_admin`, with its password from the passfile,
    /// or whoever the control address names.
    pub fn new(config: &Config, catalog: Arc<Catalog>) -> Result<Admin, Error> {
        Ok(Admin { login: Login::new(config, ADMIN_ROLE)?, catalog })
    }

    /// Every database that has a schema, with what it is for.
    pub fn databases(&self) -> Vec<(Database, schema::Kind)> {
        let shards = self.catalog.shards.iter().map(|s| (Database::Shard(s.shard), schema::Kind::Shard));
        [(Database::Control, schema::Kind::Control), (Database::Directory, schema::Kind::Directory)]
            .into_iter()
            .chain(shards)
            .collect()
    }

    /// The same as the mover: role `therev_mover`, which may make slots and subscriptions.
    pub fn mover(config: &Config, catalog: Arc<Catalog>) -> Result<Admin, Error> {
        Ok(Admin { login: Login::new(config, MOVER_ROLE)?, catalog })
    }

    /// The right to change schemas, for as long as the connection lives: while a relocation is under way nobody has it, and
    /// while somebody has it none begins.
    pub async fn begin_schema_change(&self) -> Result<Client, Error> {
        let control = self.connect(Database::Control).await?;
        let sql = |source| Error::of_statement(Database::Control, false, source);
        control.batch_execute("SELECT pg_advisory_lock(hashtext('therev.schema_change'))").await.map_err(sql)?;
        let open = "SELECT min(r.relocation) FROM therev.relocations AS r WHERE r.ended_at IS NULL";
        match control.query_one(open, &[]).await.map_err(sql)?.get::<_, Option<i64>>(0) {
            None => Ok(control),
            Some(number) => Err(Error::in_the_way(
                format!("relocation {number} is under way, and schemas do not change meanwhile"),
                format!("wait until it is done (`therev relocation show {number}`), then run this again"),
            )),
        }
    }

    /// A connection of its own to one of them.
    pub async fn connect(&self, database: Database) -> Result<Client, Error> {
        let life = self.catalog.find(database).map(|(_, life)| life);
        connect(database, &self.config(database)?, life).await
    }

    /// A new slot of a database with the snapshot that it begins at. Waits for every write that is under way there.
    pub async fn make_slot(&self, database: Database, slot: &str) -> Result<SlotSnapshot, Error> {
        slot::make(database, &self.config(database)?, slot).await
    }

    /// How another server reaches a database, in libpq's words; the password is among them.
    pub fn conninfo(&self, database: Database) -> Result<SecretString, Error> {
        Ok(Login::conninfo(&self.config(database)?).into())
    }

    fn config(&self, database: Database) -> Result<tokio_postgres::Config, Error> {
        let unknown = || Error::Config(format!("{database} is not in the control database"));
        match database {
            Database::Control => self.login.control(),
            Database::Directory => self.login.to(&self.catalog.directory, true),
            Database::Replica(n) => {
                let at = usize::try_from(n - 1).ok().and_then(|n| self.catalog.replicas.get(n));
                self.login.to(at.ok_or_else(unknown)?, false)
            }
            Database::Shard(number) => {
                let entry = self.catalog.shards.iter().find(|s| s.shard == number);
                self.login.to(&entry.ok_or_else(unknown)?.at, true)
            }
        }
    }
}

/// Connects, and drives the connection until the client is dropped. Of several hosts the one is preferred that is in this life.
pub(crate) async fn connect(
    database: Database,
    config: &tokio_postgres::Config,
    life: Option<Life>,
) -> Result<Client, Error> {
    // The driver's own limit ends with the first packet; an address without one has none here either.
    let limit = config.get_connect_timeout().copied().unwrap_or(Duration::MAX);
    let connected = tokio::time::timeout(limit, reach(config, life)).await;
    let connected = connected.map_err(|_| Error::Down { database, source: None })?;
    let (client, _) = connected.map_err(|source| not_connected(database, source))?;
    Ok(client)
}

/// Why there is no connection: who asks is refused, or nobody is let in.
pub(crate) fn not_connected(database: Database, source: tokio_postgres::Error) -> Error {
    match source.code().map_or("", |code| &code.code()[..2]) {
        "28" => Error::Refused { database, source },
        "3D" => Error::WrongDatabase { database, reason: "the server has no such database".into() },
        _ if source.to_string().contains("password missing") => Error::Refused { database, source },
        _ => Error::Down { database, source: Some(source) },
    }
}

/// Where a database is, as an address without password.
impl std::fmt::Display for Hosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.hosts, self.database)
    }
}
