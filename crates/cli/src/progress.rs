//! How far a long operation has come: a bar on a terminal, lines otherwise.

use crate::output::{stderr_is_terminal, talk};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// What is shown of one operation.
pub(crate) struct Shown {
    bar: Option<ProgressBar>,
    phase: &'static str,
    last_line: Instant,
}

impl Shown {
    /// `template`: the bar's, with the phase as its prefix.
    pub(crate) fn new(template: &str) -> Shown {
        let bar = stderr_is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            // Templates are constants; if one were wrong, the default would do.
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Shown { bar, phase: "", last_line: Instant::now() }
    }

    pub(crate) fn show(&mut self, phase: &'static str, position: u64, total: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(position);
            bar.set_prefix(phase);
            bar.set_message(message.to_owned());
        } else if phase != self.phase || self.last_line.elapsed() >= LINE_EVERY {
            let message = if message.is_empty() { String::new() } else { format!(", {message}") };
            talk(&format!("{phase}: {} %{message}", position.saturating_mul(100) / total.max(1)));
            self.last_line = Instant::now();
        }
        self.phase = phase;
    }

    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
