//! How many unanswered probes are more than chance.

use super::FALSE_ALARM;

/// The fewest probes that a verdict rests on.
const FEWEST_PROBES: u32 = 3;

/// The most. At a round-trip loss of 60 % chance alone makes such a run once in 750 million probes; a path that loses more is none.
pub(super) const MOST_PROBES: u32 = 40;

/// How many probes in a row must stay unanswered, at a loss measured as (probes, lost), so that chance alone makes such a run with less than
/// [`FALSE_ALARM`].
///
/// The measure is of the last minute and of the last probes, whichever is worse: a path that begins to lose counts as lossy at once. Both are
/// taken with a reserve, so that the first few answers of a new session do not count too much.
pub(super) fn needed_probes(minute: (u32, u32), recent: (u32, u32)) -> u32 {
    let share = |(total, lost): (u32, u32), extra: f64, of: f64| {
        (f64::from(lost) + extra) / (f64::from(total) + of)
    };
    let loss = share(minute, 2.0, 20.0)
        .max(share(recent, 1.0, 10.0))
        .clamp(1e-3, 0.99);
    // Between 3 and 2,062: a whole number that a u32 holds.
    let needed = (FALSE_ALARM.ln() / loss.ln() - 1e-6).ceil() as u32;
    needed.clamp(FEWEST_PROBES, MOST_PROBES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_is_lost_the_more_probes_it_takes() {
        assert_eq!(needed_probes((0, 0), (0, 0)), 9);
        assert_eq!(needed_probes((1400, 0), (128, 0)), 5);
        assert_eq!(needed_probes((100_000, 0), (100_000, 0)), 3);
        // 5 % each way.
        assert_eq!(needed_probes((1400, 137), (100, 9)), 9);
        // The last probes were bad, the minute was good.
        assert_eq!(needed_probes((1400, 10), (100, 50)), 27);
        assert_eq!(needed_probes((1400, 1400), (100, 100)), MOST_PROBES);
    }
}
