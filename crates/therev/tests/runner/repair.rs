//! Derived rows that were damaged by hand, and what is a user's own beside them.

use crate::things::{operator, post, thread, user, user_per_shard};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use testkit::{TestCluster, drive};
use therev::relocation::{Goal, Mover, Options, Request, State};
use therev::repair::Report;
use therev::{
    AccountType, Config, Group, Layout, NewAccount, NewPost, NewSession, NewTask, NewUser, Provider, SecretString,
    ShardNo, TaskType, Therev, ThreadId, ThreadOrder, UserChange, UserId,
};

/// What is a user's own.
const OWN: [&str; 6] = ["users", "user_sessions", "user_ai_accounts", "ai_tasks", "threads", "posts"];

/// A hash of all own rows of every shard. Ids that were never registered are nobody's.
async fn own_rows(cluster: &TestCluster) -> BTreeMap<(u16, &'static str), (i64, i64)> {
    let mut all = BTreeMap::new();
    for shard in 0..cluster.shards() {
        let client = cluster.stranger(&format!("shard_{shard}")).await;
        for table in OWN {
            let those = if table == "users" { "WHERE was_registered" } else { "" };
            let hash = format!(
                "SELECT count(*), coalesce(bit_xor(hashtextextended(t::text, 0)), 0) FROM {table} AS t {those}"
            );
            let row = client.query_one(&hash, &[]).await.expect("the table is read");
            all.insert((shard, table), (row.get(0), row.get(1)));
        }
    }
    all
}

/// Runs SQL as a superuser past all triggers, on every shard or on the directory.
async fn damage(cluster: &TestCluster, part: &str, sql: &str) {
    let parts = match part {
        "shards" => (0..cluster.shards()).map(|n| format!("shard_{n}")).collect(),
        other => vec![other.to_owned()],
    };
    for part in parts {
        let client = cluster.stranger(&part).await;
        client.batch_execute("SET session_replication_role = replica").await.expect("no trigger fires");
        client.batch_execute(sql).await.unwrap_or_else(|e| panic!("{part}: {sql}: {e:?}"));
    }
}

/// A community with everything in it; all of it delivered.
async fn community(node: &Therev) -> [UserId; 4] {
    let authors = user_per_shard(node).await;
    let password = SecretString::from("correct horse");
    let new = NewUser {
        user_name: "ada".into(),
        email: Some("ada@example.org".into()),
        password: Some(password.clone()),
        ..NewUser::default()
    };
    let ada = node.register(new, &operator()).await.expect("a user").user_id;
    node.log_in("ada", &password, NewSession::default()).await.expect("a session");
    let account = NewAccount::new(ada, Provider::Claude, AccountType::Api, "work");
    node.tasks().create_account(account, &operator()).await.expect("an account");
    node.tasks().create_task(NewTask::new(ada, TaskType::Analysis, serde_json::json!({}))).await.expect("a task");
    let renamed = UserChange { user_name: Some("renamed".into()), ..UserChange::default() };
    node.change_user(authors[1], renamed, &operator()).await.expect("another name");
    for (n, title) in ["Tea", "Coffee", "Water"].into_iter().enumerate() {
        let open = thread(node, authors[n], title).await;
        for m in 0..8 {
            post(node, authors[m % 4], &open, "text").await;
        }
        let last = post(node, authors[3], &open, "to be deleted").await;
        node.delete_post(last.post_id, &operator()).await.expect("a place of a deleted post");
    }
    let gone = thread(node, authors[0], "Gone").await;
    post(node, authors[1], &gone, "stays").await;
    node.delete_thread(gone.thread_id, &operator()).await.expect("a deleted thread");
    let left = user(node, "left").await.user_id;
    node.delete_user(left, true, &operator()).await.expect("a deleted user");
    node.relay_once().await.expect("the relay runs");
    authors
}

const ANYBODY: &str = "'00000000-0000-4000-8000-000000000001'";
const NOBODY: &str = "'00000000-0000-4000-8000-000000000002'";
const ANYTHING: &str = "'018f3c5e-7b2a-7000-8000-00000000abcd'";

/// What is damaged, by SQL on the shards and on the directory; and the proofs that are repaired for it.
struct Damage {
    what: &'static str,
    shards: String,
    directory: String,
    broken: &'static [&'static str],
}

fn missing() -> Damage {
    Damage {
        what: "missing",
        shards: "DELETE FROM therev.claims; DELETE FROM therev.thread_contributions;
                 DELETE FROM therev.thread_participants; DELETE FROM therev.thread_totals"
            .into(),
        directory: "DELETE FROM user_directory; DELETE FROM thread_directory".into(),
        broken: &["names of users = claims", "contributions = posts", "users = directory", "threads = directory"],
    }
}

