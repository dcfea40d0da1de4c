//! `therev thread`: threads and their pages.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::input::{self, Body};
use crate::output::{Output, document, write_text};
use crate::page;
use crate::readable;
use crate::tables::{count, day};
use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use std::fmt::Write as _;
use std::time::Duration;
use therev::{Format, Listed, Moderation, NewThread, ThreadCard, ThreadChange, ThreadId, ThreadOrder};

/// Of more shards than this, a page asks some and not most.
const REACHED_AT_ONCE: usize = 8;
/// How long a page waits for connections that it may not need.
const REACHED_WITHIN: Duration = Duration::from_millis(100);

/// Threads: show, list, add, edit, lock, pin, moderate, delete
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a page of a thread: who, when, what, replies under their parent
    #[command(after_help = "\
Examples:
  therev thread show 018f3c5e-7b2a-8000-8000-00000000abcd
  therev thread show 018f3c5e-7b2a-8000-8000-00000000abcd --page-size 10 --json")]
    Show(Show),
    /// List threads
    #[command(after_help = "\
Examples:
  therev thread list
  therev thread list --most-active --limit 5
  therev thread list --by @ada")]
    List(List),
    /// Open a thread
    #[command(after_help = "\
Examples:
  therev thread add --author @ada --title 'Which tea?' --body 'I only have coffee.'
  therev thread add --author @ada --title 'Which tea?' < question.txt")]
    Add(Add),
    /// Change a thread's title or text
    #[command(after_help = "\
Examples:
  therev thread edit 018f3c5e-7b2a-8000-8000-00000000abcd --title 'Which coffee?'
  therev thread edit 018f3c5e-7b2a-8000-8000-00000000abcd < question.txt")]
    Edit(Edit),
    /// Delete a thread: it answers as gone, and other people's posts in it stay theirs
    Delete(One),
    /// Let a thread take no more replies
    Lock(One),
    /// Let a locked thread take replies again
    Unlock(One),
    /// Mark a thread as pinned
    Pin(One),
    /// Show a pinned thread at its place again
    Unpin(One),
    /// Set what a moderator decided
    #[command(after_help = "Example:\n  therev thread moderate 018f3c5e-7b2a-8000-8000-00000000abcd rejected")]
    Moderate {
        #[command(flatten)]
        which: One,
        /// The decision
        #[arg(value_parser = PossibleValuesParser::new(Moderation::ALL.iter().map(|word| word.name())))]
        decision: String,
    },
}

#[derive(Debug, clap::Args)]
struct One {
    /// Which thread
    #[arg(value_name = "ID")]
    thread: String,
}

#[derive(Debug, clap::Args)]
struct Show {
    #[command(flatten)]
    which: One,
    /// Posts on a page
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    page_size: u16,
    /// Go on after this cursor; each page ends with it
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
}

#[derive(Debug, clap::Args)]
struct List {
    #[command(flatten)]
    order: Order,
    /// How many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    limit: u16,
    /// Go on after this cursor; each list ends with it
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
}

#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Order {
    /// Opened last first; this is the default
    #[arg(long)]
    newest: bool,
    /// Most posts first
    #[arg(long)]
    most_active: bool,
    /// One author's, opened last first
    #[arg(long, value_name = "ID|@NAME")]
    by: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// Who opens it
    #[arg(long, value_name = "ID|@NAME")]
    author: String,
    /// What it is about
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    title: String,
    #[command(flatten)]
    body: Body,
    /// How the text is written
    #[arg(long, default_value = "plain", value_parser = PossibleValuesParser::new(Format::ALL.iter().map(|f| f.name())))]
    format: String,
    /// The id that an earlier try was told, so that this one is the same thread
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Edit {
    #[command(flatten)]
    which: One,
    /// Another title; the text stays unless --body is given too
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    title: Option<String>,
    #[command(flatten)]
    body: Body,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let state = ThreadChange::default();
    match args.command {
        Command::Show(args) => show(app, args).await,
        Command::List(args) => list(app, args).await,
        Command::Add(new) => add(app, new).await,
        Command::Edit(edit) => {
            let keeps_text = edit.title.is_some() && !edit.body.is_given();
            let body = if keeps_text { None } else { Some(edit.body.text()?) };
            if body.as_deref() == Some("") && !edit.body.is_given() {
                // Nothing was written there by anybody: an editor that is not a terminal, or a job.
                let next = "give a --title, or a text by --body or on standard input; `--body ''` empties the thread";
                return Err(CliError::usage("there is nothing to change", next));
            }
            change(app, &edit.which, ThreadChange { title: edit.title, body, ..state }, "Changed").await
        }
        Command::Delete(which) => delete(app, &which).await,
        Command::Lock(which) => change(app, &which, ThreadChange { is_locked: Some(true), ..state }, "Locked").await,
        Command::Unlock(which) => {
            change(app, &which, ThreadChange { is_locked: Some(false), ..state }, "Unlocked").await
        }
        Command::Pin(which) => change(app, &which, ThreadChange { is_pinned: Some(true), ..state }, "Pinned").await,
        Command::Unpin(which) => {
            change(app, &which, ThreadChange { is_pinned: Some(false), ..state }, "Unpinned").await
        }
        Command::Moderate { which, decision } => {
            let moderation = decision.parse().ok();
            change(app, &which, ThreadChange { moderation, ..state }, &format!("Marked as {decision}:")).await
        }
    }
}

