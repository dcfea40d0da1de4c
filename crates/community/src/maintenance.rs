//! What is done by a schedule: month partitions, materialized views, delivered events. Any number may run.

use crate::community::Community;
use crate::error::Result;
use futures_util::future::join_all;
use placement::ShardNo;
use serde::Serialize;
use shards::{Admin, Database, Error};

/// What one round of maintenance did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Maintained {
    /// Month partitions made.
    pub partitions_made: i64,
    /// Materialized views refreshed.
    pub views_refreshed: u64,
    /// Events dropped that were delivered over an hour ago.
    pub events_dropped: u64,
    /// Shards that could not be served.
    pub shards_down: Vec<ShardNo>,
}

const VIEWS: [&str; 2] = ["user_ai_summary", "ai_task_stats"];

impl Community {
    /// One round on every shard, side by side: partitions three months ahead, views, old events.
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
    Ok(done)
}
