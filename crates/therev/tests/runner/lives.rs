//! Servers that were promoted: which life of theirs counts, and what they know in it.

use crate::things::{post, thread, user_per_shard};
use testkit::{TestCluster, drive};
use therev::relocation::{Goal, Mover, Options, Request, State};
use therev::{Config, Database, Error, Group, Layout, NewPost, ShardNo, StoreError, Therev, UserId};
use tokio_postgres::Client;
use uuid::Uuid;

/// Lets a database look as if its server had been promoted since its life began: on another timeline.
async fn promoted(cluster: &TestCluster, part: &str) {
    let database = cluster.stranger(part).await;
    let sql = "UPDATE therev.identity SET timeline = 0, candidate_timeline = candidate_timeline - 1";
    database.batch_execute(sql).await.expect("another timeline");
    end_others(&database).await;
}

/// Ends all other connections to a database, as the end of a server does, and waits until they are gone: what is sent on
/// a connection that is only about to end may or may not have an effect.
async fn end_others(database: &Client) {
    let end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()";
    database.query(end, &[]).await.expect("connections are ended");
}

/// Which life a database is in, and which one counts.
async fn lives(cluster: &TestCluster, part: &str) -> ((Uuid, i64), (Uuid, i64)) {
    let life = |row: tokio_postgres::Row| (row.get("incarnation"), row.get("incarnation_counter"));
    let here = "SELECT incarnation, incarnation_counter FROM therev.identity";
    let here = cluster.stranger(part).await.query_one(here, &[]).await.expect("an identity");
    let name = if part == "directory" { "the directory".to_owned() } else { part.replace('_', " ") };
    let counts = "SELECT incarnation, incarnation_counter FROM therev.incarnations WHERE database = $1";
    let counts = cluster.stranger("control").await.query_one(counts, &[&name]).await.expect("a life that counts");
    (life(here), life(counts))
}

/// A node whose first connection to everything is made now.
async fn fresh(cluster: &TestCluster) -> Therev {
    cluster.node().await
}

/// Invariant 12.
#[tokio::test]
async fn a_promoted_shard_begins_a_life_that_knows_what_the_others_know() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Promoted").await;
    post(&node, authors[1], &open, "before").await;
    let (before, _) = lives(&cluster, "shard_1").await;

    // A bucket had moved on to shard 2, and the mark of it was among what shard 1 lost.
    let bucket = authors[1].bucket().number() ^ 4;
    let moved = format!("SET state = 'owned', peer = NULL, epoch = 5 WHERE bucket = {bucket}");
    cluster.stranger("shard_2").await.batch_execute(&format!("UPDATE therev.ownership {moved}")).await.expect("owned");
    promoted(&cluster, "shard_1").await;

    // The node that was connected, and one that comes now, find the new life by themselves.
    post(&node, authors[1], &open, "after").await;
    let (here, counts) = lives(&cluster, "shard_1").await;
    assert_eq!(here, counts);
    assert_eq!(here.1, before.1 + 1);
    assert_ne!(here.0, before.0);
    fresh(&cluster).await.user(authors[1]).await.expect("the user is there");
    assert_eq!(lives(&cluster, "shard_1").await.0, here, "one life a promotion");

    let shard = cluster.stranger("shard_1").await;
    let known = format!("SELECT state::text, peer, epoch FROM therev.ownership WHERE bucket = {bucket}");
    for row in shard.query(&known, &[]).await.expect("ownership") {
        assert_eq!((row.get(0), row.get(1), row.get(2)), ("moved", Some(2_i16), 5_i64));
    }
    let floor = "SELECT bool_and(version_floor = 2::bigint << 40) FROM therev.fence";
    assert!(shard.query_one(floor, &[]).await.expect("a fence").get::<_, bool>(0), "versions never go back");
    let least = "SELECT max(version) >= 2::bigint << 40 FROM posts";
    assert!(shard.query_one(least, &[]).await.expect("posts").get::<_, bool>(0));
    let told = "SELECT count(*) FROM therev.operator_log WHERE action = 'grant life' AND target = 'shard 1'";
    assert_eq!(cluster.stranger("control").await.query_one(told, &[]).await.expect("a log").get::<_, i64>(0), 1);

    // Shard 0 gives the borrowed bucket back, so that everything is where it was placed.
    let back = format!("UPDATE therev.ownership SET state = 'owned', peer = NULL, epoch = 6 WHERE bucket = {bucket}");
    shard.batch_execute(&back).await.expect("given back");
    let away = format!("UPDATE therev.ownership SET state = 'moved', peer = 1, epoch = 6 WHERE bucket = {bucket}");
    cluster.stranger("shard_2").await.batch_execute(&away).await.expect("given back");
    drop(node);
    cluster.finish().await;
}

