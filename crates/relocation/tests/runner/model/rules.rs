//! The rules of the switch, each of which can be left out: the model must then find what it was for.

/// One rule of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// A draining source refuses writes.
    DrainedRefusesWrites,
    /// A write takes the table's lock first and looks at the part in a snapshot that is younger.
    LockBeforeFence,
    /// `drain(k)` compares the attempt: not once more after a back-out. (It compares the state, too; nothing rests on that,
    /// since whoever decided did so with an attempt that is no smaller.)
    DrainComparesAttempt,
    /// `send_sentinel` comes after `wait_for_writers`.
    WaitForWriters,
    /// `get_ready(k)` finds k in the target's sentinel row, in its own transaction.
    SentinelBeforeReady,
    /// `get_ready` commits synchronously, on the standbys too.
    ReadyIsDurable,
    /// Whoever finds *ready, k* instead of making it so makes it durable before he builds upon it.
    ReadyFoundIsMadeDurable,
    /// `decide(k)` is committed only by whoever knows that `get_ready(k)` committed.
    DecideAfterReady,
    /// `decide(k)` compares the attempt.
    DecideComparesAttempt,
    /// `decide(k)` compares the state: not after a back-out.
    DecideComparesState,
    /// `back_out(k)` compares the state: not after a decision.
    BackOutComparesState,
    /// `take_over(k)` is committed only by whoever knows that the source said *moved* with that k.
    TakeOverAfterMoved,
    /// `take_over(k)` compares the state: done once more, it would move `since` past what was written meanwhile. (It compares the
    /// attempt, too; nothing rests on that, since a target that gave the bucket back gets ready no more.)
    TakeOverComparesState,
    /// `decide` commits synchronously, on the standbys too.
    MovedIsDurable,
    /// Whoever finds *moved, k* instead of making it so makes it durable before he builds upon it.
    MovedFoundIsMadeDurable,
    /// Whoever finds *owned* at the target instead of making it so makes it durable before he builds upon it.
    OwnedFoundIsMadeDurable,
    /// The control database lets only a higher epoch replace what it says.
    HigherEpochInControl,
    /// A node says with which epoch it was sent, and the shard waits with it instead of sending it back.
    HigherEpochInNodes,
    /// A node that has waited where it was sent asks the peer, and believes it if it owns, whatever the epochs: what
    /// sent the node may be gone with a promotion.
    OwnerIsBelieved,
    /// `stop_forward` comes before `start_reverse`.
    ForwardStopped,
    /// The reverse stream begins at `since`.
    ReverseBeginsAtSince,
    /// `start_reverse` does nothing to a stream that was started before.
    ReverseStartsOnce,
    /// `get_ready` refuses in another incarnation of the target.
    ReadyInOneLife,
    /// `decide` refuses in another incarnation of the source. (So does `drain`, to spare a pause that leads nowhere;
    /// nothing rests on it, and the drain of the model does not refuse.)
    DecideInOneLife,
}

impl Rule {
    /// All of them.
    pub(super) const ALL: [Rule; 24] = [
        Rule::DrainedRefusesWrites,
        Rule::LockBeforeFence,
        Rule::DrainComparesAttempt,
        Rule::WaitForWriters,
        Rule::SentinelBeforeReady,
        Rule::ReadyIsDurable,
        Rule::ReadyFoundIsMadeDurable,
        Rule::DecideAfterReady,
        Rule::DecideComparesAttempt,
        Rule::DecideComparesState,
        Rule::BackOutComparesState,
        Rule::TakeOverAfterMoved,
        Rule::TakeOverComparesState,
        Rule::MovedIsDurable,
        Rule::MovedFoundIsMadeDurable,
        Rule::OwnedFoundIsMadeDurable,
        Rule::HigherEpochInControl,
        Rule::HigherEpochInNodes,
        Rule::OwnerIsBelieved,
        Rule::ForwardStopped,
        Rule::ReverseBeginsAtSince,
        Rule::ReverseStartsOnce,
        Rule::ReadyInOneLife,
        Rule::DecideInOneLife,
    ];
}
