//! Relocation: what is moved is whole, on one shard, and nothing of the move is left.

use crate::outages::reachable;
use crate::things::{begun_by_a_sleeper, post, thread, user_per_shard};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use testkit::{TestCluster, drive};
use therev::relocation::{Goal, Mover, Options, Request, State};
use therev::{Config, Group, Layout, NewPost, ShardNo, Therev};

/// A request for all buckets of these owners' shard that hold something.
fn request(source: ShardNo, target: ShardNo, buckets: Vec<therev::Bucket>) -> Request {
    Request { groups: Group::ALL.to_vec(), buckets, pin: None, source, target }
}

/// Nothing of any relocation is left on the servers of a cluster.
async fn nothing_left(cluster: &TestCluster) {
    let shards: Vec<String> = (0..cluster.shards()).map(|n| cluster.url(&format!("shard_{n}"))).collect();
    testkit::nothing_left(&shards).await;
}

async fn some_content(node: &Therev) -> Vec<therev::UserId> {
    let authors = user_per_shard(node).await;
    for author in &authors {
        let open = thread(node, *author, "A thread").await;
        for other in &authors {
            post(node, *other, &open, "a post").await;
        }
    }
    node.relay_once().await.expect("the relay runs");
    authors.to_vec()
}

#[tokio::test]
async fn a_user_moves_with_everything_and_comes_back() {
    for layout in TestCluster::LAYOUTS {
        Box::pin(moves_and_comes_back(layout)).await;
    }
}

/// In the split layout the content goes by itself.
async fn moves_and_comes_back(layout: Layout) {
    let cluster = TestCluster::new(layout, 4).await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let bucket = authors[0].bucket();

    let groups = if layout == Layout::Split { vec![Group::Content] } else { Group::ALL.to_vec() };
    let source = node.shards().map().place(Group::Content, bucket).shard;
    let target = ShardNo(if source == ShardNo(2) { 3 } else { 2 });
    let there = Request { groups, ..request(source, target, vec![bucket]) };
    let [giving, taking] = [source, target].map(|shard| format!("shard_{shard}"));
    let plan = mover.plan(&there).await.expect("a plan");
    assert!(plan.obstacles.is_empty() && plan.rows > 5, "{plan:?}");
    let begun = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins");
    let held = Box::pin(drive(&node, &mover, begun.relocation)).await;
    assert_eq!(held.state, State::Switched);
    // However long it is held, nobody has to keep log for it but the shard that feeds the way back.
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
    for (shard, expected) in [(&giving, 0), (&taking, 1)] {
        let slots: i64 = cluster.stranger(shard).await.query_one(slots, &[]).await.expect("an answer").get(0);
        assert_eq!(slots, expected, "{shard}");
    }
    assert_eq!(node.user(authors[0]).await.expect("an answer").user_id, authors[0]);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    let open = thread(&node, authors[0], "After the switch").await;
    post(&node, authors[0], &open, "written there").await;
    // The mover's password stands in the subscriptions, and nowhere that others look.
    for part in [&giving, &taking] {
        // In two pieces, so that this question does not find itself.
        let seen = "SELECT (SELECT count(*) FROM pg_stat_statements WHERE query LIKE '%pass' || 'word=' || chr(39) || '%')
                         + (SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pass' || 'word=' || chr(39) || '%')";
        let seen = cluster.stranger(part).await.query_one(seen, &[]).await.expect("the statistics answer");
        assert_eq!(seen.get::<_, i64>(0), 0, "a password is seen on {part}");
    }

    mover.want(begun.relocation, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Reversed);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    nothing_left(&cluster).await;
    cluster.prove().await;

    let plan = mover.plan(&there).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Done, "test").await.expect("it begins");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Done);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

/// Everything that a shard has, on a budget of which the steps alone take a multiple.
/// Invariant 15.
#[tokio::test]
async fn a_budget_too_small_for_the_steps_themselves_gets_through() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options { budget: Duration::from_millis(1), ..Options::default() });
    let map = node.shards().map();
    let on_shard_0 =
        |bucket: &therev::Bucket| Group::ALL.iter().all(|group| map.place(*group, *bucket).shard == ShardNo(0));
    let all = therev::Bucket::all().filter(on_shard_0).collect();
    let plan = mover.plan(&request(ShardNo(0), ShardNo(2), all)).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, begun)).await.state, State::Done);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    nothing_left(&cluster).await;
    cluster.prove().await;
    drop((mover, node));
    cluster.finish().await;
}