/// A server is closed until its life has begun: that waits for no more than there is time for, here not for a row that is locked.
#[tokio::test]
async fn a_life_begins_however_much_was_told_lately() {
    let cluster = TestCluster::colocated().await;
    let node = therev::connect(Config { deadline_ms: 8_000, ..cluster.config() }).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let told = "INSERT INTO therev.outbox (colocation_group, bucket, kind, facts, delivered_at, first_delivered_at)
                SELECT 'content', 0, 'totals', '[]', now(), now() FROM generate_series(1, 2000)";
    let teller = cluster.stranger("shard_0").await;
    teller.batch_execute(told).await.expect("much was told");
    let holder = cluster.stranger("shard_0").await;
    let last = "BEGIN; SELECT FROM therev.outbox ORDER BY outbox_id DESC LIMIT 1 FOR UPDATE";
    holder.batch_execute(last).await.expect("the last one is held");
    promoted(&cluster, "shard_1").await;
    let mut found = node.user(authors[1]).await;
    for _ in 0..5 {
        if found.is_err() {
            found = node.user(authors[1]).await;
        }
    }
    assert_eq!(found.expect("the user is there").user_id, authors[1]);
    let again = "SELECT count(*) FROM therev.outbox WHERE delivered_at IS NULL AND lost_by = '{shard 1}'";
    assert!(teller.query_one(again, &[]).await.expect("a count").get::<_, i64>(0) > 0, "as much as there was time for");
    holder.batch_execute("ROLLBACK").await.expect("nobody holds it");
    teller.batch_execute("DELETE FROM therev.outbox WHERE facts = '[]'").await.expect("they were nobody's");
    drop((node, teller, holder));
    cluster.finish().await;
}

/// Invariants 6 and 12.
#[tokio::test]
async fn versions_never_go_back_where_rows_move_to_a_server_of_fewer_lives() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Promoted").await;
    promoted(&cluster, "shard_1").await;
    post(&node, authors[1], &open, "in the second life").await;
    node.relay_once().await.expect("the relay runs");

    let mover = Mover::new(node.shards().clone(), Options::default());
    let buckets = vec![authors[1].bucket()];
    let request = Request { groups: Group::ALL.to_vec(), buckets, pin: None, source: ShardNo(1), target: ShardNo(2) };
    let plan = mover.plan(&request).await.expect("a plan");
    let begun = mover.begin(&plan, Goal::Done, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, begun)).await.state, State::Done);

    // What is counted anew there, and what is new, is newer than what was told of the rows before.
    let target = cluster.stranger("shard_2").await;
    let contribution = format!("therev.thread_contributions WHERE author_id = '{}'", authors[1]);
    let version = format!("SELECT max(version) FROM {contribution}");
    let told: i64 = target.query_one(&version, &[]).await.expect("a contribution").get(0);
    assert!(told >= 2 << 40, "{told}");
    let damage = "UPDATE therev.thread_contributions SET posts = posts + 1";
    target.batch_execute(damage).await.expect("a count is wrong");
    assert!(node.repair().await.expect("it is repaired").ok);
    let counted: i64 = target.query_one(&version, &[]).await.expect("a contribution").get(0);
    assert!(counted > told, "{counted} after {told}");
    let another = thread(&node, authors[0], "Another").await;
    post(&node, authors[1], &another, "in a new thread").await;
    let least = format!("SELECT min(version) FROM {contribution}");
    assert!(target.query_one(&least, &[]).await.expect("two").get::<_, i64>(0) >= 2 << 40);

    // The next life of any server is above all of these.
    promoted(&cluster, "shard_2").await;
    post(&node, authors[1], &another, "in the next life").await;
    let target = cluster.stranger("shard_2").await;
    assert!(target.query_one(&version, &[]).await.expect("a version").get::<_, i64>(0) >= 3 << 40);
    drop((mover, node));
    cluster.finish().await;
}

