//! What a pod may send to the other end of its connection: frames from its own Ethernet address and, where its connection says so, from its own addresses.

use nsm_ebpf_common::{
    Address, Reason,
    forward::{Forward, MacWords, is_same},
    mapped,
};

use crate::{
    Bytes,
    packet::{ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6},
};

const ETHERTYPE_ARP: u16 = 0x0806;

/// Offsets in a frame: the IPv4 source address, the IPv6 source address, the sender's address in ARP for IPv4 (RFC 826).
const IPV4_SOURCE: u32 = ETHERNET_HEADER + 12;
const IPV6_SOURCE: u32 = ETHERNET_HEADER + 8;
const ARP_SENDER: u32 = ETHERNET_HEADER + 14;

/// The Ethernet header of a frame: its words as they lie in memory.
pub type EthernetWords = [u16; 7];

/// The destination address of a frame.
#[inline(always)]
#[must_use]
pub const fn destination(header: EthernetWords) -> MacWords {
    [header[0], header[1], header[2]]
}

/// The source address of a frame.
#[inline(always)]
#[must_use]
pub const fn source(header: EthernetWords) -> MacWords {
    [header[3], header[4], header[5]]
}

/// Whether a pod may send this frame.
///
/// # Errors
///
/// The reason why it is dropped.
#[inline(always)]
pub fn check<B: Bytes + ?Sized>(
    frame: &B,
    header: EthernetWords,
    forward: &Forward,
) -> Result<(), Reason> {
    if !is_same(source(header), forward.mac) {
        return Err(Reason::PodWrongMac);
    }
    if forward.checked == 0 {
        return Ok(());
    }
    let may_send = match u16::from_be(header[6]) {
        ETHERTYPE_IPV4 => v4(frame, IPV4_SOURCE).is_some_and(|it| is_allowed(&it, forward)),
        // Who asks whether an address is free has none yet (RFC 5227).
        ETHERTYPE_ARP => {
            v4(frame, ARP_SENDER).is_some_and(|it| it == mapped([0; 4]) || is_allowed(&it, forward))
        }
        ETHERTYPE_IPV6 => frame
            .load(IPV6_SOURCE)
            .is_some_and(|it| is_of_link(&it) || is_allowed(&it, forward)),
        // A second VLAN tag, for one, would hide what is behind it.
        _ => false,
    };
    if may_send {
        Ok(())
    } else {
        Err(Reason::PodWrongSource)
    }
}

#[inline(always)]
fn v4<B: Bytes + ?Sized>(frame: &B, offset: u32) -> Option<Address> {
    frame.load(offset).map(mapped)
}

/// Neighbour discovery (RFC 4861) speaks from a link-local address, or from none before there is one.
#[inline(always)]
fn is_of_link(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80 || *address == [0; 16]
}

#[inline(always)]
fn is_allowed(address: &Address, forward: &Forward) -> bool {
    let [a, b, c, d] = &forward.sources;
    a.contains(address)
        || forward.checked > 1 && b.contains(address)
        || forward.checked > 2 && c.contains(address)
        || forward.checked > 3 && d.contains(address)
}
