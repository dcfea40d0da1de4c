//! The end: after the switch what is left on the side that gave the buckets away goes, before it what came to the target.

use crate::copy::{delete_rows, take_round};
use crate::error::{Error, Result};
use crate::objects;
use crate::record::{Goal, Records, Relocation, State};
use crate::side::{Pair, Part, PartState, Side, Which};
use crate::switch::{HAVE, STANDBY_LOOK, hands};
use crate::throttle::Progress;
use futures_util::future::{join_all, try_join_all};
use placement::{ShardNo, UserId};
use shards::{Admin, Database};
use std::collections::BTreeSet;
use std::time::Duration;
use uuid::Uuid;

/// How often the outbox is looked at while it is waited for.
const OUTBOX_LOOK: Duration = Duration::from_millis(100);

/// How long shards have to learn where a user is who was placed apart, where nobody depends on it yet.
const HOME_WITHIN: Duration = Duration::from_secs(1);

const OWNED: &str = "
    SELECT array_agg(o.colocation_group::text ORDER BY o.colocation_group, o.bucket) AS groups,
           array_agg(o.bucket ORDER BY o.colocation_group, o.bucket) AS buckets,
           array_agg(coalesce(p.epoch, o.epoch) ORDER BY o.colocation_group, o.bucket) AS epochs
      FROM therev.ownership AS o
      LEFT JOIN therev.pins AS p ON p.colocation_group = o.colocation_group AND p.user_id = $3
     WHERE o.colocation_group::text = ANY ($1) AND o.bucket = ANY ($2) AND coalesce(p.state, o.state) = 'owned'";

/// Where buckets (or the one user) are now, by group and bucket, since which epochs.
struct Owned {
    groups: Vec<String>,
    buckets: Vec<i16>,
    epochs: Vec<i64>,
}

async fn owned(relocation: &Relocation, owner: &Side) -> Result<Owned> {
    let pin = relocation.pin.map(|user| user.0);
    let row = owner.one(OWNED, &[&relocation.group_names(), &relocation.bucket_numbers(), &pin]).await?;
    Ok(Owned {
        groups: row.get::<_, Option<_>>("groups").unwrap_or_default(),
        buckets: row.get::<_, Option<_>>("buckets").unwrap_or_default(),
        epochs: row.get::<_, Option<_>>("epochs").unwrap_or_default(),
    })
}

/// Tells the control database what the shards have decided.
pub(crate) async fn record_placement(relocation: &Relocation, pair: &Pair, admin: &Admin) -> Result<()> {
    let (_, owner) = hands(relocation, pair);
    record(relocation, &owned(relocation, owner).await?, owner.shard, admin).await
}

/// Tells the control database where a user has stayed: with the bucket again, where that has come to the same shard.
pub(crate) async fn record_undone(relocation: &Relocation, admin: &Admin) -> Result<()> {
    if relocation.pin.is_none() {
        return Ok(());
    }
    let source = Side::connect(admin, Which::Source, relocation.source).await?;
    record_end(relocation, &source, admin).await
}

/// What the control database is told of a user in the end: of one who is with the bucket again, nothing, whatever a worker that slept
/// has written there meanwhile.
async fn record_end(relocation: &Relocation, owner: &Side, admin: &Admin) -> Result<()> {
    let Some(user) = relocation.pin else { return Ok(()) };
    // Of a group in which the user has gone elsewhere meanwhile, by another relocation, that one tells.
    let owned = owned(relocation, owner).await?;
    record(relocation, &owned, owner.shard, admin).await?;
    let at_home = "SELECT coalesce(array_agg(g.name), '{}') FROM unnest($2::text[]) AS g (name)
                    WHERE NOT EXISTS (SELECT FROM therev.pins AS p
                                       WHERE p.user_id = $1 AND p.colocation_group::text = g.name)";
    let at_home: Vec<String> = owner.one(at_home, &[&user.0, &owned.groups]).await?.get(0);
    let forget = format!(
        "SELECT therev.forget_pins(array_agg(p.colocation_group), array_agg(p.user_id), array_agg(p.shard),
                                   array_agg(p.epoch))
           FROM therev.pins AS p
          WHERE p.user_id = $1 AND p.colocation_group = ANY ($2) AND {IS_OPEN}"
    );
    let control = admin.connect(Database::Control).await?;
    let forgotten = control.query(&forget, &[&user.0, &at_home, &relocation.relocation]).await;
    forgotten.map(drop).map_err(|source| Error::Sql { database: Database::Control, source })
}

