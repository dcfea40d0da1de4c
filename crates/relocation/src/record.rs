//! A relocation as the control database keeps it.

use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
use placement::{Bucket, Group, ShardNo, UserId};
use serde::{Deserialize, Serialize};
use shards::Database;
use std::time::Duration;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// Its name in SQL, on the command line and in JSON.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }

            fn of(text: &str) -> Option<$name> {
                match text { $($text => Some($name::$variant),)* _ => None }
            }
        }
    };
}

named! {
    /// How far a relocation is.
    State {
        /// Nothing was done yet.
        Planned = "planned",
        /// Rows are copied; a copy that broke off begins anew.
        Copying = "copying",
        /// What was written since the copy began is on its way.
        CatchingUp = "catching_up",
        /// Both sides were compared, row by row.
        Verified = "verified",
        /// The buckets change hands, or did.
        Switching = "switching",
        /// The other side owns them; the way back is open.
        Switched = "switched",
        /// What is left on the side that gave them away is being removed.
        Finishing = "finishing",
        /// Nothing is left but this row.
        Done = "done",
        /// Undone before the switch.
        Aborted = "aborted",
        /// Gone back after the switch.
        Reversed = "reversed",
    }
}

named! {
    /// What the operator wants of a relocation.
    Goal {
        /// That it is carried through.
        Done = "done",
        /// That it stops where the way back is open.
        Switched = "switched",
        /// That it is undone; before the switch.
        Aborted = "aborted",
        /// That the buckets go back; after the switch.
        Reversed = "reversed",
    }
}

impl State {
    /// Whether nothing more happens.
    pub fn is_over(self) -> bool {
        matches!(self, State::Done | State::Aborted | State::Reversed)
    }
}

/// A user of moving buckets who is placed apart, and does not move along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apart {
    /// In which group.
    pub colocation_group: Group,
    /// Who.
    pub user_id: UserId,
    /// Since which epoch.
    pub epoch: i64,
    /// Where the user is.
    pub shard: ShardNo,
}

/// One relocation.
#[derive(Debug, Clone, Serialize)]
pub struct Relocation {
    /// Its number.
    pub relocation: i64,
    /// In the names of its slots, publications and subscriptions.
    pub tag: String,
    /// The colocation groups that move.
    pub groups: Vec<Group>,
    /// The buckets that move.
    pub buckets: Vec<Bucket>,
    /// Of its one bucket this user alone.
    pub pin: Option<UserId>,
    /// Who of the buckets is placed apart and does not move along.
    pub apart: Vec<Apart>,
    /// The shard that has them at first.
    pub source: ShardNo,
    /// The shard that gets them.
    pub target: ShardNo,
    /// How far it is.
    pub state: State,
    /// What is wanted of it.
    pub goal: Goal,
    /// Whether it rests where it is.
    pub is_paused: bool,
    #[serde(skip)]
    pub(crate) source_life: Option<Uuid>,
    #[serde(skip)]
    pub(crate) target_life: Option<Uuid>,
    #[serde(skip)]
    pub(crate) copy_round: i32,
    /// How many rows there were when the copy began.
    pub rows_total: i64,
    /// How many of them are copied.
    pub rows_copied: i64,
    /// How many bytes that took, in PostgreSQL's binary form.
    pub bytes_copied: i64,
    /// How far the other side is behind, in bytes of the log.
    pub lag_bytes: Option<i64>,
    /// What it waits for, or why it is slow.
    pub note: String,
    /// How often the switch was tried.
    pub attempts: i32,
    /// How long writes to these buckets waited in the try that succeeded, in milliseconds.
    pub pause_ms: Option<f64>,
    /// How long they may wait in a try, in milliseconds; see [`crate::Options::budget`].
    pub budget_ms: i32,
    /// Whether a process works at it now.
    pub has_worker: bool,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When something was last heard of it.
    pub updated_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
}

const COLUMNS: &str = "
    r.relocation, r.tag, r.groups, r.buckets, r.pin, r.apart, r.source, r.target, r.state, r.goal, r.is_paused, r.source_life,
    r.target_life, r.copy_round, r.rows_total, r.rows_copied, r.bytes_copied, r.lag_bytes, r.note, r.attempts,
    r.pause_ms, r.budget_ms, r.created_at, r.updated_at, r.ended_at, coalesce(r.leased_until > now(), false) AS has_worker";

