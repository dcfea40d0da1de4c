//! Proof that the databases agree: every row where its owner is, and everything derived from it the same everywhere.
//!
//! Safe beside live traffic. What lies in one database is looked at in one snapshot. What lies in two is compared by
//! class (bucket): counts and order-independent hashes first, single rows only in the classes that differ. What differs is
//! looked at again until it agrees or has stayed different, key by key; and what an event is still to tell is not wrong for
//! the minute that this may take.

pub(crate) mod across;
mod catalog;
pub(crate) mod within;

use crate::community::Community;
use crate::error::Result;
use serde::Serialize;
use shards::{Admin, Database, Error, Shards};
use std::time::Duration;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

/// What `check` found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Each proof.
    pub checks: Vec<Check>,
}

/// One proof.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was proved.
    pub name: String,
    /// How many rows (or things) were looked at.
    pub checked: u64,
    /// How many of them are wrong.
    pub wrong: u64,
    /// Some of the wrong ones, by key.
    pub examples: Vec<String>,
}

/// The proofs of what is derived, which [`Community::repair`] puts right where they fail.
pub(crate) const OWNERS: &str = "one owner per bucket";
pub(crate) const OUTBOX: &str = "outbox younger than a minute";
pub(crate) const CLAIMS: &str = "claims settled";
pub(crate) const NAMES: &str = "names of users = claims";
pub(crate) const CONTRIBUTIONS: &str = "contributions = posts";
pub(crate) const PARTICIPANTS: &str = "contributions = participants";
pub(crate) const TOTALS: &str = "totals = participants";
pub(crate) const USERS: &str = "users = directory";
pub(crate) const THREADS: &str = "threads = directory";

/// How many wrong keys are named.
pub(crate) const EXAMPLES: usize = 5;
/// How often something that differs is looked at again, and how long after.
pub(crate) const LOOKS: u32 = 5;
pub(crate) const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

impl Check {
    fn named(name: &str) -> Check {
        Check { name: name.to_owned(), ..Check::default() }
    }

    fn wrong(&mut self, example: String) {
        self.wrong += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }
}

/// A connection per database, in one time zone, so that times read the same everywhere.
pub(crate) struct Databases {
    pub(crate) control: Client,
    pub(crate) directory: Client,
    pub(crate) shards: Vec<(Database, Client)>,
}

impl Databases {
    /// Those of the cluster as it is now.
    pub(crate) async fn of(shards: &Shards) -> std::result::Result<Databases, Error> {
        shards.refresh().await?;
        Databases::connect(&Admin::new(shards.config(), shards.catalog())?).await
    }

    pub(crate) async fn connect(admin: &Admin) -> std::result::Result<Databases, Error> {
        let open = |database: Database| async move {
            let client = admin.connect(database).await?;
            let settings = "SET timezone = 'UTC'; SET work_mem = '64MB'";
            client.batch_execute(settings).await.map_err(|source| Error::Sql { database, source })?;
            Ok::<_, Error>((database, client))
        };
        let opened = futures_util::future::try_join_all(admin.databases().into_iter().map(|(d, _)| open(d))).await?;
        let mut shards = Vec::new();
        let (mut control, mut directory) = (None, None);
        for (database, client) in opened {
            match database {
                Database::Control => control = Some(client),
                Database::Directory => directory = Some(client),
                _ => shards.push((database, client)),
            }
        }
        let missing = || Error::Config("a cluster without control database or directory".into());
        Ok(Databases { control: control.ok_or_else(missing)?, directory: directory.ok_or_else(missing)?, shards })
    }

    /// The rows of all shards, asked side by side.
    pub(crate) async fn ask_shards(
        &self,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> std::result::Result<Vec<Row>, Error> {
        let asked = self.shards.iter().map(|(database, client)| async move {
            client.query(sql, params).await.map_err(|source| Error::Sql { database: *database, source })
        });
        Ok(futures_util::future::try_join_all(asked).await?.into_iter().flatten().collect())
    }

    /// Every proof.
    pub(crate) async fn prove(&self) -> std::result::Result<Vec<Check>, Error> {
        let mut checks = catalog::checks(self).await?;
        checks.extend(within::checks(self).await?);
        checks.extend(across::checks(self).await?);
        Ok(checks)
    }
}

impl Community {
    /// Proves the whole cluster. Needs every database; one that is down is the error. Where a shard was added meanwhile it is proved
    /// once more, with that.
    pub async fn check(&self) -> Result<Report> {
        loop {
            let databases = Databases::of(self.shards()).await?;
            let asked = self.shards().numbers();
            let checks = databases.prove().await?;
            let ok = checks.iter().all(|check| check.wrong == 0);
            self.shards().refresh().await?;
            if ok || self.shards().numbers() == asked {
                return Ok(Report { ok, checks });
            }
        }
    }
}
