//! The parser and the decisions on the host: random bytes, mutated packets, every length.

use std::{cell::RefCell, collections::HashMap};

use nsm_ebpf_common::{Reason, Tunnel, TunnelKey, UNSPECIFIED, mapped};
use nsm_ebpf_programs::{
    Bytes,
    decide::{Direction, Miss, Node, Size, Traffic, decide},
    packet::{self, Header, NotVxlan, PlainV4, PlainV6, Step},
};
use proptest::prelude::*;

const PEER: [u8; 4] = [198, 51, 100, 7];
const US: [u8; 4] = [192, 0, 2, 1];
const VNI: u32 = 0x12_3456;

/// A node as the maps would describe it.
#[derive(Default)]
struct Maps {
    tunnels: HashMap<TunnelKey, Tunnel>,
    foreign: RefCell<Vec<(Direction, TunnelKey)>>,
}

impl Maps {
    /// Knows [`VNI`] to [`PEER`].
    fn new() -> Self {
        let tunnel = Tunnel::counted(3);
        let key = |peer| TunnelKey { vni: VNI, peer };
        Self {
            tunnels: HashMap::from([(key(mapped(PEER)), tunnel), (key(UNSPECIFIED), tunnel)]),
            ..Self::default()
        }
    }
}

impl Node for Maps {
    fn is_tunnel_port(&self, port: u16) -> bool {
        port == 4789
    }

    fn tunnel(&self, key: &TunnelKey) -> Option<&Tunnel> {
        self.tunnels.get(key)
    }

    fn foreign(&self, direction: Direction, packet: &TunnelKey) {
        self.foreign.borrow_mut().push((direction, *packet));
    }
}

/// VXLAN over IPv4, with `inner` in it.
fn ipv4(source: [u8; 4], destination: [u8; 4], vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([source, destination].concat());
    frame.extend(udp_vxlan(vni, inner));
    frame
}

/// VXLAN over IPv6 behind extension headers, each given as its kind and the bytes after its next-header byte.
fn ipv6(extensions: &[(u8, Vec<u8>)], vni: u32) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0]);
    frame.push(extensions.first().map_or(17, |(kind, _)| *kind));
    frame.push(64);
    frame.extend([[0x20; 16], [0x30; 16]].concat());
    for (at, (_, body)) in extensions.iter().enumerate() {
        frame.push(extensions.get(at + 1).map_or(17, |(kind, _)| *kind));
        frame.extend(body);
    }
    frame.extend(udp_vxlan(vni, &[]));
    frame
}

fn udp_vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    let length = (16 + inner.len()) as u16;
    let mut bytes = vec![0x30, 0x39, 0x12, 0xb5];
    bytes.extend(length.to_be_bytes());
    bytes.extend([0, 0, 0x08, 0, 0, 0]);
    bytes.extend((vni << 8).to_be_bytes());
    bytes.extend(inner);
    bytes
}

fn parse(frame: &[u8]) -> Result<packet::Vxlan, NotVxlan> {
    packet::parse(frame, |port| port == 4789)
}

fn size(frame: &[u8]) -> Size {
    Size {
        len: frame.len() as u32,
        ..Size::default()
    }
}

#[test]
fn a_tunnel_packet_is_counted_by_its_peer_in_each_direction() {
    let maps = Maps::new();
    for (direction, source, destination) in [(Direction::In, PEER, US), (Direction::Out, US, PEER)]
    {
        let frame = ipv4(source, destination, VNI, &[0; 60]);
        let expected = Traffic {
            slot: 3,
            packets: 1,
            bytes: frame.len() as u64,
        };
        assert_eq!(
            decide(direction, frame.as_slice(), size(&frame), &maps),
            Ok(expected)
        );
    }
    assert!(maps.foreign.borrow().is_empty());
}

#[test]
fn a_wrong_peer_is_no_foreign_vni() {
    let maps = Maps::new();
    let stranger = [203, 0, 113, 9];
    let frame = ipv4(stranger, US, VNI, &[]);
    let miss = decide(Direction::In, frame.as_slice(), size(&frame), &maps).unwrap_err();
    assert_eq!(miss.reason(Direction::In), Some(Reason::WrongSource));
    assert!(maps.foreign.borrow().is_empty());

    let frame = ipv4(stranger, US, VNI + 1, &[]);
    let miss = decide(Direction::In, frame.as_slice(), size(&frame), &maps).unwrap_err();
    assert_eq!(miss.reason(Direction::In), Some(Reason::ForeignVniIn));
    let key = TunnelKey {
        vni: VNI + 1,
        peer: mapped(stranger),
    };
    assert_eq!(maps.foreign.take(), [(Direction::In, key)]);
}

