//! Shards that come and go while people write and read: nobody notices, nothing is lost, and each holds its share.

use crate::things::{operator, post, thread, user, user_per_shard};
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use testkit::{PASSWORD, TestCluster, drive};
use therev::generate::Plan;
use therev::planner::{By, Reached, Why};
use therev::relocation::{Aim, Error, Goal, Mover, Options, Rebalance, Request, State};
use therev::{
    AddPlan, Admin, Group, Layout, NewPost, NewUser, PostId, RolePasswords, ShardNo, StoreError, Therev, ThreadId,
    UserId, add_shard, look_at_shard, remove_shard, set_weight,
};
use tokio::sync::RwLock;

const BY_SIZE: Aim = Aim::Balance { by: By::Size, moves_max: None };
/// No user has so much that a shard of eight could not be brought within 10 % of its share.
const PEOPLE: Plan = Plan { users: 1_500, threads: 200, posts: 6_000, seed: 17, zipf: 0.4 };

fn plan(address: &str) -> AddPlan {
    let word = || PASSWORD.to_owned();
    let passwords = RolePasswords { library: word(), admin: word(), mover: word() };
    AddPlan { address: address.to_owned(), weight: 1.0, passwords }
}

fn mover(node: &Therev) -> Mover {
    // Machines that run all tests at once make a switch wait for the processor.
    Mover::new(node.shards().clone(), Options { budget: Duration::from_secs(1), ..Options::default() })
}

/// People who write and read all the time, each call of which must succeed.
struct Traffic {
    node: Therev,
    authors: Vec<UserId>,
    threads: Vec<ThreadId>,
    /// Held by who looks at the cluster: nobody writes meanwhile.
    gate: RwLock<()>,
    /// What was acknowledged. A call that is dropped when the work beside it is done may have written or not.
    written: Mutex<BTreeSet<PostId>>,
    tried: Mutex<BTreeSet<PostId>>,
    read: AtomicU64,
}

impl Traffic {
    async fn new(cluster: &TestCluster) -> Traffic {
        let mut config = cluster.config();
        config.refresh_ms = 500;
        config.relay_ms = 100;
        let node = therev::connect(config).await.expect("a node");
        let (mut authors, mut threads) = (Vec::new(), Vec::new());
        for shard in 0..cluster.shards() {
            let shard = cluster.stranger(&format!("shard_{shard}")).await;
            let users = shard.query("SELECT user_id FROM users LIMIT 200", &[]).await.expect("users");
            authors.extend(users.iter().map(|row| UserId(row.get(0))));
            let found = shard.query("SELECT thread_id FROM threads LIMIT 20", &[]).await.expect("threads");
            threads.extend(found.iter().map(|row| ThreadId(row.get(0))));
        }
        Traffic {
            node,
            authors,
            threads,
            gate: RwLock::new(()),
            written: Mutex::default(),
            tried: Mutex::default(),
            read: AtomicU64::new(0),
        }
    }

    async fn write(&self) {
        let mut ticks = tokio::time::interval(Duration::from_millis(25));
        for n in 0.. {
            ticks.tick().await;
            let _open = self.gate.read().await;
            let (author, thread) = (self.authors[n * 7 % self.authors.len()], self.threads[n * 3 % self.threads.len()]);
            let id = PostId::new(author);
            self.tried.lock().expect("a list").insert(id);
            let new = NewPost { post_id: Some(id), ..NewPost::new(author, thread, "on the way") };
            let post = self.node.create_post(new).await;
            self.written.lock().expect("a list").insert(post.expect("a write succeeds").post_id);
        }
    }

    async fn read(&self) {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        for n in 0.. {
            ticks.tick().await;
            let author = self.authors[n * 11 % self.authors.len()];
            assert_eq!(self.node.user(author).await.expect("a read succeeds").user_id, author);
            let page = self.node.thread_page(self.threads[n % self.threads.len()], None, 20).await;
            assert!(!page.expect("a page comes").partial, "no shard is missing");
            self.read.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Does something while people write and read.
    async fn under<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            done = work => done,
            () = self.write() => unreachable!("writers have no end"),
            () = self.read() => unreachable!("readers have no end"),
        }
    }

