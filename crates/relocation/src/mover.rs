//! Who carries relocations on: takes the work at one, brings it as far as is wanted, gives the work back.

use crate::ending::{may_finish, not_now, wanted_in};
use crate::error::{Error, Result};
use crate::plan::{self, Plan, Request};
use crate::record::{Goal, Records, Relocation, State};
use crate::side::{Pair, PartState};
use crate::throttle::Progress;
use crate::tries::Try;
use crate::work::Wanted;
use crate::{finish, lost, verify};
use placement::{Bucket, Group, Layout, ShardNo};
use shards::{Admin, Config, Database, Shards};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::fmt::Display;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How a relocation is carried on.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long a try of the switch may have writes wait before it is given up: no less than twice what its steps take by
    /// themselves. Whoever carries a relocation on goes by what it began with.
    pub budget: Duration,
    /// How long the work is a worker's after it was last heard of: so long it takes until another one takes what a dead one
    /// left. It is heard of twice a second.
    pub lease: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options { budget: Duration::from_millis(25), lease: Duration::from_secs(5) }
    }
}

/// How often it is heard of.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// How often it is looked for relocations that nobody works at.
const LOOK: Duration = Duration::from_secs(1);
/// How many are carried on at a time: each has connections to two shards, and one that waits keeps its place.
const AT_ONCE: usize = 8;
/// How long what cannot go on is left alone: at first, and at the most; each time twice as long as before.
const STUCK: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));

/// Carries relocations on. Any number may run, in any processes.
pub struct Mover {
    pub(crate) shards: Shards,
    pub(crate) worker: Uuid,
    pub(crate) options: Options,
    pub(crate) on_try: Box<dyn Fn(&Try) + Send + Sync>,
    /// What it carries on now. Its lease tells it from other workers, not one of its calls from another.
    at_work: Mutex<BTreeSet<i64>>,
}

/// A call that carries a relocation on, as long as it lives.
struct AtWork<'a> {
    all: &'a Mutex<BTreeSet<i64>>,
    number: i64,
}

