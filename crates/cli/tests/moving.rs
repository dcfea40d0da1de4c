//! The operator's page on moving rows: its commands do what it says, in its order.

use crate::therev;
use testkit::TestCluster;

/// The commands of a page, as they are typed.
fn commands(page: &str) -> Vec<Vec<&str>> {
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block);
    blocks.flat_map(str::lines).map(|line| line.split_whitespace().skip(1).collect()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_on_moving_is_true() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let actor = therev::Actor::Operator("test".into());
    for n in 0..40 {
        // On shard 1, from which the page moves one of them.
        let id = std::iter::repeat_with(therev::UserId::new).find(|id| id.bucket().number() % 4 == 1);
        let new = therev::NewUser { user_id: id, user_name: format!("user-{n}"), ..Default::default() };
        node.register(new, &actor).await.unwrap();
    }
    drop(node);
    let control = cluster.url("control");
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/moving.md")).unwrap();
    let commands = commands(&page);
    assert!(commands.len() > 8);
    for command in commands {
        let all = [&["--control", control.as_str()][..], &command].concat();
        let output = tokio::task::block_in_place(|| therev(&all));
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{command:?}: {said}");
        if command.contains(&"--plan") {
            assert!(said.contains("Nothing stands in the way."), "{command:?}: {said}");
            continue;
        }
        for (word, state) in [("reverse", "reversed"), ("finish", "done"), ("--hold", "switched")] {
            if command.contains(&word) {
                assert!(said.contains(&format!("state       {state}")), "{command:?}: {said}");
            }
        }
    }
    cluster.finish().await;
}
