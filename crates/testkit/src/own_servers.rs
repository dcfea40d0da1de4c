//! Servers of a test's own, for it breaks them.

use crate::cluster::PASSWORD;
use crate::servers::test_servers;
use std::os::unix::fs::PermissionsExt;
use therev::{Config, InitPlan, Layout};

/// A cluster, each shard with a server of its own and so many standbys; shard 0's server also has the control database
/// and the directory.
pub struct OwnServers {
    cluster: Option<local::Cluster>,
    _folder: tempfile::TempDir,
}

impl OwnServers {
    /// Starts them, and makes the cluster. Where there are standbys, commits wait for one.
    pub async fn up(shards: u16, standbys: u16) -> OwnServers {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("its mode");
        let options = local::Options {
            shards,
            standbys,
            replicas: 0,
            synchronous: standbys > 0,
            pg_bin: Some(test_servers().pg_bin.clone()),
            durable: false,
            ..local::Options::new(folder.path().join("cluster"))
        };
        let cluster = local::Cluster::up(&options, &mut |_| {}).expect("the servers start");
        let plan = InitPlan {
            control: cluster.control_url().expect("an address"),
            directory: cluster.directory_url().expect("an address"),
            replicas: Vec::new(),
            shards: cluster.shard_urls(),
            layout: Layout::Colocated,
            password: PASSWORD.into(),
            admin_password: PASSWORD.into(),
            mover_password: PASSWORD.into(),
        };
        therev::init(&plan).await.expect("the cluster is made");
        OwnServers { cluster: Some(cluster), _folder: folder }
    }

    /// The servers.
    pub fn servers(&mut self) -> &mut local::Cluster {
        self.cluster.as_mut().expect("they are there until the end")
    }

    /// A superuser's addresses of the shards.
    pub fn shards(&mut self) -> Vec<String> {
        self.servers().shard_urls()
    }

    /// How a node finds them; its relay runs.
    pub fn config(&mut self) -> Config {
        let control = self.servers().control_url().expect("an address");
        let (_, place) = control.rsplit_once('@').expect("an address with a role");
        Config {
            password: Some(PASSWORD.into()),
            relay_ms: 100,
            breaker_ms: 100,
            ..Config::new(format!("postgresql://therev@{place}"))
        }
    }
}

impl Drop for OwnServers {
    fn drop(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.destroy(&mut |_| {}).expect("the servers are removed");
        }
    }
}
