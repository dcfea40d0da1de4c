//! Writers: processes that append numbers to histories, whatever happens.
//!
//! Each user belongs to one writer, which appends one number after the other: the next one only when the last was
//! acknowledged. The number, and the id of its post, are in the journal before the first try; every further try, in this
//! life or a later one, is the same create.

use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use therev::{Actor, Config, Layout, Map, NewPost, NewUser, PostId, Therev, ThreadId, UserId};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

use crate::journal::{Append, Event, Journal, Journals, now};

/// What a writer writes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// The library, as it is.
    Library,
    /// The library with a placement that is wrong again and again.
    Stale,
    /// SQL, as psql would: into the shard where it last found the user, and into the others where it is refused.
    Stranger,
    /// SQL right into one shard after the other, whoever owns the user: all but the owner must refuse it.
    Intruder,
    /// No writer: it moves the others' users from shard to shard.
    Mover,
}

impl Kind {
    /// Whether it appends numbers to histories.
    pub(crate) fn appends(self) -> bool {
        !matches!(self, Kind::Intruder | Kind::Mover)
    }
}

/// A user and what it writes to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct History {
    pub(crate) user: UserId,
    pub(crate) thread: ThreadId,
    pub(crate) thread_author: UserId,
    /// The shard that owns the user at first.
    pub(crate) shard: usize,
}

/// All that a writer or a mover is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) kind: Kind,
    pub(crate) journal: PathBuf,
    pub(crate) histories: Vec<History>,
    pub(crate) control: String,
    pub(crate) password: String,
    pub(crate) state_file: PathBuf,
    /// The shards' addresses by a superuser.
    pub(crate) shards: Vec<String>,
}

/// How long a writer's call may take: less than some stalls do.
const DEADLINE_MS: u64 = 1_000;
/// How long a connection may take.
const CONNECT_MS: u64 = 2_000;
/// Longer than anything takes that has a deadline: a create asks three times, each within its deadline.
pub(crate) const HANGS: Duration = Duration::from_secs(30);
/// Between two appends to one history: what is written is copied with every promotion.
const PACE: Duration = Duration::from_millis(200);
/// Between two tries of the same append.
const AGAIN: Duration = Duration::from_millis(25);
/// How long the last append is tried after the writer was told to end.
const LAST_TRIES: Duration = Duration::from_secs(15);
/// How often a writer with a bad memory forgets where everything is.
const FORGETS_EVERY: u64 = 7;
/// How often a writer registers somebody: names are decided on two shards.
const REGISTERS_EVERY: u64 = 10;
/// The guard's refusal of a row whose bucket is not owned.
const NOT_OWNED: &str = "TR001";

/// How the nodes of this program reach the cluster.
pub(crate) fn config(control: &str, password: &str) -> Config {
    Config {
        password: Some(password.into()),
        connect_timeout_ms: CONNECT_MS,
        breaker_ms: 100,
        refresh_ms: 500,
        pool_size: Some(4),
        ..Config::new(control)
    }
}

/// A post's text: its number, and as much behind it as makes pages of a table fill.
pub(crate) fn body(number: u64) -> String {
    format!("{number} {}", "x".repeat(usize::try_from(number * 97 % 600).unwrap_or(0)))
}

/// The number in a post's text.
pub(crate) fn number_in(body: Option<&str>) -> Option<u64> {
    body?.split(' ').next()?.parse().ok()
}

/// A writer's whole life. It ends soon after its standard input does, and so never outlives who started it.
pub(crate) async fn live(spec: Spec) -> Result<(), Box<dyn std::error::Error>> {
    let end = end_of_input();
    let mut known = Journals::of([spec.journal.clone()]);
    known.read_on()?;
    let journal = Arc::new(Mutex::new(Journal::append_to(&spec.journal)?));
    let node = match spec.kind {
        Kind::Library | Kind::Stale => match connect(&spec, &end, CONNECT_MS).await {
            Some(node) => Some(node),
            None => return Ok(()),
        },
        Kind::Stranger | Kind::Intruder | Kind::Mover => None,
    };
    let tasks = spec.histories.iter().map(|history| {
        let writer = Writer {
            kind: spec.kind,
            history: history.clone(),
            node: node.clone(),
            shards: spec.shards.clone(),
            journal: journal.clone(),
            end: end.clone(),
        };
        let appends = known.appends.remove(&history.user).unwrap_or_default();
        tokio::spawn(async move {
            match writer.kind {
                Kind::Intruder => writer.intrude().await,
                Kind::Mover => Ok(()),
                _ => writer.append_all(appends).await,
            }
        })
    });
    for outcome in join_all(tasks).await {
        outcome??;
    }
    Ok(())
}

