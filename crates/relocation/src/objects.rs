//! Publications, slots and subscriptions: two streams, one in each direction.
//!
//! Their names follow from the relocation's tag, so that they are recorded before they exist, and each function compares what
//! should be with what is.

use crate::error::{Error, Result};
use crate::record::Relocation;
use crate::side::{KEEP_PART, Pair, Side, Which};
use secrecy::ExposeSecret;
use shards::{Admin, SlotSnapshot};
use std::time::Duration;
use tokio_postgres::error::SqlState;

/// How long a worker of a stream may take to be gone after it was told to.
const WORKER_WAIT: Duration = Duration::from_secs(30);

/// One of the two streams of a relocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// From source to target.
    Forward,
    /// From target to source: keeps the way back open.
    Reverse,
}

impl Stream {
    /// The name of its publication, its slot and its subscription.
    pub(crate) fn name(self, relocation: &Relocation) -> String {
        let direction = match self {
            Stream::Forward => "forward",
            Stream::Reverse => "reverse",
        };
        format!("therev_{}_{direction}", relocation.tag)
    }

    /// Where its rows come from, and where they go.
    pub(crate) fn ends(self, pair: &Pair) -> (&Side, &Side) {
        match self {
            Stream::Forward => (&pair.source, &pair.target),
            Stream::Reverse => (&pair.target, &pair.source),
        }
    }

    /// The stream that a side feeds.
    pub(crate) fn from(which: Which) -> Stream {
        match which {
            Which::Source => Stream::Forward,
            Which::Target => Stream::Reverse,
        }
    }
}

/// The rows of these buckets in every table of these groups, and the sentinel of this direction. The filter tests a bitmap:
/// half the cost of a list. A TRUNCATE is never published: it would ignore the filter.
async fn publish(relocation: &Relocation, stream: Stream, from: &Side) -> Result<()> {
    let name = stream.name(relocation);
    if !from.query("SELECT FROM pg_publication WHERE pubname = $1", &[&name]).await?.is_empty() {
        return Ok(());
    }
    let tables = from
        .query(
            "SELECT t.table_name, t.colocation_group::text, t.owner_column FROM therev.owned_tables AS t
              WHERE t.colocation_group::text = ANY ($1) ORDER BY t.table_name",
            &[&relocation.group_names()],
        )
        .await?;
    let mut bits = vec![b'0'; usize::from(placement::BUCKETS)];
    for bucket in &relocation.buckets {
        bits[bucket.index()] = b'1';
    }
    let bits = String::from_utf8_lossy(&bits).into_owned();
    let mut published: Vec<String> = tables
        .iter()
        .map(|row| {
            let whose = relocation.whose(row.get("colocation_group"), row.get("owner_column"));
            format!("{} WHERE (get_bit(B'{bits}', bucket) = 1{whose})", row.get::<_, &str>("table_name"))
        })
        .collect();
    published.push(format!(
        "therev.sentinels WHERE (relocation = {} AND side = '{}')",
        relocation.relocation,
        from.which.name()
    ));
    let create = format!(
        "CREATE PUBLICATION {name} FOR TABLE {}
             WITH (publish = 'insert, update, delete', publish_via_partition_root = true)",
        published.join(", ")
    );
    while_part_is(relocation, from, &create).await
}

/// Makes something in a transaction that keeps this side's part: a worker that slept until its relocation had ended would
/// leave what nobody looks for any more.
async fn while_part_is(relocation: &Relocation, side: &Side, make: &str) -> Result<()> {
    side.batch("BEGIN").await?;
    let part = format!("{KEEP_PART} WHERE p.relocation = $1 FOR SHARE");
    if side.query(&part, &[&relocation.relocation]).await?.is_empty() {
        return Err(Error::Taken(relocation.relocation));
    }
    side.batch(make).await?;
    side.batch("COMMIT").await
}

