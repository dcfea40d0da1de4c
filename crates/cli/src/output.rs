//! The way out: data on stdout, talk on stderr, never wider than the terminal or 100 columns.

use crate::error::Result;
use crate::readable;
use serde::Serialize;
use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::sync::atomic::{AtomicBool, Ordering};

/// The widest that anything is written.
const WIDTH_MAX: usize = 100;
/// Below this nothing can be laid out.
const WIDTH_MIN: usize = 40;

/// Where data and talk go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// Whether programs read stdout.
    pub(crate) json: bool,
    /// Columns of a line.
    pub(crate) width: usize,
    /// Whether stdout may be coloured.
    pub(crate) colors: bool,
}

impl Output {
    pub(crate) fn new(json: bool, no_color: bool) -> Output {
        let columns = terminal_size::terminal_size_of(stdout()).map_or(WIDTH_MAX, |(width, _)| usize::from(width.0));
        Output { json, width: columns.clamp(WIDTH_MIN, WIDTH_MAX), colors: stdout().is_terminal() && !no_color }
    }

    /// Writes a fact: as JSON when programs read, else as the text that `say` makes.
    pub(crate) fn fact(&self, value: &impl Serialize, say: impl FnOnce() -> String) -> Result<()> {
        if self.json { document(value) } else { write_line(&say()) }
    }

    /// What is well, and what is not, as a word that can be seen.
    ///
    /// A sentence is laid out in lines, each with its own colour.
    pub(crate) fn word(&self, word: &str, is_well: bool) -> String {
        let color = if is_well { 32 } else { 31 };
        let fitted = self.fitted(word);
        if !self.colors {
            return fitted;
        }
        fitted.lines().map(|line| format!("\x1b[{color}m{line}\x1b[0m")).collect::<Vec<_>>().join("\n")
    }

    /// A text in lines that fit.
    pub(crate) fn fitted(&self, text: &str) -> String {
        readable::plain(text, self.width)
    }

    /// A text behind its first words or blanks, in lines that fit: the later ones stand below the first one's text.
    pub(crate) fn indented(&self, first: &str, text: &str) -> String {
        let indent = first.chars().count();
        let fitted = readable::plain(text, self.width.saturating_sub(indent));
        format!("{first}{}", fitted.replace('\n', &format!("\n{}", " ".repeat(indent))))
    }

    /// A heading.
    pub(crate) fn bold(&self, text: &str) -> String {
        if self.colors { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Writes data as it is.
pub(crate) fn write_text(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a line of data.
pub(crate) fn write_line(line: &str) -> Result<()> {
    write_text(&format!("{line}\n"))
}

/// Writes one JSON document.
pub(crate) fn document(value: &impl Serialize) -> Result<()> {
    write_line(&serde_json::to_string_pretty(value)?)
}

/// Whether programs read stderr too: set once, as the command line is read.
static IS_READ: AtomicBool = AtomicBool::new(false);

/// From now on stderr is for errors alone, unless somebody sees it.
pub(crate) fn only_errors() {
    IS_READ.store(!stderr_is_terminal(), Ordering::Relaxed);
}

/// Talks to whoever watches.
pub(crate) fn talk(line: &str) {
    if !IS_READ.load(Ordering::Relaxed) {
        complain(line);
    }
}

/// Says what went wrong.
pub(crate) fn complain(line: &str) {
    // Nobody watching is no reason to stop.
    let _ = writeln!(stderr(), "{line}");
}

/// Whether somebody watches stderr.
pub(crate) fn stderr_is_terminal() -> bool {
    stderr().is_terminal()
}

/// Whether somebody can be asked.
pub(crate) fn stdin_is_terminal() -> bool {
    stdin().is_terminal()
}
