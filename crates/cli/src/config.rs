//! How a command finds its cluster. The only place that reads the environment.

use crate::error::{CliError, Result};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use therev::Config;

/// The name of a configuration file.
pub(crate) const FILE: &str = "therev.toml";
/// The folder of a local cluster, unless another one is named.
pub(crate) const LOCAL_FOLDER: &str = ".therev";

/// What the environment says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    /// `THEREV_CONTROL_URL`.
    pub(crate) control: Option<String>,
    /// `THEREV_PASSFILE`, else libpq's `PGPASSFILE`, else `~/.pgpass` where that exists.
    pub(crate) passfile: Option<PathBuf>,
    /// `THEREV_PG_BIN`: where PostgreSQL's programs are.
    pub(crate) pg_bin: Option<PathBuf>,
    /// `PATH`.
    pub(crate) search_path: Option<OsString>,
    /// `USER` or `LOGNAME`: who works here.
    pub(crate) operator: String,
    /// `NO_COLOR`.
    pub(crate) no_color: bool,
}

impl Environment {
    /// Reads it, once.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    pub(crate) fn read() -> Environment {
        let text = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let path = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || path("HOME").map(|home| home.join(".pgpass")).filter(|file| file.is_file());
        Environment {
            control: text("THEREV_CONTROL_URL"),
            passfile: path("THEREV_PASSFILE").or_else(|| path("PGPASSFILE")).or_else(home),
            pg_bin: path("THEREV_PG_BIN"),
            search_path: std::env::var_os("PATH"),
            operator: text("USER").or_else(|| text("LOGNAME")).unwrap_or_else(|| "operator".to_owned()),
            no_color: text("NO_COLOR").is_some(),
        }
    }
}

/// How the cluster was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FoundBy {
    /// The flag `--control`.
    Flag,
    /// `THEREV_CONTROL_URL`.
    Environment,
    /// A file.
    File(PathBuf),
}

impl fmt::Display for FoundBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FoundBy::Flag => f.write_str("--control"),
            FoundBy::Environment => f.write_str("THEREV_CONTROL_URL"),
            FoundBy::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A configuration, and how it was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) config: Config,
    pub(crate) by: FoundBy,
}

/// Finds the cluster: the flag, the environment, `therev.toml`, `.therev/therev.toml`; files in this folder or above.
pub(crate) fn find(flag: Option<&str>, env: &Environment, folder: &Path) -> Result<Found> {
    let address = |control: &str, by| {
        let config = Config { passfile: env.passfile.clone(), ..Config::new(control) };
        Ok(Found { config, by })
    };
    if let Some(control) = flag {
        return address(control, FoundBy::Flag);
    }
    if let Some(control) = &env.control {
        return address(control, FoundBy::Environment);
    }
    let local = Path::new(LOCAL_FOLDER).join(FILE);
    for name in [Path::new(FILE), &local] {
        if let Some(path) = folder.ancestors().map(|above| above.join(name)).find(|path| path.is_file()) {
            let config = read_file(&path)?;
            return Ok(Found { config, by: FoundBy::File(path) });
        }
    }
    Err(CliError::new(
        "config",
        format!("no cluster is known here: there is neither --control, nor THEREV_CONTROL_URL, nor a {FILE}"),
        "start a local one with `therev cluster up`, or make one of servers that exist with `therev init`",
    ))
}

/// Reads a configuration file.
pub(crate) fn read_file(path: &Path) -> Result<Config> {
    let text = std::fs::read_to_string(path).map_err(|e| CliError::file("read", path, &e))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    Config::parse(&text, folder).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.strip_prefix("configuration: ").unwrap_or(&reason);
        CliError::new(
            "config",
            format!("{} cannot be used: {reason}", path.display()),
            "correct it; docs/config.md lists every key with its default",
        )
    })
}

