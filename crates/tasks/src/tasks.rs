//! AI tasks of a user: create, look up, cancel. Writes tables `ai_tasks` and `ai_task_logs`.

use crate::Tasks;
use crate::accounts::Provider;
use crate::audit::{acting_user, audited};
use crate::check::{bounded, check_json, check_priority, check_range, check_text, word};
use chrono::{DateTime, Utc};
use community::{Actor, Community, Error, Result, words};
use placement::{AccountId, Bucket, Group, TaskId, UserId, new_id};
use serde::Serialize;
use serde_json::{Value, json};
use shards::{Read, Write};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

words! {
    /// What kind of work a task is.
    TaskType {
        /// To do something.
        Automation = "automation",
        /// To write or draw something.
        Generation = "generation",
        /// To find something out.
        Analysis = "analysis",
        /// To sum something up.
        Summarization = "summarization",
        /// To go somewhere.
        Navigation = "navigation",
        /// To fill a form in.
        FormFilling = "form_filling",
    }
}

words! {
    /// How far a task is.
    TaskStatus {
        /// Nobody has looked at it.
        Pending = "pending",
        /// It waits for its turn.
        Queued = "queued",
        /// An AI is at work on it.
        Running = "running",
        /// It waits for another attempt.
        Retrying = "retrying",
        /// It is done.
        Completed = "completed",
        /// It was given up.
        Failed = "failed",
        /// It was called off.
        Cancelled = "cancelled",
    }
}

words! {
    /// How much a line of a task's log matters.
    LogLevel {
        /// To those who look for an error.
        Debug = "DEBUG",
        /// To those who want to know what was done.
        Info = "INFO",
        /// Something was not as it should be.
        Warn = "WARN",
        /// An attempt failed.
        Error = "ERROR",
        /// The task failed.
        Fatal = "FATAL",
    }
}

/// An AI task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Task {
    /// Its id, which carries its owner's bucket.
    pub task_id: TaskId,
    /// Whose it is.
    pub user_id: UserId,
    /// What kind of work it is.
    pub task_type: TaskType,
    /// What it is meant to do, one of the table of intents; absent: nobody knows yet.
    pub intent: Option<String>,
    /// How sure that is, 0 to 1; absent: its owner said it.
    pub intent_confidence: Option<f32>,
    /// How the intent was found.
    pub routing: Value,
    /// 1 (first) to 10.
    pub priority: i16,
    /// How far it is.
    pub status: TaskStatus,
    /// What the AI is given.
    pub input: Value,
    /// What the AI gave.
    pub output: Option<Value>,
    /// Why the last attempt failed.
    pub error: Option<String>,
    /// The chosen provider.
    pub provider: Option<Provider>,
    /// The chosen account; it may have been removed since.
    pub account_id: Option<AccountId>,
    /// Why that one.
    pub choice_reason: Option<String>,
    /// What is tried one after the other.
    pub fallback: Value,
    /// Where in `fallback` it is.
    pub fallback_position: i16,
    /// How many attempts were begun.
    pub attempt: i32,
    /// How many attempts there may be.
    pub max_attempts: i32,
    /// It does not run before.
    pub run_after: DateTime<Utc>,
    /// It is of no use after.
    pub deadline: Option<DateTime<Utc>>,
    /// When its first attempt began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it was completed, given up or called off.
    pub finished_at: Option<DateTime<Utc>>,
    /// How long it waited.
    pub queued_ms: Option<i64>,
    /// How long the AI worked.
    pub run_ms: Option<i64>,
    /// What the provider counted.
    pub tokens_used: Option<i64>,
    /// What the provider asks for it, in millionths of a cent of its currency.
    pub cost_microcents: Option<i64>,
    /// When it was created.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Grows with every change.
    pub version: i64,
}

