//! Growth: the same operations with ten times the data, and on more and more shards.

use crate::Anyhow;
use crate::chart::{Chart, Point, Series};
use crate::figure::{Figure, Pairs, count, latencies, median};
use crate::ground::Ground;
use crate::writes::BODY;
use std::collections::BTreeMap;
use std::path::Path;
use therev::{Actor, Database, NewPost, NewUser, Therev, ThreadId, UserId};
use uuid::Uuid;

/// How many shards the same community is spread over.
const SHARDS: [u16; 5] = [1, 2, 4, 8, 16];
/// How many posts the thread has whose page is asked for, or nearly.
const LONG: i64 = 500;

/// What people do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Operation {
    User,
    AuthorPage,
    ThreadPage,
    Register,
    Reply,
}

/// A community, and what is asked of it.
struct Site {
    node: Therev,
    users: Vec<UserId>,
    /// Those who wrote more than a page.
    authors: Vec<UserId>,
    threads: Vec<ThreadId>,
    /// A thread of some ten pages.
    long: ThreadId,
}

/// What one operation took at one site.
#[derive(Default)]
struct Taken {
    /// The median of each run.
    p50s: Vec<f64>,
    statements: f64,
}

impl Operation {
    const ALL: [Operation; 5] =
        [Operation::User, Operation::AuthorPage, Operation::ThreadPage, Operation::Register, Operation::Reply];

    /// As in a figure's name, and as in the chart.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Operation::User => ("user", "get a user"),
            Operation::AuthorPage => ("author_page", "page of an author"),
            Operation::ThreadPage => ("thread_page", "page of a thread"),
            Operation::Register => ("register", "register"),
            Operation::Reply => ("reply", "reply"),
        }
    }

    /// How many of them one run has.
    fn calls(self) -> u32 {
        match self {
            Operation::User => 300,
            Operation::AuthorPage => 150,
            _ => 60,
        }
    }

    async fn call(self, site: &Site, number: u32) -> Anyhow<()> {
        let node = &site.node;
        let at = usize::try_from(number)?;
        let shown = match self {
            Operation::User => return Ok(node.user(site.users[at * 31 % site.users.len()]).await.map(|_| ())?),
            Operation::AuthorPage => {
                let author = site.authors[at * 31 % site.authors.len()];
                node.posts_by_author(author, None, 50).await?.len()
            }
            Operation::ThreadPage => {
                let page = node.thread_page(site.long, None, 50).await?;
                if page.partial { 0 } else { page.posts.len() }
            }
            Operation::Register => {
                let user_name = format!("growth-{}-{number}", std::process::id());
                let new = NewUser { user_name, ..NewUser::default() };
                return Ok(node.register(new, &Actor::Operator("bench".into())).await.map(|_| ())?);
            }
            Operation::Reply => {
                let (author, thread) = (site.users[at % site.users.len()], site.threads[at * 7 % site.threads.len()]);
                return Ok(node.create_post(NewPost::new(author, thread, BODY)).await.map(|_| ())?);
            }
        };
        if shown == 50 { Ok(()) } else { Err("a page is not whole".into()) }
    }
}

impl Site {
    async fn new(ground: &Ground<'_>) -> Anyhow<Site> {
        let (mut users, mut authors, mut threads) = (Vec::new(), Vec::new(), Vec::new());
        let mut posts: BTreeMap<ThreadId, i64> = BTreeMap::new();
        for shard in 0..ground.shards {
            let client = ground.databases.shard(shard).await?;
            let ids = async |sql: &str| -> Anyhow<Vec<Uuid>> {
                Ok(client.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect())
            };
            users.extend(ids("SELECT user_id FROM users WHERE deleted_at IS NULL").await?.into_iter().map(UserId));
            threads.extend(ids("SELECT thread_id FROM threads").await?.into_iter().map(ThreadId));
            let busy = "SELECT author_id FROM posts GROUP BY author_id HAVING count(*) > 50";
            authors.extend(ids(busy).await?.into_iter().map(UserId));
            for row in client.query("SELECT thread_id, count(*) FROM posts GROUP BY thread_id", &[]).await? {
                *posts.entry(ThreadId(row.get(0))).or_default() += row.get::<_, i64>(1);
            }
        }
        // Everybody is asked for in the same order, wherever they are.
        users.sort();
        authors.sort();
        threads.sort();
        let long = posts.into_iter().min_by_key(|(thread, posts)| (posts.abs_diff(LONG), *thread));
        let (long, _) = long.filter(|_| !authors.is_empty()).ok_or("growth wants more posts")?;
        Ok(Site { node: ground.node(1).await?, users, authors, threads, long })
    }