fn altered() -> Damage {
    Damage {
        what: "altered",
        shards: "UPDATE therev.thread_contributions SET posts = posts + 3;
                 UPDATE therev.thread_participants SET deleted = deleted + 1, last_post_at = '2000-01-01';
                 UPDATE therev.claims SET value = value || '-other' WHERE kind = 'user_name'"
            .into(),
        directory: "UPDATE user_directory SET display_name = 'Somebody else', role = 'ADMIN' WHERE NOT is_deleted;
                    UPDATE thread_directory SET title = 'Other', post_count = 99, is_locked = true
                     WHERE NOT is_deleted"
            .into(),
        broken: &[
            "names of users = claims",
            "contributions = posts",
            "contributions = participants",
            "users = directory",
            "threads = directory",
        ],
    }
}

/// Copies with versions that no delivery replaces, of contributions whose own versions went back.
fn from_the_future(bob: UserId) -> Damage {
    Damage {
        what: "from the future",
        shards: format!(
            "UPDATE therev.thread_contributions SET thread_author_id = {ANYBODY}, version = 1;
             UPDATE therev.thread_participants SET posts = 0, version = 9223372036854775807;
             UPDATE therev.thread_totals SET posts = 0, version = version * 2;
             UPDATE therev.claims SET user_id = '{bob}', version = version + 1000"
        ),
        directory: format!(
            "UPDATE user_directory SET version = 9223372036854775807, is_deleted = true;
             UPDATE thread_directory SET version = version + 5, totals_version = totals_version + 7, post_count = 1,
                    author_id = {ANYBODY}, created_at = '2100-01-01'"
        ),
        broken: &[
            "names of users = claims",
            "contributions = posts",
            "contributions = participants",
            "users = directory",
            "threads = directory",
        ],
    }
}

fn totals() -> Damage {
    Damage {
        what: "totals",
        shards: "UPDATE therev.thread_totals SET posts = posts + 1, version = version + 1 WHERE posts % 2 = 0;
                 UPDATE therev.thread_totals SET participants = 77 WHERE posts % 2 = 1"
            .into(),
        directory: "UPDATE thread_directory SET post_count = 0, totals_version = totals_version * 3".into(),
        broken: &["totals = participants"],
    }
}

/// Rows of users, threads and names that nobody has.
fn stray(bob: UserId) -> Damage {
    let owned = format!(
        "FROM therev.fence AS f
          WHERE f.colocation_group = 'content' AND get_bit(f.writable, therev.bucket_of({ANYBODY})) = 1"
    );
    let claim = |name: &str, user: &str, version: &str, state: &str| {
        format!(
            "INSERT INTO therev.claims
             SELECT therev.bucket_of(k.key), k.key, 'user_name', '{name}', {user}, '{state}', now() - interval '1 hour',
                    {version}
               FROM therev.fence AS f, (SELECT therev.claim_key('user_name', '{name}') AS key) AS k
              WHERE f.colocation_group = 'account' AND get_bit(f.writable, therev.bucket_of(k.key)) = 1"
        )
    };
    let bob = format!("'{bob}'");
    let statements = [
        format!(
            "INSERT INTO therev.thread_participants
             SELECT therev.bucket_of({ANYBODY}), {ANYBODY}, {ANYTHING}, {ANYTHING}, 3, 0, now(), 9 {owned};
             INSERT INTO therev.thread_participants
             SELECT DISTINCT ON (bucket, author_id, thread_id) bucket, author_id, thread_id, {ANYBODY}::uuid, 2, 1,
                    '2100-01-01'::timestamptz, 9223372036854775807
               FROM therev.thread_participants;
             INSERT INTO therev.thread_contributions
             SELECT therev.bucket_of({ANYBODY}), {ANYBODY}, {ANYTHING}, {ANYBODY}, 5, 0, now(), 1 {owned};
             INSERT INTO therev.thread_totals
             SELECT therev.bucket_of({ANYBODY}), {ANYBODY}, {ANYBODY}, 4, 1, now(), 1 {owned};
             UPDATE therev.outbox SET delivered_at = NULL, created_at = now() - interval '1 hour'"
        ),
        claim("of-nobody", ANYBODY, "1", "held"),
        claim("left-off", ANYTHING, "1", "pending"),
        claim("too-many", &bob, "1", "held"),
        claim("to-come", &bob, "(1::bigint << 50)", "held"),
    ];
    Damage {
        what: "stray",
        shards: statements.join("; "),
        directory: format!(
            "INSERT INTO user_directory
             VALUES ({NOBODY}, 'stray', NULL, NULL, 'STANDARD', true, now(), false, 1 << 30);
             INSERT INTO thread_directory (thread_id, author_id, title, is_pinned, is_locked, moderation, created_at,
                                           is_deleted, version, last_activity_at)
             VALUES ({ANYTHING}, {ANYBODY}, 'stray', false, false, 'approved', now(), false, 7, now())"
        ),
        broken: &[
            "outbox younger than a minute",
            "claims settled",
            "names of users = claims",
            "contributions = posts",
            "contributions = participants",
            "totals = participants",
            "users = directory",
            "threads = directory",
        ],
    }
}

