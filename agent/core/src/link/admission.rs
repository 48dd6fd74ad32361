//! What another party may put into a pod: the addresses, routes, neighbours and DNS of a connection's context.
//!
//! The context of a connection is written by the other end, which may be of another domain, and is applied in the pod's network
//! namespace with the agent's rights. [`Rules::admit`] decides on one end of a connection before anything of it is made. The rules refuse
//! by default:
//!
//! - a route to everything, in one prefix or in several, unless the client has asked for it;
//! - special ranges: loopback, link-local, multicast, metadata services and so on;
//! - what is of the node, of the cluster, or of the tunnel's own underlay;
//! - what lies outside of the prefixes that the other party's domain may use, by default the private ranges;
//! - what the pod has already on another link;
//! - a neighbour that is not the other end;
//! - DNS servers in these ranges, and search domains that take names of the cluster.
//!
//! The counts are bounded, so that no context costs more than a page of netlink messages.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use super::RouteSpec;
use crate::{
    net::special::{Special, in_prefix, overlap},
    nsm::name::Domain,
};

mod dns;
mod part;

pub use self::{dns::Dns, part::Part};

/// The largest connection that is taken or kept, in bytes on the wire: a path of eight segments with their tokens is 8 KiB at most.
pub const MAX_CONNECTION: usize = 16 << 10;

/// Addresses of one end. A service has one of each family, or a few.
pub const MAX_ADDRESSES: usize = 16;

/// Mechanisms that one Request offers beside that of the connection. A client has one for each kind of interface.
pub const MAX_PREFERENCES: usize = 16;

/// Routes of one end. A service that has more networks has them in few prefixes.
pub const MAX_ROUTES: usize = 64;

/// Prefixes that one end may give to others.
pub const MAX_EXTRA: usize = 16;

/// Neighbours beside the other end's addresses.
pub const MAX_NEIGHBOURS: usize = 32;

/// The shortest prefix of an address on a link, IPv4: the network of a link is a service, not a site.
const SHORTEST_V4: u8 = 16;

/// The same for IPv6, where a site has 48 bits (RFC 6177).
const SHORTEST_V6: u8 = 48;

/// Prefixes that any domain may use unless the configuration says otherwise: those that no host of the Internet has (RFC 1918, RFC 6598,
/// RFC 4193, RFC 3849).
#[must_use]
pub fn private_ranges() -> Vec<IpNet> {
    [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
        "2001:db8::/32",
    ]
    .map(|text| text.parse().expect("a prefix"))
    .into()
}

/// The domains of a cluster's own names, unless the configuration says otherwise.
#[must_use]
pub fn cluster_domains() -> Vec<Domain> {
    ["cluster.local", "svc"]
        .map(|text| text.parse().expect("a DNS name"))
        .into()
}

/// The configured part of the policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What any domain may use.
    pub prefixes: Vec<IpNet>,
    /// What a domain may use in place of that.
    pub of_domain: BTreeMap<Domain, Vec<IpNet>>,
    /// What no domain may use: pods and services of the cluster.
    pub protected: Vec<IpNet>,
    /// Domains whose names no other party may resolve.
    pub dns_domains: Vec<Domain>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            prefixes: private_ranges(),
            of_domain: BTreeMap::new(),
            protected: Vec::new(),
            dns_domains: cluster_domains(),
        }
    }
}

/// Which end of a connection a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client.
    Client,
    /// The endpoint.
    Endpoint,
}

/// What one end of a connection would get.
#[derive(Debug, Clone, Copy)]
pub struct Proposal<'a> {
    /// Which end.
    pub side: Side,
    /// Addresses of its link, with the length of their network.
    pub addresses: &'a [IpNet],
    /// Routes over its link, those of policies too.
    pub routes: &'a [RouteSpec],
    /// Prefixes that it may give to others.
    pub extra: &'a [IpNet],
    /// Addresses of the other end.
    pub others: &'a [IpNet],
    /// Neighbours beside the other end.
    pub neighbours: &'a [IpAddr],
}

/// What the decision depends on beside the proposal.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The other party's domain, where it is known.
    pub domain: Option<&'a Domain>,
    /// The client has asked for a default route.
    pub wants_default_route: bool,
    /// The other end of the tunnel on the underlay.
    pub peer: Option<IpAddr>,
    /// Addresses of the node, with the length of their network.
    pub node: &'a [IpNet],
    /// What is on the pod's other links.
    pub pod: &'a [Holding],
}

/// An address or a route that a pod has on a link which is not the connection's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// The prefix; of an address, its own.
    pub prefix: IpNet,
    /// What it is.
    pub kind: HoldingKind,
    /// The name of the link.
    pub link: String,
    /// The link is that of another connection.
    pub is_connection: bool,
}

