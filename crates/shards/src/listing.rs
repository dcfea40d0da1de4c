//! The shards at a glance: where they are, how much they should hold, what they own.

use crate::address::Hosts;
use crate::error::Error;
use crate::statement::Unfenced;
use crate::store::Shards;
use futures_util::future::join_all;
use placement::ShardNo;
use serde::Serialize;

/// One shard. What it owns is absent while it is down.
#[derive(Debug, Clone, Serialize)]
pub struct ShardListing {
    /// Its number.
    pub shard: ShardNo,
    /// How much it should hold beside the others; 0: it is being drained.
    pub weight: f32,
    /// Where it is.
    pub at: Hosts,
    /// Buckets of accounts that it owns.
    pub account_buckets: Option<i64>,
    /// Buckets of content that it owns.
    pub content_buckets: Option<i64>,
    /// The database on disk.
    pub bytes: Option<i64>,
    /// Why it does not answer.
    pub reason: Option<String>,
}

static OWNS: Unfenced = Unfenced::read(
    "SELECT count(*) FILTER (WHERE o.colocation_group = 'account') AS account,
            count(*) FILTER (WHERE o.colocation_group = 'content') AS content,
            pg_database_size(current_database()) AS bytes
       FROM therev.ownership AS o
      WHERE o.state IN ('owned', 'draining')",
);

impl Shards {
    /// All shards, by the control database's word where they are and by their own what they own.
    pub async fn listing(&self) -> Result<Vec<ShardListing>, Error> {
        self.refresh().await?;
        let catalog = self.catalog();
        let asked = catalog.shards.iter().map(|entry| async move {
            let answer = self.unfenced(entry.shard, &OWNS, &[]).await;
            let row = answer.as_ref().ok().and_then(|rows| rows.first());
            ShardListing {
                shard: entry.shard,
                weight: entry.weight,
                at: entry.at.clone(),
                account_buckets: row.map(|row| row.get("account")),
                content_buckets: row.map(|row| row.get("content")),
                bytes: row.map(|row| row.get("bytes")),
                reason: answer.err().map(|error| error.to_string()),
            }
        });
        Ok(join_all(asked).await)
    }
}
