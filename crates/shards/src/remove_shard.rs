//! A shard that owns nothing leaves the cluster. Its database stays as it is, and goes on pointing the way to nodes that have
//! not heard of it yet.

use crate::add_shard::{at_control, lock, no_such_shard};
use crate::admin::Admin;
use crate::error::{Database, Error};
use crate::fresh::Target;
use crate::owners::{self, Columns, Highest};
use crate::store::Shards;
use futures_util::future::try_join_all;
use placement::ShardNo;
use schema::Kind;
use std::time::Duration;
use tokio_postgres::{Client, GenericClient, Transaction};

/// A shard that was removed.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Removed {
    /// Its number.
    pub shard: ShardNo,
    /// How long ago rows last left it; nodes that have not read the placement since may still ask it. `None`: it never had
    /// any.
    #[serde(skip)]
    pub empty_for: Option<Duration>,
}

/// What keeps a shard in its cluster, by its own word.
const HOLDS: &str = "
    SELECT (SELECT count(DISTINCT o.bucket) FROM therev.ownership AS o WHERE o.state <> 'moved') AS buckets,
           (SELECT count(DISTINCT p.user_id) FROM therev.pins AS p) AS users,
           (SELECT count(*) FROM therev.relocation_parts) AS parts";

/// Removes a shard that owns nothing, after every other one was told who owns what. Refuses, and says why, otherwise.
pub async fn remove_shard(shards: &Shards, shard: ShardNo) -> Result<Removed, Error> {
    shards.inner.refresh().await?;
    if !shards.numbers().contains(&shard) {
        return Err(no_such_shard(shard));
    }
    let admin = Admin::new(shards.config(), shards.catalog())?;
    let mut control = lock(&admin).await?;
    let leaving = admin.connect(Database::Shard(shard)).await?;
    is_empty(&leaving, shard).await?;
    point_past(shards, &admin, &control, shard).await?;
    fail::fail_point!("remove_shard.pointed_past");
    let transaction = control.transaction().await.map_err(at_control)?;
    let empty_for = forget(&transaction, shard).await?;
    // Once more: nothing can begin to move there from here on, but it may have while others were told.
    is_empty(&leaving, shard).await?;
    transaction.commit().await.map_err(at_control)?;
    shards.inner.refresh().await?;
    Ok(Removed { shard, empty_for })
}

/// No shard is added while this lives: what becomes of the server of one that was removed befalls no shard.
pub struct Gone {
    _lock: Client,
}

/// Makes sure that a shard is not of the cluster, and does not become so.
pub async fn stay_gone(shards: &Shards, shard: ShardNo) -> Result<Gone, Error> {
    let lock = lock(&Admin::new(shards.config(), shards.catalog())?).await?;
    shards.inner.refresh().await?;
    if shards.numbers().contains(&shard) {
        return Err(Error::in_the_way(
            format!("shard {shard} was added again meanwhile; its server stays"),
            "`therev shard list` lists the shards",
        ));
    }
    Ok(Gone { _lock: lock })
}

/// Refuses where a database that should be a shard's which was removed is another cluster's, or has what nobody else has.
pub async fn is_left_over(shards: &Shards, shard: ShardNo, address: &str) -> Result<(), Error> {
    let target = Target::new(Database::Shard(shard), Kind::Shard, address)?;
    match target.inspect().await?.identity {
        None => Ok(()),
        Some(it) if it.cluster_id == shards.catalog().cluster_id => {
            owns_nothing(&target.as_owner().await?, shard).await
        }
        Some(it) => Err(Error::in_the_way(
            format!("{} is {} of another cluster, not this one's shard {shard}", target.at, it.name()),
            "`therev status` says which cluster this is",
        )),
    }
}

/// Says what would be removed, and changes nothing; what stands in the way is the error.
pub async fn look_at_leaving(shards: &Shards, shard: ShardNo) -> Result<Removed, Error> {
    shards.inner.refresh().await?;
    if !shards.numbers().contains(&shard) {
        return Err(no_such_shard(shard));
    }
    let admin = Admin::new(shards.config(), shards.catalog())?;
    // What it has to tell others is told when it is removed.
    owns_nothing(&admin.connect(Database::Shard(shard)).await?, shard).await?;
    let empty_for = unconcerned(&admin.connect(Database::Control).await?, shard).await?;
    Ok(Removed { shard, empty_for })
}

async fn is_empty(leaving: &Client, shard: ShardNo) -> Result<(), Error> {
    owns_nothing(leaving, shard).await?;
    let events = "SELECT count(*) FROM therev.outbox AS o WHERE o.delivered_at IS NULL";
    let events = leaving.query_one(events, &[]).await;
    let events: i64 = events.map_err(|source| Error::of_statement(Database::Shard(shard), false, source))?.get(0);
    if events > 0 {
        return Err(Error::in_the_way(
            format!("shard {shard} has {events} events to deliver"),
            "`therev relay --once` delivers them",
        ));
    }
    Ok(())
}

