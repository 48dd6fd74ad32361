//! What the BPF programs and user space agree on: map keys, map values, constants.
//!
//! Every type that crosses a map is `repr(C)` and free of padding: the kernel compares hash keys byte by byte, so a
//! padding byte that one side leaves uninitialised is a key that is never found. The sizes are asserted below at compile
//! time. Integers are in host order; addresses are the 16 bytes of an IPv6 address, IPv4 as `::ffff:a.b.c.d`, so that one
//! map serves both families.
//!
//! A change of any layout or of what a field means changes [`LAYOUT`]: an agent adopts pinned maps only when theirs is the
//! same, and starts with fresh maps otherwise.

#![no_std]

pub mod fast;
pub mod forward;
pub mod management;
pub mod sbfd;
mod shared;

pub use shared::Shared;

use forward::MacWords;
use management::MAX_SESSIONS;

/// Version of everything in this crate that is seen through a pinned map.
pub const LAYOUT: u32 = 11;

/// Pod links that one node can hold: the bar is 10,000 connections, the rest is head room. A connection between two pods of one node has
/// two.
pub const MAX_SLOTS: u32 = 16_384;

/// Entries of the TUNNELS map: each tunnel has its own entry and at most one marker of its VNI, each peer its own (see
/// [`TunnelKey`]).
pub const MAX_TUNNEL_ENTRIES: u32 = 2 * MAX_SLOTS + MAX_SESSIONS;

/// Entries of the FOREIGN map. The one that was not seen for longest gives way.
pub const MAX_FOREIGN: u32 = 1_024;

/// As the VNI of a [`TunnelKey`]: one more than the wire has. Its entry says that the address is that of a peer.
pub const PEER_MARKER: u32 = 1 << 24;

/// No slot.
pub const NO_SLOT: u32 = u32::MAX;

/// Look-ups in TUNNELS that each CPU remembers; a power of two. A hash look-up costs as much as all the rest, and the packets of a
/// moment are of few tunnels.
pub const RECENT_ENTRIES: u32 = 64;

/// Where a look-up is remembered. VNIs are drawn at random; even and odd ones are of different servers.
#[inline(always)]
#[must_use]
pub const fn recent_place(key: &TunnelKey) -> u32 {
    (key.vni >> 1 ^ key.peer[15] as u32) % RECENT_ENTRIES
}

/// UDP destination port of VXLAN (RFC 7348, section 8).
pub const VXLAN_PORT: u16 = 4789;

/// The `skb->mark` of packets of tunnels: those that our programs send through the node's external VXLAN device, and those that they have
/// let in on the underlay. Rules of the agent drop others' UDP to the tunnels' port and take the mark off what leaves: a packet's mark does not cross namespaces, so no pod can set it. Its bits are none of those that
/// kube-proxy, Calico, Cilium and Istio give a meaning.
pub const TUNNEL_MARK: u32 = 0x3057;

/// Words of the PORTS bitmap: one bit for each of the 65,536 UDP ports.
pub const PORT_WORDS: u32 = 65_536 / 64;

/// A 16 byte address: IPv6, or IPv4 mapped into it (RFC 4291, section 2.5.5.2).
pub type Address = [u8; 16];

/// No address. As the address of a [`TunnelKey`] it marks a VNI as ours.
pub const UNSPECIFIED: Address = [0; 16];

/// The mapped form of an IPv4 address.
#[inline(always)]
#[must_use]
pub const fn mapped(v4: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3],
    ]
}

/// Where the bit of `port` is in the PORTS bitmap: word, and mask within the word.
#[inline(always)]
#[must_use]
pub const fn port_bit(port: u16) -> (u32, u64) {
    (port as u32 / 64, 1 << (port % 64))
}

/// Key of TUNNELS.
///
/// Three kinds of entry share the map. `(vni, peer)` is a tunnel, found with one look-up by every packet of it.
/// `(vni, UNSPECIFIED)` only says that the VNI is ours; it is looked up when the first look-up finds nothing, and tells a
/// wrong source from a foreign VNI. `(PEER_MARKER, peer)` says that a foreign VNI came from somebody we have tunnels with:
/// one of us must be wrong about the VNI.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The peer's public address: destination of what we send, source of what it sends.
    pub peer: Address,
}

