//! After everything is healed: what is in the databases is what was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::Duration;

use testkit::connect;
use therev::{Cursor, PostId, Therev, ThreadId, UserId};

use crate::journal::Journals;
use crate::reader;
use crate::settle::{self, Switches};
use crate::world::{SHARDS, World};
use crate::writer::{self, number_in};

/// How long the relay may take for what was left undelivered.
const RELAY_WITHIN: Duration = Duration::from_secs(120);
/// How many posts of a thread are asked for at once.
const PAGE: usize = 200;
/// How long the servers may take to notice that a writer is gone.
const SESSIONS_END_WITHIN: Duration = Duration::from_secs(15);

/// What is wrong, in words.
#[derive(Default)]
pub(crate) struct Verdict {
    pub(crate) acknowledged: u64,
    pub(crate) lost: Vec<String>,
    pub(crate) doubled: Vec<String>,
    pub(crate) check: Vec<String>,
    pub(crate) left_over: Vec<String>,
    pub(crate) relocations: usize,
    pub(crate) switches: Switches,
    /// Relocations that did not come to an end.
    pub(crate) stuck: Vec<String>,
}

/// One post as its shard has it.
struct Stored {
    shard: u16,
    post: PostId,
    number: Option<u64>,
    whole: bool,
}

pub(crate) async fn verify(world: &World, journals: &Journals) -> Result<Verdict, Box<dyn Error>> {
    let mut verdict = Verdict { left_over: sessions(world).await?, ..Verdict::default() };
    let node = world.node().await?;
    (verdict.relocations, verdict.switches, verdict.stuck) = settle::end_relocations(&node).await?;
    // Told with everything else, so that the rest is proved all the same.
    if let Err(unfinished) = relay(&node).await {
        verdict.stuck.push(unfinished.to_string());
    }
    verdict.stuck.extend(settle::lives(world, &node).await?);
    verdict.left_over.extend(settle::left_overs(world).await?);
    let mut stored = histories(world).await?;
    let_in(journals, &mut stored, &mut verdict);
    for (user, appends) in &journals.appends {
        let posts = stored.remove(user).unwrap_or_default();
        verdict.acknowledged += appends.iter().filter(|append| append.acknowledged_at.is_some()).count() as u64;
        compare(*user, appends, &posts, &mut verdict);
        let shown = shown(&node, *user).await?;
        let ordered: Vec<PostId> = posts.iter().map(|stored| stored.post).collect();
        if shown != ordered {
            verdict.lost.push(format!(
                "user {user}: the library shows {} posts, there are {}",
                shown.len(),
                posts.len()
            ));
        }
    }
    for (user, posts) in stored {
        verdict.doubled.push(format!("user {user} has {} posts that nobody tried to write", posts.len()));
    }
    for (user, name) in &journals.registered {
        let found = node.user_named(name).await?;
        if found != Some(*user) {
            verdict.lost.push(format!("user {user} was registered as {name}, which is the name of {found:?}"));
        }
    }
    verdict.check = settle::check(&node).await?;
    verdict.check.extend(pending_names(world).await?);
    verdict.check.extend(pages(world).await?);
    Ok(verdict)
}

/// What intruders were let in with: the owner's they were, so that each is there, and once.
fn let_in(journals: &Journals, stored: &mut BTreeMap<UserId, Vec<Stored>>, verdict: &mut Verdict) {
    for (user, posts) in &journals.let_in {
        let there = stored.remove(user).unwrap_or_default();
        for post in posts {
            match there.iter().filter(|stored| stored.post == *post).count() {
                0 => verdict.lost.push(format!("{post} of user {user}, which a shard let in")),
                1 => {}
                times => verdict.doubled.push(format!("{post} of user {user} is there {times} times")),
            }
        }
        let mut ids: Vec<PostId> = there.iter().map(|stored| stored.post).collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            verdict.doubled.push(format!("user {user}, an intruder, has a post twice"));
        }
    }
}

/// What one user tried to write beside what is there, in the order of time.
fn compare(user: UserId, appends: &[crate::journal::Append], posts: &[Stored], verdict: &mut Verdict) {
    let mut by_id: BTreeMap<PostId, Vec<&Stored>> = BTreeMap::new();
    for stored in posts {
        by_id.entry(stored.post).or_default().push(stored);
    }
    for (number, append) in (0_u64..).zip(appends) {
        match by_id.remove(&append.post).unwrap_or_default().as_slice() {
            [] if append.acknowledged_at.is_some() => verdict.lost.push(format!("number {number} of user {user}")),
            [] => {}
            [one] if one.number == Some(number) && one.whole => {}
            [one] => verdict.lost.push(format!("number {number} of user {user} became {:?}", one.number)),
            many => {
                let shards: Vec<u16> = many.iter().map(|stored| stored.shard).collect();
                verdict.doubled.push(format!("number {number} of user {user} is on shards {shards:?}"));
            }
        }
    }
    for stray in by_id.into_values().flatten() {
        verdict.doubled.push(format!("user {user} has {} as {:?}, which nobody tried", stray.post, stray.number));
    }
    let numbers: Vec<u64> = posts.iter().filter_map(|stored| stored.number).collect();
    if !numbers.is_sorted() {
        verdict.lost.push(format!("user {user}: the order of numbers is not that of time"));
    }
}

