//! What an import counts.

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

/// Which column of the table per shard a kind of row counts in.
#[derive(Debug, Clone, Copy)]
pub(super) enum Column {
    Users = 0,
    Threads = 1,
    Posts = 2,
}

pub(super) const ALREADY_HERE: &str = "already here";

impl Tally {
    pub(super) fn read(&mut self, file: &'static str) {
        *self.read.entry(file).or_default() += 1;
    }

    pub(super) fn skip(&mut self, kind: &'static str, reason: &str) {
        self.skip_many(kind, reason, 1);
    }

    pub(super) fn skip_many(&mut self, kind: &'static str, reason: &str, count: u64) {
        if count > 0 {
            *self.skipped.entry((kind, reason.to_owned())).or_default() += count;
        }
    }

    /// A kind of row that may come to nothing is in the report all the same.
    pub(super) fn wrote(&mut self, kind: &'static str, count: u64) {
        *self.written.entry(kind).or_default() += count;
    }

    pub(super) fn copied(&mut self, column: Column, copied: &Copied) {
        for (shard, count) in &copied.written {
            self.per_shard.entry(*shard).or_default()[column as usize] += count;
        }
    }

    pub(super) fn total_written(&self) -> u64 {
        self.written.values().sum()
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
