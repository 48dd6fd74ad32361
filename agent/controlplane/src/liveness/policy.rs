//! The `reachability` policy: whether a path must be proved before a connection is granted.

use std::{fmt, str::FromStr};

/// Whether a path must be proved before a connection is granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reachability {
    /// A Request whose path cannot be proved is refused, with the evidence.
    Require,
    /// An endpoint whose path is proved comes first. Where there is none the connection is granted all the same, with the path's
    /// health in its metrics.
    #[default]
    Prefer,
    /// No probes are sent and no peer's are answered.
    Off,
}

impl Reachability {
    /// As it is configured.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::Prefer => "prefer",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Reachability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no reachability policy: write require, prefer or off")]
pub struct ReachabilityError(pub String);

impl FromStr for Reachability {
    type Err = ReachabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Require, Self::Prefer, Self::Off]
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| ReachabilityError(text.to_owned()))
    }
}