/// A decision that a promotion has lost is carried out by nobody who comes late; one that was kept is.
/// Invariants 12 and 14.
#[tokio::test]
async fn what_a_promotion_has_not_decided_nobody_takes_over() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let mover = Mover::new(node.shards().clone(), Options::default());
    let (source, target) = (ShardNo(0), ShardNo(1));
    let request = Request { groups: Group::ALL.to_vec(), buckets: vec![ada.bucket()], pin: None, source, target };
    let plan = mover.plan(&request).await.expect("a plan");
    let number = mover.begin(&plan, Goal::Switched, "test").await.expect("it begins").relocation;
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Switched);

    let taker = cluster.stranger("shard_1").await;
    // As both shards are between the decision and its end, where the giving one has decided, and where that is lost.
    let between = async |decided: bool| {
        let bucket = ada.bucket();
        let giver = cluster.stranger("shard_0").await;
        let gives = if decided { ("moved", "1", "NULL") } else { ("draining", "NULL", "now()") };
        for (client, (state, peer, drained_at), part) in
            [(&giver, gives, gives.0), (&taker, ("incoming", "0", "NULL"), "ready")]
        {
            let so = format!(
                "UPDATE therev.relocation_parts SET state = '{part}', drained_at = {drained_at};
                 UPDATE therev.ownership SET state = '{state}', peer = {peer} WHERE bucket = {bucket}"
            );
            client.batch_execute(&so).await.expect("a superuser may");
        }
    };
    let part = async || {
        let part = "SELECT state, attempt FROM therev.relocation_parts";
        let row = taker.query_one(part, &[]).await.expect("its part");
        (row.get::<_, String>("state"), row.get::<_, i32>("attempt"))
    };
    let take_over = "SELECT therev.take_over($1, $2)";

    // Lost: whoever comes late finds nothing to take over.
    between(false).await;
    promoted(&cluster, "shard_0").await;
    node.user(ada).await.expect("shard 0 has begun a life, in which she is there");
    let (state, attempt) = part().await;
    assert_eq!(state, "incoming");
    let late = taker.query_one(take_over, &[&number, &attempt]).await.expect("an answer");
    assert!(!late.get::<_, bool>(0));
    assert_eq!(node.where_id(ada.0).await.expect("a place").shard, source);

    // Lost, while it is just being carried out: the life begins with the end of that.
    between(false).await;
    promoted(&cluster, "shard_0").await;
    let takes = cluster.stranger("shard_1").await;
    takes.batch_execute("BEGIN").await.expect("a transaction");
    let taken = takes.query_one(take_over, &[&number, &attempt]).await.expect("an answer");
    assert!(taken.get::<_, bool>(0));
    let asked = tokio::spawn({
        let node = node.clone();
        async move { node.user(ada).await }
    });
    let waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%lay_down%'
                    AND datname = current_database()";
    while taker.query(waits, &[]).await.expect("who waits").is_empty() {
        assert!(!asked.is_finished(), "it does not wait: {:?}", asked.await);
    }
    takes.batch_execute("COMMIT").await.expect("it is taken over");
    asked.await.expect("no panic").expect("she is there");
    assert_eq!(node.where_id(ada.0).await.expect("a place").shard, target);

    // Kept: it is carried out.
    between(true).await;
    promoted(&cluster, "shard_0").await;
    node.shards().ownership(source, Group::Account, &[ada.into()]).await.expect("it has begun a life");
    assert_eq!(part().await.0, "ready");
    mover.want(number, Goal::Done).await.expect("it is open");
    assert_eq!(Box::pin(drive(&node, &mover, number)).await.state, State::Done);
    assert_eq!(node.where_id(ada.0).await.expect("a place").shard, target);
    drop((taker, takes, mover, node));
    cluster.finish().await;
}

