//! `therev where`: which shard owns something, and how that is known.

use crate::app::App;
use crate::error::Result;
use crate::input;
use therev::{Found, Whereabouts};
use uuid::Uuid;

/// Say which shard owns an id or a name, and how that was found
///
/// A well-formed id that nobody has yet is placed all the same.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev where @ada
  therev where 018f3c5e-7b2a-8000-8000-00000000abcd --json")]
pub(crate) struct Args {
    /// An id of a user, thread, post, session, AI account or task; or a user's name
    #[arg(value_name = "ID|@NAME")]
    what: String,
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let name = args.what.strip_prefix('@');
    let id = if name.is_some() { None } else { Some(input::id::<Uuid>("user, thread or post", &args.what)?) };
    let therev = app.open().await?;
    let found = match (name, id) {
        (Some(name), _) => therev.where_name(name).await?,
        (None, id) => therev.where_id(id.unwrap_or_default()).await?,
    };
    app.out.fact(&found, || said(&found))
}

fn said(found: &Whereabouts) -> String {
    let via = match found.via {
        Found::Hash => "the hash of the user's id",
        Found::Id => "the id, which carries its owner's bucket",
        Found::Route => "its route: another system made the id",
        Found::Name => "the claim of the name, then the hash of the user's id",
    };
    let owner = found.owner.map_or_else(|| "nobody yet".to_owned(), |owner| format!("user {owner}"));
    let what = if found.exists { found.what } else { "nothing has this id yet; it would be here" };
    [
        format!("shard   {}", found.shard),
        format!("bucket  {} of group {}", found.bucket, found.group),
        format!("owner   {owner}"),
        format!("is      {what}"),
        format!("found   by {via}"),
    ]
    .join("\n")
}
