//! Proofs about the databases themselves: versions, one owner per bucket, the placement.

use super::{Check, Databases};
use schema::Kind;
use shards::{Database, Error};
use std::collections::BTreeMap;
use tokio_postgres::Client;

pub(super) async fn checks(databases: &Databases) -> Result<Vec<Check>, Error> {
    Ok(vec![schema_versions(databases).await?, one_owner(databases).await?])
}

async fn schema_versions(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named("schema versions");
    let mut all: Vec<(Database, Kind, &Client)> = vec![
        (Database::Control, Kind::Control, &databases.control),
        (Database::Directory, Kind::Directory, &databases.directory),
    ];
    all.extend(databases.shards.iter().map(|(database, client)| (*database, Kind::Shard, client)));
    for (database, kind, client) in all {
        check.checked += 1;
        let found = schema::version(client).await.map_err(|source| Error::Schema { database, source })?;
        if found != kind.newest_version() {
            check.wrong(format!("{database} is at version {found} of {}", kind.newest_version()));
        }
    }
    Ok(check)
}

/// At most and at least one shard owns each bucket of each group, and the control database names that one.
async fn one_owner(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named("one owner per bucket");
    let mut owners: BTreeMap<(String, i16), Vec<i16>> = BTreeMap::new();
    for (database, client) in &databases.shards {
        let Database::Shard(number) = database else { continue };
        let rows = client
            .query(
                "SELECT o.colocation_group::text, o.bucket FROM therev.ownership AS o
                  WHERE o.state IN ('owned', 'draining')",
                &[],
            )
            .await
            .map_err(|source| Error::Sql { database: *database, source })?;
        for row in rows {
            owners.entry((row.get(0), row.get(1))).or_default().push(number.0);
        }
    }
    let placed = databases
        .control
        .query("SELECT p.colocation_group, p.bucket, p.shard FROM therev.placement AS p ORDER BY 1, 2", &[])
        .await
        .map_err(|source| Error::Sql { database: Database::Control, source })?;
    for row in placed {
        check.checked += 1;
        let (group, bucket, shard): (String, i16, i16) = (row.get(0), row.get(1), row.get(2));
        match owners.get(&(group.clone(), bucket)).map(Vec::as_slice) {
            Some([owner]) if *owner == shard => {}
            Some([owner]) => {
                check.wrong(format!("{group} bucket {bucket}: owned by shard {owner}, placed on shard {shard}"));
            }
            Some(several) => check.wrong(format!("{group} bucket {bucket}: owned by shards {several:?}")),
            None => check.wrong(format!("{group} bucket {bucket}: owned by nobody")),
        }
    }
    Ok(check)
}
