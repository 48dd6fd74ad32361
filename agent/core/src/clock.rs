//! Points in time, as in the kernel's stamps.

use std::{
    fmt,
    ops::{Add, Sub},
    time::Duration,
};

use serde::{Serialize, Serializer};

/// A point on the node's monotonic clock, in nanoseconds: `CLOCK_MONOTONIC`, which BPF programs read by `bpf_ktime_get_ns`.
///
/// `std::time::Instant` is the same clock and cannot be made from a stamp. Sums and differences saturate: a stamp in the future, or a
/// time before the machine started, is no fault.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Monotonic(u64);

impl Monotonic {
    /// From a stamp in nanoseconds.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// As a stamp in nanoseconds.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Monotonic {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl Sub<Duration> for Monotonic {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

impl fmt::Debug for Monotonic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Serialises a duration as its nanoseconds.
pub(crate) fn serialize_nanos<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(nanos(*duration))
}
