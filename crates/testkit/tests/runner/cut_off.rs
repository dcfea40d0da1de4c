//! `kill -9` between each two steps: what is half done is finished or undone by the relay and by the same call again.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use testkit::TestCluster;
use therev::{Actor, Config, Error, NewPost, NewThread, NewUser, PostId, Therev, UserId};

fn operator() -> Actor {
    Actor::Operator("test".into())
}

/// Runs an operation in a process that is killed at the nth pass of a point. Says whether it came there.
pub(crate) fn cut_off(cluster: &TestCluster, point: &str, nth: u32, operation: &[&str]) -> bool {
    let status = Command::new(env!("CARGO_BIN_EXE_cut-off"))
        .args([point, &nth.to_string(), &cluster.config().control, testkit::PASSWORD])
        .args(operation)
        .status()
        .expect("the process starts");
    assert!(status.success() || status.signal() == Some(9), "{point}: {status}");
    !status.success()
}

async fn register(node: &Therev, id: UserId, name: &str) -> Result<UserId, Error> {
    let email = Some(format!("{name}@example.org"));
    let new = NewUser { user_id: Some(id), user_name: name.into(), email, ..NewUser::default() };
    node.register(new, &operator()).await.map(|user| user.user_id)
}

/// Invariant 8.
#[tokio::test]
async fn registration() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let points = [
            ("register.name_taken", 1),
            ("register.name_taken", 2),
            ("register.written", 1),
            ("deliver.kind_delivered", 1),
            ("deliver.names_confirmed", 1),
        ];
        for (n, (point, nth)) in points.into_iter().enumerate() {
            let node = cluster.node().await;
            // Cut off, then asked again before any relay: the same registration.
            let (id, name) = (UserId::new(), format!("again-{n}"));
            assert!(cut_off(&cluster, point, nth, &["register", &id.to_string(), &name]), "{point} {nth}");
            assert_eq!(register(&node, id, &name).await.expect("the retry"), id, "{point} {nth}");

            // Cut off, then the relay: the user is there with its names, or the names are free.
            let (id, name) = (UserId::new(), format!("settled-{n}"));
            assert!(cut_off(&cluster, point, nth, &["register", &id.to_string(), &name]));
            cluster.prove().await;
            let written = node.user(id).await.is_ok();
            assert_eq!(written, point != "register.name_taken", "{point} {nth}");
            let other = register(&node, UserId::new(), &name).await;
            assert_eq!(matches!(other, Err(Error::Conflict { .. })), written, "{point} {nth}: {other:?}");
        }
        cluster.finish().await;
    }
}

/// The burial of an id is done, the freeing of its name is late: a registration that has taken the name anew keeps it.
/// Invariant 8.
#[tokio::test]
async fn a_late_freeing_does_not_take_a_name_that_was_taken_anew() {
    let cluster = TestCluster::new(therev::Layout::Colocated, 1).await;
    let shard = cluster.stranger("shard_0").await;
    let id = UserId::new();
    let claimed = "INSERT INTO therev.claims (claim_key, kind, value, user_id, state, version)
                   VALUES (therev.claim_key('user_name', 'mine'), 'user_name', 'mine', $1, 'pending', 1)";
    shard.execute(claimed, &[&id.0]).await.expect("the claim of an earlier try");
    let buried = "INSERT INTO users (user_id, is_active, deleted_at, was_registered) VALUES ($1, false, now(), false)";
    shard.execute(buried, &[&id.0]).await.expect("its burial");
    // What the settling has still to say of the claim as it found it; it comes late.
    let late: i64 = shard.query_one("SELECT version FROM therev.claims", &[]).await.expect("the claim").get(0);
    // Name and address are taken, the row is found buried, and the name is taken anew: there the call is stopped.
    assert!(cut_off(&cluster, "register.name_taken", 3, &["register", &id.to_string(), "mine"]));
    let event = "INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
                VALUES ('account', therev.bucket_of($1), 'claim', jsonb_build_array(jsonb_build_object(
                            'claim_key', therev.claim_key('user_name', 'mine'), 'user_id', $1,
                            'held', false, 'version', $2::bigint)))";
    shard.execute(event, &[&id.0, &late]).await.expect("the freeing");
    let mut patient = cluster.config();
    patient.claim_timeout_s = 3_600;
    let patient = therev::connect(patient).await.expect("a node");
    assert_eq!(patient.relay_once().await.expect("the relay runs").delivered.get("claim"), Some(&1));
    assert_eq!(patient.user_named("mine").await.expect("an answer"), None, "it is nobody's yet");
    let other = register(&patient, UserId::new(), "mine").await;
    assert!(matches!(other, Err(Error::Conflict { .. })), "the name is still taken: {other:?}");
    register(&patient, id, "mine").await.expect("the same registration, asked for again");
    drop((patient, shard));
    cluster.finish().await;
}

