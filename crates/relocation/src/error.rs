//! Why a relocation does not go on.

use shards::Database;
use tokio_postgres::error::SqlState;

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a relocation did not begin, or does not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something stands in the way; nothing was changed.
    #[error("{reason}")]
    Refused {
        /// What stands in the way.
        reason: String,
        /// What to do about it.
        next: String,
    },
    /// There is no such relocation.
    #[error("there is no relocation {0}")]
    Unknown(i64),
    /// Another process works at it now.
    #[error("another process works at relocation {0} now")]
    Taken(i64),
    /// Rows differ between the two sides, and do not come to agree.
    #[error("rows of relocation {relocation} differ between its two sides: {examples}")]
    Differs {
        /// Which relocation.
        relocation: i64,
        /// Some of them, by table and key.
        examples: String,
    },
    /// A promotion or a restore of one of its servers took away what it counts on.
    #[error("{database} was promoted or restored since the relocation began")]
    OtherLife {
        /// Which database.
        database: Database,
    },
    /// A shard has no part in it any more: somebody who slept has undone it while another process went on.
    #[error("relocation {relocation} has no part on {database}")]
    PartGone {
        /// Which relocation.
        relocation: i64,
        /// Which database.
        database: Database,
    },
    /// The stream of changes stopped on a row that the other side cannot take.
    #[error("the stream to {database} does not get on: {reason}")]
    Stream {
        /// The side that takes.
        database: Database,
        /// What is known of it.
        reason: String,
    },
    /// A server could not be reached, or refused.
    #[error(transparent)]
    Store(#[from] shards::Error),
    /// A statement failed.
    #[error("a statement failed on {database}")]
    Sql {
        /// Which database.
        database: Database,
        /// What it said.
        source: tokio_postgres::Error,
    },
}

impl Error {
    pub(crate) fn refused(reason: impl Into<String>, next: impl Into<String>) -> Error {
        Error::Refused { reason: reason.into(), next: next.into() }
    }

    /// Whether a shard does not own the buckets as a step expects it.
    pub(crate) fn is_ownership(&self) -> bool {
        matches!(self, Error::Sql { source, .. } if source.code().is_some_and(|code| code.code() == "TR004"))
    }

    /// Whether trying again a little later may help: a server that is down comes back.
    pub fn is_passing(&self) -> bool {
        match self {
            Error::Store(error) => {
                matches!(error.kind(), "down" | "deadline" | "closed" | "outcome_unknown" | "refused")
            }
            Error::Sql { source, .. } => source.as_db_error().is_none_or(|error| {
                let class = &error.code().code()[..2];
                // Operator intervention, lack of resources, a broken connection, a deadlock, an object in use; and a step that
                // lay ready for too long.
                matches!(class, "57" | "53" | "08" | "40" | "55")
                    || *error.code() == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
                    || shards::has_missed_publication(error)
                    || has_lost_publisher(error)
            }),
            Error::Stream { .. } | Error::OtherLife { .. } | Error::PartGone { .. } => true,
            _ => false,
        }
    }
}

/// Whether a subscription's server lost the publishing one in the middle of a question; it has no code for that.
fn has_lost_publisher(error: &tokio_postgres::error::DbError) -> bool {
    *error.code() == SqlState::INTERNAL_ERROR && error.message().contains("from the publisher")
}
