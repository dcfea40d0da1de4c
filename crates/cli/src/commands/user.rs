//! `therev user`: the people of the community.

use crate::app::App;
use crate::commands::move_rows::{How, carry_out};
use crate::error::{CliError, Result};
use crate::input;
use crate::output::Output;
use crate::page::wrapped;
use crate::readable;
use crate::tables::{count, day, minute, table};
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Subcommand};
use serde::Serialize;
use std::fmt::Write as _;
use therev::{Group, Listed, NewUser, Post, Role, Therev, ThreadCard, ThreadOrder, User, UserCard, UserChange, UserId};

/// How many of a person's threads and posts its page shows.
const NEWEST: usize = 5;

/// People: show, list, add, edit, deactivate, delete
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a person's page: profile, newest threads and posts, where everything lives
    #[command(after_help = "Example:\n  therev user show @ada")]
    Show(One),
    /// List people by the beginning of their names
    #[command(after_help = "Examples:\n  therev user list\n  therev user list ad --limit 50")]
    List(List),
    /// Register a person
    #[command(after_help = "\
Examples:
  therev user add ada --first-name Ada --last-name Lovelace
  pass show ada | therev user add ada --password-stdin")]
    Add(Box<Add>),
    /// Change a person; an empty text empties a field
    #[command(
        override_usage = "therev user edit [OPTIONS] <ID|@NAME> <what changes>...",
        after_help = "\
Examples:
  therev user edit @ada --role MODERATOR
  therev user edit @ada --user-name countess --bio ''"
    )]
    Edit(Box<Edit>),
    /// Delete a person: account, sessions, AI accounts and tasks go, the names are free again
    #[command(after_help = "Example:\n  therev user delete @ada --with-content")]
    Delete {
        #[command(flatten)]
        who: One,
        /// Delete what the person wrote too; otherwise it stays, under a deleted author
        #[arg(long)]
        with_content: bool,
    },
    /// Bring a person who was placed apart (`therev move user`) back to the bucket
    #[command(after_help = "\
Examples:
  therev user unpin @ada --plan
  therev user unpin @ada")]
    Unpin {
        #[command(flatten)]
        who: One,
        #[command(flatten)]
        how: How,
    },
    /// Let a person log in no more
    Deactivate(One),
    /// Let a deactivated person log in again
    Activate(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// Who
    #[arg(value_name = "ID|@NAME")]
    user: String,
}

#[derive(Debug, clap::Args)]
struct List {
    /// How the names begin
    #[arg(default_value = "")]
    prefix: String,
    /// How many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    limit: u16,
    /// Go on after this name
    #[arg(long, value_name = "NAME")]
    after: Option<String>,
}

/// What is said of a person.
#[derive(Debug, clap::Args)]
struct Profile {
    /// First name, or the whole display name
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    first_name: Option<String>,
    /// Last name
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    last_name: Option<String>,
    /// E-mail address, unique in the community
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    /// What the person says of itself
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    bio: Option<String>,
    /// What the person stands for
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    ideology: Option<String>,
    /// Address of a picture
    #[arg(long, value_name = "URL")]
    picture: Option<String>,
    /// Read the password from standard input; with a new one all sessions end
    #[arg(long)]
    password_stdin: bool,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The user name, unique in the community
    #[arg(value_name = "NAME")]
    user_name: String,
    #[command(flatten)]
    profile: Profile,
    /// The id that an earlier try was told, so that this one is the same registration
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true).args([
    "user_name", "first_name", "last_name", "email", "bio", "ideology", "picture", "password_stdin", "role",
]))]
struct Edit {
    #[command(flatten)]
    who: One,
    /// Another user name
    #[arg(long, value_name = "NAME")]
    user_name: Option<String>,
    #[command(flatten)]
    profile: Profile,
    /// What the person may do
    #[arg(long, value_parser = PossibleValuesParser::new(Role::ALL.iter().map(|role| role.name())))]
    role: Option<String>,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    match args.command {
        Command::Show(who) => Box::pin(show(app, &who.user)).await,
        Command::List(list) => list_by_prefix(app, list).await,
        Command::Add(new) => add(app, *new).await,
        Command::Edit(edit) => change(app, *edit).await,
        Command::Delete { who, with_content } => delete(app, &who.user, with_content).await,
        Command::Unpin { who, how } => unpin(app, &who.user, &how).await,
        Command::Deactivate(who) => set_active(app, &who.user, false).await,
        Command::Activate(who) => set_active(app, &who.user, true).await,
    }
}

