//! A thread's page as text: who, when, what, and replies under the post that they answer.

use crate::output::Output;
use crate::readable;
use crate::tables::{count, minute};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use therev::{Author, Format, Moderation, PagePost, Post, PostId, ShardNo, ThreadPage};

/// A reply stands this much further to the right than its parent.
const STEP: usize = 4;
/// Deeper replies stand no further to the right: the text needs room.
const DEPTH_MAX: usize = 6;

/// Which shards gave no answer, as a sentence.
pub(crate) fn silent(missing: &[ShardNo]) -> String {
    let shards: Vec<String> = missing.iter().map(ToString::to_string).collect();
    format!("{} {} gave no answer.", if shards.len() == 1 { "shard" } else { "shards" }, shards.join(", "))
}

/// A page as text, no line wider than the output. `next` is the command that shows the next page.
pub(crate) fn render(page: &ThreadPage, out: &Output, next: &str) -> String {
    let mut text = head(page, out);
    for (depth, item) in in_order(&page.posts) {
        text.push('\n');
        text.push_str(&post(item, depth, page, out));
    }
    if page.partial {
        let missing = format!("This page is not whole: {} What their users wrote is missing.", silent(&page.missing));
        let _ = write!(text, "\n{}\n", readable::plain(&missing, out.width));
    }
    if page.next.is_some() {
        let _ = write!(text, "\nMore: {next}\n");
    }
    text
}

fn head(page: &ThreadPage, out: &Output) -> String {
    let thread = &page.thread;
    let mut facts = vec![name(&page.author), minute(thread.created_at), count(thread.post_count, "post")];
    facts.extend(score(thread.score));
    facts.extend(thread.is_pinned.then(|| "pinned".to_owned()));
    facts.extend(thread.is_locked.then(|| "locked".to_owned()));
    facts.extend(moderated(thread.moderation));
    facts.push(format!("thread {}", thread.thread_id));
    let title = readable::plain(&readable::line(&thread.title), out.width);
    let title: Vec<String> = title.lines().map(|line| out.bold(line)).collect();
    let mut text = format!("{}\n{}\n", title.join("\n"), wrapped(&facts, out.width));
    let body = body(&thread.body, thread.format, out.width);
    if !body.is_empty() {
        let _ = write!(text, "\n{body}\n");
    }
    text
}

/// A post with its author, as deep as it answers.
fn post(item: &PagePost, depth: usize, page: &ThreadPage, out: &Output) -> String {
    let PagePost { post, author } = item;
    let indent = " ".repeat(depth.min(DEPTH_MAX) * STEP);
    let width = out.width - indent.len();
    let mut facts = vec![name(author), minute(post.created_at)];
    facts.extend(score(post.score));
    facts.extend(post.is_pinned.then(|| "pinned".to_owned()));
    facts.extend(moderated(post.moderation));
    facts.push(format!("post {}", post.post_id));
    facts.extend(elsewhere(post, page, depth));
    let body = match &post.body {
        None => "(deleted)".to_owned(),
        Some(text) => body(text, post.format, width - 2),
    };
    let mut text = String::new();
    for line in wrapped(&facts, width).lines() {
        let _ = writeln!(text, "{indent}{line}");
    }
    for line in body.lines() {
        let line = format!("{indent}  {line}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// What is answered, where the place on the page does not say it.
fn elsewhere(post: &Post, page: &ThreadPage, depth: usize) -> Option<String> {
    let parent = post.parent_post_id?;
    let here = page.posts.iter().find(|item| item.post.post_id == parent);
    match here {
        // So deep that the parent stands as far to the right.
        Some(item) if depth > DEPTH_MAX => Some(format!("in reply to {}", name(&item.author))),
        Some(_) => None,
        None => Some(format!("in reply to post {parent}")),
    }
}

/// The posts of a page with their depth: each followed by what answers it, all by time.
fn in_order(posts: &[PagePost]) -> Vec<(usize, &PagePost)> {
    let here: BTreeSet<PostId> = posts.iter().map(|item| item.post.post_id).collect();
    let mut answers: BTreeMap<Option<PostId>, Vec<&PagePost>> = BTreeMap::new();
    for item in posts {
        let parent = item.post.parent_post_id.filter(|parent| here.contains(parent) && *parent != item.post.post_id);
        answers.entry(parent).or_default().push(item);
    }
    let mut ordered = Vec::with_capacity(posts.len());
    let mut open: Vec<(usize, &PagePost)> = Vec::new();
    open.extend(answers.remove(&None).into_iter().flatten().rev().map(|item| (0, item)));
    while let Some((depth, item)) = open.pop() {
        ordered.push((depth, item));
        let under = answers.remove(&Some(item.post.post_id));
        open.extend(under.into_iter().flatten().rev().map(|item| (depth + 1, item)));
    }
    // What answers itself in a circle is nobody's answer: it is shown all the same.
    ordered.extend(answers.into_values().flatten().map(|item| (0, item)));
    ordered
}

/// `Ada Lovelace (@ada)`; without a name in the directory, the id.
pub(crate) fn name(author: &Author) -> String {
    match (&author.display_name, &author.user_name) {
        (Some(display), Some(user)) if !readable::line(display).is_empty() => {
            format!("{} (@{})", readable::line(display), readable::line(user))
        }
        (_, Some(user)) => format!("@{}", readable::line(user)),
        _ => format!("user {}", author.user_id),
    }
}

fn score(score: i32) -> Option<String> {
    (score != 0).then(|| format!("score {score}"))
}

fn moderated(moderation: Moderation) -> Option<String> {
    (moderation != Moderation::Approved).then(|| moderation.name().to_owned())
}

/// A text as people read it.
pub(crate) fn body(text: &str, format: Format, width: usize) -> String {
    match format {
        Format::Html => readable::html(text, width),
        Format::Plain => readable::plain(text, width),
    }
}

/// Facts one after the other, broken only between two of them.
pub(crate) fn wrapped(facts: &[String], width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for fact in facts {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 3 + fact.chars().count() <= width => {
                line.push_str(" · ");
                line.push_str(fact);
            }
            _ => lines.push(fact.clone()),
        }
    }
    // One fact may be wider than a line, and letters wider than a column.
    lines.iter().map(|line| readable::plain(line, width)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;
