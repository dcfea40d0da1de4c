//! Lists from the directory: threads newest, most active, by author; names by prefix. Read on its replicas.

use crate::authors::Author;
use crate::community::{Community, Seen};
use crate::error::{Error, Result};
use crate::page::Cursor;
use crate::text::{Moderation, bounded};
use crate::users::{Role, word};
use chrono::{DateTime, Utc};
use placement::{ThreadId, UserId};
use serde::Serialize;
use shards::{Token, Unfenced};
use std::fmt;
use std::str::FromStr;
use tokio_postgres::Row;
use uuid::Uuid;

/// How threads are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadOrder {
    /// Opened last first.
    Newest,
    /// Most posts first.
    MostActive,
    /// One author's, opened last first.
    ByAuthor(UserId),
}

/// A thread as the directory knows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThreadCard {
    /// Its id.
    pub thread_id: ThreadId,
    /// What it is about.
    pub title: String,
    /// Who opened it.
    pub author: Author,
    /// How many posts can be read in it; may be some seconds old.
    pub post_count: i32,
    /// Shown first.
    pub is_pinned: bool,
    /// Takes no replies.
    pub is_locked: bool,
    /// What a moderator decided.
    pub moderation: Moderation,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
    /// When somebody last wrote in it.
    pub last_activity_at: DateTime<Utc>,
}

/// A user as the directory knows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UserCard {
    /// Its id.
    pub user_id: UserId,
    /// Unique.
    pub user_name: String,
    /// First and last name.
    pub display_name: Option<String>,
    /// What the user may do.
    pub role: Role,
    /// Whether it may log in.
    pub is_active: bool,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listed<T> {
    /// The items, in the list's order.
    pub items: Vec<T>,
    /// Give it back to go on; absent: there is no more.
    pub next: Option<String>,
}

macro_rules! threads_ordered {
    ($condition:literal, $order:literal) => {
        concat!(
            "SELECT t.thread_id, t.title, t.author_id, u.user_name, u.display_name, t.post_count, t.is_pinned,
                    t.is_locked, t.moderation, t.created_at, t.last_activity_at
               FROM thread_directory AS t
               LEFT JOIN user_directory AS u ON u.user_id = t.author_id AND NOT u.is_deleted
              WHERE NOT t.is_deleted AND ",
            $condition,
            " ORDER BY ",
            $order
        )
    };
}

static NEWEST: Unfenced = Unfenced::read(threads_ordered!(
    "(t.created_at, t.thread_id) < ($1, $2)",
    "t.created_at DESC, t.thread_id DESC LIMIT $3"
));

static MOST_ACTIVE: Unfenced = Unfenced::read(threads_ordered!(
    "(t.post_count, t.thread_id) < ($1, $2)",
    "t.post_count DESC, t.thread_id DESC LIMIT $3"
));

static BY_AUTHOR: Unfenced = Unfenced::read(threads_ordered!(
    "(t.created_at, t.thread_id) < ($1, $2) AND t.author_id = $4",
    "t.created_at DESC, t.thread_id DESC LIMIT $3"
));

/// `~>~` compares byte by byte, as the index does.
static BY_PREFIX: Unfenced = Unfenced::read(
    "SELECT d.user_id, d.user_name, d.display_name, d.role, d.is_active, d.created_at
       FROM user_directory AS d
      WHERE NOT d.is_deleted AND d.user_name LIKE $1 AND d.user_name ~>~ $2
      ORDER BY d.user_name USING ~<~ LIMIT $3",
);

/// Where a list of most active threads goes on.
struct CountCursor(i32, Uuid);

impl fmt::Display for CountCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1.simple())
    }
}

impl FromStr for CountCursor {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (count, id) = text.split_once('.').ok_or(())?;
        Ok(CountCursor(count.parse().map_err(drop)?, id.parse().map_err(drop)?))
    }
}

