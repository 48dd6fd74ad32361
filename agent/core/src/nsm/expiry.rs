//! How long a connection or registration lives, and when it is to be refreshed.

use std::time::{Duration, SystemTime};

/// The shortest wait before a refresh. What has (nearly) expired is refreshed at once, but a peer that grants no lifetime must not be
/// asked in a busy loop; NSM waits the same 200 ms between refreshes that fail.
pub const MIN_REFRESH: Duration = Duration::from_millis(200);

/// The longest time that a Close may need at the hops behind this one: a dead one is given up after it.
pub const CLOSE_TIME: Duration = Duration::from_secs(3);

/// Stands for "no limit" where a configured maximum is too large to be added to a time.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The expiry that is granted: the earliest of what was requested, of all `bounds` (tokens, the peer's expiry, a certificate) and of
/// `max` from now; never before `now`.
#[must_use]
pub fn granted_expiry(
    now: SystemTime,
    requested: Option<SystemTime>,
    bounds: &[SystemTime],
    max: Duration,
) -> SystemTime {
    let longest = now.checked_add(max.min(FOREVER)).unwrap_or(now);
    bounds
        .iter()
        .copied()
        .chain(requested)
        .fold(longest, SystemTime::min)
        .max(now)
}

/// How long to wait before a connection whose token has `left` to live is closed. Endpoints that check tokens refuse the Close with a dead
/// one, so it comes earlier by the time that it may need; of a short life by an eighth at most, so that a refresh that failed
/// can be tried again.
#[must_use]
pub fn close_after(left: Duration) -> Duration {
    left - CLOSE_TIME.min(left / 8)
}

/// How long to wait before the refresh: two thirds of what is left, so that a third remains for tries that fail; at least
/// [`MIN_REFRESH`], also for what has expired.
#[must_use]
pub fn refresh_after(now: SystemTime, expiry: SystemTime) -> Duration {
    let left = expiry.duration_since(now).unwrap_or_default();
    (left / 3 * 2).max(MIN_REFRESH)
}
