//! Readers: no read goes back in time.

use std::collections::BTreeMap;
use std::time::Duration;

use therev::{Cursor, Therev, ThreadId, UserId};
use tokio::sync::watch;

use crate::journal::Event;
use crate::saboteur::Known;
use crate::world::World;
use crate::writer::{HANGS, Kind, failed, number_in};

/// How many posts a read takes.
const PAGE: usize = 40;
/// Between two reads.
const PACE: Duration = Duration::from_millis(15);

/// What readers saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) reads: u64,
    /// Reads that an earlier read or a completed write contradicts.
    pub(crate) back: Vec<String>,
    pub(crate) odd: Vec<String>,
    pub(crate) hung: Vec<String>,
    /// By user, how many numbers a read showed.
    shown: BTreeMap<UserId, u64>,
    windows: BTreeMap<ThreadId, Window>,
}

/// Where a thread is being read, and what was there.
#[derive(Default)]
struct Window {
    after: Option<Cursor>,
    posts: Vec<Cursor>,
    post_count: i64,
}

/// Reads histories and threads in turn until the end.
pub(crate) async fn read(
    node: Therev,
    known: Known,
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
        let user = histories[turn % histories.len()];
        let thread = threads[turn % threads.len()];
        // A thread now and then: its pages are asked of all shards.
        let read = async {
            if turn.is_multiple_of(4) {
                seen.read_thread(&node, thread).await
            } else {
                seen.read_history(&node, &known, user).await
            }
        };
        match tokio::time::timeout(HANGS, read).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                if let Event::Odd { what } = failed(&error) {
                    seen.odd.push(format!("a reader: {what}"));
                }
            }
            Err(_) => seen.hung.push(format!("a read of user {user} or thread {thread}")),
        }
    }
    seen
}

impl Seen {
    /// The newest numbers of a history: none missing that was acknowledged or shown before, and none in between.
    async fn read_history(&mut self, node: &Therev, known: &Known, user: UserId) -> therev::Result<()> {
        // Before the read begins.
        let acknowledged = known.now().map_or(0, |known| known.acknowledged(user));
        let posts = node.posts_by_author(user, None, i64::try_from(PAGE).unwrap_or(i64::MAX)).await?;
        self.reads += 1;
        let numbers: Vec<u64> = posts.iter().filter_map(|post| number_in(post.body.as_deref())).collect();
        let count = numbers.first().map_or(0, |newest| newest + 1);
        let shown = self.shown.entry(user).or_default();
        if count < acknowledged || count < *shown {
            self.back.push(format!("user {user}: {count} numbers, after {acknowledged} and {shown} before"));
        }
        *shown = count.max(*shown);
        let expected = (0..count).rev().take(PAGE);
        if !numbers.iter().copied().eq(expected) {
            self.back.push(format!("user {user}: not one after the other: {numbers:?}"));
        }
        Ok(())
    }

    /// A part of a thread: what a whole page showed, every later one shows too, and its count only grows.
    async fn read_thread(&mut self, node: &Therev, thread: ThreadId) -> therev::Result<()> {
        let after = self.windows.get(&thread).and_then(|window| window.after);
        let page = node.thread_page(thread, after, PAGE).await?;
        if page.partial {
            return Ok(());
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
        Ok(())
    }
}

/// What there is to read.
pub(crate) fn what(world: &World) -> (Vec<UserId>, Vec<ThreadId>) {
    let specs = || world.specs.iter().filter(|spec| spec.kind != Kind::Intruder);
    let users = specs().flat_map(|spec| spec.histories.iter().map(|history| history.user)).collect();
    let mut threads: Vec<ThreadId> = specs().flat_map(|spec| spec.histories.iter().map(|h| h.thread)).collect();
    threads.sort_unstable();
    threads.dedup();
    (users, threads)
}
