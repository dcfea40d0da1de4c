//! Whoever ends a measurement finds nothing of it left.

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// The signal comes while servers are being started, when there is most to lose.
#[test]
fn nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_therev-bench"));
    command.args(["--only", "one_of_sixteen", "--posts", "20000"]).env("TMPDIR", folder.path());
    let mut bench = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut servers = String::new();
    let mut said = String::new();
    for line in BufReader::new(bench.stderr.take().unwrap()).lines().map_while(Result::ok) {
        if let Some((_, place)) = line.split_once("servers in ") {
            place.clone_into(&mut servers);
            kill_process(Pid::from_child(&bench), Signal::INT).unwrap();
        }
        said.extend([&line, "\n"]);
    }
    assert_eq!(bench.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("it was interrupted") && !servers.is_empty(), "{said}");
    assert!(!Path::new(&servers).exists(), "{said}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "{said}");
    let running = Command::new("pgrep").args(["-f", &servers]).output().unwrap();
    assert!(running.stdout.is_empty(), "{said}");
}
