//! Nodes whose placement is wrong, and ownership that changes under writers.

use crate::things::{bulk_post, operator, post, thread, user_per_shard};
use futures_util::future::join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use testkit::TestCluster;
use therev::{
    AccountType, Actor, Bucket, Error, ExposeSecret, Group, Layout, Map, NewAccount, NewPost, NewSession, NewTask,
    NewUser, Place, PostChange, Provider, ShardNo, TaskStatus, TaskType, Therev, ThreadChange, ThreadOrder, UserChange,
    UserId,
};

/// A node that believes every bucket to be on a shard where it is not.
fn all_wrong(node: &Therev) -> Map {
    let mut map = Map::clone(&node.shards().map());
    for group in Group::ALL {
        for bucket in Bucket::all() {
            let place = map.place(group, bucket);
            let wrong = Place { shard: ShardNo((place.shard.0 + 1) % 4), epoch: place.epoch };
            map.learn(group, bucket, wrong);
        }
    }
    map
}

#[tokio::test]
async fn a_wrong_or_empty_placement_answers_everything_rightly() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let authors = user_per_shard(&node).await;
        let open = thread(&node, authors[0], "Found all the same").await;
        for author in authors {
            post(&node, author, &open, "a post").await;
        }
        // None: what a node of another shard count would guess first. Wrong: everything one shard off.
        for map in [Map::first(layout, 2), all_wrong(&node)] {
            let lost = cluster.node().await;
            lost.shards().forget_placement(map.clone());
            assert_eq!(lost.user(authors[2]).await.expect("found").user_id, authors[2]);
            assert_eq!(lost.users(&authors).await.expect("all are found").len(), 4);
            let page = lost.thread_page(open.thread_id, None, 50).await.expect("the page");
            assert!(!page.partial);
            let before = page.posts.len();
            lost.shards().forget_placement(map.clone());
            let written = post(&lost, authors[3], &open, "by a lost node").await;
            lost.shards().forget_placement(map.clone());
            lost.change_post(
                written.post_id,
                PostChange { is_pinned: Some(true), ..PostChange::default() },
                &operator(),
            )
            .await
            .expect("a change");
            lost.shards().forget_placement(map.clone());
            assert_eq!(lost.thread_page(open.thread_id, None, 50).await.expect("the page").posts.len(), before + 1);
            lost.shards().forget_placement(map.clone());
            assert!(lost.where_name("user-1").await.expect("found").exists);
            assert!(matches!(lost.user(therev::UserId::new()).await, Err(Error::NotFound { .. })));
            lost.shards().forget_placement(map);
            let rows = (0..40).map(|n| bulk_post(&open, authors[n % 4])).collect();
            let mut writer = lost.bulk_writer();
            writer.posts("posts", rows).await.expect("a bulk write");
            writer.finish().await.expect("a bulk write");
            assert_eq!(writer.written(), 40);
        }
        drop(node);
        cluster.finish().await;
    }
}

/// A node whose placement is wrong again before each call.
struct Lost {
    node: Therev,
    map: Map,
}

impl Lost {
    fn node(&self) -> &Therev {
        self.node.shards().forget_placement(self.map.clone());
        &self.node
    }

    /// Whose an id is, and what.
    async fn finds(&self, id: uuid::Uuid, owner: UserId, what: &str) {
        let found = self.node().where_id(id).await.expect("found");
        assert_eq!((found.exists, found.what, found.owner), (true, what, Some(owner)));
    }
}

#[tokio::test]
async fn whatever_a_lost_node_is_asked_for_it_does() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let others = user_per_shard(&node).await;
        for (name, map) in [("guessed", Map::first(layout, 2)), ("wrong", all_wrong(&node))] {
            let lost = Lost { node: cluster.node().await, map };
            let ada = a_lost_node_knows_people(&lost, name, &others).await;
            a_lost_node_keeps_sessions(&lost, ada).await;
            a_lost_node_keeps_accounts_and_tasks(&lost, ada).await;
            a_lost_node_writes_and_reads(&lost, ada, others[1]).await;
            a_lost_node_deletes(&lost, ada, others[2]).await;
            let relayed = lost.node().relay_once().await.expect("the relay runs");
            assert_eq!(relayed.waiting, 0, "{relayed:?}");
        }
        drop(node);
        cluster.finish().await;
    }
}

