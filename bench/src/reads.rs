//! Reads: one row by key, a page of an author, a page of a thread.

use crate::figure::{Figure, Pairs, count, latencies, median, throughput};
use crate::ground::{Ground, WORKERS, bare_statement};
use crate::{Anyhow, PERIOD};
use chrono::{DateTime, Utc};
use futures_util::future::try_join_all;
use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;
use therev::{Bucket, BucketSet, Database, ShardNo, Therev, ThreadId, UserId};
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;

/// In so many parts the sides of a run take turns: a machine that slows down for a second slows all of them down.
const SLICES: u32 = 8;

/// Connections with a statement prepared on each, one for each worker, or one for several.
struct Bare {
    clients: Vec<(Client, Statement)>,
}

impl Bare {
    async fn new(ground: &Ground<'_>, sql: &str, connections: usize) -> Anyhow<Arc<Bare>> {
        let mut clients = Vec::new();
        for _ in 0..connections {
            let client = ground.databases.bare(0).await?;
            let statement = client.prepare(sql).await?;
            clients.push((client, statement));
        }
        Ok(Arc::new(Bare { clients }))
    }

    /// Runs the statement and reads what it says, as whoever asks must; says how many rows there are.
    async fn query(&self, worker: usize, params: &[&(dyn ToSql + Sync)]) -> Anyhow<usize> {
        let (client, statement) = &self.clients[worker % self.clients.len()];
        let rows = client.query(statement, params).await?;
        for row in &rows {
            (0..row.len()).for_each(|at| read(row, at));
        }
        Ok(rows.len())
    }
}

/// Reads a value as whoever asked for it must.
fn read(row: &Row, at: usize) {
    match *row.columns()[at].type_() {
        Type::UUID => drop(black_box(row.get::<_, Option<Uuid>>(at))),
        Type::TIMESTAMPTZ => drop(black_box(row.get::<_, Option<DateTime<Utc>>>(at))),
        Type::JSONB => drop(black_box(row.get::<_, Option<serde_json::Value>>(at))),
        Type::INT8 => drop(black_box(row.get::<_, Option<i64>>(at))),
        Type::INT4 => drop(black_box(row.get::<_, Option<i32>>(at))),
        Type::BOOL => drop(black_box(row.get::<_, Option<bool>>(at))),
        ref text if <String as FromSql>::accepts(text) => drop(black_box(row.get::<_, Option<String>>(at))),
        // What a shard says of the fence, which is nothing where it refuses nothing.
        _ => {}
    }
}

/// Which of some users a worker asks for: all of them in turn, each worker from another place.
fn turn(users: &[UserId], worker: usize, number: u64) -> UserId {
    users[(worker * 7_919 + usize::try_from(number).unwrap_or(0) * 31) % users.len()]
}

/// The same work in a later slice, which asks for others than those before it.
fn after<F>(slice: u32, work: impl Fn(usize, u64) -> F + Clone) -> impl Fn(usize, u64) -> F + Clone {
    const APART: u64 = 10_007;
    move |worker, number| work(worker, number + APART * u64::from(slice))
}

/// A call beside its statement on bare connections.
#[derive(Default)]
struct Beside {
    /// The library, beside a connection for each worker.
    library: Pairs,
    /// The library, beside two workers on each connection, as it has them itself.
    shared: Pairs,
    /// The statement with its fence, beside the one without.
    fence: Pairs,
}

/// A call of the library beside its statement on bare connections, without its fence and with it. `params` and `least`:
/// what the statement takes after bucket and owner, and how many rows it must answer with.
async fn beside_bare<F>(
    ground: &Ground<'_>,
    statement: &str,
    owners: &Arc<Vec<UserId>>,
    params: &'static [&'static (dyn ToSql + Sync)],
    least: usize,
    call: impl Fn(Therev, UserId) -> F + Clone + Send + 'static,
) -> Anyhow<Beside>
where
    F: Future<Output = Anyhow<()>> + Send + 'static,
{
    if owners.is_empty() {
        return Err("shard 0 has nobody to ask for: more posts are wanted".into());
    }
    let node = ground.node(WORKERS).await?;
    let (plain, fenced) = bare_statement(statement)?;
    let half = Bare::new(ground, &plain, WORKERS / 2).await?;
    let (plain, fenced) = (Bare::new(ground, &plain, WORKERS).await?, Bare::new(ground, &fenced, WORKERS).await?);
    let by_bare = |bare: &Arc<Bare>| {
        let (bare, owners) = (bare.clone(), owners.clone());
        move |worker, number| {
            let (bare, owner) = (bare.clone(), turn(&owners, worker, number));
            async move {
                let bucket = owner.bucket().sql();
                let mut all: Vec<&(dyn ToSql + Sync)> = vec![&bucket, &owner.0];
                all.extend_from_slice(params);
                if bare.query(worker, &all).await? >= least { Ok(()) } else { Err("rows are missing".into()) }
            }
        }
    };
    let mut beside = Beside::default();
    for run in 0..=ground.runs {
        let (node, owners, call) = (node.clone(), owners.clone(), call.clone());
        let by_library = move |worker, number| call(node.clone(), turn(&owners, worker, number));
        let [mut ours, mut without, mut with, mut shared] = [0.0; 4];
        for slice in 0..SLICES {
            ours += throughput(WORKERS, PERIOD / SLICES, after(slice, by_library.clone())).await?;
            without += throughput(WORKERS, PERIOD / SLICES, after(slice, by_bare(&plain))).await?;
            with += throughput(WORKERS, PERIOD / SLICES, after(slice, by_bare(&fenced))).await?;
            shared += throughput(WORKERS, PERIOD / SLICES, after(slice, by_bare(&half))).await?;
        }
        let [ours, without, with, shared] = [ours, without, with, shared].map(|rates| rates / f64::from(SLICES));
        // The first run warms both sides up.
        if run > 0 {
            beside.library.add(ours, without);
            beside.shared.add(ours, shared);
            beside.fence.add(with, without);
        }
    }
    Ok(beside)
}

