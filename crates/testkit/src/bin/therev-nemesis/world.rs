//! The cluster that is tormented: servers of its own, a proxy in front of each, users and threads.

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use local::{Cluster, Options, ServerId};
use testkit::{Disk, Proxy, connect};
use therev::{Actor, InitPlan, Layout, NewThread, NewUser, Therev, UserId};

use crate::writer::{self, History, Kind, Spec};

/// How many shards there are, each with a server of its own.
pub(crate) const SHARDS: u16 = 3;
/// The shard whose posts are on a disk that can be filled; not the first, which has all the other databases.
pub(crate) const DISK_SHARD: u16 = 1;
/// The writers. Each has a user on each shard.
const WRITERS: [Kind; 5] = [Kind::Library, Kind::Library, Kind::Stale, Kind::Stranger, Kind::Intruder];
/// How many move their users meanwhile: they compete for the work.
pub(crate) const MOVERS: usize = 2;
const PASSWORD: &str = "nemesis";
/// How long a server may take to say something of users who wait.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How much of a log is told.
const LOG_LINES: usize = 20;

/// What is asked about users of a shard: who owns them, and who is at work or waits there.
const OF_SHARD: &[&str] = &[
    "SELECT row_to_json(o)::text FROM therev.ownership AS o
      WHERE o.bucket IN (SELECT therev.bucket_of(u::uuid) FROM unnest($1::text[]) AS u)",
    "SELECT row_to_json(p)::text FROM therev.pins AS p WHERE p.user_id::text = ANY ($1)",
    "SELECT format('%s %s %s %s/%s %s: %s', a.pid, a.application_name, a.state, a.wait_event_type, a.wait_event,
                   now() - a.xact_start, left(a.query, 100))
       FROM pg_stat_activity AS a
      WHERE a.state <> 'idle' AND a.pid <> pg_backend_pid() AND $1::text[] IS NOT NULL",
    "SELECT format('%s waits for %s %s, held by %s', l.pid, l.locktype, l.mode, pg_blocking_pids(l.pid))
       FROM pg_locks AS l WHERE NOT l.granted AND $1::text[] IS NOT NULL",
    "SELECT format('prepared: %s %s', x.gid, now() - x.prepared) FROM pg_prepared_xacts AS x WHERE $1::text[] IS NOT NULL",
];
/// And of the control database: which relocations are under way.
const OF_CONTROL: &[&str] =
    &["SELECT (to_jsonb(r) - '{groups,buckets,apart}'::text[])::text FROM therev.relocations AS r
      WHERE r.ended_at IS NULL AND $1::text[] IS NOT NULL"];

/// Everything that was started. Dropped without [`World::clear`], it is cleared as well as can be.
pub(crate) struct World {
    folder: Option<tempfile::TempDir>,
    pub(crate) cluster: Option<Cluster>,
    /// In front of the control database alone, though it is on the first shard's server.
    pub(crate) control: Proxy,
    /// The same in front of the directory.
    pub(crate) directory: Proxy,
    /// In front of each shard's server.
    pub(crate) servers: Vec<Proxy>,
    /// Absent where nothing can be mounted, and why.
    pub(crate) disk: Result<Disk, String>,
    /// One for each writer, in the order of `WRITERS`, then one for each mover.
    pub(crate) specs: Vec<Spec>,
}

impl World {
    /// Starts servers and makes a cluster on them, which knows itself by the addresses of the proxies only.
    pub(crate) async fn make(pg_bin: Option<PathBuf>) -> Result<World, Box<dyn Error>> {
        let folder = tempfile::Builder::new().prefix("therev-nemesis-").tempdir()?;
        // The servers run as another account when this is root.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let mut world = World {
            control: Proxy::start(0).await?,
            directory: Proxy::start(0).await?,
            servers: Vec::new(),
            disk: Err("it was not tried".into()),
            specs: Vec::new(),
            cluster: None,
            folder: Some(folder),
        };
        let options = Options { shards: SHARDS, replicas: 0, pg_bin, ..Options::new(world.dir()) };
        let options = Options { standbys: 1, synchronous: true, ..options };
        #[expect(clippy::disallowed_methods, reason = "this is a program, whose environment says where to look")]
        let options = Options { search_path: std::env::var_os("PATH"), ..options };
        world.cluster = Some(tokio::task::block_in_place(|| Cluster::up(&options, &mut |_| {}))?);
        for _ in 0..SHARDS {
            world.servers.push(Proxy::start(0).await?);
        }
        world.lead_proxies()?;
        world.init().await?;
        world.disk = world.lay_on_disk().await.map_err(|error| error.to_string());
        world.specs = world.populate().await?;
        Ok(world)
    }

    fn dir(&self) -> PathBuf {
        self.path().join("cluster")
    }

    /// The folder in which everything is.
    pub(crate) fn path(&self) -> &Path {
        self.folder.as_ref().map_or(Path::new("/nowhere"), tempfile::TempDir::path)
    }

    pub(crate) fn cluster(&self) -> Result<&Cluster, &'static str> {
        self.cluster.as_ref().ok_or("the cluster is gone")
    }

    /// Leads each proxy to where its server is now.
    pub(crate) fn lead_proxies(&self) -> Result<(), Box<dyn Error>> {
        for status in self.cluster()?.status() {
            let (ServerId::Shard(number) | ServerId::Standby(number, _)) = status.server else { continue };
            if status.follows.is_some() {
                continue;
            }
            self.servers[usize::from(number)].lead_to(status.port);
            if number == 0 {
                self.control.lead_to(status.port);
                self.directory.lead_to(status.port);
            }
        }
        Ok(())
    }

    /// A superuser's address of a database, through a proxy.
    fn through(&self, proxy: &Proxy, database: &str) -> Result<String, Box<dyn Error>> {
        let (user, password) = self.cluster()?.superuser();
        Ok(format!("postgresql://{user}:{password}@127.0.0.1:{}/{database}", proxy.port()))
    }

    fn shard_urls(&self) -> Result<Vec<String>, Box<dyn Error>> {
        let numbered = self.servers.iter().enumerate();
        numbered.map(|(number, proxy)| self.through(proxy, &format!("therev_shard_{number}"))).collect()
    }

    async fn init(&self) -> Result<(), Box<dyn Error>> {
        let plan = InitPlan {
            control: self.through(&self.control, "therev_control")?,
            directory: self.through(&self.directory, "therev_directory")?,
            replicas: Vec::new(),
            shards: self.shard_urls()?,
            layout: Layout::Colocated,
            password: PASSWORD.into(),
            admin_password: PASSWORD.into(),
            mover_password: PASSWORD.into(),
        };
        therev::init(&plan).await?;
        Ok(())
    }

    /// Puts one shard's posts on a disk of their own. Not its log: a server whose log finds no room ends.
    async fn lay_on_disk(&self) -> Result<Disk, Box<dyn Error>> {
        let server = ServerId::Shard(DISK_SHARD);
        let cluster = self.cluster()?;
        // It would lay its copy at the same path.
        cluster.stop_server(ServerId::Standby(DISK_SHARD, 1))?;
        let data = cluster.status().into_iter().find(|it| it.server == server).ok_or("there is no such server")?.data;
        let disk = Disk::mount(&self.path().join("disk"), &data)?;
        let shard = connect(&cluster.shard_url(DISK_SHARD)?).await;
        disk.take_table(&shard, "posts").await?;
        Ok(disk)
    }

    /// A user of each writer on each shard, a thread on each shard, and who writes where.
    async fn populate(&self) -> Result<Vec<Spec>, Box<dyn Error>> {
        let node = self.node().await?;
        let mut threads = Vec::new();
        for shard in 0..usize::from(SHARDS) {
            let author = register(&node, shard, &format!("author-{shard}")).await?;
            let thread = node.create_thread(NewThread::new(author, format!("Thread {shard}"), "Numbers.")).await?;
            threads.push((author, thread.thread_id));
        }
        let mut specs = Vec::new();
        for (number, kind) in WRITERS.into_iter().enumerate() {
            let mut histories = Vec::new();
            for shard in 0..usize::from(SHARDS) {
                let user = register(&node, shard, &format!("writer-{number}-{shard}")).await?;
                // To the thread on the same shard and to those on others, one writer after the other.
                let (thread_author, thread) = threads[(shard + number) % threads.len()];
                histories.push(History { user, thread, thread_author, shard });
            }
            specs.push(self.spec(kind, &format!("writer-{number}"), histories)?);
        }
        let all: Vec<History> = specs.iter().flat_map(|spec| spec.histories.clone()).collect();
        for number in 0..MOVERS {
            specs.push(self.spec(Kind::Mover, &format!("mover-{number}"), all.clone())?);
        }
        Ok(specs)
    }

    fn spec(&self, kind: Kind, name: &str, histories: Vec<History>) -> Result<Spec, Box<dyn Error>> {
        Ok(Spec {
            kind,
            histories,
            journal: self.path().join(format!("{name}.journal")),
            state_file: self.path().join(format!("{name}.placement.json")),
            control: self.control_address(),
            password: PASSWORD.into(),
            shards: self.shard_urls()?,
        })
    }

    fn control_address(&self) -> String {
        format!("postgresql://therev@127.0.0.1:{}/therev_control", self.control.port())
    }

    /// A node of this program: it relays only when it is told to.
    pub(crate) async fn node(&self) -> therev::Result<Therev> {
        let config = writer::config(&self.control_address(), PASSWORD);
        therev::connect(therev::Config { relay_ms: 0, claim_timeout_s: 0, ..config }).await
    }

    /// What autovacuum does on servers that live longer: a crash takes the counters away that it decides by.
    pub(crate) async fn vacuum(&self) -> Result<(), Box<dyn Error>> {
        let cluster = self.cluster()?;
        let mut databases = vec![cluster.control_url()?, cluster.directory_url()?];
        for shard in 0..SHARDS {
            databases.push(cluster.shard_url(shard)?);
        }
        for database in databases {
            connect(&database).await.batch_execute("VACUUM (ANALYZE)").await?;
        }
        Ok(())
    }

    /// Starts the servers that do not run: a fault that could not be ended has left them so.
    pub(crate) fn raise(&mut self) -> Result<(), Box<dyn Error>> {
        let cluster = self.cluster.as_mut().ok_or("the cluster is gone")?;
        for shard in 0..SHARDS {
            let primary = cluster.primary(shard);
            tokio::task::block_in_place(|| cluster.start_server(primary, &mut |_| {}))?;
        }
        self.lead_proxies()
    }

    /// The last lines of each shard's primary.
    pub(crate) fn tell_logs(&self) {
        let Some(cluster) = &self.cluster else { return };
        for shard in 0..SHARDS {
            let log = cluster.logs(cluster.primary(shard)).map(fs::read);
            let text = log.ok().and_then(Result::ok).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            lines
                .iter()
                .skip(lines.len().saturating_sub(LOG_LINES))
                .for_each(|line| eprintln!("shard {shard}: {line}"));
        }
    }

    /// What the servers say of users whose histories do not go on, told at once, since they are removed in the end.
    pub(crate) async fn tell_of(&self, users: &[UserId]) -> Result<(), Box<dyn Error>> {
        let cluster = self.cluster()?;
        let ids: Vec<String> = users.iter().map(ToString::to_string).collect();
        let mut databases = vec![("control".to_owned(), cluster.control_url()?, OF_CONTROL)];
        for shard in 0..SHARDS {
            databases.push((format!("shard {shard}"), cluster.shard_url(shard)?, OF_SHARD));
        }
        for (name, url, looks) in databases {
            // One that is down, or says nothing, says just that.
            let said = async {
                let client = writer::connect_to(&url).await?;
                for look in looks {
                    for row in client.query(*look, &[&ids]).await? {
                        eprintln!("{name}: {}", row.get::<_, String>(0));
                    }
                }
                Ok::<_, tokio_postgres::Error>(())
            };
            match tokio::time::timeout(ANSWERS_WITHIN, said).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("{name}: {error}"),
                Err(_) => eprintln!("{name}: no answer within {ANSWERS_WITHIN:?}"),
            }
        }
        Ok(())
    }

    /// Removes everything, and says what is left over.
    pub(crate) fn clear(mut self) -> Vec<String> {
        self.clear_up()
    }

    fn clear_up(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        let path = self.path().to_owned();
        tokio::task::block_in_place(|| {
            let cluster = self.cluster.take();
            if let Some(cluster) = &cluster
                && let Err(error) = cluster.down(&mut |_| {})
            {
                left.push(format!("servers: {error}"));
            }
            // Before its folder is removed, which a mount would not let go.
            self.disk = Err("it is gone".into());
            if let Some(cluster) = cluster
                && let Err(error) = cluster.destroy(&mut |_| {})
            {
                left.push(format!("the cluster: {error}"));
            }
            if let Some(folder) = self.folder.take()
                && let Err(error) = folder.close()
            {
                left.push(format!("{}: {error}", path.display()));
            }
        });
        if path.exists() {
            left.push(format!("the folder {}", path.display()));
        }
        left.extend(processes_of(&path));
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        left.extend(
            mounts.lines().filter(|line| line.contains(&*path.to_string_lossy())).map(|it| format!("mount {it}")),
        );
        left
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.folder.is_some() {
            for left in self.clear_up() {
                eprintln!("therev-nemesis: left over: {left}");
            }
        }
    }
}

/// Processes whose command names this folder: servers and writers do.
fn processes_of(folder: &Path) -> Vec<String> {
    let folder = folder.to_string_lossy();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let commands = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let commands = commands.map(|raw| String::from_utf8_lossy(&raw).replace('\0', " "));
    commands.filter(|command| command.contains(&*folder)).map(|command| format!("process {command}")).collect()
}

/// A user whose bucket is first placed on this shard.
async fn register(node: &Therev, shard: usize, name: &str) -> therev::Result<UserId> {
    let id = loop {
        let id = UserId::new();
        if usize::from(id.bucket().number()) % usize::from(SHARDS) == shard {
            break id;
        }
    };
    let new = NewUser { user_id: Some(id), user_name: name.into(), ..NewUser::default() };
    Ok(node.register(new, &Actor::Operator("nemesis".into())).await?.user_id)
}
