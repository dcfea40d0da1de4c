//! Somebody at a desk, with a local cluster of their own.

use local::Cluster;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Output;

/// A folder in which somebody works with a local cluster, which is destroyed with it.
pub(crate) struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    pub(crate) fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        // The servers run as another account when this is root.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Desk { folder }
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.folder.path().join(".therev")
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let mut command = crate::command(args);
        command.current_dir(self.folder.path()).env("THEREV_PG_BIN", &testkit::test_servers().pg_bin);
        command.output().unwrap()
    }

    /// What a command says for programs, with its exit code.
    pub(crate) fn said(&self, args: &[&str]) -> (Value, Option<i32>) {
        let output = self.run(&[args, &["--json"]].concat());
        let said = serde_json::from_slice(&output.stdout);
        let said = said.unwrap_or_else(|_| panic!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)));
        (said, output.status.code())
    }

    /// What a command that succeeds says for programs.
    pub(crate) fn json_of(&self, args: &[&str]) -> Value {
        let (said, code) = self.said(args);
        assert_eq!(code, Some(0), "{args:?}: {said}");
        said
    }

    /// Which server follows which, and whether it runs.
    pub(crate) fn servers(&self) -> Vec<(String, Value, bool)> {
        let (said, _) = self.said(&["cluster", "status"]);
        let servers = said["servers"].as_array().unwrap().iter();
        servers
            .map(|it| (it["server"].as_str().unwrap().to_owned(), it["follows"].clone(), it["state"] == "running"))
            .collect()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Ok(cluster) = Cluster::open(&self.dir()) {
            cluster.destroy(&mut |_| {}).unwrap();
        }
    }
}
