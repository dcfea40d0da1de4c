//! Real servers: each test has a cluster of its own and looks afterwards that nothing of it is left.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use local::{Addresses, Cluster, Error, Options, Promoted, ServerId, ServerState};
use rustix::process::{Pid, Signal, kill_process};

/// A folder for one cluster, which is destroyed with it.
struct Ground {
    folder: tempfile::TempDir,
}

impl Ground {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { folder }
    }

    /// A folder that nobody but its owner may enter.
    fn closed() -> Self {
        let ground = Self::new();
        fs::set_permissions(ground.folder.path(), fs::Permissions::from_mode(0o700)).expect("its mode");
        ground
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join(".therev")
    }

    fn options(&self, shards: u16, replicas: u16) -> Options {
        #[expect(clippy::disallowed_methods, reason = "the full tier says in no other way which PostgreSQL to test")]
        let pg_bin = std::env::var_os("THEREV_PG_BIN").map(PathBuf::from);
        Options { shards, replicas, pg_bin, durable: false, ..Options::new(self.dir()) }
    }

    fn up(&self, shards: u16, replicas: u16) -> (Cluster, Vec<String>) {
        let mut said = Vec::new();
        let cluster = Cluster::up(&self.options(shards, replicas), &mut |line| said.push(line.to_owned()))
            .unwrap_or_else(|error| panic!("up: {error}\n{said:#?}"));
        (cluster, said)
    }

    /// Commands of processes that have to do with this cluster.
    fn processes(&self) -> Vec<String> {
        let output = Command::new("ps").args(["-axww", "-o", "args="]).output().expect("ps");
        let dir = self.folder.path().to_string_lossy().into_owned();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().filter(|line| line.contains(&dir)).map(str::to_owned).collect()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Ok(cluster) = Cluster::open(&self.dir()) {
            cluster.destroy(&mut |_| {}).expect("destroyed");
        }
    }
}

fn quiet(_: &str) {}

/// What psql answers, or what it complains of.
fn ask(cluster: &Cluster, url: &str, sql: &str) -> Result<String, String> {
    let output = Command::new(cluster.pg_bin().join("psql"))
        .args(["-X", "-A", "-t", "-q", "-c", sql, url])
        .output()
        .expect("psql runs");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A superuser's address of one server, by that of another.
fn address_of(cluster: &Cluster, other: &str, server: ServerId) -> String {
    let (login, _) = other.split_once('@').expect("an address with a password");
    let port = cluster.status().into_iter().find(|it| it.server == server).expect("such a server").port;
    format!("{login}@127.0.0.1:{port}/postgres")
}

fn pids(cluster: &Cluster) -> Vec<Option<i32>> {
    cluster.status().into_iter().map(|it| it.pid).collect()
}

fn assert_all_run(cluster: &Cluster) {
    for status in cluster.status() {
        assert_eq!(status.state, ServerState::Running, "{}", status.server);
    }
    for url in cluster.shard_urls().iter().chain(&cluster.directory_replica_urls()) {
        assert_eq!(ask(cluster, url, "SELECT 1").expect(url), "1");
    }
}

#[test]
fn comes_up_cold_and_then_warm_with_everything_in_it() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(2, 1);
    assert_all_run(&cluster);
    let on = |url: Result<String, Error>, sql| ask(&cluster, &url.expect("an address"), sql).expect(sql);
    assert_eq!(on(cluster.shard_url(1), "SELECT current_database()"), "therev_shard_1");
    assert_eq!(on(cluster.control_url(), "SHOW wal_level"), "logical");
    assert_eq!(on(cluster.directory_url(), "SHOW server_encoding"), "UTF8");
    assert_eq!(on(cluster.directory_url(), "SHOW listen_addresses"), "127.0.0.1");
    assert_eq!(on(cluster.shard_url(0), "SHOW shared_preload_libraries"), "pg_stat_statements");
    assert_eq!(on(cluster.shard_url(0), "SELECT usesuper FROM pg_user WHERE usename = current_user"), "t");
    let replica = cluster.directory_replica_urls().remove(0);
    assert_eq!(ask(&cluster, &replica, "SELECT pg_is_in_recovery()").expect("the replica"), "t");

    let wrong = cluster.control_url().expect("an address").replace(cluster.superuser().1, "guessed");
    assert!(
        ask(&cluster, &wrong, "SELECT 1").expect_err("a wrong password").contains("password authentication failed")
    );
    let socket = cluster.status()[0].data.parent().expect("a parent").join("sockets");
    if socket.exists() {
        let unnamed = format!("postgresql:///postgres?host={}&port={}", socket.display(), cluster.status()[0].port);
        assert!(ask(&cluster, &format!("{unnamed}&user=postgres"), "SELECT 1").is_err(), "a socket asks no password");
    }

    let before = (pids(&cluster), cluster.addresses());
    let (again, said) = ground.up(2, 1);
    assert_eq!((pids(&again), again.addresses()), before);
    assert_eq!(said, Vec::<String>::new(), "a second `up` has nothing to do");
    assert_eq!(again.addresses().to_string().parse::<Addresses>().expect("addresses"), again.addresses());
}

