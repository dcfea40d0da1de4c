//! The placement: what the shards own counts, and a control database that was put back to an older state learns it again. So does a
//! shard that owns the bucket of a user who is placed apart, where a promotion has taken back what it knew of that.

use crate::check::Databases;
use crate::error::Result;
use placement::ShardNo;
use shards::{Database, Error};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

const OWNED: &str = "
    SELECT array_agg(o.colocation_group::text) AS groups, array_agg(o.bucket) AS buckets, array_agg(o.epoch) AS epochs
      FROM therev.ownership AS o
     WHERE o.state IN ('owned', 'draining')";

/// Users whom a shard has apart from their buckets.
const PINS: &str = "
    SELECT p.colocation_group::text, p.user_id, p.bucket, p.epoch
      FROM therev.pins AS p
     WHERE p.state IN ('owned', 'draining')";

/// Where the control database says that users are who are placed apart.
const PLACED: &str = "SELECT p.colocation_group, p.user_id, p.shard, p.epoch FROM therev.pins AS p";

/// A group of a user's rows, on which shard it is, and since which epoch.
type Apart = (String, Uuid, i16, i64);

/// Records what each shard owns, where its epoch is the higher one. Says how much was news to somebody.
pub(super) async fn record(databases: &Databases) -> Result<u64> {
    let mut news = 0;
    let mut homes: BTreeMap<(String, i16), ShardNo> = BTreeMap::new();
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
        homes.extend(groups.into_iter().zip(buckets).map(|owned| (owned, *shard)));
    }
    Ok(news + record_pins(databases, &homes).await?)
}

/// Records who is placed apart, by the word of the shards that have them: in the control database, and on the shards that own
/// their buckets.
async fn record_pins(databases: &Databases, homes: &BTreeMap<(String, i16), ShardNo>) -> Result<u64> {
    // Asked before the shards: what is recorded meanwhile is none of what is forgotten.
    let placed = databases.control.query(PLACED, &[]).await.map_err(by_control)?;
    let placed: BTreeSet<Apart> = placed.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect();
    let mut pins: Vec<(Apart, i16)> = Vec::new();
    for (database, client) in &databases.shards {
        let Database::Shard(shard) = database else { continue };
        let here = client.query(PINS, &[]).await.map_err(|source| Error::Sql { database: *database, source })?;
        pins.extend(here.iter().map(|row| ((row.get(0), row.get(1), shard.0, row.get(3)), row.get(2))));
    }
    let here: BTreeSet<&Apart> = pins.iter().map(|(apart, _)| apart).collect();
    // First these: a row with a higher epoch, of a pin of before, would stay.
    let was_asked = |shard: i16| databases.shards.iter().any(|(asked, _)| *asked == Database::Shard(ShardNo(shard)));
    let gone: Vec<&Apart> = placed.iter().filter(|apart| !here.contains(apart) && was_asked(apart.2)).collect();
    let mut news = forget(databases, &gone).await?;
    for (apart, bucket) in &pins {
        let (group, user, shard, epoch) = apart;
        let home = homes.get(&(group.clone(), *bucket)).copied();
        // Who is with the bucket again need not be placed anywhere.
        if home == Some(ShardNo(*shard)) {
            continue;
        }
        if !placed.contains(apart) {
            let record = "SELECT therev.record_pin($1, $2, $3, $4, $5)";
            let (groups, epochs) = ([group.as_str()], [*epoch]);
            let params: [&(dyn ToSql + Sync); 5] = [&groups.as_slice(), user, bucket, shard, &epochs.as_slice()];
            databases.control.query(record, &params).await.map_err(by_control)?;
            news += 1;
        }
        if let Some(home) = home {
            news += teach(databases, home, apart).await?;
        }
    }
    Ok(news)
}

/// Takes out of the control database what no shard says.
async fn forget(databases: &Databases, gone: &[&Apart]) -> Result<u64> {
    if gone.is_empty() {
        return Ok(0);
    }
    let groups: Vec<&str> = gone.iter().map(|apart| apart.0.as_str()).collect();
    let users: Vec<Uuid> = gone.iter().map(|apart| apart.1).collect();
    let owners: Vec<i16> = gone.iter().map(|apart| apart.2).collect();
    let epochs: Vec<i64> = gone.iter().map(|apart| apart.3).collect();
    let forget = "SELECT therev.forget_pins($1, $2, $3, $4)";
    let forgotten = databases.control.query_one(forget, &[&groups, &users, &owners, &epochs]).await;
    Ok(u64::try_from(forgotten.map_err(by_control)?.get::<_, i64>(0)).unwrap_or(0))
}

/// Tells the shard that owns a user's bucket where the user is, should it point elsewhere by an older epoch.
async fn teach(databases: &Databases, home: ShardNo, apart: &Apart) -> Result<u64> {
    let (group, user, shard, epoch) = apart;
    let known = databases.shards.iter().find(|(database, _)| *database == Database::Shard(home));
    let Some((database, client)) = known else { return Ok(0) };
    let (groups, epochs) = ([group.as_str()], [*epoch]);
    let params: [&(dyn ToSql + Sync); 4] = [&groups.as_slice(), user, shard, &epochs.as_slice()];
    let learned = client.query_one("SELECT therev.learn_pin($1, $2, $3, $4)", &params).await;
    let learned = learned.map_err(|source| Error::Sql { database: *database, source })?;
    Ok(u64::try_from(learned.get::<_, i64>(0)).unwrap_or(0))
}

fn by_control(source: tokio_postgres::Error) -> Error {
    Error::Sql { database: Database::Control, source }
}
