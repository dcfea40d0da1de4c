//! Doubt about a server: a statement on it was given up. It may be slow, or wait for a lock; or the server is silent,
//! and then everybody else need not wait as long to find that out.

use crate::breaker::{Breaker, Leave};
use crate::lanes::{Left, Seat};
use crate::pool::{LifeInForce, Limits};
use crate::reach::{is_in, reach};
use deadpool_postgres::Object;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::NoTls;

/// Finds out whether a server answers at all.
pub(crate) struct Doubt {
    connections: deadpool_postgres::Pool,
    login: tokio_postgres::Config,
    life: Arc<LifeInForce>,
    pub(crate) breaker: Breaker,
    /// How long a new connection may take.
    connect: Duration,
    is_asking: AtomicBool,
}

/// A connection for one statement, or a seat on one. Dropped while the answer is pending, by a deadline or by a caller who left,
/// it does not go back into the pool, where the next statement on it would wait for that answer first.
pub(crate) struct Lent<'a> {
    pub(crate) seat: Option<Seat<'a, Object>>,
    /// Whether to leave without an answer says nothing against the server: it may wait for another one's first.
    is_patient: bool,
    doubt: &'a Arc<Doubt>,
}

impl Doubt {
    pub(crate) fn new(
        connections: deadpool_postgres::Pool,
        login: tokio_postgres::Config,
        limits: Limits,
        life: Arc<LifeInForce>,
    ) -> Arc<Doubt> {
        let (breaker, connect) = (Breaker::new(limits.rest), limits.connect);
        Arc::new(Doubt { connections, login, life, breaker, connect, is_asking: AtomicBool::new(false) })
    }

    /// For a seat that is to be lent, beside others or not.
    pub(crate) fn lend(self: &Arc<Self>, is_beside_others: bool) -> Lent<'_> {
        Lent { seat: None, is_patient: is_beside_others, doubt: self }
    }

    /// The server said nothing to whoever came anew: nobody is sent to it for a while, and nobody afterwards on a
    /// connection on which it would say nothing either.
    pub(crate) fn is_silent(&self, leave: Leave) {
        if self.breaker.failed(leave, Instant::now()) {
            self.connections.retain(|_, _| false);
        }
    }

    /// Asks the server, beside whoever calls, whether it takes a new connection. Whatever it says to that, it is not
    /// silent: a statement that is slow is no failure.
    pub(crate) fn raise(self: &Arc<Self>) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_asking.swap(true, Ordering::Relaxed) {
            return;
        }
        let (doubt, leave) = (self.clone(), self.breaker.leave());
        runtime.spawn(async move {
            match tokio::time::timeout(doubt.connect, doubt.is_who_it_was()).await {
                Ok(Ok(true)) => {}
                // Another server answers in its place: on a connection to that one, nobody would hear anything until the deadline.
                Ok(Ok(false)) => drop(doubt.connections.retain(|_, _| false)),
                // A word of refusal is an answer, too.
                Ok(Err(error)) if error.code().is_some() => {}
                Ok(Err(_)) | Err(_) => doubt.is_silent(leave),
            }
            doubt.is_asking.store(false, Ordering::Relaxed);
        });
    }

    /// Whether a new connection leads to the server of the life that this pool trusts, if it trusts any.
    async fn is_who_it_was(&self) -> Result<bool, tokio_postgres::Error> {
        let life = self.life.get();
        let (client, _) = reach(&self.login, life).await?;
        Ok(match life {
            Some(life) => is_in(&client, life).await,
            None => true,
        })
    }

    /// For a connection that is asked for.
    pub(crate) fn ask(self: &Arc<Self>) -> Asking<'_> {
        Asking(Some(self))
    }

    /// Ends on the server what nobody waits for any more.
    fn give_up(&self, client: Object) {
        let cancel = client.cancel_token();
        drop(Object::take(client));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let limit = self.connect;
            runtime.spawn(async move {
                // Where it cannot be told, its own time-out ends the statement.
                tokio::time::timeout(limit, cancel.cancel_query(NoTls)).await.ok();
            });
        }
    }
}

/// Somebody asks for a connection. Who leaves before there is one doubts the server.
pub(crate) struct Asking<'a>(Option<&'a Arc<Doubt>>);

impl Asking<'_> {
    /// There is one, or a reason why there is none.
    pub(crate) fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(doubt) = self.0 {
            doubt.raise();
        }
    }
}

impl Lent<'_> {
    /// The answer is there, whatever it is.
    pub(crate) fn give_back(mut self) {
        if let Some(seat) = self.seat.take() {
            self.leave(seat, Some(Instant::now()));
        }
    }

    fn leave(&self, seat: Seat<Object>, answered: Option<Instant>) {
        if let Some(Left::Unanswered(client)) = seat.leave(answered) {
            self.doubt.give_up(client);
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let Some(seat) = self.seat.take() else { return };
        self.leave(seat, None);
        if !self.is_patient {
            self.doubt.raise();
        }
    }
}
