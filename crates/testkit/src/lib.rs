//! Real servers, template databases and workloads for tests.

mod cluster;
mod servers;

pub use cluster::{TestCluster, connect};
pub use servers::{TestServers, test_servers};
