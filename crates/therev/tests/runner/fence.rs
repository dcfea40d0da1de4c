//! Every statement of the library, where it must be refused.

use crate::things::{operator, post, thread, user_per_shard};
use std::collections::BTreeMap;
use testkit::TestCluster;
use therev::{Bucket, BucketSet, Error, Group, NewThread, Therev, UserId};
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

/// The tables that buckets own, and the outbox.
const TABLES: [&str; 14] = [
    "users",
    "user_sessions",
    "user_ai_accounts",
    "ai_tasks",
    "ai_task_logs",
    "audit_log",
    "therev.claims",
    "therev.id_routes",
    "threads",
    "posts",
    "therev.thread_contributions",
    "therev.thread_participants",
    "therev.thread_totals",
    "therev.outbox",
];

/// A hash of everything in a shard's tables.
async fn contents(client: &Client) -> BTreeMap<&'static str, (i64, i64)> {
    let mut all = BTreeMap::new();
    for table in TABLES {
        let sql = format!("SELECT count(*), coalesce(bit_xor(hashtextextended(t::text, 0)), 0) FROM {table} AS t");
        let row = client.query_one(&sql, &[]).await.expect("the table is read");
        all.insert(table, (row.get(0), row.get(1)));
    }
    all
}

/// Some value for a parameter; where the bucket is refused, which one does not matter.
fn some_value(number: usize, param: &Type, many: bool, owner: UserId) -> Box<dyn ToSql + Sync + Send> {
    match (number, many) {
        (0, false) if *param == Type::INT2 => return Box::new(owner.bucket().sql()),
        (0, true) => return Box::new(vec![owner.bucket().sql()]),
        (1, true) if *param == Type::UUID_ARRAY => return Box::new(vec![owner.0]),
        _ => {}
    }
    match *param {
        Type::UUID => Box::new(owner.0),
        // Also an address, which one column holds.
        Type::TEXT => Box::new("127.0.0.1".to_owned()),
        Type::INT2 => Box::new(1_i16),
        Type::INT4 => Box::new(1_i32),
        Type::INT8 => Box::new(1_i64),
        Type::FLOAT4 => Box::new(1.0_f32),
        Type::FLOAT8 => Box::new(1.0_f64),
        Type::BOOL => Box::new(true),
        Type::VARBIT => Box::new(BucketSet::from_iter([owner.bucket()])),
        Type::BYTEA => Box::new(vec![0_u8; 32]),
        Type::TIMESTAMPTZ => Box::new(chrono::DateTime::UNIX_EPOCH),
        Type::JSONB => Box::new(serde_json::json!({ "user_name": "x", "audit_id": Uuid::new_v4() })),
        Type::JSONB_ARRAY => Box::new(vec![serde_json::json!({})]),
        Type::UUID_ARRAY => Box::new(vec![owner.0]),
        Type::TEXT_ARRAY => Box::new(vec!["text".to_owned()]),
        ref other => panic!("a statement has a parameter of type {other}: add a value for it"),
    }
}

/// A user of shard 0 with a thread in which two have written.
async fn ada_of_shard_0() -> (TestCluster, Therev, UserId) {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Owned by shard 0").await;
    post(&node, ada, &open, "by its author").await;
    post(&node, bob, &open, "by another").await;
    node.relay_once().await.expect("the relay runs");
    (cluster, node, ada)
}

