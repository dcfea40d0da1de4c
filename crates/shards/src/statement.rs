//! The fenced statements: the only ways to run SQL on owned rows.
//!
//! Each constructor puts the fence around the text it is given, so that check and effect share one snapshot, and is a
//! `const fn` that does not compile where the text leaves out its half of the bargain. In all of them `$1` is the bucket
//! (or the buckets), and an answer without rows means *not here*.

use crate::pool::Errand;
use placement::Group;
use std::sync::OnceLock;

/// What a statement names its rows by; the fence goes by the same.
#[derive(Clone, Copy)]
pub(crate) enum By {
    /// The bucket in `$1`, of rows that are no user's.
    Bucket,
    /// The bucket in `$1` and the user in `$2`.
    Owner,
    /// The bucket in `$1` and an id: whose the row is shows in this column, once it is found. It may be of a user who is placed
    /// apart from the bucket.
    Id(&'static str),
}

impl By {
    /// The test that a row of `q` passes by the fence `f`, on the way of reads or of writes.
    fn passes(self, way: Way) -> String {
        let Way { may, bitmap, .. } = way;
        match self {
            By::Bucket => format!("get_bit(f.{bitmap}, $1::smallint) = 1"),
            By::Owner => format!("therev.{may}(f, $1::smallint, $2::uuid)"),
            By::Id(owner) => format!("therev.{may}(f, $1::smallint, q.{owner})"),
        }
    }
}

/// Reads and writes, as the fence tells them apart.
#[derive(Clone, Copy)]
struct Way {
    may: &'static str,
    bitmap: &'static str,
    users: &'static str,
    /// The states of users whose rows are not to be had here.
    not_here: &'static str,
}

const READS: Way =
    Way { may: "may_read", bitmap: "readable", users: "readers", not_here: "p.state IN ('moved', 'incoming')" };
const WRITES: Way = Way { may: "may_write", bitmap: "writable", users: "writers", not_here: "p.state <> 'owned'" };

/// What a shard says beside the row that an id names: whether it owns the bucket, whose rows it has apart from their buckets, and
/// who of this bucket is not to be had here (with the shard that has them, where that is decided).
fn said(group: Group, way: Way, fence: &str) -> String {
    let Way { bitmap, users, not_here, .. } = way;
    format!(
        "get_bit({fence}.{bitmap}, $1::smallint) = 1 AS is_home, {fence}.{users} AS here, {}",
        apart(group, fence, &format!("p.bucket = $1::smallint AND {not_here}"))
    )
}

/// Who is placed apart from the buckets that were asked for, and where, side by side; nothing is read where nobody is.
fn apart(group: Group, fence: &str, meant: &str) -> String {
    let column = |what| {
        format!(
            "CASE WHEN {fence}.pinned <> '{{}}' THEN ARRAY(
                 SELECT p.{what} FROM therev.pins AS p
                  WHERE p.colocation_group = '{group}' AND {meant}
                  ORDER BY p.user_id) END AS apart_{what}"
        )
    };
    format!("{}, {}", column("user_id"), column("peer"))
}

/// A read of one owner's rows. `$1` is the bucket.
///
/// The text is a plain `SELECT`. It is asked in its quick form first: rows passed the fence in their own snapshot. No row
/// may mean two things; the form with the verdict tells them apart: one row of nulls (`present` is null) when nothing was
/// found, none when the bucket is not here.
pub struct Read {
    pub(crate) group: Group,
    pub(crate) by: By,
    pub(crate) errand: Errand,
    text: &'static str,
    quick: OnceLock<String>,
    quick_apart: OnceLock<String>,
    sql: OnceLock<String>,
}

/// By the time that a row of the answer is made, whatever `result` rests on has been written.
const WROTE_NOTHING: &str = "pg_current_xact_id_if_assigned() IS NULL AS wrote_nothing";

/// A write of one owner's rows, in one statement. `$1` is the bucket.
///
/// The text is a list of CTEs of which the last is named `result`; the first write selects `FROM fence`, which holds one
/// row (with `version_floor`) when the bucket may be written and none otherwise. The answer is the rows of `result`, or
/// one row of nulls (`present` is null) when the bucket is owned and `result` is empty. It also says where nothing was written: what
/// was there already is acknowledged only once it is as safe as a write is.
pub struct Write {
    pub(crate) group: Group,
    pub(crate) by: By,
    text: &'static str,
    sql: OnceLock<String>,
}

