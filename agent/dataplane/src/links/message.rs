//! The requests that links are made with.
//!
//! Each is made by a builder of rtnetlink where that gives the same message, else by hand: its address builder adds a broadcast address
//! and has no flags, it has none for neighbours and namespace numbers, and its route builder sets what a look-up must leave open.

use std::{
    net::IpAddr,
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute,
        LinkExtentMask, LinkMessage,
    },
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    nsid::{NsidAttribute, NsidMessage},
    route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteVia},
};
use nsm_core::{
    link::{LinkSpec, NODE_GROUP, NODE_GROUPS, NodeLinkStep, RouteSpec},
    net::{IfName, MacAddr},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::{netlink::Request, netns::Netns};

/// The group of the links that the agent makes in pods, "nsmp" in ASCII: `ip link show group 1853058416`. It is for people; what is
/// ours is told by the alias. Those in the node's namespace are in [`NODE_GROUP`].
pub(super) const LINK_GROUP: u32 = u32::from_be_bytes(*b"nsmp");

/// Groups for links in the node's namespace that are about to be deleted together: until then, their frames are kept off the node as before.
pub(super) const DOOMED_GROUPS: RangeInclusive<u32> = NODE_GROUP + 1..=*NODE_GROUPS.end();

/// The origin of routes that the agent makes (`proto` in `ip route`), so that no other route is ever removed. Free for use as all above
/// RTPROT_STATIC that rtnetlink.h does not list.
pub(super) const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(78);

/// Create a pod link; sent in the node's namespace, where the end with the index and the name stays.
pub(super) fn create_pod_link(
    index: u32,
    node_end: &IfName,
    pod: &Netns,
    spec: &LinkSpec,
) -> Request {
    let (node_name, pod_name) = (node_end.as_str(), spec.name.as_str());
    let pod_end = one_queue(place(LinkUnspec::new_with_name(pod_name), pod, spec)).build();
    let pair = LinkVeth::new(node_name, pod_name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(pod_end)))
        .index(index)
        .link_group(NODE_GROUP)
        .mtu(spec.mtu)
        .arp(false);
    create(one_queue(pair).build())
}

/// A veth end has a queue for each processor unless told otherwise, which costs memory and gains nothing here: it takes no lock to send.
fn one_queue<T>(link: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
    link.append_extra_attribute(LinkAttribute::NumTxQueues(1))
        .append_extra_attribute(LinkAttribute::NumRxQueues(1))
}

fn create(link: LinkMessage) -> Request {
    (
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// What every link is created with beside its name.
fn place<T>(link: LinkMessageBuilder<T>, netns: &Netns, spec: &LinkSpec) -> LinkMessageBuilder<T> {
    let link = link
        .setns_by_fd(netns.as_fd().as_raw_fd())
        .link_group(LINK_GROUP)
        .mtu(spec.mtu);
    match spec.mac {
        Some(mac) => link.address(mac.octets().to_vec()),
        None => link,
    }
}

/// All links of the namespace; the statistics only when asked for, for they are most of the answer.
pub(super) fn get_links(statistics: bool) -> RouteNetlinkMessage {
    let mut links = LinkMessageBuilder::<LinkUnspec>::new();
    if !statistics {
        links =
            links.append_extra_attribute(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    }
    RouteNetlinkMessage::GetLink(links.build())
}

/// The link with this name.
pub(super) fn get_link_named(name: &str) -> Request {
    let link = LinkUnspec::new_with_name(name).build();
    (RouteNetlinkMessage::GetLink(link), 0)
}

/// The link with this index.
pub(super) fn get_link(index: u32) -> Request {
    let link = LinkUnspec::new_with_index(index).build();
    (RouteNetlinkMessage::GetLink(link), 0)
}

/// Mark the link with this name.
pub(super) fn set_alias(name: &str, alias: &str) -> Request {
    set(LinkUnspec::new_with_name(name).alias(alias))
}

/// Mark the link with this index.
pub(super) fn set_alias_at(index: u32, alias: &str) -> Request {
    set(LinkUnspec::new_with_index(index).alias(alias))
}

/// No IPv6 address that the kernel generates and announces. A kernel without IPv6 refuses, and does not need it.
pub(super) fn no_addresses(link: LinkMessageBuilder<LinkUnspec>) -> Request {
    set(
        link.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
        )])),
    )
}

/// Take the link with this name up.
pub(super) fn set_up_named(name: &str) -> Request {
    set(LinkUnspec::new_with_name(name).up())
}

