//! What a shard says of a bucket: the protocol with two sides, stated once.
//!
//! Every shard holds one row for every bucket of every group. The SQL of `therev.ownership` and of the fence is this
//! table of states:
//!
//! | state      | reads | writes | where a refused caller goes |
//! |------------|-------|--------|-----------------------------|
//! | `owned`    | yes   | yes    | here, again                 |
//! | `draining` | yes   | no     | here, a moment later        |
//! | `moved`    | no    | no     | to the peer                 |
//! | `incoming` | no    | no     | to the peer, unless the peer sent it here with a higher epoch: then here, a moment later |

use crate::map::{Place, ShardNo};
use std::str::FromStr;

/// What a shard says of one bucket of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// This shard is the authority: it reads and writes the bucket.
    Owned,
    /// A switch is under way: reads go on, writes wait for its outcome.
    Draining,
    /// Another shard, the peer, is the authority.
    Moved,
    /// A copy is under way from the peer, which is still the authority as far as this shard knows.
    Incoming,
}

impl State {
    /// Whether reads are answered in this state.
    pub fn readable(self) -> bool {
        matches!(self, State::Owned | State::Draining)
    }

    /// Whether writes are accepted in this state.
    pub fn writable(self) -> bool {
        self == State::Owned
    }
}

impl FromStr for State {
    type Err = crate::map::UnknownName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "owned" => Ok(State::Owned),
            "draining" => Ok(State::Draining),
            "moved" => Ok(State::Moved),
            "incoming" => Ok(State::Incoming),
            other => Err(crate::map::UnknownName(other.to_owned())),
        }
    }
}

/// One row of a shard's `ownership`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    /// What the shard may do with the bucket.
    pub state: State,
    /// The other shard of `moved` and `incoming`.
    pub peer: Option<ShardNo>,
    /// Grows with every change of owner, never falls.
    pub epoch: i64,
}

/// What a refused caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Ask another shard, which owns the bucket since `epoch`.
    Go(ShardNo, i64),
    /// Ask this shard again, at once: it owns the bucket after all.
    Again(i64),
    /// Ask this shard again a moment later: a switch is being decided.
    Wait,
}

impl Hint {
    /// The place that the hint names, given by the shard `asked`; `None`: it is being decided.
    pub fn place(self, asked: ShardNo) -> Option<Place> {
        match self {
            Hint::Go(shard, epoch) => Some(Place { shard, epoch }),
            Hint::Again(epoch) => Some(Place { shard: asked, epoch }),
            Hint::Wait => None,
        }
    }
}

impl Ownership {
    /// Where a refused caller goes, who came to this shard because something said `sent_by_epoch` of it.
    pub fn hint(self, sent_by_epoch: i64) -> Hint {
        match (self.state, self.peer) {
            (State::Owned, _) => Hint::Again(self.epoch),
            (State::Moved, Some(peer)) => Hint::Go(peer, self.epoch),
            // The one who sent the caller here has already given the bucket away: this shard is about to own it.
            (State::Incoming, Some(peer)) if sent_by_epoch <= self.epoch => Hint::Go(peer, self.epoch),
            _ => Hint::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: State, epoch: i64) -> Ownership {
        let peer = matches!(state, State::Moved | State::Incoming).then_some(ShardNo(2));
        Ownership { state, peer, epoch }
    }

    #[test]
    fn a_refused_caller_never_bounces_between_the_two_sides_of_a_switch() {
        // The source has decided (epoch 5), the target has not heard of it yet (epoch 4).
        assert_eq!(row(State::Moved, 5).hint(4), Hint::Go(ShardNo(2), 5));
        assert_eq!(row(State::Incoming, 4).hint(5), Hint::Wait);
        // Sent here by a stale map: the source still decides.
        assert_eq!(row(State::Incoming, 4).hint(4), Hint::Go(ShardNo(2), 4));
    }

    #[test]
    fn one_state_alone_writes_and_two_read() {
        let states = [State::Owned, State::Draining, State::Moved, State::Incoming];
        assert_eq!(states.map(State::writable), [true, false, false, false]);
        assert_eq!(states.map(State::readable), [true, true, false, false]);
        assert_eq!(row(State::Draining, 1).hint(1), Hint::Wait);
        assert_eq!(row(State::Owned, 1).hint(1), Hint::Again(1));
    }
}
