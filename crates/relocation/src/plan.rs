//! What a relocation would do, and what stands in its way: asked before anything is changed.

use crate::copy::count_rows;
use crate::error::{Error, Result};
use crate::record::{Apart, whose};
use crate::side::{Side, Which};
use placement::{Bucket, Group, ShardNo, UserId};
use serde::Serialize;
use shards::Admin;

/// What to move.
#[derive(Debug, Clone)]
pub struct Request {
    /// Which colocation groups.
    pub groups: Vec<Group>,
    /// Which buckets, all of one shard.
    pub buckets: Vec<Bucket>,
    /// Of one bucket this user alone, to be placed apart or to go back to it.
    pub pin: Option<UserId>,
    /// From where.
    pub source: ShardNo,
    /// Where to.
    pub target: ShardNo,
}

/// What moving it takes.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The colocation groups.
    pub groups: Vec<Group>,
    /// The buckets.
    pub buckets: Vec<Bucket>,
    /// Of its one bucket this user alone.
    pub pin: Option<UserId>,
    /// From where.
    pub source: ShardNo,
    /// Where to.
    pub target: ShardNo,
    /// How many rows go.
    pub rows: i64,
    /// How many bytes they take, indexes included: their share of their tables.
    pub bytes: i64,
    /// How much log the source writes in a minute now, all of which is kept until the other side has read it.
    pub log_bytes_per_minute: i64,
    /// How much log that comes to by the end of the copy: the source's disk needs room for it.
    pub log_bytes_held: i64,
    /// How long the copy takes, roughly, in seconds.
    pub seconds: f64,
    /// The highest number that a part on one of the two shards has: a control database that was put back may give it again.
    #[serde(skip)]
    pub(crate) last_part: i64,
    /// What stands in the way, with what to do about it; empty: nothing.
    pub obstacles: Vec<Obstacle>,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// What it is.
    pub reason: String,
    /// What to do about it.
    pub next: String,
}

/// A copy with indexes writes about so much in a second, and a removal takes no longer.
const BYTES_PER_SECOND: f64 = 20e6;

/// How much is written to find out whether a disk has room, at the least and at the most; one page holds one row of it.
const PROBE_BYTES: (i64, i64) = (16 << 20, 64 << 20);
const PAGE_BYTES: i64 = 8192;

/// The tablespaces in which these groups' rows lie, and where the mover may make a table.
const PLACES: &str = "
    SELECT DISTINCT quote_ident(s.spcname)
      FROM therev.relations_of($1) AS r
      JOIN pg_class AS c ON c.oid = r.relation
      JOIN pg_database AS d ON d.datname = current_database()
      JOIN pg_tablespace AS s ON s.oid = coalesce(nullif(c.reltablespace, 0), d.dattablespace)
     WHERE r.holds_rows AND (s.oid = d.dattablespace OR has_tablespace_privilege(s.oid, 'CREATE'))";

/// What a server has to offer.
const ROOM: &str = "
    SELECT current_setting('wal_level') AS wal_level,
           current_setting('server_version_num')::integer AS version,
           current_setting('max_replication_slots')::bigint
               - (SELECT count(*) FROM pg_replication_slots) AS slots,
           current_setting('max_wal_senders')::bigint - (SELECT count(*) FROM pg_stat_replication) AS senders,
           current_setting('max_logical_replication_workers')::bigint
               - (SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL) AS workers,
           (SELECT max(v.version) FROM therev.schema_versions AS v) AS schema_version,
           (SELECT i.cluster_id::text FROM therev.identity AS i) AS cluster_id,
           coalesce((SELECT max(s.bytes_behind) FROM therev.standbys AS s), 0)::bigint AS behind";

/// The tables of these groups, how large they are and how many rows they hold by PostgreSQL's estimate.
const HELD: &str = "
    SELECT array_agg(r.relation::text ORDER BY r.relation) AS names,
           array_agg(r.colocation_group ORDER BY r.relation) AS groups,
           array_agg(r.owner_column ORDER BY r.relation) AS owners, sum(pg_total_relation_size(r.relation))::bigint AS bytes,
           sum(greatest(c.reltuples, 0))::float8 AS rows
      FROM therev.relations_of($1) AS r JOIN pg_class AS c ON c.oid = r.relation
     WHERE r.holds_rows";

/// Buckets that this shard does not own (whose user it does not have), or that are in a relocation.
const NOT_READY: &str = "
    SELECT (SELECT array_agg(DISTINCT o.bucket ORDER BY o.bucket)
              FROM therev.ownership AS o
              LEFT JOIN therev.pins AS p ON p.colocation_group = o.colocation_group AND p.user_id = $3
             WHERE o.colocation_group::text = ANY ($1) AND o.bucket = ANY ($2) AND coalesce(p.state, o.state) <> 'owned')
               AS elsewhere,
           therev.buckets_under_way(0, $1, $2) AS under_way";

impl Plan {
    /// The refusal that the first obstacle means, if there is one.
    pub fn refusal(&self) -> Option<Error> {
        self.obstacles.first().map(|obstacle| Error::refused(&obstacle.reason, &obstacle.next))
    }
}

