//! What can go wrong on the way to a server.

use placement::ShardNo;
use std::fmt;

/// One database of the cluster, as errors and counters name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Database {
    /// The catalog.
    Control,
    /// The directory's writer.
    Directory,
    /// A replica of the directory.
    Replica(i16),
    /// A shard.
    Shard(ShardNo),
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Database::Control => f.write_str("the control database"),
            Database::Directory => f.write_str("the directory"),
            Database::Replica(n) => write!(f, "directory replica {n}"),
            Database::Shard(n) => write!(f, "shard {n}"),
        }
    }
}

/// Why a call did not reach its rows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server cannot be reached; nothing was done there.
    #[error("{database} is down")]
    Down {
        /// Which database.
        database: Database,
        /// What the attempt ended with; `None` where nothing came in time, and while the breaker spares the server.
        source: Option<tokio_postgres::Error>,
    },
    /// The server refuses this role or its password.
    #[error("{database} refuses the role or its password")]
    Refused {
        /// Which database.
        database: Database,
        /// What it said.
        source: tokio_postgres::Error,
    },
    /// The connection broke while a write was under way: it is done or it is not.
    #[error("the connection to {database} broke while a write was under way: it may have been done")]
    OutcomeUnknown {
        /// Which database.
        database: Database,
        /// What the connection ended with; `None` where it was lost with others' writes, or their answer was too late.
        source: Option<tokio_postgres::Error>,
    },
    /// The call's deadline passed.
    #[error("no answer within {limit_ms} ms, waiting for {waiting_for}")]
    Deadline {
        /// The deadline.
        limit_ms: u128,
        /// What it was waiting for.
        waiting_for: String,
    },
    /// The address leads to a database that is not the one meant.
    #[error("{database} is not where its address leads: {reason}")]
    WrongDatabase {
        /// Which database was meant.
        database: Database,
        /// What is there instead.
        reason: String,
    },
    /// The server is of a life that does not count (yet): it was promoted or restored, and nobody may trust it before the
    /// control database has said so.
    #[error("{database} is closed: {reason}")]
    Closed {
        /// Which database.
        database: Database,
        /// Why.
        reason: String,
    },
    /// The statement failed; it changed nothing.
    #[error("a statement failed on {database}")]
    Sql {
        /// Which database.
        database: Database,
        /// What it said.
        source: tokio_postgres::Error,
    },
    /// A row does not have the shape that this program expects.
    #[error("an unexpected answer from {database}: {reason}")]
    Answer {
        /// Which database.
        database: Database,
        /// What is odd.
        reason: String,
    },
    /// Something stands in the way of what was asked for; nothing was changed.
    #[error("{reason}")]
    InTheWay {
        /// What it is.
        reason: String,
        /// What to do about it.
        next: String,
    },
    /// The configuration cannot be used.
    #[error("configuration: {0}")]
    Config(String),
    /// A schema could not be applied or is of another version.
    #[error("schema of {database}")]
    Schema {
        /// Which database.
        database: Database,
        /// Why.
        source: schema::Error,
    },
}

impl Error {
    /// The shard or other database that the error is about.
    pub fn database(&self) -> Option<Database> {
        match self {
            Error::Down { database, .. }
            | Error::Refused { database, .. }
            | Error::OutcomeUnknown { database, .. }
            | Error::WrongDatabase { database, .. }
            | Error::Closed { database, .. }
            | Error::Sql { database, .. }
            | Error::Answer { database, .. }
            | Error::Schema { database, .. } => Some(*database),
            Error::Deadline { .. } | Error::Config(_) | Error::InTheWay { .. } => None,
        }
    }

    /// What kind of error this is, for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Down { .. } => "down",
            Error::Refused { .. } => "refused",
            Error::OutcomeUnknown { .. } => "outcome_unknown",
            Error::Deadline { .. } => "deadline",
            Error::WrongDatabase { .. } => "wrong_database",
            Error::Closed { .. } => "closed",
            Error::Sql { .. } => "sql",
            Error::Answer { .. } => "answer",
            Error::InTheWay { .. } => "in_the_way",
            Error::Config(_) => "config",
            Error::Schema { .. } => "schema",
        }
    }

    pub(crate) fn in_the_way(reason: impl Into<String>, next: impl Into<String>) -> Error {
        Error::InTheWay { reason: reason.into(), next: next.into() }
    }

    /// The SQLSTATE and constraint of a failed statement.
    pub fn sql_error(&self) -> Option<&tokio_postgres::error::DbError> {
        match self {
            Error::Sql { source, .. } => source.as_db_error(),
            _ => None,
        }
    }

    /// Sorts a driver's error: the server's word on the statement, or a broken connection.
    pub(crate) fn of_statement(database: Database, writes: bool, source: tokio_postgres::Error) -> Error {
        use tokio_postgres::error::Severity;
        let is_over = match source.as_db_error() {
            // The server ends the session, whatever the reason: what the statement did is not said. It may have been committed
            // before the log of it could not be written on.
            Some(said) => matches!(said.parsed_severity(), Some(Severity::Fatal | Severity::Panic)),
            None => !is_local(&source),
        };
        match (is_over, writes) {
            (true, true) => Error::OutcomeUnknown { database, source: Some(source) },
            (true, false) => Error::Down { database, source: Some(source) },
            (false, _) => Error::Sql { database, source },
        }
    }
}

/// Whether the driver itself refused the call (a parameter of the wrong type), so that nothing was sent.
fn is_local(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_none() && !error.is_closed() && {
        let text = error.to_string();
        text.contains("serializing") || text.contains("deserializing") || text.contains("number of")
    }
}

/// Whether a statement failed, and changed nothing, because a publication went just then: PostgreSQL finds a table's publications,
/// then reads each, and says this when a relocation has ended in between.
pub fn has_missed_publication(error: &tokio_postgres::error::DbError) -> bool {
    *error.code() == tokio_postgres::error::SqlState::INTERNAL_ERROR
        && error.message().starts_with("cache lookup failed for publication")
}
