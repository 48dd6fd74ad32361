//! Changes of the pods' links by others, noticed by the kernel's announcements.
//!
//! A socket in a pod's namespace would keep the namespace of a pod that is gone, with its links. One socket in the node's namespace gets
//! the announcements of all namespaces that have a number there (NETLINK_LISTEN_ALL_NSID, which takes CAP_NET_BROADCAST), and each
//! namespace with the other end of a pod link has one: the kernel gives it with the link.
//!
//! Only an announcement that means a change for the worse counts: something is removed, the link is down, or has another name or Ethernet
//! address. What the agent itself lays on a link that it makes is none, so new connections cost nothing here. Whether the link lacks
//! something is then looked at by whoever has its specification.

use std::{
    collections::{HashMap, HashSet},
    io::{self, IoSliceMut},
    net::IpAddr,
    os::fd::AsRawFd as _,
    time::Instant,
};

use netlink_packet_core::{NLM_F_REPLACE, NLMSG_OVERRUN, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::RouteAttribute,
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt},
};
use nsm_core::{
    link::VethPeer,
    net::{IfName, MacAddr},
};

/// RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR and _IPV6_ROUTE of linux/rtnetlink.h.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// The receive buffer, bytes: room for the announcements of some 1,000 new connections between two looks.
const BUFFER: usize = 8 << 20;

/// Room for one datagram. The kernel's announcements have some hundred bytes, but for routes with very many next hops; one that is cut makes
/// all links of its namespace suspect.
const DATAGRAM: usize = 64 * 1024;

/// The most datagrams of one look: some 1,000 new connections.
const MOST_DATAGRAMS: usize = 16 * 1024;

/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// Where the messages about links, addresses and neighbours have the link's index.
const INDEX: usize = HEADER + 4;

/// SOL_NETLINK of linux/socket.h.
const SOL_NETLINK: i32 = 270;

/// NETLINK_LISTEN_ALL_NSID of linux/netlink.h: the number of the namespace that an announcement is from; the socket's own has none.
const LISTEN_ALL_NSID: i32 = 8;

/// The pod's end of a link as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodEnd {
    /// The index of its other end, on the node.
    pub(crate) node: u32,
    /// Its name.
    pub(crate) name: IfName,
    /// Its Ethernet address.
    pub(crate) mac: MacAddr,
    /// When the call began that made or changed it last: what it lays on the link is announced after that.
    pub(crate) since: Instant,
    /// When it came to be known here. A look between the two has taken its announcements for those of somebody else's link.
    pub(crate) noted: Instant,
}

impl PodEnd {
    /// Whether it was being made at that time.
    fn was_half_made(&self, at: Instant) -> bool {
        self.since < at && at <= self.noted
    }
}

/// The pods' ends of links, by where they are.
pub(crate) type PodEndPlaces = HashMap<VethPeer, PodEnd>;

/// Pods' ends that may lack something now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suspects {
    /// These.
    pub(crate) ends: HashSet<VethPeer>,
    /// And any other: announcements were lost, or nothing was looked at before.
    pub(crate) any: bool,
}

/// A watch over the links of pods.
pub(crate) struct PodWatch {
    socket: Socket,
    /// Whether the announcements of other namespaces arrive.
    is_told: bool,
    is_unknown: bool,
    looked: Instant,
    buffer: Vec<u8>,
}

