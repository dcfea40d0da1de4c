//! What is done by a schedule: month partitions, materialized views, delivered events. Any number may run.

use crate::community::Community;
use crate::error::Result;
use futures_util::future::join_all;
use placement::ShardNo;
use serde::Serialize;
use shards::{Admin, Database, Error};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// What one round of maintenance did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Maintained {
    /// Month partitions made.
    pub partitions_made: i64,
    /// Materialized views refreshed.
    pub views_refreshed: u64,
    /// Events dropped that were delivered over an hour ago.
    pub events_dropped: u64,
    /// Sessions removed that had ended over a month ago.
    pub sessions_removed: u64,
    /// Shards that could not be served.
    pub shards_down: Vec<ShardNo>,
}

/// Sessions that ended long ago, some at a time, in the order of their keys: looked for without a lock that a switch waits for.
const ENDED_SESSIONS: &str = "
    SELECT s.bucket, s.user_id, s.session_id
      FROM user_sessions AS s
     WHERE (s.bucket, s.user_id, s.session_id) > ($1, $2, $3)
       AND CASE WHEN s.status IN ('active', 'suspended') THEN s.expires_at
                ELSE least(s.expires_at, s.updated_at) END < now() - interval '1 month'
     ORDER BY s.bucket, s.user_id, s.session_id
     LIMIT $4";

/// Those of them whose users' rows this shard writes just now. What has ended does not come back.
const REMOVE_SESSIONS: &str = "
    DELETE FROM user_sessions AS s
     USING therev.fence AS f, unnest($1::smallint[], $2::uuid[], $3::uuid[]) AS e (bucket, user_id, session_id)
     WHERE f.colocation_group = 'account' AND therev.may_write(f, e.bucket, e.user_id)
       AND s.bucket = e.bucket AND s.user_id = e.user_id AND s.session_id = e.session_id";
const REMOVED_AT_ONCE: i64 = 1_000;

const VIEWS: [&str; 2] = ["user_ai_summary", "ai_task_stats"];

impl Community {
    /// One round on every shard, side by side: partitions three months ahead, views, old events and sessions.
    pub async fn maintain_once(&self) -> Result<Maintained> {
        let admin = Admin::new(self.shards().config(), self.shards().catalog())?;
        let rounds = self.shards().numbers().into_iter().map(|shard| {
            let admin = &admin;
            async move { (shard, maintain_shard(admin, shard).await) }
        });
        let mut total = Maintained::default();
        for (shard, outcome) in join_all(rounds).await {
            match outcome {
                Ok(done) => {
                    total.partitions_made += done.partitions_made;
                    total.views_refreshed += done.views_refreshed;
                    total.events_dropped += done.events_dropped;
                    total.sessions_removed += done.sessions_removed;
                }
                Err(error) => {
                    tracing::warn!(%shard, %error, "a shard could not be maintained");
                    total.shards_down.push(shard);
                }
            }
        }
        Ok(total)
    }
}

async fn maintain_shard(admin: &Admin, shard: ShardNo) -> std::result::Result<Maintained, Error> {
    let database = Database::Shard(shard);
    let failed = |source| Error::Sql { database, source };
    let client = admin.connect(database).await?;
    let made: i32 = client.query_one("SELECT therev.make_partitions(3)", &[]).await.map_err(failed)?.get(0);
    let mut done = Maintained { partitions_made: made.into(), ..Maintained::default() };
    for view in VIEWS {
        // The names are the constants above. Readers go on with the old rows while the new ones are made.
        let refresh = format!("REFRESH MATERIALIZED VIEW CONCURRENTLY {view}");
        client.batch_execute(&refresh).await.map_err(failed)?;
        client
            .execute(
                "INSERT INTO therev.refreshes (view_name, refreshed_at) VALUES ($1, now())
                 ON CONFLICT (view_name) DO UPDATE SET refreshed_at = excluded.refreshed_at",
                &[&view],
            )
            .await
            .map_err(failed)?;
        done.views_refreshed += 1;
    }
    done.events_dropped = client
        .execute("DELETE FROM therev.outbox AS o WHERE o.delivered_at < now() - interval '1 hour'", &[])
        .await
        .map_err(failed)?;
    done.sessions_removed = remove_sessions(&client).await.map_err(failed)?;
    Ok(done)
}

/// Removes sessions that ended long ago; says how many. What is in the way of it just now, a switch or a deletion, waits for the next round.
async fn remove_sessions(client: &Client) -> std::result::Result<u64, tokio_postgres::Error> {
    let (mut removed, mut after) = (0, (-1_i16, Uuid::nil(), Uuid::nil()));
    loop {
        let ended = client.query(ENDED_SESSIONS, &[&after.0, &after.1, &after.2, &REMOVED_AT_ONCE]).await?;
        let keys: Vec<(i16, Uuid, Uuid)> = ended.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
        let Some(last) = keys.last() else { return Ok(removed) };
        after = *last;
        let (buckets, users, sessions) = keys.iter().copied().collect::<(Vec<i16>, Vec<Uuid>, Vec<Uuid>)>();
        match client.execute(REMOVE_SESSIONS, &[&buckets, &users, &sessions]).await {
            Err(error) if error.code().is_some_and(is_in_the_way) => {
                tracing::debug!(%error, "sessions that ended long ago are removed another time");
                return Ok(removed);
            }
            gone => removed += gone?,
        }
    }
}

/// Not owned any more, or somebody else was at the same rows.
fn is_in_the_way(code: &SqlState) -> bool {
    code.code() == "TR001" || code.code().starts_with("40")
}
