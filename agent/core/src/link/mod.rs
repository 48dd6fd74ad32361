//! What a connection's link should be, what was observed of it, and the steps from one to the other.
//!
//! A connection ends in one link inside the pod's network namespace: a VXLAN link across nodes, one end of a veth pair on one node.
//! [`VxlanSpec`] and [`LinkSpec`] say what is wanted, [`Link`] what the kernel shows, and [`diff`] plans the operations between the
//! two. A plan is made from the kernel's state every time, never from what an earlier plan was meant to have done: a refresh, a
//! restart of the agent and a link that somebody changed by hand are then one case.
//!
//! A link is ours only when its alias parses as a [`LinkAlias`]. Nothing else is ever changed or deleted, whatever its name.

mod alias;
#[cfg(test)]
mod model;
mod plan;

use std::net::IpAddr;

use ipnet::IpNet;

pub use self::{
    alias::{LinkAlias, LinkAliasError},
    plan::{Operation, diff, must_create},
};
use crate::net::{IfName, MacAddr, Vni};

/// The UDP port of VXLAN (RFC 7348 section 5), used when the mechanism names none.
pub const VXLAN_PORT: u16 = 4789;

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

/// A link as a connection wants it, whatever its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// Marks the link as ours and names its connection.
    pub alias: LinkAlias,
    /// The interface's name in the pod.
    pub name: IfName,
    /// The Ethernet address; the kernel draws one when none is given, and a refresh keeps it.
    pub mac: Option<MacAddr>,
    /// The MTU of the link, bytes.
    pub mtu: u32,
    /// Addresses with the length of their network, in order of preference.
    pub addresses: Vec<IpNet>,
    /// Routes over the link. One that an address brings along by itself need not be here, and does no harm.
    pub routes: Vec<RouteSpec>,
    /// Permanent neighbours: who answers to an address is known from the exchange, so that no ARP crosses the tunnel.
    pub neighbours: Vec<(IpAddr, MacAddr)>,
}

/// A route over a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteSpec {
    /// The destination; bits beyond the prefix length are ignored.
    pub prefix: IpNet,
    /// The next hop, taken to be on the link even when no other route says so. None: the destination itself is on the link.
    pub via: Option<IpAddr>,
}

/// A VXLAN link (RFC 7348) whose UDP socket lives on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    /// What every link has.
    pub link: LinkSpec,
    /// The network identifier; with the port it exists once per node.
    pub vni: Vni,
    /// Our address on the underlay.
    pub local: IpAddr,
    /// The peer's address on the underlay, of the same family.
    pub remote: IpAddr,
    /// The UDP port of both sides.
    pub port: u16,
}

/// What [`diff`] plans for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// A VXLAN link.
    Vxlan(&'a VxlanSpec),
    /// One end of a veth pair.
    Veth(&'a LinkSpec),
}

impl<'a> Wanted<'a> {
    /// What every link has.
    #[must_use]
    pub const fn link(self) -> &'a LinkSpec {
        match self {
            Self::Vxlan(vxlan) => &vxlan.link,
            Self::Veth(link) => link,
        }
    }
}

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whose it is; None: not ours.
    pub alias: Option<LinkAlias>,
    /// Its Ethernet address, when it has one.
    pub mac: Option<MacAddr>,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// What it is.
    pub kind: LinkKind,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// The unicast routes over it in the main table.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<(IpAddr, MacAddr)>,
}

/// A route as the kernel shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Where it leads.
    pub spec: RouteSpec,
    /// Whether the agent made it. What the kernel, a routing daemon or a person put there stays.
    pub ours: bool,
}

/// The kind of an observed link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A VXLAN link.
    Vxlan {
        /// The network identifier; 0 for a link that carries many.
        vni: u32,
        /// Our address on the underlay, when it has a fixed one.
        local: Option<IpAddr>,
        /// The peer's address on the underlay, when it has a fixed one.
        remote: Option<IpAddr>,
        /// The UDP port.
        port: u16,
    },
    /// One end of a veth pair.
    Veth {
        /// The index of the other end, in the namespace where that one is.
        peer: u32,
        /// That namespace, by the number that it has in the link's own; None: the same.
        peer_netns: Option<i32>,
    },
    /// Another kind, by the kernel's name; empty for one that has none, such as a network card.
    Other(String),
}

impl LinkKind {
    /// The kernel's name of the kind, as in `ip link add type …`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Vxlan { .. } => "vxlan",
            Self::Veth { .. } => "veth",
            Self::Other(kind) if kind.is_empty() => "device",
            Self::Other(kind) => kind,
        }
    }
}
