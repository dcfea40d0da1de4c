//! Makes a cluster out of empty databases: roles, schemas, identities, first ownership, catalog.
//!
//! Every step compares what should be with what is, so that a run which was cut off is run again.

use crate::address::{ADMIN_ROLE, Hosts, LIBRARY_ROLE, MOVER_ROLE, parse};
use crate::error::{Database, Error};
use crate::fresh::{Found, RolePasswords, Target, first_ownership};
use crate::life::Life;
use crate::owners;
use futures_util::future::try_join_all;
use placement::{Bucket, Group, Layout, Place, ShardNo};
use schema::Kind;
use uuid::Uuid;

/// What `init` is told: addresses with a role that may create roles (a superuser), and the passwords to set.
pub struct InitPlan {
    /// The control database.
    pub control: String,
    /// The directory's writer.
    pub directory: String,
    /// The directory's replicas.
    pub replicas: Vec<String>,
    /// The shards, in the order of their numbers.
    pub shards: Vec<String>,
    /// How the groups lie on them.
    pub layout: Layout,
    /// The password of the library's role on all servers.
    pub password: String,
    /// The password of the schema owner's role on all servers.
    pub admin_password: String,
    /// The password of the mover's role on all servers: relocation works as it.
    pub mover_password: String,
}

/// What `init` made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initialized {
    /// Which cluster it is.
    pub cluster_id: Uuid,
    /// The major version of the oldest PostgreSQL in it.
    pub oldest_postgres: u32,
}

impl Initialized {
    /// What the oldest server cannot do and a later PostgreSQL can, a sentence each.
    pub fn needs_later_postgres(&self) -> Vec<String> {
        let lacking = LATER.iter().filter(|(since, _)| self.oldest_postgres < *since);
        lacking
            .map(|(since, what)| {
                format!("{what} needs PostgreSQL {since}, a server here runs {}.", self.oldest_postgres)
            })
            .collect()
    }
}

/// What later versions can do besides, and since when.
const LATER: [(u32, &str); 1] = [(16, "That the role which moves rows is no superuser")];

/// Makes the cluster, or finishes what an earlier run began.
pub async fn init(plan: &InitPlan) -> Result<Initialized, Error> {
    let least = if plan.layout == Layout::Split { 2 } else { 1 };
    if plan.shards.len() < least || plan.shards.len() > 256 {
        return Err(Error::Config(format!("the {} layout takes {least} to 256 shards", plan.layout.name())));
    }
    let control = Target::new(Database::Control, Kind::Control, &plan.control)?;
    let mut all = vec![Target::new(Database::Directory, Kind::Directory, &plan.directory)?];
    for (number, address) in (0..).zip(&plan.shards) {
        all.push(Target::new(Database::Shard(ShardNo(number)), Kind::Shard, address)?);
    }
    for (at, target) in all.iter().enumerate() {
        if target.at == control.at || all[..at].iter().any(|other| other.at == target.at) {
            return Err(Error::Config(format!("{} is named twice, each database has one use", target.at)));
        }
    }
    let passwords = RolePasswords {
        library: plan.password.clone(),
        admin: plan.admin_password.clone(),
        mover: plan.mover_password.clone(),
    };
    // Before anything is changed anywhere.
    let mut oldest_postgres = u32::MAX;
    for target in std::iter::once(&control).chain(&all) {
        let found = target.inspect().await?;
        is_what_it_was(target, &found)?;
        oldest_postgres = oldest_postgres.min(found.major);
    }
    // Roles belong to a server, and several databases may share one: one after the other.
    for target in std::iter::once(&control).chain(&all) {
        target.prepare(&passwords).await?;
    }
    let (cluster_id, _) = set_up(&control, None, plan).await?;
    if has_these_shards(&control, plan).await? {
        try_join_all(all.iter().map(|target| is_as_planned(target, plan))).await?;
    }
    let lives = try_join_all(all.iter().map(|target| set_up(target, Some(cluster_id), plan))).await?;
    let lives: Vec<Life> = lives.into_iter().map(|(_, life)| life).collect();
    fill_catalog(&control, &all, &lives, plan).await?;
    Ok(Initialized { cluster_id, oldest_postgres })
}

/// An earlier init made it something: that it must be.
fn is_what_it_was(target: &Target, found: &Found) -> Result<(), Error> {
    match &found.identity {
        Some(it) if it.kind != target.kind.name() || it.shard != target.shard() => Err(Error::WrongDatabase {
            database: target.database,
            reason: format!("it is the {} database already", it.name()),
        }),
        _ => Ok(()),
    }
}

/// A cluster that is there already gets no more shards: first ownership is given out once. Fewer are readdressed. Says whether there is
/// none yet.
async fn has_these_shards(control: &Target, plan: &InitPlan) -> Result<bool, Error> {
    let client = control.as_owner().await?;
    let row = client.query_one("SELECT count(*) FROM therev.shards", &[]).await.map_err(|e| control.sql(e))?;
    let (has, asked) = (row.get::<_, i64>(0), plan.shards.len());
    if usize::try_from(has).is_ok_and(|has| has == 0 || asked <= has) {
        return Ok(has == 0);
    }
    Err(Error::in_the_way(
        format!("the cluster has {has} shards, not {asked}"),
        "`therev shard add` makes a database one of its shards, `therev shard remove` the reverse",
    ))
}

