//! Changes of the node's links by others: noticed by the kernel's notifications, and undone.
//!
//! A look at all links twice a second would cost a node with 10,000 connections some percents of a processor. The kernel announces each
//! change of a link and of what hangs on it, so a look reads those links alone; all of them only at first, and where announcements
//! were lost because too much happened.

use std::{
    collections::{BTreeSet, HashMap},
    io,
};

use ipnet::IpNet;
use netlink_packet_core::NLMSG_OVERRUN;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};
use nsm_core::{
    link::{NodeLink, repair_node_link},
    net::IfName,
};

use super::{
    LinkError,
    basics::{disable_ipv6, take_steps},
    message, observe,
};
use crate::netlink::{Netlink, NetlinkError, Request};

/// RTNLGRP_LINK, _TC, _IPV4_IFADDR and _IPV6_IFADDR of linux/rtnetlink.h: links, the filters on them, and addresses.
const GROUPS: [u32; 4] = [1, 4, 5, 9];

/// RTM_NEWADDR of linux/rtnetlink.h.
const NEW_ADDRESS: u16 = 20;

/// The receive buffer, bytes: room for the announcements of some 2,000 new links between two looks.
const BUFFER: usize = 8 << 20;

/// Room for one datagram of announcements; the kernel makes none larger.
const DATAGRAM: usize = 32 * 1024;

/// `struct nlmsghdr`: 16 bytes, with length and type in front.
const HEADER: usize = 16;

/// Where `struct ifinfomsg`, `struct tcmsg` and `struct ifaddrmsg` have the link's index.
const INDEX: usize = HEADER + 4;

/// Links that changed since the last look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// These, by index: made, changed, deleted, or with another filter. `u32::MAX` stands for a block of filters that links share.
    Links(BTreeSet<u32>),
    /// Any.
    Unknown,
}

/// What a look at the node's links found.
#[derive(Debug)]
pub struct Looked {
    /// The links that may have changed, whether ours or not.
    pub changed: Changed,
    /// Those of ours that were not as they were made, by index.
    pub mended: Vec<(u32, Mended)>,
}

/// What became of a link that was not as it was made.
#[derive(Debug)]
pub enum Mended {
    /// It is right again, after this many steps.
    Repaired(usize),
    /// It is gone, with its other end.
    Gone,
    /// It is as somebody else has made it.
    Refused(LinkError),
}

impl Changed {
    /// Whether this link may have changed.
    #[must_use]
    pub fn includes(&self, index: u32) -> bool {
        match self {
            Self::Links(links) => links.contains(&index),
            Self::Unknown => true,
        }
    }
}

/// A watch over the links of one namespace.
pub struct NodeWatch {
    netlink: Netlink,
    announcements: Announcements,
}

impl NodeWatch {
    /// Watches the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// No socket can be opened.
    pub fn open() -> Result<Self, LinkError> {
        Ok(Self {
            announcements: Announcements::open()?,
            netlink: Netlink::open()?,
        })
    }

    /// Compares links of ours, each as it was made, by index, with what they are now, and repairs them. Those that were not announced
    /// since the last look are taken to be right; the first look reads all.
    ///
    /// # Errors
    ///
    /// The links cannot be read. The next look reads all again.
    pub fn look(&mut self, made: &HashMap<u32, NodeLink>) -> Result<Looked, LinkError> {
        let (changed, addressed) = self.announcements.changed()?;
        let mended = mend(&mut self.netlink, made, &changed, &addressed)
            .inspect_err(|_| self.announcements.is_unknown = true)?;
        Ok(Looked { changed, mended })
    }
}

/// The kernel's announcements.
struct Announcements {
    socket: Socket,
    is_unknown: bool,
    buffer: Vec<u8>,
}

impl Announcements {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // More than the machine's limit takes CAP_NET_ADMIN. With less, announcements are lost sooner, which is noticed.
        if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER) {
            tracing::debug!(%error, "the buffer for announcements of links keeps its size");
        }
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        Ok(Self {
            socket,
            is_unknown: true,
            buffer: Vec::with_capacity(DATAGRAM),
        })
    }

    /// What changed since the last call, and the links that got addresses; the first time, everything may have changed.
    fn changed(&mut self) -> Result<(Changed, BTreeSet<u32>), NetlinkError> {
        let (mut links, mut addressed) = (BTreeSet::new(), BTreeSet::new());
        let mut is_unknown = std::mem::take(&mut self.is_unknown);
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {
                    let read = read(&self.buffer, &mut links, &mut addressed);
                    is_unknown |= read.is_none();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => is_unknown = true,
                Err(error) => return Err(error.into()),
            }
        }
        let changed = if is_unknown {
            Changed::Unknown
        } else {
            Changed::Links(links)
        };
        Ok((changed, addressed))
    }
}