    /// Everything that was acknowledged is there, once.
    async fn nothing_lost(&self, cluster: &TestCluster) {
        let mut found = Vec::new();
        let mine = "SELECT p.post_id FROM posts AS p
                      JOIN therev.fence AS f ON f.colocation_group = 'content' AND get_bit(f.readable, p.bucket) = 1
                     WHERE p.body = 'on the way'";
        for shard in self.node.shards().numbers() {
            let client = cluster.stranger(&format!("shard_{shard}")).await;
            let posts = client.query(mine, &[]).await.expect("posts");
            found.extend(posts.iter().map(|row| PostId(row.get(0))));
        }
        let (written, tried) = (self.written.lock().expect("a list"), self.tried.lock().expect("a list"));
        let once: BTreeSet<PostId> = found.iter().copied().collect();
        assert_eq!(found.len(), once.len(), "nothing is in two places");
        assert_eq!(written.difference(&once).collect::<Vec<_>>(), Vec::<&PostId>::new(), "nothing is lost");
        assert_eq!(once.difference(&tried).collect::<Vec<_>>(), Vec::<&PostId>::new(), "nothing comes from nowhere");
    }
}

fn is_balanced(plan: &Rebalance) -> bool {
    plan.shares(false).iter().all(|share| share.within)
}

/// Balances under load, then looks at everything while nobody writes.
async fn balance(cluster: &TestCluster, traffic: &Traffic, mover: &Mover, aim: Aim) {
    let ended = traffic.under(Box::pin(mover.rebalance(aim, "test", &|_| {}))).await.expect("it is balanced");
    assert!(!ended.is_empty() && ended.iter().all(|one| one.state == State::Done), "{ended:?}");
    cluster.prove().await;
    let now = mover.plan_rebalance(BY_SIZE).await.expect("a plan");
    assert!(is_balanced(&now), "not within 10 %: {:#?}", now.shares(false));
    traffic.nothing_lost(cluster).await;
}

async fn grow(cluster: &TestCluster, traffic: &Traffic, mover: &Mover, shards: std::ops::Range<i16>) {
    for shard in shards {
        let address = cluster.empty_database(&format!("shard_{shard}")).await;
        let added =
            traffic.under(Box::pin(add_shard(traffic.node.shards(), &plan(&address)))).await.expect("a shard more");
        assert_eq!(added.shard, ShardNo(shard));
    }
    balance(cluster, traffic, mover, BY_SIZE).await;
}

async fn shrink(cluster: &TestCluster, traffic: &Traffic, mover: &Mover, shards: std::ops::Range<i16>) {
    for shard in shards.clone() {
        set_weight(traffic.node.shards(), ShardNo(shard), 0.0).await.expect("a weight");
    }
    balance(cluster, traffic, mover, Aim::Empty(ShardNo(shards.end - 1))).await;
    for shard in shards.rev().map(ShardNo) {
        traffic.under(Box::pin(remove_shard(traffic.node.shards(), shard))).await.expect("an empty shard goes");
    }
    cluster.prove().await;
}

async fn community(cluster: &TestCluster) -> (Traffic, Mover) {
    let node = cluster.node().await;
    therev::generate::generate(&node, PEOPLE, &mut |_| {}).await.expect("a community");
    let traffic = Traffic::new(cluster).await;
    let mover = mover(&traffic.node);
    (traffic, mover)
}

/// Invariant 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_to_five_to_four_under_load() {
    let cluster = TestCluster::usual().await;
    let (traffic, mover) = community(&cluster).await;
    grow(&cluster, &traffic, &mover, 4..5).await;
    shrink(&cluster, &traffic, &mover, 4..5).await;
    let (written, read) = (traffic.written.lock().expect("a list").len(), traffic.read.load(Ordering::Relaxed));
    assert!(written > 50 && read > 50, "{written} posts, {read} reads");
    drop((mover, traffic));
    cluster.finish().await;
}