/// All posts of all users, from the servers themselves, each user's by time.
async fn histories(world: &World) -> Result<BTreeMap<UserId, Vec<Stored>>, Box<dyn Error>> {
    let mut all: BTreeMap<UserId, Vec<Stored>> = BTreeMap::new();
    for shard in 0..SHARDS {
        let client = connect(&world.cluster()?.shard_url(shard)?).await;
        let sql = "SELECT author_id, post_id, body FROM posts ORDER BY author_id, created_at, post_id";
        for row in client.query(sql, &[]).await? {
            let body: Option<&str> = row.get("body");
            let number = number_in(body);
            all.entry(UserId(row.get("author_id"))).or_default().push(Stored {
                shard,
                post: PostId(row.get("post_id")),
                number,
                whole: number.is_some_and(|number| Some(writer::body(number).as_str()) == body),
            });
        }
    }
    Ok(all)
}

/// Names of which nobody knows whether they are taken: with no registration under way each has been settled.
async fn pending_names(world: &World) -> Result<Vec<String>, Box<dyn Error>> {
    let mut pending = Vec::new();
    for shard in 0..SHARDS {
        let client = connect(&world.cluster()?.shard_url(shard)?).await;
        let rows =
            client.query("SELECT to_jsonb(c)::text FROM therev.claims AS c WHERE c.state = 'pending'", &[]).await?;
        pending.extend(rows.iter().map(|row| format!("shard {shard}: a name still waits: {}", row.get::<_, &str>(0))));
    }
    Ok(pending)
}

/// The pages of each thread, one after the other, beside the posts that the servers have of it: as a node sees them that
/// knows nothing, and then once more with what it has learned.
async fn pages(world: &World) -> Result<Vec<String>, Box<dyn Error>> {
    let mut stored: BTreeMap<ThreadId, BTreeSet<PostId>> = BTreeMap::new();
    for shard in 0..SHARDS {
        let client = connect(&world.cluster()?.shard_url(shard)?).await;
        for row in client.query("SELECT thread_id, post_id FROM posts", &[]).await? {
            stored.entry(ThreadId(row.get(0))).or_default().insert(PostId(row.get(1)));
        }
    }
    let (_, threads) = reader::what(world);
    let mut wrong = Vec::new();
    let node = world.node().await?;
    for thread in threads.into_iter().flat_map(|thread| [thread, thread]) {
        let there = stored.get(&thread).cloned().unwrap_or_default();
        let (mut shown, mut after) = (Vec::new(), None);
        loop {
            let page = node.thread_page(thread, after, PAGE).await?;
            if page.partial {
                wrong.push(format!("thread {thread}: a page lacks a shard's posts"));
            }
            let Some(last) = page.posts.last() else { break };
            after = Some(Cursor::from(&last.post));
            shown.extend(page.posts.iter().map(|item| item.post.post_id));
        }
        let whole: BTreeSet<PostId> = shown.iter().copied().collect();
        if whole != there || whole.len() != shown.len() {
            let (pages, once) = (shown.len(), whole.len());
            wrong.push(format!(
                "thread {thread}: pages show {pages} posts, {once} of them once, there are {}",
                there.len()
            ));
        }
    }
    Ok(wrong)
}

/// Delivers what writers left behind, until nothing waits.
async fn relay(node: &Therev) -> Result<(), Box<dyn Error>> {
    let mut last = None;
    let passes = async {
        loop {
            let relayed = node.relay_once().await?;
            last = Some(relayed.clone());
            if relayed.waiting == 0 && relayed.shards_down.is_empty() && relayed.delivered.is_empty() {
                return Ok::<_, therev::Error>(());
            }
        }
    };
    let ended = tokio::time::timeout(RELAY_WITHIN, passes).await;
    Ok(ended.map_err(|_| format!("the relay has not ended: {last:?}"))??)
}

/// What the writers, all gone, left open on the servers: transactions, prepared or idle, and sessions.
async fn sessions(world: &World) -> Result<Vec<String>, Box<dyn Error>> {
    let mut left = Vec::new();
    for shard in 0..SHARDS {
        let client = connect(&world.cluster()?.shard_url(shard)?).await;
        let sql = "SELECT 'prepared transaction ' || gid AS what FROM pg_prepared_xacts
                   UNION ALL
                   SELECT format('session %s of %s, %s: %s', pid, usename, state, query) FROM pg_stat_activity
                    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let mut found = Vec::new();
        let end = tokio::time::Instant::now() + SESSIONS_END_WITHIN;
        loop {
            found.clear();
            found.extend(
                client.query(sql, &[]).await?.iter().map(|row| format!("shard {shard}: {}", row.get::<_, &str>(0))),
            );
            if found.is_empty() || tokio::time::Instant::now() >= end {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        left.extend(found);
    }
    Ok(left)
}

/// A user's whole history as the library shows it, oldest first.
async fn shown(node: &Therev, user: UserId) -> therev::Result<Vec<PostId>> {
    let mut posts: Vec<PostId> = Vec::new();
    loop {
        let page = node.posts_by_author(user, posts.last().copied(), 1_000).await?;
        if page.is_empty() {
            posts.reverse();
            return Ok(posts);
        }
        posts.extend(page.iter().map(|post| post.post_id));
    }
}
