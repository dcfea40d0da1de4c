//! psql and scripts: writers that are not the library.

use crate::things::{operator, post, thread, user_per_shard};
use std::collections::BTreeSet;
use testkit::TestCluster;
use therev::{
    AccountType, Actor, NewAccount, NewSession, NewTask, NewUser, PostId, Provider, SecretString, SessionId, TaskType,
    Therev, ThreadId, UserId,
};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// Runs SQL that must be refused with this code.
pub(crate) async fn refused(client: &Client, sql: &str, code: &str) {
    match client.batch_execute(sql).await {
        Ok(()) => panic!("this was let through: {sql}"),
        Err(error) => assert_eq!(error.code().map(SqlState::code), Some(code), "{sql}: {error:?}"),
    }
    client.batch_execute("ROLLBACK").await.expect("whatever was open is closed");
}

/// A bucket that is not owned here.
pub(crate) const NOT_OWNED: &str = "TR001";
/// An isolation that would miss a mark.
const ISOLATION: &str = "TR002";
/// TRUNCATE.
const TRUNCATE: &str = "TR003";
/// Something that no row may hold.
const CHECK: &str = "23514";
/// What a role may not do.
pub(crate) const NO_RIGHT: &str = "42501";

/// Invariants 2 and 3.
#[tokio::test]
async fn are_refused_where_the_bucket_is_not_owned() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "On shard 0").await;
    post(&node, ada, &open, "a post").await;
    let client = cluster.stranger("shard_0").await;
    let there = ThreadId::new(bob);

    // Bob's bucket is owned by shard 1.
    let row = format!("(author_id, thread_id, title, body) VALUES ('{bob}', '{there}', 't', 'b')");
    refused(&client, &format!("INSERT INTO threads {row}"), NOT_OWNED).await;
    refused(&client, &format!("UPDATE threads SET author_id = '{bob}' WHERE author_id = '{ada}'"), NOT_OWNED).await;
    let copied = client.copy_in::<_, bytes::Bytes>("COPY threads (author_id, thread_id, title, body) FROM STDIN").await;
    let sink = copied.expect("a copy begins");
    futures_util::pin_mut!(sink);
    let line = bytes::Bytes::from(format!("{bob}\t{there}\tt\tb\n"));
    futures_util::SinkExt::send(&mut sink, line).await.expect("a line is sent");
    let error = sink.finish().await.expect_err("the copy is refused");
    assert_eq!(error.code().map(SqlState::code), Some(NOT_OWNED));

    // Ada's bucket is taken away from under her rows: old owners are checked too.
    let mark = |state: &str, peer: &str| {
        format!("UPDATE therev.ownership SET state = '{state}', peer = {peer} WHERE bucket = {}", ada.bucket())
    };
    client.batch_execute(&mark("moved", "2")).await.expect("the mark is set");
    for table in ["users", "threads", "posts"] {
        refused(&client, &format!("DELETE FROM {table}"), NOT_OWNED).await;
        refused(&client, &format!("UPDATE {table} SET metadata = '{{\"x\": 1}}'"), NOT_OWNED).await;
    }
    client.batch_execute(&mark("draining", "NULL")).await.expect("the mark is set");
    refused(&client, "UPDATE threads SET title = 'x'", NOT_OWNED).await;
    client.batch_execute(&mark("owned", "NULL")).await.expect("the mark is taken off");
    drop((client, node));
    cluster.finish().await;
}