#[test]
fn down_leaves_nothing_running_and_keeps_the_data() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(2, 1);
    let control = cluster.control_url().expect("an address");
    ask(&cluster, &control, "CREATE TABLE kept AS SELECT 42 AS answer").expect("a table");
    cluster.down(&mut quiet).expect("down");
    assert_eq!(ground.processes(), Vec::<String>::new());
    assert!(cluster.status().iter().all(|it| it.state == ServerState::Down && it.pid.is_none()));
    let sockets = ground.dir().join("servers/sockets");
    assert_eq!(fs::read_dir(&sockets).map_or(0, Iterator::count), 0, "sockets");
    cluster.down(&mut quiet).expect("down twice");

    let (cluster, _) = ground.up(2, 1);
    assert_eq!(cluster.control_url().expect("an address"), control, "ports are remembered");
    assert_eq!(ask(&cluster, &control, "SELECT answer FROM kept").expect("the table"), "42");
}

#[test]
fn up_repairs_each_server_that_was_killed() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(2, 1);
    let servers = [ServerId::Shard(0), ServerId::Shard(1), ServerId::Replica(1)];
    for server in servers {
        cluster.kill(server).expect("killed");
        let cluster = ground.up(2, 1).0;
        assert_all_run(&cluster);
    }
    for server in servers {
        cluster.kill(server).expect("killed");
    }
    let (mut cluster, said) = ground.up(2, 1);
    assert_all_run(&cluster);
    assert!(!said.iter().any(|line| line.contains("anew")), "the replica could go on: {said:?}");

    cluster.kill(ServerId::Shard(1)).expect("killed");
    cluster.start_server(ServerId::Shard(1), &mut quiet).expect("started");
    cluster.stop_server(ServerId::Replica(1)).expect("stopped");
    cluster.start_server(ServerId::Replica(1), &mut quiet).expect("started");
    assert_all_run(&cluster);
    assert!(matches!(cluster.kill(ServerId::Shard(2)), Err(Error::UnknownServer { .. })));
}

#[test]
fn a_stale_pid_file_whose_number_is_someone_elses_does_not_keep_a_server_down() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(1, 0);
    cluster.kill(ServerId::Shard(0)).expect("killed");
    let file = cluster.status()[0].data.join("postmaster.pid");
    let text = fs::read_to_string(&file).expect("it outlives the server");
    let rest = text.split_once('\n').expect("lines").1;
    fs::write(&file, format!("{}\n{rest}", std::process::id())).expect("written");
    assert_all_run(&ground.up(1, 0).0);
}