#[tokio::test]
async fn what_one_database_has_lost_is_told_again_for_its_sake_alone() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Told").await;
    post(&node, authors[1], &open, "text").await;
    // What is delivered is marked with the next pass.
    for _ in 0..2 {
        node.relay_once().await.expect("the relay runs");
    }
    let teller = cluster.stranger("shard_1").await;
    let pending = async || {
        let sql = "SELECT count(*) FROM therev.outbox WHERE delivered_at IS NULL";
        teller.query_one(sql, &[]).await.expect("a count").get::<_, i64>(0)
    };
    assert_eq!(pending().await, 0);
    let long_ago = "UPDATE therev.outbox
                       SET first_delivered_at = first_delivered_at - interval '2 hours', lost_by = '{shard 0}'";
    teller.batch_execute(long_ago).await.expect("told long ago, and again just now");

    promoted(&cluster, "shard_2").await;
    node.user(authors[2]).await.expect("the user is there");
    assert_eq!(pending().await, 0, "it was no news to shard 2");
    promoted(&cluster, "shard_0").await;
    node.user(authors[0]).await.expect("the user is there");
    assert!(pending().await > 0, "shard 0 may have lost it once more");

    for _ in 0..2 {
        node.relay_once().await.expect("the relay runs");
    }
    let told = "SELECT count(*) FROM therev.outbox
                 WHERE delivered_at IS NULL OR first_delivered_at > now() - interval '1 hour'";
    assert_eq!(teller.query_one(told, &[]).await.expect("a count").get::<_, i64>(0), 0, "it keeps its first time");
    drop(node);
    cluster.finish().await;
}

/// The server of shard 1 takes the place of the one that counts, by a call that is cut off when the life is granted, and by the next.
async fn begins_what_was_granted(cluster: &TestCluster, author: UserId) {
    let (_, (counts, _)) = lives(cluster, "shard_1").await;
    let server = cluster.stranger("shard_1").await;
    let takes = format!("SELECT therev.take_its_place('{counts}')");
    server.batch_execute(&takes).await.expect("it may ask");
    let asked = server.query_one("SELECT before, candidate FROM therev.ask_for_life()", &[]).await.expect("it asks");
    let (mut before, candidate): (Vec<Uuid>, Uuid) = (asked.get("before"), asked.get("candidate"));
    before.push(counts);
    let grant = "SELECT incarnation FROM therev.grant_life('shard 1', $1, $2)";
    let control = cluster.stranger("control").await;
    let granted = control.query_one(grant, &[&before, &candidate]).await.expect("it is granted");
    assert_eq!(granted.get::<_, Uuid>(0), candidate);

    let (operator, shard) = (fresh(cluster).await, Database::Shard(ShardNo(1)));
    let begun = operator.shards().grant_life(shard).await.expect("the same call goes on");
    assert_eq!(begun.incarnation, candidate);
    operator.shards().grant_life(shard).await.expect_err("it is in force");
    operator.user(author).await.expect("it serves");
}

