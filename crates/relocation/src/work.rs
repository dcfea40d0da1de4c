//! The work at a relocation: state after state, each a step that compares what should be with what is.

use crate::beats::Beats;
use crate::error::{Error, Result};
use crate::mover::{Mover, at, chain};
use crate::objects::Stream;
use crate::record::{Goal, Records, Relocation, State};
use crate::side::{Pair, Which};
use crate::throttle::Progress;
use crate::tries::Try;
use crate::{copy, finish, switch, verify};
use placement::ShardNo;
use shards::Admin;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

/// How long after an error that passes the next try begins.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// In which round, five copies and their four ends, it is left to people when a stream has stopped once more.
const ROUNDS_MAX: i32 = 9;
/// Further behind than this, and the comparison waits.
const CAUGHT_UP_BYTES: i64 = 16 << 20;

/// What is wanted of a relocation, as the control database said it last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    is_paused: bool,
    aim: (ShardNo, bool),
}

impl Wanted {
    pub(crate) fn of(relocation: &Relocation) -> Wanted {
        Wanted { is_paused: relocation.is_paused, aim: relocation.aim() }
    }
}

/// Where a step hears of it that takes long.
pub(crate) type Heard = watch::Receiver<Wanted>;

/// What a step comes to. `None`: the relocation is to rest, or something else is wanted of it than what the step does.
///
/// The step ends where it is, as if its process had died: a transaction that is open ends with its connection, a statement that is
/// under way is one of somebody who slept, and what was begun is found by whoever goes on. Not for a try of the switch: writers would
/// wait until somebody ended it.
pub(crate) async fn unless_called_off<T>(
    relocation: &Relocation,
    heard: &Heard,
    step: impl Future<Output = Result<T>>,
) -> Result<Option<T>> {
    let mut heard = heard.clone();
    // The step goes by a look of its own, which is newer.
    heard.mark_unchanged();
    let called_off = async {
        while heard.changed().await.is_ok() {
            let now = *heard.borrow();
            if now.is_paused || now.aim != relocation.aim() {
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        outcome = step => outcome.map(Some),
        () = called_off => Ok(None),
    }
}

impl Mover {
    /// Step after step, until it rests. Errors that pass are waited out.
    pub(crate) async fn work(
        &self,
        mut relocation: Relocation,
        progress: &Progress,
        heard: &Heard,
    ) -> Result<Relocation> {
        let mut wait = RETRY.0;
        while !relocation.rests() {
            match self.step(&relocation, progress, heard).await {
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
                    relocation = self.again(relocation, &error, heard).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(relocation)
    }

    /// What is known now; and where what it counted on is lost, from the beginning.
    async fn again(&self, relocation: Relocation, error: &Error, heard: &Heard) -> Relocation {
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
        match self.anew(&now, heard).await {
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
            Records(&self.control().await?).admit(relocation, self.worker, Goal::Switched).await?;
            tracing::warn!(relocation = relocation.relocation, "a promotion has closed the way back");
        }
        Ok(())
    }

    /// Undoes it, and plans it again.
    async fn anew(&self, relocation: &Relocation, heard: &Heard) -> Result<Relocation> {
        let admin = self.admin()?;
        let undone = Box::pin(finish::undo(relocation, &admin, Some(self.worker)));
        if unless_called_off(relocation, heard, undone).await? != Some(true) {
            return self.show(relocation.relocation).await;
        }
        Records(&self.control().await?).advance(relocation, self.worker, State::Planned).await
    }

    /// One state's work.
    async fn step(&self, relocation: &Relocation, progress: &Progress, heard: &Heard) -> Result<Relocation> {
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
            return Records(&control).admit(relocation, self.worker, Goal::Reversed).await;
        }
        if relocation.goal == Goal::Aborted && relocation.state != State::Switched {
            return self.abort(relocation, progress, heard).await;
        }
        let pair = &pair?;
        if relocation.state != State::Planned
            && let Some(state) = finish::by_the_parts(relocation, pair, &admin).await?
        {
            return Records(&control).advance(relocation, self.worker, state).await;
        }
        let next = match relocation.state {
            State::Planned => Some(self.prepare(relocation, &control, pair).await?),
            State::Copying => {
                let copied = Box::pin(self.copy(relocation, &control, pair, &admin, progress));
                unless_called_off(relocation, heard, copied).await?
            }
            State::CatchingUp => {
                let caught_up = Box::pin(self.catch_up(relocation, pair, &admin, progress));
                unless_called_off(relocation, heard, caught_up).await?
            }
            State::Verified => Some(State::Switching),
            State::Switching => self.switch(relocation, pair, &admin, progress, heard).await?,
            State::Switched if relocation.goal == Goal::Reversed => Some(State::Switching),
            State::Switched => Some(State::Finishing),
            State::Finishing => {
                let finished = Box::pin(finish::run(relocation, pair, &admin, progress));
                let finished = unless_called_off(relocation, heard, finished).await?;
                finished.map(|()| if relocation.goal == Goal::Reversed { State::Reversed } else { State::Done })
            }
            State::Done | State::Aborted | State::Reversed => return Ok(relocation.clone()),
        };
        let Some(next) = next else { return self.called_off(relocation, progress).await };
        fail::fail_point!("relocation.before_advance");
        // The work may have taken hours: the connection that began it may be gone by now.
        Records(&self.control().await?).advance(relocation, self.worker, next).await
    }

    /// What is known of one whose step was called off: it waits for nothing any more, and says so.
    async fn called_off(&self, relocation: &Relocation, progress: &Progress) -> Result<Relocation> {
        progress.say("");
        self.beat_once(relocation.relocation, progress, &mut None).await
    }

    /// Another relocation has taken some of the buckets away since this one was planned: nothing of it has begun, and it ends.
    async fn overtaken(&self, relocation: &Relocation, control: &Client) -> Result<Error> {
        let number = relocation.relocation;
        let aborted = Records(control).admit(relocation, self.worker, Goal::Aborted).await?;
        let is_undone = finish::undo(&aborted, &self.admin()?, Some(self.worker)).await?;
        self.after_undo(&aborted, is_undone).await?;
        let source = relocation.source;
        Ok(Error::refused(
            format!(
                "some of the buckets have left shard {source} since relocation {number} was planned; it is aborted"
            ),
            "plan it anew: run the same command again",
        ))
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
        let apart: serde_json::Value = match pair.source.one(begin, &source).await {
            Ok(row) => row.get(0),
            Err(error) if error.is_ownership() => return Err(self.overtaken(relocation, control).await?),
            Err(error) => return Err(error),
        };
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
        progress.reset(relocation.rows_total);
        let copied_nothing =
            "UPDATE therev.relocations SET rows_copied = 0, bytes_copied = 0 WHERE relocation = $1 AND worker = $2";
        control.execute(copied_nothing, &[&relocation.relocation, &self.worker]).await.map_err(at)?;
        let last = pair.target.part(relocation.relocation).await?.map_or(0, |part| part.round);
        let copy_round = Records(control).next_round(relocation.relocation, Some(self.worker), last).await?;
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
        for side in [&pair.source, &pair.target] {
            // Whoever began to undo it and did not come to the end has left no stream to wait for.
            side.must_have_part(relocation.relocation).await?;
        }
        let name = Stream::Forward.name(relocation);
        let errors = verify::stream_errors(&pair.target, &name).await?;
        loop {
            let Some(lag) = verify::lag_bytes(&pair.source, &pair.target, &name).await? else {
                let reason = format!("its slot on shard {} is gone", pair.source.shard);
                return Err(Error::Stream { database: pair.target.database(), reason });
            };
            progress.lag_bytes.store(lag, Ordering::Relaxed);
            if lag < CAUGHT_UP_BYTES {
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
            Ok(now) => !now.rests() && now.aim() == relocation.aim(),
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
        heard: &Heard,
    ) -> Result<Option<State>> {
        let told = |one: &Try| {
            tracing::debug!(relocation = one.relocation, attempt = one.attempt, steps = %one.told(), "a switch was tried");
            (self.on_try)(one);
        };
        let by = (self, heard);
        let Some(done) = switch::run(relocation, pair, relocation.budget(), progress, by, &told).await? else {
            return Ok(None);
        };
        progress.say("");
        self.note_switch(relocation, &done).await?;
        finish::record_placement(relocation, pair, admin).await?;
        fail::fail_point!("relocation.recorded");
        switch::turn_streams(relocation, pair).await?;
        finish::tell_home(relocation, pair, admin).await;
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

    async fn abort(&self, relocation: &Relocation, progress: &Progress, heard: &Heard) -> Result<Relocation> {
        let admin = self.admin()?;
        let undone = Box::pin(finish::undo(relocation, &admin, Some(self.worker)));
        match unless_called_off(relocation, heard, undone).await? {
            Some(is_undone) => self.after_undo(relocation, is_undone).await,
            None => self.called_off(relocation, progress).await,
        }
    }

    async fn after_undo(&self, relocation: &Relocation, is_undone: bool) -> Result<Relocation> {
        let control = self.control().await?;
        let records = Records(&control);
        if is_undone {
            finish::record_undone(relocation, &self.admin()?).await?;
            return records.advance(relocation, self.worker, State::Aborted).await;
        }
        // The switch was quicker than the wish to abort: it is carried through, and rests where the way back is open.
        records.admit(relocation, self.worker, Goal::Switched).await
    }
}
