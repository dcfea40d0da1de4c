//! Nodes whose clocks are wrong by years, or jump at each reading, beside one whose clock is right.

use serde_json::Value;
use std::process::Command;
use std::str::FromStr;
use testkit::{TestCluster, WrongClock};
use therev::{PostId, Session, TaskId, ThreadId, ThreadOrder, UserId};

const HOUR: i64 = 3_600;
const DAY: i64 = 24 * HOUR;
const YEAR: i64 = 365 * DAY;

/// What a node with such a clock made: see `wrong-clock`.
fn live(cluster: &TestCluster, clock: &WrongClock, name: &str, jumps_s: &[i64]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrong-clock"));
    command.args([&cluster.config().control, testkit::PASSWORD, name]);
    clock.wind(&mut command, jumps_s);
    let output = command.output().expect("the process starts");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("what it made")
}

fn ids<Id: FromStr>(made: &Value) -> Vec<Id> {
    let ids = made.as_array().expect("ids").iter();
    ids.map(|id| id.as_str().and_then(|id| id.parse().ok()).expect("an id")).collect()
}

/// Invariant 13.
#[tokio::test]
async fn harms_nobody() {
    let cluster = TestCluster::usual().await;
    let clock = WrongClock::build().expect("a compiler");
    let node = cluster.node().await;
    let jumping = [0, HOUR, -DAY, 100 * YEAR, -70 * YEAR, 9_000 * YEAR, -HOUR, 100_000 * YEAR];
    let clocks: [(&str, &[i64]); 7] = [
        ("tomorrow", &[DAY]),
        ("an-hour-ago", &[-HOUR]),
        ("years-ahead", &[100 * YEAR]),
        ("before-1970", &[-70 * YEAR]),
        ("beyond-ids", &[20_000 * YEAR]),
        ("jumping", &jumping),
        ("right", &[]),
    ];
    for (name, jumps_s) in clocks {
        let made = live(&cluster, &clock, name, jumps_s);
        if name != "jumping" {
            assert_eq!(made["clock_is_before_1970"], name == "before-1970", "{name}: its clock is wrong");
        }
        let user: UserId = made["user"].as_str().expect("an id").parse().expect("an id");
        let thread: ThreadId = made["thread"].as_str().expect("an id").parse().expect("an id");

        // The other node finds everything, in the order in which it was made.
        assert_eq!(node.user_named(name).await.expect("an answer"), Some(user));
        let page = node.thread_page(thread, None, 9).await.expect("the page");
        let posts: Vec<PostId> = page.posts.iter().map(|it| it.post.post_id).collect();
        assert_eq!(posts, ids(&made["posts"]), "{name}");
        assert_eq!(page.thread.post_count, 5, "{name}");
        let own = node.posts_by_author(user, None, 9).await.expect("posts");
        let own: Vec<PostId> = own.iter().rev().map(|post| post.post_id).collect();
        assert_eq!(own, [posts[0], posts[2], posts[3]], "{name}");
        let sessions = node.sessions(user).await.expect("sessions");
        let sessions: Vec<_> = sessions.iter().rev().map(|it: &Session| it.session_id).collect();
        assert_eq!(sessions, ids(&made["sessions"]), "{name}");
        let session = node.verify_session(made["token"].as_str().expect("a token")).await.expect("it is open");
        assert_eq!(session.user_id, user);
        let tasks = node.tasks().tasks(user, None, None, 9).await.expect("tasks");
        let tasks: Vec<TaskId> = tasks.iter().rev().map(|task| task.task_id).collect();
        assert_eq!(tasks, ids(&made["tasks"]), "{name}");
        let steps = node.tasks().task_log(tasks[0]).await.expect("its log");
        assert_eq!(steps.len(), 2, "{name}: created, then called off");
        assert!(steps[0].message.contains("created"), "{name}: {steps:?}");
        cluster.prove().await;
    }
    // Each was made after the one before, whatever its maker's clock said.
    let newest = node.threads(ThreadOrder::Newest, None, 9, None).await.expect("a list");
    let titles: Vec<&str> = newest.items.iter().rev().map(|it| it.title.as_str()).collect();
    assert_eq!(titles, clocks.map(|(name, _)| name));
    drop(node);
    cluster.finish().await;
}