/// Two names each stand where the other one's claim belongs.
fn swapped() -> Damage {
    Damage {
        what: "swapped",
        shards: "
            WITH two AS (
                SELECT c.claim_key, c.value, c.user_id, row_number() OVER (ORDER BY c.claim_key) AS n
                  FROM therev.claims AS c WHERE c.kind = 'user_name' AND c.state = 'held' LIMIT 2)
            UPDATE therev.claims AS c SET value = o.value, user_id = o.user_id
              FROM two AS t JOIN two AS o ON o.n = 3 - t.n WHERE c.claim_key = t.claim_key"
            .into(),
        directory: String::new(),
        broken: &["names of users = claims"],
    }
}

fn repaired(report: &Report, name: &str) -> u64 {
    report.repaired.iter().filter(|repaired| repaired.name == name).map(|repaired| repaired.repaired).sum()
}

async fn every_kind_of_damage(layout: Layout) {
    let cluster = TestCluster::new(layout, 4).await;
    let node = cluster.node().await;
    let authors = community(&node).await;
    cluster.prove().await;
    let before = own_rows(&cluster).await;
    let bob = authors[1];
    let all = [missing(), altered(), swapped(), from_the_future(bob), totals(), stray(bob)];
    for Damage { what, shards, directory, broken } in all {
        damage(&cluster, "shards", &shards).await;
        damage(&cluster, "directory", &directory).await;
        let report = node.repair().await.expect("the repair runs");
        let wrong: Vec<_> = report.checks.iter().filter(|check| check.wrong > 0).collect();
        assert!(report.ok, "{what}: {wrong:#?}");
        for name in broken {
            assert!(repaired(&report, name) > 0, "{what}: {name}: {:#?}", report.repaired);
        }
        assert_eq!(own_rows(&cluster).await, before, "{what}: what is a user's own stays as it is, bit for bit");
    }
    // What a change of name may still be under way for was left to the relay.
    assert_eq!(node.relay_once().await.expect("the relay runs").claims_settled, 1);
    let again = node.repair().await.expect("the repair runs");
    let done: Vec<_> = again.repaired.iter().filter(|repaired| repaired.repaired > 0).collect();
    assert!(again.ok && done.is_empty(), "nothing is left: {done:#?}");
    for name in ["of-nobody", "left-off", "too-many", "to-come"] {
        user(&node, name).await;
    }
    let listed = node.threads(ThreadOrder::MostActive, None, 9, None).await.expect("the list");
    assert_eq!(listed.items.iter().map(|card| card.post_count).collect::<Vec<_>>(), [8, 8, 8]);
    drop(node);
    cluster.finish().await;
}

/// Invariant 11.
#[tokio::test]
async fn every_kind_of_damage_is_repaired() {
    every_kind_of_damage(Layout::Colocated).await;
}

#[tokio::test]
async fn every_kind_of_damage_is_repaired_in_the_split_layout() {
    every_kind_of_damage(Layout::Split).await;
}

/// Invariants 7 and 11.
#[tokio::test]
async fn what_no_shard_has_is_not_raised_by_a_late_event() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Lost").await;
    node.relay_once().await.expect("the relay runs");
    for table in ["threads", "users"] {
        let owner = if table == "users" { format!("user_id = '{bob}'") } else { format!("author_id = '{ada}'") };
        damage(&cluster, "shards", &format!("DELETE FROM {table} WHERE {owner}")).await;
    }
    let report = node.repair().await.expect("the repair runs");
    assert!(report.ok, "{:#?}", report.checks);
    damage(&cluster, "shards", "UPDATE therev.outbox SET delivered_at = NULL").await;
    node.relay_once().await.expect("everything once more");
    assert!(node.threads(ThreadOrder::Newest, None, 9, Some(&open.seen)).await.expect("a list").items.is_empty());
    assert!(node.users_by_prefix("user-1", None, 9, Some(&open.seen)).await.expect("a list").items.is_empty());
    drop(node);
    cluster.finish().await;
}

