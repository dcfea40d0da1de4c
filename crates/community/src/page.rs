//! A thread's page: the head, and one statement per shard that holds posts of it; one more for the names of those whose accounts lie
//! apart from their posts. Of a thread that is longer than the page a shard that holds much more of the page than of the thread is
//! asked twice.
//!
//! The head says in which buckets there are posts. Where a node has shown the thread before, it asks for head and posts at once,
//! and for the posts of other buckets besides once the head names some.

use crate::authors::{Author, author_columns, author_joined};
use crate::community::Community;
use crate::error::{Error, Result};
use crate::posts::{Post, post_columns, post_from};
use crate::text::bounded;
use crate::threads::Thread;
use chrono::{DateTime, Utc};
use placement::{Group, PostId, ShardNo, ThreadId, UserId, Whose};
use serde::Serialize;
use shards::{BucketSet, Many, ReadBuckets};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_postgres::Row;
use uuid::Uuid;

/// Where a page ends: the next one begins after it. Opaque in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    created_at: DateTime<Utc>,
    id: Uuid,
}

/// A cursor that is none.
#[derive(Debug, thiserror::Error)]
#[error("this is no cursor: take the one that a page ended with")]
pub struct InvalidCursor;

impl Cursor {
    pub(crate) fn new(created_at: DateTime<Utc>, id: Uuid) -> Cursor {
        Cursor { created_at, id }
    }

    /// Before everything.
    pub(crate) fn start() -> Cursor {
        Cursor { created_at: DateTime::UNIX_EPOCH - chrono::TimeDelta::days(365 * 200), id: Uuid::nil() }
    }

    /// After everything.
    pub(crate) fn end() -> Cursor {
        Cursor { created_at: DateTime::UNIX_EPOCH + chrono::TimeDelta::days(365 * 8_000), id: Uuid::max() }
    }

    pub(crate) fn parts(&self) -> (DateTime<Utc>, Uuid) {
        (self.created_at, self.id)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.created_at.timestamp_micros(), self.id.simple())
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> std::result::Result<Self, InvalidCursor> {
        let (micros, id) = text.split_once('.').ok_or(InvalidCursor)?;
        let created_at = micros.parse().ok().and_then(DateTime::from_timestamp_micros).ok_or(InvalidCursor)?;
        // What PostgreSQL cannot hold is no cursor of its rows.
        let (first, last) = (Cursor::start().created_at, Cursor::end().created_at);
        if created_at < first || created_at > last {
            return Err(InvalidCursor);
        }
        Ok(Cursor { created_at, id: id.parse().map_err(|_| InvalidCursor)? })
    }
}

impl Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One post of a page with its author.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PagePost {
    /// The post.
    #[serde(flatten)]
    pub post: Post,
    /// Who wrote it.
    pub author: Author,
}

/// A page of a thread, oldest post first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThreadPage {
    /// The thread's head.
    pub thread: Thread,
    /// Who opened it.
    pub author: Author,
    /// The posts, by time.
    pub posts: Vec<PagePost>,
    /// Where the next page begins; absent: this is the last one.
    pub next: Option<Cursor>,
    /// Shards that gave no answer: what their users wrote is missing here.
    pub missing: Vec<ShardNo>,
    /// Whether anything is missing.
    pub partial: bool,
}

/// Where threads had posts, as far as this node has seen: a guess to begin with, which the head adds to.
pub(crate) struct Remembered(moka::sync::Cache<ThreadId, Arc<Known>>);

/// In which buckets a thread had posts, and how many on which shard, when that was noted.
#[derive(Default, Clone)]
struct Known {
    buckets: BucketSet,
    posts: BTreeMap<ShardNo, usize>,
}

impl Known {
    fn all_posts(&self) -> usize {
        self.posts.values().sum()
    }
}

impl Default for Remembered {
    fn default() -> Remembered {
        // Half a kilobyte each.
        const THREADS: u64 = 20_000;
        Remembered(moka::sync::Cache::builder().max_capacity(THREADS).expire_after(FromTheFirst).build())
    }
}

/// A guess lives for a while from when it was first made, however often it was added to: no bucket is ever taken out of it.
struct FromTheFirst;

impl moka::Expiry<ThreadId, Arc<Known>> for FromTheFirst {
    fn expire_after_create(&self, _: &ThreadId, _: &Arc<Known>, _: Instant) -> Option<Duration> {
        Some(Duration::from_secs(600))
    }
}