/// Told when standard input ends.
pub(crate) fn end_of_input() -> watch::Receiver<bool> {
    let (tell_end, end) = watch::channel(false);
    std::thread::spawn(move || {
        std::io::stdin().read_to_end(&mut Vec::new()).ok();
        tell_end.send_replace(true);
    });
    end
}

/// A node, as soon as there is a way to one: with neither control database nor state file there is none.
pub(crate) async fn connect(spec: &Spec, end: &watch::Receiver<bool>, connect_timeout_ms: u64) -> Option<Therev> {
    let config = config(&spec.control, &spec.password);
    let mut config = Config { connect_timeout_ms, ..config };
    config.deadline_ms = DEADLINE_MS;
    config.state_file = Some(spec.state_file.clone());
    while !*end.borrow() {
        match therev::connect(config.clone()).await {
            Ok(node) => return Some(node),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
    None
}

/// One history's writer.
struct Writer {
    kind: Kind,
    history: History,
    node: Option<Therev>,
    shards: Vec<String>,
    journal: Arc<Mutex<Journal>>,
    end: watch::Receiver<bool>,
}

impl Writer {
    async fn append_all(mut self, appends: Vec<Append>) -> std::io::Result<()> {
        let user = self.history.user;
        let mut last = appends.last().map(|append| append.post);
        let mut number = appends.len() as u64;
        // What an earlier life left open comes first.
        let mut open = appends.last().filter(|append| append.acknowledged_at.is_none()).map(|append| append.post);
        let mut client = None;
        loop {
            let post = if let Some(post) = open.take() {
                number -= 1;
                post
            } else {
                if *self.end.borrow() {
                    return Ok(());
                }
                let post = later_id(user, last).await;
                self.note(&Event::Try { user, number, post, at: now() })?;
                post
            };
            if !self.append(number, post, &mut client).await? {
                return Ok(());
            }
            self.note(&Event::Acknowledged { user, number, at: now() })?;
            if number % REGISTERS_EVERY == REGISTERS_EVERY - 1 && !self.register().await? {
                return Ok(());
            }
            (last, number) = (Some(post), number + 1);
            self.rest(PACE).await;
        }
    }

    /// Tries until it is acknowledged; false where the end came first.
    async fn append(&mut self, number: u64, post: PostId, client: &mut Option<Client>) -> std::io::Result<bool> {
        let mut ends = self.end.clone();
        let last_tries = async {
            // An error: who tells the end is gone, which is one.
            ends.wait_for(|end| *end).await.ok();
            tokio::time::sleep(LAST_TRIES).await;
        };
        tokio::pin!(last_tries);
        loop {
            if let (Kind::Stale, Some(node)) = (self.kind, &self.node)
                && number.is_multiple_of(FORGETS_EVERY)
            {
                // Everything on the first shard, or on the first two.
                let shards = if number.is_multiple_of(2) { 1 } else { 2 };
                node.shards().forget_placement(Map::first(Layout::Colocated, shards));
            }
            let tried = tokio::time::timeout(HANGS, self.try_once(number, post, client));
            let outcome = tokio::select! {
                outcome = tried => outcome,
                () = &mut last_tries => return Ok(false),
            };
            match outcome {
                Ok(Ok(())) => return Ok(true),
                Ok(Err(event)) => self.note(&event)?,
                Err(_) => self.note(&Event::Hung { what: format!("append {number} of {}", self.history.user) })?,
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Registers a new user until it is acknowledged; false where the end came first. A life that ends within leaves a
    /// name that is pending, and nothing that anybody relied on.
    async fn register(&mut self) -> std::io::Result<bool> {
        let Some(node) = self.node.clone() else { return Ok(true) };
        let user = UserId::new();
        // As no other name: the end of the id is random.
        let name = format!("of-{}", &user.0.simple().to_string()[12..]);
        let new = NewUser { user_id: Some(user), user_name: name.clone(), ..NewUser::default() };
        loop {
            match tokio::time::timeout(HANGS, node.register(new.clone(), &Actor::Operator("nemesis".into()))).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => self.note(&failed(&error))?,
                Err(_) => self.note(&Event::Hung { what: format!("registering {name}") })?,
            }
            if *self.end.borrow() {
                return Ok(false);
            }
            tokio::time::sleep(AGAIN).await;
        }
        self.note(&Event::Registered { user, name })?;
        Ok(true)
    }

    async fn try_once(&mut self, number: u64, post: PostId, client: &mut Option<Client>) -> Result<(), Event> {
        let History { user, thread, shard, .. } = self.history;
        if let Some(node) = &self.node {
            let new = NewPost { post_id: Some(post), ..NewPost::new(user, thread, body(number)) };
            return node.create_post(new).await.map(drop).map_err(|error| failed(&error));
        }
        self.insert(shard, number, post, client).await.map_err(|error| {
            if is_refusal(&error) {
                // The user may have moved.
                (self.history.shard, *client) = ((shard + 1) % self.shards.len(), None);
                return Event::Refused;
            }
            failed_sql(&error)
        })
    }

    /// Inserts with SQL, over a connection that is kept while it works.
    async fn insert(
        &self,
        shard: usize,
        number: u64,
        post: PostId,
        client: &mut Option<Client>,
    ) -> Result<(), tokio_postgres::Error> {
        let History { user, thread, thread_author, .. } = &self.history;
        let open = match client.take() {
            Some(open) => open,
            None => connect_to(&self.shards[shard]).await?,
        };
        let sql = "INSERT INTO posts (author_id, post_id, thread_id, thread_author_id, body)
                   VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING";
        open.execute(sql, &[&user.0, &post.0, &thread.0, &thread_author.0, &body(number)]).await?;
        *client = Some(open);
        Ok(())
    }

    /// Tries one shard after the other. Who is let in was let in by the owner: in the end the row is there, and once.
    async fn intrude(mut self) -> std::io::Result<()> {
        let user = self.history.user;
        for shard in (0..self.shards.len()).cycle() {
            if *self.end.borrow() {
                break;
            }
            let post = PostId::new(user);
            match tokio::time::timeout(HANGS, self.insert(shard, 0, post, &mut None)).await {
                Ok(Ok(())) => self.note(&Event::LetIn { user, post })?,
                Ok(Err(error)) if is_refusal(&error) => self.note(&Event::Refused)?,
                // Whatever is broken; nothing is expected of it meanwhile.
                Ok(Err(error)) => {
                    if let odd @ Event::Odd { .. } = failed_sql(&error) {
                        self.note(&odd)?;
                    }
                }
                Err(_) => self.note(&Event::Hung { what: format!("an intruder's row of {user}") })?,
            }
            self.rest(4 * PACE).await;
        }
        Ok(())
    }

    /// Waits, unless the end comes.
    async fn rest(&mut self, time: Duration) {
        tokio::time::timeout(time, self.end.wait_for(|end| *end)).await.ok();
    }

    fn note(&self, event: &Event) -> std::io::Result<()> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).write(event)
    }
}

/// Whether a shard refused a row because it does not own it.
fn is_refusal(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == NOT_OWNED)
}

/// A connection with a deadline for each statement, as therev's own have.
pub(crate) async fn connect_to(address: &str) -> Result<Client, tokio_postgres::Error> {
    let mut config: tokio_postgres::Config = address.parse()?;
    config.options(format!("-c statement_timeout={DEADLINE_MS}"));
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// An id that sorts after the last one: two made within a millisecond sort by chance.
async fn later_id(user: UserId, last: Option<PostId>) -> PostId {
    loop {
        let post = PostId::new(user);
        if last.is_none_or(|last| last < post) {
            return post;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Whether a server refuses statements with this because something is broken: it ends or begins, a statement took too long,
/// the disk is full, connections are used up, it is a standby. Anything else would be a fault of the store.
fn is_of_a_fault(code: &str) -> bool {
    matches!(code, "57014" | "57P01" | "57P02" | "57P03" | "25006") || code.starts_with("53") || code.starts_with("08")
}

/// What became of a statement of somebody who has no library.
fn failed_sql(error: &tokio_postgres::Error) -> Event {
    match error.code().map(tokio_postgres::error::SqlState::code) {
        None => Event::Failed { kind: "connection".into() },
        Some(code) if is_of_a_fault(code) => Event::Failed { kind: format!("stranger {code}") },
        Some(code) => Event::Odd { what: format!("stranger {code}: {error:?}") },
    }
}

/// Whether an error is one that calls may end with while something is broken.
pub(crate) fn failed(error: &therev::Error) -> Event {
    let kind = error.kind();
    let refused = match error {
        therev::Error::Store(error) => error.sql_error(),
        _ => None,
    };
    let code = refused.map(|refused| refused.code().code());
    let is_expected = ["down", "closed", "outcome_unknown", "deadline", "sql", "changed"].contains(&kind);
    if !is_expected || !code.is_none_or(is_of_a_fault) {
        let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
        return Event::Odd { what: format!("{kind}: {error}{cause}") };
    }
    Event::Failed { kind: code.map_or(kind.to_owned(), |code| format!("{kind} {code}")) }
}
