//! A shard's server dies, and an operator puts its standby in its place: by the command line alone, on servers of its
//! own.

use crate::desk::Desk;
use local::{Cluster, ServerId};
use serde_json::{Value, json};
use std::time::Duration;

#[test]
fn a_standby_takes_the_place_of_a_server_that_died() {
    let desk = Desk::new();
    // What was acknowledged is to be there afterwards.
    let up = ["cluster", "up", "--shards", "2", "--replicas", "0", "--standbys", "1", "--synchronous", "true"];
    let made = desk.json_of(&up);
    assert_eq!((&made["standbys"], &made["initialized"]), (&json!(1), &json!(true)), "{made}");
    let shard_of = |name: &str| desk.json_of(&["where", &format!("@{name}")])["shard"].as_u64().unwrap();
    let names: Vec<String> = (0..).map(|number| format!("user-{number}")).take(16).collect();
    for name in &names {
        desk.json_of(&["user", "add", name]);
    }
    let hit = names.iter().find(|name| shard_of(name) == 1).unwrap();
    let author = format!("@{hit}");
    let thread = desk.json_of(&["thread", "add", "--author", &author, "--title", "Kept", "--body", "Before."]);
    let thread = thread["thread_id"].as_str().unwrap();
    let post = |body: &str| {
        desk.json_of(&["post", "add", "--author", &author, "--thread", thread, "--body", body]);
    };
    post("Before, too.");

    Cluster::open(&desk.dir()).unwrap().kill(ServerId::Shard(1)).unwrap();
    let down = |(server, _, runs): (String, Value, bool)| (!runs).then_some(server);
    assert_eq!(desk.servers().into_iter().filter_map(down).collect::<Vec<_>>(), ["shard 1"]);
    assert_eq!(desk.run(&["cluster", "status"]).status.code(), Some(1));
    let error = desk.run(&["thread", "show", thread, "--json"]);
    let error: Value = serde_json::from_slice(&error.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "down", "{error}");

    let promoted = desk.json_of(&["cluster", "promote", "1"]);
    assert_eq!(promoted, json!({ "shard": 1, "primary": "standby 1-1", "may_be_lost": null }));
    // What was there is there, what comes new goes on, and nobody has to tell anybody.
    post("After.");
    let page = desk.json_of(&["thread", "show", thread]);
    let bodies: Vec<&Value> = page["posts"].as_array().unwrap().iter().map(|post| &post["body"]).collect();
    assert_eq!(bodies, ["Before, too.", "After."]);
    // It counts by itself: nobody has to say so.
    let granted = desk.run(&["life", "grant", "1", "--yes", "--json"]);
    let error: Value = serde_json::from_slice(&granted.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "in_the_way", "{error}");
    // The old primary is a standby now; the other shard's servers are as they were.
    let follows = |server: &str| {
        let servers = desk.servers();
        assert!(servers.iter().all(|(_, _, runs)| *runs), "{servers:?}");
        servers.into_iter().find(|(name, _, _)| name == server).unwrap().1
    };
    assert_eq!((follows("shard 1"), follows("standby 1-1")), (json!("standby 1-1"), Value::Null));
    assert_eq!((follows("shard 0"), follows("standby 0-1")), (Value::Null, json!("shard 0")));
    assert_eq!(desk.json_of(&["check"])["ok"], true);

    // And back, in words for people, without a death.
    let output = desk.run(&["cluster", "promote", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("Shard 1's primary is shard 1 now"), "{text}");
    assert_eq!(follows("standby 1-1"), "shard 1");
    assert_eq!(desk.json_of(&["thread", "show", thread])["posts"], page["posts"]);
    assert_eq!(desk.json_of(&up)["initialized"], false, "a second `up` changes nothing");
    assert_eq!(follows("standby 1-1"), "shard 1");
    let unknown = desk.run(&["cluster", "promote", "7", "--json"]);
    let unknown: Value = serde_json::from_slice(&unknown.stderr).unwrap();
    assert!(unknown["error"]["message"].as_str().unwrap().contains('7'), "{unknown}");
    assert_eq!(desk.json_of(&["check"])["ok"], true);

    // A standby that does not follow is no good, though all databases answer.
    assert_eq!(desk.json_of(&["status"])["shards"][1]["standbys"].as_array().unwrap().len(), 1);
    Cluster::open(&desk.dir()).unwrap().stop_server(ServerId::Standby(1, 1)).unwrap();
    let (status, code) = desk.said(&["status"]);
    assert_eq!((&status["shards"][1]["standbys"], code), (&json!([{ "lag_ms": null }]), Some(1)), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_passfile_and_a_wrong_layout_do_not_block_a_cluster() {
    let desk = Desk::new();
    desk.json_of(&["cluster", "up", "--shards", "2", "--replicas", "0"]);
    std::fs::remove_file(desk.dir().join("passfile")).unwrap();
    std::fs::write(desk.dir().join("layout"), "split").unwrap();
    let up = desk.json_of(&["cluster", "up"]);
    assert_eq!((&up["layout"], &up["initialized"]), (&json!("colocated"), &json!(false)), "{up}");
    assert_eq!(std::fs::read_to_string(desk.dir().join("layout")).unwrap(), "colocated");
    desk.json_of(&["user", "add", "ada"]);
    assert_eq!(desk.json_of(&["check"])["ok"], true);
    // Nothing has kept the new passwords.
    for shard in 0..2 {
        let client = testkit::connect(&Cluster::open(&desk.dir()).unwrap().shard_url(shard).unwrap()).await;
        let kept = "SELECT query FROM pg_stat_statements WHERE query ILIKE 'alter role%'";
        client.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await.unwrap();
        assert_eq!(client.query(kept, &[]).await.unwrap().len(), 0);
    }
}

/// A replica that answers and follows nobody gets older and older, and does not know by how much.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_follows_nobody_is_no_good() {
    let desk = Desk::new();
    desk.json_of(&["cluster", "up", "--shards", "1", "--replicas", "1"]);
    let until_it_says_a_lag = async |says: bool| {
        let wait = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            loop {
                ticks.tick().await;
                let (said, code) = desk.said(&["status"]);
                if said["directory"]["replicas"][0]["lag_ms"].is_number() == says {
                    return code;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("its state is known")
    };
    assert_eq!(until_it_says_a_lag(true).await, Some(0));
    let replica = Cluster::open(&desk.dir()).unwrap().directory_replica_urls().remove(0);
    let replica = testkit::connect(&replica).await;
    replica.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.unwrap();
    replica.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    assert_eq!(until_it_says_a_lag(false).await, Some(1));
    drop(replica);
}
