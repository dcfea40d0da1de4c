//! A small disk in memory that a test may fill.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How large it is while it is not full. Memory is only used for what is on it.
const SIZE: &str = "1g";

/// A file system of its own; unmounted when it is dropped.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounts one on a new folder, for the account that owns `like`. The error says why that is not possible here: it
    /// takes root, and containers often forbid it.
    pub fn mount(path: &Path, like: &Path) -> io::Result<Disk> {
        let owner = std::fs::metadata(like)?;
        std::fs::create_dir(path)?;
        mount(path, &format!("size={SIZE},mode=0700"))?;
        let disk = Disk { path: path.to_owned() };
        chown(path, Some(owner.uid()), Some(owner.gid()))?;
        Ok(disk)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a table of a database on this machine to it, by a superuser.
    pub async fn take_table(&self, client: &tokio_postgres::Client, table: &str) -> Result<(), tokio_postgres::Error> {
        let (space, place) = (self.space(), self.path.display());
        client.batch_execute(&format!("CREATE TABLESPACE {space} LOCATION '{place}'")).await?;
        client.batch_execute(&format!("ALTER TABLE {table} SET TABLESPACE {space}")).await
    }

    /// The tablespace's name, on its server: as no other disk's.
    pub fn space(&self) -> String {
        let hash = self
            .path
            .as_os_str()
            .as_bytes()
            .iter()
            .fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        format!("disk_{hash:x}")
    }

    /// Leaves no byte free: it becomes as large as what is on it.
    pub fn fill(&self) -> io::Result<()> {
        self.fill_but(0)
    }

    /// Leaves so many bytes free.
    pub fn fill_but(&self, left: u64) -> io::Result<()> {
        // Somebody may write while this looks.
        let mut last = None;
        for _ in 0..10 {
            let stat = rustix::fs::statvfs(&self.path)?;
            let size = (stat.f_blocks - stat.f_bfree) * stat.f_frsize + left;
            match mount(&self.path, &format!("remount,size={size}")) {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::other("never tried")))
    }

    /// Gives it back its room.
    pub fn empty(&self) -> io::Result<()> {
        mount(&self.path, &format!("remount,size={SIZE}"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a server that ends a moment later does not keep it.
        Command::new("umount").arg("-l").arg(&self.path).status().ok();
        std::fs::remove_dir(&self.path).ok();
    }
}

fn mount(path: &Path, options: &str) -> io::Result<()> {
    let output =
        Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
