//! One of the two shards of a relocation, and what it says of its part.

use crate::error::{Error, Result};
use crate::record::{Apart, Relocation};
use placement::ShardNo;
use shards::{Admin, Database};
use std::time::{Duration, Instant};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;

/// Which side of a relocation, as planned; going back does not change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Source,
    Target,
}

impl Which {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Which::Source => "source",
            Which::Target => "target",
        }
    }
}

/// What a shard may do with the buckets of a relocation, by its own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PartState {
    Owned,
    Draining,
    Moved,
    Incoming,
    Ready,
}

/// A shard's part in a relocation.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) state: PartState,
    pub(crate) attempt: i32,
    /// Which copy, or undoing of one, it is in.
    pub(crate) round: i32,
    /// Whether the server still lives the life in which the part began.
    pub(crate) is_same_life: bool,
    pub(crate) since: Option<String>,
}

/// A connection to one of the two shards.
pub(crate) struct Side {
    pub(crate) which: Which,
    pub(crate) shard: ShardNo,
    pub(crate) client: Client,
}

const PART: &str = "
    SELECT p.state, p.attempt, p.copy_round, therev.is_same_life(p) AS is_same_life, p.since::text
      FROM therev.relocation_parts AS p
     WHERE p.relocation = $1";

/// Within a transaction: keeps a part as it is until the transaction ends, in a way that tells others apart who do. What follows says
/// which part.
pub(crate) const KEEP_PART: &str = "
    SELECT pg_advisory_xact_lock_shared(hashtextextended('therev.relocation_parts', p.relocation))
      FROM therev.relocation_parts AS p";

const LIFE: &str = "
    SELECT i.incarnation, i.timeline = therev.current_timeline() AS is_known FROM therev.identity AS i";

impl Side {
    /// Connects; what is written through this connection fires no trigger, and no key is looked up.
    pub(crate) async fn connect(admin: &Admin, which: Which, shard: ShardNo) -> Result<Side> {
        let client = admin.connect(Database::Shard(shard)).await?;
        let side = Side { which, shard, client };
        side.batch(
            // Keys with a time in them are compared as text.
            "SET session_replication_role = replica; SET lock_timeout = '10s'; SET statement_timeout = 0;
             SET timezone = 'UTC'; SET datestyle = 'ISO, YMD'; SET application_name = 'therev mover'",
        )
        .await?;
        Ok(side)
    }

    pub(crate) fn database(&self) -> Database {
        Database::Shard(self.shard)
    }

    pub(crate) fn sql(&self, source: tokio_postgres::Error) -> Error {
        Error::Sql { database: self.database(), source }
    }

    pub(crate) async fn batch(&self, sql: &str) -> Result<()> {
        self.client.batch_execute(sql).await.map_err(|e| self.sql(e))
    }

