//! Forwarding between pod links and the tunnels, or between two pod links: what the programs at both ends of the way read.
//!
//! A pod link is a veth pair. What comes from the pod is looked up by the interface of the node's end ([`Forward`]). It leaves through an
//! external VXLAN device ([`Device`]), or ends at the link of another pod of this node. What comes out of that device is looked up by VNI and outer source ([`crate::Tunnel`]). Probes have
//! no pod link: they are looked up by their destination Ethernet address ([`ProbePath`]).

use crate::{Address, Reason, Tunnel};

/// External VXLAN devices of one node: one for each UDP port of tunnels.
pub const MAX_DEVICES: u32 = 16;

/// Source prefixes of one pod link that are checked. A connection with more is checked by its Ethernet address only.
pub const MAX_SOURCES: usize = 4;

/// Bits of [`crate::Tunnel::flags`].
pub mod tunnel_flags {
    /// The entry is of the probe VNI: its frames go to the reflector and the sessions.
    pub const PROBES: u32 = 1;
    /// The pod's end of the link is in the node's own network namespace, which `bpf_redirect_peer` does not reach.
    pub const SAME_NAMESPACE: u32 = 2;
}

/// An Ethernet address as its three words lie in memory, by which the programs compare it.
pub type MacWords = [u16; 3];

/// The words of an Ethernet address.
#[inline(always)]
#[must_use]
pub const fn mac_words(mac: [u8; 6]) -> MacWords {
    let [a, b, c, d, e, f] = mac;
    [
        u16::from_ne_bytes([a, b]),
        u16::from_ne_bytes([c, d]),
        u16::from_ne_bytes([e, f]),
    ]
}

/// The reverse of [`mac_words`].
#[inline(always)]
#[must_use]
pub const fn mac_bytes(words: MacWords) -> [u8; 6] {
    let ([a, b], [c, d], [e, f]) = (
        words[0].to_ne_bytes(),
        words[1].to_ne_bytes(),
        words[2].to_ne_bytes(),
    );
    [a, b, c, d, e, f]
}

/// Addresses that a pod may send from: those whose bits under `mask` are `address`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// The network, its host bits zero.
    pub address: Address,
    /// The bits that count.
    pub mask: Address,
}

impl Prefix {
    /// The prefix of an address with this many leading bits; of IPv4, 96 and those of its own length.
    #[must_use]
    pub fn new(address: Address, bits: u32) -> Self {
        let mask = match bits {
            0 => 0,
            bits => u128::MAX << 128_u32.saturating_sub(bits),
        };
        Self {
            address: (u128::from_be_bytes(address) & mask).to_be_bytes(),
            mask: mask.to_be_bytes(),
        }
    }

    /// Whether an address is in it.
    #[inline(always)]
    #[must_use]
    pub fn contains(&self, address: &Address) -> bool {
        let ([a, b], [c, d], [e, f]) = (halves(address), halves(&self.mask), halves(&self.address));
        (a & c) ^ e | (b & d) ^ f == 0
    }
}

/// An address as two numbers, in the order of memory.
#[inline(always)]
const fn halves(address: &Address) -> [u64; 2] {
    crate::management::words(address)
}

/// Value of FORWARD, by the index of the node's end of a pod link: where what the pod sends goes, and what it may send.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The key again: the kernel gives the memory of an entry to another one while a program still reads it, and this tells.
    pub link: u32,
    /// Index into DEVICES. This and the tunnel's VNI and addresses count only where `pod` has no link.
    pub device: u32,
    /// VNI of the tunnel.
    pub vni: u32,
    /// Index into LINKS, and of a tunnel into COUNTERS.
    pub slot: u32,
    /// How many of `sources` count; 0: any source address is allowed.
    pub checked: u32,
    /// Our address on the underlay.
    pub local: Address,
    /// The peer's.
    pub remote: Address,
    /// The Ethernet address of the pod's end: the only source of its frames.
    pub mac: MacWords,
    /// Always 0: hash values are compared by nobody, but nothing of this process's memory goes into the kernel.
    pub reserved: u16,
    /// Addresses that the pod may send from.
    pub sources: [Prefix; MAX_SOURCES],
    /// The pod at the other end where that is on this node too; its link is 0 where frames go through a tunnel.
    pub pod: Tunnel,
}

/// Value of DEVICES: an external VXLAN device. An index of 0: there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its interface index.
    pub index: u32,
    /// The UDP port that it sends to and receives on.
    pub port: u32,
}

