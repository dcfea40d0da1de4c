//! The dump on one side and the community on the other: reading ahead on a thread of its own, and derived ids.

use super::dump::{CommentRow, DumpError, PostRow, Row, Rows, Unusable, UserRow, VoteRow};
use super::tally::Tally;
use super::{Progress, VoteReport};
use crate::bulk::{BATCH, BulkWriter};
use crate::community::Community;
use chrono::{DateTime, Datelike, Utc};
use placement::{UserId, derived_id};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::{Builder, Uuid};

/// A batch of long texts ends earlier: with so many bytes.
pub(super) const BATCH_BYTES: usize = 16 << 20;
/// How many batches are read ahead.
const AHEAD: usize = 2;

/// One import under way.
pub(super) struct Import<'a> {
    pub(super) writer: BulkWriter,
    pub(super) site: String,
    pub(super) files: Files,
    progress: &'a mut (dyn FnMut(Progress) + Send),
    bytes: Arc<AtomicU64>,
    bytes_total: u64,
    pub(super) tally: Tally,
    pub(super) votes: VoteReport,
    /// The users of the dump.
    pub(super) users: HashMap<i64, UserId>,
    /// Whose everything is that no user of the dump wrote.
    pub(super) deleted_user: UserId,
    /// Its questions and answers.
    pub(super) posts: HashMap<i64, Source>,
    pub(super) comments: HashSet<i64>,
}

/// The files of a dump, each read ahead on a thread of its own, a batch at a time. After an error nothing more comes.
pub(super) struct Files {
    pub(super) users: Batches<UserRow>,
    pub(super) posts: Batches<PostRow>,
    pub(super) comments: Batches<CommentRow>,
    /// One task, which ends with the import.
    pub(super) votes: JoinSet<Result<Votes, DumpError>>,
}

/// Rows in their order; those that cannot be used come along, to be counted.
type Batch<T> = Result<Vec<Result<T, Unusable>>, DumpError>;
type Batches<T> = mpsc::Receiver<Batch<T>>;

/// The votes of a dump.
#[derive(Default)]
pub(super) struct Votes {
    /// By post: those for it minus those against it.
    pub(super) sums: HashMap<i64, i32>,
    pub(super) tally: Tally,
}

impl Votes {
    async fn sum(mut batches: Batches<VoteRow>) -> Result<Votes, DumpError> {
        let mut votes = Votes::default();
        while let Some(batch) = batches.recv().await {
            for vote in batch? {
                let Some(vote) = votes.tally.read("votes", "vote", vote) else { continue };
                let sign = match vote.vote_type {
                    2 => 1,
                    3 => -1,
                    _ => continue,
                };
                *votes.sums.entry(vote.post).or_default() += sign;
            }
        }
        Ok(votes)
    }
}

impl Files {
    fn open(folder: &Path, counted: &Arc<AtomicU64>) -> Files {
        Files {
            users: read(folder.join("Users.xml"), "users", counted),
            posts: read(folder.join("Posts.xml"), "posts", counted),
            comments: read(folder.join("Comments.xml"), "comments", counted),
            // Nothing is written of them, so that they wait for nothing.
            votes: JoinSet::from_iter([Votes::sum(read(folder.join("Votes.xml"), "votes", counted))]),
        }
    }
}

/// The files that a dump must have.
const FILES: [&str; 4] = ["Users.xml", "Posts.xml", "Comments.xml", "Votes.xml"];

fn read<T>(path: PathBuf, root: &'static str, counted: &Arc<AtomicU64>) -> Batches<T>
where
    T: TryFrom<Row, Error = Unusable> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(AHEAD);
    let counted = counted.clone();
    tokio::task::spawn_blocking(move || {
        // An error here means that nobody listens any more.
        let _ = read_batches(&path, root, counted, &sender);
    });
    receiver
}

/// What a later row must know of a question or an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    /// What it is here: a thread's id, or a post's.
    pub(super) id: Uuid,
    pub(super) author_id: UserId,
    /// An answer's question.
    pub(super) question: Option<i64>,
    pub(super) score: i32,
}

