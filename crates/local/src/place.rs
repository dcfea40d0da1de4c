//! Where a cluster's data, logs and sockets lie.
//!
//! In `servers/` of its folder, unless root starts it and `postgres` may not enter that (a clone below `/root`, say):
//! then in `/var/lib/therev-<hash of the folder>`, or under `/var/tmp` where there is no `/var/lib`. The place is
//! chosen once and remembered. Sockets move to `/tmp/therev-<hash>` when their path would be too long for the system.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::account::{Account, remove};
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
        account.make_folder(&outside)?;
        account.write(&outside.join(OWNER_FILE), &place.dir.to_string_lossy())?;
        Ok(place)
    }

    /// Servers of a cluster that was here before and whose folder was deleted without `destroy`: they lie outside.
    pub(crate) fn orphaned(&self) -> Option<Self> {
        ["/var/lib", "/var/tmp", "/tmp"].into_iter().find_map(|parent| {
            let outside = Path::new(parent).join(&self.name);
            let owner = fs::read(outside.join(OWNER_FILE)).ok()?;
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