/// Whether the relocation `$3` is under way: a worker that slept past its end tells nothing of it.
const IS_OPEN: &str = "EXISTS (SELECT FROM therev.relocations AS r WHERE r.relocation = $3 AND r.ended_at IS NULL)";

async fn record(relocation: &Relocation, owned: &Owned, owner: ShardNo, admin: &Admin) -> Result<()> {
    let control = admin.connect(Database::Control).await?;
    let Owned { groups, buckets, epochs } = owned;
    let recorded = match relocation.pin {
        None => {
            let record = "SELECT therev.record_placement($1, $2, $3, $4)";
            control.query(record, &[groups, buckets, &owner.0, epochs]).await
        }
        Some(user) => {
            let record = format!("SELECT therev.record_pin($1, $2, $4, $5, $6) WHERE {IS_OPEN}");
            let (number, bucket) = (&relocation.relocation, &user.bucket().sql());
            control.query(&record, &[groups, &user.0, number, bucket, &owner.0, epochs]).await
        }
    };
    recorded.map_err(|source| Error::Sql { database: Database::Control, source })?;
    Ok(())
}

/// Ends a relocation whose buckets have changed hands: streams, the former owner's rows, both parts.
pub(crate) async fn run(relocation: &Relocation, pair: &Pair, admin: &Admin, progress: &Progress) -> Result<()> {
    let (former, owner) = hands(relocation, pair);
    may_end(relocation, former, owner).await?;
    former.end_keepers(relocation.relocation).await?;
    owner.end_keepers(relocation.relocation).await?;
    // First, so that no delete travels.
    objects::drop_all(relocation, pair).await?;
    fail::fail_point!("relocation.streams_dropped");
    wait_for_outbox(relocation, former, progress).await?;
    let round = round_of(relocation, former, 0).await?;
    // The target may be left as somebody who slept made it, who meant to bring them there again.
    let given = if former.shard == relocation.target { &["moved", "incoming", "ready"][..] } else { &["moved"] };
    delete_rows(relocation, former, given, round).await?;
    fail::fail_point!("relocation.rows_deleted");
    match relocation.pin {
        None => teach_others(relocation, owner, admin).await,
        Some(user) => teach_home(relocation, user, owner, admin, progress).await?,
    }
    former.query("SELECT therev.end_part($1, $2)", &[&relocation.relocation, &given]).await?;
    if former.part(relocation.relocation).await?.is_some() {
        // Somebody who slept has begun the way back meanwhile: that is called off first.
        return Err(Error::Taken(relocation.relocation));
    }
    fail::fail_point!("relocation.part_ended");
    owner.query("SELECT therev.end_part($1, '{owned}')", &[&relocation.relocation]).await?;
    record_end(relocation, owner, admin).await
}

/// The former owner's rows may be the only ones: they stay where a promotion has lost that the other side took the buckets, whatever it
/// has heard of since. And a way back that somebody began who slept while it was called off is called off again.
async fn may_end(relocation: &Relocation, former: &Side, owner: &Side) -> Result<()> {
    // A promoted server is waited for until it has begun its life.
    let life = owner.life().await?;
    if former.part(relocation.relocation).await?.is_none() {
        // Nothing is deleted there any more.
        return Ok(());
    }
    call_off_return(relocation, former, owner).await?;
    let noted = if owner.shard == relocation.target { relocation.target_life } else { relocation.source_life };
    match owner.part(relocation.relocation).await?.map(|part| part.state) {
        Some(PartState::Owned) => Ok(()),
        // Somebody who slept is at a way back, which ends soon.
        Some(_) => Err(Error::Taken(relocation.relocation)),
        // Ended, and the end on the other side taken back by a promotion of that.
        None if noted == Some(life) => Ok(()),
        None => Err(lost_at(relocation, former, owner)),
    }
}