async fn unpin(app: &App, user: &str, how: &How) -> Result<()> {
    let therev = app.open_relaying().await?;
    let user = input::user(&therev, user).await?;
    let mover = how.pace.mover(&therev);
    let is_with_it = if how.is_plan() { mover.may_release(user).await? } else { mover.release(user).await? };
    if is_with_it && !how.is_plan() {
        app.note(&therev, "user unpin", &format!("user {user}"), serde_json::json!({ "moved": false })).await;
    }
    match mover.unpin_requests(user).await {
        Err(therev::relocation::Error::Refused { .. }) if is_with_it => {
            app.out.fact(&[(); 0], || "The bucket is here: this person is with it, and nothing has to move.".to_owned())
        }
        requests => carry_out(app, &therev, &mover, &requests?, how).await,
    }
}

/// A person's page.
#[derive(Serialize)]
struct Page {
    user: User,
    threads: Vec<ThreadCard>,
    posts: Vec<Post>,
    lives: Lives,
}

/// Where a person's rows are.
#[derive(Serialize)]
struct Lives {
    bucket: u16,
    account: i16,
    content: i16,
    /// Whether the person is placed apart from the bucket (`therev move user`).
    is_pinned: bool,
}

async fn show(app: &App, user: &str) -> Result<()> {
    let therev = app.open().await?;
    let id = input::user(&therev, user).await?;
    // The directory and the person's shard do not wait for each other.
    let (user, posts, threads) = tokio::try_join!(
        therev.user(id),
        therev.posts_by_author(id, None, i64::try_from(NEWEST).unwrap_or(i64::MAX)),
        therev.threads(ThreadOrder::ByAuthor(id), None, NEWEST, None),
    )?;
    let page = Page { user, threads: threads.items, posts, lives: lives(&therev, id) };
    app.out.fact(&page, || said(&page, &app.out))
}

fn lives(therev: &Therev, id: UserId) -> Lives {
    let map = therev.shards().map();
    let shard = |group| map.place_of(group, id.into()).shard.0;
    let is_pinned = Group::ALL.iter().any(|group| map.pins_of(*group, id.bucket()).any(|(user, _)| user == id));
    let bucket = id.bucket().number();
    Lives { bucket, account: shard(Group::Account), content: shard(Group::Content), is_pinned }
}

fn said(page: &Page, out: &Output) -> String {
    let user = &page.user;
    let mut facts = vec![format!("@{}", readable::line(&user.user_name)), user.role.to_string()];
    facts.push(if user.is_active { "active" } else { "deactivated" }.to_owned());
    facts.push(format!("since {}", day(user.created_at)));
    facts.extend(user.email.as_deref().map(readable::line));
    facts.extend((!user.has_password).then(|| "no password".to_owned()));
    facts.extend(user.ideology.as_deref().map(readable::line));
    facts.push(format!("user {}", user.user_id));
    let mut lines = vec![out.bold(&readable::line(&user.display_name())), wrapped(&facts, out.width)];
    if let Some(bio) = user.bio.as_deref().filter(|bio| !bio.trim().is_empty()) {
        // Other sites' profiles are HTML.
        let text = if bio.contains('<') { readable::html(bio, out.width) } else { readable::plain(bio, out.width) };
        lines.extend([String::new(), text]);
    }
    lines.extend([String::new(), out.bold("Newest threads")]);
    lines.extend(page.threads.iter().map(|card| {
        let title = format!("{}  {} ({})", day(card.created_at), card.title, count(card.post_count.into(), "post"));
        format!("{}\n            {}", first_line(&title, out.width), card.thread_id)
    }));
    lines.extend(page.threads.is_empty().then(|| "none".to_owned()));
    lines.extend([String::new(), out.bold("Newest posts")]);
    lines.extend(page.posts.iter().map(|post| {
        let body = crate::page::body(post.body.as_deref().unwrap_or("(deleted)"), post.format, out.width);
        let text = format!("{}  {}", day(post.created_at), body.split_whitespace().collect::<Vec<_>>().join(" "));
        format!("{}\n            {}", first_line(&text, out.width), post.post_id)
    }));
    lines.extend(page.posts.is_empty().then(|| "none".to_owned()));
    let Lives { bucket, account, content, is_pinned } = page.lives;
    let bucket = if is_pinned { format!("apart from bucket {bucket}") } else { format!("in bucket {bucket}") };
    let place = if account == content {
        format!("Everything of this person lives on shard {account}, {bucket}.")
    } else {
        format!("The account lives on shard {account}, the content on shard {content}, {bucket}.")
    };
    lines.extend([String::new(), place]);
    lines.join("\n")
}

