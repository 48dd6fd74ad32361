//! Words that come from elsewhere and are shown on a person's terminal.

use std::fmt::Write as _;

/// The words of somebody else as they may be shown: on one line, without anything that a terminal obeys or that hides or turns around
/// what stands beside it, and of at most `longest` characters, the last of them `…` where something was cut off.
///
/// ```
/// # use nsm_core::text::printable;
/// assert_eq!(printable("the way → is down", 80), "the way → is down");
/// assert_eq!(printable("\u{1b}[2Jfine\n", 80), "\\u{1b}[2Jfine\\n");
/// assert_eq!(printable("far too long", 8), "far too…");
/// ```
#[must_use]
pub fn printable(text: &str, longest: usize) -> String {
    let mut shown = String::new();
    let mut room = longest;
    for char in text.chars() {
        let start = shown.len();
        match char {
            // What `escape_debug` escapes for the sake of string literals.
            '\'' | '"' | '\\' => shown.push(char),
            _ => write!(shown, "{}", char.escape_debug()).expect("a String takes every text"),
        }
        let width = shown[start..].chars().count();
        if width > room {
            shown.truncate(start);
            if room == 0 {
                shown.pop();
            }
            shown.push('…');
            break;
        }
        room -= width;
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::printable;

    proptest! {
        #[test]
        fn nothing_that_a_terminal_obeys_is_left(text: String, longest in 1_usize..50) {
            let shown = printable(&text, longest);
            prop_assert!(shown.chars().count() <= longest);
            prop_assert!(!shown.chars().any(char::is_control));
            prop_assert_eq!(printable(&shown, longest), shown);
        }

        #[test]
        fn plain_words_stay_as_they_are(text in "[ -~äß→…]{0,50}") {
            prop_assert_eq!(printable(&text, 50), text);
        }
    }

    #[test]
    fn words_cannot_be_turned_around() {
        assert_eq!(printable("a\u{202e}b\u{2028}", 80), "a\\u{202e}b\\u{2028}");
    }
}