    pub(crate) async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.client.query(sql, params).await.map_err(|e| self.sql(e))
    }

    pub(crate) async fn one(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Row> {
        self.client.query_one(sql, params).await.map_err(|e| self.sql(e))
    }

    pub(crate) async fn execute(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64> {
        self.client.execute(sql, params).await.map_err(|e| self.sql(e))
    }

    pub(crate) async fn prepare(&self, sql: &str) -> Result<Statement> {
        self.client.prepare(sql).await.map_err(|e| self.sql(e))
    }

    /// A function of this database that says whether it changed anything.
    pub(crate) async fn says(&self, statement: &Statement, params: &[&(dyn ToSql + Sync)]) -> Result<bool> {
        Ok(self.client.query_one(statement, params).await.map_err(|e| self.sql(e))?.get(0))
    }

    /// What this shard says of its part; `None`: it has none.
    pub(crate) async fn part(&self, relocation: i64) -> Result<Option<Part>> {
        let rows = self.query(PART, &[&relocation]).await?;
        rows.first().map(|row| self.part_of(row)).transpose()
    }

    /// The same where it is counted on.
    pub(crate) async fn must_have_part(&self, relocation: i64) -> Result<Part> {
        let gone = || Error::PartGone { relocation, database: self.database() };
        self.part(relocation).await?.ok_or_else(gone)
    }

    /// Ends the transactions that keep this side's part: whoever goes on with a relocation has its work, and a process that was stopped
    /// in one of them would hold it up for as long as it sleeps.
    pub(crate) async fn end_keepers(&self, relocation: i64) -> Result<()> {
        let sql = "SELECT pg_terminate_backend(l.pid)
                     FROM pg_locks AS l
                     JOIN pg_database AS d ON d.oid = l.database AND d.datname = current_database()
                    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.pid <> pg_backend_pid()
                      AND (l.classid::bigint << 32 | l.objid::bigint)
                          = hashtextextended('therev.relocation_parts', $1)";
        self.query(sql, &[&relocation]).await.map(drop)
    }

    /// Who of these buckets is placed apart, by this shard's word.
    pub(crate) async fn apart(&self, groups: &[&str], buckets: &[i16]) -> Result<Vec<Apart>> {
        let said = self.one("SELECT therev.apart_of($1, $2)", &[&groups, &buckets]).await?;
        serde_json::from_value(said.get(0)).map_err(|error| {
            let reason = format!("people apart of an unknown shape: {error}");
            shards::Error::Answer { database: self.database(), reason }.into()
        })
    }

    fn part_of(&self, row: &Row) -> Result<Part> {
        let state = match row.get("state") {
            "owned" => PartState::Owned,
            "draining" => PartState::Draining,
            "moved" => PartState::Moved,
            "incoming" => PartState::Incoming,
            "ready" => PartState::Ready,
            other => {
                let reason = format!("a part in the unknown state `{other}`");
                return Err(shards::Error::Answer { database: self.database(), reason }.into());
            }
        };
        Ok(Part {
            state,
            attempt: row.get("attempt"),
            round: row.get("copy_round"),
            is_same_life: row.get("is_same_life"),
            since: row.get("since"),
        })
    }

    /// Which life this server lives; an error while it is not known.
    pub(crate) async fn life(&self) -> Result<Uuid> {
        let row = self.one(LIFE, &[]).await?;
        if row.get::<_, Option<bool>>("is_known") == Some(true) {
            Ok(row.get("incarnation"))
        } else {
            Err(Error::OtherLife { database: self.database() })
        }
    }

    /// Waits until a question is answered with yes, looking every so often.
    pub(crate) async fn until(
        &self,
        what: &str,
        limit: Duration,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<()> {
        let (began, statement) = (Instant::now(), self.prepare(sql).await?);
        let mut wait = Duration::from_millis(1);
        while !self.says(&statement, params).await? {
            if began.elapsed() > limit {
                let reason = format!("{what} within {} s", limit.as_secs());
                return Err(Error::Stream { database: self.database(), reason });
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(200));
        }
        Ok(())
    }
}

/// Both shards of a relocation.
pub(crate) struct Pair {
    pub(crate) source: Side,
    pub(crate) target: Side,
}

impl Pair {
    pub(crate) async fn connect(admin: &Admin, relocation: &Relocation) -> Result<Pair> {
        let source = Side::connect(admin, Which::Source, relocation.source);
        let target = Side::connect(admin, Which::Target, relocation.target);
        let (source, target) = futures_util::future::try_join(source, target).await?;
        Ok(Pair { source, target })
    }

    /// Refuses to go on when one of the servers lost what the relocation counts on.
    pub(crate) async fn check_lives(&self, relocation: &Relocation) -> Result<()> {
        for (side, life) in [(&self.source, relocation.source_life), (&self.target, relocation.target_life)] {
            if life != Some(side.life().await?) {
                return Err(Error::OtherLife { database: side.database() });
            }
        }
        Ok(())
    }
}
