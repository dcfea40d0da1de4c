//! Proofs within one shard, each in one statement and so in one snapshot. Only the routes of ids are looked up on all shards.

use super::{BETWEEN_LOOKS, CLAIMS, CONTRIBUTIONS, Check, Databases, EXAMPLES, LOOKS, OUTBOX, TOTALS};
use futures_util::future::try_join_all;
use shards::{Database, Error};
use std::collections::BTreeSet;
use tokio_postgres::Client;
use uuid::Uuid;

/// A proof: its SQL gives, per row looked at, a key and whether it is wrong.
struct Proof {
    name: &'static str,
    sql: &'static str,
    /// Which of these keys (`$1`) are only late, by the word of any shard: an event stays where the bucket was.
    late: Option<&'static str>,
}

/// How many wrong rows a look names.
const NAMED_MAX: u64 = 5_000;

const PROOFS: &[Proof] = &[
    Proof {
        name: "rows on the shard that owns them",
        sql: "
            SELECT r.key,
                   -- What a relocation brings or has not taken away yet is on its way.
                   NOT therev.may_read(f, r.bucket, r.owner)
                   AND NOT EXISTS (SELECT FROM therev.relocation_parts AS p
                                    WHERE f.colocation_group = ANY (p.groups) AND r.bucket = ANY (p.buckets)) AS wrong
              FROM (SELECT 'account' AS g, bucket, user_id AS owner, 'user ' || user_id AS key FROM users
                    UNION ALL SELECT 'account', bucket, user_id, 'session ' || session_id FROM user_sessions
                    UNION ALL SELECT 'account', bucket, user_id, 'account ' || account_id FROM user_ai_accounts
                    UNION ALL SELECT 'account', bucket, user_id, 'task ' || task_id FROM ai_tasks
                    UNION ALL SELECT 'account', bucket, user_id, 'task log ' || log_id FROM ai_task_logs
                    UNION ALL SELECT 'account', bucket, user_id, 'audit ' || audit_id FROM audit_log
                    UNION ALL SELECT 'account', bucket, claim_key, kind || ' ' || value FROM therev.claims
                    UNION ALL SELECT 'account', bucket, id, 'route ' || id FROM therev.id_routes
                    UNION ALL SELECT 'content', bucket, author_id, 'thread ' || thread_id FROM threads
                    UNION ALL SELECT 'content', bucket, author_id, 'post ' || post_id FROM posts
                    UNION ALL SELECT 'content', bucket, author_id, 'contribution ' || author_id || ' to ' || thread_id
                                FROM therev.thread_contributions
                    UNION ALL SELECT 'content', bucket, author_id, 'participant ' || participant_id || ' of ' || thread_id
                                FROM therev.thread_participants
                    UNION ALL SELECT 'content', bucket, author_id, 'totals of ' || thread_id FROM therev.thread_totals) AS r
              JOIN therev.fence AS f ON f.colocation_group = r.g::therev.colocation_group",
        late: None,
    },
    Proof {
        name: "rows in their owner's bucket",
        sql: "
            SELECT r.key, r.bucket <> therev.bucket_of(r.owner) AS wrong
              FROM (SELECT bucket, user_id AS owner, 'user ' || user_id AS key FROM users
                    UNION ALL SELECT bucket, user_id, 'session ' || session_id FROM user_sessions
                    UNION ALL SELECT bucket, user_id, 'account ' || account_id FROM user_ai_accounts
                    UNION ALL SELECT bucket, user_id, 'task ' || task_id FROM ai_tasks
                    UNION ALL SELECT bucket, author_id, 'thread ' || thread_id FROM threads
                    UNION ALL SELECT bucket, author_id, 'post ' || post_id FROM posts
                    UNION ALL SELECT bucket, claim_key, kind || ' ' || value FROM therev.claims) AS r",
        late: None,
    },
    Proof {
        name: "deleted users have nothing left",
        sql: "
            SELECT r.key, u.deleted_at IS NOT NULL AS wrong
              FROM (SELECT bucket, user_id, 'session ' || session_id AS key FROM user_sessions
                    UNION ALL SELECT bucket, user_id, 'account ' || account_id FROM user_ai_accounts
                    UNION ALL SELECT bucket, user_id, 'task ' || task_id FROM ai_tasks
                    UNION ALL SELECT bucket, user_id, 'task log ' || log_id FROM ai_task_logs) AS r
              JOIN users AS u USING (bucket, user_id)
             WHERE EXISTS (SELECT FROM therev.fence AS f
                             WHERE f.colocation_group = 'account' AND therev.may_read(f, u.bucket, u.user_id))",
        late: None,
    },
    Proof {
        name: CONTRIBUTIONS,
        // Joined by the thread's author too: where that differs, both rows stand alone.
        sql: "
            SELECT 'author ' || author_id || ' in thread ' || thread_id AS key,
                   (coalesce(p.posts, 0), coalesce(p.deleted, 0))
                       IS DISTINCT FROM (coalesce(c.posts, 0), coalesce(c.deleted, 0))
                   OR c.last_post_at < p.last_post_at AS wrong
              FROM (SELECT bucket, author_id, thread_id, thread_author_id,
                           count(*) FILTER (WHERE deleted_at IS NULL) AS posts,
                           count(*) FILTER (WHERE deleted_at IS NOT NULL) AS deleted, max(created_at) AS last_post_at
                      FROM posts
                     GROUP BY bucket, author_id, thread_id, thread_author_id) AS p
              FULL JOIN therev.thread_contributions AS c USING (bucket, author_id, thread_id, thread_author_id)
             WHERE EXISTS (SELECT FROM therev.fence AS f
                             WHERE f.colocation_group = 'content' AND therev.may_read(f, bucket, author_id))",
        late: None,
    },
    Proof {
        name: TOTALS,
        sql: "
            SELECT 'thread ' || thread_id || ' of ' || author_id AS key,
                   (coalesce(p.posts, 0), coalesce(p.participants, 0))
                       IS DISTINCT FROM (coalesce(t.posts, 0), coalesce(t.participants, 0))
                   OR p.last_post_at IS DISTINCT FROM t.last_post_at AS wrong
              FROM (SELECT bucket, author_id, thread_id, sum(posts) AS posts,
                           count(*) FILTER (WHERE posts > 0) AS participants, max(last_post_at) AS last_post_at
                      FROM therev.thread_participants
                     GROUP BY bucket, author_id, thread_id) AS p
              FULL JOIN therev.thread_totals AS t USING (bucket, author_id, thread_id)
             WHERE EXISTS (SELECT FROM therev.fence AS f
                             WHERE f.colocation_group = 'content' AND therev.may_read(f, bucket, author_id))",
        // An event asks for them. One that does so for longer than a minute, the proof of the outbox names.
        late: Some(
            "SELECT DISTINCT l.key
               FROM (SELECT 'thread ' || (f.fact ->> 'thread_id') || ' of ' || (f.fact ->> 'author_id') AS key
                       FROM therev.outbox AS o, jsonb_array_elements(therev.facts_of(o)) AS f (fact)
                      WHERE o.kind = 'totals' AND o.delivered_at IS NULL
                        AND o.created_at >= now() - interval '1 minute') AS l
              WHERE l.key = ANY ($1)",
        ),
    },
    Proof {
        name: OUTBOX,
        sql: "
            SELECT o.kind::text || ' event ' || o.outbox_id AS key, o.created_at < now() - interval '1 minute' AS wrong
              FROM therev.outbox AS o
             WHERE o.delivered_at IS NULL",
        late: None,
    },
    Proof {
        name: CLAIMS,
        sql: "
            SELECT c.kind || ' ' || c.value AS key,
                   c.state = 'pending' AND c.created_at < now() - interval '10 minutes' AS wrong
              FROM therev.claims AS c",
        late: None,
    },
    Proof {
        name: "partitions for three months",
        sql: "
            SELECT p.name AS key, to_regclass('public.' || p.name) IS NULL AS wrong
              FROM (SELECT t.parent || to_char(date_trunc('month', now() AT TIME ZONE 'UTC')
                                               + make_interval(months => n.ahead), '_YYYY_MM') AS name
                      FROM unnest(ARRAY['ai_task_logs', 'audit_log']) AS t (parent), generate_series(0, 3) AS n (ahead))
                       AS p",
        late: None,
    },
];