/// Value of PROBE_PATHS, by the destination of a probe or answer ([`crate::sbfd::frame::session_key`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePath {
    /// The key again, as in [`Forward::link`]: its upper and its lower half.
    pub key: [u32; 2],
    /// Index into DEVICES.
    pub device: u32,
    /// The peer's probe VNI.
    pub vni: u32,
    /// The UDP port of the peer's tunnels.
    pub port: u32,
    /// Our address on the underlay; unspecified: the one of the route.
    pub local: Address,
    /// The peer's.
    pub remote: Address,
}

/// The halves of a key of PROBE_PATHS.
#[inline(always)]
#[must_use]
pub const fn key_halves(key: u64) -> [u32; 2] {
    [(key >> 32) as u32, key as u32]
}

const BROADCAST_OR_MULTICAST: u8 = 1;

/// Whether a frame from the tunnel is for the pod: to its Ethernet address or to a group.
///
/// # Errors
///
/// [`Reason::TunnelWrongMac`] for a frame to another station.
#[inline(always)]
pub fn check_destination(destination: MacWords, pod: MacWords) -> Result<(), Reason> {
    let [first, _] = destination[0].to_ne_bytes();
    if is_same(destination, pod) || first & BROADCAST_OR_MULTICAST != 0 {
        Ok(())
    } else {
        Err(Reason::TunnelWrongMac)
    }
}

/// Whether a frame from the tunnel is the peer's own, where its Ethernet address is known (all zero: it is not).
///
/// # Errors
///
/// [`Reason::TunnelWrongSourceMac`] for a frame of another station.
#[inline(always)]
pub fn check_source(source: MacWords, peer: MacWords) -> Result<(), Reason> {
    if is_same(source, peer) || is_same(peer, [0; 3]) {
        Ok(())
    } else {
        Err(Reason::TunnelWrongSourceMac)
    }
}

/// Whether two Ethernet addresses are the same.
#[inline(always)]
#[must_use]
pub const fn is_same(one: MacWords, other: MacWords) -> bool {
    (one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) == 0
}

// A struct is free of padding exactly when it is as large as its fields together.
const _: () = {
    assert!(size_of::<Prefix>() == 2 * 16);
    assert!(
        size_of::<Forward>()
            == 5 * 4 + 2 * 16 + 6 + 2 + MAX_SOURCES * size_of::<Prefix>() + size_of::<Tunnel>()
    );
    assert!(size_of::<Device>() == 2 * 4);
    assert!(size_of::<ProbePath>() == 5 * 4 + 2 * 16);
};

#[cfg(feature = "user")]
mod user {
    use super::{Device, Forward, ProbePath};

    // SAFETY: repr(C), Copy, 'static, no padding (asserted above), every bit pattern of their integers is valid.
    unsafe impl aya::Pod for Forward {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Device {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbePath {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapped;

    #[test]
    fn prefixes_hold_their_addresses_of_either_family() {
        let net = Prefix::new(mapped([172, 16, 1, 9]), 96 + 24);
        assert!(net.contains(&mapped([172, 16, 1, 2])));
        assert!(!net.contains(&mapped([172, 16, 2, 2])));
        let host = Prefix::new(mapped([172, 16, 1, 2]), 128);
        assert!(host.contains(&mapped([172, 16, 1, 2])));
        assert!(!host.contains(&mapped([172, 16, 1, 3])));
        let any = Prefix::new(mapped([0; 4]), 96);
        assert!(any.contains(&mapped([8, 8, 8, 8])));
        assert!(
            !any.contains(&[0xfd; 16]),
            "IPv6 is not in a prefix of IPv4"
        );
        assert!(Prefix::new([0xfd; 16], 0).contains(&mapped([1, 2, 3, 4])));
    }

    #[test]
    fn a_pod_gets_frames_to_itself_and_to_groups() {
        let pod = mac_words([2, 0, 0, 0, 0, 1]);
        assert_eq!(mac_bytes(pod), [2, 0, 0, 0, 0, 1]);
        assert_eq!(check_destination(pod, pod), Ok(()));
        assert_eq!(check_destination(mac_words([0xff; 6]), pod), Ok(()));
        assert_eq!(
            check_destination(mac_words([0x33, 0x33, 0, 0, 0, 1]), pod),
            Ok(())
        );
        let other = mac_words([2, 0, 0, 0, 0, 2]);
        assert_eq!(check_destination(other, pod), Err(Reason::TunnelWrongMac));
        assert_eq!(check_source(pod, pod), Ok(()));
        assert_eq!(check_source(other, pod), Err(Reason::TunnelWrongSourceMac));
        assert_eq!(check_source(other, [0; 3]), Ok(()), "it is not known");
    }
}
