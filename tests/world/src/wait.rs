//! Bounded waits for a condition, so that no test sleeps a fixed time and none hangs.

use std::{
    env,
    sync::OnceLock,
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

/// The variable with the whole number that deadlines are multiplied by: for machines that are slow by nature, as one with an
/// emulated processor is. No deadline is ever shortened.
pub const PATIENCE_VARIABLE: &str = "NSM_WORLD_PATIENCE";

/// A deadline, longer where the environment says so ([`PATIENCE_VARIABLE`]). Waits of this crate are so by themselves.
pub fn patient(deadline: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    deadline * *FACTOR.get_or_init(|| factor(env::var(PATIENCE_VARIABLE).ok().as_deref()))
}

/// The factor that a variable's value says; 1 if it says none.
fn factor(value: Option<&str>) -> u32 {
    value
        .and_then(|value| value.parse().ok())
        .map_or(1, |factor: u32| factor.clamp(1, 100))
}

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
    let deadline = patient(deadline);
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
    fn patience_never_shortens_a_deadline() {
        assert_eq!(factor(Some("4")), 4);
        for none in [None, Some(""), Some("0"), Some("-2"), Some("slow")] {
            assert_eq!(factor(none), 1, "{none:?}");
        }
    }

    #[test]
    fn says_what_was_waited_for() {
        let error = wait_until("a blue moon", Duration::from_millis(5), || false).unwrap_err();
        assert!(error.to_string().contains("a blue moon"), "{error}");
        assert!(error.waited >= Duration::from_millis(5));
    }
}