/// Invariant 12.
#[tokio::test]
async fn of_two_that_were_promoted_apart_one_counts() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let shard = cluster.stranger("shard_1").await;
    let name: String = shard.query_one("SELECT current_database()", &[]).await.expect("a name").get(0);
    drop(shard);
    let url = cluster.url("shard_1");
    let (server, _) = url.rsplit_once('/').expect("an address with a database");
    let server = testkit::connect(&format!("{server}/postgres")).await;
    // The old primary that comes back as it was, and a second standby.
    for copy in ["old", "other"] {
        end_others(&cluster.stranger("shard_1").await).await;
        let sql = format!("CREATE DATABASE {name}_{copy} TEMPLATE {name}");
        server.batch_execute(&sql).await.expect("a copy of the server");
    }
    let leads_to = async |database: String| {
        let control = cluster.stranger("control").await;
        let set = "UPDATE therev.shards SET database = $1 WHERE shard = 1";
        control.execute(set, &[&database]).await.expect("the address leads there");
    };
    promoted(&cluster, "shard_1").await;
    node.user(authors[1]).await.expect("the first one that asks is granted its life");
    let (winner, _) = lives(&cluster, "shard_1").await;

    for (copy, on_another_timeline) in [("other", true), ("old", false)] {
        leads_to(format!("{name}_{copy}")).await;
        let other = testkit::connect(&format!("{}_{copy}", cluster.url("shard_1"))).await;
        if on_another_timeline {
            other.batch_execute("UPDATE therev.identity SET timeline = 0").await.expect("another timeline");
        }
        let late = fresh(&cluster).await;
        for _ in 0..3 {
            let refused = late.user(authors[1]).await;
            let Err(Error::Store(error)) = refused else { panic!("{copy}: {refused:?}") };
            assert_eq!(error.kind(), "closed", "{copy}: {error}");
            assert!(error.to_string().contains("another server was promoted in its place"), "{error}");
        }
        late.user(authors[2]).await.expect("the other shards go on");
        let life = "SELECT incarnation_counter FROM therev.identity";
        assert_eq!(other.query_one(life, &[]).await.expect("an identity").get::<_, i64>(0), 1, "{copy}");
    }
    leads_to(name.clone()).await;
    assert_eq!(lives(&cluster, "shard_1").await, (winner, winner));
    fresh(&cluster).await.user(authors[1]).await.expect("the winner serves");

    // Lost for good, it gives way to whichever an operator names, and to the next one again.
    let shard_1 = Database::Shard(ShardNo(1));
    let granted = fresh(&cluster).await.shards().grant_life(shard_1).await;
    assert!(matches!(&granted, Err(StoreError::InTheWay { .. })), "it serves: {granted:?}");
    for (copy, counter) in [("other", winner.1 + 1), ("old", winner.1 + 2)] {
        leads_to(format!("{name}_{copy}")).await;
        let operator = fresh(&cluster).await;
        let granted = operator.shards().grant_life(shard_1).await.expect("the control database grants it");
        assert_eq!(granted.counter, counter, "{copy}");
        operator.user(authors[1]).await.expect("it serves");
        fresh(&cluster).await.user(authors[1]).await.expect("everybody");
        let other = testkit::connect(&format!("{}_{copy}", cluster.url("shard_1"))).await;
        let floor = "SELECT bool_and(f.version_floor = $1::bigint << 40) FROM therev.fence AS f";
        let is_above = other.query_one(floor, &[&counter]).await.expect("a fence");
        assert!(is_above.get::<_, bool>(0), "versions are greater than those of the lost one");
    }
    leads_to(name.clone()).await;
    let refused = fresh(&cluster).await.user(authors[1]).await;
    assert!(matches!(&refused, Err(Error::Store(error)) if error.kind() == "closed"), "{refused:?}");
    // It may come back by the same way: here by a call that goes on with one that was cut off.
    begins_what_was_granted(&cluster, authors[1]).await;
    for copy in ["old", "other"] {
        let drop = format!("DROP DATABASE {name}_{copy} WITH (FORCE)");
        server.batch_execute(&drop).await.expect("the copy goes");
    }
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn the_directory_and_the_control_database_are_promoted() {
    let cluster = TestCluster::usual().await;
    let config = Config { refresh_ms: 100, ..cluster.config() };
    let node = therev::connect(config).await.expect("a node");
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "All at once").await;
    let post_id = therev::PostId::new(authors[1]);
    for part in ["control", "directory", "shard_0"] {
        promoted(&cluster, part).await;
    }
    // Other threads' authors are found by the directory, the thread on a shard, both by the control database.
    // Connections that were ended are found out one by one, by the calls that meet them.
    let written = || NewPost { post_id: Some(post_id), ..NewPost::new(authors[1], open.thread_id, "after") };
    while let Err(error) = node.create_post(written()).await {
        assert!(matches!(error, Error::Store(_)), "{error}");
    }
    assert_eq!(node.thread_page(open.thread_id, None, 9).await.expect("a page").posts.len(), 1);
    node.relay_once().await.expect("a relay");
    for part in ["directory", "shard_0"] {
        let (here, counts) = lives(&cluster, part).await;
        assert_eq!(here, counts, "{part}");
        assert!(here.1 > 1, "{part}");
    }
    let control = "SELECT incarnation_counter FROM therev.identity WHERE timeline = therev.current_timeline()";
    let counter = cluster.stranger("control").await.query_one(control, &[]).await.expect("an identity");
    assert_eq!(counter.get::<_, i64>(0), 2);
    drop(node);
    cluster.finish().await;
}

