//! Readers: no read goes back in time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use therev::{Cursor, Layout, Map, Therev, ThreadId, UserId};
use tokio::sync::watch;

use crate::history::{Read, contradictions};
use crate::journal::{Event, Journals, now};
use crate::world::World;
use crate::writer::{HANGS, failed, number_in};

/// How many posts a read takes.
const PAGE: usize = 40;
/// How many pages of threads are read in a round of all histories.
const THREADS_A_ROUND: usize = 4;
/// Between two reads.
const PACE: Duration = Duration::from_millis(15);
/// How often a stale reader's placement is wrong again.
const FORGETS_EVERY: usize = 5;

/// What readers saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) reads: u64,
    /// Reads that an earlier read or a completed write contradicts.
    pub(crate) back: Vec<String>,
    pub(crate) odd: Vec<String>,
    pub(crate) hung: Vec<String>,
    /// By user, what was read when.
    pub(crate) histories: BTreeMap<UserId, Vec<Read>>,
    windows: BTreeMap<ThreadId, Window>,
}

/// Where a thread is being read, and what was there.
#[derive(Default)]
struct Window {
    after: Option<Cursor>,
    posts: Vec<Cursor>,
    post_count: i64,
}

/// Reads histories, the newest post of each by its id, and threads in turn until the end. A stale reader asks wrong shards first.
pub(crate) async fn read(
    node: Therev,
    is_stale: bool,
    failures: Arc<AtomicU64>,
    histories: Vec<UserId>,
    threads: Vec<ThreadId>,
    end: watch::Receiver<bool>,
) -> Seen {
    let mut seen = Seen::default();
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for turn in 0_usize.. {
        pace.tick().await;
        if *end.borrow() {
            break;
        }
        if is_stale && turn.is_multiple_of(FORGETS_EVERY) {
            node.shards().forget_placement(Map::first(Layout::Colocated, if turn % 2 == 0 { 1 } else { 2 }));
        }
        // Rounds of all histories, and a thread between two of them now and then: its pages are asked of all shards.
        let (round, at) = (turn / (histories.len() + THREADS_A_ROUND), turn % (histories.len() + THREADS_A_ROUND));
        let thread = threads[(round * THREADS_A_ROUND + at) % threads.len()];
        let user = histories.get(at);
        let read = async {
            match user {
                Some(user) => seen.read_history(&node, *user).await.map(|()| true),
                None => seen.read_thread(&node, thread).await,
            }
        };
        match tokio::time::timeout(HANGS, read).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => drop(failures.fetch_add(1, Ordering::Relaxed)),
            Ok(Err(error)) => {
                failures.fetch_add(1, Ordering::Relaxed);
                if let Event::Odd { what } = failed(&error) {
                    seen.odd.push(format!("a reader: {what}"));
                }
            }
            Err(_) => seen.hung.push(format!("a read of user {user:?} or thread {thread}")),
        }
    }
    seen
}

impl Seen {
    /// Adds what another reader saw.
    pub(crate) fn join(&mut self, other: Seen) {
        self.reads += other.reads;
        self.back.extend(other.back);
        self.odd.extend(other.odd);
        self.hung.extend(other.hung);
        for (user, reads) in other.histories {
            self.histories.entry(user).or_default().extend(reads);
        }
    }

    /// Whether what all readers saw of each history can have happened one after the other.
    pub(crate) fn judge(&mut self, journals: &Journals) {
        let unread = journals.appends.keys().filter(|user| !self.histories.contains_key(user));
        self.odd.extend(unread.map(|user| format!("nobody has read the history of user {user}")));
        for (user, reads) in &self.histories {
            let appends = journals.appends.get(user).map_or(&[][..], Vec::as_slice);
            let found = contradictions(appends, reads);
            self.back.extend(found.into_iter().map(|what| format!("user {user}: {what}")));
        }
    }

    /// The newest numbers of a history, none of them missing in between. What was read when is judged in the end.
    async fn read_history(&mut self, node: &Therev, user: UserId) -> therev::Result<()> {
        let began = now();
        let posts = node.posts_by_author(user, None, i64::try_from(PAGE).unwrap_or(i64::MAX)).await?;
        let ended = now();
        self.reads += 1;
        let numbers: Vec<u64> = posts.iter().filter_map(|post| number_in(post.body.as_deref())).collect();
        let count = numbers.first().map_or(0, |newest| newest + 1);
        self.histories.entry(user).or_default().push(Read { began, ended, count });
        let expected = (0..count).rev().take(PAGE);
        if !numbers.iter().copied().eq(expected) {
            self.back.push(format!("user {user}: not one after the other: {numbers:?}"));
        }
        // What is there is found by its id, which names no more than a bucket: «not found» would be odd.
        if let Some(newest) = posts.first() {
            node.post(newest.post_id).await?;
        }
        Ok(())
    }

    /// A part of a thread: what a whole page showed, every later one shows too, and its count only grows. `false`: the page
    /// lacks a shard's posts.
    async fn read_thread(&mut self, node: &Therev, thread: ThreadId) -> therev::Result<bool> {
        let after = self.windows.get(&thread).and_then(|window| window.after);
        let page = node.thread_page(thread, after, PAGE).await?;
        if page.partial {
            return Ok(false);
        }
        self.reads += 1;
        let window = self.windows.entry(thread).or_default();
        let posts: Vec<Cursor> = page.posts.iter().map(|item| Cursor::from(&item.post)).collect();
        let is_full = posts.len() == PAGE;
        // What an author wrote may come to be shown late, and push others off a full page at its end.
        let ends_before = |post: &Cursor| is_full && posts.last().is_some_and(|last| last < post);
        let gone = window.posts.iter().filter(|post| !posts.contains(post) && !ends_before(post)).count();
        if gone > 0 {
            self.back.push(format!("thread {thread}: {gone} posts are gone from a page"));
        }
        if page.thread.post_count < window.post_count {
            self.back.push(format!("thread {thread}: {} posts after {}", page.thread.post_count, window.post_count));
        }
        window.post_count = page.thread.post_count.max(window.post_count);
        window.posts = posts;
        if is_full {
            window.after = window.posts.get(PAGE / 2).copied();
            window.posts.drain(..=PAGE / 2);
        }
        Ok(true)
    }
}

/// What there is to read.
pub(crate) fn what(world: &World) -> (Vec<UserId>, Vec<ThreadId>) {
    let specs = || world.specs.iter().filter(|spec| spec.kind.appends());
    let users = specs().flat_map(|spec| spec.histories.iter().map(|history| history.user)).collect();
    let mut threads: Vec<ThreadId> = specs().flat_map(|spec| spec.histories.iter().map(|h| h.thread)).collect();
    threads.sort_unstable();
    threads.dedup();
    (users, threads)
}
