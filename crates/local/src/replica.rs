//! Streaming standbys and replicas: copied, started, and made anew when they cannot catch up; a standby's promotion.

use std::fs;
use std::time::Duration;

use crate::account::remove;
use crate::process::wait_for;
use crate::server::Server;
use crate::side_by_side::{Tell, tell};
use crate::{Error, ServerId, sql};

/// How long a replica may take until it receives, or comes further in what it has.
const STREAM_WAIT: Duration = Duration::from_secs(20);
/// How long a standby that runs may take to be back at its primary.
const FOLLOW_WAIT: Duration = Duration::from_secs(5);
/// How long a standby may take to become the primary.
const PROMOTION_WAIT: Duration = Duration::from_secs(60);

/// The replication slot of a replica: keeps on the primary what the replica has not received.
pub(crate) fn slot(replica: ServerId) -> String {
    replica.file_name().replace('-', "_")
}

/// How the replica reaches the primary. The password has no character that would need quoting.
pub(crate) fn conninfo(replica: &Server<'_>, source: ServerId) -> Result<String, Error> {
    let state = &replica.cluster.state;
    Ok(format!(
        "host=127.0.0.1 port={} user={} password={} application_name={} sslmode=disable gssencmode=disable",
        replica.cluster.port(source)?,
        state.superuser,
        state.password,
        slot(replica.id),
    ))
}

/// Brings about that the replica runs and receives, whatever it was before: a primary whose place was taken, too.
pub(crate) fn raise(replica: &Server<'_>, to: &Tell) -> Result<(), Error> {
    let slot = slot(replica.id);
    let Some(source) = replica.cluster.state.source(replica.id) else { return Ok(()) };
    if replica.data().exists() {
        let follows = replica.data().join(STANDBY_SIGNAL).exists();
        // Asked whatever it was: nothing is removed here while there is nobody to copy from.
        let is_usable = slot_is_usable(replica, source, &slot)?;
        if follows && is_usable && replica.start(to).is_ok() && receives(replica) {
            return Ok(());
        }
        tell(to, replica.id, "too far behind or broken, making it anew");
        replica.running().stop()?;
        remove(&replica.data())?;
    }
    copy(replica, source, &slot, to)?;
    replica.start(to)?;
    if receives(replica) {
        return Ok(());
    }
    Err(Error::NotStreaming { server: replica.id, source_server: source, log: replica.log() })
}

/// Removes a replica that is no longer wanted, with its slot.
pub(crate) fn dismiss(replica: &Server<'_>, to: &Tell) -> Result<(), Error> {
    tell(to, replica.id, "no longer wanted, removing it");
    replica.running().stop()?;
    remove(&replica.data())?;
    match replica.cluster.state.source(replica.id) {
        Some(source) => sql::run(replica.cluster, source, &drop_slot(&slot(replica.id), "true")).map(drop),
        None => Ok(()),
    }
}

/// Makes a standby the primary, if it is not yet: it takes writes when this returns.
pub(crate) fn promote(standby: &Server<'_>, to: &Tell) -> Result<(), Error> {
    if !standby.data().join(STANDBY_SIGNAL).exists() {
        return Ok(());
    }
    tell(to, standby.id, "promoting");
    let seconds = PROMOTION_WAIT.as_secs();
    let promoted = sql::run(standby.cluster, standby.id, &format!("SELECT pg_promote(true, {seconds})"))?;
    let writes = "SELECT NOT pg_is_in_recovery()";
    if promoted == "t" || sql::run(standby.cluster, standby.id, writes)? == "t" {
        return Ok(());
    }
    Err(Error::NotPromoted { server: standby.id, log: standby.log() })
}