async fn a_lost_node_knows_people(lost: &Lost, name: &str, others: &[UserId; 4]) -> UserId {
    let new = NewUser { user_name: name.into(), ..NewUser::default() };
    let ada = lost.node().register(new, &operator()).await.expect("registered").user_id;
    assert_eq!(lost.node().user_named(name).await.expect("an answer"), Some(ada));
    assert_eq!(lost.node().user_named("nobody").await.expect("an answer"), None);
    let thief = NewUser { user_name: "user-3".into(), ..NewUser::default() };
    assert!(matches!(lost.node().register(thief, &operator()).await, Err(Error::Conflict { .. })));
    let again = format!("{name}-again");
    let change = UserChange { user_name: Some(again.clone()), ..UserChange::default() };
    assert_eq!(lost.node().change_user(ada, change, &operator()).await.expect("a change of name").user_name, again);
    assert_eq!(lost.node().user_named(name).await.expect("an answer"), None);
    assert_eq!(lost.node().where_name(&again).await.expect("found").owner, Some(ada));
    assert!(!lost.node().set_active(ada, false, &operator()).await.expect("deactivated").is_active);
    assert!(lost.node().set_active(ada, true, &operator()).await.expect("active again").is_active);
    assert_eq!(lost.node().user(ada).await.expect("found").user_name, again);
    let everybody = [others.as_slice(), &[ada]].concat();
    assert_eq!(lost.node().users(&everybody).await.expect("all are found").len(), 5);
    let listed = lost.node().list_users(&everybody).await.expect("all are found");
    assert_eq!((listed.partial, listed.users.len()), (false, 5));
    assert_eq!(lost.node().audit(Some(ada), 9).await.expect("her log").entries.len(), 4);
    lost.finds(ada.0, ada, "user").await;
    ada
}

async fn a_lost_node_keeps_sessions(lost: &Lost, ada: UserId) {
    let open = async || lost.node().open_session(ada, NewSession::default()).await.expect("a session");
    let (kept, other) = (open().await, open().await);
    let id = kept.session.session_id;
    let token = kept.token.expose_secret();
    assert_eq!(lost.node().verify_session(token).await.expect("the session").session_id, id);
    assert_eq!(lost.node().sessions(ada).await.expect("a list").len(), 2);
    lost.finds(id.0, ada, "session").await;
    assert_eq!(lost.node().revoke_other_sessions(ada, id, &operator()).await.expect("the other one ends"), 1);
    let ended = lost.node().verify_session(other.token.expose_secret()).await;
    assert!(matches!(ended, Err(Error::Credentials)), "{ended:?}");
    lost.node().verify_session(token).await.expect("this one does not");
    lost.node().revoke_session(id, &operator()).await.expect("now it does");
    assert!(matches!(lost.node().verify_session(token).await, Err(Error::Credentials)));
}

