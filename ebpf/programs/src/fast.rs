//! What may take the fast path, and the headers that it writes.
//!
//! Only what is simple does: whole IPv4 and IPv6 packets without options or extension headers, from and to one station. Everything else is
//! left to the kernel's VXLAN device.

use nsm_ebpf_common::{
    Tunnel,
    fast::{Hop, OVERHEAD, Settings},
    forward::is_same,
};

use crate::{
    Bytes,
    decide::Size,
    packet::{
        self, ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_ICMPV6, PROTOCOL_TCP,
        PROTOCOL_UDP, PlainV4Words, UDP_HEADER,
    },
    pod::{self, EthernetWords},
};

/// ECN codepoints (RFC 3168, section 5).
const ECN_MASK: u8 = 3;
const ECT_0: u8 = 2;
const CONGESTION_EXPERIENCED: u8 = 3;

/// Version 4, and a header of five words.
const IPV4_PLAIN: u8 = 0x45;

/// Flags of the IPv4 header: don't fragment; and all that makes a packet a fragment.
const DONT_FRAGMENT: u16 = 0x4000;
const FRAGMENT: u16 = 0x3fff;

/// The VXLAN header's first word with flag I and nothing else.
const VXLAN_FLAGS: u16 = 0x0800;

/// The first words of a frame: Ethernet and IPv4 headers, or the first part of that of IPv6.
pub type HeadWords = [u16; 17];

/// The words of a frame's Ethernet and IPv6 headers.
pub type HeadV6Words = [u16; 27];

/// The words that are written in front of a packet: outer Ethernet, IPv4, UDP and VXLAN headers, and the frame's own Ethernet header.
pub type OuterWords = [u16; (OVERHEAD + ETHERNET_HEADER) as usize / 2];

