//! Real servers, template databases and workloads for tests.

mod clock;
mod cluster;
mod disk;
mod frozen;
mod moving;
mod own_servers;
mod proxy;
mod servers;

pub use clock::WrongClock;
pub use cluster::{PASSWORD, TestCluster, connect};
pub use disk::Disk;
pub use frozen::Frozen;
pub use moving::{Writing, drive, nothing_left, while_relaying};
pub use own_servers::OwnServers;
pub use proxy::{At, Mode, Proxy};
pub use servers::{TestServers, test_servers};
