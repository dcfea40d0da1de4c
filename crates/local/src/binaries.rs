//! Where PostgreSQL's programs are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::account::plain_command;
use crate::{Error, Options};

/// The oldest major version that therev runs on.
const OLDEST: u32 = 15;
/// What is run; a folder that lacks one is of no use.
const TOOLS: [&str; 5] = ["postgres", "initdb", "pg_ctl", "pg_basebackup", "psql"];
/// Where packages put them, around the version: Debian, RPM of PostgreSQL's own, Homebrew on both kinds of Mac,
/// `MacPorts`, Postgres.app, FreeBSD and what `make install` does.
const USUAL_PLACES: [(&str, &str, &str); 8] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    ("/opt/local/lib", "postgresql", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
    ("/usr/local", "pgsql", "bin"),
];

/// A folder with all of [`TOOLS`], and what version they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binaries {
    pub(crate) bin: PathBuf,
    pub(crate) major: u32,
}

impl Binaries {
    /// Finds programs for new servers, or those of the version that made existing ones.
    pub(crate) fn find(options: &Options, made_by: Option<u32>) -> Result<Self, Error> {
        if let Some(bin) = &options.pg_bin {
            let found = Self::at(bin)?;
            return if found.major < OLDEST { Err(found.too_old()) } else { found.or_other(options, made_by) };
        }
        let found: Vec<Self> = in_path(options.search_path.as_deref())
            .into_iter()
            .chain(in_usual_places())
            .filter_map(|bin| Self::at(&bin).ok())
            .collect();
        let fits = |it: &&Self| made_by.map_or(it.major >= OLDEST, |major| it.major == major);
        match found.iter().find(fits) {
            Some(fitting) => Ok(fitting.clone()),
            None => match found.into_iter().max_by_key(|it| it.major) {
                Some(newest) if newest.major < OLDEST => Err(newest.too_old()),
                Some(newest) => newest.or_other(options, made_by),
                None => Err(Error::NoPostgres),
            },
        }
    }

    /// Looks whether this folder holds every tool, and asks `postgres` for its version.
    pub(crate) fn at(bin: &Path) -> Result<Self, Error> {
        let bin = std::path::absolute(bin).map_err(Error::file("find", bin))?;
        if let Some(tool) = TOOLS.into_iter().find(|tool| !bin.join(tool).is_file()) {
            return Err(Error::NoTool { bin, tool });
        }
        let program = bin.join("postgres");
        let output =
            plain_command(&program).arg("--version").output().map_err(|source| Error::Program { program, source })?;
        let major = major_in(&String::from_utf8_lossy(&output.stdout));
        major.map(|major| Self { bin: bin.clone(), major }).ok_or(Error::NoTool { bin, tool: "postgres" })
    }

    fn or_other(self, options: &Options, made_by: Option<u32>) -> Result<Self, Error> {
        match made_by {
            Some(made_by) if made_by != self.major => {
                Err(Error::OtherVersion { dir: options.dir.clone(), made_by, found: self.major })
            }
            _ => Ok(self),
        }
    }

    fn too_old(self) -> Error {
        Error::TooOld { bin: self.bin, found: self.major }
    }
}

fn in_path(search_path: Option<&OsStr>) -> Vec<PathBuf> {
    let folders = search_path.map(env::split_paths).into_iter().flatten();
    // An installation elsewhere is often only linked here, and its other programs lie beside the real file.
    folders.flat_map(|folder| [real_folder(&folder), Some(folder)]).flatten().collect()
}

fn real_folder(folder: &Path) -> Option<PathBuf> {
    let program = fs::canonicalize(folder.join("postgres")).ok()?;
    program.parent().map(Path::to_owned)
}

/// The folders that exist of [`USUAL_PLACES`], the newest version first in each.
fn in_usual_places() -> Vec<PathBuf> {
    USUAL_PLACES
        .iter()
        .flat_map(|(parent, prefix, bin)| {
            let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(parent)
                .into_iter()
                .flatten()
                .filter_map(|entry| {
                    let path = entry.ok()?.path();
                    let version = path.file_name()?.to_str()?.strip_prefix(prefix)?.to_owned();
                    Some((version.parse().unwrap_or(0), path.join(bin)))
                })
                .filter(|(_, folder)| folder.join("postgres").is_file())
                .collect();
            versions.sort_by(|one, other| other.cmp(one));
            versions.into_iter().map(|(_, folder)| folder)
        })
        .collect()
}

/// `postgres (PostgreSQL) 15.18 (Debian …)` → 15; development versions (`19devel`, `18beta1`) count as theirs.
fn major_in(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits = version.find(|it: char| !it.is_ascii_digit()).map_or(version, |end| &version[..end]);
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind_of_version() {
        assert_eq!(major_in("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(major_in("postgres (PostgreSQL) 18.4\n"), Some(18));
        assert_eq!(major_in("postgres (PostgreSQL) 19devel\n"), Some(19));
        assert_eq!(major_in("postgres (PostgreSQL) 9.6.24"), Some(9));
        assert_eq!(major_in("mysqld 8.0"), None);
    }

    #[test]
    fn says_which_tool_a_named_folder_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { pg_bin: Some(folder.path().to_owned()), ..Options::new("unused") };
        let error = Binaries::find(&options, None).unwrap_err();
        assert!(matches!(error, Error::NoTool { tool: "postgres", .. }), "{error}");
    }

    #[test]
    fn refuses_another_version_than_the_data_was_made_by() {
        let error = Binaries::find(&Options::new("unused"), Some(14)).unwrap_err();
        assert!(matches!(error, Error::OtherVersion { made_by: 14, .. }), "{error}");
    }
}