impl Relocation {
    fn of(row: &Row) -> Result<Relocation> {
        let odd = |reason: &str| shards::Error::Answer { database: Database::Control, reason: reason.to_owned() };
        let groups: Vec<&str> = row.get("groups");
        let buckets: Vec<i16> = row.get("buckets");
        let groups = groups.into_iter().map(str::parse).collect::<std::result::Result<_, _>>();
        let buckets = buckets.into_iter().map(Bucket::try_from).collect::<std::result::Result<_, _>>();
        Ok(Relocation {
            relocation: row.get("relocation"),
            tag: row.get("tag"),
            groups: groups.map_err(|_| odd("a relocation of an unknown group"))?,
            buckets: buckets.map_err(|_| odd("a relocation of an unknown bucket"))?,
            pin: row.get::<_, Option<Uuid>>("pin").map(UserId),
            apart: serde_json::from_value(row.get("apart")).map_err(|_| odd("a relocation with odd people apart"))?,
            source: ShardNo(row.get("source")),
            target: ShardNo(row.get("target")),
            state: State::of(row.get("state")).ok_or_else(|| odd("a relocation in an unknown state"))?,
            goal: Goal::of(row.get("goal")).ok_or_else(|| odd("a relocation with an unknown goal"))?,
            is_paused: row.get("is_paused"),
            source_life: row.get("source_life"),
            target_life: row.get("target_life"),
            copy_round: row.get("copy_round"),
            rows_total: row.get("rows_total"),
            rows_copied: row.get("rows_copied"),
            bytes_copied: row.get("bytes_copied"),
            lag_bytes: row.get("lag_bytes"),
            note: row.get("note"),
            attempts: row.get("attempts"),
            pause_ms: row.get("pause_ms"),
            budget_ms: row.get("budget_ms"),
            has_worker: row.get("has_worker"),
            created_at: row.get("created_at"),
            updated_at: row.get("updated_at"),
            ended_at: row.get("ended_at"),
        })
    }

    /// The group names, for SQL.
    pub(crate) fn group_names(&self) -> Vec<&'static str> {
        self.groups.iter().map(|group| group.name()).collect()
    }

    /// The bucket numbers, for SQL.
    pub(crate) fn bucket_numbers(&self) -> Vec<i16> {
        self.buckets.iter().map(|bucket| bucket.sql()).collect()
    }

    /// Of the rows of its buckets in a table of this group with this owner's column, those that move: what follows `bucket = …`.
    pub(crate) fn whose(&self, group: &str, owner: &str) -> String {
        whose(self.pin, &self.apart, group, owner)
    }

    /// Which shard is to own the buckets in the end.
    pub(crate) fn owner_wanted(&self) -> ShardNo {
        if matches!(self.goal, Goal::Aborted | Goal::Reversed) { self.source } else { self.target }
    }

    /// How long writers may be kept waiting by one try of the switch.
    pub(crate) fn budget(&self) -> Duration {
        Duration::from_millis(self.budget_ms.unsigned_abs().into())
    }

    /// What is wanted, as far as a step under way goes by it: who is to own the buckets, and whether only what was begun is to be
    /// undone.
    pub(crate) fn aim(&self) -> (ShardNo, bool) {
        (self.owner_wanted(), self.goal == Goal::Aborted)
    }

    /// Whether there is nothing to do for a worker now.
    pub fn rests(&self) -> bool {
        self.state.is_over() || self.is_paused || (self.state == State::Switched && self.goal == Goal::Switched)
    }
}

/// Of a bucket's rows, those of the one user who moves, or of all but those placed apart.
pub(crate) fn whose(pin: Option<UserId>, apart: &[Apart], group: &str, owner: &str) -> String {
    if let Some(user) = pin {
        return format!(" AND {owner} = '{}'", user.0);
    }
    let others = apart.iter().filter(|one| one.colocation_group.name() == group);
    let others: Vec<String> = others.map(|one| one.user_id.0.to_string()).collect();
    if others.is_empty() { String::new() } else { format!(" AND {owner} <> ALL ('{{{}}}'::uuid[])", others.join(",")) }
}

/// The control database's relocations, through one connection.
pub(crate) struct Records<'a>(pub(crate) &'a Client);

