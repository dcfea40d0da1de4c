//! The community's operations, in both layouts.

use crate::things::{operator, post, thread, until_somebody_waits, user, user_per_shard};
use testkit::TestCluster;
use therev::{
    Actor, Config, Error, Group, Layout, Moderation, NewPost, NewThread, NewUser, PostChange, PostId, Role, ShardNo,
    ThreadChange, ThreadOrder, UserChange, UserId,
};

#[tokio::test]
async fn a_person_from_registration_to_deletion() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "Ada").await;
        assert_eq!((ada.user_name.as_str(), ada.display_name().as_str()), ("ada", "ADA"));
        assert_eq!(node.user(ada.user_id).await.expect("she is there"), ada.value);

        // The same registration again is the same; another one of the name is not.
        let again = NewUser { user_id: Some(ada.user_id), user_name: "ada".into(), ..NewUser::default() };
        assert_eq!(node.register(again, &operator()).await.expect("a retry").user_id, ada.user_id);
        let thief = NewUser { user_name: "ADA".into(), ..NewUser::default() };
        assert!(matches!(node.register(thief, &operator()).await, Err(Error::Conflict { .. })));

        // A change of name frees the old one at once.
        let change = UserChange {
            user_name: Some("countess".into()),
            email: Some(Some("Ada@Example.org".into())),
            role: Some(Role::Moderator),
            ..UserChange::default()
        };
        let changed = node.change_user(ada.user_id, change, &operator()).await.expect("she is renamed");
        assert_eq!((changed.user_name.as_str(), changed.email.as_deref()), ("countess", Some("ada@example.org")));
        assert!(changed.version > ada.version);
        // What came of it since is no other registration; her id with a name that was never hers is one.
        let again = NewUser { user_id: Some(ada.user_id), user_name: "ada".into(), ..NewUser::default() };
        assert_eq!(node.register(again, &operator()).await.expect("a late retry").user_id, ada.user_id);
        let eve = NewUser { user_id: Some(ada.user_id), user_name: "eve".into(), ..NewUser::default() };
        assert!(matches!(node.register(eve, &operator()).await, Err(Error::Conflict { what: "id", .. })));
        assert_eq!(node.user_named("eve").await.expect("an answer"), None);
        let second = user(&node, "ada").await;
        assert_eq!(node.user_named("countess").await.expect("an answer"), Some(ada.user_id));

        let off = node.set_active(ada.user_id, false, &operator()).await.expect("she is deactivated");
        assert!(!off.is_active);

        let log = node.audit(Some(ada.user_id), 10).await.expect("the log is read").entries;
        let actions: Vec<&str> = log.iter().map(|entry| entry.action.as_str()).collect();
        assert_eq!(actions, ["change user", "change user", "register"]);
        assert_eq!(log[1].before["user_name"], "ada");
        assert_eq!(log[1].after["role"], "MODERATOR");
        // It outlives her, and her address does not.
        assert_eq!(log[1].after["changed"], serde_json::json!(["email"]));
        assert!(!format!("{log:?}").contains("example.org"), "{log:?}");

        node.delete_user(ada.user_id, false, &operator()).await.expect("she is deleted");
        assert!(matches!(node.user(ada.user_id).await, Err(Error::Gone { .. })));
        let raise = NewUser { user_id: Some(ada.user_id), user_name: "ada2".into(), ..NewUser::default() };
        assert!(matches!(node.register(raise, &operator()).await, Err(Error::Gone { .. })));
        user(&node, "countess").await;
        let found = node.users(&[ada.user_id, second.user_id, UserId::new()]).await.expect("the living are found");
        assert_eq!(found.iter().map(|u| u.user_id).collect::<Vec<_>>(), [second.user_id]);
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn a_thread_across_shards_page_by_page() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let authors = user_per_shard(&node).await;
        let thread = thread(&node, authors[0], "Across").await;
        let mut written = Vec::new();
        for n in 0..23 {
            written.push(post(&node, authors[n % 4], &thread, &format!("post {n}")).await);
        }
        let reply = node.reply(authors[1], written[2].post_id, "an answer").await.expect("a reply to a post");
        assert_eq!(reply.parent_post_id, Some(written[2].post_id));

        let mut read = Vec::new();
        let mut after = None;
        loop {
            let page = node.thread_page(thread.thread_id, after, 7).await.expect("a page");
            assert!(!page.partial && page.posts.len() <= 7);
            assert_eq!(page.thread.post_count, 24);
            read.extend(page.posts.into_iter().map(|item| {
                assert!(item.author.user_name.is_some_and(|name| name.starts_with("user-")));
                item.post.post_id
            }));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        written.push(reply);
        assert_eq!(read, written.iter().map(|p| p.post_id).collect::<Vec<PostId>>());

        let by_author = node.posts_by_author(authors[1], None, 3).await.expect("newest first");
        assert_eq!(by_author[0].post_id, written[23].post_id);
        let older = node.posts_by_author(authors[1], Some(by_author[2].post_id), 100).await.expect("the older ones");
        assert_eq!(by_author.len() + older.len(), 7);
        drop(node);
        cluster.finish().await;
    }
}

