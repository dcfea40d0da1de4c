//! What went wrong, for people and for programs: one sentence, and the next step.

use crate::output::complain;
use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use therev::Database;

/// The result of a command's steps.
pub(crate) type Result<T> = std::result::Result<T, CliError>;

/// An error as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    /// What kind it is, for programs.
    kind: &'static str,
    /// What happened, with the reasons behind it.
    message: String,
    /// What to do next.
    next: String,
}

/// Nobody reads the output any more: nothing to tell, and nobody to tell it to.
const UNREAD: &str = "unread";
/// The command line could not be understood.
const USAGE: &str = "usage";

impl CliError {
    pub(crate) fn new(kind: &'static str, message: impl Into<String>, next: impl Into<String>) -> CliError {
        CliError { kind, message: message.into(), next: next.into() }
    }

    /// A value that cannot be accepted.
    pub(crate) fn invalid(message: impl Into<String>, next: impl Into<String>) -> CliError {
        CliError::new("invalid", message, next)
    }

    /// A command line that cannot be understood, found out only after clap had read it.
    pub(crate) fn usage(message: impl Into<String>, next: impl Into<String>) -> CliError {
        CliError::new(USAGE, message, next)
    }

    /// A file that could not be used.
    pub(crate) fn file(action: &str, path: &Path, source: &io::Error) -> CliError {
        let message = format!("could not {action} {}: {source}", path.display());
        CliError::new("file", message, "put that right, then run the command again")
    }

    /// The same with something more in the next step.
    pub(crate) fn also(mut self, more: &str) -> CliError {
        self.next = if self.next.is_empty() { more.to_owned() } else { format!("{}; {more}", self.next) };
        self
    }

    /// An error of a create. Where nobody knows what became of it, the same id makes the same command the same create.
    pub(crate) fn of_create(error: therev::Error, id: impl fmt::Display) -> CliError {
        let is_open = matches!(&error, therev::Error::Store(e) if matches!(e.kind(), "outcome_unknown" | "deadline"));
        let error = CliError::from(error);
        if !is_open {
            return error;
        }
        CliError { next: format!("run the same command again with --id {id}: it writes nothing twice"), ..error }
    }

    /// The object that programs read.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({ "error": { "kind": self.kind, "message": self.message, "next": self.next } })
    }

    /// Tells it on stderr.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        if self.kind == UNREAD {
            return ExitCode::SUCCESS;
        }
        if json {
            complain(&self.json().to_string());
        } else {
            complain(&self.to_string());
        }
        if self.kind == USAGE { ExitCode::from(2) } else { ExitCode::FAILURE }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if self.next.is_empty() { Ok(()) } else { write!(f, "\n next: {}", self.next) }
    }
}

/// Tells what clap has to say: help on stdout, what it could not understand on stderr.
pub(crate) fn report_usage(usage: &clap::Error) -> ExitCode {
    if !usage.use_stderr() {
        // Whoever closed the pipe has read enough.
        let _ = usage.print();
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = usage.render().to_string();
        let message = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").trim();
        complain(&CliError::usage(message, "`--help` shows what can be said").json().to_string());
    } else {
        let _ = usage.print();
    }
    ExitCode::from(2)
}

/// An error with the reasons behind it, each once.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        let said = reason.to_string();
        // The driver's word for "the server said".
        if said != "db error" && !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = reason.source();
    }
    text
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> CliError {
        let kind = if error.kind() == io::ErrorKind::BrokenPipe { UNREAD } else { "io" };
        CliError::new(kind, error.to_string(), "put that right, then run the command again")
    }
}

impl From<serde_json::Error> for CliError {
    fn from(error: serde_json::Error) -> CliError {
        if error.is_io() {
            io::Error::from(error).into()
        } else {
            CliError::new("json", error.to_string(), "report this")
        }
    }
}

impl From<therev::Error> for CliError {
    fn from(error: therev::Error) -> CliError {
        let next = next_step(&error);
        CliError::new(error.kind(), chain(&error), next)
    }
}

impl From<therev::relocation::Error> for CliError {
    fn from(error: therev::relocation::Error) -> CliError {
        use therev::relocation::Error;
        match error {
            Error::Refused { reason, next } => CliError::new("refused", reason, next),
            Error::Store(error) => CliError::from(error),
            Error::Unknown(_) => {
                CliError::new("not_found", error.to_string(), "`therev relocation list --all` lists all")
            }
            Error::Taken(_) => CliError::new("taken", error.to_string(), "look on with `therev relocation show`"),
            Error::Differs { relocation, .. } => CliError::new(
                "differs",
                error.to_string(),
                format!("`therev relocation verify {relocation} --repair` copies them anew"),
            ),
            _ => CliError::new("relocation", chain(&error), "see to that server"),
        }
    }
}

impl From<therev::StoreError> for CliError {
    fn from(error: therev::StoreError) -> CliError {
        CliError::from(therev::Error::from(error))
    }
}

