//! Movers: processes that move users from shard to shard, with their buckets or alone, for as long as they live, and empty shards
//! and fill them again, as operators would: some relocations go through, some are held at the switch and then reversed or
//! finished, some aborted or paused in the middle. Several movers take up what others left, and are killed and put to sleep
//! themselves.

use std::error::Error;
use std::time::Duration;

use futures_util::future::join;
use rand::RngExt;
use therev::planner::By;
use therev::relocation::{self, Aim, Goal, Mover, Options, Relocation, Request, State};
use therev::{Bucket, Group, Therev, UserId};

use crate::journal::{Event, Journal};
use crate::writer::{Spec, connect, end_of_input};

/// Servers, standbys and all others share one machine, and the switch is not to wait until it is calm.
pub(crate) const OPTIONS: Options = Options { budget: Duration::from_millis(200), lease: Duration::from_secs(5) };
/// How many relocations may be open before the next one is begun.
const OPEN_MAX: usize = 3;
/// How long a connection may take: a mover is in no hurry.
const PATIENCE_MS: u64 = 5_000;
/// How many buckets go beside a writer's.
const MORE_BUCKETS: u16 = 12;
/// The longest time before somebody interferes, or rests at the switch.
const MEDDLES_MS: u64 = 1_500;
/// Longer than a relocation of so little takes, whatever is broken meanwhile. A copy of a whole shard begins anew with each fault that
/// meets it, so that it may take until the next quiet spell.
const HANGS: Duration = Duration::from_secs(600);
/// How often a user moves alone and not with the bucket.
const PINS: f64 = 0.4;
/// How often one goes as a plan for the whole cluster says: a shard is to be empty, or all are to have their share again.
const PLANNED: f64 = 0.2;
/// How often a shard is to be empty, where none is to be yet and each has its share.
const EMPTIED: f64 = 0.5;
/// Between two relocations.
const REST: Duration = Duration::from_millis(50);

/// Moves until standard input ends, and stops there in the middle of whatever it does.
pub(crate) async fn live(spec: Spec) -> Result<(), Box<dyn Error>> {
    let mut end = end_of_input();
    let Some(node) = connect(&spec, &end, PATIENCE_MS).await else { return Ok(()) };
    let mut journal = Journal::append_to(&spec.journal)?;
    let mover = Mover::new(node.shards().clone(), OPTIONS);
    let moves = async {
        loop {
            let user = spec.histories[rand::rng().random_range(0..spec.histories.len())].user;
            let moved = Box::pin(one(&node, &mover, user));
            let event = match tokio::time::timeout(HANGS, moved).await {
                Ok(Ok(Some(ended))) => {
                    let Relocation { relocation, source, target, state, .. } = &ended;
                    let state = state.name();
                    eprintln!("therev-nemesis: relocation {relocation} from shard {source} to {target} is {state}");
                    Event::Brought { state: ended.state.name().to_owned() }
                }
                Ok(Ok(None)) => {
                    tokio::time::sleep(REST).await;
                    continue;
                }
                Ok(Err(error)) => said(&error),
                Err(_) => Event::Hung { what: "a mover with a relocation".into() },
            };
            journal.write(&event)?;
            tokio::time::sleep(REST).await;
        }
    };
    tokio::select! {
        outcome = moves => outcome,
        _ = end.wait_for(|end| *end) => Ok(()),
    }
}

/// One relocation, an open one or a new one, until it rests. `None`: there is nothing to do.
async fn one(node: &Therev, mover: &Mover, user: UserId) -> relocation::Result<Option<Relocation>> {
    let open = mover.list(true).await?;
    let left: Vec<&Relocation> = open.iter().filter(|one| !one.has_worker).collect();
    if !left.is_empty() && (open.len() >= OPEN_MAX || rand::rng().random_bool(0.7)) {
        let number = left[rand::rng().random_range(0..left.len())].relocation;
        return Box::pin(carry_on(mover, number)).await.map(Some);
    }
    if open.len() >= OPEN_MAX {
        return Ok(None);
    }
    let goal = if rand::rng().random_bool(0.5) { Goal::Done } else { Goal::Switched };
    let is_planned = rand::rng().random_bool(PLANNED);
    let request = if is_planned { planned(node, mover).await? } else { request(node, mover, user).await? };
    let Some(request) = request else { return Ok(None) };
    let begun = mover.begin(&mover.plan(&request).await?, goal, "nemesis").await?;
    Box::pin(carry_on(mover, begun.relocation)).await.map(Some)
}