/// A read of many owners' rows on one shard. `$1` are buckets, `$2` keys and `$3` users (null: whoever's of the bucket), side by
/// side.
///
/// The text is a `SELECT` from `asked (bucket, key)`, which holds what this shard may read of these. Where its keys are ids, it
/// reads rows of users with `therev.may_read(f, bucket, owner)` from the group's table of the fence. The answer also says which were refused
/// (by their place in the lists), and who of the buckets is to be had elsewhere.
pub struct ReadMany {
    pub(crate) group: Group,
    text: &'static str,
    sql: OnceLock<String>,
}

/// A read of the rows of whole buckets on one shard, however many. `$1` are the buckets as bits ([`BucketSet`]), `$2` users placed
/// apart from their buckets who are asked for by name.
///
/// The text is a `SELECT` of rows whose bucket is in `$1::varbit`, or whose owner is in `$2::uuid[]`, and which pass
/// `therev.may_read(f, bucket, owner)` by the group's table of the fence, `f`. The answer also says which buckets and users were refused, and who
/// of the buckets is to be had elsewhere. Nothing in it costs by the bucket.
///
/// [`BucketSet`]: crate::BucketSet
pub struct ReadBuckets {
    pub(crate) group: Group,
    text: &'static str,
    sql: OnceLock<String>,
}

