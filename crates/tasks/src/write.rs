//! What the writes of this crate have in common.

use crate::Tasks;
use crate::check::invalid;
use community::{Error, Result};
use placement::{Bucket, UserId};
use shards::Write;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

/// How often a write is sent before it is given up. Each further time needs somebody else to have won a race.
const TRIES: u32 = 4;

impl Tasks {
    /// Runs a write that may be sent again, since a second time has no other effect. `None`: there is nothing to write.
    pub(crate) async fn write_again(
        &self,
        statement: &Write,
        bucket: Bucket,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>> {
        let (mut tries, mut was_empty, mut unknown) = (0, false, None);
        loop {
            tries += 1;
            match self.community.shards().write(statement, bucket, params).await {
                Ok(mut rows) if !rows.is_empty() => return Ok(Some(rows.swap_remove(0))),
                // Nothing there, or just being committed by somebody else: then the next snapshot has it.
                Ok(_) if was_empty || tries >= TRIES => return Ok(None),
                Ok(_) => was_empty = true,
                Err(error) if tries < TRIES && is_lost_race(&error) => {
                    unknown = unknown.or(Some(error).filter(is_unknown));
                }
                // A try that failed does not say what became of the one whose connection broke.
                Err(error) => return Err(unknown.map_or_else(|| refused(error), Error::Store)),
            }
        }
    }

    /// Why a write found no owner: there is no such user, or it was deleted.
    pub(crate) async fn no_owner(&self, user: UserId) -> Error {
        match self.community.user(user).await {
            Ok(_) => Error::Changed { what: "user", id: user.to_string() },
            Err(error) => error,
        }
    }
}

/// The connection broke, or somebody else's default account came first: the same statement again is right.
fn is_lost_race(error: &shards::Error) -> bool {
    is_unknown(error) || error.sql_error().is_some_and(|refused| *refused.code() == SqlState::EXCLUSION_VIOLATION)
}

fn is_unknown(error: &shards::Error) -> bool {
    matches!(error, shards::Error::OutcomeUnknown { .. })
}

/// A refused constraint in terms of the field that it guards.
fn refused(error: shards::Error) -> Error {
    let Some(refused) = error.sql_error() else { return Error::Store(error) };
    // Without a name it is no rule for values: a month has no partition.
    let Some(constraint) = refused.constraint().map(str::to_owned) else { return Error::Store(error) };
    match (refused.code().clone(), constraint.as_str()) {
        (SqlState::FOREIGN_KEY_VIOLATION, "ai_tasks_intent_fkey") => invalid("intent", "there is no such intent"),
        (SqlState::FOREIGN_KEY_VIOLATION, _) => {
            Error::NotFound { what: "row that this one belongs to", id: constraint }
        }
        (SqlState::UNIQUE_VIOLATION, _) => Error::Conflict { what: "id", value: constraint },
        (SqlState::EXCLUSION_VIOLATION, _) => Error::Changed { what: "default account", id: "of the user".to_owned() },
        (SqlState::CHECK_VIOLATION, _) => invalid("value", format!("refused by {constraint}")),
        _ => Error::Store(error),
    }
}
