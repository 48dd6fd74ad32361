//! How long to wait before the next try.

use std::time::Duration;

/// Waits that grow and differ: each is drawn between the shortest and three times the last one, so
/// that clients which lost the same agent do not come back all at once ("decorrelated jitter").
#[derive(Debug, Clone)]
pub struct Backoff {
    shortest: Duration,
    longest: Duration,
    last: Duration,
}

impl Backoff {
    /// Waits from `shortest` to `longest`.
    pub const fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            last: shortest,
        }
    }

    /// The next wait. `random` is uniform in 0..1.
    pub fn next(&mut self, random: f64) -> Duration {
        let most = (self.last * 3).min(self.longest).max(self.shortest);
        let room = most - self.shortest;
        self.last = self.shortest + room.mul_f64(random.clamp(0.0, 1.0));
        self.last
    }

    /// Starts again at the shortest wait: the last try succeeded.
    pub fn reset(&mut self) {
        self.last = self.shortest;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHORTEST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);

    #[test]
    fn waits_grow_up_to_the_longest_and_start_again() {
        let mut backoff = Backoff::new(SHORTEST, LONGEST);
        assert_eq!(backoff.next(1.0), Duration::from_millis(600));
        assert_eq!(backoff.next(1.0), Duration::from_millis(1800));
        for _ in 0..5 {
            backoff.next(1.0);
        }
        assert_eq!(backoff.next(1.0), LONGEST);
        backoff.reset();
        assert_eq!(backoff.next(0.0), SHORTEST);
    }

    proptest! {
        #[test]
        fn every_wait_is_between_the_two(randoms in proptest::collection::vec(0.0..1.0, 0..50)) {
            let mut backoff = Backoff::new(SHORTEST, LONGEST);
            for random in randoms {
                let wait = backoff.next(random);
                prop_assert!((SHORTEST..=LONGEST).contains(&wait));
            }
        }
    }
}
