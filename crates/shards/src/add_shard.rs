//! An empty database becomes one more shard of a cluster that runs. It owns nothing at first, and points everybody to
//! whoever does; rows come to it by relocations.
//!
//! The cluster hears of it by the last step alone, the row in the control database: up to there nothing else was touched,
//! and a run that was cut off is run again.

use crate::address::Hosts;
use crate::admin::Admin;
use crate::error::{Database, Error};
use crate::fresh::{RolePasswords, Target, first_ownership};
use crate::life::Life;
use crate::owners::{self, Columns, Highest};
use crate::store::Shards;
use futures_util::future::try_join_all;
use placement::ShardNo;
use schema::Kind;
use tokio_postgres::Client;
use uuid::Uuid;

/// A database that is to be a shard.
pub struct AddPlan {
    /// Its address, with a role that may create roles.
    pub address: String,
    /// How much it should hold beside the others.
    pub weight: f32,
    /// The passwords that therev's roles have on the other servers.
    pub passwords: RolePasswords,
}

/// A shard that was added.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Added {
    /// Its number.
    pub shard: ShardNo,
    /// Where it is.
    pub at: Hosts,
    /// How much it should hold beside the others.
    pub weight: f32,
}

/// Above it a weight is a slip of the hand.
const WEIGHT_MAX: f32 = 1_000.0;
/// There are no more numbers than this.
const SHARDS_MAX: usize = 256;

/// Which number a database would get, and whether it can: changes nothing.
pub async fn look_at_shard(shards: &Shards, plan: &AddPlan) -> Result<Added, Error> {
    shards.inner.refresh().await?;
    let admin = Admin::new(shards.config(), shards.catalog())?;
    known(&admin, shards).await?;
    let target = find_place(shards, plan).await?;
    Ok(Added { shard: number(&target), at: target.at, weight: plan.weight })
}

/// Makes an empty database a shard, or finishes what an earlier run began.
pub async fn add_shard(shards: &Shards, plan: &AddPlan) -> Result<Added, Error> {
    check_weight(plan.weight)?;
    shards.inner.refresh().await?;
    let admin = Admin::new(shards.config(), shards.catalog())?;
    let _changing = lock(&admin).await?;
    let highest = known(&admin, shards).await?;
    let target = find_place(shards, plan).await?;
    let shard = number(&target);
    let catalog = shards.catalog();
    target.prepare(&plan.passwords).await?;
    let mut client = target.as_owner().await?;
    let (_, life) = target.identify(&mut client, Some(catalog.cluster_id), catalog.layout).await?;
    fail::fail_point!("add_shard.identified");
    point_the_way(&client, &target, &highest).await?;
    fail::fail_point!("add_shard.points");
    list(&admin, &target, life, plan.weight).await?;
    shards.inner.refresh().await?;
    Ok(Added { shard, at: target.at, weight: plan.weight })
}

/// Changes how much a shard should hold beside the others. Nothing moves by it.
pub async fn set_weight(shards: &Shards, shard: ShardNo, weight: f32) -> Result<(), Error> {
    if weight != 0.0 {
        check_weight(weight)?;
    }
    shards.inner.refresh().await?;
    let catalog = shards.catalog();
    if !catalog.shards.iter().any(|entry| entry.shard == shard) {
        return Err(no_such_shard(shard));
    }
    if weight == 0.0 && !catalog.shards.iter().any(|entry| entry.shard != shard && entry.weight > 0.0) {
        return Err(Error::in_the_way(
            format!("shard {shard} is the only one with a weight: there is nowhere to put its rows"),
            "add a shard first, or give another one a weight",
        ));
    }
    let mut control = Admin::new(shards.config(), catalog)?.connect(Database::Control).await?;
    let set = async {
        let transaction = control.transaction().await?;
        // A relocation that is just being written down is there afterwards; a later one sees the weight.
        transaction.batch_execute("LOCK TABLE therev.relocations IN SHARE ROW EXCLUSIVE MODE").await?;
        transaction.execute("UPDATE therev.shards SET weight = $2 WHERE shard = $1", &[&shard.0, &weight]).await?;
        transaction.commit().await
    };
    set.await.map_err(at_control)?;
    shards.inner.refresh().await
}

pub(crate) fn no_such_shard(shard: ShardNo) -> Error {
    Error::in_the_way(format!("there is no shard {shard}"), "`therev shard list` lists them")
}

pub(crate) fn at_control(source: tokio_postgres::Error) -> Error {
    Error::of_statement(Database::Control, true, source)
}

fn check_weight(weight: f32) -> Result<(), Error> {
    if (0.001..=WEIGHT_MAX).contains(&weight) {
        return Ok(());
    }
    Err(Error::in_the_way(
        format!("{weight} is no weight: it goes from 0.001 to {WEIGHT_MAX}"),
        "1 is what every shard has at first",
    ))
}

