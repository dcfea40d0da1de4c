//! Many relocations for one aim: every shard holds its weight's share, or a shard holds nothing any more.
//!
//! Nothing is kept of it but its relocations. One that was interrupted is gone on with by asking for the same again: what is
//! under way is carried through first, then it is planned anew from what is there by then.

use crate::error::{Error, Result};
use crate::mover::Mover;
use crate::plan::{Plan, Request};
use crate::record::{Goal, Relocation, State};
use crate::survey::Survey;
use placement::planner::{self, By, Item, OutOfBand, Pin, Reached, Shard, ShardShare, Why};
use placement::{Group, Layout, ShardNo};
use serde::Serialize;
use shards::ShardEntry;

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// Every shard near its weight's share; so many buckets move at the most.
    Balance {
        /// Of what.
        by: By,
        /// How many buckets may move.
        moves_max: Option<usize>,
    },
    /// This shard owns nothing. Others of weight 0 are emptied with it.
    Empty(ShardNo),
}

/// Groups that move together, and what should move of them.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    /// The colocation groups.
    pub groups: Vec<Group>,
    /// The planner's word.
    pub plan: planner::Plan,
}

/// What should move.
#[derive(Debug, Clone, Serialize)]
pub struct Rebalance {
    /// Both groups together in the colocated layout, each by itself in the split one.
    pub parts: Vec<Part>,
    /// Users whom a shard without weight has apart from their buckets go back to these.
    #[serde(skip)]
    unpins: Vec<Request>,
}

/// How far a rebalancing is.
#[derive(Debug)]
pub struct Step<'a> {
    /// Which relocation it is at, from 1.
    pub at: usize,
    /// Of how many.
    pub of: usize,
    /// The relocation.
    pub relocation: &'a Relocation,
}

