//! How many statements an operation costs; this does not depend on the machine.

use crate::things::{post, thread, user_per_shard};
use futures_util::future::{join, join_all};
use std::collections::BTreeMap;
use testkit::TestCluster;
use therev::{BucketSet, Database, NewPost, PostId, ShardNo, Therev, Thread, ThreadId, UserId};
use uuid::Uuid;

/// What was sent since `before`, to whom; the control database hears of the node from time to time, of no operation.
fn since(node: &Therev, before: &BTreeMap<Database, u64>) -> BTreeMap<Database, u64> {
    let now = node.shards().statements();
    now.into_iter()
        .map(|(d, n)| (d, n - before.get(&d).unwrap_or(&0)))
        .filter(|(d, n)| *n > 0 && *d != Database::Control)
        .collect()
}

fn shard(number: i16) -> Database {
    Database::Shard(ShardNo(number))
}

#[tokio::test]
async fn per_operation() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Counted").await;
    for author in [authors[1], authors[2], authors[2]] {
        post(&node, author, &open, "text").await;
    }

    let before = node.shards().statements();
    node.user(authors[3]).await.expect("a user");
    assert_eq!(since(&node, &before), BTreeMap::from([(shard(3), 1)]), "a user: one");

    let before = node.shards().statements();
    node.users(&authors).await.expect("users");
    assert_eq!(since(&node, &before).values().sum::<u64>(), 4, "many users: one per shard");

    // The head on shard 0; posts are on shards 1 and 2 only.
    let before = node.shards().statements();
    node.thread_page(open.thread_id, None, 50).await.expect("a page");
    let asked = BTreeMap::from([(shard(0), 1), (shard(1), 1), (shard(2), 1)]);
    assert_eq!(since(&node, &before), asked, "a page: the head, one per shard that holds posts, each with names");

    let before = node.shards().statements();
    post(&node, authors[3], &open, "a reply").await;
    let asked = BTreeMap::from([(shard(0), 2), (shard(3), 1)]);
    assert_eq!(since(&node, &before), asked, "a reply: the head, its own transaction, one for the thread's shard");

    let before = node.shards().statements();
    let answer = NewPost::new(authors[0], open.thread_id, "on the thread's own shard");
    node.create_post(answer).await.expect("a reply");
    assert_eq!(since(&node, &before), BTreeMap::from([(shard(0), 3)]), "the same on one shard");
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn replies_that_come_at_once_share_their_deliveries() {
    const REPLIES: usize = 40;
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Popular").await;
    let before = node.shards().statements();
    // Until everything is written nothing can be delivered to the thread's shard.
    let mut holder = cluster.stranger("shard_0").await;
    let held = holder.transaction().await.expect("a transaction");
    held.batch_execute("LOCK TABLE therev.thread_participants IN EXCLUSIVE MODE").await.expect("the lock");
    let replies = join_all((0..REPLIES).map(|n| post(&node, authors[n % authors.len()], &open, "a reply")));
    let written = async {
        let mut clients = Vec::new();
        for n in 0..cluster.shards() {
            clients.push(cluster.stranger(&format!("shard_{n}")).await);
        }
        let mut ticks = tokio::time::interval(std::time::Duration::from_millis(10));
        loop {
            ticks.tick().await;
            let mut posts = 0;
            for client in &clients {
                let row = client.query_one("SELECT count(*) FROM posts", &[]).await.expect("a count");
                posts += usize::try_from(row.get::<_, i64>(0)).expect("a number");
            }
            if posts == REPLIES {
                return held.commit().await.expect("the lock is gone");
            }
        }
    };
    join(replies, written).await;
    let asked = since(&node, &before)[&shard(0)];
    // The heads, and what was written there, by several at once or each alone; besides, two deliveries that were under way, and what
    // had gathered meanwhile. Each by itself would be forty more.
    let (most, shared) = (REPLIES + REPLIES / authors.len() + REPLIES / 2, REPLIES + 3);
    assert!((shared..most).contains(&usize::try_from(asked).expect("a number")), "{asked} statements");
    drop(node);
    drop(holder);
    cluster.finish().await;
}