/// Invariant 7.
#[tokio::test]
async fn what_deleting_means() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let [ada, bob, carl, _] = user_per_shard(&node).await;
        let thread = thread(&node, ada, "To be cut").await;
        let first = post(&node, bob, &thread, "first").await;
        let under = node.reply(carl, first.post_id, "under it").await.expect("a reply");

        // A moderator's delete is audited at the author's, and the place stays.
        let moderator = Actor::User(carl);
        node.delete_post(first.post_id, &moderator).await.expect("the post is deleted");
        assert!(matches!(node.delete_post(first.post_id, &moderator).await, Err(Error::Gone { .. })));
        let page = node.thread_page(thread.thread_id, None, 10).await.expect("the page");
        assert_eq!(page.posts.iter().map(|p| p.post.body.as_deref()).collect::<Vec<_>>(), [None, Some("under it")]);
        assert_eq!(page.thread.post_count, 1);
        node.relay_once().await.expect("the relay runs");
        let log = node.audit(Some(bob), 10).await.expect("the log").entries;
        assert_eq!((log[0].action.as_str(), log[0].actor.as_str()), ("delete post", format!("user {carl}").as_str()));

        // A deleted author's content stays, without a name.
        node.delete_user(carl, false, &operator()).await.expect("the user is deleted");
        cluster.replica_caught_up().await;
        let page = node.thread_page(thread.thread_id, None, 10).await.expect("the page");
        assert_eq!(page.posts[1].author.user_name, None);
        assert_eq!(page.posts[1].post.body.as_deref(), Some("under it"));

        // With content, it goes too; others' posts in a deleted thread stay theirs.
        let own = post(&node, ada, &thread, "mine").await;
        let gone = node.delete_user(ada, true, &operator()).await.expect("the user is deleted with content");
        assert_eq!((gone.threads, gone.posts), (1, 1));
        assert!(matches!(node.thread_page(thread.thread_id, None, 10).await, Err(Error::Gone { .. })));
        assert_eq!(node.post(own.post_id).await.expect("its place").body, None);
        assert_eq!(node.post(under.post_id).await.expect("another's post").body.as_deref(), Some("under it"));
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn content_that_a_deletion_left_goes_when_it_is_asked_for_again() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let [ada, bob, ..] = user_per_shard(&node).await;
        let own = thread(&node, ada, "Her own").await;
        let open = thread(&node, bob, "Another's").await;
        let left = post(&node, ada, &open, "left").await;
        node.delete_user(ada, false, &operator()).await.expect("the user is deleted");
        assert!(matches!(node.delete_user(ada, false, &operator()).await, Err(Error::Gone { .. })));
        assert_eq!(node.post(left.post_id).await.expect("it stays").body.as_deref(), Some("left"));

        let gone = node.delete_user(ada, true, &operator()).await.expect("there was content to delete");
        assert_eq!((gone.threads, gone.posts), (1, 1));
        assert!(matches!(node.thread(own.thread_id).await, Err(Error::Gone { .. })));
        assert_eq!(node.post(left.post_id).await.expect("its place").body, None);
        assert!(matches!(node.delete_user(ada, true, &operator()).await, Err(Error::Gone { .. })));
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn what_is_written_while_its_author_is_deleted_goes_too() {
    let cluster = TestCluster::usual().await;
    let node = therev::connect(Config { deadline_ms: 60_000, ..cluster.config() }).await.expect("a node");
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, bob, "Another's").await;
    let (holder, looks) = (cluster.stranger("shard_0").await, cluster.stranger("shard_0").await);
    let hold = format!("BEGIN; SELECT FROM users WHERE user_id = '{ada}' FOR UPDATE");
    holder.batch_execute(&hold).await.expect("the account is held");
    let deleting = node.clone();
    let deletion = tokio::spawn(async move { deleting.delete_user(ada, true, &operator()).await });
    // Her content has been looked for, and there was none.
    until_somebody_waits(&looks).await;
    let late = post(&node, ada, &open, "late").await;
    holder.batch_execute("ROLLBACK").await.expect("the account is free");
    let gone = deletion.await.expect("no panic").expect("the user is deleted");
    assert_eq!((gone.threads, gone.posts), (0, 1));
    assert_eq!(node.post(late.post_id).await.expect("its place").body, None);
    drop((holder, looks, node));
    cluster.finish().await;
}