/// Two registrations of one id share the claim of a name. The one that is refused for another reason does not give back what
/// the other one has taken since, and written.
/// Invariant 8.
#[tokio::test]
async fn a_name_that_another_call_has_taken_too_is_not_given_back() {
    let cluster = TestCluster::new(therev::Layout::Colocated, 1).await;
    let node = therev::connect(Config { deadline_ms: 60_000, ..cluster.config() }).await.expect("a node");
    register(&node, UserId::new(), "bob").await.expect("a user");
    let (holder, looks) = (cluster.stranger("shard_0").await, cluster.stranger("shard_0").await);
    let hold = "BEGIN; SELECT FROM therev.claims WHERE value = 'bob@example.org' FOR UPDATE";
    holder.batch_execute(hold).await.expect("bob's address is held");
    let (id, name) = (UserId::new(), "shared");
    let email = Some("bob@example.org".to_owned());
    let new = NewUser { user_id: Some(id), user_name: name.into(), email, ..NewUser::default() };
    let refused = node.clone();
    let refused = tokio::spawn(async move { refused.register(new, &operator()).await });
    // It has the name and waits for the address. Not asked in the transaction: that would see the same activity all the while.
    let waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let until_it_waits = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while looks.query(waits, &[]).await.expect("the activity is read").is_empty() {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), until_it_waits).await.expect("it waits");
    assert!(cut_off(&cluster, "register.written", 1, &["register", &id.to_string(), name]));
    holder.batch_execute("ROLLBACK").await.expect("bob's address is free");
    let refused = refused.await.expect("no panic");
    assert!(matches!(refused, Err(Error::Conflict { what: "e-mail address", .. })), "{refused:?}");
    assert_eq!(node.user_named(name).await.expect("an answer"), Some(id), "the claim is there");
    drop((holder, looks, node));
    cluster.finish().await;
}

#[tokio::test]
async fn posting() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let (ada, bob) = (UserId::new(), UserId::new());
    register(&node, ada, "ada").await.expect("a user");
    register(&node, bob, "bob").await.expect("a user");
    let thread = node.create_thread(NewThread::new(ada, "Cut", "off")).await.expect("a thread").thread_id;
    let points = ["post.thread_read", "post.written", "deliver.kind_delivered"];
    let mut expected = 0;
    for point in points {
        let id = PostId::new(bob);
        let operation = ["post", &bob.to_string(), &thread.to_string(), &id.to_string()];
        assert!(cut_off(&cluster, point, 1, &operation), "{point}");
        cluster.prove().await;
        let again = NewPost { post_id: Some(id), ..NewPost::new(bob, thread, "cut off") };
        node.create_post(again).await.expect("the same post");
        expected += 1;
        node.relay_once().await.expect("the relay runs");
        assert_eq!(node.thread(thread).await.expect("the thread").post_count, expected, "{point}");
    }
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn a_relay() {
    let cluster = TestCluster::usual().await;
    let mut config = cluster.config();
    config.delivery_ms = 0;
    let node = therev::connect(config).await.expect("a node");
    let ada = UserId::new();
    register(&node, ada, "ada").await.expect("a user");
    let thread = node.create_thread(NewThread::new(ada, "Left", "behind")).await.expect("a thread").thread_id;
    node.create_post(NewPost::new(ada, thread, "text")).await.expect("a post");
    for client in ["shard_0", "shard_1", "shard_2", "shard_3"] {
        let shard = cluster.stranger(client).await;
        shard.batch_execute("UPDATE therev.outbox SET delivered_at = NULL").await.expect("everything waits");
    }
    for (point, nth) in [("deliver.kind_delivered", 1), ("relay.before_mark", 1), ("deliver.kind_delivered", 2)] {
        assert!(cut_off(&cluster, point, nth, &["relay"]), "{point} {nth}");
    }
    drop(node);
    cluster.finish().await;
}