/// Somebody with a row in every table whose rows have owners.
async fn somebody_with_everything(cluster: &TestCluster, node: &Therev) {
    let password = SecretString::from("correct horse");
    let new = NewUser { user_name: "ada".into(), password: Some(password.clone()), ..NewUser::default() };
    let ada = node.register(new, &operator()).await.expect("registered").user_id;
    node.log_in("ada", &password, NewSession::default()).await.expect("a session");
    node.set_active(ada, true, &operator()).await.expect("an audit row");
    let tasks = node.tasks();
    let account = NewAccount::new(ada, Provider::Claude, AccountType::Api, "mine");
    tasks.create_account(account, &operator()).await.expect("an account");
    let task = NewTask::new(ada, TaskType::Summarization, serde_json::json!({}));
    let task = tasks.create_task(task).await.expect("a task").task_id;
    tasks.cancel_task(task, &Actor::User(ada)).await.expect("a line in its log");
    let open = thread(node, ada, "A thread").await;
    post(node, ada, &open, "a post").await;
    node.relay_once().await.expect("the relay runs");
    let home = node.where_id(ada.0).await.expect("a place").shard;
    let route = "INSERT INTO therev.id_routes (id, owner_id) VALUES ($1, $1)";
    cluster.stranger(&format!("shard_{home}")).await.execute(route, &[&ada.0]).await.expect("a route");
}

async fn copies_nothing(client: &Client, table: &str, column: &str) {
    let copy = format!("COPY {table} ({column}) FROM STDIN");
    let sink = client.copy_in::<_, bytes::Bytes>(&copy).await.expect("a copy begins");
    futures_util::pin_mut!(sink);
    let line = bytes::Bytes::from(format!("{}\n", UserId::new()));
    futures_util::SinkExt::send(&mut sink, line).await.expect("a line is sent");
    let error = sink.finish().await.expect_err("the copy is refused");
    assert_eq!(error.code().map(SqlState::code), Some(NOT_OWNED), "{copy}: {error:?}");
}

/// No table is left out, whatever the statement: the guard comes before everything else that a row must be.
#[tokio::test]
async fn are_refused_at_every_table_whose_rows_have_owners() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        somebody_with_everything(&cluster, &node).await;
        let (mut all, mut with_rows) = (BTreeSet::new(), BTreeSet::new());
        for shard in 0..cluster.shards() {
            let client = cluster.stranger(&format!("shard_{shard}")).await;
            let take_away = format!(
                "CREATE TEMP TABLE was AS SELECT * FROM therev.ownership WHERE state = 'owned';
                 UPDATE therev.ownership SET state = 'moved', peer = {} WHERE state = 'owned'",
                (shard + 1) % cluster.shards()
            );
            let give_back = "
                UPDATE therev.ownership AS o SET state = 'owned', peer = NULL
                  FROM was WHERE (o.colocation_group, o.bucket) = (was.colocation_group, was.bucket)";
            let tables = "SELECT table_name, owner_column FROM therev.owned_tables ORDER BY table_name";
            let tables = client.query(tables, &[]).await.expect("the tables");
            client.batch_execute(&take_away).await.expect("nothing is owned here");
            for row in &tables {
                let (table, column): (&str, &str) = (row.get(0), row.get(1));
                let insert = format!("INSERT INTO {table} ({column}) VALUES ('{}')", UserId::new());
                let changes = [format!("UPDATE {table} SET bucket = bucket"), format!("DELETE FROM {table}")];
                refused(&client, &insert, NOT_OWNED).await;
                copies_nothing(&client, table, column).await;
                refused(&client, &format!("TRUNCATE {table} CASCADE"), TRUNCATE).await;
                all.insert(table.to_owned());
                if !client.query(&format!("SELECT FROM {table} LIMIT 1"), &[]).await.expect("rows").is_empty() {
                    with_rows.insert(table.to_owned());
                    for change in &changes {
                        refused(&client, change, NOT_OWNED).await;
                    }
                }
            }
            client.batch_execute(give_back).await.expect("everything is as it was");
            for row in &tables {
                let (table, column): (&str, &str) = (row.get(0), row.get(1));
                for level in ["REPEATABLE READ", "SERIALIZABLE"] {
                    let insert = format!("INSERT INTO {table} ({column}) VALUES ('{}')", UserId::new());
                    refused(&client, &format!("BEGIN ISOLATION LEVEL {level}; {insert}; COMMIT"), ISOLATION).await;
                }
            }
        }
        assert!(all.len() >= 13 && with_rows == all, "no row was tried of {:?}", &all - &with_rows);
        drop(node);
        cluster.finish().await;
    }
}