/// Subscribes to a slot that exists; the stream rests until it is started.
async fn subscribe(relocation: &Relocation, stream: Stream, pair: &Pair, admin: &Admin) -> Result<()> {
    let (from, to) = stream.ends(pair);
    let name = stream.name(relocation);
    let known = "SELECT FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                  WHERE s.subname = $1 AND d.datname = current_database()";
    if !to.query(known, &[&name]).await?.is_empty() {
        return Ok(());
    }
    // The address holds a password. It travels as a parameter, into a setting of the transaction that follows: nobody finds it
    // in a log, among the sessions' statements or in their statistics.
    let conninfo = admin.conninfo(from.database())?;
    to.query("SELECT set_config('therev.conninfo', $1, false)", &[&conninfo.expose_secret()]).await?;
    let create = format!(
        "SET LOCAL log_statement = 'none'; SET LOCAL log_min_error_statement = panic;
         SET LOCAL log_min_duration_statement = -1; SET LOCAL pg_stat_statements.track = 'none';
         DO $$ BEGIN
             EXECUTE format('CREATE SUBSCRIPTION {name} CONNECTION %L PUBLICATION {name}
                                 WITH (slot_name = ''{name}'', create_slot = false, enabled = false, copy_data = false)',
                            current_setting('therev.conninfo'));
         END $$;
         RESET therev.conninfo"
    );
    while_part_is(relocation, to, &create).await
}

/// The forward stream, at rest, with the snapshot that it begins at.
pub(crate) async fn make_forward(relocation: &Relocation, pair: &Pair, admin: &Admin) -> Result<SlotSnapshot> {
    publish(relocation, Stream::Forward, &pair.source).await?;
    fail::fail_point!("relocation.published");
    let name = Stream::Forward.name(relocation);
    let snapshot = admin.make_slot(pair.source.database(), &name).await?;
    fail::fail_point!("relocation.slot_made");
    subscribe(relocation, Stream::Forward, pair, admin).await?;
    Ok(snapshot)
}

/// The reverse stream, at rest: made before the switch, so that nothing of it falls into the pause.
pub(crate) async fn make_reverse(relocation: &Relocation, pair: &Pair, admin: &Admin) -> Result<()> {
    publish(relocation, Stream::Reverse, &pair.target).await?;
    let name = Stream::Reverse.name(relocation);
    let known = "SELECT FROM pg_replication_slots WHERE slot_name = $1";
    if pair.target.query(known, &[&name]).await?.is_empty() {
        drop(admin.make_slot(pair.target.database(), &name).await?);
    }
    fail::fail_point!("relocation.reverse_slot_made");
    subscribe(relocation, Stream::Reverse, pair, admin).await
}

/// Starts the forward stream, as long as the copy that it follows counts: a worker that slept must not start it once the
/// switch has ended it, or both streams would run.
pub(crate) async fn start_forward(relocation: &Relocation, pair: &Pair) -> Result<()> {
    let sql = format!(
        "DO $$ BEGIN
             PERFORM FROM therev.relocation_parts AS p
               WHERE p.relocation = {} AND p.copy_round = {} AND p.state = 'incoming' FOR SHARE;
             IF FOUND THEN
                 ALTER SUBSCRIPTION {} ENABLE;
             END IF;
         END $$",
        relocation.relocation,
        relocation.copy_round,
        Stream::Forward.name(relocation)
    );
    pair.target.batch(&sql).await
}

/// Starts a stream behind everything that its origin had before `since`: what came to it by the other stream stays there.
/// In one transaction and once: a worker that slept must not move it back.
pub(crate) async fn start_behind(relocation: &Relocation, stream: Stream, pair: &Pair, since: &str) -> Result<()> {
    let (_, to) = stream.ends(pair);
    let name = stream.name(relocation);
    let sql = format!(
        "DO $$ BEGIN
             UPDATE therev.relocation_parts SET is_fed_back = true WHERE relocation = {} AND NOT is_fed_back;
             IF FOUND THEN
                 PERFORM pg_replication_origin_advance('pg_' || s.oid, '{since}')
                    FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                   WHERE s.subname = '{name}' AND d.datname = current_database();
                 ALTER SUBSCRIPTION {name} ENABLE;
             END IF;
         END $$",
        relocation.relocation
    );
    to.batch(&sql).await
}