#[test]
fn a_replica_that_cannot_follow_is_made_anew() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(1, 1);
    cluster.stop_server(ServerId::Replica(1)).expect("stopped");
    let control = cluster.control_url().expect("an address");
    ask(&cluster, &control, "SELECT pg_drop_replication_slot('replica_1')").expect("the slot is gone");
    let (cluster, said) = ground.up(1, 1);
    assert!(said.iter().any(|line| line.contains("anew")), "{said:?}");
    assert_all_run(&cluster);

    let (cluster, _) = ground.up(1, 0);
    assert_eq!(cluster.directory_replica_urls(), Vec::<String>::new());
    assert_eq!(ask(&cluster, &control, "SELECT count(*) FROM pg_replication_slots").expect("slots"), "0");
    assert_all_run(&ground.up(1, 2).0);
}

#[test]
fn a_port_that_was_taken_is_exchanged() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(1, 1);
    let before = cluster.status()[0].port;
    cluster.down(&mut quiet).expect("down");
    let _stranger = TcpListener::bind(("127.0.0.1", before)).expect("the port");
    let (cluster, said) = ground.up(1, 1);
    assert_ne!(cluster.status()[0].port, before);
    assert!(said.iter().any(|line| line.contains(&before.to_string())), "{said:?}");
    assert_all_run(&cluster);
}

#[test]
fn two_at_once_end_with_one_cluster() {
    let ground = Ground::new();
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| ground.up(2, 1).0);
        let other = scope.spawn(|| ground.up(2, 1).0);
        (one.join().expect("one"), other.join().expect("the other"))
    });
    assert_eq!((pids(&one), one.addresses()), (pids(&other), other.addresses()));
    assert_all_run(&one);
}

#[test]
fn works_in_a_folder_that_the_servers_may_not_enter() {
    let ground = Ground::closed();
    let (cluster, _) = ground.up(1, 1);
    assert_all_run(&cluster);
    let data = cluster.status()[0].data.clone();
    let home = data.parent().expect("a parent").to_owned();
    let outside = fs::metadata(ground.dir()).expect("the folder").uid() == 0;
    assert_eq!(!data.starts_with(fs::canonicalize(ground.dir()).expect("a path")), outside);

    if outside {
        // The folder is moved, or copied: its servers are one cluster's alone.
        let (moved, copied) = (ground.dir().with_extension("moved"), ground.dir().with_extension("copied"));
        fs::rename(ground.dir(), &moved).expect("moved");
        let refused = Cluster::up(&ground.options(1, 1), &mut quiet).expect_err("what was here is somewhere");
        assert!(matches!(refused, Error::Orphaned { .. }), "{refused}");
        assert!(data.exists());
        fs::remove_dir_all(ground.dir()).expect("nothing was made");
        let same = Cluster::up(&Options { dir: moved.clone(), ..ground.options(1, 1) }, &mut quiet).expect("up");
        assert_eq!(same.status()[0].data, data);
        fs::create_dir(&copied).expect("a folder");
        fs::copy(moved.join("cluster.json"), copied.join("cluster.json")).expect("copied");
        let copy = Cluster::open(&copied).expect("it looks like a cluster");
        let refused = copy.destroy(&mut quiet).expect_err("these are another's servers");
        assert!(matches!(refused, Error::OthersServers { .. }) && data.exists(), "{refused}");
        fs::remove_dir_all(&copied).expect("removed");
        // The folder is deleted by hand: what lies outside goes when somebody says so.
        fs::remove_dir_all(&moved).expect("deleted");
        assert_eq!(Cluster::destroy_orphaned(&moved, &mut quiet).expect("destroyed"), Some(home.clone()));
        assert_eq!(Cluster::destroy_orphaned(&moved, &mut quiet).expect("nothing is left"), None);
    } else {
        let cluster = Cluster::open(&ground.dir()).expect("the cluster");
        cluster.destroy(&mut quiet).expect("destroyed");
    }
    assert!(!home.exists() && !ground.dir().exists());
    assert_eq!(ground.processes(), Vec::<String>::new());
}

