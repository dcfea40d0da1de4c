//! Failure tests: processes that are killed, and sequences that nobody thought of. And what keeps the sources tidy.

#[path = "runner/cut_connections.rs"]
mod cut_connections;
#[path = "runner/cut_off.rs"]
mod cut_off;
#[path = "runner/cut_off_shards.rs"]
mod cut_off_shards;
#[path = "runner/disk_full.rs"]
mod disk_full;
#[path = "runner/movers_killed.rs"]
mod movers_killed;
#[path = "runner/nemesis.rs"]
mod nemesis;
#[path = "runner/sequences.rs"]
mod sequences;
#[path = "runner/servers_killed.rs"]
mod servers_killed;
#[path = "runner/tidy.rs"]
mod tidy;
#[cfg(target_os = "linux")]
#[path = "runner/wrong_clock.rs"]
mod wrong_clock;