/// The whole way; in the full tier.
/// Invariant 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: scripts/test --full runs it"]
async fn four_to_five_to_eight_to_four_under_load() {
    let cluster = TestCluster::usual().await;
    let (traffic, mover) = community(&cluster).await;
    grow(&cluster, &traffic, &mover, 4..5).await;
    grow(&cluster, &traffic, &mover, 5..8).await;
    shrink(&cluster, &traffic, &mover, 4..8).await;
    drop((mover, traffic));
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_split_layout_accounts_stay_unless_their_shard_is_drained() {
    let cluster = TestCluster::new(Layout::Split, 3).await;
    let node = cluster.node().await;
    let people = Plan { users: 300, threads: 40, posts: 1_000, ..PEOPLE };
    therev::generate::generate(&node, people, &mut |_| {}).await.expect("a community");
    let mover = mover(&node);
    let address = cluster.empty_database("shard_3").await;
    add_shard(node.shards(), &plan(&address)).await.expect("a shard more");
    let balanced = mover.plan_rebalance(BY_SIZE).await.expect("a plan");
    assert!(balanced.requests().iter().all(|it| it.groups == [Group::Content] && it.target == ShardNo(3)));
    assert!(!balanced.requests().is_empty());

    // It is still empty: the Users Database may move there, and nowhere else.
    let drained = mover.plan_rebalance(Aim::Empty(ShardNo(0))).await.expect("a plan").requests();
    assert_eq!(drained.len(), 1, "{drained:?}");
    assert_eq!((drained[0].groups.clone(), drained[0].target), (vec![Group::Account], ShardNo(3)));
    set_weight(node.shards(), ShardNo(3), 0.0).await.expect("a weight");
    let refused = mover.plan_rebalance(Aim::Empty(ShardNo(0))).await.expect_err("content shards take no accounts");
    assert!(refused.to_string().contains("no other shard can take the accounts"), "{refused}");
    set_weight(node.shards(), ShardNo(3), 1.0).await.expect("a weight");

    // Of a user who is placed apart the account stays, too; and nobody who is apart is in the way of the rest.
    let ada = user(&node, "ada").await.user_id;
    let home = node.shards().map().place(Group::Content, ada.bucket()).shard;
    let away = mover.pin_requests(ada, ShardNo(3 - home.0)).await.expect("a way");
    assert!(away.len() == 1 && away[0].groups == [Group::Content], "{away:?}");
    let begun = mover.begin(&mover.plan(&away[0]).await.expect("a plan"), Goal::Done, "test").await.expect("it begins");
    assert_eq!(Box::pin(drive(&node, &mover, begun.relocation)).await.state, State::Done);
    mover.pin_requests(ada, ShardNo(0)).await.expect_err("no content goes where accounts are");

    Box::pin(mover.rebalance(BY_SIZE, "test", &|_| {})).await.expect("it is balanced");
    cluster.prove().await;
    drop((mover, node));
    cluster.finish().await;
}

/// A bucket weighs what its rows take in every table; who is placed apart weighs where it is, also where its bucket is by now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_weighs_where_it_lies() {
    let cluster = TestCluster::new(Layout::Colocated, 2).await;
    let node = cluster.node().await;
    let mover = mover(&node);
    // What each shard holds, and why shard 1 is out of balance.
    let weighed = async || {
        let plan = mover.plan_rebalance(BY_SIZE).await.expect("a plan");
        let part = &plan.parts[0].plan;
        let bytes: Vec<u64> = part.before.iter().map(|share| share.bytes).collect();
        let why = match &part.reached {
            Reached::AsNearAsPossible(out) => out.iter().find(|one| one.shard == ShardNo(1)).map(|one| one.why),
            _ => None,
        };
        (bytes, why)
    };
    let bucket_on_0 = |id: &UserId| id.bucket().number().is_multiple_of(2);
    let author = std::iter::repeat_with(UserId::new).find(bucket_on_0).expect("one of many");
    let new = NewUser { user_id: Some(author), user_name: "ada".into(), ..NewUser::default() };
    node.register(new, &operator()).await.expect("registered");
    let open = thread(&node, author, "A thread").await;
    for _ in 0..20 {
        let body = "what takes its place ".repeat(80);
        join_all((0..20).map(|_| post(&node, author, &open, &body))).await;
    }
    // A name's claim lies by the name.
    let is_all_of_it = |some: u64, other: u64| some > 500_000 && some > 4 * other;
    let (before, _) = weighed().await;
    assert!(is_all_of_it(before[0], before[1]), "{before:?}");

    // The author is placed apart, and the bucket comes to the same shard.
    for request in mover.pin_requests(author, ShardNo(1)).await.expect("a way") {
        let begun = begin(&mover, &mover.plan(&request).await.expect("a plan")).await;
        mover.want(begun, Goal::Done).await.expect("it is to end");
        assert_eq!(Box::pin(drive(&node, &mover, begun)).await.state, State::Done);
    }
    let bucket = Request {
        groups: Group::ALL.to_vec(),
        buckets: vec![author.bucket()],
        pin: None,
        source: ShardNo(0),
        target: ShardNo(1),
    };
    let begun = begin(&mover, &mover.plan(&bucket).await.expect("a plan")).await;
    mover.want(begun, Goal::Done).await.expect("it is to end");
    assert_eq!(Box::pin(drive(&node, &mover, begun)).await.state, State::Done);
    let (after, why) = weighed().await;
    assert!(is_all_of_it(after[1], after[0]) && why == Some(Why::Pins), "{after:?} {why:?}");
    assert!(mover.release(author).await.expect("it is with the bucket"), "it was not");
    assert!(!mover.release(author).await.expect("once"), "nothing is left to do");
    let (after, why) = weighed().await;
    assert!(is_all_of_it(after[1], after[0]) && why == Some(Why::Bucket(author.bucket())), "{after:?} {why:?}");
    cluster.prove().await;
    drop((mover, node));
    cluster.finish().await;
}