/// How many rows of what is meant a side has in the tables that it says it has, and how many bytes they take.
pub(crate) async fn held(
    side: &Side,
    groups: &[&str],
    pin: Option<UserId>,
    apart: &[Apart],
    buckets: &[i16],
) -> Result<(i64, i64)> {
    let held = side.one(HELD, &[&groups]).await?;
    let texts = |name| held.get::<_, Option<Vec<String>>>(name).unwrap_or_default();
    let (tables, of, owners) = (texts("names"), texts("groups"), texts("owners"));
    let meant: Vec<String> = of.iter().zip(&owners).map(|(group, owner)| whose(pin, apart, group, owner)).collect();
    let parts: Vec<(&str, &str)> = tables.iter().map(String::as_str).zip(meant.iter().map(String::as_str)).collect();
    let rows = count_rows(side, &parts, buckets).await?;
    let (all_bytes, all_rows) = (held.get::<_, Option<i64>>("bytes").unwrap_or(0), held.get::<_, Option<f64>>("rows"));
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "an estimate")]
    let bytes = (all_bytes as f64 * (rows as f64 / all_rows.unwrap_or(0.0).max(rows as f64).max(1.0))) as i64;
    Ok((rows, bytes))
}

/// How long it takes to write so much, or to remove it.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
pub(crate) fn seconds_for(bytes: i64) -> f64 {
    bytes as f64 / BYTES_PER_SECOND
}

/// Asks both servers.
pub(crate) async fn make(request: &Request, admin: &Admin) -> Result<Plan> {
    let (source, target) = futures_util::future::try_join(
        Side::connect(admin, Which::Source, request.source),
        Side::connect(admin, Which::Target, request.target),
    )
    .await?;
    let groups: Vec<&str> = request.groups.iter().map(|group| group.name()).collect();
    let buckets: Vec<i16> = request.buckets.iter().map(|bucket| bucket.sql()).collect();
    let apart = source.apart(&groups, &buckets).await?;
    let (rows, bytes) = held(&source, &groups, request.pin, &apart, &buckets).await?;
    let mut obstacles = room(&source, &target).await?;
    obstacles.extend(ownership(&source, &target, &groups, &buckets, request).await?);
    if obstacles.is_empty() {
        // By its own tables: it may have other months.
        let (stray, _) = held(&target, &groups, request.pin, &apart, &buckets).await?;
        if stray > 0 {
            obstacles.push(Obstacle {
                reason: format!("shard {} holds {stray} rows of these buckets already", request.target),
                next: "`therev check` names them; an earlier relocation may be finishing".into(),
            });
        }
    }
    if let Err(error) = write_probe(&target, &groups, bytes).await {
        obstacles.push(Obstacle {
            reason: format!("shard {} takes no writes: {}", request.target, crate::mover::chain(&error)),
            next: "see to its disk and its log".into(),
        });
    }
    let last = "SELECT coalesce(max(p.relocation), 0) FROM therev.relocation_parts AS p";
    let last_part = source.one(last, &[]).await?.get::<_, i64>(0).max(target.one(last, &[]).await?.get(0));
    let seconds = seconds_for(bytes);
    let log_bytes_per_minute = log_rate(&source).await?;
    Ok(Plan {
        groups: request.groups.clone(),
        buckets: request.buckets.clone(),
        pin: request.pin,
        source: request.source,
        target: request.target,
        rows,
        bytes,
        log_bytes_per_minute,
        log_bytes_held: log_held(log_bytes_per_minute, seconds),
        seconds,
        last_part,
        obstacles,
    })
}

/// A disk says what it has left only to who writes: as much as comes, within limits, is written where the tables are, into one
/// that never comes to be. Temporary, since backups leave such files out: of an unlogged table one may catch a file without the
/// other that says what it is, and a standby made from it does not start.
async fn write_probe(target: &Side, groups: &[&str], bytes: i64) -> Result<()> {
    let tried = async {
        target.batch("BEGIN; INSERT INTO therev.sentinels (relocation, side) VALUES (0, 'source')").await?;
        let pages = bytes.clamp(PROBE_BYTES.0, PROBE_BYTES.1) / PAGE_BYTES;
        for (at, place) in target.query(PLACES, &[&groups]).await?.iter().enumerate() {
            let place: &str = place.get(0);
            let write = format!(
                "CREATE TEMPORARY TABLE probe_{at} (filler text) TABLESPACE {place};
                 ALTER TABLE probe_{at} ALTER filler SET STORAGE PLAIN;
                 INSERT INTO probe_{at} SELECT repeat(' ', 8000) FROM generate_series(1, {pages})"
            );
            target.batch(&write).await?;
        }
        Ok(())
    };
    let tried = tried.await;
    let undone = target.batch("ROLLBACK").await;
    tried.and(undone)
}

/// How much log a server writes in a minute, by a short look.
async fn log_rate(side: &Side) -> Result<i64> {
    let at = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint";
    let before: i64 = side.one(at, &[]).await?.get(0);
    let look = std::time::Duration::from_millis(200);
    tokio::time::sleep(look).await;
    let after: i64 = side.one(at, &[]).await?.get(0);
    Ok((after - before) * 300)
}

