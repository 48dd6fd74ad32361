//! What the demo prints: each step with its time.

use std::time::Instant;

/// Prints steps with the time since the beginning; on standard error where standard output is for JSON.
pub(super) struct Transcript {
    start: Instant,
    to_stderr: bool,
}

impl Transcript {
    pub(super) fn begin(to_stderr: bool) -> Self {
        Self {
            start: Instant::now(),
            to_stderr,
        }
    }

    /// A step, with the time at which it was done.
    pub(super) fn step(&mut self, what: &str) {
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        self.print(&format!("{ms:9.1} ms  {what}"));
    }

    /// More about the last step.
    pub(super) fn detail(&mut self, what: &str) {
        self.print(&format!("{:14}{what}", ""));
    }

    /// A text of several lines, as it is.
    pub(super) fn text(&mut self, what: &str) {
        self.print(&format!("\n{}\n", what.trim_end()));
    }

    fn print(&self, line: &str) {
        if self.to_stderr {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }
}
