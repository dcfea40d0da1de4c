//! Questions, answers, comments and votes of a dump.

use super::ImportError;
use super::dump::{CommentRow, PostKind, PostRow, Unusable};
use super::source::{BATCH_BYTES, Import, Source, Votes, too_late};
use crate::bulk::{BATCH, BulkPost, BulkThread};
use crate::text::{BODY_BYTES_MAX, TITLE_CHARS_MAX};
use crate::{Format, Parent};
use placement::{PostId, ThreadId};
use serde_json::{Map, Value, json};
use std::collections::hash_map::Entry;
use std::time::Duration;

/// How often an import that has nothing left but votes to read says how far it is.
const SAY_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn import_posts(import: &mut Import<'_>) -> Result<(), ImportError> {
    // Answers that stand before their question.
    let mut early = Vec::new();
    while let Some(batch) = import.files.posts.recv().await {
        let (mut threads, mut answers) = (Vec::new(), Vec::new());
        for row in batch? {
            let Some(row) = import.tally.read("posts", "post", row) else { continue };
            match row.kind {
                PostKind::Question => threads.extend(thread(import, row)),
                PostKind::Answer if row.parent.is_some_and(|id| import.posts.contains_key(&id)) => {
                    answers.extend(answer(import, row));
                }
                PostKind::Answer => early.push(row),
                PostKind::Other(number) => {
                    import.tally.skip("post", &format!("a tag wiki or the like (type {number})"));
                }
            }
        }
        // Threads first: whoever reads in between finds no answer without its thread.
        import.writer.threads("threads", threads).await?;
        import.writer.posts("answers", answers).await?;
        import.say("posts");
    }
    import_early(import, early).await
}

