//! `therev cluster up`: servers, then a cluster on them; nothing is done twice.

use crate::app::App;
use crate::commands::cluster::quoted;
use crate::commands::init::LayoutName;
use crate::commands::schema::{SchemaOf, versions};
use crate::config::{FILE, LOCAL_FOLDER, file_text};
use crate::error::{CliError, Result};
use crate::output::talk;
use crate::passfile::{Passwords, library_address};
use local::{Cluster, Options};
use std::path::Path;
use therev::{Config, InitPlan, Layout};
use uuid::Uuid;

/// Files of the cluster's folder that are ours; the rest is the servers'.
const PASSFILE: &str = "passfile";
const STATE_FILE: &str = "placement.json";
/// The layout that was asked for first, until the control database says it.
const LAYOUT_FILE: &str = "layout";

#[derive(Debug, clap::Args)]
pub(super) struct Up {
    /// How many shards; fixed when the cluster is made [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: Option<u16>,
    /// How the colocation groups lie on them; fixed when the cluster is made [default: colocated]
    #[arg(long, value_enum)]
    layout: Option<LayoutName>,
    /// How many streaming replicas of the directory's server [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=64))]
    replicas: Option<u16>,
    /// How many streaming standbys of each shard's server, which `promote` puts in its place [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=4))]
    standbys: Option<u16>,
    /// Whether commits wait until a standby has them, so that a promotion loses none [default: false]
    #[arg(long, value_name = "BOOL")]
    synchronous: Option<bool>,
}

