//! Which programs belong on an interface.

/// What an interface carries: it decides which programs belong on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Packets of tunnels.
    Underlay,
    /// Probes: the interface is the probe link.
    Management,
}