/// What it says when it refuses.
fn said<T: std::fmt::Debug, E: std::fmt::Display>(refused: Result<T, E>) -> String {
    refused.expect_err("it is refused").to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_added_is_refused_with_the_reason() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let add = async |address: &str| add_shard(node.shards(), &plan(address)).await;

    let address = cluster.empty_database("shard_4").await;
    let spare = testkit::connect(&address).await;
    spare.batch_execute("CREATE TABLE mine ()").await.expect("a table");
    assert!(said(add(&address).await).contains("it holds tables that are not therev's"));
    spare.batch_execute("DROP TABLE mine").await.expect("no table");
    assert!(said(add(&cluster.url("shard_2")).await).contains("is shard 2 of this cluster already"));
    assert!(said(add(&cluster.url("directory")).await).contains("it is the directory database already"));
    // Copied from the same template: another cluster only by its place, to begin with.
    let other = TestCluster::usual().await;
    assert!(said(add(&other.url("shard_0")).await).contains("it was made shard 0 of this cluster once"));
    let shard = other.stranger("shard_0").await;
    let own = shard.query_one("SELECT cluster_id FROM therev.identity", &[]).await.expect("an identity");
    let become_another = "UPDATE therev.identity SET cluster_id = $1";
    shard.execute(become_another, &[&uuid::Uuid::new_v4()]).await.expect("another cluster");
    assert!(said(add(&other.url("shard_0")).await).contains("it is the shard 0 database of another cluster"));
    shard.execute(become_another, &[&own.get::<_, uuid::Uuid>(0)]).await.expect("itself again");
    drop(shard);
    other.finish().await;
    assert!(said(add("shard_4").await).contains("an address looks like"));
    for wrong in [0.0, -1.0, f32::NAN, 1_001.0] {
        let refused = add_shard(node.shards(), &AddPlan { weight: wrong, ..plan(&address) }).await;
        assert!(said(refused).contains("is no weight"));
    }
    let passwords = RolePasswords { library: "x".into(), admin: "x".into(), mover: "x".into() };
    let refused = add_shard(node.shards(), &AddPlan { passwords, ..plan(&address) }).await;
    assert!(said(refused).contains("another password"));

    // Two at once: the second one is told so.
    let control = cluster.stranger("control").await;
    control.batch_execute("SELECT pg_advisory_lock(hashtext('therev.shards'))").await.expect("a lock");
    assert!(said(add(&address).await).contains("another process adds or removes a shard now"));
    control.batch_execute("SELECT pg_advisory_unlock_all()").await.expect("no lock");

    assert_eq!(look_at_shard(node.shards(), &plan(&address)).await.expect("it could be").shard, ShardNo(4));
    assert_eq!(node.shards().numbers().len(), 4, "nothing of all this was done");
    drop((node, spare, control));
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_go_or_move_is_refused_with_the_reason() {
    let cluster = TestCluster::new(Layout::Colocated, 4).await;
    let node = cluster.node().await;
    let mover = mover(&node);
    assert!(said(remove_shard(node.shards(), ShardNo(9)).await).contains("there is no shard 9"));
    assert!(said(remove_shard(node.shards(), ShardNo(3)).await).contains("shard 3 owns 1024 buckets"));
    assert!(said(set_weight(node.shards(), ShardNo(9), 1.0).await).contains("there is no shard 9"));
    assert!(said(mover.plan_rebalance(Aim::Empty(ShardNo(9))).await).contains("there is no shard 9"));
    let load = Aim::Balance { by: By::Load, moves_max: None };
    assert!(said(mover.plan_rebalance(load).await).contains("nothing was written in the last day"));
    let authors = user_per_shard(&node).await;
    join_all(authors.iter().map(|author| thread(&node, *author, "A thread"))).await;
    assert!(mover.plan_rebalance(load).await.is_ok());

    for shard in 1..4 {
        set_weight(node.shards(), ShardNo(shard), 0.0).await.expect("a weight");
    }
    assert!(said(set_weight(node.shards(), ShardNo(0), 0.0).await).contains("the only one with a weight"));
    assert!(said(mover.plan_rebalance(Aim::Empty(ShardNo(0))).await).contains("nowhere to put its rows"));
    let there = Request {
        groups: Group::ALL.to_vec(),
        buckets: vec![authors[0].bucket()],
        pin: None,
        source: ShardNo(0),
        target: ShardNo(1),
    };
    assert!(said(mover.plan(&there).await).contains("shard 1 is being drained"));
    set_weight(node.shards(), ShardNo(1), 1.0).await.expect("a weight");

    // A relocation and a schema change keep out of each other's way.
    let admin = Admin::new(node.shards().config(), node.shards().catalog()).expect("an admin");
    let changing = admin.begin_schema_change().await.expect("nothing is under way");
    let begun = mover.plan(&there).await.expect("a plan");
    assert!(said(mover.begin(&begun, Goal::Switched, "test").await).contains("the schema is being changed"));
    drop(changing);
    let begun = begin(&mover, &begun).await;
    assert!(said(admin.begin_schema_change().await.map(drop)).contains(&format!("relocation {begun} is under way")));

    // What was paused by somebody is not carried on behind their back.
    mover.pause(begun, true).await.expect("it rests");
    assert!(said(Box::pin(mover.rebalance(BY_SIZE, "test", &|_| {})).await).contains("is paused"));
    mover.want(begun, Goal::Aborted).await.expect("it is not wanted any more");
    assert_eq!(Box::pin(mover.drive(begun, &|_| {})).await.expect("undone").state, State::Aborted);
    drop((mover, node));
    cluster.finish().await;
}

/// Begins a relocation as soon as the schema's lock is given back, which is when its connection has ended.
async fn begin(mover: &Mover, plan: &therev::relocation::Plan) -> i64 {
    let begun = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            match mover.begin(plan, Goal::Switched, "test").await {
                Ok(begun) => return begun.relocation,
                Err(Error::Refused { .. } | Error::Store(StoreError::Down { .. })) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), begun).await.expect("the lock is given back")
}