/// What a pod holds a prefix as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldingKind {
    /// An address.
    Address,
    /// The destination of a route.
    Route,
    /// The next hop of a route.
    Gateway,
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            HoldingKind::Address => "the address",
            HoldingKind::Route => "the route",
            HoldingKind::Gateway => "the gateway",
        };
        write!(f, "{kind} {} on its link `{}`", self.prefix, self.link)
    }
}

/// The rule that refused a context.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Inadmissible {
    /// More of something than the limit.
    #[error("it has {count} {what}, more than the {limit} that a connection may have")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// The whole connection is over the limit.
    #[error(
        "the connection has {bytes} bytes, more than the {MAX_CONNECTION} that one may have: use fewer labels, routes or path segments"
    )]
    TooLarge {
        /// Its size on the wire.
        bytes: usize,
    },
    /// A special range.
    #[error("{part} is not admitted: {range} is {special}")]
    Special {
        /// What was proposed.
        part: Part,
        /// The range that it has addresses of.
        range: IpNet,
        /// What that is for.
        special: Special,
    },
    /// Everything, or half of it, would be routed over the connection.
    #[error(
        "its {family} routes cover half of all addresses or more, and the client has not asked for a default route: ask with \
         `connect --default-route` or the label {DEFAULT_ROUTE_LABEL}=true"
    )]
    DefaultRoute {
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The other end of the tunnel would be routed into the tunnel.
    #[error(
        "{part} is not admitted: it holds {peer}, the other end of the connection's own tunnel"
    )]
    Underlay {
        /// What was proposed.
        part: Part,
        /// The peer's address.
        peer: IpAddr,
    },
    /// An address or network of the node.
    #[error("{part} is not admitted: it overlaps {network}, a network of this node")]
    Node {
        /// What was proposed.
        part: Part,
        /// The node's address with its prefix.
        network: IpNet,
    },
    /// A configured prefix of the cluster.
    #[error(
        "{part} is not admitted: it overlaps {network}, a prefix of the cluster (`admission.protected` or excluded_prefixes.yaml)"
    )]
    Protected {
        /// What was proposed.
        part: Part,
        /// The configured prefix.
        network: IpNet,
    },
    /// Outside of what the domain may use.
    #[error(
        "{part} is not admitted: it lies outside of the prefixes that {} may use; add them to {} to admit it",
        party(.domain.as_ref()),
        key(.domain.as_ref())
    )]
    Outside {
        /// What was proposed.
        part: Part,
        /// The domain, where it has prefixes of its own.
        domain: Option<Domain>,
    },
    /// An address whose network is too large for a link.
    #[error(
        "{part} is not admitted: its network is larger than /{shortest}, the largest that a link may have"
    )]
    TooWide {
        /// What was proposed.
        part: Part,
        /// The shortest prefix.
        shortest: u8,
    },
    /// The pod has it already.
    #[error(
        "{part} is not admitted: it overlaps {held} of the pod, which would lose it; the endpoint must leave out the client's \
         excluded_prefixes, or use others"
    )]
    Overlap {
        /// What was proposed.
        part: Part,
        /// What the pod has.
        held: Holding,
    },
    /// A pod has one default route of a connection.
    #[error(
        "{part} is not admitted: the pod has {held} already, and one connection of a pod has its default route: close that one, or ask \
         without `connect --default-route`"
    )]
    SecondDefault {
        /// What was proposed.
        part: Part,
        /// What the pod has.
        held: Holding,
    },
    /// A neighbour that is not the other end.
    #[error(
        "{part} is not admitted: it is neither an address of the other end nor a next hop of the connection"
    )]
    Neighbour {
        /// What was proposed.
        part: Part,
    },
    /// Something is no address.
    #[error("{field} `{value}` is no address")]
    NotAnAddress {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// A search domain that is no name.
    #[error("the search domain {name:?} is no DNS name: it has blanks or control characters")]
    DnsName {
        /// The search domain.
        name: String,
    },
    /// A search domain that takes names of the cluster.
    #[error(
        "the DNS search domain `{name}` is not admitted: it takes names of `{domain}`, which are the cluster's own"
    )]
    DnsDomain {
        /// The search domain.
        name: String,
        /// The cluster's domain.
        domain: Domain,
    },
}

/// The label by which a client asks for a default route.
pub const DEFAULT_ROUTE_LABEL: &str = "nsm-default-route";

/// Whether the client with these labels has asked for a default route.
#[must_use]
pub fn wants_default_route(labels: &BTreeMap<String, String>) -> bool {
    labels
        .get(DEFAULT_ROUTE_LABEL)
        .is_some_and(|value| value == "true")
}