#[tokio::test]
async fn moderation_locks_and_edits() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let [ada, bob, ..] = user_per_shard(&node).await;
        let open = thread(&node, ada, "Old title").await;
        let written = post(&node, bob, &open, "text").await;

        let own = PostChange { body: Some("better text".into()), ..PostChange::default() };
        let edited = node.change_post(written.post_id, own, &Actor::User(bob)).await.expect("an edit");
        assert_eq!(edited.body.as_deref(), Some("better text"));
        let flag = PostChange { moderation: Some(Moderation::Flagged), is_pinned: Some(true), ..PostChange::default() };
        let flagged = node.change_post(written.post_id, flag, &Actor::User(ada)).await.expect("a decision");
        assert_eq!((flagged.moderation, flagged.is_pinned), (Moderation::Flagged, true));

        // Nothing to change is no trouble, and nothing that the author's shard could not take in.
        node.change_post(written.post_id, PostChange::default(), &operator()).await.expect("the post as it is");
        node.change_thread(open.thread_id, ThreadChange::default(), &Actor::User(bob)).await.expect("as it is");

        let change = ThreadChange { title: Some("New title".into()), is_locked: Some(true), ..ThreadChange::default() };
        let locked = node.change_thread(open.thread_id, change, &operator()).await.expect("a change");
        assert!(locked.is_locked && locked.title == "New title" && locked.post_count == 1);
        let late = node.create_post(NewPost::new(bob, open.thread_id, "too late")).await;
        assert!(matches!(late, Err(Error::Locked(id)) if id == open.thread_id));

        let listed = node.threads(ThreadOrder::Newest, None, 5, Some(&locked.seen)).await.expect("the list");
        assert_eq!((listed.items[0].title.as_str(), listed.items[0].is_locked), ("New title", true));
        node.relay_once().await.expect("the relay runs");
        let of_ada = node.audit(Some(ada), 5).await.expect("the log").entries;
        assert_eq!(of_ada[0].action, "change thread");
        assert_eq!(of_ada[0].after["changed"], serde_json::json!(["title"]), "the audit outlives the words");
        let of_bob = node.audit(Some(bob), 5).await.expect("the log").entries;
        assert_eq!(of_bob.iter().filter(|e| e.action == "change post").count(), 2, "an own edit is not audited");
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn lists_of_the_directory() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let mut threads = Vec::new();
    for n in 0..9 {
        threads.push(thread(&node, authors[n % 3], &format!("thread {n}")).await);
    }
    for thread in &threads[..4] {
        post(&node, authors[3], thread, "a reply").await;
    }
    node.relay_once().await.expect("totals are summed");
    let seen = user(&node, "last").await.seen;

    let mut titles = Vec::new();
    let mut after = None;
    loop {
        let page = node.threads(ThreadOrder::Newest, after.as_deref(), 4, Some(&seen)).await.expect("a page");
        titles.extend(page.items.into_iter().map(|card| card.title));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(titles, (0..9).rev().map(|n| format!("thread {n}")).collect::<Vec<_>>());
    let active = node.threads(ThreadOrder::MostActive, None, 20, Some(&seen)).await.expect("the list");
    assert_eq!(active.items.iter().map(|c| c.post_count).collect::<Vec<_>>(), [1, 1, 1, 1, 0, 0, 0, 0, 0]);
    let own = node.threads(ThreadOrder::ByAuthor(authors[1]), None, 20, Some(&seen)).await.expect("the list");
    assert_eq!(own.items.len(), 3);
    let names = node.users_by_prefix("user-", None, 2, Some(&seen)).await.expect("the list");
    assert_eq!(names.items.iter().map(|u| u.user_name.as_str()).collect::<Vec<_>>(), ["user-0", "user-1"]);
    let rest = node.users_by_prefix("user-", names.next.as_deref(), 9, Some(&seen)).await.expect("the rest");
    assert_eq!(rest.items.len(), 2);
    assert!(node.users_by_prefix("us_r", None, 9, Some(&seen)).await.expect("the list").items.is_empty());
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn where_things_are() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "ada").await;
        let thread = thread(&node, ada.user_id, "Here").await;
        let bucket = ada.user_id.bucket().number();

        let by_name = node.where_name("Ada").await.expect("she is found");
        let by_id = node.where_id(ada.user_id.0).await.expect("she is found");
        for (found, via) in [(&by_name, "name"), (&by_id, "hash")] {
            assert_eq!(found.owner, Some(ada.user_id));
            assert_eq!((found.bucket, found.group, found.exists), (bucket, Group::Account, true));
            assert_eq!(serde_json::to_value(found).expect("JSON")["via"], via);
        }
        let content = node.where_id(thread.thread_id.0).await.expect("it is found");
        let expected = match layout {
            Layout::Colocated => bucket % 4,
            Layout::Split => 1 + bucket % 3,
        };
        assert_eq!(content.shard, ShardNo(expected.cast_signed()));
        assert_eq!((content.owner, content.group), (Some(ada.user_id), Group::Content));
        let nobody = node.where_id(UserId::new().0).await.expect("it is placed all the same");
        assert!(!nobody.exists);
        assert!(matches!(node.where_name("nobody").await, Err(Error::NotFound { .. })));
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn an_id_of_another_system_routes_by_its_row() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await;
    let foreign = uuid::Uuid::new_v4();
    let at = format!("shard_{}", therev::bucket_of(foreign).number() % 4);
    let stranger = cluster.stranger(&at).await;
    stranger
        .execute("INSERT INTO therev.id_routes (id, owner_id) VALUES ($1, $2)", &[&foreign, &ada.user_id.0])
        .await
        .expect("the route is written");
    let home = cluster.stranger(&format!("shard_{}", ada.user_id.bucket().number() % 4)).await;
    home.execute(
        "INSERT INTO threads (author_id, thread_id, title, body) VALUES ($1, $2, 'migrated', 'text')",
        &[&ada.user_id.0, &foreign],
    )
    .await
    .expect("the row is written");
    let thread = node.thread(foreign.into()).await.expect("it is found by its route");
    assert_eq!(thread.title, "migrated");
    assert_eq!(node.where_id(foreign).await.expect("it is found").owner, Some(ada.user_id));
    drop((node, stranger, home));
    cluster.finish().await;
}