async fn a_lost_node_keeps_accounts_and_tasks(lost: &Lost, ada: UserId) {
    let new = NewAccount::new(ada, Provider::Claude, AccountType::Api, "work");
    let account = lost.node().tasks().create_account(new, &operator()).await.expect("an account").account_id;
    assert_eq!(lost.node().tasks().account(account).await.expect("the account").label, "work");
    let marked = lost.node().tasks().set_default_account(ada, account, &operator()).await.expect("the default one");
    assert!(marked.is_default);
    assert_eq!(lost.node().tasks().accounts(ada).await.expect("a list").len(), 1);
    lost.finds(account.0, ada, "account").await;
    lost.node().tasks().remove_account(account, &operator()).await.expect("removed");
    let removed = lost.node().tasks().account(account).await;
    assert!(matches!(removed, Err(Error::NotFound { .. })), "{removed:?}");

    let new = NewTask::new(ada, TaskType::Analysis, serde_json::json!({ "text": "hello" }));
    let task = lost.node().tasks().create_task(new).await.expect("a task").task_id;
    assert_eq!(lost.node().tasks().task(task).await.expect("the task").status, TaskStatus::Pending);
    assert_eq!(lost.node().tasks().tasks(ada, None, None, 9).await.expect("a list").len(), 1);
    lost.finds(task.0, ada, "task").await;
    let cancelled = lost.node().tasks().cancel_task(task, &operator()).await.expect("cancelled");
    assert_eq!(cancelled.status, TaskStatus::Cancelled);
    assert_eq!(lost.node().tasks().task_log(task).await.expect("its log").len(), 2);
}

async fn a_lost_node_writes_and_reads(lost: &Lost, ada: UserId, bob: UserId) {
    let open = thread(lost.node(), ada, "Found").await.thread_id;
    let new = NewPost::new(bob, open, "a reply");
    let reply = lost.node().create_post(new).await.expect("a post").post_id;
    let under = lost.node().reply(ada, reply, "under it").await.expect("an answer").post_id;
    let change = ThreadChange { title: Some("Found again".into()), ..ThreadChange::default() };
    let changed = lost.node().change_thread(open, change, &operator()).await.expect("a change");
    assert_eq!((changed.title.as_str(), changed.post_count), ("Found again", 2));
    let change = PostChange { body: Some("a better reply".into()), ..PostChange::default() };
    lost.node().change_post(reply, change, &Actor::User(bob)).await.expect("a change");

    assert_eq!(lost.node().thread(open).await.expect("the thread").title, "Found again");
    assert_eq!(lost.node().post(reply).await.expect("the post").body.as_deref(), Some("a better reply"));
    let page = lost.node().thread_page(open, None, 9).await.expect("the page");
    let shown: Vec<_> = page.posts.iter().map(|item| item.post.post_id).collect();
    assert_eq!((page.partial, shown), (false, vec![reply, under]));
    assert_eq!(lost.node().posts_by_author(bob, None, 1).await.expect("his posts")[0].post_id, reply);
    assert_eq!(lost.node().posts_by_author(ada, None, 9).await.expect("her posts").len(), 1);
    let listed = lost.node().threads(ThreadOrder::ByAuthor(ada), None, 9, Some(&changed.seen)).await.expect("the list");
    assert_eq!(listed.items.iter().map(|card| card.thread_id).collect::<Vec<_>>(), [open]);
    for (id, owner, what) in [(open.0, ada, "thread"), (reply.0, bob, "post"), (under.0, ada, "post")] {
        lost.finds(id, owner, what).await;
    }
}

/// `ada` has a thread and a post from before.
async fn a_lost_node_deletes(lost: &Lost, ada: UserId, cy: UserId) {
    let open = thread(lost.node(), cy, "Not for long").await.thread_id;
    let reply = lost.node().create_post(NewPost::new(ada, open, "likewise")).await.expect("a post").post_id;
    let stays =
        lost.node().create_post(NewPost::new(ada, open, "it stays until she goes")).await.expect("a post").post_id;
    lost.node().delete_post(reply, &operator()).await.expect("the post goes");
    assert_eq!(lost.node().post(reply).await.expect("its place").body, None);
    let again = lost.node().delete_post(reply, &operator()).await;
    assert!(matches!(again, Err(Error::Gone { .. })), "{again:?}");
    assert_eq!(lost.node().thread(open).await.expect("the thread").post_count, 1);
    lost.node().delete_thread(open, &operator()).await.expect("the thread goes");
    assert!(matches!(lost.node().thread(open).await, Err(Error::Gone { .. })));
    let late = lost.node().create_post(NewPost::new(ada, open, "too late")).await;
    assert!(matches!(late, Err(Error::Gone { what: "thread", .. })), "{late:?}");

    let name = lost.node().user(ada).await.expect("she is there").user_name;
    let gone = lost.node().delete_user(ada, true, &operator()).await.expect("she goes with all that she wrote");
    assert_eq!((gone.threads, gone.posts), (1, 2));
    assert!(matches!(lost.node().user(ada).await, Err(Error::Gone { .. })));
    assert_eq!(lost.node().user_named(&name).await.expect("an answer"), None);
    assert_eq!(lost.node().users(&[ada, cy]).await.expect("the living").len(), 1);
    assert_eq!(lost.node().post(stays).await.expect("its place").body, None);
    assert!(!lost.node().where_id(ada.0).await.expect("it is placed all the same").exists);
}