/// Begins to move a user's bucket from shard 0 to shard 2.
async fn begun(node: &Therev, mover: &Mover, user: therev::UserId, goal: Goal) -> i64 {
    let request = request(ShardNo(0), ShardNo(2), vec![user.bucket()]);
    let plan = mover.plan(&request).await.expect("a plan");
    let begun = mover.begin(&plan, goal, "test").await.expect("it begins").relocation;
    if goal == Goal::Switched {
        assert_eq!(Box::pin(drive(node, mover, begun)).await.state, State::Switched);
    }
    begun
}

#[tokio::test]
async fn what_the_control_database_has_lost_is_found_on_the_shards() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let control = cluster.stranger("control").await;
    let first_places = "CREATE TABLE therev.earlier AS SELECT * FROM therev.placement";
    control.batch_execute(first_places).await.expect("the earlier state is kept");

    // Decided: it is found, rests, and can be carried through. The placement is put right with it.
    let number = begun(&node, &mover, authors[0], Goal::Switched).await;
    control
        .batch_execute(
            "DELETE FROM therev.relocations;
             UPDATE therev.placement AS p SET shard = e.shard, epoch = e.epoch
               FROM therev.earlier AS e
              WHERE p.colocation_group = e.colocation_group AND p.bucket = e.bucket;
             DROP TABLE therev.earlier",
        )
        .await
        .expect("the control database is put back");
    mover.find_lost().await.expect("the shards are asked");
    let found = mover.show(number).await.expect("it is there again");
    assert!(found.is_paused && found.goal == Goal::Switched, "{found:?}");
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    mover.want(number, Goal::Done).await.expect("it goes on");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    nothing_left(&cluster).await;
    cluster.prove().await;

    // A number that was given before is not given again where a part has it.
    control.batch_execute("DELETE FROM therev.relocations").await.expect("they are forgotten");
    let way_back = Request {
        source: ShardNo(2),
        target: ShardNo(0),
        ..request(ShardNo(0), ShardNo(0), vec![authors[0].bucket()])
    };
    let plan = mover.plan(&way_back).await.expect("a plan");
    let back = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    fail::cfg("relocation.caught_up", "panic").expect("a place in the sources");
    let dies = tokio::spawn({
        let mover = Mover::new(node.shards().clone(), Options::default());
        async move { mover.drive(back, &|_| {}).await.map(|_| ()) }
    });
    assert!(dies.await.is_err(), "the mover dies");
    fail::remove("relocation.caught_up");
    // Not decided: what was copied is taken away. The number that it had is not given a second time.
    let forgotten =
        format!("DELETE FROM therev.relocations; SELECT setval('therev.relocations_relocation_seq', {back}, false)");
    control.batch_execute(&forgotten).await.expect("it is forgotten");
    mover.find_lost().await.expect("the shards are asked");
    let found = mover.show(back).await.expect("it is there again");
    assert!(found.is_paused && found.goal == Goal::Aborted, "{found:?}");
    mover.pause(back, false).await.expect("it goes on");
    assert_eq!(Box::pin(drive(&node, &mover, back)).await.state, State::Aborted);
    nothing_left(&cluster).await;
    let plan = mover.plan(&way_back).await.expect("a plan");
    let again = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, again)).await.state, State::Done);
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

/// A call with less time than others wait before they look after a switch does so in time for itself.
/// Invariant 15.
#[tokio::test]
async fn a_hasty_call_ends_what_its_mover_left() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let open = thread(&node, authors[1], "Of somebody who stays").await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let left = begun(&node, &mover, authors[0], Goal::Done).await;
    fail::cfg("relocation.drained", "panic").expect("a place in the sources");
    let dies = tokio::spawn({
        let mover = Mover::new(node.shards().clone(), Options::default());
        async move { mover.drive(left, &|_| {}).await.map(|_| ()) }
    });
    assert!(dies.await.is_err(), "the mover dies");
    fail::remove("relocation.drained");

    let hasty = therev::connect(Config { deadline_ms: 900, ..cluster.config() }).await.expect("the cluster answers");
    let written = hasty.create_post(NewPost::new(authors[0], open.thread_id, "nobody else would end it")).await;
    written.expect("the switch is given up");
    let lapse = "UPDATE therev.relocations SET leased_until = now()";
    cluster.stranger("control").await.batch_execute(lapse).await.expect("the dead mover's lease ends");
    assert_eq!(Box::pin(drive(&node, &mover, left)).await.state, State::Done);
    nothing_left(&cluster).await;
    cluster.prove().await;
    drop((mover, node, hasty));
    cluster.finish().await;
}

