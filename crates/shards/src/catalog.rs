//! What the control database says: the cluster, its shards and directories, and the placement.
//!
//! Kept in a small file too, so that a node can start while the control database is down.

use crate::address::Hosts;
use crate::error::{Database, Error};
use crate::life::Life;
use crate::pool::Pool;
use placement::{Bucket, Group, Layout, Map, Pins, Place, ShardNo, UserId};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{DirEntry, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

/// Removes what somebody who was killed while writing a state file has left beside it. What is being written just now is young.
/// Where the clock says otherwise, that write fails, and the next one does not.
pub(crate) fn remove_leftovers(path: &Path) {
    const YOUNG: Duration = Duration::from_secs(60);
    let (Some(folder), Some(stem)) = (path.parent(), path.file_stem().and_then(OsStr::to_str)) else { return };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let is_left = |entry: &DirEntry| {
        let name = entry.file_name();
        let between = name.to_str().and_then(|name| name.strip_prefix(stem)?.strip_prefix('.')?.strip_suffix(".new"));
        let written = entry.metadata().and_then(|it| it.modified()).ok();
        let is_old = written.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > YOUNG);
        is_old && between.is_some_and(|id| Uuid::try_parse(id).is_ok())
    };
    for left in std::fs::read_dir(folder).into_iter().flatten().flatten().filter(is_left) {
        std::fs::remove_file(left.path()).ok();
    }
}

/// The cluster as the control database knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Catalog {
    /// Which cluster this is.
    pub cluster_id: Uuid,
    /// How its groups lay at first.
    pub layout: Layout,
    /// The shards, by number.
    pub shards: Vec<ShardEntry>,
    /// The directory's writer.
    pub directory: Hosts,
    /// Which life of it counts.
    pub directory_life: Life,
    /// The directory's replicas.
    pub replicas: Vec<Hosts>,
    /// Bucket to place, for each group in the order of [`Group::ALL`].
    places: Vec<Vec<Place>>,
    /// Who is placed apart from the bucket.
    #[serde(default)]
    pins: Vec<PinEntry>,
}

/// A user placed apart, as the control database knows it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct PinEntry {
    colocation_group: Group,
    user_id: UserId,
    #[serde(flatten)]
    place: Place,
}

/// A shard as the control database knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Its number.
    pub shard: ShardNo,
    /// Where it is.
    pub at: Hosts,
    /// Which life of it counts.
    pub life: Life,
    /// The most connections that a node opens to it.
    pub pool_size: usize,
    /// How much it should hold beside the others; 0: it is being drained.
    #[serde(default = "even")]
    pub weight: f32,
}

/// Every shard's weight at first.
fn even() -> f32 {
    1.0
}

/// Where a node's placement came from when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundPlacement {
    /// The control database answered.
    Control,
    /// It did not, and the state file was read.
    StateFile,
}

/// The placement comes in the order of its key: sorted rows are read off the index once, where an aggregate that sorts would do it for
/// each of the two, which took five times as long.
const CLUSTER: &str = "
    SELECT i.cluster_id, i.layout, clock_timestamp() AS now,
           (SELECT json_agg(json_build_object('shard', s.shard, 'hosts', s.hosts, 'database', s.database,
                                              'pool_size', s.pool_size, 'weight', s.weight,
                                              'life', to_jsonb(l)) ORDER BY s.shard)
              FROM therev.shards AS s
              JOIN therev.incarnations AS l ON l.database = 'shard ' || s.shard) AS shards,
           (SELECT to_jsonb(l) FROM therev.incarnations AS l WHERE l.database = 'the directory') AS directory_life,
           (SELECT json_agg(json_build_object('hosts', d.hosts, 'database', d.database)
                            ORDER BY NOT d.is_writer, d.directory)
              FROM therev.directories AS d) AS directories,
           p.shard_numbers, p.epochs,
           (SELECT json_agg(json_build_object('colocation_group', p.colocation_group, 'user_id', p.user_id,
                                              'shard', p.shard, 'epoch', p.epoch))
              FROM therev.pins AS p) AS pins
      FROM therev.identity AS i
     CROSS JOIN (SELECT array_agg(o.shard) AS shard_numbers, array_agg(o.epoch) AS epochs
                   FROM (SELECT p.shard, p.epoch FROM therev.placement AS p ORDER BY p.colocation_group, p.bucket) AS o) AS p";

#[derive(Deserialize)]
struct ShardRow {
    shard: ShardNo,
    hosts: String,
    database: String,
    pool_size: usize,
    weight: f32,
    life: Life,
}

