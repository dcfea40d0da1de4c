use super::*;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use therev::{Cursor, PostType, ShardNo, Thread, ThreadId, UserId};
use uuid::Uuid;

fn user(number: u128) -> UserId {
    UserId(Uuid::from_u128(0x018f_3c5e_7b2a_4000_8000_0000_0000_0000 + number))
}

fn author(number: u128) -> Author {
    let (user_name, display_name) = match number {
        1 => (Some("ada"), Some("Ada Lovelace")),
        2 => (Some("bob"), None),
        3 => (Some("eve"), Some("Eve\u{1b}[31m \u{202e}live")),
        _ => (None, None),
    };
    let text = |name: Option<&str>| name.map(str::to_owned);
    Author { user_id: user(number), user_name: text(user_name), display_name: text(display_name) }
}

fn at(minutes: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_615_000_000, 0).unwrap() + TimeDelta::minutes(minutes)
}

fn post_id(number: u128) -> PostId {
    PostId(Uuid::from_u128(0x018f_3c5e_7b2a_8abc_8000_0000_0000_0000 + number))
}

fn thread_id() -> ThreadId {
    ThreadId(Uuid::from_u128(0x018f_3c5e_7b2a_8abc_9000_0000_0000_0001))
}

fn item(number: u128, by: u128, parent: Option<u128>, body: Option<&str>) -> PagePost {
    let post = Post {
        post_id: post_id(number),
        author_id: user(by),
        thread_id: thread_id(),
        thread_author_id: user(1),
        parent_post_id: parent.map(post_id),
        post_type: PostType::Text,
        body: body.map(str::to_owned),
        format: Format::Plain,
        is_pinned: false,
        moderation: Moderation::Approved,
        score: 0,
        metadata: json!({}),
        created_at: at(i64::try_from(number).unwrap()),
        updated_at: at(0),
        version: 1,
    };
    PagePost { post, author: author(by) }
}

fn page(posts: Vec<PagePost>) -> ThreadPage {
    let thread = Thread {
        thread_id: thread_id(),
        author_id: user(1),
        title: "Why does a measurement disturb the state, and what would a weaker measurement leave?".into(),
        body: "<p>I have a qubit in <code>|+&gt;</code>.</p><p>What is left of it after I looked?</p>".into(),
        format: Format::Html,
        is_pinned: true,
        is_locked: false,
        moderation: Moderation::Approved,
        score: 7,
        metadata: json!({}),
        post_count: i64::try_from(posts.len()).unwrap(),
        created_at: at(0),
        updated_at: at(0),
        version: 1,
    };
    ThreadPage { thread, author: author(1), posts, next: None, missing: Vec::new(), partial: false }
}

fn shown(page: &ThreadPage) -> String {
    let out = Output { json: false, width: 72, colors: false };
    render(page, &out, "therev thread show ID --after CURSOR")
}

#[test]
fn a_page_reads_like_a_page() {
    let mut first = item(1, 2, None, Some("It collapses.\n\n    let x = measure(q);\n"));
    first.post.score = 3;
    let mut flagged =
        item(4, 3, None, Some("Another answer that is long enough to be wrapped at the width of this page."));
    flagged.post.moderation = Moderation::Flagged;
    let posts = vec![
        first,
        item(2, 1, Some(1), Some("All of it?")),
        item(3, 2, Some(2), Some("Yes.")),
        flagged,
        item(5, 9, Some(1), None),
        item(6, 2, Some(77), Some("This answers something on the page before.")),
    ];
    let mut page = page(posts);
    page.next = Some(Cursor::from(&page.posts[5].post));
    insta::assert_snapshot!(shown(&page));
}

#[test]
fn a_page_that_is_not_whole_says_so() {
    let mut page = page(vec![item(1, 2, None, Some("It collapses."))]);
    page.partial = true;
    page.missing = vec![ShardNo(2)];
    insta::assert_snapshot!(shown(&page));
}

#[test]
fn every_post_is_shown_once_however_they_answer_each_other() {
    let circle = vec![item(1, 1, Some(2), Some("a")), item(2, 2, Some(1), Some("b")), item(3, 2, Some(3), Some("c"))];
    assert_eq!(in_order(&circle).len(), 3);
    let chain: Vec<PagePost> = (0..500).map(|n| item(n, 1, n.checked_sub(1), Some("x"))).collect();
    let order = in_order(&chain);
    assert_eq!(order.len(), 500);
    assert!(order.iter().enumerate().all(|(at, (depth, _))| at == *depth));
    assert!(shown(&page(chain)).lines().all(|line| line.chars().count() <= 72));
}

#[test]
fn names_cannot_drive_the_terminal() {
    assert_eq!(name(&author(1)), "Ada Lovelace (@ada)");
    assert_eq!(name(&author(2)), "@bob");
    assert!(!name(&author(3)).contains(['\u{1b}', '\u{202e}']));
    assert!(name(&author(4)).starts_with("user 018f3c5e"));
}
