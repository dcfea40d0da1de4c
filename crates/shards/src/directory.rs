//! The directory: one writer, any number of replicas, and tokens by which a reader sees its own writes.

use crate::address::Hosts;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::error::{Database, Error};
use crate::life::Lives;
use crate::pool::{Expected, Params, Pool};
use crate::statement::Unfenced;
use crate::store::limits;
use arc_swap::ArcSwap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{PgLsn, ToSql, Type};
use uuid::Uuid;

/// The directory's databases.
pub struct Directory {
    pools: ArcSwap<Pools>,
    next: AtomicUsize,
}

/// Connections to each of them, and where they are.
pub(crate) struct Pools {
    at: (Hosts, Vec<Hosts>),
    writer: Pool,
    replicas: Vec<Pool>,
}

/// What a reader has seen or written: which life of the directory, and how far it had come. Opaque in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    incarnation: Uuid,
    lsn: PgLsn,
}

/// A token that is none.
#[derive(Debug, thiserror::Error)]
#[error("this is no token of a write")]
pub struct InvalidToken;

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:016x}", self.incarnation.simple(), u64::from(self.lsn))
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let (incarnation, lsn) = text.split_at_checked(32).ok_or(InvalidToken)?;
        let incarnation = incarnation.parse().map_err(|_| InvalidToken)?;
        let whole = lsn.len() == 16 && lsn.bytes().all(|b| b.is_ascii_hexdigit());
        let lsn = whole.then(|| u64::from_str_radix(lsn, 16).ok()).flatten().ok_or(InvalidToken)?;
        Ok(Token { incarnation, lsn: lsn.into() })
    }
}

/// How far the writer has come; asked after the write it stands for.
const POSITION: &str = "SELECT incarnation, pg_current_wal_insert_lsn() AS lsn FROM therev.identity";

/// Whether a replica has come as far. Asked in a statement of its own before the read: a snapshot taken together with
/// the question could be older than the answer.
const REACHED: &str = "
    SELECT FROM therev.identity AS i
     WHERE i.incarnation = $1 AND pg_last_wal_replay_lsn() >= $2";

impl Directory {
    pub(crate) fn new(catalog: &Catalog, config: &Config, lives: &Arc<Lives>) -> Result<Directory, Error> {
        let pools = ArcSwap::from_pointee(Pools::new(catalog, config, lives)?);
        Ok(Directory { pools, next: AtomicUsize::new(0) })
    }

    /// Goes where a later catalog says that they are, and trusts a later life of the writer.
    pub(crate) fn follow(&self, catalog: &Catalog, config: &Config, lives: &Arc<Lives>) -> Result<(), Error> {
        let known = self.pools.load();
        if known.at == at(catalog) {
            known.writer.know(catalog.directory_life);
        } else {
            self.pools.store(Arc::new(Pools::new(catalog, config, lives)?));
        }
        Ok(())
    }

    pub(crate) fn pools(&self) -> Arc<Pools> {
        self.pools.load_full()
    }

    /// How many replicas there are.
    pub fn replica_count(&self) -> usize {
        self.pools.load().replicas.len()
    }

    /// Runs a statement on the writer.
    pub async fn writer(&self, statement: &Unfenced, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        self.pools().writer.query(statement.sql, params, statement.writes).await
    }

