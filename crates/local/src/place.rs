//! Where a cluster's data, logs and sockets lie.
//!
//! In `servers/` of its folder, unless root starts it and `postgres` may not enter that (a clone below `/root`, say):
//! then in `/var/lib/therev-<hash of the folder>`, or under `/var/tmp` where there is no `/var/lib`. The place is
//! chosen once and remembered. Sockets move to `/tmp/therev-<hash>` when their path would be too long for the system.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::account::{Account, remove};
use crate::state::State;
use crate::{Error, ServerId};

/// The longest path of a socket that systems take, without its closing zero (Linux 107, macOS 103).
const SOCKET_PATH_MAX: usize = 103;
/// What PostgreSQL adds to the folder, at most.
const SOCKET_NAME_MAX: usize = "/.s.PGSQL.65535".len();
/// In a place outside: which folder it belongs to.
const OWNER_FILE: &str = "belongs-to";

/// The folders of one cluster.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The cluster's folder, with no link in its path.
    pub(crate) dir: PathBuf,
    /// `therev-` and a hash of `dir`: tells this cluster's processes and folders from any other's.
    pub(crate) name: String,
    /// Data and logs.
    pub(crate) home: PathBuf,
    /// The servers' sockets, at a short path.
    pub(crate) sockets: PathBuf,
}

impl Place {
    /// The folders of a cluster whose servers are outside of `dir`, or in it.
    pub(crate) fn new(dir: PathBuf, outside: Option<&Path>) -> Self {
        let name = name_of(&dir);
        let home = outside.map_or_else(|| dir.join("servers"), Path::to_owned);
        let sockets = home.join("sockets");
        let fits = sockets.as_os_str().len() + SOCKET_NAME_MAX <= SOCKET_PATH_MAX;
        let sockets = if fits { sockets } else { Path::new("/tmp").join(&name) };
        Self { dir, name, home, sockets }
    }

    /// Chooses where the servers of a new cluster go, and makes that folder.
    pub(crate) fn choose(dir: PathBuf, account: Account) -> Result<Self, Error> {
        let inside = Self::new(dir.clone(), None);
        let is_empty_folder = || fs::read_dir(&inside.home).is_ok_and(|mut it| it.next().is_none());
        if fs::symlink_metadata(&inside.home).is_ok() && !is_empty_folder() {
            // Data without the state that goes with it, or somebody's file: only its owner can say whether it is needed.
            return Err(Error::InTheWay { path: inside.home });
        }
        match account.make_folder(&inside.home) {
            Ok(()) if account.may_enter(&inside.home) => return Ok(inside),
            Err(error) if !account.is_other() => return Err(error),
            _ => {}
        }
        remove(&inside.home)?;
        let parent = ["/var/lib", "/var/tmp"].into_iter().map(Path::new).find(|it| it.is_dir());
        let outside = parent.unwrap_or(Path::new("/tmp")).join(&inside.name);
        let place = Self::new(dir, Some(&outside));
        match place.owner() {
            // Of a cluster whose folder was here and is another one by now.
            Some(owner) if owner != place.dir => return Err(Error::OthersServers { home: outside, dir: owner }),
            // Cut off before there was a server.
            _ if account.has(&outside) && place.servers().is_empty() => remove(&outside)?,
            _ => {}
        }
        account.make_folder(&outside)?;
        place.own(account)?;
        Ok(place)
    }

    /// Notes in a place outside whose it is.
    fn own(&self, account: Account) -> Result<(), Error> {
        account.write(&self.home.join(OWNER_FILE), &self.dir.to_string_lossy())
    }

    /// Takes what lies outside over, where its folder was moved here. A copy of a folder has no servers: they are the other one's.
    pub(crate) fn claim(&self, account: Account) -> Result<(), Error> {
        if self.home == Self::new(self.dir.clone(), None).home || !account.has(&self.home) {
            return Ok(());
        }
        match self.owner() {
            Some(owner) if owner == self.dir => Ok(()),
            Some(owner) if self.is_theirs(&owner) => Err(Error::OthersServers { home: self.home.clone(), dir: owner }),
            _ => self.own(account),
        }
    }

    /// The folder that a place outside belongs to; `None`: nobody came to say it.
    fn owner(&self) -> Option<PathBuf> {
        let owner = fs::read(self.home.join(OWNER_FILE)).ok().filter(|it| !it.is_empty())?;
        Some(OsStr::from_bytes(&owner).into())
    }

    /// Whether another folder has the cluster of these servers: not where a link leads from there to here.
    fn is_theirs(&self, owner: &Path) -> bool {
        let is_here = fs::canonicalize(owner).is_ok_and(|it| it == self.dir);
        let state = State::load(owner).ok().flatten();
        !is_here && state.is_some_and(|it| it.outside.as_ref() == Some(&self.home))
    }

    /// Servers of a cluster whose folder was here before, and was deleted without `destroy` or moved away: they lie outside.
    pub(crate) fn orphaned(&self, account: Account) -> Option<Self> {
        let around = ["/var/lib", "/var/tmp", "/tmp"].into_iter().filter_map(|parent| fs::read_dir(parent).ok());
        around.flatten().flatten().find_map(|entry| {
            let outside = entry.path();
            let is_one = entry.file_name().as_bytes().starts_with(b"therev-") && account.has(&outside);
            let owner = is_one.then(|| fs::read(outside.join(OWNER_FILE)).ok()).flatten()?;
            (owner == self.dir.as_os_str().as_bytes()).then(|| Self::new(self.dir.clone(), Some(&outside)))
        })
    }

    /// Makes what is missing of the folders: `/tmp` is emptied by some systems.
    pub(crate) fn make(&self, account: Account) -> Result<(), Error> {
        for folder in [&self.home, &self.sockets, &self.logs()] {
            account.make_folder(folder)?;
        }
        Ok(())
    }

    /// Where the servers write their logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.home.join("logs")
    }

    /// The data of a server.
    pub(crate) fn data(&self, server: ServerId) -> PathBuf {
        self.home.join(server.file_name())
    }

    /// The servers whose data is here, whether or not anything else knows of them.
    pub(crate) fn servers(&self) -> Vec<ServerId> {
        let entries = fs::read_dir(&self.home).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    /// Removes data, logs and sockets. The servers must have stopped.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        remove(&self.sockets)?;
        // Whose it is goes last, so that what is cut off is found again.
        let entries = fs::read_dir(&self.home).into_iter().flatten().flatten();
        entries.filter(|it| it.file_name() != OWNER_FILE).try_for_each(|it| remove(&it.path()))?;
        remove(&self.home)
    }
}

fn name_of(dir: &Path) -> String {
    // FNV-1a: the same in every version, unlike the standard library's. It needs to be short, not secret.
    let hash = dir
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("therev-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_stay_short_wherever_the_cluster_is() {
        let near = Place::new("/srv/therev/.therev".into(), None);
        assert_eq!(near.sockets, Path::new("/srv/therev/.therev/servers/sockets"));
        let far = Place::new(Path::new("/srv").join("deep/".repeat(30)), None);
        assert_eq!(far.sockets, Path::new("/tmp").join(&far.name));
        assert_ne!(near.name, far.name);
    }
}
