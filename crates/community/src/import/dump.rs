//! Reads the XML files of a Stack Exchange data dump as streams.
//!
//! A dump holds one file per table, `<users><row Id="1" … /> … </users>`, of any size: a row is read, handed
//! over and forgotten, so memory does not grow with the file. What a row means is up to its typed form:
//! [`UserRow`], [`PostRow`], [`CommentRow`] and [`VoteRow`] take the attributes they know and keep all others.
//!
//! The reader is strict where it matters: whatever is not well-formed XML, not UTF-8 or not for PostgreSQL
//! (NUL) is a [`DumpError`] at its line. One thing it lets pass: a reference to a control character
//! (`&#x1F;`), which XML 1.0 forbids and the writer of the dumps nevertheless makes.
//!
//! It is lenient with what a sound row says: dumps of other years lack attributes and have others. Only what a row
//! cannot be written without makes it [`Unusable`], and the rows after it are read all the same.

mod markup;
mod rows;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use chrono::{DateTime, Datelike, NaiveDateTime, Utc};
use markup::{Markup, Place, Step, newlines};
use quick_xml::Reader;
use quick_xml::encoding::EncodingError;
use quick_xml::errors::{IllFormedError, SyntaxError};
use quick_xml::escape::EscapeError;
use quick_xml::events::attributes::AttrError;
use serde_json::{Map, Value};

pub use rows::{CommentRow, PostKind, PostRow, Unusable, UserRow, VoteRow};

/// The most bytes that a row may have in the file; what is longer is no row but a mistake or an attack.
pub const ROW_BYTES_MAX: usize = 64 << 20;

/// What one read of the file brings at most.
const READ_BYTES: usize = 128 << 10;

/// What the row buffer may keep from one row to the next.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    /// The file.
    pub path: Arc<Path>,
    /// The line, from 1.
    pub line: u64,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}, line {}", self.path.display(), self.line)
    }
}

/// Why a dump could not be read further, and where.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The file is missing, may not be read, or could not be read to its end.
    #[error("{}: cannot be read", path.display())]
    Io {
        /// The file.
        path: Arc<Path>,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// Some bytes are not UTF-8.
    #[error("{0}: not UTF-8")]
    Utf8(At),
    /// The file declares another encoding than UTF-8.
    #[error("{0}: declares the encoding {1:?}; only UTF-8 can be read")]
    Encoding(At, String),
    /// A NUL character, raw or as a reference.
    #[error("{0}: a NUL character, which PostgreSQL cannot store")]
    Nul(At),
    /// Not XML, or cut off.
    #[error("{0}: not well-formed XML")]
    NotWellFormed(At, #[source] Fault),
    /// A document type, which may name files and addresses.
    #[error("{0}: a DOCTYPE is refused; nothing that it names was fetched")]
    Doctype(At),
    /// An entity other than the five of XML.
    #[error("{0}: unknown entity \"&{1};\"")]
    Entity(At, String),
    /// One attribute twice in the same row.
    #[error("{0}: attribute {1} twice in one row")]
    DuplicateAttribute(At, String),
    /// More than [`ROW_BYTES_MAX`] without an end.
    #[error("{0}: a row of more than {max} MiB", max = ROW_BYTES_MAX >> 20)]
    TooLong(At),
    /// XML, but of another table or program.
    #[error("{at}: starts with <{found}> where <{expected}> belongs")]
    WrongRoot {
        /// Where.
        at: At,
        /// The root of this table's dump.
        expected: &'static str,
        /// The root that is there.
        found: String,
    },
    /// Well-formed, but nothing that a dump has at this place.
    #[error("{0}: unexpected {1}")]
    Unexpected(At, String),
    /// The reader was asked for more after it had failed; what it would say now is worth nothing.
    #[error("{}: reading stopped at an earlier error", .0.display())]
    Stopped(Arc<Path>),
}

/// The rule of XML that a file breaks.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Markup without an end.
    #[error(transparent)]
    Syntax(SyntaxError),
    /// Tags that do not match, and the like.
    #[error(transparent)]
    IllFormed(IllFormedError),
    /// An attribute not written as `name="value"`.
    #[error(transparent)]
    Attribute(AttrError),
    /// A broken reference in an attribute.
    #[error(transparent)]
    Reference(EscapeError),
    /// Anything else that the parser finds.
    #[error(transparent)]
    Parser(quick_xml::Error),
    /// A rule that the parser does not check.
    #[error("{0}")]
    Rule(&'static str),
}

impl From<quick_xml::Error> for Fault {
    fn from(error: quick_xml::Error) -> Self {
        match error {
            quick_xml::Error::Syntax(inner) => Self::Syntax(inner),
            quick_xml::Error::IllFormed(inner) => Self::IllFormed(inner),
            quick_xml::Error::InvalidAttr(inner) => Self::Attribute(inner),
            quick_xml::Error::Escape(inner) => Self::Reference(inner),
            other => Self::Parser(other),
        }
    }
}

/// The rows of one file, in their order.
pub struct Rows<R: BufRead> {
    xml: Reader<Counted<R>>,
    buffer: Vec<u8>,
    path: Arc<Path>,
    root: &'static str,
    place: Place,
    /// A row written as `<row …></row>`, until its end tag.
    open: Option<Row>,
}

/// One `<row … />`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The line on which it starts, from 1.
    pub line: u64,
    /// Names and values in their order, references resolved.
    pub attributes: Vec<(String, String)>,
}