/// The owner's server does not know that it took the buckets.
pub(crate) fn lost_at(relocation: &Relocation, former: &Side, owner: &Side) -> Error {
    let (number, owner, former) = (relocation.relocation, owner.shard, former.shard);
    Error::refused(
        format!("a promotion of shard {owner} has lost that relocation {number} brought rows there"),
        format!("nothing is deleted on shard {former}, which has the rows; restore what shard {owner} lost"),
    )
}

/// Nobody is at a way back any more once it is to end: what is left of one is called off, by the rule of the switch itself: the other
/// side was looked at last.
async fn call_off_return(relocation: &Relocation, former: &Side, owner: &Side) -> Result<()> {
    let gives = former.part(relocation.relocation).await?;
    let Some(gives) = gives.filter(|part| matches!(part.state, PartState::Incoming | PartState::Ready)) else {
        return Ok(());
    };
    let tried = match owner.part(relocation.relocation).await? {
        Some(takes) if takes.state != PartState::Owned => return Err(Error::Taken(relocation.relocation)),
        Some(takes) if !takes.is_same_life => None,
        Some(takes) if takes.attempt < gives.attempt => return Err(Error::Taken(relocation.relocation)),
        // Without a part there nobody decides anything.
        _ => Some(gives.attempt),
    };
    former.query("SELECT therev.call_off_return($1, $2)", &[&relocation.relocation, &tried]).await.map(drop)
}

/// The round of a side's part, after so many more; 0 where it has no part.
async fn round_of(relocation: &Relocation, side: &Side, more: i32) -> Result<i32> {
    let sql =
        "UPDATE therev.relocation_parts SET copy_round = copy_round + $2 WHERE relocation = $1 RETURNING copy_round";
    let rows = side.query(sql, &[&relocation.relocation, &more]).await?;
    Ok(rows.first().map_or(0, |row| row.get("copy_round")))
}

const LAST_EVENT: &str = "SELECT coalesce(max(outbox_id), 0) FROM therev.outbox";

/// What the former owner has to tell others it tells while it has the rows: a bulk write's event reads them. Such an event
/// names several owners, so that each of those counts.
async fn wait_for_outbox(relocation: &Relocation, former: &Side, progress: &Progress) -> Result<()> {
    let last: i64 = former.one(LAST_EVENT, &[]).await?.get(0);
    loop {
        let waiting = undelivered(relocation, former, last).await?;
        if waiting == 0 {
            progress.say("");
            return Ok(());
        }
        progress.say(format!("shard {} has {waiting} events to deliver first; a relay does that", former.shard));
        tokio::time::sleep(OUTBOX_LOOK).await;
    }
}

/// How many events up to this one a side has yet to deliver that may be about its rows.
async fn undelivered(relocation: &Relocation, side: &Side, last: i64) -> Result<i64> {
    let sql = "SELECT count(*) FROM therev.outbox AS o
                WHERE o.delivered_at IS NULL AND o.outbox_id <= $1 AND o.colocation_group::text = ANY ($2)
                  AND (o.bucket = -1 OR o.bucket = ANY ($3))";
    Ok(side.one(sql, &[&last, &relocation.group_names(), &relocation.bucket_numbers()]).await?.get(0))
}

fn shards_of(admin: &Admin) -> impl Iterator<Item = ShardNo> {
    admin.databases().into_iter().filter_map(|(database, _)| match database {
        Database::Shard(shard) => Some(shard),
        _ => None,
    })
}

/// Other shards learn the short way; one that is down goes on pointing the long one.
async fn teach_others(relocation: &Relocation, owner: &Side, admin: &Admin) {
    let Ok(owned) = owned(relocation, owner).await else { return };
    let told: Vec<_> = shards_of(admin)
        .filter(|shard| *shard != owner.shard)
        .map(|shard| teach(shard, &owned, owner.shard, admin))
        .collect();
    for outcome in join_all(told).await {
        if let Err(error) = outcome {
            tracing::debug!(%error, "a shard did not learn who owns what moved");
        }
    }
}

