//! Databases that are down.

use crate::names::claim_key;
use crate::things::{operator, post, thread, user, user_per_shard};
use testkit::TestCluster;
use therev::{
    Config, Database, Error, NewSession, NewUser, SecretString, Seen, ShardNo, Therev, ThreadOrder, UserChange,
};

/// Ends every connection to a database and lets nobody in, or lets everybody in again.
pub(crate) async fn reachable(cluster: &TestCluster, part: &str, yes: bool) {
    let url = cluster.url(part);
    let (server, database) = url.rsplit_once('/').expect("an address with a database");
    let client = testkit::connect(&format!("{server}/postgres")).await;
    let sql = format!(
        "ALTER DATABASE {database} ALLOW_CONNECTIONS {yes};
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE NOT {yes} AND datname = '{database}'"
    );
    client.batch_execute(&sql).await.expect("the database is opened or closed");
}

#[tokio::test]
async fn the_control_database_is_down() {
    let cluster = TestCluster::usual().await;
    let state = tempfile::tempdir().expect("a folder");
    let mut config = cluster.config();
    config.state_file = Some(state.path().join("placement.json"));
    let node = therev::connect(config.clone()).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Without a catalog").await;

    reachable(&cluster, "control", false).await;
    post(&node, authors[1], &open, "written by the node that runs").await;
    user(&node, "newcomer").await;
    // A node starts from the state file, and finds its way even when the file is wrong by now.
    let fresh = therev::connect(config).await.expect("a node starts all the same");
    assert_eq!(fresh.shards().found_placement(), therev::FoundPlacement::StateFile);
    fresh.shards().forget_placement(therev::Map::first(therev::Layout::Colocated, 2));
    post(&fresh, authors[2], &open, "written by the node that started").await;
    assert_eq!(fresh.thread_page(open.thread_id, None, 9).await.expect("the page").posts.len(), 2);
    assert!(!fresh.overview().await.expect("an overview").is_up());
    // Without a state file a node says what is down.
    let error = therev::connect(cluster.config()).await.err().expect("no way to start");
    assert!(error.to_string().contains("the control database is down"), "{error}");

    reachable(&cluster, "control", true).await;
    drop((node, fresh));
    cluster.finish().await;
}

/// A server that has no connection left for anybody works: who wants one of it waits, and the shard counts as up.
#[tokio::test]
async fn a_server_that_is_full_is_not_down() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { pool_size: Some(8), ..cluster.config() }).await.expect("a node");
    let author = user_per_shard(&node).await[0];
    let open = thread(&node, author, "Of a shard that has room for few").await;
    let stranger = cluster.stranger("shard_0").await;
    let limit = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I CONNECTION LIMIT 3', current_database()); END $$";
    stranger.batch_execute(limit).await.expect("room for two besides this one");
    let posts = (0..24).map(|_| post(&node, author, &open, "one after the other"));
    assert_eq!(futures_util::future::join_all(posts).await.len(), 24);
    assert!(node.overview().await.expect("an overview").is_up());
    drop((node, stranger));
    cluster.finish().await;
}

/// Tries names until one of them is on a shard that is down: which that is.
async fn refused_log_in(node: &Therev) -> Option<Database> {
    for n in 0..60 {
        let name = format!("nobody-{n}");
        match node.log_in(&name, &SecretString::from("correct horse"), NewSession::default()).await {
            Err(Error::Store(error)) => return error.database(),
            other => assert!(matches!(other, Err(Error::Credentials)), "{other:?}"),
        }
    }
    None
}

