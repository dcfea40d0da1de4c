//! People at work while rows move: callers at a steady pace, and what each of their calls took.

use crate::Anyhow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

/// One call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

impl Call {
    pub(crate) fn ms(self) -> f64 {
        self.ended.duration_since(self.began).as_secs_f64() * 1_000.0
    }

    /// Whether it was under way at some moment between these two.
    pub(crate) fn met(self, from: Instant, to: Instant) -> bool {
        self.began < to && self.ended > from
    }
}

/// What some callers did.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    pub(crate) done: Vec<Call>,
    pub(crate) failed: u64,
}

impl Calls {
    /// How long after the later of two moments the calls were answered that were under way between them.
    pub(crate) fn answers(&self, from: Instant, to: Instant) -> impl Iterator<Item = f64> {
        let met = self.done.iter().filter(move |call| call.met(from, to));
        met.map(move |call| call.ended.saturating_duration_since(to).as_secs_f64() * 1_000.0)
    }

    /// What the calls took that were under way between two moments.
    pub(crate) fn met(&self, from: Instant, to: Instant) -> impl Iterator<Item = f64> {
        self.done.iter().filter(move |call| call.met(from, to)).map(|call| call.ms())
    }
}

/// Callers at work until they are asked what they did.
pub(crate) struct Traffic {
    is_over: Arc<AtomicBool>,
    callers: Vec<JoinHandle<Calls>>,
}

impl Traffic {
    /// So many callers, so many calls a second of all of them together; a caller that had to wait does not hurry after.
    pub(crate) fn start<F>(
        callers: u32,
        per_second: u32,
        call: impl Fn(usize, u64) -> F + Clone + Send + 'static,
    ) -> Traffic
    where
        F: Future<Output = Anyhow<()>> + Send,
    {
        let is_over = Arc::new(AtomicBool::new(false));
        let period = Duration::from_secs(1) * callers / per_second;
        let begin = tokio::time::Instant::now();
        let callers = (0..callers).map(|caller| {
            let (is_over, call) = (is_over.clone(), call.clone());
            let number = usize::try_from(caller).unwrap_or(0);
            let mut ticks = tokio::time::interval_at(begin + period * caller / callers, period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            tokio::spawn(async move {
                let (mut calls, mut round) = (Calls::default(), 0);
                while !is_over.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    let began = Instant::now();
                    if let Err(error) = call(number, round).await {
                        if calls.failed == 0 {
                            let cause = error.source().map(ToString::to_string).unwrap_or_default();
                            eprintln!("a call failed: {error} {cause}");
                        }
                        calls.failed += 1;
                    }
                    calls.done.push(Call { began, ended: Instant::now() });
                    round += 1;
                }
                calls
            })
        });
        Traffic { callers: callers.collect(), is_over }
    }

    /// Ends it.
    pub(crate) async fn end(self) -> Anyhow<Calls> {
        self.is_over.store(true, Ordering::Relaxed);
        let mut all = Calls::default();
        for caller in self.callers {
            let calls = caller.await?;
            all.done.extend(calls.done);
            all.failed += calls.failed;
        }
        Ok(all)
    }
}
