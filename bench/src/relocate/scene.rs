//! Whose buckets move, and who else is there.

use super::traffic::{Calls, Traffic};
use crate::Anyhow;
use crate::cluster::Databases;
use crate::ground::Ground;
use crate::writes::BODY;
use std::sync::Arc;
use therev::relocation::Request;
use therev::{Bucket, Group, NewPost, ShardNo, Therev, ThreadId, UserId};

/// How many callers write to the moving buckets, and how often in a second all together.
const WRITERS: (u32, u32) = (16, 500);
/// The same of those who read there.
const READERS: (u32, u32) = (8, 100);
/// The same of the other users of both shards, who read and write in turn.
const OTHERS: (u32, u32) = (4, 200);

/// Some buckets on their way between two shards.
#[derive(Clone)]
pub(crate) struct Scene {
    node: Therev,
    pub(crate) source: ShardNo,
    pub(crate) target: ShardNo,
    pub(crate) buckets: Vec<Bucket>,
    /// The users of these buckets.
    pub(crate) moving: Arc<Vec<UserId>>,
    /// The other users of both shards.
    pub(crate) others: Arc<Vec<UserId>>,
    /// Threads of others.
    threads: Arc<Vec<ThreadId>>,
}

/// Everybody at work.
pub(crate) struct Everybody {
    writers: Traffic,
    readers: Traffic,
    others: Traffic,
}

/// What everybody did.
pub(crate) struct Done {
    pub(crate) writers: Calls,
    pub(crate) readers: Calls,
    pub(crate) others: Calls,
}

impl Scene {
    /// The `number`th time so many buckets move: another pair of shards each time, and other buckets.
    pub(crate) async fn new(ground: &Ground<'_>, node: &Therev, number: usize, buckets: usize) -> Anyhow<Scene> {
        let shards = usize::from(ground.shards);
        let source = number % shards;
        let target = (source + 1 + number / shards % (shards - 1)) % shards;
        let (source, target) = (u16::try_from(source)?, u16::try_from(target)?);
        let client = ground.databases.shard(source).await?;
        let owned = "SELECT bucket FROM therev.ownership
                      WHERE colocation_group = 'account' AND state = 'owned' ORDER BY bucket";
        let owned: Vec<i16> = client.query(owned, &[]).await?.iter().map(|row| row.get(0)).collect();
        let set = owned.chunks_exact(buckets).cycle().nth(number / shards).ok_or("the shard has too few buckets")?;
        let users = users(&ground.databases, &[source, target]).await?;
        let is_moving = |user: &UserId| set.contains(&user.bucket().sql());
        let (moving, others): (Vec<_>, Vec<_>) = users.into_iter().partition(is_moving);
        let sql = "SELECT thread_id FROM threads WHERE NOT bucket = ANY ($1) ORDER BY thread_id LIMIT 500";
        let threads = client.query(sql, &[&set]).await?.iter().map(|row| ThreadId(row.get(0))).collect();
        Ok(Scene {
            node: node.clone(),
            source: ShardNo(i16::try_from(source)?),
            target: ShardNo(i16::try_from(target)?),
            buckets: set.iter().map(|bucket| Bucket::try_from(*bucket)).collect::<Result<_, _>>()?,
            moving: Arc::new(moving),
            others: Arc::new(others),
            threads: Arc::new(threads),
        })
    }

    pub(crate) fn request(&self) -> Request {
        let Scene { source, target, buckets, .. } = self;
        Request { groups: Group::ALL.to_vec(), buckets: buckets.clone(), pin: None, source: *source, target: *target }
    }

    /// Lets everybody begin.
    pub(crate) fn everybody(&self) -> Everybody {
        let (writes, reads, others) = (self.clone(), self.clone(), self.clone());
        Everybody {
            writers: Traffic::start(WRITERS.0, WRITERS.1, move |caller, round| {
                let (scene, at) = (writes.clone(), mix(caller, round));
                async move { scene.write(scene.moving[at % scene.moving.len()], at).await }
            }),
            readers: Traffic::start(READERS.0, READERS.1, move |caller, round| {
                let (scene, at) = (reads.clone(), mix(caller, round));
                async move { scene.read(scene.moving[at % scene.moving.len()]).await }
            }),
            others: Traffic::start(OTHERS.0, OTHERS.1, move |caller, round| {
                let (scene, at) = (others.clone(), mix(caller, round));
                async move { scene.any(at, round).await }
            }),
        }
    }

    /// A call of one of the others: reads and writes in turn.
    pub(crate) async fn any(&self, at: usize, round: u64) -> Anyhow<()> {
        let user = self.others[at % self.others.len()];
        if round.is_multiple_of(2) { self.write(user, at).await } else { self.read(user).await }
    }

    pub(crate) async fn write(&self, author: UserId, at: usize) -> Anyhow<()> {
        let thread = self.threads[at * 7 % self.threads.len()];
        Ok(self.node.create_post(NewPost::new(author, thread, BODY)).await.map(drop)?)
    }

    pub(crate) async fn read(&self, user: UserId) -> Anyhow<()> {
        Ok(self.node.user(user).await.map(drop)?)
    }
}

impl Everybody {
    pub(crate) async fn end(self) -> Anyhow<Done> {
        Ok(Done {
            writers: self.writers.end().await?,
            readers: self.readers.end().await?,
            others: self.others.end().await?,
        })
    }
}

/// Which user's turn it is.
pub(crate) fn mix(caller: usize, round: u64) -> usize {
    caller * 61 + usize::try_from(round).unwrap_or(0) * 17
}

async fn users(databases: &Databases, shards: &[u16]) -> Anyhow<Vec<UserId>> {
    let mut users = Vec::new();
    for shard in shards {
        let client = databases.shard(*shard).await?;
        let sql = "SELECT u.user_id FROM users AS u JOIN therev.ownership AS o USING (bucket)
                    WHERE o.colocation_group = 'account' AND o.state = 'owned' AND u.deleted_at IS NULL ORDER BY u.user_id";
        users.extend(client.query(sql, &[]).await?.iter().map(|row| UserId(row.get(0))));
    }
    Ok(users)
}
