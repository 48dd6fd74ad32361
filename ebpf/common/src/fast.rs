//! The fast path: what the programs remember of the slow path's decisions, so that most packets need not ask the kernel again.
//!
//! A packet on the slow path passes the external VXLAN device and the node's whole IP stack: routes, policy routing, neighbours, path MTU,
//! IPsec, the host's firewall. A program at the underlay sees what came of it. For [`LIFETIME_NS`] other packets of the same kind are
//! given the same treatment by BPF alone; then the next one takes the slow path again.
//!
//! - Out: `underlay_egress` learns the next hop ([`Hop`]) from a packet that our program has just handed to the kernel ([`Asked`]).
//! - In: `external_ingress` notes that the kernel has accepted a packet of a peer ([`accepted`]).
//!
//! So nothing takes the fast path that the kernel would not have sent or accepted at most that long ago, with forwarding on or off, whatever the
//! routes are; and a path whose probes, which always take the slow path, are lost does not carry data either.

/// How long a decision of the slow path is used again, nanoseconds: a change of routes, neighbours or rules shows after that time at the
/// latest. Two packets a second, each CPU and peer, cost nothing that can be measured.
pub const LIFETIME_NS: u64 = 500_000_000;

/// Next hops that each CPU remembers, a power of two. Two peers may have the same place: then both take the slow path more often.
pub const HOPS: u32 = 256;

/// Peers whose packets the kernel has accepted; likewise.
pub const ACCEPTED: u32 = 4096;

/// The `skb->mark` of a packet that BPF has encapsulated, until `underlay_egress` takes it off: nothing is learned from such a packet.
/// As [`crate::TUNNEL_MARK`] it has none of the bits that others give a meaning.
pub const FAST_MARK: u32 = 0x3056;

/// Beside [`crate::TUNNEL_MARK`]: the packet came by IPsec. That the kernel accepts it says nothing of one that does not.
pub const SECURED: u32 = 0x8;

/// Bytes in front of the inner frame: Ethernet, IPv4, UDP, VXLAN.
pub const OVERHEAD: u32 = 14 + 20 + 8 + 8;

/// Bits of [`Settings::flags`].
pub mod settings_flags {
    /// Every packet takes the slow path.
    pub const SLOW_ONLY: u32 = 1;
}

/// Value of SETTINGS.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Bits of [`settings_flags`].
    pub flags: u32,
    /// The lowest UDP source port of tunnels, as the kernel's VXLAN device has it.
    pub first_port: u32,
    /// How many ports follow from it.
    pub ports: u32,
}

/// Value of HOPS, for each CPU: how the kernel has sent a packet to a peer. An interface of 0: nothing is known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// When the kernel did that: CLOCK_MONOTONIC at the resolution of a timer tick, nanoseconds.
    pub learned_ns: u64,
    /// Our IPv4 address, as it lies in a packet.
    pub local: u32,
    /// The peer's, likewise.
    pub remote: u32,
    /// The UDP destination port.
    pub port: u32,
    /// Index of the interface.
    pub interface: u32,
    /// The largest IPv4 packet that was seen to leave, bytes: what is larger asks the kernel, which knows the path's MTU.
    pub largest: u32,
    /// Ethernet destination and source, words as they lie in a packet.
    pub ethernet: [u16; 6],
    /// TTL.
    pub ttl: u8,
    /// Traffic class without its ECN bits.
    pub dscp: u8,
    /// Always 0.
    pub reserved: [u16; 3],
}

impl Hop {
    /// Whether it is of a packet to this peer, and young enough.
    #[inline(always)]
    #[must_use]
    pub const fn holds(&self, local: u32, remote: u32, port: u32, now_ns: u64) -> bool {
        (self.local ^ local) | (self.remote ^ remote) | (self.port ^ port) == 0
            && self.interface != 0
            && now_ns.wrapping_sub(self.learned_ns) < LIFETIME_NS
    }
}

/// The place of a peer in HOPS.
#[inline(always)]
#[must_use]
pub const fn hop_place(remote: u32) -> u32 {
    spread(remote) >> (32 - HOPS.ilog2())
}

/// The place of a peer in ACCEPTED.
#[inline(always)]
#[must_use]
pub const fn accepted_place(peer: u32) -> u32 {
    spread(peer) >> (32 - ACCEPTED.ilog2())
}

/// Multiplicative hashing: 2^32 by the golden ratio. The upper bits depend on all of the address, most on its last byte.
#[inline(always)]
const fn spread(address: u32) -> u32 {
    u32::from_be(address).wrapping_mul(0x9e37_79b9)
}

/// A packet that a program has just handed to the external device, for each CPU: what the kernel sends of it is what the next hop is learned
/// from, and nothing that others put on the card.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// When: CLOCK_MONOTONIC at the resolution of a timer tick, nanoseconds.
    pub at_ns: u64,
    /// The peer's IPv4 address, as it lies in a packet; 0: nothing is asked.
    pub remote: u32,
    /// The VNI.
    pub vni: u32,
    /// Bytes of the inner frame.
    pub length: u32,
    /// Always 0.
    pub reserved: u32,
}

impl Asked {
    /// How long the kernel may take, nanoseconds: it sends on the same CPU, before anything else runs there, and a timer tick may fall between.
    const TIME_NS: u64 = 20_000_000;

