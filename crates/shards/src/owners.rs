//! Who owns what, by what shards know of each other: the highest epoch wins.

use crate::error::{Database, Error};
use placement::{Bucket, Group, Place, ShardNo};
use std::collections::BTreeMap;
use tokio_postgres::Client;

const OWNERS: &str = "
    SELECT array_agg(coalesce(o.peer, i.shard) ORDER BY o.colocation_group, o.bucket) AS owners,
           array_agg(o.epoch ORDER BY o.colocation_group, o.bucket) AS epochs
      FROM therev.ownership AS o, therev.identity AS i";

/// Who owns what, as one shard knows it.
pub(crate) async fn known_to(client: &Client, shard: Database) -> Result<Vec<((Group, Bucket), Place)>, Error> {
    let row = client.query_one(OWNERS, &[]).await.map_err(|source| Error::of_statement(shard, false, source))?;
    let owners: Vec<i16> = row.get::<_, Option<_>>("owners").unwrap_or_default();
    let epochs: Vec<i64> = row.get::<_, Option<_>>("epochs").unwrap_or_default();
    let keys = Group::ALL.into_iter().flat_map(|group| Bucket::all().map(move |bucket| (group, bucket)));
    let places = owners.into_iter().zip(epochs).map(|(owner, epoch)| Place { shard: ShardNo(owner), epoch });
    Ok(keys.zip(places).collect())
}

/// The place of each bucket with the highest epoch that anybody knows.
pub(crate) struct Highest(BTreeMap<(Group, Bucket), Place>);

/// The same side by side, for SQL.
pub(crate) struct Columns {
    pub(crate) groups: Vec<&'static str>,
    pub(crate) buckets: Vec<i16>,
    pub(crate) owners: Vec<i16>,
    pub(crate) epochs: Vec<i64>,
}

impl Highest {
    pub(crate) fn of(known: impl Iterator<Item = ((Group, Bucket), Place)>) -> Highest {
        let mut highest: BTreeMap<(Group, Bucket), Place> = BTreeMap::new();
        for (key, place) in known {
            let highest = highest.entry(key).or_insert(place);
            if place.epoch > highest.epoch {
                *highest = place;
            }
        }
        Highest(highest)
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = ((Group, Bucket), Place)> + '_ {
        self.0.iter().map(|(key, place)| (*key, *place))
    }

    pub(crate) fn columns(&self) -> Columns {
        Columns {
            groups: self.0.keys().map(|(group, _)| group.name()).collect(),
            buckets: self.0.keys().map(|(_, bucket)| bucket.sql()).collect(),
            owners: self.0.values().map(|place| place.shard.0).collect(),
            epochs: self.0.values().map(|place| place.epoch).collect(),
        }
    }
}