/// A decision that a promotion has lost leaves nodes with an epoch that no shard has any more.
#[tokio::test]
async fn who_believes_in_an_epoch_that_is_lost_is_put_right_by_the_shards() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Lost decisions").await;
    let mut map = Map::first(Layout::Colocated, 4);
    for (group, bucket) in Group::ALL.into_iter().flat_map(|group| Bucket::all().map(move |bucket| (group, bucket))) {
        let ShardNo(owner) = map.place(group, bucket).shard;
        map.learn(group, bucket, Place { shard: ShardNo((owner + 1) % 4), epoch: 9 });
    }
    let lost = cluster.node().await;
    let owner = node.shards().map().place(Group::Content, authors[1].bucket()).shard;
    let believed = || lost.shards().map().place(Group::Content, authors[1].bucket()).shard;

    lost.shards().forget_placement(map.clone());
    let mut writer = lost.bulk_writer();
    writer.posts("posts", (0..40).map(|n| bulk_post(&open, authors[n % 4])).collect()).await.expect("a bulk write");
    writer.finish().await.expect("it ends");
    assert_eq!((writer.written(), believed()), (40, owner));

    lost.shards().forget_placement(map.clone());
    post(&lost, authors[1], &open, "by itself").await;
    assert_eq!(believed(), owner);

    lost.shards().forget_placement(map);
    let page = lost.thread_page(open.thread_id, None, 50).await.expect("a page");
    assert_eq!((page.posts.len(), believed()), (41, owner));
    drop((node, lost));
    cluster.finish().await;
}

/// Invariant 4.
#[tokio::test]
async fn an_epoch_never_falls() {
    let cluster = TestCluster::usual().await;
    let mut shard = cluster.stranger("shard_0").await;
    let changed = shard.transaction().await.expect("a transaction");
    let set = "UPDATE therev.ownership SET epoch = $1 WHERE colocation_group = 'content' AND bucket = 8";
    assert_eq!(changed.execute(set, &[&7_i64]).await.expect("it grows"), 1);
    let refused = changed.execute(set, &[&6_i64]).await.expect_err("it does not fall");
    assert!(refused.as_db_error().is_some_and(|e| e.message().contains("may not fall from 7 to 6")), "{refused:?}");
    changed.rollback().await.expect("as it was");
    drop(shard);
    cluster.finish().await;
}

