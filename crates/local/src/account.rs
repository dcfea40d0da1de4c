//! Who the servers run as. PostgreSQL refuses root, so root hands everything to the account `postgres`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::OFlags;

use crate::Error;

/// Variables that would turn PostgreSQL's tools to other servers than those named.
const MISLEADING: [&str; 17] = [
    "PGDATA",
    "PGHOST",
    "PGHOSTADDR",
    "PGPORT",
    "PGDATABASE",
    "PGUSER",
    "PGPASSWORD",
    "PGPASSFILE",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGOPTIONS",
    "PGREQUIRESSL",
    "PGCHANNELBINDING",
    "PGTARGETSESSIONATTRS",
    "PGCLIENTENCODING",
    "PGSSLROOTCERT",
    "PGREQUIREAUTH",
];

/// The account that owns the servers' files and processes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Account {
    uid: u32,
    gid: u32,
    /// Whether that is someone else than the caller, who then is root.
    other: bool,
}

impl Account {
    /// The caller, or `postgres` when the caller is root.
    pub(crate) fn for_servers() -> Result<Self, Error> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if !uid.is_root() {
            return Ok(Self { uid: uid.as_raw(), gid: gid.as_raw(), other: false });
        }
        let accounts = fs::read_to_string("/etc/passwd").map_err(Error::file("read", Path::new("/etc/passwd")))?;
        let (uid, gid) = ids_in(&accounts, "postgres").ok_or(Error::NoAccount)?;
        Ok(Self { uid, gid, other: true })
    }

    /// Whether the servers run as someone else than the caller.
    pub(crate) fn is_other(self) -> bool {
        self.other
    }

    /// A command that runs as this account, in a folder that it may enter.
    pub(crate) fn command(self, program: &Path, folder: &Path) -> Command {
        let mut command = plain_command(program);
        command.current_dir(folder);
        if self.other {
            // Setting the user as root also drops root's supplementary groups.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Whether the account gets into the folder, asked of the system itself: modes alone do not say it.
    pub(crate) fn may_enter(self, folder: &Path) -> bool {
        if !self.other {
            return true;
        }
        let mut command = self.command(Path::new("/bin/sh"), Path::new("/"));
        command.args(["-c", "cd \"$1\" && test -w .", "sh"]).arg(folder);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    /// Makes a folder that only this account may use. One that exists must be such a folder already.
    pub(crate) fn make_folder(self, path: &Path) -> Result<(), Error> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => self.give(path),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Root's own is one that was made a moment before it should have been handed over.
                if !self.has(path) {
                    return Err(Error::InTheWay { path: path.to_owned() });
                }
                // What was looked at, whatever stands at the path by now: others may write into the folder around it.
                let folder = OpenOptions::new()
                    .read(true)
                    .custom_flags((OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed())
                    .open(path)
                    .map_err(Error::file("open", path))?;
                folder.set_permissions(fs::Permissions::from_mode(0o700)).map_err(Error::file("protect", path))?;
                self.give_open(&folder, path)
            }
            Err(error) => Err(Error::file("make", path)(error)),
        }
    }

    /// Writes a file that only this account may read, whole or not at all.
    pub(crate) fn write(self, path: &Path, content: &str) -> Result<(), Error> {
        let new = path.with_extension("new");
        remove(&new)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(Error::file("make", &new))?;
        file.write_all(content.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::file("write", &new))?;
        self.give_open(&file, &new)?;
        fs::rename(&new, path).map_err(Error::file("replace", path))
    }

    /// Whether a folder, and no link to one, is this account's or the caller's own.
    pub(crate) fn has(self, folder: &Path) -> bool {
        fs::symlink_metadata(folder)
            .is_ok_and(|it| it.is_dir() && (it.uid() == self.uid || (self.other && it.uid() == 0)))
    }

    fn give(self, path: &Path) -> Result<(), Error> {
        if self.other {
            lchown(path, Some(self.uid), Some(self.gid)).map_err(Error::file("hand to `postgres`", path))?;
        }
        Ok(())
    }

    fn give_open(self, file: &File, path: &Path) -> Result<(), Error> {
        if self.other {
            fchown(file, Some(self.uid), Some(self.gid)).map_err(Error::file("hand to `postgres`", path))?;
        }
        Ok(())
    }
}

/// A command whose tools go where they are told, in words that can be recognized.
pub(crate) fn plain_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for name in MISLEADING {
        command.env_remove(name);
    }
    // Only the loopback is asked, where encryption would cost time and need certificates.
    command.env("LC_ALL", "C").env("PGSSLMODE", "disable").env("PGGSSENCMODE", "disable");
    command.env("PGCONNECT_TIMEOUT", "10").stdin(Stdio::null());
    command
}

/// Removes a file or folder, with all in it; that there is none is fine.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::file("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The user's and the group's id of an account in `/etc/passwd`.
fn ids_in(accounts: &str, name: &str) -> Option<(u32, u32)> {
    let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::ids_in;

    #[test]
    fn finds_an_account_by_its_whole_name() {
        let accounts = "root:x:0:0:root:/root:/bin/bash\npostgres2:x:7:8::/:/bin/sh\npostgres:x:105:110::/:/bin/sh\n";
        assert_eq!(ids_in(accounts, "postgres"), Some((105, 110)));
        assert_eq!(ids_in(accounts, "nobody"), None);
        assert_eq!(ids_in("postgres:x:?\n", "postgres"), None);
    }
}