#[tokio::test]
async fn what_cannot_be_accepted_is_refused_whole() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await;
    let open = thread(&node, ada.user_id, "Open").await;
    let long = "x".repeat(1_048_577);
    for body in ["", "  ", "a\0b", &long] {
        let refused = node.create_post(NewPost::new(ada.user_id, open.thread_id, body)).await;
        assert!(matches!(refused, Err(Error::Invalid { field: "body", .. })));
    }
    for title in ["", "a\0", &"t".repeat(501)] {
        let refused = node.create_thread(NewThread::new(ada.user_id, title, "")).await;
        assert!(matches!(refused, Err(Error::Invalid { field: "title", .. })));
    }
    let stranger_id =
        NewPost { post_id: Some(PostId(uuid::Uuid::new_v4())), ..NewPost::new(ada.user_id, open.thread_id, "x") };
    assert!(matches!(node.create_post(stranger_id).await, Err(Error::Invalid { field: "id", .. })));
    let nowhere = therev::ThreadId::new(ada.user_id);
    assert!(matches!(node.create_post(NewPost::new(ada.user_id, nowhere, "x")).await, Err(Error::NotFound { .. })));
    let nobody = node.create_thread(NewThread::new(UserId::new(), "t", "b")).await;
    assert!(matches!(nobody, Err(Error::NotFound { what: "user", .. })));

    // The same id with another text is no retry.
    let id = Some(PostId::new(ada.user_id));
    let new = |body: &str| NewPost { post_id: id, ..NewPost::new(ada.user_id, open.thread_id, body) };
    let first = node.create_post(new("one")).await.expect("the first");
    assert_eq!(node.create_post(new("one")).await.expect("a retry"), first);
    assert!(matches!(node.create_post(new("two")).await, Err(Error::Conflict { .. })));
    drop(node);
    cluster.finish().await;
}

