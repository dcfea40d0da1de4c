//! One piece of markup: the rules of XML that the parser leaves unchecked, and what a dump's files may hold at all.

use super::{At, DumpError, Fault, Row};
use quick_xml::XmlVersion;
use quick_xml::errors::IllFormedError;
use quick_xml::escape::{EscapeError, ParseCharRefError, unescape};
use quick_xml::events::attributes::{AttrError, Attribute};
use quick_xml::events::{BytesDecl, BytesStart, Event};
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

/// How much of an offending value an error repeats.
const SHOWN_CHARS_MAX: usize = 60;

/// How far the reader has come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing was read yet; only here may the XML declaration stand.
    Start,
    BeforeRoot,
    InRoot,
    AfterRoot,
    End,
    Failed,
}

/// What a piece of markup leads to.
pub(super) enum Step {
    To(Place),
    Opens(Row),
    Row(Row),
    Closes,
}

/// One piece of markup and where it stands. The parser leaves some rules of XML unchecked; they are checked here.
pub(super) struct Markup<'a> {
    pub(super) path: &'a Arc<Path>,
    /// Where it starts.
    pub(super) line: u64,
    pub(super) root: &'static str,
    /// How far the reader had come before it.
    pub(super) place: Place,
    /// Inside `<row>` and `</row>`.
    pub(super) open: bool,
    pub(super) text: &'a str,
}

