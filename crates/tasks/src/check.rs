//! Checks of what callers hand in: PostgreSQL can hold it, and it is of a bounded size.

use community::{Error, Result, json_fault};
use serde_json::Value;

/// The largest JSON value, in bytes of its text.
pub(crate) const JSON_BYTES_MAX: usize = 1_048_576;
/// The most rows of one list.
const LIMIT_MAX: i64 = 1_000;

pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::Invalid { field, reason: reason.into() }
}

/// A text of 1 to `most` characters.
pub(crate) fn check_text(field: &'static str, text: &str, most: usize) -> Result<()> {
    if text.trim().is_empty() {
        return Err(invalid(field, "it is empty"));
    }
    if text.contains('\0') {
        return Err(invalid(field, "it holds a NUL character"));
    }
    let length = text.chars().count();
    if length > most {
        return Err(invalid(field, format!("it has {length} characters, {most} are allowed")));
    }
    Ok(())
}

/// A JSON object that jsonb can hold.
pub(crate) fn check_object(field: &'static str, value: &Value) -> Result<()> {
    if !value.is_object() {
        return Err(invalid(field, "it is no JSON object"));
    }
    check_json(field, value)
}

/// A JSON value that jsonb can hold: without NUL characters, of a bounded depth and size.
pub(crate) fn check_json(field: &'static str, value: &Value) -> Result<()> {
    json_fault(value, JSON_BYTES_MAX).map_or(Ok(()), |fault| Err(invalid(field, fault)))
}

/// 1 (first) to 10.
pub(crate) fn check_priority(priority: i16) -> Result<()> {
    check_range("priority", i32::from(priority), 10)
}

/// A number from 1 to `most`.
pub(crate) fn check_range(field: &'static str, number: i32, most: i32) -> Result<()> {
    if (1..=most).contains(&number) {
        Ok(())
    } else {
        Err(invalid(field, format!("it is {number}, 1 to {most} are allowed")))
    }
}

/// How many rows a list gives.
pub(crate) fn bounded(limit: i64) -> i64 {
    limit.clamp(0, LIMIT_MAX)
}

/// A word of a closed list, which the schema has checked.
pub(crate) fn word<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| invalid("row", format!("`{text}` is a word that this program does not know")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(outcome: Result<()>) -> String {
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn texts_are_bounded_and_hold_no_nul() {
        check_text("label", &"ä".repeat(100), 100).unwrap();
        assert_eq!(
            refused(check_text("label", &"ä".repeat(101), 100)),
            "label: it has 101 characters, 100 are allowed"
        );
        assert_eq!(refused(check_text("label", " \t", 100)), "label: it is empty");
        assert_eq!(refused(check_text("label", "a\0b", 100)), "label: it holds a NUL character");
    }

    #[test]
    fn json_holds_no_nul_in_texts_or_keys() {
        check_json("input", &json!([null, true, 1.5, "two", { "a": [] }])).unwrap();
        check_json("input", &json!("a backslash and then u0000: \\u0000")).unwrap();
        for wrong in [json!("\0"), json!({ "a": ["x\0"] }), json!([{ "a\0": 1 }])] {
            assert_eq!(refused(check_json("input", &wrong)), "input: it holds a NUL character");
        }
        assert_eq!(refused(check_object("limits", &json!([]))), "limits: it is no JSON object");
    }

    #[test]
    fn json_is_bounded_in_depth_and_size() {
        let deep = |depth| (1..depth).fold(json!([]), |inner, _| json!([inner]));
        check_json("input", &deep(127)).unwrap();
        assert_eq!(refused(check_json("input", &deep(128))), "input: it nests deeper than 127");
        check_json("input", &json!("x".repeat(JSON_BYTES_MAX - 2))).unwrap();
        check_json("input", &json!("x".repeat(JSON_BYTES_MAX - 1))).unwrap_err();
    }

    #[test]
    fn numbers_keep_their_ranges() {
        for number in [1, 10] {
            check_priority(number).unwrap();
        }
        assert_eq!(refused(check_priority(0)), "priority: it is 0, 1 to 10 are allowed");
        assert_eq!(refused(check_range("max_attempts", 101, 100)), "max_attempts: it is 101, 1 to 100 are allowed");
        assert_eq!((bounded(-1), bounded(7), bounded(i64::MAX)), (0, 7, 1_000));
    }
}