/// An AI task to be created.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// Chosen by the caller ([`TaskId::new`]), so that a retry is the same task; made when absent.
    pub task_id: Option<TaskId>,
    /// Whose it is.
    pub user_id: UserId,
    /// What kind of work it is.
    pub task_type: TaskType,
    /// What it is meant to do, one of the table of intents; absent: to be found out.
    pub intent: Option<String>,
    /// 1 (first) to 10.
    pub priority: i16,
    /// What the AI is given: any JSON of at most 1 MiB.
    pub input: Value,
    /// It does not run before; absent: it may run now.
    pub run_after: Option<DateTime<Utc>>,
    /// It is of no use after; not before `run_after`.
    pub deadline: Option<DateTime<Utc>>,
    /// How many attempts there may be, 1 to 100.
    pub max_attempts: i32,
}

impl NewTask {
    /// A task of middle priority that may run now, three times at most.
    pub fn new(user_id: UserId, task_type: TaskType, input: Value) -> NewTask {
        NewTask {
            task_id: None,
            user_id,
            task_type,
            intent: None,
            priority: 5,
            input,
            run_after: None,
            deadline: None,
            max_attempts: 3,
        }
    }
}

/// A line of a task's log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskLogEntry {
    /// Its id.
    pub log_id: Uuid,
    /// When.
    pub created_at: DateTime<Utc>,
    /// In which attempt; 0: in none.
    pub attempt: i32,
    /// How much it matters.
    pub level: LogLevel,
    /// The number of the step.
    pub step: Option<i32>,
    /// The name of the step.
    pub step_name: Option<String>,
    /// What happened.
    pub message: String,
    /// More of it.
    pub details: Value,
    /// The provider that was asked.
    pub provider: Option<Provider>,
    /// The account that was used.
    pub account_id: Option<AccountId>,
    /// How long it took.
    pub duration_ms: Option<i64>,
}

/// The longest name of an intent, in characters.
const INTENT_CHARS_MAX: usize = 63;
/// The most attempts of a task.
const ATTEMPTS_MAX: i32 = 100;

macro_rules! task_columns {
    () => {
        "t.task_id, t.user_id, t.task_type, t.intent, t.intent_confidence, t.routing, t.priority, t.status, t.input,
         t.output, t.error, t.provider, t.account_id, t.choice_reason, t.fallback, t.fallback_position, t.attempt,
         t.max_attempts, t.run_after, t.deadline, t.started_at, t.finished_at, t.queued_ms, t.run_ms, t.tokens_used,
         t.cost_microcents, t.created_at, t.updated_at, t.version"
    };
}

/// The task and the first line of its log. The row if it is new, else the one that is there; `is_same`: whether that is
/// what was asked for, in what nobody changes later. PostgreSQL compares, since jsonb writes some numbers otherwise.
///
/// The lock on the owner's row makes a deletion that is under way be waited for, and seen.
static CREATE: Write = Write::of_owner(
    Group::Account,
    concat!(
        "owner AS (
             SELECT u.user_id FROM users AS u, fence
              WHERE u.bucket = $1 AND u.user_id = $2 AND u.deleted_at IS NULL
                FOR SHARE OF u),
         created AS (
             INSERT INTO ai_tasks (bucket, user_id, task_id, task_type, intent, priority, input, run_after, deadline,
                                   max_attempts, version)
             SELECT $1, o.user_id, $3, $4, $5, $6, $7, coalesce($8, now()), $9, $10, fence.version_floor
               FROM owner AS o, fence
             ON CONFLICT (bucket, user_id, task_id) DO NOTHING
             RETURNING *),
         logged AS (
             INSERT INTO ai_task_logs (bucket, user_id, log_id, task_id, message)
             SELECT c.bucket, c.user_id, $11, c.task_id, 'task created' FROM created AS c),
         result AS (
             SELECT true AS is_same, ",
        task_columns!(),
        " FROM created AS t
             UNION ALL
             SELECT (t.task_type, t.input) = ($4, $7) AND ($5 IS NULL OR t.intent IS NOT DISTINCT FROM $5), ",
        task_columns!(),
        " FROM ai_tasks AS t, fence WHERE t.bucket = $1 AND t.user_id = $2 AND t.task_id = $3)"
    ),
);