#[test]
fn a_packet_from_the_unspecified_address_is_not_taken_for_the_marker() {
    let maps = Maps::new();
    let mut frame = ipv6(&[], VNI);
    frame[14 + 8..14 + 24].fill(0);
    let decided = decide(Direction::In, frame.as_slice(), size(&frame), &maps);
    assert_eq!(decided, Err(Miss::WrongPeer));
}

#[test]
fn the_reserved_byte_is_no_part_of_the_vni() {
    let mut frame = ipv4(PEER, US, VNI, &[]);
    let last = frame.len() - 1;
    frame[last] = 0xff;
    assert_eq!(parse(&frame).map(|vxlan| vxlan.vni), Ok(VNI));
}

#[test]
fn a_frame_cut_anywhere_is_no_tunnel_packet() {
    for whole in [ipv4(PEER, US, VNI, &[]), ipv6(&[(0, vec![0; 7])], VNI)] {
        assert!(parse(&whole).is_ok());
        for length in 0..whole.len() {
            let expected = if length < whole.len() - 10 {
                NotVxlan::Other
            } else {
                NotVxlan::Malformed
            };
            assert_eq!(parse(&whole[..length]), Err(expected), "{length} bytes");
        }
    }
}

#[test]
fn a_first_fragment_cut_before_the_vxlan_header_is_tiny() {
    let mut whole = ipv4(PEER, US, VNI, &[]);
    whole[20] = 0x20;
    assert!(parse(&whole).is_ok());
    for length in 34..whole.len() {
        assert_eq!(parse(&whole[..length]), Err(NotVxlan::TinyFragment));
    }
    whole[21] = 1;
    assert_eq!(parse(&whole), Err(NotVxlan::Fragment));

    let first = (44, vec![0, 0, 1, 0, 0, 0, 9]);
    let whole = ipv6(&[first.clone(), (60, vec![0; 7])], VNI);
    assert!(parse(&whole).is_ok());
    // From the end of the fragment header on, the fragment itself says that more follow.
    for length in 14 + 40 + 8..whole.len() {
        assert_eq!(parse(&whole[..length]), Err(NotVxlan::TinyFragment));
    }
    let later = ipv6(&[(44, vec![0, 0, 8, 0, 0, 0, 9])], VNI);
    assert_eq!(parse(&later), Err(NotVxlan::Fragment));
}

#[test]
fn a_first_fragment_with_a_broken_vxlan_header_needs_no_second_one() {
    // Whole as it is, the kernel refuses it after reassembly: the later fragments cannot change what came first.
    let mut frame = ipv4(PEER, US, VNI, &[]);
    frame[20] = 0x20;
    frame[14 + 28] = 0;
    assert_eq!(parse(&frame), Err(NotVxlan::Malformed));
}

#[test]
fn eight_extension_headers_are_followed_and_nine_are_not() {
    let option = (60, vec![0; 7]);
    assert!(parse(&ipv6(&vec![option.clone(); 8], VNI)).is_ok());
    assert_eq!(
        parse(&ipv6(&vec![option; 9], VNI)),
        Err(NotVxlan::ExtensionHeaders)
    );
    let no_next_header = ipv6(&[(59, vec![0; 7])], VNI);
    assert_eq!(parse(&no_next_header), Err(NotVxlan::Other));
    let esp = ipv6(&[(50, vec![0; 7])], VNI);
    assert_eq!(parse(&esp), Err(NotVxlan::Other));
}

#[test]
fn the_headers_inside_are_measured() {
    let mut tcp = vec![0; 12];
    tcp.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 0]);
    tcp.resize(14 + 40 + 12, 0);
    tcp.extend([0xa0, 0]);
    let measured = packet::inner_headers(tcp.as_slice(), 0);
    assert_eq!(measured, 14 + 40 + 40);
    tcp[14 + 6] = 17;
    assert_eq!(packet::inner_headers(tcp.as_slice(), 0), 14 + 40 + 8);
    tcp[14 + 6] = 1;
    assert_eq!(packet::inner_headers(tcp.as_slice(), 0), 0);
}

