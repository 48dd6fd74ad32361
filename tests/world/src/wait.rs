//! Bounded waits for a condition, so that no test sleeps a fixed time and none hangs.

use std::{
    thread,
    time::{Duration, Instant},
};

/// A condition did not come true in time.
#[derive(Debug, thiserror::Error)]
#[error("waited {waited:?} for {what}, in vain")]
pub struct WaitError {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub waited: Duration,
}

/// Conditions here come true in milliseconds: looking each millisecond at first keeps measured times honest.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// Looking 50 times a second costs next to nothing, and delays a test by less than a person would notice.
const LAST_PAUSE: Duration = Duration::from_millis(20);

/// Waits until `condition` is true, for `deadline` at most.
///
/// # Errors
/// When the deadline passes; the condition is looked at once more after it.
pub fn wait_until(
    what: impl Into<String>,
    deadline: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<(), WaitError> {
    wait_for(what, deadline, || condition().then_some(()))
}

/// Waits until `probe` has an answer, for `deadline` at most.
pub(crate) fn wait_for<T>(
    what: impl Into<String>,
    deadline: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T, WaitError> {
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let late = start.elapsed() >= deadline;
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if late {
            return Err(WaitError {
                what: what.into(),
                waited: start.elapsed(),
            });
        }
        thread::sleep(pause.min(deadline.saturating_sub(start.elapsed())));
        pause = (pause * 5 / 4).min(LAST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_as_soon_as_the_condition_holds() {
        let mut looks = 0;
        wait_until("three looks", Duration::from_secs(5), || {
            looks += 1;
            looks == 3
        })
        .unwrap();
        assert_eq!(looks, 3);
    }

    #[test]
    fn says_what_was_waited_for() {
        let error = wait_until("a blue moon", Duration::from_millis(5), || false).unwrap_err();
        assert!(error.to_string().contains("a blue moon"), "{error}");
        assert!(error.waited >= Duration::from_millis(5));
    }
}
