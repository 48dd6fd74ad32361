//! The fast path on the host: the headers that it writes against a plain reading of them, and what it leaves to the kernel.

use nsm_ebpf_common::{
    Tunnel,
    fast::{Hop, OVERHEAD, Settings},
    forward::mac_words,
    mapped,
};
use nsm_ebpf_programs::{
    decide::Size,
    fast::{self, Packet},
    packet::{self, PlainV4Words},
};
use proptest::prelude::*;

const US: [u8; 4] = [192, 0, 2, 1];
const PEER: [u8; 4] = [198, 51, 100, 7];
const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GATEWAY: [u8; 6] = [6, 0, 0, 0, 0, 9];
const CARD: [u8; 6] = [6, 0, 0, 0, 0, 8];
const OWN: [u8; 4] = [172, 16, 1, 2];
const VNI: u32 = 0x12_3456;

fn words<const N: usize>(bytes: &[u8]) -> [u16; N] {
    std::array::from_fn(|at| u16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]))
}

fn bytes(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn hop() -> Hop {
    let [d0, d1, d2] = mac_words(GATEWAY);
    let [s0, s1, s2] = mac_words(CARD);
    Hop {
        learned_ns: 1,
        local: u32::from_ne_bytes(US),
        remote: u32::from_ne_bytes(PEER),
        port: 4789,
        interface: 2,
        largest: 1500,
        ethernet: [d0, d1, d2, s0, s1, s2],
        ttl: 64,
        dscp: 0,
        reserved: [0; 3],
    }
}

/// A frame between the pods: IPv4, with this traffic class.
fn inner(from: [u8; 6], to: [u8; 6], class: u8) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x08, 0x00]].concat();
    frame.extend([0x45, class, 0, 48, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend([172, 16, 1, 1]);
    frame.extend(OWN);
    frame.resize(14 + 48, 7);
    frame
}

/// Likewise IPv6, with this next header.
fn inner_v6(next: u8, class: u8) -> Vec<u8> {
    let mut frame = [&POD[..], &OTHER, &[0x86, 0xdd]].concat();
    frame.extend([0x60 | class >> 4, class << 4, 0, 0, 0, 8, next, 64]);
    frame.extend([0xfd; 32]);
    frame.resize(14 + 48, 7);
    frame
}

fn encapsulate(hop: &Hop, frame: &[u8], ecn: u8, source_port: u16, vni: u32) -> Vec<u8> {
    let packet = Packet {
        vni,
        length: frame.len() as u32,
        ecn,
        source_port,
        ethernet: words(frame),
    };
    [&bytes(&fast::outer(hop, &packet)), &frame[14..]].concat()
}

/// RFC 1071, byte by byte: 0 for a header with its right checksum.
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in header.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(pair[1]);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn be(bytes: &[u8]) -> usize {
    usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn tunnel() -> Tunnel {
    Tunnel {
        link: 9,
        mac: mac_words(POD),
        peer_mac: mac_words(OTHER),
        local: u32::from_ne_bytes(US),
        own_v4: u32::from_ne_bytes(OWN),
        own_v6: [0xfd; 16],
        ..Tunnel::counted(3)
    }
}

#[test]
fn congestion_and_class_outside_are_those_of_the_kernels_device() {
    let hop = Hop {
        dscp: 0xb8,
        ..hop()
    };
    for (inside, outside) in [(0, 0xb8), (1, 0xb9), (2, 0xba), (3, 0xba)] {
        let frame = encapsulate(&hop, &inner(OTHER, POD, inside), inside, 40_000, VNI);
        assert_eq!(frame[15], outside);
        assert_eq!(frame[65], inside, "inside it stays");
    }
}

#[test]
fn only_simple_frames_leave() {
    let leaving = |frame: &[u8]| fast::leaving(&words(frame));
    assert_eq!(leaving(&inner(POD, OTHER, 0xba)), Some(2));
    for next in [6, 17, 58] {
        assert_eq!(leaving(&inner_v6(next, 0xbb)), Some(3));
    }
    let changed = |frame: Vec<u8>, at: usize, value: u8| {
        let mut frame = frame;
        frame[at] = value;
        leaving(&frame)
    };
    let v4 = || inner(POD, OTHER, 0);
    for (at, value) in [
        // To a group; options; not IPv4; a fragment, the first and a later one; ARP; a VLAN tag.
        (0, 0x01),
        (14, 0x46),
        (14, 0x55),
        (20, 0x20),
        (21, 1),
        (13, 0x06),
        (12, 0x81),
    ] {
        assert_eq!(changed(v4(), at, value), None, "{at} {value}");
    }
    for next in [0, 43, 44, 51, 59, 60, 135] {
        assert_eq!(leaving(&inner_v6(next, 0)), None);
    }
    assert_eq!(changed(inner_v6(17, 0), 14, 0x40), None);
}

#[test]
fn only_what_is_for_the_pod_itself_takes_the_fast_path_in() {
    let tunnel = tunnel();
    let v4 = |frame: &[u8], tunnel: &Tunnel| {
        fast::is_between_pods(words(frame), tunnel) && fast::is_v4_for_pod(&words(frame), tunnel)
    };
    let good = inner(OTHER, POD, 0);
    assert!(v4(&good, &tunnel));
    // Ethernet destination and source, type, version, header length, fragments, destination.
    for at in [0, 5, 6, 11, 12, 13, 14, 20, 21, 30, 33] {
        let mut frame = good.clone();
        frame[at] ^= 0x21;
        assert!(!v4(&frame, &tunnel), "{at}");
    }
    let unknown = Tunnel {
        peer_mac: [0; 3],
        ..tunnel
    };
    assert!(v4(&inner([2; 6], POD, 0), &unknown));
    assert!(
        !v4(&inner([3; 6], POD, 0), &unknown),
        "a group sends nothing"
    );
    let without = Tunnel {
        own_v4: 0,
        ..tunnel
    };
    let mut nobody = good;
    nobody[30..34].fill(0);
    assert!(!v4(&nobody, &without));

    let v6 = |frame: &[u8], tunnel: &Tunnel| fast::is_v6_for_pod(&words(frame), tunnel);
    assert!(v6(&inner_v6(6, 0), &tunnel) && v6(&inner_v6(17, 3), &tunnel));
    for next in [0, 43, 44, 58, 60] {
        assert!(!v6(&inner_v6(next, 0), &tunnel));
    }
    for at in [14, 38, 45, 53] {
        let mut frame = inner_v6(6, 0);
        frame[at] ^= 0x41;
        assert!(!v6(&frame, &tunnel), "{at}");
    }
    let without = Tunnel {
        own_v6: [0; 16],
        ..tunnel
    };
    let mut nobody = inner_v6(6, 0);
    nobody[38..54].fill(0);
    assert!(!v6(&nobody, &without));
}

#[test]
fn a_source_port_is_the_kernels() {
    let settings = Settings {
        flags: 0,
        first_port: 32_768,
        ports: 60_999 - 32_768,
    };
    // udp_flow_src_port of include/net/udp.h, in other words: the hash's low half decides.
    for hash in [0, 1, 0xffff, 0x1234_5678, u32::MAX] {
        let mixed = u64::from(hash ^ hash.wrapping_shl(16));
        let expected = 32_768 + (mixed * 28_231) / (1 << 32);
        assert_eq!(u64::from(fast::source_port(hash, &settings)), expected);
    }
}

#[test]
fn sizes_are_those_of_the_packets_that_leave() {
    let frame = inner(POD, OTHER, 0);
    let size = |gso_size| Size {
        len: 62,
        gso_segs: 0,
        gso_size,
    };
    let outside = |frame: &[u8], gso| fast::size_outside(frame, size(gso), 0);
    assert_eq!(outside(&frame, 0), Some(62 + 36));
    assert_eq!(outside(&frame, 1000), Some(14 + 20 + 8 + 1000 + 36));
    let mut other = frame.clone();
    other[23] = 1;
    assert_eq!(outside(&other, 1000), None, "nobody segments that");
    let whole = encapsulate(&hop(), &frame, 0, 40_000, VNI);
    let seen = Size {
        len: whole.len() as u32,
        ..Size::default()
    };
    assert_eq!(
        fast::size_outside(whole.as_slice(), seen, OVERHEAD),
        Some(62 + 36)
    );
}

#[test]
fn router_advertisements_are_seen_behind_headers() {
    let mut frame = inner_v6(58, 0);
    frame[54] = 134;
    assert!(packet::is_router_advertisement(frame.as_slice()));
    frame[54] = 136;
    assert!(!packet::is_router_advertisement(frame.as_slice()));
    let mut hidden = inner_v6(0, 0);
    hidden.resize(14 + 40 + 16, 0);
    hidden[54..62].copy_from_slice(&[58, 0, 1, 4, 0, 0, 0, 0]);
    hidden[62] = 134;
    assert!(packet::is_router_advertisement(hidden.as_slice()));
    assert!(!packet::is_router_advertisement(&hidden[..62]));
    // Behind more headers than are followed.
    let mut deep = inner_v6(60, 0);
    deep.truncate(54);
    deep.extend([60, 0, 1, 4, 0, 0, 0, 0].repeat(9));
    deep.extend([58, 0, 1, 4, 0, 0, 0, 0, 134, 0]);
    assert!(packet::is_router_advertisement(deep.as_slice()));
    assert!(!packet::is_router_advertisement(
        inner(OTHER, POD, 0).as_slice()
    ));
}

proptest! {
    #[test]
    fn what_is_written_is_read_the_same(
        vni in 0_u32..1 << 24,
        length in 62_usize..9000,
        ecn in 0_u8..4,
        source_port in any::<u16>(),
        addresses in any::<[[u8; 4]; 2]>(),
        port in 1_u16..,
        ttl in any::<u8>(),
        dscp in any::<u8>(),
    ) {
        let [local, remote] = addresses;
        let hop = Hop {
            local: u32::from_ne_bytes(local),
            remote: u32::from_ne_bytes(remote),
            port: port.into(),
            ttl,
            dscp: dscp & !3,
            ..hop()
        };
        let mut frame = inner(POD, OTHER, ecn);
        frame.resize(length, 1);
        let whole = encapsulate(&hop, &frame, ecn, source_port, vni);
        prop_assert_eq!(whole.len(), frame.len() + 50);
        prop_assert_eq!(&whole[50..], &frame[..]);
        prop_assert_eq!(&whole[..14], &[&GATEWAY[..], &CARD, &[0x08, 0x00]].concat()[..]);
        prop_assert_eq!(checksum(&whole[14..34]), 0);
        prop_assert_eq!(be(&whole[16..]), whole.len() - 14);
        prop_assert_eq!(be(&whole[38..]), whole.len() - 34);
        prop_assert_eq!((be(&whole[34..]), be(&whole[40..])), (source_port.into(), 0));
        prop_assert_eq!((whole[22], whole[20]), (ttl, 0x40));
        let parsed = packet::parse(whole.as_slice(), |it| it == port).expect("VXLAN");
        prop_assert_eq!(parsed.vni, vni);
        prop_assert_eq!((parsed.source, parsed.destination), (mapped(local), mapped(remote)));

        // The other side takes it, and would learn the same next hop.
        let outer: PlainV4Words = words(&whole);
        prop_assert!(fast::is_simple(&outer, whole.len() as u32));
        prop_assert!(!fast::has_checksum(&outer));
        prop_assert_eq!(fast::vni(&outer), vni);
        let learned = fast::hop(&outer, hop.interface, hop.largest, hop.learned_ns);
        prop_assert_eq!(learned, hop);
    }

    #[test]
    fn what_the_kernel_would_look_at_twice_is_not_simple(
        at in 14_usize..50,
        flip in 1_u8..,
        longer in 1_u32..20,
    ) {
        let good = encapsulate(&hop(), &inner(OTHER, POD, 0), 0, 40_000, VNI);
        let length = good.len() as u32;
        prop_assert!(!fast::is_simple(&words(&good), length + longer));
        prop_assert!(!fast::is_simple(&words(&good), length - longer));
        let mut frame = good;
        frame[at] ^= flip;
        // Ports, checksum and VNI are judged elsewhere.
        let is_free = (34..38).contains(&at) || (40..42).contains(&at) || (46..49).contains(&at);
        prop_assert_eq!(fast::is_simple(&words(&frame), length), is_free);
    }

    #[test]
    fn no_frame_panics(frame in proptest::collection::vec(any::<u8>(), 54..120), gso_size in any::<u16>()) {
        let tunnel = tunnel();
        let size = Size { len: frame.len() as u32, gso_segs: 0, gso_size: gso_size.into() };
        let _ = fast::leaving(&words(&frame));
        let _ = fast::size_outside(frame.as_slice(), size, 0);
        let _ = fast::is_simple(&words(&frame), size.len);
        let _ = fast::is_between_pods(words(&frame), &tunnel);
        let _ = fast::is_v4_for_pod(&words(&frame), &tunnel);
        let _ = fast::is_v6_for_pod(&words(&frame), &tunnel);
        let _ = packet::is_router_advertisement(frame.as_slice());
    }
}
