//! The requests that links are made with.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
        LinkInfo, LinkMessage, VxlanDf,
    },
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    nsid::{NsidAttribute, NsidMessage},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType, RouteVia,
    },
};
use nsm_core::tunnel::{LinkSpec, MacAddr, RouteSpec, VxlanSpec};

use crate::{netlink::Request, netns::Netns};

/// The group of every link that the agent makes, "nsmp" in ASCII: `ip link show group 1853058416`. It is for people; what is ours is
/// told by the alias.
const LINK_GROUP: u32 = u32::from_be_bytes(*b"nsmp");

/// Groups for links that are about to be deleted together.
pub(super) const DOOMED_GROUPS: std::ops::Range<u32> = LINK_GROUP + 1..LINK_GROUP + 1024;

/// The origin of routes that the agent makes (`proto` in `ip route`), so that nobody else's is ever removed. Free for use as all above
/// RTPROT_STATIC that rtnetlink.h does not list.
pub(super) const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(78);

/// Create a VXLAN link in the pod's namespace; sent in the node's, where its UDP socket then lives.
pub(super) fn create_vxlan(pod: &Netns, spec: &VxlanSpec) -> Request {
    let endpoints = endpoints(spec.local, spec.remote);
    let data = [
        InfoVxlan::Id(spec.vni.get()),
        InfoVxlan::Port(spec.port),
        // One peer, named: nothing to learn.
        InfoVxlan::Learning(false),
        // Without it the kernel fragments silently, and the inner flow never learns the path's MTU.
        InfoVxlan::Df(VxlanDf::Set),
    ];
    let data = InfoData::Vxlan(data.into_iter().chain(endpoints).collect());
    create(new_link(pod, &spec.link), InfoKind::Vxlan, data)
}

/// Create a veth pair, each end in its namespace.
pub(super) fn create_veth(a: (&Netns, &LinkSpec), b: (&Netns, &LinkSpec)) -> Request {
    // Up in the peer's part makes the kernel refuse; both ends are taken up afterwards.
    let peer = new_link(b.0, b.1);
    create(
        new_link(a.0, a.1),
        InfoKind::Veth,
        InfoData::Veth(InfoVeth::Peer(peer)),
    )
}

fn create(mut link: LinkMessage, kind: InfoKind, data: InfoData) -> Request {
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(kind),
        LinkInfo::Data(data),
    ]));
    (
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

fn new_link(netns: &Netns, spec: &LinkSpec) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.as_str().to_owned()),
        LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
        LinkAttribute::Group(LINK_GROUP),
        LinkAttribute::Mtu(spec.mtu),
    ];
    message.attributes.extend(
        spec.mac
            .map(|mac| LinkAttribute::Address(mac.octets().to_vec())),
    );
    message
}

fn endpoints(local: IpAddr, remote: IpAddr) -> [InfoVxlan; 2] {
    let local = match local {
        IpAddr::V4(ip) => InfoVxlan::Local(ip),
        IpAddr::V6(ip) => InfoVxlan::Local6(ip),
    };
    let remote = match remote {
        IpAddr::V4(ip) => InfoVxlan::Group(ip),
        IpAddr::V6(ip) => InfoVxlan::Group6(ip),
    };
    [local, remote]
}

/// All links of the namespace; the statistics only when asked for, for they are most of the answer.
pub(super) fn get_links(statistics: bool) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    if !statistics {
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    }
    RouteNetlinkMessage::GetLink(message)
}

/// The link with this name.
pub(super) fn get_link_named(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    (RouteNetlinkMessage::GetLink(message), 0)
}

/// The link with this index.
pub(super) fn get_link(index: u32) -> Request {
    (RouteNetlinkMessage::GetLink(link(index)), 0)
}

/// Mark the link with this name.
pub(super) fn set_alias(name: &str, alias: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::IfAlias(alias.to_owned()),
    ];
    (RouteNetlinkMessage::SetLink(message), 0)
}

pub(super) fn set_endpoints(index: u32, local: IpAddr, remote: IpAddr) -> Request {
    let mut message = link(index);
    let data = InfoData::Vxlan(endpoints(local, remote).into());
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Vxlan),
        LinkInfo::Data(data),
    ]));
    // Changing what a kind has of its own takes a NEWLINK without CREATE.
    (RouteNetlinkMessage::NewLink(message), 0)
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Request {
    set(index, LinkAttribute::Mtu(mtu))
}

