//! The command on a real cluster: what it prints for programs, and how it fails.

use crate::therev;
use serde_json::{Value, json};
use std::process::Output;
use testkit::TestCluster;
use therev::relocation::{Goal, Mover, Options, State};

/// Runs a command on a cluster, found by the superuser's address as `cluster env` would print it.
fn on(cluster: &TestCluster, args: &[&str]) -> Output {
    let control = cluster.url("control");
    let mut all = vec!["--control", control.as_str()];
    all.extend(args);
    therev(&all)
}

/// What a command prints for programs.
pub(crate) fn json_of(cluster: &TestCluster, args: &[&str]) -> Value {
    let output = on(cluster, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Kind and exit code of a command that fails; nothing may be on its standard output.
fn failure(cluster: &TestCluster, args: &[&str]) -> (String, i32) {
    let output = on(cluster, &[args, &["--json"]].concat());
    assert!(output.stdout.is_empty(), "{args:?}");
    let error: Value = serde_json::from_slice(&output.stderr)
        .unwrap_or_else(|_| panic!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)));
    let error = &error["error"];
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    assert!(error.get("next").is_some(), "{error}");
    (error["kind"].as_str().unwrap().to_owned(), output.status.code().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journey_for_programs() {
    let cluster = TestCluster::usual().await;
    let ada = json_of(&cluster, &["user", "add", "ada"]);
    let thread = json_of(&cluster, &["thread", "add", "--author", "@ada", "--title", "Tea?", "--body", "No."]);
    let id = thread["thread_id"].as_str().unwrap();
    let post = json_of(&cluster, &["post", "add", "--author", "@ada", "--thread", id, "--body", "Yes."]);
    let post_id = post["post_id"].as_str().unwrap();
    json_of(&cluster, &["post", "add", "--author", "@ada", "--reply-to", post_id, "--body", "Perhaps."]);

    let found = json_of(&cluster, &["where", "@ada"]);
    let keys: Vec<&String> = found.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["bucket", "exists", "group", "owner", "shard", "via"]);
    assert_eq!((&found["owner"], &found["via"], &found["exists"]), (&ada["user_id"], &json!("name"), &json!(true)));
    assert_eq!(json_of(&cluster, &["where", post_id])["group"], "content");
    let nobody = json_of(&cluster, &["where", "018f3c5e-7b2a-7000-8000-00000000abcd"]);
    assert_eq!((&nobody["bucket"], &nobody["exists"]), (&json!(3483), &json!(false)));

    let page = json_of(&cluster, &["thread", "show", id]);
    let bodies: Vec<&Value> = page["posts"].as_array().unwrap().iter().map(|post| &post["body"]).collect();
    assert_eq!(bodies, ["Yes.", "Perhaps."]);
    let status = json_of(&cluster, &["status"]);
    assert_eq!(status["shards"].as_array().unwrap().len(), 4);
    let posts: i64 = status["shards"].as_array().unwrap().iter().map(|s| s["posts"].as_i64().unwrap()).sum();
    assert_eq!(posts, 2);
    assert!(status["directory"]["replicas"][0]["lag_ms"].is_number() && status["found_by"].is_string());
    let check = json_of(&cluster, &["check"]);
    assert_eq!(check["ok"], true, "{check}");
    let log = json_of(&cluster, &["audit", "list", "--user", "@ada"]);
    assert_eq!((&log["entries"][0]["action"], &log["partial"]), (&json!("register"), &json!(false)));

    let log = json_of(&cluster, &["audit", "list"]).to_string();
    for (action, target) in [("thread add", format!("thread {id}")), ("post add", format!("post {post_id}"))] {
        assert!(log.contains(&format!("\"{action}\"")) && log.contains(&target), "{action} is not in {log}");
    }

    // What is written is written, whether or not it can be noted.
    let control = cluster.stranger("control").await;
    control.batch_execute("REVOKE INSERT ON therev.operator_log FROM therev").await.unwrap();
    let unnoted = on(&cluster, &["post", "add", "--author", "@ada", "--thread", id, "--body", "- one"]);
    let warning = String::from_utf8(unnoted.stderr).unwrap();
    assert!(unnoted.status.success() && warning.contains("could not be noted"), "{warning}");
    control.batch_execute("GRANT INSERT ON therev.operator_log TO therev").await.unwrap();
    drop(control);

    json_of(&cluster, &["user", "delete", "@ada", "--with-content"]);
    assert_eq!(failure(&cluster, &["thread", "show", id]), ("gone".into(), 1));
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_says_what_it_changed() {
    let cluster = TestCluster::usual().await;
    let ada = json_of(&cluster, &["user", "add", "ada"]);
    json_of(&cluster, &["thread", "add", "--author", "@ada", "--title", "Tea?", "--body", "No."]);
    let directory = cluster.stranger("directory").await;
    directory.batch_execute("DELETE FROM user_directory; UPDATE thread_directory SET title = 'Coffee?'").await.unwrap();
    let check = on(&cluster, &["check"]);
    assert_eq!(check.status.code(), Some(1));
    assert!(String::from_utf8(check.stdout).unwrap().contains("therev check --repair"));

    let report = json_of(&cluster, &["check", "--repair"]);
    let keys: Vec<&String> = report.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["checks", "ok", "repaired"]);
    assert_eq!(report["ok"], true, "{report}");
    let of = |name: &str| report["repaired"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap();
    let user = format!("user {}", ada["user_id"].as_str().unwrap());
    assert_eq!(of("users = directory"), &json!({ "name": "users = directory", "repaired": 1, "examples": [user] }));
    assert_eq!(of("threads = directory")["repaired"], 1);
    assert_eq!(
        of("names of users = claims"),
        &json!({ "name": "names of users = claims", "repaired": 0, "examples": [] })
    );
    assert_eq!(json_of(&cluster, &["thread", "list"])["items"][0]["title"], "Tea?");
    let log = json_of(&cluster, &["audit", "list"]);
    assert!(log.to_string().contains("\"action\":\"repair\""), "{log}");

    let output = on(&cluster, &["check", "--repair"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with("Nothing was to be repaired."), "{text}");

    // What nobody can decide is named, with exit code 1.
    let bob = json_of(&cluster, &["user", "add", "bob"]);
    let rename = async |name: &str| {
        for shard in 0..4 {
            let client = cluster.stranger(&format!("shard_{shard}")).await;
            client.batch_execute("SET session_replication_role = replica").await.unwrap();
            let id = &bob["user_id"].as_str().unwrap();
            let sql = "UPDATE users SET user_name = $1 WHERE user_id = $2::text::uuid";
            client.execute(sql, &[&name, id]).await.unwrap();
        }
    };
    rename("ada").await;
    let output = on(&cluster, &["check", "--repair"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("user_name ada: more than once"), "{text}");
    rename("bob").await;
    assert_eq!(json_of(&cluster, &["check", "--repair"])["ok"], true);
    drop(directory);
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_gets_one_clear_sentence() {
    let cluster = TestCluster::usual().await;
    json_of(&cluster, &["user", "add", "ada"]);
    let thread = json_of(&cluster, &["thread", "add", "--author", "@ada", "--title", "Open", "--body", ""]);
    let id = thread["thread_id"].as_str().unwrap();
    let nowhere = "01646449-9349-8f35-abaa-0f1857397a51";
    for (args, kind) in [
        (vec!["user", "add", "ADA"], "conflict"),
        (vec!["user", "add", "a b"], "invalid"),
        (vec!["user", "show", "@nobody"], "not_found"),
        (vec!["thread", "show", nowhere], "not_found"),
        (vec!["post", "add", "--author", "@ada", "--thread", id, "--body", ""], "invalid"),
        (vec!["import", "stackexchange", "/nonexistent", "--site", "x"], "io"),
    ] {
        let (found, code) = failure(&cluster, &args);
        assert_eq!(code, 1, "{args:?}");
        if kind != "io" {
            assert_eq!(found, kind, "{args:?}");
        }
    }
    // People get the same in words, with the next step, and never a password.
    let output = on(&cluster, &["thread", "show", nowhere]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(nowhere) && !text.contains("postgresql://"), "{text}");
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_dump_stops_at_its_line_and_leaves_the_rest_whole() {
    let cluster = TestCluster::usual().await;
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| std::fs::write(folder.path().join(name), text).unwrap();
    let user = |id: u32| format!("<row Id=\"{id}\" CreationDate=\"2018-01-01T00:00:00\" DisplayName=\"Ann\" />\r\n");
    let good = format!("\u{feff}<?xml version=\"1.0\"?>\r\n<users>\r\n{}{}</users>", user(1), user(2));
    for (name, root) in [("Posts.xml", "posts"), ("Comments.xml", "comments"), ("Votes.xml", "votes")] {
        write(name, format!("<{root}></{root}>").as_bytes());
    }
    let dump = folder.path().to_str().unwrap();
    let import = ["import", "stackexchange", dump, "--site", "small"];
    let broken: [(&str, Vec<u8>); 4] = [
        ("line 4", good.replace("<row Id=\"2\"", "<row Id=\"2\" Broken").into_bytes()),
        (
            "DOCTYPE",
            good.replace("<users>", "<!DOCTYPE u [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><users>").into_bytes(),
        ),
        ("line 4", good.replace("Id=\"2\"", "Id=\"&#0;\"").into_bytes()),
        ("line 4", [good.split("<row Id=\"2\"").next().unwrap().as_bytes(), b"<row Id=\"\xff\"/></users>"].concat()),
    ];
    for (word, bytes) in broken {
        write("Users.xml", &bytes);
        let output = on(&cluster, &import);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(word) && text.contains("Users.xml"), "{text}");
        // Clean at once: what stood before the faulty line is known everywhere.
        assert_eq!(json_of(&cluster, &["check"])["ok"], true);
    }
    write("Users.xml", good.as_bytes());
    let report = json_of(&cluster, &import);
    let written = report["written"]["users"].as_u64().unwrap();
    let known = report["skipped"].as_array().unwrap().iter().filter(|s| s["reason"] == "already here");
    assert_eq!(written + known.map(|s| s["count"].as_u64().unwrap()).sum::<u64>(), 2, "{report}");
    let names = json_of(&cluster, &["user", "list", "ann"]);
    assert_eq!(names["items"].as_array().unwrap().len(), 2, "two of one display name have two user names");
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_says_what_an_older_server_cannot_do() {
    // The servers have therev's roles once a cluster was made on them.
    let cluster = TestCluster::usual().await;
    let server = cluster.url("control").rsplit_once('/').unwrap().0.to_owned();
    let admin = testkit::connect(&format!("{server}/postgres")).await;
    let prefix = format!("init_{}", std::process::id());
    let parts = ["control", "directory", "shard_0"].map(|part| format!("{prefix}_{part}"));
    for part in &parts {
        admin.batch_execute(&format!("CREATE DATABASE {part}")).await.unwrap();
    }
    let [control, directory, shard] = parts.each_ref().map(|part| format!("{server}/{part}"));
    let folder = tempfile::tempdir().unwrap();
    let passfile = folder.path().join("pass");
    let password = testkit::PASSWORD;
    let line = |role| format!("*:*:*:{role}:{password}\n");
    std::fs::write(&passfile, ["therev", "therev_admin", "therev_mover"].map(line).concat()).unwrap();
    let passfile = passfile.to_str().unwrap();
    let base =
        ["--control", &control, "init", "--directory", &directory, "--shard", &shard, "--passfile", passfile].to_vec();

    let version: i32 =
        admin.query_one("SELECT current_setting('server_version_num')::integer / 10000", &[]).await.unwrap().get(0);
    let said = therev(&base);
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(text.contains("needs PostgreSQL 16"), version < 16, "{text}");
    // Once more: nothing to do, the same answer for programs.
    let again = therev(&[base, vec!["--json"]].concat());
    let fact: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(fact["oldest_postgres"], version, "{fact}");
    for part in &parts {
        admin.batch_execute(&format!("DROP DATABASE {part} WITH (FORCE)")).await.unwrap();
    }
    cluster.finish().await;
}

/// The same command again, after the process that it was begun by has died: before the switch, and after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_move_goes_on_by_the_same_command() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let mover = therev::relocation::Mover::new(node.shards().clone(), therev::relocation::Options::default());
    let (done, held) = (therev::relocation::Goal::Done, therev::relocation::Goal::Switched);
    let begin = async |source: i16, target: i16, goal| {
        let buckets = [4_u16, 8].map(|number| therev::Bucket::try_from(number).unwrap()).to_vec();
        let (source, target) = (therev::ShardNo(source), therev::ShardNo(target));
        let groups = therev::Group::ALL.to_vec();
        let request = therev::relocation::Request { groups, buckets, pin: None, source, target };
        let plan = mover.plan(&request).await.unwrap();
        mover.begin(&plan, goal, "test").await.unwrap().relocation
    };
    let next = |args: &[&str]| {
        let output = on(&cluster, &[args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        error["error"]["next"].as_str().unwrap().to_owned()
    };
    let ended = |args: &[&str]| {
        let all = json_of(&cluster, args);
        assert_eq!((all.as_array().unwrap().len(), &all[0]["state"]), (1, &json!("done")), "{all}");
        all[0]["relocation"].clone()
    };

    let left = begin(0, 2, done).await;
    // Some of it, or to another shard: that is not the same.
    for other in [["move", "buckets", "4", "--to", "2"], ["move", "buckets", "4,8", "--to", "3"]] {
        let next = next(&other);
        assert!(next.contains(&format!("`therev relocation resume {left}`")), "{next}");
    }
    assert_eq!(ended(&["move", "buckets", "4,8", "--to", "2"]), json!(left));

    // What is there already stays; where that is all, nothing is to be done.
    ended(&["move", "buckets", "4,5", "--to", "2"]);
    assert_eq!(next(&["move", "buckets", "4,5", "--to", "2"]), "name buckets of other shards, or another shard");

    let left = begin(2, 0, held).await;
    Box::pin(mover.drive(left, &|_| {})).await.unwrap();
    let next = next(&["move", "buckets", "4,8", "--to", "0"]);
    assert!(next.contains(&format!("`therev relocation finish {left}`")), "{next}");
    let number = left.to_string();
    let planned = |what: &str| json_of(&cluster, &["relocation", what, &number, "--plan"]);
    for (what, goal, owner, former) in [("finish", "done", 0, 2), ("reverse", "reversed", 2, 0)] {
        let plan = planned(what);
        let said = (&plan["state"], &plan["goal"], &plan["owner"], &plan["former"], &plan["obstacles"]);
        assert_eq!(said, (&json!("switched"), &json!(goal), &json!(owner), &json!(former), &json!([])), "{plan}");
    }
    let (plan, reason) = (planned("abort"), format!("relocation {left} is switched"));
    assert_eq!((&plan["obstacles"][0]["reason"], &plan["rows"]), (&json!(reason), &json!(0)), "{plan}");
    mover.want(left, done).await.unwrap();
    assert_eq!(ended(&["move", "buckets", "4,8", "--to", "0"]), json!(left));
    assert_eq!(planned("finish")["obstacles"][0]["reason"], json!(format!("relocation {left} is done")));
    drop((mover, node));
    cluster.finish().await;
}

/// `abort` on the way back has done what it was for when everything stays where it was switched to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_is_called_off() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let held = json_of(&cluster, &["move", "buckets", "4", "--to", "2", "--hold"]);
    let relocation = held[0]["relocation"].as_i64().unwrap();
    // Whoever holds on to a table where the buckets are lets no try get through.
    let mut holder = cluster.stranger("shard_2").await;
    let holds = holder.transaction().await.unwrap();
    holds.batch_execute("LOCK TABLE posts IN ROW EXCLUSIVE MODE").await.unwrap();
    let mover = Mover::new(node.shards().clone(), Options::default());
    mover.want(relocation, Goal::Reversed).await.unwrap();
    let called_off = async {
        while mover.show(relocation).await.unwrap().state != State::Switching {
            tokio::task::yield_now().await;
        }
        let (control, number) = (cluster.url("control"), relocation.to_string());
        let abort = move || therev(&["--control", &control, "relocation", "abort", &number, "--json"]);
        tokio::task::spawn_blocking(abort).await.unwrap()
    };
    let (driven, output) = tokio::join!(mover.drive(relocation, &|_| {}), called_off);
    assert_eq!(driven.unwrap().state, State::Switched);
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &said["state"]), (Some(0), &json!("switched")), "{said}");
    drop(holds);
    drop(holder);
    let ended = json_of(&cluster, &["relocation", "finish", &relocation.to_string()]);
    assert_eq!(ended["state"], "done");
    drop((mover, node));
    cluster.finish().await;
}

/// A command is a node of its own: the one's clock is years before 1970, the next one's jumps at each reading.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_clock_harms_no_command() {
    let cluster = TestCluster::usual().await;
    let clock = testkit::WrongClock::build().unwrap();
    let year = 365 * 24 * 3_600;
    let jumping = [100 * year, -70 * year, 0, 3_600, -3_600, 1_000_000 * year];
    let wrong = |jumps_s: &[i64], args: &[&str]| {
        let control = cluster.url("control");
        let mut command =
            crate::command(&[&["--control", &control, "--log-format", "json", "--json", "-vv"], args].concat());
        clock.wind(&mut command, jumps_s);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let before_1970 = [-70 * year];
    for (name, jumps_s) in [("ada", &before_1970[..]), ("bob", &jumping)] {
        wrong(jumps_s, &["user", "add", name]);
        let author = format!("@{name}");
        let thread = wrong(jumps_s, &["thread", "add", "--author", &author, "--title", name, "--body", "No."]);
        let id = thread["thread_id"].as_str().unwrap();
        for body in ["First", "Second"] {
            wrong(jumps_s, &["post", "add", "--author", &author, "--thread", id, "--body", body]);
        }
        wrong(jumps_s, &["relay", "--once"]);
        wrong(jumps_s, &["maintain", "--once"]);
        let page = wrong(jumps_s, &["thread", "show", id]);
        assert_eq!(page["posts"].as_array().unwrap().len(), 2);
        assert_eq!(page, json_of(&cluster, &["thread", "show", id]));
        for list in [&["thread", "list"][..], &["user", "list"], &["audit", "list"]] {
            assert_eq!(wrong(jumps_s, list), json_of(&cluster, list));
        }
        assert_eq!(wrong(jumps_s, &["check"])["ok"], true);
    }
    cluster.finish().await;
}

/// What was applied before a failure stays, each database for itself, and the next run continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_that_was_applied_half_way_is_continued() {
    let cluster = TestCluster::usual().await;
    let shards = [cluster.stranger("shard_1").await, cluster.stranger("shard_2").await];
    for shard in &shards {
        let last =
            "DELETE FROM therev.schema_versions WHERE version = (SELECT max(version) FROM therev.schema_versions)";
        shard.batch_execute(last).await.unwrap();
    }
    // The last chapter grants rights to this table among others.
    shards[0].batch_execute("ALTER TABLE threads RENAME TO gone").await.unwrap();
    let apply = || {
        let output = on(&cluster, &["schema", "apply", "--json"]);
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), told["databases"].as_array().unwrap().clone())
    };
    let (code, databases) = apply();
    assert_eq!(code, Some(1));
    for one in &databases {
        let (newest, name) = (one["newest"].as_i64().unwrap(), one["database"].as_str().unwrap());
        let (behind, applied) = (i64::from(name == "shard 1"), usize::from(name == "shard 2"));
        assert_eq!(one["version"], json!(newest - behind), "{one}");
        assert_eq!(one["applied"].as_array().unwrap().len(), applied, "{one}");
        assert_eq!(one["error"].as_str().is_some_and(|error| error.contains("threads")), behind == 1, "{one}");
    }
    assert_eq!(on(&cluster, &["schema", "status"]).status.code(), Some(1));

    shards[0].batch_execute("ALTER TABLE gone RENAME TO threads").await.unwrap();
    let (code, databases) = apply();
    assert_eq!(code, Some(0));
    let applied: Vec<&Value> = databases.iter().flat_map(|one| one["applied"].as_array().unwrap()).collect();
    assert_eq!(applied, ["shard/09_grants"]);
    assert_eq!(json_of(&cluster, &["schema", "status"])["ok"], true);
    drop(shards);
    cluster.finish().await;
}
