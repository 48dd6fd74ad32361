//! Links as the kernel shows them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{LinkAlias, RouteSpec};
use crate::net::MacAddr;

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
            Self::Veth { .. } => "veth",
            Self::Other(kind) if kind.is_empty() => "device",
            Self::Other(kind) => kind,
        }
    }
}
