//! What tests of relocations share: an author who goes on writing and knows what was acknowledged, and the proof that
//! nothing of a relocation is left.

use crate::cluster::connect;
use std::sync::Arc;
use std::time::{Duration, Instant};
use therev::relocation::{Mover, Relocation};
use therev::{Actor, Error, NewPost, PostId, Therev, ThreadId, UserChange, UserId};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;

/// How often an author writes when nobody waits for it: often enough that some write is nearly always on its way, seldom enough
/// that what is tested has the machine.
const WRITE_EVERY: Duration = Duration::from_millis(100);
/// How often a relay delivers beside what is waited for.
const RELAY_EVERY: Duration = Duration::from_millis(50);
/// How soon a write that failed is tried again.
const TRY_EVERY: Duration = Duration::from_millis(25);

/// What a relocation could leave on a shard, and rows of buckets that it does not own.
const LEFT: &str = "
    SELECT (SELECT count(*) FROM therev.relocation_parts) AS parts,
           (SELECT count(*) FROM therev.sentinels) AS sentinels,
           (SELECT count(*) FROM pg_publication) AS publications,
           (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()) AS slots,
           (SELECT count(*) FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid
             WHERE d.datname = current_database()) AS subscriptions,
           (SELECT count(*) FROM therev.ownership WHERE state NOT IN ('owned', 'moved')) AS buckets_between,
           (SELECT count(*) FROM therev.pins WHERE state NOT IN ('owned', 'moved')) AS users_between";

/// Waits for something while a relay delivers what former owners have to tell.
pub async fn while_relaying<T>(node: &Therev, work: impl Future<Output = T>) -> T {
    let relaying = async {
        let mut ticks = tokio::time::interval(RELAY_EVERY);
        loop {
            ticks.tick().await;
            node.relay_once().await.expect("the relay runs");
        }
    };
    tokio::select! {
        done = work => done,
        () = relaying => unreachable!("the relay has no end"),
    }
}

/// Carries a relocation on as far as it goes, beside a relay.
pub async fn drive(node: &Therev, mover: &Mover, number: i64) -> Relocation {
    let driven = Box::pin(while_relaying(node, Box::pin(mover.drive(number, &|_| {})))).await;
    driven.expect("the relocation goes on")
}

/// Nothing of any relocation is left on these shards, given by a superuser's addresses.
pub async fn nothing_left(shards: &[String]) {
    for address in shards {
        let client = connect(address).await;
        let left = client.query_one(LEFT, &[]).await.expect("the catalogs answer");
        for (n, column) in left.columns().iter().enumerate() {
            assert_eq!(left.get::<_, i64>(n), 0, "{address}: {} are left of a relocation", column.name());
        }
        let tables = "SELECT table_name, colocation_group::text, owner_column FROM therev.owned_tables";
        for table in client.query(tables, &[]).await.expect("the tables") {
            let (table, group, owner): (&str, &str, &str) = (table.get(0), table.get(1), table.get(2));
            let strays = format!(
                "SELECT count(*) FROM {table} AS t
                   JOIN therev.fence AS f ON f.colocation_group = '{group}'
                  WHERE NOT therev.may_write(f, t.bucket, t.{owner})"
            );
            let strays: i64 = client.query_one(&strays, &[]).await.expect("the rows are counted").get(0);
            assert_eq!(strays, 0, "{address}: rows of {table} are left whose owner is not there");
        }
    }
}

/// An author who goes on writing: posts to a thread, each with an id of its own, and now and then a biography. Each write
/// is tried until it is acknowledged, then the next one begins.
pub struct Writing {
    author: UserId,
    acknowledged: watch::Receiver<usize>,
    hurry: Arc<Notify>,
    end: watch::Sender<bool>,
    task: JoinHandle<(Vec<PostId>, usize)>,
}

impl Writing {
    /// Begins to write in the background.
    pub fn begin(node: Therev, author: UserId, thread: ThreadId) -> Writing {
        let (count, acknowledged) = watch::channel(0);
        let (end, ended) = watch::channel(false);
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        let task = tokio::spawn(async move {
            let (mut posts, actor) = (Vec::new(), Actor::User(author));
            let mut ticks = tokio::time::interval(WRITE_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while !*ended.borrow() {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = hurried.notified() => {}
                }
                let post_id = PostId::new(author);
                let new = || NewPost { post_id: Some(post_id), ..NewPost::new(author, thread, "on and on") };
                until_acknowledged(|| node.create_post(new())).await;
                posts.push(post_id);
                let bio = || UserChange { bio: Some(Some(posts.len().to_string())), ..UserChange::default() };
                until_acknowledged(|| node.change_user(author, bio(), &actor)).await;
                count.send_replace(posts.len());
            }
            let written = posts.len();
            (posts, written)
        });
        Writing { author, acknowledged, hurry, end, task }
    }

    /// Waits until something was written that had not begun before this call, and has it written at once; says how long that
    /// took.
    pub async fn goes_on(&self, limit: Duration) -> Duration {
        let (mut acknowledged, began) = (self.acknowledged.clone(), Instant::now());
        let next = *acknowledged.borrow() + 2;
        let write = async {
            while *acknowledged.borrow_and_update() < next {
                self.hurry.notify_one();
                acknowledged.changed().await.expect("the author goes on to the end");
            }
        };
        let waited = tokio::time::timeout(limit, write).await;
        assert!(waited.is_ok(), "{} wrote nothing for {limit:?}", self.author);
        began.elapsed()
    }

    /// Ends it, and looks at the rows themselves: what was acknowledged is there once, and nothing else is.
    pub async fn prove(self, shards: &[String]) -> usize {
        self.end.send_replace(true);
        let (mut expected, bio) = self.task.await.expect("the author wrote to the end");
        let (mut posts, mut bios) = (Vec::new(), Vec::new());
        for address in shards {
            let client = connect(address).await;
            let found = "SELECT post_id FROM posts WHERE author_id = $1 AND body = 'on and on'";
            posts.extend(ids(&client, found, self.author).await);
            let found = client.query("SELECT bio FROM users WHERE user_id = $1", &[&self.author.0]).await;
            bios.extend(found.expect("users").iter().map(|row| row.get::<_, Option<String>>(0)));
        }
        expected.sort_unstable();
        posts.sort_unstable();
        assert!(posts == expected, "{} has {} posts, {} were acknowledged", self.author, posts.len(), expected.len());
        assert_eq!(bios, [Some(bio.to_string())], "the biography of {}", self.author);
        expected.len()
    }
}

async fn ids(client: &Client, sql: &str, author: UserId) -> Vec<PostId> {
    let rows = client.query(sql, &[&author.0]).await.expect("posts");
    rows.iter().map(|row| PostId(row.get(0))).collect()
}

/// A write that failed may have happened: the same again.
async fn until_acknowledged<T, W: Future<Output = Result<T, Error>>>(write: impl Fn() -> W) {
    let mut ticks = tokio::time::interval(TRY_EVERY);
    loop {
        match write().await {
            Ok(_) => return,
            Err(Error::Store(_)) => drop(ticks.tick().await),
            Err(other) => panic!("{other:?}"),
        }
    }
}
