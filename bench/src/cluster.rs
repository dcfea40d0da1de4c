//! Servers of the benchmark, and fresh databases for each ground.

use crate::Anyhow;
use local::{Cluster, Options};
use std::io::Write;
use tempfile::TempDir;
use therev::{Config, InitPlan, Layout};
use tokio_postgres::{Client, NoTls};

/// How many servers there are; shards go around on them.
const SERVERS: u16 = 4;

/// Four servers, and a replica of the first.
pub(crate) struct Servers {
    cluster: Cluster,
    _home: Home,
}

/// A temporary folder with servers in it. They go on by themselves, so that however this ends, it ends them.
struct Home(TempDir);

/// A cluster's databases: shards go around on the servers, control and directory are on the first.
pub(crate) struct Databases {
    name: String,
    shards: u16,
    /// Server addresses up to the database's name; the replica's at the end.
    servers: Vec<String>,
}

impl Servers {
    pub(crate) fn start() -> Anyhow<Servers> {
        let home = Home(tempfile::tempdir()?);
        let mut options = Options::new(home.0.path());
        options.shards = SERVERS;
        options.replicas = 1;
        options.durable = true;
        #[expect(clippy::disallowed_methods, reason = "this is a program, whose environment says where to look")]
        let (named, searched) = (std::env::var_os("THEREV_PG_BIN"), std::env::var_os("PATH"));
        (options.pg_bin, options.search_path) = (named.map(Into::into), searched);
        Ok(Servers { cluster: Cluster::up(&options, &mut tell)?, _home: home })
    }

    /// A cluster of empty databases, of so many shards.
    pub(crate) async fn databases(&self, name: &str, shards: u16) -> Anyhow<Databases> {
        let base = |url: String| url.rsplit_once('/').map_or(url.clone(), |(base, _)| base.to_owned());
        let replicas = self.cluster.directory_replica_urls();
        let servers = self.cluster.shard_urls().into_iter().chain(replicas).map(base).collect();
        let databases = Databases { name: name.to_owned(), shards, servers };
        for (server, database) in databases.all() {
            let client = databases.connect(server, "postgres").await?;
            client.batch_execute(&format!("CREATE DATABASE {database}")).await?;
        }
        let plan = InitPlan {
            control: databases.control(),
            directory: databases.url(0, "directory"),
            replicas: vec![databases.url(usize::from(SERVERS), "directory")],
            shards: (0..shards).map(|n| databases.url(server_of(n), &format!("shard_{n}"))).collect(),
            layout: Layout::Colocated,
            password: "bench".into(),
            admin_password: "bench".into(),
            mover_password: "bench".into(),
        };
        therev::init(&plan).await?;
        Ok(databases)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Before there is a cluster, there is nothing to stop.
        let Ok(cluster) = Cluster::open(self.0.path()) else { return };
        if let Err(error) = cluster.destroy(&mut tell) {
            tell(&format!("The servers in {} could not be removed: {error}", self.0.path().display()));
        }
    }
}

/// A line for who looks on. Where nobody does any more, the servers are removed all the same.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn server_of(shard: u16) -> usize {
    usize::from(shard % SERVERS)
}

impl Databases {
    fn all(&self) -> Vec<(usize, String)> {
        let shards = (0..self.shards).map(|n| (server_of(n), format!("{}_shard_{n}", self.name)));
        let first = ["control", "directory"].map(|part| (0, format!("{}_{part}", self.name)));
        first.into_iter().chain(shards).collect()
    }

    fn url(&self, server: usize, part: &str) -> String {
        format!("{}/{}_{part}", self.servers[server], self.name)
    }

    pub(crate) fn control(&self) -> String {
        self.url(0, "control")
    }

    /// A node that relays nothing by itself, so that nothing else runs while it is measured.
    pub(crate) fn config(&self) -> Config {
        Config { relay_ms: 0, ..Config::new(self.control()) }
    }

    /// A connection to a shard as the library has it: its role, and no compiling of statements.
    pub(crate) async fn bare(&self, shard: u16) -> Anyhow<Client> {
        let client = self.shard(shard).await?;
        client.batch_execute("SET ROLE therev; SET jit = off").await?;
        Ok(client)
    }

    /// A superuser's connection to a shard.
    pub(crate) async fn shard(&self, shard: u16) -> Anyhow<Client> {
        self.connect(server_of(shard), &format!("{}_shard_{shard}", self.name)).await
    }

    /// A superuser's connection to the control database.
    pub(crate) async fn control_client(&self) -> Anyhow<Client> {
        self.connect(0, &format!("{}_control", self.name)).await
    }

    /// Connections to the databases that hold rows: each shard, and the directory last.
    pub(crate) async fn with_rows(&self) -> Anyhow<Vec<Client>> {
        let mut clients = Vec::new();
        for shard in 0..self.shards {
            clients.push(self.shard(shard).await?);
        }
        clients.push(self.connect(0, &format!("{}_directory", self.name)).await?);
        Ok(clients)
    }

    /// Lets the servers write out what they hold, so that what is measured next does not pay for it.
    pub(crate) async fn checkpoint(&self) -> Anyhow<()> {
        for client in self.with_rows().await? {
            client.batch_execute("CHECKPOINT").await?;
        }
        Ok(())
    }

    async fn connect(&self, server: usize, database: &str) -> Anyhow<Client> {
        let (client, connection) =
            tokio_postgres::connect(&format!("{}/{database}", self.servers[server]), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    pub(crate) async fn remove(self) -> Anyhow<()> {
        for (server, database) in self.all() {
            let client = self.connect(server, "postgres").await?;
            client.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).await?;
        }
        Ok(())
    }
}
