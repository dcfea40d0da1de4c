//! What is remembered of a cluster between two commands, and who may work on it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::RngExt;
use rand::distr::Alphanumeric;
use serde::{Deserialize, Serialize};

use crate::process::wait_for;
use crate::{Error, ServerId};

/// The number of this form of the file.
const FORMAT: u32 = 1;
/// Enough for 190 bits.
const PASSWORD_LEN: usize = 32;
/// How long one process waits for another that works on the cluster.
const LOCK_WAIT: Duration = Duration::from_secs(120);

/// The content of `cluster.json`. What a server has become is seen on the server, not written here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    format: u32,
    /// The superuser's name and password, the same on all servers.
    pub(crate) superuser: String,
    pub(crate) password: String,
    /// Whether commits survive a crash of the machine.
    pub(crate) durable: bool,
    /// The major version that made the data, and where its programs were seen last.
    pub(crate) pg_major: u32,
    pub(crate) pg_bin: PathBuf,
    /// Where data, logs and sockets are when they cannot be in the cluster's folder.
    pub(crate) outside: Option<PathBuf>,
    /// Whether commits wait for a standby.
    #[serde(default)]
    pub(crate) synchronous: bool,
    /// A port for each shard's server, for each shard's standbys, and for each replica.
    pub(crate) shard_ports: Vec<u16>,
    #[serde(default)]
    pub(crate) standby_ports: Vec<Vec<u16>>,
    pub(crate) replica_ports: Vec<u16>,
    /// By shard: the number of the standby that was promoted, 0 while it is the first server.
    #[serde(default)]
    pub(crate) promoted: Vec<u16>,
    /// By shard: whether its data has been made. Where it has, a missing folder is a loss and not a beginning.
    #[serde(default)]
    pub(crate) made: Vec<bool>,
    /// How many standbys each shard is to have, and how many replicas there are to be. A promoted standby stays beyond that.
    #[serde(default)]
    pub(crate) standbys_wanted: Option<u16>,
    #[serde(default)]
    pub(crate) replicas_wanted: Option<u16>,
}

impl State {
    /// What a new cluster begins with: a password that nobody has seen.
    pub(crate) fn new(pg_major: u32, pg_bin: PathBuf, outside: Option<PathBuf>, durable: bool) -> Self {
        let password = rand::rng().sample_iter(Alphanumeric).take(PASSWORD_LEN).map(char::from).collect();
        Self {
            format: FORMAT,
            superuser: "postgres".to_owned(),
            password,
            durable,
            pg_major,
            pg_bin,
            outside,
            synchronous: false,
            shard_ports: Vec::new(),
            standby_ports: Vec::new(),
            replica_ports: Vec::new(),
            promoted: Vec::new(),
            made: Vec::new(),
            standbys_wanted: None,
            replicas_wanted: None,
        }
    }

    /// Reads the file; `None` when there is no cluster.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, Error> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let path = file_in(dir);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        let bad = |source| Error::BadState { path: path.clone(), source };
        let Format { format } = serde_json::from_str(&text).map_err(bad)?;
        if format > FORMAT {
            return Err(Error::NewerState { path, format });
        }
        serde_json::from_str(&text).map_err(bad).map(Some)
    }

    /// Writes the file, whole or not at all.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Error> {
        use std::io::Write;
        let path = file_in(dir);
        let text =
            serde_json::to_string_pretty(self).map_err(|source| Error::BadState { path: path.clone(), source })?;
        let new = dir.join("cluster.json.new");
        crate::account::remove(&new)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(Error::file("make", &new))?;
        writeln!(file, "{text}").and_then(|()| file.sync_all()).map_err(Error::file("write", &new))?;
        fs::rename(&new, &path).map_err(Error::file("replace", &path))
    }

    /// Forgets the cluster: the last step of removing it.
    pub(crate) fn remove(dir: &Path) -> Result<(), Error> {
        crate::account::remove(&file_in(dir))
    }

    /// Forgets the last shard, its standbys with it.
    pub(crate) fn forget_last(&mut self) {
        self.shard_ports.pop();
        self.standby_ports.truncate(self.shard_ports.len());
        self.promoted.truncate(self.shard_ports.len());
        self.made.truncate(self.shard_ports.len());
    }

    /// Whether a shard's data has been made.
    pub(crate) fn is_made(&self, shard: u16) -> bool {
        self.made.get(usize::from(shard)).copied().unwrap_or(false)
    }

    /// Remembers whether a shard's data has been made.
    pub(crate) fn set_made(&mut self, shard: u16, is_made: bool) {
        self.made.resize(self.shard_ports.len(), false);
        if let Some(made) = self.made.get_mut(usize::from(shard)) {
            *made = is_made;
        }
    }

    /// The shards' numbers.
    pub(crate) fn shards(&self) -> impl Iterator<Item = u16> {
        (0_u16..).take(self.shard_ports.len())
    }

    /// All servers, shards first.
    pub(crate) fn servers(&self) -> Vec<ServerId> {
        let standbys = self.shards().flat_map(|shard| self.standbys(shard));
        let replicas = (1_u16..).take(self.replica_ports.len()).map(ServerId::Replica);
        self.shards().map(ServerId::Shard).chain(standbys).chain(replicas).collect()
    }

    /// A shard's standbys, as they were made; one of them may be the primary now.
    pub(crate) fn standbys(&self, shard: u16) -> impl Iterator<Item = ServerId> {
        let count = self.standby_ports.get(usize::from(shard)).map_or(0, Vec::len);
        (1_u16..).take(count).map(move |number| ServerId::Standby(shard, number))
    }

    /// The servers that can be a shard's primary.
    pub(crate) fn members(&self, shard: u16) -> impl Iterator<Item = ServerId> {
        std::iter::once(ServerId::Shard(shard)).chain(self.standbys(shard))
    }

    /// The server that takes a shard's writes.
    pub(crate) fn primary(&self, shard: u16) -> ServerId {
        match self.promoted.get(usize::from(shard)) {
            None | Some(0) => ServerId::Shard(shard),
            Some(number) => ServerId::Standby(shard, *number),
        }
    }

    /// The server that this one receives from, unless it is a primary itself.
    pub(crate) fn source(&self, server: ServerId) -> Option<ServerId> {
        let source = match server {
            ServerId::Shard(shard) | ServerId::Standby(shard, _) => self.primary(shard),
            ServerId::Replica(_) => self.primary(0),
        };
        (source != server).then_some(source)
    }

    /// Makes a server its shard's primary.
    pub(crate) fn promote(&mut self, server: ServerId) {
        let (shard, number) = match server {
            ServerId::Shard(shard) => (shard, 0),
            ServerId::Standby(shard, number) => (shard, number),
            ServerId::Replica(_) => return,
        };
        self.promoted.resize(self.shard_ports.len(), 0);
        if let Some(promoted) = self.promoted.get_mut(usize::from(shard)) {
            *promoted = number;
        }
    }

    /// The port of a server, if there is such a server.
    pub(crate) fn port(&self, server: ServerId) -> Option<u16> {
        match server {
            ServerId::Shard(number) => self.shard_ports.get(usize::from(number)).copied(),
            ServerId::Standby(shard, number) => {
                self.standby_ports.get(usize::from(shard))?.get(usize::from(number.checked_sub(1)?)).copied()
            }
            ServerId::Replica(number) => self.replica_ports.get(usize::from(number.checked_sub(1)?)).copied(),
        }
    }

    /// Gives a server another port.
    pub(crate) fn set_port(&mut self, server: ServerId, port: u16) {
        let place = match server {
            ServerId::Shard(number) => self.shard_ports.get_mut(usize::from(number)),
            ServerId::Standby(shard, number) => self
                .standby_ports
                .get_mut(usize::from(shard))
                .and_then(|ports| ports.get_mut(usize::from(number.saturating_sub(1)))),
            ServerId::Replica(number) => self.replica_ports.get_mut(usize::from(number.saturating_sub(1))),
        };
        if let Some(place) = place {
            *place = port;
        }
    }
}

