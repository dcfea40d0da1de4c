//! What comes while enough is under way gathers, and goes together: the busier a node is, the more of its callers share one
//! statement and its wait for the disk.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What gathers, by where it goes.
///
/// A place under way is taken by [`Gathering::begin`] or [`Gathering::add`], and given back by [`Gathering::end`] or
/// [`Gathering::next`] once nothing has gathered, or by [`Gathering::abandon`].
pub struct Gathering<To, T> {
    under_way: usize,
    gathered: usize,
    at_once: usize,
    all: Mutex<BTreeMap<To, Gathered<T>>>,
}

struct Gathered<T> {
    under_way: usize,
    waiting: Vec<T>,
}

impl<To: Ord + Copy, T> Gathering<To, T> {
    /// So many are under way to one place at the most, so many gather meanwhile, and so many of these go at once.
    pub fn new(under_way: usize, gathered: usize, at_once: usize) -> Gathering<To, T> {
        Gathering { under_way, gathered, at_once, all: Mutex::default() }
    }

    /// Takes a place under way, for whoever goes by itself; `false`: enough are, and it is to gather with the others.
    pub fn begin(&self, to: To) -> bool {
        let mut all = self.all();
        let gathered = Self::at(&mut all, to);
        let is_free = gathered.under_way < self.under_way;
        gathered.under_way += usize::from(is_free);
        is_free
    }

    /// Whoever went by itself is back; `true`: it is to carry what has gathered meanwhile.
    pub fn end(&self, to: To) -> bool {
        let mut all = self.all();
        let gathered = Self::at(&mut all, to);
        let is_wanted = !gathered.waiting.is_empty();
        gathered.under_way -= usize::from(!is_wanted);
        is_wanted
    }

    /// Adds one, or hands it back where too many wait; `true`: somebody is to carry what has gathered.
    pub fn add(&self, to: To, one: T) -> Result<bool, T> {
        let mut all = self.all();
        let gathered = Self::at(&mut all, to);
        if gathered.waiting.len() >= self.gathered {
            return Err(one);
        }
        gathered.waiting.push(one);
        let is_wanted = gathered.under_way < self.under_way;
        gathered.under_way += usize::from(is_wanted);
        Ok(is_wanted)
    }

    /// What is to be carried next. Nothing: whoever asks is not wanted any more.
    pub fn next(&self, to: To) -> Vec<T> {
        let mut all = self.all();
        let gathered = Self::at(&mut all, to);
        let many = gathered.waiting.len().min(self.at_once);
        gathered.under_way -= usize::from(many == 0);
        gathered.waiting.drain(..many).collect()
    }

    /// Nobody carries any more what has gathered, which is dropped.
    pub fn abandon(&self, to: To) {
        let mut all = self.all();
        let gathered = Self::at(&mut all, to);
        gathered.under_way -= 1;
        gathered.waiting.clear();
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<To, Gathered<T>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(all: &mut BTreeMap<To, Gathered<T>>, to: To) -> &mut Gathered<T> {
        all.entry(to).or_insert_with(|| Gathered { under_way: 0, waiting: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_while_enough_is_under_way_goes_together() {
        let gathering = Gathering::new(2, 9, 9);
        assert_eq!(gathering.add(3, 1), Ok(true));
        assert_eq!(gathering.next(3), [1]);
        assert_eq!(gathering.add(3, 2), Ok(true));
        assert_eq!(gathering.next(3), [2]);
        assert_eq!([gathering.add(3, 3), gathering.add(3, 4)], [Ok(false); 2], "two are under way");
        assert_eq!(gathering.add(1, 9), Ok(true), "elsewhere none is");
        assert_eq!(gathering.next(3), [3, 4]);
        assert!(gathering.next(3).is_empty(), "one of the two has nothing left to carry");
        assert_eq!(gathering.add(3, 5), Ok(true));
        assert_eq!(gathering.next(3), [5]);
        assert!(gathering.next(3).is_empty() && gathering.next(3).is_empty());
        assert_eq!(gathering.add(3, 6), Ok(true), "nobody is under way");
    }

    #[test]
    fn whoever_goes_alone_carries_what_has_gathered_meanwhile() {
        let gathering = Gathering::new(1, 9, 9);
        assert!(gathering.begin(()), "nobody is under way");
        assert!(!gathering.begin(()));
        assert_eq!(gathering.add((), 1), Ok(false));
        assert!(gathering.end(()));
        assert!(!gathering.begin(()), "it still is");
        assert_eq!(gathering.next(()), [1]);
        assert!(gathering.next(()).is_empty());
        assert!(gathering.begin(()) && !gathering.end(()), "nothing has gathered");
        assert!(gathering.begin(()));
    }

    #[test]
    fn neither_gathers_nor_goes_more_than_may() {
        let gathering = Gathering::new(1, 4, 3);
        assert!(gathering.begin(()));
        let added: Vec<_> = (0..6).map(|one| gathering.add((), one)).collect();
        assert_eq!(added, [Ok(false), Ok(false), Ok(false), Ok(false), Err(4), Err(5)]);
        assert!(gathering.end(()));
        assert_eq!(gathering.next(()), [0, 1, 2]);
        assert_eq!(gathering.next(()), [3]);
        assert!(gathering.next(()).is_empty());
    }

    #[test]
    fn what_nobody_carries_any_more_is_dropped_and_its_place_is_free() {
        let gathering = Gathering::new(1, 9, 9);
        assert!(gathering.begin(()));
        assert_eq!(gathering.add((), 1), Ok(false));
        gathering.abandon(());
        assert!(gathering.begin(()) && !gathering.end(()));
    }
}