/// What a create answers is the post as it is read, also when it is asked for twice.
#[tokio::test]
async fn the_same_post_twice_is_one() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Twice").await;
    let parent = post(&node, authors[2], &open, "first").await;
    let answers = therev::Parent { post_id: parent.post_id, author_id: parent.author_id };
    let new = NewPost {
        post_id: Some(therev::PostId::new(authors[1])),
        parent: Some(answers),
        post_type: therev::PostType::Link,
        format: therev::Format::Html,
        metadata: Some(serde_json::json!({ "a": 1 })),
        ..NewPost::new(authors[1], open.thread_id, "https://example.org")
    };
    let created = node.create_post(new.clone()).await.expect("a post");
    assert_eq!(node.post(created.post_id).await.expect("the post"), created);
    assert_eq!(node.create_post(new.clone()).await.expect("the same post"), created);
    let other = NewPost { body: "something else".into(), ..new };
    assert!(matches!(node.create_post(other).await, Err(Error::Conflict { what: "id", .. })));
    assert_eq!(node.thread(open.thread_id).await.expect("the thread").post_count, 2);
    drop(node);
    cluster.finish().await;
}

/// Whoever did not hear the answer asks again, and the thread takes no posts by then.
#[tokio::test]
async fn the_same_post_is_answered_after_its_thread_was_locked_or_deleted() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let open = thread(&node, ada, "Not for long").await;
    let new = |body: &str| NewPost { post_id: Some(PostId::new(bob)), ..NewPost::new(bob, open.thread_id, body) };
    let (first, second) = (new("first"), new("second"));
    let created = node.create_post(first.clone()).await.expect("a post");
    let removed = node.create_post(second.clone()).await.expect("another");
    node.delete_post(removed.post_id, &operator()).await.expect("it is deleted");

    let lock = ThreadChange { is_locked: Some(true), ..ThreadChange::default() };
    node.change_thread(open.thread_id, lock, &operator()).await.expect("it is locked");
    assert_eq!(node.create_post(first.clone()).await.expect("the same post"), created);
    assert!(matches!(node.create_post(second).await, Err(Error::Gone { what: "post", .. })));
    let other = NewPost { body: "something else".into(), ..first.clone() };
    assert!(matches!(node.create_post(other).await, Err(Error::Conflict { what: "id", .. })));
    assert!(matches!(node.create_post(new("too late")).await, Err(Error::Locked(_))));
    assert!(matches!(node.create_post(NewPost::new(bob, open.thread_id, "x")).await, Err(Error::Locked(_))));

    node.delete_thread(open.thread_id, &operator()).await.expect("it is deleted");
    assert_eq!(node.create_post(first).await.expect("the same post"), created);
    assert!(matches!(node.create_post(new("too late")).await, Err(Error::Gone { what: "thread", .. })));
    drop(node);
    cluster.finish().await;
}