fn party(domain: Option<&Domain>) -> String {
    domain.map_or_else(|| "any domain".to_owned(), |domain| format!("`{domain}`"))
}

fn key(domain: Option<&Domain>) -> String {
    domain.map_or_else(
        || "`admission.prefixes`".to_owned(),
        |domain| format!("`admission.domains` of `{domain}`"),
    )
}

/// Whether a connection of this size is taken.
///
/// # Errors
/// It is too large.
pub const fn check_size(bytes: usize) -> Result<(), Inadmissible> {
    if bytes > MAX_CONNECTION {
        return Err(Inadmissible::TooLarge { bytes });
    }
    Ok(())
}

/// Whether a Request may offer so many mechanisms.
///
/// # Errors
/// It may not.
pub fn check_preferences(count: usize) -> Result<(), Inadmissible> {
    check_count("mechanism preferences", count, MAX_PREFERENCES)
}

fn check_count(what: &'static str, count: usize, limit: usize) -> Result<(), Inadmissible> {
    if count > limit {
        return Err(Inadmissible::TooMany { what, count, limit });
    }
    Ok(())
}

impl Rules {
    /// Decides on what one end of a connection would get.
    ///
    /// # Errors
    /// The first rule that refuses it.
    pub fn admit(
        &self,
        proposal: &Proposal<'_>,
        around: &Surroundings<'_>,
    ) -> Result<(), Inadmissible> {
        check_count("addresses", proposal.addresses.len(), MAX_ADDRESSES)?;
        check_count(
            "addresses of the other end",
            proposal.others.len(),
            MAX_ADDRESSES,
        )?;
        check_count("routes", proposal.routes.len(), MAX_ROUTES)?;
        check_count("extra prefixes", proposal.extra.len(), MAX_EXTRA)?;
        check_count("neighbours", proposal.neighbours.len(), MAX_NEIGHBOURS)?;
        if !around.wants_default_route {
            check_cover(proposal)?;
        }
        for &address in proposal.addresses {
            check_width(address)?;
            self.check(Part::Address(address), proposal.side, around)?;
        }
        for &other in proposal.others {
            self.check(Part::Other(other), proposal.side, around)?;
        }
        for route in proposal.routes {
            let part = Part::Route(route.prefix);
            if around.wants_default_route && is_default(route.prefix) {
                check_second(part, around.pod)?;
            } else {
                self.check(part, proposal.side, around)?;
            }
            if let Some(via) = route.via {
                self.check(Part::NextHop(via), proposal.side, around)?;
            }
        }
        // What the pod has of them already, it may have given to those on its other links.
        let outside = Surroundings {
            pod: &[],
            ..*around
        };
        for &extra in proposal.extra {
            self.check(Part::Extra(extra), proposal.side, &outside)?;
        }
        check_neighbours(proposal)
    }

    /// Decides on one part of a context.
    fn check(&self, part: Part, side: Side, around: &Surroundings<'_>) -> Result<(), Inadmissible> {
        let prefix = part.prefix();
        self.check_special(part, around.domain)?;
        if let Some(peer) = around.peer.filter(|peer| prefix.contains(peer)) {
            return Err(Inadmissible::Underlay { part, peer });
        }
        let touched = |nets: &[IpNet]| {
            nets.iter()
                .copied()
                .find(|net| overlap(net.trunc(), prefix))
        };
        if let Some(network) = touched(around.node) {
            return Err(Inadmissible::Node { part, network });
        }
        if let Some(network) = touched(&self.protected) {
            return Err(Inadmissible::Protected { part, network });
        }
        let domain = around
            .domain
            .filter(|domain| self.of_domain.contains_key(domain));
        if !self
            .prefixes_of(domain)
            .iter()
            .any(|net| net.contains(&prefix))
        {
            return Err(Inadmissible::Outside {
                part,
                domain: domain.cloned(),
            });
        }
        check_pod(part, side, around.pod)
    }

    /// Link-local addresses may be configured for a domain; other special ranges are nobody's.
    fn check_special(&self, part: Part, domain: Option<&Domain>) -> Result<(), Inadmissible> {
        let Some((special, range)) = in_prefix(part.prefix()) else {
            return Ok(());
        };
        let mut configured = self.prefixes_of(domain).iter();
        let is_configured = |net: &IpNet| range.contains(net) && net.contains(&part.prefix());
        if special == Special::LinkLocal && configured.any(is_configured) {
            return Ok(());
        }
        Err(Inadmissible::Special {
            part,
            range,
            special,
        })
    }

    fn prefixes_of(&self, domain: Option<&Domain>) -> &[IpNet] {
        let own = domain.and_then(|domain| self.of_domain.get(domain));
        own.unwrap_or(&self.prefixes)
    }
}

