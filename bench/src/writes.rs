//! Writes: a post by itself, and what people wait for.

use crate::figure::{Figure, Pairs, latencies, percentile, throughput};
use crate::ground::{Ground, WORKERS, bare_statement};
use crate::{Anyhow, PERIOD};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use therev::{Actor, AnyFenced, NewPost, NewThread, NewUser, PostId, ThreadId, ThreadOrder, UserId};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

pub(crate) const BODY: &str = "Some two hundred and fifty bytes of text, as half of the posts of a forum have less and the others \
                    more: a sentence or two about what was asked, a word of thanks, and a question back to whoever \
                    wrote first, since nobody says everything at once.";

const INSERT: &str = "
    INSERT INTO posts (bucket, author_id, post_id, thread_id, thread_author_id, parent_post_id, parent_author_id, type,
                       body, format, metadata, version)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 1)";

/// Who writes where: authors of shard 0, a few threads each.
#[derive(Clone)]
struct Scene {
    authors: Arc<Vec<UserId>>,
    threads: Arc<Vec<(ThreadId, UserId)>>,
}

impl Scene {
    async fn new(ground: &Ground<'_>) -> Anyhow<Scene> {
        let client = ground.databases.shard(0).await?;
        let users = client.query("SELECT user_id FROM users ORDER BY user_id LIMIT 500", &[]).await?;
        let threads =
            client.query("SELECT thread_id, author_id FROM threads ORDER BY thread_id LIMIT 500", &[]).await?;
        Ok(Scene {
            authors: Arc::new(users.iter().map(|row| UserId(row.get(0))).collect()),
            threads: Arc::new(threads.iter().map(|row| (ThreadId(row.get(0)), UserId(row.get(1)))).collect()),
        })
    }

    fn pick(&self, worker: usize, number: u64) -> (UserId, ThreadId, UserId) {
        let at = worker * 61 + usize::try_from(number).unwrap_or(0);
        let (thread, thread_author) = self.threads[at * 7 % self.threads.len()];
        (self.authors[at % self.authors.len()], thread, thread_author)
    }
}

/// A post as its statements take it.
struct Row {
    bucket: i16,
    author: UserId,
    id: PostId,
    thread: ThreadId,
    thread_author: UserId,
    parent: Option<Uuid>,
    metadata: Value,
}

impl Row {
    fn new((author, thread, thread_author): (UserId, ThreadId, UserId)) -> Row {
        let (bucket, id) = (author.bucket().sql(), PostId::new(author));
        Row { bucket, author, id, thread, thread_author, parent: None, metadata: json!({}) }
    }

    /// All parameters, the bucket first.
    fn params(&self) -> [&(dyn ToSql + Sync); 11] {
        let Row { bucket, author, id, thread, thread_author, parent, metadata } = self;
        [bucket, &author.0, &id.0, &thread.0, &thread_author.0, parent, parent, &"TEXT", &BODY, &"plain", metadata]
    }

    /// The same as the statement for many takes it.
    fn item(&self) -> Value {
        json!({
            "author_id": self.author, "post_id": self.id, "thread_id": self.thread, "thread_author_id": self.thread_author,
            "parent_post_id": self.parent, "parent_author_id": self.parent, "type": "TEXT", "body": BODY,
            "format": "plain", "metadata": self.metadata,
        })
    }
}

/// A post by itself: the library's (fence, contribution, event, with others that come at once), the same rows without fence and
/// library, and the bare insert.
pub(crate) async fn insert(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    let scene = Scene::new(ground).await?;
    let node = ground.node(WORKERS).await?;
    let statements = || therev::fenced_statements().into_iter();
    let named = |end| statements().find(|(name, _)| name.ends_with(end)).map(|(_, statement)| statement);
    let (Some(AnyFenced::Write(create)), Some(AnyFenced::WriteMany(together))) =
        (named("posts::CREATE"), named("posts::CREATE_TOGETHER"))
    else {
        return Err("there is no statement posts::CREATE, or posts::CREATE_TOGETHER".into());
    };
    let prepare = async |sql: &str| {
        let mut all: Vec<(Client, Statement)> = Vec::new();
        for _ in 0..WORKERS {
            let client = ground.databases.bare(0).await?;
            let statement = client.prepare(sql).await?;
            all.push((client, statement));
        }
        Anyhow::Ok(Arc::new(all))
    };
    let (alone, with_side_rows) = (prepare(INSERT).await?, prepare(&bare_statement("posts::CREATE")?.0).await?);
    let by_bare = |clients: &Arc<Vec<(Client, Statement)>>| {
        let (clients, scene) = (clients.clone(), scene.clone());
        move |worker: usize, number| {
            let (clients, post) = (clients.clone(), scene.pick(worker, number));
            async move {
                let (client, statement) = &clients[worker];
                client.query(statement, &Row::new(post).params()).await?;
                Ok(())
            }
        }
    };
    let (mut to_insert, mut to_rows) = (Pairs::default(), Pairs::default());
    for run in 0..=ground.runs {
        let bare = throughput(WORKERS, PERIOD, by_bare(&alone)).await?;
        let ours = {
            let (node, scene) = (node.clone(), scene.clone());
            throughput(WORKERS, PERIOD, move |worker, number| {
                let (node, post) = (node.clone(), scene.pick(worker, number));
                async move {
                    let row = Row::new(post);
                    let (params, item) = (row.params(), || row.item());
                    let bucket = row.author.bucket();
                    node.shards().write_together(create, together, bucket, &params[1..], (row.id.0, item)).await?;
                    Ok(())
                }
            })
            .await?
        };
        let rows = throughput(WORKERS, PERIOD, by_bare(&with_side_rows)).await?;
        if run > 0 {
            to_insert.add(ours, bare);
            to_rows.add(ours, rows);
        }
    }
    let note =
        "fence, contribution and event, posts that come at once in one statement; 8 workers, one shard, fsync on";
    Ok(vec![
        to_insert.rate("insert", Some(0.60), "posts/s").note(format!("{note}; bare: the post's row alone")),
        to_rows.rate("insert_side_rows", Some(0.85), "posts/s").note(format!("{note}; bare: the same rows, no fence")),
    ])
}