impl Markup<'_> {
    /// What it leads to, if it may stand where it stands.
    pub(super) fn read(&self, event: &Event) -> Result<Step, DumpError> {
        if let Event::DocType(_) = event {
            return Err(DumpError::Doctype(self.at(0)));
        }
        self.characters()?;
        // Whatever was read, the start of the file is behind it.
        let place = if self.place == Place::Start { Place::BeforeRoot } else { self.place };
        match event {
            Event::Start(tag) => self.element(tag, false),
            Event::Empty(tag) => self.element(tag, true),
            Event::End(_) => Ok(Step::Closes),
            Event::Text(_) => self.blank(place),
            Event::Decl(declaration) if self.place == Place::Start => {
                self.declaration(declaration)?;
                Ok(Step::To(place))
            }
            Event::Decl(_) => Err(self.rule(0, "an XML declaration after the start")),
            Event::GeneralRef(name) if is_defined(name) => Err(self.unexpected(0, format!("\"&{};\"", shown(name)))),
            Event::GeneralRef(name) => Err(DumpError::Entity(self.at(0), shown(name))),
            Event::CData(_) => Err(self.unexpected(0, "CDATA".to_owned())),
            Event::Comment(_) | Event::PI(_) | Event::DocType(_) => Ok(Step::To(place)),
            Event::Eof => self.end(),
        }
    }

    /// The line of the byte at `offset`.
    fn at(&self, offset: usize) -> At {
        let before = self.text.as_bytes().get(..offset).unwrap_or_default();
        At { path: Arc::clone(self.path), line: self.line + newlines(before) }
    }

    fn rule(&self, offset: usize, rule: &'static str) -> DumpError {
        DumpError::NotWellFormed(self.at(offset), Fault::Rule(rule))
    }

    fn unexpected(&self, offset: usize, found: String) -> DumpError {
        DumpError::Unexpected(self.at(offset), found)
    }

    /// Whether all of the text may stand in XML 1.0.
    fn characters(&self) -> Result<(), DumpError> {
        let bytes = self.text.as_bytes();
        let control = |byte: &u8| *byte < b' ' && !matches!(byte, b'\t' | b'\n' | b'\r');
        if let Some(offset) = bytes.iter().position(control) {
            return Err(match bytes.get(offset) {
                Some(0) => DumpError::Nul(self.at(offset)),
                _ => self.rule(offset, "a control character"),
            });
        }
        // Both non-characters start with this byte; most rows have none and are spared the slow search.
        if bytes.contains(&0xEF)
            && let Some(offset) = self.text.find(['\u{FFFE}', '\u{FFFF}'])
        {
            return Err(self.rule(offset, "a code point that is no character"));
        }
        Ok(())
    }

    fn element(&self, tag: &BytesStart, empty: bool) -> Result<Step, DumpError> {
        let attributes = self.attributes(tag)?;
        let name = tag.name().0;
        let unexpected = |there: &str| Err(self.unexpected(0, format!("<{}> {there}", shown(name))));
        match self.place {
            Place::InRoot if self.open => unexpected("inside a row"),
            Place::InRoot if name == "row" => {
                let row = Row { line: self.line, attributes };
                Ok(if empty { Step::Row(row) } else { Step::Opens(row) })
            }
            Place::InRoot => unexpected("between the rows"),
            Place::AfterRoot => Err(self.rule(0, "a second root element")),
            _ if name == self.root => Ok(Step::To(if empty { Place::AfterRoot } else { Place::InRoot })),
            _ => Err(DumpError::WrongRoot { at: self.at(0), expected: self.root, found: shown(name) }),
        }
    }

    /// Text outside attributes: a dump has none but blanks, and perhaps a byte order mark before all.
    fn blank(&self, then: Place) -> Result<Step, DumpError> {
        let mark =
            if self.place == Place::Start && self.text.starts_with('\u{FEFF}') { '\u{FEFF}'.len_utf8() } else { 0 };
        let rest = self.text.get(mark..).unwrap_or_default();
        match rest.find(|c| !is_blank(c)) {
            Some(offset) if self.place == Place::InRoot => {
                Err(self.unexpected(mark + offset, "text between the rows".to_owned()))
            }
            Some(offset) => Err(self.rule(mark + offset, "text outside the root element")),
            None => Ok(Step::To(if rest.is_empty() { self.place } else { then })),
        }
    }

    /// Refuses a declaration of another encoding or version.
    fn declaration(&self, declaration: &BytesDecl) -> Result<(), DumpError> {
        let version = declaration.xml_version().map_err(|error| DumpError::NotWellFormed(self.at(0), error.into()))?;
        if version == XmlVersion::Explicit1_1 {
            return Err(self.rule(0, "only version 1.0 of XML is read"));
        }
        match declaration.encoding().transpose() {
            Ok(None) => Ok(()),
            Ok(Some(name)) if ["utf-8", "utf8", "us-ascii"].iter().any(|known| name.eq_ignore_ascii_case(known)) => {
                Ok(())
            }
            Ok(Some(name)) => Err(DumpError::Encoding(self.at(0), shown(&name))),
            Err(error) => Err(self.broken(error)),
        }
    }

    /// The file has ended; whether it may here.
    fn end(&self) -> Result<Step, DumpError> {
        match self.place {
            Place::AfterRoot => Ok(Step::To(Place::End)),
            Place::InRoot => {
                let tag = if self.open { "row" } else { self.root };
                let fault = Fault::IllFormed(IllFormedError::MissingEndTag(tag.to_owned()));
                Err(DumpError::NotWellFormed(self.at(0), fault))
            }
            _ => Err(self.rule(0, "the file ends before its first element")),
        }
    }

    /// The attributes of a tag, resolved.
    fn attributes(&self, tag: &BytesStart) -> Result<Vec<(String, String)>, DumpError> {
        let mut all = Vec::with_capacity(16);
        for attribute in tag.attributes() {
            let attribute = attribute.map_err(|error| self.broken(error))?;
            let name = attribute.key.0;
            let start = offset_in(self.text, name);
            if !self.text.get(..start).is_some_and(|before| before.ends_with(is_blank)) {
                return Err(self.rule(start, "no blank before an attribute"));
            }
            if !is_name(name) {
                return Err(self.rule(start, "an attribute name with characters that no name has"));
            }
            let start = offset_in(self.text, &attribute.value);
            if let Some(offset) = attribute.value.find('<') {
                return Err(self.rule(start + offset, "\"<\" in an attribute value"));
            }
            let value = match resolved(&attribute) {
                Ok(value) => value,
                Err(quick_xml::Error::Escape(error)) => return Err(self.unresolved(start, &attribute.value, error)),
                Err(error) => return Err(DumpError::NotWellFormed(self.at(start), error.into())),
            };
            all.push((name.to_owned(), value));
        }
        Ok(all)
    }

    /// An attribute that is not written as one, or twice.
    fn broken(&self, error: AttrError) -> DumpError {
        match error {
            AttrError::Duplicated(offset, _) => {
                let name = self.text.get(offset..).unwrap_or_default();
                let name = name.split(|c| c == '=' || is_blank(c)).next().unwrap_or_default();
                DumpError::DuplicateAttribute(self.at(offset), shown(name))
            }
            AttrError::ExpectedEq(offset)
            | AttrError::ExpectedValue(offset)
            | AttrError::UnquotedValue(offset)
            | AttrError::ExpectedQuote(offset, _) => DumpError::NotWellFormed(self.at(offset), Fault::Attribute(error)),
        }
    }

    /// A reference that stands for nothing, in the value that starts at `start`.
    fn unresolved(&self, start: usize, value: &str, error: EscapeError) -> DumpError {
        match error {
            EscapeError::UnrecognizedEntity(range, name) => {
                DumpError::Entity(self.at(start + range.start), shown(&name))
            }
            EscapeError::UnterminatedEntity(range) => {
                self.rule(start + range.start, "\"&\" without the \";\" that ends a reference")
            }
            EscapeError::InvalidCharRef(_) => {
                // The parser does not say which one.
                let broken = |offset: &usize| {
                    let reference = value.get(*offset..).and_then(|rest| rest.split_inclusive(';').next());
                    reference.is_some_and(|reference| unescape(reference).is_err())
                };
                let offset = value.match_indices("&#").map(|(offset, _)| offset).find(broken).unwrap_or_default();
                let at = self.at(start + offset);
                if matches!(error, EscapeError::InvalidCharRef(ParseCharRefError::IllegalCharacter(0))) {
                    DumpError::Nul(at)
                } else {
                    DumpError::NotWellFormed(at, Fault::Reference(error))
                }
            }
            EscapeError::TooManyNestedEntities => DumpError::NotWellFormed(self.at(start), Fault::Reference(error)),
        }
    }
}

/// A value with its references resolved and its blanks normalized. Almost none has blanks to normalize, which is slow.
fn resolved(attribute: &Attribute) -> Result<String, quick_xml::Error> {
    if attribute.value.bytes().any(|byte| matches!(byte, b'\t' | b'\n' | b'\r')) {
        return attribute.normalized_value(XmlVersion::Implicit1_0).map(Cow::into_owned);
    }
    Ok(unescape(&attribute.value)?.into_owned())
}

/// A reference that XML itself defines.
fn is_defined(name: &str) -> bool {
    name.starts_with('#') || matches!(name, "lt" | "gt" | "amp" | "apos" | "quot")
}

fn is_name(name: &str) -> bool {
    let starts = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':' || !c.is_ascii();
    name.starts_with(starts) && name.chars().all(|c| starts(c) || c.is_ascii_digit() || c == '-' || c == '.')
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// Where `part`, a slice of `whole`, starts in it.
fn offset_in(whole: &str, part: &str) -> usize {
    part.as_ptr().addr().saturating_sub(whole.as_ptr().addr())
}

pub(super) fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(*byte == b'\n')).sum()
}

/// The start of a text, short enough for one line.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
