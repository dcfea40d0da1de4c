//! Every operation, begun while each other one is under way: it works, perhaps after a wait, or is refused with the reason, and
//! works once the other one is over.

use crate::things::{post, thread, user_per_shard};
use futures_util::future::join;
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use testkit::{PASSWORD, TestCluster, nothing_left};
use therev::relocation::{Aim, Goal, Mover, Options, Plan, Request};
use therev::{AddPlan, Admin, Config, Database, Group, RolePasswords, ShardNo, Therev, UserId, add_shard, set_weight};
use tokio::sync::Notify;

/// No operation waits longer for another one.
const LIMIT: Duration = Duration::from_secs(120);
/// How soon what a server's end has cut off is tried again.
const TRY_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    /// The schema of all shards changes.
    Schema,
    /// A bucket moves.
    Move,
    /// A user is placed apart.
    Pin,
    /// A shard is emptied.
    Drain,
    /// A shard is added.
    Add,
    /// A shard's server is promoted.
    Promote,
    /// Rows are written in bulk, as an import does.
    Load,
}

use Operation::{Add, Drain, Load, Move, Pin, Promote, Schema};

const ALL: [Operation; 7] = [Schema, Move, Pin, Drain, Add, Promote, Load];

/// Why the second of two may be refused, or, where a promotion meets it, end: each of these is a reason that people can act on.
fn may_be_refused(first: Operation, second: Operation) -> &'static [&'static str] {
    match (first, second) {
        (Schema, Move | Pin | Drain) => &["the schema is being changed"],
        (Move | Pin | Drain, Schema) => &["is under way, and schemas do not change meanwhile"],
        // What a drain has on its way itself is not moved elsewhere meanwhile.
        (Drain, Pin | Move | Drain) => &["in another relocation"],
        (Add, Add) => &["another process adds or removes a shard now"],
        _ => &[],
    }
}

struct Scene {
    cluster: TestCluster,
    node: Therev,
    mover: Mover,
    users: [UserId; 4],
    /// How many posts the first and the second bulk write say that there are of theirs.
    loaded: [AtomicU64; 2],
}

/// An error with its causes.
fn said(error: impl Error) -> String {
    let (mut said, mut cause) = (error.to_string(), error.source());
    while let Some(reason) = cause {
        said = format!("{said}: {reason}");
        cause = reason.source();
    }
    said
}

impl Scene {
    async fn new() -> Scene {
        let cluster = TestCluster::colocated().await;
        // A name whose user is not there yet stays taken for a while: rows that come in bulk come after their names.
        let node = therev::connect(Config { claim_timeout_s: 60, ..cluster.config() }).await.expect("a node");
        let users = user_per_shard(&node).await;
        for user in users {
            let open = thread(&node, user, "A thread").await;
            post(&node, users[0], &open, "a post").await;
        }
        let mover = Mover::new(node.shards().clone(), Options::default());
        Scene { cluster, node, mover, users, loaded: [0, 0].map(AtomicU64::new) }
    }

