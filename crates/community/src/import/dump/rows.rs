//! What the rows of each file mean.

use super::Row;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

/// Why a well-formed row cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// It lacks an attribute that it means nothing without.
    #[error("no {0}")]
    Missing(&'static str),
    /// An attribute that it needs has a value that means nothing here.
    #[error("unreadable {0}")]
    Unreadable(&'static str),
}

/// A row of `Users.xml`.
#[derive(Debug, Clone, PartialEq)]
pub struct UserRow {
    /// The site's own id; -1 is the site itself.
    pub id: i64,
    /// Not unique, of any characters.
    pub display_name: Option<String>,
    /// When the account was made.
    pub created_at: DateTime<Utc>,
    /// `AboutMe`, as HTML.
    pub about: Option<String>,
    /// Address of the user's picture.
    pub profile_image_url: Option<String>,
    /// Every other attribute as it was.
    pub rest: Map<String, Value>,
}

impl TryFrom<Row> for UserRow {
    type Error = Unusable;

    fn try_from(mut row: Row) -> Result<Self, Unusable> {
        Ok(Self {
            id: row.needed("Id")?,
            display_name: row.take("DisplayName"),
            created_at: row.created_at()?,
            about: row.take("AboutMe"),
            profile_image_url: row.take("ProfileImageUrl"),
            rest: row.rest(),
        })
    }
}

/// What a post of a dump is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PostKind {
    /// Type 1.
    Question,
    /// Type 2.
    Answer,
    /// Tag wikis (4, 5) and whatever else a site has, by its number.
    Other(u16),
}

impl From<u16> for PostKind {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Question,
            2 => Self::Answer,
            other => Self::Other(other),
        }
    }
}

/// A row of `Posts.xml`.
#[derive(Debug, Clone, PartialEq)]
pub struct PostRow {
    /// The site's own id.
    pub id: i64,
    /// Question, answer or something else.
    pub kind: PostKind,
    /// An answer's question; an answer has one.
    pub parent: Option<i64>,
    /// The author, unless the account is gone.
    pub owner: Option<i64>,
    /// The author's name at the time of leaving.
    pub owner_name: Option<String>,
    /// When it was written.
    pub created_at: DateTime<Utc>,
    /// Questions have one.
    pub title: Option<String>,
    /// The text as HTML; absent where a dump left it out.
    pub body: Option<String>,
    /// Votes for it minus votes against it; 0 where a dump left it out.
    pub score: i32,
    /// Every other attribute as it was.
    pub rest: Map<String, Value>,
}

impl TryFrom<Row> for PostRow {
    type Error = Unusable;

    fn try_from(mut row: Row) -> Result<Self, Unusable> {
        let id = row.needed("Id")?;
        let kind = row.needed::<u16>("PostTypeId")?.into();
        let parent = match kind {
            PostKind::Answer => Some(row.needed("ParentId")?),
            _ => row.reference("ParentId"),
        };
        Ok(Self {
            id,
            kind,
            parent,
            owner: row.reference("OwnerUserId"),
            owner_name: row.take("OwnerDisplayName"),
            created_at: row.created_at()?,
            title: row.take("Title"),
            body: row.take("Body"),
            score: row.score()?,
            rest: row.rest(),
        })
    }
}

/// A row of `Comments.xml`.
#[derive(Debug, Clone, PartialEq)]
pub struct CommentRow {
    /// The site's own id; comments and posts count apart.
    pub id: i64,
    /// The post it is under.
    pub post: i64,
    /// The author, unless the account is gone.
    pub user: Option<i64>,
    /// The author's name at the time of leaving.
    pub user_name: Option<String>,
    /// When it was written.
    pub created_at: DateTime<Utc>,
    /// Plain text with a little Markdown; absent where a dump left it out.
    pub text: Option<String>,
    /// Votes for it; 0 where a dump left it out.
    pub score: i32,
    /// Every other attribute as it was.
    pub rest: Map<String, Value>,
}

impl TryFrom<Row> for CommentRow {
    type Error = Unusable;

    fn try_from(mut row: Row) -> Result<Self, Unusable> {
        Ok(Self {
            id: row.needed("Id")?,
            post: row.needed("PostId")?,
            user: row.reference("UserId"),
            user_name: row.take("UserDisplayName"),
            created_at: row.created_at()?,
            text: row.take("Text"),
            score: row.score()?,
            rest: row.rest(),
        })
    }
}

/// A row of `Votes.xml`; dumps do not say who voted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VoteRow {
    /// The post voted on.
    pub post: i64,
    /// 2 is for it, 3 against it; the others are favourites, flags and the like.
    pub vote_type: u16,
}

impl TryFrom<Row> for VoteRow {
    type Error = Unusable;

    fn try_from(mut row: Row) -> Result<Self, Unusable> {
        Ok(Self { post: row.needed("PostId")?, vote_type: row.needed("VoteTypeId")? })
    }
}