async fn show(app: &App, args: Show) -> Result<()> {
    let id: ThreadId = input::id("thread", &args.which.thread)?;
    let after = input::cursor(args.after.as_deref())?;
    let therev = app.open().await?;
    // A page asks most of a few. One that says nothing is left to the call that needs it; none is given up half made.
    let shards = therev.shards().clone();
    if shards.numbers().len() <= REACHED_AT_ONCE {
        let ahead = tokio::spawn(async move { shards.reach_all().await });
        tokio::time::timeout(REACHED_WITHIN, ahead).await.ok();
    }
    let page = therev.thread_page(id, after, args.page_size.into()).await?;
    if app.out.json {
        return document(&page);
    }
    let size = if args.page_size == 50 { String::new() } else { format!(" --page-size {}", args.page_size) };
    let cursor = page.next.map(|cursor| cursor.to_string()).unwrap_or_default();
    write_text(&page::render(&page, &app.out, &format!("therev thread show {id}{size} --after {cursor}")))
}

async fn list(app: &App, args: List) -> Result<()> {
    let therev = app.open().await?;
    let (order, flag) = match &args.order {
        Order { by: Some(user), .. } => {
            (ThreadOrder::ByAuthor(input::user(&therev, user).await?), format!(" --by {user}"))
        }
        Order { most_active: true, .. } => (ThreadOrder::MostActive, " --most-active".to_owned()),
        Order { .. } => (ThreadOrder::Newest, String::new()),
    };
    let threads = therev.threads(order, args.after.as_deref(), args.limit.into(), None).await?;
    let again = format!("therev thread list{flag} --limit {}", args.limit);
    app.out.fact(&threads, || listed(&threads, &again, &app.out))
}

fn listed(threads: &Listed<ThreadCard>, again: &str, out: &Output) -> String {
    if threads.items.is_empty() {
        return "There are no threads here.".to_owned();
    }
    let mut text = threads.items.iter().map(|card| one(card, out)).collect::<Vec<_>>().join("\n");
    if let Some(next) = &threads.next {
        let _ = write!(text, "\n\nMore: {again} --after {next}");
    }
    text
}

/// A thread in two lines: what it is about, then the facts and its id.
fn one(card: &ThreadCard, out: &Output) -> String {
    let title = readable::plain(&readable::line(&card.title), out.width);
    let user_name = card.author.user_name.as_deref().map(|name| format!("@{}", readable::line(name)));
    let mut facts = vec![
        count(card.post_count.into(), "post"),
        user_name.unwrap_or_else(|| format!("user {}", card.author.user_id)),
        day(card.created_at),
    ];
    facts.extend(card.is_pinned.then(|| "pinned".to_owned()));
    facts.extend(card.is_locked.then(|| "locked".to_owned()));
    facts.extend((card.moderation != Moderation::Approved).then(|| card.moderation.to_string()));
    facts.push(format!("thread {}", card.thread_id));
    let facts = page::wrapped(&facts, out.width - 2).replace('\n', "\n  ");
    format!("{}\n  {facts}", title.lines().map(|line| out.bold(line)).collect::<Vec<_>>().join("\n"))
}

async fn add(app: &App, new: Add) -> Result<()> {
    let thread_id = input::optional_id("thread", new.id.as_deref())?;
    let body = new.body.text()?;
    let therev = app.open().await?;
    let author = input::user(&therev, &new.author).await?;
    let format = new.format.parse().unwrap_or(Format::Plain);
    let thread_id = thread_id.unwrap_or_else(|| ThreadId::new(author));
    let thread = NewThread { thread_id: Some(thread_id), format, ..NewThread::new(author, new.title, body) };
    let created = therev.create_thread(thread).await;
    let thread = created.map_err(|error| CliError::of_create(error, thread_id))?;
    app.settle(&therev).await;
    app.out.fact(&thread, || format!("Opened thread {}.", thread.thread_id))?;
    let (target, after) = (format!("thread {}", thread.thread_id), serde_json::json!({ "author": author }));
    app.note(&therev, "thread add", &target, after).await;
    Ok(())
}

async fn change(app: &App, which: &One, change: ThreadChange, done: &str) -> Result<()> {
    let id: ThreadId = input::id("thread", &which.thread)?;
    let therev = app.open().await?;
    let thread = therev.change_thread(id, change, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&thread, || format!("{done} thread {id}."))
}

async fn delete(app: &App, which: &One) -> Result<()> {
    let id: ThreadId = input::id("thread", &which.thread)?;
    let therev = app.open().await?;
    therev.delete_thread(id, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&serde_json::json!({ "deleted": id }), || format!("Deleted thread {id}."))
}
