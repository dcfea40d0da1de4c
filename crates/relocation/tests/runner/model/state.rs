//! What the servers and the movers hold: one bucket, the rows in it, and who is about to do what.

/// A shard of the two: the source of the relocation, or its target.
pub(super) type Shard = usize;
pub(super) const SOURCE: Shard = 0;
pub(super) const TARGET: Shard = 1;

/// Which way a switch goes: there, or back by the reverse stream with the sides swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Way {
    Forward,
    Reverse,
}

impl Way {
    /// The shard that gives.
    pub(super) fn from(self) -> Shard {
        self as Shard
    }

    /// The shard that takes.
    pub(super) fn to(self) -> Shard {
        1 - self.from()
    }

    /// The way whose stream begins at a shard.
    pub(super) fn out_of(shard: Shard) -> Self {
        if shard == SOURCE { Way::Forward } else { Way::Reverse }
    }

    /// The epoch of the owner after this switch.
    pub(super) fn epoch(self) -> u8 {
        self as u8 + 1
    }
}

/// The state of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Is {
    Owned,
    Draining,
    Moved,
    Incoming,
    Ready,
}

/// A row of `therev.relocation_parts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Part {
    pub(super) is: Is,
    pub(super) attempt: u8,
    pub(super) epoch: u8,
}

impl Part {
    pub(super) fn reads(self, is: Is, attempt: u8) -> bool {
        self.is == is && self.attempt == attempt
    }

    pub(super) fn readable(self) -> bool {
        matches!(self.is, Is::Owned | Is::Draining)
    }
}

/// A change of a row, as a stream carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// One value appended; values are numbered as they commit, wherever that is.
    Append(u8),
    /// The sentinel row was set to an attempt.
    Sentinel(u8),
}

/// A short list of changes, oldest first: four bits each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Changes(u64);

impl Changes {
    pub(super) fn push(&mut self, change: Change) {
        let code = match change {
            Change::Append(n) => n,
            Change::Sentinel(k) => 8 | k,
        };
        self.0 |= u64::from(code) << (4 * self.len());
    }

    pub(super) fn len(self) -> u32 {
        (u64::BITS - self.0.leading_zeros()).div_ceil(4)
    }

    pub(super) fn drop_first(&mut self, count: u32) {
        self.0 >>= 4 * count;
    }

    pub(super) fn get(self, index: u32) -> Option<Change> {
        let [byte, ..] = (self.0 >> (4 * index)).to_le_bytes();
        match byte & 15 {
            0 => None,
            code if code & 8 > 0 => Some(Change::Sentinel(code & 7)),
            code => Some(Change::Append(code)),
        }
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Change> {
        (0..).map_while(move |index| self.get(index))
    }

    /// Whether these are the appends 1 to `last`, in order.
    pub(super) fn are_all_up_to(self, last: u8) -> bool {
        self.iter().eq((1..=last).map(Change::Append))
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// What a server would show: the part, the rows, the sentinel row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Image {
    pub(super) part: Part,
    pub(super) rows: Changes,
    pub(super) sentinel: u8,
}

/// One server with its standbys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Server {
    /// What is visible.
    pub(super) now: Image,
    /// What is on the disk and on the standbys: where a crash or a promotion falls back to.
    pub(super) durable: Image,
    /// Whether what the part says was committed without waiting for the disk: a crash may take it back.
    pub(super) is_soft: bool,
    /// Whether it was promoted since the relocation was planned: another incarnation.
    pub(super) another_life: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Flow {
    NotStarted,
    Running,
    Stopped,
    /// Its slot went with a promotion.
    Lost,
}

/// A stream: what its slot holds for the subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) flow: Flow,
    /// Committed at one side, not yet durable at the other.
    pub(super) held: Changes,
    /// How many of these are applied, though not yet durable.
    pub(super) applied: u32,
}

/// A write transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Writer {
    Idle,
    /// Holds the table's lock, has not looked at the part.
    Locked(Shard),
    /// Has passed the fence; commits or aborts at some time.
    Passed(Shard),
    /// Has passed the fence by a snapshot older than its lock; only without [`super::Rule::LockBeforeFence`].
    PassedUnlocked(Shard),
}

/// What a mover, or whoever helps, is about to send. It is all that it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Mover {
    /// Knows nothing: just started, crashed, or without an answer; will read a part.
    Looking,
    Drain(Way, u8),
    WaitForWriters(Way, u8),
    /// In `wait_for_writers`, for these writers (a bit each).
    Waiting(Way, u8, u8),
    SendSentinel(Way, u8),
    GetReady(Way, u8),
    Decide(Way, u8),
    TakeOver(Way, u8),
    RecordPlacement(Way),
    StopForward,
    StartReverse,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) servers: [Server; 2],
    /// By [`Way`].
    pub(super) streams: [Stream; 2],
    pub(super) writers: [Writer; 2],
    /// Sorted: the two are alike.
    pub(super) movers: [Mover; 2],
    /// How many appends were committed, and so acknowledged: they are numbered 1, 2, …
    pub(super) commits: u8,
    /// How many rows the target had when it took over: where `since` is.
    pub(super) since: u32,
    /// The highest epoch that a part ever showed: a node may have been told.
    pub(super) shown: u8,
    /// The epoch that the control database has for the bucket; even ones mean the source.
    pub(super) control: u8,
    /// The highest epoch recorded there since it was put back.
    pub(super) recorded: u8,
    pub(super) control_is_up: bool,
}

impl State {
    /// Caught up, verified, nothing switched: the source owns.
    pub(super) fn caught_up() -> Self {
        let server = |is| {
            let part = Part { is, attempt: 0, epoch: 0 };
            let image = Image { part, rows: Changes::default(), sentinel: 0 };
            Server { now: image, durable: image, is_soft: false, another_life: false }
        };
        let stream = |flow| Stream { flow, held: Changes::default(), applied: 0 };
        Self {
            servers: [server(Is::Owned), server(Is::Incoming)],
            streams: [stream(Flow::Running), stream(Flow::NotStarted)],
            writers: [Writer::Idle; 2],
            movers: [Mover::Looking; 2],
            commits: 0,
            since: 0,
            shown: 0,
            control: 0,
            recorded: 0,
            control_is_up: true,
        }
    }

    pub(super) fn part(&self, shard: Shard) -> Part {
        self.servers[shard].now.part
    }
}
