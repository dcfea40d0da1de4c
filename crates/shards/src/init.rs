//! Makes a cluster out of empty databases: roles, schemas, identities, first ownership, catalog.
//!
//! Every step compares what should be with what is, so that a run which was cut off is run again.

use crate::address::{ADMIN_ROLE, Hosts, LIBRARY_ROLE, MOVER_ROLE, parse};
use crate::admin::connect;
use crate::error::{Database, Error};
use crate::life::Life;
use futures_util::future::try_join_all;
use placement::{Bucket, Group, Layout, ShardNo};
use schema::Kind;
use tokio_postgres::Client;
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

/// The oldest major version that therev runs on.
const OLDEST: u32 = 15;
/// What later versions can do besides, and since when.
const LATER: [(u32, &str); 1] =
    [(17, "That replication slots survive a promotion, so that what follows a server by one need not begin anew,")];

/// Why a server of this `server_version_num` is refused.
fn too_old(version: u32) -> Option<String> {
    let major = version / 10_000;
    (major < OLDEST).then(|| format!("it runs PostgreSQL {major}, version {OLDEST} or later is needed"))
}

struct Target {
    database: Database,
    kind: Kind,
    config: tokio_postgres::Config,
    at: Hosts,
}

impl Target {
    fn new(database: Database, kind: Kind, address: &str) -> Result<Target, Error> {
        let config = parse(address)?;
        let at = Hosts::of(&config)?;
        Ok(Target { database, kind, config, at })
    }

    fn shard(&self) -> Option<i16> {
        match self.database {
            Database::Shard(ShardNo(number)) => Some(number),
            _ => None,
        }
    }

    fn sql(&self, source: tokio_postgres::Error) -> Error {
        Error::Sql { database: self.database, source }
    }

    /// Connects as the schema's owner, by the plan's own login.
    async fn as_owner(&self) -> Result<Client, Error> {
        let mut config = self.config.clone();
        config.options(format!("-c role={ADMIN_ROLE}"));
        connect(self.database, &config).await
    }
}

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
    // Before anything is changed anywhere.
    let mut oldest_postgres = u32::MAX;
    for target in std::iter::once(&control).chain(&all) {
        oldest_postgres = oldest_postgres.min(inspect(target).await?);
    }
    // Roles belong to a server, and several databases may share one: one after the other.
    for target in std::iter::once(&control).chain(&all) {
        prepare(target, plan).await?;
        log_in(target, LIBRARY_ROLE, &plan.password).await?;
        log_in(target, ADMIN_ROLE, &plan.admin_password).await?;
        log_in(target, MOVER_ROLE, &plan.mover_password).await?;
    }
    let (cluster_id, _) = set_up(&control, None, plan).await?;
    let lives = try_join_all(all.iter().map(|target| set_up(target, Some(cluster_id), plan))).await?;
    let lives: Vec<Life> = lives.into_iter().map(|(_, life)| life).collect();
    fill_catalog(&control, &all, &lives, plan).await?;
    Ok(Initialized { cluster_id, oldest_postgres })
}

/// Refuses a server that is too old and a database that holds something else. Says the server's major version.
async fn inspect(target: &Target) -> Result<u32, Error> {
    let database = target.database;
    let client = connect(database, &target.config).await?;
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::integer AS version,
                    to_regclass('therev.schema_versions') IS NOT NULL AS is_ours,
                    (SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                      WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm')
                        AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = c.oid AND d.deptype = 'e')) AS tables",
            &[],
        )
        .await
        .map_err(|e| target.sql(e))?;
    let wrong = |reason: String| Err(Error::WrongDatabase { database, reason });
    let version = row.get::<_, i32>("version").unsigned_abs();
    if let Some(reason) = too_old(version) {
        return wrong(reason);
    }
    if !row.get::<_, bool>("is_ours") && row.get::<_, i64>("tables") > 0 {
        return wrong("it holds tables that are not therev's; init takes empty databases".into());
    }
    // An earlier init made it something: that it must be.
    let identity = client.query_opt("SELECT i.kind, i.shard FROM therev.identity AS i", &[]).await;
    if let Ok(Some(row)) = identity {
        let (kind, shard): (String, Option<i16>) = (row.get("kind"), row.get("shard"));
        if kind != target.kind.name() || shard != target.shard() {
            let number = shard.map_or(String::new(), |n| format!(" {n}"));
            return wrong(format!("it is the {kind}{number} database already"));
        }
    }
    Ok(version / 10_000)
}

/// Whether a role logs in with the password that this cluster will use.
async fn log_in(target: &Target, role: &str, password: &str) -> Result<(), Error> {
    let mut config = target.config.clone();
    config.user(role).password(password);
    match connect(target.database, &config).await {
        Ok(_) => Ok(()),
        Err(Error::Refused { .. }) => Err(Error::Config(format!(
            "role {role} is on the server of {} already, with another password: give the passfile that has it",
            target.database
        ))),
        Err(error) => Err(error),
    }
}