/// The ECN bits of a frame that may leave by the fast path: to one station, a whole IPv4 packet without options, or IPv6 without extension
/// headers.
#[inline(always)]
#[must_use]
pub const fn leaving(frame: &HeadWords) -> Option<u8> {
    let [first, _] = frame[0].to_ne_bytes();
    let [version, class] = frame[7].to_ne_bytes();
    if first & 1 != 0 {
        return None;
    }
    match u16::from_be(frame[6]) {
        ETHERTYPE_IPV4 if version == IPV4_PLAIN && frame[10] & FRAGMENT.to_be() == 0 => {
            Some(class & ECN_MASK)
        }
        ETHERTYPE_IPV6 if version >> 4 == 6 => {
            let [next, _] = frame[10].to_ne_bytes();
            match next {
                PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_ICMPV6 => Some(class >> 4 & ECN_MASK),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Bytes of the outer IPv4 packet that each of the packets of a frame becomes, where `payload` is the offset of the inner frame; none
/// where that cannot be said.
#[inline(always)]
pub fn size_outside<B: Bytes + ?Sized>(frame: &B, size: Size, payload: u32) -> Option<u32> {
    const OUTSIDE: u32 = OVERHEAD - ETHERNET_HEADER;
    if size.gso_size == 0 {
        return Some(size.len - payload + OUTSIDE);
    }
    match packet::inner_headers(frame, payload) {
        0 => None,
        headers => Some(headers + size.gso_size + OUTSIDE),
    }
}

/// The UDP source port of a flow: the kernel's VXLAN device maps the same hash to the same port, so that a flow keeps its way through
/// networks that spread flows.
#[inline(always)]
#[must_use]
pub const fn source_port(hash: u32, settings: &Settings) -> u16 {
    let hash = hash ^ hash << 16;
    let offset = (hash as u64 * settings.ports as u64) >> 32;
    (settings.first_port + offset as u32) as u16
}

/// What the headers in front of a packet depend on beside its next hop.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// VNI of the tunnel.
    pub vni: u32,
    /// Bytes of the inner frame; of one that is segmented later, of all of it.
    pub length: u32,
    /// ECN bits of the inner packet.
    pub ecn: u8,
    /// UDP source port.
    pub source_port: u16,
    /// The inner Ethernet header.
    pub ethernet: EthernetWords,
}

/// The headers in front of a packet. Those of the kernel's VXLAN device, but for two: the UDP checksum is 0, which every receiver must accept
/// (RFC 7348, section 4.1), and so is the identification, which says nothing where fragments are forbidden (RFC 6864).
#[inline(always)]
#[must_use]
pub fn outer(hop: &Hop, packet: &Packet) -> OuterWords {
    let udp_length = packet.length + OVERHEAD - ETHERNET_HEADER - 20;
    // Of what is segmented later the kernel writes the lengths anew; 64 KiB is the most that comes here.
    let total = (udp_length + 20) as u16;
    // As the kernel does it (RFC 3168, section 9.1.1, full functionality): congestion before the tunnel is left to the inner header.
    let ecn = match packet.ecn {
        CONGESTION_EXPERIENCED => ECT_0,
        ecn => ecn,
    };
    let [l0, l1] = halves(hop.local);
    let [r0, r1] = halves(hop.remote);
    let [d0, d1, d2, s0, s1, s2] = hop.ethernet;
    let mut ip = [
        u16::from_ne_bytes([IPV4_PLAIN, hop.dscp | ecn]),
        total.to_be(),
        0,
        DONT_FRAGMENT.to_be(),
        u16::from_ne_bytes([hop.ttl, PROTOCOL_UDP]),
        0,
        l0,
        l1,
        r0,
        r1,
    ];
    ip[5] = !sum(&ip);
    let [a, b, c, d, e, f, g, h, i, j] = ip;
    let [_, vni0, vni1, vni2] = packet.vni.to_be_bytes();
    let [i0, i1, i2, i3, i4, i5, i6] = packet.ethernet;
    [
        d0,
        d1,
        d2,
        s0,
        s1,
        s2,
        ETHERTYPE_IPV4.to_be(),
        a,
        b,
        c,
        d,
        e,
        f,
        g,
        h,
        i,
        j,
        packet.source_port.to_be(),
        (hop.port as u16).to_be(),
        (udp_length as u16).to_be(),
        0,
        VXLAN_FLAGS.to_be(),
        0,
        u16::from_ne_bytes([vni0, vni1]),
        u16::from_ne_bytes([vni2, 0]),
        i0,
        i1,
        i2,
        i3,
        i4,
        i5,
        i6,
    ]
}

/// The next hop of a plain frame that the kernel sends, for packets of at most its own size.
#[inline(always)]
#[must_use]
pub const fn hop(frame: &PlainV4Words, interface: u32, size: u32, now_ns: u64) -> Hop {
    let [d0, d1, d2, s0, s1, s2, _, class, _, _, _, ttl, ..] = *frame;
    let ([_, class], [ttl, _]) = (class.to_ne_bytes(), ttl.to_ne_bytes());
    Hop {
        learned_ns: now_ns,
        local: source(frame),
        remote: destination(frame),
        port: u16::from_be(frame[18]) as u32,
        interface,
        largest: size,
        ethernet: [d0, d1, d2, s0, s1, s2],
        ttl,
        dscp: class & !ECN_MASK,
        reserved: [0; 3],
    }
}

/// The source of the outer IPv4 header, as it lies in the packet.
#[inline(always)]
#[must_use]
pub const fn source(frame: &PlainV4Words) -> u32 {
    joined(frame[13], frame[14])
}

/// The VNI.
#[inline(always)]
#[must_use]
pub const fn vni(frame: &PlainV4Words) -> u32 {
    let ([high, middle], [low, _]) = (frame[23].to_ne_bytes(), frame[24].to_ne_bytes());
    u32::from_be_bytes([0, high, middle, low])
}

/// The destination, likewise.
#[inline(always)]
#[must_use]
pub const fn destination(frame: &PlainV4Words) -> u32 {
    joined(frame[15], frame[16])
}

/// Whether the outer headers of a VXLAN packet are what the kernel would take, and ask for nothing that only the kernel does: a sound IPv4
/// header, lengths that agree with the frame's, no congestion to be noted inside (RFC 6040), no flag of VXLAN that we do not have.
#[inline(always)]
#[must_use]
pub fn is_simple(frame: &PlainV4Words, length: u32) -> bool {
    let words = frame;
    let [_, class] = words[7].to_ne_bytes();
    let [_, vni_reserved] = words[24].to_ne_bytes();
    let total = u32::from(u16::from_be(words[8]));
    let udp_length = u32::from(u16::from_be(words[19]));
    let [.., a, b, c, d, e, f, g, h, i, j, _, _, _, _, _, _, _, _] = *words;
    class & ECN_MASK != CONGESTION_EXPERIENCED
        && total + ETHERNET_HEADER == length
        && udp_length + 20 == total
        && words[21] == VXLAN_FLAGS.to_be()
        && words[22] == 0
        && vni_reserved == 0
        && sum(&[a, b, c, d, e, f, g, h, i, j]) == u16::MAX
}

/// Whether a VXLAN packet says a UDP checksum, which the kernel would check.
#[inline(always)]
#[must_use]
pub const fn has_checksum(frame: &PlainV4Words) -> bool {
    frame[20] != 0
}

/// Whether an inner frame is from the peer's pod to our pod, which is known to take it.
#[inline(always)]
#[must_use]
pub const fn is_between_pods(ethernet: EthernetWords, tunnel: &Tunnel) -> bool {
    let [first, _] = ethernet[3].to_ne_bytes();
    let is_known = is_same(tunnel.peer_mac, [0; 3]) && first & 1 == 0
        || is_same(pod::source(ethernet), tunnel.peer_mac);
    is_known && is_same(pod::destination(ethernet), tunnel.mac)
}

/// Whether an inner frame is a whole IPv4 packet without options, for the pod itself.
///
/// What the pod passes on is left to the kernel: BPF cannot take the marks of the tunnel off a packet that is segmented later, and those would
/// mean something where the packet leaves the pod again.
#[inline(always)]
#[must_use]
pub const fn is_v4_for_pod(frame: &HeadWords, tunnel: &Tunnel) -> bool {
    let [version, _] = frame[7].to_ne_bytes();
    u16::from_be(frame[6]) == ETHERTYPE_IPV4
        && version == IPV4_PLAIN
        && frame[10] & FRAGMENT.to_be() == 0
        && tunnel.own_v4 != 0
        && joined(frame[15], frame[16]) == tunnel.own_v4
}

/// Whether a whole packet without options or extension headers is TCP.
#[inline(always)]
#[must_use]
pub const fn is_tcp(frame: &HeadWords) -> bool {
    let ([next, _], [_, protocol]) = (frame[10].to_ne_bytes(), frame[11].to_ne_bytes());
    let is_v6 = u16::from_be(frame[6]) == ETHERTYPE_IPV6;
    is_v6 && next == PROTOCOL_TCP || !is_v6 && protocol == PROTOCOL_TCP
}

/// Whether an inner frame says that it is IPv6.
#[inline(always)]
#[must_use]
pub const fn is_v6(ethernet: EthernetWords) -> bool {
    u16::from_be(ethernet[6]) == ETHERTYPE_IPV6
}

/// Whether an inner frame is TCP or UDP over IPv6 without extension headers, for the pod itself; see [`is_v4_for_pod`].
#[inline(always)]
#[must_use]
pub const fn is_v6_for_pod(frame: &HeadV6Words, tunnel: &Tunnel) -> bool {
    let [version, _] = frame[7].to_ne_bytes();
    let [next, _] = frame[10].to_ne_bytes();
    let own = &tunnel.own_v6;
    let mut difference = 0;
    let mut at = 0;
    while at < 8 {
        difference |= frame[19 + at] ^ u16::from_ne_bytes([own[2 * at], own[2 * at + 1]]);
        at += 1;
    }
    // A pod without an address has the unspecified one here, to which nothing is sent.
    let to_nobody = frame[19] | frame[20] | frame[21] | frame[22] | frame[23] | frame[24] == 0
        && frame[25] | frame[26] == 0;
    version >> 4 == 6
        && matches!(next, PROTOCOL_TCP | PROTOCOL_UDP)
        && difference == 0
        && !to_nobody
}

/// The Internet checksum's sum of a header (RFC 1071).
#[inline(always)]
fn sum(words: &[u16; 10]) -> u16 {
    let [a, b, c, d, e, f, g, h, i, j] = words.map(u32::from);
    let sum = a + b + c + d + e + f + g + h + i + j;
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[inline(always)]
const fn joined(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
const fn halves(address: u32) -> [u16; 2] {
    let [a, b, c, d] = address.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

// The words above are those of a UDP header that follows IPv4's.
const _: () = assert!(OVERHEAD == ETHERNET_HEADER + 20 + UDP_HEADER + 8);
