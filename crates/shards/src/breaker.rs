//! A breaker: a server that cannot be reached is spared for a while, and its callers are told at once.

use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Breaker {
    rest: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed,
    /// Nobody tries before this instant; then one caller does, and the others wait for its outcome as refused.
    Open(Instant),
}

impl Breaker {
    pub(crate) fn new(rest: Duration) -> Breaker {
        Breaker { rest, state: Mutex::new(State::Closed) }
    }

    /// Whether a caller may try now. The one who may after a rest is the probe: it puts the next try off by a rest.
    pub(crate) fn admits(&self, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match *state {
            State::Closed => true,
            State::Open(until) if now < until => false,
            State::Open(_) => {
                *state = State::Open(now + self.rest);
                true
            }
        }
    }

    pub(crate) fn reached(&self) {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = State::Closed;
    }

    pub(crate) fn failed(&self, now: Instant) {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = State::Open(now + self.rest);
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
        assert!(breaker.admits(start));
        breaker.failed(start);
        assert!(!breaker.admits(start));
        assert!(breaker.admits(start + rest));
        assert!(!breaker.admits(start + rest), "only one probe");
        breaker.reached();
        assert!(breaker.admits(start + rest));
    }
}
