//! What an import counts.

use super::dump::Unusable;
use super::{ImportReport, ShardRows, Skipped};
use crate::bulk::Copied;
use placement::ShardNo;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub(super) struct Tally {
    read: BTreeMap<&'static str, u64>,
    written: BTreeMap<&'static str, u64>,
    skipped: BTreeMap<(&'static str, String), u64>,
    per_shard: BTreeMap<ShardNo, [u64; 3]>,
}

/// Kinds of rows that an import writes; what one is called when it is left out; its column in the table per shard.
const KINDS: [(&str, &str, usize); 5] = [
    ("deleted_users", "deleted user", 0),
    ("users", "user", 0),
    ("threads", "question", 1),
    ("answers", "answer", 2),
    ("comments", "comment", 2),
];

impl Tally {
    /// Counts a row as read, and one that cannot be used as left out: it is no reason to do without all the others.
    pub(super) fn read<T>(&mut self, file: &'static str, kind: &'static str, row: Result<T, Unusable>) -> Option<T> {
        *self.read.entry(file).or_default() += 1;
        row.inspect_err(|reason| self.skip(kind, &reason.to_string())).ok()
    }

    pub(super) fn skip(&mut self, kind: &'static str, reason: &str) {
        self.skip_many(kind, reason, 1);
    }

    pub(super) fn skip_many(&mut self, kind: &'static str, reason: &str, count: u64) {
        if count > 0 {
            *self.skipped.entry((kind, reason.to_owned())).or_default() += count;
        }
    }

    /// Counts what another one has counted, too.
    pub(super) fn add(&mut self, other: Tally) {
        for (file, count) in other.read {
            *self.read.entry(file).or_default() += count;
        }
        for ((kind, reason), count) in other.skipped {
            self.skip_many(kind, &reason, count);
        }
    }

    /// Counts what became of the rows. A kind of which nothing was written is in the report all the same.
    pub(super) fn copied(&mut self, by_kind: &BTreeMap<&'static str, Copied>) {
        for (kind, one, column) in KINDS {
            let copied = by_kind.get(kind).cloned().unwrap_or_default();
            self.written.insert(kind, copied.total());
            for (shard, count) in &copied.written {
                self.per_shard.entry(*shard).or_default()[column] += count;
            }
            // The author of what has none is no row of the dump.
            if kind != "deleted_users" {
                self.skip_many(one, "already here", copied.existing);
            }
        }
    }

    pub(super) fn report(&self, shards: Vec<ShardNo>) -> ImportReport {
        let shard = |(shard, [users, threads, posts]): (&ShardNo, &[u64; 3])| ShardRows {
            shard: *shard,
            users: *users,
            threads: *threads,
            posts: *posts,
        };
        let skipped = |((kind, reason), count): (&(&'static str, String), &u64)| Skipped {
            kind,
            reason: reason.clone(),
            count: *count,
        };
        ImportReport {
            read: self.read.clone(),
            written: self.written.clone(),
            skipped: self.skipped.iter().map(skipped).collect(),
            per_shard: shards
                .iter()
                .map(|number| shard((number, self.per_shard.get(number).unwrap_or(&[0; 3]))))
                .collect(),
            ..ImportReport::default()
        }
    }
}
