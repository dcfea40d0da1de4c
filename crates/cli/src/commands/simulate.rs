//! `therev simulate`: what the planner would do for a community that nobody has yet.

mod chart;
mod community;
mod days;

use crate::app::App;
use crate::error::{CliError, Result};
use crate::output::Output;
use crate::tables::{bytes, count, table};
use days::{Day, Setting, simulate};
use std::path::PathBuf;
use therev::planner::{By, HotUsers, OutOfBand, Reached, TOLERANCE_PERCENT, Why};

/// Show what the planner would do, day by day, without any database
///
/// A community is made up whose activity follows Zipf's law; it grows, moods change, and somebody becomes busy now and
/// then. Each day hot users are isolated and buckets rebalanced, and everything planned is done at once. The same seed gives
/// the same days.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  therev simulate --shards 256 --users 1e9 --zipf 0.9 --days 30 --svg skew.svg
  therev simulate --shards 4 --shards-after 6 --by size")]
pub(crate) struct Args {
    /// How many shards there are
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=4096))]
    shards: u16,
    /// How many there are from the second day on: more are added, or the last ones drained
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    shards_after: Option<u16>,
    /// How many users there are at first; 1e9 is a billion
    #[arg(long, value_name = "N", default_value = "1e6", value_parser = users)]
    users: f64,
    /// Zipf's exponent of the users' activity; 0 is even
    #[arg(long, value_name = "S", default_value_t = 0.9, value_parser = exponent)]
    zipf: f64,
    /// How many days
    #[arg(long, value_name = "D", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
    /// Which community of this size
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// What is to be balanced: load or size
    #[arg(long, value_name = "WHAT", default_value_t = By::Load)]
    by: By,
    /// What is done about hot users: off, plan (only counted, the first ones) or apply
    #[arg(long, value_name = "POLICY", default_value_t = HotUsers::Apply)]
    hot_users: HotUsers,
    /// How many buckets may move in a day
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    max_moves: Option<u16>,
    /// Write a chart into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn users(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (1.0..=1e12).contains(&value) => Ok(value.round()),
        _ => Err("a number from 1 to 1e12 is wanted".into()),
    }
}

fn exponent(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=10.0).contains(&value) => Ok(value),
        _ => Err("a number from 0 to 10 is wanted".into()),
    }
}

pub(crate) fn run(app: &App, args: Args) -> Result<()> {
    let Args { shards, shards_after, users, zipf, days, seed, by, hot_users, max_moves, svg } = args;
    let shards_after = shards_after.unwrap_or(shards);
    let max_moves = max_moves.map(usize::from);
    let setting = Setting { shards, shards_after, users, zipf, days, seed, by, hot_users, max_moves };
    let days = simulate(setting)
        .map_err(|error| CliError::invalid(error.to_string(), "correct it and run the command again"))?;
    if let Some(file) = &svg {
        let picture = chart::svg(&title(setting), &days);
        std::fs::write(app.folder.join(file), picture).map_err(|e| CliError::file("write", file, &e))?;
    }
    let facts = serde_json::json!({ "setting": setting, "days": days });
    app.out.fact(&facts, || said(setting, &days, &app.out))
}

fn title(setting: Setting) -> String {
    let Setting { shards, shards_after, users, zipf, by, .. } = setting;
    let after = if shards_after == shards { String::new() } else { format!(", then {shards_after}") };
    format!("{shards} shards{after}, {users:e} users, Zipf {zipf}, balanced by {by}")
}

fn said(setting: Setting, days: &[Day], out: &Output) -> String {
    let header =
        ["day", "shards", "skew before", "skew after", "buckets", "bytes", "of all", "rounds", "hot", "pins", "out"];
    let row = |day: &Day| {
        vec![
            day.number.to_string(),
            day.shards.to_string(),
            format!("{:.2}", day.skew_before),
            format!("{:.2}", day.skew_after),
            day.moves.to_string(),
            size(day.bytes),
            format!("{:.2} %", part(day.bytes, day.bytes_all) * 100.0),
            day.rounds.to_string(),
            day.isolated.to_string(),
            day.pins.to_string(),
            format!("{} → {}", day.out_before, day.out_after),
        ]
    };
    let table = table(out.width, &header, &header, days.iter().map(row));
    let mut lines = vec![out.bold(&title(setting)), String::new(), table, String::new()];
    lines.push(summary(days));
    lines.extend(days.last().and_then(left));
    lines.join("\n")
}

