//! Addresses of servers, and the passwords that go with them.

use crate::config::Config;
use crate::error::Error;
use secrecy::ExposeSecret;
use std::fmt::Write as _;
use std::time::Duration;
use tokio_postgres::config::{Host, TargetSessionAttrs};

/// The role of the library. Every connection works as this role, whoever logged in.
pub(crate) const LIBRARY_ROLE: &str = "therev";
/// The role that owns the schema.
pub(crate) const ADMIN_ROLE: &str = "therev_admin";
/// The role that moves rows between shards.
pub(crate) const MOVER_ROLE: &str = "therev_mover";

/// How a server finds out that a client vanished in the middle of a COPY, which no time-out of a statement ends: within
/// half a minute, not the two hours that systems take by themselves. Its locks last until then.
const KEEPALIVES: &str = "-c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3";

/// The fence counts on a snapshot that is younger than the statement's locks, whatever a server's defaults are.
const ISOLATION: &str = "-c default_transaction_isolation=read\\ committed";

/// A database by its hosts (`host:port`, several separated by commas) and its name: what the control database keeps.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hosts {
    /// `host:port[,host:port…]`.
    pub hosts: String,
    /// The database's name.
    pub database: String,
}

impl Hosts {
    /// Takes hosts and database out of a `postgresql://` address.
    pub fn of(config: &tokio_postgres::Config) -> Result<Hosts, Error> {
        let database = config.get_dbname().ok_or_else(|| Error::Config("an address names no database".into()))?;
        let mut hosts = String::new();
        for (at, host) in config.get_hosts().iter().enumerate() {
            let port = config.get_ports().get(at).or(config.get_ports().first()).unwrap_or(&5432);
            let separator = if hosts.is_empty() { "" } else { "," };
            let name = match host {
                Host::Tcp(name) => name.clone(),
                Host::Unix(path) => path.to_string_lossy().into_owned(),
            };
            // Writing to a string does not fail.
            let _ = write!(hosts, "{separator}{name}:{port}");
        }
        if hosts.is_empty() {
            return Err(Error::Config("an address names no host".into()));
        }
        Ok(Hosts { hosts, database: database.to_owned() })
    }
}

/// How one node logs in, on every server alike.
#[derive(Clone)]
pub(crate) struct Login {
    base: tokio_postgres::Config,
    passfile: Vec<PassLine>,
    role: &'static str,
}

#[derive(Clone)]
struct PassLine([String; 5]);

impl Login {
    pub(crate) fn new(config: &Config, role: &'static str) -> Result<Login, Error> {
        let mut base = parse(&config.control)?;
        if base.get_user().is_none_or(|user| user == LIBRARY_ROLE) {
            base.user(role);
        }
        if let Some(password) = &config.password {
            base.password(password.expose_secret());
        }
        let passfile = match &config.passfile {
            None => Vec::new(),
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| Error::Config(format!("passfile {}: {e}", path.display())))?
                .lines()
                .filter_map(passfile_line)
                .map(PassLine)
                .collect(),
        };
        base.connect_timeout(Duration::from_millis(config.connect_timeout_ms));
        base.application_name("therev");
        let options = match role {
            // Every statement is short: compiling one takes longer than running it.
            LIBRARY_ROLE => {
                format!(
                    "-c role={role} -c jit=off -c statement_timeout={} {ISOLATION} {KEEPALIVES}",
                    config.deadline_ms
                )
            }
            _ => format!("-c role={role} {ISOLATION} {KEEPALIVES}"),
        };
        base.options(options);
        Ok(Login { base, passfile, role })
    }

    /// The control database itself.
    pub(crate) fn control(&self) -> Result<tokio_postgres::Config, Error> {
        Hosts::of(&self.base).and_then(|hosts| self.to(&hosts, true))
    }

    /// The login for a database elsewhere.
    pub(crate) fn to(&self, at: &Hosts, writes: bool) -> Result<tokio_postgres::Config, Error> {
        let user = self.base.get_user().unwrap_or(self.role).to_owned();
        let mut config = tokio_postgres::Config::new();
        config.user(&user).dbname(&at.database).application_name("therev");
        if let Some(options) = self.base.get_options() {
            config.options(options);
        }
        if let Some(limit) = self.base.get_connect_timeout() {
            config.connect_timeout(*limit);
        }
        let mut first = None;
        for host in at.hosts.split(',') {
            let (name, port) = host
                .rsplit_once(':')
                .and_then(|(name, port)| Some((name, port.parse::<u16>().ok()?)))
                .ok_or_else(|| Error::Config(format!("`{host}` is not host:port")))?;
            config.host(name).port(port);
            first.get_or_insert((name.to_owned(), port));
        }
        let password = self.base.get_password().map(<[u8]>::to_vec).or_else(|| {
            let (name, port) = first.as_ref()?;
            let wanted = [name.as_str(), &port.to_string(), &at.database, &user];
            self.passfile.iter().find(|line| line.fits(wanted)).map(|line| line.0[4].as_bytes().to_vec())
        });
        if let Some(password) = password {
            config.password(password);
        }
        if writes {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        Ok(config)
    }
}