/// Tries every statement on one user's rows at a shard that must refuse them.
async fn refuses_everything(client: &Client, ada: UserId, takes: impl Fn(&therev::AnyFenced) -> bool) {
    let thread = client.query_one("SELECT thread_id FROM posts WHERE author_id = $1", &[&ada.0]).await;
    let thread: Uuid = thread.expect("she has written once").get(0);
    client.batch_execute("SET ROLE therev").await.expect("the library's role");
    let statements: Vec<_> = therev::fenced_statements().into_iter().chain(therev::fenced_task_statements()).collect();
    assert!(statements.len() > 40, "{} statements are known", statements.len());
    for (name, statement) in statements.into_iter().filter(|(_, statement)| takes(statement)) {
        let prepared = client.prepare(statement.sql()).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let many = statement.asks_many();
        let mut values: Vec<_> =
            prepared.params().iter().enumerate().map(|(n, param)| some_value(n, param, many, ada)).collect();
        if statement.asks_buckets() {
            // A thread in which she has posts.
            values[2] = Box::new(thread);
        }
        let params: Vec<&(dyn ToSql + Sync)> = values.iter().map(|v| v.as_ref() as &(dyn ToSql + Sync)).collect();
        let rows = client.query(&prepared, &params).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        if many || statement.asks_buckets() || statement.is_by_id() {
            assert_eq!(rows.len(), 1, "{name} answers with nothing but the refusal");
            assert_eq!(rows[0].get::<_, Option<bool>>("present"), None, "{name}");
        }
        if many {
            assert_eq!(rows[0].get::<_, Vec<i64>>("refused"), [1], "{name}");
        } else if statement.asks_buckets() {
            assert_eq!(rows[0].get::<_, Vec<Uuid>>("refused_users"), [ada.0], "{name}");
            let refused: Option<BucketSet> = rows[0].get("refused_buckets");
            let apart = rows[0].get::<_, Option<Vec<Uuid>>>("apart_user_id").unwrap_or_default();
            assert!(refused.is_some_and(|set| set.contains(ada.bucket())) || apart == [ada.0], "{name}");
        } else if statement.is_by_id() {
            let apart = rows[0].get::<_, Option<Vec<Uuid>>>("apart_user_id").unwrap_or_default();
            assert!(!rows[0].get::<_, bool>("is_home") || apart == [ada.0], "{name}");
        } else {
            assert!(rows.is_empty(), "{name} was answered where its owner is not");
        }
        if let Some(quick) = statement.quick() {
            let rows = client.query(quick, &params).await.unwrap_or_else(|e| panic!("{name}, quick: {e:?}"));
            assert!(rows.is_empty(), "{name} in its quick form was answered where its owner is not");
        }
    }
    client.batch_execute("RESET ROLE").await.expect("the superuser again");
}

/// Invariants 3 and 22.
#[tokio::test]
async fn every_statement_is_refused_where_the_user_is_away() {
    let (cluster, node, ada) = ada_of_shard_0().await;
    let client = cluster.stranger("shard_0").await;
    let away = format!(
        "INSERT INTO therev.pins (colocation_group, user_id, bucket, state, peer, epoch)
         SELECT g, '{ada}', therev.bucket_of('{ada}'), 'moved', 1, 2
           FROM unnest(enum_range(NULL::therev.colocation_group)) AS g"
    );
    client.batch_execute(&away).await.expect("she is away");
    let before = contents(&client).await;
    refuses_everything(&client, ada, |statement| !statement.is_of_buckets()).await;
    let update = format!("UPDATE threads SET title = 'changed' WHERE author_id = '{ada}'");
    let refused = client.batch_execute(&update).await.expect_err("a stranger is refused too");
    assert!(refused.as_db_error().is_some_and(|e| e.message().contains("moved shard 1")), "{refused:?}");
    assert_eq!(contents(&client).await, before, "nothing was let through");

    client.batch_execute("DELETE FROM therev.pins").await.expect("she is back");
    drop((client, node));
    cluster.finish().await;
}

/// However many users of a bucket are away: a caller asks for each key again that is named here, and as often.
/// Invariant 5.
#[tokio::test]
async fn a_refusal_names_each_key_once() {
    let (cluster, node, ada) = ada_of_shard_0().await;
    // Shard 1 does not own her bucket, and learns of it and of who is away while it is coming.
    let client = cluster.stranger("shard_1").await;
    let away = format!(
        "INSERT INTO therev.pins (colocation_group, user_id, bucket, state, peer, epoch)
         SELECT g, gen_random_uuid(), therev.bucket_of('{ada}'), 'moved', 2, 2
           FROM unnest(enum_range(NULL::therev.colocation_group)) AS g, generate_series(1, 3)"
    );
    client.batch_execute(&away).await.expect("they are away");
    client.batch_execute("SET ROLE therev").await.expect("the library's role");
    let mut tried = 0;
    for (name, statement) in therev::fenced_statements().into_iter().filter(|(_, statement)| statement.asks_many()) {
        let prepared = client.prepare(statement.sql()).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let mut values: Vec<_> =
            prepared.params().iter().enumerate().map(|(n, param)| some_value(n, param, true, ada)).collect();
        values[2] = Box::new(vec![None::<Uuid>]);
        let params: Vec<&(dyn ToSql + Sync)> = values.iter().map(|v| v.as_ref() as &(dyn ToSql + Sync)).collect();
        let rows = client.query(&prepared, &params).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(rows[0].get::<_, Vec<i64>>("refused"), [1], "{name}");
        tried += 1;
    }
    assert!(tried > 5, "{tried}");
    client.batch_execute("RESET ROLE; DELETE FROM therev.pins").await.expect("they are back");
    drop((client, node));
    cluster.finish().await;
}