/// Somebody holds on to what the taking side must write, once nobody can write any more. The mover alone gives that try up: nobody calls
/// who could, until it has.
/// Invariant 15.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_try_that_hangs_is_given_up_by_its_mover() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let open = thread(&node, authors[1], "Of somebody who stays").await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Done).await;
    let (source, holder) = (cluster.stranger("shard_0").await, Arc::new(cluster.stranger("shard_2").await));
    let (told, held) = std::sync::mpsc::channel();
    let (holds, runtime, is_first) = (holder.clone(), tokio::runtime::Handle::current(), AtomicBool::new(true));
    fail::cfg_callback("relocation.drained", move || {
        if is_first.swap(false, Ordering::Relaxed) {
            let hold = holds.batch_execute("BEGIN; SELECT FROM therev.relocation_parts FOR UPDATE");
            tokio::task::block_in_place(|| runtime.block_on(hold)).expect("the part is held on to");
            told.send(()).expect("the test goes on");
        }
    })
    .expect("a place in the sources");
    let driven = tokio::spawn({
        let (node, mover) = (node.clone(), Mover::new(node.shards().clone(), Options::default()));
        async move { Box::pin(drive(&node, &mover, number)).await.state }
    });
    let held = tokio::task::spawn_blocking(move || held.recv_timeout(Duration::from_secs(60)));
    held.await.expect("no panic").expect("a try has begun");

    let is_given_up = "SELECT state = 'owned' FROM therev.relocation_parts";
    let mut looks = tokio::time::interval(Duration::from_millis(10));
    while !source.query_one(is_given_up, &[]).await.expect("the part").get::<_, bool>(0) {
        looks.tick().await;
    }
    post(&node, authors[0], &open, "while it is held on to").await;
    holder.batch_execute("ROLLBACK").await.expect("it is free");
    assert_eq!(driven.await.expect("it goes on"), State::Done);
    fail::remove("relocation.drained");
    nothing_left(&cluster).await;
    cluster.prove().await;
    drop((mover, node));
    cluster.finish().await;
}

/// Who takes the log away and never replays it is no standby, and nothing waits for it.
/// Invariant 16.
#[tokio::test]
async fn an_archiver_is_no_standby() {
    let cluster = TestCluster::usual().await;
    // The other servers' log is taken by nobody: shard 0's goes to the directory's replica.
    let client = cluster.stranger("shard_1").await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut archiver = tokio::process::Command::new(testkit::test_servers().pg_bin.join("pg_receivewal"))
        .arg("--directory")
        .arg(folder.path())
        .args(["--no-loop", "--dbname", &cluster.url("shard_1")])
        .env("PGAPPNAME", cluster.url("shard_1").rsplit('/').next().expect("a database"))
        .kill_on_drop(true)
        .spawn()
        .expect("an archiver");
    let is_fed = "SELECT EXISTS (SELECT FROM pg_stat_replication
                                  WHERE application_name = current_database() AND state = 'streaming')";
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    while !client.query_one(is_fed, &[]).await.expect("an answer").get::<_, bool>(0) {
        assert!(archiver.try_wait().expect("its state").is_none(), "the archiver has ended");
        looks.tick().await;
    }
    let waits = "SELECT EXISTS (SELECT FROM therev.standbys), therev.standbys_have('FFFFFFFF/FFFFFFFF')";
    let row = client.query_one(waits, &[]).await.expect("an answer");
    assert_eq!((row.get(0), row.get(1)), (false, true));
    archiver.kill().await.expect("the archiver ends");
    drop(client);
    cluster.finish().await;
}

