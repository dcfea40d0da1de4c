//! `therev init`: makes a cluster of databases that exist already.

use crate::app::App;
use crate::config::{FILE, file_text};
use crate::error::{CliError, Result};
use crate::passfile::{Passwords, library_address};
use clap::ValueEnum;
use std::path::PathBuf;
use therev::{InitPlan, Layout};

/// Where the last known placement is kept.
const STATE_FILE: &str = "therev-placement.json";

/// Make a cluster of PostgreSQL databases that exist already
///
/// The addresses, --control among them, name a role that may create roles. Roles, schemas, identities and the first placement are made;
/// what an interrupted run left is finished. The passwords of therev's own roles are taken from the passfile, or made
/// and written to it; therev.toml is written unless it exists.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  therev init --control postgresql://postgres@a/control --directory postgresql://postgres@a/directory \\
    --shard postgresql://postgres@a/shard_0 --shard postgresql://postgres@b/shard_1")]
pub(crate) struct Args {
    /// The directory's writer
    #[arg(long, value_name = "URL")]
    directory: String,
    /// A read replica of the directory; any number
    #[arg(long, value_name = "URL")]
    replica: Vec<String>,
    /// A shard, in the order of their numbers
    #[arg(long, value_name = "URL", required = true)]
    shard: Vec<String>,
    /// How the colocation groups lie on the shards
    #[arg(long, value_enum, default_value_t = LayoutName::Colocated)]
    layout: LayoutName,
    /// Where the passwords of therev's own roles are, or will be
    #[arg(long, value_name = "FILE", default_value = "therev.pass")]
    passfile: PathBuf,
}

/// A layout, as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutName {
    /// Everything of a user on one shard, over all shards
    Colocated,
    /// Accounts on shard 0, content on the others
    Split,
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Layout {
        match name {
            LayoutName::Colocated => Layout::Colocated,
            LayoutName::Split => Layout::Split,
        }
    }
}

pub(crate) async fn run(app: &App, args: Args) -> Result<()> {
    let Some(control) = app.global.control.clone() else {
        return Err(CliError::usage("init needs --control URL", "`therev init --help` shows an example"));
    };
    let passfile = app.folder.join(&args.passfile);
    let passwords = Passwords::read_or_make(&passfile)?;
    let plan = InitPlan {
        control,
        directory: args.directory,
        replicas: args.replica,
        shards: args.shard,
        layout: args.layout.into(),
        password: passwords.library.clone(),
        admin_password: passwords.admin.clone(),
        mover_password: passwords.mover.clone(),
    };
    // Before the roles get them: a run that is cut off here is run again with the same ones.
    passwords.keep(&passfile)?;
    let made = therev::init(&plan).await.map_err(therev::Error::from)?;
    let control = library_address(&plan.control);
    let file = app.folder.join(FILE);
    let written = !file.exists();
    if written {
        let text = file_text(&control, &args.passfile, STATE_FILE)?;
        std::fs::write(&file, text).map_err(|e| CliError::file("write", &file, &e))?;
    }
    let fact = serde_json::json!({
        "cluster_id": made.cluster_id, "oldest_postgres": made.oldest_postgres, "shards": plan.shards.len(),
        "layout": plan.layout, "control": control, "passfile": passfile.to_string_lossy(),
        "config": file.to_string_lossy(), "config_written": written,
    });
    app.out.fact(&fact, || {
        let shards = plan.shards.len();
        let later = made.needs_later_postgres().into_iter().chain(["Next: therev status".into()]);
        let later = later.collect::<Vec<String>>().join("\n");
        let config = if written { "written" } else { "left as it was: see that its `control` is the address above" };
        format!(
            "The cluster {} is ready: {shards} shards, {} layout.\n  control   {control}\n  passfile  {}\n  \
             config    {} ({config})\n{later}",
            made.cluster_id,
            plan.layout.name(),
            passfile.display(),
            file.display(),
        )
    })
}