impl Rows<BufReader<File>> {
    /// Opens one file of a dump, whose root element must be `root` (`users`, `posts`, …).
    pub fn open(path: &Path, root: &'static str) -> Result<Self, DumpError> {
        let file = File::open(path).map_err(|error| DumpError::Io { path: path.into(), source: Arc::new(error) })?;
        Ok(Self::new(BufReader::with_capacity(READ_BYTES, file), path, root))
    }
}

impl<R: BufRead> Rows<R> {
    /// Reads from anything; errors name `path`.
    pub fn new(reader: R, path: &Path, root: &'static str) -> Self {
        let mut xml = Reader::from_reader(Counted::new(reader, ROW_BYTES_MAX));
        xml.config_mut().enable_all_checks(true);
        Self { xml, buffer: Vec::new(), path: path.into(), root, place: Place::Start, open: None }
    }

    /// The next row; `None` once the file has ended as it should. After an error there are no more rows, and
    /// asking again is an error too, so nobody mistakes a broken file for a short one.
    #[allow(clippy::should_implement_trait, reason = "an error ends the rows, which an Iterator does not promise")]
    pub fn next(&mut self) -> Result<Option<Row>, DumpError> {
        let row = self.advance();
        if row.is_err() {
            self.place = Place::Failed;
        }
        row
    }

    fn advance(&mut self) -> Result<Option<Row>, DumpError> {
        loop {
            match self.place {
                Place::End => return Ok(None),
                Place::Failed => return Err(DumpError::Stopped(Arc::clone(&self.path))),
                _ => {}
            }
            self.buffer.clear();
            self.buffer.shrink_to(KEPT_BYTES_MAX);
            let line = self.xml.get_mut().start_markup();
            let event = match self.xml.read_event_into(&mut self.buffer) {
                Ok(event) => event,
                Err(error) => return Err(self.explain(line, error)),
            };
            let open = self.open.is_some();
            let markup = Markup { path: &self.path, line, root: self.root, place: self.place, open, text: &event };
            match markup.read(&event)? {
                Step::To(place) => self.place = place,
                Step::Opens(row) => self.open = Some(row),
                Step::Row(row) => return Ok(Some(row)),
                Step::Closes => match self.open.take() {
                    Some(row) => return Ok(Some(row)),
                    None => self.place = Place::AfterRoot,
                },
            }
        }
    }