/// One process at a time adds or removes shards; the right goes with the connection.
pub(crate) async fn lock(admin: &Admin) -> Result<Client, Error> {
    let control = admin.connect(Database::Control).await?;
    let taken = "SELECT pg_try_advisory_lock(hashtext('therev.shards'))";
    if control.query_one(taken, &[]).await.map_err(at_control)?.get(0) {
        return Ok(control);
    }
    Err(Error::in_the_way("another process adds or removes a shard now", "run this again when it is done"))
}

/// Who owns what by the word of all shards, all of which must be at this program's version.
async fn known(admin: &Admin, shards: &Shards) -> Result<Highest, Error> {
    let newest = Kind::Shard.newest_version();
    let known = try_join_all(shards.numbers().into_iter().map(|shard| async move {
        let database = Database::Shard(shard);
        let client = admin.connect(database).await?;
        let version = schema::version(&client).await.map_err(|source| Error::Schema { database, source })?;
        if version != newest {
            return Err(Error::in_the_way(
                format!("the schema of shard {shard} is at version {version}, the new one would be at {newest}"),
                "run `therev schema apply` first, by the same program",
            ));
        }
        owners::known_to(&client, database).await
    }))
    .await?;
    Ok(Highest::of(known.into_iter().flatten()))
}

/// The number that a database has of an earlier run, or the next one; an error if it is anything else than empty.
async fn find_place(shards: &Shards, plan: &AddPlan) -> Result<Target, Error> {
    let catalog = shards.catalog();
    let is_free = |number: i16| !catalog.shards.iter().any(|entry| entry.shard.0 == number);
    if catalog.shards.len() >= SHARDS_MAX {
        return Err(Error::in_the_way(format!("a cluster has {SHARDS_MAX} shards at the most"), "remove one first"));
    }
    let next = (0..i16::MAX).find(|number| is_free(*number)).unwrap_or(i16::MAX);
    let new = |number| Target::new(Database::Shard(ShardNo(number)), Kind::Shard, &plan.address);
    let target = new(next)?;
    if let Some(entry) = catalog.shards.iter().find(|entry| entry.at == target.at) {
        return Err(Error::in_the_way(
            format!("{} is shard {} of this cluster already", target.at, entry.shard),
            "name another database; an empty one is needed",
        ));
    }
    let found = target.inspect().await?;
    found.can_relocate(target.database)?;
    let Some(identity) = found.identity else { return Ok(target) };
    let wrong = |reason| Err(Error::WrongDatabase { database: target.database, reason });
    match identity.shard {
        _ if identity.cluster_id != catalog.cluster_id => {
            wrong(format!("it is the {} database of another cluster; an empty one is needed", identity.name()))
        }
        Some(number) if is_free(number) => new(number),
        Some(number) => wrong(format!(
            "it was made shard {number} of this cluster once, which is another database by now; drop it and make it anew"
        )),
        None => wrong(format!("it is the {} database already; an empty one is needed", identity.name())),
    }
}

fn number(target: &Target) -> ShardNo {
    ShardNo(target.shard().unwrap_or_default())
}

/// Every bucket is another shard's, and since when.
async fn point_the_way(client: &Client, target: &Target, highest: &Highest) -> Result<(), Error> {
    first_ownership(client, number(target), highest.places()).await.map_err(|e| target.sql(e))?;
    // What an earlier run wrote may be behind by now.
    let Columns { groups, buckets, owners, epochs } = highest.columns();
    let learn = "SELECT therev.learn_owners($1, $2, $3, $4)";
    client.query(learn, &[&groups, &buckets, &owners, &epochs]).await.map_err(|e| target.sql(e))?;
    let odd = "SELECT count(*) FROM therev.ownership WHERE state <> 'moved'";
    if client.query_one(odd, &[]).await.map_err(|e| target.sql(e))?.get::<_, i64>(0) == 0 {
        return Ok(());
    }
    let reason = "it owns buckets, though the cluster does not know it; drop it and make it anew".into();
    Err(Error::WrongDatabase { database: target.database, reason })
}

/// With this the shard exists.
async fn list(admin: &Admin, target: &Target, life: Life, weight: f32) -> Result<(), Error> {
    let mut control = admin.connect(Database::Control).await?;
    let transaction = control.transaction().await.map_err(at_control)?;
    let (name, incarnation): (_, &Uuid) = (target.database.to_string(), &life.incarnation);
    transaction
        .execute(
            "INSERT INTO therev.incarnations (database, incarnation, incarnation_counter) VALUES ($1, $2, $3)",
            &[&name, incarnation, &life.counter],
        )
        .await
        .map_err(at_control)?;
    transaction
        .execute(
            "INSERT INTO therev.shards (shard, hosts, database, weight) VALUES ($1, $2, $3, $4)",
            &[&number(target).0, &target.at.hosts, &target.at.database, &weight],
        )
        .await
        .map_err(at_control)?;
    fail::fail_point!("add_shard.before_commit");
    transaction.commit().await.map_err(at_control)
}