impl From<local::Error> for CliError {
    /// The library's sentence ends with the next step.
    fn from(error: local::Error) -> CliError {
        let own = error.to_string();
        let (message, next) = own.rsplit_once("; ").unwrap_or((&own, ""));
        let mut message = message.to_owned();
        if let Some(source) = error.source() {
            message = format!("{message}: {}", chain(source));
        }
        CliError::new("local", message, next.trim_start_matches("see the reason, "))
    }
}

impl From<therev::import::ImportError> for CliError {
    fn from(error: therev::import::ImportError) -> CliError {
        match error {
            therev::import::ImportError::Community(error) => {
                CliError::from(error).also("what was imported stays, and the same import continues it")
            }
            therev::import::ImportError::Dump(error) => CliError::new(
                "dump",
                chain(&error),
                "correct or replace the file, then run the same import again: it continues, and changes nothing twice",
            ),
        }
    }
}

/// What to do about an error of the library.
fn next_step(error: &therev::Error) -> String {
    let text = match error {
        therev::Error::Store(therev::StoreError::InTheWay { next, .. }) => next,
        therev::Error::Store(store) => match (store.kind(), store.database()) {
            ("down", Some(Database::Control)) => "start it (a local cluster: `therev cluster up`)",
            ("down", _) => "`therev status` shows what is down; a local cluster is repaired by `therev cluster up`",
            ("refused", _) => {
                "give the right role and password: in the passfile, in therev.toml or in the control address \
                 (docs/config.md)"
            }
            ("outcome_unknown", _) => "look whether it was done, or run the same command again with the same --id",
            ("deadline", _) => "try again; `therev status` shows which database does not answer",
            ("closed", _) => {
                "`therev status` shows what is down; a server whose place was taken is to become a standby, or counts \
                 again by `therev life grant` where the one that took it is lost for good"
            }
            ("wrong_database", _) => "correct the address; `therev init` makes a cluster of empty databases",
            ("config", _) => "correct it; docs/config.md lists every key and form of address",
            ("schema", _) => "`therev schema status` shows the versions; a newer schema needs the newer program",
            ("answer", _) => "`therev schema status` shows whether schemas and program belong together",
            _ => "run it again with -v to see more; `therev schema status` shows whether the schemas are current",
        },
        therev::Error::NotFound { what, .. } => match *what {
            "user" => "`therev user list PREFIX` finds users by the beginning of their names",
            "thread" => "`therev thread list` shows the threads",
            _ => "check the id; `therev where ID` says where it would be",
        },
        therev::Error::Gone { .. } => "nothing is left to do: what was deleted stays deleted",
        therev::Error::Conflict { .. } => "choose another one; nothing was written",
        therev::Error::Invalid { .. } => "correct it and run the command again; nothing was written",
        therev::Error::Locked(thread) => return format!("`therev thread unlock {thread}` lets it take replies again"),
        therev::Error::Changed { .. } => "run the command again: it starts from what is there now",
        _ => "put that right, then run the command again",
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the file is gone")]
    struct Inner;

    #[derive(Debug, thiserror::Error)]
    #[error("db error")]
    struct Middle(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("shard 2 is down")]
    struct Outer(#[source] Middle);

    #[test]
    fn reasons_follow_once_each() {
        assert_eq!(chain(&Outer(Middle(Inner))), "shard 2 is down: the file is gone");
    }

    #[test]
    fn programs_get_three_fields() {
        let error = CliError::from(therev::Error::NotFound { what: "user", id: "@ada".into() });
        insta::assert_snapshot!(error.json(), @r#"{"error":{"kind":"not_found","message":"there is no user @ada","next":"`therev user list PREFIX` finds users by the beginning of their names"}}"#);
        insta::assert_snapshot!(error, @r"
        error: there is no user @ada
         next: `therev user list PREFIX` finds users by the beginning of their names
        ");
    }

    #[test]
    fn a_local_error_is_split_into_what_happened_and_what_to_do() {
        let error = CliError::from(local::Error::NoCluster { dir: "/x".into() });
        assert_eq!(error.message, "there is no local cluster in /x");
        assert_eq!(error.next, "make one with `therev cluster up`");
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = CliError::from(local::Error::File { action: "make", path: "/x".into(), source: denied });
        assert_eq!(error.message, "could not make /x: permission denied");
        assert_eq!(error.next, "put it right and try again");
    }

    #[test]
    fn only_a_pipe_that_nobody_reads_is_told_of_to_nobody() {
        let silent = |error: CliError| format!("{:?}", error.report(true)) == format!("{:?}", ExitCode::SUCCESS);
        assert!(silent(io::Error::from(io::ErrorKind::BrokenPipe).into()));
        let closed = therev::StoreError::Closed { database: Database::Directory, reason: "promoted".into() };
        let closed = CliError::from(closed);
        assert_eq!(closed.json()["error"]["kind"], "closed");
        assert!(!silent(closed));
    }
}
