//! Writers that a switch could miss: each of them is refused, waited for, or carried along. None loses a row or doubles one. And
//! rows that somebody put at the target past all guards: the comparison finds them before any switch.

use crate::things::{operator, post, thread, user_per_shard};
use std::sync::Arc;
use std::time::Duration;
use testkit::{TestCluster, nothing_left};
use therev::bulk::BulkPost;
use therev::relocation::{self, Goal, Mover, Options, Relocation, Request, Result, State};
use therev::{Config, Error, Format, Group, Layout, PostId, ShardNo, Therev, Thread, ThreadId, UserChange, UserId};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

const LIMIT: Duration = Duration::from_secs(120);
const BUDGET: Duration = Duration::from_millis(500);
const TRUE_SESSION: &str = "user_sessions WHERE token_hash = sha256('the true one')";
/// How many posts of each of two authors a bulk write brings.
const IN_BULK: u16 = 200;

/// Two shards; `ada`'s bucket is to move from shard 0 to shard 1, `bob`'s stays on shard 0, `cy`'s on shard 1.
struct Attacked {
    cluster: TestCluster,
    node: Therev,
    mover: Arc<Mover>,
    ada: UserId,
    bob: UserId,
    cy: UserId,
    open: Thread,
}

impl Attacked {
    async fn new() -> Attacked {
        let cluster = TestCluster::new(Layout::Colocated, 2).await;
        let config = Config { relay_ms: 50, deadline_ms: 20_000, ..cluster.config() };
        let node = therev::connect(config).await.expect("a node");
        let [ada, cy, bob, _] = user_per_shard(&node).await;
        let open = thread(&node, ada, "It moves").await.value;
        post(&node, cy, &open, "a reply from elsewhere").await;
        let mover = Mover::new(node.shards().clone(), Options { budget: BUDGET, ..Options::default() }).into();
        Attacked { cluster, node, mover, ada, bob, cy, open }
    }

    async fn begin(&self, goal: Goal) -> i64 {
        let (source, target) = (ShardNo(0), ShardNo(1));
        let request =
            Request { groups: Group::ALL.to_vec(), buckets: vec![self.ada.bucket()], pin: None, source, target };
        let plan = self.mover.plan(&request).await.expect("a plan");
        self.mover.begin(&plan, goal, "test").await.expect("it begins").relocation
    }

