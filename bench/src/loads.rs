//! Many rows: import, generate, check.

use crate::cluster::{Databases, Servers};
use crate::figure::{Figure, Pairs, count, median};
use crate::ground::{Ground, plan};
use crate::{Anyhow, bare};
use std::path::Path;
use std::time::Instant;
use therev::Therev;

/// How many posts a generation has whose rate is taken.
const GENERATED: u32 = 200_000;

/// The rates of one way to fill a cluster, beside COPY of the same rows.
#[derive(Default)]
struct Rates {
    all: Pairs,
    own: Pairs,
}

impl Rates {
    /// Fills a fresh cluster, then copies what lies there into twins of its tables.
    async fn measure(
        &mut self,
        servers: &Servers,
        runs: usize,
        fill: impl AsyncFn(&Therev, &Databases) -> Anyhow<()>,
    ) -> Anyhow<()> {
        for run in 0..=runs {
            let databases = servers.databases(&format!("load_{run}"), 4).await?;
            let node = therev::connect(databases.config()).await?;
            // Both sides are connected before the clock starts, and the servers have written everything before it.
            futures_util::future::try_join_all((0..2).map(|_| node.overview())).await?;
            databases.checkpoint().await?;
            let started = Instant::now();
            fill(&node, &databases).await?;
            let seconds = started.elapsed().as_secs_f64();
            let own = bare::copy(&databases, bare::OWN).await?;
            let all = bare::copy(&databases, bare::ALL).await?;
            // The first run warms servers and files up.
            if run > 0 {
                self.all.add(count(all.rows) / seconds, count(all.rows) / all.seconds);
                self.own.add(count(own.rows) / seconds, count(own.rows) / own.seconds);
            }
            drop(node);
            databases.remove().await?;
        }
        Ok(())
    }

    fn figures(&self, what: &str) -> Vec<Figure> {
        let all = self.all.rate(what, Some(0.5), "rows/s");
        let own = self.own.rate(&format!("{what}_own_rows"), None, "rows/s");
        vec![
            all.note("bare: COPY of every row that was written, derived ones too, into the same tables"),
            own.note("bare: COPY of users, threads and posts alone"),
        ]
    }
}

pub(crate) async fn import(servers: &Servers, runs: usize, dump: &Path) -> Anyhow<Vec<Figure>> {
    let mut rates = Rates::default();
    let fill = async |node: &Therev, _: &Databases| {
        therev::import::stackexchange(node, dump, "bench", &mut |_| {}).await?;
        Ok(())
    };
    rates.measure(servers, runs, fill).await?;
    Ok(rates.figures("import"))
}

pub(crate) async fn generate(servers: &Servers, runs: usize) -> Anyhow<Vec<Figure>> {
    let mut rates = Rates::default();
    let fill = async |node: &Therev, _: &Databases| {
        therev::generate::generate(node, plan(GENERATED), &mut |_| {}).await?;
        Ok(())
    };
    rates.measure(servers, runs, fill).await?;
    let mut figures = rates.figures("generate");
    figures.push(generate_million(servers).await?);
    Ok(figures)
}

/// A community of a million posts, from empty tables to the last of it told.
async fn generate_million(servers: &Servers) -> Anyhow<Figure> {
    let databases = servers.databases("million", 4).await?;
    let node = therev::connect(databases.config()).await?;
    let started = Instant::now();
    therev::generate::generate(&node, plan(1_000_000), &mut |_| {}).await?;
    let seconds = started.elapsed().as_secs_f64();
    drop(node);
    databases.remove().await?;
    Ok(Figure::at_most("generate_million", seconds, Some(180.0), "s", 1).note("1,000,000 posts"))
}

/// The whole cluster, proved.
pub(crate) async fn check(ground: &Ground<'_>) -> Anyhow<Vec<Figure>> {
    let node = therev::connect(ground.databases.config()).await?;
    node.relay_once().await?;
    let mut seconds = Vec::new();
    for _ in 0..ground.runs {
        let started = Instant::now();
        let report = node.check().await?;
        seconds.push(started.elapsed().as_secs_f64());
        if !report.ok {
            return Err("check found something wrong".into());
        }
    }
    let runs = seconds.len();
    Ok(vec![Figure::at_most("check", median(seconds), Some(60.0), "s", runs).note("the whole cluster")])
}
