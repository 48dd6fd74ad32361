//! Where rows go as they are measured, so that nothing that comes later can lose them.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Result, anyhow};

use super::report::{PartReport, Row};

/// All parts of a run, those that are under way included. Clones share what they hold, with the thread that attends to signals, too.
#[derive(Clone, Default)]
pub(super) struct Parts(Arc<Mutex<Vec<Arc<Sink>>>>);

impl Parts {
    /// A part that begins now; its rows are shown on stderr as they come.
    pub(super) fn begin(&self, name: &str) -> Arc<Sink> {
        eprintln!("==> {name}");
        let sink = Arc::new(Sink::new(name, true));
        lock(&self.0).push(Arc::clone(&sink));
        sink
    }

    /// What was found until now.
    pub(super) fn reports(&self) -> Vec<PartReport> {
        let parts = lock(&self.0);
        parts.iter().map(|sink| sink.report()).collect()
    }

    /// Notes on the part that is under way why it ends here.
    pub(super) fn interrupt(&self, why: &str) {
        let last = lock(&self.0).last().cloned();
        if let Some(sink) = last {
            sink.fail(why);
        }
    }
}

/// Rows and notes of one part. A row that was put here is printed, whatever fails later.
pub(super) struct Sink {
    state: Mutex<State>,
    shown: bool,
}

struct State {
    report: PartReport,
    /// What the part is doing.
    step: Option<String>,
}

impl Sink {
    /// A sink that shows nothing, for measurements of which only the rows count.
    pub(super) fn quiet() -> Self {
        Self::new("", false)
    }

    fn new(part: &str, shown: bool) -> Self {
        let report = PartReport {
            part: part.to_owned(),
            ..PartReport::default()
        };
        Self {
            state: Mutex::new(State { report, step: None }),
            shown,
        }
    }

    /// Measures; an error or a panic becomes the part's failure, with the step in which it came.
    pub(super) fn measure(&self, work: impl FnOnce(&Self) -> Result<()>) {
        if let Err(error) = without_panic(|| work(self)) {
            self.fail(&format!("{error:#}"));
        }
    }

    /// Names what comes next.
    pub(super) fn step(&self, name: impl Into<String>) {
        let name = name.into();
        if self.shown {
            eprintln!("    {name} …");
        }
        lock(&self.state).step = Some(name);
    }

    pub(super) fn row(&self, row: Row) {
        if self.shown {
            eprintln!("    {row}");
        }
        lock(&self.state).report.rows.push(row);
    }

    pub(super) fn rows(&self, rows: impl IntoIterator<Item = Row>) {
        rows.into_iter().for_each(|row| self.row(row));
    }

    pub(super) fn note(&self, note: impl Into<String>) {
        lock(&self.state).report.notes.push(note.into());
    }

    pub(super) fn report(&self) -> PartReport {
        lock(&self.state).report.clone()
    }

    fn fail(&self, error: &str) {
        let mut state = lock(&self.state);
        let failed_step = state.step.clone();
        if self.shown {
            let step = failed_step.as_deref().unwrap_or("its start");
            eprintln!("    {}: failed in {step}: {error}", state.report.part);
        }
        state.report.failed_step = failed_step;
        state.report.error = Some(error.to_owned());
    }
}

/// Does the work; a panic is returned as an error, so that it ends one part and not the run.
///
/// # Errors
/// The work's, or the message of its panic.
pub(super) fn without_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    // What the work shares with the run are locks, and what stands behind them is whole after a panic.
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Err(anyhow!(
            "it panicked: {}",
            text.unwrap_or("without a message")
        ))
    })
}

/// What a thread that panicked left is whole: each change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn rows(report: &PartReport) -> Vec<Row> {
        report.rows.clone()
    }

    #[test]
    fn rows_stay_when_a_later_step_fails() {
        let parts = Parts::default();
        let (first, second) = (Row::new("a", 1.0, "ms", 3), Row::new("b", 2.0, "ms", 4));
        parts.begin("broken").measure(|sink| {
            sink.step("the first step");
            sink.row(first.clone());
            sink.row(second.clone());
            sink.step("the last step");
            bail!("bpftool is not installed")
        });
        let reports = parts.reports();
        assert_eq!(rows(&reports[0]), [first, second]);
        assert_eq!(reports[0].failed_step.as_deref(), Some("the last step"));
        let error = reports[0].error.as_deref();
        assert_eq!(error, Some("bpftool is not installed"));
    }

    #[test]
    fn a_panic_is_the_failure_of_its_part() {
        let parts = Parts::default();
        let row = Row::new("a", 1.0, "ms", 3);
        parts.begin("broken").measure(|sink| {
            sink.row(row.clone());
            sink.step("the last step");
            panic!("no value {}", 3)
        });
        parts.begin("next").measure(|_| Ok(()));
        let reports = parts.reports();
        assert_eq!(rows(&reports[0]), [row]);
        assert_eq!(reports[0].failed_step.as_deref(), Some("the last step"));
        let error = reports[0].error.as_deref();
        assert_eq!(error, Some("it panicked: no value 3"));
        assert_eq!(reports[1].error, None);
    }

    #[test]
    fn what_a_signal_ends_is_the_part_under_way() {
        let parts = Parts::default();
        let whole = Row::new("a", 1.0, "ms", 3);
        parts.begin("whole").measure(|sink| {
            sink.row(whole.clone());
            Ok(())
        });
        let sink = parts.begin("under way");
        sink.step("minutes of it");
        sink.row(Row::new("b", 2.0, "ms", 4));
        parts.interrupt("SIGTERM");
        let reports = parts.reports();
        assert_eq!(reports[0].error, None);
        assert_eq!(reports[1].error.as_deref(), Some("SIGTERM"));
        assert_eq!(reports[1].failed_step.as_deref(), Some("minutes of it"));
        assert_eq!(reports[1].rows.len(), 1);
    }
}