static GET: Read = Read::by_id(
    Group::Account,
    "user_id",
    concat!("SELECT ", task_columns!(), " FROM ai_tasks AS t WHERE t.bucket = $1 AND t.task_id = $2"),
);

/// Newest first: ids sort by time, so that the primary key is the order.
static OF_USER: Read = Read::of_owner(
    Group::Account,
    concat!(
        "SELECT ",
        task_columns!(),
        " FROM ai_tasks AS t
          WHERE t.bucket = $1 AND t.user_id = $2 AND t.task_id < $3 AND ($4::text IS NULL OR t.status = $4)
          ORDER BY t.task_id DESC LIMIT $5"
    ),
);

/// `old` locks the task and holds what it is now, also when the snapshot is older: a worker that just claimed it is
/// seen. `$4` is the user who does it, null for an operator: calling one's own task off is not audited. `result` holds
/// the task as it has become, or as it was found.
static CANCEL: Write = Write::by_id(
    Group::Account,
    concat!(
        "old AS (
             SELECT t.* FROM ai_tasks AS t, fence
              WHERE t.bucket = $1 AND t.task_id = $2 AND therev.may_write(fence.here, t.bucket, t.user_id)
                FOR UPDATE OF t),
         cancelled AS (
             UPDATE ai_tasks AS t
                SET status = 'cancelled', finished_at = now(), updated_at = now(),
                    version = greatest(t.version + 1, fence.version_floor)
               FROM fence, old AS o
              WHERE t.bucket = $1 AND t.user_id = o.user_id AND t.task_id = o.task_id
                AND o.status IN ('pending', 'queued', 'retrying')
             RETURNING t.*),
         logged AS (
             INSERT INTO ai_task_logs (bucket, user_id, log_id, task_id, attempt, message, details)
             SELECT c.bucket, c.user_id, $5, c.task_id, c.attempt, 'task cancelled', $6 FROM cancelled AS c),
         change AS (
             SELECT c.bucket, c.user_id, 'task ' || c.task_id AS target,
                    jsonb_build_object('status', o.status) AS before, jsonb_build_object('status', c.status) AS after
               FROM cancelled AS c, old AS o
              WHERE c.user_id IS DISTINCT FROM $4::uuid),
         ",
        audited!("change", "$3"),
        ", result AS (
             SELECT true AS is_done, ",
        task_columns!(),
        " FROM cancelled AS t
             UNION ALL
             SELECT false, ",
        task_columns!(),
        " FROM old AS t WHERE NOT EXISTS (SELECT FROM cancelled))"
    ),
);

/// A task without lines is one row of nulls; no task, none.
static LOG: Read = Read::by_id(
    Group::Account,
    "user_id",
    "SELECT t.user_id, l.log_id, l.created_at, l.attempt, l.level, l.step, l.step_name, l.message, l.details, l.provider,
            l.account_id, l.duration_ms
       FROM ai_tasks AS t
       LEFT JOIN ai_task_logs AS l ON l.bucket = t.bucket AND l.task_id = t.task_id AND l.user_id = t.user_id
      WHERE t.bucket = $1 AND t.task_id = $2
      ORDER BY l.created_at, l.log_id LIMIT 10000",
)
.long();

community::fenced_list! { CREATE GET OF_USER CANCEL LOG }

