//! Relocations that cannot be: refused before anything is changed, with the reason and the next step.

use crate::things::user_per_shard;
use testkit::{Disk, OwnServers, TestCluster, connect, nothing_left};
use therev::relocation::{Error, Goal, Mover, Options, Plan, Request, State};
use therev::{Bucket, Database, Group, Layout, ShardNo, Therev};

fn mover(node: &Therev) -> Mover {
    Mover::new(node.shards().clone(), Options { budget: std::time::Duration::from_secs(1), ..Options::default() })
}

fn request(bucket: Bucket, source: i16, target: i16) -> Request {
    Request {
        groups: Group::ALL.to_vec(),
        buckets: vec![bucket],
        pin: None,
        source: ShardNo(source),
        target: ShardNo(target),
    }
}

/// What is refused, and what to do about it, in one line.
fn said(refused: Result<impl std::fmt::Debug, Error>) -> String {
    match refused {
        Err(Error::Refused { reason, next }) => format!("{reason}; {next}"),
        other => panic!("that is not refused: {other:?}"),
    }
}

/// The plan names the obstacle, and nothing begins.
async fn in_the_way(mover: &Mover, plan: &Plan) -> String {
    said(mover.begin(plan, Goal::Done, "test").await)
}

#[tokio::test]
async fn what_cannot_move_is_refused() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let node = cluster.node().await;
    let mover = mover(&node);
    let [ada, ..] = user_per_shard(&node).await;
    let bucket = ada.bucket();
    let there = request(bucket, 0, 1);
    let plan_of = async |request: Request| mover.plan(&request).await;

    let here = said(plan_of(request(bucket, 0, 0)).await);
    assert_eq!(here, "these buckets are on shard 0 already; name another shard");
    let nowhere = said(plan_of(request(bucket, 0, 7)).await);
    assert_eq!(nowhere, "there is no shard 7; `therev status` lists the shards");
    let nothing = said(plan_of(Request { buckets: Vec::new(), ..there.clone() }).await);
    assert_eq!(nothing, "nothing is named that could move; name buckets and groups");
    let half = said(plan_of(Request { groups: vec![Group::Content], ..there.clone() }).await);
    assert!(half.starts_with("in the colocated layout both groups of a bucket move together; "), "{half}");
    // The buckets of another shard than was thought.
    let wrong = in_the_way(&mover, &plan_of(request(bucket, 1, 0)).await.expect("a plan")).await;
    assert_eq!(wrong, format!("bucket {bucket} is not on shard 1; plan anew: they have moved"));

    // Twice at once: the second one finds the first, whether or not that has begun.
    let plan = plan_of(there.clone()).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins").relocation;
    let twice = in_the_way(&mover, &plan).await;
    assert!(twice.starts_with("some of these buckets are in another relocation; wait for it, or abort it"), "{twice}");
    let early = said(mover.finish(begun).await);
    assert!(early.contains("is planned, it can be finished when it is switched; `therev relocation resume"), "{early}");
    let early = said(mover.want(begun, Goal::Reversed).await);
    assert!(early.contains("is planned; only what is switched"), "{early}");
    assert_eq!(Box::pin(mover.drive(begun, &|_| {})).await.expect("it goes on").state, State::Switched);
    let again = in_the_way(&mover, &plan_of(there.clone()).await.expect("a plan")).await;
    assert!(again.starts_with(&format!("bucket {bucket} is in another relocation; ")), "{again}");
    let late = said(mover.want(begun, Goal::Aborted).await);
    assert!(late.ends_with("is switched; after the switch `therev relocation reverse` goes back"), "{late}");
    mover.want(begun, Goal::Reversed).await.expect("the way back");
    assert_eq!(Box::pin(mover.drive(begun, &|_| {})).await.expect("it goes on").state, State::Reversed);
    let over = said(mover.finish(begun).await);
    assert!(over.contains("is reversed; `therev relocation show` says what became of it"), "{over}");
    assert!(matches!(mover.show(99).await, Err(Error::Unknown(99))));

    // Rows of these buckets that should not be there.
    let target = cluster.stranger("shard_1").await;
    let stray = format!(
        "SET session_replication_role = replica;
         INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, expires_at)
         VALUES ({bucket}, '{ada}', gen_random_uuid(), sha256('x'), now())"
    );
    target.batch_execute(&stray).await.expect("past all guards");
    let stray = in_the_way(&mover, &plan_of(there.clone()).await.expect("a plan")).await;
    assert!(stray.starts_with("shard 1 holds 1 rows of these buckets already; `therev check` names them"), "{stray}");
    target.batch_execute("DELETE FROM user_sessions").await.expect("it is gone");

    // An older schema.
    let source = cluster.stranger("shard_0").await;
    let newer = "INSERT INTO therev.schema_versions (version, name) VALUES (900, 'of a later release')";
    source.batch_execute(newer).await.expect("a newer one");
    let older = in_the_way(&mover, &plan_of(there.clone()).await.expect("a plan")).await;
    assert!(older.starts_with("the schemas differ: shard 0 is at version 900, shard 1 at "), "{older}");
    assert!(older.ends_with("; run `therev schema apply` first"), "{older}");
    source.batch_execute("DELETE FROM therev.schema_versions WHERE version = 900").await.expect("as it was");

    nothing_left(&[cluster.url("shard_0"), cluster.url("shard_1")]).await;
    drop((source, target, mover, node));
    cluster.finish().await;
}