    /// How many statements went to shards and directory so far.
    fn statements(&self) -> u64 {
        let all = self.node.shards().statements();
        all.iter().filter(|(database, _)| **database != Database::Control).map(|(_, statements)| statements).sum()
    }

    /// One run of an operation, which is counted from the second run on: the first warms up.
    async fn run(&self, operation: Operation, run: usize, taken: &mut Taken) -> Anyhow<()> {
        let first = operation.calls() * u32::try_from(run)?;
        let (mut times, mut statements) = (Vec::new(), Vec::new());
        for number in first..first + operation.calls() {
            let before = self.statements();
            times.extend(latencies(1, async |_| operation.call(self, number).await).await?);
            statements.push(count(self.statements() - before));
        }
        if run > 0 {
            taken.p50s.push(median(times));
            // Now and then a delivery takes along what another call left in its bucket.
            taken.statements = median(statements);
        }
        Ok(())
    }
}

impl Taken {
    fn point(&self, shards: u16) -> Point {
        Point { shards, p50_ms: median(self.p50s.iter().copied()), statements: self.statements }
    }

    /// This p50 beside another one.
    fn beside(&self, other: &Taken, name: &str) -> Figure {
        let mut pairs = Pairs::default();
        self.p50s.iter().zip(&other.p50s).for_each(|(ours, other)| pairs.add(*ours, *other));
        pairs.time(name, None, "ms")
    }
}

/// The ground's community beside one of a tenth of its posts, and that one on 1 to 16 shards. All are measured in turn.
pub(crate) async fn growth(ground: &Ground<'_>, chart: Option<&Path>) -> Anyhow<Vec<Figure>> {
    let posts = ground.posts / 10;
    let mut grounds = Vec::new();
    for shards in SHARDS {
        grounds.push(Ground::new(ground.servers, &format!("growth_{shards}"), shards, posts, ground.runs).await?);
    }
    let mut sites = Vec::new();
    for each in grounds.iter().chain([ground]) {
        sites.push(Site::new(each).await?);
    }
    let mut figures = Vec::new();
    let mut series = Vec::new();
    let mut grown = 0.0_f64;
    for operation in Operation::ALL {
        let mut taken: Vec<Taken> = sites.iter().map(|_| Taken::default()).collect();
        for run in 0..=ground.runs {
            for (site, taken) in sites.iter().zip(&mut taken) {
                site.run(operation, run, taken).await?;
            }
        }
        let [one, _, four, _, sixteen, more] = &taken[..] else { return Err("a community was not measured".into()) };
        let (name, shown) = operation.names();
        let statements =
            |a: &Taken, b: &Taken| format!("statements per call: {:.0}, {:.0}", a.statements, b.statements);
        let by_data = more.beside(four, &format!("growth_data_{name}"));
        let by_shards = sixteen.beside(one, &format!("growth_shards_{name}"));
        figures.push(by_data.note(format!("p50 with ten times the posts on 4 shards; {}", statements(more, four))));
        figures.push(by_shards.note(format!("p50 on 16 shards, on one; {}", statements(sixteen, one))));
        if operation != Operation::ThreadPage {
            grown = taken.iter().map(|other| other.statements / one.statements).fold(grown, f64::max);
        }
        let by_shards = SHARDS.iter().zip(&taken).map(|(shards, taken)| taken.point(*shards)).collect();
        series.push(Series { name: shown, by_shards, more_data: more.point(ground.shards) });
    }
    let note = "the most by which statements per call grow with data or shards, but for a thread's page";
    figures.push(Figure::at_most("growth_statements", grown, Some(1.0), "ratio", ground.runs).note(note));
    if let Some(path) = chart {
        std::fs::write(path, Chart { posts, series }.svg())?;
    }
    // The databases go with the servers: dropping them one by one takes as long as measuring.
    Ok(figures)
}
