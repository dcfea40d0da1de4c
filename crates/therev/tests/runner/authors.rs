//! Whose names a thread's page shows.

use crate::outages::reachable;
use crate::things::{operator, post, thread, user, user_per_shard};
use testkit::TestCluster;
use therev::{Layout, Therev, Thread, UserChange};

/// The names that a page shows: who opened the thread, and who wrote its posts.
async fn shown(node: &Therev, open: &Thread) -> Vec<(Option<String>, Option<String>)> {
    let page = node.thread_page(open.thread_id, None, 9).await.expect("the page");
    let authors = std::iter::once(page.author).chain(page.posts.into_iter().map(|it| it.author));
    authors.map(|author| (author.user_name, author.display_name)).collect()
}

fn names(of: &[(&str, Option<&str>)]) -> Vec<(Option<String>, Option<String>)> {
    of.iter().map(|(user_name, display)| (Some((*user_name).into()), display.map(Into::into))).collect()
}

/// Where accounts lie with posts, names come with these: as they are now, whatever the directory has heard, and without it.
#[tokio::test]
async fn names_come_with_what_their_owners_wrote() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [author, second, ..] = user_per_shard(&node).await;
    let ada = user(&node, "ada").await.value.user_id;
    let open = thread(&node, author, "Named").await;
    post(&node, second, &open, "text").await;
    post(&node, ada, &open, "text").await;
    let before = names(&[("user-0", None), ("user-1", None), ("ada", Some("ADA"))]);
    assert_eq!(shown(&node, &open).await, before);

    reachable(&cluster, "directory", false).await;
    let change = UserChange { last_name: Some(Some("Lovelace".into())), ..UserChange::default() };
    node.change_user(ada, change, &operator()).await.expect("a change of name");
    let after = names(&[("user-0", None), ("user-1", None), ("ada", Some("ADA Lovelace"))]);
    assert_eq!(shown(&node, &open).await, after);
    reachable(&cluster, "directory", true).await;
    drop(node);
    cluster.finish().await;
}

/// Where accounts lie apart, names come from the directory, and a row of an account that its shard does not own is nobody's name.
/// Invariant 2.
#[tokio::test]
async fn names_of_accounts_elsewhere_come_from_the_directory() {
    let cluster = TestCluster::new(Layout::Split, 4).await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Named").await;
    post(&node, authors[1], &open, "text").await;
    for number in 0..cluster.shards() {
        let shard = cluster.stranger(&format!("shard_{number}")).await;
        shard.batch_execute("SET session_replication_role = replica").await.expect("past the guard");
        for author in authors {
            let stray =
                "INSERT INTO users (bucket, user_id, user_name) VALUES ($1, $2, 'a stray row') ON CONFLICT DO NOTHING";
            shard.execute(stray, &[&author.bucket().sql(), &author.0]).await.expect("a copy where it is not owned");
        }
    }
    assert_eq!(shown(&node, &open).await, names(&[("user-0", None), ("user-1", None)]));
    for number in 0..cluster.shards() {
        let shard = cluster.stranger(&format!("shard_{number}")).await;
        let clean = "SET session_replication_role = replica; DELETE FROM users WHERE user_name = 'a stray row'";
        shard.batch_execute(clean).await.expect("it is taken away");
    }
    drop(node);
    cluster.finish().await;
}
