//! The cluster at a glance: what each database holds and whether it answers.

use crate::community::Community;
use crate::error::Result;
use futures_util::future::join_all;
use placement::ShardNo;
use serde::Serialize;
use shards::Unfenced;
use tokio_postgres::Row;

/// What `status` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overview {
    /// Each shard.
    pub shards: Vec<ShardStatus>,
    /// The directory.
    pub directory: DirectoryStatus,
    /// The outboxes of all shards together.
    pub outbox: OutboxStatus,
    /// Whether the control database answers.
    pub control: State,
}

/// Whether a database answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It does.
    Up,
    /// It does not.
    Down,
}

/// One shard. Rows are counted where their bucket is owned; absent while it is down, and where to count them takes longer than a
/// call may.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardStatus {
    /// Its number.
    pub shard: ShardNo,
    /// Whether it answers.
    pub state: State,
    /// Why it does not.
    pub reason: Option<String>,
    /// PostgreSQL's version.
    pub version: Option<String>,
    /// Living users.
    pub users: Option<i64>,
    /// Living threads.
    pub threads: Option<i64>,
    /// Living posts.
    pub posts: Option<i64>,
    /// AI tasks.
    pub tasks: Option<i64>,
    /// The database on disk.
    pub bytes: Option<i64>,
    /// Servers that follow this one, and those that should and do not; nobody knows of them while it is down.
    pub standbys: Vec<Standby>,
    /// Other hosts of its address that take writes, which nobody counts on.
    pub other_primaries: Vec<String>,
}

/// A server that follows another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standby {
    /// How far it is behind, in milliseconds; absent: it does not answer, or does not say.
    pub lag_ms: Option<f64>,
}

/// The directory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DirectoryStatus {
    /// Whether its writer answers.
    pub state: State,
    /// Living users in it.
    pub users: Option<i64>,
    /// Living threads in it.
    pub threads: Option<i64>,
    /// Its replicas.
    pub replicas: Vec<Standby>,
}

/// What waits to be delivered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutboxStatus {
    /// How many events, on the shards that answer; absent: none does.
    pub pending: Option<i64>,
    /// The age of the oldest, in milliseconds.
    pub oldest_ms: Option<f64>,
}

/// Apart from the rest: a shard may hold more than can be counted in a call's time, and is well all the same.
static COUNTS: Unfenced = Unfenced::read(
    "SELECT (SELECT count(*) FROM users AS u WHERE u.deleted_at IS NULL AND therev.may_read(a, u.bucket, u.user_id))
                AS users,
            (SELECT count(*) FROM threads AS t WHERE t.deleted_at IS NULL AND therev.may_read(c, t.bucket, t.author_id))
                AS threads,
            (SELECT count(*) FROM posts AS p WHERE p.deleted_at IS NULL AND therev.may_read(c, p.bucket, p.author_id))
                AS posts,
            (SELECT count(*) FROM ai_tasks AS t WHERE therev.may_read(a, t.bucket, t.user_id)) AS tasks
       FROM therev.fence AS a, therev.fence AS c
      WHERE a.colocation_group = 'account' AND c.colocation_group = 'content'",
);

static SHARD: Unfenced = Unfenced::read(
    "SELECT current_setting('server_version') AS version, pg_database_size(current_database()) AS bytes,
            (SELECT array_agg(coalesce(extract(epoch FROM s.replay_lag) * 1000, 0)::float8)
               FROM therev.standbys AS s) AS standbys,
            (SELECT count(*) FROM therev.outbox AS o WHERE o.delivered_at IS NULL) AS pending,
            (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(o.created_at)) * 1000, 0)::float8
               FROM therev.outbox AS o WHERE o.delivered_at IS NULL) AS oldest_ms",
);

static DIRECTORY: Unfenced = Unfenced::read("SELECT FROM therev.identity");

static DIRECTORY_COUNTS: Unfenced = Unfenced::read(
    "SELECT (SELECT count(*) FROM user_directory AS u WHERE NOT u.is_deleted) AS users,
            (SELECT count(*) FROM thread_directory AS t WHERE NOT t.is_deleted) AS threads",
);

// Without a receiver what was received is all replayed, however far behind that is: the replica does not say then. One that is
// fed by files never has one.
static REPLICA: Unfenced = Unfenced::read(
    "SELECT CASE WHEN pg_last_wal_receive_lsn() IS DISTINCT FROM pg_last_wal_replay_lsn()
                 THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000
                 WHEN EXISTS (SELECT FROM pg_stat_wal_receiver) THEN 0
            END::float8 AS lag_ms",
);

static CONTROL: Unfenced = Unfenced::read("SELECT FROM therev.identity");

impl Overview {
    /// Whether everything answers, and each shard has one primary.
    pub fn is_up(&self) -> bool {
        self.control == State::Up
            && self.directory.state == State::Up
            && self.shards.iter().all(|shard| shard.state == State::Up && shard.other_primaries.is_empty())
            && self.shards.iter().flat_map(|shard| &shard.standbys).all(|standby| standby.lag_ms.is_some())
            && self.directory.replicas.iter().all(|replica| replica.lag_ms.is_some())
    }
}

