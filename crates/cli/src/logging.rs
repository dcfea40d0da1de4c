//! What the libraries say while they work, on stderr.

use crate::cli::{Global, LogFormat};
use crate::output::stderr_is_terminal;
use std::io::stderr;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

/// The rooms whose words are shown more of with `-v`; drivers below them only warn.
const OURS: [&str; 7] = ["therev", "community", "shards", "schema", "tasks", "relocation", "local"];

/// Begins to write the log.
pub(crate) fn start(global: &Global, no_color: bool) {
    // Where programs read stderr too, a warning would be in the way of the error.
    let least = if global.json && !stderr_is_terminal() { LevelFilter::ERROR } else { LevelFilter::WARN };
    let level = match global.verbose {
        0 => least,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = Targets::new().with_default(least).with_targets(OURS.map(|room| (room, level)));
    let lines = fmt::layer().with_writer(stderr).with_target(false);
    let lines = match global.log_format {
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Text => lines.without_time().with_ansi(stderr_is_terminal() && !no_color).boxed(),
    };
    registry().with(lines.with_filter(filter)).init();
}
