//! Which programs belong on an interface.

use super::Direction;

/// What an interface carries: it decides which programs belong on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Packets of tunnels.
    Underlay,
    /// What was decapsulated, and what is to be encapsulated: the interface is an external VXLAN device.
    External,
    /// Probes that go out: the interface is the probe link.
    Probe,
}

impl Role {
    /// Every role.
    pub(super) const ALL: [Self; 3] = [Self::Underlay, Self::External, Self::Probe];

    /// The directions in which an interface of this role has a program.
    pub(super) const fn directions(self) -> &'static [Direction] {
        match self {
            Self::Underlay => &[Direction::In, Direction::Out],
            Self::External => &[Direction::In],
            Self::Probe => &[Direction::Out],
        }
    }
}
