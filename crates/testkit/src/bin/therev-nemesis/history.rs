//! Whether what was written and read can have happened one after the other.
//!
//! A history only grows, by one writer who waits for each number, so that its state is how many numbers it has. Then there
//! is an order that agrees with real time exactly if
//!
//! 1. a read that began after number `k` was acknowledged shows it;
//! 2. a read that ended before number `k` was first tried does not;
//! 3. a read that began after another one ended shows no less.
//!
//! For then each append can be put at the latest beginning of its try and of the reads that do not show it: by (1) that is
//! before it was acknowledged, by (2) and (3) before the end of each read that shows it; and these places follow one another.

use crate::journal::Append;

/// What one read showed, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) began: u64,
    pub(crate) ended: u64,
    /// How many numbers: all from 0.
    pub(crate) count: u64,
}

/// Every read that no order of appends and reads explains.
pub(crate) fn contradictions(appends: &[Append], reads: &[Read]) -> Vec<String> {
    let mut found = Vec::new();
    let mut by_end = reads.to_vec();
    by_end.sort_unstable_by_key(|read| read.ended);
    let mut by_begin = reads.to_vec();
    by_begin.sort_unstable_by_key(|read| read.began);
    let (mut ended, mut shown) = (by_end.into_iter().peekable(), 0);
    let mut acknowledged = 0;
    for read in by_begin {
        while let Some(earlier) = ended.next_if(|earlier| earlier.ended < read.began) {
            shown = earlier.count.max(shown);
        }
        let next = |at: u64| usize::try_from(at).ok().and_then(|at| appends.get(at));
        while next(acknowledged).and_then(|append| append.acknowledged_at).is_some_and(|at| at < read.began) {
            acknowledged += 1;
        }
        let Read { count, .. } = read;
        if count < acknowledged {
            found.push(format!("a read shows {count} numbers, after {acknowledged} were acknowledged: {read:?}"));
        }
        if count < shown {
            found.push(format!("a read shows {count} numbers, after one that showed {shown}: {read:?}"));
        }
        if count > 0 && next(count - 1).is_none_or(|append| append.tried_at > read.ended) {
            found.push(format!("a read shows {count} numbers, before the last of them was tried: {read:?}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use therev::{PostId, UserId};

    fn appends(times: &[(u64, Option<u64>)]) -> Vec<Append> {
        let post = PostId::new(UserId::new());
        times.iter().map(|&(tried_at, acknowledged_at)| Append { post, tried_at, acknowledged_at }).collect()
    }

    fn count(appends: &[Append], reads: &[(u64, u64, u64)]) -> usize {
        let reads: Vec<Read> = reads.iter().map(|&(began, ended, count)| Read { began, ended, count }).collect();
        contradictions(appends, &reads).len()
    }

    #[test]
    fn what_may_be_is_no_contradiction() {
        let appends = appends(&[(10, Some(20)), (30, Some(40)), (50, None)]);
        assert_eq!(count(&appends, &[]), 0);
        // Before, meanwhile either way, after; and what was never acknowledged, there or not.
        assert_eq!(count(&appends, &[(0, 5, 0), (11, 15, 0), (16, 19, 1), (21, 29, 1), (31, 60, 1), (61, 70, 2)]), 0);
        assert_eq!(count(&appends, &[(55, 60, 3), (61, 70, 3)]), 0);
        // Side by side, reads may show more and less.
        assert_eq!(count(&appends, &[(31, 39, 2), (32, 38, 1)]), 0);
    }

    #[test]
    fn each_rule_is_kept() {
        let appends = appends(&[(10, Some(20)), (30, Some(40)), (50, None)]);
        assert_eq!(count(&appends, &[(41, 45, 1)]), 1, "acknowledged and not shown");
        assert_eq!(count(&appends, &[(31, 33, 2), (34, 36, 1)]), 1, "shown and gone");
        assert_eq!(count(&appends, &[(1, 9, 1)]), 1, "shown before it was tried");
        assert_eq!(count(&appends, &[(60, 70, 4)]), 1, "shown and never tried");
        assert_eq!(count(&appends, &[(55, 60, 3), (61, 70, 2)]), 1, "open, shown and gone");
    }
}