/// Invariant 12.
#[tokio::test]
async fn a_promoted_shard_stays_closed_while_nobody_can_grant_its_life() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    for (part, reason) in [("control", "the control database"), ("shard_3", "shard 3")] {
        promoted(&cluster, "shard_1").await;
        crate::outages::reachable(&cluster, part, false).await;
        let closed = node.user(authors[1]).await;
        let Err(Error::Store(error)) = closed else { panic!("{part}: {closed:?}") };
        assert_eq!(error.kind(), "closed", "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        node.user(authors[2]).await.expect("the others go on");
        crate::outages::reachable(&cluster, part, true).await;
        let open = async {
            while node.user(authors[1]).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), open).await.expect("it opens by itself");
    }
    drop(node);
    cluster.finish().await;
}

/// A node that saw the server as unknown, and asked after another one had ended it all, was granted a second life; killed
/// before that began, it left the server closed for good.
/// Invariant 12.
#[tokio::test]
async fn one_promotion_is_one_life_whoever_asks_and_when() {
    let cluster = TestCluster::colocated().await;
    let mut nodes = Vec::new();
    for _ in 0..6 {
        nodes.push(cluster.node().await);
    }
    let authors = user_per_shard(&nodes[0]).await;
    for round in 1..=3 {
        for part in ["shard_1", "control"] {
            promoted(&cluster, part).await;
        }
        // All at once; connections that were ended are found out by the calls that meet them.
        let calls = nodes.iter().map(|node| async { while node.user(authors[1]).await.is_err() {} });
        futures_util::future::join_all(calls).await;
        let (here, counts) = lives(&cluster, "shard_1").await;
        assert_eq!((here, here.1), (counts, 1 + round));
        // Whoever comes late has nothing to ask for.
        let shard = cluster.stranger("shard_1").await;
        assert!(shard.query("SELECT * FROM therev.ask_for_life()", &[]).await.expect("an answer").is_empty());
        let control = cluster.stranger("control").await;
        let counter = "SELECT incarnation_counter FROM therev.identity";
        assert_eq!(control.query_one(counter, &[]).await.expect("an identity").get::<_, i64>(0), 1 + round);
    }
    drop(nodes);
    cluster.finish().await;
}

/// The control database was promoted as well, and has lost the life of the server that the next one followed.
/// Invariant 12.
#[tokio::test]
async fn a_life_that_was_lost_is_learned_from_whoever_followed_it() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let (_, first) = lives(&cluster, "shard_1").await;
    let answers = async || {
        let asked = async { while node.user(authors[1]).await.is_err() {} };
        tokio::time::timeout(std::time::Duration::from_secs(30), asked).await.expect("it opens by itself");
    };
    promoted(&cluster, "shard_1").await;
    answers().await;
    let (second, _) = lives(&cluster, "shard_1").await;
    let lost = "UPDATE therev.incarnations SET incarnation = $1, incarnation_counter = $2 WHERE database = 'shard 1'";
    let control = cluster.stranger("control").await;
    assert_eq!(control.execute(lost, &[&first.0, &first.1]).await.expect("as it was"), 1);
    promoted(&cluster, "shard_1").await;
    answers().await;
    let (here, counts) = lives(&cluster, "shard_1").await;
    assert_eq!((here, here.1), (counts, second.1 + 1));
    drop((node, control));
    cluster.finish().await;
}

