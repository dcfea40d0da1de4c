//! A life in the community, for a process whose clock is wrong: `wrong-clock CONTROL_URL PASSWORD NAME`.
//!
//! Prints what it made, in the order in which it was made, for others to read.

use secrecy::ExposeSecret;
use serde_json::json;
use std::error::Error;
use std::time::SystemTime;
use therev::{Actor, Config, NewPost, NewSession, NewTask, NewThread, NewUser, TaskType, ThreadOrder, UserId};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [control, password, name] = arguments.as_slice() else {
        return Err("wrong-clock CONTROL_URL PASSWORD NAME".into());
    };
    let node = therev::connect(Config {
        password: Some(password.as_str().into()),
        relay_ms: 50,
        delivery_ms: 5_000,
        claim_timeout_s: 1,
        ..Config::new(control.as_str())
    })
    .await?;
    let operator = Actor::Operator("wrong clock".into());
    // Its id is made by this process, as all ids are.
    let (user, other) = (UserId::new(), UserId::new());
    for (id, user_name) in [(user, name.clone()), (other, format!("{name}-other"))] {
        node.register(NewUser { user_id: Some(id), user_name, ..NewUser::default() }, &operator).await?;
    }
    let thread = node.create_thread(NewThread::new(user, name, "What time is it?")).await?;
    let mut posts = Vec::new();
    for author in [user, other, user, user, other] {
        posts.push(node.create_post(NewPost::new(author, thread.thread_id, "Late.")).await?.post_id);
    }
    let page = node.thread_page(thread.thread_id, None, 9).await?;
    assert_eq!(page.posts.iter().map(|it| it.post.post_id).collect::<Vec<_>>(), posts);
    let listed = node.threads(ThreadOrder::ByAuthor(user), None, 9, Some(&thread.seen)).await?;
    assert_eq!(listed.items[0].thread_id, thread.thread_id);

    let (first, second) =
        (node.open_session(user, NewSession::default()).await?, node.open_session(user, NewSession::default()).await?);
    node.verify_session(second.token.expose_secret()).await?;
    node.revoke_session(first.session.session_id, &operator).await?;
    let new = NewTask::new(user, TaskType::Analysis, json!({ "text": "hello" }));
    let task = node.tasks().create_task(new.clone()).await?.task_id;
    node.tasks().cancel_task(task, &operator).await?;
    let again = node.tasks().create_task(new).await?.task_id;
    node.relay_once().await?;
    println!(
        "{}",
        json!({
            "user": user, "thread": thread.thread_id, "posts": posts, "token": second.token.expose_secret(),
            "sessions": [first.session.session_id, second.session.session_id], "tasks": [task, again],
            "clock_is_before_1970": is_before_1970(),
        })
    );
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "this is what is wrong here")]
fn is_before_1970() -> bool {
    SystemTime::now() < SystemTime::UNIX_EPOCH
}
