//! The servers' settings: `therev.conf`, included by the `postgresql.conf` that `initdb` wrote.

use std::path::Path;

/// What one server's settings depend on.
pub(crate) struct Settings<'a> {
    pub(crate) port: u16,
    pub(crate) sockets: &'a Path,
    /// Shown in front of each process's title, and how a cluster finds its own.
    pub(crate) cluster_name: &'a str,
    pub(crate) durable: bool,
    /// Where a standby or replica receives from, and the slot that keeps what it has not received.
    pub(crate) primary: Option<(String, String)>,
    /// The names of the standbys, one of which must have a commit before it counts.
    pub(crate) waits_for: Vec<String>,
}

/// What a server keeps of its tables in memory, in MB: a 64th of the machine's, for several servers share it, and what they
/// leave to the system serves them as well.
fn shared_buffers() -> u128 {
    let machine = rustix::system::sysinfo();
    let memory = u128::from(machine.totalram) * u128::from(machine.mem_unit);
    (memory >> 26).clamp(64, 512)
}

/// The same on every server. Kept small, for several servers share one machine.
const COMMON: &str = "\
listen_addresses = '127.0.0.1'
password_encryption = 'scram-sha-256'
ssl = off
max_connections = 200
max_worker_processes = 20
max_wal_senders = 20
max_replication_slots = 20
max_logical_replication_workers = 12
max_prepared_transactions = 10
# Rows move between shards by logical replication, which should find its way back at once after a break.
wal_level = logical
wal_retrieve_retry_interval = '100ms'
# A replica that stays away is rebuilt rather than fill the disk with what it misses.
max_slot_wal_keep_size = '2GB'
max_wal_size = '1GB'
checkpoint_timeout = '5min'
hot_standby = on
hot_standby_feedback = on
shared_preload_libraries = 'pg_stat_statements'
# In the server's folder: what a killed server shares otherwise stays in memory when its folder is removed.
dynamic_shared_memory_type = mmap
track_io_timing = on
autovacuum = on
# Short statements by key never gain what compiling them costs.
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = off
log_checkpoints = off
log_line_prefix = '%m [%p] %q%u@%d '
";

/// Servers of a test run: a crash of the machine may lose them, one of a process may not.
const NOT_DURABLE: &str = "\
fsync = off
full_page_writes = off
synchronous_commit = on
";

impl Settings<'_> {
    /// The text of the file.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from("# Written by therev at each start; changes here are lost.\n");
        let mut set = |name: &str, value: &str| {
            text.extend([name, " = '", &value.replace('\'', "''"), "'\n"]);
        };
        set("port", &self.port.to_string());
        // A comma would separate two folders.
        set("unix_socket_directories", &format!("\"{}\"", self.sockets.display()));
        set("cluster_name", self.cluster_name);
        set("shared_buffers", &format!("{}MB", shared_buffers()));
        if let Some((conninfo, slot)) = &self.primary {
            set("primary_conninfo", conninfo);
            set("primary_slot_name", slot);
        }
        if !self.waits_for.is_empty() {
            set("synchronous_standby_names", &format!("ANY 1 ({})", self.waits_for.join(", ")));
        }
        text.push_str(COMMON);
        text.push_str(if self.durable { "fsync = on\n" } else { NOT_DURABLE });
        text
    }
}