/// How much log is kept for a stream that is read only after so long.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "an estimate")]
fn log_held(bytes_per_minute: i64, seconds: f64) -> i64 {
    (bytes_per_minute as f64 * seconds / 60.0) as i64
}

/// Whether both servers can carry streams.
async fn room(source: &Side, target: &Side) -> Result<Vec<Obstacle>> {
    let mut obstacles = Vec::new();
    let mut obstacle = |reason: String, next: &str| obstacles.push(Obstacle { reason, next: next.to_owned() });
    let rows = [source.one(ROOM, &[]).await?, target.one(ROOM, &[]).await?];
    for (side, row) in [source, target].into_iter().zip(&rows) {
        let shard = side.shard;
        if row.get::<_, &str>("wal_level") != "logical" {
            obstacle(
                format!("wal_level of shard {shard}'s server is {}, not logical", row.get::<_, &str>("wal_level")),
                "set wal_level = logical there, then restart it",
            );
        }
        // One slot each, and one at the target for a moment more; one worker each.
        for (name, setting) in [
            ("slots", "max_replication_slots"),
            ("senders", "max_wal_senders"),
            ("workers", "max_logical_replication_workers"),
        ] {
            if row.get::<_, i64>(name) < 2 {
                obstacle(
                    format!("shard {shard}'s server has no room for a stream ({setting})"),
                    "raise it there and restart, or wait until another relocation is done",
                );
            }
        }
        if row.get::<_, i64>("behind") > 1 << 30 {
            obstacle(format!("a standby of shard {shard} is far behind"), "wait until it has caught up");
        }
    }
    let versions: Vec<i32> = rows.iter().map(|row| row.get("schema_version")).collect();
    if versions[0] != versions[1] {
        obstacle(
            format!(
                "the schemas differ: shard {} is at version {}, shard {} at {}",
                source.shard, versions[0], target.shard, versions[1]
            ),
            "run `therev schema apply` first",
        );
    }
    if rows[0].get::<_, &str>("cluster_id") != rows[1].get::<_, &str>("cluster_id") {
        obstacle("the two shards are of different clusters".into(), "look at the addresses in the control database");
    }
    Ok(obstacles)
}

/// `bucket 7 is`, `buckets 3, 11 are`; of many the first ones, and how many more.
fn buckets_are(buckets: &[i16]) -> String {
    const NAMED: usize = 8;
    if let [bucket] = buckets {
        return format!("bucket {bucket} is");
    }
    let named: Vec<String> = buckets.iter().take(NAMED).map(ToString::to_string).collect();
    let more = buckets.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("buckets {}{more} are", named.join(", "))
}

/// Whether the source owns what is to move, and nobody else is moving it.
async fn ownership(
    source: &Side,
    target: &Side,
    groups: &[&str],
    buckets: &[i16],
    request: &Request,
) -> Result<Vec<Obstacle>> {
    let mut obstacles = Vec::new();
    for side in [source, target] {
        let user = request.pin.map(|user| user.0);
        let row = side.one(NOT_READY, &[&groups, &buckets, &user]).await?;
        if let Some(under_way) = row.get::<_, Option<Vec<i16>>>("under_way") {
            obstacles.push(Obstacle {
                reason: format!("{} in another relocation", buckets_are(&under_way)),
                next: "wait for it, or abort it; `therev relocation list` names it".into(),
            });
        }
        let elsewhere = row.get::<_, Option<Vec<i16>>>("elsewhere").unwrap_or_default();
        if side.which == Which::Source && !elsewhere.is_empty() {
            obstacles.push(Obstacle {
                reason: match request.pin {
                    Some(_) => format!("shard {} does not have this user", request.source),
                    None => format!("{} not on shard {}", buckets_are(&elsewhere), request.source),
                },
                next: "plan anew: they have moved".into(),
            });
        }
        if side.which == Which::Target && elsewhere.len() < buckets.len() {
            obstacles.push(Obstacle {
                reason: match request.pin {
                    Some(_) => format!("shard {} has this user already", request.target),
                    None => format!("shard {} owns some of these buckets already", request.target),
                },
                next: "name only the others".into(),
            });
        }
    }
    obstacles.dedup();
    Ok(obstacles)
}

#[cfg(test)]
mod tests {
    use super::{buckets_are, log_held};

    #[test]
    fn of_many_buckets_the_first_are_named() {
        assert_eq!(buckets_are(&[7]), "bucket 7 is");
        assert_eq!(buckets_are(&[3, 11]), "buckets 3, 11 are");
        let many: Vec<i16> = (0..1024).collect();
        assert_eq!(buckets_are(&many), "buckets 0, 1, 2, 3, 4, 5, 6, 7 and 1016 more are");
    }

    #[test]
    fn log_is_kept_for_as_long_as_the_copy_takes() {
        assert_eq!(log_held(600 << 20, 90.0), 900 << 20);
        assert_eq!(log_held(600 << 20, 0.0), 0);
        assert_eq!(log_held(0, 3_600.0), 0);
    }
}