/// Invariant 5.
#[tokio::test]
async fn a_shard_is_down_and_comes_back() {
    let cluster = TestCluster::colocated().await;
    let mut config = cluster.config();
    config.breaker_ms = 50;
    let node = therev::connect(config).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Three quarters").await;
    for author in authors {
        post(&node, author, &open, "text").await;
    }
    let theirs = thread(&node, authors[2], "Away for a while").await;
    let taken_back = post(&node, authors[1], &theirs, "I take it back").await;

    reachable(&cluster, "shard_2", false).await;
    let failed = node.user(authors[2]).await;
    let Err(Error::Store(error)) = failed else { panic!("{failed:?}") };
    assert_eq!(error.database(), Some(Database::Shard(ShardNo(2))));
    assert!(error.to_string().contains("shard 2 is down"), "{error}");
    // At once, and only its users: the breaker answers for a server that was just found down.
    for _ in 0..50 {
        assert!(node.user(authors[2]).await.is_err());
        node.user(authors[1]).await.expect("another shard's user");
    }
    let page = node.thread_page(open.thread_id, None, 9).await.expect("the page");
    assert_eq!((page.partial, page.missing, page.posts.len()), (true, vec![ShardNo(2)], 3));
    let registered = NewUser { user_id: Some(authors[1]), user_name: "user-1".into(), ..NewUser::default() };
    node.register(registered, &operator()).await.expect("a retry elsewhere");
    assert!(!node.overview().await.expect("an overview").is_up());
    // What waits for that shard in an author's bucket is nothing that the directory lacks.
    node.delete_post(taken_back.post_id, &operator()).await.expect("deleted");
    let seen = thread(&node, authors[1], "Seen at once").await.seen;
    assert!(matches!(seen, Seen::Position(_)), "{seen:?}");
    let newest = node.threads(ThreadOrder::Newest, None, 1, Some(&seen)).await.expect("the list");
    assert_eq!(newest.items[0].title, "Seen at once");
    // A name that cannot be asked for now is not a wrong password.
    assert_eq!(refused_log_in(&node).await, Some(Database::Shard(ShardNo(2))));

    reachable(&cluster, "shard_2", true).await;
    let back = async {
        while node.user(authors[2]).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), back).await.expect("the shard is found again by itself");
    let page = node.thread_page(open.thread_id, None, 9).await.expect("the page");
    assert!(!page.partial && page.posts.len() == 4);
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn the_directory_is_down() {
    let cluster = TestCluster::usual().await;
    let mut config = cluster.config();
    config.breaker_ms = 50;
    let node = therev::connect(config).await.expect("a node");
    let ada = user(&node, "ada").await;
    reachable(&cluster, "directory", false).await;
    // Writes go on; what the directory must hear waits, and the token says so.
    let open = thread(&node, ada.user_id, "Later").await;
    assert!(matches!(open.seen, Seen::Pending(..)));
    let page = node.thread_page(open.thread_id, None, 9).await.expect("the page, without names");
    assert_eq!(page.thread.title, "Later");
    reachable(&cluster, "directory", true).await;
    let token: Seen = open.seen.to_string().parse().expect("a token survives text");
    let back = async {
        loop {
            if let Ok(list) = node.threads(ThreadOrder::Newest, None, 9, Some(&token)).await {
                break list;
            }
            tokio::task::yield_now().await;
        }
    };
    let list = tokio::time::timeout(std::time::Duration::from_secs(10), back).await.expect("the directory is found");
    assert_eq!(list.items[0].thread_id, open.thread_id, "own writes are visible as soon as the directory is back");
    drop(node);
    cluster.finish().await;
}

/// Much may wait for the directory: of that a pass reads no more than its beginning, and gets to what is behind it.
#[tokio::test]
async fn what_waits_for_the_directory_keeps_nothing_else_back() {
    const WAITING: i64 = 4_500;
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Much discussed").await;
    post(&node, bob, &open, "text").await;
    node.relay_once().await.expect("the relay runs");

    reachable(&cluster, "directory", false).await;
    let shard = cluster.stranger("shard_1").await;
    // Events of no bucket come first, and these are more than a pass takes at a time.
    let totals = "INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
                  SELECT 'content', -1, 'totals',
                         jsonb_build_array(jsonb_build_object('thread_id', $1::uuid, 'author_id', $2::uuid))
                    FROM generate_series(1, $3::bigint)";
    shard.execute(totals, &[&open.thread_id.0, &ada.0, &WAITING]).await.expect("events");
    let again = "UPDATE therev.outbox SET delivered_at = NULL WHERE kind = 'contribution'";
    assert_eq!(shard.execute(again, &[]).await.expect("one more"), 1);

    let relayed = node.relay_once().await.expect("the relay runs");
    assert_eq!(relayed.delivered.get("contribution"), Some(&1), "{relayed:?}");
    assert!(relayed.waiting >= WAITING.unsigned_abs(), "{relayed:?}");
    assert!(relayed.waiting_for.is_some_and(|reason| reason.contains("directory")), "it says what it waits for");

    reachable(&cluster, "directory", true).await;
    let back = async {
        loop {
            let relayed = node.relay_once().await.expect("the relay runs");
            if relayed.waiting == 0 {
                break relayed;
            }
            tokio::task::yield_now().await;
        }
    };
    let relayed = tokio::time::timeout(std::time::Duration::from_secs(10), back).await.expect("the directory is found");
    assert!(relayed.delivered.get("totals").is_some_and(|count| *count >= WAITING.unsigned_abs()), "{relayed:?}");
    drop((node, shard));
    cluster.finish().await;
}