impl Tasks {
    /// Creates an AI task, pending. The same id with the same type, intent and input again is the same task, as it is
    /// now.
    pub async fn create_task(&self, new: NewTask) -> Result<Task> {
        check(&new)?;
        let id = new.task_id.unwrap_or_else(|| TaskId::new(new.user_id));
        Community::check_id(id.0, new.user_id)?;
        let bucket = new.user_id.bucket();
        let (task_type, log_id) = (new.task_type.name(), new_id(bucket));
        let params: [&(dyn ToSql + Sync); 10] = [
            &new.user_id.0,
            &id.0,
            &task_type,
            &new.intent,
            &new.priority,
            &new.input,
            &new.run_after,
            &new.deadline,
            &new.max_attempts,
            &log_id,
        ];
        let Some(row) = self.write_again(&CREATE, bucket, &params).await? else {
            return Err(self.no_owner(new.user_id).await);
        };
        if row.get("is_same") { task_from(&row) } else { Err(Error::Conflict { what: "id", value: id.to_string() }) }
    }

    /// An AI task.
    pub async fn task(&self, id: TaskId) -> Result<Task> {
        let bucket = self.route(id).await?;
        let rows = self.community.shards().read(&GET, bucket, &[&id.0]).await?;
        task_from(rows.first().ok_or_else(|| no_task(id))?)
    }

    /// A user's AI tasks, newest first, before `before` when it is given; of one status when it is given. 1,000 at most.
    pub async fn tasks(
        &self,
        user: UserId,
        status: Option<TaskStatus>,
        before: Option<TaskId>,
        limit: i64,
    ) -> Result<Vec<Task>> {
        let (status, before) = (status.map(TaskStatus::name), before.map_or(Uuid::max(), |id| id.0));
        let params: [&(dyn ToSql + Sync); 4] = [&user.0, &before, &status, &bounded(limit)];
        let rows = self.community.shards().read(&OF_USER, user.bucket(), &params).await?;
        rows.iter().map(task_from).collect()
    }

    /// Calls a task off that is not running and has not ended. Calling somebody else's off is audited.
    pub async fn cancel_task(&self, id: TaskId, actor: &Actor) -> Result<Task> {
        let bucket = self.route(id).await?;
        let (note, log_id) = (actor.note("cancel task"), new_id(bucket));
        let by = json!({ "by": actor.to_string() });
        let params: [&(dyn ToSql + Sync); 5] = [&id.0, &note, &acting_user(actor), &log_id, &by];
        let rows = self.community.shards().write(&CANCEL, bucket, &params).await?;
        let row = rows.first().ok_or_else(|| no_task(id))?;
        let task = task_from(row)?;
        if row.get("is_done") {
            return Ok(task);
        }
        Err(Error::State { what: "task", id: id.to_string(), state: task.status.to_string() })
    }

    /// What happened to a task, in order; the first 10,000 lines.
    pub async fn task_log(&self, id: TaskId) -> Result<Vec<TaskLogEntry>> {
        let bucket = self.route(id).await?;
        let rows = self.community.shards().read(&LOG, bucket, &[&id.0]).await?;
        if rows.is_empty() {
            return Err(no_task(id));
        }
        rows.iter().filter(|row| row.get::<_, Option<Uuid>>("log_id").is_some()).map(log_entry_from).collect()
    }

    async fn route(&self, id: TaskId) -> Result<Bucket> {
        self.community.route("task", id.0).await
    }
}

fn check(new: &NewTask) -> Result<()> {
    if let Some(intent) = &new.intent {
        check_text("intent", intent, INTENT_CHARS_MAX)?;
    }
    check_priority(new.priority)?;
    check_range("max_attempts", new.max_attempts, ATTEMPTS_MAX)?;
    check_json("input", &new.input)?;
    check_time("run_after", new.run_after)?;
    check_time("deadline", new.deadline)?;
    if let (Some(run_after), Some(deadline)) = (new.run_after, new.deadline)
        && deadline < run_after
    {
        return Err(crate::check::invalid("deadline", "it is before run_after"));
    }
    Ok(())
}

/// A time that anybody may mean, and that PostgreSQL can hold.
fn check_time(field: &'static str, at: Option<DateTime<Utc>>) -> Result<()> {
    let year = at.map_or(2000, |at| chrono::Datelike::year(&at));
    if (1970..=9999).contains(&year) {
        return Ok(());
    }
    Err(crate::check::invalid(field, "only the years 1970 to 9999 are allowed"))
}