impl PassLine {
    fn fits(&self, wanted: [&str; 4]) -> bool {
        self.0.iter().zip(wanted).all(|(have, want)| have == "*" || have == want)
    }
}

/// A line of a passfile: host, port, database, role and password, separated by colons; `\:` and `\\` stand for
/// themselves. `None` for a comment and what has fewer fields.
pub fn passfile_line(line: &str) -> Option<[String; 5]> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let last = fields.len() - 1;
        match c {
            '\\' => fields[last].extend(chars.next()),
            ':' if fields.len() < 5 => fields.push(String::new()),
            other => fields[last].push(other),
        }
    }
    fields.try_into().ok()
}

/// Reads a `postgresql://` address; the message never repeats it, since it may hold a password.
pub(crate) fn parse(address: &str) -> Result<tokio_postgres::Config, Error> {
    if !address.starts_with("postgresql://") && !address.starts_with("postgres://") {
        return Err(Error::Config("an address looks like postgresql://role@host:port/database".into()));
    }
    let config: tokio_postgres::Config = address.parse().map_err(|e: tokio_postgres::Error| {
        let reason = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        Error::Config(format!("an address cannot be read: {reason}"))
    })?;
    if config.get_ssl_mode() == tokio_postgres::config::SslMode::Require {
        return Err(Error::Config(
            "sslmode=require: connections are not encrypted yet, use another way to protect them".into(),
        ));
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Texts that come close to an address.
    fn addresses() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("postgresql://".to_owned()),
            Just("sslmode=require&connect_timeout=".to_owned()),
            "[]\\[:/@?&=,%0-9a-fé]{0,9}",
            any::<String>(),
        ];
        proptest::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(text in addresses()) {
            if let Ok(config) = parse(&format!("postgresql://{text}")) {
                let _ = Hosts::of(&config);
            }
            prop_assert!(parse(&text).is_err() || text.starts_with("postgres"));
        }

        #[test]
        fn a_passfiles_fields_survive(host in "([^#\n][^\n]{0,9})?", rest in proptest::collection::vec("[^\n]{0,9}", 4)) {
            let fields = [vec![host], rest].concat();
            let escape = |text: &String| text.replace('\\', "\\\\").replace(':', "\\:");
            let line = fields.iter().map(escape).collect::<Vec<_>>().join(":");
            prop_assert_eq!(passfile_line(&line).unwrap().to_vec(), fields);
        }

        #[test]
        fn any_line_of_a_passfile_is_read(line: String) {
            prop_assert!(!line.starts_with('#') || passfile_line(&line).is_none());
        }
    }

    #[test]
    fn a_passfile_is_read_as_libpq_reads_it() {
        let line = PassLine(passfile_line(r"*:5433:*:therev:a\:b\\c:d").unwrap());
        assert_eq!(line.0[4], r"a:b\c:d");
        assert!(line.fits(["h", "5433", "x", "therev"]));
        assert!(!line.fits(["h", "5434", "x", "therev"]));
        assert!(passfile_line("# comment").is_none());
        assert!(passfile_line("too:few").is_none());
    }

    #[test]
    fn hosts_are_taken_out_of_an_address() {
        let at = Hosts::of(&parse("postgresql://r:secret@a:1,b:2/base").unwrap()).unwrap();
        assert_eq!(at, Hosts { hosts: "a:1,b:2".into(), database: "base".into() });
    }

    #[test]
    fn an_address_that_cannot_be_read_is_not_repeated() {
        let error = parse("postgresql://r:secret@[::/x").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
