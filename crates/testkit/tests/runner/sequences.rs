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

/// What a step may be refused with: what it needs is taken, locked, deleted, or changed meanwhile.
const REFUSALS: &[&str] = &["not_found", "gone", "conflict", "invalid", "locked", "changed", "state"];

#[derive(Default)]
struct World {
    /// In all its names, which others of before may have kept.
    case: usize,
    users: Vec<UserId>,
    threads: Vec<ThreadId>,
    posts: Vec<PostId>,
}

fn pick<T: Copy>(from: &[T], number: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[number % from.len()])
}

impl World {
    /// Does a step, if there is something to do it with; `false`: there is not, or it is refused (a taken name, a locked thread), which
    /// is as good an outcome as any. Nothing else is.
    async fn take(&mut self, node: &Therev, step: &Step) -> Result<bool, String> {
        match self.try_to(node, step).await {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) if REFUSALS.contains(&error.kind()) => Ok(false),
            Some(Err(error)) => Err(format!("{step:?}: {}: {error}", error.kind())),
        }
    }

    async fn try_to(&mut self, node: &Therev, step: &Step) -> Option<therev::Result<()>> {
        let operator = Actor::Operator("test".into());
        match *step {
            Step::Register(name) => {
                let new = NewUser { user_name: format!("name-{}-{name}", self.case), ..NewUser::default() };
                let registered = node.register(new, &operator).await;
                Some(registered.map(|user| self.users.push(user.user_id)))
            }
            Step::Rename(user, name) => {
                let change =
                    UserChange { user_name: Some(format!("name-{}-{name}", self.case)), ..UserChange::default() };
                Some(node.change_user(pick(&self.users, user)?, change, &operator).await.map(drop))
            }
            Step::Promote(user) => {
                let change = UserChange { role: Some(Role::Admin), ..UserChange::default() };
                Some(node.change_user(pick(&self.users, user)?, change, &operator).await.map(drop))
            }
            Step::DeleteUser(user, with_content) => {
                Some(node.delete_user(pick(&self.users, user)?, with_content, &operator).await.map(drop))
            }
            Step::OpenThread(user) => {
                let new = NewThread::new(pick(&self.users, user)?, "title", "body");
                let opened = node.create_thread(new).await;
                Some(opened.map(|thread| self.threads.push(thread.thread_id)))
            }
            Step::Lock(thread, is_locked) => {
                let change = ThreadChange { is_locked: Some(is_locked), ..ThreadChange::default() };
                Some(node.change_thread(pick(&self.threads, thread)?, change, &operator).await.map(drop))
            }
            Step::DeleteThread(thread) => {
                Some(node.delete_thread(pick(&self.threads, thread)?, &operator).await.map(drop))
            }
            Step::Post(user, thread) => {
                let new = therev::NewPost::new(pick(&self.users, user)?, pick(&self.threads, thread)?, "text");
                let written = node.create_post(new).await;
                Some(written.map(|post| self.posts.push(post.post_id)))
            }
            Step::Reply(user, post) => {
                let reply = node.reply(pick(&self.users, user)?, pick(&self.posts, post)?, "text").await;
                Some(reply.map(|post| self.posts.push(post.post_id)))
            }
            Step::Moderate(post) => {
                let change = PostChange { moderation: Some(Moderation::Flagged), ..PostChange::default() };
                Some(node.change_post(pick(&self.posts, post)?, change, &operator).await.map(drop))
            }
            Step::DeletePost(post) => Some(node.delete_post(pick(&self.posts, post)?, &operator).await.map(drop)),
            Step::Relay => Some(node.relay_once().await.map(drop)),
        }
    }
}

#[test]
fn any_sequence_leaves_check_clean() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for layout in TestCluster::LAYOUTS {
        let cluster = runtime.block_on(TestCluster::new(layout, 4));
        let node = runtime.block_on(cluster.node());
        // More where more are asked for. What fails is shown with its steps; a file of cases would be of one cluster's ids.
        let cases = Cases::default();
        let cases = Cases { cases: if cases.cases > 256 { cases.cases / 32 } else { 8 }, ..cases };
        let mut runner = TestRunner::new(Cases { failure_persistence: None, ..cases });
        let sequences = prop::collection::vec(step(), 10..60);
        let (case, done) = (std::cell::Cell::new(0_usize), std::cell::Cell::new(0_usize));
        let outcome = runner.run(&sequences, |steps| {
            runtime.block_on(async {
                case.set(case.get() + 1);
                let mut world = World { case: case.get(), ..World::default() };
                for step in &steps {
                    let taken = world.take(&node, step).await;
                    prop_assert!(taken.is_ok(), "{taken:?}");
                    done.set(done.get() + usize::from(taken == Ok(true)));
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
        assert!(done.get() > 50, "{} steps of all were taken", done.get());
        drop(node);
        runtime.block_on(cluster.finish());
    }
}
