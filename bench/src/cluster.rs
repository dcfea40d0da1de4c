//! Servers of the benchmark, and fresh databases for each run.

use crate::Anyhow;
use local::{Cluster, Options};
use std::path::Path;
use therev::{Config, InitPlan, Layout};
use tokio_postgres::{Client, NoTls};

const SHARDS: u16 = 4;

/// Four servers.
pub(crate) struct Servers {
    cluster: Cluster,
}

/// One run's databases, one on each server and two more on the first.
pub(crate) struct Databases {
    run: u32,
    /// Server addresses up to the database's name.
    servers: Vec<String>,
}

impl Servers {
    pub(crate) fn start(folder: &Path) -> Anyhow<Servers> {
        let mut options = Options::new(folder.to_owned());
        options.shards = SHARDS;
        options.replicas = 0;
        options.durable = true;
        Ok(Servers { cluster: Cluster::up(&options, &mut |line| eprintln!("{line}"))? })
    }

    pub(crate) fn remove(self) -> Anyhow<()> {
        self.cluster.destroy(&mut |line| eprintln!("{line}"))?;
        Ok(())
    }

    /// A cluster of empty databases.
    pub(crate) async fn databases(&self, run: u32) -> Anyhow<Databases> {
        let base = |url: String| url.rsplit_once('/').map_or(url.clone(), |(base, _)| base.to_owned());
        let servers: Vec<String> = self.cluster.shard_urls().into_iter().map(base).collect();
        let databases = Databases { run, servers };
        for (server, name) in databases.names() {
            let client = databases.connect(server, "postgres").await?;
            client.batch_execute(&format!("CREATE DATABASE {name}")).await?;
        }
        let plan = InitPlan {
            control: databases.control(),
            directory: databases.url(0, "directory"),
            replicas: Vec::new(),
            shards: (0..usize::from(SHARDS)).map(|n| databases.url(n, "shard")).collect(),
            layout: Layout::Colocated,
            password: "bench".into(),
            admin_password: "bench".into(),
        };
        therev::init(&plan).await?;
        Ok(databases)
    }
}

impl Databases {
    fn names(&self) -> Vec<(usize, String)> {
        let shards = (0..usize::from(SHARDS)).map(|n| (n, format!("shard_{}", self.run)));
        [(0, format!("control_{}", self.run)), (0, format!("directory_{}", self.run))]
            .into_iter()
            .chain(shards)
            .collect()
    }

    fn url(&self, server: usize, part: &str) -> String {
        format!("{}/{part}_{}", self.servers[server], self.run)
    }

    pub(crate) fn control(&self) -> String {
        self.url(0, "control")
    }

    pub(crate) fn config(&self) -> Config {
        Config { relay_ms: 0, ..Config::new(self.control()) }
    }

    /// Connections to the databases that hold rows: each shard, and the directory last.
    pub(crate) async fn with_rows(&self) -> Anyhow<Vec<Client>> {
        let mut clients = Vec::new();
        for server in 0..usize::from(SHARDS) {
            clients.push(self.connect(server, &format!("shard_{}", self.run)).await?);
        }
        clients.push(self.connect(0, &format!("directory_{}", self.run)).await?);
        Ok(clients)
    }

    async fn connect(&self, server: usize, database: &str) -> Anyhow<Client> {
        let (client, connection) =
            tokio_postgres::connect(&format!("{}/{database}", self.servers[server]), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    pub(crate) async fn remove(self) -> Anyhow<()> {
        for (server, name) in self.names() {
            let client = self.connect(server, "postgres").await?;
            client.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await?;
        }
        Ok(())
    }
}