/// This shard's share of a page: the posts of the authors whose buckets it was asked for and owns, read in the order of their index
/// and no more of them than are wanted, each with its author.
static POSTS: ReadBuckets = ReadBuckets::new(
    Group::Content,
    concat!(
        "SELECT p.*, ",
        author_columns!(),
        " FROM (SELECT ",
        post_columns!(),
        ", p.bucket
                  FROM posts AS p, therev.fence_content AS f
                 WHERE p.thread_id = $3 AND (p.created_at, p.post_id) > ($4, $5)
                   AND (get_bit($1::varbit, p.bucket) <> 0 OR p.author_id = ANY ($2::uuid[]))
                   AND f.colocation_group = 'content' AND therev.may_read(f, p.bucket, p.author_id)
                 ORDER BY p.created_at, p.post_id LIMIT $6) AS p",
        author_joined!("p")
    ),
);

crate::fenced_list! { POSTS }

impl Community {
    /// A page of a thread: `limit` posts after a cursor, 1,000 at most, oldest first.
    ///
    /// Asks only the shards that hold posts of it. A shard that is down leaves the page marked `partial`.
    pub async fn thread_page(&self, id: ThreadId, after: Option<Cursor>, limit: usize) -> Result<ThreadPage> {
        let (after, limit) = (after.unwrap_or_else(Cursor::start), bounded(limit)?);
        let Remembered(remembered) = &self.inner.remembered;
        let known = remembered.get(&id).unwrap_or_default();
        let wanted = limit.saturating_add(1);
        let posts_of = |known: Known, all: usize| Box::pin(self.posts_after(id, known, all, after, wanted));
        let begun = Box::pin(async {
            let head = self.head(id, &known.buckets).await?;
            let (mut more, mut all) = (Known::default(), Known::clone(&known));
            for (bucket, posts) in head.more_buckets {
                let shard = self.shard_of(Group::Content, bucket);
                for known in [&mut more, &mut all] {
                    known.buckets.extend([bucket]);
                    *known.posts.entry(shard).or_default() += posts;
                }
            }
            let posts = all.all_posts();
            if more.buckets != BucketSet::empty() {
                remembered.insert(id, Arc::new(all));
            }
            Ok::<_, Error>((head.thread, head.author, posts_of(more, posts).await?))
        });
        // Both to the end: to leave an answer costs its connection.
        let (begun, guessed) = tokio::join!(begun, posts_of(Known::clone(&known), known.all_posts()));
        let (thread, opened_by, (more_posts, more_missing)) = begun?;
        let (known_posts, mut missing) = guessed?;
        missing.extend(more_missing);
        // Each is the first of its own buckets.
        let found = in_order(known_posts.into_iter().chain(more_posts), |(post, _)| Cursor::from(post));
        let more = found.len() > limit;
        let (posts, with_posts): (Vec<Post>, Vec<Option<Author>>) = found.into_iter().take(limit).unzip();
        let next = posts.last().filter(|_| more).map(Cursor::from);
        let found = with_posts.into_iter().chain([opened_by]).flatten();
        let mut authors: BTreeMap<UserId, Author> = found.map(|author| (author.user_id, author)).collect();
        let all = posts.iter().map(|post| post.author_id).chain([thread.author_id]).collect();
        self.other_authors(&mut authors, all).await;
        let author_of = |id: UserId| {
            authors.get(&id).cloned().unwrap_or(Author { user_id: id, user_name: None, display_name: None })
        };
        Ok(ThreadPage {
            author: author_of(thread.author_id),
            thread,
            posts: posts.into_iter().map(|post| PagePost { author: author_of(post.author_id), post }).collect(),
            next,
            partial: !missing.is_empty(),
            missing: missing.into_iter().collect(),
        })
    }