/// The next promotion came while the granted life had yet to begin: another shard was down, or the node that asked was killed.
/// Invariant 12.
#[tokio::test]
async fn a_life_that_was_granted_and_not_begun_gives_way_to_the_next_one() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let control = cluster.stranger("control").await;
    for (part, name) in [("shard_1", "shard 1"), ("directory", "the directory")] {
        let mut succeeds = Vec::new();
        // Of three lives that it asks for, the second is granted.
        for is_granted in [false, true, false] {
            promoted(&cluster, part).await;
            let asked = cluster.stranger(part).await.query_one("SELECT * FROM therev.ask_for_life()", &[]).await;
            let asked = asked.expect("it asks");
            let (before, candidate): (Vec<Uuid>, Uuid) = (asked.get("before"), asked.get("candidate"));
            if is_granted {
                let grant = "SELECT incarnation FROM therev.grant_life($1, $2, $3)";
                let counts = control.query_one(grant, &[&name, &before, &candidate]).await.expect("a life");
                assert_eq!(counts.get::<_, Uuid>(0), candidate, "{name}");
            }
            succeeds = [before, vec![candidate]].concat();
        }
        promoted(&cluster, part).await;
        let (_, granted) = lives(&cluster, part).await;
        let open = async {
            while node.user(authors[1]).await.is_err() || node.shards().directory().token().await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), open).await.expect("it opens by itself");
        let (here, counts) = lives(&cluster, part).await;
        assert_eq!((here, here.1), (counts, granted.1 + 1), "{name}");
        // Another server of the same descent comes too late.
        let grant = "SELECT incarnation FROM therev.grant_life($1, $2, gen_random_uuid())";
        let late = control.query_one(grant, &[&name, &succeeds]).await.expect("a life");
        assert_eq!(late.get::<_, Uuid>(0), here.0, "{name}");
        let left = "SELECT cardinality(candidates) FROM therev.identity";
        assert_eq!(cluster.stranger(part).await.query_one(left, &[]).await.expect("an identity").get::<_, i32>(0), 0);
    }
    drop((control, node));
    cluster.finish().await;
}

/// Has the control database say that a shard's hosts are these.
async fn hosts(cluster: &TestCluster, shard: i16, hosts: &str) {
    let set = "UPDATE therev.shards SET hosts = $1 WHERE shard = $2";
    cluster.stranger("control").await.execute(set, &[&hosts, &shard]).await.expect("readdressed");
}

/// The host of the server that has a database.
fn host(cluster: &TestCluster, part: &str) -> String {
    let address: tokio_postgres::Config = cluster.url(part).parse().expect("an address");
    format!("127.0.0.1:{}", address.get_ports()[0])
}