impl PodWatch {
    /// Watches the namespaces that have a number in that of the calling thread.
    ///
    /// # Errors
    ///
    /// No socket can be opened.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // More than the machine's limit takes CAP_NET_ADMIN. With less, announcements are lost sooner, which is noticed.
        if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER) {
            tracing::debug!(%error, "the buffer for announcements of pods' links keeps its size");
        }
        let is_told = match socket.set_listen_all_namespaces(true) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(
                    %error,
                    "what happens to links in pods is noticed late, for the kernel does not announce it to this agent: give it CAP_NET_BROADCAST"
                );
                false
            }
        };
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        Ok(Self {
            socket,
            is_told,
            is_unknown: true,
            looked: Instant::now(),
            buffer: vec![0; DATAGRAM],
        })
    }

    /// The ends that may lack something since the last call; at first, and where nothing is announced, any.
    ///
    /// # Errors
    ///
    /// The socket fails. The next call takes any end for changed.
    pub(crate) fn suspects(&mut self, ends: &PodEndPlaces) -> io::Result<Suspects> {
        let now = Instant::now();
        let mut seen = Seen::new(ends, self.looked);
        let half_made = ends
            .iter()
            .filter(|(_, end)| end.was_half_made(self.looked));
        seen.lacking.extend(half_made.map(|(place, _)| *place));
        let read = self.read(&mut seen);
        self.looked = now;
        if let Err(error) = read {
            self.is_unknown = true;
            return Err(error);
        }
        Ok(Suspects {
            ends: seen.into_suspects(),
            any: std::mem::take(&mut self.is_unknown) || !self.is_told,
        })
    }

    /// Reads what is there, up to a limit: what a pod announces faster than that overflows the buffer, which is noticed, and keeps nothing
    /// else of the node from being looked after.
    fn read(&mut self, seen: &mut Seen<'_>) -> io::Result<()> {
        for _ in 0..MOST_DATAGRAMS {
            let mut space = cmsg_space!(i32);
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
            let received = match recvmsg::<NetlinkAddr>(fd, &mut parts, Some(&mut space), flags) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::ENOBUFS) => {
                    self.is_unknown = true;
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            // Root of a pod may send into the groups of its namespace. The kernel alone is nobody's process.
            if received.address.is_none_or(|sender| sender.pid() != 0) {
                continue;
            }
            let is_cut = received.flags.contains(MsgFlags::MSG_TRUNC);
            let (length, netns) = (received.bytes, namespace(received.cmsgs()?));
            let bytes = self.buffer.get(..length).unwrap_or_default();
            if is_cut || seen.datagram(bytes, netns).is_none() {
                seen.rerouted.insert(netns);
            }
        }
        Ok(())
    }
}

/// The number of the namespace that a datagram is from; None: the socket's own.
fn namespace(messages: impl Iterator<Item = ControlMessageOwned>) -> Option<i32> {
    messages.into_iter().find_map(|message| match message {
        ControlMessageOwned::Unknown(message)
            if message.cmsg_header.cmsg_level == SOL_NETLINK
                && message.cmsg_header.cmsg_type == LISTEN_ALL_NSID =>
        {
            let bytes = message.data_bytes.get(..4)?;
            Some(i32::from_ne_bytes(bytes.try_into().ok()?))
        }
        _ => None,
    })
}

/// What the announcements between two looks amount to.
struct Seen<'a> {
    ends: &'a PodEndPlaces,
    /// When was looked before: what is younger was being made meanwhile.
    looked: Instant,
    /// Whether a link is right by the last announcement of it.
    links: HashMap<VethPeer, bool>,
    lacking: HashSet<VethPeer>,
    /// The Ethernet addresses of neighbours that were set, the first of each.
    neighbours: HashMap<(VethPeer, Option<IpAddr>), Option<Vec<u8>>>,
    /// Namespaces of which any link may lack something: a route took the place of another, or an announcement cannot be read.
    rerouted: HashSet<Option<i32>>,
}

impl<'a> Seen<'a> {
    fn new(ends: &'a PodEndPlaces, looked: Instant) -> Self {
        Self {
            ends,
            looked,
            links: HashMap::new(),
            lacking: HashSet::new(),
            neighbours: HashMap::new(),
            rerouted: HashSet::new(),
        }
    }

    fn into_suspects(self) -> HashSet<VethPeer> {
        let mut suspects = self.lacking;
        let wrong = self.links.into_iter().filter(|(_, is_right)| !is_right);
        suspects.extend(wrong.map(|(peer, _)| peer));
        if !self.rerouted.is_empty() {
            let rerouted = self.ends.keys().copied();
            suspects.extend(rerouted.filter(|peer| self.rerouted.contains(&peer.netns)));
        }
        suspects
    }

    /// None: it cannot be read, or announcements were lost before it.
    fn datagram(&mut self, datagram: &[u8], netns: Option<i32>) -> Option<()> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
            let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
            if kind == NLMSG_OVERRUN || length < HEADER {
                return None;
            }
            let bytes = rest.get(..length)?;
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                Ok(message) => {
                    let is_replacement = message.header.flags & NLM_F_REPLACE != 0;
                    if let NetlinkPayload::InnerMessage(message) = &message.payload {
                        self.message(message, is_replacement, netns);
                    }
                }
                // Of a device of a kind newer than the decoder; or of ours, with a name that is no text.
                Err(_) => {
                    if let Some(index) = bytes.get(INDEX..INDEX + 4) {
                        self.lacks(u32::from_ne_bytes(index.try_into().ok()?), netns);
                    }
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(())
    }

