//! Changes of the node's links by others: noticed by the kernel's notifications, and undone.
//!
//! A look at all links twice a second would cost a node with 10,000 connections some percents of a processor. The kernel announces each
//! change of a link and of what hangs on it, so a look reads those links alone; all of them only at first, and where announcements
//! were lost because too much happened.

use std::{
    collections::{BTreeSet, HashMap},
    io,
};

use netlink_packet_core::NLMSG_OVERRUN;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};
use nsm_core::{
    link::{NodeLink, repair_node_link},
    net::IfName,
};

use super::{LinkError, basics::take_steps, message, observe};
use crate::netlink::{Netlink, NetlinkError};

/// RTNLGRP_LINK and RTNLGRP_TC of linux/rtnetlink.h: links, and the filters on them.
const GROUPS: [u32; 2] = [1, 4];

/// The receive buffer, bytes: room for the announcements of some 2,000 new links between two looks.
const BUFFER: usize = 8 << 20;

/// Room for one datagram of announcements; the kernel makes none larger.
const DATAGRAM: usize = 32 * 1024;

/// `struct nlmsghdr`: 16 bytes, with length and type in front.
const HEADER: usize = 16;

/// Where `struct ifinfomsg` and `struct tcmsg` have the link's index.
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
        let changed = self.announcements.changed()?;
        let mended = mend(&mut self.netlink, made, &changed)
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

    /// What changed since the last call; the first time, everything may have.
    fn changed(&mut self) -> Result<Changed, NetlinkError> {
        let mut links = BTreeSet::new();
        let mut is_unknown = std::mem::take(&mut self.is_unknown);
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => is_unknown |= read(&self.buffer, &mut links).is_none(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => is_unknown = true,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(if is_unknown {
            Changed::Unknown
        } else {
            Changed::Links(links)
        })
    }
}

/// The indexes of the links that a datagram is about. None: it cannot be read, or announcements were lost before it.
fn read(datagram: &[u8], links: &mut BTreeSet<u32>) -> Option<()> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let length = u32_at(rest, 0)? as usize;
        let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
        if kind == NLMSG_OVERRUN || length < HEADER {
            return None;
        }
        let message = rest.get(..length)?;
        links.insert(u32_at(message, INDEX)?);
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
) -> Result<Vec<(u32, Mended)>, LinkError> {
    let meant: Vec<&NodeLink> = made
        .values()
        .filter(|link| changed.includes(link.index))
        .collect();
    if meant.is_empty() {
        return Ok(Vec::new());
    }
    let found = found(netlink, &meant, changed)?;
    let mut mended = Vec::new();
    for link in meant {
        let outcome = match found.get(&link.index) {
            Some(now) if now.alias == link.alias => match repair(netlink, link, now) {
                Ok(0) => continue,
                Ok(steps) => Mended::Repaired(steps),
                Err(error) => Mended::Refused(error),
            },
            _ => Mended::Gone,
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

/// Makes a link what it was. How many steps that took. The MTU is left alone: the agent itself changes it in between, and the next refresh
/// of the connection sets it.
fn repair(netlink: &mut Netlink, made: &NodeLink, now: &NodeLink) -> Result<usize, LinkError> {
    let name = IfName::try_from(made.name.as_str())
        .map_err(|error| NetlinkError::Malformed(error.to_string()))?;
    let steps = repair_node_link(&name, None, now);
    take_steps(netlink, now.index, &name, &steps)?
        .map_err(|refused| LinkError::refused(format!("repair link `{name}`"), refused.1))?;
    Ok(steps.len())
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
        let mut links = BTreeSet::new();
        assert_eq!(read(&datagram, &mut links), Some(()));
        assert_eq!(links, BTreeSet::from([7, 9]));
        assert_eq!(read(&announcement(NLMSG_OVERRUN, 7), &mut links), None);
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read(&bytes, &mut BTreeSet::new());
        }
    }
}