    /// Carries it on in the background.
    fn drive(&self, number: i64) -> JoinHandle<Result<Relocation>> {
        let mover = self.mover.clone();
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || runtime.block_on(Box::pin(mover.drive(number, &|_| {}))))
    }

    /// Brings ada's bucket to shard 1 and stops where the way back is open.
    async fn switched(&self) -> i64 {
        let number = self.begin(Goal::Switched).await;
        rests(self.drive(number), State::Switched).await;
        number
    }

    /// Waits until the relocation is so far.
    async fn until(&self, number: i64, what: &str, is_so: impl Fn(&Relocation) -> bool) {
        let wait = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while !is_so(&self.mover.show(number).await.expect("the relocation")) {
                ticks.tick().await;
            }
        };
        let waited = tokio::time::timeout(LIMIT, wait).await;
        assert!(waited.is_ok(), "never {what}: {:?}", self.mover.show(number).await);
    }

    /// Waits until it says that a transaction holds the switch up.
    async fn until_held_up(&self, number: i64) {
        self.until(number, "held up", |now| now.note.contains("a long transaction holds the tables")).await;
    }

    /// Lets a relocation come to its switch and no further, for as long as the connection lives: a transaction that locks
    /// a table as a writer does, and has written nothing.
    async fn brake(&self) -> Client {
        let client = self.cluster.stranger("shard_0").await;
        let lock = "BEGIN; LOCK TABLE therev.id_routes IN ROW EXCLUSIVE MODE";
        client.batch_execute(lock).await.expect("the table is locked");
        client
    }

    /// Brings a relocation to its switch and has it rest there: nobody works at it, and both sides can be compared.
    async fn rests_before_its_switch(&self) -> i64 {
        let brake = self.brake().await;
        let number = self.begin(Goal::Switched).await;
        let driven = self.drive(number);
        self.until(number, "switching", |now| now.state == State::Switching).await;
        self.mover.pause(number, true).await.expect("it can rest");
        rests(driven, State::Switching).await;
        drop(brake);
        number
    }

    /// Of ada's rows at the target one is another than the source's, one is missing and one is too many.
    async fn spoil(&self, target: &Client) {
        let (ada, bucket) = (self.ada, self.ada.bucket());
        let spoil = format!(
            "SET session_replication_role = replica;
             UPDATE users SET bio = 'spoilt' WHERE user_id = '{ada}';
             DELETE FROM threads WHERE author_id = '{ada}';
             INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, expires_at)
             VALUES ({bucket}, '{ada}', gen_random_uuid(), sha256('an intruder'), now());
             RESET session_replication_role"
        );
        target.batch_execute(&spoil).await.expect("past all guards");
    }

    /// Compares both sides, and may put the target right.
    async fn verify(&self, number: i64, repair: bool) -> Result<i64> {
        Box::pin(self.mover.verify(number, repair)).await
    }

    /// Lets a relocation go on that rests before its switch.
    async fn goes_on(&self, number: i64) {
        self.mover.pause(number, false).await.expect("it goes on");
        rests(self.drive(number), State::Switched).await;
    }

    /// A session of ada's where she is, and another one of the same key on the shard that the stream leads to.
    async fn sessions_of_one_key(&self, owner: &Client, other: &Client) {
        let session = uuid::Uuid::new_v4();
        let insert = |token: &str| {
            format!(
                "INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, expires_at)
                 VALUES ({}, '{}', '{session}', sha256('{token}'), now() + interval '1 day')",
                self.ada.bucket(),
                self.ada
            )
        };
        let intruder = format!("SET session_replication_role = replica; {}", insert("an intruder"));
        other.batch_execute(&intruder).await.expect("past all guards");
        owner.batch_execute(&insert("the true one")).await.expect("a session");
    }

    /// Writes posts of ada and bob in bulk: one transaction, where one shard has both. Says how many were written.
    async fn write_in_bulk(&self) -> u64 {
        let row = |author_id: UserId| BulkPost {
            post_id: PostId::new(author_id),
            author_id,
            thread_id: self.open.thread_id,
            thread_author_id: self.ada,
            parent: None,
            body: "in bulk".into(),
            format: Format::Plain,
            score: 0,
            metadata: serde_json::json!({}),
            created_at: chrono::DateTime::UNIX_EPOCH,
        };
        let mut writer = self.node.bulk_writer();
        let rows = (0..IN_BULK).flat_map(|_| [self.ada, self.bob]).map(row).collect();
        writer.posts("posts", rows).await.expect("they are on their way");
        writer.finish().await.expect("they are written");
        writer.written()
    }

    /// Finishes what is switched, and proves that all of it fits together.
    async fn finish(self, number: i64) {
        if self.mover.show(number).await.expect("the relocation").state == State::Switched {
            self.mover.finish(number).await.expect("it can be finished");
            rests(self.drive(number), State::Done).await;
        }
        nothing_left(&[self.cluster.url("shard_0"), self.cluster.url("shard_1")]).await;
        assert_eq!(self.node.user(self.ada).await.expect("ada").user_id, self.ada);
        drop((self.mover, self.node));
        self.cluster.finish().await;
    }
}

/// A gate before the commit of bulk writes. While it is shut, each is held inside its transaction, with all its rows written.
struct Gate {
    is_open: watch::Sender<bool>,
    arrivals: Arc<Notify>,
}

impl Gate {
    /// Needs a runtime with a thread to spare for whoever waits at it.
    fn shut() -> Gate {
        let (is_open, opens) = watch::channel(false);
        let arrivals = Arc::new(Notify::new());
        let (arrives, runtime) = (arrivals.clone(), tokio::runtime::Handle::current());
        fail::cfg_callback("bulk.before_commit", move || {
            let mut opens = opens.clone();
            if *opens.borrow() {
                return;
            }
            arrives.notify_one();
            // A test that has ended holds nobody any more.
            let waits = async { opens.wait_for(|is_open| *is_open).await.is_ok() };
            tokio::task::block_in_place(|| runtime.block_on(waits));
        })
        .expect("a place in the sources");
        Gate { is_open, arrivals }
    }

    fn set(&self, is_open: bool) {
        self.is_open.send_replace(is_open);
    }

    async fn until_somebody_is_held(&self) {
        tokio::time::timeout(LIMIT, self.arrivals.notified()).await.expect("a bulk write comes to its commit");
    }
}

