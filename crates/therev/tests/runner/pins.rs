//! Pins: a user placed apart from its bucket is found by everybody, and nobody else notices.

use crate::things::{begun_by_a_sleeper, operator, post, thread, user_per_shard};
use std::time::Duration;
use testkit::{TestCluster, Writing, drive, while_relaying};
use therev::relocation::{Aim, Goal, Mover, Options, Relocation, Request, State};
use therev::{
    AccountType, Database, Group, Layout, Map, NewAccount, NewTask, NewUser, PostChange, Provider, ShardNo, TaskType,
    Therev, Thread, UserId,
};

/// A cluster with a user who is moved about, and one who has the same bucket.
struct Scene {
    cluster: TestCluster,
    node: Therev,
    mover: Mover,
    pinned: UserId,
    neighbour: UserId,
    threads: [Thread; 2],
}

impl Scene {
    async fn new() -> Scene {
        let cluster = TestCluster::colocated().await;
        let node = cluster.node().await;
        let [pinned, other, ..] = user_per_shard(&node).await;
        let neighbour =
            std::iter::repeat_with(UserId::new).find(|id| id.bucket() == pinned.bucket()).expect("one of many");
        let new = NewUser { user_id: Some(neighbour), user_name: "neighbour".into(), ..NewUser::default() };
        node.register(new, &operator()).await.expect("registered");
        let threads =
            [thread(&node, pinned, "By the pinned").await.value, thread(&node, neighbour, "By the other").await.value];
        for open in &threads {
            for author in [pinned, neighbour, other] {
                post(&node, author, open, "a post").await;
            }
        }
        node.relay_once().await.expect("the relay runs");
        let mover = Mover::new(node.shards().clone(), Options::default());
        Scene { cluster, node, mover, pinned, neighbour, threads }
    }

    async fn move_it(&self, pin: Option<UserId>, source: i16, target: i16, goal: Goal) -> i64 {
        let buckets = vec![self.pinned.bucket()];
        let (source, target) = (ShardNo(source), ShardNo(target));
        let request = Request { groups: Group::ALL.to_vec(), buckets, pin, source, target };
        let plan = self.mover.plan(&request).await.expect("a plan");
        assert!(plan.obstacles.is_empty() && plan.rows > 0, "{plan:?}");
        self.mover.begin(&plan, goal, "test").await.expect("it begins").relocation
    }

    async fn drive(&self, number: i64) -> Relocation {
        drive(&self.node, &self.mover, number).await
    }

    async fn moved(&self, pin: Option<UserId>, source: i16, target: i16) {
        let number = self.move_it(pin, source, target, Goal::Done).await;
        assert_eq!(Box::pin(self.drive(number)).await.state, State::Done);
        self.nothing_left().await;
    }

    async fn nothing_left(&self) {
        let shards: Vec<String> = (0..self.cluster.shards()).map(|n| self.cluster.url(&format!("shard_{n}"))).collect();
        testkit::nothing_left(&shards).await;
    }

    fn statements_on_shards(&self) -> u64 {
        let of_shard = |(database, count)| matches!(database, Database::Shard(_)).then_some(count);
        self.node.shards().statements().into_iter().filter_map(of_shard).sum()
    }

    /// How many rows say of users that they are placed apart, on each shard.
    async fn pins(&self) -> Vec<i64> {
        let mut pins = Vec::new();
        for shard in 0..self.cluster.shards() {
            let client = self.cluster.stranger(&format!("shard_{shard}")).await;
            pins.push(client.query_one("SELECT count(*) FROM therev.pins", &[]).await.expect("pins").get(0));
        }
        pins
    }

