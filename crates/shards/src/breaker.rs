//! A breaker: a server that cannot be reached is spared for a while, and its callers are told at once.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Breaker {
    rest: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Nobody tries before this instant; then one caller does, and the others wait for its outcome as refused.
    rests_until: Option<Instant>,
    failures: u64,
}

/// Leave to try, given after this many failures. What comes of a try counts only where nobody has met another failure since it
/// began: that one is newer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leave(u64);

impl Breaker {
    pub(crate) fn new(rest: Duration) -> Breaker {
        Breaker { rest, state: Mutex::new(State { rests_until: None, failures: 0 }) }
    }

    /// Leave for a caller to try now, or `None`. The one who gets it after a rest is the probe: it puts the next try off
    /// by a rest.
    pub(crate) fn admits(&self, now: Instant) -> Option<Leave> {
        let mut state = self.state();
        if let Some(until) = &mut state.rests_until {
            if now < *until {
                return None;
            }
            *until = now + self.rest;
        }
        Some(Leave(state.failures))
    }

    /// Whether nothing has failed since the server was reached last.
    pub(crate) fn is_closed(&self) -> bool {
        self.state().rests_until.is_none()
    }

    /// Leave for a try that the breaker does not stop, because nobody waits for it.
    pub(crate) fn leave(&self) -> Leave {
        Leave(self.state().failures)
    }

    /// Whoever had this leave has a connection.
    pub(crate) fn reached(&self, leave: Leave) {
        let mut state = self.state();
        if state.failures == leave.0 {
            state.rests_until = None;
        }
    }

    /// Whoever had this leave got none; says whether that was new.
    pub(crate) fn failed(&self, leave: Leave, now: Instant) -> bool {
        let mut state = self.state();
        let is_new = state.failures == leave.0;
        if is_new {
            *state = State { rests_until: Some(now + self.rest), failures: state.failures + 1 };
        }
        is_new
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_after_each_rest() {
        let rest = Duration::from_secs(1);
        let breaker = Breaker::new(rest);
        let start = Instant::now();
        let leave = breaker.admits(start).expect("nothing has failed");
        assert!(breaker.is_closed() && breaker.failed(leave, start));
        assert!(breaker.admits(start).is_none() && !breaker.is_closed());
        let probe = breaker.admits(start + rest).expect("the rest is over");
        assert!(breaker.admits(start + rest).is_none(), "only one probe");
        breaker.reached(probe);
        assert!(breaker.admits(start + rest).is_some());
    }

    #[test]
    fn a_connection_of_before_a_failure_says_nothing_against_it() {
        let breaker = Breaker::new(Duration::from_secs(1));
        let start = Instant::now();
        let leave = breaker.admits(start).expect("nothing has failed");
        breaker.failed(leave, start);
        breaker.reached(leave);
        assert!(breaker.admits(start).is_none());
    }

    #[test]
    fn a_failure_that_began_before_another_says_nothing_against_what_came_after() {
        let rest = Duration::from_secs(1);
        let breaker = Breaker::new(rest);
        let start = Instant::now();
        let (quick, slow) = (breaker.admits(start).expect("nothing has failed"), breaker.leave());
        assert!(breaker.failed(quick, start));
        let probe = breaker.admits(start + rest).expect("the rest is over");
        breaker.reached(probe);
        assert!(!breaker.failed(slow, start + rest));
        assert!(breaker.admits(start + rest).is_some(), "the server has been reached since");
    }
}
