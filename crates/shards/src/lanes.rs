//! Lanes: connections that short reads share.
//!
//! Where many callers read by key at once, several of them wait on one connection: server and node are woken once for what
//! comes together, and half of the pool stays free for whatever takes longer. Answers come in the order of the questions, so a
//! lane takes nobody more while its last answer is long ago.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many callers wait on one lane at a time.
const SEATS: usize = 4;
/// A lane that has not answered for this long takes nobody more.
const FRESH: Duration = Duration::from_millis(2);

/// The lanes of one pool. `T` is a connection.
pub(crate) struct Lanes<T> {
    most: usize,
    lanes: Mutex<Vec<Lane<T>>>,
}

struct Lane<T> {
    connection: Arc<T>,
    waiting: usize,
    /// When it was opened, or answered last.
    answered: Instant,
    /// Whether somebody left without an answer: what comes next on it is not for whoever asks next.
    is_left: bool,
}

/// A place on a connection, alone or with others.
pub(crate) struct Seat<'a, T> {
    connection: Arc<T>,
    lanes: Option<&'a Lanes<T>>,
}

/// A connection on which nobody waits any more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Left<T> {
    /// All answers have come.
    Clean(T),
    /// Somebody left without an answer, which may still be on its way.
    Unanswered(T),
}

impl<T> Lanes<T> {
    /// At most so many lanes.
    pub(crate) fn new(most: usize) -> Lanes<T> {
        Lanes { most, lanes: Mutex::new(Vec::with_capacity(most)) }
    }

    /// A seat beside others, on the lane where the fewest wait; `None` while there may be more lanes, and where none will do.
    pub(crate) fn join(&self, now: Instant, will_do: impl Fn(&T) -> bool) -> Option<Seat<'_, T>> {
        let mut lanes = self.lanes();
        if lanes.len() < self.most {
            return None;
        }
        let takes_more = |lane: &&mut Lane<T>| {
            let is_fresh = now.saturating_duration_since(lane.answered) < FRESH;
            lane.waiting < SEATS && !lane.is_left && is_fresh && will_do(&lane.connection)
        };
        let lane = lanes.iter_mut().filter(takes_more).min_by_key(|lane| lane.waiting)?;
        lane.waiting += 1;
        Some(Seat { connection: lane.connection.clone(), lanes: Some(self) })
    }

    /// Opens a lane with a connection on which somebody sits alone, unless there are lanes enough. Others may join from now on: what
    /// was sent before is answered before theirs.
    pub(crate) fn open<'a>(&'a self, seat: &mut Seat<'a, T>, now: Instant) {
        let mut lanes = self.lanes();
        if seat.lanes.is_none() && lanes.len() < self.most {
            lanes.push(Lane { connection: seat.connection.clone(), waiting: 1, answered: now, is_left: false });
            seat.lanes = Some(self);
        }
    }

    fn lanes(&self) -> MutexGuard<'_, Vec<Lane<T>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Seat<'_, T> {
    /// The only seat on a connection.
    pub(crate) fn alone(connection: T) -> Self {
        Seat { connection: Arc::new(connection), lanes: None }
    }

    /// Whether others may wait on the connection, too.
    pub(crate) fn is_shared(&self) -> bool {
        self.lanes.is_some()
    }

    /// Leaves with the answer that came at `answered`, or without one. Whoever is the last takes the connection along.
    pub(crate) fn leave(self, answered: Option<Instant>) -> Option<Left<T>> {
        let Seat { connection, lanes } = self;
        let mut is_left = answered.is_none();
        if let Some(lanes) = lanes {
            let mut lanes = lanes.lanes();
            let at = lanes.iter().position(|lane| Arc::ptr_eq(&lane.connection, &connection))?;
            let lane = &mut lanes[at];
            lane.waiting -= 1;
            lane.is_left |= is_left;
            lane.answered = answered.unwrap_or(lane.answered);
            is_left = lane.is_left;
            if lane.waiting > 0 {
                // While nobody else can leave: the last one's must be the only one.
                drop(connection);
                return None;
            }
            lanes.swap_remove(at);
        }
        let connection = Arc::into_inner(connection)?;
        Some(if is_left { Left::Unanswered(connection) } else { Left::Clean(connection) })
    }
}

impl<T> Deref for Seat<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.connection
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Connection = &'static str;

    fn any(_: &Connection) -> bool {
        true
    }

    fn opened(lanes: &Lanes<Connection>, connection: Connection, now: Instant) -> Seat<'_, Connection> {
        let mut seat = Seat::alone(connection);
        lanes.open(&mut seat, now);
        seat
    }

    #[test]
    fn lanes_are_opened_first_and_then_filled_evenly() {
        let (lanes, now) = (Lanes::new(2), Instant::now());
        assert!(lanes.join(now, any).is_none());
        let first = opened(&lanes, "one", now);
        assert!(lanes.join(now, any).is_none(), "there may be another");
        let second = opened(&lanes, "two", now);
        let alone = opened(&lanes, "three", now);
        assert!(first.is_shared() && !alone.is_shared(), "there are lanes enough");
        assert_eq!(alone.leave(Some(now)), Some(Left::Clean("three")));
        let mut seats: Vec<_> = std::iter::from_fn(|| lanes.join(now, any)).collect();
        assert_eq!(seats.iter().filter(|seat| ***seat == "one").count(), SEATS - 1);
        assert_eq!(seats.iter().filter(|seat| ***seat == "two").count(), SEATS - 1);
        assert_eq!(first.leave(Some(now)), None, "others wait on it");
        seats.push(lanes.join(now, any).expect("a seat is free again"));
        assert_eq!(*seats[seats.len() - 1], "one");
        seats.push(second);
        let back: Vec<_> = seats.into_iter().filter_map(|seat| seat.leave(Some(now))).collect();
        assert_eq!(back, [Left::Clean("one"), Left::Clean("two")], "the last of each takes it along");
        assert!(lanes.lanes().is_empty());
    }

    #[test]
    fn nobody_joins_who_would_wait_for_another_ones_answer() {
        let (lanes, now) = (Lanes::new(1), Instant::now());
        let first = opened(&lanes, "one", now);
        assert!(lanes.join(now + FRESH, any).is_none(), "its answer is long in coming");
        assert!(lanes.join(now, |_| false).is_none(), "the connection is of no use");
        let second = lanes.join(now, any).expect("a seat");
        assert_eq!(second.leave(Some(now + FRESH)), None);
        let third = lanes.join(now + FRESH, any).expect("it has answered just now");
        assert_eq!(first.leave(None), None);
        assert!(lanes.join(now + FRESH, any).is_none(), "an answer is on its way for which nobody waits");
        assert_eq!(third.leave(Some(now)), Some(Left::Unanswered("one")), "it is not for whoever asks next");
        assert_eq!(Seat::alone("two").leave(None), Some(Left::Unanswered("two")));
    }
}
