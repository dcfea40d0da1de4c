//! Who has just written delivers at once, and what goes to one shard goes together: while some of it is on its way there, more
//! gathers. The busier a node is, the more of its writers share one statement and its wait for the disk.

use crate::community::Community;
use crate::delivery::Event;
use placement::ShardNo;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// How many deliveries to one shard are under way at once: with a single one, a writer would wait for almost all of another's.
const UNDER_WAY_MAX: usize = 2;
/// How many events gather at the most: of a shard that is slow to answer, the relay has the rest.
const GATHERED_MAX: usize = 500;

/// What gathers, by the shard that it goes to.
#[derive(Default)]
pub(crate) struct Eager(Mutex<BTreeMap<ShardNo, Gathered>>);

#[derive(Default)]
struct Gathered {
    under_way: usize,
    /// Each with its writer, who waits.
    events: Vec<(Event, oneshot::Sender<()>)>,
}

impl Eager {
    fn all(&self) -> MutexGuard<'_, BTreeMap<ShardNo, Gathered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event, or has its writer go where too many wait; `true`: somebody is to carry what has gathered.
    fn add(&self, to: ShardNo, event: Event, writer: oneshot::Sender<()>) -> bool {
        let mut all = self.all();
        let gathered = all.entry(to).or_default();
        if gathered.events.len() < GATHERED_MAX {
            gathered.events.push((event, writer));
        }
        let is_wanted = gathered.under_way < UNDER_WAY_MAX;
        gathered.under_way += usize::from(is_wanted);
        is_wanted
    }

    /// What is to be carried next. Nothing: whoever asks is not wanted any more.
    fn next(&self, to: ShardNo) -> Vec<(Event, oneshot::Sender<()>)> {
        let mut all = self.all();
        let Some(gathered) = all.get_mut(&to) else { return Vec::new() };
        let next = std::mem::take(&mut gathered.events);
        if next.is_empty() {
            gathered.under_way -= 1;
        }
        next
    }
}

impl Community {
    /// Delivers an event that a statement has just returned, and waits for that a bounded time. What fails is left to the relay.
    pub(crate) async fn deliver_now(&self, to: ShardNo, event: Event) {
        let (writer, delivered) = oneshot::channel();
        if self.inner.eager.add(to, event, writer) {
            tokio::spawn(self.clone().carry(to));
        }
        let limit = Duration::from_millis(self.shards().config().delivery_ms);
        // Late, or without a word: it is in the outbox all the same.
        let _ = tokio::time::timeout(limit, delivered).await;
    }

    async fn carry(self, to: ShardNo) {
        loop {
            let (events, writers): (Vec<Event>, Vec<_>) = self.inner.eager.next(to).into_iter().unzip();
            if events.is_empty() {
                return;
            }
            let community = self.clone();
            // Of its own, so that whatever becomes of it the next ones are carried.
            let delivery = tokio::spawn(async move { community.deliver(events).await.failed });
            for (kind, error) in delivery.await.unwrap_or_default() {
                tracing::debug!(kind, %error, "events stay in the outbox for the relay");
            }
            for writer in writers {
                // Who waits no longer misses nothing.
                let _ = writer.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot::error::TryRecvError;

    fn event(outbox_id: i64) -> Event {
        Event { shard: Some(ShardNo(0)), outbox_id, kind: "contribution".into(), facts: Vec::new() }
    }

    fn ids(next: Vec<(Event, oneshot::Sender<()>)>) -> Vec<i64> {
        next.into_iter().map(|(event, _)| event.outbox_id).collect()
    }

    #[test]
    fn what_comes_while_enough_is_under_way_goes_together() {
        let (eager, to) = (Eager::default(), ShardNo(3));
        let add = |id| eager.add(to, event(id), oneshot::channel().0);
        assert!(add(1));
        assert_eq!(ids(eager.next(to)), [1]);
        assert!(add(2));
        assert_eq!(ids(eager.next(to)), [2]);
        assert!(!add(3) && !add(4), "two are under way");
        assert!(eager.add(ShardNo(1), event(9), oneshot::channel().0), "elsewhere none is");
        assert_eq!(ids(eager.next(to)), [3, 4]);
        assert!(eager.next(to).is_empty(), "one of the two has nothing left to carry");
        assert!(add(5));
        assert_eq!(ids(eager.next(to)), [5]);
        assert!(eager.next(to).is_empty() && eager.next(to).is_empty());
        assert!(add(6), "nobody is under way");
    }

    #[test]
    fn where_too_many_wait_a_writer_goes() {
        let (eager, to) = (Eager::default(), ShardNo(3));
        let mut waits: Vec<_> = (0..=500)
            .map(|id| {
                let (writer, delivered) = oneshot::channel();
                eager.add(to, event(id), writer);
                delivered
            })
            .collect();
        let mut goes = waits.pop().expect("the last one");
        assert_eq!(goes.try_recv(), Err(TryRecvError::Closed));
        assert!(waits.iter_mut().all(|delivered| delivered.try_recv() == Err(TryRecvError::Empty)));
        assert_eq!(eager.next(to).len(), 500);
    }
}
