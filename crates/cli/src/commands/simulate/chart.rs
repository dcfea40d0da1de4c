//! The chart of a simulation: skew before and after each day's plan, and what moves.

use super::days::Day;
use crate::tables::bytes;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 440.0;
/// Where days begin and end.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 840.0;

/// A picture with days from left to right.
struct Panel {
    name: [&'static str; 2],
    floor: f64,
    height: f64,
    /// The values at its floor and at its ceiling.
    from: f64,
    to: f64,
}

impl Panel {
    fn y(&self, value: f64) -> f64 {
        let span = (self.to - self.from).max(f64::MIN_POSITIVE);
        self.floor - (value - self.from) / span * self.height
    }

    /// Its name, its floor, and lines at a few values.
    fn frame(&self, body: &mut String, values: &[(f64, String)]) {
        text(body, "head", 20.0, self.floor - self.height - 26.0, self.name[0]);
        text(body, "dim", LEFT, self.floor - self.height - 26.0, self.name[1]);
        for (value, words) in values {
            let y = self.y(*value);
            line(body, &format!(r#"<path class="axis" d="M{LEFT} {y:.1}H{RIGHT}"/>"#));
            text(body, "dim end", LEFT - 8.0, y + 4.0, words);
        }
    }
}

/// The chart as SVG.
pub(super) fn svg(title: &str, days: &[Day]) -> String {
    let mut body = String::new();
    skews(&mut body, days);
    moved(&mut body, days);
    for day in days.iter().step_by((days.len() / 10).max(1)) {
        text(&mut body, "dim middle", x(day, days), 402.0, &day.number.to_string());
    }
    text(&mut body, "dim", 20.0, 402.0, "day");
    format!(include_str!("chart.svg"), width = WIDTH, height = HEIGHT, title = title, body = body)
}

/// How wide a day is.
fn step(days: &[Day]) -> f64 {
    (RIGHT - LEFT) / days.last().map_or(1.0, |day| f64::from(day.number))
}

/// The middle of a day.
fn x(day: &Day, days: &[Day]) -> f64 {
    LEFT + (f64::from(day.number) - 0.5) * step(days)
}

fn skews(body: &mut String, days: &[Day]) {
    let top = days.iter().map(|day| day.skew_before.max(day.skew_after)).fold(1.1, f64::max);
    let name = ["Skew", "the fullest shard beside its share: dashed before the day's moves, solid after them"];
    let panel = Panel { name, floor: 210.0, height: 110.0, from: 1.0, to: top };
    panel.frame(body, &[(1.0, "1.0".to_owned()), (top, format!("{top:.1}"))]);
    curve(body, &panel, "before", days, |day| day.skew_before);
    curve(body, &panel, "after", days, |day| day.skew_after);
}

fn curve(body: &mut String, panel: &Panel, class: &str, days: &[Day], value: fn(&Day) -> f64) {
    let point = |day: &Day| format!("{:.1},{:.1}", x(day, days), panel.y(value(day).max(1.0)));
    let points: Vec<String> = days.iter().map(point).collect();
    line(body, &format!(r#"<polyline class="{class}" points="{}"/>"#, points.join(" ")));
}

fn moved(body: &mut String, days: &[Day]) {
    let most = days.iter().map(|day| day.bytes).max().unwrap_or(0);
    let name = ["Moved", "bytes each day"];
    let panel = Panel { name, floor: 384.0, height: 100.0, from: 0.0, to: amount(most.max(1)) };
    panel.frame(body, &[(0.0, "0".to_owned()), (amount(most), bytes(i64::try_from(most).ok()))]);
    let width = step(days) * 0.7;
    for day in days.iter().filter(|day| day.bytes > 0) {
        let (left, top) = (x(day, days) - width / 2.0, panel.y(amount(day.bytes)));
        let height = panel.floor - top;
        line(
            body,
            &format!(r#"<rect class="bar" x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}"/>"#),
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "a height in a picture")]
fn amount(bytes: u64) -> f64 {
    bytes as f64
}

fn text(body: &mut String, class: &str, x: f64, y: f64, words: &str) {
    line(body, &format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{words}</text>"#));
}

fn line(body: &mut String, element: &str) {
    // Writing into a string does not fail.
    writeln!(body, "{element}").ok();
}
