//! The chart of growth: for each operation a column, in it p50 and statements per call by the number of shards.

use std::fmt::Write;

/// What is shown.
pub(crate) struct Chart {
    /// How many posts the community has; at `Series::more_data` it has ten times as many.
    pub(crate) posts: u32,
    pub(crate) series: Vec<Series>,
}

/// One operation.
pub(crate) struct Series {
    pub(crate) name: &'static str,
    /// The same community on ever more shards.
    pub(crate) by_shards: Vec<Point>,
    pub(crate) more_data: Point,
}

/// What a call took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) shards: u16,
    pub(crate) p50_ms: f64,
    pub(crate) statements: f64,
}

/// One kind of value: a row of panels.
struct Kind {
    label: [&'static str; 2],
    /// Where its baseline is.
    floor: f64,
    height: f64,
    decimals: usize,
    value: fn(&Point) -> f64,
}

const KINDS: [Kind; 2] = [
    Kind { label: ["p50", "in ms"], floor: 210.0, height: 130.0, decimals: 2, value: |point| point.p50_ms },
    Kind {
        label: ["statements", "per call"],
        floor: 350.0,
        height: 90.0,
        decimals: 0,
        value: |point| point.statements,
    },
];

const TITLE: &str = "A call by the number of shards, one call after the other";
/// Where the first column begins, how far it is to the next, and from one number of shards to the next.
const LEFT: f64 = 118.0;
const COLUMN: f64 = 170.0;
const STEP: f64 = 31.0;
const HEIGHT: f64 = 430.0;

impl Chart {
    pub(crate) fn svg(&self) -> String {
        let mut body = String::new();
        let mut left = LEFT;
        for series in &self.series {
            text(&mut body, "head", left, 70.0, series.name);
            for kind in &KINDS {
                panel(&mut body, series, kind, left);
            }
            for point in &series.by_shards {
                text(&mut body, "dim middle", x(left, point), 372.0, &point.shards.to_string());
            }
            left += COLUMN;
        }
        for Kind { label: [first, second], floor, .. } in &KINDS {
            text(&mut body, "dim", 20.0, floor - 18.0, first);
            text(&mut body, "dim", 20.0, floor - 2.0, second);
        }
        text(&mut body, "dim", 20.0, 372.0, "shards");
        legend(&mut body, self.posts);
        format!(include_str!("chart.svg"), width = left, height = HEIGHT, title = TITLE, body = body)
    }
}

fn x(left: f64, point: &Point) -> f64 {
    left + 8.0 + f64::from(point.shards).log2() * STEP
}

/// One operation's values of one kind, from zero up; the first and the last are written beside their dots.
fn panel(body: &mut String, series: &Series, kind: &Kind, left: f64) {
    let Kind { floor, height, decimals, value, .. } = *kind;
    let all = series.by_shards.iter().chain([&series.more_data]);
    let top = all.map(value).fold(f64::MIN_POSITIVE, f64::max);
    // What is written above the highest dot must fit, too.
    let y = |point: &Point| floor - value(point) / top * (height - 30.0);
    line(body, &format!(r#"<path class="axis" d="M{left} {floor}h{}"/>"#, 4.0 * STEP + 16.0));
    let dots: Vec<(f64, f64)> = series.by_shards.iter().map(|point| (x(left, point), y(point))).collect();
    let path: Vec<String> = dots.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    line(body, &format!(r#"<polyline class="line" points="{}"/>"#, path.join(" ")));
    for (x, y) in dots {
        line(body, &format!(r#"<circle class="dot" cx="{x:.1}" cy="{y:.1}" r="3"/>"#));
    }
    for point in series.by_shards.first().into_iter().chain(series.by_shards.last()) {
        text(body, "middle", x(left, point), y(point) - 9.0, &format!("{:.decimals$}", value(point)));
    }
    let more = &series.more_data;
    let (x, y) = (x(left, more), y(more));
    diamond(body, x, y);
    text(body, "told middle", x, y - 11.0, &format!("{:.decimals$}", value(more)));
}

fn legend(body: &mut String, posts: u32) {
    let (first, second, y) = (LEFT + 8.0, LEFT + 248.0, 406.0);
    line(body, &format!(r#"<circle class="dot" cx="{first}" cy="{y}" r="3"/>"#));
    text(body, "dim", first + 12.0, y + 4.0, &format!("{} posts", grouped(posts)));
    diamond(body, second, y);
    text(body, "dim", second + 12.0, y + 4.0, &format!("{} posts", grouped(posts * 10)));
}

/// A number with a comma before every three digits.
fn grouped(number: u32) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

fn diamond(body: &mut String, x: f64, y: f64) {
    line(body, &format!(r#"<path class="more" d="M{x:.1} {:.1}l5 5l-5 5l-5 -5z"/>"#, y - 5.0));
}

fn text(body: &mut String, class: &str, x: f64, y: f64, words: &str) {
    line(body, &format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{words}</text>"#));
}

fn line(body: &mut String, element: &str) {
    writeln!(body, "{element}").ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_of_some_points() {
        let series = |name, p50_ms: [f64; 5], statements: [f64; 5]| Series {
            name,
            by_shards: (0..5)
                .map(|at| Point { shards: 1 << at, p50_ms: p50_ms[at], statements: statements[at] })
                .collect(),
            more_data: Point { shards: 4, p50_ms: p50_ms[2] * 1.25, statements: statements[2] },
        };
        let chart = Chart {
            posts: 100_000,
            series: vec![
                series("get a user", [0.2, 0.2, 0.21, 0.2, 0.22], [1.0; 5]),
                series("page of a thread", [1.2, 1.5, 2.0, 3.25, 6.5], [3.0, 4.0, 6.0, 10.0, 18.0]),
            ],
        };
        insta::assert_snapshot!(chart.svg());
    }
}