/// Roles, extensions and ownership of one database, by a role that may.
async fn prepare(target: &Target, plan: &InitPlan) -> Result<(), Error> {
    let client = connect(target.database, &target.config).await?;
    let setup = include_str!("roles.sql");
    // The names are constants; the passwords travel as parameters of set_config and are quoted by the server.
    client
        .query(
            "SELECT set_config('therev.password', $1, false), set_config('therev.admin_password', $2, false),
                    set_config('therev.mover_password', $3, false)",
            &[&plan.password, &plan.admin_password, &plan.mover_password],
        )
        .await
        .map_err(|e| target.sql(e))?;
    client.batch_execute(setup).await.map_err(|e| target.sql(e))
}

/// Schema, identity and, on a shard, the first ownership.
async fn set_up(target: &Target, cluster_id: Option<Uuid>, plan: &InitPlan) -> Result<(Uuid, Life), Error> {
    let database = target.database;
    let mut client = target.as_owner().await?;
    schema::apply(&mut client, target.kind).await.map_err(|source| Error::Schema { database, source })?;
    let number = target.shard();
    let wanted = cluster_id.unwrap_or_else(Uuid::new_v4);
    client
        .execute(
            "INSERT INTO therev.identity (cluster_id, kind, shard, layout) VALUES ($1, $2, $3, $4)
             ON CONFLICT DO NOTHING",
            &[&wanted, &target.kind.name(), &number, &plan.layout.name()],
        )
        .await
        .map_err(|e| target.sql(e))?;
    let row = client
        .query_one("SELECT cluster_id, kind, shard, layout, incarnation, incarnation_counter FROM therev.identity", &[])
        .await
        .map_err(|e| target.sql(e))?;
    let found: Uuid = row.get("cluster_id");
    let layout: &str = row.get("layout");
    if found_is_ours(cluster_id, found) && layout != plan.layout.name() {
        let reason = format!("its cluster has the {layout} layout, which cannot be changed");
        return Err(Error::WrongDatabase { database, reason });
    }
    let same = found_is_ours(cluster_id, found)
        && row.get::<_, &str>("kind") == target.kind.name()
        && row.get::<_, Option<i16>>("shard") == number;
    if !same {
        let reason = "it already is another database of a cluster; init takes empty ones".into();
        return Err(Error::WrongDatabase { database, reason });
    }
    if let Database::Shard(shard) = database {
        first_ownership(&client, shard, plan).await.map_err(|e| target.sql(e))?;
    }
    Ok((found, Life::of(&row)))
}

/// Whether a database's cluster is the one that is being made; the first one asked says which that is.
fn found_is_ours(cluster_id: Option<Uuid>, found: Uuid) -> bool {
    cluster_id.is_none_or(|id| id == found)
}

/// Marks every bucket of every group as owned here or moved to its first owner, unless the shard knows already.
async fn first_ownership(client: &Client, shard: ShardNo, plan: &InitPlan) -> Result<(), tokio_postgres::Error> {
    let (groups, buckets, owners) = first_places(plan);
    client
        .batch_execute(
            "INSERT INTO therev.fence (colocation_group, version_floor)
             SELECT g, i.incarnation_counter << 40
               FROM therev.identity AS i, unnest(enum_range(NULL::therev.colocation_group)) AS g
             ON CONFLICT DO NOTHING",
        )
        .await?;
    client
        .execute(
            "INSERT INTO therev.ownership (colocation_group, bucket, state, peer)
             SELECT p.colocation_group::therev.colocation_group, p.bucket,
                    CASE WHEN p.owner = $4 THEN 'owned' ELSE 'moved' END::therev.ownership_state,
                    nullif(p.owner, $4)
               FROM unnest($1::text[], $2::smallint[], $3::smallint[]) AS p (colocation_group, bucket, owner)
             ON CONFLICT DO NOTHING",
            &[&groups, &buckets, &owners, &shard.0],
        )
        .await?;
    Ok(())
}

fn first_places(plan: &InitPlan) -> (Vec<&'static str>, Vec<i16>, Vec<i16>) {
    let count = u16::try_from(plan.shards.len()).unwrap_or(u16::MAX);
    let mut columns = (Vec::new(), Vec::new(), Vec::new());
    for group in Group::ALL {
        for bucket in Bucket::all() {
            columns.0.push(group.name());
            columns.1.push(bucket.sql());
            columns.2.push(plan.layout.first_shard(group, bucket, count).0);
        }
    }
    columns
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
    let (groups, buckets, owners) = first_places(plan);
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
        assert_eq!(too_old(140_023).unwrap(), "it runs PostgreSQL 14, version 15 or later is needed");
        assert!(too_old(150_000).is_none() && too_old(180_006).is_none());
        let on = |oldest_postgres| Initialized { cluster_id: Uuid::nil(), oldest_postgres }.needs_later_postgres();
        let sentences = on(16);
        assert!(sentences.len() == 1 && sentences[0].ends_with("needs PostgreSQL 17, a server here runs 16."));
        assert!(on(17).is_empty());
    }
}