/// Value of TUNNELS, and in [`forward::Forward::pod`]: the pod at which frames end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Index into LINKS, and of a tunnel into COUNTERS. Of a marker: the slot of the tunnel that made it.
    pub slot: u32,
    /// The interface index of the node's end of the pod link; 0: the tunnel has no pod link.
    pub link: u32,
    /// Bits of [`forward::tunnel_flags`].
    pub flags: u32,
    /// The Ethernet address of the pod's end.
    pub mac: MacWords,
    /// That of the peer's pod, the only source of its frames; all zero: it is not known.
    pub peer_mac: MacWords,
    /// Our IPv4 address on the underlay, as it lies in a packet. 0: every packet takes the slow path.
    pub local: u32,
    /// The pod's own IPv4 address, likewise; 0: it has none. Only what is for the pod itself takes the fast path in.
    pub own_v4: u32,
    /// The pod's own IPv6 address, likewise; unspecified: it has none.
    pub own_v6: Address,
}

impl Tunnel {
    /// A tunnel that is counted and leads to no pod.
    #[must_use]
    pub const fn counted(slot: u32) -> Self {
        Self {
            slot,
            link: 0,
            flags: 0,
            mac: [0; 3],
            peer_mac: [0; 3],
            local: 0,
            own_v4: 0,
            own_v6: UNSPECIFIED,
        }
    }
}

/// Value of COUNTERS, one for each slot and CPU. "In" is from the peer to us. Packets and bytes are those of the wire: the
/// outer frame from its Ethernet header on; a packet that the kernel segments later (GSO) or has merged (GRO) counts as
/// the packets it stands for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets from the peer.
    pub in_packets: u64,
    /// Bytes from the peer.
    pub in_bytes: u64,
    /// Packets to the peer.
    pub out_packets: u64,
    /// Bytes to the peer.
    pub out_bytes: u64,
    /// When the last packet came in: CLOCK_MONOTONIC at the resolution of a timer tick, nanoseconds; 0 = never.
    pub last_in_ns: u64,
    /// When the last packet went out, likewise.
    pub last_out_ns: u64,
}

/// Value of FOREIGN: packets of a VNI that is not ours, from the address of a peer. A CNI that
/// runs over the same port between the same nodes sends many.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// Packets so far; two CPUs at once may count one.
    pub packets: u64,
    /// When the last one came, CLOCK_MONOTONIC at the resolution of a timer tick, nanoseconds.
    pub last_ns: u64,
}

/// Value of RECENT, one of [`RECENT_ENTRIES`] for each CPU: what a look-up in TUNNELS has found.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    /// GENERATION before the look-up: while it is the same, the answer holds.
    pub generation: u64,
    /// What was looked up. All zero is never looked up.
    pub key: TunnelKey,
    /// What was found; its slot is [`NO_SLOT`] when that was nothing.
    pub tunnel: Tunnel,
    /// Always 0.
    pub reserved: u32,
}

/// Value of CLOCK, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// The timer tick (`bpf_jiffies64`) at which the time below was read.
    pub tick: u64,
    /// CLOCK_MONOTONIC at the resolution of a timer tick, nanoseconds.
    pub now_ns: u64,
}

/// Whether a packet goes on to the kernel (and to other programs on the same hook) or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Handed on, untouched.
    Passed,
    /// Dropped.
    Dropped,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $fate:ident;)+) => {
        /// Why a packet was not counted to a tunnel, and what became of it: the index into DROPS.
        ///
        /// Numbers are part of the layout: append, never reorder.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $variant = $number,)+
        }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name that people and metrics read.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What became of the packet.
            #[must_use]
            pub const fn fate(self) -> Fate {
                match self { $(Self::$variant => Fate::$fate,)+ }
            }
        }
    };
}

