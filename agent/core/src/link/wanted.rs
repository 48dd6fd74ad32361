//! Links as connections want them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::LinkAlias;
use crate::net::{IfName, MacAddr, Vni};

/// What the outer headers of VXLAN take from the underlay's MTU: IP, UDP, VXLAN and the inner Ethernet header, bytes (RFC 7348
/// section 5).
///
/// ```
/// # use nsm_core::link::vxlan_overhead;
/// assert_eq!(vxlan_overhead("192.0.2.1".parse().unwrap()), 50);
/// ```
#[must_use]
pub const fn vxlan_overhead(remote: IpAddr) -> u32 {
    const UDP_VXLAN_ETHERNET: u32 = 8 + 8 + 14;
    match remote {
        IpAddr::V4(_) => 20 + UDP_VXLAN_ETHERNET,
        IpAddr::V6(_) => 40 + UDP_VXLAN_ETHERNET,
    }
}

/// The pod's end of a link as a connection wants it: one end of a veth pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// Marks the link as ours and names its connection.
    pub alias: LinkAlias,
    /// The interface's name in the pod.
    pub name: IfName,
    /// The Ethernet address; without one the kernel chooses, and a refresh keeps that.
    pub mac: Option<MacAddr>,
    /// The MTU of the link, bytes.
    pub mtu: u32,
    /// Addresses with the length of their network, in order of preference.
    pub addresses: Vec<IpNet>,
    /// Routes over the link. The route that the kernel adds with an address may be left out.
    pub routes: Vec<RouteSpec>,
    /// Permanent neighbours, known from the Request and its answer: no ARP crosses the tunnel.
    pub neighbours: Vec<(IpAddr, MacAddr)>,
}

/// A route over a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteSpec {
    /// The destination; bits beyond the prefix length are ignored.
    pub prefix: IpNet,
    /// The next hop, taken to be on the link even without a route to it. None: the destination itself is on the link.
    pub via: Option<IpAddr>,
}

/// A pod link, and what its pod may send: one of two that are joined with each other on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLinkSpec {
    /// The pod's end of the link.
    pub link: LinkSpec,
    /// Addresses that the pod may send from. Empty: any.
    pub sources: Vec<IpNet>,
}

/// A pod link whose frames go through a VXLAN tunnel (RFC 7348) of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    /// The pod's end of the link.
    pub link: LinkSpec,
    /// Addresses that the pod may send from. Empty: any.
    pub sources: Vec<IpNet>,
    /// The network identifier; with the peer's address it exists once per node.
    pub vni: Vni,
    /// Our address on the underlay.
    pub local: IpAddr,
    /// The peer's address on the underlay, of the same family.
    pub remote: IpAddr,
    /// The UDP port of both sides.
    pub port: u16,
}