pub(super) fn set_mac(index: u32, mac: MacAddr) -> Request {
    set(index, LinkAttribute::Address(mac.octets().to_vec()))
}

pub(super) fn set_group(index: u32, group: u32) -> Request {
    set(index, LinkAttribute::Group(group))
}

pub(super) fn set_up(index: u32) -> Request {
    let mut message = link(index);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    (RouteNetlinkMessage::SetLink(message), 0)
}

pub(super) fn delete_link(index: u32) -> Request {
    (RouteNetlinkMessage::DelLink(link(index)), 0)
}

pub(super) fn delete_link_named(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    (RouteNetlinkMessage::DelLink(message), 0)
}

pub(super) fn delete_group(group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    (RouteNetlinkMessage::DelLink(message), 0)
}

fn set(index: u32, attribute: LinkAttribute) -> Request {
    let mut message = link(index);
    message.attributes.push(attribute);
    (RouteNetlinkMessage::SetLink(message), 0)
}

fn link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// By which number the socket's namespace knows another one.
pub(super) fn get_netns_id(netns: &Netns) -> Request {
    let mut message = NsidMessage::default();
    // Descriptors are never negative.
    message
        .attributes
        .push(NsidAttribute::Fd(netns.as_fd().as_raw_fd().cast_unsigned()));
    (RouteNetlinkMessage::GetNsId(message), 0)
}

/// The addresses of a link.
pub(super) fn get_addresses(index: u32) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    RouteNetlinkMessage::GetAddress(message)
}

pub(super) fn add_address(index: u32, address: IpNet) -> Request {
    (
        RouteNetlinkMessage::NewAddress(self::address(index, address)),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

pub(super) fn remove_address(index: u32, address: IpNet) -> Request {
    (
        RouteNetlinkMessage::DelAddress(self::address(index, address)),
        0,
    )
}

fn address(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    if address.addr().is_ipv6() {
        // There are two on the link and both addresses are agreed: asking for duplicates would only delay the first packet by a second.
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// The neighbours of a link.
pub(super) fn get_neighbours(index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.attributes.push(NeighbourAttribute::IfIndex(index));
    RouteNetlinkMessage::GetNeighbour(message)
}

pub(super) fn set_neighbour(index: u32, ip: IpAddr, mac: MacAddr) -> Request {
    let mut message = neighbour(index, ip);
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    (
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

pub(super) fn remove_neighbour(index: u32, ip: IpAddr) -> Request {
    (RouteNetlinkMessage::DelNeighbour(neighbour(index, ip)), 0)
}

fn neighbour(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message
        .attributes
        .push(NeighbourAttribute::Destination(ip.into()));
    message
}

/// The unicast routes of the main table, over a link or all.
pub(super) fn get_routes(index: Option<u32>) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.attributes.extend(index.map(RouteAttribute::Oif));
    RouteNetlinkMessage::GetRoute(message)
}

/// Which route a packet to this address takes.
pub(super) fn look_up_route(remote: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(remote);
    message.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
    message
        .attributes
        .push(RouteAttribute::Destination(remote.into()));
    (RouteNetlinkMessage::GetRoute(message), 0)
}

pub(super) fn add_route(index: u32, route: RouteSpec) -> Request {
    let mut message = self::route(index, route);
    message.header.kind = RouteType::Unicast;
    message.header.scope = match route.via {
        // IPv6 knows no scopes of routes.
        None if route.prefix.addr().is_ipv4() => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    (
        RouteNetlinkMessage::NewRoute(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(super) fn remove_route(index: u32, route: RouteSpec) -> Request {
    let mut message = self::route(index, route);
    // Any scope.
    message.header.scope = RouteScope::NoWhere;
    (RouteNetlinkMessage::DelRoute(message), 0)
}

fn route(index: u32, route: RouteSpec) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.prefix.addr());
    message.header.destination_prefix_length = route.prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = ROUTE_PROTOCOL;
    message.attributes = vec![
        RouteAttribute::Destination(route.prefix.addr().into()),
        RouteAttribute::Oif(index),
    ];
    if let Some(via) = route.via {
        // The next hop is the other end of the link, whatever the prefix length of our address says.
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(match (route.prefix, via) {
            (IpNet::V4(_), IpAddr::V6(via)) => RouteAttribute::Via(RouteVia::Inet6(via)),
            _ => RouteAttribute::Gateway(via.into()),
        });
    }
    message
}

const fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