/// Invariant 3.
#[tokio::test]
async fn every_statement_is_refused_where_the_bucket_is_not_owned() {
    let (cluster, node, ada) = ada_of_shard_0().await;
    let client = cluster.stranger("shard_0").await;
    client
        .batch_execute(
            "CREATE TABLE public.kept AS SELECT * FROM therev.ownership;
             UPDATE therev.ownership SET state = 'moved', peer = 1 WHERE state = 'owned'",
        )
        .await
        .expect("shard 0 gives everything away");
    let before = contents(&client).await;
    refuses_everything(&client, ada, |_| true).await;
    assert_eq!(contents(&client).await, before, "nothing was let through");

    client
        .batch_execute(
            "UPDATE therev.ownership AS o SET state = k.state, peer = k.peer FROM public.kept AS k
              WHERE (o.colocation_group, o.bucket) = (k.colocation_group, k.bucket);
             DROP TABLE public.kept",
        )
        .await
        .expect("shard 0 has everything back");
    drop((client, node));
    cluster.finish().await;
}

/// The list above is complete: every statement of the sources is on it.
/// Invariants 3 and 10.
#[test]
fn every_statement_of_the_sources_is_tried() {
    let mut written = 0;
    let rooms = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders = vec![rooms.join("community/src"), rooms.join("tasks/src")];
    while let Some(folder) = folders.pop() {
        for file in std::fs::read_dir(folder).expect("the sources are there").flatten() {
            if file.path().is_dir() {
                folders.push(file.path());
                continue;
            }
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            written += ["Read", "Write", "ReadMany", "ReadBuckets", "WriteMany"]
                .iter()
                .map(|kind| text.matches(&format!(": {kind} =")).count())
                .sum::<usize>();
        }
    }
    assert_eq!(written, therev::fenced_statements().len() + therev::fenced_task_statements().len());
}

/// Invariant 3.
#[tokio::test]
async fn a_refused_write_lets_nothing_of_its_transaction_through() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Before").await;
    node.relay_once().await.expect("the relay runs");
    let client = cluster.stranger("shard_0").await;
    client
        .batch_execute("UPDATE therev.ownership SET state = 'draining' WHERE state = 'owned'")
        .await
        .expect("shard 0 drains");
    let before = contents(&client).await;

    // One statement with several effects (row, contribution, outbox, audit): refused until the deadline.
    let mut config = cluster.config();
    config.deadline_ms = 200;
    let hurried = therev::connect(config).await.expect("a node");
    let post = hurried.create_post(therev::NewPost::new(ada, open.thread_id, "x")).await;
    assert!(matches!(post, Err(Error::Store(_))), "{post:?}");
    let change = hurried.delete_thread(open.thread_id, &operator()).await;
    assert!(matches!(change, Err(Error::Store(_))), "{change:?}");
    assert!(hurried.create_thread(NewThread::new(ada, "t", "b")).await.is_err());

    // A bulk transaction: the check fails before anything is sent.
    let owners = std::collections::BTreeSet::from([ada.into()]);
    let bulk = hurried.shards().bulk(Group::Content, therev::ShardNo(0), &owners).await.expect("an answer");
    assert!(bulk.is_none());

    // A stranger's transaction of several statements, and one with a savepoint.
    let insert = format!(
        "INSERT INTO threads (author_id, thread_id, title, body) VALUES ('{ada}', '{}', 't', 'b')",
        Uuid::new_v4()
    );
    assert!(client.batch_execute(&format!("BEGIN; {insert}; {insert}; COMMIT")).await.is_err());
    client.batch_execute("ROLLBACK").await.expect("it is over");
    client.batch_execute("BEGIN; SAVEPOINT s").await.expect("a savepoint");
    assert!(client.batch_execute(&insert).await.is_err());
    let after = format!("ROLLBACK TO s; UPDATE threads SET title = 'changed' WHERE author_id = '{ada}'");
    assert!(client.batch_execute(&after).await.is_err(), "the next write is refused as well");
    client.batch_execute("ROLLBACK").await.expect("it is over");

    // A pipeline: what was sent behind the refused statement fails with it.
    client.batch_execute("BEGIN").await.expect("a transaction");
    let update = format!("UPDATE threads SET title = 'changed' WHERE author_id = '{ada}'");
    let (first, second, third) =
        tokio::join!(client.execute(&insert, &[]), client.execute(&update, &[]), client.batch_execute("COMMIT"));
    assert!(first.is_err() && second.is_err());
    assert!(third.is_ok(), "the commit of a failed transaction rolls it back");

    assert_eq!(contents(&client).await, before, "nothing was let through");
    client
        .batch_execute("UPDATE therev.ownership SET state = 'owned' WHERE state = 'draining'")
        .await
        .expect("shard 0 owns again");
    assert!(Bucket::all().count() == 4096);
    drop((client, node, hurried));
    cluster.finish().await;
}