/// The shard that owns the bucket of a user who went from one place apart to another hears of it as soon as it is so, if it can:
/// till then those who come by it go a longer way.
pub(crate) async fn tell_home(relocation: &Relocation, pair: &Pair, admin: &Admin) {
    let (Some(user), (_, owner)) = (relocation.pin, hands(relocation, pair)) else { return };
    match tokio::time::timeout(HOME_WITHIN, taught_homes(relocation, user, owner, admin)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the home of a user who is placed apart cannot hear where that is"),
        Err(_) => tracing::debug!("the home of a user who is placed apart did not hear in time where that is"),
    }
}

/// The same before the shard forgets to which home pointed; then home must know. Its standbys, too: after a promotion nobody else
/// could say where the user is.
async fn teach_home(
    relocation: &Relocation,
    user: UserId,
    owner: &Side,
    admin: &Admin,
    progress: &Progress,
) -> Result<()> {
    for side in taught_homes(relocation, user, owner, admin).await? {
        let lsn: String = side.one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?.get(0);
        while !side.one(HAVE, &[&lsn]).await?.get::<_, bool>(0) {
            progress.say(format!("a standby of shard {} is behind; where the user is must be on it, too", side.shard));
            tokio::time::sleep(STANDBY_LOOK).await;
        }
        progress.say("");
    }
    Ok(())
}

/// Has the homes of a user learn where it is, and answers with them; other shards learn it as far as they can be asked, for where the
/// control database was put back one of them may be the home.
async fn taught_homes(relocation: &Relocation, user: UserId, owner: &Side, admin: &Admin) -> Result<Vec<Side>> {
    let owned = owned(relocation, owner).await?;
    let homes =
        "SELECT DISTINCT p.shard FROM therev.placement AS p WHERE p.bucket = $1 AND p.colocation_group = ANY ($2)";
    let control = admin.connect(Database::Control).await?;
    let homes = control.query(homes, &[&user.bucket().sql(), &owned.groups]).await;
    let homes = homes.map_err(|source| Error::Sql { database: Database::Control, source })?;
    let homes: BTreeSet<ShardNo> = homes.iter().map(|home| ShardNo(home.get(0))).collect();
    let learns = async |shard| {
        let side = Side::connect(admin, Which::Source, shard).await?;
        let learn = "SELECT therev.learn_pin($1, $2, $3, $4)";
        side.query(learn, &[&owned.groups, &user.0, &owner.shard.0, &owned.epochs]).await?;
        Ok::<_, Error>(side)
    };
    let others = shards_of(admin).filter(|shard| !homes.contains(shard));
    let others = others.map(|shard| tokio::time::timeout(HOME_WITHIN, learns(shard)));
    let (taught, _) = tokio::join!(try_join_all(homes.iter().map(|home| learns(*home))), join_all(others));
    taught
}

async fn teach(shard: ShardNo, owned: &Owned, owner: ShardNo, admin: &Admin) -> Result<()> {
    let side = Side::connect(admin, Which::Source, shard).await?;
    let owners = vec![owner.0; owned.buckets.len()];
    side.query("SELECT therev.learn_owners($1, $2, $3, $4)", &[&owned.groups, &owned.buckets, &owners, &owned.epochs])
        .await
        .map(drop)
}

/// How far a relocation is by the shards' word, where a control database that was put back to an older state says otherwise.
pub(crate) async fn by_the_parts(relocation: &Relocation, pair: &Pair, admin: &Admin) -> Result<Option<State>> {
    let (giver, taker) = hands(relocation, pair);
    let gives = giver.part(relocation.relocation).await?.map(|part| part.state);
    let takes = taker.part(relocation.relocation).await?.map(|part| part.state);
    if gives.is_none() && takes.is_none() {
        return ended(relocation, pair, admin).await;
    }
    Ok(match relocation.state {
        // It has changed hands, and the former owner's end of it has come already.
        State::Copying | State::CatchingUp | State::Verified | State::Switching | State::Switched
            if gives.is_none() && takes == Some(PartState::Owned) =>
        {
            Some(State::Finishing)
        }
        State::Copying | State::CatchingUp | State::Verified
            if matches!(gives, Some(PartState::Moved | PartState::Incoming | PartState::Ready)) =>
        {
            Some(State::Switching)
        }
        State::Switched | State::Finishing if takes.is_some_and(|state| state != PartState::Owned) => {
            (relocation.goal != Goal::Reversed || relocation.state == State::Finishing).then_some(State::Switching)
        }
        _ => None,
    })
}

