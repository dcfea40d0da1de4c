//! Real servers, template databases and workloads for tests.

mod cluster;
mod servers;

pub use cluster::{PASSWORD, TestCluster, connect};
pub use servers::{TestServers, test_servers};