/// A write of many owners' rows on one shard, each checked by itself. `$1` are buckets, `$2` JSON items and `$3` users (null: the
/// row is no user's), side by side.
///
/// The text is a list of CTEs of which the last is named `result`; they read `owned (bucket, item, version_floor)`, the
/// items that this shard may write. The answer also says which were refused, by their place in the lists.
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
    ReadBuckets(&'static ReadBuckets),
    WriteMany(&'static WriteMany),
}

impl AnyFenced {
    pub fn sql(&self) -> &str {
        match self {
            AnyFenced::Read(statement) => statement.sql(),
            AnyFenced::Write(statement) => statement.sql(),
            AnyFenced::ReadMany(statement) => statement.sql(),
            AnyFenced::ReadBuckets(statement) => statement.sql(),
            AnyFenced::WriteMany(statement) => statement.sql(),
        }
    }

    /// The forms in which it is asked first, where those are others: where nobody is placed apart, and where somebody is.
    pub fn quick(&self) -> Option<[&str; 2]> {
        match self {
            AnyFenced::Read(statement) => Some([true, false].map(|is_whole| statement.quick(is_whole))),
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
            AnyFenced::ReadMany(_) | AnyFenced::ReadBuckets(_) | AnyFenced::WriteMany(_) => None,
        }
    }

    /// Whether it finds a row by an id that names only the bucket: its refusal is one row that says so.
    pub fn is_by_id(&self) -> bool {
        matches!(self, AnyFenced::Read(Read { by: By::Id(_), .. }) | AnyFenced::Write(Write { by: By::Id(_), .. }))
    }

    /// Whether its rows are no user's, and never placed apart from their bucket.
    pub fn is_of_buckets(&self) -> bool {
        matches!(self, AnyFenced::Read(Read { by: By::Bucket, .. }) | AnyFenced::Write(Write { by: By::Bucket, .. }))
    }

    /// Whether its answer names the refused by their places in the lists.
    pub fn asks_many(&self) -> bool {
        matches!(self, AnyFenced::ReadMany(_) | AnyFenced::WriteMany(_))
    }

    /// Whether its answer names the refused buckets as bits; else an answer without rows is the refusal.
    pub fn asks_buckets(&self) -> bool {
        matches!(self, AnyFenced::ReadBuckets(_))
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

any_fenced! { Read Write ReadMany ReadBuckets WriteMany }

/// A statement on machinery that no bucket owns (the outbox's queue, a version), or that only counts.
pub struct Unfenced {
    pub(crate) sql: &'static str,
    pub(crate) writes: bool,
}

impl Read {
    /// A read of rows of `group` that are no user's.
    pub const fn new(group: Group, text: &'static str) -> Read {
        assert!(mentions(text, "$1"), "a fenced read names its bucket as $1");
        Read {
            group,
            by: By::Bucket,
            errand: Errand::ReadByKey,
            text,
            quick: OnceLock::new(),
            quick_apart: OnceLock::new(),
            sql: OnceLock::new(),
        }
    }

    /// The same of a user's rows; `$2` is the user's id.
    pub const fn of_owner(group: Group, text: &'static str) -> Read {
        assert!(mentions(text, "$2"), "what names its owner names it as $2");
        let mut statement = Read::new(group, text);
        statement.by = By::Owner;
        statement
    }

    /// The same of a user's rows, by an id that names only the bucket; the text's column `owner` says whose they are.
    pub const fn by_id(group: Group, owner: &'static str, text: &'static str) -> Read {
        let mut statement = Read::new(group, text);
        statement.by = By::Id(owner);
        statement
    }

    /// The same where very many rows may be read: not on a connection on which others wait for one or two.
    #[must_use]
    pub const fn long(mut self) -> Read {
        self.errand = Errand::Read;
        self
    }

    /// Without the verdict: a plain join, which costs 2–3 % of a point read less.
    ///
    /// Where nobody of the bucket is placed apart, as far as the caller knows, it asks only whether the shard reads the bucket with
    /// everybody of it, which costs 4 % less again. Where that is not so, no row passes, and the verdict tells.
    /// As everywhere the group is named for the planner's sake: it takes the key where many versions of the one row lie about.
    pub(crate) fn quick(&self, is_whole: bool) -> &str {
        let Read { group, text, .. } = self;
        if is_whole && !matches!(self.by, By::Bucket) {
            self.quick.get_or_init(|| {
                format!(
                    "SELECT q.*
                       FROM therev.fence_{group} AS f
                      CROSS JOIN ({text}) AS q
                      WHERE f.colocation_group = '{group}' AND get_bit(f.whole, $1::smallint) <> 0"
                )
            })
        } else {
            self.quick_apart.get_or_init(|| {
                format!(
                    "SELECT q.*
                       FROM therev.fence_{group} AS f
                      CROSS JOIN ({text}) AS q
                      WHERE f.colocation_group = '{group}' AND {}",
                    self.by.passes(READS)
                )
            })
        }
    }

    pub(crate) fn sql(&self) -> &str {
        let Read { group, by, text, .. } = self;
        let passes = by.passes(READS);
        self.sql.get_or_init(|| match by {
            By::Id(_) => format!(
                "SELECT r.*, {}
                   FROM therev.fence_{group} AS f
                   LEFT JOIN LATERAL (SELECT true AS present, q.* FROM ({text}) AS q WHERE {passes}) AS r ON true
                  WHERE f.colocation_group = '{group}'",
                said(*group, READS, "f")
            ),
            By::Bucket | By::Owner => format!(
                "SELECT r.*
                   FROM therev.fence_{group} AS f
                   LEFT JOIN LATERAL (SELECT true AS present, q.* FROM ({text}) AS q) AS r ON true
                  WHERE f.colocation_group = '{group}' AND {passes}"
            ),
        })
    }
}

impl Write {
    /// A write of rows of `group` that are no user's.
    pub const fn new(group: Group, text: &'static str) -> Write {
        assert!(mentions(text, "fence"), "a fenced write selects FROM fence");
        assert!(mentions(text, "result AS ("), "the last CTE of a fenced write is named result");
        Write { group, by: By::Bucket, text, sql: OnceLock::new() }
    }

    /// The same of a user's rows; `$2` is the user's id.
    pub const fn of_owner(group: Group, text: &'static str) -> Write {
        assert!(mentions(text, "$2"), "what names its owner names it as $2");
        let mut statement = Write::new(group, text);
        statement.by = By::Owner;
        statement
    }

    /// The same of a user's rows, by an id that names only the bucket: the first write asks of each row
    /// `therev.may_write(fence.here, bucket, owner)`.
    pub const fn by_id(group: Group, text: &'static str) -> Write {
        assert!(mentions(text, "therev.may_write(fence.here, "), "a row that an id names is tested by its owner");
        let mut statement = Write::new(group, text);
        statement.by = By::Id("");
        statement
    }

    pub(crate) fn sql(&self) -> &str {
        let Write { group, by, text, .. } = self;
        self.sql.get_or_init(|| match by {
            By::Id(_) => format!(
                "WITH fence AS MATERIALIZED (
                     SELECT f.version_floor, f AS here FROM therev.fence_{group} AS f
                      WHERE f.colocation_group = '{group}'),
                 {text}
                 SELECT r.*, {WROTE_NOTHING}, {}
                   FROM fence LEFT JOIN (SELECT true AS present, result.* FROM result) AS r ON true",
                said(*group, WRITES, "(fence.here)")
            ),
            By::Bucket | By::Owner => format!(
                "WITH fence AS MATERIALIZED (
                     SELECT f.version_floor FROM therev.fence_{group} AS f
                      WHERE f.colocation_group = '{group}' AND {}),
                 {text}
                 SELECT r.*, {WROTE_NOTHING}
                   FROM fence LEFT JOIN (SELECT true AS present, result.* FROM result) AS r ON true",
                by.passes(WRITES)
            ),
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
                     SELECT k.bucket, k.key, k.owner, k.at,
                            CASE WHEN k.owner IS NULL THEN get_bit(f.readable, k.bucket) = 1
                                 ELSE therev.may_read(f, k.bucket, k.owner) END AS here
                       FROM therev.fence_{group} AS f,
                            unnest($1::smallint[], $2::uuid[], $3::uuid[]) WITH ORDINALITY AS k (bucket, key, owner, at)
                      WHERE f.colocation_group = '{group}'),
                 asked AS (SELECT DISTINCT e.bucket, e.key FROM every AS e WHERE e.here),
                 apart AS (
                     SELECT p.user_id, p.peer FROM therev.pins AS p
                      WHERE p.colocation_group = '{group}' AND p.state IN ('moved', 'incoming')
                        AND (SELECT f.pinned <> '{{}}' FROM therev.fence_{group} AS f)
                        AND EXISTS (SELECT FROM every AS e WHERE e.here AND e.owner IS NULL AND e.bucket = p.bucket))
                 SELECT (SELECT array_agg(e.at) FROM every AS e WHERE NOT e.here) AS refused, told.*, r.*
                   FROM (SELECT array_agg(a.user_id) AS apart_user_id, array_agg(a.peer) AS apart_peer
                           FROM apart AS a) AS told
                   LEFT JOIN (SELECT true AS present, q.* FROM ({text}) AS q) AS r ON true",
                group = self.group,
                text = self.text
            )
        })
    }
}

