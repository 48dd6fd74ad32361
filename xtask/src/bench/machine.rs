//! Where is measured, and how fast that is at the time.

use std::{fs, hint::black_box, thread, time::Instant};

use anyhow::{Context as _, Result};
use nsm_stats::{fixed_work, median};

use super::{
    report::{Machine, Row},
    sink::Sink,
};

/// How often the fixed work is done at a time.
const ROUNDS: u64 = 5;

/// Times a fixed piece of work: what it takes longer than on another day, other numbers of this run took longer, too.
pub(super) fn calibrate(sink: &Sink, when: &str) {
    let times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            black_box(fixed_work());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    let value = median(&times).unwrap_or(f64::NAN);
    sink.row(Row::new(
        format!("a fixed piece of work, {when}"),
        value,
        "ms",
        ROUNDS,
    ));
}

impl Machine {
    /// Before anything is measured.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub(super) fn look() -> Result<Self> {
        let load = load_average()?;
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            load_before: load,
            load_after: load,
        })
    }

    /// The same machine after it.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub(super) fn after(mut self) -> Result<Self> {
        self.load_after = load_average()?;
        Ok(self)
    }
}

/// Of the last minute.
fn load_average() -> Result<f64> {
    let text = read("/proc/loadavg")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first
        .parse()
        .with_context(|| format!("/proc/loadavg begins with {first:?}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}
