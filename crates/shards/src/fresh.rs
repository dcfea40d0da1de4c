//! An empty database becomes one of a cluster: roles, schema, identity, first ownership. Every step compares what should be
//! with what is, so that a run which was cut off is run again.

use crate::address::{ADMIN_ROLE, Hosts, LIBRARY_ROLE, MOVER_ROLE, parse};
use crate::admin::connect;
use crate::error::{Database, Error};
use crate::life::Life;
use placement::{Bucket, Group, Layout, Place, ShardNo};
use schema::Kind;
use tokio_postgres::Client;
use uuid::Uuid;

/// The passwords of therev's roles, the same on all servers.
pub struct RolePasswords {
    /// The library's role.
    pub library: String,
    /// The schema owner's role.
    pub admin: String,
    /// The mover's role: relocation works as it.
    pub mover: String,
}

/// The oldest major version that therev runs on.
const OLDEST: u32 = 15;

/// Why a server of this `server_version_num` is refused.
fn too_old(version: u32) -> Option<String> {
    let major = version / 10_000;
    (major < OLDEST).then(|| format!("it runs PostgreSQL {major}, version {OLDEST} or later is needed"))
}

/// Why a server cannot take part in relocations.
fn without_logical(wal_level: &str) -> Option<String> {
    (wal_level != "logical").then(|| {
        format!("wal_level of its server is {wal_level}: set it to logical and restart, or no rows can move there")
    })
}

/// A database, by an address whose role may create roles.
pub(crate) struct Target {
    pub(crate) database: Database,
    pub(crate) kind: Kind,
    config: tokio_postgres::Config,
    pub(crate) at: Hosts,
}

/// What a database is already, by an earlier run or by another cluster.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// The server's major version.
    pub(crate) major: u32,
    pub(crate) wal_level: String,
    pub(crate) identity: Option<Identity>,
}

/// Who a database says it is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) cluster_id: Uuid,
    pub(crate) kind: String,
    pub(crate) shard: Option<i16>,
}

impl Identity {
    /// `shard 2`, `control`.
    pub(crate) fn name(&self) -> String {
        self.shard.map_or_else(|| self.kind.clone(), |number| format!("{} {number}", self.kind))
    }
}

impl Found {
    /// Refuses a server through which no rows could move.
    pub(crate) fn can_relocate(&self, database: Database) -> Result<(), Error> {
        without_logical(&self.wal_level).map_or(Ok(()), |reason| Err(Error::WrongDatabase { database, reason }))
    }
}

/// Nobody finds the passwords in a log, as far as the role may say so.
const UNLOGGED: &str = "
    DO $$
    DECLARE
        one text[];
    BEGIN
        FOREACH one SLICE 1 IN ARRAY ARRAY[
            ['log_statement', 'none'], ['log_min_duration_statement', '-1'], ['log_min_duration_sample', '-1'],
            ['log_min_error_statement', 'panic'], ['log_parameter_max_length', '0']]
        LOOP
            BEGIN
                PERFORM set_config(one[1], one[2], false);
            EXCEPTION WHEN insufficient_privilege THEN
                NULL;
            END;
        END LOOP;
    END $$";

impl Target {
    pub(crate) fn new(database: Database, kind: Kind, address: &str) -> Result<Target, Error> {
        let config = parse(address)?;
        let at = Hosts::of(&config)?;
        Ok(Target { database, kind, config, at })
    }

    pub(crate) fn shard(&self) -> Option<i16> {
        match self.database {
            Database::Shard(ShardNo(number)) => Some(number),
            _ => None,
        }
    }

    pub(crate) fn sql(&self, source: tokio_postgres::Error) -> Error {
        Error::Sql { database: self.database, source }
    }

    /// Connects as the schema's owner, by the plan's own login.
    pub(crate) async fn as_owner(&self) -> Result<Client, Error> {
        let mut config = self.config.clone();
        config.options(format!("-c role={ADMIN_ROLE}"));
        connect(self.database, &config, None).await
    }

