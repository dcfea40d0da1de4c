//! The SQL of every database, and what applies it.
//!
//! A database's schema is a list of chapters, read top to bottom. Each is applied in a transaction of its own and
//! recorded with its number, so that a run which failed half-way continues, and a program never meets a schema that it
//! does not know without noticing.

use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// What a database of a cluster is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Users and content of some buckets.
    Shard,
    /// The cross-shard reference tables.
    Directory,
    /// The catalog.
    Control,
}

impl Kind {
    /// Its name in `therev.identity`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Shard => "shard",
            Kind::Directory => "directory",
            Kind::Control => "control",
        }
    }

    /// The chapters of such a database, in order; a chapter's number is its place, from 1.
    pub fn chapters(self) -> &'static [Chapter] {
        match self {
            Kind::Shard => SHARD,
            Kind::Directory => DIRECTORY,
            Kind::Control => CONTROL,
        }
    }

    /// The newest version that this program knows.
    pub fn newest_version(self) -> i32 {
        i32::try_from(self.chapters().len()).unwrap_or(i32::MAX)
    }
}

/// One file of SQL.
#[derive(Debug)]
pub struct Chapter {
    /// The file's name without its ending.
    pub name: &'static str,
    sql: &'static str,
}

macro_rules! chapters {
    ($($path:literal)*) => {
        &[$(Chapter { name: $path, sql: include_str!(concat!("../", $path, ".sql")) }),*]
    };
}

const SHARD: &[Chapter] = chapters! {
    "common/01_identity"
    "shard/02_ownership"
    "shard/03_account"
    "shard/04_content"
    "shard/05_outbox"
    "shard/06_guards"
    "shard/07_months_and_views"
    "shard/08_relocation"
    "shard/09_grants"
};
const DIRECTORY: &[Chapter] = chapters! { "common/01_identity" "directory/02_directory" };
const CONTROL: &[Chapter] = chapters! { "common/01_identity" "control/02_control" };

/// Why a schema could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database has been used by a newer program.
    #[error("the schema is at version {found}, this program knows {known}: use the newer program")]
    TooNew {
        /// What the database has.
        found: i32,
        /// What this program has.
        known: i32,
    },
    /// A chapter failed; those before it are in place.
    #[error("chapter {chapter} failed")]
    Chapter {
        /// Which one.
        chapter: &'static str,
        /// What PostgreSQL said.
        source: tokio_postgres::Error,
    },
    /// The database did not answer as it should.
    #[error("the schema's version could not be read")]
    Sql(#[from] tokio_postgres::Error),
}

/// How long a chapter waits for a lock before it lets the traffic behind it pass and tries again.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// How often it tries.
const LOCK_TRIES: u32 = 10;

/// The version of a database; 0 when it has no schema of therev.
pub async fn version(client: &Client) -> Result<i32, Error> {
    let known = client.query_one("SELECT to_regclass('therev.schema_versions') IS NOT NULL", &[]).await?;
    if !known.get::<_, bool>(0) {
        return Ok(0);
    }
    let row = client.query_one("SELECT coalesce(max(version), 0) FROM therev.schema_versions", &[]).await?;
    Ok(row.get(0))
}

/// Brings a database to the newest version and says which chapters were applied.
///
/// Runs as the schema's owner. Any number may run: they wait for each other.
pub async fn apply(client: &mut Client, kind: Kind) -> Result<Vec<&'static str>, Error> {
    client.batch_execute("SELECT pg_advisory_lock(hashtext('therev.schema'))").await?;
    let applied = apply_missing(client, kind).await;
    // The lock goes with the session in any case; an error here must not hide the first one.
    let unlocked = client.batch_execute("SELECT pg_advisory_unlock(hashtext('therev.schema'))").await;
    let applied = applied?;
    unlocked?;
    Ok(applied)
}

async fn apply_missing(client: &mut Client, kind: Kind) -> Result<Vec<&'static str>, Error> {
    let found = version(client).await?;
    if found == 0 {
        client.batch_execute(include_str!("versions.sql")).await?;
    }
    let known = kind.newest_version();
    if found > known {
        return Err(Error::TooNew { found, known });
    }
    let mut applied = Vec::new();
    for (number, chapter) in (1..).zip(kind.chapters()).skip(usize::try_from(found).unwrap_or(0)) {
        apply_chapter(client, number, chapter).await?;
        applied.push(chapter.name);
    }
    Ok(applied)
}

async fn apply_chapter(client: &mut Client, number: i32, chapter: &'static Chapter) -> Result<(), Error> {
    let failed = |source| Error::Chapter { chapter: chapter.name, source };
    let mut tries = 1;
    loop {
        match try_chapter(client, number, chapter).await {
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) && tries < LOCK_TRIES => tries += 1,
            outcome => return outcome.map_err(failed),
        }
    }
}

async fn try_chapter(client: &mut Client, number: i32, chapter: &Chapter) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    let wait = format!("SET LOCAL lock_timeout = {}", LOCK_WAIT.as_millis());
    transaction.batch_execute(&wait).await?;
    transaction.batch_execute(chapter.sql).await?;
    transaction
        .execute("INSERT INTO therev.schema_versions (version, name) VALUES ($1, $2)", &[&number, &chapter.name])
        .await?;
    transaction.commit().await
}