/// Accounts among content, or content among accounts, would count as the other kind of shard from then on.
#[tokio::test]
async fn in_the_split_layout_each_kind_goes_where_it_is() {
    let cluster = TestCluster::new(Layout::Split, 3).await;
    let node = cluster.node().await;
    let mover = mover(&node);
    let bucket = Bucket::try_from(4_u16).expect("a bucket");
    let of = |group, source, target| Request { groups: vec![group], ..request(bucket, source, target) };
    let accounts = said(mover.plan(&of(Group::Account, 0, 2)).await);
    let expected = "in the split layout shard 2 is for content alone; name another shard, or `--group content`";
    assert_eq!(accounts, expected);
    let content = said(mover.plan(&of(Group::Content, 1, 0)).await);
    assert!(content.starts_with("in the split layout shard 0 is for account alone; "), "{content}");
    mover.plan(&of(Group::Content, 1, 2)).await.expect("a plan");

    // One that holds nothing is for whatever comes first, also where both were planned before either began.
    let control = cluster.stranger("control").await;
    let empty = "UPDATE therev.placement SET shard = 1, epoch = epoch + 1 WHERE shard = 2";
    control.batch_execute(empty).await.expect("a superuser may");
    node.shards().refresh().await.expect("the control database answers");
    let content = mover.plan(&of(Group::Content, 1, 2)).await.expect("a plan");
    let accounts = mover.plan(&of(Group::Account, 0, 2)).await.expect("a plan");
    let begun = mover.begin(&content, Goal::Done, "test").await.expect("it begins").relocation;
    assert_eq!(in_the_way(&mover, &accounts).await, expected);
    mover.want(begun, Goal::Aborted).await.expect("it is open");
    testkit::drive(&node, &mover, begun).await;
    let as_it_was = "UPDATE therev.placement SET shard = 2, epoch = epoch - 1 WHERE epoch > 1";
    control.batch_execute(as_it_was).await.expect("a superuser may");
    drop((control, mover, node));
    cluster.finish().await;
}

