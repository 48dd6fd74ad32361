//! Text from other hosts: as a terminal may show it, and as a number.

use std::fmt;

/// Foreign text as it may be shown anywhere: in a line of the log, an error, a table. Control characters, and characters that hide or
/// reorder others, are escaped; nothing is cut off.
///
/// ```
/// # use nsm_core::text::Shown;
/// assert_eq!(Shown("nse\nERROR all is lost").to_string(), "nse\\nERROR all is lost");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|char| escape(char, f))
    }
}

/// Writes a character, escaped where it is not plain text.
fn escape(char: char, to: &mut impl fmt::Write) -> fmt::Result {
    match char {
        // What `escape_debug` escapes for the sake of string literals.
        '\'' | '"' | '\\' => to.write_char(char),
        _ => write!(to, "{}", char.escape_debug()),
    }
}

/// Foreign text as a terminal may show it: on one line, without control characters and without characters that hide or reorder
/// others, and of at most `longest` characters, the last of them `…` where something was cut off.
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
        escape(char, &mut shown).expect("a String takes every text");
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

/// A decimal number without sign.
pub(crate) fn decimal(text: &str) -> Option<u64> {
    // `parse` alone would take a sign.
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// A TCP or UDP port in decimal, without sign and never 0.
#[must_use]
pub fn port_number(text: &str) -> Option<u16> {
    let port = u16::try_from(decimal(text)?).ok()?;
    (port != 0).then_some(port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Shown, printable};

    proptest! {
        #[test]
        fn no_control_character_is_left(text: String, longest in 1_usize..50) {
            let shown = printable(&text, longest);
            prop_assert!(shown.chars().count() <= longest);
            prop_assert!(!shown.chars().any(char::is_control));
            prop_assert_eq!(printable(&shown, longest), shown);
        }

        #[test]
        fn what_is_shown_is_one_line(text: String) {
            let shown = Shown(&text).to_string();
            prop_assert!(!shown.chars().any(char::is_control));
            prop_assert_eq!(Shown(&shown).to_string(), shown);
        }

        #[test]
        fn plain_text_is_unchanged(text in "[ -~äß→…]{0,50}") {
            prop_assert_eq!(printable(&text, 50), text);
        }
    }

    #[test]
    fn text_direction_cannot_be_changed() {
        assert_eq!(printable("a\u{202e}b\u{2028}", 80), "a\\u{202e}b\\u{2028}");
    }
}
