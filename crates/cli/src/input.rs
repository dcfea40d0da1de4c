//! What commands are given: ids, names, texts.

use crate::error::{CliError, Result};
use crate::output::{stdin_is_terminal, talk};
use clap::Args;
use std::fmt::Display;
use std::io::{BufRead, Read};
use std::str::FromStr;
use therev::{Cursor, SecretString, Therev, UserId};

/// No text of the community is longer; more is not even read.
const STDIN_BYTES_MAX: u64 = 8 * 1_048_576;

/// Reads an id.
pub(crate) fn id<T: FromStr>(what: &str, text: &str) -> Result<T> {
    text.trim().parse().map_err(|_| {
        CliError::invalid(
            format!("`{}` is not the id of a {what}", shown(text)),
            "an id looks like 018f3c5e-7b2a-8000-8000-00000000abcd; a user can also be given as @name",
        )
    })
}

/// Reads an id that may be left out.
pub(crate) fn optional_id<T: FromStr>(what: &str, text: Option<&str>) -> Result<Option<T>> {
    text.map(|text| id(what, text)).transpose()
}

/// Reads a cursor that may be left out.
pub(crate) fn cursor(text: Option<&str>) -> Result<Option<Cursor>> {
    let parsed = text.map(|text| text.trim().parse::<Cursor>()).transpose();
    parsed.map_err(|error| {
        let text = shown(text.unwrap_or_default());
        CliError::invalid(
            format!("--after `{text}`: {error}"),
            "copy it from the end of the page before, or leave it out",
        )
    })
}

/// What was typed, short enough for a sentence and without control characters.
fn shown(text: &str) -> String {
    let short: String = text.chars().filter(|c| !c.is_control()).take(60).collect();
    if short.len() < text.len() { format!("{short}…") } else { short }
}

/// Finds a user by id or @name.
pub(crate) async fn user(therev: &Therev, text: &str) -> Result<UserId> {
    let Some(name) = text.strip_prefix('@') else { return id("user", text) };
    let missing = || therev::Error::NotFound { what: "user", id: format!("@{}", shown(name)) };
    Ok(therev.user_named(name).await?.ok_or_else(missing)?)
}

/// Where a text comes from.
#[derive(Debug, Args)]
pub(crate) struct Body {
    /// The text; without it, standard input is read
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    body: Option<String>,
}

impl Body {
    /// Whether the flag was given.
    pub(crate) fn is_given(&self) -> bool {
        self.body.is_some()
    }

    /// The text of the flag, or of standard input to its end.
    pub(crate) fn text(&self) -> Result<String> {
        if let Some(text) = &self.body {
            return Ok(text.clone());
        }
        if stdin_is_terminal() {
            talk("Write the text; end it with Ctrl-D on a line of its own.");
        }
        from_stdin("the text")
    }
}

/// A password from standard input: a command line can be read by everybody on the machine.
pub(crate) fn password(from_input: bool) -> Result<Option<SecretString>> {
    if !from_input {
        return Ok(None);
    }
    if stdin_is_terminal() {
        talk("Type the password (it is shown), then Enter and Ctrl-D.");
    }
    from_stdin("the password").map(|text| Some(text.into()))
}

/// Asks whether what cannot be undone is meant; an error where it is not, or where there is nobody to ask.
pub(crate) fn confirmed(what: &str, otherwise: &str) -> Result<()> {
    if !stdin_is_terminal() {
        let message = format!("{what}, and there is no terminal to ask on: {otherwise}");
        return Err(CliError::new("not_confirmed", message, "say it with --yes"));
    }
    talk(&format!("{what}. Type yes to go on:"));
    let mut answer = String::new();
    std::io::stdin().lock().take(STDIN_BYTES_MAX).read_line(&mut answer)?;
    if answer.trim() == "yes" {
        return Ok(());
    }
    Err(CliError::new("not_confirmed", otherwise, "type yes, or give --yes"))
}

/// Standard input as text, without the end of its last line.
fn from_stdin(what: impl Display) -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(STDIN_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    text_of(bytes, &what)
}

fn text_of(bytes: Vec<u8>, what: &dyn Display) -> Result<String> {
    if bytes.len() as u64 > STDIN_BYTES_MAX {
        let message = format!("{what} on standard input has more than {STDIN_BYTES_MAX} bytes");
        return Err(CliError::invalid(message, "shorten it; nothing was written"));
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let message = format!("{what} on standard input is not UTF-8 (byte {at})");
        CliError::invalid(message, "convert it, for example with `iconv -t utf-8`; nothing was written")
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// A field that an empty text empties.
#[expect(clippy::option_option, reason = "the library's word for a field that stays, is emptied, or is set")]
pub(crate) fn emptied(text: Option<String>) -> Option<Option<String>> {
    text.map(|text| Some(text).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use therev::ThreadId;

    #[test]
    fn what_is_no_id_is_named_shortly() {
        let error = id::<ThreadId>("thread", &"x\u{1b}[31m".repeat(100)).unwrap_err().to_string();
        assert!(error.contains("is not the id of a thread") && !error.contains('\u{1b}'), "{error}");
        assert!(cursor(Some("12")).is_err());
        assert!(cursor(None).unwrap().is_none());
    }

    #[test]
    fn text_loses_the_end_of_its_last_line_only() {
        assert_eq!(text_of(b"a\n\nb\r\n".to_vec(), &"it").unwrap(), "a\n\nb");
        assert!(text_of(vec![b'a', 0xff], &"it").unwrap_err().to_string().contains("byte 1"));
    }
}
