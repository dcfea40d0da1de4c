//! Much work in parts that fit into memory.

/// Items in groups that weigh no more than `most` together, in their order; an item that weighs more is alone.
pub fn in_parts<T>(items: &[T], most: u64, weight: impl Fn(&T) -> u64) -> Vec<&[T]> {
    let (mut parts, mut start, mut together) = (Vec::new(), 0, 0_u64);
    for (at, item) in items.iter().enumerate() {
        let more = weight(item);
        if at > start && together.saturating_add(more) > most {
            parts.push(&items[start..at]);
            (start, together) = (at, 0);
        }
        together = together.saturating_add(more);
    }
    if start < items.len() {
        parts.push(&items[start..]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_part_is_too_heavy(items in proptest::collection::vec(0_u64..50, 0..40), most in 0_u64..100) {
            let parts = in_parts(&items, most, |item| *item);
            prop_assert_eq!(&parts.concat(), &items);
            for part in &parts {
                prop_assert!(part.len() == 1 || part.iter().sum::<u64>() <= most);
            }
            // Two neighbours that would fit together are one.
            for two in parts.windows(2) {
                prop_assert!(two[0].iter().sum::<u64>() + two[1][0] > most);
            }
        }
    }
}