/// Invariants 8 and 11.
#[tokio::test]
async fn a_name_that_two_rows_have_is_left_to_people() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    damage(&cluster, "shards", &format!("UPDATE users SET user_name = 'user-0' WHERE user_id = '{bob}'")).await;
    let report = node.repair().await.expect("the repair runs");
    let wrong: Vec<_> = report.checks.iter().filter(|check| check.wrong > 0).collect();
    assert!(!report.ok && wrong.len() == 1 && wrong[0].examples == ["user_name user-0: more than once"], "{wrong:#?}");
    assert_eq!(node.user_named("user-0").await.expect("an answer"), Some(ada));
    damage(&cluster, "shards", &format!("UPDATE users SET user_name = 'user-1' WHERE user_id = '{bob}'")).await;
    assert!(node.repair().await.expect("the repair runs").ok);
    drop(node);
    cluster.finish().await;
}

/// Invariant 22.
#[tokio::test]
async fn who_is_placed_apart_is_learnt_anew_from_the_shards() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    for (source, target) in [(0, 3), (3, 2)] {
        let (groups, buckets) = (Group::ALL.to_vec(), vec![ada.bucket()]);
        let request = Request { groups, buckets, pin: Some(ada), source: ShardNo(source), target: ShardNo(target) };
        let plan = mover.plan(&request).await.expect("a plan");
        let number = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
        assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    }
    // Home points to where she was before, as after a promotion that took it back. The control database was put back to a time
    // when she was elsewhere, by epochs of a pin that is over, and when bob was apart.
    let home = cluster.stranger("shard_0").await;
    home.batch_execute("UPDATE therev.pins SET peer = 3, epoch = epoch - 1").await.expect("home's word");
    let control = cluster.stranger("control").await;
    let older = format!(
        "UPDATE therev.pins SET shard = 3, epoch = epoch + 7;
         INSERT INTO therev.pins (colocation_group, user_id, bucket, shard, epoch)
         SELECT p.colocation_group, '{bob}'::uuid, {}, 3, 5 FROM therev.pins AS p",
        bob.bucket()
    );
    control.batch_execute(&older).await.expect("an older state");
    assert_eq!(wrong(&node.check().await.expect("check runs")), ["one owner per bucket"]);
    let report = node.repair().await.expect("the repair runs");
    assert!(report.ok, "{:?}", report.checks);
    // Of each group: two rows forgotten, one recorded, one learnt at home.
    assert_eq!(repaired(&report, "one owner per bucket"), 8);
    let points = home.query_one("SELECT count(*) FROM therev.pins WHERE peer = 2", &[]).await.expect("home's word");
    assert_eq!(points.get::<_, i64>(0), 2);
    let placed = "SELECT count(*) FROM therev.pins WHERE shard = 2 AND user_id = $1";
    assert_eq!(control.query_one(placed, &[&ada.0]).await.expect("a count").get::<_, i64>(0), 2);

    // A record that comes late changes nothing.
    let late = "SELECT therev.record_pin('{account,content}', $1, $2, 3::smallint, '{1,1}')";
    control.query(late, &[&ada.0, &ada.bucket().sql()]).await.expect("it is heard");
    assert_eq!(control.query_one(placed, &[&ada.0]).await.expect("a count").get::<_, i64>(0), 2);
    drop((home, control, mover, node));
    cluster.finish().await;
}

/// Invariant 11.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_writers_no_count_is_lost() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let threads = [thread(&node, authors[0], "One").await, thread(&node, authors[1], "Two").await];
    let stop = Arc::new(AtomicBool::new(false));
    let writers = (0..4_usize).map(|n| {
        let (node, stop, open) = (node.clone(), stop.clone(), threads[n / 2].value.clone());
        tokio::spawn(async move {
            let mut written = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // Two writers of each author and thread, one of which deletes now and then.
                let new = NewPost::new(authors[2 + n / 2], open.thread_id, "text");
                let post = node.create_post(new).await.expect("a post is written");
                if written.len() % 5 == 4 && n % 2 == 0 {
                    node.delete_post(post.post_id, &operator()).await.expect("a post is deleted");
                }
                written.push(post);
                if written.len() % 10 == 0 {
                    user(&node, &format!("new-{n}-{}", written.len())).await;
                }
            }
            written.len()
        })
    });
    let writers: Vec<_> = writers.collect();
    // Only too many: of too few a delete would be refused.
    damage(&cluster, "shards", "UPDATE therev.thread_contributions SET posts = posts + 1000").await;
    damage(&cluster, "shards", "DELETE FROM therev.thread_participants; DELETE FROM therev.thread_totals").await;
    damage(&cluster, "directory", "UPDATE thread_directory SET title = 'wrong', version = version + 2").await;
    damage(&cluster, "directory", "DELETE FROM user_directory").await;
    let report = node.repair().await.expect("the repair runs");
    for name in ["contributions = posts", "users = directory", "threads = directory"] {
        assert!(repaired(&report, name) > 0, "{name}: {:#?}", report.repaired);
    }
    stop.store(true, Ordering::Relaxed);
    let mut written = 0;
    for writer in writers {
        written += writer.await.expect("no panic");
    }
    assert!(written > 20, "{written} posts were written meanwhile");
    cluster.prove().await;
    drop(node);
    cluster.finish().await;
}

