//! Figures, and what they are made of.

use crate::Anyhow;
use serde::Serialize;
use std::time::{Duration, Instant};

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) ours: f64,
    pub(crate) bare: Option<f64>,
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<f64>,
    pub(crate) ok: bool,
    pub(crate) unit: &'static str,
    pub(crate) runs: usize,
    pub(crate) note: String,
}

/// Values of runs in which both sides were measured, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    ours: Vec<f64>,
    bare: Vec<f64>,
}

impl Figure {
    /// A value that may have an upper limit.
    pub(crate) fn at_most(name: &str, ours: f64, goal: Option<f64>, unit: &'static str, runs: usize) -> Figure {
        let ok = goal.is_none_or(|goal| ours <= goal);
        Figure { name: name.to_owned(), ours, bare: None, ratio: None, goal, ok, unit, runs, note: String::new() }
    }

    pub(crate) fn note(self, note: impl Into<String>) -> Figure {
        Figure { note: note.into(), ..self }
    }
}

impl Pairs {
    pub(crate) fn add(&mut self, ours: f64, bare: f64) {
        self.ours.push(ours);
        self.bare.push(bare);
    }

    /// A rate beside the bare one: the median of the runs' ratios must reach the goal.
    pub(crate) fn rate(&self, name: &str, goal: Option<f64>, unit: &'static str) -> Figure {
        let ratio = median(self.ours.iter().zip(&self.bare).map(|(ours, bare)| ours / bare));
        self.figure(name, ratio, goal, goal.is_none_or(|goal| ratio >= goal), unit)
    }

    /// A duration beside the bare one: the median of the runs' ratios may not pass the goal.
    pub(crate) fn time(&self, name: &str, goal: Option<f64>, unit: &'static str) -> Figure {
        let ratio = median(self.ours.iter().zip(&self.bare).map(|(ours, bare)| ours / bare));
        self.figure(name, ratio, goal, goal.is_none_or(|goal| ratio <= goal), unit)
    }

    fn figure(&self, name: &str, ratio: f64, goal: Option<f64>, ok: bool, unit: &'static str) -> Figure {
        Figure {
            name: name.to_owned(),
            ours: median(self.ours.iter().copied()),
            bare: Some(median(self.bare.iter().copied())),
            ratio: Some(ratio),
            goal,
            ok,
            unit,
            runs: self.ours.len(),
            note: String::new(),
        }
    }
}

/// Operations per second of some workers in one period, each worker one operation after the other.
pub(crate) async fn throughput<F>(
    workers: usize,
    period: Duration,
    work: impl Fn(usize, u64) -> F + Clone + Send + 'static,
) -> Anyhow<f64>
where
    F: Future<Output = Anyhow<()>> + Send,
{
    let started = Instant::now();
    let tasks: Vec<_> = (0..workers)
        .map(|worker| {
            let work = work.clone();
            tokio::spawn(async move {
                let mut done = 0_u64;
                while started.elapsed() < period {
                    work(worker, done).await?;
                    done += 1;
                }
                Anyhow::Ok(done)
            })
        })
        .collect();
    let mut done = 0;
    for task in tasks {
        done += task.await??;
    }
    Ok(count(done) / started.elapsed().as_secs_f64())
}

/// How long each of some calls took, in milliseconds, one after the other.
pub(crate) async fn latencies(calls: u32, mut call: impl AsyncFnMut(u32) -> Anyhow<()>) -> Anyhow<Vec<f64>> {
    let mut all = Vec::new();
    for number in 0..calls {
        let started = Instant::now();
        call(number).await?;
        all.push(started.elapsed().as_secs_f64() * 1_000.0);
    }
    Ok(all)
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    percentile(values, 50)
}

/// The value that so many of a hundred do not pass.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, hundredths: usize) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * hundredths / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

pub(crate) fn count(rows: u64) -> f64 {
    f64::from(u32::try_from(rows).unwrap_or(u32::MAX))
}

pub(crate) fn table(figures: &[Figure]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["figure", "ours", "bare", "ratio", "goal", "ok", "unit"]);
    for figure in figures {
        let shown = |value: f64| if value >= 1_000.0 { format!("{value:.0}") } else { format!("{value:.2}") };
        let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), shown);
        let ok = if figure.goal.is_none() {
            "-"
        } else if figure.ok {
            "yes"
        } else {
            "NO"
        };
        table.add_row([
            figure.name.clone(),
            shown(figure.ours),
            optional(figure.bare),
            optional(figure.ratio),
            figure.goal.map_or_else(|| "-".to_owned(), |goal| goal.to_string()),
            ok.to_owned(),
            figure.unit.to_owned(),
        ]);
    }
    table
}
