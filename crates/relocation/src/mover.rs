//! Who carries relocations on: takes the work at one, brings it as far as is wanted, gives the work back.

use crate::beats::Beats;
use crate::error::{Error, Result};
use crate::objects::Stream;
use crate::plan::{self, Plan, Request};
use crate::record::{Goal, Records, Relocation, State, over};
use crate::side::{Pair, Which};
use crate::throttle::Progress;
use crate::tries::Try;
use crate::{copy, finish, lost, switch, verify};
use placement::Group;
use shards::{Admin, Config, Database, Shards};
use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How a relocation is carried on.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long a try of the switch may have writes wait before it is given up.
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
/// How long after an error that passes the next try begins.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// How often it is looked for relocations that nobody works at.
const LOOK: Duration = Duration::from_secs(1);
/// How often a copy begins anew because its stream stopped, before it is left to people.
const ROUNDS_MAX: i32 = 5;
/// Further behind than this, and the comparison waits.
const CAUGHT_UP_BYTES: i64 = 16 << 20;

/// Carries relocations on. Any number may run, in any processes.
pub struct Mover {
    pub(crate) shards: Shards,
    worker: Uuid,
    options: Options,
    on_try: Box<dyn Fn(&Try) + Send + Sync>,
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
            return Err(Error::refused(
                format!("shard {} is being drained", request.target),
                "name another shard, or give this one a weight (`therev shard weight`)",
            ));
        }
        let colocated = catalog.layout == placement::Layout::Colocated;
        if colocated && request.groups.len() < Group::ALL.len() {
            return Err(Error::refused(
                "in the colocated layout both groups of a bucket move together",
                "leave --group out, or give `both`",
            ));
        }
        plan::make(request, &self.admin()?).await
    }

    /// Writes a relocation down; it begins when a worker takes it.
    pub async fn begin(&self, plan: &Plan, goal: Goal, actor: &str) -> Result<Relocation> {
        if let Some(refusal) = plan.refusal() {
            return Err(refusal);
        }
        let control = self.control().await?;
        let groups: Vec<&str> = plan.groups.iter().map(|group| group.name()).collect();
        let buckets: Vec<i16> = plan.buckets.iter().map(|bucket| bucket.sql()).collect();
        // Of two that begin at once the later one sees the earlier one: the lock is held to the end.
        control.batch_execute("BEGIN; LOCK TABLE therev.relocations IN SHARE ROW EXCLUSIVE MODE").await.map_err(at)?;
        may_begin(&control, plan).await?;
        let pin = plan.pin.map(|user| user.0);
        let params: [&(dyn ToSql + Sync); 8] =
            [&groups, &buckets, &plan.source.0, &plan.target.0, &goal.name(), &actor, &plan.last_part, &pin];
        let begun = control
            .query_opt(
                "INSERT INTO therev.relocations (relocation, groups, buckets, source, target, goal, actor, pin)
                 OVERRIDING SYSTEM VALUE
                 SELECT greatest(nextval(pg_get_serial_sequence('therev.relocations', 'relocation')), $7::bigint + 1),
                        $1, $2, $3, $4, $5, $6, $8::uuid
                  WHERE NOT EXISTS (SELECT FROM therev.relocations AS r
                                     WHERE r.ended_at IS NULL AND r.groups && $1 AND r.buckets && $2)
                 RETURNING relocation",
                &params,
            )
            .await
            .map_err(at)?;
        control.batch_execute("COMMIT").await.map_err(at)?;
        let Some(row) = begun else {
            return Err(Error::refused(
                "some of these buckets are in another relocation",
                "wait for it, or abort it; `therev relocation list` names it",
            ));
        };
        Records(&control).get(row.get(0)).await
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

    /// Changes what is wanted of a relocation, where it is still possible.
    pub async fn want(&self, number: i64, goal: Goal) -> Result<Relocation> {
        use State::{Aborted, CatchingUp, Copying, Done, Finishing, Planned, Reversed, Switched, Switching, Verified};
        let before_switch: &[State] = &[Planned, Copying, CatchingUp, Verified, Switching];
        let control = self.control().await?;
        let records = Records(&control);
        let (states, next): (&[State], &str) = match goal {
            Goal::Aborted => (before_switch, "after the switch `therev relocation reverse` goes back"),
            Goal::Reversed => (&[Switched], "only what is switched and not yet finishing can go back"),
            Goal::Switched => (before_switch, "it is past the switch already"),
            Goal::Done => (&[Planned, Copying, CatchingUp, Verified, Switching, Switched], "it is on its way already"),
        };
        if goal == Goal::Reversed {
            self.can_go_back(&records.get(number).await?).await?;
        }
        if let Some(changed) = records.set_goal(number, goal, states).await? {
            return Ok(changed);
        }
        let found = records.get(number).await?;
        match found.state {
            Done | Aborted | Reversed => Err(over(&found)),
            Finishing => Err(Error::refused(format!("relocation {number} is finishing"), next)),
            state => Err(Error::refused(format!("relocation {number} is {}", state.name()), next)),
        }
    }

    /// `finish` before the switch would take what is not there yet.
    pub async fn finish(&self, number: i64) -> Result<Relocation> {
        let found = self.show(number).await?;
        if found.state != State::Switched {
            return Err(if found.state.is_over() {
                over(&found)
            } else {
                Error::refused(
                    format!("relocation {number} is {}, it can be finished when it is switched", found.state.name()),
                    "`therev relocation resume` brings it there",
                )
            });
        }
        self.want(number, Goal::Done).await
    }

    /// The way back is a stream that a promotion cuts.
    async fn can_go_back(&self, relocation: &Relocation) -> Result<()> {
        if relocation.state != State::Switched {
            return Ok(());
        }
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
        if !matches!(relocation.state, State::CatchingUp | State::Verified | State::Switching) {
            return Err(Error::refused(
                format!("relocation {number} is {}: there are no two sides to compare", relocation.state.name()),
                "they can be compared between the copy and the switch",
            ));
        }
        let admin = self.admin()?;
        let pair = Pair::connect(&admin, &relocation).await?;
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
        let outcome = tokio::select! {
            outcome = self.work(taken, &progress) => outcome,
            lost = self.beat(number, &progress, seen) => Err(lost),
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
    /// One after the other. What cannot go on is left to people after it was told of.
    pub async fn carry_on(&self) {
        let mut stuck = BTreeSet::new();
        loop {
            if let Err(error) = lost::find(&self.shards).await {
                tracing::debug!(error = %chain(&error), "nobody says what was lost of");
            }
            match self.list(true).await {
                Ok(open) => {
                    let left = open.iter().filter(|one| !one.rests() && !one.has_worker).map(|one| one.relocation);
                    for number in left.filter(|number| !stuck.contains(number)).collect::<Vec<_>>() {
                        match self.drive(number, &|_| {}).await {
                            Ok(ended) => tracing::info!(relocation = number, state = ended.state.name(), "carried on"),
                            Err(Error::Taken(_)) => {}
                            Err(error) => {
                                tracing::error!(relocation = number, error = %chain(&error), "it cannot go on");
                                stuck.insert(number);
                            }
                        }
                    }
                }
                Err(error) => tracing::debug!(error = %chain(&error), "nobody says what is under way"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Keeps the work this worker's, and tells how far it is; ends when it is another's.
    async fn beat(&self, number: i64, progress: &Progress, seen: &(dyn Fn(&Relocation) + Sync)) -> Error {
        let mut control = None;
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            let outcome = self.beat_once(number, progress, &mut control).await;
            match outcome {
                Ok(now) => seen(&now),
                Err(lost @ (Error::Taken(_) | Error::Unknown(_))) => return lost,
                Err(error) => {
                    tracing::debug!(%error, "the control database does not hear of relocation {number}");
                    control = None;
                }
            }
        }
    }

    async fn beat_once(&self, number: i64, progress: &Progress, control: &mut Option<Client>) -> Result<Relocation> {
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

    /// Step after step, until it rests. Errors that pass are waited out.
    async fn work(&self, mut relocation: Relocation, progress: &Progress) -> Result<Relocation> {
        let mut wait = RETRY.0;
        while !relocation.rests() {
            match self.step(&relocation, progress).await {
                Ok(next) => {
                    (relocation, wait) = (next, RETRY.0);
                    fail::fail_point!("relocation.stepped");
                }
                Err(error) if error.is_passing() => {
                    progress.say(format!("waits: {}", chain(&error)));
                    tracing::warn!(relocation = relocation.relocation, error = %chain(&error), "it does not go on");
                    tokio::time::sleep(wait).await;
                    progress.say("");
                    wait = (wait * 2).min(RETRY.1);
                    relocation = self.again(relocation, &error).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(relocation)
    }

    /// What is known now; and where what it counted on is lost, from the beginning.
    async fn again(&self, relocation: Relocation, error: &Error) -> Relocation {
        let Ok(now) = self.show(relocation.relocation).await else { return relocation };
        if now.goal == Goal::Reversed && matches!(error, Error::OtherLife { .. }) {
            if let Err(error) = self.stay(&now).await {
                tracing::warn!(error = %chain(&error), "relocation {} cannot stay where it is yet", now.relocation);
            }
            return now;
        }
        let before_switch =
            matches!(now.state, State::Copying | State::CatchingUp | State::Verified | State::Switching);
        let lost = matches!(error, Error::OtherLife { .. } | Error::PartGone { .. });
        let stuck = matches!(error, Error::Stream { .. }) && now.copy_round < ROUNDS_MAX;
        if !before_switch || now.goal == Goal::Aborted || !(lost || stuck) {
            return now;
        }
        match self.anew(&now).await {
            Ok(anew) => anew,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "relocation {} cannot begin anew yet", now.relocation);
                now
            }
        }
    }

    /// A promotion was quicker than the wish to go back: it rests at the switch, and can only be finished.
    async fn stay(&self, relocation: &Relocation) -> Result<()> {
        let pair = Pair::connect(&self.admin()?, relocation).await?;
        if switch::stay(relocation, &pair).await? {
            let control = self.control().await?;
            let kept = Records(&control).set_goal(relocation.relocation, Goal::Switched, &[State::Switching]).await?;
            if kept.is_some() {
                tracing::warn!(relocation = relocation.relocation, "a promotion has closed the way back");
            }
        }
        Ok(())
    }

    /// Undoes it, and plans it again.
    async fn anew(&self, relocation: &Relocation) -> Result<Relocation> {
        if !finish::undo(relocation, &self.admin()?).await? {
            return self.show(relocation.relocation).await;
        }
        Records(&self.control().await?).advance(relocation, self.worker, State::Planned).await
    }

    /// One state's work.
    async fn step(&self, relocation: &Relocation, progress: &Progress) -> Result<Relocation> {
        let control = self.control().await?;
        let relocation = &Records(&control).get(relocation.relocation).await?;
        if relocation.rests() {
            return Ok(relocation.clone());
        }
        let admin = self.admin()?;
        let pair = Pair::connect(&admin, relocation).await;
        if let Ok(pair) = &pair
            && relocation.goal != Goal::Reversed
            && finish::has_gone_back(relocation, pair).await?
        {
            let back = Records(&control).set_goal(relocation.relocation, Goal::Reversed, &[relocation.state]).await?;
            return back.ok_or(Error::Taken(relocation.relocation));
        }
        if relocation.goal == Goal::Aborted && relocation.state != State::Switched {
            return self.abort(relocation).await;
        }
        let pair = &pair?;
        if relocation.state != State::Planned
            && let Some(state) = finish::by_the_parts(relocation, pair, &admin).await?
        {
            return Records(&control).advance(relocation, self.worker, state).await;
        }
        let next = match relocation.state {
            State::Planned => self.prepare(relocation, &control, pair).await?,
            State::Copying => self.copy(relocation, &control, pair, &admin, progress).await?,
            State::CatchingUp => self.catch_up(relocation, pair, &admin, progress).await?,
            State::Verified => State::Switching,
            State::Switching => match self.switch(relocation, pair, &admin, progress).await? {
                Some(next) => next,
                None => return self.show(relocation.relocation).await,
            },
            State::Switched if relocation.goal == Goal::Reversed => State::Switching,
            State::Switched => State::Finishing,
            State::Finishing => {
                finish::run(relocation, pair, &admin, progress).await?;
                if relocation.goal == Goal::Reversed { State::Reversed } else { State::Done }
            }
            State::Done | State::Aborted | State::Reversed => return Ok(relocation.clone()),
        };
        fail::fail_point!("relocation.before_advance");
        // The work may have taken hours: the connection that began it may be gone by now.
        Records(&self.control().await?).advance(relocation, self.worker, next).await
    }

    /// Which lives it counts on, and a part on each side.
    async fn prepare(&self, relocation: &Relocation, control: &Client, pair: &Pair) -> Result<State> {
        let (source_life, target_life) = verify::lives(pair).await?;
        control
            .execute(
                "UPDATE therev.relocations SET source_life = $3, target_life = $4
                  WHERE relocation = $1 AND worker = $2",
                &[&relocation.relocation, &self.worker, &source_life, &target_life],
            )
            .await
            .map_err(at)?;
        let (groups, buckets) = (relocation.group_names(), relocation.bucket_numbers());
        let pin = relocation.pin.map(|user| user.0);
        let begin = "SELECT therev.begin_part($1, $2, $3, $4, $5, $6, $7, $8, $9)";
        let (none, nobody): (Vec<i64>, _) = (Vec::new(), serde_json::json!([]));
        let source: [&(dyn ToSql + Sync); 9] = [
            &relocation.relocation,
            &relocation.tag,
            &Which::Source.name(),
            &relocation.target.0,
            &groups,
            &buckets,
            &none,
            &pin,
            &nobody,
        ];
        // Frozen from now on: who is placed apart changes by relocations alone, and no bucket is in two of them.
        let apart: serde_json::Value = pair.source.one(begin, &source).await?.get(0);
        fail::fail_point!("relocation.source_part");
        let epochs = "SELECT array_agg(coalesce(p.epoch, o.epoch) ORDER BY g.at, b.at)
                        FROM unnest($1::text[]) WITH ORDINALITY AS g (name, at)
                       CROSS JOIN unnest($2::smallint[]) WITH ORDINALITY AS b (bucket, at)
                        JOIN therev.ownership AS o ON o.colocation_group::text = g.name AND o.bucket = b.bucket
                        LEFT JOIN therev.pins AS p ON p.colocation_group = o.colocation_group AND p.user_id = $3";
        let epochs: Vec<i64> = pair.source.one(epochs, &[&groups, &buckets, &pin]).await?.get(0);
        let target: [&(dyn ToSql + Sync); 9] = [
            &relocation.relocation,
            &relocation.tag,
            &Which::Target.name(),
            &relocation.source.0,
            &groups,
            &buckets,
            &epochs,
            &pin,
            &apart,
        ];
        pair.target.query(begin, &target).await?;
        let note = "UPDATE therev.relocations SET apart = $3 WHERE relocation = $1 AND worker = $2";
        control.execute(note, &[&relocation.relocation, &self.worker, &apart]).await.map_err(at)?;
        fail::fail_point!("relocation.target_part");
        Ok(State::Copying)
    }

    async fn copy(
        &self,
        relocation: &Relocation,
        control: &Client,
        pair: &Pair,
        admin: &Admin,
        progress: &Progress,
    ) -> Result<State> {
        let row = control
            .query_opt(
                "UPDATE therev.relocations SET copy_round = copy_round + 1, rows_copied = 0, bytes_copied = 0
                  WHERE relocation = $1 AND worker = $2 RETURNING copy_round",
                &[&relocation.relocation, &self.worker],
            )
            .await
            .map_err(at)?;
        let copy_round = row.ok_or(Error::Taken(relocation.relocation))?.get(0);
        let relocation = Relocation { copy_round, ..relocation.clone() };
        pair.check_lives(&relocation).await?;
        copy::run(&relocation, pair, admin, progress).await?;
        Ok(State::CatchingUp)
    }

    async fn catch_up(
        &self,
        relocation: &Relocation,
        pair: &Pair,
        admin: &Admin,
        progress: &Progress,
    ) -> Result<State> {
        pair.check_lives(relocation).await?;
        let name = Stream::Forward.name(relocation);
        let errors = verify::stream_errors(&pair.target, &name).await?;
        loop {
            let lag = verify::lag_bytes(&pair.source, &name).await?;
            progress.lag_bytes.store(lag.unwrap_or(-1), Ordering::Relaxed);
            if lag.is_some_and(|bytes| bytes < CAUGHT_UP_BYTES) {
                break;
            }
            if verify::stream_errors(&pair.target, &name).await? > errors {
                let reason = "a change could not be applied there; its server's log says which".to_owned();
                return Err(Error::Stream { database: pair.target.database(), reason });
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Beats::new(relocation, pair).await?.arrive().await?;
        progress.lag_bytes.store(0, Ordering::Relaxed);
        fail::fail_point!("relocation.caught_up");
        let compared = verify::run(relocation, pair, admin, progress, false).await?;
        tracing::info!(relocation = relocation.relocation, compared, "both sides hold the same rows");
        Ok(State::Verified)
    }

    /// Whether the buckets are still to change hands as they were.
    pub(crate) async fn is_still_wanted(&self, relocation: &Relocation) -> bool {
        match self.show(relocation.relocation).await {
            Ok(now) => !now.rests() && now.owner_wanted() == relocation.owner_wanted(),
            // The shards alone decide: with the control database down a switch goes on.
            Err(_) => true,
        }
    }

    /// `None`: something else is wanted by now.
    async fn switch(
        &self,
        relocation: &Relocation,
        pair: &Pair,
        admin: &Admin,
        progress: &Progress,
    ) -> Result<Option<State>> {
        let told = |one: &Try| {
            tracing::debug!(relocation = one.relocation, attempt = one.attempt, steps = %one.told(), "a switch was tried");
            (self.on_try)(one);
        };
        let Some(done) = switch::run(relocation, pair, self.options.budget, progress, self, &told).await? else {
            return Ok(None);
        };
        progress.say("");
        self.note_switch(relocation, &done).await?;
        finish::record_placement(relocation, pair, admin).await?;
        fail::fail_point!("relocation.recorded");
        switch::turn_streams(relocation, pair).await?;
        fail::fail_point!("relocation.streams_turned");
        Ok(Some(if relocation.goal == Goal::Reversed { State::Finishing } else { State::Switched }))
    }

    async fn note_switch(&self, relocation: &Relocation, done: &switch::Switched) -> Result<()> {
        let pause_ms = done.pause.map(|pause| pause.as_secs_f64() * 1_000.0);
        self.control()
            .await?
            .execute(
                "UPDATE therev.relocations SET attempts = attempts + $2, pause_ms = coalesce($3, pause_ms)
                  WHERE relocation = $1",
                &[&relocation.relocation, &done.attempts, &pause_ms],
            )
            .await
            .map(drop)
            .map_err(at)
    }

    async fn abort(&self, relocation: &Relocation) -> Result<Relocation> {
        let undone = finish::undo(relocation, &self.admin()?).await?;
        let control = self.control().await?;
        let records = Records(&control);
        if undone {
            return records.advance(relocation, self.worker, State::Aborted).await;
        }
        // The switch was quicker than the wish to abort: it is carried through, and rests where the way back is open.
        let kept = records.set_goal(relocation.relocation, Goal::Switched, &[relocation.state]).await?;
        kept.ok_or(Error::Taken(relocation.relocation))
    }
}

/// Within the transaction that begins a relocation: no schema is being changed, and both shards are there still.
async fn may_begin(control: &Client, plan: &Plan) -> Result<()> {
    let row = control
        .query_one(
            "SELECT pg_try_advisory_xact_lock_shared(hashtext('therev.schema_change')) AS is_still,
                    (SELECT count(*) FROM therev.shards AS s WHERE s.shard IN ($1, $2)) AS shards",
            &[&plan.source.0, &plan.target.0],
        )
        .await
        .map_err(at)?;
    if !row.get::<_, bool>("is_still") {
        return Err(Error::refused("the schema is being changed", "run this again when `therev schema apply` is done"));
    }
    if row.get::<_, i64>("shards") < 2 {
        return Err(Error::refused("one of the two shards was removed", "`therev shard list` lists them"));
    }
    Ok(())
}

fn at(source: tokio_postgres::Error) -> Error {
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
}
