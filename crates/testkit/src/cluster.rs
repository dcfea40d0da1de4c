//! A cluster of its own for each test: databases copied from a template on the shared servers.

use crate::proxy::Proxy;
use crate::servers::{test_servers, usual_layout};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use therev::{Config, InitPlan, Layout, Therev};
use tokio_postgres::{Client, NoTls};

/// The password of therev's roles on test servers.
pub const PASSWORD: &str = "test";

/// A cluster on databases of its own.
pub struct TestCluster {
    name: String,
    layout: Layout,
    shards: u16,
}

/// Which database of a cluster is on which server: shards go around, control and directory are on the first.
fn parts(shards: u16) -> Vec<(String, usize)> {
    let shards = (0..shards).map(|n| format!("shard_{n}"));
    let all = ["control".to_owned(), "directory".to_owned()].into_iter().chain(shards);
    all.map(|part| (part.clone(), server_of(&part))).collect()
}

/// On which server a database is.
fn server_of(part: &str) -> usize {
    let number = part.strip_prefix("shard_").and_then(|number| number.parse::<usize>().ok());
    number.unwrap_or(0) % test_servers().servers.len()
}

/// The address of a database on one of the shared servers, by the superuser.
fn address(server: &str, database: &str) -> String {
    let mut url = server.rsplit_once('/').map_or(server, |(base, _)| base).to_owned();
    url.push('/');
    url.push_str(database);
    url
}

/// A connection that is driven until its client is dropped.
pub async fn connect(address: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(address, NoTls).await.expect("the test server answers");
    tokio::spawn(connection);
    client
}

impl TestCluster {
    /// A cluster of four shards for what goes in either layout: colocated, unless this run is of the other one.
    pub async fn usual() -> TestCluster {
        TestCluster::new(usual_layout(), 4).await
    }

    /// A colocated cluster of four shards.
    pub async fn colocated() -> TestCluster {
        TestCluster::new(Layout::Colocated, 4).await
    }

    /// Both layouts, one after the other.
    pub const LAYOUTS: [Layout; 2] = [Layout::Colocated, Layout::Split];

    /// A cluster of empty databases.
    pub async fn new(layout: Layout, shards: u16) -> TestCluster {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{}_{number}", std::process::id());
        let template = format!("template_{}_{shards}", layout.name());
        make_template(&template, layout, shards).await;
        let cluster = TestCluster { name, layout, shards };
        for (part, server) in parts(shards) {
            let admin = connect(&test_servers().servers[server]).await;
            let copy = format!("CREATE DATABASE {}_{part} TEMPLATE {template}_{part} OWNER therev_admin", cluster.name);
            admin.batch_execute(&copy).await.expect("a database is copied from its template");
        }
        cluster.readdress().await;
        cluster
    }

    /// Tells the control database the names of the copies.
    async fn readdress(&self) {
        let control = connect(&self.url("control")).await;
        let rename = "UPDATE therev.shards SET database = $1 || '_shard_' || shard";
        control.execute(rename, &[&self.name]).await.expect("the shards are renamed");
        let rename = "UPDATE therev.directories SET database = $1 || '_directory'";
        control.execute(rename, &[&self.name]).await.expect("the directories are renamed");
    }

    /// How its groups lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// How many shards it has.
    pub fn shards(&self) -> u16 {
        self.shards
    }

    /// A superuser's address of one database: `control`, `directory`, `shard_0` and so on. To the guards a stranger.
    pub fn url(&self, part: &str) -> String {
        address(&test_servers().servers[server_of(part)], &format!("{}_{part}", self.name))
    }

    /// An empty database that the cluster does not know, with a superuser's address; `finish` drops it.
    pub async fn empty_database(&self, part: &str) -> String {
        let admin = connect(&test_servers().servers[server_of(part)]).await;
        let make = format!("CREATE DATABASE {}_{part}", self.name);
        admin.batch_execute(&make).await.expect("an empty database is made");
        self.url(part)
    }

    /// A superuser's connection to one database.
    pub async fn stranger(&self, part: &str) -> Client {
        connect(&self.url(part)).await
    }

    /// Puts a proxy in front of a shard: nodes that connect from now on go through it, for as long as it lives.
    pub async fn proxy(&self, shard: u16) -> Proxy {
        let address: tokio_postgres::Config = self.url(&format!("shard_{shard}")).parse().expect("an address");
        let proxy = Proxy::start(address.get_ports()[0]).await.expect("a free port");
        let control = connect(&self.url("control")).await;
        let readdress = "UPDATE therev.shards SET hosts = $1 WHERE shard = $2";
        let hosts = format!("127.0.0.1:{}", proxy.port());
        control.execute(readdress, &[&hosts, &shard.cast_signed()]).await.expect("the shard is readdressed");
        proxy
    }