impl<'a> Import<'a> {
    pub(super) fn new(
        community: &Community,
        folder: &Path,
        site: &str,
        progress: &'a mut (dyn FnMut(Progress) + Send),
    ) -> Result<Import<'a>, DumpError> {
        let mut bytes_total = 0;
        // All four must be there before the first row is written.
        for file in FILES {
            let path = folder.join(file);
            let size =
                std::fs::metadata(&path).map_err(|e| DumpError::Io { path: path.into(), source: Arc::new(e) })?;
            bytes_total += size.len();
        }
        let bytes = Arc::default();
        Ok(Import {
            writer: community.bulk_writer(),
            site: site.to_owned(),
            files: Files::open(folder, &bytes),
            progress,
            bytes,
            bytes_total,
            tally: Tally::default(),
            votes: VoteReport::default(),
            users: HashMap::new(),
            deleted_user: user_id(site, "deleted"),
            posts: HashMap::new(),
            comments: HashSet::new(),
        })
    }

    /// Tells how far the import has come.
    pub(super) fn say(&mut self, phase: &'static str) {
        let (bytes, bytes_total) = (self.bytes.load(Ordering::Relaxed), self.bytes_total);
        (self.progress)(Progress { phase, bytes, bytes_total, written: self.writer.written() });
    }

    pub(super) fn content_id(&self, kind: &str, source: i64, author: UserId, created_at: DateTime<Utc>) -> Uuid {
        let digest = digest(&self.site, kind, &source.to_string());
        let mut low = [0; 8];
        low.copy_from_slice(&digest[..8]);
        derived_id(author.bucket(), created_at, u64::from_be_bytes(low))
    }

    /// An author of the dump as it is known here: one that the dump does not have is the `deleted` user.
    pub(super) fn author(&self, source: Option<i64>) -> UserId {
        source.and_then(|id| self.users.get(&id).copied()).unwrap_or(self.deleted_user)
    }
}

/// Why a row of this time is left out: cursors of pages and lists end in the year 9964, and what comes after is never shown.
pub(super) fn too_late(created_at: DateTime<Utc>) -> Option<&'static str> {
    (created_at.year() >= 9_900).then_some("its time is after the year 9899")
}

/// The user that a user of the dump became.
pub(super) fn user_id(site: &str, name: &str) -> UserId {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest(site, "user", name)[..16]);
    // A name-based id: users route by its hash.
    UserId(Builder::from_sha1_bytes(bytes).into_uuid())
}

fn digest(site: &str, kind: &str, name: &str) -> [u8; 32] {
    Sha256::digest(format!("{site}\n{kind}\n{name}")).into()
}

fn read_batches<T>(
    path: &Path,
    root: &'static str,
    counted: Arc<AtomicU64>,
    sender: &mpsc::Sender<Batch<T>>,
) -> Result<(), mpsc::error::SendError<Batch<T>>>
where
    T: TryFrom<Row, Error = Unusable>,
{
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) => return sender.blocking_send(Err(DumpError::Io { path: path.into(), source: Arc::new(e) })),
    };
    let mut rows = Rows::new(BufReader::with_capacity(1 << 17, Counted { file, counted }), path, root);
    let (mut batch, mut bytes) = (Vec::with_capacity(BATCH), 0);
    loop {
        match rows.next() {
            Ok(Some(row)) => {
                bytes += row.attributes.iter().map(|(_, value)| value.len()).sum::<usize>();
                batch.push(T::try_from(row));
            }
            Ok(None) => return sender.blocking_send(Ok(batch)),
            Err(error) => {
                // What stood before the faulty line is written; then the import stops.
                sender.blocking_send(Ok(batch))?;
                return sender.blocking_send(Err(error));
            }
        }
        if batch.len() == BATCH || bytes >= BATCH_BYTES {
            bytes = 0;
            sender.blocking_send(Ok(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))))?;
        }
    }
}

/// A file that tells how much of it was read.
struct Counted {
    file: File,
    counted: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.counted.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Cursor;

    #[test]
    fn every_time_that_is_let_in_can_be_a_cursor() {
        let late = |time: &str| too_late(time.parse().unwrap());
        assert_eq!(late("9899-12-31T23:59:59Z"), None);
        assert!(late("9900-01-01T00:00:00Z").is_some());
        let last: DateTime<Utc> = "9899-12-31T23:59:59Z".parse().unwrap();
        let text = Cursor::new(last, Uuid::max()).to_string();
        assert!(text.parse::<Cursor>().is_ok());
    }
}