/// Invariant 2.
#[tokio::test]
async fn are_refused_above_read_committed_and_never_truncate() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    thread(&node, ada, "On shard 0").await;
    let client = cluster.stranger("shard_0").await;
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let begin = format!("BEGIN ISOLATION LEVEL {level}");
        refused(&client, &format!("{begin}; UPDATE threads SET title = 'x'; COMMIT"), ISOLATION).await;
        refused(&client, &format!("{begin}; DELETE FROM threads; COMMIT"), ISOLATION).await;
        let id = ThreadId::new(ada);
        let insert =
            format!("INSERT INTO threads (author_id, thread_id, title, body) VALUES ('{ada}', '{id}', 't', 'b')");
        refused(&client, &format!("{begin}; {insert}; COMMIT"), ISOLATION).await;
    }
    refused(&client, "TRUNCATE posts", TRUNCATE).await;
    refused(&client, "TRUNCATE users CASCADE", TRUNCATE).await;
    refused(&client, "TRUNCATE audit_log", TRUNCATE).await;
    for machinery in
        ["ownership", "pins", "fence", "fence_account", "fence_content", "outbox", "relocation_parts", "sentinels"]
    {
        refused(&client, &format!("TRUNCATE therev.{machinery}"), TRUNCATE).await;
    }
    let month = client
        .query_one(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_log'::regclass LIMIT 1",
            &[],
        )
        .await
        .expect("there is a month");
    refused(&client, &format!("TRUNCATE {}", month.get::<_, &str>(0)), TRUNCATE).await;
    drop((client, node));
    cluster.finish().await;
}

#[tokio::test]
async fn write_rows_that_count_like_any_other() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "On shard 0").await;
    let client = cluster.stranger("shard_1").await;
    let id = PostId::new(bob);
    client
        .execute(
            "INSERT INTO posts (author_id, post_id, thread_id, thread_author_id, body) VALUES ($1, $2, $3, $4, 'by hand')",
            &[&bob.0, &id.0, &open.thread_id.0, &ada.0],
        )
        .await
        .expect("the bucket is filled in");
    node.relay_once().await.expect("the relay runs");
    assert_eq!(node.thread(open.thread_id).await.expect("the thread").post_count, 1);
    let page = node.thread_page(open.thread_id, None, 5).await.expect("the page");
    assert_eq!(page.posts[0].post.body.as_deref(), Some("by hand"));
    let first = page.posts[0].post.version;
    client.execute("UPDATE posts SET body = 'again' WHERE post_id = $1", &[&id.0]).await.expect("an update");
    assert!(node.post(id).await.expect("the post").version > first, "versions grow for strangers too");
    client.execute("DELETE FROM posts WHERE post_id = $1", &[&id.0]).await.expect("a delete");
    drop((client, node));
    cluster.finish().await;
}

