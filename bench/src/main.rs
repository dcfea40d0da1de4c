//! What an import costs beside COPY, how long a check takes, how long a thread takes to open.
//!
//! On a cluster of its own (four servers, fsync on), made in a temporary folder and removed afterwards. Both sides are
//! measured in the same run, alternating; the figures are medians.

mod bare;
mod cluster;

use clap::Parser;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Measures therev beside bare PostgreSQL.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// A folder with a Stack Exchange data dump.
    dump: PathBuf,
    /// How often each side is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..100))]
    runs: u32,
    /// The `therev` program whose `thread show` is timed; without it that figure is left out.
    #[arg(long)]
    therev: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One figure.
#[derive(Serialize)]
struct Figure {
    name: &'static str,
    ours: f64,
    bare: Option<f64>,
    ratio: Option<f64>,
    goal: f64,
    ok: bool,
    unit: &'static str,
    runs: u32,
    note: &'static str,
}

type Anyhow<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> Anyhow<()> {
    let arguments = Arguments::parse();
    let folder = tempfile::tempdir()?;
    let servers = cluster::Servers::start(folder.path())?;
    let figures = measure(&arguments, &servers).await;
    servers.remove()?;
    let figures = figures?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        println!("{}", table(&figures));
    }
    if figures.iter().all(|figure| figure.ok) { Ok(()) } else { Err("a goal was missed".into()) }
}

async fn measure(arguments: &Arguments, servers: &cluster::Servers) -> Anyhow<Vec<Figure>> {
    let mut seconds = Series::default();
    for run in 0..=arguments.runs {
        let databases = servers.databases(run).await?;
        let node = therev::connect(databases.config()).await?;
        // Both sides are connected before the clock starts.
        node.overview().await?;
        let started = Instant::now();
        let report = therev::import::stackexchange(&node, &arguments.dump, "bench", &mut |_| {}).await?;
        let import = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let checked = node.check().await?;
        let check = started.elapsed().as_secs_f64();
        if !checked.ok {
            return Err("check found something wrong after the import".into());
        }
        // The read rows are what COPY is compared by; all rows are those and what was derived from them.
        let read_rows = bare::copy(&databases, bare::READ).await?;
        let all_rows = bare::copy(&databases, bare::ALL).await?;
        let page = match &arguments.therev {
            Some(program) => Some(open_thread(program, &databases, &node).await?),
            None => None,
        };
        let written: u64 = report.written.values().sum();
        if written != read_rows.rows {
            return Err(format!("{written} rows were imported, {} copied", read_rows.rows).into());
        }
        // The first run warms servers and files up.
        if run > 0 {
            seconds.add(import, check, &read_rows, &all_rows, page);
        }
        databases.remove().await?;
    }
    Ok(seconds.figures(arguments.runs))
}

/// Opens the busiest thread by the command line, the start of the process included.
async fn open_thread(program: &PathBuf, databases: &cluster::Databases, node: &therev::Therev) -> Anyhow<f64> {
    let busiest = node.threads(therev::ThreadOrder::MostActive, None, 1, None).await?;
    let thread = busiest.items.first().ok_or("the dump has no thread")?.thread_id.to_string();
    let run = || {
        let arguments = ["--control", &databases.control(), "thread", "show", &thread, "--page-size", "50"];
        std::process::Command::new(program).args(arguments).output()
    };
    run()?;
    let started = Instant::now();
    let output = run()?;
    let seconds = started.elapsed().as_secs_f64();
    if output.status.success() { Ok(seconds) } else { Err(String::from_utf8_lossy(&output.stderr).into()) }
}

#[derive(Default)]
struct Series {
    import: Vec<f64>,
    check: Vec<f64>,
    read_rows: Vec<f64>,
    all_rows: Vec<f64>,
    page: Vec<f64>,
    rows: (f64, f64),
}

impl Series {
    fn add(&mut self, import: f64, check: f64, read: &bare::Copied, all: &bare::Copied, page: Option<f64>) {
        self.import.push(import);
        self.check.push(check);
        self.read_rows.push(read.seconds);
        self.all_rows.push(all.seconds);
        self.page.extend(page);
        self.rows = (count(read.rows), count(all.rows));
    }

    fn figures(&self, runs: u32) -> Vec<Figure> {
        let (import, read, all) = (median(&self.import), median(&self.read_rows), median(&self.all_rows));
        let against = |name, rows: f64, bare: f64, note| {
            let ratio = bare / import;
            let (ours, bare) = (rows / import, Some(rows / bare));
            Figure { name, ours, bare, ratio: Some(ratio), goal: 0.5, ok: ratio >= 0.5, unit: "rows/s", runs, note }
        };
        let limit = |name, ours: f64, goal, unit, note| Figure {
            name,
            ours,
            bare: None,
            ratio: None,
            goal,
            ok: ours <= goal,
            unit,
            runs,
            note,
        };
        let mut figures = vec![
            against("import, all rows", self.rows.1, all, "COPY of every row that the import wrote, derived ones too"),
            against("import, users threads posts", self.rows.0, read, "COPY of the dump's own rows alone"),
            limit("check", median(&self.check), 3.0, "s", "the whole cluster"),
        ];
        if !self.page.is_empty() {
            let note = "the process's start included";
            figures.push(limit("thread show, 50 posts", median(&self.page) * 1_000.0, 100.0, "ms", note));
        }
        figures
    }
}

fn count(rows: u64) -> f64 {
    f64::from(u32::try_from(rows).unwrap_or(u32::MAX))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(figures: &[Figure]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["figure", "ours", "bare", "ratio", "goal", "ok", "unit"]);
    for figure in figures {
        let optional = |value: Option<f64>, digits| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        table.add_row([
            figure.name.to_owned(),
            format!("{:.2}", figure.ours),
            optional(figure.bare, 0),
            optional(figure.ratio, 2),
            format!("{}", figure.goal),
            if figure.ok { "yes" } else { "NO" }.to_owned(),
            figure.unit.to_owned(),
        ]);
    }
    table
}
