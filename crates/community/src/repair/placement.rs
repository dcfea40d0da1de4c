//! The placement: what the shards own counts, and a control database that was put back to an older state learns it again.

use crate::check::Databases;
use crate::error::Result;
use shards::{Database, Error};
use uuid::Uuid;

const OWNED: &str = "
    SELECT array_agg(o.colocation_group::text) AS groups, array_agg(o.bucket) AS buckets, array_agg(o.epoch) AS epochs
      FROM therev.ownership AS o
     WHERE o.state IN ('owned', 'draining')";

/// Users whom a shard has apart from their buckets.
const PINS: &str = "
    SELECT p.user_id, p.bucket, array_agg(p.colocation_group::text) AS groups, array_agg(p.epoch) AS epochs
      FROM therev.pins AS p
     WHERE p.state IN ('owned', 'draining')
     GROUP BY p.user_id, p.bucket";

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
    record_pins(databases).await?;
    Ok(news)
}

/// Records who is placed apart, by the shards' word.
async fn record_pins(databases: &Databases) -> Result<()> {
    let control = |source| Error::Sql { database: Database::Control, source };
    let (mut groups_there, mut users_there) = (Vec::new(), Vec::new());
    for (database, client) in &databases.shards {
        let Database::Shard(shard) = database else { continue };
        let pins = client.query(PINS, &[]).await.map_err(|source| Error::Sql { database: *database, source })?;
        for pin in &pins {
            let (user, bucket): (Uuid, i16) = (pin.get("user_id"), pin.get("bucket"));
            let (groups, epochs): (Vec<String>, Vec<i64>) = (pin.get("groups"), pin.get("epochs"));
            let record = "SELECT therev.record_pin($1, $2, $3, $4, $5)";
            databases.control.query(record, &[&groups, &user, &bucket, &shard.0, &epochs]).await.map_err(control)?;
            users_there.extend(groups.iter().map(|_| user));
            groups_there.extend(groups);
        }
    }
    let forget = "SELECT therev.forget_pins_but($1, $2)";
    databases.control.query(forget, &[&groups_there, &users_there]).await.map_err(control)?;
    Ok(())
}
