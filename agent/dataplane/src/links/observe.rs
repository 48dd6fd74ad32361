//! What the kernel shows of links, as `nsm_core::link` takes it.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage, Stats64,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    nsid::NsidAttribute,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia},
};
use nsm_core::{
    link::{Link, LinkKind, NodeLink, Route, RouteSpec, VethPeer},
    net::MacAddr,
};

use super::message;
use crate::netlink::{Netlink, NetlinkError};

/// All links of the socket's namespace, without what lies on them.
pub(super) fn links(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    Ok(netlink
        .dump(&message::get_links(false))?
        .into_iter()
        .filter_map(link_of)
        .collect())
}

/// Completes a link by what lies on it.
pub(super) fn contents(netlink: &mut Netlink, link: &mut Link) -> Result<(), NetlinkError> {
    let index = link.index;
    let addresses = netlink.dump(&message::get_addresses(index))?;
    link.addresses = addresses
        .into_iter()
        .filter_map(|message| address_of(message, index))
        .collect();
    link.routes = routes(netlink, index)?;
    let neighbours = netlink.dump(&message::get_neighbours(index))?;
    link.neighbours = neighbours
        .into_iter()
        .filter_map(|message| neighbour_of(message, index))
        .collect();
    Ok(())
}

/// The unicast routes of the main table over a link.
pub(super) fn routes(netlink: &mut Netlink, index: u32) -> Result<Vec<Route>, NetlinkError> {
    let routes = netlink.dump(&message::get_routes(Some(index)))?;
    Ok(routes
        .into_iter()
        .filter_map(|message| route_of(message, index))
        .collect())
}

/// Whether the message is about a link that is up and has a carrier.
pub(super) fn is_running(message: &RouteNetlinkMessage) -> bool {
    matches!(message, RouteNetlinkMessage::NewLink(link) if link.header.flags.contains(LinkFlags::Running))
}

/// The link that a message describes, without what lies on it.
pub(super) fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(LinkMessage {
        header, attributes, ..
    }) = message
    else {
        return None;
    };
    let mut link = Link {
        index: header.index,
        name: String::new(),
        alias: None,
        mac: None,
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        kind: LinkKind::Other(String::new()),
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    let (mut peer, mut peer_netns, mut infos) = (0, None, Vec::new());
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = alias.parse().ok(),
            LinkAttribute::Address(bytes) => link.mac = mac_of(&bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => peer = index,
            LinkAttribute::LinkNetNsId(id) => peer_netns = Some(id),
            LinkAttribute::LinkInfo(info) => infos = info,
            _ => {}
        }
    }
    link.kind = kind_of(infos, peer, peer_netns);
    Some(link)
}

/// The link in the node's namespace that a message describes.
pub(super) fn node_link_of(message: &RouteNetlinkMessage) -> Option<NodeLink> {
    let RouteNetlinkMessage::NewLink(LinkMessage {
        header, attributes, ..
    }) = message
    else {
        return None;
    };
    let mut link = NodeLink {
        index: header.index,
        name: String::new(),
        alias: None,
        mac: MacAddr::new([0; 6]),
        mtu: 0,
        group: 0,
        up: header.flags.contains(LinkFlags::Up),
        arp: !header.flags.contains(LinkFlags::Noarp),
        generates_addresses: false,
        controller: None,
        peer: None,
    };
    let (mut is_veth, mut peer, mut netns) = (false, 0, None);
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = alias.parse().ok(),
            LinkAttribute::Address(bytes) => link.mac = mac_of(bytes)?,
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Link(index) => peer = *index,
            LinkAttribute::LinkNetNsId(id) => netns = Some(*id),
            LinkAttribute::LinkInfo(infos) => {
                is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::AfSpecUnspec(families) => {
                link.generates_addresses = generates_addresses(families);
            }
            _ => {}
        }
    }
    link.peer = is_veth.then_some(VethPeer { index: peer, netns });
    Some(link)
}

fn generates_addresses(families: &[AfSpecUnspec]) -> bool {
    families.iter().any(|family| {
        matches!(family, AfSpecUnspec::Inet6(inet6) if inet6.iter().any(|attribute| {
            matches!(attribute, AfSpecInet6::AddrGenMode(mode) if *mode != In6AddrGenMode::None)
        }))
    })
}

/// What a link has counted since it was created.
pub(super) fn counted(message: &RouteNetlinkMessage) -> Option<Stats64> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Stats64(counted) => Some(*counted),
            _ => None,
        })
}

fn kind_of(infos: Vec<LinkInfo>, peer: u32, peer_netns: Option<i32>) -> LinkKind {
    let kind = infos.into_iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Veth) => LinkKind::Veth { peer, peer_netns },
        other => LinkKind::Other(other.map(|kind| kind.to_string()).unwrap_or_default()),
    }
}

fn address_of(message: RouteNetlinkMessage, index: u32) -> Option<IpNet> {
    let (found, address) = any_address(message)?;
    (found == index).then_some(address)
}

/// An address, and the index of its link.
pub(super) fn any_address(message: RouteNetlinkMessage) -> Option<(u32, IpNet)> {
    let RouteNetlinkMessage::NewAddress(AddressMessage {
        header, attributes, ..
    }) = message
    else {
        return None;
    };
    let (mut local, mut address) = (None, None);
    for attribute in attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(ip),
            AddressAttribute::Address(ip) => address = Some(ip),
            _ => {}
        }
    }
    // IPv6 has no LOCAL; on IPv4 ADDRESS is the peer's where there is one.
    let address = IpNet::new(local.or(address)?, header.prefix_len).ok()?;
    Some((header.index, address))
}

fn neighbour_of(message: RouteNetlinkMessage, index: u32) -> Option<(IpAddr, MacAddr)> {
    let RouteNetlinkMessage::NewNeighbour(NeighbourMessage {
        header, attributes, ..
    }) = message
    else {
        return None;
    };
    if header.ifindex != index || header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                ip = Some(IpAddr::V4(v4))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                ip = Some(IpAddr::V6(v6))
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(&bytes),
            _ => {}
        }
    }
    Some((ip?, mac?))
}

fn route_of(message: RouteNetlinkMessage, index: u32) -> Option<Route> {
    let (out, route) = any_route(message)?;
    (out == index).then_some(route)
}

/// A unicast route of the main table, and the index of the link that it leads over.
pub(super) fn any_route(message: RouteNetlinkMessage) -> Option<(u32, Route)> {
    let RouteNetlinkMessage::NewRoute(RouteMessage {
        header, attributes, ..
    }) = message
    else {
        return None;
    };
    if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut destination, mut via, mut out) = (None, None, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(&address),
            RouteAttribute::Gateway(address) => via = ip_of(&address),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => via = Some(IpAddr::V6(ip)),
            RouteAttribute::Oif(index) => out = Some(index),
            _ => {}
        }
    }
    // The kernel leaves out the destination of a default route.
    let any = if header.address_family == netlink_packet_route::AddressFamily::Inet {
        IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let prefix = IpNet::new(destination.unwrap_or(any), header.destination_prefix_length).ok()?;
    let route = Route {
        spec: RouteSpec { prefix, via },
        ours: header.protocol == message::ROUTE_PROTOCOL,
    };
    Some((out?, route))
}

/// The number by which a namespace is known, when it has one.
pub(super) fn netns_id_of(message: &RouteNetlinkMessage) -> Option<i32> {
    let RouteNetlinkMessage::NewNsId(message) = message else {
        return None;
    };
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NsidAttribute::Id(id) if *id >= 0 => Some(*id),
            _ => None,
        })
}

pub(super) fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn mac_of(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr::new)
}