/// The indexes of the links that a datagram is about, and of those that got an address. None: it cannot be read, or announcements were lost
/// before it.
fn read(datagram: &[u8], links: &mut BTreeSet<u32>, addressed: &mut BTreeSet<u32>) -> Option<()> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let length = u32_at(rest, 0)? as usize;
        let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
        if kind == NLMSG_OVERRUN || length < HEADER {
            return None;
        }
        let message = rest.get(..length)?;
        let index = u32_at(message, INDEX)?;
        links.insert(index);
        if kind == NEW_ADDRESS {
            addressed.insert(index);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn mend(
    netlink: &mut Netlink,
    made: &HashMap<u32, NodeLink>,
    changed: &Changed,
    addressed: &BTreeSet<u32>,
) -> Result<Vec<(u32, Mended)>, LinkError> {
    let meant: Vec<&NodeLink> = made
        .values()
        .filter(|link| changed.includes(link.index))
        .collect();
    if meant.is_empty() {
        return Ok(Vec::new());
    }
    let found = found(netlink, &meant, changed)?;
    let mut strange = addresses(netlink, made, changed, addressed)?;
    let mut mended = Vec::new();
    for link in meant {
        let strange = strange.remove(&link.index).unwrap_or_default();
        // No other link has had the index: one without its alias is ours all the same.
        let outcome = match found.get(&link.index) {
            Some(now) => match repair(netlink, link, now, &strange) {
                Ok(0) => continue,
                Ok(steps) => Mended::Repaired(steps),
                Err(error) => Mended::Refused(error),
            },
            None => Mended::Gone,
        };
        mended.push((link.index, outcome));
    }
    Ok(mended)
}

fn found(
    netlink: &mut Netlink,
    meant: &[&NodeLink],
    changed: &Changed,
) -> Result<HashMap<u32, NodeLink>, LinkError> {
    let messages = match changed {
        Changed::Unknown => netlink.dump(&message::get_links(false))?,
        Changed::Links(_) => {
            let requests = meant
                .iter()
                .map(|link| message::get_link(link.index))
                .collect();
            let answers = netlink.transact(requests)?;
            answers.into_iter().flatten().flatten().collect()
        }
    };
    let found = messages.iter().filter_map(observe::node_link_of);
    Ok(found.map(|link| (link.index, link)).collect())
}

/// The addresses that somebody gave to links of ours, which have none.
fn addresses(
    netlink: &mut Netlink,
    made: &HashMap<u32, NodeLink>,
    changed: &Changed,
    addressed: &BTreeSet<u32>,
) -> Result<HashMap<u32, Vec<IpNet>>, LinkError> {
    let ours = addressed.iter().filter(|index| made.contains_key(index));
    let questions: Vec<u32> = match changed {
        // Of all links.
        Changed::Unknown => vec![0],
        Changed::Links(_) => ours.copied().collect(),
    };
    let mut found: HashMap<u32, Vec<IpNet>> = HashMap::new();
    for question in questions {
        let answers = netlink.dump(&message::get_addresses(question))?;
        let addresses = answers.into_iter().filter_map(observe::any_address);
        for (index, address) in addresses.filter(|(index, _)| made.contains_key(index)) {
            found.entry(index).or_default().push(address);
        }
    }
    Ok(found)
}

/// Makes a link what it was. How many steps that took. The MTU is left alone: the agent itself changes it in between, and the next refresh
/// of the connection sets it.
fn repair(
    netlink: &mut Netlink,
    made: &NodeLink,
    now: &NodeLink,
    strange: &[IpNet],
) -> Result<usize, LinkError> {
    let name = IfName::try_from(made.name.as_str())
        .map_err(|error| NetlinkError::Malformed(error.to_string()))?;
    let refused = |kernel| LinkError::refused(format!("repair link `{name}`"), kernel);
    let index = now.index;
    let steps = repair_node_link(&name, None, now);
    take_steps(netlink, index, &name, &steps)?.map_err(|it| refused(it.1))?;
    let alias = made.alias.as_ref().filter(|_| now.alias != made.alias);
    let mut requests: Vec<Request> = strange
        .iter()
        .map(|address| message::remove_address(index, *address))
        .collect();
    requests.extend(alias.map(|alias| message::set_alias_at(index, &alias.to_string())));
    let count = steps.len() + requests.len();
    for answer in netlink.transact(requests)? {
        match answer {
            // Gone meanwhile.
            Err(kernel) if kernel.errno == Errno::EADDRNOTAVAIL => {}
            answer => drop(answer.map_err(refused)?),
        }
    }
    if !strange.is_empty() {
        disable_ipv6(&name);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn announcement(kind: u16, index: u32) -> Vec<u8> {
        let mut bytes = vec![0; 34];
        bytes[..4].copy_from_slice(&34u32.to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[INDEX..INDEX + 4].copy_from_slice(&index.to_ne_bytes());
        bytes.resize(36, 0);
        bytes
    }

    #[test]
    fn all_links_of_a_datagram_are_read() {
        const RTM_NEWLINK: u16 = 16;
        let datagram = [announcement(RTM_NEWLINK, 7), announcement(RTM_NEWLINK, 9)].concat();
        let (mut links, mut addressed) = (BTreeSet::new(), BTreeSet::new());
        assert_eq!(read(&datagram, &mut links, &mut addressed), Some(()));
        assert_eq!(links, BTreeSet::from([7, 9]));
        assert_eq!(addressed, BTreeSet::new());
        let datagram = announcement(NEW_ADDRESS, 8);
        assert_eq!(read(&datagram, &mut links, &mut addressed), Some(()));
        assert_eq!(addressed, BTreeSet::from([8]));
        let lost = announcement(NLMSG_OVERRUN, 7);
        assert_eq!(read(&lost, &mut links, &mut addressed), None);
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read(&bytes, &mut BTreeSet::new(), &mut BTreeSet::new());
        }
    }
}
