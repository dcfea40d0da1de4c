//! User names made from display names.
//!
//! A display name is anything a person typed: «J. Smith», «李明», «☃». A user name has 1 to 40 characters,
//! letters and digits of any script and `_`, `-`, `.`, in one spelling (NFKC, lower case), with a letter or
//! digit at both ends. Names made here obey that; they need not be free, so [`with_suffix`] tells namesakes
//! apart.

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// The most characters that a user name may have.
const NAME_CHARS_MAX: usize = 40;

/// The most that a made name has, which leaves room for a suffix.
const MADE_CHARS_MAX: usize = 28;

/// The name of those whose display name holds no letter or digit.
const NAMELESS: &str = "user";

/// One spelling may need another: lower-casing can undo NFKC and a dropped mark can let two letters join.
/// Two rounds settle what is known; more are for what is not.
const ROUNDS_MAX: usize = 8;

/// The user name that a display name suggests: always a valid one, and itself when it is one already and short.
pub fn user_name_from(display: &str) -> String {
    made(display, MADE_CHARS_MAX)
}

/// `base-suffix`, the base shortened where both are too long together. The suffix is made a name as well, and
/// one without letters and digits adds nothing.
pub fn with_suffix(base: &str, suffix: &str) -> String {
    if spelled(suffix).is_empty() {
        return made(base, NAME_CHARS_MAX);
    }
    let suffix = made(suffix, MADE_CHARS_MAX);
    let room = NAME_CHARS_MAX - 1 - suffix.chars().count();
    format!("{}-{suffix}", made(base, room))
}

/// A valid name of at most `chars` characters.
fn made(text: &str, chars: usize) -> String {
    let mut name = spelled(text);
    for _ in 0..ROUNDS_MAX {
        let next = spelled(&name);
        if next == name {
            break;
        }
        name = next;
    }
    let name = cut(&name, chars);
    if name.is_empty() { NAMELESS.to_owned() } else { name.to_owned() }
}

/// One spelling, folded.
fn spelled(text: &str) -> String {
    // Plain ASCII is in one spelling already, but for its case.
    if text.is_ascii() {
        return folded(text.chars().map(|c| c.to_ascii_lowercase()));
    }
    let lower: String = text.nfkc().collect::<String>().to_lowercase();
    folded(lower.nfkc())
}

/// Letters and digits kept, runs of everything else folded to one character.
fn folded(lower: impl Iterator<Item = char>) -> String {
    let mut name = String::new();
    // The separator between two letters, once something follows it.
    let mut between: Option<char> = None;
    for c in lower {
        if c.is_alphanumeric() {
            if let Some(separator) = between.take().filter(|_| !name.is_empty()) {
                name.push(separator);
            }
            name.push(c);
        } else if !is_combining_mark(c) {
            let separator = if matches!(c, '-' | '.') { c } else { '_' };
            between = Some(if between.is_none_or(|other| other == separator) { separator } else { '_' });
        }
    }
    name
}

/// The first `chars` characters, without a separator at the end.
fn cut(name: &str, chars: usize) -> &str {
    let end = name.char_indices().nth(chars).map_or(name.len(), |(end, _)| end);
    name.get(..end).unwrap_or(name).trim_end_matches(|c: char| !c.is_alphanumeric())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rules, as registration checks them.
    fn is_valid(name: &str) -> bool {
        let spelled: String = name.nfkc().collect::<String>().to_lowercase();
        let ends = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        spelled == name
            && (1..=40).contains(&name.chars().count())
            && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))
            && ends(name.chars().next())
            && ends(name.chars().last())
    }

    #[test]
    fn display_names_as_people_have_them() {
        for (display, name) in [
            ("Adam Lear", "adam_lear"),
            ("  J. Smith (he/him) ", "j_smith_he_him"),
            ("user-12.x_y", "user-12.x_y"),
            ("a...b", "a.b"),
            ("a__b", "a_b"),
            ("Zoë Müller", "zoë_müller"),
            ("Zoe\u{308}", "zoë"),
            ("李明", "李明"),
            ("Ａｄａ", "ada"),
            ("ﬁnn²", "finn2"),
            ("İzmir", "izmir"),
            ("ΣΊΣΥΦΟΣ", "σίσυφος"),
            ("x\u{20dd}y", "xy"),
            ("नमस्ते", "नमसते"),
            ("☃ ☃", "user"),
            ("", "user"),
            ("\0\u{1b}[31mred", "31mred"),
            ("._-", "user"),
        ] {
            assert_eq!(user_name_from(display), name, "{display:?}");
        }
        assert_eq!(user_name_from(&"a".repeat(100)).chars().count(), 28);
        assert_eq!(user_name_from("aaaaaaaaaaaaaaaaaaaaaaaaaaa bbb"), "a".repeat(27));
    }

    #[test]
    fn suffixes_tell_namesakes_apart() {
        assert_eq!(with_suffix("anna", "42"), "anna-42");
        assert_eq!(with_suffix("anna", "-1"), "anna-1");
        assert_eq!(with_suffix("anna", ""), "anna");
        assert_eq!(with_suffix("", ""), "user");
        assert_eq!(with_suffix(&"a".repeat(28), &"9".repeat(11)).len(), 40);
        assert_eq!(with_suffix(&"a".repeat(99), "42"), format!("{}-42", "a".repeat(37)));
        assert_eq!(with_suffix(&"a".repeat(28), &"9".repeat(99)), format!("{}-{}", "a".repeat(11), "9".repeat(28)));
    }

    /// Texts that normalization has most to do with: marks, ligatures, jamo, Greek with iota.
    fn awkward() -> impl Strategy<Value = String> {
        let c = prop_oneof![
            any::<char>(),
            prop::char::range('\u{300}', '\u{36f}'),
            prop::char::range('\u{370}', '\u{3ff}'),
            prop::char::range('\u{1100}', '\u{11ff}'),
            prop::char::range('\u{1e00}', '\u{1fff}'),
            prop::char::range('\u{900}', '\u{97f}'),
            prop::char::range('\u{fb00}', '\u{fb4f}'),
            prop::char::range(' ', '~'),
        ];
        prop::collection::vec(c, 0..50).prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(2_000), ..ProptestConfig::default() })]

        #[test]
        fn made_names_are_valid_and_stay(display in awkward()) {
            let name = user_name_from(&display);
            prop_assert!(is_valid(&name), "{:?}", name);
            prop_assert!(name.chars().count() <= 28);
            prop_assert_eq!(user_name_from(&name), name);
        }

        #[test]
        fn suffixed_names_are_valid(base in awkward(), suffix in awkward()) {
            let name = with_suffix(&base, &suffix);
            prop_assert!(is_valid(&name), "{:?}", name);
        }
    }

    #[test]
    fn every_character_alone_is_valid_and_stays() {
        for c in '\0'..='\u{1ffff}' {
            let name = user_name_from(&format!("a{c}b"));
            assert!(is_valid(&name), "{c:?}");
            assert_eq!(user_name_from(&name), name, "{c:?}");
        }
    }
}