/// Whether the buckets have gone there and come back, or it is decided that they do: whatever is wanted by now, there is only the end of
/// that left to do.
pub(crate) async fn has_gone_back(relocation: &Relocation, pair: &Pair) -> Result<bool> {
    let gave = pair.target.part(relocation.relocation).await?.is_some_and(|part| part.state == PartState::Moved);
    let takes = |part: Part| matches!(part.state, PartState::Ready | PartState::Owned);
    Ok(gave && pair.source.part(relocation.relocation).await?.is_some_and(takes))
}

/// How one ended that has no part on either side any more.
async fn ended(relocation: &Relocation, pair: &Pair, admin: &Admin) -> Result<Option<State>> {
    let all = relocation.groups.len() * relocation.buckets.len();
    for (owner, state) in [(&pair.target, State::Done), (&pair.source, State::Aborted)] {
        let owned = owned(relocation, owner).await?;
        if owned.buckets.len() == all {
            objects::drop_all(relocation, pair).await?;
            record(relocation, &owned, owner.shard, admin).await?;
            return Ok(Some(match (state, relocation.goal) {
                // Undone, and nobody could say so any more: what is wanted begins anew.
                (State::Aborted, Goal::Done | Goal::Switched) => State::Planned,
                (State::Aborted, Goal::Reversed) => State::Reversed,
                (state, _) => state,
            }));
        }
    }
    Ok(None)
}

/// Undoes a relocation whose switch was not decided. `false`: it was; there is only the way back by a reversal.
///
/// The source's part goes first: without it nobody can switch any more. What was copied goes in a round of its own: whoever has slept
/// while the relocation began anew takes nothing of what was copied since. Without a `worker` the relocation is over.
pub(crate) async fn undo(relocation: &Relocation, admin: &Admin, worker: Option<Uuid>) -> Result<bool> {
    let source = Side::connect(admin, Which::Source, relocation.source).await?;
    source.end_keepers(relocation.relocation).await?;
    while let Some(part) = source.part(relocation.relocation).await? {
        match part.state {
            PartState::Owned => {}
            // Another worker's try, which may also have begun since the last look.
            PartState::Draining => {
                source.query("SELECT therev.back_out($1, $2)", &[&relocation.relocation, &part.attempt]).await?;
            }
            PartState::Incoming | PartState::Ready | PartState::Moved => return Ok(false),
        }
        let ended = source.one("SELECT therev.end_part($1, '{owned}')", &[&relocation.relocation]).await?;
        if ended.get(0) {
            break;
        }
    }
    fail::fail_point!("relocation.undone_at_source");
    match Side::connect(admin, Which::Target, relocation.target).await {
        Ok(target) => {
            let has = target.part(relocation.relocation).await?.map(|part| part.state);
            if worker.is_some() && has == Some(PartState::Owned) {
                // The source's end of it has come after the switch, by somebody of whom the control database does not know.
                return Ok(false);
            }
            // First: whoever has slept does not take the streams of another copy either.
            let round = begin_undoing(relocation, &target, admin, worker).await?;
            objects::drop_between(&source, &target, &relocation.tag).await?;
            fail::fail_point!("relocation.undone_streams");
            if let Some(round) = round {
                undo_copy(relocation, &target, round).await?;
            }
            Ok(true)
        }
        Err(error) => {
            // The source at least is rid of it: a slot that nobody reads holds its log.
            objects::drop_at(&source, &relocation.tag).await?;
            Err(error)
        }
    }
}

/// The round in which what was copied is removed; `None`: the target is not about to take anything.
async fn begin_undoing(
    relocation: &Relocation,
    target: &Side,
    admin: &Admin,
    worker: Option<Uuid>,
) -> Result<Option<i32>> {
    let part = target.part(relocation.relocation).await?;
    let Some(part) = part.filter(|part| matches!(part.state, PartState::Incoming | PartState::Ready)) else {
        return Ok(None);
    };
    let control = admin.connect(Database::Control).await?;
    let round = Records(&control).next_round(relocation.relocation, worker, part.round).await?;
    target.end_keepers(relocation.relocation).await?;
    if take_round(relocation, target, round).await? {
        Ok(Some(round))
    } else {
        Err(Error::Taken(relocation.relocation))
    }
}