#[test]
fn destroy_leaves_nothing_of_its_own_even_after_a_crash() {
    let ground = Ground::new();
    let (cluster, _) = ground.up(2, 1);
    let note = ground.dir().join("someone-elses");
    fs::write(&note, "kept").expect("written");
    let killed = pids(&cluster)[0].expect("it runs").to_string();
    let blocks = || {
        let blocks = fs::read_to_string("/proc/sysvipc/shm").expect("the system's blocks of memory");
        blocks.lines().filter(|line| line.split_whitespace().nth(4) == Some(&*killed)).count()
    };
    assert_eq!(blocks(), 1);
    cluster.kill(ServerId::Shard(0)).expect("killed");
    cluster.destroy(&mut quiet).expect("destroyed");
    assert_eq!(blocks(), 0);
    assert_eq!(ground.processes(), Vec::<String>::new());
    let left: Vec<_> = fs::read_dir(ground.dir()).expect("the folder").map(|it| it.expect("an entry").path()).collect();
    assert_eq!(left, [note]);
    assert!(matches!(Cluster::open(&ground.dir()), Err(Error::NoCluster { .. })));
}

#[test]
fn sockets_stay_short_in_a_deep_folder() {
    let ground = Ground::new();
    let deep = ground.dir().join("a-folder-with-a-long-name".repeat(4)).join("cluster");
    let options = Options { dir: deep, ..ground.options(1, 0) };
    let cluster = Cluster::up(&options, &mut quiet).expect("up");
    assert_all_run(&cluster);
    let asked = ask(&cluster, &cluster.control_url().expect("an address"), "SHOW unix_socket_directories");
    let sockets = asked.expect("sockets").trim_matches('"').to_owned();
    assert!(sockets.starts_with("/tmp/therev-") && Path::new(&sockets).is_dir(), "{sockets}");
    cluster.destroy(&mut quiet).expect("destroyed");
    assert!(!Path::new(&sockets).exists());
}

#[test]
fn says_what_cannot_be() {
    let ground = Ground::new();
    assert!(matches!(Cluster::open(&ground.dir()), Err(Error::NoCluster { .. })));
    let up = |options: Options| Cluster::up(&options, &mut quiet).map(drop).expect_err("an error");
    assert!(matches!(up(ground.options(0, 0)), Error::ShardsOutOfRange { asked: 0, .. }));
    assert!(matches!(up(ground.options(1, 65)), Error::ReplicasOutOfRange { asked: 65, .. }));
    let elsewhere = Options { pg_bin: Some(ground.folder.path().to_owned()), ..ground.options(1, 0) };
    assert!(matches!(up(elsewhere), Error::NoTool { tool: "postgres", .. }));

    ground.up(1, 0);
    let error = up(ground.options(3, 0));
    assert!(matches!(error, Error::OtherShards { has: 1, asked: 3, .. }));
    assert!(error.to_string().contains("has 1 shards, not 3"), "{error}");
}

