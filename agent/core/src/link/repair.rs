//! When a pod's link that somebody else changed is repaired, and when it is left as it is.
//!
//! A change by mistake is repaired at once. Who changes the link again after each repair means it: after a few repairs in a minute the
//! link is left alone, and the connection is DOWN with the reason. Later it is tried once more, each time after a longer pause. Whoever
//! makes the link right ends that, and so does a Request.

use std::time::{Duration, Instant};

/// How many repairs within [`WINDOW`] are made before the link is left alone. A person who tries a command, or two programs that set up a
/// pod one after the other, need fewer.
const MOST: usize = 3;

/// How long a repair counts.
const WINDOW: Duration = Duration::from_secs(60);

/// The longest pause: an hour's fight is some eight repairs.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// The repairs of one connection's link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repairs {
    /// When the last ones were made, [`MOST`] at most, the oldest first.
    made: Vec<Instant>,
    /// The pause after the last one of a fight.
    pause: Duration,
}

impl Repairs {
    /// When the next repair may be made; a time that is not after `now` means at once.
    #[must_use]
    pub fn next(&self, now: Instant) -> Instant {
        match self.made.last() {
            Some(last) if self.is_fight(now) => *last + self.pause,
            _ => now,
        }
    }

    /// A repair was made.
    pub fn made(&mut self, now: Instant) {
        let was_fight = self.is_fight(now);
        self.made
            .retain(|at| now.saturating_duration_since(*at) < WINDOW);
        if self.made.len() == MOST {
            self.made.remove(0);
        }
        self.made.push(now);
        self.pause = match (was_fight, self.made.len() == MOST) {
            (true, _) => (self.pause * 2).min(LONGEST_PAUSE),
            (false, true) => WINDOW,
            (false, false) => Duration::ZERO,
        };
    }

    /// Whether the link is undone again and again.
    #[must_use]
    pub fn is_fight(&self, now: Instant) -> bool {
        let last = self.made.last();
        // What was undone after its pause goes on; what stood twice as long was the end of it.
        !self.pause.is_zero()
            && last.is_some_and(|last| now.saturating_duration_since(*last) < self.pause * 2)
    }

    /// Whether there is nothing to keep any more.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        let last = self.made.last();
        !self.is_fight(now)
            && last.is_none_or(|last| now.saturating_duration_since(*last) >= WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_few_repairs_are_made_at_once_and_a_fight_is_left() {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        for at in [0, 1, 2] {
            let now = start + seconds(at);
            assert_eq!(repairs.next(now), now);
            repairs.made(now);
        }
        let now = start + seconds(3);
        assert!(repairs.is_fight(now));
        assert_eq!(repairs.next(now), start + seconds(2) + WINDOW);
        assert!(!repairs.is_over(now));
    }

    #[test]
    fn repairs_far_apart_are_no_fight() {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        for at in (0..20).map(|n| start + seconds(30) * n) {
            assert_eq!(repairs.next(at), at);
            repairs.made(at);
            assert!(!repairs.is_fight(at), "two within a minute");
        }
    }

    #[test]
    fn the_pause_grows_while_the_fight_goes_on() {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        for _ in 0..MOST {
            repairs.made(start);
        }
        let (mut now, mut pauses) = (start, Vec::new());
        for _ in 0..6 {
            let next = repairs.next(now);
            pauses.push((next - now).as_secs());
            now = next;
            repairs.made(now);
        }
        assert_eq!(pauses, [60, 120, 240, 480, 600, 600]);
    }

    #[test]
    fn what_stands_long_enough_is_forgotten() {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        repairs.made(start);
        assert!(!repairs.is_over(start + seconds(59)));
        assert!(repairs.is_over(start + seconds(60)));
        for _ in 0..MOST {
            repairs.made(start + seconds(100));
        }
        assert!(repairs.is_fight(start + seconds(219)));
        assert!(repairs.is_over(start + seconds(220)));
        assert_eq!(repairs.next(start + seconds(220)), start + seconds(220));
    }
}