/// What the kernel's side does first with every frame; `None` where it goes on with [`parse`].
fn parse_plain(frame: &[u8]) -> Option<Result<packet::Vxlan, NotVxlan>> {
    fn words<const WORDS: usize>(frame: &[u8]) -> Option<[u16; WORDS]> {
        let bytes = frame.get(..2 * WORDS)?;
        Some(std::array::from_fn(|at| {
            u16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]])
        }))
    }
    let is_port = |port| port == 4789;
    if let Some(plain) = words(frame).map(PlainV4).filter(PlainV4::is_plain) {
        return Some(plain.vxlan(is_port));
    }
    let plain = words(frame).map(PlainV6).filter(PlainV6::is_plain)?;
    Some(plain.vxlan(is_port))
}

#[test]
fn common_frames_are_plain_and_others_are_not() {
    let (v4, v6) = (ipv4(PEER, US, VNI, &[]), ipv6(&[], VNI));
    for frame in [&v4, &v6] {
        assert_eq!(parse_plain(frame), Some(parse(frame)));
        assert!(parse(frame).is_ok());
    }
    let mut fragment = v4.clone();
    fragment[20] = 0x20;
    let mut options = v4.clone();
    options[14] = 0x46;
    let extension = ipv6(&[(60, vec![0; 7])], VNI);
    let cut = &v4[..v4.len() - 1];
    for frame in [&fragment, &options, &extension, cut] {
        assert_eq!(parse_plain(frame), None);
    }
}

fn header() -> impl Strategy<Value = Header> {
    (any::<u8>(), any::<u32>(), any::<bool>()).prop_map(|(kind, offset, more_fragments)| Header {
        kind,
        offset,
        more_fragments,
    })
}

proptest! {
    #[test]
    fn random_bytes_never_panic(frame in prop::collection::vec(any::<u8>(), 0..200)) {
        let maps = Maps::new();
        for direction in [Direction::In, Direction::Out] {
            for gso_size in [0, 1, u32::MAX] {
                let size = Size { len: frame.len() as u32, gso_segs: 0, gso_size };
                let _ = decide(direction, frame.as_slice(), size, &maps);
            }
        }
    }

    #[test]
    fn mutated_packets_never_panic_and_never_reach_a_tunnel_that_is_not_theirs(
        inner in prop::collection::vec(any::<u8>(), 0..80),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        length in any::<prop::sample::Index>(),
        gso_segs in any::<u32>(),
        gso_size in any::<u32>(),
    ) {
        let maps = Maps::new();
        let mut frame = ipv4(PEER, US, VNI, &inner);
        for (at, value) in changes {
            let at = at.index(frame.len());
            frame[at] = value;
        }
        frame.truncate(length.index(frame.len() + 1));
        let size = Size { len: frame.len() as u32, gso_segs, gso_size };
        let decided = decide(Direction::In, frame.as_slice(), size, &maps);
        if let Ok(traffic) = decided {
            prop_assert!(traffic.packets >= 1 && traffic.bytes >= frame.len() as u64);
            let vxlan = parse(&frame).expect("counted, so parsed");
            prop_assert_eq!((vxlan.vni, vxlan.source), (VNI, mapped(PEER)));
        }
    }

    #[test]
    fn a_plain_frame_is_parsed_as_any_other(
        is_v6 in any::<bool>(),
        changes in prop::collection::vec((12_usize..70, any::<u8>()), 0..4),
    ) {
        let mut frame = if is_v6 { ipv6(&[], VNI) } else { ipv4(PEER, US, VNI, &[0; 20]) };
        for (at, value) in changes {
            frame[at] = value;
        }
        if let Some(parsed) = parse_plain(&frame) {
            prop_assert_eq!(parsed, parse(&frame));
        }
    }

    #[test]
    fn random_chains_of_extension_headers_end(
        chain in prop::collection::vec((prop::sample::select(vec![0_u8, 17, 43, 44, 51, 60, 135, 59]),
            prop::collection::vec(any::<u8>(), 7..40)), 0..12),
    ) {
        let _ = parse(&ipv6(&chain, VNI));
    }

    #[test]
    fn what_crosses_into_the_global_function_comes_back(header in header()) {
        prop_assert_eq!(Header::unpack(header.pack()), header);
        let ended = [Step::Fragment, Step::Other, Step::CutOff, Step::TinyFragment];
        for step in ended.into_iter().chain([Step::Header(header)]) {
            prop_assert_eq!(Step::unpack(step.pack()), step);
        }
    }

    #[test]
    fn loads_stay_inside(frame in prop::collection::vec(any::<u8>(), 0..64), offset in any::<u32>()) {
        let loaded: Option<[u8; 4]> = frame.as_slice().load(offset);
        let inside = (offset as usize).checked_add(4).is_some_and(|end| end <= frame.len());
        prop_assert_eq!(loaded.is_some(), inside);
    }
}