async fn rests(driven: JoinHandle<Result<Relocation>>, state: State) -> Relocation {
    let ended = tokio::time::timeout(LIMIT, driven).await.expect("it comes to an end").expect("no panic");
    let ended = ended.expect("the relocation goes on");
    assert_eq!(ended.state, state, "{ended:?}");
    ended
}

async fn refused(client: &Client, sql: &str, code: &str) {
    match client.batch_execute(sql).await {
        Ok(()) => panic!("this was let through: {sql}"),
        Err(error) => assert_eq!(error.code().map(SqlState::code), Some(code), "{sql}: {error:?}"),
    }
}

fn insert_thread(author: UserId, title: &str) -> String {
    let id = ThreadId::new(author);
    format!("INSERT INTO threads (author_id, thread_id, title, body) VALUES ('{author}', '{id}', '{title}', 'b')")
}

/// How many rows of ada's are spoilt at the target, missing there, and too many.
async fn spoilt(target: &Client) -> [i64; 3] {
    let there = count(target, "threads WHERE title = 'It moves'").await;
    [count(target, "users WHERE bio = 'spoilt'").await, 1 - there, count(target, "user_sessions").await]
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM {sql}"), &[]).await.expect("rows are counted").get(0)
}

/// Invariant 2.
#[tokio::test]
async fn a_snapshot_older_than_the_mark_writes_nothing() {
    let attacked = Attacked::new().await;
    let mut old = Vec::new();
    for (level, code) in [("REPEATABLE READ", "TR002"), ("SERIALIZABLE", "TR002"), ("READ COMMITTED", "TR001")] {
        let client = attacked.cluster.stranger("shard_0").await;
        client.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; TABLE therev.fence")).await.expect("a snapshot");
        old.push((client, code));
    }
    let number = attacked.switched().await;
    for (client, code) in old {
        client.batch_execute("SAVEPOINT s").await.expect("it is open still");
        for write in [
            insert_thread(attacked.ada, "late"),
            format!("UPDATE users SET bio = 'late' WHERE user_id = '{}'", attacked.ada),
            format!("DELETE FROM posts WHERE author_id = '{}'; DELETE FROM threads", attacked.ada),
        ] {
            refused(&client, &write, code).await;
            client.batch_execute("ROLLBACK TO s").await.expect("the next one");
        }
        client.batch_execute("COMMIT").await.expect("it wrote nothing");
    }
    attacked.finish(number).await;
}