/// Of two plans for one bucket the second one begins when the first has been carried out.
#[tokio::test]
async fn a_plan_that_another_relocation_has_overtaken_is_refused_and_ends() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let buckets = vec![authors[0].bucket()];
    let late = mover.plan(&request(ShardNo(0), ShardNo(1), buckets.clone())).await.expect("a plan");
    let first = begun(&node, &mover, authors[0], Goal::Done).await;
    assert_eq!(Box::pin(drive(&node, &mover, first)).await.state, State::Done);

    let late = mover.begin(&late, Goal::Done, "test").await.expect("no other relocation is under way").relocation;
    let refused = Box::pin(mover.drive(late, &|_| {})).await.expect_err("the bucket is elsewhere");
    assert!(refused.to_string().contains("have left shard 0"), "{refused}");
    assert_eq!(mover.show(late).await.expect("its record").state, State::Aborted);
    let back = mover.plan(&request(ShardNo(2), ShardNo(1), buckets)).await.expect("a plan");
    assert!(back.obstacles.is_empty(), "{back:?}");
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn an_undone_relocation_that_is_to_begin_anew_does() {
    let cluster = TestCluster::new(Layout::Colocated, 4).await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let plan = mover.plan(&request(ShardNo(1), ShardNo(3), vec![authors[1].bucket()])).await.expect("a plan");
    let control = cluster.stranger("control").await;
    for state in ["copying", "switching"] {
        let begun = mover.begin(&plan, Goal::Aborted, "test").await.expect("it begins");
        // As a worker leaves it who was killed after it had undone everything, and before it could say so.
        let left = "UPDATE therev.relocations SET state = $2, goal = 'switched', source_life = s.incarnation,
                           target_life = t.incarnation
                      FROM therev.incarnations AS s, therev.incarnations AS t
                     WHERE relocation = $1 AND s.database = 'shard 1' AND t.database = 'shard 3'";
        let left = control.execute(left, &[&begun.relocation, &state]).await.expect("the control database answers");
        assert_eq!(left, 1);
        assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Switched);
        mover.want(begun.relocation, Goal::Reversed).await.expect("the way back is open");
        assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Reversed);
    }
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn a_control_database_that_was_put_back_learns_the_placement_by_a_repair() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let control = cluster.stranger("control").await;
    control.batch_execute("CREATE TABLE therev.earlier AS SELECT * FROM therev.placement").await.expect("it is kept");
    let number = begun(&node, &mover, authors[0], Goal::Done).await;
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    control
        .batch_execute(
            "UPDATE therev.placement AS p SET shard = e.shard, epoch = e.epoch
               FROM therev.earlier AS e WHERE p.colocation_group = e.colocation_group AND p.bucket = e.bucket;
             DROP TABLE therev.earlier",
        )
        .await
        .expect("the control database is put back");
    assert!(!node.check().await.expect("check runs").ok, "check sees that it is behind");
    let report = node.repair().await.expect("the repair runs");
    assert!(report.ok && report.repaired[0].repaired == 2, "{report:?}");
    drop((mover, node));
    cluster.finish().await;
}

/// Invariant 18.
#[tokio::test]
async fn a_way_back_that_a_promotion_closes_is_forgone() {
    let cluster = TestCluster::new(Layout::Colocated, 4).await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let there = request(ShardNo(0), ShardNo(2), vec![authors[0].bucket()]);
    let plan = mover.plan(&there).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins");
    let held = Box::pin(drive(&node, &mover, begun.relocation)).await;
    assert_eq!(held.state, State::Switched);

    mover.want(begun.relocation, Goal::Reversed).await.expect("the way back is open");
    // As it is found after a promotion: the part began in another life.
    let target = cluster.stranger("shard_2").await;
    target
        .execute("UPDATE therev.relocation_parts SET incarnation = gen_random_uuid()", &[])
        .await
        .expect("the part is there");
    let kept = Box::pin(drive(&node, &mover, begun.relocation)).await;
    assert_eq!((kept.state, kept.goal), (State::Switched, Goal::Switched));
    let open = thread(&node, authors[0], "Where it went").await;
    post(&node, authors[0], &open, "and stays").await;

    mover.finish(begun.relocation).await.expect("it can be finished");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Done);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn a_reversal_can_be_called_off() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Switched).await;
    mover.want(number, Goal::Reversed).await.expect("the way back is open");
    // As a worker leaves it who did not get on with the switch back.
    let source = cluster.stranger("shard_0").await;
    source.query("SELECT therev.await_return($1)", &[&number]).await.expect("it awaits the buckets");
    let control = cluster.stranger("control").await;
    control.batch_execute("UPDATE therev.relocations SET state = 'switching'").await.expect("it is at the switch");

    mover.want(number, Goal::Switched).await.expect("it is called off");
    let kept = Box::pin(drive(&node, &mover, number)).await;
    assert_eq!((kept.state, kept.goal), (State::Switched, Goal::Switched));
    let open = thread(&node, authors[0], "Where it went").await;
    post(&node, authors[0], &open, "and stays").await;
    // The way back is open still.
    mover.want(number, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Reversed);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 5);
    drop((mover, node));
    cluster.finish().await;
}

