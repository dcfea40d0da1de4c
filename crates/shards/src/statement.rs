//! The fenced statements: the only ways to run SQL on owned rows.
//!
//! Each constructor puts the fence around the text it is given, so that check and effect share one snapshot, and is a
//! `const fn` that does not compile where the text leaves out its half of the bargain. In all of them `$1` is the bucket
//! (or the buckets), and an answer without rows means *not here*.

use placement::Group;
use std::sync::OnceLock;

/// A read of one owner's rows. `$1` is the bucket.
///
/// The text is a plain `SELECT`. It is asked in its quick form first: rows passed the fence in their own snapshot. No row
/// may mean two things; the form with the verdict tells them apart: one row of nulls (`present` is null) when nothing was
/// found, none when the bucket is not here.
pub struct Read {
    pub(crate) group: Group,
    pub(crate) names_owner: bool,
    text: &'static str,
    quick: OnceLock<String>,
    sql: OnceLock<String>,
}

/// A write of one owner's rows, in one statement. `$1` is the bucket.
///
/// The text is a list of CTEs of which the last is named `result`; the first write selects `FROM fence`, which holds one
/// row (with `version_floor`) when the bucket may be written and none otherwise. The answer is the rows of `result`, or
/// one row of nulls (`present` is null) when the bucket is owned and `result` is empty.
pub struct Write {
    pub(crate) group: Group,
    pub(crate) names_owner: bool,
    text: &'static str,
    sql: OnceLock<String>,
}

/// A read of many owners' rows on one shard. `$1` are buckets and `$2` keys, side by side.
///
/// The text is a `SELECT` from `asked (bucket, key)`, which holds the pairs whose bucket this shard may read. The
/// answer also says which buckets were refused.
pub struct ReadMany {
    pub(crate) group: Group,
    text: &'static str,
    sql: OnceLock<String>,
}

/// A write of many owners' rows on one shard, each checked by itself. `$1` are buckets and `$2` JSON items.
///
/// The text is a list of CTEs of which the last is named `result`; they read `owned (bucket, item, version_floor)`, the
/// items whose bucket this shard may write. The answer also says which buckets were refused.
pub struct WriteMany {
    pub(crate) group: Group,
    text: &'static str,
    sql: OnceLock<String>,
}

