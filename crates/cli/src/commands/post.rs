//! `therev post`: single posts.

use crate::app::App;
use crate::error::{CliError, Result};
use crate::input::{self, Body};
use crate::output::Output;
use crate::page::{body, wrapped};
use crate::tables::minute;
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Subcommand};
use therev::{Format, Moderation, NewPost, Parent, Post, PostChange, PostId, PostType, Therev, ThreadId, UserId};

/// Posts: show, add, edit, pin, moderate, delete
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a post
    Show(One),
    /// Write a post: to a thread, or in reply to a post
    #[command(after_help = "\
Examples:
  therev post add --author @bob --thread 018f3c5e-7b2a-8000-8000-00000000abcd --body 'Coffee.'
  fortune | therev post add --author @bob --reply-to 018f3c5e-7b2a-8000-8000-00000000abcd")]
    Add(Add),
    /// Change a post's text
    #[command(
        after_help = "Example:\n  therev post edit 018f3c5e-7b2a-8000-8000-00000000abcd --body 'Then drink tea.'"
    )]
    Edit {
        #[command(flatten)]
        which: One,
        #[command(flatten)]
        body: Body,
    },
    /// Delete a post: it keeps its place for the replies under it and loses its text
    Delete(One),
    /// Mark a post as pinned
    Pin(One),
    /// Show a pinned post at its place again
    Unpin(One),
    /// Set what a moderator decided
    #[command(after_help = "Example:\n  therev post moderate 018f3c5e-7b2a-8000-8000-00000000abcd flagged")]
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
    /// Which post
    #[arg(value_name = "ID")]
    post: String,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("to").required(true).args(["thread", "reply_to"]))]
struct Add {
    /// Who writes
    #[arg(long, value_name = "ID|@NAME")]
    author: String,
    /// The thread it goes to
    #[arg(long, value_name = "ID")]
    thread: Option<String>,
    /// The post it answers
    #[arg(long, value_name = "POST")]
    reply_to: Option<String>,
    #[command(flatten)]
    body: Body,
    /// What it is
    #[arg(long = "type", default_value = "TEXT", value_parser = PossibleValuesParser::new(PostType::ALL.iter().map(|t| t.name())))]
    post_type: String,
    /// How the text is written
    #[arg(long, default_value = "plain", value_parser = PossibleValuesParser::new(Format::ALL.iter().map(|f| f.name())))]
    format: String,
    /// The id that an earlier try was told, so that this one is the same post
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let state = PostChange::default();
    match args.command {
        Command::Show(which) => show(app, &which).await,
        Command::Add(new) => add(app, new).await,
        Command::Edit { which, body } => {
            let body = Some(body.text()?);
            change(app, &which, PostChange { body, ..state }, "Changed").await
        }
        Command::Delete(which) => delete(app, &which).await,
        Command::Pin(which) => change(app, &which, PostChange { is_pinned: Some(true), ..state }, "Pinned").await,
        Command::Unpin(which) => change(app, &which, PostChange { is_pinned: Some(false), ..state }, "Unpinned").await,
        Command::Moderate { which, decision } => {
            let moderation = decision.parse().ok();
            change(app, &which, PostChange { moderation, ..state }, &format!("Marked as {decision}:")).await
        }
    }
}

async fn show(app: &App, which: &One) -> Result<()> {
    let id: PostId = input::id("post", &which.post)?;
    let therev = app.open().await?;
    let post = therev.post(id).await?;
    // The name is a courtesy: an author who is deleted, or whose shard is down, is shown by id.
    let author =
        therev.user(post.author_id).await.ok().map(|user| format!("@{}", crate::readable::line(&user.user_name)));
    app.out.fact(&post, || said(&post, author, &app.out))
}

fn said(post: &Post, author: Option<String>, out: &Output) -> String {
    let mut facts = vec![author.unwrap_or_else(|| format!("user {}", post.author_id)), minute(post.created_at)];
    facts.extend((post.post_type != PostType::Text).then(|| post.post_type.to_string()));
    facts.extend((post.score != 0).then(|| format!("score {}", post.score)));
    facts.extend(post.is_pinned.then(|| "pinned".to_owned()));
    facts.extend((post.moderation != Moderation::Approved).then(|| post.moderation.to_string()));
    facts.push(format!("post {}", post.post_id));
    facts.push(format!("in thread {}", post.thread_id));
    facts.extend(post.parent_post_id.map(|parent| format!("in reply to post {parent}")));
    let text = post.body.as_deref().map_or_else(|| "(deleted)".to_owned(), |text| body(text, post.format, out.width));
    format!("{}\n\n{text}", wrapped(&facts, out.width))
}

async fn add(app: &App, new: Add) -> Result<()> {
    let post_id = input::optional_id("post", new.id.as_deref())?;
    let thread: Option<ThreadId> = input::optional_id("thread", new.thread.as_deref())?;
    let reply_to: Option<PostId> = input::optional_id("post", new.reply_to.as_deref())?;
    let body = new.body.text()?;
    let post_type = new.post_type.parse().unwrap_or(PostType::Text);
    let format = new.format.parse().unwrap_or(Format::Plain);
    let therev = app.open().await?;
    // The library leaves it to whoever calls to know the author; here it is just a name or an id that was typed.
    let author = therev.user(input::user(&therev, &new.author).await?).await?.user_id;
    let post = match (thread, reply_to) {
        (_, Some(parent)) => answer(&therev, author, parent, body).await?,
        (thread, None) => NewPost::new(author, thread.unwrap_or(ThreadId(uuid::Uuid::nil())), body),
    };
    let post_id = post_id.unwrap_or_else(|| PostId::new(author));
    let created = therev.create_post(NewPost { post_id: Some(post_id), post_type, format, ..post }).await;
    let post = created.map_err(|error| CliError::of_create(error, post_id))?;
    app.settle(&therev).await;
    app.out.fact(&post, || format!("Wrote post {}.", post.post_id))?;
    let (target, after) = (format!("post {}", post.post_id), serde_json::json!({ "author": author }));
    app.note(&therev, "post add", &target, after).await;
    Ok(())
}

/// A post under another one, in the same thread.
async fn answer(therev: &Therev, author: UserId, to: PostId, body: String) -> Result<NewPost> {
    let parent = therev.post(to).await?;
    if parent.body.is_none() {
        return Err(therev::Error::Gone { what: "post", id: to.to_string() }.into());
    }
    let parent_place = Parent { post_id: to, author_id: parent.author_id };
    Ok(NewPost { parent: Some(parent_place), ..NewPost::new(author, parent.thread_id, body) })
}

async fn change(app: &App, which: &One, change: PostChange, done: &str) -> Result<()> {
    let id: PostId = input::id("post", &which.post)?;
    let therev = app.open().await?;
    let post = therev.change_post(id, change, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&post, || format!("{done} post {id}."))
}

async fn delete(app: &App, which: &One) -> Result<()> {
    let id: PostId = input::id("post", &which.post)?;
    let therev = app.open().await?;
    therev.delete_post(id, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&serde_json::json!({ "deleted": id }), || format!("Deleted post {id}."))
}
