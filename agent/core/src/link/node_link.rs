//! Links of ours in the node's namespace: what they are called, how they must be, and the steps that repair them.
//!
//! A pod link is a veth pair. Its end in the pod is a link as a connection wants it ([`LinkSpec`](super::LinkSpec)). Its other end is in
//! the node's namespace, where no tenant reaches it, and carries nothing but BPF programs: it has no address, no ARP and no IPv6
//! address generation, and is in the link group whose frames the node's IP stack never gets. The device that ends the tunnels is kept
//! in the same way.
//!
//! An end's name and its alias follow from the connection alone, so one look-up finds it, whatever the number of links.

use std::{fmt::Write as _, ops::RangeInclusive};

use sha2::{Digest as _, Sha256};

use super::LinkAlias;
use crate::net::{IfName, MacAddr};

/// The group of the links of ours in the node's namespace, "nsl" in ASCII and a zero: `ip link show group 1853058048`. Frames that come
/// in by a link of one of the [`NODE_GROUPS`] never enter the node's IP stack: a table of nftables drops them.
pub const NODE_GROUP: u32 = u32::from_be_bytes([b'n', b's', b'l', 0]);

/// The bits that are equal in all groups of [`NODE_GROUPS`].
pub const NODE_GROUP_MASK: u32 = 0xffff_ff00;

/// [`NODE_GROUP`], and behind it the groups for links that are about to be deleted together.
pub const NODE_GROUPS: RangeInclusive<u32> = NODE_GROUP..=NODE_GROUP | !NODE_GROUP_MASK;

/// What the name of every node's end starts with.
const NAME_PREFIX: &str = "nsm";

/// Bytes of the hash in a name, written as hexadecimal digits: a name has 15 bytes at most. With 48 bits, two of 100,000 connections
/// have one name with a probability of 2 in 100,000; the second is then refused, as any name that is taken.
const HASH_BYTES: usize = 6;

/// The name of the node's end of a connection's pod link.
///
/// ```
/// # use nsm_core::link::{LinkAlias, node_end_name};
/// let alias = LinkAlias::new("cluster-1.example", "5b7f-4c").unwrap();
/// assert_eq!(node_end_name(&alias).as_str().len(), 15);
/// ```
#[must_use]
pub fn node_end_name(alias: &LinkAlias) -> IfName {
    let hash = Sha256::digest(alias.to_string());
    let mut name = String::from(NAME_PREFIX);
    for byte in &hash[..HASH_BYTES] {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    IfName::try_from(name.as_str()).expect("three letters and twelve hexadecimal digits are a name")
}

/// A link in the node's namespace as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLink {
    /// Its index in the node's namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whose it is; None: not ours.
    pub alias: Option<LinkAlias>,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Its group.
    pub group: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether the kernel resolves neighbours over it.
    pub arp: bool,
    /// Whether the kernel gives it IPv6 addresses by itself.
    pub generates_addresses: bool,
    /// The bridge or bond that it belongs to.
    pub controller: Option<u32>,
    /// Its other end; None: it is no veth.
    pub peer: Option<VethPeer>,
}

/// The other end of a veth pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VethPeer {
    /// Its index in its own namespace.
    pub index: u32,
    /// That namespace, by the number that it has in the namespace of the first end; None: the same.
    pub netns: Option<i32>,
}

/// One step of a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeLinkStep {
    /// Take the link down, which a change of its name needs on kernels before 6.2.
    SetDown,
    /// Give it its name.
    SetName,
    /// Take it out of a bridge or bond, which would get its frames before the IP stack does.
    LeaveController,
    /// Put it into [`NODE_GROUP`].
    SetGroup,
    /// Set the MTU, bytes.
    SetMtu(u32),
    /// No ARP.
    DisableArp,
    /// No IPv6 address by itself.
    DisableAddresses,
    /// Take it up.
    SetUp,
}

/// The steps that make a link of ours on the node as it must be, in the order in which the kernel takes them; empty when it is so.
///
/// `mtu`: None leaves it as it is.
#[must_use]
pub fn repair_node_link(name: &IfName, mtu: Option<u32>, link: &NodeLink) -> Vec<NodeLinkStep> {
    let renamed = link.name != name.as_str();
    let mtu = mtu.filter(|mtu| *mtu != link.mtu);
    // What keeps frames off the node's IP stack comes first.
    [
        (link.group != NODE_GROUP).then_some(NodeLinkStep::SetGroup),
        link.controller.map(|_| NodeLinkStep::LeaveController),
        link.arp.then_some(NodeLinkStep::DisableArp),
        link.generates_addresses
            .then_some(NodeLinkStep::DisableAddresses),
        mtu.map(NodeLinkStep::SetMtu),
        (renamed && link.up).then_some(NodeLinkStep::SetDown),
        renamed.then_some(NodeLinkStep::SetName),
        (renamed || !link.up).then_some(NodeLinkStep::SetUp),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn alias() -> LinkAlias {
        LinkAlias::new("d", "c").unwrap()
    }

    fn as_wanted() -> NodeLink {
        NodeLink {
            index: 3,
            name: node_end_name(&alias()).to_string(),
            alias: Some(alias()),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            group: NODE_GROUP,
            up: true,
            arp: false,
            generates_addresses: false,
            controller: None,
            peer: Some(VethPeer {
                index: 2,
                netns: Some(0),
            }),
        }
    }

    fn apply(end: &mut NodeLink, step: NodeLinkStep) {
        match step {
            NodeLinkStep::SetDown => end.up = false,
            NodeLinkStep::SetName => {
                assert!(!end.up, "a link that is up keeps its name");
                end.name = node_end_name(&alias()).to_string();
            }
            NodeLinkStep::LeaveController => end.controller = None,
            NodeLinkStep::SetGroup => end.group = NODE_GROUP,
            NodeLinkStep::SetMtu(mtu) => end.mtu = mtu,
            NodeLinkStep::DisableArp => end.arp = false,
            NodeLinkStep::DisableAddresses => end.generates_addresses = false,
            NodeLinkStep::SetUp => end.up = true,
        }
    }

    #[test]
    fn names_follow_from_the_whole_alias() {
        let name = |domain, id| node_end_name(&LinkAlias::new(domain, id).unwrap());
        assert_eq!(name("d", "c"), name("d", "c"));
        assert_ne!(name("d", "c"), name("e", "c"));
        assert_ne!(name("d", "c"), name("d", "d"));
    }

    proptest! {
        #[test]
        fn one_repair_is_enough(
            renamed: bool,
            group in prop_oneof![Just(NODE_GROUP), Just(0)],
            up: bool,
            arp: bool,
            generates_addresses: bool,
            controller in proptest::option::of(1u32..9),
            mtu in 1449u32..1452,
        ) {
            let mut end = NodeLink { group, up, arp, generates_addresses, controller, mtu, ..as_wanted() };
            if renamed {
                end.name = "other".to_owned();
            }
            for step in repair_node_link(&node_end_name(&alias()), Some(1450), &end) {
                apply(&mut end, step);
            }
            prop_assert_eq!(&end, &as_wanted());
            prop_assert_eq!(repair_node_link(&node_end_name(&alias()), Some(1450), &end), vec![]);
        }
    }
}