/// Who looks on.
type Seen<'a> = &'a (dyn Fn(&Step<'_>) + Sync);

/// The planner counts weights in whole numbers.
const WEIGHT_UNIT: f32 = 1_000.0;

impl Rebalance {
    /// Its relocations, in the order in which they run: round by round, one at a time.
    pub fn requests(&self) -> Vec<Request> {
        let requests = self.parts.iter().flat_map(|part| {
            part.plan.rounds().into_iter().flatten().map(|relocation| Request {
                groups: part.groups.clone(),
                buckets: relocation.buckets,
                pin: None,
                source: relocation.from,
                target: relocation.to,
            })
        });
        requests.chain(self.unpins.iter().cloned()).collect()
    }

    /// The shards of all parts as they are, or as they will be.
    pub fn shares(&self, after: bool) -> Vec<&ShardShare> {
        self.parts.iter().flat_map(|part| if after { &part.plan.after } else { &part.plan.before }).collect()
    }
}

impl Mover {
    /// What should move for this aim, by what is there now.
    pub async fn plan_rebalance(&self, aim: Aim) -> Result<Rebalance> {
        self.shards.refresh().await?;
        let catalog = self.shards.catalog();
        let entries = weighed(&catalog.shards, aim)?;
        let drained: Vec<ShardNo> =
            entries.iter().filter(|entry| entry.weight == 0.0).map(|entry| entry.shard).collect();
        let survey = Survey::take(&self.admin()?, &self.shards.numbers()).await?;
        let is_idle = Group::ALL.iter().all(|group| survey.of(&[*group]).iter().all(|item| item.load == 0));
        if is_idle && matches!(aim, Aim::Balance { by: By::Load, .. }) {
            return Err(Error::refused(
                "nothing was written in the last day: there is no load to go by",
                "balance by size",
            ));
        }
        let candidates = match catalog.layout {
            Layout::Colocated => vec![(Group::ALL.to_vec(), entries)],
            Layout::Split => of_split(|shard, group| survey.holds(shard, group), &entries)?,
        };
        let mut left = if let Aim::Balance { moves_max, .. } = aim { moves_max } else { None };
        let mut parts = Vec::new();
        for (groups, entries) in candidates {
            let (items, mut pins) = (survey.of(&groups), survey.pins_of(&groups));
            // In the split layout: of users who are on shards of the other kind.
            pins.retain(|pin| entries.iter().any(|entry| entry.shard == pin.shard));
            let plan = plan_part(&items, &pins, &entries, aim, stays(catalog.layout, &groups), left)?;
            left = left.map(|left| left.saturating_sub(plan.moves.len()));
            parts.push(Part { groups, plan });
        }
        let mut unpins = Vec::new();
        for shard in &drained {
            unpins.extend(self.pins_on(*shard).await?);
        }
        // Whose bucket has yet to leave another such shard goes after it.
        unpins.retain(|request| !drained.contains(&request.target));
        Ok(Rebalance { parts, unpins })
    }

    /// Whether a shard could be emptied, as far as it can be said before what is under way has ended.
    pub async fn may_empty(&self, shard: ShardNo) -> Result<()> {
        self.shards.refresh().await?;
        let (catalog, map) = (self.shards.catalog(), self.shards.map());
        let entries = weighed(&catalog.shards, Aim::Empty(shard))?;
        if catalog.layout == Layout::Split {
            let holds = |shard, group| map.places(group).any(|(_, place)| place.shard == shard);
            of_split(holds, &entries)?;
        }
        Ok(())
    }

    /// What each relocation of a rebalancing takes, and what stands in its way.
    pub async fn plan_each(&self, rebalance: &Rebalance) -> Result<Vec<Plan>> {
        let mut plans = Vec::new();
        for request in rebalance.requests() {
            plans.push(self.plan(&request).await?);
        }
        Ok(plans)
    }

    /// Carries through whatever is under way, then moves what the aim takes. Says what became of each relocation.
    pub async fn rebalance(&self, aim: Aim, actor: &str, seen: Seen<'_>) -> Result<Vec<Relocation>> {
        let mut ended = self.carry_open(seen).await?;
        let mut are_buckets_moved = false;
        loop {
            let mut requests = self.plan_rebalance(aim).await?.requests();
            if are_buckets_moved && !matches!(aim, Aim::Empty(_)) {
                requests.retain(|request| request.pin.is_some());
            }
            // Users go back to their buckets last: these may be on their way themselves.
            if requests.iter().any(|request| request.pin.is_none()) {
                requests.retain(|request| request.pin.is_none());
                are_buckets_moved = true;
            }
            let are_users = requests.iter().any(|request| request.pin.is_some());
            let of = requests.len();
            for (at, request) in (1..).zip(&requests) {
                let plan = self.plan(request).await?;
                let begun = self.begin(&plan, Goal::Done, actor).await?;
                fail::fail_point!("rebalance.begun");
                let show = |relocation: &Relocation| seen(&Step { at, of, relocation });
                ended.push(self.see_through(begun.relocation, &show).await.and_then(is_done)?);
            }
            // What came to a shard that is to be empty while others were moved goes, too; and of what is balanced users follow.
            if requests.is_empty() || (are_users && !matches!(aim, Aim::Empty(_))) {
                return Ok(ended);
            }
        }
    }

    async fn carry_open(&self, seen: Seen<'_>) -> Result<Vec<Relocation>> {
        let mut open = self.list(true).await?;
        open.reverse();
        let mut ended = Vec::new();
        for (at, relocation) in (1..).zip(&open) {
            let show = |relocation: &Relocation| seen(&Step { at, of: open.len(), relocation });
            ended.push(self.see_through(relocation.relocation, &show).await.and_then(is_over)?);
        }
        Ok(ended)
    }

    /// Carries a relocation on until it rests; where another process works at it, looks on.
    pub async fn see_through(&self, number: i64, seen: &(dyn Fn(&Relocation) + Sync)) -> Result<Relocation> {
        loop {
            match Box::pin(self.drive(number, seen)).await {
                Err(Error::Taken(_)) => {
                    let now = self.show(number).await?;
                    seen(&now);
                    if now.rests() {
                        return Ok(now);
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                }
                outcome => return outcome,
            }
        }
    }
}

/// The shards with the weights that an aim goes by.
fn weighed(shards: &[ShardEntry], aim: Aim) -> Result<Vec<ShardEntry>> {
    let mut entries = shards.to_vec();
    if let Aim::Empty(shard) = aim {
        let entry = entries.iter_mut().find(|entry| entry.shard == shard);
        let Some(entry) = entry else {
            return Err(Error::refused(format!("there is no shard {shard}"), "`therev shard list` lists them"));
        };
        entry.weight = 0.0;
    }
    if entries.iter().all(|entry| entry.weight == 0.0) {
        return Err(Error::refused(
            "no other shard has a weight: there is nowhere to put its rows",
            "add a shard first (`therev shard add`), or give another one a weight (`therev shard weight`)",
        ));
    }
    Ok(entries)
}

/// Plans one part. What stays where it is unless its shard is drained moves no further than that.
fn plan_part(
    items: &[Item],
    pins: &[Pin],
    entries: &[ShardEntry],
    aim: Aim,
    stays: bool,
    moves_max: Option<usize>,
) -> Result<planner::Plan> {
    let shards: Vec<Shard> =
        entries.iter().map(|entry| Shard { shard: entry.shard, weight: whole(entry.weight) }).collect();
    let leaves = |item: &&Item| shards.iter().any(|shard| shard.shard == item.shard && shard.weight == 0);
    let leaving = items.iter().filter(leaves).count();
    let (by, moves_max) = match aim {
        Aim::Balance { by, .. } if stays => (by, Some(moves_max.map_or(leaving, |max| max.min(leaving)))),
        Aim::Balance { by, .. } => (by, moves_max),
        // Those come first, and nothing else is to move.
        Aim::Empty(_) => (By::Size, Some(leaving)),
    };
    let mut plan = planner::plan(&shards, items, pins, by, moves_max)
        .map_err(|error| Error::refused(error.to_string(), "`therev shard list` shows where everything is"))?;
    // No more would move however often it was planned anew.
    if (stays || matches!(aim, Aim::Empty(_))) && plan.reached == Reached::MaxMoves && plan.moves.len() == leaving {
        let out = plan.after.iter().filter(|share| !share.within);
        plan.reached =
            Reached::AsNearAsPossible(out.map(|share| OutOfBand { shard: share.shard, why: Why::Stays }).collect());
    }
    Ok(plan)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the control database bounds weights")]
pub(crate) fn whole(weight: f32) -> u32 {
    (weight * WEIGHT_UNIT).round() as u32
}

/// In the split layout accounts stay on their shard unless it is drained: the point of it is that they have one.
fn stays(layout: Layout, groups: &[Group]) -> bool {
    layout == Layout::Split && groups == [Group::Account]
}

/// In the split layout: accounts on the shards that have some, or on ones that own nothing at all where all of those are
/// drained; content on the shards without accounts.
fn of_split(
    holds: impl Fn(ShardNo, Group) -> bool,
    entries: &[ShardEntry],
) -> Result<Vec<(Vec<Group>, Vec<ShardEntry>)>> {
    let has = |entry: &ShardEntry, group| holds(entry.shard, group);
    let mut account: Vec<ShardEntry> = entries.iter().filter(|it| has(it, Group::Account)).cloned().collect();
    if account.iter().all(|entry| entry.weight == 0.0) {
        let empty = |it: &&ShardEntry| it.weight > 0.0 && Group::ALL.iter().all(|group| !has(it, *group));
        let empty: Vec<ShardEntry> = entries.iter().filter(empty).cloned().collect();
        if empty.is_empty() {
            return Err(Error::refused(
                "no other shard can take the accounts: in the split layout they do not go where content is",
                "add a shard for them first: `therev shard add`",
            ));
        }
        account.extend(empty);
    }
    let holds_accounts = |it: &ShardEntry| account.iter().any(|entry| entry.shard == it.shard);
    let weightless = |it: &ShardEntry| ShardEntry { weight: 0.0, ..it.clone() };
    let content = entries.iter().map(|it| if holds_accounts(it) { weightless(it) } else { it.clone() });
    Ok(vec![(vec![Group::Account], account.clone()), (vec![Group::Content], content.collect())])
}

/// What somebody undid or stopped is not begun again.
fn is_done(ended: Relocation) -> Result<Relocation> {
    match ended.state {
        State::Done => Ok(ended),
        state if state.is_over() => Err(Error::refused(
            format!("relocation {} was {}: no more are begun", ended.relocation, state.name()),
            "run this again to go on",
        )),
        _ => is_over(ended),
    }
}

fn is_over(ended: Relocation) -> Result<Relocation> {
    let number = ended.relocation;
    match (ended.state.is_over(), ended.is_paused) {
        (true, _) => Ok(ended),
        (false, true) => Err(Error::refused(
            format!("relocation {number} is paused"),
            format!("`therev relocation resume {number}` or `abort {number}` first"),
        )),
        (false, false) => Err(Error::refused(
            format!("relocation {number} is held after its switch"),
            format!("`therev relocation finish {number}` or `reverse {number}` first"),
        )),
    }
}
