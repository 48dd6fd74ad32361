//! What identifies a path.

use std::net::IpAddr;

use serde::Serialize;

use super::{Health, sbfd::Discriminator};
use crate::net::Vni;

/// An S-BFD reflector, as the two ends of a tunnel exchange it in the mechanism's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Reflector {
    /// The discriminator in probes to it.
    pub discriminator: Discriminator,
    /// Its probe VNI: the VNI of those probes (RFC 8971).
    pub vni: Vni,
}

/// A path to a peer, identified by everything that the peer states of itself. Each connection has the path that its own peer stated:
/// another statement about the same address is another path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PathId {
    /// The peer's public address: the remote address of tunnels to it.
    pub address: IpAddr,
    /// The UDP port of its tunnels.
    pub port: u16,
    /// Its reflector.
    pub reflector: Reflector,
}

impl PathId {
    /// The same path with its address as frames and maps have it: IPv4 that is written as IPv6 becomes IPv4.
    #[must_use]
    pub const fn canonical(self) -> Self {
        Self {
            address: self.address.to_canonical(),
            ..self
        }
    }
}

/// A change on a path, or of what arrives from a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PathEvent {
    /// The health of a path, or its MTU, has changed.
    Changed {
        /// The path.
        path: PathId,
        /// Its health now.
        health: Health,
    },
    /// A peer sent packets of a VNI that is no tunnel of this node.
    ForeignVni {
        /// The peer.
        peer: IpAddr,
        /// The VNI.
        vni: Vni,
    },
}
