//! `therev audit`: who changed what of whom.

use crate::app::App;
use crate::error::Result;
use crate::input;
use crate::output::Output;
use crate::page::silent;
use crate::readable;
use crate::tables::minute;
use clap::Subcommand;
use serde_json::Value;
use therev::{AuditEntry, AuditList};

/// Read the audit log: who changed what of whom
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the newest entries: one user's, or everybody's and the operators'
    #[command(after_help = "\
Examples:
  therev audit list
  therev audit list --user @ada --limit 5 --json")]
    List {
        /// Only what was done to this user's account and content
        #[arg(long, value_name = "ID|@NAME")]
        user: Option<String>,
        /// How many
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=1_000))]
        limit: i64,
    },
}

/// What changed stands under the time.
const INDENT: &str = "                      ";

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let Command::List { user, limit } = args.command;
    let therev = app.open().await?;
    let of = match &user {
        Some(user) => Some(input::user(&therev, user).await?),
        None => None,
    };
    let log = therev.audit(of, limit).await?;
    app.out.fact(&log, || said(&log, &app.out))
}

fn said(log: &AuditList, out: &Output) -> String {
    let mut blocks: Vec<String> = log.entries.iter().map(|entry| one(entry, out)).collect();
    if log.partial {
        blocks.push(
            out.fitted(&format!("This list is not whole: {} What was noted there is missing.", silent(&log.missing))),
        );
    } else if blocks.is_empty() {
        return "Nothing was noted.".to_owned();
    }
    blocks.join("\n")
}

fn one(entry: &AuditEntry, out: &Output) -> String {
    let (action, target) = (readable::line(&entry.action), readable::line(&entry.target));
    // `change user` of `user 018f…`: the word once.
    let what = target.split(' ').next().unwrap_or_default();
    let did = format!("{} {target}", action.strip_suffix(what).unwrap_or(&action).trim_end());
    let who = format!("{}: {did}", readable::line(&entry.actor));
    let mut lines = vec![out.indented(&format!("{}  ", minute(entry.created_at)), &who)];
    let changes = changes(entry).join(", ");
    let wrapped = readable::plain(&changes, out.width - INDENT.len());
    lines.extend(wrapped.lines().filter(|line| !line.is_empty()).map(|line| format!("{INDENT}{line}")));
    lines.join("\n")
}

/// Field by field: what was there, what is there now.
fn changes(entry: &AuditEntry) -> Vec<String> {
    let nothing = serde_json::Map::new();
    let before = entry.before.as_object().unwrap_or(&nothing);
    let after = entry.after.as_object().unwrap_or(&nothing);
    let said = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => shortened(&readable::line(text)),
        Some(other) => shortened(&readable::line(&other.to_string())),
    };
    let mut fields: Vec<&String> = before.keys().chain(after.keys()).collect();
    fields.sort();
    fields.dedup();
    let change = |field: &String| match before.get(field) {
        None => format!("{field}: {}", said(after.get(field))),
        old => format!("{field}: {} → {}", said(old), said(after.get(field))),
    };
    fields.into_iter().map(change).collect()
}

fn shortened(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    if short.len() < text.len() { format!("{short}…") } else { short }
}