#[tokio::test]
async fn a_host_that_says_nothing_keeps_nobody_from_the_next() {
    let cluster = TestCluster::colocated().await;
    let authors = user_per_shard(&fresh(&cluster).await).await;
    // The system takes connections for it, and nobody ever answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let (port, answers) = (silent.local_addr().expect("a port").port(), host(&cluster, "shard_1"));
    hosts(&cluster, 1, &format!("127.0.0.1:{port},{answers}")).await;
    let node = fresh(&cluster).await;
    node.user(authors[1]).await.expect("the other host answers");
    node.check().await.expect("whoever proves gets there as well");
    // A standby that has taken the silent one's place is in no life that anybody knows yet.
    promoted(&cluster, "shard_1").await;
    node.user(authors[1]).await.expect("who was connected follows");
    fresh(&cluster).await.user(authors[1]).await.expect("who comes now gets there");
    let (here, counts) = lives(&cluster, "shard_1").await;
    assert_eq!(here, counts);
    hosts(&cluster, 1, &answers).await;
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn of_two_hosts_that_take_writes_the_one_counts_that_was_granted_its_life() {
    let cluster = TestCluster::colocated().await;
    let node = fresh(&cluster).await;
    let authors = user_per_shard(&node).await;
    drop(node);
    // On another server, under the same name: one that was shard 1 in another life.
    let name: String = {
        let shard = cluster.stranger("shard_1").await;
        shard.query_one("SELECT current_database()", &[]).await.expect("a name").get(0)
    };
    end_others(&cluster.stranger("shard_2").await).await;
    let source = cluster.url("shard_2");
    let (server, template) = source.rsplit_once('/').expect("an address with a database");
    let admin = testkit::connect(&format!("{server}/postgres")).await;
    let copy = format!("CREATE DATABASE {name} TEMPLATE {template} OWNER therev_admin");
    admin.batch_execute(&copy).await.expect("a database of that name");
    let other = testkit::connect(&format!("{server}/{name}")).await;
    let pretend = "UPDATE therev.identity SET shard = 1, incarnation = gen_random_uuid()";
    other.batch_execute(pretend).await.expect("another life");

    let (first, second) = (host(&cluster, "shard_2"), host(&cluster, "shard_1"));
    hosts(&cluster, 1, &format!("{first},{second}")).await;
    let node = fresh(&cluster).await;
    node.user(authors[1]).await.expect("the second host is the one that counts");
    node.check().await.expect("whoever proves gets there as well");
    hosts(&cluster, 1, &first).await;
    let refused = fresh(&cluster).await.user(authors[1]).await;
    assert!(matches!(&refused, Err(Error::Store(error)) if error.kind() == "closed"), "{refused:?}");
    hosts(&cluster, 1, &second).await;
    drop((node, other));
    cluster.finish().await;
}

#[tokio::test]
async fn nodes_go_where_a_shard_and_the_directory_have_gone() {
    let cluster = TestCluster::colocated().await;
    let node = fresh(&cluster).await;
    let authors = user_per_shard(&node).await;
    let control = cluster.stranger("control").await;
    let directory = "UPDATE therev.directories SET hosts = $1 WHERE directory = 0";
    let nobody = "127.0.0.1:1";
    for (there, answers) in [(nobody, false), ("", true)] {
        let hosts_of = |part: &str| if there.is_empty() { host(&cluster, part) } else { there.to_owned() };
        hosts(&cluster, 1, &hosts_of("shard_1")).await;
        control.execute(directory, &[&hosts_of("directory")]).await.expect("readdressed");
        node.shards().refresh().await.expect("the control database answers");
        assert_eq!(node.user(authors[1]).await.is_ok(), answers, "shard 1 is at `{there}`");
        assert_eq!(node.shards().directory().token().await.is_ok(), answers, "the directory is at `{there}`");
        node.user(authors[2]).await.expect("the others go on");
    }
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn another_control_database_counts_only_with_a_greater_number() {
    let cluster = TestCluster::usual().await;
    let node = fresh(&cluster).await;
    promoted(&cluster, "control").await;
    node.shards().refresh().await.expect("it has begun a life");
    let control = cluster.stranger("control").await;
    let life = control.query_one("SELECT incarnation, incarnation_counter FROM therev.identity", &[]).await;
    let life = life.expect("an identity");
    let (incarnation, counter): (Uuid, i64) = (life.get(0), life.get(1));
    let set = "UPDATE therev.identity SET incarnation = $1, incarnation_counter = $2";
    // One that was promoted beside it, and one that comes back as it was before.
    for (incarnation, counter) in [(Uuid::new_v4(), counter), (Uuid::new_v4(), counter - 1)] {
        control.execute(set, &[&incarnation, &counter]).await.expect("another server is in its place");
        end_others(&control).await;
        let refused = node.shards().refresh().await.expect_err("it is not the one that counts");
        assert!(refused.to_string().contains("another server was promoted in its place"), "{refused}");
    }
    control.execute(set, &[&incarnation, &counter]).await.expect("the one that counts is back");
    end_others(&control).await;
    node.shards().refresh().await.expect("it answers");
    drop(node);
    cluster.finish().await;
}