    /// Both users are found with everything, by a node that knows nothing as well.
    async fn prove(&self, pinned_at: i16, neighbour_at: i16) {
        let stale = self.cluster.node().await;
        for round in 0..2 {
            if round == 0 {
                stale.shards().forget_placement(Map::first(Layout::Colocated, 4));
            }
            for (user, shard) in [(self.pinned, pinned_at), (self.neighbour, neighbour_at)] {
                assert_eq!(stale.user(user).await.expect("the user").user_id, user);
                let posts = stale.posts_by_author(user, None, 50).await.expect("posts");
                assert!(posts.len() >= 2, "{posts:?}");
                assert_eq!(stale.post(posts[0].post_id).await.expect("by its id").author_id, user);
                assert_eq!(stale.where_id(user.0).await.expect("a place").shard, ShardNo(shard));
                assert_eq!(stale.where_id(posts[0].post_id.0).await.expect("a place").shard, ShardNo(shard));
            }
            for open in &self.threads {
                let page = stale.thread_page(open.thread_id, None, 50).await.expect("a page");
                assert!(!page.partial && page.posts.len() >= 3, "{page:?}");
                let mut authors: Vec<UserId> = page.posts.iter().map(|post| post.post.author_id).collect();
                authors.sort_unstable();
                authors.dedup();
                assert_eq!(authors.len(), 3, "everybody's posts are on the page");
            }
            let nobody = therev::PostId::new(self.pinned);
            assert!(matches!(stale.post(nobody).await, Err(therev::Error::NotFound { .. })));
        }
        self.cluster.prove().await;
    }
}