/// The next step of a plan for the whole cluster. Operators empty a shard to take it out, and think better of it: it has no weight
/// until it is empty, and then its share again.
async fn planned(node: &Therev, mover: &Mover) -> relocation::Result<Option<Request>> {
    let store = node.shards();
    store.refresh().await?;
    let to_be_empty = store.catalog().shards.iter().find(|entry| entry.weight == 0.0).map(|entry| entry.shard);
    let aim = to_be_empty.map_or(Aim::Balance { by: By::Size, moves_max: None }, Aim::Empty);
    let next = mover.plan_rebalance(aim).await?.requests().into_iter().next();
    match (&next, to_be_empty) {
        (None, Some(shard)) => therev::set_weight(store, shard, 1.0).await?,
        (None, None) if rand::rng().random_bool(EMPTIED) => {
            let shards = store.numbers();
            therev::set_weight(store, shards[rand::rng().random_range(0..shards.len())], 0.0).await?;
        }
        _ => {}
    }
    Ok(next)
}

/// A user's bucket with some others; or the user alone, to be placed apart or to go back.
async fn request(node: &Therev, mover: &Mover, user: UserId) -> relocation::Result<Option<Request>> {
    let (shards, map) = (node.shards().numbers(), node.shards().map());
    let target = shards[rand::rng().random_range(0..shards.len())];
    if rand::rng().random_bool(PINS) {
        let away = rand::rng().random_bool(0.5);
        let mut requests =
            if away { mover.pin_requests(user, target).await } else { mover.unpin_requests(user).await }?;
        return Ok(requests.pop());
    }
    let bucket = user.bucket();
    let source = map.place(Group::Content, bucket).shard;
    if source == target {
        return Ok(None);
    }
    let mut buckets: Vec<Bucket> = map
        .places(Group::Content)
        .filter(|(other, place)| place.shard == source && other.number() % 97 == bucket.number() % 97)
        .map(|(other, _)| other)
        .take(usize::from(rand::rng().random_range(0..=MORE_BUCKETS)))
        .chain([bucket])
        .collect();
    buckets.sort_unstable();
    buckets.dedup();
    Ok(Some(Request { groups: Group::ALL.to_vec(), buckets, pin: None, source, target }))
}

/// Drives a relocation to its end, while somebody may change what is wanted of it.
async fn carry_on(mover: &Mover, number: i64) -> relocation::Result<Relocation> {
    loop {
        let before = mover.show(number).await?;
        if before.is_paused {
            mover.pause(number, false).await?;
        }
        if before.state == State::Switched && before.goal == Goal::Switched {
            rest().await;
            go_either_way(mover, number).await?;
        }
        let meddler = async {
            match rand::rng().random_range(0..10_u32) {
                0 | 1 => {
                    rest().await;
                    mover.want(number, Goal::Aborted).await.map(drop)
                }
                2 => {
                    rest().await;
                    mover.pause(number, true).await.map(drop)
                }
                _ => Ok(()),
            }
        };
        let (driven, meddled) = Box::pin(join(mover.drive(number, &|_| {}), meddler)).await;
        // It may have been quicker than who interferes.
        meddled.or_else(|error| if refuses(&error) { Ok(()) } else { Err(error) })?;
        let driven = driven?;
        if driven.state.is_over() {
            return Ok(driven);
        }
    }
}

/// From the switch back or on; where the way back is closed, on.
pub(crate) async fn go_either_way(mover: &Mover, number: i64) -> relocation::Result<()> {
    if rand::rng().random_bool(0.5) {
        match mover.want(number, Goal::Reversed).await {
            Err(error) if refuses(&error) => {}
            outcome => return outcome.map(drop),
        }
    }
    match mover.finish(number).await {
        // Another mover was quicker.
        Err(error) if refuses(&error) => Ok(()),
        outcome => outcome.map(drop),
    }
}

fn refuses(error: &relocation::Error) -> bool {
    matches!(error, relocation::Error::Refused { .. })
}

async fn rest() {
    let time = Duration::from_millis(rand::rng().random_range(0..MEDDLES_MS));
    tokio::time::sleep(time).await;
}

/// What may happen while something is broken, and what may not.
fn said(error: &relocation::Error) -> Event {
    let kind = match error {
        relocation::Error::Refused { .. } => "refused".to_owned(),
        relocation::Error::Taken(_) => "taken".to_owned(),
        error if error.is_passing() => "passing".to_owned(),
        error => return Event::Odd { what: format!("a mover: {}", chain(error)) },
    };
    Event::Failed { kind: format!("mover {kind}") }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
