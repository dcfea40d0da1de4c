//! Who has just written delivers at once, and what goes to one shard goes together: while some of it is on its way there, more
//! gathers. The busier a node is, the more of its writers share one statement and its wait for the disk.

use crate::community::Community;
use crate::delivery::Event;
use placement::ShardNo;
use shards::Gathering;
use std::time::Duration;
use tokio::sync::oneshot;

/// How many deliveries to one shard are under way at once: with a single one, a writer would wait for almost all of another's.
const UNDER_WAY_MAX: usize = 2;
/// How many events gather at the most: of a shard that is slow to answer, the relay has the rest.
const GATHERED_MAX: usize = 500;

/// What gathers, by the shard that it goes to: each event with its writer, who waits.
pub(crate) struct Eager(Gathering<ShardNo, (Event, oneshot::Sender<()>)>);

impl Default for Eager {
    fn default() -> Eager {
        Eager(Gathering::new(UNDER_WAY_MAX, GATHERED_MAX, GATHERED_MAX))
    }
}

/// Whoever carries what gathers for a shard. One that ends before its time, with its runtime, leaves its place to others.
struct Carrier {
    community: Community,
    to: ShardNo,
    has_ended: bool,
}

impl Carrier {
    /// What is to be delivered next; the place is given back with the last look.
    fn next(&mut self) -> Vec<(Event, oneshot::Sender<()>)> {
        let next = self.community.inner.eager.0.next(self.to);
        self.has_ended = next.is_empty();
        next
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if !self.has_ended {
            self.community.inner.eager.0.abandon(self.to);
        }
    }
}

impl Community {
    /// Delivers an event that a statement has just returned, and waits for that a bounded time. What fails is left to the relay.
    pub(crate) async fn deliver_now(&self, to: ShardNo, event: Event) {
        let (writer, delivered) = oneshot::channel();
        if let Ok(true) = self.inner.eager.0.add(to, (event, writer)) {
            tokio::spawn(carry(Carrier { community: self.clone(), to, has_ended: false }));
        }
        let limit = Duration::from_millis(self.shards().config().delivery_ms);
        // Late, or without a word: it is in the outbox all the same.
        let _ = tokio::time::timeout(limit, delivered).await;
    }
}

/// Delivers what has gathered until nothing has.
async fn carry(mut carrier: Carrier) {
    loop {
        let (events, writers): (Vec<Event>, Vec<_>) = carrier.next().into_iter().unzip();
        if events.is_empty() {
            return;
        }
        let community = carrier.community.clone();
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