#[tokio::test]
async fn databases_that_are_not_meant_are_named() {
    let cluster = TestCluster::colocated().await;
    let wrong = |part: &str| {
        let mut config = cluster.config();
        let name = cluster.url(part).rsplit('/').next().expect("a database").to_owned();
        let control = cluster.url("control").rsplit('/').next().expect("a database").to_owned();
        config.control = config.control.replace(&control, &name);
        config
    };
    let error = therev::connect(wrong("shard_2")).await.err().expect("a shard is no control database");
    assert!(error.to_string().contains("it is the shard 2 database"), "{error}");
    let mut config = cluster.config();
    config.control = config.control.rsplit_once('/').expect("an address").0.to_owned() + "/postgres";
    let error = therev::connect(config).await.err().expect("no database of therev");
    assert!(error.to_string().contains("no database of therev"), "{error}");
    let mut config = cluster.config();
    config.password = Some("wrong".into());
    let error = therev::connect(config).await.err().expect("a wrong password");
    assert!(error.to_string().contains("refuses the role or its password"), "{error}");

    // A shard with a newer schema is refused by name; the others serve.
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let newer = cluster.stranger("shard_1").await;
    newer
        .batch_execute("INSERT INTO therev.schema_versions (version, name) VALUES (999, 'from the future')")
        .await
        .expect("a newer schema");
    let fresh = cluster.node().await;
    let error = fresh.user(authors[1]).await.expect_err("a schema that is not known");
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let error = format!("{error}: {cause}");
    assert!(error.contains("shard 1") && error.contains("999"), "{error}");
    fresh.user(authors[0]).await.expect("another shard");
    newer.batch_execute("DELETE FROM therev.schema_versions WHERE version = 999").await.expect("as it was");
    drop((node, newer, fresh));
    cluster.finish().await;
}

/// A statement that waits for a lock is given up by its caller; that is nobody else's trouble.
#[tokio::test]
async fn a_statement_that_waits_for_a_lock_is_no_outage() {
    let cluster = TestCluster::colocated().await;
    // One connection: what one call leaves behind, the next one finds. Nobody's deadline comes to help.
    let config = Config { pool_size: Some(1), deadline_ms: 60_000, breaker_ms: 60_000, ..cluster.config() };
    let node = therev::connect(config).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let locks = cluster.stranger("shard_1").await;
    locks.batch_execute("BEGIN; SELECT FROM users FOR UPDATE").await.expect("the rows are locked");
    let looks = cluster.stranger("shard_1").await;
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let waiters = async || looks.query_one(waiting, &[]).await.expect("an answer").get::<_, i64>(0);
    let until = async |count: i64| while waiters().await != count {};
    for _ in 0..5 {
        let change = UserChange { bio: Some(Some("late".into())), ..UserChange::default() };
        let actor = operator();
        tokio::select! {
            changed = node.change_user(authors[1], change, &actor) => panic!("the row is locked: {changed:?}"),
            () = until(1) => {}
        }
        // It went with its connection, and ended on the server, too; a new one is there for others.
        let read = tokio::time::timeout(std::time::Duration::from_secs(30), node.user(authors[1])).await;
        read.expect("nobody waits behind it").expect("the shard is not down");
        tokio::time::timeout(std::time::Duration::from_secs(30), until(0)).await.expect("nothing is left of it");
    }
    locks.batch_execute("ROLLBACK").await.expect("the rows are free");
    let user = node.user(authors[1]).await.expect("the user");
    assert_eq!(user.bio, None, "what was given up was not done");
    drop((node, locks, looks));
    cluster.finish().await;
}

/// Names of which the claims are on shard 2 of four.
fn names_claimed_on_shard_2() -> impl Iterator<Item = String> {
    let is_there = |name: &String| therev::bucket_of(claim_key(name)).number() % 4 == 2;
    (0..10_000).map(|n| format!("there-{n}")).filter(is_there)
}

