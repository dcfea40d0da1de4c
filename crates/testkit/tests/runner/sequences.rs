//! Any sequence of operations leaves `check` clean.

use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use testkit::TestCluster;
use therev::{
    Actor, Moderation, NewThread, NewUser, PostChange, PostId, Role, Therev, ThreadChange, ThreadId, UserChange, UserId,
};

/// One thing that somebody does; numbers choose among what exists.
#[derive(Debug, Clone)]
enum Step {
    Register(u8),
    Rename(usize, u8),
    Promote(usize),
    DeleteUser(usize, bool),
    OpenThread(usize),
    Lock(usize, bool),
    DeleteThread(usize),
    Post(usize, usize),
    Reply(usize, usize),
    Moderate(usize),
    DeletePost(usize),
    Relay,
}

fn step() -> impl Strategy<Value = Step> {
    let nth = any::<usize>();
    prop_oneof![
        3 => (0_u8..12).prop_map(Step::Register),
        2 => (nth, 0_u8..12).prop_map(|(user, name)| Step::Rename(user, name)),
        1 => nth.prop_map(Step::Promote),
        1 => (nth, any::<bool>()).prop_map(|(user, content)| Step::DeleteUser(user, content)),
        3 => nth.prop_map(Step::OpenThread),
        1 => (nth, any::<bool>()).prop_map(|(thread, lock)| Step::Lock(thread, lock)),
        1 => nth.prop_map(Step::DeleteThread),
        6 => (nth, nth).prop_map(|(user, thread)| Step::Post(user, thread)),
        4 => (nth, nth).prop_map(|(user, post)| Step::Reply(user, post)),
        1 => nth.prop_map(Step::Moderate),
        2 => nth.prop_map(Step::DeletePost),
        1 => Just(Step::Relay),
    ]
}

#[derive(Default)]
struct World {
    users: Vec<UserId>,
    threads: Vec<ThreadId>,
    posts: Vec<PostId>,
}

fn pick<T: Copy>(from: &[T], number: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[number % from.len()])
}

impl World {
    /// Does a step; that it is refused (a taken name, a locked thread) is as good an outcome as any.
    async fn take(&mut self, node: &Therev, step: &Step) -> Option<()> {
        let operator = Actor::Operator("test".into());
        match *step {
            Step::Register(name) => {
                let new = NewUser { user_name: format!("name-{name}"), ..NewUser::default() };
                self.users.push(node.register(new, &operator).await.ok()?.user_id);
            }
            Step::Rename(user, name) => {
                let change = UserChange { user_name: Some(format!("name-{name}")), ..UserChange::default() };
                node.change_user(pick(&self.users, user)?, change, &operator).await.ok()?;
            }
            Step::Promote(user) => {
                let change = UserChange { role: Some(Role::Admin), ..UserChange::default() };
                node.change_user(pick(&self.users, user)?, change, &operator).await.ok()?;
            }
            Step::DeleteUser(user, with_content) => {
                node.delete_user(pick(&self.users, user)?, with_content, &operator).await.ok()?;
            }
            Step::OpenThread(user) => {
                let new = NewThread::new(pick(&self.users, user)?, "title", "body");
                self.threads.push(node.create_thread(new).await.ok()?.thread_id);
            }
            Step::Lock(thread, is_locked) => {
                let change = ThreadChange { is_locked: Some(is_locked), ..ThreadChange::default() };
                node.change_thread(pick(&self.threads, thread)?, change, &operator).await.ok()?;
            }
            Step::DeleteThread(thread) => {
                node.delete_thread(pick(&self.threads, thread)?, &operator).await.ok()?;
            }
            Step::Post(user, thread) => {
                let new = therev::NewPost::new(pick(&self.users, user)?, pick(&self.threads, thread)?, "text");
                self.posts.push(node.create_post(new).await.ok()?.post_id);
            }
            Step::Reply(user, post) => {
                let reply = node.reply(pick(&self.users, user)?, pick(&self.posts, post)?, "text").await;
                self.posts.push(reply.ok()?.post_id);
            }
            Step::Moderate(post) => {
                let change = PostChange { moderation: Some(Moderation::Flagged), ..PostChange::default() };
                node.change_post(pick(&self.posts, post)?, change, &operator).await.ok()?;
            }
            Step::DeletePost(post) => node.delete_post(pick(&self.posts, post)?, &operator).await.ok()?,
            Step::Relay => {
                node.relay_once().await.ok()?;
            }
        }
        Some(())
    }
}

#[test]
fn any_sequence_leaves_check_clean() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for layout in TestCluster::LAYOUTS {
        let cluster = runtime.block_on(TestCluster::new(layout, 4));
        let node = runtime.block_on(cluster.node());
        let mut runner = TestRunner::new(Cases { cases: 8, failure_persistence: None, ..Cases::default() });
        let sequences = prop::collection::vec(step(), 10..60);
        let outcome = runner.run(&sequences, |steps| {
            runtime.block_on(async {
                let mut world = World::default();
                for step in &steps {
                    world.take(&node, step).await;
                }
                node.relay_once().await.expect("the relay runs");
                let report = node.check().await.expect("check runs");
                prop_assert!(report.ok, "{:#?}", report.checks.iter().filter(|c| c.wrong > 0).collect::<Vec<_>>());
                Ok(())
            })
        });
        if let Err(error) = outcome {
            panic!("{error}");
        }
        drop(node);
        runtime.block_on(cluster.finish());
    }
}