/// Schema, identity and, on a shard, the first ownership.
async fn set_up(target: &Target, cluster_id: Option<Uuid>, plan: &InitPlan) -> Result<(Uuid, Life), Error> {
    let mut client = target.as_owner().await?;
    let made = target.identify(&mut client, cluster_id, plan.layout).await?;
    if let Database::Shard(shard) = target.database {
        first_ownership(&client, shard, first_places(plan)).await.map_err(|e| target.sql(e))?;
    }
    Ok(made)
}

/// An earlier run that was cut off may have given the buckets out among another number of shards: two would own some of them.
async fn is_as_planned(target: &Target, plan: &InitPlan) -> Result<(), Error> {
    let Database::Shard(_) = target.database else { return Ok(()) };
    let client = target.as_owner().await?;
    let is_begun = client.query_one("SELECT to_regclass('therev.ownership') IS NOT NULL", &[]).await;
    if !is_begun.map_err(|e| target.sql(e))?.get::<_, bool>(0) {
        return Ok(());
    }
    let knows = owners::known_to(&client, target.database).await?;
    if knows.is_empty() || knows.into_iter().eq(first_places(plan)) {
        return Ok(());
    }
    Err(Error::in_the_way(
        format!("an init that was cut off has begun {} of a cluster with another number of shards", target.database),
        "run it again with that number, or begin with empty databases",
    ))
}

/// Where everything is before anything was moved.
fn first_places(plan: &InitPlan) -> impl Iterator<Item = ((Group, Bucket), Place)> {
    let (layout, count) = (plan.layout, u16::try_from(plan.shards.len()).unwrap_or(u16::MAX));
    let place = move |group, bucket| Place { shard: layout.first_shard(group, bucket, count), epoch: 1 };
    Group::ALL
        .into_iter()
        .flat_map(move |group| Bucket::all().map(move |bucket| ((group, bucket), place(group, bucket))))
}

/// Hosts and placement, last: with them the cluster exists. Hosts are brought up to date, places never.
async fn fill_catalog(control: &Target, all: &[Target], lives: &[Life], plan: &InitPlan) -> Result<(), Error> {
    let sql = |e| control.sql(e);
    let mut client = control.as_owner().await?;
    let transaction = client.transaction().await.map_err(sql)?;
    for (target, life) in all.iter().zip(lives) {
        // Never brought up to date: which life counts, a promoted server has to ask.
        transaction
            .execute(
                "INSERT INTO therev.incarnations (database, incarnation, incarnation_counter) VALUES ($1, $2, $3)
                 ON CONFLICT DO NOTHING",
                &[&target.database.to_string(), &life.incarnation, &life.counter],
            )
            .await
            .map_err(sql)?;
        if let Database::Shard(ShardNo(number)) = target.database {
            transaction
                .execute(
                    "INSERT INTO therev.shards (shard, hosts, database) VALUES ($1, $2, $3)
                     ON CONFLICT (shard) DO UPDATE SET hosts = excluded.hosts, database = excluded.database",
                    &[&number, &target.at.hosts, &target.at.database],
                )
                .await
                .map_err(sql)?;
        }
    }
    let mut directories = vec![Hosts::of(&parse(&plan.directory)?)?];
    for address in &plan.replicas {
        directories.push(Hosts::of(&parse(address)?)?);
    }
    transaction.execute("DELETE FROM therev.directories", &[]).await.map_err(sql)?;
    for (number, at) in (0_i16..).zip(directories) {
        transaction
            .execute(
                "INSERT INTO therev.directories (directory, is_writer, hosts, database) VALUES ($1, $2, $3, $4)",
                &[&number, &(number == 0), &at.hosts, &at.database],
            )
            .await
            .map_err(sql)?;
    }
    let (mut groups, mut buckets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for ((group, bucket), place) in first_places(plan) {
        groups.push(group.name());
        buckets.push(bucket.sql());
        owners.push(place.shard.0);
    }
    transaction
        .execute(
            "INSERT INTO therev.placement (colocation_group, bucket, shard)
             SELECT * FROM unnest($1::text[], $2::smallint[], $3::smallint[])
             ON CONFLICT DO NOTHING",
            &[&groups, &buckets, &owners],
        )
        .await
        .map_err(sql)?;
    transaction
        .execute(
            "INSERT INTO therev.operator_log (actor, action, target, after)
             SELECT session_user, 'init', 'cluster ' || i.cluster_id,
                    jsonb_build_object('shards', $1::bigint, 'layout', i.layout)
               FROM therev.identity AS i",
            &[&i64::try_from(plan.shards.len()).unwrap_or(i64::MAX)],
        )
        .await
        .map_err(sql)?;
    transaction.commit().await.map_err(sql)
}

/// The roles that `init` makes, for the passfile.
pub(crate) const LOGIN_ROLES: [&str; 3] = [LIBRARY_ROLE, ADMIN_ROLE, MOVER_ROLE];

impl InitPlan {
    /// The lines of a passfile for these roles on any server.
    pub fn passfile(&self) -> String {
        let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
        let passwords = [&self.password, &self.admin_password, &self.mover_password];
        let line = |(role, password): (&str, &String)| format!("*:*:*:{role}:{}\n", escape(password));
        LOGIN_ROLES.into_iter().zip(passwords).map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_versions_are_needed() {
        let on = |oldest_postgres| Initialized { cluster_id: Uuid::nil(), oldest_postgres }.needs_later_postgres();
        let sentences = on(15);
        assert!(sentences.len() == 1 && sentences[0].ends_with("needs PostgreSQL 16, a server here runs 15."));
        assert!(on(16).is_empty());
    }
}
