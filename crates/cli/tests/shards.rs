//! A local cluster gets a server more, spreads its rows, and loses it again: by the command line alone.

use crate::desk::Desk;
use local::Cluster;
use serde_json::{Value, json};

fn numbers(listed: &Value) -> Vec<(i64, i64)> {
    let of = |one: &Value| (one["shard"].as_i64().unwrap(), one["account_buckets"].as_i64().unwrap());
    listed.as_array().unwrap().iter().map(of).collect()
}

/// The message and the next step of a command that is refused.
fn refused(desk: &Desk, args: &[&str]) -> String {
    let output = desk.run(&[args, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    // What was talked about before it stands above it.
    let last = text.lines().last().unwrap();
    serde_json::from_str::<Value>(last).unwrap()["error"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_local_cluster_grows_and_shrinks() {
    let desk = Desk::new();
    desk.json_of(&["cluster", "up", "--shards", "2", "--replicas", "0"]);
    let config = desk.dir().join("therev.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}refresh_ms = 200\n")).unwrap();
    desk.json_of(&["generate", "--users", "300", "--threads", "30", "--posts", "600", "--zipf", "0.2", "--seed", "1"]);

    assert_eq!(desk.json_of(&["shard", "add", "--local", "--plan"])["shard"], 2);
    // An interrupted run had made the server, and no more.
    Cluster::open(&desk.dir()).unwrap().grow(3, &mut |_| {}).unwrap();
    let up = desk.run(&["cluster", "up"]);
    let text = String::from_utf8(up.stderr).unwrap();
    assert!(up.status.success() && text.contains("shard-2 is not part of the cluster yet"), "{text}");
    let added = desk.json_of(&["shard", "add", "--local"]);
    assert_eq!((&added["shard"], &added["weight"]), (&json!(2), &json!(1.0)));
    assert_eq!(numbers(&desk.json_of(&["shard", "list"])), [(0, 2048), (1, 2048), (2, 0)]);
    assert_eq!(desk.json_of(&["cluster", "up"])["initialized"], false, "a second `up` changes nothing");

    let planned = desk.json_of(&["rebalance", "--plan"]);
    assert_eq!(planned["relocations"].as_array().unwrap().len(), 2, "{planned}");
    assert_eq!(planned["relocations"][0]["obstacles"], json!([]));
    let text = String::from_utf8(desk.run(&["rebalance", "--plan"]).stdout).unwrap();
    assert!(text.contains("In all 2 relocations") && text.contains("of share"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    let output = desk.run(&["rebalance", "--budget-ms", "2000"]);
    let (text, talk) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(text.contains("in 2 relocations") && text.contains("within 10 %"), "{text}\n{talk}");
    assert!(talk.contains("1 of 2: relocation 1,") && talk.contains("done: 100 %"), "{talk}");
    assert_eq!(desk.json_of(&["rebalance"])["relocations"], json!([]), "there is nothing more to do");
    assert_eq!(desk.json_of(&["check"])["ok"], true);

    assert!(refused(&desk, &["shard", "remove", "2"]).contains("shard 2 owns"));
    assert!(refused(&desk, &["shard", "remove", "2", "--plan"]).contains("shard 2 owns"));
    assert!(refused(&desk, &["shard", "remove", "0"]).contains("has the control database and the directory"));
    assert!(refused(&desk, &["shard", "remove", "1"]).contains("is not the last one"));
    assert!(refused(&desk, &["shard", "remove", "7"]).contains("there is no shard 7"));
    assert!(refused(&desk, &["shard", "add", "--url", "nowhere"]).contains("an address looks like"));
    assert_eq!(desk.json_of(&["shard", "drain", "2", "--plan"])["relocations"].as_array().unwrap().len(), 2);
    let drained = desk.json_of(&["shard", "drain", "2", "--budget-ms", "2000"]);
    assert_eq!(drained["relocations"].as_array().unwrap().len(), 2, "{drained}");
    let removed = json!({ "shard": 2, "server_removed": true });
    assert_eq!(desk.json_of(&["shard", "remove", "2", "--plan"]), removed, "nothing stands in the way");
    assert_eq!(desk.servers().len(), 3);
    assert_eq!(desk.json_of(&["shard", "remove", "2"]), removed);
    let left = numbers(&desk.json_of(&["shard", "list"]));
    assert_eq!((left.len(), left[0].1 + left[1].1), (2, 4096), "{left:?}");
    assert_eq!(desk.servers().len(), 2);
    assert_eq!(desk.json_of(&["cluster", "up"])["initialized"], false);
    assert_eq!(desk.json_of(&["shard", "weight", "1", "0.5"])["weight"], 0.5);
    assert_eq!(desk.json_of(&["check"])["ok"], true);
}
