//! A shard whose disk is full: its writes fail and say why, all else goes on, and room is all that it takes to recover.

use std::error::Error as _;
use std::path::Path;
use testkit::{Disk, TestCluster};
use therev::{Actor, Database, Error, NewPost, NewThread, NewUser, PostId, ShardNo, UserId};

#[tokio::test]
async fn writes_fail_by_name_and_go_on_with_room() {
    let cluster = TestCluster::colocated().await;
    // Shard 1 is on the second server, which no replica follows: a tablespace is of a server and its replicas.
    let shard = cluster.stranger("shard_1").await;
    let row = shard.query_one("SHOW data_directory", &[]).await.expect("the server answers");
    let folder = tempfile::tempdir().expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("the server may enter");
    let disk = match Disk::mount(&folder.path().join("disk"), Path::new(row.get::<_, &str>(0))) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: no disk can be mounted here: {error}");
            return cluster.finish().await;
        }
    };
    disk.take_table(&shard, "posts").await.expect("the posts move");

    let node = cluster.node().await;
    let mut users = Vec::new();
    for number in 0..4 {
        let id =
            std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % 4 == number).expect("one of four");
        let new = NewUser { user_id: Some(id), user_name: format!("user-{number}"), ..NewUser::default() };
        users.push(node.register(new, &Actor::Operator("test".into())).await.expect("a user").user_id);
    }
    let thread = node.create_thread(NewThread::new(users[0], "Full", "disk")).await.expect("a thread").thread_id;
    let post = |author| NewPost { post_id: Some(PostId::new(author)), ..NewPost::new(author, thread, "x".repeat(900)) };
    node.create_post(post(users[1])).await.expect("there is room");

    disk.fill().expect("no byte is free");
    let mut written = 1;
    // Pages that are there have some room left.
    let (refused, error) = loop {
        let new = post(users[1]);
        match node.create_post(new.clone()).await {
            Ok(_) => written += 1,
            Err(error) => break (new, error),
        }
        assert!(written < 1_000, "the disk is never full");
    };
    let Error::Store(store) = &error else { panic!("{error:?}") };
    assert_eq!(store.database(), Some(Database::Shard(ShardNo(1))));
    assert!(error.to_string().contains("shard 1"), "{error}");
    let cause = error.source().map(|cause| format!("{cause}: {:?}", cause.source().map(ToString::to_string)));
    assert!(cause.as_ref().is_some_and(|cause| cause.contains("No space left on device")), "{cause:?}");
    // Other shards, other tables of this one, and all reads.
    node.create_post(post(users[2])).await.expect("another shard");
    node.create_thread(NewThread::new(users[1], "On", "another disk")).await.expect("another table");
    let contribution = "SELECT posts FROM therev.thread_contributions WHERE author_id = $1";
    for _ in 0..2 {
        node.create_post(refused.clone()).await.expect_err("still full");
        let posts = node.posts_by_author(users[1], None, 10_000).await.expect("a read");
        let counted: i32 = shard.query_one(contribution, &[&users[1].0]).await.expect("a row").get(0);
        assert_eq!((posts.len(), counted), (written, i32::try_from(written).expect("few")), "nothing is half written");
    }

    let started = "SELECT pg_postmaster_start_time()::text";
    let before: String = shard.query_one(started, &[]).await.expect("a time").get(0);
    disk.empty().expect("room again");
    node.create_post(refused).await.expect("the same post, now that there is room");
    assert_eq!(before, shard.query_one(started, &[]).await.expect("a time").get::<_, String>(0), "without a restart");
    node.relay_once().await.expect("the relay runs");
    let count = node.thread(thread).await.expect("the thread").post_count;
    assert_eq!(usize::try_from(count).ok(), Some(written + 2));
    drop((node, shard));
    let server = cluster.url("shard_1");
    cluster.finish().await;
    let (server, _) = server.rsplit_once('/').expect("an address with a database");
    let server = testkit::connect(&format!("{server}/postgres")).await;
    let drop_space = format!("DROP TABLESPACE {}", disk.space());
    server.batch_execute(&drop_space).await.expect("nothing is left on it");
}