/// The request of a step on a node's end.
pub(super) fn node_link_step(index: u32, name: &IfName, step: NodeLinkStep) -> Request {
    let link = LinkUnspec::new_with_index(index);
    match step {
        NodeLinkStep::SetDown => set(link.down()),
        NodeLinkStep::SetName => set(link.name(name.as_str())),
        NodeLinkStep::LeaveController => set(link.nocontroller()),
        NodeLinkStep::SetGroup => set_group(index, NODE_GROUP),
        NodeLinkStep::SetMtu(mtu) => set_mtu(index, mtu),
        NodeLinkStep::DisableArp => set(link.arp(false)),
        NodeLinkStep::DisableAddresses => no_addresses(link),
        NodeLinkStep::SetUp => set_up(index),
    }
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Request {
    set(LinkUnspec::new_with_index(index).mtu(mtu))
}

pub(super) fn set_mac(index: u32, mac: MacAddr) -> Request {
    set(LinkUnspec::new_with_index(index).address(mac.octets().to_vec()))
}

pub(super) fn set_group(index: u32, group: u32) -> Request {
    set(LinkUnspec::new_with_index(index).link_group(group))
}

pub(super) fn set_up(index: u32) -> Request {
    set(LinkUnspec::new_with_index(index).up())
}

fn set(link: LinkMessageBuilder<LinkUnspec>) -> Request {
    (RouteNetlinkMessage::SetLink(link.build()), 0)
}

pub(super) fn delete_link(index: u32) -> Request {
    delete(LinkUnspec::new_with_index(index))
}

pub(super) fn delete_link_named(name: &str) -> Request {
    delete(LinkUnspec::new_with_name(name))
}

pub(super) fn delete_group(group: u32) -> Request {
    delete(LinkMessageBuilder::<LinkUnspec>::new().link_group(group))
}

fn delete(link: LinkMessageBuilder<LinkUnspec>) -> Request {
    (RouteNetlinkMessage::DelLink(link.build()), 0)
}

/// The number of another namespace in the socket's own.
pub(super) fn get_netns_id(netns: &Netns) -> Request {
    let mut message = NsidMessage::default();
    // Descriptors are never negative.
    message
        .attributes
        .push(NsidAttribute::Fd(netns.as_fd().as_raw_fd().cast_unsigned()));
    (RouteNetlinkMessage::GetNsId(message), 0)
}

/// The number of a process's network namespace in the socket's own. The kernel asks no rights over that process.
pub(super) fn get_netns_id_of_process(pid: u32) -> Request {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Pid(pid));
    (RouteNetlinkMessage::GetNsId(message), 0)
}

/// Give a process's network namespace a number in the socket's own, of the kernel's choice.
pub(super) fn number_netns_of_process(pid: u32) -> Request {
    let mut message = NsidMessage::default();
    let any = NsidAttribute::Id(-1);
    message.attributes = vec![any, NsidAttribute::Pid(pid)];
    (RouteNetlinkMessage::NewNsId(message), 0)
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
    // Of every origin: the builder presets "static", and the kernel filters by it.
    let mut routes = RouteMessageBuilder::<IpAddr>::new().protocol(RouteProtocol::Unspec);
    if let Some(index) = index {
        routes = routes.output_interface(index);
    }
    RouteNetlinkMessage::GetRoute(routes.build())
}

/// Which route a packet to this address takes.
pub(super) fn look_up_route(remote: IpAddr) -> Request {
    // The kernel refuses a look-up that names a table, an origin or a type, as the builder does.
    let mut message = RouteMessage::default();
    message.header.address_family = family(remote);
    message.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
    message
        .attributes
        .push(RouteAttribute::Destination(remote.into()));
    (RouteNetlinkMessage::GetRoute(message), 0)
}

pub(super) fn add_route(index: u32, route: RouteSpec) -> Request {
    let scope = match route.via {
        // IPv6 has no scopes of routes.
        None if route.prefix.addr().is_ipv4() => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    let message = self::route(index, route).scope(scope).build();
    (
        RouteNetlinkMessage::NewRoute(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(super) fn remove_route(index: u32, route: RouteSpec) -> Request {
    // Any scope.
    let message = self::route(index, route).scope(RouteScope::NoWhere).build();
    (RouteNetlinkMessage::DelRoute(message), 0)
}

/// A unicast route of the main table, as the builder presets.
fn route(index: u32, route: RouteSpec) -> RouteMessageBuilder<IpAddr> {
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .protocol(ROUTE_PROTOCOL)
        .destination_prefix(route.prefix.addr(), route.prefix.prefix_len())
        .expect("a prefix is no longer than its address")
        .output_interface(index);
    if let Some(via) = route.via {
        // The next hop is the other end of the link, whatever the prefix length of our address.
        message = message.onlink();
        // Not the builder's `gateway`: the families that it refuses are for the kernel to refuse, whose answer is reported as any other.
        message
            .get_mut()
            .attributes
            .push(match (route.prefix, via) {
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