async fn owns_nothing(leaving: &Client, shard: ShardNo) -> Result<(), Error> {
    let row = leaving.query_one(HOLDS, &[]).await;
    let row = row.map_err(|source| Error::of_statement(Database::Shard(shard), false, source))?;
    let (buckets, parts): (i64, i64) = (row.get("buckets"), row.get("parts"));
    if parts > 0 {
        return Err(Error::in_the_way(
            format!("shard {shard} takes part in {parts} relocations"),
            "`therev relocation list` lists them; wait until they are done",
        ));
    }
    if buckets > 0 {
        return Err(Error::in_the_way(
            format!("shard {shard} owns {buckets} buckets"),
            format!("`therev shard drain {shard}` moves them to the others"),
        ));
    }
    let users: i64 = row.get("users");
    if users > 0 {
        return Err(Error::in_the_way(
            format!("shard {shard} has {users} users who are placed apart from their buckets"),
            format!("`therev shard drain {shard}` moves them back to these"),
        ));
    }
    let tables = with_rows(leaving).await;
    match tables.map_err(|source| Error::of_statement(Database::Shard(shard), false, source))?.as_slice() {
        [] => Ok(()),
        tables => Err(Error::in_the_way(
            format!("shard {shard} owns no bucket and still holds rows, in {}", tables.join(", ")),
            "`therev check` names them",
        )),
    }
}

/// The owned tables that hold anything.
async fn with_rows(leaving: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut tables = Vec::new();
    for table in leaving.query("SELECT table_name FROM therev.owned_tables ORDER BY table_name", &[]).await? {
        let name: String = table.get(0);
        if leaving.query_one(&format!("SELECT EXISTS (SELECT FROM {name})"), &[]).await?.get(0) {
            tables.push(name);
        }
    }
    Ok(tables)
}

/// Tells the control database and every other shard who owns what, until none of them points to the shard that leaves.
async fn point_past(shards: &Shards, admin: &Admin, control: &Client, leaving: ShardNo) -> Result<(), Error> {
    let others: Vec<(ShardNo, Client)> = try_join_all(
        shards
            .numbers()
            .into_iter()
            .filter(|other| *other != leaving)
            .map(|other| async move { Ok::<_, Error>((other, admin.connect(Database::Shard(other)).await?)) }),
    )
    .await?;
    let known = try_join_all(others.iter().map(|(other, client)| owners::known_to(client, Database::Shard(*other))));
    let Columns { groups, buckets, owners, epochs } = Highest::of(known.await?.into_iter().flatten()).columns();
    for (other, client) in &others {
        let sql = |source| Error::of_statement(Database::Shard(*other), true, source);
        let learn = "SELECT therev.learn_owners($1, $2, $3, $4)";
        client.query(learn, &[&groups, &buckets, &owners, &epochs]).await.map_err(sql)?;
        let left = "SELECT count(*) FROM therev.ownership WHERE peer = $1";
        let left: i64 = client.query_one(left, &[&leaving.0]).await.map_err(sql)?.get(0);
        if left > 0 {
            return Err(Error::in_the_way(
                format!("shard {other} points to shard {leaving} for {left} buckets that nobody else is known to own"),
                "`therev check` says what is wrong",
            ));
        }
    }
    let record = "
        SELECT sum(therev.record_placement(ARRAY[k.colocation_group], ARRAY[k.bucket], k.owner, ARRAY[k.epoch]))
          FROM unnest($1::text[], $2::smallint[], $3::smallint[], $4::bigint[])
               AS k (colocation_group, bucket, owner, epoch)
          JOIN therev.placement AS p USING (colocation_group, bucket)
         WHERE p.epoch < k.epoch";
    control.query(record, &[&groups, &buckets, &owners, &epochs]).await.map(drop).map_err(at_control)
}

/// That no relocation under way is from or to a shard. Says how long ago rows last left it.
async fn unconcerned(control: &(impl GenericClient + Sync), shard: ShardNo) -> Result<Option<Duration>, Error> {
    let row = control
        .query_one(
            "SELECT count(*) FILTER (WHERE r.ended_at IS NULL) AS open,
                    extract(epoch FROM now() - max(r.ended_at) FILTER (WHERE r.source = $1))::float8 AS empty_for
               FROM therev.relocations AS r
              WHERE $1 IN (r.source, r.target)",
            &[&shard.0],
        )
        .await
        .map_err(at_control)?;
    if row.get::<_, i64>("open") > 0 {
        return Err(Error::in_the_way(
            format!("a relocation from or to shard {shard} is under way"),
            "`therev relocation list` lists it; wait until it is done",
        ));
    }
    let empty_for: Option<f64> = row.get("empty_for");
    Ok(empty_for.map(|seconds| Duration::from_secs_f64(seconds.max(0.0))))
}

/// Takes it out of the control database. Says how long ago rows last left it.
async fn forget(control: &Transaction<'_>, shard: ShardNo) -> Result<Option<Duration>, Error> {
    // Who begins a relocation now waits, and finds the shard gone.
    control.batch_execute("LOCK TABLE therev.relocations IN SHARE ROW EXCLUSIVE MODE").await.map_err(at_control)?;
    let empty_for = unconcerned(control, shard).await?;
    let name = Database::Shard(shard).to_string();
    // It has said that nobody is apart there: what still says so is old.
    let forget = "
        SELECT therev.forget_pins(array_agg(p.colocation_group), array_agg(p.user_id), array_agg(p.shard), array_agg(p.epoch))
          FROM therev.pins AS p WHERE p.shard = $1";
    control.query(forget, &[&shard.0]).await.map_err(at_control)?;
    control.execute("DELETE FROM therev.shards WHERE shard = $1", &[&shard.0]).await.map_err(at_control)?;
    control.execute("DELETE FROM therev.incarnations WHERE database = $1", &[&name]).await.map_err(at_control)?;
    Ok(empty_for)
}