    /// What the parser's error means, for markup that starts at `line`.
    fn explain(&self, line: u64, error: quick_xml::Error) -> DumpError {
        let path = Arc::clone(&self.path);
        if self.xml.get_ref().exhausted {
            return DumpError::TooLong(At { path, line });
        }
        match error {
            quick_xml::Error::Io(source) => DumpError::Io { path, source },
            quick_xml::Error::Encoding(EncodingError::Utf8(error)) => {
                let sound = self.buffer.get(..error.valid_up_to()).unwrap_or_default();
                DumpError::Utf8(At { path, line: line + newlines(sound) })
            }
            quick_xml::Error::Syntax(SyntaxError::UnclosedDoctype)
            | quick_xml::Error::IllFormed(IllFormedError::MissingDoctypeName) => DumpError::Doctype(At { path, line }),
            other => DumpError::NotWellFormed(At { path, line }, other.into()),
        }
    }
}

/// Counts lines as they are consumed, and ends markup that has no end.
struct Counted<R> {
    inner: R,
    /// The line of the next byte, from 1.
    line: u64,
    /// How many bytes one piece of markup may take, and how many of them are left.
    limit: usize,
    left: usize,
    exhausted: bool,
}

impl<R: BufRead> Counted<R> {
    fn new(inner: R, limit: usize) -> Self {
        Self { inner, line: 1, limit, left: limit, exhausted: false }
    }

    /// A new piece of markup starts here; its line.
    fn start_markup(&mut self) -> u64 {
        self.left = self.limit;
        self.line
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let available = self.inner.fill_buf()?;
        if self.left == 0 && !available.is_empty() {
            self.exhausted = true;
            return Err(io::Error::other("markup without an end"));
        }
        Ok(available.get(..self.left).unwrap_or(available))
    }

    fn consume(&mut self, amount: usize) {
        if amount == 0 {
            return;
        }
        // Not read again: what was filled and not consumed is still there.
        if let Ok(available) = self.inner.fill_buf() {
            self.line += newlines(available.get(..amount).unwrap_or(available));
        }
        self.left = self.left.saturating_sub(amount);
        self.inner.consume(amount);
    }
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let amount = self.fill_buf()?.read(into)?;
        self.consume(amount);
        Ok(amount)
    }
}

impl Row {
    /// An attribute's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Takes an attribute's value out of the row.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let index = self.attributes.iter().position(|(known, _)| known == name)?;
        Some(self.attributes.remove(index).1)
    }

    fn number<T: FromStr>(&mut self, attribute: &'static str) -> Result<Option<T>, Unusable> {
        let Some(value) = self.take(attribute) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| Unusable::Unreadable(attribute))
    }

    /// A number that the row means nothing without.
    fn needed<T: FromStr>(&mut self, attribute: &'static str) -> Result<T, Unusable> {
        self.number(attribute)?.ok_or(Unusable::Missing(attribute))
    }

    /// Who or what the row refers to, where it makes sense without. One that cannot be read stays in the row as it is.
    fn reference(&mut self, attribute: &str) -> Option<i64> {
        let id = self.get(attribute)?.parse().ok()?;
        self.take(attribute);
        Some(id)
    }

    /// 0 where there is none. One that cannot be read is not taken for 0: a wrong score looks like a right one.
    fn score(&mut self) -> Result<i32, Unusable> {
        Ok(self.number("Score")?.unwrap_or(0))
    }

    fn created_at(&mut self) -> Result<DateTime<Utc>, Unusable> {
        let attribute = "CreationDate";
        let value = self.take(attribute).ok_or(Unusable::Missing(attribute))?;
        time(&value).ok_or(Unusable::Unreadable(attribute))
    }

    /// All attributes that are left, under their own names.
    fn rest(self) -> Map<String, Value> {
        self.attributes.into_iter().map(|(name, value)| (name, Value::String(value))).collect()
    }
}

