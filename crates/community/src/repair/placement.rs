//! The placement: what the shards own counts, and a control database that was put back to an older state learns it again.

use crate::check::Databases;
use crate::error::Result;
use shards::{Database, Error};

const OWNED: &str = "
    SELECT array_agg(o.colocation_group::text) AS groups, array_agg(o.bucket) AS buckets, array_agg(o.epoch) AS epochs
      FROM therev.ownership AS o
     WHERE o.state IN ('owned', 'draining')";

/// Records what each shard owns, where its epoch is the higher one. Says how many places were news.
pub(super) async fn record(databases: &Databases) -> Result<u64> {
    let mut news = 0;
    for (database, client) in &databases.shards {
        let Database::Shard(shard) = database else { continue };
        let row = client.query_one(OWNED, &[]).await.map_err(|source| Error::Sql { database: *database, source })?;
        let Some(groups) = row.get::<_, Option<Vec<String>>>("groups") else { continue };
        let (buckets, epochs): (Vec<i16>, Vec<i64>) = (row.get("buckets"), row.get("epochs"));
        let recorded = databases
            .control
            .query_one("SELECT therev.record_placement($1, $2, $3, $4)", &[&groups, &buckets, &shard.0, &epochs])
            .await
            .map_err(|source| Error::Sql { database: Database::Control, source })?;
        news += u64::try_from(recorded.get::<_, i64>(0)).unwrap_or(0);
    }
    Ok(news)
}
