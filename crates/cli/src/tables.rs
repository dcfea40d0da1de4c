//! Tables, numbers and times as people read them.

use chrono::{DateTime, Utc};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table};
use therev::import::ShardRows;

/// A table without lines; columns named in `right` hold numbers, and a column of ids is never broken.
pub(crate) fn table(
    width: usize,
    header: &[&str],
    right: &[&str],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(u16::try_from(width).unwrap_or(u16::MAX)).force_no_tty();
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for (at, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(at) {
            column.set_padding((0, 2));
            if *name == "id" {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
            if right.contains(name) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// What each shard got of a load.
pub(crate) fn per_shard(width: usize, shards: &[ShardRows]) -> String {
    let numbers = |shard: &ShardRows| [shard.users, shard.threads, shard.posts].map(|number| number.to_string());
    let rows = shards.iter().map(|shard| [vec![format!("shard {}", shard.shard)], numbers(shard).to_vec()].concat());
    table(width, &["", "users", "threads", "posts"], &["users", "threads", "posts"], rows)
}

/// How a load ends: what waits for a database that is down, and how fast it was.
pub(crate) fn load_end(undelivered: u64, written: u64, seconds: f64) -> Vec<String> {
    let of = |number: u64, what| count(i64::try_from(number).unwrap_or(i64::MAX), what);
    let waiting = (undelivered > 0).then(|| {
        let events = of(undelivered, "event");
        format!("A database is down: {events} wait. `therev relay --once` delivers them when it is back.")
    });
    let speed = u32::try_from(written).map_or(f64::INFINITY, f64::from) / seconds.max(0.001);
    let wrote = format!("Wrote {} in {seconds:.1} s: {speed:.0} rows/s.", of(written, "row"));
    waiting.into_iter().chain([wrote]).collect()
}

/// A number that may be unknown.
pub(crate) fn number<T: ToString>(number: Option<T>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

/// A size that people can compare.
pub(crate) fn bytes(bytes: Option<i64>) -> String {
    let Some(bytes) = bytes.and_then(|n| u64::try_from(n).ok()) else { return "-".to_owned() };
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut unit = 0;
    let mut size = bytes;
    while size >= 10 * 1_024 && unit + 1 < units.len() {
        size = (size + 512) / 1_024;
        unit += 1;
    }
    format!("{size} {}", units[unit])
}

/// A time, to the minute.
pub(crate) fn minute(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M UTC").to_string()
}

/// A time, to the day.
pub(crate) fn day(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d").to_string()
}

/// `1 post`, `2 posts`.
pub(crate) fn count(number: i64, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_fits_its_width() {
        let title = "A title that is far too long for one line of such a narrow table".to_owned();
        let text =
            table(60, &["title", "posts"], &["posts"], [vec![title, "12".into()], vec!["Short".into(), "3".into()]]);
        assert!(text.lines().all(|line| line.chars().count() <= 60), "{text}");
        insta::assert_snapshot!(text);
    }

    #[test]
    fn sizes_are_short() {
        let sizes = [None, Some(0), Some(9_000), Some(20_000), Some(50_000_000)].map(bytes);
        assert_eq!(sizes, ["-", "0 B", "9000 B", "20 kB", "48 MB"]);
        assert_eq!(count(1, "post"), "1 post");
        assert_eq!(count(0, "post"), "0 posts");
    }
}