    /// Waits until the directory's replica has everything that its writer has now.
    pub async fn replica_caught_up(&self) {
        let position = "SELECT pg_current_wal_flush_lsn()::text";
        let row = self.stranger("directory").await.query_one(position, &[]).await.expect("the writer answers");
        let replica = connect(&test_servers().replica).await;
        let reached = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
        let wait = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            loop {
                ticks.tick().await;
                let there = replica.query_one(reached, &[&row.get::<_, &str>(0)]).await.expect("the replica answers");
                if there.get(0) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the replica catches up");
    }

    /// What a node is given to find this cluster: nothing runs in the background, claims settle at once.
    pub fn config(&self) -> Config {
        let address = self.url("control");
        let (_, host) = address.rsplit_once('@').expect("an address with a role");
        Config {
            relay_ms: 0,
            claim_timeout_s: 0,
            delivery_ms: 2_000,
            password: Some(PASSWORD.into()),
            pool_size: Some(8),
            // A machine that is busy with tests is slow, not down.
            connect_timeout_ms: 10_000,
            ..Config::new(format!("postgresql://therev@{host}"))
        }
    }

    /// A node of it.
    pub async fn node(&self) -> Therev {
        therev::connect(self.config()).await.expect("the cluster answers")
    }

    /// What every test ends with: the relay has run, `check` is clean, and the databases are gone.
    pub async fn finish(self) {
        self.prove().await;
        for server in &test_servers().servers {
            let admin = connect(server).await;
            let mine = "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1 || '_')";
            for row in admin.query(mine, &[&self.name]).await.expect("the catalog answers") {
                let drop = format!("DROP DATABASE {} WITH (FORCE)", row.get::<_, &str>(0));
                admin.batch_execute(&drop).await.expect("a test's database is dropped");
            }
        }
    }

    /// The relay runs, then `check` must be clean.
    pub async fn prove(&self) {
        let node = self.node().await;
        let relayed = node.relay_once().await.expect("the relay runs");
        assert_eq!(relayed.waiting, 0, "nothing waits: {relayed:?}");
        let report = node.check().await.expect("check runs");
        assert!(
            report.ok,
            "check found something: {:#?}",
            report.checks.iter().filter(|c| c.wrong > 0).collect::<Vec<_>>()
        );
    }
}

/// Makes the databases that tests copy, once per run of the test servers; other test processes wait for it.
async fn make_template(template: &str, layout: Layout, shards: u16) {
    let servers = &test_servers().servers;
    let guard = connect(&servers[0]).await;
    guard.execute("SELECT pg_advisory_lock(hashtext($1))", &[&"templates"]).await.expect("the lock is free one day");
    let made = "SELECT FROM pg_database WHERE datname = $1 AND datistemplate";
    let name = format!("{template}_control");
    if guard.query_opt(made, &[&name]).await.expect("the catalog answers").is_some() {
        return;
    }
    let mut clients = Vec::new();
    for (part, server) in parts(shards) {
        let admin = connect(&servers[server]).await;
        let database = format!("{template}_{part}");
        let again = format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)");
        admin.batch_execute(&again).await.expect("what a killed run left is dropped");
        let make = format!("CREATE DATABASE {database}");
        admin.batch_execute(&make).await.expect("a template is made");
        clients.push((admin, part, database));
    }
    let at = |part: &str| {
        let all = parts(shards);
        let (_, server) = all.iter().find(|(name, _)| name == part).expect("a part of the cluster");
        address(&servers[*server], &format!("{template}_{part}"))
    };
    let plan = InitPlan {
        control: at("control"),
        directory: at("directory"),
        replicas: vec![address(&test_servers().replica, &format!("{template}_directory"))],
        shards: (0..shards).map(|n| at(&format!("shard_{n}"))).collect(),
        layout,
        password: PASSWORD.into(),
        admin_password: PASSWORD.into(),
        mover_password: PASSWORD.into(),
    };
    therev::init(&plan).await.expect("the template is initialized");
    // One month more than must be there: the month may turn while tests run.
    for shard in &plan.shards {
        let months = "SET ROLE therev_admin; SELECT therev.make_partitions(4)";
        connect(shard).await.batch_execute(months).await.expect("there are partitions for the months to come");
    }
    // The control database last: its mark says that all are whole.
    clients.reverse();
    for (admin, _, database) in clients {
        let close = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}' AND pid <> pg_backend_pid();
             ALTER DATABASE {database} IS_TEMPLATE true"
        );
        admin.batch_execute(&close).await.expect("a template is marked");
    }
}