/// The proofs that find something wrong.
fn wrong(report: &therev::check::Report) -> Vec<&str> {
    report.checks.iter().filter(|check| check.wrong > 0).map(|check| check.name.as_str()).collect()
}

/// At any moment some thread is not summed, some copy not delivered: another one each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_writers_and_a_relay_check_finds_nothing_wrong() {
    let cluster = TestCluster::usual().await;
    let config = Config { relay_ms: 50, claim_timeout_s: 60, ..cluster.config() };
    let node = therev::connect(config).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let mut threads = Vec::new();
    for n in 0..40 {
        threads.push(thread(&node, authors[n % 4], "Busy").await.value);
    }
    let (threads, stop) = (Arc::new(threads), Arc::new(AtomicBool::new(false)));
    let writers = authors.map(|author| {
        let (node, threads, stop) = (node.clone(), threads.clone(), stop.clone());
        tokio::spawn(async move {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                post(&node, author, &threads[written % threads.len()], "text").await;
                written += 1;
            }
            written
        })
    });
    for _ in 0..3 {
        let report = node.check().await.expect("check runs");
        assert!(report.ok, "{:?}", wrong(&report));
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.expect("no panic") > 0);
    }
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn what_is_on_its_way_is_not_wrong_for_a_minute() {
    let cluster = TestCluster::new(Layout::Colocated, 1).await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await.user_id;
    // Nobody has summed this thread yet.
    let open = thread(&node, ada, "Not summed").await;
    post(&node, ada, &open, "text").await;
    // And of what a stranger writes nobody has heard.
    let shard = cluster.stranger("shard_0").await;
    let bob = UserId::new();
    let by_hand = format!(
        "INSERT INTO therev.claims (claim_key, kind, value, user_id, state, version)
         VALUES (therev.claim_key('user_name', 'bob'), 'user_name', 'bob', '{bob}', 'held', 1);
         INSERT INTO users (user_id, user_name) VALUES ('{bob}', 'bob');
         INSERT INTO threads (author_id, thread_id, title, body) VALUES ('{bob}', '{}', 'By hand', 'text')",
        ThreadId::new(bob)
    );
    shard.batch_execute(&by_hand).await.expect("a stranger's rows");
    let report = node.check().await.expect("check runs");
    assert!(report.ok, "{:?}", wrong(&report));

    // Nothing takes as long as that.
    let aged = "UPDATE therev.outbox SET created_at = now() - interval '2 minutes' WHERE delivered_at IS NULL";
    shard.batch_execute(aged).await.expect("two minutes later");
    let report = node.check().await.expect("check runs");
    let late = ["totals = participants", "outbox younger than a minute", "users = directory", "threads = directory"];
    assert_eq!(wrong(&report), late);
    drop((shard, node));
    cluster.finish().await;
}

/// What statements test is compared with what the shard owns.
#[tokio::test]
async fn a_fence_that_is_not_what_is_owned_is_named() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let shard = cluster.stranger("shard_0").await;
    for (damage, mend) in [
        ("writable = set_bit(writable, 1, 1)", "writable = set_bit(writable, 1, 0)"),
        ("readers = ARRAY[gen_random_uuid()]", "readers = '{}'"),
        ("version_floor = version_floor >> 1", "version_floor = version_floor << 1"),
    ] {
        shard.batch_execute(&format!("UPDATE therev.fence SET {damage}")).await.expect("a superuser may");
        assert_eq!(wrong(&node.check().await.expect("check runs")), ["fence = ownership"], "{damage}");
        shard.batch_execute(&format!("UPDATE therev.fence SET {mend}")).await.expect("as it was");
    }
    assert!(node.check().await.expect("check runs").ok);
    drop((shard, node));
    cluster.finish().await;
}