    /// Does an operation, the first or the second of two (0, 1), and tells when it is under way.
    async fn run(&self, operation: Operation, number: u8, is_under_way: &Notify) -> Result<(), String> {
        let n = usize::from(number);
        match operation {
            Schema => self.change_schema(number, is_under_way).await,
            Move => {
                let (source, target) = (ShardNo(i16::from(number)), ShardNo(i16::from(1 - number)));
                let buckets = vec![self.users[n].bucket()];
                self.relocate(
                    &Request { groups: Group::ALL.to_vec(), buckets, pin: None, source, target },
                    is_under_way,
                )
                .await
            }
            Pin => {
                let target = ShardNo(i16::from(number));
                let requests = self.mover.pin_requests(self.users[2 + n], target).await.map_err(said)?;
                for request in &requests {
                    self.relocate(request, is_under_way).await?;
                }
                Ok(())
            }
            Drain => {
                set_weight(self.node.shards(), ShardNo(3), 0.0).await.map_err(said)?;
                let seen = |_: &therev::relocation::Step<'_>| is_under_way.notify_one();
                Box::pin(self.mover.rebalance(Aim::Empty(ShardNo(3)), "test", &seen)).await.map_err(said)?;
                is_under_way.notify_one();
                Ok(())
            }
            Add => {
                is_under_way.notify_one();
                let word = || PASSWORD.to_owned();
                let passwords = RolePasswords { library: word(), admin: word(), mover: word() };
                let next = self.node.shards().numbers().len();
                let address = self.cluster.url(&format!("shard_{next}"));
                let plan = AddPlan { address, weight: 1.0, passwords };
                add_shard(self.node.shards(), &plan).await.map(drop).map_err(said)
            }
            Promote => self.promote(2 + number, is_under_way).await,
            Load => {
                let seed = u64::from(number);
                let plan = therev::generate::Plan { users: 150, threads: 30, posts: 600, seed, zipf: 0.4 };
                let mut seen = |_: therev::generate::Generated| is_under_way.notify_one();
                let report = therev::generate::generate(&self.node, plan, &mut seen).await.map_err(said)?;
                // What a first try has left is found by the second.
                let posts =
                    [&report.written, &report.existing].iter().filter_map(|rows| rows.get("posts")).sum::<u64>();
                self.loaded[n].store(posts, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    async fn change_schema(&self, number: u8, is_under_way: &Notify) -> Result<(), String> {
        let admin = Admin::new(self.node.shards().config(), self.node.shards().catalog()).map_err(said)?;
        let right = admin.begin_schema_change().await.map_err(said)?;
        is_under_way.notify_one();
        for shard in self.node.shards().numbers() {
            let shard = admin.connect(Database::Shard(shard)).await.map_err(said)?;
            let change = format!("ALTER TABLE posts ADD COLUMN IF NOT EXISTS note_{number} text");
            shard.batch_execute(&change).await.map_err(said)?;
        }
        drop(right);
        Ok(())
    }

    /// Moves rows, and goes on with it when a server has ended meanwhile, as every worker does.
    async fn relocate(&self, request: &Request, is_under_way: &Notify) -> Result<(), String> {
        let plan: Plan = self.mover.plan(request).await.map_err(said)?;
        let begun = self.mover.begin(&plan, Goal::Done, "test").await.map_err(said)?.relocation;
        is_under_way.notify_one();
        let mut ticks = tokio::time::interval(TRY_EVERY);
        loop {
            ticks.tick().await;
            match Box::pin(self.mover.see_through(begun, &|_| {})).await {
                Ok(there) if there.state.is_over() => return Ok(()),
                Ok(there) => return Err(format!("it rests: {there:?}")),
                Err(error) => eprintln!("relocation {begun} is tried again: {}", said(error)),
            }
        }
    }

    /// As a promotion shows: the server is on another timeline, and the connections to it have ended.
    async fn promote(&self, shard: u8, is_under_way: &Notify) -> Result<(), String> {
        let database = self.cluster.stranger(&format!("shard_{shard}")).await;
        database.batch_execute("UPDATE therev.identity SET timeline = 0").await.map_err(said)?;
        let end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()";
        database.query(end, &[]).await.map_err(said)?;
        is_under_way.notify_one();
        let known = "SELECT timeline = therev.current_timeline() FROM therev.identity";
        let mut ticks = tokio::time::interval(TRY_EVERY);
        while !database.query_one(known, &[]).await.map_err(said)?.get::<_, bool>(0) {
            ticks.tick().await;
            self.node.user(self.users[usize::from(shard)]).await.ok();
        }
        Ok(())
    }

    /// Does something beside a relay, to which a server that has just ended is nothing new.
    async fn beside_a_relay<T>(&self, work: impl Future<Output = T>) -> T {
        let relay = async {
            let mut ticks = tokio::time::interval(TRY_EVERY);
            loop {
                ticks.tick().await;
                self.node.relay_once().await.ok();
            }
        };
        tokio::select! {
            done = tokio::time::timeout(LIMIT, work) => done.expect("nobody waits for ever"),
            () = relay => unreachable!("the relay has no end"),
        }
    }

    /// Begins the second while the first one is under way.
    async fn both(&self, first: Operation, second: Operation) {
        for shard in ["shard_4", "shard_5"] {
            self.cluster.empty_database(shard).await;
        }
        let is_under_way = Notify::new();
        let begins = async {
            is_under_way.notified().await;
            self.run(second, 1, &Notify::new()).await
        };
        let outcomes = self.beside_a_relay(Box::pin(join(self.run(first, 0, &is_under_way), begins))).await;
        let pair = format!("{second:?} while {first:?}");
        eprintln!("{pair}: {outcomes:?}");
        for (operation, number, outcome) in [(first, 0, outcomes.0), (second, 1, outcomes.1)] {
            let Err(reason) = outcome else { continue };
            let mut reasons = may_be_refused(first, second).iter().chain(may_be_refused(second, first));
            assert!(reasons.any(|one| reason.contains(one)), "{pair}: {operation:?}: {reason}");
            let again = self.beside_a_relay(Box::pin(self.run(operation, number, &Notify::new()))).await;
            assert_eq!(again, Ok(()), "{pair}: {operation:?} once more");
        }
        let shards: Vec<String> =
            self.node.shards().numbers().iter().map(|n| self.cluster.url(&format!("shard_{n}"))).collect();
        nothing_left(&shards).await;
        self.every_post_is_there(&pair).await;
    }

    /// As many posts as were written, neither more nor fewer, and each where its author is.
    async fn every_post_is_there(&self, pair: &str) {
        let loaded: u64 = self.loaded.iter().map(|posts| posts.load(Ordering::Relaxed)).sum();
        let (mut there, mut owned) = (0, 0);
        for shard in self.node.shards().numbers() {
            let client = self.cluster.stranger(&format!("shard_{shard}")).await;
            let count = "SELECT count(*), count(*) FILTER (WHERE therev.may_write(f, p.bucket, p.author_id))
                           FROM posts AS p, therev.fence AS f WHERE f.colocation_group = 'content'";
            let row = client.query_one(count, &[]).await.expect("posts are counted");
            there += row.get::<_, i64>(0).unsigned_abs();
            owned += row.get::<_, i64>(1).unsigned_abs();
        }
        let written = u64::try_from(self.users.len()).unwrap_or(0) + loaded;
        assert_eq!((there, owned), (written, written), "{pair}: {:?}", self.loaded);
    }
}

async fn while_under_way(first: Operation) {
    for second in ALL {
        let scene = Scene::new().await;
        Box::pin(scene.both(first, second)).await;
        let Scene { cluster, node, mover, .. } = scene;
        drop((node, mover));
        cluster.finish().await;
    }
}

macro_rules! matrix {
    ($($name:ident: $first:expr)*) => { $(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = "takes a minute: scripts/test --full runs it"]
        async fn $name() {
            while_under_way($first).await;
        }
    )* };
}

matrix! {
    while_a_schema_changes: Schema
    while_a_bucket_moves: Move
    while_a_user_is_placed_apart: Pin
    while_a_shard_is_drained: Drain
    while_a_shard_is_added: Add
    while_a_shard_is_promoted: Promote
    while_rows_are_written_in_bulk: Load
}