#[tokio::test]
async fn a_page_asks_one_shard_of_sixteen() {
    let cluster = TestCluster::new(therev::Layout::Colocated, 16).await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "On one shard").await;
    post(&node, authors[0], &open, "text").await;
    let before = node.shards().statements();
    node.thread_page(open.thread_id, None, 50).await.expect("a page");
    let shards: u64 =
        since(&node, &before).iter().filter(|(d, _)| matches!(d, Database::Shard(_))).map(|(_, n)| n).sum();
    assert_eq!(shards, 2, "the head and the posts, both of one shard");
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn a_shard_that_holds_more_of_a_page_than_of_the_thread_is_asked_twice() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    let open = thread(&node, authors[0], "Mostly one's").await;
    // Two of everybody in turn, then one author's alone.
    let in_turn = (0..46).map(|number| if number < 8 { authors[number % 4] } else { authors[1] });
    let (written, asked) = written_and_shown(&node, &open, in_turn).await;
    let expected = BTreeMap::from([(shard(0), 2), (shard(1), 1), (shard(2), 1), (shard(3), 1)]);
    assert_eq!(asked, expected, "the head, and one per shard: most of the thread is where most of the page is");

    // Of a thread that the page holds whole nobody is asked twice, by a node that has seen it and by one that has not.
    let fresh = cluster.node().await;
    for _ in 0..2 {
        let before = fresh.shards().statements();
        let page = fresh.thread_page(open.thread_id, None, 50).await.expect("a page");
        assert_eq!((page.posts.len(), since(&fresh, &before)), (46, expected.clone()));
    }
    drop(fresh);
    pages_are_whole(&node, open.thread_id, &written).await;

    // One author's alone at first, a quarter of the thread.
    let open = thread(&node, authors[0], "First one's").await;
    let at_first = (0..80).map(|number| if number < 20 { authors[1] } else { authors[[0, 2, 3][number % 3]] });
    let (written, asked) = written_and_shown(&node, &open, at_first).await;
    let expected = BTreeMap::from([(shard(0), 2), (shard(1), 2), (shard(2), 1), (shard(3), 1)]);
    assert_eq!(asked, expected, "the head, one per shard, one more where the page is");
    pages_are_whole(&node, open.thread_id, &written).await;
    drop(node);
    cluster.finish().await;
}

/// Writes a post of each author in turn; what was written, and whom a first page of 20 has asked.
async fn written_and_shown(
    node: &Therev,
    open: &Thread,
    authors: impl Iterator<Item = UserId>,
) -> (Vec<PostId>, BTreeMap<Database, u64>) {
    let mut written = Vec::new();
    for author in authors {
        written.push(post(node, author, open, "text").await.post_id);
    }
    node.relay_once().await.expect("the relay runs");
    let before = node.shards().statements();
    let page = node.thread_page(open.thread_id, None, 20).await.expect("a page");
    assert_eq!(page.posts.iter().map(|it| it.post.post_id).collect::<Vec<_>>(), written[..20]);
    (written, since(node, &before))
}

