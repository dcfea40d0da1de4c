//! A wall clock that is wrong or jumps, for processes that are started with it.

use std::io;
use std::path::PathBuf;
use std::process::Command;

/// What makes a process's clock wrong: a library that is loaded before all others. Linux only.
pub struct WrongClock {
    library: PathBuf,
    _folder: tempfile::TempDir,
}

impl WrongClock {
    /// Builds the library, with the compiler that Rust links with.
    pub fn build() -> io::Result<WrongClock> {
        let folder = tempfile::tempdir()?;
        let (source, library) = (folder.path().join("clock.c"), folder.path().join("clock.so"));
        std::fs::write(&source, include_str!("clock.c"))?;
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&library).arg(&source).status()?;
        if !built.success() {
            return Err(io::Error::other(format!("cc: {built}")));
        }
        Ok(WrongClock { library, _folder: folder })
    }

    /// The process will read its wall clock off by these seconds, each reading by the next of them. Its other clocks are
    /// right.
    pub fn wind(&self, command: &mut Command, jumps_s: &[i64]) {
        let jumps: Vec<String> = jumps_s.iter().map(ToString::to_string).collect();
        command.env("LD_PRELOAD", &self.library).env("WRONG_CLOCK", jumps.join(","));
    }
}
