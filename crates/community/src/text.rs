//! Checks of what people write, and the closed lists of content.

use crate::error::{Error, Result};
use crate::words;

/// The longest body of a thread or post, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1_048_576;
/// The longest metadata of a row, in bytes of JSON: a page shows them all.
const METADATA_BYTES_MAX: usize = 65_536;
/// The longest title, in characters.
pub(crate) const TITLE_CHARS_MAX: usize = 500;

/// The most rows of an answer: who wants more asks for what comes after.
const ROWS_MAX: usize = 1_000;

/// How many rows an answer has at the most, of how many are asked for.
pub(crate) fn bounded(limit: impl TryInto<usize>) -> Result<usize> {
    match limit.try_into() {
        Ok(limit) if limit > 0 => Ok(limit.min(ROWS_MAX)),
        _ => Err(Error::invalid("limit", "it is below 1")),
    }
}

words! {
    /// How a text is written.
    Format {
        /// Plain text.
        Plain = "plain",
        /// HTML as another site wrote it.
        Html = "html",
    }
}

words! {
    /// What a moderator decided.
    Moderation {
        /// Shown.
        Approved = "approved",
        /// Waiting for a decision.
        Pending = "pending",
        /// Refused: whoever shows it says so.
        Rejected = "rejected",
        /// Somebody asks to look at it.
        Flagged = "flagged",
    }
}

/// A text that PostgreSQL can hold, of a bounded length.
pub(crate) fn check_chars(field: &'static str, text: &str, least: usize, most: usize) -> Result<()> {
    check_nul(field, text)?;
    let length = text.chars().count();
    if text.trim().is_empty() && least > 0 {
        return Err(Error::invalid(field, "it is empty"));
    }
    if length > most {
        return Err(Error::invalid(field, format!("it has {length} characters, {most} are allowed")));
    }
    Ok(())
}

/// The body of a post or thread.
pub(crate) fn check_body(text: &str, may_be_empty: bool) -> Result<()> {
    check_nul("body", text)?;
    if text.trim().is_empty() && !may_be_empty {
        return Err(Error::invalid("body", "it is empty"));
    }
    if text.len() > BODY_BYTES_MAX {
        return Err(Error::invalid("body", format!("it has {} bytes, {BODY_BYTES_MAX} are allowed", text.len())));
    }
    Ok(())
}

fn check_nul(field: &'static str, text: &str) -> Result<()> {
    if text.contains('\0') {
        return Err(Error::invalid(field, "it holds a NUL character"));
    }
    Ok(())
}

/// The most levels of JSON that a row may hold: what reading it takes.
const JSON_DEPTH_MAX: usize = 127;

/// Why jsonb cannot hold a value, or nobody could read it back: NUL characters, its depth, its size.
#[doc(hidden)]
pub fn json_fault(value: &serde_json::Value, bytes_max: usize) -> Option<String> {
    use serde_json::Value;
    // Not by recursion: the depth is what is checked. The text comes last, since writing it recurses.
    let mut open = vec![(value, 1)];
    while let Some((value, depth)) = open.pop() {
        if depth > JSON_DEPTH_MAX {
            return Some(format!("it nests deeper than {JSON_DEPTH_MAX}"));
        }
        let holds_nul = match value {
            Value::String(text) => text.contains('\0'),
            Value::Array(items) => {
                open.extend(items.iter().map(|item| (item, depth + 1)));
                false
            }
            Value::Object(fields) => {
                open.extend(fields.values().map(|item| (item, depth + 1)));
                fields.keys().any(|key| key.contains('\0'))
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => false,
        };
        if holds_nul {
            return Some("it holds a NUL character".to_owned());
        }
    }
    let length = value.to_string().len();
    (length > bytes_max).then(|| format!("it has {length} bytes of JSON, {bytes_max} are allowed"))
}

/// A JSON object of a bounded size that can be read back.
pub(crate) fn check_object(field: &'static str, value: &serde_json::Value) -> Result<()> {
    if !value.is_object() {
        return Err(Error::invalid(field, "it is no JSON object"));
    }
    json_fault(value, METADATA_BYTES_MAX).map_or(Ok(()), |fault| Err(Error::invalid(field, fault)))
}
