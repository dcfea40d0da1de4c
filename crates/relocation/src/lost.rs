//! What was lost sight of: parts of relocations that the control database does not know (it was put back to an older state),
//! and streams that a worker made which slept past the relocation's end.

use crate::error::{Error, Result};
use crate::finish;
use crate::mover::chain;
use crate::objects;
use crate::record::Records;
use crate::side::{Side, Which};
use shards::{Admin, Database, Shards};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

const PARTS: &str = "
    SELECT p.relocation, p.tag, p.side, p.peer, p.groups::text[] AS groups, p.buckets, p.pin, p.apart,
           -- The side that was to give takes, or has given; the side that was to take gives, or has taken.
           p.state = ANY (CASE p.side WHEN 'source' THEN '{moved,incoming,ready}'::text[]
                                      ELSE '{owned,draining,moved}' END) AS is_decided
      FROM therev.relocation_parts AS p";

/// Tags in the names of streams that belong to no part here.
const STRAYS: &str = "
    SELECT DISTINCT substr(n.name, 8, 16) AS tag
      FROM (SELECT s.slot_name::text AS name FROM pg_replication_slots AS s WHERE s.database = current_database()
            UNION ALL SELECT p.pubname FROM pg_publication AS p
            UNION ALL SELECT s.subname FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                       WHERE d.datname = current_database()) AS n
     WHERE n.name ~ '^therev_[0-9a-f]{16}_(forward|reverse)$'
       AND NOT EXISTS (SELECT FROM therev.relocation_parts AS p WHERE p.tag = substr(n.name, 8, 16))";

/// A part that the control database does not know.
struct Lost {
    relocation: i64,
    tag: String,
    is_source: bool,
    shard: i16,
    peer: i16,
    groups: Vec<String>,
    buckets: Vec<i16>,
    pin: Option<Uuid>,
    apart: serde_json::Value,
    is_decided: bool,
}

/// Writes down what the control database does not know, paused for people to decide; removes streams of what has ended.
pub(crate) async fn find(shards: &Shards) -> Result<()> {
    let admin = Admin::mover(shards.config(), shards.catalog())?;
    let control = admin.connect(Database::Control).await?;
    let (mut asked, mut lost) = (Vec::new(), Vec::new());
    for shard in shards.numbers() {
        let side = match Side::connect(&admin, Which::Source, shard).await {
            Ok(side) => side,
            Err(error) => {
                tracing::debug!(%error, "shard {shard} is not asked what it knows of relocations");
                continue;
            }
        };
        asked.push(shard.0);
        lost.extend(unknown_parts(&side, &control).await?);
        for number in ended_parts(&side, &control).await? {
            tracing::warn!(relocation = number, "what was begun of it after its end is taken back");
            let relocation = Records(&control).get(number).await?;
            // Its other shard may be down, or be no more: the others are looked at all the same.
            if let Err(error) = finish::clear(&relocation, &admin).await {
                tracing::debug!(relocation = number, error = %chain(&error), "that is not taken back yet");
            }
        }
        remove_strays(&side, &control).await?;
    }
    // The source's part says more; the target's counts where the source has none.
    lost.sort_by_key(|part| !part.is_source);
    for part in lost.iter().filter(|part| part.is_source || asked.contains(&part.peer)) {
        adopt(part, &control).await?;
    }
    Ok(())
}

async fn unknown_parts(side: &Side, control: &Client) -> Result<Vec<Lost>> {
    let mut lost = Vec::new();
    for part in side.query(PARTS, &[]).await? {
        let tag: String = part.get("tag");
        let known = control.query("SELECT FROM therev.relocations AS r WHERE r.tag = $1", &[&tag]).await.map_err(at)?;
        if known.is_empty() {
            lost.push(Lost {
                relocation: part.get("relocation"),
                tag,
                is_source: part.get::<_, &str>("side") == Which::Source.name(),
                shard: side.shard.0,
                peer: part.get("peer"),
                groups: part.get("groups"),
                buckets: part.get("buckets"),
                pin: part.get("pin"),
                apart: part.get("apart"),
                is_decided: part.get("is_decided"),
            });
        }
    }
    Ok(lost)
}

/// The relocations that are over and have a part here: begun by a worker that slept past the end.
async fn ended_parts(side: &Side, control: &Client) -> Result<Vec<i64>> {
    let tags: Vec<String> = side.query(PARTS, &[]).await?.iter().map(|part| part.get("tag")).collect();
    let over = "SELECT r.relocation FROM therev.relocations AS r WHERE r.tag = ANY ($1) AND r.ended_at IS NOT NULL";
    Ok(control.query(over, &[&tags]).await.map_err(at)?.iter().map(|row| row.get("relocation")).collect())
}

async fn remove_strays(side: &Side, control: &Client) -> Result<()> {
    for row in side.query(STRAYS, &[]).await? {
        let tag: &str = row.get("tag");
        let open = "SELECT FROM therev.relocations AS r WHERE r.tag = $1 AND r.ended_at IS NULL";
        if control.query(open, &[&tag]).await.map_err(at)?.is_empty() {
            tracing::warn!("streams of a relocation that is over are removed from shard {}", side.shard);
            objects::drop_at(side, tag).await?;
        }
    }
    Ok(())
}

/// Gives a part its relocation again. Whether its copy was whole nobody knows: what was not decided is to be undone.
async fn adopt(part: &Lost, control: &Client) -> Result<()> {
    let (source, target) = if part.is_source { (part.shard, part.peer) } else { (part.peer, part.shard) };
    let (state, goal) = if part.is_decided { ("switching", "switched") } else { ("copying", "aborted") };
    let Lost { relocation, tag, groups, buckets, pin, apart, .. } = part;
    let params: [&(dyn ToSql + Sync); 10] =
        [relocation, tag, groups, buckets, &source, &target, &state, &goal, pin, apart];
    let adopted = control
        .execute(
            "INSERT INTO therev.relocations
                    (relocation, tag, groups, buckets, source, target, state, goal, pin, apart, is_paused, note, actor)
             OVERRIDING SYSTEM VALUE
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, true, 'found on the shards', 'therev')
             ON CONFLICT DO NOTHING",
            &params,
        )
        .await
        .map_err(at)?;
    if adopted > 0 {
        tracing::warn!(part.relocation, "a relocation was found that the control database had lost; it rests, paused");
    }
    Ok(())
}

fn at(source: tokio_postgres::Error) -> Error {
    Error::Sql { database: Database::Control, source }
}