/// The same while a worker is at it, whom a transaction holds up.
#[tokio::test]
async fn a_reversal_under_way_can_be_aborted() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Arc::new(Mover::new(node.shards().clone(), Options::default()));
    let number = begun(&node, &mover, authors[0], Goal::Switched).await;
    let brake = cluster.stranger("shard_2").await;
    brake.batch_execute("BEGIN; LOCK TABLE therev.id_routes IN ROW EXCLUSIVE MODE").await.expect("the brake is on");
    mover.want(number, Goal::Reversed).await.expect("the way back is open");
    let driven = tokio::spawn({
        let (node, mover) = (node.clone(), Arc::clone(&mover));
        async move { Box::pin(drive(&node, &mover, number)).await }
    });
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    while !mover.show(number).await.expect("the relocation").note.contains("a long transaction holds the tables") {
        looks.tick().await;
    }
    let planned = mover.plan_ending(number, Goal::Aborted).await.expect("a plan");
    mover.want(number, Goal::Aborted).await.expect("it is called off");
    let kept = driven.await.expect("it rests while the transaction goes on");
    assert_eq!((kept.state, kept.goal), (State::Switched, Goal::Switched));
    assert_eq!((planned.owner, planned.rows, planned.obstacles.len()), (kept.target, Some(0), 0), "nothing goes");
    brake.batch_execute("ROLLBACK").await.expect("the brake is off");
    mover.want(number, Goal::Done).await.expect("it stays where it went");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    nothing_left(&cluster).await;
    cluster.prove().await;
    drop((mover, node));
    cluster.finish().await;
}

/// The source is free at once; what lies on the target goes when that is back, and is counted then.
#[tokio::test]
async fn an_abort_is_planned_while_its_target_is_down() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Done).await;
    reachable(&cluster, "shard_2", false).await;
    let planned = mover.plan_ending(number, Goal::Aborted).await.expect("a plan");
    assert_eq!((planned.owner, planned.former, planned.rows, planned.bytes), (ShardNo(0), ShardNo(2), None, None));
    assert_eq!((planned.seconds, planned.obstacles.len()), (None, 0));
    let back = mover.plan_ending(number, Goal::Reversed).await.expect("a plan");
    assert_eq!((back.rows, back.obstacles.len()), (Some(0), 1), "nothing is switched that could go back: {back:?}");
    reachable(&cluster, "shard_2", true).await;
    let planned = mover.plan_ending(number, Goal::Aborted).await.expect("a plan");
    assert_eq!(planned.rows, Some(0), "nothing was copied yet");
    mover.want(number, Goal::Aborted).await.expect("it is called off");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Aborted);
    drop((mover, node));
    cluster.finish().await;
}

/// Invariants 19 and 20.
#[tokio::test]
async fn what_a_sleeper_begins_after_the_end_is_taken_back() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Aborted).await;
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Aborted);
    begun_by_a_sleeper(&cluster, &mover, number, authors[0].bucket()).await;
    mover.find_lost().await.expect("the shards are asked");
    nothing_left(&cluster).await;
    drop((mover, node));
    cluster.finish().await;
}