/// Page by page a thread has every post once, in order, however long the pages are.
async fn pages_are_whole(node: &Therev, thread: ThreadId, written: &[PostId]) {
    for limit in [1, 5, 9, 20, 45, 46, 47] {
        let (mut read, mut after) = (Vec::new(), None);
        loop {
            let page = node.thread_page(thread, after, limit).await.expect("a page");
            assert!(page.posts.len() == limit || page.next.is_none(), "a page of {limit} is whole, or the last");
            read.extend(page.posts.iter().map(|it| it.post.post_id));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(read, written, "pages of {limit}");
    }
}

/// Where a node has shown a thread before, it asks for the posts without waiting for the head; and for those of whoever came
/// since when the head names them.
#[tokio::test]
async fn a_page_shown_before_shows_whoever_came_since() {
    let cluster = TestCluster::colocated().await;
    let (node, other) = (cluster.node().await, cluster.node().await);
    let [author, second, third, ..] = user_per_shard(&node).await;
    let open = thread(&node, author, "Shown before").await;
    post(&node, author, &open, "the first").await;
    post(&node, second, &open, "the second").await;
    let shown = async || {
        let before = node.shards().statements();
        let page = node.thread_page(open.thread_id, None, 9).await.expect("a page");
        assert!(!page.partial);
        (page.posts.len(), page.thread.post_count, since(&node, &before))
    };
    let cost = BTreeMap::from([(shard(0), 2), (shard(1), 1)]);
    assert_eq!(shown().await, (2, 2, cost.clone()), "the head, one per shard");
    assert_eq!(shown().await, (2, 2, cost), "the same");

    post(&other, third, &open, "of somebody new, by another node").await;
    let cost = BTreeMap::from([(shard(0), 2), (shard(1), 1), (shard(2), 1)]);
    assert_eq!(shown().await, (3, 3, cost.clone()), "nobody is asked twice");
    assert_eq!(shown().await, (3, 3, cost));
    drop((node, other));
    cluster.finish().await;
}

/// However long a thread is: its posts come in the order of an index, which is left after the last one that is wanted.
#[tokio::test]
async fn a_page_of_a_long_thread_reads_no_more_than_it_shows() {
    const LIMIT: i64 = 20;
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [author, ..] = user_per_shard(&node).await;
    let long = thread(&node, author, "Long").await;
    for number in 0..300 {
        if number % 5 == 0 {
            let short = thread(&node, author, "Short").await;
            post(&node, author, &short, "the only reply").await;
        }
        post(&node, author, &long, "one of many").await;
    }
    let statements = therev::fenced_statements();
    let (_, share) = statements.iter().find(|(name, _)| name.ends_with("page::POSTS")).expect("it has a name");
    let mut shard = cluster.stranger("shard_0").await;
    shard.batch_execute("ANALYZE posts; SET plan_cache_mode = force_generic_plan").await.expect("settings");
    let (asked, apart) = (BucketSet::from_iter([author.bucket()]), Vec::<Uuid>::new());
    let start = chrono::DateTime::UNIX_EPOCH;
    let transaction = shard.transaction().await.expect("a transaction");
    let posts = transaction
        .query(share.sql(), &[&asked, &apart, &long.value.thread_id.0, &start, &Uuid::nil(), &LIMIT])
        .await
        .expect("an answer");
    assert_eq!(i64::try_from(posts.len()), Ok(LIMIT));
    // By an index alone they are counted there, by a bitmap at the table.
    let read = "SELECT sum(pg_stat_get_xact_tuples_fetched(c.oid))::bigint
                  FROM pg_class AS c WHERE c.relname IN ('posts', 'posts_of_thread')";
    let read: i64 = transaction.query_one(read, &[]).await.expect("a count").get(0);
    assert_eq!(read, LIMIT);
    drop(transaction);
    drop((shard, node));
    cluster.finish().await;
}

#[tokio::test]
async fn the_busiest_users_are_known_to_the_control_database() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let authors = user_per_shard(&node).await;
    // Of content: in the split layout what is done with accounts is not counted.
    for _ in 0..400 {
        node.posts_by_author(authors[1], None, 1).await.expect("none");
    }
    node.posts_by_author(authors[2], None, 1).await.expect("none");
    let told = async {
        let mut ticks = tokio::time::interval(std::time::Duration::from_millis(100));
        loop {
            ticks.tick().await;
            let hot = node.shards().hot_users(1).await.expect("the control database answers");
            if hot.nodes > 0 {
                return hot;
            }
        }
    };
    let hot = tokio::time::timeout(std::time::Duration::from_secs(30), told).await.expect("the node tells its load");
    assert_eq!(hot.users[0].user_id, authors[1].0, "{hot:?}");
    drop(node);
    cluster.finish().await;
}