/// The text of a configuration file that `cluster up` and `init` write.
pub(crate) fn file_text(control: &str, passfile: &Path, state_file: &str) -> Result<String> {
    #[derive(serde::Serialize)]
    struct Keys<'a> {
        control: &'a str,
        passfile: &'a Path,
        state_file: &'a str,
    }
    let text = toml::to_string(&Keys { control, passfile, state_file })
        .map_err(|e| CliError::new("config", format!("{FILE} cannot be written: {e}"), "use paths that are UTF-8"))?;
    Ok(format!("# How therev finds this cluster; docs/config.md lists every key.\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, control: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("control = '{control}'")).unwrap();
    }

    #[test]
    fn the_order_is_flag_environment_own_file_local_cluster() {
        let top = tempfile::tempdir().unwrap();
        let below = top.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        let control = |flag: Option<&str>, env: &Environment| find(flag, env, &below).unwrap().config.control;
        let nothing = Environment::default();
        let env = Environment { control: Some("postgresql://env/c".into()), ..Environment::default() };

        let error = find(None, &nothing, &below).unwrap_err().to_string();
        assert!(error.contains("THEREV_CONTROL_URL"), "{error}");

        write(&top.path().join(".therev/therev.toml"), "postgresql://local-above/c");
        assert_eq!(control(None, &nothing), "postgresql://local-above/c");
        write(&below.join(".therev/therev.toml"), "postgresql://local/c");
        assert_eq!(control(None, &nothing), "postgresql://local/c");
        write(&top.path().join("therev.toml"), "postgresql://above/c");
        assert_eq!(control(None, &nothing), "postgresql://above/c");
        write(&below.join("therev.toml"), "postgresql://here/c");
        assert_eq!(control(None, &nothing), "postgresql://here/c");
        assert_eq!(find(None, &nothing, &below).unwrap().by, FoundBy::File(below.join("therev.toml")));

        assert_eq!(control(None, &env), "postgresql://env/c");
        assert_eq!(control(Some("postgresql://flag/c"), &env), "postgresql://flag/c");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), "control = 'x'\ncolour = 'red'").unwrap();
        let error = find(None, &Environment::default(), folder.path()).unwrap_err().to_string();
        assert!(error.contains(FILE) && error.contains("colour"), "{error}");
    }

    #[test]
    fn what_is_written_is_read() {
        let text = file_text("postgresql://therev@h:1/d", Path::new("pass file"), "state.json").unwrap();
        let config = Config::parse(&text, Path::new("/etc")).unwrap();
        assert_eq!(config.control, "postgresql://therev@h:1/d");
        assert_eq!(config.passfile, Some(PathBuf::from("/etc/pass file")));
        assert_eq!(config.state_file, Some(PathBuf::from("/etc/state.json")));
    }

    /// Every key by its name in the file, with its default as the page writes it. A new field does not compile here.
    fn keys() -> Vec<(&'static str, String)> {
        let Config {
            control: _,
            passfile,
            password,
            state_file,
            deadline_ms,
            connect_timeout_ms,
            pool_size,
            breaker_ms,
            refresh_ms,
            delivery_ms,
            relay_ms,
            hot_users,
            claim_timeout_s,
            session_s,
        } = Config::new("");
        let none = |is_none: bool| if is_none { "none" } else { "another" }.to_owned();
        vec![
            ("control", "required".to_owned()),
            ("passfile", none(passfile.is_none())),
            ("password", none(password.is_none())),
            ("state_file", none(state_file.is_none())),
            ("deadline_ms", deadline_ms.to_string()),
            ("connect_timeout_ms", connect_timeout_ms.to_string()),
            ("pool_size", none(pool_size.is_none())),
            ("breaker_ms", breaker_ms.to_string()),
            ("refresh_ms", refresh_ms.to_string()),
            ("delivery_ms", delivery_ms.to_string()),
            ("relay_ms", relay_ms.to_string()),
            ("hot_users", hot_users.to_string()),
            ("claim_timeout_s", claim_timeout_s.to_string()),
            ("session_s", session_s.to_string()),
        ]
    }

    #[test]
    fn the_page_of_docs_lists_every_key_with_its_default() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/config.md")).unwrap();
        for (key, default) in keys() {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{key}` |")));
            let row = row.unwrap_or_else(|| panic!("docs/config.md has no row for {key}"));
            let cell = row.split('|').nth(2).unwrap().trim();
            assert_eq!(cell, default, "the default of {key}");
        }
    }
}