/// Whether ids say where their rows are: one scan of each table, for what they say is in their bits. An id that carries its bucket
/// (version 8 of the standard variant, bits 52 to 63) must name the row's (1: it names another one). A thread or a post whose id some
/// other system made needs a route (2).
const IDS: &str = "
    SELECT count(*) AS checked, count(*) FILTER (WHERE i.verdict = 1) AS wrong,
           (array_agg(i.what || ' ' || i.id) FILTER (WHERE i.verdict = 1))[1:5] AS examples,
           array_agg(i.id) FILTER (WHERE i.verdict = 2) AS ids,
           array_agg(i.bucket) FILTER (WHERE i.verdict = 2) AS buckets,
           array_agg(i.what || ' ' || i.id) FILTER (WHERE i.verdict = 2) AS keys
      FROM (SELECT r.what, r.id, r.bucket,
                   CASE WHEN get_byte(r.bytes, 6) >> 4 = 8 AND get_byte(r.bytes, 8) >> 6 = 2
                        THEN CASE WHEN ((get_byte(r.bytes, 6) & 15) << 8) + get_byte(r.bytes, 7) = r.bucket THEN 0 ELSE 1 END
                        WHEN r.what IN ('thread', 'post') THEN 2 ELSE 0 END AS verdict
              FROM (SELECT bucket, session_id AS id, uuid_send(session_id) AS bytes, 'session' AS what FROM user_sessions
                    UNION ALL SELECT bucket, account_id, uuid_send(account_id), 'account' FROM user_ai_accounts
                    UNION ALL SELECT bucket, task_id, uuid_send(task_id), 'task' FROM ai_tasks
                    UNION ALL SELECT bucket, thread_id, uuid_send(thread_id), 'thread' FROM threads
                    UNION ALL SELECT bucket, post_id, uuid_send(post_id), 'post' FROM posts) AS r
            -- Judged once a row.
            OFFSET 0) AS i";