/// Any of the fenced statements, for the test that tries them all where they must be refused.
#[doc(hidden)]
pub enum AnyFenced {
    Read(&'static Read),
    Write(&'static Write),
    ReadMany(&'static ReadMany),
    WriteMany(&'static WriteMany),
}

impl AnyFenced {
    pub fn sql(&self) -> &str {
        match self {
            AnyFenced::Read(statement) => statement.sql(),
            AnyFenced::Write(statement) => statement.sql(),
            AnyFenced::ReadMany(statement) => statement.sql(),
            AnyFenced::WriteMany(statement) => statement.sql(),
        }
    }

    /// The form in which it is asked first, where that is another one.
    pub fn quick(&self) -> Option<&str> {
        match self {
            AnyFenced::Read(statement) => Some(statement.quick()),
            _ => None,
        }
    }

    /// The same without its fence, for whoever measures what the fence costs; of the statements on one owner only.
    pub fn bare(&self) -> Option<String> {
        match self {
            AnyFenced::Read(statement) => Some(statement.text.to_owned()),
            AnyFenced::Write(statement) => Some(format!(
                "WITH fence AS MATERIALIZED (SELECT 1::bigint AS version_floor), {} SELECT r.* FROM result AS r",
                statement.text
            )),
            AnyFenced::ReadMany(_) | AnyFenced::WriteMany(_) => None,
        }
    }

    /// Whether its answer names the refused buckets; else an answer without rows is the refusal.
    pub fn asks_many(&self) -> bool {
        matches!(self, AnyFenced::ReadMany(_) | AnyFenced::WriteMany(_))
    }
}

macro_rules! any_fenced {
    ($($kind:ident)*) => {$(
        impl From<&'static $kind> for AnyFenced {
            fn from(statement: &'static $kind) -> AnyFenced {
                AnyFenced::$kind(statement)
            }
        }
    )*};
}

any_fenced! { Read Write ReadMany WriteMany }

/// A statement on machinery that no bucket owns (the outbox's queue, a version), or that only counts.
pub struct Unfenced {
    pub(crate) sql: &'static str,
    pub(crate) writes: bool,
}

impl Read {
    /// The same where `$2` is the owner's id: its calls count as this owner's load.
    pub const fn of_owner(group: Group, text: &'static str) -> Read {
        assert!(mentions(text, "$2"), "what names its owner names it as $2");
        let mut statement = Read::new(group, text);
        statement.names_owner = true;
        statement
    }

    /// A read of rows of `group`.
    pub const fn new(group: Group, text: &'static str) -> Read {
        assert!(mentions(text, "$1"), "a fenced read names its bucket as $1");
        Read { group, names_owner: false, text, quick: OnceLock::new(), sql: OnceLock::new() }
    }

    /// Without the verdict: a plain join, which costs 2–3 % of a point read less.
    pub(crate) fn quick(&self) -> &str {
        self.quick.get_or_init(|| {
            format!(
                "SELECT q.*
                   FROM therev.fence AS f
                  CROSS JOIN ({}) AS q
                  WHERE f.colocation_group = '{}' AND get_bit(f.readable, $1::smallint) = 1",
                self.text, self.group
            )
        })
    }

    pub(crate) fn sql(&self) -> &str {
        self.sql.get_or_init(|| {
            format!(
                "SELECT r.*
                   FROM therev.fence AS f
                   LEFT JOIN LATERAL (SELECT true AS present, q.* FROM ({}) AS q) AS r ON true
                  WHERE f.colocation_group = '{}' AND get_bit(f.readable, $1::smallint) = 1",
                self.text, self.group
            )
        })
    }
}

impl Write {
    /// The same where `$2` is the owner's id: its calls count as this owner's load.
    pub const fn of_owner(group: Group, text: &'static str) -> Write {
        assert!(mentions(text, "$2"), "what names its owner names it as $2");
        let mut statement = Write::new(group, text);
        statement.names_owner = true;
        statement
    }

    /// A write of rows of `group`.
    pub const fn new(group: Group, text: &'static str) -> Write {
        assert!(mentions(text, "fence"), "a fenced write selects FROM fence");
        assert!(mentions(text, "result AS ("), "the last CTE of a fenced write is named result");
        Write { group, names_owner: false, text, sql: OnceLock::new() }
    }

    pub(crate) fn sql(&self) -> &str {
        self.sql.get_or_init(|| {
            format!(
                "WITH fence AS MATERIALIZED (
                     SELECT f.version_floor FROM therev.fence AS f
                      WHERE f.colocation_group = '{}' AND get_bit(f.writable, $1::smallint) = 1),
                 {}
                 SELECT r.* FROM fence LEFT JOIN (SELECT true AS present, result.* FROM result) AS r ON true",
                self.group, self.text
            )
        })
    }
}

impl ReadMany {
    /// A read of rows of `group`.
    pub const fn new(group: Group, text: &'static str) -> ReadMany {
        assert!(mentions(text, "asked"), "a fenced read of many selects FROM asked");
        ReadMany { group, text, sql: OnceLock::new() }
    }

    pub(crate) fn sql(&self) -> &str {
        self.sql.get_or_init(|| {
            format!(
                "WITH every AS (
                     SELECT k.bucket, k.key, get_bit(f.readable, k.bucket) = 1 AS here
                       FROM therev.fence AS f, unnest($1::smallint[], $2::uuid[]) AS k (bucket, key)
                      WHERE f.colocation_group = '{}'),
                 asked AS (SELECT e.bucket, e.key FROM every AS e WHERE e.here)
                 SELECT refused.buckets AS refused, r.*
                   FROM (SELECT array_agg(DISTINCT e.bucket) FILTER (WHERE NOT e.here) AS buckets FROM every AS e)
                            AS refused
                   LEFT JOIN (SELECT true AS present, q.* FROM ({}) AS q) AS r ON true",
                self.group, self.text
            )
        })
    }
}

impl WriteMany {
    /// A write of rows of `group`.
    pub const fn new(group: Group, text: &'static str) -> WriteMany {
        assert!(mentions(text, "owned"), "a fenced write of many selects FROM owned");
        assert!(mentions(text, "result AS ("), "the last CTE of a fenced write is named result");
        WriteMany { group, text, sql: OnceLock::new() }
    }

    pub(crate) fn sql(&self) -> &str {
        self.sql.get_or_init(|| {
            format!(
                "WITH every AS MATERIALIZED (
                     SELECT i.bucket, i.item, f.version_floor, get_bit(f.writable, i.bucket) = 1 AS here
                       FROM therev.fence AS f, unnest($1::smallint[], $2::jsonb[]) AS i (bucket, item)
                      WHERE f.colocation_group = '{}'),
                 owned AS (SELECT e.bucket, e.item, e.version_floor FROM every AS e WHERE e.here),
                 {}
                 SELECT refused.buckets AS refused, r.*
                   FROM (SELECT array_agg(DISTINCT e.bucket) FILTER (WHERE NOT e.here) AS buckets FROM every AS e)
                            AS refused
                   LEFT JOIN (SELECT true AS present, result.* FROM result) AS r ON true",
                self.group, self.text
            )
        })
    }
}

impl Unfenced {
    /// A read of machinery.
    pub const fn read(sql: &'static str) -> Unfenced {
        Unfenced { sql, writes: false }
    }

    /// A write of machinery: never of a row that a bucket owns.
    pub const fn write(sql: &'static str) -> Unfenced {
        Unfenced { sql, writes: true }
    }
}

const fn mentions(text: &str, word: &str) -> bool {
    let (text, word) = (text.as_bytes(), word.as_bytes());
    let mut at = 0;
    while at + word.len() <= text.len() {
        let mut same = 0;
        while same < word.len() && text[at + same] == word[same] {
            same += 1;
        }
        if same == word.len() {
            return true;
        }
        at += 1;
    }
    false
}
