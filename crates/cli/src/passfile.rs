//! Passwords of therev's roles: read from a passfile, or made and written to it. Addresses without them.

use crate::error::{CliError, Result};
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use uuid::Uuid;

/// The passwords of the library's role, of the schema owner's and of the mover's.
pub(crate) struct Passwords {
    pub(crate) library: String,
    pub(crate) admin: String,
    pub(crate) mover: String,
    /// The roles whose passwords were made here, and must be written down.
    made: Vec<&'static str>,
}

impl Passwords {
    /// The passwords that a passfile has for these roles, and new ones for those that it has none for.
    pub(crate) fn read_or_make(path: &Path) -> Result<Passwords> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(CliError::file("read", path, &error)),
        };
        let mut made = Vec::new();
        // One that is there is kept: logins take the first line that fits, so that a second one would never be used.
        let mut of = |role: &'static str| {
            text.lines().find_map(|line| password_in(line, role)).unwrap_or_else(|| {
                made.push(role);
                new_password()
            })
        };
        let (library, admin, mover) = (of("therev"), of("therev_admin"), of("therev_mover"));
        Ok(Passwords { library, admin, mover, made })
    }

    /// The roles with their passwords.
    pub(crate) fn all(&self) -> [(&'static str, &str); 3] {
        [("therev", &self.library), ("therev_admin", &self.admin), ("therev_mover", &self.mover)]
    }

    /// The roles whose passwords were made here, with them.
    pub(crate) fn made(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.all().into_iter().filter(|(role, _)| self.made.contains(role))
    }

    /// Writes down what was made.
    pub(crate) fn keep(&self, path: &Path) -> Result<()> {
        // What is made here has no character that would need escaping.
        let lines: Vec<String> = self.made().map(|(role, password)| format!("*:*:*:{role}:{password}\n")).collect();
        if lines.is_empty() { Ok(()) } else { Self::add_lines(path, &lines.concat()) }
    }

    /// Adds lines to a passfile that only its owner may read.
    fn add_lines(path: &Path, lines: &str) -> Result<()> {
        let mut options = std::fs::OpenOptions::new();
        options.create(true).append(true).read(true).mode(0o600);
        let failed = |e: std::io::Error| CliError::file("write", path, &e);
        let mut file = options.open(path).map_err(failed)?;
        // One that was there may have been made for others, too.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        // A last line without an end would swallow the first new one.
        let open_end = std::fs::read(path).map_err(failed)?.last().is_some_and(|byte| *byte != b'\n');
        let text = if open_end { format!("\n{lines}") } else { lines.to_owned() };
        file.write_all(text.as_bytes()).map_err(failed)
    }
}

/// 244 random bits.
fn new_password() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// The password in a line of five fields, when it is for this role, or for everybody everywhere.
fn password_in(line: &str, role: &str) -> Option<String> {
    let [host, port, database, whose, password] = therev::passfile_line(line)?;
    let is_everybodys = [host, port, database, whose.clone()].iter().all(|field| field == "*");
    (whose == role || is_everybodys).then_some(password)
}

/// An address for the library: its own role, and no password.
pub(crate) fn library_address(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
    let (authority, path) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
    let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
    let secret = ["user=", "password="];
    let kept: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    let kept: Vec<&str> = kept.into_iter().filter(|pair| !secret.iter().any(|name| pair.starts_with(name))).collect();
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    format!("postgresql://therev@{hosts}/{path}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_loses_role_and_password() {
        let address = library_address("postgres://postgres:s3:cr@t@a:1,b:2/control?password=x&sslmode=disable&user=me");
        assert_eq!(address, "postgresql://therev@a:1,b:2/control?sslmode=disable");
        assert_eq!(library_address("postgresql://h/d"), "postgresql://therev@h/d");
    }

    #[test]
    fn passwords_are_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pass");
        std::fs::write(&path, "# mine\n*:*:*:somebody:x").unwrap();
        let made = Passwords::read_or_make(&path).unwrap();
        assert_eq!(made.made().map(|(role, _)| role).collect::<Vec<_>>(), ["therev", "therev_admin", "therev_mover"]);
        assert!(made.library.len() == 64 && made.library != made.admin);
        let lines = format!("*:*:*:therev:{}\n*:*:*:therev_admin:a\\:b\n*:*:*:therev_mover:c\n", made.library);
        Passwords::add_lines(&path, &lines).unwrap();
        let read = Passwords::read_or_make(&path).unwrap();
        assert_eq!(read.made().count(), 0);
        assert_eq!((read.library, read.admin.as_str()), (made.library, "a:b"));
        assert!(std::fs::read_to_string(&path).unwrap().contains("somebody:x\n"));
    }

    #[test]
    fn only_what_is_missing_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pass");
        std::fs::write(&path, "*:*:*:therev:mine\n").unwrap();
        let made = Passwords::read_or_make(&path).unwrap();
        assert_eq!((made.library.as_str(), made.made().count()), ("mine", 2));
        made.keep(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!((text.lines().count(), text.matches(":therev:").count()), (3, 1), "{text}");
        let read = Passwords::read_or_make(&path).unwrap();
        assert_eq!((read.made().count(), &read.admin), (0, &made.admin));
        read.keep(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);

        std::fs::write(&path, "*:*:*:*:ours\n").unwrap();
        let read = Passwords::read_or_make(&path).unwrap();
        assert_eq!((read.made().count(), read.mover.as_str()), (0, "ours"));
    }

    #[test]
    fn the_file_is_its_owners() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pass");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        Passwords::add_lines(&path, "*:*:*:therev:x\n").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
