//! The node's routes to a peer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage, RouteMetric, RouteNextHopFlags, RouteType},
};
use nix::errno::Errno;
use nsm_core::link::Link;

use super::{LinkError, message, observe};
use crate::netlink::{Netlink, Refusal};

/// Where packets leave.
#[derive(Clone, Copy, Default)]
struct Way {
    out: u32,
    source: Option<IpAddr>,
    gateway: Option<IpAddr>,
    mtu: Option<u32>,
    metric: u32,
}

pub(super) fn mtu(netlink: &mut Netlink, remote: IpAddr) -> Result<u32, LinkError> {
    let way = look_up(netlink, remote)?;
    // Read besides the route's: a route can promise more than its interface carries.
    let interface = link_of(netlink, &way, remote)?.mtu;
    Ok(way.mtu.map_or(interface, |mtu| mtu.min(interface)))
}

/// The name of the interface that packets leave by.
pub(crate) fn interface(netlink: &mut Netlink, remote: IpAddr) -> Result<String, LinkError> {
    let way = look_up(netlink, remote)?;
    Ok(link_of(netlink, &way, remote)?.name)
}

fn link_of(netlink: &mut Netlink, way: &Way, remote: IpAddr) -> Result<Link, LinkError> {
    let refused = |kernel| LinkError::NoRoute { remote, kernel };
    let link = netlink
        .ask(message::get_link(way.out).0, 0)?
        .map_err(refused)?;
    link.into_iter().find_map(observe::link_of).ok_or_else(|| {
        refused(Refusal {
            errno: Errno::ENODEV,
            text: None,
        })
    })
}

pub(crate) fn source(netlink: &mut Netlink, remote: IpAddr) -> Result<IpAddr, LinkError> {
    let kernel = Refusal {
        errno: Errno::EADDRNOTAVAIL,
        text: Some("the route has no source address".to_owned()),
    };
    look_up(netlink, remote)?
        .source
        .ok_or(LinkError::NoRoute { remote, kernel })
}

pub(crate) fn default_source(netlink: &mut Netlink) -> Result<IpAddr, LinkError> {
    let routes = netlink.dump(&message::get_routes(None))?;
    let mut defaults: Vec<(bool, Way)> = routes
        .into_iter()
        .flat_map(|route| match route {
            RouteNetlinkMessage::NewRoute(route) if route.header.destination_prefix_length == 0 => {
                let is_v6 = route.header.address_family != AddressFamily::Inet;
                let ways = ways_of(route).into_iter();
                ways.map(|way| (is_v6, way)).collect()
            }
            _ => Vec::new(),
        })
        .collect();
    defaults.sort_by_key(|(is_v6, way)| (*is_v6, way.metric));
    for (is_v6, way) in defaults {
        // A route without a next hop is asked for an address that lies nowhere (RFC 5737, RFC 3849).
        let nowhere: IpAddr = if is_v6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()
        } else {
            Ipv4Addr::new(203, 0, 113, 1).into()
        };
        match way.source {
            Some(source) => return Ok(source),
            None => {
                if let Ok(source) = source(netlink, way.gateway.unwrap_or(nowhere)) {
                    return Ok(source);
                }
            }
        }
    }
    Err(LinkError::NoDefaultRoute)
}

fn look_up(netlink: &mut Netlink, remote: IpAddr) -> Result<Way, LinkError> {
    let (request, flags) = message::look_up_route(remote);
    let answer = netlink
        .ask(request, flags)?
        .map_err(|kernel| LinkError::NoRoute { remote, kernel })?;
    let refused = || LinkError::NoRoute {
        remote,
        kernel: Refusal {
            errno: Errno::ENETUNREACH,
            text: Some("the route does not lead to a host".to_owned()),
        },
    };
    answer
        .into_iter()
        .find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => ways_of(route).into_iter().next(),
            _ => None,
        })
        .ok_or_else(refused)
}

/// The ways of a route: several of a multipath route, none of one that delivers nothing, such as `unreachable`.
fn ways_of(route: RouteMessage) -> Vec<Way> {
    if !matches!(route.header.kind, RouteType::Unicast | RouteType::Local) {
        return Vec::new();
    }
    let (mut out, mut next_hops) = (None, Vec::new());
    let mut way = Way::default();
    for attribute in route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => out = Some(index),
            RouteAttribute::MultiPath(hops) => next_hops = hops,
            RouteAttribute::PrefSource(address) => way.source = observe::ip_of(&address),
            RouteAttribute::Gateway(address) => way.gateway = observe::ip_of(&address),
            RouteAttribute::Priority(metric) => way.metric = metric,
            RouteAttribute::Metrics(metrics) => {
                way.mtu = metrics.into_iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    if let Some(out) = out {
        return vec![Way { out, ..way }];
    }
    let dead = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
    let alive = next_hops
        .into_iter()
        .filter(|hop| !hop.flags.intersects(dead));
    alive
        .map(|hop| Way {
            out: hop.interface_index,
            gateway: hop.attributes.iter().find_map(gateway_of),
            ..way
        })
        .collect()
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => observe::ip_of(address),
        _ => None,
    }
}