pub(super) async fn run(app: &App, dir: &Path, wanted: &Up) -> Result<()> {
    let existing = match Cluster::open(dir) {
        Ok(cluster) => Some(cluster),
        Err(local::Error::NoCluster { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let asked = wanted.layout.map(Layout::from);
    let layout = first_layout(dir, existing.is_some(), asked)?;
    let options = options(app, dir, wanted, existing.as_ref());
    // What is only remembered may be another `up`'s that came to nothing: the control database says it below.
    if asked == Some(Layout::Split) && options.shards < 2 {
        return Err(CliError::usage("the split layout takes 2 shards or more", "give another --shards or --layout"));
    }
    write(dir, LAYOUT_FILE, layout.name())?;
    let cluster = Cluster::up(&options, &mut |line| talk(line))?;
    // Another first `up` may have asked for another one meanwhile: all go by what is written last.
    let layout = first_layout(dir, true, asked)?;
    let passwords = passwords(dir, &cluster)?;
    let mut plan = plan(&cluster, layout, &passwords)?;
    let initialized = !is_current(dir, &mut plan, asked).await?;
    if initialized {
        talk("Setting the cluster up: roles, schemas, addresses");
        // It may be the passwords by which nobody got in: of a run that was cut off, or of a passfile that was changed.
        cluster.set_passwords(&passwords.all(), &mut |line| talk(line))?;
        therev::init(&plan).await.map_err(therev::Error::from)?;
    }
    write_config(dir, &library_address(&plan.control))?;
    tell(app, dir, &cluster, plan.layout, initialized)
}

/// The passwords of the passfile. Where it lacks some, roles that are there get the new ones.
fn passwords(dir: &Path, cluster: &Cluster) -> Result<Passwords> {
    let path = dir.join(PASSFILE);
    let found = Passwords::read_or_make(&path)?;
    if found.made().next().is_none() {
        return Ok(found);
    }
    found.keep(&path)?;
    // Of two that made some at once, the first one's count: they stand first.
    let passwords = Passwords::read_or_make(&path)?;
    cluster.set_passwords(&passwords.all(), &mut |line| talk(line))?;
    Ok(passwords)
}

/// Removes what [`run`] wrote beside the servers.
pub(super) fn forget(dir: &Path) -> Result<()> {
    for name in [FILE, PASSFILE, STATE_FILE, LAYOUT_FILE] {
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(CliError::file("remove", &path, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The layout of the cluster that is there, or the one to begin with.
fn first_layout(dir: &Path, exists: bool, asked: Option<Layout>) -> Result<Layout> {
    let remembered = std::fs::read_to_string(dir.join(LAYOUT_FILE)).ok().filter(|_| exists);
    let remembered: Option<Layout> = remembered.and_then(|word| word.trim().parse().ok());
    match (remembered, asked) {
        (Some(has), Some(asked)) => same_layout(dir, has, asked),
        (has, asked) => Ok(has.or(asked).unwrap_or(Layout::Colocated)),
    }
}

fn same_layout(dir: &Path, has: Layout, asked: Layout) -> Result<Layout> {
    if has == asked {
        return Ok(has);
    }
    let message = format!("the cluster in {} has the {} layout, not {}", dir.display(), has.name(), asked.name());
    Err(CliError::new("local", message, "leave out --layout, or name another folder with --dir"))
}

fn options(app: &App, dir: &Path, wanted: &Up, existing: Option<&Cluster>) -> Options {
    let count = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    let mut options = Options::new(dir);
    options.shards = wanted.shards.or(existing.map(|it| count(it.shards()))).unwrap_or(options.shards);
    let replicas = existing.map(|it| count(it.replicas()));
    options.replicas = wanted.replicas.or(replicas).unwrap_or(options.replicas);
    let standbys = existing.map(|it| count(it.standbys()));
    options.standbys = wanted.standbys.or(standbys).unwrap_or(options.standbys);
    options.synchronous = wanted.synchronous.or(existing.map(Cluster::is_synchronous)).unwrap_or(options.synchronous);
    options.pg_bin.clone_from(&app.env.pg_bin);
    options.search_path.clone_from(&app.env.search_path);
    options
}

fn plan(cluster: &Cluster, layout: Layout, passwords: &Passwords) -> Result<InitPlan> {
    Ok(InitPlan {
        control: cluster.control_url()?,
        directory: cluster.directory_url()?,
        replicas: cluster.directory_replica_urls(),
        shards: cluster.shard_urls(),
        layout,
        password: passwords.library.clone(),
        admin_password: passwords.admin.clone(),
        mover_password: passwords.mover.clone(),
    })
}

/// Whether the cluster on these servers is whole: the control database has the servers' addresses, and every schema is
/// this program's.
///
/// A server that `shard add` has not made a shard yet is none: it leaves the plan. The layout that counts is the one that the
/// control database says.
async fn is_current(dir: &Path, plan: &mut InitPlan, asked: Option<Layout>) -> Result<bool> {
    let config =
        Config { passfile: Some(dir.join(PASSFILE)), relay_ms: 0, ..Config::new(library_address(&plan.control)) };
    let therev = match therev::connect(config).await {
        Ok(therev) => therev,
        Err(error) => {
            tracing::debug!(%error, "no cluster on these servers yet");
            return Ok(false);
        }
    };
    let catalog = therev.shards().catalog();
    write(dir, LAYOUT_FILE, catalog.layout.name())?;
    plan.layout = same_layout(dir, catalog.layout, asked.unwrap_or(catalog.layout))?;
    if plan.shards.len() > catalog.shards.len() {
        let number = catalog.shards.len();
        talk(&format!("shard-{number} is not part of the cluster yet: `therev shard add --local` goes on with it"));
        plan.shards.truncate(number);
    }
    // Others may be elsewhere.
    let there = catalog
        .shards
        .iter()
        .take(plan.shards.len())
        .map(|shard| &shard.at)
        .chain([&catalog.directory])
        .chain(&catalog.replicas);
    let there: Vec<String> = there.map(ToString::to_string).collect();
    let wanted = plan.shards.iter().chain([&plan.directory]).chain(&plan.replicas);
    let wanted: Vec<String> = wanted.map(|url| place(url).to_owned()).collect();
    if there != wanted {
        return Ok(false);
    }
    Ok(versions(therev.shards(), false).await?.iter().all(SchemaOf::is_current))
}

/// `host:port/database` of an address.
fn place(url: &str) -> &str {
    let place = url.rsplit_once('@').map_or(url, |(_, place)| place);
    place.split_once('?').map_or(place, |(place, _)| place)
}

/// Writes the configuration, or only what changed of one that somebody has added keys to.
fn write_config(dir: &Path, control: &str) -> Result<()> {
    let path = dir.join(FILE);
    // One that cannot be read is somebody's, with a slip in it.
    let before = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.map_err(|e| CliError::file("read", &path, &e))?,
    };
    if !before.trim().is_empty() {
        crate::config::read_file(&path)?;
    }
    let text = match before.parse::<toml::Table>() {
        Ok(table) if table.get("control").and_then(toml::Value::as_str) == Some(control) => return Ok(()),
        Ok(mut table) if table.contains_key("control") => {
            table.insert("control".to_owned(), control.into());
            table.to_string()
        }
        _ => file_text(control, Path::new(PASSFILE), STATE_FILE)?,
    };
    write(dir, FILE, &text)
}

fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| CliError::file("make", dir, &e))?;
    let path = dir.join(name);
    // Whole or not at all: what was there stays where the disk is full. As private as it was.
    let new = dir.join(format!("{name}.{}.new", Uuid::new_v4().simple()));
    let written = std::fs::write(&new, text).and_then(|()| match std::fs::metadata(&path) {
        Ok(before) => std::fs::set_permissions(&new, before.permissions()),
        Err(_) => Ok(()),
    });
    let replaced = written.and_then(|()| std::fs::rename(&new, std::fs::canonicalize(&path).as_ref().unwrap_or(&path)));
    replaced.map_err(|e| {
        drop(std::fs::remove_file(&new));
        CliError::file("write", &path, &e)
    })
}

fn tell(app: &App, dir: &Path, cluster: &Cluster, layout: Layout, initialized: bool) -> Result<()> {
    let (shards, replicas) = (cluster.shards(), cluster.directory_replica_urls().len());
    let standbys = cluster.standbys();
    let config = dir.join(FILE);
    let fact = serde_json::json!({
        "dir": cluster.dir(), "layout": layout, "shards": shards, "replicas": replicas, "standbys": standbys, "config": config,
        "initialized": initialized,
    });
    app.out.fact(&fact, || {
        let found = dir == app.folder.join(LOCAL_FOLDER);
        let next = if found {
            "therev status".to_owned()
        } else {
            format!("eval \"$(therev cluster env --dir {})\" && therev status", quoted(&dir.to_string_lossy()))
        };
        let plural = if replicas == 1 { "replica" } else { "replicas" };
        let each = if standbys == 0 { String::new() } else { format!(" with {standbys} standby each") };
        let servers = format!("{shards} shards ({}){each}, {replicas} {plural} of the directory", layout.name());
        format!("The cluster in {} is up: {servers}.\nNext: {next}", dir.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_layout_than_the_clusters_is_an_error_that_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        assert_eq!(first_layout(dir, false, None).unwrap(), Layout::Colocated);
        assert_eq!(first_layout(dir, false, Some(Layout::Split)).unwrap(), Layout::Split);
        write(dir, LAYOUT_FILE, "split").unwrap();
        assert_eq!(first_layout(dir, true, None).unwrap(), Layout::Split);
        // What is left of a cluster that is gone says nothing.
        assert_eq!(first_layout(dir, false, None).unwrap(), Layout::Colocated);
        let error = first_layout(dir, true, Some(Layout::Colocated)).unwrap_err().to_string();
        assert!(error.contains("split") && error.contains("--layout"), "{error}");
    }

    #[test]
    fn keys_that_somebody_added_stay() {
        let folder = tempfile::tempdir().unwrap();
        let read = || std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        write_config(folder.path(), "postgresql://therev@h:1/c").unwrap();
        write(folder.path(), FILE, &format!("{}deadline_ms = 9\n", read())).unwrap();
        write_config(folder.path(), "postgresql://therev@h:2/c").unwrap();
        let config = Config::parse(&read(), folder.path()).unwrap();
        assert_eq!((config.control.as_str(), config.deadline_ms), ("postgresql://therev@h:2/c", 9));
        assert!(config.passfile.is_some());
    }
}