impl Community {
    /// Asks every database how it is.
    pub async fn overview(&self) -> Result<Overview> {
        let asked = self.shards().numbers().into_iter().map(|shard| async move {
            let answer = match self.shards().unfenced(shard, &SHARD, &[]).await {
                Ok(rows) => Ok((rows, self.shards().unfenced(shard, &COUNTS, &[]).await.unwrap_or_default())),
                Err(error) => Err(in_words(&error)),
            };
            (shard, answer, self.shards().other_primaries(shard).await)
        });
        let answers = join_all(asked).await;
        let rows: Vec<&Row> = answers.iter().flat_map(|(_, answer, _)| answer).flat_map(|(rows, _)| rows).collect();
        let pending = (!rows.is_empty()).then(|| rows.iter().map(|row| row.get::<_, i64>("pending")).sum());
        let oldest_ms = rows.iter().map(|row| row.get("oldest_ms")).reduce(f64::max);
        let control = self.shards().control(&CONTROL, &[]).await;
        let directory = self.directory_status().await;
        let status = |(shard, answer, others): &(ShardNo, Answer, Vec<String>)| ShardStatus {
            other_primaries: others.clone(),
            ..shard_status(*shard, answer, self.followers(*shard, &directory))
        };
        Ok(Overview {
            shards: answers.iter().map(status).collect(),
            directory,
            outbox: OutboxStatus { pending, oldest_ms },
            control: if control.is_ok() { State::Up } else { State::Down },
        })
    }

    /// How many servers should follow a shard's: the standbys that its address names after the first host. On the directory's
    /// server its replicas that follow come on top, or they would be taken for standbys.
    fn followers(&self, shard: ShardNo, directory: &DirectoryStatus) -> usize {
        let catalog = self.shards().catalog();
        let Some(entry) = catalog.shards.iter().find(|entry| entry.shard == shard) else { return 0 };
        let standbys = entry.at.hosts.split(',').count() - 1;
        if entry.at.hosts != catalog.directory.hosts {
            return standbys;
        }
        let is_extra = |hosts: &str| !entry.at.hosts.split(',').any(|host| host == hosts);
        let replicas = catalog.replicas.iter().zip(&directory.replicas);
        standbys + replicas.filter(|(at, replica)| replica.lag_ms.is_some() && is_extra(&at.hosts)).count()
    }

    async fn directory_status(&self) -> DirectoryStatus {
        let directory = self.shards().directory();
        let is_up = directory.writer(&DIRECTORY, &[]).await.is_ok();
        let counted = if is_up { directory.writer(&DIRECTORY_COUNTS, &[]).await.ok() } else { None };
        let row = counted.as_ref().and_then(|rows| rows.first());
        let mut replicas = Vec::new();
        for at in 0..directory.replica_count() {
            let rows = directory.replica(at, &REPLICA, &[]).await.ok();
            let lag_ms = rows.as_ref().and_then(|rows| rows.first()).and_then(|row| row.get("lag_ms"));
            replicas.push(Standby { lag_ms });
        }
        DirectoryStatus {
            state: if is_up { State::Up } else { State::Down },
            users: row.map(|row| row.get("users")),
            threads: row.map(|row| row.get("threads")),
            replicas,
        }
    }
}

/// An error and what caused it, in one line.
fn in_words(error: &shards::Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        words = format!("{words}: {inner}");
        cause = inner.source();
    }
    words
}

/// How a shard is, and its rows' counts if they came in time; or why it does not answer.
type Answer = std::result::Result<(Vec<Row>, Vec<Row>), String>;

fn shard_status(shard: ShardNo, answer: &Answer, followers: usize) -> ShardStatus {
    let (row, counts) = answer.as_ref().map_or((None, None), |(row, counts)| (row.first(), counts.first()));
    let count = |of: &str| counts.map(|row| row.get::<_, i64>(of));
    let lags: Vec<f64> = row.and_then(|row| row.get::<_, Option<_>>("standbys")).unwrap_or_default();
    let missing = if row.is_some() { followers.saturating_sub(lags.len()) } else { 0 };
    let missing = std::iter::repeat_n(Standby { lag_ms: None }, missing);
    ShardStatus {
        shard,
        state: if row.is_some() { State::Up } else { State::Down },
        reason: answer.as_ref().err().cloned(),
        version: row.map(|row| row.get::<_, &str>("version").split(' ').next().unwrap_or_default().to_owned()),
        users: count("users"),
        threads: count("threads"),
        posts: count("posts"),
        tasks: count("tasks"),
        bytes: row.map(|row| row.get("bytes")),
        standbys: lags.into_iter().map(|lag| Standby { lag_ms: Some(lag) }).chain(missing).collect(),
        other_primaries: Vec::new(),
    }
}
