//! Everything that can be set, with its default. The library reads no environment: whoever starts it fills this in.

use crate::error::Error;
use placement::planner::HotUsers;
use secrecy::SecretString;
use serde::Deserialize;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach a cluster and how long to wait for it.
///
/// As `therev.toml` it is one flat table; `docs/config.md` lists the keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The control database: `postgresql://role@host:port/database`, several hosts allowed.
    pub control: String,
    /// A file of passwords in libpq's form (`host:port:database:role:password`).
    #[serde(default)]
    pub passfile: Option<PathBuf>,
    /// The password of the role on all servers; one in the control address means the same.
    #[serde(default)]
    pub password: Option<SecretString>,
    /// Where the last known placement is kept, so that a node can start while the control database is down.
    #[serde(default)]
    pub state_file: Option<PathBuf>,
    /// How long a call may take, in milliseconds.
    #[serde(default = "defaults::deadline_ms")]
    pub deadline_ms: u64,
    /// How long connecting to a server may take, in milliseconds.
    #[serde(default = "defaults::connect_timeout_ms")]
    pub connect_timeout_ms: u64,
    /// The most connections to one database; the control database's own number for each shard when absent.
    #[serde(default)]
    pub pool_size: Option<usize>,
    /// How long a server that could not be reached is spared, in milliseconds.
    #[serde(default = "defaults::breaker_ms")]
    pub breaker_ms: u64,
    /// How often the placement is read anew from the control database, in milliseconds.
    #[serde(default = "defaults::refresh_ms")]
    pub refresh_ms: u64,
    /// How long a writer waits for its own events to reach other databases, in milliseconds.
    #[serde(default = "defaults::delivery_ms")]
    pub delivery_ms: u64,
    /// How often this node's relay looks for what was left undelivered, in milliseconds; 0: it does not.
    #[serde(default = "defaults::relay_ms")]
    pub relay_ms: u64,
    /// What `therev relay` does about users who are too much for their shard: `off`, `plan` or `apply`.
    #[serde(default)]
    pub hot_users: HotUsers,
    /// How old a pending claim is before it is settled, in seconds.
    #[serde(default = "defaults::claim_timeout_s")]
    pub claim_timeout_s: u64,
    /// How long a session lasts, in seconds.
    #[serde(default = "defaults::session_s")]
    pub session_s: u64,
}

mod defaults {
    pub(super) fn deadline_ms() -> u64 {
        5_000
    }
    pub(super) fn connect_timeout_ms() -> u64 {
        2_000
    }
    pub(super) fn breaker_ms() -> u64 {
        1_000
    }
    pub(super) fn refresh_ms() -> u64 {
        10_000
    }
    pub(super) fn delivery_ms() -> u64 {
        50
    }
    pub(super) fn relay_ms() -> u64 {
        1_000
    }
    pub(super) fn claim_timeout_s() -> u64 {
        60
    }
    pub(super) fn session_s() -> u64 {
        30 * 24 * 3_600
    }
}

impl Config {
    /// The defaults, for a cluster whose control database is at this address.
    pub fn new(control: impl Into<String>) -> Config {
        Config {
            control: control.into(),
            passfile: None,
            password: None,
            state_file: None,
            deadline_ms: defaults::deadline_ms(),
            connect_timeout_ms: defaults::connect_timeout_ms(),
            pool_size: None,
            breaker_ms: defaults::breaker_ms(),
            refresh_ms: defaults::refresh_ms(),
            delivery_ms: defaults::delivery_ms(),
            relay_ms: defaults::relay_ms(),
            hot_users: HotUsers::default(),
            claim_timeout_s: defaults::claim_timeout_s(),
            session_s: defaults::session_s(),
        }
    }

    /// Reads the text of a `therev.toml`; relative paths in it are relative to `folder`.
    pub fn parse(text: &str, folder: &std::path::Path) -> Result<Config, Error> {
        let mut config: Config = toml::from_str(text).map_err(|error| Error::Config(unreadable(text, &error)))?;
        for path in [&mut config.passfile, &mut config.state_file].into_iter().flatten() {
            *path = folder.join(&*path);
        }
        Ok(config)
    }

    /// Refuses values with which nothing would work.
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (key, value) in [("deadline_ms", self.deadline_ms), ("connect_timeout_ms", self.connect_timeout_ms)] {
            if value == 0 {
                return Err(Error::Config(format!("{key} is 0: nothing would ever be answered")));
            }
        }
        if self.pool_size == Some(0) {
            return Err(Error::Config("pool_size is 0: nothing would ever be asked".into()));
        }
        Ok(())
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }
}

/// Where a file cannot be understood, and why, in one sentence. Never a value or a line of it: that may be a password.
fn unreadable(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
    let message = match message.split_once(", expected ") {
        // `invalid type: integer `1234`, expected a string`
        Some((found, expected)) if found.starts_with("invalid ") => {
            let kind = found.split(['`', '"']).next().unwrap_or_default().trim_end();
            format!("{kind}, expected {expected}")
        }
        _ => message,
    };
    let Some(span) = error.span() else { return message };
    let line = text.bytes().take(span.start).filter(|byte| *byte == b'\n').count() + 1;
    format!("line {line}: {message}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_file_may_say_only_where_the_control_database_is() {
        let config = Config::parse("control = 'postgresql://h/d'\npassfile = 'pass'", Path::new("/etc/x")).unwrap();
        assert_eq!(config.passfile, Some(PathBuf::from("/etc/x/pass")));
        assert_eq!(config.deadline_ms, 5_000);
    }

    #[test]
    fn what_cannot_be_read_is_told_by_its_line_and_never_repeated() {
        for wrong in ["password = 's3cret", "password = s3cret", "password = 53627", "password = ['s3cret']"] {
            let error = Config::parse(&format!("control = 'x'\n{wrong}\n"), Path::new("/")).unwrap_err().to_string();
            assert!(error.contains("line 2: ") && error.lines().count() == 1, "{error}");
            assert!(!error.contains("s3cret") && !error.contains("53627"), "{error}");
        }
        let error = Config::parse("control = 'x'\ndeadline_ms = 's3cret'", Path::new("/")).unwrap_err().to_string();
        assert!(error.ends_with("line 2: invalid type: string, expected u64"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = Config::parse("control = 'x'\ncolour = 'red'", Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("colour"), "{error}");
    }
}