    /// Refuses a server that is too old and a database that holds something else. Changes nothing.
    pub(crate) async fn inspect(&self) -> Result<Found, Error> {
        let database = self.database;
        let client = connect(database, &self.config, None).await?;
        let row = client
            .query_one(
                "SELECT current_setting('server_version_num')::integer AS version, current_setting('wal_level') AS wal_level,
                        to_regclass('therev.schema_versions') IS NOT NULL AS is_ours,
                        (SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                          WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
                            AND c.relkind IN ('r', 'p', 'v', 'm')
                            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = c.oid AND d.deptype = 'e'))
                            AS tables",
                &[],
            )
            .await
            .map_err(|e| self.sql(e))?;
        let wrong = |reason: String| Err(Error::WrongDatabase { database, reason });
        let version = row.get::<_, i32>("version").unsigned_abs();
        if let Some(reason) = too_old(version) {
            return wrong(reason);
        }
        if !row.get::<_, bool>("is_ours") && row.get::<_, i64>("tables") > 0 {
            return wrong("it holds tables that are not therev's; an empty database is needed".into());
        }
        // A schema that is not whole yet has none.
        let identity = client.query_opt("SELECT i.cluster_id, i.kind, i.shard FROM therev.identity AS i", &[]).await;
        let identity = identity.ok().flatten().map(|row| Identity {
            cluster_id: row.get("cluster_id"),
            kind: row.get("kind"),
            shard: row.get("shard"),
        });
        Ok(Found { major: version / 10_000, wal_level: row.get("wal_level"), identity })
    }

    /// Roles, extensions and the database's owner, by a role that may; and that therev's roles log in.
    pub(crate) async fn prepare(&self, passwords: &RolePasswords) -> Result<(), Error> {
        let RolePasswords { library, admin, mover } = passwords;
        let client = connect(self.database, &self.config, None).await?;
        client.batch_execute(UNLOGGED).await.map_err(|e| self.sql(e))?;
        // The names are constants; the passwords travel as parameters of set_config and are quoted by the server.
        client
            .query(
                "SELECT set_config('therev.password', $1, false), set_config('therev.admin_password', $2, false),
                        set_config('therev.mover_password', $3, false)",
                &[library, admin, mover],
            )
            .await
            .map_err(|e| self.sql(e))?;
        client.batch_execute(include_str!("roles.sql")).await.map_err(|e| self.sql(e))?;
        fail::fail_point!("fresh.roles_made");
        self.log_in(LIBRARY_ROLE, library).await?;
        self.log_in(ADMIN_ROLE, admin).await?;
        self.log_in(MOVER_ROLE, mover).await
    }

    /// Whether a role logs in with the password that this cluster will use.
    async fn log_in(&self, role: &str, password: &str) -> Result<(), Error> {
        let mut config = self.config.clone();
        config.user(role).password(password);
        match connect(self.database, &config, None).await {
            Ok(_) => Ok(()),
            Err(Error::Refused { .. }) => Err(Error::Config(format!(
                "role {role} is on the server of {} already, with another password: give the passfile that has it",
                self.database
            ))),
            Err(error) => Err(error),
        }
    }

    /// Schema and identity: of a cluster, or of a new one. Says which it is, and the life that the server lives.
    pub(crate) async fn identify(
        &self,
        client: &mut Client,
        cluster_id: Option<Uuid>,
        layout: Layout,
    ) -> Result<(Uuid, Life), Error> {
        let database = self.database;
        schema::apply(client, self.kind).await.map_err(|source| Error::Schema { database, source })?;
        fail::fail_point!("fresh.schema_applied");
        let number = self.shard();
        let wanted = cluster_id.unwrap_or_else(Uuid::new_v4);
        client
            .execute(
                "INSERT INTO therev.identity (cluster_id, kind, shard, layout) VALUES ($1, $2, $3, $4)
                 ON CONFLICT DO NOTHING",
                &[&wanted, &self.kind.name(), &number, &layout.name()],
            )
            .await
            .map_err(|e| self.sql(e))?;
        let row = client
            .query_one(
                "SELECT cluster_id, kind, shard, layout, incarnation, incarnation_counter FROM therev.identity",
                &[],
            )
            .await
            .map_err(|e| self.sql(e))?;
        let found: Uuid = row.get("cluster_id");
        let is_ours = cluster_id.is_none_or(|id| id == found);
        let has: &str = row.get("layout");
        if is_ours && has != layout.name() {
            let reason = format!("its cluster has the {has} layout, which cannot be changed");
            return Err(Error::WrongDatabase { database, reason });
        }
        let same =
            is_ours && row.get::<_, &str>("kind") == self.kind.name() && row.get::<_, Option<i16>>("shard") == number;
        if !same {
            let reason = "it already is another database of a cluster; an empty one is needed".into();
            return Err(Error::WrongDatabase { database, reason });
        }
        Ok((found, Life::of(&row)))
    }
}

/// Marks every bucket of every group as owned here or moved to its owner, unless the shard knows already.
pub(crate) async fn first_ownership(
    client: &Client,
    shard: ShardNo,
    places: impl Iterator<Item = ((Group, Bucket), Place)>,
) -> Result<(), tokio_postgres::Error> {
    let (mut groups, mut buckets, mut owners, mut epochs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ((group, bucket), place) in places {
        groups.push(group.name());
        buckets.push(bucket.sql());
        owners.push(place.shard.0);
        epochs.push(place.epoch);
    }
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
            "INSERT INTO therev.ownership (colocation_group, bucket, state, peer, epoch)
             SELECT p.colocation_group::therev.colocation_group, p.bucket,
                    CASE WHEN p.owner = $5 THEN 'owned' ELSE 'moved' END::therev.ownership_state,
                    nullif(p.owner, $5), p.epoch
               FROM unnest($1::text[], $2::smallint[], $3::smallint[], $4::bigint[])
                    AS p (colocation_group, bucket, owner, epoch)
             ON CONFLICT DO NOTHING",
            &[&groups, &buckets, &owners, &epochs, &shard.0],
        )
        .await?;
    // Without statistics a switch would go through all rows of a group, and a page of many take the fence for many rows.
    client.batch_execute("ANALYZE therev.ownership, therev.fence").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_a_server_lacks() {
        assert_eq!(too_old(140_023).unwrap(), "it runs PostgreSQL 14, version 15 or later is needed");
        assert!(too_old(150_000).is_none() && too_old(180_006).is_none());
        assert!(without_logical("replica").unwrap().starts_with("wal_level of its server is replica"));
        assert!(without_logical("logical").is_none());
    }
}