const FENCE_NOTE: &str = "the same statement with and without fence, no library";
const SHARED_NOTE: &str = "bare: two workers on each of four connections, which is how the library sends them";

/// A user by key.
pub(crate) async fn point_read(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    let users = ground.users_of_shard_0().await?;
    let call = |node: Therev, user| async move { Ok(node.user(user).await.map(|_| ())?) };
    let Beside { library, shared, fence } = beside_bare(ground, "users::GET", &users, &[], 1, call).await?;
    Ok(vec![
        library.rate("point_read", Some(0.88), "reads/s").note("a user by key, 8 workers, one shard"),
        shared.rate("point_read_shared", None, "reads/s").note(SHARED_NOTE),
        fence.rate("point_read_fence", None, "reads/s").note(FENCE_NOTE),
    ])
}

/// The 50 newest posts of one author.
pub(crate) async fn author_page(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    const LIMIT: i64 = 50;
    static REST: [&(dyn ToSql + Sync); 2] = [&Uuid::max(), &LIMIT];
    let authors = ground.busy_authors_of_shard_0(LIMIT).await?;
    let call = |node: Therev, author| async move { Ok(node.posts_by_author(author, None, LIMIT).await.map(|_| ())?) };
    let Beside { library, shared, fence } = beside_bare(ground, "posts::BY_AUTHOR", &authors, &REST, 50, call).await?;
    Ok(vec![
        library.rate("author_page", Some(0.93), "pages/s").note("50 posts of one author, 8 workers, one shard"),
        shared.rate("author_page_shared", None, "pages/s").note(SHARED_NOTE),
        fence.rate("author_page_fence", None, "pages/s").note(FENCE_NOTE),
    ])
}

/// The first 50 posts of a thread whose posts are on all shards, beside the slowest of its shards' own queries for them.
///
/// A page asks its shards side by side, and so does the bare side, which cannot know where the posts of the page are: on a
/// machine with fewer processors than shards one query by itself says little of four.
pub(crate) async fn thread_page(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    /// What the library asks a shard for that has a quarter of the posts, if it wants 50 and to know whether there are more.
    const SHARE: i64 = 23;
    let thread = ground.busy_thread().await?;
    let node = ground.node(WORKERS).await?;
    let (_, sql) = bare_statement("page::POSTS")?;
    let mut shards = Vec::new();
    for shard in 0..ground.shards {
        let client = ground.databases.bare(shard).await?;
        let statement = client.prepare(&sql).await?;
        let buckets = ground.buckets_of_thread(shard, thread).await?;
        shards.push(Arc::new(ShardOfThread { client, statement, thread, buckets }));
    }
    let page = move || {
        let node = node.clone();
        async move {
            let page = node.thread_page(thread, None, 50).await?;
            if page.posts.len() == 50 && !page.partial { Ok(()) } else { Err("the page is not whole".into()) }
        }
    };
    let at_once = |shards: &[Arc<ShardOfThread>], limit| {
        let shards = shards.to_vec();
        latencies_of_a_task(move || {
            let shards = shards.clone();
            async move { try_join_all(shards.iter().map(|shard| shard.query(limit))).await.map(drop) }
        })
    };
    let [mut shares, mut whole, mut alone] = [Pairs::default(), Pairs::default(), Pairs::default()];
    for run in 0..=ground.runs {
        let ours = median(latencies_of_a_task(page.clone()).await?);
        let of_shares = median(at_once(&shards, SHARE).await?);
        let of_whole = median(at_once(&shards, 51).await?);
        let mut slowest = 0.0_f64;
        for shard in shards.chunks(1) {
            slowest = slowest.max(median(at_once(shard, 51).await?));
        }
        if run > 0 {
            shares.add(ours, of_shares);
            whole.add(ours, of_whole);
            alone.add(ours, slowest);
        }
    }
    let ours = "p50, shown before; bare: the slowest of 4 shards, each asked for all 50, at once";
    let a_quarter = "bare: the slowest of 4 shards, each asked for a quarter and what chance may add, at once";
    Ok(vec![
        whole.time("thread_page", Some(1.6), "ms").note(ours),
        shares.time("thread_page_shares", None, "ms").note(a_quarter),
        alone.time("thread_page_alone", None, "ms").note("bare: the slowest shard, asked for all 50 while no other is"),
    ])
}