/// Invariant 22.
#[tokio::test]
async fn a_pinned_user_is_found_wherever_it_and_its_bucket_go() {
    let scene = Scene::new().await;
    let Scene { node, pinned, neighbour, .. } = &scene;
    // Away from home, and what is written then is written there.
    scene.moved(Some(*pinned), 0, 3).await;
    assert_eq!(scene.pins().await, [2, 0, 0, 2]);
    scene.prove(3, 0).await;
    // What is waited for is the shard that has the rows, also by a node that believes them at home.
    let lost = scene.cluster.node().await;
    lost.shards().forget_placement(Map::first(Layout::Colocated, 4));
    let asked = || lost.shards().statements()[&Database::Shard(ShardNo(3))];
    let before = asked();
    lost.shards().confirm(Group::Content, *pinned).await.expect("her commits are safe");
    assert!(asked() > before);
    drop(lost);
    // A node that has heard of it goes straight there, and its neighbour's calls are what they were.
    node.shards().refresh().await.expect("the control database answers");
    for user in [pinned, neighbour] {
        let before = scene.statements_on_shards();
        node.user(*user).await.expect("an answer");
        assert_eq!(scene.statements_on_shards() - before, 1);
    }
    let tasks = node.tasks();
    let new = NewAccount::new(*pinned, Provider::Claude, AccountType::Api, "mine");
    let account = tasks.create_account(new, &operator()).await.expect("an account");
    assert_eq!(tasks.account(account.account_id).await.expect("by its id").user_id, *pinned);
    let task =
        tasks.create_task(NewTask::new(*pinned, TaskType::Summarization, serde_json::json!({}))).await.expect("a task");
    assert_eq!(tasks.cancel_task(task.task_id, &operator()).await.expect("by its id").user_id, *pinned);
    for user in [pinned, neighbour] {
        let written = post(node, *user, &scene.threads[0], "after the pin").await;
        let change = PostChange { body: Some("changed".into()), ..PostChange::default() };
        node.change_post(written.post_id, change, &operator()).await.expect("changed by its id");
        node.delete_post(written.post_id, &operator()).await.expect("deleted by its id");
    }
    // From there to another place.
    scene.moved(Some(*pinned), 3, 1).await;
    assert_eq!(scene.pins().await, [2, 2, 0, 0]);
    scene.prove(1, 0).await;
    // Its bucket moves without it, then to the shard where it is, then away from there.
    scene.moved(None, 0, 2).await;
    assert_eq!(scene.pins().await, [0, 2, 2, 0]);
    scene.prove(1, 2).await;
    scene.moved(None, 2, 1).await;
    assert_eq!(scene.pins().await, [0, 2, 0, 0]);
    scene.prove(1, 1).await;
    scene.moved(None, 1, 3).await;
    assert_eq!(scene.pins().await, [0, 2, 0, 2]);
    scene.prove(1, 3).await;
    // Back to its bucket.
    scene.moved(Some(*pinned), 1, 3).await;
    assert_eq!(scene.pins().await, [0, 0, 0, 0]);
    scene.prove(3, 3).await;
    // Or the bucket to it.
    scene.moved(Some(*pinned), 3, 1).await;
    assert!(!scene.mover.release(*pinned).await.expect("an answer"), "its bucket is elsewhere");
    assert!(!scene.mover.may_release(*pinned).await.expect("an answer"));
    scene.moved(None, 3, 1).await;
    assert!(scene.mover.may_release(*pinned).await.expect("an answer"));
    assert!(scene.mover.release(*pinned).await.expect("it is with its bucket"));
    assert_eq!(scene.pins().await, [0, 0, 0, 0]);
    scene.prove(1, 1).await;
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// A command that was interrupted after the switch is gone on with by the same command, which finds the user there already.
#[tokio::test]
async fn what_was_left_after_the_switch_is_the_same_request_again() {
    let scene = Scene::new().await;
    let Scene { node, mover, pinned, .. } = &scene;
    for (source, target, is_back) in [(ShardNo(0), ShardNo(2), false), (ShardNo(2), ShardNo(0), true)] {
        let requests = async || {
            if is_back { mover.unpin_requests(*pinned).await } else { mover.pin_requests(*pinned, target).await }
        };
        let first = requests().await.expect("a way");
        let number = scene.move_it(Some(*pinned), source.0, target.0, Goal::Switched).await;
        assert_eq!(Box::pin(scene.drive(number)).await.state, State::Switched);
        let again = requests().await.expect("what was begun");
        assert_eq!(again.len(), 1);
        assert_eq!((again[0].source, again[0].target, again[0].pin), (source, target, Some(*pinned)));
        assert_eq!(again[0].groups, first[0].groups);
        let held = mover.left_of(&again[0]).await.expect_err("it is held for people").to_string();
        assert!(held.contains("in another relocation"), "{held}");
        mover.want(number, Goal::Done).await.expect("it is open");
        let left = mover.left_of(&again[0]).await.expect("an answer").expect("nobody works at it");
        assert_eq!(left.relocation, number);
        assert_eq!(Box::pin(scene.drive(number)).await.state, State::Done);
        requests().await.expect_err("nothing is left to do");
    }
    assert_eq!(node.where_id(pinned.0).await.expect("a place").shard, ShardNo(0));
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// Who has gone on from one place apart to another is found by ids, also while home still points to the first one: rows that are
/// there, and that there are none.
/// Invariant 22.
#[tokio::test]
async fn by_an_id_who_is_apart_is_found_before_home_hears_of_the_next_place() {
    let scene = Scene::new().await;
    scene.moved(Some(scene.pinned), 0, 3).await;
    let held = scene.move_it(Some(scene.pinned), 3, 1, Goal::Switched).await;
    assert_eq!(Box::pin(scene.drive(held)).await.state, State::Switched);
    scene.prove(1, 0).await;
    // As where home was down, or was put back to before it heard.
    let home = scene.cluster.stranger("shard_0").await;
    let forgets = "UPDATE therev.pins SET peer = 3, epoch = epoch - 1 WHERE user_id = $1 AND state = 'moved'";
    assert_eq!(home.execute(forgets, &[&scene.pinned.0]).await.expect("it forgets"), 2);
    let node = scene.cluster.node().await;
    for user in [scene.pinned, scene.neighbour] {
        let written = post(&node, user, &scene.threads[0], "while it is held").await;
        let change = PostChange { body: Some("changed".into()), ..PostChange::default() };
        node.change_post(written.post_id, change, &operator()).await.expect("changed by its id");
        node.delete_post(written.post_id, &operator()).await.expect("deleted by its id");
        let nobody = therev::PostId::new(user);
        assert!(matches!(node.post(nobody).await, Err(therev::Error::NotFound { .. })));
    }
    drop(home);
    scene.mover.want(held, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(scene.drive(held)).await.state, State::Reversed);
    scene.prove(3, 0).await;
    drop(node);
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// Reads by an id that names only the bucket, before, during and after each switch of a pin: never «not found», and once it is
/// over each in one round of who may have the row.
/// Invariant 22.
#[tokio::test]
async fn reads_by_id_go_on_over_the_switches_of_a_pin() {
    let scene = Scene::new().await;
    let posts = [
        post(&scene.node, scene.pinned, &scene.threads[1], "read on and on").await.post_id,
        post(&scene.node, scene.neighbour, &scene.threads[1], "read on and on").await.post_id,
    ];
    let (tell_end, end) = tokio::sync::watch::channel(false);
    let mut readers = tokio::task::JoinSet::new();
    for is_stale in [false, true] {
        let (node, end) = (scene.cluster.node().await, end.clone());
        readers.spawn(async move {
            let mut reads = 0_u64;
            while !*end.borrow() {
                if is_stale {
                    node.shards().forget_placement(Map::first(Layout::Colocated, 4));
                }
                for post in posts {
                    assert_eq!(node.post(post).await.expect("it is there").post_id, post);
                    reads += 1;
                }
            }
            reads
        });
    }
    for (source, target) in [(0, 3), (3, 1), (1, 0)] {
        let there_and_back = scene.move_it(Some(scene.pinned), source, target, Goal::Switched).await;
        assert_eq!(Box::pin(scene.drive(there_and_back)).await.state, State::Switched);
        scene.mover.want(there_and_back, Goal::Reversed).await.expect("the way back is open");
        assert_eq!(Box::pin(scene.drive(there_and_back)).await.state, State::Reversed);
        scene.moved(Some(scene.pinned), source, target).await;
        scene.node.shards().refresh().await.expect("the control database answers");
        let who_may_have_it = if target == 0 { 1 } else { 2 };
        for post in posts {
            let before = scene.statements_on_shards();
            scene.node.post(post).await.expect("it is there");
            // One that has no connection ready while the other one has answered is not asked.
            let asked = scene.statements_on_shards() - before;
            assert!((1..=who_may_have_it).contains(&asked), "{source} to {target}: {asked}");
        }
    }
    tell_end.send_replace(true);
    while let Some(reads) = readers.join_next().await {
        assert!(reads.expect("no read failed") > 10);
    }
    scene.prove(0, 0).await;
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// A mover dies in the middle of each leg of a user's way, and nobody calls but by the id of a post, which names only the bucket.
/// Invariants 15 and 22.
#[tokio::test]
async fn a_call_by_an_id_ends_what_the_mover_of_a_pin_left() {
    let scene = Scene::new().await;
    let post = post(&scene.node, scene.pinned, &scene.threads[1], "changed again and again").await.post_id;
    for point in ["relocation.drained", "relocation.decided"] {
        for (source, target) in [(0, 3), (3, 1), (1, 0)] {
            let left = scene.move_it(Some(scene.pinned), source, target, Goal::Done).await;
            fail::cfg(point, "panic").expect("a place in the sources");
            let mover = Mover::new(scene.node.shards().clone(), Options::default());
            let dies = tokio::spawn(async move { mover.drive(left, &|_| {}).await.map(drop) });
            assert!(dies.await.is_err(), "the mover dies");
            fail::remove(point);

            let caller = scene.cluster.node().await;
            let body = format!("from {source} to {target}, {point}");
            let change = PostChange { body: Some(body.clone()), ..PostChange::default() };
            caller.change_post(post, change, &operator()).await.expect("the switch is ended");
            assert_eq!(caller.post(post).await.expect("it is there").body, Some(body));
            let lapse = "UPDATE therev.relocations SET leased_until = now()";
            scene.cluster.stranger("control").await.batch_execute(lapse).await.expect("the dead mover's lease ends");
            assert_eq!(Box::pin(scene.drive(left)).await.state, State::Done);
        }
    }
    scene.nothing_left().await;
    scene.prove(0, 0).await;
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// Invariant 22.
#[tokio::test]
async fn a_pin_goes_back_and_is_undone_like_any_relocation() {
    let scene = Scene::new().await;
    let (node, pinned) = (&scene.node, scene.pinned);
    let writing = [pinned, scene.neighbour].map(|user| Writing::begin(node.clone(), user, scene.threads[1].thread_id));
    let held = scene.move_it(Some(pinned), 0, 2, Goal::Switched).await;
    assert_eq!(Box::pin(scene.drive(held)).await.state, State::Switched);
    for one in &writing {
        one.goes_on(Duration::from_secs(10)).await;
    }
    scene.mover.want(held, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(scene.drive(held)).await.state, State::Reversed);
    assert_eq!(scene.pins().await, [0, 0, 0, 0]);
    scene.nothing_left().await;
    let undone = scene.move_it(Some(pinned), 0, 2, Goal::Aborted).await;
    assert_eq!(Box::pin(scene.drive(undone)).await.state, State::Aborted);
    assert_eq!(scene.pins().await, [0, 0, 0, 0]);
    // While it is away its bucket can be moved and come back.
    scene.moved(Some(pinned), 0, 2).await;
    let bucket = scene.move_it(None, 0, 1, Goal::Switched).await;
    assert_eq!(Box::pin(scene.drive(bucket)).await.state, State::Switched);
    for one in &writing {
        one.goes_on(Duration::from_secs(10)).await;
    }
    scene.mover.want(bucket, Goal::Reversed).await.expect("the way back is open");
    assert_eq!(Box::pin(scene.drive(bucket)).await.state, State::Reversed);
    scene.nothing_left().await;
    assert_eq!(scene.pins().await, [2, 0, 2, 0]);
    let shards: Vec<String> = (0..scene.cluster.shards()).map(|n| scene.cluster.url(&format!("shard_{n}"))).collect();
    for one in writing {
        assert!(one.prove(&shards).await > 10);
    }
    node.relay_once().await.expect("the relay runs");
    scene.prove(2, 0).await;
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// A worker that slept tells the control database of a place where the user is no more; the end of the relocation does so last.
/// Invariant 22.
#[tokio::test]
async fn what_a_sleeper_noted_of_a_user_who_went_home_is_forgotten() {
    let scene = Scene::new().await;
    scene.moved(Some(scene.pinned), 0, 3).await;
    let control = scene.cluster.stranger("control").await;
    let home = scene.move_it(Some(scene.pinned), 3, 0, Goal::Switched).await;
    assert_eq!(Box::pin(scene.drive(home)).await.state, State::Switched);
    let late = "INSERT INTO therev.pins (colocation_group, user_id, bucket, shard, epoch)
                SELECT g, $1, $2, 3, 1000 FROM unnest(ARRAY['account', 'content']) AS g";
    let noted = control.execute(late, &[&scene.pinned.0, &scene.pinned.bucket().sql()]).await.expect("a note");
    assert_eq!(noted, 2, "the user was at home by the word of the control database");
    scene.mover.want(home, Goal::Done).await.expect("it goes on");
    assert_eq!(Box::pin(scene.drive(home)).await.state, State::Done);
    scene.prove(0, 0).await;
    drop(control);
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// A worker that slept tells the home of a place of an earlier time that the user was apart.
/// Invariants 19 and 22.
#[tokio::test]
async fn what_a_sleeper_tells_of_an_earlier_time_apart_is_no_news() {
    let scene = Scene::new().await;
    scene.moved(Some(scene.pinned), 0, 3).await;
    scene.moved(Some(scene.pinned), 3, 1).await;
    let home = scene.cluster.stranger("shard_0").await;
    let epochs = "SELECT array_agg(p.epoch ORDER BY p.colocation_group) FROM therev.pins AS p WHERE p.user_id = $1";
    let told: Vec<i64> = home.query_one(epochs, &[&scene.pinned.0]).await.expect("what it was told").get(0);
    scene.moved(Some(scene.pinned), 1, 0).await;
    scene.moved(Some(scene.pinned), 0, 2).await;
    let late = "SELECT therev.learn_pin('{account,content}', $1, 1::smallint, $2)";
    let learned: i64 = home.query_one(late, &[&scene.pinned.0, &told]).await.expect("an answer").get(0);
    assert_eq!(learned, 0);
    scene.prove(2, 0).await;
    drop(home);
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

/// What is taken back of a part that was begun too late is what the part would have brought: the user who was placed apart on its
/// shard since is there for good.
/// Invariants 19 and 22.
#[tokio::test]
async fn what_a_sleeper_begins_takes_nothing_from_whom_was_placed_apart_since() {
    let scene = Scene::new().await;
    let late = scene.move_it(None, 0, 2, Goal::Aborted).await;
    assert_eq!(Box::pin(scene.drive(late)).await.state, State::Aborted);
    scene.moved(Some(scene.pinned), 0, 2).await;
    begun_by_a_sleeper(&scene.cluster, &scene.mover, late, scene.pinned.bucket()).await;
    scene.mover.find_lost().await.expect("the shards are asked");
    scene.nothing_left().await;
    scene.prove(2, 0).await;
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}

#[tokio::test]
async fn a_hot_user_is_isolated_and_goes_back_when_the_shard_is_drained() {
    let scene = Scene::new().await;
    let Scene { cluster, mover, pinned, neighbour, .. } = &scene;
    let third = std::iter::repeat_with(UserId::new).find(|id| id.bucket().number() % 4 == 0).expect("one of many");
    let new = NewUser { user_id: Some(third), user_name: "third".into(), ..NewUser::default() };
    scene.node.register(new, &operator()).await.expect("registered");
    // Three users of shard 0 together are too much for it; each of the others has room for one.
    let told = "INSERT INTO therev.nodes (node, window_s, operations, users, user_operations)
                VALUES (gen_random_uuid(), 1, 10000, ARRAY[$1::uuid, $2, $3], ARRAY[401, 400, 400])";
    let control = cluster.stranger("control").await;
    control.execute(told, &[&pinned.0, &neighbour.0, &third.0]).await.expect("a node tells its load");
    let isolated = mover.plan_isolation().await.expect("a plan");
    assert!(isolated.iter().any(|one| one.user == *pinned && one.from == ShardNo(0)), "{isolated:?}");
    let begun = mover.isolate(isolated.clone(), "test").await.expect("it begins");
    assert!(!begun.is_empty() && mover.isolate(isolated.clone(), "test").await.expect("nothing more").is_empty());
    for one in &begun {
        assert_eq!(Box::pin(scene.drive(one.relocation)).await.state, State::Done);
    }
    let there = begun[0].target;
    scene.prove(there.0, 0).await;
    let told = "UPDATE therev.nodes SET operations = 1, users = '{}', user_operations = '{}'";
    control.execute(told, &[]).await.expect("the load is gone");

    let emptied = Box::pin(mover.rebalance(Aim::Empty(there), "test", &|_| {}));
    let emptied = while_relaying(&scene.node, emptied).await.expect("it is emptied");
    assert!(emptied.iter().any(|one| one.pin == begun[0].pin));
    assert_eq!(scene.pins().await[usize::try_from(there.0).expect("a number")], 0);
    scene.nothing_left().await;
    scene.prove(0, 0).await;
    drop(control);
    let Scene { cluster, node, mover, .. } = scene;
    drop((node, mover));
    cluster.finish().await;
}
