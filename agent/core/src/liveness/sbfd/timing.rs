//! The pace of a session.

use std::time::Duration;

/// The pace of a session, and with it the time from a loss to its verdict.
///
/// The first probe after a loss leaves within `interval`. The verdict comes when `silence` has passed since, or on a long path when
/// answers have been overdue twice: once for the suspicion, and once for the last of the probes that suspicion sends, 3 ms apart. Where
/// an answer is overdue after the round trip (10 ms at least, and four times its variation), and the verdict rests on seven probes,
/// that is
///
/// ```text
/// interval + max(silence, 2 × round trip + 7 × 3 ms)
/// ```
///
/// by default 160 ms for round trips up to 44 ms, 200 ms for 64 ms, 271 ms for 100 ms; the prober's delay is added, and on a lossy
/// path the probes that it needs more.
///
/// A path that becomes longer than `silence` at once (a detour, 1 ms → 150 ms) is down until two answers have arrived, a round trip and
/// an interval after the change. Smaller steps, ramps, jitter and reordering raise no alarm. A path that does so repeatedly must be
/// proved for longer, as after any other loss: by 32 answers in a row at most, which takes less than a second and two round trips.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two probes of a path that is up.
    pub interval: Duration,
    /// Between two probes of a path that has been down for long, or of a peer that is switched off: at least 1 s (RFC 7880 section 7.3.3).
    pub slow_interval: Duration,
    /// How long a path must be silent to be down.
    pub silence: Duration,
}

impl Default for Timing {
    /// The verdict on a loss on a path of up to 44 ms comes within 50 + 110 ms and a prober's delay: below 200 ms with 40 ms to spare.
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(50),
            slow_interval: Duration::from_secs(1),
            silence: Duration::from_millis(110),
        }
    }
}
