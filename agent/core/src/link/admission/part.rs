//! The parts of a context that rules look at, as refusals name them.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

/// A part of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// An address of the pod's link.
    Address(IpNet),
    /// A route of the pod.
    Route(IpNet),
    /// The next hop of a route.
    NextHop(IpAddr),
    /// An address of the other end.
    Other(IpNet),
    /// A neighbour beside the other end.
    Neighbour(IpAddr),
    /// A DNS server.
    DnsServer(IpAddr),
    /// A prefix that the pod may give to others.
    Extra(IpNet),
}

impl Part {
    /// The addresses that it takes from the pod: of an address, those of its network.
    pub(super) fn prefix(self) -> IpNet {
        match self {
            Self::Address(net) | Self::Route(net) | Self::Extra(net) => net.trunc(),
            Self::Other(net) => net.addr().into(),
            Self::NextHop(ip) | Self::Neighbour(ip) | Self::DnsServer(ip) => ip.into(),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(net) => write!(f, "the address {net}"),
            Self::Route(net) => write!(f, "the route {net}"),
            Self::NextHop(ip) => write!(f, "the next hop {ip}"),
            Self::Other(net) => write!(f, "the other end's address {net}"),
            Self::Neighbour(ip) => write!(f, "the neighbour {ip}"),
            Self::DnsServer(ip) => write!(f, "the DNS server {ip}"),
            Self::Extra(net) => write!(f, "the extra prefix {net}"),
        }
    }
}