impl<'a> AtWork<'a> {
    fn begin(all: &'a Mutex<BTreeSet<i64>>, number: i64) -> Result<AtWork<'a>> {
        let is_first = all.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
        if is_first { Ok(AtWork { all, number }) } else { Err(Error::Taken(number)) }
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// What could not go on, by its number.
#[derive(Default)]
struct Stuck(BTreeMap<i64, Rest>);

/// It is left alone until then, or until something else is wanted of it.
struct Rest {
    until: Instant,
    length: Duration,
    goal: Goal,
}

impl Stuck {
    fn rests(&self, one: &Relocation) -> bool {
        self.0.get(&one.relocation).is_some_and(|rest| rest.goal == one.goal && Instant::now() < rest.until)
    }

    /// What has ended meanwhile is forgotten.
    fn keep(&mut self, open: &[Relocation]) {
        self.0.retain(|number, _| open.iter().any(|one| one.relocation == *number));
    }

    /// One more that cannot go on, or one that cannot go on once more; says how long it rests now.
    fn add(&mut self, number: i64, goal: Goal) -> Duration {
        let length = self.0.get(&number).map_or(STUCK.0, |rest| (rest.length * 2).min(STUCK.1));
        self.0.insert(number, Rest { until: Instant::now() + length, length, goal });
        length
    }

    /// What became of one that was carried on.
    fn note(&mut self, number: i64, goal: Goal, outcome: std::result::Result<Result<Relocation>, JoinError>) {
        let error = match outcome {
            Ok(Ok(ended)) => {
                tracing::info!(relocation = number, state = ended.state.name(), "carried on");
                self.0.remove(&number);
                return;
            }
            Ok(Err(Error::Taken(_))) => return,
            Ok(Err(error)) => chain(&error),
            // A panic: to those beside it no worse than an error.
            Err(error) => error.to_string(),
        };
        let rest = self.add(number, goal);
        tracing::error!(relocation = number, %error, rest_s = rest.as_secs(), "it cannot go on");
    }
}

impl Mover {
    /// Of a cluster; works as role `therev_mover`, whose password the passfile has.
    pub fn new(shards: Shards, options: Options) -> Mover {
        Mover { shards, worker: Uuid::new_v4(), options, on_try: Box::new(|_| {}), at_work: Mutex::default() }
    }

    /// Tells of every try of a switch, as soon as it is over.
    #[must_use]
    pub fn on_try(self, told: impl Fn(&Try) + Send + Sync + 'static) -> Mover {
        Mover { on_try: Box::new(told), ..self }
    }

    pub(crate) fn admin(&self) -> Result<Admin> {
        Ok(Admin::mover(self.config(), self.shards.catalog())?)
    }

    fn config(&self) -> &Config {
        self.shards.config()
    }

    pub(crate) async fn control(&self) -> Result<Client> {
        Ok(self.admin()?.connect(Database::Control).await?)
    }

    /// What a relocation would do and what stands in its way.
    pub async fn plan(&self, request: &Request) -> Result<Plan> {
        if request.buckets.is_empty() || request.groups.is_empty() {
            return Err(Error::refused("nothing is named that could move", "name buckets and groups"));
        }
        if request.source == request.target {
            return Err(Error::refused(
                format!("these buckets are on shard {} already", request.target),
                "name another shard",
            ));
        }
        for shard in [request.source, request.target] {
            if !self.shards.numbers().contains(&shard) {
                return Err(Error::refused(format!("there is no shard {shard}"), "`therev status` lists the shards"));
            }
        }
        let catalog = self.shards.catalog();
        if catalog.shards.iter().any(|entry| entry.shard == request.target && entry.weight == 0.0) {
            return Err(being_drained(request.target));
        }
        match catalog.layout {
            Layout::Colocated if request.groups.len() < Group::ALL.len() => {
                return Err(Error::refused(
                    "in the colocated layout both groups of a bucket move together",
                    "leave --group out, or give `both`",
                ));
            }
            // Users are sent where their group is.
            Layout::Split if request.pin.is_none() => {
                let map = self.shards.map();
                let holds = |group| map.places(group).any(|(_, place)| place.shard == request.target);
                let mut others = Group::ALL.into_iter().filter(|group| !request.groups.contains(group));
                // One that has both is neither.
                if let Some(other) = others.find(|group| holds(*group) && !request.groups.iter().any(|it| holds(*it))) {
                    return Err(for_others(request.target, other));
                }
            }
            Layout::Colocated | Layout::Split => {}
        }
        plan::make(request, &self.admin()?).await
    }

    /// Writes a relocation down; it begins when a worker takes it.
    pub async fn begin(&self, plan: &Plan, goal: Goal, actor: &str) -> Result<Relocation> {
        if let Some(refusal) = plan.refusal() {
            return Err(refusal);
        }
        // A number that the control database has lost is no new one's. What a shard has that is down waits until it is back.
        if let Err(error) = self.find_lost().await {
            tracing::debug!(error = %chain(&error), "nobody says what was lost of");
        }
        let control = self.control().await?;
        let groups: Vec<&str> = plan.groups.iter().map(|group| group.name()).collect();
        let buckets: Vec<i16> = plan.buckets.iter().map(|bucket| bucket.sql()).collect();
        // Of two that begin at once the later one sees the earlier one: the lock is held to the end. Where the control database
        // had lost relocations, its sequence may be behind those that were found again.
        control.batch_execute("BEGIN; LOCK TABLE therev.relocations IN SHARE ROW EXCLUSIVE MODE").await.map_err(at)?;
        may_begin(&control, plan, self.shards.catalog().layout).await?;
        let pin = plan.pin.map(|user| user.0);
        let budget_ms = i32::try_from(self.options.budget.as_millis()).unwrap_or(i32::MAX).max(1);
        let params: [&(dyn ToSql + Sync); 9] = [
            &groups,
            &buckets,
            &plan.source.0,
            &plan.target.0,
            &goal.name(),
            &actor,
            &plan.last_part,
            &pin,
            &budget_ms,
        ];
        let begun = control
            .query_opt(
                "INSERT INTO therev.relocations (relocation, groups, buckets, source, target, goal, actor, pin, budget_ms)
                 OVERRIDING SYSTEM VALUE
                 SELECT greatest(nextval(pg_get_serial_sequence('therev.relocations', 'relocation')), $7::bigint + 1,
                                 (SELECT max(r.relocation) + 1 FROM therev.relocations AS r)),
                        $1, $2, $3, $4, $5, $6, $8::uuid, $9
                  WHERE NOT EXISTS (SELECT FROM therev.relocations AS r
                                     WHERE r.ended_at IS NULL AND r.groups && $1 AND r.buckets && $2)
                 RETURNING relocation",
                &params,
            )
            .await
            .map_err(at)?;
        control.batch_execute("COMMIT").await.map_err(at)?;
        let Some(row) = begun else {
            let open = Records(&control).list(true).await?;
            return Err(in_another(sharing(&open, &plan.groups, &plan.buckets)));
        };
        Records(&control).get(row.get(0)).await
    }

    /// What a process that died has left of this very request: its relocation, which is on its way and nobody works at. `None`:
    /// nothing of the request is under way. Refused where something else is under way with some of it.
    pub async fn left_of(&self, request: &Request) -> Result<Option<Relocation>> {
        let open = self.list(true).await?;
        let Some(one) = sharing(&open, &request.groups, &request.buckets) else { return Ok(None) };
        let is_same = one.groups == request.groups
            && one.buckets == request.buckets
            && one.pin == request.pin
            && (one.source, one.target) == (request.source, request.target);
        let is_on_its_way = matches!(one.goal, Goal::Done | Goal::Switched) && !one.rests();
        if is_same && is_on_its_way && !one.has_worker { Ok(Some(one.clone())) } else { Err(in_another(Some(one))) }
    }

    /// Finds what the control database has lost of relocations, where it was put back to an older state, and what a worker
    /// that slept left behind after the end.
    pub async fn find_lost(&self) -> Result<()> {
        lost::find(&self.shards).await
    }

    /// All relocations, the newest first; only those under way when `open`.
    pub async fn list(&self, open: bool) -> Result<Vec<Relocation>> {
        Records(&self.control().await?).list(open).await
    }

    /// One relocation.
    pub async fn show(&self, number: i64) -> Result<Relocation> {
        Records(&self.control().await?).get(number).await
    }

    /// Has a relocation rest where it is, or go on.
    pub async fn pause(&self, number: i64, is_paused: bool) -> Result<Relocation> {
        Records(&self.control().await?).set_paused(number, is_paused).await
    }

    /// Changes what is wanted of a relocation, where it is still possible. A way back that is aborted is one to stay: what is wanted then
    /// is [`Goal::Switched`].
    pub async fn want(&self, number: i64, goal: Goal) -> Result<Relocation> {
        let control = self.control().await?;
        let records = Records(&control);
        self.may_want(&records.get(number).await?, goal).await?;
        match records.set_goal(number, goal, wanted_in(goal).0).await? {
            Some(changed) => Ok(changed),
            // It has gone on since.
            None => Err(not_now(&records.get(number).await?, goal)),
        }
    }

    /// Whether this can be wanted of a relocation that is as it was found.
    pub(crate) async fn may_want(&self, found: &Relocation, goal: Goal) -> Result<()> {
        if !wanted_in(goal).0.contains(&found.state) {
            return Err(not_now(found, goal));
        }
        if goal == Goal::Reversed { self.can_go_back(found).await } else { Ok(()) }
    }

    /// Ends one that is switched: from here on there is no way back.
    pub async fn finish(&self, number: i64) -> Result<Relocation> {
        may_finish(&self.show(number).await?)?;
        self.want(number, Goal::Done).await
    }

    /// The way back is a stream that a promotion cuts.
    async fn can_go_back(&self, relocation: &Relocation) -> Result<()> {
        let pair = Pair::connect(&self.admin()?, relocation).await?;
        match pair.check_lives(relocation).await {
            Err(Error::OtherLife { database }) => Err(Error::refused(
                format!("the way back is closed: {database} was promoted since the switch"),
                "finish this relocation, then move the buckets back with another one",
            )),
            outcome => outcome,
        }
    }

    /// Compares both sides of a relocation under way, and with `repair` copies anew what differs. Says how many rows
    /// were compared.
    pub async fn verify(&self, number: i64, repair: bool) -> Result<i64> {
        let relocation = self.show(number).await?;
        // On its way back only the stream from the target to the source is left, and both have written.
        let goes_there = relocation.goal != Goal::Reversed;
        let refused = |is: &str| {
            Error::refused(
                format!("relocation {number} is {is}: there are no two sides to compare"),
                "they can be compared between the copy and the switch",
            )
        };
        if !goes_there || !matches!(relocation.state, State::CatchingUp | State::Verified | State::Switching) {
            return Err(refused(relocation.state.name()));
        }
        let admin = self.admin()?;
        let pair = Pair::connect(&admin, &relocation).await?;
        // A switch that is decided is so before the control database hears of it, and so is a way back that nobody wants any more.
        let gives = pair.source.must_have_part(number).await?.state;
        if !matches!(gives, PartState::Owned | PartState::Draining) {
            return Err(refused("past its switch"));
        }
        verify::run(&relocation, &pair, &admin, &Progress::default(), repair).await
    }

    /// Carries one relocation on until it rests: done, switched and held, paused, aborted or reversed.
    ///
    /// `seen` is told how far it is, twice a second. A server that is down is waited for; what does not pass is an error,
    /// and the relocation stays where it is.
    pub async fn drive(&self, number: i64, seen: &(dyn Fn(&Relocation) + Sync)) -> Result<Relocation> {
        let _at_work = AtWork::begin(&self.at_work, number)?;
        let control = self.control().await?;
        let taken = Records(&control).take(number, self.worker, self.options.lease.as_secs_f64()).await?;
        drop(control);
        seen(&taken);
        let progress = Progress::default();
        let (says, heard) = watch::channel(Wanted::of(&taken));
        let outcome = tokio::select! {
            outcome = Box::pin(self.work(taken, &progress, &heard)) => outcome,
            lost = self.beat(number, &progress, &says, seen) => Err(lost),
        };
        if matches!(outcome, Err(Error::Taken(_))) {
            self.clear_after(number).await;
        }
        if let Ok(control) = self.control().await {
            // A lease that is not given back runs out by itself.
            let _ = Records(&control).give_back(number, self.worker).await;
            if let Ok(now) = Records(&control).get(number).await {
                seen(&now);
                return outcome.map(|_| now);
            }
        }
        outcome
    }

    /// A worker that slept until others had ended its relocation may have made a slot or begun a part meanwhile.
    async fn clear_after(&self, number: i64) {
        let clear = async {
            let now = self.show(number).await?;
            finish::clear(&now, &self.admin()?).await
        };
        if let Err(error) = clear.await {
            tracing::warn!(error = %chain(&error), "relocation {number} ended elsewhere; `check` names what is left of it");
        }
    }

    /// Carries on what is under way and nobody works at, for as long as it is polled: what a process that died has left.
    ///
    /// Several at a time, each in a task of its own: one that waits for a server, or for somebody's transaction, keeps nobody from
    /// the others. What cannot go on is told of, and tried again after a rest, which grows.
    pub async fn carry_on(self: &Arc<Self>) {
        let finding = async {
            loop {
                if let Err(error) = lost::find(&self.shards).await {
                    tracing::debug!(error = %chain(&error), "nobody says what was lost of");
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = finding => {}
            () = self.carry_each() => {}
        }
    }

    /// Looks who is left, and gives each a task.
    async fn carry_each(self: &Arc<Self>) {
        let mut tasks: JoinSet<Result<Relocation>> = JoinSet::new();
        let (mut under_way, mut stuck) = (BTreeMap::new(), Stuck::default());
        loop {
            while let Some(ended) = tasks.try_join_next_with_id() {
                let (id, outcome) = match ended {
                    Ok((id, outcome)) => (id, Ok(outcome)),
                    Err(error) => (error.id(), Err(error)),
                };
                if let Some((number, goal)) = under_way.remove(&id) {
                    stuck.note(number, goal, outcome);
                }
            }
            match self.list(true).await {
                Ok(open) => {
                    stuck.keep(&open);
                    let left = open.iter().filter(|one| !one.rests() && !one.has_worker && !stuck.rests(one));
                    for one in left.take(AT_ONCE.saturating_sub(under_way.len())) {
                        let (mover, number) = (Arc::clone(self), one.relocation);
                        let task = tasks.spawn(async move { Box::pin(mover.drive(number, &|_| {})).await });
                        under_way.insert(task.id(), (number, one.goal));
                    }
                }
                Err(error) => tracing::debug!(error = %chain(&error), "nobody says what is under way"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Keeps the work this worker's, tells how far it is and hears what is wanted; ends when it is another's.
    async fn beat(
        &self,
        number: i64,
        progress: &Progress,
        says: &watch::Sender<Wanted>,
        seen: &(dyn Fn(&Relocation) + Sync),
    ) -> Error {
        let mut control = None;
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            let outcome = self.beat_once(number, progress, &mut control).await;
            match outcome {
                Ok(now) => {
                    says.send_replace(Wanted::of(&now));
                    seen(&now);
                }
                Err(lost @ (Error::Taken(_) | Error::Unknown(_))) => return lost,
                Err(error) => {
                    tracing::debug!(%error, "the control database does not hear of relocation {number}");
                    control = None;
                }
            }
        }
    }

    pub(crate) async fn beat_once(
        &self,
        number: i64,
        progress: &Progress,
        control: &mut Option<Client>,
    ) -> Result<Relocation> {
        let client = match control {
            Some(client) => client,
            None => control.insert(self.control().await?),
        };
        let (total, rows) = (progress.rows_total.load(Ordering::Relaxed), progress.rows.load(Ordering::Relaxed));
        let (bytes, lag) = (progress.bytes.load(Ordering::Relaxed), progress.lag_bytes.load(Ordering::Relaxed));
        let lease_s = self.options.lease.as_secs_f64();
        let params: [&(dyn ToSql + Sync); 8] =
            [&number, &self.worker, &total, &rows, &bytes, &(lag >= 0).then_some(lag), &progress.note(), &lease_s];
        let told = client
            .execute(
                "UPDATE therev.relocations
                    SET rows_total = greatest(rows_total, $3), rows_copied = greatest($4, rows_copied),
                        bytes_copied = greatest($5, bytes_copied), lag_bytes = $6, note = $7, updated_at = now(),
                        leased_until = now() + make_interval(secs => $8)
                  WHERE relocation = $1 AND worker = $2",
                &params,
            )
            .await
            .map_err(at)?;
        if told == 0 { Err(Error::Taken(number)) } else { Records(client).get(number).await }
    }
}

/// Of the relocations under way one that has some of these buckets, of one of these groups.
fn sharing<'a>(open: &'a [Relocation], groups: &[Group], buckets: &[Bucket]) -> Option<&'a Relocation> {
    open.iter().find(|one| {
        one.groups.iter().any(|group| groups.contains(group)) && one.buckets.iter().any(|it| buckets.contains(it))
    })
}

/// Why nothing can begin with what another relocation has; `None`: it has ended by now.
fn in_another(one: Option<&Relocation>) -> Error {
    let next = match one {
        None => "it has just ended: run this again".to_owned(),
        Some(one) if one.state == State::Switched && one.goal == Goal::Switched => {
            let number = one.relocation;
            format!("it is held after its switch: `therev relocation finish {number}`, or `reverse {number}`")
        }
        Some(one) => {
            let number = one.relocation;
            format!("wait for it, or abort it; `therev relocation resume {number}` carries it on")
        }
    };
    Error::refused("some of these buckets are in another relocation", next)
}

fn being_drained(shard: ShardNo) -> Error {
    let next = "name another shard, or give this one a weight (`therev shard weight`)";
    Error::refused(format!("shard {shard} is being drained"), next)
}

fn for_others(target: ShardNo, other: impl Display) -> Error {
    let reason = format!("in the split layout shard {target} is for {other} alone");
    Error::refused(reason, format!("name another shard, or `--group {other}`"))
}

/// Within the transaction that begins a relocation: no schema is being changed, and both shards are there still, the one to take also
/// with a weight; in the split layout nothing has come to it since the plan, or is on its way, that makes it one of the other kind.
async fn may_begin(control: &Client, plan: &Plan, layout: Layout) -> Result<()> {
    let groups: Vec<&str> = plan.groups.iter().map(|group| group.name()).collect();
    let row = control
        .query_one(
            "WITH held AS (
                 SELECT p.colocation_group FROM therev.placement AS p WHERE p.shard = $2
                  UNION
                 SELECT unnest(r.groups) FROM therev.relocations AS r
                  WHERE r.target = $2 AND r.pin IS NULL AND r.ended_at IS NULL)
             SELECT pg_try_advisory_xact_lock_shared(hashtext('therev.schema_change')) AS is_still,
                    (SELECT count(*) FROM therev.shards AS s WHERE s.shard IN ($1, $2)) AS shards,
                    EXISTS (SELECT FROM therev.shards AS s WHERE s.shard = $2 AND s.weight = 0) AS is_drained,
                    (SELECT min(h.colocation_group) FROM held AS h
                      WHERE NOT EXISTS (SELECT FROM held AS o WHERE o.colocation_group = ANY ($3))) AS other",
            &[&plan.source.0, &plan.target.0, &groups],
        )
        .await
        .map_err(at)?;
    if !row.get::<_, bool>("is_still") {
        return Err(Error::refused("the schema is being changed", "run this again when `therev schema apply` is done"));
    }
    if row.get::<_, i64>("shards") < 2 {
        return Err(Error::refused("one of the two shards was removed", "`therev shard list` lists them"));
    }
    if row.get("is_drained") {
        return Err(being_drained(plan.target));
    }
    match row.get::<_, Option<&str>>("other") {
        Some(other) if layout == Layout::Split && plan.pin.is_none() => Err(for_others(plan.target, other)),
        _ => Ok(()),
    }
}

pub(crate) fn at(source: tokio_postgres::Error) -> Error {
    Error::Sql { database: Database::Control, source }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only while a mover's work can be given to any thread.
    fn of_any_thread(mover: &Mover) -> impl Send {
        mover.drive(0, &|_| {})
    }

    #[test]
    fn a_movers_work_can_be_spawned() {
        let _: fn(&'static Mover) -> _ = of_any_thread;
    }

    #[test]
    fn what_cannot_go_on_rests_longer_each_time() {
        let mut stuck = Stuck::default();
        let rests: Vec<u64> = (0..8).map(|_| stuck.add(7, Goal::Done).as_secs()).collect();
        assert_eq!(rests, [60, 120, 240, 480, 960, 1_920, 3_600, 3_600]);
        assert_eq!(stuck.add(8, Goal::Done), STUCK.0, "each by itself");
        stuck.keep(&[]);
        assert_eq!(stuck.add(7, Goal::Done), STUCK.0, "what has ended is forgotten");
    }
}