/// Stops a stream, and removes it once its worker is gone: a slot that nobody reads would hold all the log of its server.
pub(crate) async fn drop_stream(relocation: &Relocation, stream: Stream, pair: &Pair) -> Result<()> {
    // Of the two, each side gives one and takes the other.
    let (from, to) = stream.ends(pair);
    unsubscribe(to, &relocation.tag).await?;
    drop_slots(from, &relocation.tag).await
}

/// Stops a stream and waits until its worker is gone.
async fn stop_at(to: &Side, name: &str) -> Result<()> {
    let known = "SELECT s.oid, s.subenabled FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                  WHERE s.subname = $1 AND d.datname = current_database()";
    let rows = to.query(known, &[&name]).await?;
    let Some(row) = rows.first() else { return Ok(()) };
    if row.get("subenabled") {
        to.batch(&format!("ALTER SUBSCRIPTION {name} DISABLE")).await?;
    }
    let gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_subscription WHERE subid = $1 AND pid IS NOT NULL)";
    let oid: u32 = row.get("oid");
    to.until("the stream's worker did not end", WORKER_WAIT, gone, &[&oid]).await
}

/// Removes what one side has of a relocation's streams, the other side being out of reach.
pub(crate) async fn drop_at(side: &Side, tag: &str) -> Result<()> {
    unsubscribe(side, tag).await?;
    drop_slots(side, tag).await
}

/// Removes the ends of a relocation's streams that take.
async fn unsubscribe(side: &Side, tag: &str) -> Result<()> {
    let prefix = format!("therev_{tag}_");
    let here = "SELECT s.subname FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
                 WHERE starts_with(s.subname, $1) AND d.datname = current_database()";
    for row in side.query(here, &[&prefix]).await? {
        unless_gone(remove_subscription(side, row.get(0)).await)?;
    }
    fail::fail_point!("relocation.unsubscribed");
    Ok(())
}

/// What another worker was quicker to remove is removed: one that slept, or whoever went on for this one.
fn unless_gone(removed: Result<()>) -> Result<()> {
    match removed {
        Err(Error::Sql { source, .. }) if source.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(()),
        removed => removed,
    }
}

async fn remove_subscription(side: &Side, name: &str) -> Result<()> {
    stop_at(side, name).await?;
    // Without its slot's name, dropping it needs no answer from the other server.
    side.batch(&format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)")).await?;
    side.batch(&format!("DROP SUBSCRIPTION {name}")).await
}

async fn remove_slot(side: &Side, name: &str) -> Result<()> {
    let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots
                WHERE slot_name = $1 AND active_pid IS NOT NULL";
    side.query(end, &[&name]).await?;
    let idle = "SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active)";
    side.until("a slot stayed in use", WORKER_WAIT, idle, &[&name]).await?;
    side.query("SELECT pg_drop_replication_slot($1)", &[&name]).await.map(drop)
}

/// Removes the slots and the publications that give.
async fn drop_slots(side: &Side, tag: &str) -> Result<()> {
    let prefix = format!("therev_{tag}_");
    let slots = "SELECT slot_name FROM pg_replication_slots
                  WHERE starts_with(slot_name, $1) AND database = current_database()";
    for row in side.query(slots, &[&prefix]).await? {
        unless_gone(remove_slot(side, row.get(0)).await)?;
    }
    fail::fail_point!("relocation.slots_dropped");
    for row in side.query("SELECT pubname FROM pg_publication WHERE starts_with(pubname, $1)", &[&prefix]).await? {
        unless_gone(side.batch(&format!("DROP PUBLICATION {}", row.get::<_, &str>(0))).await)?;
    }
    Ok(())
}

/// Removes the streams between two sides: first what takes, on both, for a subscription that is left comes back to its slot
/// as often as it is sent away.
pub(crate) async fn drop_between(source: &Side, target: &Side, tag: &str) -> Result<()> {
    unsubscribe(target, tag).await?;
    unsubscribe(source, tag).await?;
    drop_slots(target, tag).await?;
    drop_slots(source, tag).await
}

/// Removes the streams on both sides.
pub(crate) async fn drop_all(relocation: &Relocation, pair: &Pair) -> Result<()> {
    drop_between(&pair.source, &pair.target, &relocation.tag).await
}
