//! Proofs about the databases themselves: versions, one owner per bucket, the placement.

use super::{BETWEEN_LOOKS, Check, Databases, LOOKS, OWNERS};
use schema::Kind;
use shards::{Database, Error};
use std::collections::BTreeMap;
use tokio_postgres::Client;
use uuid::Uuid;

pub(super) async fn checks(databases: &Databases) -> Result<Vec<Check>, Error> {
    Ok(vec![
        schema_versions(databases).await?,
        one_owner(databases).await?,
        fences(databases).await?,
        nothing_left(databases).await?,
    ])
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

/// At most and at least one shard owns each bucket of each group, and the control database names that one. The databases
/// are asked one after the other, and a bucket may change hands in between: what is wrong is looked at again.
async fn one_owner(databases: &Databases) -> Result<Check, Error> {
    let mut check = look_at_owners(databases).await?;
    for _ in 1..LOOKS {
        if check.wrong == 0 {
            break;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
        check = look_at_owners(databases).await?;
    }
    Ok(check)
}

async fn look_at_owners(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named(OWNERS);
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
    look_at_pins(databases, &owners, &mut check).await?;
    Ok(check)
}

/// What the shards say of one user who is placed apart.
#[derive(Default)]
struct Apart {
    bucket: i16,
    /// The shards that read the user's rows.
    here: Vec<i16>,
    /// Who points where.
    points: BTreeMap<i16, i16>,
    /// Where the control database says the user is.
    placed: Option<i16>,
}

/// A user placed apart is on one shard, the bucket's owner points there, and so does the control database.
async fn look_at_pins(
    databases: &Databases,
    owners: &BTreeMap<(String, i16), Vec<i16>>,
    check: &mut Check,
) -> Result<(), Error> {
    let mut users: BTreeMap<(String, Uuid), Apart> = BTreeMap::new();
    let pins = "SELECT p.colocation_group::text, p.user_id, p.bucket, p.state IN ('owned', 'draining') AS here, p.peer
                  FROM therev.pins AS p";
    for (database, client) in &databases.shards {
        let Database::Shard(number) = database else { continue };
        for row in client.query(pins, &[]).await.map_err(|source| Error::Sql { database: *database, source })? {
            let apart = users.entry((row.get(0), row.get(1))).or_default();
            apart.bucket = row.get("bucket");
            if row.get("here") {
                apart.here.push(number.0);
            }
            apart.points.extend(row.get::<_, Option<i16>>("peer").map(|peer| (number.0, peer)));
        }
    }
    let placed =
        databases.control.query("SELECT p.colocation_group, p.user_id, p.bucket, p.shard FROM therev.pins AS p", &[]);
    for row in placed.await.map_err(|source| Error::Sql { database: Database::Control, source })? {
        let apart = users.entry((row.get(0), row.get(1))).or_default();
        (apart.bucket, apart.placed) = (row.get(2), Some(row.get(3)));
    }
    for ((group, user), apart) in &users {
        check.checked += 1;
        let homes = owners.get(&(group.clone(), apart.bucket)).map_or(&[][..], Vec::as_slice);
        let ([here], [home]) = (apart.here.as_slice(), homes) else {
            check.wrong(format!("{group} user {user}, placed apart: on shards {:?}", apart.here));
            continue;
        };
        if here != home && apart.points.get(home) != Some(here) {
            check.wrong(format!("{group} user {user}, placed apart: on shard {here}, which shard {home} does not say"));
        }
        // Who is with the bucket again, or for as long as it is there, need not be placed anywhere.
        if here != home && apart.placed != Some(*here) {
            check.wrong(format!("{group} user {user}: apart on shard {here}, placed on shard {:?}", apart.placed));
        }
    }
    Ok(())
}

/// What statements test is what the shard says of its buckets and of users placed apart, and versions are those of its life.
async fn fences(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named("fence = ownership");
    for (database, client) in &databases.shards {
        for row in client.query(FENCES, &[]).await.map_err(|source| Error::Sql { database: *database, source })? {
            check.checked += 1;
            if row.get("wrong") {
                check.wrong(format!("{database}: {}", row.get::<_, &str>("key")));
            }
        }
    }
    Ok(check)
}

const FENCES: &str = "
    SELECT f.colocation_group::text AS key,
           (f.readable, f.writable) IS DISTINCT FROM (o.readable, o.writable)
           OR f.whole IS DISTINCT FROM therev.whole_of(o.readable, coalesce(p.pinned, '{}'), coalesce(p.readers, '{}'))
           OR (SELECT array_agg(u.id ORDER BY u.id) FROM unnest(f.pinned) AS u (id)) IS DISTINCT FROM p.pinned
           OR (SELECT array_agg(u.id ORDER BY u.id) FROM unnest(f.readers) AS u (id)) IS DISTINCT FROM p.readers
           OR (SELECT array_agg(u.id ORDER BY u.id) FROM unnest(f.writers) AS u (id)) IS DISTINCT FROM p.writers
           OR f.version_floor < i.incarnation_counter << 40 AS wrong
      FROM therev.identity AS i,
           therev.fence AS f
      JOIN (SELECT w.colocation_group,
                   string_agg((w.state IN ('owned', 'draining'))::integer::text, '' ORDER BY w.bucket)::bit(4096)
                       AS readable,
                   string_agg((w.state = 'owned')::integer::text, '' ORDER BY w.bucket)::bit(4096) AS writable
              FROM therev.ownership AS w
             GROUP BY w.colocation_group) AS o USING (colocation_group)
      LEFT JOIN (SELECT a.colocation_group, array_agg(a.user_id ORDER BY a.user_id) AS pinned,
                        array_agg(a.user_id ORDER BY a.user_id) FILTER (WHERE a.state IN ('owned', 'draining'))
                            AS readers,
                        array_agg(a.user_id ORDER BY a.user_id) FILTER (WHERE a.state = 'owned') AS writers
                   FROM therev.pins AS a
                  GROUP BY a.colocation_group) AS p USING (colocation_group)";

/// Slots, publications and subscriptions belong to a relocation that has its part on that shard. One that does not holds the
/// server's log for ever.
async fn nothing_left(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named("streams of relocations");
    for (database, client) in &databases.shards {
        let rows = client
            .query(
                "SELECT n.what || ' ' || n.name AS key,
                        NOT EXISTS (SELECT FROM therev.relocation_parts AS p
                                     WHERE starts_with(n.name, 'therev_' || p.tag)) AS wrong
                   FROM (SELECT 'slot' AS what, s.slot_name::text AS name FROM pg_replication_slots AS s
                          WHERE s.database = current_database() AND s.slot_name LIKE 'therev\\_%'
                         UNION ALL SELECT 'publication', pubname FROM pg_publication WHERE pubname LIKE 'therev\\_%'
                         UNION ALL SELECT 'subscription', s.subname
                                     FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                                    WHERE d.datname = current_database() AND s.subname LIKE 'therev\\_%') AS n",
                &[],
            )
            .await
            .map_err(|source| Error::Sql { database: *database, source })?;
        for row in rows {
            check.checked += 1;
            if row.get("wrong") {
                check.wrong(format!("{database}: {}", row.get::<_, &str>("key")));
            }
        }
    }
    Ok(check)
}
