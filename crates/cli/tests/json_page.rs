//! The page on JSON: every key that it names of a command's document is there, and no other.

use crate::on_a_cluster::json_of;
use serde_json::Value;
use std::collections::BTreeSet;
use testkit::TestCluster;

/// The keys of a shape such as `{"a","b":[{"c"}]}`, or of the first object of such a list, but not of what is in them.
fn keys_of_shape(shape: &str) -> BTreeSet<String> {
    let (mut keys, mut depth) = (BTreeSet::new(), 0);
    for (number, part) in shape.split('"').enumerate() {
        if number % 2 == 1 {
            keys.extend((depth == 1).then(|| part.to_owned()));
            continue;
        }
        depth += part.matches('{').count();
        depth -= part.matches('}').count();
    }
    keys
}

/// What the page says of a command, in the row that begins with it.
fn documented(command: &str) -> BTreeSet<String> {
    let page = include_str!("../../../docs/json.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    let mut of_command = rows.filter(|(commands, _)| commands.starts_with(&format!("`{command}`")));
    let (_, document) = of_command.next().unwrap_or_else(|| panic!("docs/json.md does not name {command}"));
    keys_of_shape(document.split('`').nth(1).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_on_json_is_true() {
    let cluster = TestCluster::colocated().await;
    // `waiting_for`: only where something waits.
    let is = |command: &str, args: &[&str]| {
        let said = json_of(&cluster, args);
        let first = said.as_array().map_or(&said, |all| &all[0]);
        let keys: BTreeSet<String> = first.as_object().unwrap().keys().cloned().collect();
        let mut wanted = documented(command);
        wanted.retain(|key| key != "waiting_for" || keys.contains(key));
        assert_eq!(keys, wanted, "{command}");
        said
    };
    let id_of = |said: &Value, key: &str| said[key].as_str().unwrap().to_owned();
    is("user add", &["user", "add", "ada"]);
    is("user add", &["user", "edit", "@ada", "--first-name", "Ada"]);
    let thread = is("thread add", &["thread", "add", "--author", "@ada", "--title", "Tea?", "--body", "No."]);
    let thread = id_of(&thread, "thread_id");
    let post = ["post", "add", "--author", "@ada", "--thread", &thread, "--body", "Yes."];
    let post = id_of(&json_of(&cluster, &post), "post_id");
    is("thread add", &["thread", "lock", &thread]);
    is("thread list", &["thread", "list"]);
    let page = is("thread show", &["thread", "show", &thread]);
    assert_eq!(page["posts"][0]["author"]["display_name"], "Ada");
    is("post show", &["post", "show", &post]);
    is("user show", &["user", "show", "@ada"]);
    is("user list", &["user", "list"]);
    is("where", &["where", &post]);
    for command in ["status", "check", "hot", "audit list", "shard list", "check --repair", "rebalance --plan"] {
        is(command.strip_suffix(" --plan").unwrap_or(command), &command.split(' ').collect::<Vec<_>>());
    }
    is("schema apply", &["schema", "status"]);
    is("relay", &["relay", "--once"]);
    is("maintain", &["maintain", "--once"]);
    is("shard weight", &["shard", "weight", "3", "1"]);
    is("move … --plan", &["move", "buckets", "4", "--to", "2", "--plan"]);
    is("relocation show", &["move", "buckets", "4", "--to", "2", "--hold"]);
    is("relocation show", &["relocation", "list"]);
    is("relocation abort", &["relocation", "finish", "1", "--plan"]);
    is("relocation show", &["relocation", "finish", "1"]);
    is("thread delete", &["post", "delete", &post]);
    is("user delete", &["user", "delete", "@ada", "--with-content"]);
    is("generate", &["generate", "--users", "9", "--threads", "3", "--posts", "9", "--seed", "1"]);
    is("simulate", &["simulate", "--users", "1000", "--days", "1"]);
    cluster.finish().await;
}