#[test]
fn a_standby_takes_its_primarys_place_and_gives_it_back() {
    let ground = Ground::new();
    let options = Options { standbys: 1, synchronous: true, ..ground.options(2, 1) };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    let urls = cluster.shard_urls();
    ask(&cluster, &urls[0], "CREATE TABLE kept (n integer); INSERT INTO kept VALUES (1)").expect("written");

    cluster.kill(ServerId::Shard(0)).expect("killed");
    let new = cluster.promote(0, &mut quiet).expect("promoted");
    // Commits waited for it.
    assert_eq!(new, Promoted { primary: ServerId::Standby(0, 1), may_be_lost: None });
    assert_eq!(cluster.shard_urls(), urls, "addresses stay");
    // What was acknowledged is there, and the old primary follows: a commit waits for it.
    ask(&cluster, &urls[0], "INSERT INTO kept SELECT n + 1 FROM kept").expect("written");
    assert_all_run(&cluster);

    // Another process knows it as well, and a second `up` leaves it so.
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    assert_eq!(cluster.primary(0), ServerId::Standby(0, 1));
    assert_eq!(cluster.primary(1), ServerId::Shard(1));
    assert_eq!(cluster.promote(0, &mut quiet).expect("promoted").primary, ServerId::Shard(0));
    assert_eq!(ask(&cluster, &urls[0], "SELECT count(*) FROM kept").expect("read"), "2");
    let follows: Vec<_> = cluster.status().into_iter().map(|it| it.follows).collect();
    let (first, second) = (Some(ServerId::Shard(0)), Some(ServerId::Shard(1)));
    assert_eq!(follows, [None, None, first, second, first]);

    // Where commits do not wait, or did not while the standby was away, whoever promotes hears it.
    let options = Options { synchronous: false, ..options };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    ask(&cluster, &urls[0], "INSERT INTO kept VALUES (3)").expect("written");
    let standby = address_of(&cluster, &urls[0], ServerId::Standby(0, 1));
    while ask(&cluster, &standby, "SELECT pg_last_xact_replay_timestamp()").expect("an answer").is_empty() {}
    cluster.kill(ServerId::Shard(0)).expect("killed");
    let lost = cluster.promote(0, &mut quiet).expect("promoted").may_be_lost.expect("commits did not wait for it");
    let told = "shard 0 was down and had not waited for standby 0-1: what it acknowledged after 20";
    assert!(lost.starts_with(told) && lost.ends_with(" may be lost"), "{lost}");

    // A promoted server is needed, and stays; how many were asked for is remembered all the same.
    let options = Options { standbys: 0, ..options };
    Cluster::up(&options, &mut quiet).expect("up");
    let found = Cluster::open(&ground.dir()).expect("the cluster");
    assert_eq!((found.standbys(), found.primary(0)), (0, ServerId::Standby(0, 1)));
    let options = Options { standbys: 1, ..options };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");

    let none = cluster.stop_server(ServerId::Standby(1, 1)).and_then(|()| cluster.promote(1, &mut quiet).map(drop));
    assert!(matches!(none, Err(Error::NoStandby { shard: 1 })), "{none:?}");
}

#[test]
fn a_primary_that_works_is_not_replaced_by_a_standby_that_is_behind() {
    let ground = Ground::new();
    let options = Options { standbys: 1, ..ground.options(1, 0) };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    let urls = cluster.shard_urls();
    let standby = address_of(&cluster, &urls[0], ServerId::Standby(0, 1));
    let reload = |setting: &str| {
        ask(&cluster, &standby, setting).expect("another setting");
        ask(&cluster, &standby, "SELECT pg_reload_conf()").expect("it is read");
    };
    reload("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'");
    while ask(&cluster, &urls[0], "SELECT count(*) FROM pg_stat_replication").expect("an answer") != "0" {}
    ask(&cluster, &urls[0], "CREATE TABLE kept (n integer)").expect("written");

    let refused = Cluster::open(&ground.dir()).and_then(|mut cluster| cluster.promote(0, &mut quiet));
    assert!(matches!(refused, Err(Error::NoneFollows { shard: 0, primary: ServerId::Shard(0) })), "{refused:?}");
    assert_eq!(ask(&cluster, &urls[0], "SELECT count(*) FROM kept").expect("it works"), "0");
    reload("ALTER SYSTEM RESET primary_conninfo");
    Cluster::up(&options, &mut quiet).expect("up");
    assert_eq!(cluster.promote(0, &mut quiet).expect("promoted").primary, ServerId::Standby(0, 1));
    assert_eq!(ask(&cluster, &urls[0], "SELECT count(*) FROM kept").expect("it was received"), "0");
}

