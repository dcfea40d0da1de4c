//! Streaming replicas of shard 0's server: copied, started, and made anew when they cannot catch up.

use std::fs;
use std::time::Duration;

use crate::account::remove;
use crate::process::wait_for;
use crate::server::Server;
use crate::side_by_side::{Tell, tell};
use crate::{Error, ServerId, sql};

/// The server that replicas receive from.
const PRIMARY: ServerId = ServerId::Shard(0);
/// How long a replica may take from its start until it receives.
const STREAM_WAIT: Duration = Duration::from_secs(20);

/// The replication slot of a replica: keeps on the primary what the replica has not received.
pub(crate) fn slot(replica: ServerId) -> String {
    replica.file_name().replace('-', "_")
}

/// How the replica reaches the primary. The password has no character that would need quoting.
pub(crate) fn conninfo(replica: &Server<'_>) -> Result<String, Error> {
    let state = &replica.cluster.state;
    Ok(format!(
        "host=127.0.0.1 port={} user={} password={} application_name={} sslmode=disable gssencmode=disable",
        replica.cluster.port(PRIMARY)?,
        state.superuser,
        state.password,
        slot(replica.id),
    ))
}

/// Brings about that the replica runs and receives, whatever it was before.
pub(crate) fn raise(replica: &Server<'_>, to: &Tell) -> Result<(), Error> {
    let slot = slot(replica.id);
    if replica.data().exists() {
        if slot_is_usable(replica, &slot)? && replica.start(to).is_ok() && receives(replica) {
            return Ok(());
        }
        tell(to, replica.id, "too far behind or broken, making it anew");
        replica.running().stop()?;
        remove(&replica.data())?;
    }
    copy(replica, &slot, to)?;
    replica.start(to)?;
    if receives(replica) { Ok(()) } else { Err(Error::NotStreaming { server: replica.id, log: replica.log() }) }
}

/// Removes a replica that is no longer wanted, with its slot.
pub(crate) fn dismiss(replica: &Server<'_>, to: &Tell) -> Result<(), Error> {
    tell(to, replica.id, "no longer wanted, removing it");
    replica.running().stop()?;
    remove(&replica.data())?;
    sql::run(replica.cluster, PRIMARY, &drop_slot(&slot(replica.id), "true")).map(drop)
}

fn slot_is_usable(replica: &Server<'_>, slot: &str) -> Result<bool, Error> {
    let usable =
        format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}' AND wal_status <> 'lost'");
    Ok(sql::run(replica.cluster, PRIMARY, &usable)? == "1")
}

fn copy(replica: &Server<'_>, slot: &str, to: &Tell) -> Result<(), Error> {
    tell(to, replica.id, "copying shard 0");
    let new = replica.data().with_extension("new");
    remove(&new)?;
    let make_slot = format!(
        "{}SELECT pg_create_physical_replication_slot('{slot}', true) \
         WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{slot}');\n",
        drop_slot(slot, "wal_status = 'lost'")
    );
    sql::run(replica.cluster, PRIMARY, &make_slot)?;
    let mut pg_basebackup = replica.tool("pg_basebackup");
    pg_basebackup.args(["-X", "stream", "--checkpoint=fast", "-w", "-S", slot, "-h", "127.0.0.1"]);
    pg_basebackup.args(["-p", &replica.cluster.port(PRIMARY)?.to_string(), "-U", &replica.cluster.state.superuser]);
    pg_basebackup.env("PGPASSWORD", &replica.cluster.state.password).arg("-D").arg(&new);
    if !replica.cluster.state.durable {
        pg_basebackup.arg("--no-sync");
    }
    replica.run("pg_basebackup", pg_basebackup)?;
    // Its settings are its own: where to receive from is in `therev.conf`, written at each start.
    replica.cluster.account.write(&new.join("standby.signal"), "")?;
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

/// Waits until the replica receives what the primary writes.
fn receives(replica: &Server<'_>) -> bool {
    let streaming = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
    wait_for(STREAM_WAIT, || sql::run(replica.cluster, replica.id, streaming).is_ok_and(|it| it == "1"))
}