/// The names of a user may be claimed on a shard that is down: that keeps its events in the outbox, and nothing from the directory.
/// What is asked of all shards says which of them are missing.
#[tokio::test]
async fn own_writes_are_visible_while_the_shard_of_a_name_is_down() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { breaker_ms: 50, ..cluster.config() }).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let name = names_claimed_on_shard_2().next().expect("one of them");
    let named = UserChange { user_name: Some(name.clone()), ..UserChange::default() };
    node.change_user(authors[1], named, &operator()).await.expect("another name");
    node.relay_once().await.expect("the relay runs");

    reachable(&cluster, "shard_2", false).await;
    let change = UserChange { first_name: Some(Some("Seen".into())), ..UserChange::default() };
    let changed = node.change_user(authors[1], change, &operator()).await.expect("a user of another shard");
    assert!(matches!(changed.seen, Seen::Position(_)), "{:?}", changed.seen);
    let listed = node.users_by_prefix(&name, None, 1, Some(&changed.seen)).await.expect("the list");
    assert_eq!(listed.items[0].display_name.as_deref(), Some("Seen"));
    let users = node.list_users(&authors).await.expect("those of the others");
    assert_eq!((users.partial, users.missing, users.users.len()), (true, vec![ShardNo(2)], 3));
    assert!(node.users(&authors).await.is_err());
    let audit = node.audit(None, 50).await.expect("the log of the others");
    assert_eq!((audit.partial, audit.missing), (true, vec![ShardNo(2)]));

    reachable(&cluster, "shard_2", true).await;
    drop(node);
    cluster.finish().await;
}

/// With a shard its own users fail, and nobody else whose name is claimed there: the directory says whom to ask, and the user's row
/// has the last word.
#[tokio::test]
async fn users_of_other_shards_are_found_while_the_shard_of_their_names_is_down() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { breaker_ms: 50, ..cluster.config() }).await.expect("a node");
    let [ada, bob, carl, dora] = user_per_shard(&node).await;
    let names: Vec<String> = names_claimed_on_shard_2().take(5).collect();
    let [adas, bobs, carls, given_up, unknown] = names.as_slice() else { panic!("five of them: {names:?}") };
    let password = SecretString::from("correct horse");
    for (user, name) in [(ada, adas), (bob, bobs), (carl, carls)] {
        let named =
            UserChange { user_name: Some(name.clone()), password: Some(password.clone()), ..UserChange::default() };
        node.change_user(user, named, &operator()).await.expect("another name");
    }
    node.relay_once().await.expect("the relay runs");
    // A name that dora had, as far as the directory has heard.
    let directory = cluster.stranger("directory").await;
    let late_with_dora = async |name: &str| {
        let late = "UPDATE user_directory SET user_name = $2 WHERE user_id = $1";
        assert_eq!(directory.execute(late, &[&dora.0, &name]).await.expect("the directory's row"), 1);
        cluster.replica_caught_up().await;
    };

    reachable(&cluster, "shard_2", false).await;
    // Also where somebody else has her name by now.
    late_with_dora(adas).await;
    for (user, name) in [(ada, adas), (bob, bobs)] {
        assert_eq!(node.user_named(&name.to_uppercase()).await.expect("an answer"), Some(user));
        assert_eq!(node.where_name(name).await.expect("found").owner, Some(user));
        let open = node.log_in(name, &password, NewSession::default()).await.expect("a log-in");
        assert_eq!(open.session.user_id, user);
        let refused = node.log_in(name, &SecretString::from("wrong"), NewSession::default()).await;
        assert!(matches!(refused, Err(Error::Credentials)), "{refused:?}");
    }
    // Whose row does not say so, may all the same have the name by its claim.
    late_with_dora(given_up).await;
    for name in [carls, given_up, unknown] {
        let failed = node.user_named(name).await;
        let Err(Error::Store(error)) = failed else { panic!("{name}: {failed:?}") };
        assert_eq!(error.database(), Some(Database::Shard(ShardNo(2))), "{name}");
        let failed = node.log_in(name, &password, NewSession::default()).await;
        let Err(Error::Store(error)) = failed else { panic!("{name}: {failed:?}") };
        assert!(error.to_string().contains("shard 2 is down"), "{name}: {error}");
    }

    reachable(&cluster, "shard_2", true).await;
    late_with_dora("user-3").await;
    drop((node, directory));
    cluster.finish().await;
}