impl ReadBuckets {
    /// A read of rows of `group`.
    pub const fn new(group: Group, text: &'static str) -> ReadBuckets {
        assert!(mentions(text, "$1::varbit"), "a fenced read of buckets names them as $1");
        assert!(mentions(text, "$2::uuid[]"), "a fenced read of buckets names users placed apart as $2");
        assert!(mentions(text, "therev.may_read(f, "), "each row is tested by its owner");
        ReadBuckets { group, text, sql: OnceLock::new() }
    }

    pub(crate) fn sql(&self) -> &str {
        self.sql.get_or_init(|| {
            let group = &self.group;
            let meant = format!("get_bit($1::varbit & f.readable, p.bucket) = 1 AND {}", READS.not_here);
            format!(
                "WITH said AS MATERIALIZED (
                     SELECT nullif($1::varbit & ~f.readable, 0::bit(4096)) AS refused_buckets,
                            (SELECT array_agg(k.owner) FROM unnest($2::uuid[]) AS k (owner)
                              WHERE NOT therev.may_read(f, therev.bucket_of(k.owner), k.owner)) AS refused_users,
                            {}
                       FROM therev.fence_{group} AS f WHERE f.colocation_group = '{group}')
                 SELECT said.*, r.*
                   FROM said LEFT JOIN (SELECT true AS present, q.* FROM ({}) AS q) AS r ON true",
                apart(*group, "f", &meant),
                self.text
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
                     SELECT i.bucket, i.item, f.version_floor, i.at,
                            CASE WHEN i.owner IS NULL THEN get_bit(f.writable, i.bucket) = 1
                                 ELSE therev.may_write(f, i.bucket, i.owner) END AS here
                       FROM therev.fence_{group} AS f,
                            unnest($1::smallint[], $2::jsonb[], $3::uuid[]) WITH ORDINALITY AS i (bucket, item, owner, at)
                      WHERE f.colocation_group = '{group}'),
                 owned AS (SELECT e.bucket, e.item, e.version_floor FROM every AS e WHERE e.here),
                 {}
                 SELECT said.*, r.*
                   FROM (SELECT array_agg(e.at) FILTER (WHERE NOT e.here) AS refused FROM every AS e) AS said
                   LEFT JOIN (SELECT true AS present, result.* FROM result) AS r ON true",
                self.text,
                group = self.group
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
