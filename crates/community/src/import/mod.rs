//! Communities of other sites, brought in from their data dumps.
//!
//! The dump is read as streams; ids are derived from site, kind, source id and time, so that a second import changes
//! nothing and one that was cut off continues. In memory: some 60 bytes per post of the dump, so that a comment finds
//! the post it belongs to, 16 per comment, some 40 for each author in each thread, and the batches that are read ahead.

mod content;
pub mod dump;
pub mod names;
mod people;
mod source;
mod tally;

pub use dump::DumpError;

use crate::community::Community;
use placement::ShardNo;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Why an import stopped. What was written stays; the same import continues it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file of the dump cannot be read.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The rows could not be written.
    #[error(transparent)]
    Community(#[from] crate::Error),
}

impl From<shards::Error> for ImportError {
    fn from(error: shards::Error) -> Self {
        ImportError::Community(error.into())
    }
}

/// How far an import has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What is being read: `users`, `posts`, `comments`, `votes`; at the end `deliver`.
    pub phase: &'static str,
    /// Bytes of the dump read so far.
    pub bytes: u64,
    /// Bytes of the dump in all.
    pub bytes_total: u64,
    /// Rows written so far.
    pub written: u64,
}

/// What an import did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ImportReport {
    /// Rows read, by file.
    pub read: BTreeMap<&'static str, u64>,
    /// Rows written, by what they became: `users`, `deleted_users`, `threads`, `answers`, `comments`.
    pub written: BTreeMap<&'static str, u64>,
    /// Rows that were left out, and why. A dump of another year may have many: an attribute that a row needs is not there, or is
    /// written otherwise.
    pub skipped: Vec<Skipped>,
    /// Rows written, by shard.
    pub per_shard: Vec<ShardRows>,
    /// Events that found their database down; a relay delivers them.
    pub undelivered: u64,
    /// Scores compared with the votes of the dump.
    pub votes: VoteReport,
    /// How long it took.
    pub seconds: f64,
}

/// Rows that were left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// What they were.
    pub kind: &'static str,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// What one shard got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShardRows {
    /// Which shard.
    pub shard: ShardNo,
    /// Users written there.
    pub users: u64,
    /// Threads written there.
    pub threads: u64,
    /// Posts written there.
    pub posts: u64,
}

/// Scores as posts have them, against votes for minus votes against.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VoteReport {
    /// Questions and answers.
    pub compared: u64,
    /// How many of them differ.
    pub differing: u64,
    /// Some of those: the post's id in the dump, its score, its votes.
    pub examples: Vec<String>,
}

async fn read_all(import: &mut source::Import<'_>) -> Result<(), ImportError> {
    people::import(import).await?;
    content::import_posts(import).await?;
    content::import_comments(import).await?;
    // All is written; nothing of it shall wait for the votes to be read.
    import.writer.finish().await?;
    content::compare_votes(import).await
}

/// The ids of everything imported come from the site's name: one spelling, so that nobody imports a site twice by
/// writing it differently.
fn check_site(site: &str) -> Result<(), crate::Error> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    if (1..=40).contains(&site.len()) && site.chars().all(plain) {
        return Ok(());
    }
    Err(crate::Error::invalid("site", "1 to 40 of a-z, 0-9, - and . are allowed"))
}

/// Imports a Stack Exchange data dump: `Users.xml`, `Posts.xml`, `Comments.xml`, `Votes.xml` in `folder`.
///
/// Users get unique user names made from their display names; questions become threads, answers and comments posts.
/// Rows without an author go to one `deleted` user of the site.
pub async fn stackexchange(
    community: &Community,
    folder: &Path,
    site: &str,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<ImportReport, ImportError> {
    let started = Instant::now();
    check_site(site)?;
    let mut import = source::Import::new(community, folder, site, progress)?;
    let read = read_all(&mut import).await;
    import.say("deliver");
    let written = import.writer.finish().await;
    // Also after a file that could not be read to its end: what was written must be known everywhere.
    let left = community.relay_what_is_left().await;
    read?;
    written?;
    let left = left?;
    import.tally.copied(import.writer.copied());
    let mut report = import.tally.report(community.shards().numbers());
    report.votes = import.votes;
    report.undelivered = left;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}