/// A server whose transactions are SERIALIZABLE unless they say otherwise: the library's do.
/// Invariant 2.
#[tokio::test]
async fn a_servers_default_isolation_does_not_reach_the_library() {
    let attacked = Attacked::new().await;
    for part in ["shard_0", "shard_1"] {
        let client = attacked.cluster.stranger(part).await;
        let sql =
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = ''repeatable read''',
                       current_database()); END $$";
        client.batch_execute(sql).await.expect("another default");
    }
    let late = attacked.cluster.node().await;
    let (holder, looks) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_0").await);
    let hold = "BEGIN ISOLATION LEVEL READ COMMITTED; UPDATE users SET first_name = 'first' WHERE bucket = $1";
    let hold = hold.replace("$1", &attacked.ada.bucket().to_string());
    holder.batch_execute(&hold).await.expect("the row is held");
    let ada = attacked.ada;
    let change = tokio::spawn(async move {
        let bio = UserChange { bio: Some(Some("second".into())), ..UserChange::default() };
        late.change_user(ada, bio, &operator()).await
    });
    until_waiting(&looks, 1).await;
    holder.batch_execute("COMMIT").await.expect("the row is free");
    // It saw the row as it is after the wait, and that its version is another one: it could not with an older snapshot.
    let changed = change.await.expect("no panic").expect_err("somebody was quicker");
    assert!(matches!(changed, Error::Changed { .. }), "{changed:?}");
    let number = attacked.switched().await;
    attacked.finish(number).await;
}

/// Waits until so many wait for a lock in this database.
///
/// Not asked through a transaction of its own: that would see the same activity all the while.
async fn until_waiting(client: &Client, waiters: i64) {
    let sql = "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let wait = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while count(client, sql).await != waiters {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("somebody waits");
}

/// Invariant 2.
#[tokio::test]
async fn a_generic_plan_asks_the_fence_each_time() {
    let attacked = Attacked::new().await;
    let sql = "WITH fence AS (SELECT FROM therev.fence
                              WHERE colocation_group = 'content' AND get_bit(writable, $1::smallint) = 1)
               UPDATE threads AS t SET score = t.score + 1 FROM fence
                WHERE t.bucket = $1 AND t.author_id = $2";
    let mut prepared = Vec::new();
    for part in ["shard_0", "shard_1"] {
        let client = attacked.cluster.stranger(part).await;
        client.batch_execute("SET ROLE therev; SET plan_cache_mode = force_generic_plan").await.expect("the library");
        let update = client.prepare(sql).await.expect("it is prepared");
        prepared.push((client, update));
    }
    let bucket = attacked.ada.bucket().sql();
    let run = async |n: usize| {
        let (client, update): &(Client, tokio_postgres::Statement) = &prepared[n];
        client.execute(update, &[&bucket, &attacked.ada.0]).await.expect("an answer")
    };
    for _ in 0..8 {
        assert_eq!((run(0).await, run(1).await), (1, 0));
    }
    let number = attacked.switched().await;
    assert_eq!((run(0).await, run(1).await), (0, 1), "the rows are on both sides, and one of them owns them");
    attacked.mover.want(number, Goal::Reversed).await.expect("the way back");
    rests(attacked.drive(number), State::Reversed).await;
    assert_eq!((run(0).await, run(1).await), (1, 0));
    let thread = attacked.cluster.stranger("shard_0").await;
    let score = "threads WHERE score = 10";
    assert_eq!(count(&thread, score).await, 1, "each update counted once");
    drop((prepared, thread));
    attacked.finish(number).await;
}

/// Invariant 14.
#[tokio::test]
async fn an_update_that_waits_for_a_row_is_waited_for() {
    let attacked = Attacked::new().await;
    let brake = attacked.brake().await;
    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    attacked.until(number, "switching", |now| now.state == State::Switching).await;
    // A lock on the row alone is none of a writer; who waits for it has passed the fence.
    let (holder, looks) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_0").await);
    let hold = format!("BEGIN; SELECT FROM users WHERE user_id = '{}' FOR UPDATE", attacked.ada);
    holder.batch_execute(&hold).await.expect("the row is held");
    let (node, ada) = (attacked.node.clone(), attacked.ada);
    let change = tokio::spawn(async move {
        let bio = UserChange { bio: Some(Some("over the mark".into())), ..UserChange::default() };
        node.change_user(ada, bio, &operator()).await
    });
    until_waiting(&looks, 1).await;
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    attacked.until_held_up(number).await;
    // A mark that comes all the same, from a mover that asked nobody, finds it among the writers.
    let mark = "SELECT therev.drain($1, 1, 5000000)";
    assert!(holder.query_one(mark, &[&number]).await.is_ok());
    holder.batch_execute("COMMIT").await.expect("the row is free");
    change.await.expect("no panic").expect("the change is made");
    rests(driven, State::Switched).await;
    assert_eq!(attacked.node.user(ada).await.expect("ada").bio.as_deref(), Some("over the mark"));
    let target = attacked.cluster.stranger("shard_1").await;
    assert_eq!(count(&target, "users WHERE bio = 'over the mark'").await, 1);
    drop((brake, holder, looks, target));
    attacked.finish(number).await;
}

/// Invariant 14.
#[tokio::test]
async fn prepared_transactions_are_waited_for() {
    let attacked = Attacked::new().await;
    let prepare = async |name: &str| {
        let client = attacked.cluster.stranger("shard_0").await;
        let gid = format!("{name}-{}", std::process::id());
        let begin = format!("BEGIN; {}; PREPARE TRANSACTION '{gid}'", insert_thread(attacked.ada, name));
        client.batch_execute(&begin).await.expect("it is prepared");
        gid
    };
    let end = async |what: &str, gid: &str| {
        let client = attacked.cluster.stranger("shard_0").await;
        client.batch_execute(&format!("{what} PREPARED '{gid}'")).await.expect("it ends");
    };
    // One that was there before: the slot, and so the copy, begins behind it.
    let first = prepare("before the slot").await;
    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    let looks = attacked.cluster.stranger("shard_0").await;
    until_waiting(&looks, 1).await;
    assert_eq!(attacked.mover.show(number).await.expect("the relocation").state, State::Copying);
    let brake = attacked.brake().await;
    end("COMMIT", &first).await;
    attacked.until(number, "switching", |now| now.state == State::Switching).await;
    // One that comes later: the switch waits for it, and carries it along.
    let second = prepare("before the switch").await;
    let third = prepare("never to be").await;
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    attacked.until_held_up(number).await;
    end("ROLLBACK", &third).await;
    attacked.until_held_up(number).await;
    assert!(!driven.is_finished());
    end("COMMIT", &second).await;
    rests(driven, State::Switched).await;
    let target = attacked.cluster.stranger("shard_1").await;
    for (title, times) in [("before the slot", 1), ("before the switch", 1), ("never to be", 0)] {
        assert_eq!(count(&target, &format!("threads WHERE title = '{title}'")).await, times, "{title}");
    }
    drop((looks, brake, target));
    attacked.finish(number).await;
}

/// A bulk write locks first, checks then, and copies: the copy and the switch wait for it, and all its rows are carried along. One
/// that still believes the old owner is sent to the new one.
/// Invariants 2 and 14.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_writes_are_waited_for_and_lose_no_row() {
    let attacked = Attacked::new().await;
    let (source, target) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_1").await);
    let gate = Gate::shut();
    let all = 2 * u64::from(IN_BULK);

    // One that was there before: the slot, and so the copy, begins behind it.
    let begins = async {
        gate.until_somebody_is_held().await;
        let number = attacked.begin(Goal::Switched).await;
        let driven = attacked.drive(number);
        until_waiting(&source, 1).await;
        let brake = attacked.brake().await;
        gate.set(true);
        (number, driven, brake)
    };
    let (written, (number, driven, brake)) = tokio::join!(attacked.write_in_bulk(), begins);
    assert_eq!(written, all);
    attacked.until(number, "switching", |now| now.state == State::Switching).await;

    // One that is under way when the mark is to come.
    gate.set(false);
    let switches = async {
        gate.until_somebody_is_held().await;
        brake.batch_execute("ROLLBACK").await.expect("the brake is off");
        attacked.until_held_up(number).await;
        assert!(!driven.is_finished(), "it waits");
        gate.set(true);
    };
    let (written, ()) = tokio::join!(attacked.write_in_bulk(), switches);
    assert_eq!(written, all);
    rests(driven, State::Switched).await;

    // One that comes after it.
    assert_eq!(attacked.write_in_bulk().await, all);
    let (ada, bob) = (attacked.ada, attacked.bob);
    let posts_of = |author: UserId| format!("posts WHERE body = 'in bulk' AND author_id = '{author}'");
    let each = 3 * i64::from(IN_BULK);
    assert_eq!(count(&target, &posts_of(ada)).await, each);
    attacked.mover.finish(number).await.expect("it can be finished");
    rests(attacked.drive(number), State::Done).await;
    for (client, author, posts) in [(&target, ada, each), (&source, ada, 0), (&source, bob, each), (&target, bob, 0)] {
        assert_eq!(count(client, &posts_of(author)).await, posts, "{author}");
    }
    fail::remove("bulk.before_commit");
    attacked.node.relay_once().await.expect("the relay runs");
    assert_eq!(attacked.node.thread(attacked.open.thread_id).await.expect("it moved").post_count, 2 * each + 1);
    drop((source, target, brake));
    attacked.finish(number).await;
}

#[tokio::test]
async fn strangers_are_carried_along_or_refused() {
    let attacked = Attacked::new().await;
    let Attacked { ada, bob, cy, .. } = attacked;
    let (source, target) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_1").await);
    let brake = attacked.brake().await;
    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    attacked.until(number, "switching", |now| now.state == State::Switching).await;

    // Before the switch: into the buckets that move and out of them, on the source; nothing on the target.
    for (owner, title) in [(ada, "to bob"), (bob, "to ada")] {
        source.batch_execute(&insert_thread(owner, title)).await.expect("a thread");
    }
    for (owner, title) in [(bob, "to bob"), (ada, "to ada")] {
        let update = format!("UPDATE threads SET author_id = '{owner}' WHERE title = '{title}'");
        source.batch_execute(&update).await.expect("another owner");
    }
    refused(&target, &insert_thread(ada, "too early"), "TR001").await;
    let steal = format!("UPDATE posts SET author_id = '{ada}' WHERE author_id = '{cy}'");
    refused(&target, &steal, "TR001").await;
    for client in [&source, &target] {
        refused(client, "TRUNCATE threads CASCADE", "TR003").await;
    }

    // A copy that is under way when the mark is to come: it has passed the guard, so it is waited for.
    let columns = "COPY threads (author_id, thread_id, title, body) FROM STDIN";
    let slow = attacked.cluster.stranger("shard_0").await;
    let mut sink = Box::pin(slow.copy_in::<_, bytes::Bytes>(columns).await.expect("a copy begins"));
    let line = |title: &str| bytes::Bytes::from(format!("{ada}\t{}\t{title}\tb\n", ThreadId::new(ada)));
    futures_util::SinkExt::send(&mut sink, line("copied over the mark")).await.expect("a line");
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    attacked.until_held_up(number).await;
    futures_util::SinkExt::send(&mut sink, line("copied over the mark")).await.expect("a line");
    assert_eq!(sink.as_mut().finish().await.expect("the copy ends"), 2);
    rests(driven, State::Switched).await;

    // After it: the source takes nothing more, and what came before is where its owner is.
    let mut sink = Box::pin(source.copy_in::<_, bytes::Bytes>(columns).await.expect("a copy begins"));
    futures_util::SinkExt::send(&mut sink, line("too late")).await.expect("a line");
    let error = sink.as_mut().finish().await.expect_err("the copy is refused");
    assert_eq!(error.code().map(SqlState::code), Some("TR001"));
    refused(&source, &insert_thread(ada, "too late"), "TR001").await;
    refused(&source, &format!("UPDATE threads SET author_id = '{ada}' WHERE title = 'to bob'"), "TR001").await;
    refused(&source, &format!("UPDATE threads SET author_id = '{bob}' WHERE title = 'to ada'"), "TR001").await;
    for client in [&source, &target] {
        refused(client, "TRUNCATE posts", "TR003").await;
    }
    let titles = [("to bob", 0), ("to ada", 1), ("copied over the mark", 2), ("too late", 0), ("too early", 0)];
    for (title, times) in titles {
        assert_eq!(count(&target, &format!("threads WHERE title = '{title}'")).await, times, "{title}");
    }
    assert_eq!(count(&source, "threads WHERE title = 'to bob'").await, 1);
    // Their ids say another bucket than their owners', which only a stranger brings about.
    source.batch_execute("DELETE FROM threads WHERE title = 'to bob'").await.expect("deleted");
    target.batch_execute("DELETE FROM threads WHERE title = 'to ada'").await.expect("deleted");
    drop((sink, slow, brake, source, target));
    attacked.finish(number).await;
}

#[tokio::test]
async fn a_huge_transaction_is_decoded_before_the_switch_not_in_it() {
    let attacked = Attacked::new().await;
    let brake = attacked.brake().await;
    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    attacked.until(number, "switching", |now| now.state == State::Switching).await;
    let huge = attacked.cluster.stranger("shard_0").await;
    let rows = format!(
        "BEGIN; SET LOCAL logical_decoding_work_mem = '64kB';
         INSERT INTO user_sessions (user_id, session_id, token_hash, expires_at)
         SELECT u.id::uuid, gen_random_uuid(), sha256(n::text::bytea), now() + interval '1 day'
           FROM generate_series(1, 10000) AS n, (VALUES ('{}'), ('{}')) AS u (id)",
        attacked.ada, attacked.bob
    );
    huge.batch_execute(&rows).await.expect("many rows");
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    attacked.until_held_up(number).await;
    // The stream has it all to do from here on, while the switch is tried again and again.
    huge.batch_execute("COMMIT").await.expect("it is committed");
    let switched = rests(driven, State::Switched).await;
    assert!(switched.pause_ms.is_some_and(|ms| ms <= BUDGET.as_secs_f64() * 1_000.0), "{switched:?}");
    let target = attacked.cluster.stranger("shard_1").await;
    assert_eq!(count(&target, &format!("user_sessions WHERE user_id = '{}'", attacked.ada)).await, 10_000);
    assert_eq!(count(&target, &format!("user_sessions WHERE user_id = '{}'", attacked.bob)).await, 0);
    drop((huge, brake, target));
    attacked.finish(number).await;
}

/// Somebody has put a row where the stream wants to put one: it stops, and all is copied anew.
#[tokio::test]
async fn a_stream_that_stops_on_a_conflict_is_begun_anew() {
    let attacked = Attacked::new().await;
    let brake = attacked.brake().await;
    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    attacked.until(number, "switching", |now| now.state == State::Switching).await;
    let (source, target) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_1").await);
    attacked.sessions_of_one_key(&source, &target).await;
    // And what comes behind it.
    post(&attacked.node, attacked.ada, &attacked.open, "behind the conflict").await;
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    rests(driven, State::Switched).await;
    assert_eq!(count(&target, TRUE_SESSION).await, 1);
    assert_eq!(count(&target, "user_sessions").await, 1, "the intruder is gone");
    assert_eq!(attacked.node.posts_by_author(attacked.ada, None, 9).await.expect("an answer").len(), 1);
    drop((brake, source, target));
    attacked.finish(number).await;
}

/// The same on the way back: users go on where they are, and going back waits, says for what, and can be called off. Once the row
/// is gone, the stream gets on by itself.
#[tokio::test]
async fn a_way_back_that_stops_on_a_conflict_waits_for_people() {
    let attacked = Attacked::new().await;
    let number = attacked.switched().await;
    let (source, target) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_1").await);
    attacked.sessions_of_one_key(&target, &source).await;
    attacked.mover.want(number, Goal::Reversed).await.expect("the way back is open");
    let driven = attacked.drive(number);
    attacked.until(number, "stopped", |now| now.note.contains("a change cannot be applied there")).await;
    post(&attacked.node, attacked.ada, &attacked.open, "behind the conflict").await;
    assert!(!driven.is_finished(), "it waits");
    assert_eq!(count(&source, TRUE_SESSION).await, 0);

    attacked.mover.want(number, Goal::Aborted).await.expect("it can be called off");
    rests(driven, State::Switched).await;
    source.batch_execute("DELETE FROM user_sessions").await.expect("the intruder is gone");
    attacked.mover.want(number, Goal::Reversed).await.expect("the way back is open still");
    rests(attacked.drive(number), State::Reversed).await;
    assert_eq!(count(&source, TRUE_SESSION).await, 1);
    assert_eq!(attacked.node.posts_by_author(attacked.ada, None, 9).await.expect("an answer").len(), 1);
    drop((source, target));
    attacked.finish(number).await;
}

#[tokio::test]
async fn rows_that_differ_are_named_and_put_right() {
    let attacked = Attacked::new().await;
    let (ada, bucket, thread) = (attacked.ada, attacked.ada.bucket(), attacked.open.thread_id);
    let number = attacked.rests_before_its_switch().await;
    let rows = attacked.verify(number, false).await.expect("both sides hold the same rows");
    assert!(rows > 1);
    let target = attacked.cluster.stranger("shard_1").await;
    attacked.spoil(&target).await;

    let differs = attacked.verify(number, false).await.expect_err("they do not any more");
    let relocation::Error::Differs { relocation, examples } = &differs else { panic!("{differs:?}") };
    assert_eq!(*relocation, number);
    let session = format!("public.user_sessions ({bucket}, {ada}, ");
    for named in
        [format!("public.users ({bucket}, {ada})"), format!("public.threads ({bucket}, {ada}, {thread})"), session]
    {
        assert!(examples.contains(&named), "{named} is not named: {examples}");
    }
    assert_eq!(examples.matches(" (").count(), 3, "nothing else is named: {examples}");
    assert_eq!(spoilt(&target).await, [1, 1, 1], "who only compares changes nothing");

    let repaired = attacked.verify(number, true).await.expect("the source's rows are put in their place");
    assert_eq!(repaired, rows, "those are counted that are there by now");
    assert_eq!(spoilt(&target).await, [0, 0, 0]);
    attacked.verify(number, false).await.expect("both sides hold the same rows");

    // Decided, and the control database has yet to hear of it: no stream brings both sides together.
    let source = attacked.cluster.stranger("shard_0").await;
    let part = |state| format!("UPDATE therev.relocation_parts SET state = '{state}'");
    source.batch_execute(&part("moved")).await.expect("a superuser may");
    let refused = attacked.verify(number, false).await.expect_err("there is nothing to compare").to_string();
    assert!(refused.contains("past its switch"), "{refused}");
    source.batch_execute(&part("owned")).await.expect("as it was");
    attacked.goes_on(number).await;
    drop((source, target));
    attacked.finish(number).await;
}

/// Between the look at the rows and their repair another copy may begin, or the buckets change hands: then the target's rows are
/// not to be replaced by those of before.
#[tokio::test]
async fn a_repair_that_comes_too_late_changes_nothing() {
    let attacked = Attacked::new().await;
    let number = attacked.rests_before_its_switch().await;
    let target = attacked.cluster.stranger("shard_1").await;
    attacked.spoil(&target).await;
    let moments =
        [("copy_round = copy_round + 1", "copy_round = copy_round - 1"), ("state = 'owned'", "state = 'incoming'")];
    for (later, before) in moments {
        let part = |change: &str| format!("UPDATE therev.relocation_parts SET {change}");
        target.batch_execute(&part(later)).await.expect("the part goes on");
        let late = attacked.verify(number, true).await;
        assert!(matches!(late, Err(relocation::Error::Taken(it)) if it == number), "{later}: {late:?}");
        assert_eq!(spoilt(&target).await, [1, 1, 1], "{later}");
        target.batch_execute(&part(before)).await.expect("as it was");
    }
    attacked.verify(number, true).await.expect("in time");
    assert_eq!(spoilt(&target).await, [0, 0, 0]);
    attacked.goes_on(number).await;
    drop(target);
    attacked.finish(number).await;
}

/// A copy begins behind every transaction that has written, so that somebody's holds it up. Who wants something else of it does not
/// wait with it.
#[tokio::test]
async fn a_copy_that_is_held_up_ends_when_something_else_is_wanted() {
    let attacked = Attacked::new().await;
    let (holder, looks) = (attacked.cluster.stranger("shard_0").await, attacked.cluster.stranger("shard_0").await);
    let writes = format!("BEGIN; {}", insert_thread(attacked.bob, "it holds"));
    holder.batch_execute(&writes).await.expect("it has written");

    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    until_waiting(&looks, 1).await;
    attacked.mover.want(number, Goal::Aborted).await.expect("it can be undone");
    rests(driven, State::Aborted).await;
    nothing_left(&[attacked.cluster.url("shard_0"), attacked.cluster.url("shard_1")]).await;

    let number = attacked.begin(Goal::Switched).await;
    let driven = attacked.drive(number);
    until_waiting(&looks, 1).await;
    attacked.mover.pause(number, true).await.expect("it can rest");
    let paused = rests(driven, State::Copying).await;
    assert!(paused.is_paused && !paused.has_worker, "{paused:?}");
    holder.batch_execute("COMMIT").await.expect("the transaction ends");
    attacked.goes_on(number).await;
    drop((holder, looks));
    attacked.finish(number).await;
}

/// One relocation waits for a transaction that somebody forgot; another one's mover dies, and whoever carries on does both.
#[tokio::test]
async fn one_that_waits_keeps_nobody_from_the_others() {
    let attacked = Attacked::new().await;
    let brake = attacked.brake().await;
    let waits = attacked.begin(Goal::Switched).await;
    let (source, target) = (ShardNo(1), ShardNo(0));
    let other = Request { groups: Group::ALL.to_vec(), buckets: vec![attacked.cy.bucket()], pin: None, source, target };
    let plan = attacked.mover.plan(&other).await.expect("a plan");
    let left = attacked.mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    let dies = tokio::spawn({
        let options = Options { budget: BUDGET, lease: Duration::from_secs(1) };
        let mover = Mover::new(attacked.node.shards().clone(), options);
        async move { mover.drive(left, &|_| {}).await.map(|_| ()) }
    });
    attacked.until(left, "taken", |now| now.has_worker).await;
    dies.abort();
    assert!(dies.await.expect_err("its mover has not come to the end").is_cancelled());

    let options = Options { budget: BUDGET, ..Options::default() };
    let relay = Arc::new(Mover::new(attacked.node.shards().clone(), options));
    let both = async {
        attacked.until_held_up(waits).await;
        attacked.until(left, "carried on", |now| now.state == State::Done).await;
        assert_eq!(attacked.mover.show(waits).await.expect("the relocation").state, State::Switching);
        brake.batch_execute("ROLLBACK").await.expect("the brake is off");
        attacked.until(waits, "switched", |now| now.state == State::Switched && !now.has_worker).await;
    };
    tokio::select! {
        () = both => {}
        () = Box::pin(relay.carry_on()) => unreachable!("it has no end"),
    }
    drop((brake, relay));
    attacked.finish(waits).await;
}
