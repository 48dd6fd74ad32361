//! What passed a place of this node: a link, or the node's cards.

use crate::clock::Monotonic;

/// What passed in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// When the last packet passed, to a timer tick (1 to 10 ms). `None`: none did, or the place keeps no times, as a link.
    pub last: Option<Monotonic>,
}

/// What passed in both directions, as seen from the pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the peer.
    pub sent: Count,
    /// From the peer.
    pub received: Count,
}