/// The buckets have come back since, so that parts can begin once more; with them they would be under way for ever.
/// Invariant 20. A standby that was behind and takes over lacks the last commits: parts are there again, and rows of the former owner.
#[tokio::test]
async fn an_end_that_promotions_have_taken_back_is_ended_again() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Switched).await;
    let (giver, taker) = (cluster.stranger("shard_0").await, cluster.stranger("shard_2").await);
    let part = "SELECT to_jsonb(p) FROM therev.relocation_parts AS p WHERE p.relocation = $1";
    let gave: serde_json::Value = giver.query_one(part, &[&number]).await.expect("a part").get(0);
    let took: serde_json::Value = taker.query_one(part, &[&number]).await.expect("a part").get(0);
    let posts = "SELECT jsonb_agg(to_jsonb(p)) FROM posts AS p WHERE p.author_id = $1";
    let posts: serde_json::Value = giver.query_one(posts, &[&authors[0].0]).await.expect("rows").get(0);
    mover.want(number, Goal::Done).await.expect("it goes on");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    nothing_left(&cluster).await;

    let again = "INSERT INTO therev.relocation_parts
                 SELECT * FROM jsonb_populate_record(NULL::therev.relocation_parts, $1)";
    giver.execute(again, &[&gave]).await.expect("the part is back");
    taker.execute(again, &[&took]).await.expect("the part is back");
    giver.batch_execute("SET session_replication_role = replica").await.expect("past the guard");
    let rows = "INSERT INTO posts SELECT * FROM jsonb_populate_recordset(NULL::posts, $1)";
    assert_eq!(giver.execute(rows, &[&posts]).await.expect("the rows are back"), 4);
    mover.find_lost().await.expect("the shards are asked");
    nothing_left(&cluster).await;
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    let back = mover.plan(&request(ShardNo(2), ShardNo(0), vec![authors[0].bucket()])).await.expect("a plan");
    assert_eq!(back.obstacles, []);
    drop((mover, node, giver, taker));
    cluster.finish().await;
}

/// A server takes the target's place that was so far behind that it knows nothing of the relocation, and hears from the others what it
/// owns: the source's rows are the only ones, and stay.
/// Invariant 16.
#[tokio::test]
async fn rows_stay_where_a_promotion_has_lost_that_they_were_brought() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Switched).await;
    let (giver, taker) = (cluster.stranger("shard_0").await, cluster.stranger("shard_2").await);
    let part = "DELETE FROM therev.relocation_parts AS p WHERE p.relocation = $1 RETURNING to_jsonb(p)";
    let took: serde_json::Value = taker.query_one(part, &[&number]).await.expect("a part").get(0);
    let control = cluster.stranger("control").await;
    let other_life = "UPDATE therev.relocations SET target_life = gen_random_uuid() WHERE relocation = $1";
    control.execute(other_life, &[&number]).await.expect("the relocation");
    mover.want(number, Goal::Done).await.expect("it goes on");
    let refused = Box::pin(mover.drive(number, &|_| {})).await;
    assert!(matches!(refused, Err(therev::relocation::Error::Refused { .. })), "{refused:?}");
    let posts = "SELECT count(*) FROM posts AS p WHERE p.author_id = $1";
    assert_eq!(giver.query_one(posts, &[&authors[0].0]).await.expect("an answer").get::<_, i64>(0), 4);

    // Restored, it can be ended.
    let again = "INSERT INTO therev.relocation_parts
                 SELECT * FROM jsonb_populate_record(NULL::therev.relocation_parts, $1)";
    taker.execute(again, &[&took]).await.expect("the part is back");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    nothing_left(&cluster).await;
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    drop((mover, node, giver, taker, control));
    cluster.finish().await;
}

/// Invariants 19 and 20.
#[tokio::test]
async fn what_a_sleeper_begins_of_what_was_done_is_taken_back() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let number = begun(&node, &mover, authors[0], Goal::Done).await;
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    let plan = mover.plan(&request(ShardNo(2), ShardNo(0), vec![authors[0].bucket()])).await.expect("a plan");
    let back = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, back)).await.state, State::Done);

    begun_by_a_sleeper(&cluster, &mover, number, authors[0].bucket()).await;
    mover.find_lost().await.expect("the shards are asked");
    nothing_left(&cluster).await;
    assert_eq!(node.posts_by_author(authors[0], None, 50).await.expect("an answer").len(), 4);
    let again = mover.plan(&request(ShardNo(0), ShardNo(2), vec![authors[0].bucket()])).await.expect("a plan");
    assert_eq!(again.obstacles, []);
    drop((mover, node));
    cluster.finish().await;
}