    fn message(&mut self, message: &RouteNetlinkMessage, is_replacement: bool, netns: Option<i32>) {
        use RouteNetlinkMessage as Message;
        match message {
            // What a bridge announces of its ports is of another family.
            Message::NewLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.link(link, netns);
            }
            Message::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.lacks(link.header.index, netns);
            }
            Message::DelAddress(address) => self.lacks(address.header.index, netns),
            Message::DelRoute(route) => {
                let out = route
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        RouteAttribute::Oif(index) => Some(*index),
                        _ => None,
                    });
                if let Some(index) = out {
                    self.lacks(index, netns);
                }
            }
            Message::NewRoute(_) if is_replacement => {
                self.rerouted.insert(netns);
            }
            Message::DelNeighbour(neighbour) => self.lacks(neighbour.header.ifindex, netns),
            Message::NewNeighbour(neighbour)
                if neighbour.header.state == NeighbourState::Permanent =>
            {
                self.neighbour(neighbour, netns);
            }
            _ => {}
        }
    }

    fn lacks(&mut self, index: u32, netns: Option<i32>) {
        let peer = VethPeer { index, netns };
        if self.ends.contains_key(&peer) {
            self.lacking.insert(peer);
        }
    }

    /// A permanent neighbour is set. That of a link which is being made is the first that is announced.
    fn neighbour(&mut self, message: &NeighbourMessage, netns: Option<i32>) {
        let index = message.header.ifindex;
        let peer = VethPeer { index, netns };
        let Some(end) = self.ends.get(&peer) else {
            return;
        };
        let (mut ip, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    ip = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    ip = Some(IpAddr::V6(*v6));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes.clone()),
                _ => {}
            }
        }
        let first = self.neighbours.entry((peer, ip)).or_insert(mac.clone());
        if end.since < self.looked || *first != mac {
            self.lacking.insert(peer);
        }
    }

    fn link(&mut self, message: &LinkMessage, netns: Option<i32>) {
        let index = message.header.index;
        let peer = VethPeer { index, netns };
        let Some(end) = self.ends.get(&peer) else {
            return;
        };
        let is_right = message.header.flags.contains(LinkFlags::Up)
            && message.attributes.iter().all(|attribute| match attribute {
                LinkAttribute::IfName(name) => name == end.name.as_str(),
                LinkAttribute::Address(mac) => mac.as_slice() == end.mac.octets(),
                _ => true,
            });
        self.links.insert(peer, is_right);
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkHeader;
    use netlink_packet_route::{address::AddressMessage, link::LinkHeader, route::RouteMessage};
    use proptest::prelude::*;

    use super::*;

    const HERE: VethPeer = VethPeer {
        index: 2,
        netns: Some(7),
    };

    fn ends(looked: Instant) -> PodEndPlaces {
        let end = PodEnd {
            node: 1 << 30,
            name: "nsm-1".parse().unwrap(),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            since: looked,
            noted: looked,
        };
        HashMap::from([(HERE, end)])
    }

    fn link(index: u32, name: &str, is_up: bool) -> RouteNetlinkMessage {
        let mut message = LinkMessage::default();
        message.header = LinkHeader {
            index,
            flags: if is_up {
                LinkFlags::Up
            } else {
                LinkFlags::empty()
            },
            ..LinkHeader::default()
        };
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        RouteNetlinkMessage::NewLink(message)
    }

    fn route(index: u32) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.attributes.push(RouteAttribute::Oif(index));
        message
    }

    /// As the kernel writes it.
    fn datagram(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
        message.serialize(&mut bytes);
        bytes
    }

    fn is_suspect(messages: Vec<(RouteNetlinkMessage, u16)>, netns: i32) -> bool {
        let looked = Instant::now();
        let ends = ends(looked);
        let mut seen = Seen::new(&ends, looked);
        for (message, flags) in messages {
            let bytes = datagram(message, flags);
            assert_eq!(seen.datagram(&bytes, Some(netns)), Some(()));
        }
        seen.into_suspects().contains(&HERE)
    }

    #[test]
    fn what_is_for_the_worse_counts() {
        let mut address = AddressMessage::default();
        address.header.index = 2;
        let gone = RouteNetlinkMessage::DelAddress(address.clone());
        assert!(is_suspect(vec![(gone.clone(), 0)], 7));
        assert!(!is_suspect(vec![(gone, 0)], 8), "of another namespace");
        let new = RouteNetlinkMessage::NewAddress(address);
        assert!(!is_suspect(vec![(new, 0)], 7));
        let gone = |index| (RouteNetlinkMessage::DelRoute(route(index)), 0);
        assert!(is_suspect(vec![gone(2)], 7));
        assert!(!is_suspect(vec![gone(3)], 7), "of another link");
        // Another route takes the place of ours.
        let new = |flags| (RouteNetlinkMessage::NewRoute(route(3)), flags);
        assert!(is_suspect(vec![new(NLM_F_REPLACE)], 7));
        assert!(!is_suspect(vec![new(0)], 7));
        let mut deleted = LinkMessage::default();
        deleted.header.index = 2;
        let deleted = RouteNetlinkMessage::DelLink(deleted);
        assert!(is_suspect(vec![(deleted, 0)], 7));
    }

    #[test]
    fn the_last_announcement_of_a_link_counts() {
        let (down, up) = ((link(2, "nsm-1", false), 0), (link(2, "nsm-1", true), 0));
        assert!(is_suspect(vec![up.clone(), down.clone()], 7));
        assert!(!is_suspect(vec![down, up], 7), "as it is made");
        assert!(is_suspect(vec![(link(2, "eth7", true), 0)], 7));
        assert!(!is_suspect(vec![(link(3, "eth7", false), 0)], 7));
    }

    #[test]
    fn a_neighbour_that_is_set_anew_counts() {
        let neighbour = |last: u8| {
            let mut message = NeighbourMessage::default();
            message.header.ifindex = 2;
            message.header.state = NeighbourState::Permanent;
            let ip = NeighbourAddress::Inet("172.16.1.2".parse().unwrap());
            let mac = vec![2, 0, 0, 0, 0, last];
            message.attributes = vec![
                NeighbourAttribute::Destination(ip),
                NeighbourAttribute::LinkLayerAddress(mac),
            ];
            (RouteNetlinkMessage::NewNeighbour(message), 0)
        };
        assert!(!is_suspect(vec![neighbour(2)], 7), "as it is made");
        assert!(is_suspect(vec![neighbour(2), neighbour(9)], 7));
        let made = Instant::now();
        let (ends, later) = (ends(made), made + std::time::Duration::from_millis(500));
        let mut seen = Seen::new(&ends, later);
        let (message, flags) = neighbour(9);
        seen.datagram(&datagram(message, flags), Some(7));
        assert!(seen.into_suspects().contains(&HERE), "it was made before");
    }

    /// Programs in a pod that set up each new link are quicker than the agent's next look.
    #[test]
    fn a_link_that_was_being_made_at_a_look_is_suspect_once() {
        let made = Instant::now();
        let after = |ms| made + std::time::Duration::from_millis(ms);
        let end = PodEnd {
            noted: after(20),
            ..ends(made)[&HERE].clone()
        };
        assert!(end.was_half_made(after(10)));
        assert!(!end.was_half_made(after(510)));
        assert!(!end.was_half_made(made));
    }

    /// A name need not be text.
    #[test]
    fn a_link_that_cannot_be_decoded_is_suspect() {
        let mut bytes = datagram(link(2, "nsm-1", true), 0);
        let at = bytes.windows(5).position(|it| it == b"nsm-1").unwrap();
        bytes[at] = 0xff;
        let looked = Instant::now();
        let ends = ends(looked);
        let mut seen = Seen::new(&ends, looked);
        assert_eq!(seen.datagram(&bytes, Some(7)), Some(()));
        assert!(seen.into_suspects().contains(&HERE));
    }

    /// What a pod sends into the groups of its namespace is not the kernel's.
    #[test]
    #[ignore = "needs root: makes a network namespace, and sends to a multicast group"]
    fn what_is_not_the_kernels_does_not_count() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let ends = ends(Instant::now());
            let mut watch = PodWatch::open().unwrap();
            assert!(watch.suspects(&ends).unwrap().any, "the first look");
            let mut forger = Socket::new(NETLINK_ROUTE).unwrap();
            forger.bind_auto().unwrap();
            let overrun = [
                &16u32.to_ne_bytes()[..],
                &NLMSG_OVERRUN.to_ne_bytes(),
                &[0; 10],
            ];
            let group = netlink_sys::SocketAddr::new(0, 1);
            forger.send_to(&overrun.concat(), &group, 0).unwrap();
            let nothing = Suspects {
                ends: HashSet::new(),
                any: false,
            };
            assert_eq!(watch.suspects(&ends).unwrap(), nothing);
        })
        .join()
        .unwrap();
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let looked = Instant::now();
            let ends = ends(looked);
            Seen::new(&ends, looked).datagram(&bytes, None);
        }
    }
}