/// Answers that stood before their question, a batch at a time as those that did not.
async fn import_early(import: &mut Import<'_>, early: Vec<PostRow>) -> Result<(), ImportError> {
    let mut rows = early.into_iter();
    while !rows.as_slice().is_empty() {
        let (mut answers, mut bytes) = (Vec::new(), 0);
        for row in rows.by_ref().take(BATCH) {
            bytes += row.body.as_ref().map_or(0, String::len);
            answers.extend(answer(import, row));
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        import.writer.posts("answers", answers).await?;
        import.say("posts");
    }
    Ok(())
}

pub(super) async fn import_comments(import: &mut Import<'_>) -> Result<(), ImportError> {
    while let Some(batch) = import.files.comments.recv().await {
        let posts = batch?.into_iter().filter_map(|row| comment(import, row)).collect();
        import.writer.posts("comments", posts).await?;
        import.say("comments");
    }
    Ok(())
}

/// Votes are not kept, their sum is the score; where it is not, the report says so.
pub(super) async fn compare_votes(import: &mut Import<'_>) -> Result<(), ImportError> {
    let mut ticks = tokio::time::interval(SAY_EVERY);
    let votes = loop {
        tokio::select! {
            votes = import.files.votes.join_next() => break votes,
            _ = ticks.tick() => import.say("votes"),
        }
    };
    let Some(votes) = votes else { return Ok(()) };
    let Votes { sums, tally } = votes.unwrap_or_else(|failure| std::panic::resume_unwind(failure.into_panic()))?;
    import.tally.add(tally);
    let mut posts: Vec<(&i64, &Source)> = import.posts.iter().collect();
    posts.sort_by_key(|(id, _)| **id);
    for (id, source) in posts {
        let votes = sums.get(id).copied().unwrap_or(0);
        import.votes.compared += 1;
        if votes != source.score {
            import.votes.differing += 1;
            if import.votes.examples.len() < 5 {
                import.votes.examples.push(format!("post {id}: score {}, votes {votes}", source.score));
            }
        }
    }
    Ok(())
}

fn thread(import: &mut Import<'_>, row: PostRow) -> Option<BulkThread> {
    let source = remember(import, &row, None)?;
    let title = row.title.clone().unwrap_or_default();
    let body = row.body.clone().unwrap_or_default();
    let trouble = if title.trim().is_empty() {
        Some("it has no title")
    } else if title.chars().count() > TITLE_CHARS_MAX {
        Some("its title is too long")
    } else {
        too_long(&body).or_else(|| too_late(row.created_at))
    };
    if let Some(reason) = trouble {
        import.tally.skip("question", reason);
        import.posts.remove(&row.id);
        return None;
    }
    Some(BulkThread {
        thread_id: ThreadId(source.id),
        author_id: source.author_id,
        title,
        body,
        format: Format::Html,
        score: row.score,
        created_at: row.created_at,
        metadata: metadata(import, row.rest, row.id, row.owner_name),
    })
}

fn answer(import: &mut Import<'_>, row: PostRow) -> Option<BulkPost> {
    let question = row.parent.and_then(|id| import.posts.get(&id).copied().map(|source| (id, source)));
    let Some((question_id, question)) = question.filter(|(_, source)| source.question.is_none()) else {
        import.tally.skip("answer", "its question is not in the dump, or was left out");
        return None;
    };
    let body = row.body.clone().unwrap_or_default();
    if let Some(reason) = empty(&body).or_else(|| too_long(&body)).or_else(|| too_late(row.created_at)) {
        import.tally.skip("answer", reason);
        return None;
    }
    let source = remember(import, &row, Some(question_id))?;
    Some(BulkPost {
        post_id: PostId(source.id),
        author_id: source.author_id,
        thread_id: ThreadId(question.id),
        thread_author_id: question.author_id,
        parent: None,
        body,
        format: Format::Html,
        score: row.score,
        created_at: row.created_at,
        metadata: metadata(import, row.rest, row.id, row.owner_name),
    })
}

fn comment(import: &mut Import<'_>, row: Result<CommentRow, Unusable>) -> Option<BulkPost> {
    let row = import.tally.read("comments", "comment", row)?;
    if !import.comments.insert(row.id) {
        import.tally.skip("comment", "the same id again");
        return None;
    }
    let Some(under) = import.posts.get(&row.post).copied() else {
        import.tally.skip("comment", "its post is not in the dump, or was left out");
        return None;
    };
    let question_id = under.question.unwrap_or(row.post);
    let question = *import.posts.get(&question_id)?;
    let body = row.text.unwrap_or_default();
    if let Some(reason) = empty(&body).or_else(|| too_long(&body)).or_else(|| too_late(row.created_at)) {
        import.tally.skip("comment", reason);
        return None;
    }
    let author_id = import.author(row.user);
    // A comment on a question answers the thread itself; one on an answer answers that post.
    let parent = under.question.map(|_| Parent { post_id: PostId(under.id), author_id: under.author_id });
    Some(BulkPost {
        post_id: PostId(import.content_id("comment", row.id, author_id, row.created_at)),
        author_id,
        thread_id: ThreadId(question.id),
        thread_author_id: question.author_id,
        parent,
        body,
        format: Format::Plain,
        score: row.score,
        created_at: row.created_at,
        metadata: metadata(import, row.rest, row.id, row.user_name),
    })
}

/// Keeps what answers and comments must know of a post.
fn remember(import: &mut Import<'_>, row: &PostRow, question: Option<i64>) -> Option<Source> {
    let author_id = import.author(row.owner);
    let id = import.content_id("post", row.id, author_id, row.created_at);
    let Entry::Vacant(free) = import.posts.entry(row.id) else {
        import.tally.skip("post", "the same id again");
        return None;
    };
    Some(*free.insert(Source { id, author_id, question, score: row.score }))
}

fn metadata(import: &Import<'_>, mut rest: Map<String, Value>, id: i64, author: Option<String>) -> Value {
    rest.insert("site".into(), json!(import.site));
    rest.insert("source_id".into(), json!(id));
    if let Some(name) = author {
        rest.insert("author_name".into(), json!(name));
    }
    Value::Object(rest)
}

fn empty(body: &str) -> Option<&'static str> {
    body.trim().is_empty().then_some("it has no text")
}

fn too_long(body: &str) -> Option<&'static str> {
    (body.len() > BODY_BYTES_MAX).then_some("it is longer than 1 MiB")
}