/// A time of the dump, which is UTC and does not say so; with or without a fraction of a second.
fn time(value: &str) -> Option<DateTime<Utc>> {
    let time = value.strip_suffix('Z').unwrap_or(value).parse::<NaiveDateTime>().ok()?;
    (1970..10_000).contains(&time.year()).then(|| time.and_utc())
}

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;

    fn rows(xml: &[u8]) -> Rows<&[u8]> {
        Rows::new(xml, Path::new("Users.xml"), "users")
    }

    /// All rows up to the end or the error.
    fn all<R: BufRead>(mut rows: Rows<R>) -> (Vec<Row>, Option<DumpError>) {
        let mut read = Vec::new();
        loop {
            match rows.next() {
                Ok(Some(row)) => read.push(row),
                Ok(None) => return (read, None),
                Err(error) => return (read, Some(error)),
            }
        }
    }

    fn one(attributes: &str) -> Row {
        rows(format!("<users>\n<row {attributes}/></users>").as_bytes()).next().unwrap().unwrap()
    }

    /// The error and its source as one line, as the command prints them.
    fn said(error: &DumpError) -> String {
        error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
    }

    fn error(xml: impl AsRef<[u8]>) -> String {
        said(&all(rows(xml.as_ref())).1.unwrap())
    }

    #[test]
    fn a_dump_as_it_comes() {
        let xml = "\u{FEFF}<?xml version=\"1.0\" encoding=\"utf-8\"?>\r\n<users>\r\n  <row Id=\"-1\" DisplayName=\"Community\" />\r\n\
                   <!-- two\r\nlines --><?pi?>\r\n  <row Id='2' New=\"x &#xA;&#10;y\" AboutMe=\"&lt;p&gt;&amp;&quot;&apos;é&#x1F600;\"></row>\r\n</users>\r\n";
        let (read, error) = all(rows(xml.as_bytes()));
        assert!(error.is_none(), "{error:?}");
        assert_eq!(read.iter().map(|row| row.line).collect::<Vec<_>>(), [3, 6]);
        assert_eq!(read[0].get("DisplayName"), Some("Community"));
        assert_eq!(read[0].get("AboutMe"), None);
        assert_eq!(read[1].get("New"), Some("x \n\ny"));
        assert_eq!(read[1].get("AboutMe"), Some("<p>&\"'é😀"));
        assert_eq!(all(rows(b"<users/>")).0, []);
        assert_eq!(all(rows(b"<users x='1'></users >\n<!-- end -->")).0, []);
    }

    #[test]
    fn a_line_break_inside_a_value_is_a_blank() {
        let row = one("A=\"x\r\ny\tz\" B=\"&#x1F;\"");
        assert_eq!(row.get("A"), Some("x y z"));
        assert_eq!(row.get("B"), Some("\u{1f}"));
    }

    #[test]
    fn taking_leaves_the_others_in_order() {
        let mut row = one("A='1' B='2' C='3'");
        assert_eq!(row.take("B").as_deref(), Some("2"));
        assert_eq!(row.take("B"), None);
        assert_eq!(row.attributes, [("A".to_owned(), "1".to_owned()), ("C".to_owned(), "3".to_owned())]);
    }

    #[test]
    fn what_is_not_well_formed_is_named_with_its_line() {
        for (xml, said) in [
            ("", "Users.xml, line 1: not well-formed XML: the file ends before its first element"),
            ("<users>\n<row Id=\"1\"/>\n", "line 3: not well-formed XML: start tag not closed: `</users>`"),
            ("<users>\n<row Id=\"1\">\n", "line 3: not well-formed XML: start tag not closed: `</row>`"),
            ("<users>\n<row Id=\"1\"/>\n<row Id=\"2\" Na", "line 3: not well-formed XML: tag not closed"),
            ("<users>\n<row Id=\"1\"/>\n<row Id=\"2", "line 3: not well-formed XML: attribute value not closed"),
            ("<users>\n\n</user>", "line 3: not well-formed XML: expected `</users>`, but `</user>`"),
            ("<users>\n<row>\n</users>", "line 3: not well-formed XML: expected `</row>`"),
            ("<users/>\n<users/>", "line 2: not well-formed XML: a second root element"),
            ("<users/>\n x", "line 2: not well-formed XML: text outside"),
            ("x<users/>", "line 1: not well-formed XML: text outside"),
            ("<users>\n<row A='1'\nB='2'C='3'/>", "line 3: not well-formed XML: no blank"),
            ("<users>\n<row A='1'\nB=2/>", "line 3: not well-formed XML: position"),
            ("<users>\n<row A/>", "line 2: not well-formed XML: position"),
            ("<users>\n<row 1='2'/>", "line 2: not well-formed XML: an attribute name"),
            ("<users>\n<row A='\n<'/>", "line 3: not well-formed XML: \"<\" in an attribute value"),
            ("<users>\n<row A='x & y'/>", "line 2: not well-formed XML: \"&\" without"),
            ("<users>\n<row A='&#xD800;'/>", "line 2: not well-formed XML: invalid character reference"),
            ("<users>\n<row A='&#;'/>", "line 2: not well-formed XML: invalid character reference"),
            ("<users>\n<row A='\u{1}'/>", "line 2: not well-formed XML: a control character"),
            ("<users>\n<row A='\u{FFFF}'/>", "line 2: not well-formed XML: a code point that is no character"),
            ("<users>\n<!-- a -- b --></users>", "line 2: not well-formed XML: forbidden string"),
            ("<users>\n<!-- a", "line 2: not well-formed XML: comment not closed"),
            ("\n<?xml version='1.0'?><users/>", "line 2: not well-formed XML: an XML declaration after"),
            ("<?xml version='1.1'?><users/>", "line 1: not well-formed XML: only version 1.0"),
            ("<users>\n&", "line 2: not well-formed XML: entity or character reference not closed"),
        ] {
            let found = error(xml);
            assert!(found.contains(said), "{xml:?}: {found}");
        }
    }

    #[test]
    fn what_is_refused_is_named_with_its_line() {
        let nul = "a NUL character, which PostgreSQL cannot store";
        for (xml, said) in [
            (&b"<users>\n<row A='x\n\xff'/>"[..], "Users.xml, line 3: not UTF-8".to_owned()),
            (b"\xff\xfe<\0u\0", "line 1: not UTF-8".to_owned()),
            (b"<users>\n<!--\n\xc3--></users>", "line 3: not UTF-8".to_owned()),
            (b"<users>\n<row A='\n\0'/>", format!("line 3: {nul}")),
            (b"<users>\n\0</users>", format!("line 2: {nul}")),
            (b"<users>\n<row A='&#10;\n&#0;'/>", format!("line 3: {nul}")),
            (b"<users>\n<row A='&#x000;'/>", format!("line 2: {nul}")),
            (b"<!DOCTYPE users SYSTEM \"http://localhost/x.dtd\"><users/>", "line 1: a DOCTYPE is refused".to_owned()),
            (b"\n<!DOCTYPE users [<!ENTITY x SYSTEM \"file:///etc/passwd\">", "line 2: a DOCTYPE".to_owned()),
            (b"\n<!doctype users>", "line 2: a DOCTYPE".to_owned()),
            (b"<users>\n<row A='\n&nbsp;'/>", "line 3: unknown entity \"&nbsp;\"".to_owned()),
            (b"<users>\n&x;</users>", "line 2: unknown entity \"&x;\"".to_owned()),
            (b"<users>\n&lt;</users>", "line 2: unexpected \"&lt;\"".to_owned()),
            (b"<users>\n<row A='1'\nA='2'/>", "line 3: attribute A twice in one row".to_owned()),
            (b"<?xml version='1.0' encoding='windows-1252'?><users/>", "line 1: declares the encoding".to_owned()),
            (b"\n<posts/>", "line 2: starts with <posts> where <users> belongs".to_owned()),
            (b"<users>\n<user/>", "line 2: unexpected <user> between the rows".to_owned()),
            (b"<users>\n<row><row/>", "line 2: unexpected <row> inside a row".to_owned()),
            (b"<users>\n\nx", "line 3: unexpected text between the rows".to_owned()),
            (b"<users>\n<![CDATA[x]]>", "line 2: unexpected CDATA".to_owned()),
        ] {
            let found = error(xml);
            assert!(found.contains(&said), "{:?}: {found}", String::from_utf8_lossy(xml));
        }
    }

    #[test]
    fn rows_before_an_error_are_read_and_none_after_it() {
        let mut rows = rows(b"<users><row Id='1'/>\n<row Id='2' Id='3'/><row Id='4'/></users>");
        assert_eq!(rows.next().unwrap().unwrap().get("Id"), Some("1"));
        assert!(matches!(rows.next(), Err(DumpError::DuplicateAttribute(at, _)) if at.line == 2));
        assert!(matches!(rows.next(), Err(DumpError::Stopped(_))));
    }

    #[test]
    fn a_row_without_an_end_is_refused() {
        let xml = format!("<users>\n<row A='{}'/>\n<row A='{}'/></users>", "x".repeat(80), "y".repeat(100));
        let mut rows = rows(xml.as_bytes());
        rows.xml.get_mut().limit = 100;
        let (read, error) = all(rows);
        assert_eq!(read.len(), 1);
        assert!(matches!(error, Some(DumpError::TooLong(ref at)) if at.line == 3), "{error:?}");
    }

    #[test]
    fn a_missing_file_says_its_path() {
        let error = Rows::open(Path::new("/nowhere/Users.xml"), "users").err().unwrap();
        assert!(matches!(&error, DumpError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "/nowhere/Users.xml: cannot be read");
    }

    #[test]
    fn a_folder_in_place_of_a_file_is_an_error() {
        let error = Rows::open(Path::new("/"), "users").and_then(|mut rows| rows.next()).err().unwrap();
        assert!(matches!(error, DumpError::Io { .. }), "{error}");
    }

    #[test]
    fn typed_rows_keep_what_they_do_not_know() {
        let user = UserRow::try_from(one("Id='-1' DisplayName='Ada' CreationDate='2018-03-09T18:48:09.477' Views='3'"));
        let user = user.unwrap();
        assert_eq!((user.id, user.display_name.as_deref(), user.about), (-1, Some("Ada"), None));
        assert_eq!(user.created_at.to_rfc3339(), "2018-03-09T18:48:09.477+00:00");
        assert_eq!(Value::Object(user.rest), serde_json::json!({ "Views": "3" }));

        let post = one("Id='4' PostTypeId='2' ParentId='3' CreationDate='2018-03-09T18:48:09' Score='-7' Body='b' \
             OwnerDisplayName='gone'");
        let post = PostRow::try_from(post).unwrap();
        assert_eq!((post.id, post.kind, post.parent, post.score), (4, PostKind::Answer, Some(3), -7));
        assert_eq!((post.owner, post.owner_name.as_deref(), post.title), (None, Some("gone"), None));
        assert_eq!(post.created_at.to_rfc3339(), "2018-03-09T18:48:09+00:00");
        assert!(post.rest.is_empty());

        let comment =
            CommentRow::try_from(one("Id='1' PostId='2' Text='t' CreationDate='2018-03-09T18:48:09' UserId='5'"));
        let comment = comment.unwrap();
        assert_eq!((comment.post, comment.user, comment.score, comment.text.as_deref()), (2, Some(5), 0, Some("t")));

        let vote = VoteRow::try_from(one("Id='1' PostId='2' VoteTypeId='3' CreationDate='x'")).unwrap();
        assert_eq!(vote, VoteRow { post: 2, vote_type: 3 });
        assert_eq!(PostKind::from(5), PostKind::Other(5));
    }

    #[test]
    fn an_unusable_row_says_which_attribute_it_lacks_or_cannot_be_read() {
        let time = "CreationDate='2018-03-09T18:48:09'";
        let user = |attributes: &str| UserRow::try_from(one(attributes)).unwrap_err().to_string();
        assert_eq!(user(time), "no Id");
        assert_eq!(user("Id='1' DisplayName='Ada'"), "no CreationDate");

        let post = |attributes: &str| PostRow::try_from(one(attributes)).unwrap_err().to_string();
        assert_eq!(post("PostTypeId='1'"), "no Id");
        assert_eq!(post("Id='1x'"), "unreadable Id");
        assert_eq!(post("Id='99999999999999999999'"), "unreadable Id");
        assert_eq!(post(&format!("Id='1' {time}")), "no PostTypeId");
        assert_eq!(post(&format!("Id='1' PostTypeId='70000' {time}")), "unreadable PostTypeId");
        assert_eq!(post("Id='1' PostTypeId='1'"), "no CreationDate");
        assert_eq!(post(&format!("Id='1' PostTypeId='1' {time} Score='3000000000'")), "unreadable Score");
        assert_eq!(post(&format!("Id='1' PostTypeId='2' {time}")), "no ParentId");
        assert_eq!(post(&format!("Id='1' PostTypeId='2' ParentId='x' {time}")), "unreadable ParentId");
        for time in ["2018-02-30T00:00:00", "2018-03-12", "1969-12-31T23:59:59", "12018-01-01T00:00:00", ""] {
            assert_eq!(post(&format!("Id='1' PostTypeId='1' CreationDate='{time}'")), "unreadable CreationDate");
        }

        let comment = |attributes: &str| CommentRow::try_from(one(attributes)).unwrap_err().to_string();
        assert_eq!(comment(&format!("Id='1' Text='t' {time}")), "no PostId");
        assert_eq!(comment(&format!("Id='1' PostId='' Text='t' {time}")), "unreadable PostId");

        let vote = |attributes: &str| VoteRow::try_from(one(attributes)).unwrap_err().to_string();
        assert_eq!(vote("Id='1' VoteTypeId='2'"), "no PostId");
        assert_eq!(vote("Id='1' PostId='2'"), "no VoteTypeId");
        assert_eq!(vote("Id='1' PostId='2' VoteTypeId='up'"), "unreadable VoteTypeId");
    }

    #[test]
    fn what_a_row_makes_sense_without_does_not_lose_it() {
        let time = "CreationDate='2018-03-09T18:48:09'";
        let question = PostRow::try_from(one(&format!("Id='1' PostTypeId='1' {time} OwnerUserId='' ParentId='x'")));
        let question = question.unwrap();
        assert_eq!((question.owner, question.parent, question.score), (None, None, 0));
        assert_eq!(Value::Object(question.rest), serde_json::json!({ "OwnerUserId": "", "ParentId": "x" }));

        let comment = CommentRow::try_from(one(&format!("Id='1' PostId='2' {time} UserId='5.0'"))).unwrap();
        assert_eq!((comment.user, comment.score, comment.text), (None, 0, None));
        assert_eq!(Value::Object(comment.rest), serde_json::json!({ "UserId": "5.0" }));
    }

    #[test]
    fn an_error_is_small_enough_to_hand_around() {
        assert!(size_of::<DumpError>() <= 128, "{}", size_of::<DumpError>());
    }

    /// A file with something broken in it.
    fn damaged() -> impl Strategy<Value = Vec<u8>> {
        let whole = "\u{FEFF}<?xml version='1.0'?>\n<users>\r\n<row Id='1' A=\"&lt;&#xA;é\" />\n<row B='2'></row><!-- c -->\n</users>\n";
        let piece = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..4),
            proptest::sample::select(vec![
                "<",
                ">",
                "/>",
                "'",
                "\"",
                "&",
                ";",
                "&#0;",
                "<!",
                "<!DOCTYPE x [",
                "]>",
                "<![CDATA[",
                "]]>",
                "<!--",
                "-->",
                "<?",
                "?>",
                "<?xml ",
                "</",
                "<row ",
                "=",
                "\0",
                "\n",
                "&x;",
                "<row A='1'/>",
                "<?xml",
                "<??>",
                "<!-->",
                "<!>",
                "</>",
                "<>",
            ])
            .prop_map(|piece| piece.as_bytes().to_vec()),
        ];
        let edits = proptest::collection::vec((0..=whole.len(), 0..6_usize, piece), 0..5);
        edits.prop_map(move |edits| {
            let mut bytes = whole.as_bytes().to_vec();
            for (at, cut, piece) in edits {
                let at = at.min(bytes.len());
                bytes.splice(at..(at + cut).min(bytes.len()), piece);
            }
            bytes
        })
    }

    /// Attributes that the rows know, and one that they do not.
    const KNOWN: [&str; 13] = [
        "Id",
        "PostTypeId",
        "ParentId",
        "PostId",
        "OwnerUserId",
        "UserId",
        "CreationDate",
        "Score",
        "Title",
        "Text",
        "Body",
        "VoteTypeId",
        "Other",
    ];

    /// Values as they come, nearly as they come, and any.
    fn value() -> impl Strategy<Value = String> {
        prop_oneof![
            "-?[0-9]{1,20}",
            "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{0,12})?Z?",
            any::<String>(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(4_000), ..ProptestConfig::default() })]

        #[test]
        fn damage_never_panics_and_reads_the_same_in_pieces(xml in damaged(), size in 1..9_usize) {
            let (read, error) = all(rows(&xml));
            let pieces = BufReader::with_capacity(size, xml.as_slice());
            let (read_again, error_again) = all(Rows::new(pieces, Path::new("Users.xml"), "users"));
            prop_assert_eq!(read, read_again);
            prop_assert_eq!(error.as_ref().map(said), error_again.as_ref().map(said));
        }

        #[test]
        fn any_bytes_never_panic(xml in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(all(rows(&xml)).1.is_some());
        }

        #[test]
        fn any_attributes_are_a_row_of_every_file_or_unusable_for_one_of_them(
            values in proptest::collection::vec((0..KNOWN.len(), value()), 0..9),
            line: u64,
        ) {
            let mut attributes = Vec::new();
            for (name, value) in values {
                if attributes.iter().all(|(known, _): &(String, String)| known != KNOWN[name]) {
                    attributes.push((KNOWN[name].into(), value));
                }
            }
            let row = Row { line, attributes };
            let reasons = [
                UserRow::try_from(row.clone()).err(),
                PostRow::try_from(row.clone()).err(),
                CommentRow::try_from(row.clone()).err(),
                VoteRow::try_from(row.clone()).err(),
            ];
            for reason in reasons.into_iter().flatten() {
                match reason {
                    Unusable::Missing(attribute) => prop_assert_eq!(row.get(attribute), None),
                    Unusable::Unreadable(attribute) => prop_assert!(row.get(attribute).is_some()),
                }
            }
        }

        #[test]
        fn every_text_survives(values in proptest::collection::vec("[^\0]*", 0..5)) {
            let mut xml = "<users><row".to_owned();
            for (index, value) in values.iter().enumerate() {
                write!(xml, " A{index}='").unwrap();
                for c in value.chars() {
                    write!(xml, "&#x{:X};", u32::from(c)).unwrap();
                }
                xml.push('\'');
            }
            xml.push_str("/></users>");
            let row = rows(xml.as_bytes()).next().unwrap().unwrap();
            let read: Vec<_> = row.attributes.into_iter().map(|(_, value)| value).collect();
            prop_assert_eq!(read, values);
        }
    }
}