/// What the library cannot read, times and JSON, would break every list that it is in.
#[tokio::test]
async fn are_refused_what_nobody_can_read() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "On shard 0").await;
    post(&node, ada, &open, "a post").await;
    node.relay_once().await.expect("the relay runs");
    let client = cluster.stranger("shard_0").await;
    let columns = [
        ("users", "created_at"),
        ("threads", "created_at"),
        ("posts", "created_at"),
        ("therev.thread_contributions", "last_post_at"),
    ];
    for (table, column) in columns {
        for time in ["infinity", "-infinity", "1600-01-01", "9950-01-01"] {
            refused(&client, &format!("UPDATE {table} SET {column} = '{time}'"), CHECK).await;
        }
    }
    let endless = format!(
        "INSERT INTO user_sessions (user_id, session_id, token_hash, expires_at)
         VALUES ('{ada}', '{}', sha256('x'), 'infinity')",
        SessionId::new(ada)
    );
    refused(&client, &endless, CHECK).await;
    let deep = format!("{}1{}", "[".repeat(127), "]".repeat(127));
    for json in [r#"{"x": 1e400}"#, r#"[{"y": [-2e308]}]"#, &deep] {
        refused(&client, &format!("UPDATE posts SET metadata = jsonb_build_object('in', '{json}'::jsonb)"), CHECK)
            .await;
    }
    client.batch_execute(r#"UPDATE posts SET metadata = '{"x": 1e308}'"#).await.expect("a number like any other");
    let long_ago = format!("UPDATE users SET created_at = '1999-12-31 23:59:59+00' WHERE user_id = '{ada}'");
    client.batch_execute(&long_ago).await.expect("a time like any other");
    let directory = cluster.stranger("directory").await;
    refused(&directory, "UPDATE user_directory SET created_at = 'infinity'", CHECK).await;
    for column in ["created_at", "last_activity_at"] {
        refused(&directory, &format!("UPDATE thread_directory SET {column} = '-infinity'"), CHECK).await;
    }
    drop((client, directory, node));
    cluster.finish().await;
}

/// Nobody would find such a row by its id; the route is on whichever shard its hash says.
#[tokio::test]
async fn whose_ids_carry_no_bucket_need_routes() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let client = cluster.stranger("shard_0").await;
    // Of version 8, but of no variant that is known.
    let mut bytes = *ThreadId::new(ada).0.as_bytes();
    bytes[8] &= 0x3f;
    let ids = [Uuid::new_v4(), Uuid::from_bytes(bytes)];
    for id in ids {
        let insert = "INSERT INTO threads (author_id, thread_id, title, body) VALUES ($1, $2, 'migrated', 'text')";
        client.execute(insert, &[&ada.0, &id]).await.expect("the row is written");
    }
    node.relay_once().await.expect("the relay runs");
    let report = node.check().await.expect("check runs");
    let wrong: Vec<(&str, u64)> =
        report.checks.iter().filter(|check| check.wrong > 0).map(|check| (check.name.as_str(), check.wrong)).collect();
    assert_eq!(wrong, [("ids that route", 2)]);
    for id in ids {
        let home = cluster.stranger(&format!("shard_{}", therev::bucket_of(id).number() % 4)).await;
        let route = "INSERT INTO therev.id_routes (id, owner_id) VALUES ($1, $2)";
        home.execute(route, &[&id, &ada.0]).await.expect("the route is written");
        assert_eq!(node.thread(id.into()).await.expect("it is found by its route").title, "migrated");
    }
    drop((client, node));
    cluster.finish().await;
}

#[tokio::test]
async fn a_reader_sees_no_secret() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let new = NewUser { user_name: "ada".into(), email: Some("ada@example.org".into()), ..NewUser::default() };
    node.register(new, &operator()).await.expect("a user with an address");
    for shard in 0..cluster.shards() {
        let reader = cluster.stranger(&format!("shard_{shard}")).await;
        reader.batch_execute("SET ROLE therev_reader").await.expect("its rights alone");
        for table in ["users", "user_sessions", "user_ai_accounts", "therev.claims", "therev.outbox", "audit_log"] {
            reader.query(&format!("SELECT count(*) FROM {table}"), &[]).await.expect("how many there are");
            let refused = reader.query(&format!("SELECT t::text FROM {table} AS t"), &[]).await.expect_err("not whole");
            assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{table}: {refused}");
        }
        // Nor can an address be tried against what is made of it: a claim's key and bucket.
        for column in ["claim_key", "bucket", "user_id"] {
            refused(&reader, &format!("SELECT {column} FROM therev.claims"), NO_RIGHT).await;
        }
        refused(&reader, "SELECT ids FROM therev.outbox", NO_RIGHT).await;
        for table in ["threads", "posts", "ai_tasks"] {
            reader.query(&format!("SELECT t::text FROM {table} AS t"), &[]).await.expect("what everybody may see");
        }
    }
    drop(node);
    cluster.finish().await;
}
