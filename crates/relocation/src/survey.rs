//! What every bucket holds and how much is written to it, asked of all shards: what a plan goes by.

use crate::error::{Error, Result};
use crate::side::{Side, Which};
use futures_util::future::try_join_all;
use placement::planner::{Item, Pin};
use placement::{BUCKETS, Bucket, Group, ShardNo};
use shards::Admin;
use std::collections::BTreeMap;
use tokio_postgres::Row;
use uuid::Uuid;

/// The tables, what they take on disk with their partitions and indexes, and when a row was last written, where its columns say that.
const TABLES: &str = "
    SELECT t.table_name, t.colocation_group::text AS in_group, t.owner_column,
           (SELECT sum(pg_total_relation_size(c.oid))
              FROM pg_class AS c
             WHERE c.oid = t.table_name::regclass
                OR c.oid IN (SELECT i.inhrelid FROM pg_inherits AS i WHERE i.inhparent = t.table_name::regclass))
               ::bigint AS bytes,
           (SELECT 'greatest(' || string_agg('t.' || quote_ident(a.attname), ', ') || ')'
              FROM pg_attribute AS a
             WHERE a.attrelid = t.table_name::regclass AND a.attname IN ('created_at', 'updated_at')) AS written_at
      FROM therev.owned_tables AS t
     ORDER BY t.table_name";

const OWNED: &str = "
    SELECT o.colocation_group::text AS in_group, o.bucket
      FROM therev.ownership AS o
     WHERE o.state IN ('owned', 'draining')";

/// Users whom this shard has apart from their buckets, wherever these are: also where it has them by now, they do not move along.
const PINS: &str = "
    SELECT p.colocation_group::text AS in_group, p.user_id
      FROM therev.pins AS p
     WHERE p.state IN ('owned', 'draining')";

/// One table on one shard.
struct TableOn {
    name: String,
    group: String,
    bytes: i64,
    rows: Vec<Rows>,
}

/// What a table has of a bucket on one shard: of the users who are there apart from it, or of all others.
struct Rows {
    bucket: i16,
    are_apart: bool,
    count: i64,
    /// How many of them were written in the last day.
    written: i64,
}

/// One shard.
struct ShardHolds {
    shard: ShardNo,
    owned: Vec<(String, i16)>,
    tables: Vec<TableOn>,
}

/// What the buckets of each group hold, and where they are.
pub(crate) struct Survey {
    items: BTreeMap<(Group, Bucket), Item>,
    /// What a shard has of users placed apart, all of a bucket together.
    pins: BTreeMap<(Group, Bucket, ShardNo), Pin>,
}

impl Survey {
    /// Asks all shards. Refuses while buckets change hands.
    pub(crate) async fn take(admin: &Admin, shards: &[ShardNo]) -> Result<Survey> {
        let asked = try_join_all(shards.iter().map(|shard| ask(admin, *shard))).await?;
        let mut items = BTreeMap::new();
        for held in &asked {
            for (group, bucket) in &held.owned {
                let (Ok(group), Ok(bucket)) = (group.parse::<Group>(), Bucket::try_from(*bucket)) else { continue };
                items.insert((group, bucket), Item { bucket, shard: held.shard, bytes: 0, load: 0 });
            }
        }
        if items.len() != Group::ALL.len() * usize::from(BUCKETS) {
            return Err(Error::refused(
                "some buckets are owned by no shard just now",
                "run this again in a moment; if it stays so, `therev check` says what is wrong",
            ));
        }
        let mut survey = Survey { items, pins: BTreeMap::new() };
        survey.weigh(&asked);
        Ok(survey)
    }