/// Ownership is taken away and given back, as by switches that are backed out, while writers update rows: a row that
/// exists is never «not found», and no acknowledged update is lost.
/// Invariant 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_exists_is_never_not_found() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[1], "Contended").await;
    let target = post(&node, authors[0], &open, "0").await;
    let stop = Arc::new(AtomicBool::new(false));
    let flips = Arc::new(AtomicU64::new(0));

    let saboteur = {
        let (stop, flips, client) = (stop.clone(), flips.clone(), cluster.stranger("shard_0").await);
        let bucket = authors[0].bucket().sql();
        tokio::spawn(async move {
            let mark = "UPDATE therev.ownership SET state = $2::text::therev.ownership_state
                         WHERE colocation_group = 'content' AND bucket = $1";
            let mark = client.prepare(mark).await.expect("the mark is prepared");
            while !stop.load(Ordering::Relaxed) {
                for state in ["draining", "owned"] {
                    client.execute(&mark, &[&bucket, &state]).await.expect("the state changes");
                }
                flips.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let writers = (0..4).map(|writer| {
        let node = node.clone();
        let (actor, id, flips) = (Actor::User(authors[0]), target.post_id, flips.clone());
        tokio::spawn(async move {
            let mut acknowledged = 0;
            while flips.load(Ordering::Relaxed) < 100 {
                let change = PostChange { body: Some(format!("{writer}-{acknowledged}")), ..PostChange::default() };
                node.change_post(id, change, &actor).await.expect("the row exists");
                node.post(id).await.expect("the row exists");
                acknowledged += 1;
            }
            acknowledged
        })
    });
    let acknowledged: i64 = join_all(writers).await.into_iter().map(|n| n.expect("no writer failed")).sum();
    stop.store(true, Ordering::Relaxed);
    saboteur.await.expect("the saboteur ends");
    let version = node.post(target.post_id).await.expect("the row exists").version;
    assert_eq!(version - target.version, acknowledged, "every acknowledged update counted once");
    drop(node);
    cluster.finish().await;
}

/// A bucket that has moved: the old owner points the way, and lists, pages and batches follow.
#[tokio::test]
async fn a_moved_bucket_is_followed() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let bucket = authors[0].bucket();
    // Nothing of this bucket exists yet but the user, so that moving it is a matter of marks and one row.
    let (old, new) = (cluster.stranger("shard_0").await, cluster.stranger("shard_2").await);
    let row = old
        .query_one("SELECT to_jsonb(u) FROM users AS u WHERE user_id = $1", &[&authors[0].0])
        .await
        .expect("the user's row");
    let user: serde_json::Value = row.get(0);
    new.execute(
        "INSERT INTO therev.ownership (colocation_group, bucket, state, epoch) VALUES ('account', $1, 'owned', 2)
         ON CONFLICT (colocation_group, bucket) DO UPDATE SET state = 'owned', peer = NULL, epoch = 2",
        &[&bucket.sql()],
    )
    .await
    .expect("the new owner");
    new.batch_execute("SET session_replication_role = replica").await.expect("rows that only change their place");
    new.execute("INSERT INTO users SELECT * FROM jsonb_populate_record(NULL::users, $1)", &[&user])
        .await
        .expect("the row at its new place");
    old.batch_execute("SET session_replication_role = replica").await.expect("rows that only change their place");
    old.execute("DELETE FROM users WHERE user_id = $1", &[&authors[0].0]).await.expect("the old row goes");
    old.execute("DELETE FROM audit_log WHERE user_id = $1", &[&authors[0].0]).await.expect("its audit too");
    old.batch_execute("SET session_replication_role = origin").await.expect("back to normal");
    old.execute(
        "UPDATE therev.ownership SET state = 'moved', peer = 2, epoch = 2
          WHERE colocation_group = 'account' AND bucket = $1",
        &[&bucket.sql()],
    )
    .await
    .expect("the old owner points the way");

    assert_eq!(node.user(authors[0]).await.expect("followed").user_id, authors[0]);
    assert_eq!(node.users(&authors).await.expect("followed").len(), 4);
    assert_eq!(node.where_id(authors[0].0).await.expect("followed").shard, ShardNo(2));
    let open = node.create_thread(therev::NewThread::new(authors[0], "Elsewhere", "text")).await.expect("followed");
    node.create_post(NewPost::new(authors[0], open.thread_id, "text")).await.expect("content stayed");
    node.threads(ThreadOrder::Newest, None, 5, Some(&open.seen)).await.expect("the list");
    let control = cluster.stranger("control").await;
    control
        .execute(
            "UPDATE therev.placement SET shard = 2, epoch = 2 WHERE colocation_group = 'account' AND bucket = $1",
            &[&bucket.sql()],
        )
        .await
        .expect("the control database hears of it");
    drop((node, old, new, control));
    cluster.finish().await;
}