/// Removes what was copied, and the target's part with it.
async fn undo_copy(relocation: &Relocation, target: &Side, round: i32) -> Result<()> {
    delete_rows(&copied(relocation, target).await?, target, &["incoming"], round).await?;
    fail::fail_point!("relocation.undone_rows");
    let end = "SELECT therev.end_part(mine.relocation, '{incoming}')
                 FROM (SELECT p.relocation FROM therev.relocation_parts AS p
                        WHERE p.relocation = $1 AND p.copy_round = $2 FOR UPDATE) AS mine";
    target.query(end, &[&relocation.relocation, &round]).await.map(drop)
}

/// The relocation as the part at its target has it. Where a worker that slept began that part after the end, users of its buckets may
/// have been placed apart since, here among others, and nobody noted whom. While the part is here, no more are.
async fn copied(relocation: &Relocation, target: &Side) -> Result<Relocation> {
    let apart = target.apart(&relocation.group_names(), &relocation.bucket_numbers()).await?;
    Ok(Relocation { apart: [relocation.apart.clone(), apart].concat(), ..relocation.clone() })
}

/// Removes what a worker that slept past the end of a relocation has made after it: nothing where it goes on.
pub(crate) async fn clear(relocation: &Relocation, admin: &Admin) -> Result<()> {
    match relocation.state {
        // The source owns the buckets, so that a part could begin there once more.
        State::Aborted | State::Reversed => {
            undo(relocation, admin, None).await?;
            end_again(relocation, &Pair::connect(admin, relocation).await?).await
        }
        State::Done => {
            let pair = Pair::connect(admin, relocation).await?;
            clear_done(relocation, &pair).await?;
            end_again(relocation, &pair).await
        }
        // A copier may have begun its stream anew after the switch had removed it.
        State::Switched => {
            let pair = Pair::connect(admin, relocation).await?;
            objects::drop_stream(relocation, objects::Stream::Forward, &pair).await
        }
        _ => Ok(()),
    }
}

/// The same where the target took the buckets. Another relocation may have brought them back since, so that a part could begin at the
/// source once more, and after it one at the target; with these they would be under way for ever. Rows are left alone: nobody
/// copies for such a part, and those of users who were placed apart since may lie there.
async fn clear_done(relocation: &Relocation, pair: &Pair) -> Result<()> {
    // As in `undo`, the source's part goes first.
    pair.source.query("SELECT therev.end_part($1, '{owned}')", &[&relocation.relocation]).await?;
    objects::drop_all(relocation, pair).await?;
    pair.target.query("SELECT therev.end_part($1, '{incoming}')", &[&relocation.relocation]).await?;
    Ok(())
}

/// Ends once more what was ended and a promotion has taken back: a standby that was behind lacks the last of it, the former owner's
/// rows may be there again, and no other relocation of these buckets can begin while a part is left.
async fn end_again(relocation: &Relocation, pair: &Pair) -> Result<()> {
    let (former, owner) = hands(relocation, pair);
    call_off_return(relocation, former, owner).await?;
    let part = former.part(relocation.relocation).await?;
    if part.is_some_and(|part| part.state == PartState::Moved) {
        let last = former.one(LAST_EVENT, &[]).await?.get(0);
        if undelivered(relocation, former, last).await? > 0 || !owned(relocation, former).await?.buckets.is_empty() {
            // Whoever looks for what was lost comes by again.
            return Ok(());
        }
        let round = round_of(relocation, former, 1).await?;
        delete_rows(&copied(relocation, former).await?, former, &["moved"], round).await?;
        former.query("SELECT therev.end_part($1, '{moved}')", &[&relocation.relocation]).await?;
    }
    owner.query("SELECT therev.end_part($1, '{owned}')", &[&relocation.relocation]).await?;
    Ok(())
}
