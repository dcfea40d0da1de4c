//! What PostgreSQL does: commits, streams that apply asynchronously, crashes, promotions, write transactions.

use super::state::{Change, Changes, Flow, Is, Mover, Part, Shard, State, TARGET, Way, Writer};
use super::{Rule, Switch};

/// So much fits a list of changes; echoes without end are seen long before.
const ROOM: u32 = 8;

impl State {
    /// The end of a synchronous commit: whatever is visible on a server is on its disk and its standbys.
    pub(super) fn persist(&mut self, shard: Shard) {
        let incoming = &mut self.streams[Way::out_of(1 - shard) as usize];
        let arrived = incoming.held;
        let count = std::mem::take(&mut incoming.applied);
        incoming.held.drop_first(count);
        // A stream sends only what is durable where it comes from.
        for change in arrived.iter().take(count as usize) {
            self.hold(shard, change);
        }
        self.servers[shard].durable = self.servers[shard].now;
        self.servers[shard].is_soft = false;
    }

    /// A part is about to change by a commit that waits for nothing. What is on this disk, though not on the standbys, stays so.
    pub(super) fn change_softly(&mut self, shard: Shard) -> &mut Part {
        let server = &mut self.servers[shard];
        server.is_soft |= server.now.part == server.durable.part;
        &mut server.now.part
    }

    /// A change of a server's own log is held for the stream that begins there.
    pub(super) fn hold(&mut self, shard: Shard, change: Change) {
        let way = Way::out_of(shard);
        let taken_over = self.servers[TARGET].durable.part.epoch > 0;
        let stream = &mut self.streams[way as usize];
        let kept = match stream.flow {
            Flow::Running => true,
            // Its slot holds everything; what came before `since` is told from the rows when it matters.
            Flow::NotStarted => taken_over,
            Flow::Stopped | Flow::Lost => false,
        };
        if kept && stream.held.len() < ROOM {
            stream.held.push(change);
        }
    }

    /// Room for one more in the slot of the stream out of this shard.
    pub(super) fn can_hold(&self, shard: Shard, bound: u32) -> bool {
        self.streams[Way::out_of(shard) as usize].held.len() < bound
    }

    pub(super) fn next_to_apply(&self, way: Way) -> Option<Change> {
        let stream = self.streams[way as usize];
        let room = self.servers[way.to()].now.rows.len() < ROOM;
        if stream.flow == Flow::Running && room { stream.held.get(stream.applied) } else { None }
    }

    /// The subscription applies the next change, with `synchronous_commit` off.
    pub(super) fn apply(&mut self, way: Way) {
        let Some(change) = self.next_to_apply(way) else { return };
        self.streams[way as usize].applied += 1;
        let image = &mut self.servers[way.to()].now;
        match change {
            Change::Append(_) => image.rows.push(change),
            Change::Sentinel(k) => image.sentinel = k,
        }
    }

    /// A crash matters to what is open, applied or soft. (A part's change that waited for standbys was on this disk.)
    pub(super) fn can_crash(&self, shard: Shard) -> bool {
        let server = &self.servers[shard];
        let loses = self.streams[Way::out_of(1 - shard) as usize].applied > 0;
        server.is_soft || (server.now.part == server.durable.part && (loses || self.has_writers(shard)))
    }

    /// The server comes back with what was on its disk; what was applied since is streamed again. Whoever was about to send a
    /// sentinel there counts on its drain: its connection has ended, and with it the try.
    pub(super) fn crash(&mut self, shard: Shard) {
        self.servers[shard].now = self.servers[shard].durable;
        self.servers[shard].is_soft = false;
        self.streams[Way::out_of(1 - shard) as usize].applied = 0;
        for mover in &mut self.movers {
            if let Mover::WaitForWriters(way, _) | Mover::Waiting(way, ..) | Mover::SendSentinel(way, _) = *mover
                && way.from() == shard
            {
                *mover = Mover::Looking;
            }
        }
        self.end_writers(shard);
    }

    /// A standby goes on with what it has. The slots here are gone, and the slot of the stream into here had been told
    /// that everything had arrived: what was applied and not on the standby is in no stream any more.
    pub(super) fn promote(&mut self, shard: Shard) {
        let incoming = &mut self.streams[Way::out_of(1 - shard) as usize];
        incoming.held.drop_first(incoming.applied);
        self.crash(shard);
        self.servers[shard].another_life = true;
        let outgoing = &mut self.streams[Way::out_of(shard) as usize];
        outgoing.held = Changes::default();
        outgoing.flow = Flow::Lost;
    }

    fn has_writers(&self, shard: Shard) -> bool {
        let here =
            |w: &Writer| matches!(*w, Writer::Locked(s) | Writer::Passed(s) | Writer::PassedUnlocked(s) if s == shard);
        self.writers.iter().any(here)
    }

    fn end_writers(&mut self, shard: Shard) {
        for index in 0..self.writers.len() {
            if let Writer::Locked(s) | Writer::Passed(s) | Writer::PassedUnlocked(s) = self.writers[index]
                && s == shard
            {
                self.end_writer(index);
            }
        }
    }

    /// A transaction is over: whoever waits for it sees that.
    pub(super) fn end_writer(&mut self, index: usize) {
        self.writers[index] = Writer::Idle;
        for mover in &mut self.movers {
            *mover = mover.seen_gone(index);
        }
    }

    /// The writers that hold a lock on the tables of a server, a bit each.
    pub(super) fn lock_holders(&self, shard: Shard) -> u8 {
        let holds = |w: &Writer| matches!(*w, Writer::Locked(s) | Writer::Passed(s) if s == shard);
        self.writers.iter().enumerate().filter(|(_, w)| holds(w)).map(|(index, _)| 1 << index).sum()
    }

    pub(super) fn commit(&mut self, index: usize) {
        let (Writer::Passed(shard) | Writer::PassedUnlocked(shard)) = self.writers[index] else { return };
        self.commits += 1;
        let change = Change::Append(self.commits);
        self.servers[shard].now.rows.push(change);
        self.persist(shard);
        self.hold(shard, change);
        self.end_writer(index);
    }
}

impl Switch {
    /// A write transaction begins on a shard: on either one, for a node may believe anything.
    pub(super) fn begin(&self, state: &mut State, index: usize, shard: Shard) {
        state.writers[index] = if self.keeps(Rule::LockBeforeFence) {
            Writer::Locked(shard)
        } else if self.fence_passes(state, shard) {
            Writer::PassedUnlocked(shard)
        } else {
            Writer::Idle
        };
    }

    /// It looks at the part, in a snapshot taken now: passes, or is refused and gone.
    pub(super) fn fence(&self, state: &mut State, index: usize) {
        let Writer::Locked(shard) = state.writers[index] else { return };
        if self.fence_passes(state, shard) {
            state.writers[index] = Writer::Passed(shard);
        } else {
            state.end_writer(index);
        }
    }

    fn fence_passes(&self, state: &State, shard: Shard) -> bool {
        match state.part(shard).is {
            Is::Owned => true,
            Is::Draining => !self.keeps(Rule::DrainedRefusesWrites),
            Is::Moved | Is::Incoming | Is::Ready => false,
        }
    }
}
