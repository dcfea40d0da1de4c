//! What can go wrong in the community's own terms.

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation was not done. Nothing of it is half done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The rows could not be reached.
    #[error(transparent)]
    Store(#[from] shards::Error),
    /// Nobody has this id or name.
    #[error("there is no {what} {id}")]
    NotFound {
        /// What was looked for.
        what: &'static str,
        /// Its id or name.
        id: String,
    },
    /// It was deleted.
    #[error("{what} {id} was deleted")]
    Gone {
        /// What was looked for.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// Somebody else has it.
    #[error("the {what} `{value}` is taken")]
    Conflict {
        /// What was wanted: a user name, an e-mail address, an id.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// A value cannot be accepted.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The thread takes no replies.
    #[error("thread {0} is locked")]
    Locked(placement::ThreadId),
    /// The row was changed by somebody else in between.
    #[error("{what} {id} was changed by somebody else meanwhile")]
    Changed {
        /// What was to be changed.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The state that a row is in does not allow the operation.
    #[error("{what} {id} is {state}")]
    State {
        /// What it is.
        what: &'static str,
        /// Its id.
        id: String,
        /// The state that stands in the way.
        state: String,
    },
    /// The name, password or token is wrong, or its session is over. Which, is not said.
    #[error("the log-in is not valid")]
    Credentials,
}

impl Error {
    /// What kind of error this is, for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Store(error) => error.kind(),
            Error::NotFound { .. } => "not_found",
            Error::Gone { .. } => "gone",
            Error::Conflict { .. } => "conflict",
            Error::Invalid { .. } => "invalid",
            Error::Locked(_) => "locked",
            Error::Changed { .. } => "changed",
            Error::State { .. } => "state",
            Error::Credentials => "credentials",
        }
    }

    pub(crate) fn not_found(what: &'static str, id: impl ToString) -> Error {
        Error::NotFound { what, id: id.to_string() }
    }

    pub(crate) fn gone(what: &'static str, id: impl ToString) -> Error {
        Error::Gone { what, id: id.to_string() }
    }

    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
        Error::Invalid { field, reason: reason.into() }
    }

    /// A refused constraint in terms of the field that it guards: what the checks in this crate should have caught.
    pub(crate) fn of_constraint(error: shards::Error) -> Error {
        use tokio_postgres::error::SqlState;
        let Some(refused) = error.sql_error() else { return Error::Store(error) };
        // Without a name it is no rule for values: a month has no partition.
        let Some(constraint) = refused.constraint().map(str::to_owned) else { return Error::Store(error) };
        match *refused.code() {
            SqlState::UNIQUE_VIOLATION => Error::Conflict { what: "id", value: constraint },
            SqlState::CHECK_VIOLATION => Error::invalid("value", format!("refused by {constraint}")),
            SqlState::FOREIGN_KEY_VIOLATION => Error::not_found("row that this one belongs to", constraint),
            _ => Error::Store(error),
        }
    }
}