/// Which of these standbys receive what their primary writes; `None`: it does not answer.
pub(crate) fn following(primary: &Server<'_>, standbys: &[ServerId]) -> Option<Vec<ServerId>> {
    let sql = "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'";
    let ask = || sql::run(primary.cluster, primary.id, sql).ok();
    let of = |names: String| -> Vec<ServerId> {
        standbys.iter().copied().filter(|it| names.lines().any(|name| name == slot(*it))).collect()
    };
    let mut following = of(ask()?);
    // One that has just lost its connection comes back at once.
    wait_for(FOLLOW_WAIT, || {
        following = ask().map(of).unwrap_or_default();
        !following.is_empty()
    });
    Some(following)
}

/// When the last commit of its primary's was made that a standby has replayed, by the primary's clock; `None`: none since it started.
pub(crate) fn last_commit(standby: &Server<'_>) -> Option<String> {
    let at = "SELECT date_trunc('milliseconds', pg_last_xact_replay_timestamp())";
    sql::run(standby.cluster, standby.id, at).ok().filter(|at| !at.is_empty())
}

/// How far a standby has come, as a number that grows.
pub(crate) fn received(standby: &Server<'_>) -> Option<u64> {
    let sql = "SELECT pg_wal_lsn_diff(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0')";
    sql::run(standby.cluster, standby.id, sql).ok()?.parse().ok()
}

/// What makes a server a standby when it starts.
pub(crate) const STANDBY_SIGNAL: &str = "standby.signal";

fn slot_is_usable(replica: &Server<'_>, source: ServerId, slot: &str) -> Result<bool, Error> {
    let usable =
        format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}' AND wal_status <> 'lost'");
    Ok(sql::run(replica.cluster, source, &usable)? == "1")
}

fn copy(replica: &Server<'_>, source: ServerId, slot: &str, to: &Tell) -> Result<(), Error> {
    tell(to, replica.id, &format!("copying {source}"));
    let new = replica.data().with_extension("new");
    remove(&new)?;
    let make_slot = format!(
        "{}SELECT pg_create_physical_replication_slot('{slot}', true) \
         WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{slot}');\n",
        drop_slot(slot, "wal_status = 'lost'")
    );
    sql::run(replica.cluster, source, &make_slot)?;
    let mut pg_basebackup = replica.tool("pg_basebackup");
    pg_basebackup.args(["-X", "stream", "--checkpoint=fast", "-w", "-S", slot, "-h", "127.0.0.1"]);
    pg_basebackup.args(["-p", &replica.cluster.port(source)?.to_string(), "-U", &replica.cluster.state.superuser]);
    pg_basebackup.env("PGPASSWORD", &replica.cluster.state.password).arg("-D").arg(&new);
    if !replica.cluster.state.durable {
        pg_basebackup.arg("--no-sync");
    }
    replica.run("pg_basebackup", pg_basebackup)?;
    // Its settings are its own: where to receive from is in `therev.conf`, written at each start.
    replica.cluster.account.write(&new.join(STANDBY_SIGNAL), "")?;
    fs::rename(&new, replica.data()).map_err(Error::file("rename", &new))
}

/// Drops the slot where the condition holds, after ending what is left of a replica that used it.
fn drop_slot(slot: &str, condition: &str) -> String {
    let slots = format!("FROM pg_replication_slots WHERE slot_name = '{slot}' AND {condition}");
    format!(
        "SELECT pg_terminate_backend(active_pid, 5000) {slots} AND active;\n\
         SELECT pg_drop_replication_slot(slot_name) {slots};\n"
    )
}

/// Waits until the replica receives what the primary writes. It does not while it replays what it has received before, which may
/// take however long.
fn receives(replica: &Server<'_>) -> bool {
    let streaming = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
    let is_streaming = || sql::run(replica.cluster, replica.id, streaming).is_ok_and(|it| it == "1");
    loop {
        let before = replayed(replica);
        if wait_for(STREAM_WAIT, is_streaming) {
            return true;
        }
        if replayed(replica) <= before {
            return false;
        }
    }
}

/// Up to where a replica has replayed, as a number that grows.
fn replayed(replica: &Server<'_>) -> Option<u64> {
    let sql = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')";
    sql::run(replica.cluster, replica.id, sql).ok()?.parse().ok()
}
