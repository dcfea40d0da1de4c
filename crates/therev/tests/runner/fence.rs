//! Every statement of the library, where it must be refused.

use crate::names::claim_key;
use crate::things::{operator, post, thread, user_per_shard};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use testkit::TestCluster;
use therev::{
    AccountId, AccountType, AnyFenced, Bucket, BucketSet, Database, Error, Group, NewAccount, NewSession, NewTask,
    NewThread, PostId, Provider, SessionId, ShardNo, TaskId, TaskType, Therev, ThreadId, UserChange, UserId, bucket_of,
};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
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
async fn contents(client: &Client) -> BTreeMap<String, (i64, i64)> {
    let hash = |table: &str| {
        format!("SELECT '{table}', count(*), coalesce(bit_xor(hashtextextended(t::text, 0)), 0) FROM {table} AS t")
    };
    let rows = client.query(&TABLES.map(hash).join(" UNION ALL "), &[]).await.expect("the tables are read");
    rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
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
        for quick in statement.quick().into_iter().flatten() {
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

/// Where a bucket is whole, everybody of it is read here: most reads ask for nothing else. It is whole also while somebody who is read
/// here has a place of their own, and whoever is of the same bucket is asked for in one statement still.
/// Invariant 22.
#[tokio::test]
async fn a_bucket_is_whole_while_everybody_of_it_is_read_here() {
    let (cluster, node, ada) = ada_of_shard_0().await;
    let client = cluster.stranger("shard_0").await;
    let asked = || node.shards().statements()[&Database::Shard(ShardNo(0))];
    for (bucket_is, she_is, is_whole) in [
        ("owned", None, true),
        ("draining", None, true),
        ("moved", None, false),
        ("owned", Some("owned"), true),
        ("owned", Some("draining"), true),
        ("owned", Some("moved"), false),
        ("owned", Some("incoming"), false),
        ("incoming", Some("owned"), false),
    ] {
        let case = format!("the bucket is {bucket_is}, she {she_is:?}");
        let peer = |state: &str| if ["moved", "incoming"].contains(&state) { "1" } else { "NULL" };
        let mut change = format!(
            "DELETE FROM therev.pins;
             UPDATE therev.ownership SET state = '{bucket_is}', peer = {} WHERE bucket = therev.bucket_of('{ada}');",
            peer(bucket_is)
        );
        if let Some(state) = she_is {
            let apart = format!(
                "INSERT INTO therev.pins (colocation_group, user_id, bucket, state, peer, epoch)
                 SELECT g, '{ada}', therev.bucket_of('{ada}'), '{state}', {}, 2
                   FROM unnest(enum_range(NULL::therev.colocation_group)) AS g",
                peer(state)
            );
            change.push_str(&apart);
        }
        client.batch_execute(&change).await.expect("a superuser may");
        let said = client
            .query(
                "SELECT get_bit(f.whole, b.n) = 1 AS is_whole,
                        therev.may_read(f, b.n, $1) AND therev.may_read(f, b.n, gen_random_uuid()) AS everybody
                   FROM therev.fence AS f, therev.bucket_of($1) AS b (n)",
                &[&ada.0],
            )
            .await
            .expect("the fence");
        for row in said {
            assert_eq!((row.get("is_whole"), row.get("everybody")), (is_whole, is_whole), "{case}");
        }
        if is_whole {
            let before = asked();
            assert_eq!(node.user(ada).await.expect("she is read here").user_id, ada, "{case}");
            assert_eq!(asked() - before, 1, "{case}");
        }
    }
    client
        .batch_execute(
            "DELETE FROM therev.pins; UPDATE therev.ownership SET state = 'owned', peer = NULL WHERE bucket % 4 = 0",
        )
        .await
        .expect("as it was");
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

/// What a write takes.
type Values = Vec<Box<dyn ToSql + Sync + Send>>;

macro_rules! values {
    ($($value:expr),* $(,)?) => { vec![$(Box::new($value) as Box<dyn ToSql + Sync + Send>),*] };
}

/// A write with values that have an effect where the owner is: of rows that are there, or new.
struct Attempt {
    name: &'static str,
    bucket: Bucket,
    /// Whose rows; absent: they are the bucket's.
    owner: Option<UserId>,
    values: Values,
    /// What makes it so, past all guards.
    arranged: String,
}

impl Attempt {
    fn of_owner(name: &'static str, owner: UserId, rest: Values) -> Attempt {
        let mut values = values![owner.bucket().sql(), owner.0];
        values.extend(rest);
        Attempt { name, bucket: owner.bucket(), owner: Some(owner), values, arranged: String::new() }
    }

    fn by_id(name: &'static str, owner: UserId, id: Uuid, rest: Values) -> Attempt {
        let mut values = values![owner.bucket().sql(), id];
        values.extend(rest);
        Attempt { name, bucket: owner.bucket(), owner: Some(owner), values, arranged: String::new() }
    }

    fn of_claim(name: &'static str, key: Uuid, rest: Values) -> Attempt {
        let mut values = values![bucket_of(key).sql(), key];
        values.extend(rest);
        Attempt { name, bucket: bucket_of(key), owner: None, values, arranged: String::new() }
    }

    /// A write of many, of one item.
    fn many(name: &'static str, bucket: Bucket, owner: Option<UserId>, item: Value) -> Attempt {
        let values = values![vec![bucket.sql()], vec![item], vec![owner.map(|owner| owner.0)]];
        Attempt { name, bucket, owner, values, arranged: String::new() }
    }

    fn after(self, arranged: impl Into<String>) -> Attempt {
        Attempt { arranged: arranged.into(), ..self }
    }

    /// Makes it in a transaction that is undone, once it is so `before`: what it answers, and whether it has changed anything.
    async fn make(&self, client: &Client, statement: &AnyFenced, before: &str) -> (Vec<Row>, bool) {
        let name = self.name;
        let begin = format!(
            "BEGIN; SET LOCAL session_replication_role = replica; {};
             SET LOCAL session_replication_role = origin; {before}",
            self.arranged
        );
        client.batch_execute(&begin).await.unwrap_or_else(|e| panic!("{name} cannot be arranged: {e:?}"));
        let as_it_was = contents(client).await;
        client.batch_execute("SET LOCAL ROLE therev").await.expect("the library's role");
        let prepared = client.prepare(statement.sql()).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let params: Vec<&(dyn ToSql + Sync)> = self.values.iter().map(|v| v.as_ref() as &(dyn ToSql + Sync)).collect();
        let rows = client.query(&prepared, &params).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        client.batch_execute("SET LOCAL ROLE NONE").await.expect("the superuser again");
        let has_changed = contents(client).await != as_it_was;
        client.batch_execute("ROLLBACK").await.expect("nothing has happened");
        (rows, has_changed)
    }

    fn assert_refused(&self, statement: &AnyFenced, rows: &[Row]) {
        let name = self.name;
        if !statement.asks_many() && !statement.is_by_id() {
            assert!(rows.is_empty(), "{name} was answered where its owner is not");
            return;
        }
        assert_eq!(rows.len(), 1, "{name} answers with nothing but the refusal");
        assert_eq!(rows[0].get::<_, Option<bool>>("present"), None, "{name}");
        if statement.asks_many() {
            assert_eq!(rows[0].get::<_, Vec<i64>>("refused"), [1], "{name}");
        } else {
            let apart = rows[0].get::<_, Option<Vec<Uuid>>>("apart_user_id").unwrap_or_default();
            let is_apart = self.owner.is_some_and(|owner| apart.contains(&owner.0));
            assert!(!rows[0].get::<_, bool>("is_home") || is_apart, "{name}");
        }
    }
}

/// A user of shard 0 who has one of everything, and whom else a write may be about there.
struct Things {
    ada: UserId,
    version: i64,
    /// Her name, held by a claim on the same shard.
    name: String,
    claim_version: i64,
    /// A name that is taken for her and not confirmed, and by which transaction.
    pending: (String, String),
    thread: Uuid,
    post: Uuid,
    sessions: [Uuid; 2],
    /// The default one, and another.
    accounts: [Uuid; 2],
    task: Uuid,
    /// One who has written in the thread.
    bob: UserId,
    /// One of shard 0 who is not there yet.
    new: UserId,
    now: Value,
}

/// A name whose claim is on shard 0.
fn name_on_shard_0(stem: &str) -> String {
    let is_there = |name: &String| bucket_of(claim_key(name)).number().is_multiple_of(4);
    (0..10_000).map(|n| format!("{stem}-{n}")).find(is_there).expect("there are enough numbers")
}

impl Things {
    async fn new(node: &Therev, client: &Client) -> Things {
        let [ada, bob, ..] = user_per_shard(node).await;
        let name = name_on_shard_0("ada");
        let change = UserChange { user_name: Some(name.clone()), ..UserChange::default() };
        node.change_user(ada, change, &operator()).await.expect("her name");
        let open = thread(node, ada, "Owned by shard 0").await;
        let own = post(node, ada, &open, "by its author").await;
        post(node, bob, &open, "by another").await;
        let mut sessions = [Uuid::nil(); 2];
        for session in &mut sessions {
            let opened = node.open_session(ada, NewSession::default()).await.expect("a session");
            *session = opened.session.session_id.0;
        }
        let mut accounts = [Uuid::nil(); 2];
        for (account, is_default) in accounts.iter_mut().zip([true, false]) {
            let new = NewAccount::new(ada, Provider::Claude, AccountType::Api, "work");
            let made =
                node.tasks().create_account(NewAccount { is_default, ..new }, &operator()).await.expect("an account");
            *account = made.account_id.0;
        }
        let task = node.tasks().create_task(NewTask::new(ada, TaskType::Analysis, json!({}))).await.expect("a task");
        node.relay_once().await.expect("the relay runs");
        let claim = "SELECT version FROM therev.claims WHERE claim_key = $1 AND state = 'held'";
        let claim = client.query_one(claim, &[&claim_key(&name)]).await.expect("her name is held");
        let pending = name_on_shard_0("pending");
        let take = "INSERT INTO therev.claims (claim_key, kind, value, user_id, state)
                    VALUES ($1, 'user_name', $2, $3, 'pending') RETURNING xmin::text";
        let taken = client.query_one(take, &[&claim_key(&pending), &pending, &ada.0]).await.expect("a claim");
        let now = client.query_one("SELECT to_jsonb(now())", &[]).await.expect("the server's time");
        let mut unused = std::iter::repeat_with(UserId::new);
        Things {
            ada,
            version: node.user(ada).await.expect("she is there").version,
            name,
            claim_version: claim.get("version"),
            pending: (pending, taken.get(0)),
            thread: open.thread_id.0,
            post: own.post_id.0,
            sessions,
            accounts,
            task: task.task_id.0,
            bob,
            new: unused.find(|id| id.bucket().number().is_multiple_of(4)).expect("there are enough ids"),
            now: now.get(0),
        }
    }

    /// Every write there is, some in more than one way.
    fn attempts(&self) -> Vec<Attempt> {
        [self.on_users(), self.on_claims(), self.on_belongings(), self.on_content(), self.on_copies()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn on_users(&self) -> Vec<Attempt> {
        let Things { ada, new, .. } = *self;
        let note = || operator().note("test");
        let row = || json!({ "user_name": "new", "metadata": {} });
        // A row of the new one's that is not a living user's.
        let gone = |was_registered: bool| {
            format!(
                "INSERT INTO users (bucket, user_id, is_active, deleted_at, was_registered, version)
                 VALUES ({}, '{new}', false, now(), {was_registered}, 7)",
                new.bucket()
            )
        };
        let left = format!(
            "{}; INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, expires_at)
             VALUES ({}, '{new}', gen_random_uuid(), sha256('left'), now())",
            gone(true),
            new.bucket()
        );
        let received = json!({
            "user_id": ada.0, "created_at": self.now, "audit_id": Uuid::new_v4(),
            "actor": "operator test", "action": "test", "target": "post", "before": {}, "after": {}
        });
        vec![
            Attempt::of_owner("community::users::REGISTER", new, values![row(), note()]),
            Attempt::of_owner("community::users::RAISE", new, values![row(), 7_i64, note()]).after(gone(false)),
            Attempt::of_owner(
                "community::users::CHANGE",
                ada,
                values![json!({ "bio": "changed" }), self.version, note(), Uuid::nil()],
            ),
            Attempt::of_owner("community::users::DELETE", ada, values![note()]),
            Attempt::of_owner("community::users::SWEEP", new, values![]).after(left),
            // A user who is not there yet, and one who is, without this name.
            Attempt::of_owner("community::names::SETTLE", new, values!["no name of hers".to_owned()]),
            Attempt::of_owner("community::names::SETTLE", ada, values!["no name of hers".to_owned()]),
            Attempt::many("community::audit::RECEIVE", ada.bucket(), Some(ada), received),
        ]
    }

    fn on_claims(&self) -> Vec<Attempt> {
        let Things { ada, bob, new, .. } = *self;
        let (free, held, pending) = (name_on_shard_0("free"), claim_key(&self.name), claim_key(&self.pending.0));
        let user_name = || "user_name".to_owned();
        let many = |name, item| Attempt::many(name, bucket_of(held), None, item);
        let told = |is_held: bool| json!({ "claim_key": held, "user_id": ada.0, "held": is_held, "version": i64::MAX });
        let handed_over = json!({
            "claim_key": held, "kind": "user_name", "value": self.name, "user_id": bob.0, "version": 7,
            "seen_user_id": ada.0, "seen_version": self.claim_version
        });
        vec![
            Attempt::of_claim("community::names::TAKE", claim_key(&free), values![user_name(), free, new.0, 1_i64]),
            Attempt::of_claim("community::names::GIVE_BACK", pending, values![ada.0, self.pending.1.clone()]),
            many("community::names::CONFIRM", told(true)),
            many("community::names::CONFIRM", told(false)),
            many("community::names::DOUBT", json!({ "claim_key": held, "user_id": ada.0 })),
            many("community::repair::claims::HAND_OVER", handed_over),
            many(
                "community::repair::claims::REMOVE",
                json!({ "claim_key": held, "kind": "user_name", "value": self.name }),
            ),
        ]
    }

    fn on_belongings(&self) -> Vec<Attempt> {
        let ada = self.ada;
        let [kept, other] = self.sessions;
        let [default, another] = self.accounts;
        let note = || operator().note("test");
        let nobody = || None::<Uuid>;
        let opened =
            values![SessionId::new(ada).0, vec![7_u8; 32], json!({}), None::<String>, 3_600.0_f64, None::<String>,];
        let account = values![
            AccountId::new(ada).0,
            "claude".to_owned(),
            "api".to_owned(),
            "new".to_owned(),
            true,
            5_i16,
            json!({}),
            json!({}),
            note(),
        ];
        let task = values![
            TaskId::new(ada).0,
            "analysis".to_owned(),
            None::<String>,
            5_i16,
            json!({}),
            None::<chrono::DateTime<chrono::Utc>>,
            None::<chrono::DateTime<chrono::Utc>>,
            3_i32,
            Uuid::new_v4(),
        ];
        let long_ago = "UPDATE user_sessions SET last_seen_at = now() - interval '1 hour'";
        vec![
            Attempt::of_owner("community::sessions::OPEN", ada, opened),
            Attempt::by_id("community::sessions::TOUCH", ada, other, values![]).after(long_ago),
            Attempt::by_id("community::sessions::REVOKE", ada, other, values![note(), nobody()]),
            Attempt::of_owner("community::sessions::REVOKE_OTHERS", ada, values![kept, note(), nobody()]),
            Attempt::of_owner("tasks::accounts::CREATE", ada, account),
            Attempt::of_owner("tasks::accounts::SET_DEFAULT", ada, values![another, note()]),
            Attempt::by_id("tasks::accounts::REMOVE", ada, default, values![note()]),
            Attempt::of_owner("tasks::tasks::CREATE", ada, task),
            Attempt::by_id(
                "tasks::tasks::CANCEL",
                ada,
                self.task,
                values![note(), nobody(), Uuid::new_v4(), json!({ "by": "test" })],
            ),
        ]
    }

    fn on_content(&self) -> Vec<Attempt> {
        let Things { ada, thread, post, .. } = *self;
        let note = || operator().note("test");
        let written = values![
            PostId::new(ada).0,
            thread,
            ada.0,
            None::<Uuid>,
            None::<Uuid>,
            "TEXT".to_owned(),
            "new".to_owned(),
            "plain".to_owned(),
            json!({}),
        ];
        let opened = values![ThreadId::new(ada).0, "new".to_owned(), "new".to_owned(), "plain".to_owned(), json!({})];
        let item = json!({
            "author_id": ada.0, "post_id": PostId::new(ada).0, "thread_id": thread, "thread_author_id": ada.0,
            "type": "TEXT", "body": "new", "format": "plain", "metadata": {}
        });
        vec![
            Attempt::of_owner("community::posts::CREATE", ada, written),
            Attempt::many("community::posts::CREATE_TOGETHER", ada.bucket(), Some(ada), item),
            Attempt::by_id("community::posts::CHANGE", ada, post, values![json!({ "body": "changed" }), note()]),
            Attempt::by_id("community::posts::DELETE", ada, post, values![note()]),
            Attempt::of_owner("community::threads::CREATE", ada, opened),
            Attempt::by_id("community::threads::CHANGE", ada, thread, values![json!({ "title": "changed" }), note()]),
            Attempt::by_id("community::threads::DELETE", ada, thread, values![note()]),
        ]
    }

    /// On what a thread's owner keeps of those who wrote in it.
    fn on_copies(&self) -> Vec<Attempt> {
        let Things { ada, bob, thread, .. } = *self;
        let many = |name, item| Attempt::many(name, ada.bucket(), Some(ada), item);
        let totals = || json!({ "author_id": ada.0, "thread_id": thread });
        let copy = || json!({ "author_id": ada.0, "thread_id": thread, "participant_id": bob.0 });
        let newer = json!({
            "author_id": bob.0, "thread_id": thread, "thread_author_id": ada.0, "posts": 9, "deleted": 0,
            "last_post_at": self.now, "version": i64::MAX
        });
        let set_back = "UPDATE therev.thread_participants SET version = 1";
        vec![
            many("community::delivery::UPSERT_PARTICIPANTS", newer),
            many("community::delivery::SUM_TOTALS", totals()).after("DELETE FROM therev.thread_totals"),
            many("community::repair::content::OPEN_COPIES", copy()),
            many("community::repair::content::DROP_COPIES", copy()).after(set_back),
            many("community::repair::content::OPEN_TOTALS", totals()),
        ]
    }
}

/// A refusal proves little of a write that would have found no row anyway: here each would change something, and does where the
/// owner is.
/// Invariants 3 and 22.
#[tokio::test]
async fn writes_that_have_an_effect_have_none_where_the_owner_is_not() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let client = cluster.stranger("shard_0").await;
    let things = Things::new(&node, &client).await;
    let all = therev::fenced_statements().into_iter().chain(therev::fenced_task_statements());
    let writes: BTreeMap<&str, AnyFenced> =
        all.filter(|(_, any)| matches!(any, AnyFenced::Write(_) | AnyFenced::WriteMany(_))).collect();
    let attempts = things.attempts();
    let tried: BTreeSet<&str> = attempts.iter().map(|attempt| attempt.name).collect();
    let known: BTreeSet<&str> = writes.keys().copied().collect();
    assert_eq!(tried, known, "each write is given values that have an effect");

    for attempt in &attempts {
        let (name, bucket, write) = (attempt.name, attempt.bucket, &writes[attempt.name]);
        let (_, has_changed) = attempt.make(&client, write, "").await;
        assert!(has_changed, "{name}: these values have no effect");
        let mark = |to: &str| format!("UPDATE therev.ownership SET {to} WHERE bucket = {bucket}");
        let mut elsewhere = vec![mark("state = 'moved', peer = 1"), mark("state = 'draining'")];
        elsewhere.extend(attempt.owner.map(|owner| {
            format!(
                "INSERT INTO therev.pins (colocation_group, user_id, bucket, state, peer, epoch)
                 SELECT g, '{owner}', {bucket}, 'moved', 1, 2
                   FROM unnest(enum_range(NULL::therev.colocation_group)) AS g"
            )
        }));
        for before in &elsewhere {
            let (rows, has_changed) = attempt.make(&client, write, before).await;
            assert!(!has_changed, "{name} was let through: {before}");
            attempt.assert_refused(write, &rows);
        }
    }

    client.batch_execute("DELETE FROM therev.claims WHERE state = 'pending'").await.expect("the name is free again");
    drop((client, node));
    cluster.finish().await;
}