/// A shard that holds posts of a thread, asked without the library.
struct ShardOfThread {
    client: Client,
    statement: Statement,
    thread: ThreadId,
    buckets: BucketSet,
}

impl ShardOfThread {
    async fn query(&self, limit: i64) -> Anyhow<()> {
        let (apart, start) = (Vec::<Uuid>::new(), DateTime::<Utc>::UNIX_EPOCH);
        let params: [&(dyn ToSql + Sync); 6] = [&self.buckets, &apart, &self.thread.0, &start, &Uuid::nil(), &limit];
        for row in self.client.query(&self.statement, &params).await? {
            (0..row.len()).for_each(|at| read(&row, at));
        }
        Ok(())
    }
}

/// A call's times, in milliseconds, from within a task, as the callers of a service are: the thread that waits for the whole
/// program would have to be woken for each answer.
async fn latencies_of_a_task<F>(call: impl Fn() -> F + Send + 'static) -> Anyhow<Vec<f64>>
where
    F: Future<Output = Anyhow<()>> + Send,
{
    const CALLS: u32 = 100;
    tokio::spawn(async move { latencies(CALLS, move |_| call()).await }).await?
}

/// A thread whose posts are on one shard of sixteen asks that one.
pub(crate) async fn one_of_sixteen(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    let databases = ground.servers.databases("sixteen", 16).await?;
    let node = therev::connect(databases.config()).await?;
    let actor = therev::Actor::Operator("bench".into());
    let user = node.register(therev::NewUser { user_name: "one".into(), ..Default::default() }, &actor).await?.user_id;
    let thread = node.create_thread(therev::NewThread::new(user, "One", "shard")).await?.thread_id;
    node.create_post(therev::NewPost::new(user, thread, "text")).await?;
    let shards_asked = |node: &Therev| -> u64 {
        let all = node.shards().statements();
        all.iter().filter(|(database, _)| matches!(database, Database::Shard(ShardNo(_)))).map(|(_, n)| n).sum()
    };
    let before = shards_asked(&node);
    node.thread_page(thread, None, 50).await?;
    // One of them is the head's.
    let asked = shards_asked(&node) - before - 1;
    drop(node);
    databases.remove().await?;
    let note = "shards asked for posts that one of sixteen holds, besides the thread's head";
    Ok(vec![Figure::at_most("one_of_sixteen", count(asked), Some(1.0), "shards", 1).note(note)])
}

impl Ground<'_> {
    async fn users_of_shard_0(&self) -> Anyhow<Arc<Vec<UserId>>> {
        let client = self.databases.shard(0).await?;
        let rows = client.query("SELECT user_id FROM users WHERE deleted_at IS NULL ORDER BY user_id", &[]).await?;
        Ok(Arc::new(rows.iter().map(|row| UserId(row.get(0))).collect()))
    }

    async fn busy_authors_of_shard_0(&self, posts: i64) -> Anyhow<Arc<Vec<UserId>>> {
        let client = self.databases.shard(0).await?;
        let sql = "SELECT author_id FROM posts GROUP BY author_id HAVING count(*) > $1 ORDER BY author_id";
        let rows = client.query(sql, &[&posts]).await?;
        Ok(Arc::new(rows.iter().map(|row| UserId(row.get(0))).collect()))
    }

    /// A thread with at least 100 posts on each shard, not the busiest.
    async fn busy_thread(&self) -> Anyhow<ThreadId> {
        let mut on_all: Option<BTreeSet<Uuid>> = None;
        for shard in 0..self.shards {
            let client = self.databases.shard(shard).await?;
            let sql = "SELECT thread_id FROM posts GROUP BY thread_id HAVING count(*) BETWEEN 60 AND 600";
            let here: BTreeSet<Uuid> = client.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect();
            on_all = Some(match on_all {
                Some(all) => &all & &here,
                None => here,
            });
        }
        let first = on_all.unwrap_or_default().pop_first();
        first.map(ThreadId).ok_or_else(|| "no thread has enough posts on each shard".into())
    }

    /// The buckets of a shard that hold posts of a thread.
    async fn buckets_of_thread(&self, shard: u16, thread: ThreadId) -> Anyhow<BucketSet> {
        let client = self.databases.shard(shard).await?;
        let rows = client.query("SELECT DISTINCT bucket FROM posts WHERE thread_id = $1", &[&thread.0]).await?;
        let buckets = rows.iter().map(|row| Bucket::try_from(row.get::<_, i16>(0)));
        Ok(buckets.collect::<Result<_, _>>()?)
    }
}
