//! What to do about a connection that does not work any more.
//!
//! | what is lost | what is done |
//! |---|---|
//! | the control plane, the path is good | the same endpoint is asked again; traffic goes on meanwhile |
//! | the path | another endpoint is asked for; the old tunnel stands until the new one does |
//! | the endpoint | another endpoint is asked for |
//!
//! The first loss is tried to be mended at once, and so is that of a connection that lived long enough to be called one; other tries are
//! spaced by [`Backoff`].

use std::time::Duration;

use crate::backoff::Backoff;

/// The shortest wait before another try: an agent that restarts is back within it.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// The longest: a person who mends something wants to see it work.
pub const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A connection that lived so long is one: its loss is tried to be mended at once. One that comes and goes faster is asked for with
/// growing waits, so that two that disagree do not spin.
pub const STABLE: Duration = Duration::from_secs(10);

/// What was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The agent, or a hop behind it, is not heard any more; nothing is known of the path.
    ControlPlane,
    /// Packets do not pass.
    Path,
    /// The endpoint is gone, or refused to go on.
    Endpoint,
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The same endpoint under the same id: a refresh.
    Same,
    /// Any endpoint, another one if there is.
    Reselect,
}

/// The healing of one connection.
#[derive(Debug, Clone)]
pub struct Healer {
    backoff: Backoff,
    /// What was asked for last.
    step: Option<Step>,
}

impl Default for Healer {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(SHORTEST_WAIT, LONGEST_WAIT),
            step: None,
        }
    }
}

impl Healer {
    /// A connection that lived for `lived` is lost: what to ask for, and after how long. `random` is uniform in 0..1.
    pub fn handle_loss(&mut self, loss: Loss, lived: Duration, random: f64) -> (Step, Duration) {
        let step = step(loss);
        let is_first = self.step.replace(step).is_none();
        if is_first || lived >= STABLE {
            self.backoff.reset();
            return (step, Duration::ZERO);
        }
        (step, self.backoff.next(random))
    }

    /// A try failed, for this reason: what to ask for next, and after how long.
    pub fn handle_failure(&mut self, loss: Loss, random: f64) -> (Step, Duration) {
        // Once another endpoint is wanted, nothing makes the old one wanted again.
        let step = match (self.step, step(loss)) {
            (Some(Step::Reselect), _) | (_, Step::Reselect) => Step::Reselect,
            _ => Step::Same,
        };
        self.step = Some(step);
        (step, self.backoff.next(random))
    }
}

const fn step(loss: Loss) -> Step {
    match loss {
        Loss::ControlPlane => Step::Same,
        Loss::Path | Loss::Endpoint => Step::Reselect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_decides_what_is_asked_for() {
        for (loss, expected) in [
            (Loss::ControlPlane, Step::Same),
            (Loss::Path, Step::Reselect),
            (Loss::Endpoint, Step::Reselect),
        ] {
            let mut healer = Healer::default();
            assert_eq!(
                healer.handle_loss(loss, STABLE, 0.5),
                (expected, Duration::ZERO)
            );
        }
    }

    #[test]
    fn tries_that_fail_wait_longer_and_want_another_endpoint_for_good() {
        let mut healer = Healer::default();
        healer.handle_loss(Loss::ControlPlane, STABLE, 1.0);
        let (step, first) = healer.handle_failure(Loss::ControlPlane, 1.0);
        assert_eq!((step, first), (Step::Same, 3 * SHORTEST_WAIT));
        assert_eq!(healer.handle_failure(Loss::Endpoint, 1.0).0, Step::Reselect);
        let (step, wait) = healer.handle_failure(Loss::ControlPlane, 1.0);
        assert_eq!(step, Step::Reselect);
        assert!(wait > first);
    }

    #[test]
    fn a_connection_that_comes_and_goes_is_asked_for_slower() {
        let mut healer = Healer::default();
        let waits: Vec<_> = (0..4)
            .map(|_| healer.handle_loss(Loss::Endpoint, Duration::ZERO, 1.0).1)
            .collect();
        assert!(waits.is_sorted() && waits[1] < waits[3], "{waits:?}");
        assert_eq!(waits[0], Duration::ZERO, "the first loss");
        let again = healer.handle_loss(Loss::Path, STABLE, 1.0);
        assert_eq!(again, (Step::Reselect, Duration::ZERO));
    }
}