impl Catalog {
    /// Reads it from the control database, in one statement.
    pub(crate) async fn read(control: &Pool) -> Result<Catalog, Error> {
        let odd = |reason: &str| Error::Answer { database: Database::Control, reason: reason.to_owned() };
        let rows = control.query(CLUSTER, &[], false).await?;
        let row = rows.first().ok_or_else(|| odd("it has no identity"))?;
        // With every refresh: this node may have slept, which `Instant` does not count everywhere.
        placement::tell_time(row.get("now"));
        let unfinished = || odd("its initialization was never finished: run `therev init` again");
        let json = |name: &str| row.get::<_, Option<serde_json::Value>>(name).ok_or_else(unfinished);
        let shards: Vec<ShardRow> = serde_json::from_value(json("shards")?).map_err(|e| odd(&e.to_string()))?;
        let mut directories: Vec<Hosts> =
            serde_json::from_value(json("directories")?).map_err(|e| odd(&e.to_string()))?;
        let directory_life = serde_json::from_value(json("directory_life")?).map_err(|e| odd(&e.to_string()))?;
        let numbers: Vec<i16> = row.get::<_, Option<_>>("shard_numbers").ok_or_else(unfinished)?;
        let epochs: Vec<i64> = row.get::<_, Option<_>>("epochs").ok_or_else(unfinished)?;
        let all: Vec<Place> =
            numbers.into_iter().zip(epochs).map(|(n, epoch)| Place { shard: ShardNo(n), epoch }).collect();
        let per_group = usize::from(placement::BUCKETS);
        if all.len() != Group::ALL.len() * per_group {
            return Err(unfinished());
        }
        Ok(Catalog {
            cluster_id: row.get("cluster_id"),
            layout: row.get::<_, &str>("layout").parse().map_err(|_| odd("its layout is unknown"))?,
            shards: shards
                .into_iter()
                .map(|s| ShardEntry {
                    shard: s.shard,
                    at: Hosts { hosts: s.hosts, database: s.database },
                    life: s.life,
                    pool_size: s.pool_size,
                    weight: s.weight,
                })
                .collect(),
            directory: directories.remove(0),
            directory_life,
            replicas: directories,
            places: all.chunks(per_group).map(<[Place]>::to_vec).collect(),
            pins: match row.get::<_, Option<serde_json::Value>>("pins") {
                Some(pins) => serde_json::from_value(pins).map_err(|e| odd(&e.to_string()))?,
                None => Vec::new(),
            },
        })
    }

    /// Reads it from the state file; `None` when there is none that can be used.
    pub(crate) fn load(path: &Path) -> Option<Catalog> {
        let catalog: Catalog = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let whole = catalog.places.len() == Group::ALL.len()
            && catalog.places.iter().all(|places| places.len() == usize::from(placement::BUCKETS));
        whole.then_some(catalog)
    }

    /// Writes it to the state file: whole or not at all, whoever else writes it, and also where the power fails.
    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        let fresh = path.with_extension(format!("{}.new", Uuid::new_v4().simple()));
        let written = File::create_new(&fresh).and_then(|mut file| {
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            std::fs::rename(&fresh, path)
        });
        written.inspect_err(|_| drop(std::fs::remove_file(&fresh)))
    }

    /// Whether a later catalog has a shard at another address: another database has its number by now, or it has got other hosts.
    pub(crate) fn is_elsewhere(&self, later: &Catalog, shard: ShardNo) -> bool {
        match (self.find(Database::Shard(shard)), later.find(Database::Shard(shard))) {
            (before, Some((later_at, _))) => before.is_none_or(|(at, _)| at != later_at),
            (_, None) => false,
        }
    }

    /// Where a shard or the directory's writer is, and which life of it counts.
    pub(crate) fn find(&self, database: Database) -> Option<(&Hosts, Life)> {
        match database {
            Database::Shard(number) => {
                self.shards.iter().find(|entry| entry.shard == number).map(|entry| (&entry.at, entry.life))
            }
            Database::Directory => Some((&self.directory, self.directory_life)),
            Database::Control | Database::Replica(_) => None,
        }
    }

    /// Every bucket's place.
    pub(crate) fn places(&self) -> impl Iterator<Item = ((Group, Bucket), Place)> {
        let groups = Group::ALL.into_iter().zip(&self.places);
        groups
            .flat_map(|(group, places)| Bucket::all().zip(places).map(move |(bucket, place)| ((group, bucket), *place)))
    }

    /// Writes its places into a map, where they are news.
    pub(crate) fn teach(&self, map: &mut Map) -> bool {
        let mut news = false;
        for ((group, bucket), place) in self.places() {
            news |= map.learn(group, bucket, place);
        }
        let mut pins = Pins::new();
        for PinEntry { colocation_group, user_id, place } in &self.pins {
            pins.entry((*colocation_group, user_id.bucket())).or_default().insert(*user_id, *place);
        }
        map.learn_pins(pins);
        news
    }

    /// The same catalog with the places that a node has learned.
    pub(crate) fn with_places(&self, map: &Map) -> Catalog {
        let places = Group::ALL.map(|group| map.places(group).map(|(_, place)| place).collect()).to_vec();
        let pins = map.pins().iter().flat_map(|((group, _), users)| {
            users.iter().map(|(user, place)| PinEntry { colocation_group: *group, user_id: *user, place: *place })
        });
        Catalog { places, pins: pins.collect(), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn what_a_killed_writer_of_a_state_file_has_left_goes_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let [left, young] = [(); 2].map(|()| format!("node.{}.new", Uuid::new_v4().simple()));
        let others = ["node.json", "node.notes.new", "another.new"];
        let other_node = format!("node.two.{}.new", Uuid::new_v4().simple());
        let kept = others.into_iter().chain([young.as_str(), other_node.as_str()]);
        for name in kept.clone().chain([left.as_str()]) {
            let file = File::create_new(folder.path().join(name)).unwrap();
            if name != young {
                file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }
        }
        remove_leftovers(&folder.path().join("node.json"));
        assert!(kept.clone().all(|name| folder.path().join(name).exists()));
        assert!(!folder.path().join(left).exists());
    }
}
