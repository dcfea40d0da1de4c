//! What is shown of whoever wrote something. It comes with the row from the shard that has both; where an author's account lies on
//! another shard, from the directory.

use crate::columns::Columns;
use crate::community::Community;
use placement::UserId;
use serde::Serialize;
use shards::Unfenced;
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Row;
use uuid::Uuid;

/// What is shown of an author.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Author {
    /// Who.
    pub user_id: UserId,
    /// Absent: deleted, or neither with the row nor known to the directory (yet).
    pub user_name: Option<String>,
    /// First and last name, where given.
    pub display_name: Option<String>,
}

/// Columns of [`author_joined`].
macro_rules! author_columns {
    () => {
        "u.user_id AS author_here, u.user_name, therev.display_name(u) AS display_name"
    };
}
pub(crate) use author_columns;

/// Joins a row of group `content` with its author, as far as this shard may read accounts: the groups may be on different shards.
macro_rules! author_joined {
    ($row:literal) => {
        concat!(
            " JOIN therev.fence_account AS a ON a.colocation_group = 'account'
              LEFT JOIN users AS u
                ON u.bucket = ",
            $row,
            ".bucket AND u.user_id = ",
            $row,
            ".author_id AND therev.may_read(a, u.bucket, u.user_id) "
        )
    };
}
pub(crate) use author_joined;

static NAMES: Unfenced =
    Unfenced::read("SELECT d.user_id, d.user_name, d.display_name FROM user_directory AS d WHERE d.user_id = ANY ($1)");

impl Author {
    /// The author that a row of [`author_joined`] came with.
    pub(crate) fn with_row(row: &Row) -> Option<Author> {
        let mut columns = Columns::of(row);
        columns.get::<Option<Uuid>>("author_here").map(|id| Author::named(id, columns))
    }

    fn named(id: Uuid, mut columns: Columns<'_>) -> Author {
        let [user_name, display_name] = ["user_name", "display_name"].map(|name| columns.get(name));
        Author { user_id: UserId(id), user_name, display_name }
    }
}

impl Community {
    /// Adds what the directory knows of those who are not among `found`; while it is down, nothing.
    ///
    /// Whom a replica does not know may have come a moment ago: the writer is asked for those.
    pub(crate) async fn other_authors(&self, found: &mut BTreeMap<UserId, Author>, ids: BTreeSet<UserId>) {
        let directory = self.shards().directory();
        let mut wanted: Vec<Uuid> = ids.into_iter().filter(|id| !found.contains_key(id)).map(|id| id.0).collect();
        if wanted.is_empty() {
            return;
        }
        let mut rows = directory.read(&NAMES, &[&wanted], None).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "names are missing: the directory gave no answer");
            Vec::new()
        });
        let known: BTreeSet<Uuid> = rows.iter().map(|row| row.get("user_id")).collect();
        wanted.retain(|id| !known.contains(id));
        if !wanted.is_empty() && directory.replica_count() > 0 {
            rows.extend(directory.writer(&NAMES, &[&wanted]).await.unwrap_or_default());
        }
        let named = rows.iter().map(Columns::of).map(|mut row| Author::named(row.get("user_id"), row));
        found.extend(named.map(|it| (it.user_id, it)));
    }
}