/// Planned before, begun after: whoever drains a shard has waited for everything that comes to it by then.
#[tokio::test]
async fn what_was_planned_before_a_shard_was_drained_does_not_come_to_it() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let node = cluster.node().await;
    let mover = mover(&node);
    let [ada, ..] = user_per_shard(&node).await;
    let plan = mover.plan(&request(ada.bucket(), 0, 1)).await.expect("a plan");
    therev::set_weight(node.shards(), ShardNo(1), 0.0).await.expect("it is drained");
    assert!(in_the_way(&mover, &plan).await.starts_with("shard 1 is being drained; "));
    therev::set_weight(node.shards(), ShardNo(1), 1.0).await.expect("it is as it was");
    drop((mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn a_shard_that_is_down_is_named() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let proxy = cluster.proxy(1).await;
    let through = cluster.node().await;
    drop(proxy);
    let error = mover(&through).plan(&request(ada.bucket(), 0, 1)).await.expect_err("nobody answers");
    let Error::Store(store) = &error else { panic!("{error:?}") };
    assert_eq!((store.kind(), store.database()), ("down", Some(Database::Shard(ShardNo(1)))));
    // Back to where the server is.
    let port: tokio_postgres::Config = cluster.url("shard_1").parse().expect("an address");
    let hosts = format!("127.0.0.1:{}", port.get_ports()[0]);
    let control = cluster.stranger("control").await;
    control.execute("UPDATE therev.shards SET hosts = $1 WHERE shard = 1", &[&hosts]).await.expect("readdressed");
    drop((control, node, through));
    cluster.finish().await;
}

#[tokio::test]
async fn a_full_disk_is_found_out_by_writing() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let shard = cluster.stranger("shard_1").await;
    let row = shard.query_one("SHOW data_directory", &[]).await.expect("the server answers");
    let folder = tempfile::tempdir().expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("the server may enter");
    let disk = match Disk::mount(&folder.path().join("disk"), std::path::Path::new(row.get::<_, &str>(0))) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: no disk can be mounted here: {error}");
            return cluster.finish().await;
        }
    };
    disk.take_table(&shard, "therev.sentinels").await.expect("a table moves");
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let mover = mover(&node);
    disk.fill().expect("no byte is free");
    let full = in_the_way(&mover, &mover.plan(&request(ada.bucket(), 0, 1)).await.expect("a plan")).await;
    assert!(full.starts_with("shard 1 takes no writes: ") && full.contains("No space left"), "{full}");
    assert!(full.ends_with("; see to its disk and its log"), "{full}");
    disk.empty().expect("there is room");
    let back = "ALTER TABLE therev.sentinels SET TABLESPACE pg_default";
    shard.batch_execute(back).await.expect("the table moves back");

    // A little is left, less than a copy may need.
    let lies_there = format!(
        "ALTER TABLE user_sessions SET TABLESPACE {0}; GRANT CREATE ON TABLESPACE {0} TO therev_mover",
        disk.space()
    );
    shard.batch_execute(&lies_there).await.expect("a table of owned rows moves");
    disk.fill_but(8 << 20).expect("little is free");
    let plan = mover.plan(&request(ada.bucket(), 0, 1)).await.expect("a plan");
    let scarce = in_the_way(&mover, &plan).await;
    assert!(scarce.starts_with("shard 1 takes no writes: ") && scarce.contains("No space left"), "{scarce}");
    disk.empty().expect("there is room");
    assert_eq!(mover.plan(&request(ada.bucket(), 0, 1)).await.expect("a plan").obstacles, []);
    let back = "ALTER TABLE user_sessions SET TABLESPACE pg_default";
    shard.batch_execute(back).await.expect("the table moves back");
    shard.batch_execute(&format!("DROP TABLESPACE {}", disk.space())).await.expect("it is empty");
    drop((shard, mover, node));
    cluster.finish().await;
}

/// Servers that cannot carry a stream: each setting is named with what to do about it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_cannot_stream_are_named() {
    let mut servers = OwnServers::up(2, 0).await;
    let node = therev::connect(servers.config()).await.expect("a node");
    let mover = mover(&node);
    let bucket: Bucket = 2_u16.try_into().expect("a bucket");
    let cases = [
        (
            "wal_level = replica",
            "wal_level of shard 1's server is replica, not logical; set wal_level = logical there, then restart it",
        ),
        (
            "max_replication_slots = 1",
            "shard 1's server has no room for a stream (max_replication_slots); raise it there and restart, or wait \
             until another relocation is done",
        ),
        (
            "max_logical_replication_workers = 1",
            "shard 1's server has no room for a stream (max_logical_replication_workers); raise it there and restart, \
             or wait until another relocation is done",
        ),
    ];
    for (setting, expected) in cases {
        let server = local::ServerId::Shard(1);
        let admin = connect(&servers.shards()[1]).await;
        admin.batch_execute("ALTER SYSTEM RESET ALL").await.expect("as it was");
        admin.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await.expect("another setting");
        drop(admin);
        let cluster = servers.servers();
        tokio::task::block_in_place(|| {
            cluster.stop_server(server).expect("it stops");
            cluster.start_server(server, &mut |_| {}).expect("it starts");
        });
        let plan = mover.plan(&request(bucket, 0, 1)).await.expect("a plan");
        assert_eq!(in_the_way(&mover, &plan).await, expected);
        assert!(mover.list(false).await.expect("relocations").is_empty(), "nothing was written down");
    }
}