    /// The first posts of a thread of `all` posts after a place, in order, as far as the shards answer; and which do not.
    ///
    /// Of a thread that the page holds whole each is asked for all it has; of a longer one for its likely share, since of a whole
    /// page from each of them most would be read only to be left out. One that gave all it was asked for may have more, and then
    /// posts of the others that come after its last have no place yet. Where too few come before, those that may have more are
    /// asked once again, for all that is missing.
    async fn posts_after(
        &self,
        id: ThreadId,
        known: Known,
        all: usize,
        after: Cursor,
        wanted: usize,
    ) -> Result<(Vec<(Post, Option<Author>)>, BTreeSet<ShardNo>)> {
        let ask = async |whose: Vec<Whose>, after: Cursor, limit: &(dyn Fn(ShardNo) -> usize + Sync)| {
            self.shards().read_buckets(&POSTS, whose, &[&id.0, &after.created_at, &after.id], limit).await
        };
        let buckets: Vec<Whose> = known.buckets.iter().map(Whose::from).collect();
        let share = |shard| match known.posts.get(&shard) {
            Some(here) if all > wanted => likely_share(wanted, *here, all),
            _ => wanted,
        };
        let answer = ask(buckets, after, &share).await;
        let full = answer.parts.iter().filter(|part| part.rows.len() >= share(part.shard));
        let full: Vec<(Vec<Whose>, Vec<Cursor>)> =
            full.map(|part| (part.whose.clone(), part.rows.iter().map(place_of).collect())).collect();
        let placed_until = full.iter().filter_map(|(_, places)| places.iter().max().copied()).min();
        let mut missing: BTreeSet<ShardNo> = answer.missing.iter().map(|(shard, _)| *shard).collect();
        // Who came back to the bucket between two answers is in both.
        let mut rows = in_order(with_places(answer), |(place, _)| *place);
        if let Some(end) = placed_until {
            let placed = rows.partition_point(|(place, _)| *place <= end);
            if placed < wanted {
                let more = wanted - placed;
                // Who has given as many that come after it has none that would come before these.
                let may_have_more =
                    full.into_iter().filter(|(_, places)| places.iter().filter(|it| **it > end).count() < more);
                let rest = ask(may_have_more.flat_map(|(whose, _)| whose).collect(), end, &|_| more).await;
                missing.extend(rest.missing.iter().map(|(shard, _)| *shard));
                rows = in_order(rows.into_iter().chain(with_places(rest)), |(place, _)| *place);
            }
        }
        let found = rows.iter().take(wanted).map(|(_, row)| Ok((post_from(row)?, Author::with_row(row))));
        Ok((found.collect::<Result<_>>()?, missing))
    }
}

/// How many posts a shard that has so many of a thread is asked for, so that all together hardly ever give too few: where chance says
/// whose turn it is, a shard has its share of them and three times the deviation of that more in one case of a thousand.
fn likely_share(wanted: usize, here: usize, all: usize) -> usize {
    let share = wanted.saturating_mul(here).div_ceil(all.max(1));
    share.saturating_add(3 * share.isqrt() + 1).min(wanted)
}

fn place_of(row: &Row) -> Cursor {
    Cursor::new(row.get("created_at"), row.get("post_id"))
}

fn with_places(answer: Many) -> impl Iterator<Item = (Cursor, Row)> {
    answer.parts.into_iter().flat_map(|part| part.rows).map(|row| (place_of(&row), row))
}

/// Each once, by place, which no two posts share: of one that came twice the later answer.
fn in_order<T>(all: impl Iterator<Item = T>, place: impl Fn(&T) -> Cursor) -> Vec<T> {
    let mut all: Vec<T> = all.collect();
    all.sort_by_key(&place);
    all.dedup_by(|later, earlier| {
        let is_same = place(later) == place(earlier);
        if is_same {
            std::mem::swap(later, earlier);
        }
        is_same
    });
    all
}

/// A post's place in a page.
impl From<&Post> for Cursor {
    fn from(post: &Post) -> Cursor {
        let PostId(id) = post.post_id;
        Cursor::new(post.created_at, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cursor_survives_text(micros in start_to_end(), id: u128) {
            let at = DateTime::from_timestamp_micros(micros).unwrap();
            let cursor = Cursor::new(at, Uuid::from_u128(id));
            prop_assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        }

        #[test]
        fn any_text_is_a_cursor_or_an_error(text in prop_oneof![any::<String>(), "-?[0-9]{0,20}\\.?[0-9a-f-]{0,40}"]) {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
            }
        }
    }

    /// Every time that a cursor may hold.
    fn start_to_end() -> std::ops::RangeInclusive<i64> {
        let [first, last] = [Cursor::start(), Cursor::end()].map(|cursor| cursor.created_at.timestamp_micros());
        first..=last
    }

    #[test]
    fn times_that_postgresql_cannot_hold_are_refused() {
        assert!(format!("{}.{}", i64::MAX, Uuid::nil()).parse::<Cursor>().is_err());
    }
}