/// An import that is killed seven times and started again each time, and then once more when all is there.
/// Invariant 6.
#[tokio::test]
async fn an_import_at_seven_moments() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/community");
    let folder = folder.to_str().expect("a path in UTF-8");
    let cluster = TestCluster::colocated().await;
    let moments = [
        ("bulk.names_taken", 2),
        ("bulk.before_commit", 2),
        ("bulk.committed", 3),
        ("bulk.before_commit", 9),
        ("bulk.users_written", 1),
        ("bulk.told", 2),
        ("relay.before_mark", 1),
    ];
    for (point, nth) in moments {
        assert!(cut_off(&cluster, point, nth, &["import", folder]), "{point} {nth}");
        cluster.prove().await;
    }
    let node = cluster.node().await;
    let import = async || {
        therev::import::stackexchange(&node, folder.as_ref(), "example", &mut |_| {}).await.expect("the import ends")
    };
    let last = import().await;
    assert!(last.skipped.iter().any(|s| s.reason == "already here"), "it went on where it was cut off");
    let again = import().await;
    assert_eq!(again.written.values().sum::<u64>(), 0, "everything is there: {again:?}");
    let held = node.overview().await.expect("an overview");
    let posts: i64 = held.shards.iter().filter_map(|s| s.posts).sum();
    let known: u64 = again.skipped.iter().filter(|s| is_post(s.kind, &s.reason)).map(|s| s.count).sum();
    assert_eq!(posts.unsigned_abs(), known);
    drop(node);
    cluster.finish().await;
}

/// Three batches of posts are under way when the process ends.
#[tokio::test]
async fn a_generation() {
    let cluster = TestCluster::colocated().await;
    for (point, nth) in [("bulk.committed", 11), ("bulk.before_commit", 21), ("bulk.told", 4)] {
        assert!(cut_off(&cluster, point, nth, &["generate"]), "{point} {nth}");
        cluster.prove().await;
    }
    assert!(!cut_off(&cluster, "bulk.told", 99, &["generate"]), "it comes to its end");
    cluster.finish().await;
}

/// Names of an import that was killed are settled before it is started again: its users come all the same.
#[tokio::test]
async fn an_import_whose_names_were_settled() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/community");
    let folder = folder.to_str().expect("a path in UTF-8");
    let cluster = TestCluster::usual().await;
    for nth in [1, 2] {
        assert!(cut_off(&cluster, "bulk.names_taken", nth, &["import", folder]), "{nth}");
    }
    let node = cluster.node().await;
    assert!(node.relay_once().await.expect("the relay runs").claims_settled > 2);
    cluster.prove().await;
    let report =
        therev::import::stackexchange(&node, folder.as_ref(), "example", &mut |_| {}).await.expect("the import ends");
    assert_eq!(report.written["users"], report.read["users"]);
    drop(node);
    cluster.finish().await;
}

fn is_post(kind: &str, reason: &str) -> bool {
    matches!(kind, "answer" | "comment") && reason == "already here"
}
