//! Looks at what a shard says of its buckets, shared: however many calls of a node wait for one switch, one statement after
//! the other asks for all of them.

use crate::error::Error;
use crate::store::Shards;
use placement::{Bucket, Group, Ownership, ShardNo};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Who waits for one look, and of which bucket.
type Waiting = Vec<(Bucket, oneshot::Sender<Option<Ownership>>)>;

/// The looks that are about to be taken, by shard and group.
#[derive(Default)]
pub(crate) struct Looks(Mutex<BTreeMap<(ShardNo, Group), Waiting>>);

impl Looks {
    /// Joins the next look; `true`: there was none, it has to be taken.
    fn join(&self, of: (ShardNo, Group), bucket: Bucket) -> (oneshot::Receiver<Option<Ownership>>, bool) {
        let (answer, receiver) = oneshot::channel();
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = looks.entry(of).or_default();
        waiting.push((bucket, answer));
        (receiver, waiting.len() == 1)
    }

    fn take(&self, of: (ShardNo, Group)) -> Waiting {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&of).unwrap_or_default()
    }
}

impl Shards {
    /// What a shard says of a bucket after a pause so long, or sooner where others are waiting already.
    pub(crate) async fn look(
        &self,
        shard: ShardNo,
        group: Group,
        bucket: Bucket,
        pause: Duration,
    ) -> Result<Option<Ownership>, Error> {
        let (answer, is_first) = self.inner.looks.join((shard, group), bucket);
        if is_first {
            // Of its own: the call that came first may be over before the others.
            tokio::spawn(self.clone().take_look(shard, group, pause));
        }
        match answer.await {
            Ok(owned) => Ok(owned),
            // It failed; each call finds out for itself how.
            Err(_) => Ok(self.ownership(shard, group, &[bucket]).await?.remove(&bucket)),
        }
    }

    async fn take_look(self, shard: ShardNo, group: Group, pause: Duration) {
        tokio::time::sleep(pause).await;
        let waiting = self.inner.looks.take((shard, group));
        let buckets: BTreeSet<Bucket> = waiting.iter().map(|(bucket, _)| *bucket).collect();
        let Ok(owned) = self.ownership(shard, group, &buckets.into_iter().collect::<Vec<_>>()).await else { return };
        for (bucket, call) in waiting {
            // A call that waits no longer misses nothing.
            let _ = call.send(owned.get(&bucket).copied());
        }
    }
}