    /// Copies rows into one of the writer's tables by a `COPY … FROM STDIN (FORMAT binary)` of columns of these types: all
    /// of them, or none. Says how many.
    pub async fn copy<'a>(
        &self,
        copy: &str,
        types: &[Type],
        rows: impl Iterator<Item = Vec<&'a (dyn ToSql + Sync)>>,
    ) -> Result<u64, Error> {
        self.pools().writer.copy(copy, types, rows).await
    }

    /// Runs a statement on one replica, by its place from 0.
    pub async fn replica(&self, at: usize, statement: &Unfenced, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let pools = self.pools();
        let pool = pools.replicas.get(at).ok_or_else(|| Error::Config(format!("there is no replica {}", at + 1)))?;
        pool.query(statement.sql, params, statement.writes).await
    }

    /// A token for everything that the writer holds now.
    pub async fn token(&self) -> Result<Token, Error> {
        let rows = self.pools().writer.query(POSITION, &[], false).await?;
        let row = rows
            .first()
            .ok_or_else(|| Error::Answer { database: Database::Directory, reason: "it has no identity".into() })?;
        Ok(Token { incarnation: row.get("incarnation"), lsn: row.get("lsn") })
    }

    /// Reads from a replica that has come at least as far as `seen`; from the writer when none has, or none answers.
    pub async fn read(
        &self,
        statement: &Unfenced,
        params: &Params<'_>,
        seen: Option<&Token>,
    ) -> Result<Vec<Row>, Error> {
        let (first, pools) = (self.next.fetch_add(1, Ordering::Relaxed), self.pools());
        let from_replicas = async {
            for turn in 0..pools.replicas.len() {
                let replica = &pools.replicas[(first + turn) % pools.replicas.len()];
                match read_after(replica, statement, params, seen).await {
                    Ok(Some(rows)) => return Ok(Some(rows)),
                    Ok(None) => {}
                    // A statement that is wrong is wrong everywhere. A replica that is down, or that had to cancel it to go
                    // on replaying, is only passed over.
                    Err(error) if error.sql_error().is_some_and(|refused| !is_of_the_moment(refused.code())) => {
                        return Err(error);
                    }
                    Err(error) => tracing::debug!(%error, "a directory replica was passed over"),
                }
            }
            Ok(None)
        };
        let deadline = pools.writer.deadline();
        let started = Instant::now();
        // Of one deadline for all that are asked, some is left for the writer.
        match tokio::time::timeout(deadline * 3 / 4, from_replicas).await {
            Ok(Ok(Some(rows))) => return Ok(rows),
            Ok(Err(error)) => return Err(error),
            Ok(Ok(None)) | Err(_) => {}
        }
        let from_writer = pools.writer.query(statement.sql, params, false);
        let left = deadline.saturating_sub(started.elapsed());
        tokio::time::timeout(left, from_writer).await.unwrap_or_else(|_| Err(pools.writer.late("an answer from")))
    }
}

impl Pools {
    fn new(catalog: &Catalog, config: &Config, lives: &Arc<Lives>) -> Result<Pools, Error> {
        let (cluster_id, kind) = (Some(catalog.cluster_id), schema::Kind::Directory);
        let expected = Expected { cluster_id, kind, life: Some(catalog.directory_life) };
        let login = lives.login.to(&catalog.directory, true)?;
        let writer = Pool::new(Database::Directory, login, expected, limits(config, 16), Some(lives.clone()))?;
        let expected = Expected { life: None, ..expected };
        let replica = |(number, at): (i16, &Hosts)| {
            Pool::new(Database::Replica(number), lives.login.to(at, false)?, expected, limits(config, 16), None)
        };
        let replicas = (1..).zip(&catalog.replicas).map(replica).collect::<Result<_, _>>()?;
        Ok(Pools { at: at(catalog), writer, replicas })
    }

    /// Whom the first reader asks.
    pub(crate) fn first_reader(&self) -> &Pool {
        self.replicas.first().unwrap_or(&self.writer)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Pool> {
        std::iter::once(&self.writer).chain(&self.replicas)
    }
}

/// Where the writer is, and where the replicas are.
fn at(catalog: &Catalog) -> (Hosts, Vec<Hosts>) {
    (catalog.directory.clone(), catalog.replicas.clone())
}

/// Class 40: transaction rollback, as by a conflict with recovery. Class 57: operator intervention, time-outs.
fn is_of_the_moment(code: &SqlState) -> bool {
    code.code().starts_with("40") || code.code().starts_with("57")
}

/// Reads from one replica; `None` when it is behind or of another life.
async fn read_after(
    replica: &Pool,
    statement: &Unfenced,
    params: &Params<'_>,
    seen: Option<&Token>,
) -> Result<Option<Vec<Row>>, Error> {
    match seen {
        // On one connection: an address of several hosts leads to servers that have not come equally far.
        Some(token) => replica.query_if((REACHED, &[&token.incarnation, &token.lsn]), (statement.sql, params)).await,
        None => replica.query(statement.sql, params, false).await.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_token_survives_text(incarnation: u128, lsn: u64) {
            let token = Token { incarnation: Uuid::from_u128(incarnation), lsn: lsn.into() };
            prop_assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
        }

        #[test]
        fn any_text_is_a_token_or_an_error(text in prop_oneof![any::<String>(), "[0-9a-fA-F{}é-]{40,60}"]) {
            if let Ok(token) = text.parse::<Token>() {
                prop_assert_eq!(token.to_string(), text.to_lowercase());
            }
        }
    }

    #[test]
    fn a_token_survives_text_and_nothing_else_is_one() {
        let token = Token { incarnation: Uuid::from_u128(7), lsn: 0x1_0000_00ff.into() };
        assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
        for bad in ["", "x", &"ä".repeat(24), &"0".repeat(47), &format!("{}+000000000000001", "0".repeat(32))] {
            assert!(bad.parse::<Token>().is_err(), "{bad}");
        }
    }
}
