//! What each try of a switch took, step by step: for the log, and for whoever measures.

use std::time::{Duration, Instant};

/// One try of a switch.
#[derive(Debug, Clone)]
pub struct Try {
    /// Of which relocation.
    pub relocation: i64,
    /// Which try.
    pub attempt: i32,
    /// When it was about to drain: writes wait from a moment after this.
    pub began: Instant,
    /// The steps that it came through, in order, each with the moment at which it was over.
    pub steps: Vec<(&'static str, Instant)>,
    /// Why it was given up; `None`: the buckets changed hands.
    pub backed_out: Option<&'static str>,
}

impl Try {
    pub(crate) fn begin(relocation: i64, attempt: i32) -> Try {
        Try { relocation, attempt, began: Instant::now(), steps: Vec::with_capacity(8), backed_out: None }
    }

    pub(crate) fn done(&mut self, step: &'static str) {
        self.steps.push((step, Instant::now()));
    }

    /// When a step was over, if the try came so far.
    pub fn at(&self, step: &str) -> Option<Instant> {
        self.steps.iter().find(|(name, _)| *name == step).map(|(_, at)| *at)
    }

    /// When it was over.
    pub fn ended(&self) -> Instant {
        self.steps.last().map_or(self.began, |(_, at)| *at)
    }

    /// How long each step took.
    pub fn durations(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let before = std::iter::once(self.began).chain(self.steps.iter().map(|(_, at)| *at));
        self.steps.iter().zip(before).map(|((name, at), before)| (*name, *at - before))
    }

    /// The same in words.
    pub(crate) fn told(&self) -> String {
        let all = self.durations().map(|(name, took)| format!("{name} {:.1} ms", took.as_secs_f64() * 1_000.0));
        all.collect::<Vec<_>>().join(", ")
    }
}