fn summary(days: &[Day]) -> String {
    let (moves, moved) = days.iter().fold((0, 0_u64), |(n, sum), day| (n + day.moves, sum + day.bytes));
    let [number, moves] = [days.len(), moves].map(|number| i64::try_from(number).unwrap_or(i64::MAX));
    let a_day = moved / u64::try_from(days.len().max(1)).unwrap_or(1);
    format!(
        "In {}: {} and {} moved, {} a day.\n\
         Skew is the fullest shard beside its share; out are shards more than {TOLERANCE_PERCENT} % from theirs.",
        count(number, "day"),
        count(moves, "bucket"),
        size(moved),
        size(a_day),
    )
}

/// What is not in balance at the end of the last day, and why.
fn left(day: &Day) -> Option<String> {
    let out = match &day.reached {
        Reached::Within => return None,
        Reached::MaxMoves => return Some("There was more to do on the last day than --max-moves allows.".to_owned()),
        Reached::AsNearAsPossible(out) => out,
    };
    let of = |is: fn(&OutOfBand) -> bool| i64::try_from(out.iter().filter(|it| is(it)).count()).unwrap_or(i64::MAX);
    let told = [
        (of(|it| it.why == Why::Pins), "by pinned users that are too much by themselves"),
        (of(|it| matches!(it.why, Why::Bucket(_))), "by one bucket that is too much by itself"),
        (of(|it| it.why == Why::WholeBuckets), "since whole buckets leave no more for it"),
    ];
    let told = told.iter().filter(|(number, _)| *number > 0);
    let told: Vec<String> = told.map(|(number, reason)| format!("\n  {} {reason}", count(*number, "shard"))).collect();
    let busiest = day.busiest;
    Some(format!("The busiest user alone is {busiest:.2} shards' load. Still out at the end:{}", told.concat()))
}

fn size(amount: u64) -> String {
    bytes(i64::try_from(amount).ok())
}

#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
fn part(of: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { of as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting() -> Setting {
        Setting {
            shards: 16,
            shards_after: 20,
            users: 1e8,
            zipf: 0.9,
            days: 4,
            seed: 1,
            by: By::Load,
            hot_users: HotUsers::Apply,
            max_moves: None,
        }
    }

    fn plain() -> Output {
        Output { json: false, width: 100, colors: false }
    }

    #[test]
    fn days_fit_a_page_and_are_the_same_for_the_same_seed() {
        let days = simulate(setting()).unwrap();
        assert_eq!(days, simulate(setting()).unwrap());
        let text = said(setting(), &days, &plain());
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        insta::assert_snapshot!(text);
        insta::assert_snapshot!("chart", chart::svg(&title(setting()), &days));
    }

    #[test]
    fn drained_shards_end_empty_within_the_bound_of_a_day() {
        let days =
            simulate(Setting { shards: 8, shards_after: 4, max_moves: Some(600), days: 6, ..setting() }).unwrap();
        assert!(days.iter().all(|day| day.moves <= 600), "{days:?}");
        assert_eq!(days[1].reached, Reached::MaxMoves);
        assert_ne!(days[5].reached, Reached::MaxMoves, "{days:?}");
        assert!(days.iter().map(|day| day.moves).sum::<usize>() >= 2_048);
    }

    #[test]
    fn hot_users_are_counted_pinned_or_left_alone() {
        let pins = |hot_users| {
            let days = simulate(Setting { hot_users, shards: 64, shards_after: 64, ..setting() }).unwrap();
            (days.iter().map(|day| day.isolated).sum::<usize>(), days[3].pins)
        };
        assert_eq!(pins(HotUsers::Off), (0, 0));
        let (counted, pinned) = pins(HotUsers::Plan);
        assert!(counted > 0 && pinned == 0, "{counted} {pinned}");
        assert!(pins(HotUsers::Apply).1 > 0);
    }

    #[test]
    fn what_no_placement_evens_is_said() {
        let setting = Setting { shards: 256, shards_after: 256, users: 1e9, days: 1, ..setting() };
        let text = said(setting, &simulate(setting).unwrap(), &plain());
        assert!(text.contains("by one bucket that is too much by itself"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn users_are_a_number_in_any_form() {
        let read = ["1e9", "250", "2.5e3"].map(|text| users(text).unwrap().to_string());
        assert_eq!(read, ["1000000000", "250", "2500"]);
        assert!(["0", "-1", "many", "nan", "1e13"].iter().all(|text| users(text).is_err()));
    }
}