/// As much of a text as fits one line.
fn first_line(text: &str, width: usize) -> String {
    let text = readable::line(text);
    let wrapped = readable::plain(&text, width - 2);
    let first = wrapped.lines().next().unwrap_or_default();
    if first.len() < text.len() { format!("{first} …") } else { first.to_owned() }
}

async fn list_by_prefix(app: &App, list: List) -> Result<()> {
    let therev = app.open().await?;
    let prefix = list.prefix.trim_start_matches('@');
    let users = therev.users_by_prefix(prefix, list.after.as_deref(), list.limit.into(), None).await?;
    app.out.fact(&users, || listed(&users, &list, &app.out))
}

fn listed(users: &Listed<UserCard>, list: &List, out: &Output) -> String {
    if users.items.is_empty() {
        return "Nobody's name begins like this.".to_owned();
    }
    let rows = users.items.iter().map(|user| {
        let role = if user.is_active { user.role.to_string() } else { format!("{} (deactivated)", user.role) };
        let display = user.display_name.as_deref().map(readable::line).unwrap_or_default();
        vec![
            format!("@{}", readable::line(&user.user_name)),
            display,
            role,
            day(user.created_at),
            user.user_id.to_string(),
        ]
    });
    let mut text = table(out.width, &["name", "is called", "role", "since", "id"], &[], rows);
    if let Some(next) = &users.next {
        let prefix = if list.prefix.is_empty() { String::new() } else { format!(" {}", list.prefix) };
        let _ = write!(text, "\n\nMore: therev user list{prefix} --limit {} --after {next}", list.limit);
    }
    text
}

async fn add(app: &App, new: Add) -> Result<()> {
    let user_id = input::optional_id("user", new.id.as_deref())?;
    let Profile { first_name, last_name, email, bio, ideology, picture, password_stdin } = new.profile;
    let password = input::password(password_stdin)?;
    let user_name = new.user_name.trim_start_matches('@').to_owned();
    let profile_pic_url = picture;
    let user_id = user_id.unwrap_or_else(UserId::new);
    let user = NewUser {
        user_id: Some(user_id),
        user_name,
        first_name,
        last_name,
        email,
        password,
        bio,
        ideology,
        profile_pic_url,
        metadata: None,
    };
    let therev = app.open().await?;
    let registered = therev.register(user, &app.operator()).await;
    let user = registered.map_err(|error| CliError::of_create(error, user_id))?;
    app.settle(&therev).await;
    app.out.fact(&user, || format!("Registered @{} as user {}.", user.user_name, user.user_id))
}

async fn change(app: &App, edit: Edit) -> Result<()> {
    let profile = edit.profile;
    let change = UserChange {
        user_name: edit.user_name.map(|name| name.trim_start_matches('@').to_owned()),
        email: input::emptied(profile.email),
        first_name: input::emptied(profile.first_name),
        last_name: input::emptied(profile.last_name),
        bio: input::emptied(profile.bio),
        ideology: input::emptied(profile.ideology),
        profile_pic_url: input::emptied(profile.picture),
        role: edit.role.and_then(|role| role.parse().ok()),
        is_active: None,
        password: input::password(profile.password_stdin)?,
        keep_session: None,
    };
    let therev = app.open().await?;
    let id = input::user(&therev, &edit.who.user).await?;
    let user = therev.change_user(id, change, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&user, || format!("Changed @{} ({}).", user.user_name, minute(user.updated_at)))
}

async fn set_active(app: &App, user: &str, is_active: bool) -> Result<()> {
    let therev = app.open().await?;
    let id = input::user(&therev, user).await?;
    let user = therev.set_active(id, is_active, &app.operator()).await?;
    app.settle(&therev).await;
    let now = if is_active { "may log in" } else { "may log in no more" };
    app.out.fact(&user, || format!("@{} {now}.", user.user_name))
}

async fn delete(app: &App, user: &str, with_content: bool) -> Result<()> {
    let therev = app.open().await?;
    let id = input::user(&therev, user).await?;
    let gone = therev.delete_user(id, with_content, &app.operator()).await?;
    app.settle(&therev).await;
    app.out.fact(&gone, || {
        let content = match (with_content, count_of(gone.threads, "thread"), count_of(gone.posts, "post")) {
            (false, ..) => "What the person wrote stays, under a deleted author.".to_owned(),
            (true, threads, posts) => format!("{threads} and {posts} went too."),
        };
        format!("Deleted user {id}; the names are free again. {content}")
    })
}

fn count_of(number: u64, one: &str) -> String {
    count(i64::try_from(number).unwrap_or(i64::MAX), one)
}
