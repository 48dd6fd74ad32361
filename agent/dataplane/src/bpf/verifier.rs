//! What the kernel's verifier said of a program that it refused.

use std::fmt;

/// Lines that are kept. The reason stands in the last; the verifier's statistics may follow it.
const LINES: usize = 10;

/// Bytes of a line that are kept. One line lists all registers, and nobody needs those in full.
const LINE_BYTES: usize = 160;

/// The last lines of the verifier's log, which has megabytes where a program was walked for long.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifierLog(Vec<String>);

impl VerifierLog {
    /// The end of a whole log.
    pub(super) fn tail_of(log: &str) -> Self {
        let lines = log.lines().map(str::trim_end);
        let mut last: Vec<String> = lines
            .rev()
            .filter(|line| !line.is_empty())
            .take(LINES)
            .map(shortened)
            .collect();
        last.reverse();
        Self(last)
    }

    /// The lines, the last at the end: at most 10 of at most 160 bytes and an ellipsis.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

fn shortened(line: &str) -> String {
    let end = line.floor_char_boundary(LINE_BYTES);
    if end == line.len() {
        return line.to_owned();
    }
    format!("{}…", &line[..end])
}

/// As one line, for logs that have a line an event.
impl fmt::Display for VerifierLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        f.write_str(&self.0.join(" | "))
    }
}

impl fmt::Debug for VerifierLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let log: String = (0..100)
            .map(|n| format!("{n}: (b7) r0 = {n}\n\n"))
            .collect();
        let tail = VerifierLog::tail_of(&(log + "back-edge from insn 1362 to 1363\n"));
        assert_eq!(tail.lines().len(), 10);
        assert_eq!(tail.lines()[8], "99: (b7) r0 = 99");
        assert!(
            tail.to_string()
                .ends_with("99: (b7) r0 = 99 | back-edge from insn 1362 to 1363"),
            "{tail}"
        );
    }

    #[test]
    fn a_line_is_cut_between_characters() {
        let tail = VerifierLog::tail_of(&"é".repeat(1000));
        assert_eq!(tail.lines().len(), 1);
        assert!(tail.lines()[0].len() <= LINE_BYTES + '…'.len_utf8());
        assert_eq!(VerifierLog::tail_of("\n \n").to_string(), "nothing");
    }
}