impl Community {
    /// Lists threads, 1,000 at most. With `seen` a reader finds its own writes.
    pub async fn threads(
        &self,
        order: ThreadOrder,
        after: Option<&str>,
        limit: usize,
        seen: Option<&Seen>,
    ) -> Result<Listed<ThreadCard>> {
        let bad = || Error::invalid("after", "this is no cursor of this list");
        let limit = bounded(limit)?;
        let one_more = rows_wanted(limit);
        let token = self.position(seen).await?;
        let directory = self.shards().directory();
        let rows = if order == ThreadOrder::MostActive {
            let start = || Ok(CountCursor(i32::MAX, Uuid::max()));
            let CountCursor(count, id) = after.map_or_else(start, |text| text.parse().map_err(|()| bad()))?;
            directory.read(&MOST_ACTIVE, &[&count, &id, &one_more], token.as_ref()).await?
        } else {
            let start = || Ok(Cursor::end());
            let (at, id) = after.map_or_else(start, |text| text.parse().map_err(|_| bad()))?.parts();
            match order {
                ThreadOrder::ByAuthor(author) => {
                    directory.read(&BY_AUTHOR, &[&at, &id, &one_more, &author.0], token.as_ref()).await?
                }
                _ => directory.read(&NEWEST, &[&at, &id, &one_more], token.as_ref()).await?,
            }
        };
        let items = rows.iter().map(card_from).collect::<Result<Vec<ThreadCard>>>()?;
        Ok(cut(items, limit, |last| match order {
            ThreadOrder::MostActive => CountCursor(last.post_count, last.thread_id.0).to_string(),
            _ => Cursor::new(last.created_at, last.thread_id.0).to_string(),
        }))
    }

    /// Lists users by the beginning of their names, in the order of the names; 1,000 at most.
    pub async fn users_by_prefix(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        seen: Option<&Seen>,
    ) -> Result<Listed<UserCard>> {
        if prefix.contains('\0') || after.is_some_and(|text| text.contains('\0')) {
            return Err(Error::invalid("prefix", "it holds a NUL character"));
        }
        let limit = bounded(limit)?;
        let pattern =
            format!("{}%", prefix.to_lowercase().replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_"));
        let token = self.position(seen).await?;
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&pattern, &after.unwrap_or_default(), &rows_wanted(limit)];
        let rows = self.shards().directory().read(&BY_PREFIX, &params, token.as_ref()).await?;
        let user = |row: &Row| {
            Ok(UserCard {
                user_id: UserId(row.get("user_id")),
                user_name: row.get("user_name"),
                display_name: row.get("display_name"),
                role: word(row.get("role"))?,
                is_active: row.get("is_active"),
                created_at: row.get("created_at"),
            })
        };
        let items = rows.iter().map(user).collect::<Result<Vec<UserCard>>>()?;
        Ok(cut(items, limit, |last| last.user_name.clone()))
    }

    /// How far the directory must have come for a reader: what waits in an outbox is delivered first, within the call's deadline.
    /// Why it could not be, is the error.
    async fn position(&self, seen: Option<&Seen>) -> Result<Option<Token>> {
        match seen {
            None => Ok(None),
            Some(Seen::Position(token)) => Ok(Some(*token)),
            Some(Seen::Pending(group, bucket, shard)) => {
                let deadline = self.shards().config().deadline();
                self.directory_told(*group, *bucket, Some(*shard), deadline).await.map(Some)
            }
        }
    }
}

/// One more than is shown: whether there is more.
fn rows_wanted(limit: usize) -> i64 {
    i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX)
}

/// A page out of one row more than it shows.
fn cut<T>(mut items: Vec<T>, limit: usize, cursor: impl Fn(&T) -> String) -> Listed<T> {
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(cursor);
    Listed { items, next }
}

fn card_from(row: &Row) -> Result<ThreadCard> {
    Ok(ThreadCard {
        thread_id: ThreadId(row.get("thread_id")),
        title: row.get("title"),
        author: Author {
            user_id: UserId(row.get("author_id")),
            user_name: row.get("user_name"),
            display_name: row.get("display_name"),
        },
        post_count: row.get("post_count"),
        is_pinned: row.get("is_pinned"),
        is_locked: row.get("is_locked"),
        moderation: word(row.get("moderation"))?,
        created_at: row.get("created_at"),
        last_activity_at: row.get("last_activity_at"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cursor_survives_text(count: i32, id: u128) {
            let text = CountCursor(count, Uuid::from_u128(id)).to_string();
            let CountCursor(count_again, id_again) = text.parse().unwrap();
            prop_assert_eq!((count_again, id_again.as_u128()), (count, id));
        }

        #[test]
        fn any_text_is_a_cursor_or_an_error(text in prop_oneof![any::<String>(), "-?[0-9]{0,12}\\.?[0-9a-f-]{0,40}"]) {
            if let Ok(cursor) = text.parse::<CountCursor>() {
                prop_assert!(cursor.to_string().parse::<CountCursor>().is_ok());
            }
        }
    }
}
