//! What writers did, as they did it: one line an event, in a file that outlives the writer.
//!
//! A line goes to the system in one call, so that `kill -9` loses none that was written. What a writer finds here at its
//! start is all that it knows of its earlier lives.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use therev::{PostId, UserId};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// This number is going to be appended to a user's history, under this id, from then on. Once for each number.
    Try { user: UserId, number: u64, post: PostId, at: u64 },
    /// It had been acknowledged by then.
    Acknowledged { user: UserId, number: u64, at: u64 },
    /// A user was registered under this name.
    Registered { user: UserId, name: String },
    /// A call failed, as calls may while something is broken: the kind of the error.
    Failed { kind: String },
    /// An error that no fault explains.
    Odd { what: String },
    /// A call did not return within any limit that it has.
    Hung { what: String },
    /// A shard refused a row that it does not own.
    Refused,
    /// A shard took a row from somebody who did not ask whether it owns it: it must, then.
    LetIn { user: UserId, post: PostId },
    /// A relocation was carried on to this state.
    Brought { state: String },
}

/// Nanoseconds of a clock that all processes of this machine share and nobody sets.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)).unwrap_or(0)
}

/// The end of a journal that is written to.
pub(crate) struct Journal {
    file: File,
}

impl Journal {
    pub(crate) fn append_to(path: &Path) -> io::Result<Journal> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        // Should the last life have ended within a line, the next one does not continue it.
        file.write_all(b"\n")?;
        Ok(Journal { file })
    }

    pub(crate) fn write(&mut self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

/// A number that a writer tried to append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Append {
    pub(crate) post: PostId,
    pub(crate) tried_at: u64,
    pub(crate) acknowledged_at: Option<u64>,
}

/// What journals say, read as far as they were written.
#[derive(Default)]
pub(crate) struct Journals {
    files: Vec<(PathBuf, u64)>,
    /// For each user its numbers, from 0.
    pub(crate) appends: BTreeMap<UserId, Vec<Append>>,
    /// Users that were registered, with their names.
    pub(crate) registered: Vec<(UserId, String)>,
    pub(crate) failed: BTreeMap<String, u64>,
    pub(crate) odd: Vec<String>,
    pub(crate) hung: Vec<String>,
    pub(crate) refused: u64,
    pub(crate) let_in: BTreeMap<UserId, Vec<PostId>>,
    /// How often movers brought a relocation to a state in which it rests.
    pub(crate) brought: BTreeMap<String, u64>,
}

impl Journals {
    pub(crate) fn of(paths: impl IntoIterator<Item = PathBuf>) -> Journals {
        Journals { files: paths.into_iter().map(|path| (path, 0)).collect(), ..Journals::default() }
    }

    /// Reads what was written since the last time.
    pub(crate) fn read_on(&mut self) -> io::Result<()> {
        for at in 0..self.files.len() {
            let (path, read) = &mut self.files[at];
            let mut file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            file.seek(SeekFrom::Start(*read))?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            // A last line without its end is being written.
            let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            *read += whole as u64;
            for line in text[..whole].split(|byte| *byte == b'\n') {
                // A line that a killed writer left half written says nothing that anybody relied on.
                if let Ok(event) = serde_json::from_slice(line) {
                    self.take(event);
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Try { user, number, post, at } => {
                let appends = self.appends.entry(user).or_default();
                if appends.len() as u64 == number {
                    appends.push(Append { post, tried_at: at, acknowledged_at: None });
                } else {
                    self.odd.push(format!("user {user} has {} numbers, and {number} is tried", appends.len()));
                }
            }
            Event::Acknowledged { user, number, at } => {
                let appends = self.appends.entry(user).or_default();
                if let Some(append) = usize::try_from(number).ok().and_then(|at| appends.get_mut(at)) {
                    append.acknowledged_at.get_or_insert(at);
                } else {
                    self.odd.push(format!("number {number} of user {user} is acknowledged and was never tried"));
                }
            }
            Event::Registered { user, name } => self.registered.push((user, name)),
            Event::Failed { kind } => *self.failed.entry(kind).or_default() += 1,
            Event::Odd { what } => self.odd.push(what),
            Event::Hung { what } => self.hung.push(what),
            Event::Refused => self.refused += 1,
            Event::LetIn { user, post } => self.let_in.entry(user).or_default().push(post),
            Event::Brought { state } => *self.brought.entry(state).or_default() += 1,
        }
    }

    /// How many numbers of a user are acknowledged: the first ones, since each waits for the one before it.
    pub(crate) fn acknowledged(&self, user: UserId) -> u64 {
        let appends = self.appends.get(&user).map_or(&[][..], Vec::as_slice);
        let open = appends.iter().rev().take_while(|append| append.acknowledged_at.is_none()).count();
        (appends.len() - open) as u64
    }
}
