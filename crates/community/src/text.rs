//! Checks of what people write, and the closed lists of content.

use crate::error::{Error, Result};
use crate::words;

/// The longest body of a thread or post, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1_048_576;
/// The longest title, in characters.
pub(crate) const TITLE_CHARS_MAX: usize = 500;

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

fn holds_nul(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::String(text) => text.contains('\0'),
        serde_json::Value::Array(items) => items.iter().any(holds_nul),
        serde_json::Value::Object(fields) => fields.iter().any(|(name, item)| name.contains('\0') || holds_nul(item)),
        _ => false,
    }
}

/// A JSON object without NUL characters, which PostgreSQL's jsonb refuses.
pub(crate) fn check_object(field: &'static str, value: &serde_json::Value) -> Result<()> {
    if !value.is_object() {
        return Err(Error::invalid(field, "it is no JSON object"));
    }
    if holds_nul(value) {
        return Err(Error::invalid(field, "it holds a NUL character"));
    }
    Ok(())
}