/// Whole posts as people write them: the thread's head, the post, and its delivery to the thread's shard.
pub(crate) async fn post(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    let scene = Scene::new(ground).await?;
    let node = ground.node(WORKERS).await?;
    let statements = |node: &therev::Therev| node.shards().statements().values().sum::<u64>();
    let before = statements(&node);
    let (author, thread, _) = scene.pick(0, 1);
    node.create_post(NewPost::new(author, thread, BODY)).await?;
    let per_call = statements(&node) - before;
    let mut rates = Vec::new();
    for _ in 0..ground.runs {
        let (node, scene) = (node.clone(), scene.clone());
        let rate = throughput(WORKERS, PERIOD, move |worker, number| {
            let (node, (author, thread, _)) = (node.clone(), scene.pick(worker, number));
            async move { Ok(node.create_post(NewPost::new(author, thread, BODY)).await.map(|_| ())?) }
        });
        rates.push(rate.await?);
    }
    let runs = rates.len();
    let note = format!("head, post and delivery: {per_call} statements; 8 workers, one shard");
    let figure = Figure::at_most("post_delivered", crate::figure::median(rates), None, "posts/s", runs);
    Ok(vec![figure.note(note)])
}

/// What one person waits for, alone on the cluster.
pub(crate) async fn waits(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    const CALLS: u32 = 200;
    let scene = Scene::new(ground).await?;
    let node = ground.node(WORKERS).await?;
    let actor = Actor::Operator("bench".into());
    let mut registered = Vec::new();
    let register = latencies(CALLS, async |number| {
        let user_name = format!("bench-{}-{number}", std::process::id());
        let user = node.register(NewUser { user_name, ..NewUser::default() }, &actor).await?;
        registered.push(user.user_id);
        Ok(())
    })
    .await?;
    let reply = latencies(CALLS, async |number| {
        let (_, thread, _) = scene.pick(0, u64::from(number));
        let author = registered[usize::try_from(number).unwrap_or(0)];
        node.create_post(NewPost::new(author, thread, BODY)).await?;
        Ok(())
    })
    .await?;
    let mut in_page = Vec::new();
    let mut in_directory = Vec::new();
    for number in 0..CALLS / 4 {
        let author = registered[usize::try_from(number).unwrap_or(0)];
        let started = Instant::now();
        let thread = node.create_thread(NewThread::new(author, "Mine", BODY)).await?;
        until(async || {
            // Without what the writer was told, which would send the question on to the directory itself.
            let newest = node.threads(ThreadOrder::Newest, None, 1, None).await?;
            Ok(newest.items.first().is_some_and(|card| card.thread_id == thread.thread_id))
        })
        .await?;
        in_directory.push(started.elapsed().as_secs_f64() * 1_000.0);
        let started = Instant::now();
        let post = node.create_post(NewPost::new(author, thread.thread_id, BODY)).await?;
        until(async || {
            let page = node.thread_page(thread.thread_id, None, 50).await?;
            Ok(page.posts.iter().any(|shown| shown.post.post_id == post.post_id))
        })
        .await?;
        in_page.push(started.elapsed().as_secs_f64() * 1_000.0);
    }
    let series = [
        ("register", register, "claim, row, delivery"),
        ("reply", reply, "head, post, delivery"),
        ("own_write_in_page", in_page, "a post, until the thread's page shows it"),
        ("own_write_in_directory", in_directory, "a thread, until the list of newest ones from a replica shows it"),
    ];
    let figures = series.into_iter().flat_map(|(name, all, note)| {
        [(50, "p50"), (99, "p99")].map(|(hundredths, which)| {
            let value = percentile(all.iter().copied(), hundredths);
            Figure::at_most(&format!("{name}_{which}"), value, None, "ms", all.len()).note(note)
        })
    });
    Ok(figures.collect())
}

/// Asks until the answer is yes, within a second.
async fn until(mut ask: impl AsyncFnMut() -> Anyhow<bool>) -> Anyhow<()> {
    let started = Instant::now();
    while !ask().await? {
        if started.elapsed() > Duration::from_secs(1) {
            return Err("a write was not to be seen within a second".into());
        }
    }
    Ok(())
}
