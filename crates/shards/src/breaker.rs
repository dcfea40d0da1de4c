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

/// Leave to try, given after this many failures.
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

    /// Whoever had this leave has a connection. It may be an older one than a failure that others met since then, and
    /// says nothing against that.
    pub(crate) fn reached(&self, leave: Leave) {
        let mut state = self.state();
        if state.failures == leave.0 {
            state.rests_until = None;
        }
    }

    pub(crate) fn failed(&self, now: Instant) {
        let mut state = self.state();
        *state = State { rests_until: Some(now + self.rest), failures: state.failures + 1 };
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
        assert!(breaker.admits(start).is_some());
        breaker.failed(start);
        assert!(breaker.admits(start).is_none());
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
        breaker.failed(start);
        breaker.reached(leave);
        assert!(breaker.admits(start).is_none());
    }
}