reasons! {
    /// A VXLAN packet came in whose VNI is not ours: a CNI may share the port.
    ForeignVniIn = 0, "foreign_vni_in", Passed;
    /// A VXLAN packet went out whose VNI is not ours.
    ForeignVniOut = 1, "foreign_vni_out", Passed;
    /// A packet of our VNI came in from an address that is not the peer's.
    WrongSource = 2, "wrong_source", Dropped;
    /// A packet of our VNI went out to an address that is not the peer's.
    WrongDestination = 3, "wrong_destination", Passed;
    /// To a tunnel port, but no VXLAN header follows, or it lacks the I flag: the kernel's VXLAN receiver refuses it.
    Malformed = 4, "malformed", Passed;
    /// A later fragment of a UDP datagram: it has no UDP header and cannot be told apart.
    Fragment = 5, "fragment", Passed;
    /// A first fragment that ends before the VXLAN header: after reassembly it would have passed the source check unseen.
    TinyFragment = 6, "tiny_fragment", Dropped;
    /// IPv6 with more extension headers than we follow: it too could carry our VNI past the source check.
    ExtensionHeaders = 7, "extension_headers", Dropped;
    /// On the management link: no S-BFD packet, or one that RFC 5880, 7880 or 7881 has discarded.
    SbfdMalformed = 8, "sbfd_malformed", Dropped;
    /// A probe to a reflector that is not ours, or an answer that does not belong to our session with its sender.
    SbfdUnknownDiscriminator = 9, "sbfd_unknown_discriminator", Dropped;
    /// From an Ethernet address that is no peer's.
    SbfdUnknownPeer = 10, "sbfd_unknown_peer", Dropped;
    /// A probe beyond what one peer may send.
    SbfdRateLimited = 11, "sbfd_rate_limited", Dropped;
    /// An answer from another address than the one that was probed.
    SbfdWrongSource = 12, "sbfd_wrong_source", Dropped;
    /// An answer to a probe that was never sent, was answered already, or is long forgotten.
    SbfdStale = 13, "sbfd_stale", Dropped;
    /// A probe whose number had not advanced: replayed, overtaken, or of an initiator that numbers none. It is answered and proves nothing.
    SbfdReplayed = 14, "sbfd_replayed", Passed;
    /// From a pod link of no connection.
    PodUnknownLink = 15, "pod_unknown_link", Dropped;
    /// From a pod, with another Ethernet source address than that of its link.
    PodWrongMac = 16, "pod_wrong_mac", Dropped;
    /// From a pod, with a source address that its connection does not allow.
    PodWrongSource = 17, "pod_wrong_source", Dropped;
    /// From a pod or the prober, and there is no device for its tunnel, or the kernel refused the tunnel's addresses.
    NotEncapsulated = 18, "not_encapsulated", Dropped;
    /// From a tunnel of no connection: another VNI, or another source than the peer, whatever way it came.
    TunnelUnknown = 19, "tunnel_unknown", Dropped;
    /// From a tunnel, to another Ethernet address than that of the pod.
    TunnelWrongMac = 20, "tunnel_wrong_mac", Dropped;
    /// A probe or answer to an Ethernet address of no path.
    ProbeUnknownPath = 21, "probe_unknown_path", Dropped;
    /// From a pod to the pod at the other end of its connection, on this node, with another Ethernet destination address than that pod's.
    PodWrongDestination = 22, "pod_wrong_destination", Dropped;
    /// From a tunnel, from another Ethernet address than that of the peer's pod.
    TunnelWrongSourceMac = 23, "tunnel_wrong_source_mac", Dropped;
    /// From a tunnel, an IPv6 router advertisement (RFC 4861): routes come from the connection, never from the peer's pod.
    TunnelRouterAdvertisement = 24, "tunnel_router_advertisement", Dropped;
}

/// Entries of DROPS.
pub const REASONS: u32 = Reason::ALL.len() as u32;

impl Reason {
    /// The reason with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }
}

// A struct is free of padding exactly when it is as large as its fields together.
const _: () = {
    assert!(size_of::<TunnelKey>() == 4 + 16);
    assert!(size_of::<Tunnel>() == 3 * 4 + 2 * 6 + 2 * 4 + 16);
    assert!(size_of::<Counters>() == 6 * 8);
    assert!(size_of::<Foreign>() == 2 * 8);
    assert!(size_of::<Clock>() == 2 * 8);
    assert!(size_of::<Recent>() == 8 + 20 + 48 + 4);
    assert!(RECENT_ENTRIES.is_power_of_two());
    let mut i = 0;
    while i < Reason::ALL.len() {
        assert!(
            Reason::ALL[i] as usize == i,
            "reasons are numbered without gaps"
        );
        i += 1;
    }
};

#[cfg(feature = "user")]
mod user {
    use super::{Counters, Foreign, Tunnel, TunnelKey};

    // SAFETY: repr(C), Copy, 'static, no padding (asserted above), every bit pattern of their integers is valid.
    unsafe impl aya::Pod for TunnelKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tunnel {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Counters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Foreign {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_round_trip_and_have_distinct_names() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_number(*reason as u32), Some(*reason));
            assert_eq!(
                Reason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count(),
                1
            );
        }
        assert_eq!(Reason::from_number(REASONS), None);
    }

    #[test]
    fn every_port_has_a_bit_of_its_own() {
        let (first, last) = (port_bit(0), port_bit(u16::MAX));
        assert_eq!(first, (0, 1));
        assert_eq!(last, (PORT_WORDS - 1, 1 << 63));
        assert_eq!(port_bit(VXLAN_PORT), (74, 1 << 53));
    }

    #[test]
    fn mapped_addresses_read_as_rust_reads_them() {
        let v4 = core::net::Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(mapped(v4.octets()), v4.to_ipv6_mapped().octets());
    }
}