/// Prefixes that only a default route has: all addresses, or a half of them, or the part of IPv6 that is assigned (RFC 4291 section 2.4).
fn is_default(prefix: IpNet) -> bool {
    match prefix {
        IpNet::V4(net) => net.prefix_len() <= 1,
        IpNet::V6(net) => net.prefix_len() <= 3,
    }
}

/// Several prefixes may together be a default route.
fn check_cover(proposal: &Proposal<'_>) -> Result<(), Inadmissible> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    let routes = proposal.routes.iter().map(|route| route.prefix);
    for prefix in routes.chain(proposal.addresses.iter().copied()) {
        match prefix.trunc() {
            IpNet::V4(net) => v4.push(net),
            IpNet::V6(net) => v6.push(net),
        }
    }
    // In units of the 2^-32 part of a family's addresses; prefixes of an aggregate do not overlap.
    let share = |length: u8| {
        1_u64
            .checked_shl(32_u32.saturating_sub(length.into()))
            .unwrap_or(0)
    };
    let v4: u64 = Ipv4Net::aggregate(&v4)
        .iter()
        .map(|net| share(net.prefix_len()))
        .sum();
    let v6: u64 = Ipv6Net::aggregate(&v6)
        .iter()
        .filter(|net| net.prefix_len() <= 32)
        .map(|net| share(net.prefix_len()))
        .sum();
    // All unicast addresses of IPv6 that are assigned are an eighth of it.
    for (family, covered, limit) in [("IPv4", v4, 1 << 31), ("IPv6", v6, 1 << 28)] {
        if covered >= limit {
            return Err(Inadmissible::DefaultRoute { family });
        }
    }
    Ok(())
}

fn check_width(address: IpNet) -> Result<(), Inadmissible> {
    let shortest = match address {
        IpNet::V4(_) => SHORTEST_V4,
        IpNet::V6(_) => SHORTEST_V6,
    };
    if address.prefix_len() < shortest {
        let part = Part::Address(address);
        return Err(Inadmissible::TooWide { part, shortest });
    }
    Ok(())
}

/// Whether the pod keeps what it has. An endpoint may have one address on the links of all its connections, as it chooses that itself.
fn check_pod(part: Part, side: Side, pod: &[Holding]) -> Result<(), Inadmissible> {
    let prefix = part.prefix();
    let is_shared = |held: &Holding| {
        let is_own = matches!(part, Part::Address(own) if own.addr() == held.prefix.addr());
        side == Side::Endpoint && held.is_connection && is_own
    };
    let is_hit = |held: &&Holding| {
        held.prefix.prefix_len() > 0 && overlap(held.prefix.trunc(), prefix) && !is_shared(held)
    };
    match pod.iter().find(is_hit) {
        Some(held) => Err(Inadmissible::Overlap {
            part,
            held: held.clone(),
        }),
        None => Ok(()),
    }
}

/// A default route that was asked for takes the place of no other one of a connection, and removes none of the pod.
fn check_second(part: Part, pod: &[Holding]) -> Result<(), Inadmissible> {
    let prefix = part.prefix();
    let is_in_the_way = |held: &&Holding| {
        let is_default = held.is_connection && is_default(held.prefix);
        let is_of_family = held.prefix.addr().is_ipv4() == prefix.addr().is_ipv4();
        held.kind == HoldingKind::Route && (held.prefix == prefix || (is_default && is_of_family))
    };
    match pod.iter().find(is_in_the_way) {
        Some(held) => Err(Inadmissible::SecondDefault {
            part,
            held: held.clone(),
        }),
        None => Ok(()),
    }
}

/// The two routes that stand for a default route in a pod that has one of its own: being longer they come before it, and when they go
/// it is still there. None where `route` can be made as it is.
#[must_use]
pub fn beside_own_default(route: IpNet, pod: &[Holding]) -> Option<[IpNet; 2]> {
    let is_own = |held: &Holding| {
        held.kind == HoldingKind::Route && !held.is_connection && held.prefix == route
    };
    if route.prefix_len() > 0 || !pod.iter().any(is_own) {
        return None;
    }
    let mut halves = route.subnets(1).ok()?;
    Some([halves.next()?, halves.next()?])
}

fn check_neighbours(proposal: &Proposal<'_>) -> Result<(), Inadmissible> {
    for &ip in proposal.neighbours {
        let is_other = proposal.others.iter().any(|other| other.addr() == ip);
        let is_hop = proposal.routes.iter().any(|route| route.via == Some(ip));
        // Both ends' neighbours are in one list.
        let is_own = proposal.addresses.iter().any(|own| own.addr() == ip);
        if !(is_other || is_hop || is_own) {
            let part = Part::Neighbour(ip);
            return Err(Inadmissible::Neighbour { part });
        }
    }
    Ok(())
}
