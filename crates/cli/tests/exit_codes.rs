//! 2 for a command line that cannot be understood, 1 for everything else; each with a sentence.

use crate::therev;
use serde_json::Value;
use std::process::{Command, Stdio};

const ID: &str = "018f3c5e-7b2a-8000-8000-00000000abcd";
/// Nothing listens there.
const NOWHERE: &str = "postgresql://therev:secret-word@127.0.0.1:1/therev_control";

fn assert_exit(args: &[&str], code: i32, says: &str) {
    let output = therev(args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(says), "{args:?}: {said}");
    assert!(!said.contains("secret-word"), "{args:?}: {said}");
}

#[test]
fn what_cannot_be_understood_is_2() {
    assert_exit(&[], 2, "Usage");
    assert_exit(&["fly"], 2, "fly");
    assert_exit(&["status", "--fast"], 2, "--fast");
    assert_exit(&["cluster", "up", "--shards", "0"], 2, "--shards");
    assert_exit(&["cluster", "up", "--shards", "1", "--layout", "split"], 2, "split");
    assert_exit(&["cluster", "up", "--layout", "sideways"], 2, "colocated");
    assert_exit(&["thread", "show", ID, "--page-size", "0"], 2, "--page-size");
    assert_exit(&["life", "grant", "control"], 2, "neither a shard's number");
    assert_exit(&["thread", "list", "--newest", "--most-active"], 2, "cannot be used with");
    assert_exit(&["thread", "moderate", ID, "maybe"], 2, "approved");
    assert_exit(&["user", "edit", "@ada"], 2, "required");
    assert_exit(&["user", "edit", "@ada", "--role", "KING"], 2, "MODERATOR");
    assert_exit(&["post", "add", "--author", "@ada", "--body", "x"], 2, "--reply-to");
    assert_exit(&["audit", "list", "--limit", "0"], 2, "--limit");
    assert_exit(&["init", "--directory", "x", "--shard", "y"], 2, "--control");
    assert_exit(&["simulate", "--users", "few"], 2, "--users");
    assert_exit(&["simulate", "--by", "name"], 2, "--by");
    assert_exit(&["--log-format", "xml", "status"], 2, "json");
    assert_exit(&["shard", "add", "--local", "--weight", "0"], 2, "from 0.001 to 1000");
    assert_exit(&["shard", "weight", "2", "0.0005"], 2, "from 0.001 to 1000");
}

#[test]
fn whatever_else_is_1() {
    assert_exit(&["status"], 1, "therev cluster up");
    assert_exit(&["--control", NOWHERE, "status"], 1, "control database is down");
    assert_exit(&["--control", "secret-word", "status"], 1, "postgresql://role@host:port/database");
    assert_exit(&["--control", NOWHERE, "where", "nonsense"], 1, "`nonsense` is not the id");
    assert_exit(&["--control", NOWHERE, "thread", "show", "12"], 1, "`12` is not the id of a thread");
    assert_exit(&["--control", NOWHERE, "thread", "show", ID, "--after", "x"], 1, "--after `x`");
    let dashes = ["thread", "add", "--author", ID, "--title", "-5 °C", "--body", "- one"];
    assert_exit(&[&["--control", NOWHERE][..], &dashes].concat(), 1, "control database is down");
    assert_exit(&["cluster", "down"], 1, "no local cluster");
    assert_exit(&["cluster", "env", "--dir", "elsewhere"], 1, "elsewhere");
}

#[test]
fn programs_get_errors_as_json() {
    for (args, kind, code) in [
        (vec!["status", "--json"], "config", 1),
        (vec!["--json", "--control", NOWHERE, "check"], "down", 1),
        (vec!["--json", "fly"], "usage", 2),
        (vec!["--json", "cluster", "up", "--shards", "99"], "usage", 2),
        (vec!["--json", "--control", NOWHERE, "post", "show", "x"], "invalid", 1),
    ] {
        let output = therev(&args);
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(error["error"]["kind"], kind, "{args:?}: {error}");
        assert!(error["error"]["message"].is_string() && error["error"]["next"].is_string(), "{error}");
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_reader_that_left_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_therev"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before the first byte can be written, or soon after: both must end quietly.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
