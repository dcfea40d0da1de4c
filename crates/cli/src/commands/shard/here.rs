//! Shards whose servers are of the local cluster.

use crate::app::App;
use crate::config::FoundBy;
use crate::error::{CliError, Result};
use crate::output::talk;
use local::{Cluster, ServerId};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;
use therev::{ShardNo, Therev};

/// A server that would be made.
#[derive(Serialize)]
pub(super) struct Place {
    pub(super) dir: String,
    pub(super) shard: u16,
}

/// The server of a shard, of a local cluster.
pub(super) struct Server {
    cluster: Cluster,
    shard: u16,
}

/// The local cluster by which this command found the cluster, if it did so.
fn cluster(app: &App) -> Result<Option<Cluster>> {
    let FoundBy::File(file) = app.found()?.by else { return Ok(None) };
    match Cluster::open(file.parent().unwrap_or(Path::new("."))) {
        Ok(cluster) => Ok(Some(cluster)),
        Err(local::Error::NoCluster { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The local cluster, and the number of the server that is to be added to it.
fn next(app: &App, therev: &Therev) -> Result<(Cluster, u16)> {
    let found = app.found()?;
    let Some(cluster) = cluster(app)? else {
        return Err(CliError::invalid(
            format!("the cluster was found by {}, which is no local cluster", found.by),
            "run this where `therev cluster up` was run, or name a database with --url",
        ));
    };
    let numbers = therev.shards().numbers();
    let next = u16::try_from(numbers.len()).unwrap_or(u16::MAX);
    // A server that an interrupted run has made is there already.
    let servers = u16::try_from(cluster.shards()).unwrap_or(u16::MAX);
    let in_order = numbers.iter().zip(0_i16..).all(|(shard, number)| shard.0 == number);
    if !in_order || servers < next || servers > next + 1 {
        return Err(CliError::invalid(
            "some shards of this cluster are not its local servers, so that their numbers would not agree",
            "name a database with --url",
        ));
    }
    Ok((cluster, next))
}

/// Which server would be made.
pub(super) fn look(app: &App, therev: &Therev) -> Result<Place> {
    let (cluster, shard) = next(app, therev)?;
    Ok(Place { dir: cluster.dir().display().to_string(), shard })
}

/// Makes one more server, or finds the one that an interrupted run has made. Says its address.
pub(super) fn add(app: &App, therev: &Therev) -> Result<String> {
    let (mut cluster, shard) = next(app, therev)?;
    cluster.grow(shard + 1, &mut |line| talk(line))?;
    Ok(cluster.shard_url(shard)?)
}

/// The server of a shard, if it is of the local cluster. Refuses what cannot be taken out of it.
pub(super) fn server_of(app: &App, therev: &Therev, shard: ShardNo) -> Result<Option<Server>> {
    let Some(cluster) = cluster(app)? else { return Ok(None) };
    let number = u16::try_from(shard.0).unwrap_or(u16::MAX);
    let Ok(url) = cluster.shard_url(number) else { return Ok(None) };
    let entry = therev.shards().catalog();
    if let Some(entry) = entry.shards.iter().find(|entry| entry.shard == shard)
        && !url.contains(&entry.at.to_string())
    {
        return Ok(None);
    }
    if number == 0 {
        return Err(CliError::invalid(
            "shard 0's server has the control database and the directory, too: it stays",
            "`therev cluster destroy` removes the whole cluster",
        ));
    }
    if usize::from(number) + 1 != cluster.shards() {
        return Err(CliError::invalid(
            format!("shard {shard} is not the last one of the local cluster, whose servers are numbered"),
            format!("remove shard {} first", cluster.shards() - 1),
        ));
    }
    Ok(Some(Server { cluster, shard: number }))
}

impl Server {
    /// Makes sure that it is what an interrupted removal has left: nothing else has said that there is nothing in it.
    pub(super) async fn is_left_over(&mut self, therev: &Therev) -> Result<()> {
        if !self.cluster.is_made(self.shard) {
            // Its removal has begun.
            return Ok(());
        }
        let server: ServerId = self.cluster.primary(self.shard);
        self.cluster.start_server(server, &mut |line| talk(line))?;
        let number = ShardNo(i16::try_from(self.shard).unwrap_or(i16::MAX));
        Ok(therev::is_left_over(therev.shards(), number, &self.cluster.shard_url(self.shard)?).await?)
    }

    /// Stops and removes it, once no node asks it any more.
    pub(super) async fn remove(mut self, app: &App, therev: &Therev, empty_for: Option<Duration>) -> Result<()> {
        // Twice: a node may have read the placement just before, and its next reading may be late.
        let heard = Duration::from_millis(app.found()?.config.refresh_ms) * 2;
        let left = empty_for.map_or(Duration::ZERO, |empty_for| heard.saturating_sub(empty_for));
        if !left.is_zero() {
            talk(&format!("Waiting {} s, until every node has heard that nothing is there", left.as_secs() + 1));
            tokio::time::sleep(left).await;
        }
        // Meanwhile somebody may have made it a shard again.
        let _gone = therev::stay_gone(therev.shards(), ShardNo(i16::try_from(self.shard).unwrap_or(i16::MAX))).await?;
        self.cluster.shrink(self.shard, &mut |line| talk(line))?;
        Ok(())
    }
}
