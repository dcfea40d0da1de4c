//! After everything is healed: every relocation comes to an end, and nothing of any is left.

use std::error::Error;
use std::time::{Duration, Instant};

use serde::Serialize;
use testkit::connect;
use therev::relocation::{Mover, State};
use therev::{Bucket, Group, Therev};

use crate::mover::{OPTIONS, chain, go_either_way};
use crate::world::{SHARDS, World};

/// How long all that is open may take with nothing broken: the lease of a dead mover, and copies that begin anew.
const ENDS_WITHIN: Duration = Duration::from_secs(90);
/// How long one of them may hold the others up.
const EACH_WITHIN: Duration = Duration::from_secs(20);
/// How often a relay looks meanwhile.
const RELAY_EVERY: Duration = Duration::from_millis(50);

/// How often buckets changed hands or did not.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Switches {
    pub(crate) done: usize,
    pub(crate) reversed: usize,
    pub(crate) aborted: usize,
}

/// Brings everything that is open to an end. What does not get there is told.
pub(crate) async fn end_relocations(node: &Therev) -> Result<(usize, Switches, Vec<String>), Box<dyn Error>> {
    let mover = Mover::new(node.shards().clone(), OPTIONS);
    let (begin, mut stuck, mut last_error) = (Instant::now(), Vec::new(), String::new());
    loop {
        let open = mover.list(true).await?;
        if open.is_empty() {
            break;
        }
        if begin.elapsed() > ENDS_WITHIN {
            stuck.extend(open.iter().map(|one| {
                let (number, state, goal, note) = (one.relocation, one.state, one.goal, &one.note);
                format!("relocation {number} is {state:?} on its way to {goal:?}: {note} ({last_error})")
            }));
            break;
        }
        for one in open {
            let outcome = async {
                if one.is_paused {
                    mover.pause(one.relocation, false).await?;
                }
                if one.state == State::Switched {
                    go_either_way(&mover, one.relocation).await?;
                }
                let left = EACH_WITHIN.min(ENDS_WITHIN.saturating_sub(begin.elapsed()));
                let driven = tokio::time::timeout(left, Box::pin(mover.drive(one.relocation, &|_| {})));
                tokio::select! {
                    driven = driven => driven.unwrap_or(Ok(one.clone())).map(drop),
                    () = relay(node) => Ok(()),
                }
            };
            if let Err(error) = outcome.await {
                last_error = chain(&error);
            }
        }
        tokio::time::sleep(RELAY_EVERY).await;
    }
    let all = mover.list(false).await?;
    let count = |state| all.iter().filter(|one| one.state == state).count();
    let switches =
        Switches { done: count(State::Done), reversed: count(State::Reversed), aborted: count(State::Aborted) };
    Ok((all.len(), switches, stuck))
}

/// Delivers what former owners have to tell, without end.
async fn relay(node: &Therev) {
    let mut ticks = tokio::time::interval(RELAY_EVERY);
    loop {
        ticks.tick().await;
        // What could not be delivered is delivered the next time.
        node.relay_once().await.ok();
    }
}

/// Waits until what a promotion left is made to agree: a relay that was at it may have been killed. Says what is not.
pub(crate) async fn lives(world: &World, node: &Therev) -> Result<Option<String>, Box<dyn Error>> {
    let client = connect(&world.cluster()?.control_url()?).await;
    let unsettled = "SELECT string_agg(to_jsonb(i)::text, ', ') FROM therev.incarnations AS i WHERE NOT i.is_settled";
    let begin = Instant::now();
    loop {
        let left: Option<String> = client.query_one(unsettled, &[]).await?.get(0);
        if left.is_none() || begin.elapsed() > ENDS_WITHIN {
            return Ok(left.map(|left| format!("what a promotion left is not made to agree: {left}")));
        }
        node.relay_once().await.ok();
        tokio::time::sleep(RELAY_EVERY).await;
    }
}

/// What `check` finds wrong.
pub(crate) async fn check(node: &Therev) -> therev::Result<Vec<String>> {
    let report = node.check().await?;
    let wrong = report.checks.iter().filter(|check| check.wrong > 0);
    let mut said: Vec<String> =
        wrong.map(|check| format!("check: {} {}: {:?}", check.wrong, check.name, check.examples)).collect();
    if !report.ok && said.is_empty() {
        said.push("check is not clean, and does not say why".into());
    }
    Ok(said)
}

/// Whatever a relocation had on the servers, and places that nobody owns or two do.
pub(crate) async fn left_overs(world: &World) -> Result<Vec<String>, Box<dyn Error>> {
    const LEFT: &str = "
        SELECT 'part ' || p.relocation || ' ' || p.side || ' ' || p.state AS what FROM therev.relocation_parts AS p
        UNION ALL SELECT 'sentinel ' || s.relocation || ' ' || s.side FROM therev.sentinels AS s
        UNION ALL SELECT 'publication ' || p.pubname FROM pg_publication AS p
        UNION ALL SELECT 'slot ' || s.slot_name FROM pg_replication_slots AS s WHERE s.slot_type = 'logical'
        UNION ALL SELECT 'subscription ' || s.subname FROM pg_subscription AS s
                    JOIN pg_database AS d ON d.oid = s.subdbid WHERE d.datname = current_database()
        UNION ALL SELECT 'origin ' || o.roname FROM pg_replication_origin AS o
        UNION ALL SELECT 'bucket ' || o.bucket || ' of ' || o.colocation_group || ' is ' || o.state
                    FROM therev.ownership AS o WHERE o.state NOT IN ('owned', 'moved')
        UNION ALL SELECT 'user ' || p.user_id || ' of ' || p.colocation_group || ' is ' || p.state
                    FROM therev.pins AS p WHERE p.state NOT IN ('owned', 'moved')
        UNION ALL SELECT 'advisory lock ' || l.objid FROM pg_locks AS l WHERE l.locktype = 'advisory'
        UNION ALL SELECT 'lock of ' || l.pid || ' on ' || l.relation::regclass FROM pg_locks AS l
                    JOIN therev.owned_tables AS t ON l.relation = t.table_name::regclass
                    JOIN pg_stat_activity AS a ON a.pid = l.pid AND a.backend_type <> 'autovacuum worker'
                   WHERE l.mode <> 'AccessShareLock' AND l.pid <> pg_backend_pid()";
    const OWNED: &str = "SELECT o.colocation_group::text, o.bucket FROM therev.ownership AS o WHERE o.state = 'owned'";
    let (mut left, mut owners) = (Vec::new(), std::collections::BTreeMap::<(String, i16), Vec<u16>>::new());
    for shard in 0..SHARDS {
        let client = connect(&world.cluster()?.shard_url(shard)?).await;
        let rows = client.query(LEFT, &[]).await?;
        left.extend(rows.iter().map(|row| format!("shard {shard}: {}", row.get::<_, &str>("what"))));
        for row in client.query(OWNED, &[]).await? {
            owners.entry((row.get(0), row.get(1))).or_default().push(shard);
        }
    }
    let expected = Group::ALL.len() * Bucket::all().count();
    if owners.len() != expected {
        left.push(format!("{} places have an owner, and not {expected}", owners.len()));
    }
    let twice = owners.iter().filter(|(_, shards)| shards.len() > 1);
    left.extend(twice.map(|((group, bucket), shards)| format!("{group} bucket {bucket} is owned by {shards:?}")));
    Ok(left)
}