fn file_in(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

/// The right to change the cluster, held by one process at a time and given back by the system when it dies.
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for whoever works on the cluster, and says that it does.
    pub(crate) fn take(dir: &Path, say: &mut dyn FnMut(&str)) -> Result<Self, Error> {
        let path = Self::file_in(dir);
        let mut taken = Err(Error::Busy { dir: dir.to_owned() });
        let mut said = false;
        wait_for(LOCK_WAIT, || match try_lock(&path) {
            Ok(Some(file)) => {
                taken = Ok(Self { _file: file });
                true
            }
            Ok(None) => {
                if !said {
                    say("another process works on this cluster; waiting for it");
                    said = true;
                }
                false
            }
            Err(error) => {
                taken = Err(error);
                true
            }
        });
        taken
    }

    /// The file that is locked; removed with the cluster, by the process that holds it.
    pub(crate) fn file_in(dir: &Path) -> PathBuf {
        dir.join("lock")
    }
}

/// `None` while another process has it, or has just removed the file that was opened.
fn try_lock(path: &Path) -> Result<Option<File>, Error> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("open", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(Error::file("lock", path)(error)),
    }
    let held = file.metadata().map_err(Error::file("look at", path))?;
    let still_there = fs::metadata(path).is_ok_and(|found| found.ino() == held.ino());
    Ok(still_there.then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_it_is_given_and_refuses_what_it_does_not_know() {
        let dir = tempfile::tempdir().unwrap();
        assert!(State::load(dir.path()).unwrap().is_none());
        let mut state = State::new(15, "/usr/lib/postgresql/15/bin".into(), None, true);
        state.shard_ports = vec![5001, 5002];
        state.replica_ports = vec![5003];
        state.set_port(ServerId::Replica(1), 5004);
        state.set_made(1, true);
        state.save(dir.path()).unwrap();
        let again = State::load(dir.path()).unwrap().unwrap();
        assert_eq!(again.password, state.password);
        assert_eq!(again.servers(), [ServerId::Shard(0), ServerId::Shard(1), ServerId::Replica(1)]);
        assert_eq!(again.port(ServerId::Shard(1)), Some(5002));
        assert_eq!(again.port(ServerId::Replica(1)), Some(5004));
        assert_eq!(again.port(ServerId::Replica(0)), None);
        assert!(again.is_made(1) && !again.is_made(0) && !again.is_made(2));
        state.forget_last();
        assert!(!state.is_made(1), "a shard that is gone is not missed");
        assert_eq!(fs::metadata(file_in(dir.path())).unwrap().mode() & 0o777, 0o600);

        fs::write(file_in(dir.path()), "{\"format\": 99}").unwrap();
        assert!(matches!(State::load(dir.path()), Err(Error::NewerState { format: 99, .. })));
        fs::write(file_in(dir.path()), "{").unwrap();
        assert!(matches!(State::load(dir.path()), Err(Error::BadState { .. })));
    }
}