fn no_task(id: TaskId) -> Error {
    Error::NotFound { what: "task", id: id.to_string() }
}

fn task_from(row: &Row) -> Result<Task> {
    Ok(Task {
        task_id: TaskId(row.get("task_id")),
        user_id: UserId(row.get("user_id")),
        task_type: word(row.get("task_type"))?,
        intent: row.get("intent"),
        intent_confidence: row.get("intent_confidence"),
        routing: row.get("routing"),
        priority: row.get("priority"),
        status: word(row.get("status"))?,
        input: row.get("input"),
        output: row.get("output"),
        error: row.get("error"),
        provider: row.get::<_, Option<&str>>("provider").map(word).transpose()?,
        account_id: row.get::<_, Option<Uuid>>("account_id").map(AccountId),
        choice_reason: row.get("choice_reason"),
        fallback: row.get("fallback"),
        fallback_position: row.get("fallback_position"),
        attempt: row.get("attempt"),
        max_attempts: row.get("max_attempts"),
        run_after: row.get("run_after"),
        deadline: row.get("deadline"),
        started_at: row.get("started_at"),
        finished_at: row.get("finished_at"),
        queued_ms: row.get("queued_ms"),
        run_ms: row.get("run_ms"),
        tokens_used: row.get("tokens_used"),
        cost_microcents: row.get("cost_microcents"),
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
        version: row.get("version"),
    })
}

fn log_entry_from(row: &Row) -> Result<TaskLogEntry> {
    Ok(TaskLogEntry {
        log_id: row.get("log_id"),
        created_at: row.get("created_at"),
        attempt: row.get("attempt"),
        level: word(row.get("level"))?,
        step: row.get("step"),
        step_name: row.get("step_name"),
        message: row.get("message"),
        details: row.get("details"),
        provider: row.get::<_, Option<&str>>("provider").map(word).transpose()?,
        account_id: row.get::<_, Option<Uuid>>("account_id").map(AccountId),
        duration_ms: row.get("duration_ms"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(new: NewTask) -> String {
        check(&new).unwrap_err().to_string()
    }

    #[test]
    fn a_new_task_is_checked_field_by_field() {
        let new = || NewTask::new(UserId::new(), TaskType::Analysis, json!({ "text": "hello" }));
        check(&new()).unwrap();
        let now = DateTime::from_timestamp(1_800_000_000, 0);
        let before = now.map(|at| at - chrono::TimeDelta::seconds(1));
        assert_eq!(refused(NewTask { intent: Some(String::new()), ..new() }), "intent: it is empty");
        assert_eq!(refused(NewTask { priority: 11, ..new() }), "priority: it is 11, 1 to 10 are allowed");
        assert_eq!(refused(NewTask { max_attempts: 0, ..new() }), "max_attempts: it is 0, 1 to 100 are allowed");
        assert_eq!(refused(NewTask { input: json!(["\0"]), ..new() }), "input: it holds a NUL character");
        let early = NewTask { run_after: now, deadline: before, ..new() };
        assert_eq!(refused(early), "deadline: it is before run_after");
        let never = NewTask { run_after: Some(DateTime::<Utc>::MAX_UTC), ..new() };
        assert_eq!(refused(never), "run_after: only the years 1970 to 9999 are allowed");
    }

    #[test]
    fn words_are_those_of_the_schema() {
        let schema = include_str!("../../../schema/shard/03_account.sql");
        let words = TaskType::ALL.iter().map(|w| w.name()).chain(TaskStatus::ALL.iter().map(|w| w.name()));
        for word in words.chain(LogLevel::ALL.iter().map(|w| w.name())) {
            assert!(schema.contains(&format!("'{word}'")), "{word}");
        }
    }
}