    /// A bucket weighs its rows by their table's mean over the whole cluster: what deleted rows still take on one shard is not
    /// held against the buckets that are left there.
    fn weigh(&mut self, asked: &[ShardHolds]) {
        let mut means: BTreeMap<&str, (i128, i128)> = BTreeMap::new();
        for table in asked.iter().flat_map(|held| &held.tables) {
            let (bytes, rows) = means.entry(&table.name).or_default();
            *bytes += i128::from(table.bytes);
            *rows += table.rows.iter().map(|of| i128::from(of.count)).sum::<i128>();
        }
        for held in asked {
            for table in &held.tables {
                let Ok(group) = table.group.parse::<Group>() else { continue };
                let (bytes, all_rows) = means.get(table.name.as_str()).copied().unwrap_or_default();
                for of in &table.rows {
                    let Ok(bucket) = Bucket::try_from(of.bucket) else { continue };
                    let share = u64::try_from(i128::from(of.count) * bytes / all_rows.max(1)).unwrap_or(0);
                    let written = u64::try_from(of.written).unwrap_or(0);
                    let item = self.items.get_mut(&(group, bucket)).filter(|item| item.shard == held.shard);
                    if of.are_apart {
                        let none = Pin { bucket, shard: held.shard, bytes: 0, load: 0 };
                        let pin = self.pins.entry((group, bucket, held.shard)).or_insert(none);
                        pin.bytes = pin.bytes.saturating_add(share);
                        pin.load = pin.load.saturating_add(written);
                    } else if let Some(item) = item {
                        item.bytes = item.bytes.saturating_add(share);
                        item.load = item.load.saturating_add(written);
                    }
                    // Other rows that another shard owns are what a relocation has not taken away yet.
                }
            }
        }
    }

    /// The buckets of these groups, of which those of one number lie together.
    pub(crate) fn of(&self, groups: &[Group]) -> Vec<Item> {
        let mut together: BTreeMap<Bucket, Item> = BTreeMap::new();
        for ((_, bucket), item) in self.items.iter().filter(|((group, _), _)| groups.contains(group)) {
            let sum = together.entry(*bucket).or_insert(Item { bytes: 0, load: 0, ..*item });
            sum.bytes = sum.bytes.saturating_add(item.bytes);
            sum.load = sum.load.saturating_add(item.load);
        }
        together.into_values().collect()
    }

    /// What shards have of these groups apart from their buckets.
    pub(crate) fn pins_of(&self, groups: &[Group]) -> Vec<Pin> {
        self.pins.iter().filter(|((group, ..), _)| groups.contains(group)).map(|(_, pin)| *pin).collect()
    }

    /// Whether a shard has buckets of a group.
    pub(crate) fn holds(&self, shard: ShardNo, group: Group) -> bool {
        self.items.iter().any(|((of, _), item)| *of == group && item.shard == shard)
    }
}

async fn ask(admin: &Admin, shard: ShardNo) -> Result<ShardHolds> {
    let side = Side::connect(admin, Which::Source, shard).await?;
    let (owned, pins) = (side.query(OWNED, &[]).await?, side.query(PINS, &[]).await?);
    let mut tables = Vec::new();
    for row in side.query(TABLES, &[]).await? {
        let (name, written_at): (String, Option<&str>) = (row.get("table_name"), row.get("written_at"));
        let (group, owner): (String, &str) = (row.get("in_group"), row.get("owner_column"));
        // A table whose rows do not say when they were written is not counted as written.
        let written = written_at.map_or_else(|| "false".to_owned(), |at| format!("{at} > now() - interval '1 day'"));
        let sql = format!(
            "SELECT t.bucket, t.{owner} = ANY ($1) AS are_apart, count(*) AS rows,
                    count(*) FILTER (WHERE {written}) AS written
               FROM {name} AS t
              GROUP BY t.bucket, are_apart"
        );
        let apart = pins.iter().filter(|pin| pin.get::<_, &str>("in_group") == group);
        let apart: Vec<Uuid> = apart.map(|pin| pin.get("user_id")).collect();
        let rows = side.query(&sql, &[&apart]).await?.iter().map(Rows::of).collect();
        tables.push(TableOn { group, bytes: row.get("bytes"), rows, name });
    }
    let owned = owned.iter().map(|row| (row.get("in_group"), row.get("bucket"))).collect();
    Ok(ShardHolds { shard, owned, tables })
}

impl Rows {
    fn of(row: &Row) -> Rows {
        Rows {
            bucket: row.get("bucket"),
            are_apart: row.get("are_apart"),
            count: row.get("rows"),
            written: row.get("written"),
        }
    }
}