impl Records<'_> {
    async fn query(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Relocation>> {
        let rows = self.0.query(sql, params).await;
        let rows = rows.map_err(|source| Error::Sql { database: Database::Control, source })?;
        rows.iter().map(Relocation::of).collect()
    }

    /// All of them, the newest first; only those under way when `open`.
    pub(crate) async fn list(&self, open: bool) -> Result<Vec<Relocation>> {
        let sql = format!(
            "SELECT {COLUMNS} FROM therev.relocations AS r
              WHERE r.ended_at IS NULL OR NOT $1 ORDER BY r.relocation DESC"
        );
        self.query(&sql, &[&open]).await
    }

    pub(crate) async fn get(&self, number: i64) -> Result<Relocation> {
        let sql = format!("SELECT {COLUMNS} FROM therev.relocations AS r WHERE r.relocation = $1");
        self.query(&sql, &[&number]).await?.pop().ok_or(Error::Unknown(number))
    }

    /// Takes the work at a relocation for a few seconds, if nobody else has it.
    pub(crate) async fn take(&self, number: i64, worker: Uuid, lease_s: f64) -> Result<Relocation> {
        let sql = format!(
            "UPDATE therev.relocations AS r
                SET worker = $2, leased_until = now() + make_interval(secs => $3), updated_at = now()
              WHERE r.relocation = $1 AND (r.worker = $2 OR coalesce(r.leased_until < now(), true))
             RETURNING {COLUMNS}"
        );
        match self.query(&sql, &[&number, &worker, &lease_s]).await?.pop() {
            Some(taken) => Ok(taken),
            None => self.get(number).await.and(Err(Error::Taken(number))),
        }
    }

    /// Gives the work back: whoever comes next need not wait.
    pub(crate) async fn give_back(&self, number: i64, worker: Uuid) -> Result<()> {
        let sql = "UPDATE therev.relocations SET worker = NULL, leased_until = NULL, lag_bytes = NULL
                    WHERE relocation = $1 AND worker = $2";
        let done = self.0.execute(sql, &[&number, &worker]).await;
        done.map(drop).map_err(|source| Error::Sql { database: Database::Control, source })
    }

    /// From one state to another, by the one who has the work.
    pub(crate) async fn advance(&self, before: &Relocation, worker: Uuid, after: State) -> Result<Relocation> {
        let sql = format!(
            "UPDATE therev.relocations AS r
                SET state = $4, note = '', updated_at = now(),
                    ended_at = CASE WHEN $4 IN ('done', 'aborted', 'reversed') THEN now() END
              WHERE r.relocation = $1 AND r.worker = $2 AND r.state = $3
             RETURNING {COLUMNS}"
        );
        let params: [&(dyn ToSql + Sync); 4] = [&before.relocation, &worker, &before.state.name(), &after.name()];
        self.query(&sql, &params).await?.pop().ok_or(Error::Taken(before.relocation))
    }

    /// Changes what is wanted of it, as long as it is in one of these states. To abort a way back is to stay where the switch led.
    pub(crate) async fn set_goal(&self, number: i64, goal: Goal, states: &[State]) -> Result<Option<Relocation>> {
        let sql = format!(
            "UPDATE therev.relocations AS r
                SET goal = CASE WHEN $2 = 'aborted' AND r.goal = 'reversed' THEN 'switched' ELSE $2 END,
                    is_paused = false, updated_at = now()
              WHERE r.relocation = $1 AND r.state = ANY ($3) RETURNING {COLUMNS}"
        );
        let states: Vec<&str> = states.iter().map(|state| state.name()).collect();
        Ok(self.query(&sql, &[&number, &goal.name(), &states]).await?.pop())
    }

    /// What the shards have made of it, where that is not what was worked for: told by the one who has the work. What people have come
    /// to want of it meanwhile stays.
    pub(crate) async fn admit(&self, before: &Relocation, worker: Uuid, goal: Goal) -> Result<Relocation> {
        let sql = format!(
            "UPDATE therev.relocations AS r
                SET goal = CASE WHEN r.goal = $4 THEN $5 ELSE r.goal END, updated_at = now()
              WHERE r.relocation = $1 AND r.worker = $2 AND r.state = $3
             RETURNING {COLUMNS}"
        );
        let params: [&(dyn ToSql + Sync); 5] =
            [&before.relocation, &worker, &before.state.name(), &before.goal.name(), &goal.name()];
        self.query(&sql, &params).await?.pop().ok_or(Error::Taken(before.relocation))
    }

    /// The next round of a relocation, of a copy or of the undoing of one: no two have the same, and it is a later one than `last`, which
    /// the target was seen in. There is none for a worker whose it is no more; without a worker, it is over.
    pub(crate) async fn next_round(&self, number: i64, worker: Option<Uuid>, last: i32) -> Result<i32> {
        let sql = format!(
            "UPDATE therev.relocations AS r SET copy_round = greatest(r.copy_round, $3) + 1
              WHERE r.relocation = $1 AND (CASE WHEN $2::uuid IS NULL THEN r.ended_at IS NOT NULL ELSE r.worker = $2 END)
              RETURNING {COLUMNS}"
        );
        let taken = self.query(&sql, &[&number, &worker, &last]).await?.pop();
        taken.map(|of| of.copy_round).ok_or(Error::Taken(number))
    }

    /// Has it rest, or go on.
    pub(crate) async fn set_paused(&self, number: i64, is_paused: bool) -> Result<Relocation> {
        let sql = format!(
            "UPDATE therev.relocations AS r SET is_paused = $2, updated_at = now()
              WHERE r.relocation = $1 AND r.ended_at IS NULL RETURNING {COLUMNS}"
        );
        match self.query(&sql, &[&number, &is_paused]).await?.pop() {
            Some(changed) => Ok(changed),
            None => Err(over(&self.get(number).await?)),
        }
    }
}

/// Nothing can be wanted of what has ended.
pub(crate) fn over(ended: &Relocation) -> Error {
    Error::refused(
        format!("relocation {} is {}", ended.relocation, ended.state.name()),
        "`therev relocation show` says what became of it",
    )
}