/// Nobody delivers what the former owner has to tell first: the relocation waits, and rests as soon as it is to.
#[tokio::test]
async fn a_relocation_that_waits_for_a_relay_can_rest() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let source = cluster.stranger("shard_0").await;
    source.batch_execute("UPDATE therev.outbox SET delivered_at = NULL").await.expect("everything waits");
    let number = begun(&node, &mover, authors[0], Goal::Done).await;
    let driven = tokio::spawn({
        let mover = Mover::new(node.shards().clone(), Options::default());
        async move { mover.drive(number, &|_| {}).await.map(|_| ()) }
    });
    let waits = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while !mover.show(number).await.expect("it is known").note.contains("events to deliver first") {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waits).await.expect("it says what it waits for");
    mover.pause(number, true).await.expect("it can rest");
    let rests = tokio::time::timeout(Duration::from_secs(60), driven).await.expect("it does not wait for a relay");
    rests.expect("no panic").expect("it rests");
    let paused = mover.show(number).await.expect("it is known");
    assert!(paused.is_paused && paused.state == State::Finishing && paused.note.is_empty(), "{paused:?}");

    mover.pause(number, false).await.expect("it goes on");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    nothing_left(&cluster).await;
    drop((source, mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn what_has_gone_back_cannot_be_wanted_otherwise() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    for goal in [Goal::Aborted, Goal::Switched] {
        let number = begun(&node, &mover, authors[0], Goal::Switched).await;
        mover.want(number, Goal::Reversed).await.expect("the way back is open");
        fail::cfg("relocation.taken_over", "panic").expect("a place in the sources");
        let dies = tokio::spawn({
            let mover =
                Mover::new(node.shards().clone(), Options { lease: Duration::from_secs(1), ..Options::default() });
            async move { mover.drive(number, &|_| {}).await.map(|_| ()) }
        });
        assert!(dies.await.is_err(), "the mover dies when the source owns the buckets again");
        fail::remove("relocation.taken_over");
        mover.want(number, goal).await.expect("nobody knows yet that it has gone back");
        let ended = tokio::time::timeout(Duration::from_secs(60), async {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            loop {
                ticks.tick().await;
                // The dead mover's lease runs out.
                if !mover.show(number).await.expect("it is known").has_worker {
                    return Box::pin(drive(&node, &mover, number)).await;
                }
            }
        });
        assert_eq!(ended.await.expect("it ends").state, State::Reversed);
        nothing_left(&cluster).await;
    }
    drop((mover, node));
    cluster.finish().await;
}

/// The former owner's end of a relocation has come, its new owner's has not, and the control database is put back to when rows were
/// copied: whatever is wanted of it there, it has changed hands.
#[tokio::test]
async fn what_has_half_ended_is_not_undone() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = some_content(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let on_shard_0 = |id: &therev::UserId| id.bucket().number().is_multiple_of(4) && id.bucket() != authors[0].bucket();
    let another = std::iter::repeat_with(therev::UserId::new).find(on_shard_0).expect("one of many");
    for (user, wanted) in [(authors[0], Goal::Done), (another, Goal::Aborted)] {
        let number = begun(&node, &mover, user, Goal::Done).await;
        fail::cfg("relocation.part_ended", "panic").expect("a place in the sources");
        let dies = tokio::spawn({
            let mover = Mover::new(node.shards().clone(), Options::default());
            async move { mover.drive(number, &|_| {}).await.map(|_| ()) }
        });
        assert!(dies.await.is_err(), "the mover dies between the two ends");
        fail::remove("relocation.part_ended");
        let put_back = "UPDATE therev.relocations SET state = 'copying', goal = $2, worker = NULL, leased_until = NULL
                         WHERE relocation = $1";
        let control = cluster.stranger("control").await;
        control.execute(put_back, &[&number, &wanted.name()]).await.expect("it is put back");
        assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done, "{wanted:?}");
        nothing_left(&cluster).await;
    }
    drop((mover, node));
    cluster.finish().await;
}
