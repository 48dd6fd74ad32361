//! From the observed link to the wanted one.
//!
//! The kernel's rules that shape a plan, each a reason for an order or a repetition:
//!
//! - Kind and name cannot change on a link that is up: it is deleted and made again.
//! - Routes and neighbours need the link up, and taking it down drops them: up comes first.
//! - A changed Ethernet address drops the permanent neighbours of the link: they are all set again.
//! - A removed IPv4 address takes the other addresses of its network along (unless `promote_secondaries` is set), and the last one
//!   takes the routes: after a removal, the remaining ones are set again.
//! - One IPv6 address cannot have two prefix lengths, and one prefix cannot have two next hops: removals come before additions.
//!
//! All operations can be repeated: adding what is there or removing what is not is no failure.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Link, LinkKind, LinkSpec, Route, RouteSpec};
use crate::net::MacAddr;

/// One step of a plan; it concerns the link of one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Delete the observed link.
    Delete,
    /// Create the link as wanted: name, alias, kind, MTU and Ethernet address are then right; it is down and has nothing else.
    Create,
    /// Set the MTU, bytes.
    SetMtu(u32),
    /// Set the Ethernet address.
    SetMac(MacAddr),
    /// Take the link up.
    SetUp,
    /// Remove a route that the agent made.
    RemoveRoute(RouteSpec),
    /// Remove a permanent neighbour.
    RemoveNeighbour(IpAddr),
    /// Remove an address.
    RemoveAddress(IpNet),
    /// Add an address.
    AddAddress(IpNet),
    /// Add a permanent neighbour, or change its Ethernet address.
    SetNeighbour(IpAddr, MacAddr),
    /// Add a route.
    AddRoute(RouteSpec),
}

/// Whether the observed link cannot become the wanted one: there is none, or something differs that is fixed for life.
#[must_use]
pub fn must_create(wanted: &LinkSpec, observed: Option<&Link>) -> bool {
    observed.is_none_or(|link| {
        link.name != wanted.name.as_str() || !matches!(link.kind, LinkKind::Veth { .. })
    })
}

/// The operations that make the observed link the wanted one, in the order in which the kernel takes them; empty when it is.
///
/// `observed` is the link that carries the wanted alias. IPv6 link-local addresses are the kernel's and left alone.
#[must_use]
pub fn diff(wanted: &LinkSpec, observed: Option<&Link>) -> Vec<Operation> {
    let mut plan = Vec::new();
    match observed {
        Some(link) if !must_create(wanted, observed) => {
            change_link(&mut plan, wanted, link);
            change_contents(&mut plan, wanted, link);
        }
        _ => {
            plan.extend(observed.map(|_| Operation::Delete));
            plan.extend([Operation::Create, Operation::SetUp]);
            plan.extend(addresses(wanted).into_iter().map(Operation::AddAddress));
            plan.extend(
                neighbours(wanted)
                    .into_iter()
                    .map(|(ip, mac)| Operation::SetNeighbour(ip, mac)),
            );
            plan.extend(routes(wanted).into_iter().map(Operation::AddRoute));
        }
    }
    plan
}

/// Properties of the link itself.
fn change_link(plan: &mut Vec<Operation>, spec: &LinkSpec, link: &Link) {
    if link.mtu != spec.mtu {
        plan.push(Operation::SetMtu(spec.mtu));
    }
    plan.extend(changed_mac(spec, link).map(Operation::SetMac));
    if !link.up {
        plan.push(Operation::SetUp);
    }
}

/// Addresses, neighbours and routes of the link.
fn change_contents(plan: &mut Vec<Operation>, spec: &LinkSpec, link: &Link) {
    let (addresses, neighbours, routes) = (addresses(spec), neighbours(spec), routes(spec));

    let is_wanted = |route: &RouteSpec| routes.contains(route);
    plan.extend(
        link.routes
            .iter()
            .filter(|route| route.ours && !is_wanted(&route.spec))
            .map(|route| Operation::RemoveRoute(route.spec)),
    );

    let unwanted = |ip: IpAddr| !neighbours.iter().any(|&(wanted, _)| wanted == ip);
    plan.extend(
        link.neighbours
            .iter()
            .filter(|&&(ip, _)| unwanted(ip))
            .map(|&(ip, _)| Operation::RemoveNeighbour(ip)),
    );

    let removed: Vec<IpNet> = link
        .addresses
        .iter()
        .copied()
        .filter(|address| !addresses.contains(address) && !is_link_local(*address))
        .collect();
    plan.extend(removed.iter().copied().map(Operation::RemoveAddress));

    let taken_along = |kept: &IpNet| {
        removed
            .iter()
            .any(|gone| matches!(gone, IpNet::V4(_)) && gone.trunc() == kept.trunc())
    };
    plan.extend(
        addresses
            .into_iter()
            .filter(|address| !link.addresses.contains(address) || taken_along(address))
            .map(Operation::AddAddress),
    );

    let flushed = changed_mac(spec, link).is_some();
    plan.extend(
        neighbours
            .into_iter()
            .filter(|wanted| flushed || !link.neighbours.contains(wanted))
            .map(|(ip, mac)| Operation::SetNeighbour(ip, mac)),
    );

    let there = |route: &RouteSpec| {
        removed.is_empty() && link.routes.iter().any(|Route { spec, .. }| spec == route)
    };
    plan.extend(
        routes
            .into_iter()
            .filter(|route| !there(route))
            .map(Operation::AddRoute),
    );
}

fn changed_mac(spec: &LinkSpec, link: &Link) -> Option<MacAddr> {
    spec.mac.filter(|&mac| link.mac != Some(mac))
}

/// The wanted addresses, each once; of two prefix lengths for one IPv6 address the first counts.
fn addresses(spec: &LinkSpec) -> Vec<IpNet> {
    let mut seen = BTreeSet::new();
    let key = |address: &IpNet| {
        (
            address.addr(),
            if address.addr().is_ipv4() {
                address.prefix_len()
            } else {
                0
            },
        )
    };
    spec.addresses
        .iter()
        .copied()
        .filter(|address| seen.insert(key(address)))
        .collect()
}

/// The wanted neighbours, each once: of two Ethernet addresses for one address the last counts.
fn neighbours(spec: &LinkSpec) -> Vec<(IpAddr, MacAddr)> {
    let mut result: Vec<(IpAddr, MacAddr)> = Vec::with_capacity(spec.neighbours.len());
    for &(ip, mac) in &spec.neighbours {
        match result.iter_mut().find(|(known, _)| *known == ip) {
            Some(known) => known.1 = mac,
            None => result.push((ip, mac)),
        }
    }
    result
}

/// The wanted routes, each once and without host bits; on-link ones first, for a next hop may need them. Left out are those that the
/// kernel adds by itself with an address.
fn routes(spec: &LinkSpec) -> Vec<RouteSpec> {
    let mut seen = BTreeSet::new();
    let comes_with_address = |route: &RouteSpec| {
        route.via.is_none()
            && route.prefix.prefix_len() < route.prefix.max_prefix_len()
            && spec
                .addresses
                .iter()
                .any(|address| address.trunc() == route.prefix)
    };
    let mut result: Vec<RouteSpec> = spec
        .routes
        .iter()
        .map(|route| RouteSpec {
            prefix: route.prefix.trunc(),
            via: route.via,
        })
        .filter(|route| !comes_with_address(route) && seen.insert(*route))
        .collect();
    result.sort_by_key(|route| route.via.is_some());
    result
}

fn is_link_local(address: IpNet) -> bool {
    matches!(address.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local())
}
