//! Looks at what a shard says of its buckets, shared: however many calls of a node wait for one switch, one statement after
//! the other asks for all of them.

use crate::error::Error;
use crate::store::{Said, Shards};
use placement::{Group, ShardNo, Whose};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Who waits for one look, and at whose rows.
type Waiting = Vec<(Whose, oneshot::Sender<Said>)>;

/// The looks that are about to be taken, by shard and group.
#[derive(Default)]
pub(crate) struct Looks(Mutex<BTreeMap<(ShardNo, Group), Waiting>>);

impl Looks {
    /// Joins the next look; `true`: there was none, it has to be taken.
    fn join(&self, of: (ShardNo, Group), whose: Whose) -> (oneshot::Receiver<Said>, bool) {
        let (answer, receiver) = oneshot::channel();
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = looks.entry(of).or_default();
        waiting.push((whose, answer));
        (receiver, waiting.len() == 1)
    }

    fn take(&self, of: (ShardNo, Group)) -> Waiting {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&of).unwrap_or_default()
    }
}

impl Shards {
    /// What a shard says of somebody's rows after a pause so long, or sooner where others are waiting already.
    pub(crate) async fn look(
        &self,
        shard: ShardNo,
        group: Group,
        whose: Whose,
        pause: Duration,
    ) -> Result<Said, Error> {
        let (answer, is_first) = self.inner.looks.join((shard, group), whose);
        if is_first {
            // Of its own: the call that came first may be over before the others.
            let look = About { shards: self.clone(), of: (shard, group), is_taken: false };
            tokio::spawn(self.clone().take_look(look, pause));
        }
        match answer.await {
            Ok(said) => Ok(said),
            // It failed; each call finds out for itself how.
            Err(_) => Ok(self.ownership(shard, group, &[whose]).await?[0]),
        }
    }

    async fn take_look(self, mut look: About, pause: Duration) {
        // The runtime's timer would make a wait of up to a millisecond of none.
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let (shard, group) = look.of;
        let waiting = self.inner.looks.take(look.of);
        look.is_taken = true;
        let of: BTreeSet<Whose> = waiting.iter().map(|(whose, _)| *whose).collect();
        let of: Vec<Whose> = of.into_iter().collect();
        let Ok(said) = self.ownership(shard, group, &of).await else { return };
        let said: BTreeMap<Whose, Said> = of.into_iter().zip(said).collect();
        for (whose, call) in waiting {
            if let Some(said) = said.get(&whose) {
                // A call that waits no longer misses nothing.
                let _ = call.send(*said);
            }
        }
    }
}

/// A look that is about to be taken. Where its runtime ends before that, those who wait for it find out for themselves.
struct About {
    shards: Shards,
    of: (ShardNo, Group),
    is_taken: bool,
}

impl Drop for About {
    fn drop(&mut self) {
        if !self.is_taken {
            drop(self.shards.inner.looks.take(self.of));
        }
    }
}
