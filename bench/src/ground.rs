//! What is measured on: a cluster with a generated community.

use crate::Anyhow;
use crate::cluster::{Databases, Servers};
use therev::Therev;
use therev::generate::{Plan, generate};

/// How many calls are under way at once where throughput is measured.
pub(crate) const WORKERS: usize = 8;

/// A cluster with a community in it.
pub(crate) struct Ground<'a> {
    pub(crate) servers: &'a Servers,
    pub(crate) databases: Databases,
    pub(crate) shards: u16,
    pub(crate) posts: u32,
    /// How often each side is measured.
    pub(crate) runs: usize,
}

impl<'a> Ground<'a> {
    /// A community of so many posts: a hundredth as many users, a twentieth as many threads.
    pub(crate) async fn new(
        servers: &'a Servers,
        name: &str,
        shards: u16,
        posts: u32,
        runs: usize,
    ) -> Anyhow<Ground<'a>> {
        let databases = servers.databases(name, shards).await?;
        let node = therev::connect(databases.config()).await?;
        generate(&node, plan(posts), &mut |_| {}).await?;
        for client in databases.with_rows().await? {
            client.batch_execute("VACUUM (ANALYZE)").await?;
            client.batch_execute("CHECKPOINT").await?;
        }
        Ok(Ground { servers, databases, shards, posts, runs })
    }

    /// A node with so many connections to each database, all of them open.
    pub(crate) async fn node(&self, connections: usize) -> Anyhow<Therev> {
        self.node_of(self.databases.config(), connections).await
    }

    /// The same with a relay, as nodes usually are.
    pub(crate) async fn relaying_node(&self, connections: usize) -> Anyhow<Therev> {
        self.node_of(therev::Config::new(self.databases.control()), connections).await
    }

    async fn node_of(&self, config: therev::Config, connections: usize) -> Anyhow<Therev> {
        let config = therev::Config { pool_size: Some(connections), ..config };
        let node = therev::connect(config).await?;
        let wake = (0..connections).map(|_| node.overview());
        futures_util::future::try_join_all(wake).await?;
        Ok(node)
    }
}

pub(crate) fn plan(posts: u32) -> Plan {
    Plan { users: (posts / 100).max(1), threads: (posts / 20).max(1), posts, seed: 1, zipf: 1.1 }
}

/// A statement of the library by name: without its fence (empty where it cannot be), and with it, as it is asked first.
pub(crate) fn bare_statement(name: &str) -> Anyhow<(String, String)> {
    let all = therev::fenced_statements();
    let (_, statement) =
        all.iter().find(|(known, _)| known.ends_with(name)).ok_or_else(|| format!("there is no statement {name}"))?;
    let fenced = statement.quick().map_or_else(|| statement.sql(), |[quick, _]| quick);
    Ok((statement.bare().unwrap_or_default(), fenced.to_owned()))
}
