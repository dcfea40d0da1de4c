//! `therev schema`: the versions of all databases, side by side.

use crate::app::App;
use crate::commands::unless_wrong;
use crate::error::{Result, chain};
use crate::output::Output;
use crate::tables::{number, table};
use clap::Subcommand;
use futures_util::future::join_all;
use serde::Serialize;
use std::process::ExitCode;
use therev::{Admin, Database, DatabaseKind, Shards};

/// Bring the schemas of all databases to this program's version, or show their versions
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Command {
    /// Apply what is missing on all databases side by side; exit 1 if one could not be brought up to date
    ///
    /// What was applied before a failure stays, and the next run continues. While a relocation is under way it is refused,
    /// and meanwhile none begins.
    Apply,
    /// Show every database's version; exit 1 if one is not this program's
    Status,
}

/// What became of one database.
#[derive(Debug, Serialize)]
pub(crate) struct SchemaOf {
    database: String,
    kind: &'static str,
    /// Absent: it could not be read.
    version: Option<i32>,
    /// What this program knows.
    newest: i32,
    /// Chapters that were applied now.
    applied: Vec<&'static str>,
    /// What went wrong.
    error: Option<String>,
}

impl SchemaOf {
    pub(crate) fn is_current(&self) -> bool {
        self.error.is_none() && self.version == Some(self.newest)
    }

    fn is_newer(&self) -> bool {
        self.version.is_some_and(|version| version > self.newest)
    }

    fn state(&self) -> String {
        match (&self.error, self.version) {
            (Some(error), _) => error.clone(),
            (None, Some(version)) if version == self.newest && self.applied.is_empty() => "current".to_owned(),
            (None, Some(version)) if version == self.newest => format!("applied {}", self.applied.join(", ")),
            (None, Some(_)) if self.is_newer() => "newer than this program".to_owned(),
            _ => "behind".to_owned(),
        }
    }
}

#[derive(Serialize)]
struct Versions {
    ok: bool,
    databases: Vec<SchemaOf>,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<ExitCode> {
    let therev = app.open().await?;
    let applies = matches!(args.command, Command::Apply);
    let databases = versions(therev.shards(), applies).await?;
    let applied: usize = databases.iter().map(|one| one.applied.len()).sum();
    if applied > 0 {
        let after = serde_json::to_value(&databases)?;
        app.note(&therev, "schema apply", "cluster", after).await;
    }
    let versions = Versions { ok: databases.iter().all(SchemaOf::is_current), databases };
    app.out.fact(&versions, || said(&versions, applies, &app.out))?;
    Ok(unless_wrong(versions.ok))
}

/// Looks at every database side by side, and applies what is missing when asked to.
pub(crate) async fn versions(shards: &Shards, applies: bool) -> Result<Vec<SchemaOf>> {
    let admin = Admin::new(shards.config(), shards.catalog()).map_err(therev::Error::from)?;
    // Where there is nothing to change, nothing stands in the way.
    let behind = applies && look(&admin, false).await.iter().any(|one| one.error.is_none() && !one.is_current());
    let _changing = if behind { Some(admin.begin_schema_change().await?) } else { None };
    Ok(look(&admin, applies && behind).await)
}

async fn look(admin: &Admin, applies: bool) -> Vec<SchemaOf> {
    let asked = admin.databases().into_iter().map(|(database, kind)| one(admin, database, kind, applies));
    join_all(asked).await
}

async fn one(admin: &Admin, database: Database, kind: DatabaseKind, applies: bool) -> SchemaOf {
    let newest = kind.newest_version();
    let mut one = SchemaOf {
        database: database.to_string(),
        kind: kind.name(),
        version: None,
        newest,
        applied: Vec::new(),
        error: None,
    };
    let mut client = match admin.connect(database).await {
        Ok(client) => client,
        Err(error) => return SchemaOf { error: Some(chain(&error)), ..one },
    };
    if applies {
        match schema::apply(&mut client, kind).await {
            Ok(applied) => one.applied = applied,
            Err(error) => one.error = Some(chain(&error)),
        }
    }
    match schema::version(&client).await {
        Ok(version) => one.version = Some(version),
        Err(error) => one.error = one.error.or_else(|| Some(chain(&error))),
    }
    one
}

fn said(versions: &Versions, applies: bool, out: &Output) -> String {
    let rows = versions
        .databases
        .iter()
        .map(|one| vec![one.database.clone(), number(one.version), one.newest.to_string(), one.state()]);
    let header = ["database", "version", "newest", "state"];
    let table = table(out.width, &header, &["version", "newest"], rows);
    let last = match (versions.ok, applies) {
        (true, _) => "All databases are at this program's version.",
        _ if versions.databases.iter().any(SchemaOf::is_newer) => {
            "A newer program made some of these schemas; use that one."
        }
        (false, true) => "Not all are up to date. What was applied stays; `therev schema apply` continues.",
        (false, false) => "Not all are up to date; `therev schema apply` applies what is missing.",
    };
    format!("{table}\n\n{}", out.word(last, versions.ok))
}