    /// Whether this packet is the answer; `length` is that of the outer frame.
    #[inline(always)]
    #[must_use]
    pub const fn is_answered(&self, remote: u32, vni: u32, length: u32, now_ns: u64) -> bool {
        self.remote != 0
            && (self.remote ^ remote) | (self.vni ^ vni) == 0
            && length == self.length + OVERHEAD
            && now_ns.wrapping_sub(self.at_ns) < Self::TIME_NS
    }
}

/// Value of ACCEPTED: that the kernel has accepted a packet of this IPv4 peer at this time. One number, so that no reader sees a half of it.
#[inline(always)]
#[must_use]
pub const fn accepted(peer: u32, now_ns: u64) -> u64 {
    (peer as u64) << 32 | units(now_ns) as u64
}

/// Whether a value of ACCEPTED is of this peer, and young enough.
#[inline(always)]
#[must_use]
pub const fn is_accepted(value: u64, peer: u32, now_ns: u64) -> bool {
    // Another CPU's clock may be some ticks ahead.
    const AHEAD: u32 = 32;
    let age = units(now_ns).wrapping_sub(value as u32);
    (value >> 32) as u32 == peer && age.wrapping_add(AHEAD) < units(LIFETIME_NS) + AHEAD
}

/// Time in units of 2^20 ns, about a millisecond. They begin again after 52 days.
#[inline(always)]
const fn units(ns: u64) -> u32 {
    (ns >> 20) as u32
}

/// Which way a frame of a connection has taken: the index into TAKEN. A frame that stands for several packets counts once.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// From a pod, encapsulated by BPF.
    FastOut = 0,
    /// From a pod, handed to the external device.
    SlowOut = 1,
    /// To a pod, decapsulated by BPF.
    FastIn = 2,
    /// To a pod, from the external device.
    SlowIn = 3,
}

impl Taken {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::FastOut, Self::SlowOut, Self::FastIn, Self::SlowIn];
}

// A struct is free of padding exactly when it is as large as its fields together.
const _: () = {
    assert!(size_of::<Settings>() == 3 * 4);
    assert!(size_of::<Hop>() == 8 + 5 * 4 + 6 * 2 + 2 + 3 * 2);
    assert!(size_of::<Asked>() == 8 + 4 * 4);
    assert!(HOPS.is_power_of_two() && ACCEPTED.is_power_of_two());
};

#[cfg(feature = "user")]
mod user {
    use super::{Hop, Settings};

    // SAFETY: repr(C), Copy, 'static, no padding (asserted above), every bit pattern of their integers is valid.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Hop {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_holds_for_its_peer_and_its_time() {
        let hop = Hop {
            learned_ns: 1_000,
            local: 1,
            remote: 2,
            port: 4789,
            interface: 3,
            ..Hop::default()
        };
        let last = 999 + LIFETIME_NS;
        assert!(hop.holds(1, 2, 4789, 1_000) && hop.holds(1, 2, 4789, last));
        assert!(!hop.holds(1, 2, 4789, last + 1));
        assert!(!hop.holds(1, 3, 4789, last) && !hop.holds(2, 2, 4789, last));
        assert!(!hop.holds(1, 2, 4790, last));
        assert!(!Hop::default().holds(0, 0, 0, 1), "nothing was learned");
    }

    #[test]
    fn the_peers_of_one_network_have_places_of_their_own() {
        let mut hops = [false; HOPS as usize];
        let mut accepted = [false; ACCEPTED as usize];
        for last in 0..=255 {
            let peer = u32::from_ne_bytes([10, 0, 0, last]);
            hops[hop_place(peer) as usize] = true;
            accepted[accepted_place(peer) as usize] = true;
        }
        let count = |places: &[bool]| places.iter().filter(|it| **it).count();
        assert!(count(&hops) > 200, "{}", count(&hops));
        assert!(count(&accepted) > 250, "{}", count(&accepted));
    }

    #[test]
    fn only_the_packet_that_was_asked_for_teaches() {
        let asked = Asked {
            at_ns: 5,
            remote: 2,
            vni: 3,
            length: 100,
            reserved: 0,
        };
        assert!(asked.is_answered(2, 3, 150, 6));
        assert!(!asked.is_answered(1, 3, 150, 6) && !asked.is_answered(2, 4, 150, 6));
        assert!(
            !asked.is_answered(2, 3, 151, 6) && !asked.is_answered(2, 3, 150, 5 + Asked::TIME_NS)
        );
        assert!(!Asked::default().is_answered(0, 0, 50, 1));
    }

    #[test]
    fn an_acceptance_holds_for_its_peer_and_its_time() {
        let unit = 1 << 20;
        // Near the end of the units, too.
        for at in [7 * unit, (u64::from(u32::MAX) - 2) * unit] {
            let value = accepted(9, at);
            assert!(is_accepted(value, 9, at) && is_accepted(value, 9, at + LIFETIME_NS - unit));
            assert!(
                is_accepted(value, 9, at - unit),
                "by a clock that is behind"
            );
            assert!(!is_accepted(value, 9, at + LIFETIME_NS + unit));
            assert!(!is_accepted(value, 8, at));
        }
        assert!(!is_accepted(0, 9, 3 * LIFETIME_NS), "an empty place");
    }
}