/// The buckets that ids are routed to: a route lies with the hash of its id, seldom where the row is.
const ROUTES: &str = "
    SELECT r.id, therev.bucket_of(r.owner_id) AS bucket
      FROM unnest($1::uuid[]) AS k (id)
      JOIN therev.id_routes AS r ON r.bucket = therev.bucket_of(k.id) AND r.id = k.id
      JOIN therev.fence AS f ON f.colocation_group = 'account' AND therev.may_read(f, r.bucket, r.id)";

/// How many routes are looked up at once.
const ROUTES_AT_ONCE: usize = 10_000;

pub(super) async fn checks(databases: &Databases) -> Result<Vec<Check>, Error> {
    let mut checks: Vec<Check> = PROOFS.iter().map(|proof| Check::named(proof.name)).collect();
    let of_shards =
        try_join_all(databases.shards.iter().map(|(database, client)| of_shard(databases, *database, client))).await?;
    for found in of_shards {
        for (check, part) in checks.iter_mut().zip(found) {
            check.checked += part.checked;
            check.wrong += part.wrong;
            check.examples.extend(part.examples);
            check.examples.truncate(EXAMPLES);
        }
    }
    checks.push(ids_that_route(databases).await?);
    Ok(checks)
}

/// A route may change its shard while the shards are asked: what is wrong is looked at again.
async fn ids_that_route(databases: &Databases) -> Result<Check, Error> {
    let mut check = look_at_ids(databases).await?;
    for _ in 1..LOOKS {
        if check.wrong == 0 {
            break;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
        check = look_at_ids(databases).await?;
    }
    Ok(check)
}

async fn look_at_ids(databases: &Databases) -> Result<Check, Error> {
    let mut check = Check::named("ids that route");
    let mut need_routes: Vec<(Uuid, i16, String)> = Vec::new();
    let rows = databases.ask_shards(IDS, &[]).await?;
    for ((database, _), row) in databases.shards.iter().zip(&rows) {
        let count = |name: &str| u64::try_from(row.get::<_, i64>(name)).unwrap_or(0);
        check.checked += count("checked");
        check.wrong += count("wrong");
        let wrong: Vec<String> = row.get::<_, Option<_>>("examples").unwrap_or_default();
        check.examples.extend(wrong.iter().map(|key| format!("{database}: {key}")));
        let ids: Vec<Uuid> = row.get::<_, Option<_>>("ids").unwrap_or_default();
        let buckets: Vec<i16> = row.get::<_, Option<_>>("buckets").unwrap_or_default();
        let keys: Vec<String> = row.get::<_, Option<_>>("keys").unwrap_or_default();
        let of_shard = ids.into_iter().zip(buckets).zip(keys);
        need_routes.extend(of_shard.map(|((id, bucket), key)| (id, bucket, format!("{database}: {key}"))));
    }
    check.examples.truncate(EXAMPLES);
    for some in need_routes.chunks(ROUTES_AT_ONCE) {
        let ids: Vec<Uuid> = some.iter().map(|(id, ..)| *id).collect();
        let found = databases.ask_shards(ROUTES, &[&ids]).await?;
        let routes: BTreeSet<(Uuid, i16)> = found.iter().map(|row| (row.get("id"), row.get("bucket"))).collect();
        for (id, bucket, key) in some {
            if !routes.contains(&(*id, *bucket)) {
                check.wrong(key.clone());
            }
        }
    }
    Ok(check)
}

async fn of_shard(databases: &Databases, database: Database, client: &Client) -> Result<Vec<Check>, Error> {
    let mut found = Vec::new();
    for proof in PROOFS {
        let mut seen = look(database, client, proof).await?;
        // What is derived is a moment behind by design, here now and there then: what is wrong is looked at again, and counts
        // where it is so each time.
        for at in 1..LOOKS {
            if seen.wrong == 0 {
                break;
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
            // Asked before the last look, in which is right what is told meanwhile; and after it for what became wrong before that.
            let is_last = at + 1 == LOOKS;
            let late_before = if is_last { late(databases, proof, &seen).await? } else { BTreeSet::new() };
            seen = look(database, client, proof).await?.after(seen).without(&late_before);
            if is_last {
                seen = late(databases, proof, &seen).await.map(|late| seen.without(&late))?;
            }
        }
        let examples = seen.keys.iter().take(EXAMPLES).map(|key| format!("{database}: {key}")).collect();
        found.push(Check { name: proof.name.to_owned(), checked: seen.checked, wrong: seen.wrong, examples });
    }
    Ok(found)
}

/// What was seen of a proof on one shard.
struct Look {
    checked: u64,
    wrong: u64,
    /// The keys of the wrong rows; of more than [`NAMED_MAX`] the first.
    keys: BTreeSet<String>,
}

impl Look {
    /// What is wrong still, of what was wrong in all looks before. A look that finds more than it names rules nothing out.
    fn after(mut self, before: Look) -> Look {
        if before.wrong <= NAMED_MAX {
            if self.wrong <= NAMED_MAX {
                self.keys.retain(|key| before.keys.contains(key));
            } else {
                self.keys = before.keys;
            }
            self.wrong = u64::try_from(self.keys.len()).unwrap_or(u64::MAX);
        }
        self
    }

    /// What is wrong besides these.
    fn without(mut self, late: &BTreeSet<String>) -> Look {
        let named = self.keys.len();
        self.keys.retain(|key| !late.contains(key));
        self.wrong -= u64::try_from(named - self.keys.len()).unwrap_or(0).min(self.wrong);
        self
    }
}

/// Which of the keys that were seen wrong are only late.
async fn late(databases: &Databases, proof: &Proof, seen: &Look) -> Result<BTreeSet<String>, Error> {
    let Some(sql) = proof.late else { return Ok(BTreeSet::new()) };
    let keys: Vec<&str> = seen.keys.iter().map(String::as_str).collect();
    Ok(databases.ask_shards(sql, &[&keys]).await?.iter().map(|row| row.get("key")).collect())
}

async fn look(database: Database, client: &Client, proof: &Proof) -> Result<Look, Error> {
    let sql = format!(
        "SELECT count(*) AS checked, count(*) FILTER (WHERE w.wrong) AS wrong,
                (array_agg(w.key ORDER BY w.key) FILTER (WHERE w.wrong))[1:{NAMED_MAX}] AS keys
           FROM ({}) AS w",
        proof.sql
    );
    let row = client.query_one(&sql, &[]).await.map_err(|source| Error::Sql { database, source })?;
    let count = |name: &str| u64::try_from(row.get::<_, i64>(name)).unwrap_or(0);
    let keys: Vec<String> = row.get::<_, Option<_>>("keys").unwrap_or_default();
    Ok(Look { checked: count("checked"), wrong: count("wrong"), keys: keys.into_iter().collect() })
}

/// The keys that the proof `name` finds wrong, in every look; those that are only late among them.
pub(crate) async fn wrong_keys(databases: &Databases, name: &str) -> Result<BTreeSet<String>, Error> {
    let Some(proof) = PROOFS.iter().find(|proof| proof.name == name) else { return Ok(BTreeSet::new()) };
    let sql = format!("SELECT r.key FROM ({}) AS r WHERE r.wrong", proof.sql);
    let mut wrong: Option<BTreeSet<String>> = None;
    for look in 0..LOOKS {
        if wrong.as_ref().is_some_and(BTreeSet::is_empty) {
            break;
        }
        if look > 0 {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let mut still: BTreeSet<String> =
            databases.ask_shards(&sql, &[]).await?.iter().map(|row| row.get("key")).collect();
        if let Some(before) = wrong.take() {
            still.retain(|key| before.contains(key));
        }
        wrong = Some(still);
    }
    Ok(wrong.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(wrong: &[&str]) -> Look {
        let keys: BTreeSet<String> = wrong.iter().map(|key| (*key).to_owned()).collect();
        Look { checked: 9, wrong: u64::try_from(keys.len()).unwrap(), keys }
    }

    /// One that finds so many that it names only some.
    fn too_many() -> Look {
        Look { wrong: NAMED_MAX + 1, ..look(&["a", "b"]) }
    }

    fn seen(look: &Look) -> (u64, Vec<&str>) {
        (look.wrong, look.keys.iter().map(String::as_str).collect())
    }

    #[test]
    fn only_what_every_look_finds_wrong_counts() {
        assert_eq!(seen(&look(&["b", "c"]).after(look(&["a", "b"]))), (1, vec!["b"]));
        assert_eq!(seen(&look(&["c"]).after(look(&["a"]))), (0, vec![]));
        assert_eq!(seen(&look(&[]).after(look(&["a"]))), (0, vec![]));
    }

    #[test]
    fn a_look_that_finds_too_many_rules_nothing_out() {
        assert_eq!(seen(&too_many().after(look(&["b", "z"]))), (2, vec!["b", "z"]));
        assert_eq!(seen(&look(&["y", "z"]).after(too_many())), (2, vec!["y", "z"]));
        assert_eq!(seen(&too_many().after(too_many())), (NAMED_MAX + 1, vec!["a", "b"]));
    }
}