/// Commits wait for one of two. The one that has the last of them runs and gives no answer: the other one is not put first, nor is the
/// first one made anew.
#[test]
fn a_standby_that_is_silent_may_have_what_no_other_has() {
    let ground = Ground::new();
    let options = Options { standbys: 2, synchronous: true, ..ground.options(1, 0) };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    let urls = cluster.shard_urls();
    ask(&cluster, &urls[0], "CREATE TABLE kept (n integer)").expect("written");
    let behind = address_of(&cluster, &urls[0], ServerId::Standby(0, 2));
    ask(&cluster, &behind, "ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'").expect("another setting");
    ask(&cluster, &behind, "SELECT pg_reload_conf()").expect("it is read");
    while ask(&cluster, &urls[0], "SELECT count(*) FROM pg_stat_replication").expect("an answer") != "1" {}
    ask(&cluster, &urls[0], "INSERT INTO kept VALUES (1)").expect("acknowledged");

    let of_first = cluster.status().into_iter().find(|it| it.server == ServerId::Standby(0, 1)).and_then(|it| it.pid);
    let first = of_first.and_then(Pid::from_raw).expect("it runs");
    kill_process(first, Signal::STOP).expect("it is silent");
    cluster.kill(ServerId::Shard(0)).expect("killed");
    let refused = cluster.promote(0, &mut quiet);
    kill_process(first, Signal::CONT).expect("it goes on");
    assert!(matches!(refused, Err(Error::Silent { shard: 0, standby: ServerId::Standby(0, 1) })), "{refused:?}");
    let new = cluster.promote(0, &mut quiet).expect("promoted");
    assert_eq!(new, Promoted { primary: ServerId::Standby(0, 1), may_be_lost: None });
    assert_eq!(ask(&cluster, &urls[0], "SELECT count(*) FROM kept").expect("read"), "1");
}

#[test]
fn data_that_is_gone_costs_no_copy_of_it() {
    let ground = Ground::new();
    let options = Options { standbys: 1, ..ground.options(2, 1) };
    let mut cluster = Cluster::up(&options, &mut quiet).expect("up");
    let mut other = Cluster::open(&ground.dir()).expect("the cluster");
    let url = cluster.shard_url(1).expect("an address");
    ask(&cluster, &url, "CREATE TABLE kept AS SELECT 42 AS answer").expect("a table");
    let data = |cluster: &Cluster, server| {
        cluster.status().into_iter().find(|it| it.server == server).expect("a server").data.clone()
    };

    cluster.down(&mut quiet).expect("down");
    fs::remove_dir_all(data(&cluster, ServerId::Shard(1))).expect("lost");
    let error = Cluster::up(&options, &mut quiet).map(drop).expect_err("it is gone");
    let standby = Some(ServerId::Standby(1, 1));
    assert!(matches!(&error, Error::DataGone { shard: 1, standby: found, .. } if *found == standby), "{error}");
    assert!(error.to_string().contains("`therev cluster promote 1`"), "{error}");
    assert_eq!(cluster.promote(1, &mut quiet).expect("promoted").primary, ServerId::Standby(1, 1));
    let cluster = Cluster::up(&options, &mut quiet).expect("up");
    assert_eq!(ask(&cluster, &url, "SELECT answer FROM kept").expect("the table"), "42");
    assert_all_run(&cluster);

    // Who opened the cluster before that promotion does not undo it.
    other.start_server(ServerId::Shard(0), &mut quiet).expect("it runs");
    assert_eq!(other.primary(1), ServerId::Standby(1, 1));
    other.shrink(1, &mut quiet).expect("one shard less");

    // Without a standby a replica's copy is left alone, too.
    let options = Options { shards: 1, standbys: 0, ..options };
    let cluster = Cluster::up(&options, &mut quiet).expect("up");
    cluster.down(&mut quiet).expect("down");
    fs::remove_dir_all(data(&cluster, ServerId::Shard(0))).expect("lost");
    let error = Cluster::up(&options, &mut quiet).map(drop).expect_err("it is gone");
    let replica = data(&cluster, ServerId::Replica(1));
    assert!(matches!(&error, Error::DataGone { standby: None, copy: Some(copy), .. } if *copy == replica), "{error}");
    assert!(replica.join("PG_VERSION").exists());
}
