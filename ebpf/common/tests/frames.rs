//! Probes and answers as frames, against bytes worked out by hand from RFC 791, 768, 8200, 5880, 7880 and 7881.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nsm_ebpf_common::{
    Address, mapped,
    sbfd::{
        Control, DETECT_MULTIPLIER, Flags, Reflector, State,
        frame::{
            FrameError, HEAD_V4, HEAD_V6, Packet, Probe, Role, SPEAKER, checksums_hold, mac,
            mac_key, parse, reflect, session_key,
        },
        interval_with_sequence,
    },
};
use proptest::prelude::*;

const OURS: u32 = 0x0a0b_0c0d;
const PEERS: u32 = 0x1020_3040;

fn control() -> Control {
    Control {
        diagnostic: 0,
        state: State::Up,
        flags: Flags::DEMAND,
        detect_multiplier: DETECT_MULTIPLIER,
        my_discriminator: 0x0102_0304,
        your_discriminator: PEERS,
        desired_min_tx_us: interval_with_sequence(50_000, 7),
        required_min_rx_us: 0,
        required_min_echo_rx_us: 0,
    }
}

fn probe(source: Address, destination: Address) -> Probe {
    Probe {
        sender: mac(SPEAKER, OURS),
        receiver: mac(SPEAKER, PEERS),
        source,
        destination,
        source_port: 50_000,
        control: control(),
    }
}

fn probe_v4() -> Probe {
    probe(mapped([10, 1, 0, 1]), mapped([10, 2, 0, 1]))
}

fn probe_v6() -> Probe {
    let address = |text: &str| text.parse::<Ipv6Addr>().expect("an address").octets();
    probe(address("fd00:1::1"), address("fd00:2::1"))
}

fn written(probe: &Probe, length: usize) -> Vec<u8> {
    // What was there before must not show.
    let mut frame = vec![0xa5; length];
    probe.write(&mut frame).expect("a frame");
    frame
}

fn parsed(frame: &[u8]) -> Option<Packet> {
    let length = frame.len() as u32;
    match frame.get(12..14)? {
        [0x08, 0x00] => parse::<HEAD_V4>(frame.first_chunk()?, length),
        _ => parse::<HEAD_V6>(frame.first_chunk()?, length),
    }
}

fn reflected(frame: &[u8], reflector: Reflector) -> Vec<u8> {
    let packet = parsed(frame).expect("a probe");
    let mut answer = frame.to_vec();
    match answer[12] {
        0x08 => reflect::<HEAD_V4>(
            answer.first_chunk_mut().expect("a head"),
            &packet.control,
            reflector,
        ),
        _ => reflect::<HEAD_V6>(
            answer.first_chunk_mut().expect("a head"),
            &packet.control,
            reflector,
        ),
    }
    answer
}

const REFLECTOR: Reflector = Reflector {
    state: State::Up,
    flags: Flags::CONTROL_PLANE_INDEPENDENT,
    required_min_rx_us: 2_500,
};

#[test]
fn a_probe_over_ipv4_has_these_bytes() {
    let frame = written(&probe_v4(), HEAD_V4);
    let expected = [
        [0x02, 0x53, 0x10, 0x20, 0x30, 0x40].as_slice(),
        &[0x02, 0x53, 0x0a, 0x0b, 0x0c, 0x0d],
        &[0x08, 0x00],
        // Version and header length, CS6, 52 bytes, no id, don't fragment, TTL 255, UDP. The checksum by hand: the words sum to
        // 0x45c0 + 0x0034 + 0x4000 + 0xff11 + 0x0a01 + 0x0001 + 0x0a02 + 0x0001 = 0x1990a, folded 0x990b, inverted 0x66f4.
        &[0x45, 0xc0, 0, 52, 0, 0, 0x40, 0, 255, 17, 0x66, 0xf4],
        &[10, 1, 0, 1],
        &[10, 2, 0, 1],
        // 50,000 to 7,784, 32 bytes, checksum.
        &[0xc3, 0x50, 0x1e, 0x68, 0, 32],
    ]
    .concat();
    assert_eq!(frame[..expected.len()], expected);
    assert_eq!(frame[expected.len() + 2..], control().to_bytes());
    assert_eq!(checksum_by_hand(&frame, 14 + 12, 8, 14 + 20), 0xffff);
    assert!(checksums_hold(&frame));
}

#[test]
fn a_probe_over_ipv6_has_these_bytes() {
    let frame = written(&probe_v6(), HEAD_V6);
    assert_eq!(frame[12..14], [0x86, 0xdd]);
    // Version 6, traffic class CS6, no flow label, 32 bytes, UDP, hop limit 255.
    assert_eq!(frame[14..22], [0x6c, 0, 0, 0, 0, 32, 17, 255]);
    assert_eq!(frame[22..38], probe_v6().source);
    assert_eq!(frame[38..54], probe_v6().destination);
    assert_eq!(frame[54..60], [0xc3, 0x50, 0x1e, 0x68, 0, 32]);
    assert_eq!(frame[62..], control().to_bytes());
    assert_eq!(checksum_by_hand(&frame, 22, 32, 54), 0xffff);
    assert!(checksums_hold(&frame));
}

/// The one's complement sum over pseudo header and datagram, its own checksum included, as RFC 1071 says it plainly.
fn checksum_by_hand(frame: &[u8], addresses: usize, length: usize, udp: usize) -> u16 {
    let mut bytes = frame[addresses..addresses + length].to_vec();
    let datagram = &frame[udp..];
    bytes.extend([0, 17]);
    bytes.extend((datagram.len() as u16).to_be_bytes());
    bytes.extend(datagram);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = 0;
    for pair in bytes.chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

#[test]
fn an_answer_swaps_who_and_keeps_the_rest() {
    for (probe, head) in [(probe_v4(), HEAD_V4), (probe_v6(), HEAD_V6)] {
        for length in [head, head + 1, 300, 1_500] {
            let frame = written(&probe, length);
            let answer = reflected(&frame, REFLECTOR);
            assert_eq!(answer.len(), frame.len(), "no byte more");
            assert!(checksums_hold(&answer), "{length} bytes");
            assert_eq!(answer[..6], frame[6..12]);
            assert_eq!(answer[6..12], frame[..6]);
            let packet = parsed(&answer).expect("an answer");
            assert_eq!(packet.role, Role::Reflector);
            assert_eq!(packet.source, probe.destination);
            assert_eq!(packet.initiator_port, probe.source_port);
            assert_eq!(packet.control, control().answer(REFLECTOR));
            let ttl = if head == HEAD_V4 { 22 } else { 21 };
            assert_eq!(answer[ttl], 255);
            assert!(answer[head..].iter().all(|byte| *byte == 0));
            // Type, lengths, flags and protocol: nothing but addresses, ports and the Control packet differ.
            assert_eq!(answer[12..22], frame[12..22]);
        }
    }
}

#[test]
fn no_checksum_stays_none_and_a_wrong_one_stays_wrong() {
    let mut frame = written(&probe_v4(), 200);
    frame[40..42].fill(0);
    assert_eq!(reflected(&frame, REFLECTOR)[40..42], [0, 0]);
    let mut frame = written(&probe_v4(), 200);
    frame[150] ^= 0x10;
    assert!(!checksums_hold(&frame));
    assert!(!checksums_hold(&reflected(&frame, REFLECTOR)));
}

#[test]
fn what_rfc_7880_and_7881_discard_is_no_packet() {
    let frame = written(&probe_v4(), HEAD_V4);
    let six = written(&probe_v6(), HEAD_V6);
    let with = |frame: &[u8], at: usize, value: u8| {
        let mut frame = frame.to_vec();
        frame[at] = value;
        parsed(&frame)
    };
    assert!(parsed(&frame).is_some() && parsed(&six).is_some());
    assert_eq!(with(&frame, 22, 254), None, "TTL (RFC 7881, section 3)");
    assert_eq!(with(&six, 21, 254), None, "hop limit");
    assert_eq!(with(&frame, 23, 6), None, "TCP");
    assert_eq!(with(&six, 20, 0), None, "an extension header");
    assert_eq!(with(&frame, 14, 0x46), None, "IP options");
    assert_eq!(with(&frame, 20, 0x60), None, "a first fragment");
    assert_eq!(with(&frame, 21, 1), None, "a later fragment");
    assert_eq!(with(&frame, 17, 53), None, "longer than the frame");
    assert_eq!(with(&frame, 39, 31), None, "UDP shorter than BFD");
    assert_eq!(with(&frame, 39, 33), None, "UDP longer than IP");
    assert_eq!(with(&frame, 37, 0x69), None, "another port");
    assert_eq!(with(&frame, 12, 0x81), None, "no IP");
    let flags = 14 + 20 + 8 + 1;
    assert_eq!(
        with(&frame, flags, 0b11_000000),
        None,
        "D not set, to a reflector (RFC 7880, section 7.2.1)"
    );
    let mut both = frame.clone();
    both[34..36].copy_from_slice(&7784_u16.to_be_bytes());
    assert_eq!(parsed(&both), None, "source port 7784 (RFC 7881)");

    let answer = reflected(&frame, REFLECTOR);
    assert_eq!(
        with(&answer, flags, 0b11_000010),
        None,
        "D set, to an initiator (RFC 7880, section 7.3.3)"
    );
    for state in [State::Down, State::Init] {
        assert_eq!(with(&answer, flags, state.bits() << 6), None, "{state:?}");
    }
    assert!(with(&answer, flags, 0).is_some(), "AdminDown");
}

#[test]
fn frames_that_cannot_be_are_refused() {
    let mixed = Probe {
        destination: probe_v6().destination,
        ..probe_v4()
    };
    assert_eq!(mixed.write(&mut [0; 200]), Err(FrameError::Families));
    for length in [0, HEAD_V4 - 1, 65_536 + 14] {
        let mut frame = vec![0; length];
        let refused = probe_v4().write(&mut frame);
        assert_eq!(refused, Err(FrameError::Length(length)));
    }
}

#[test]
fn addresses_of_a_node_follow_from_its_discriminator() {
    assert_eq!(mac(SPEAKER, PEERS), [0x02, 0x53, 0x10, 0x20, 0x30, 0x40]);
    assert_eq!(mac_key(mac(SPEAKER, PEERS)), 0x0253_1020_3040);
    let packet = parsed(&written(&probe_v4(), HEAD_V4)).expect("a probe");
    assert_eq!(packet.sender, mac_key(mac(SPEAKER, OURS)));
    assert_eq!(packet.receiver, mac_key(mac(SPEAKER, PEERS)));
    // The same on the other link leads elsewhere.
    let packet = parsed(&written(&probe_v6(), HEAD_V6)).expect("a probe");
    assert_eq!(packet.sender, session_key(false, mac(SPEAKER, OURS)));
    assert_ne!(packet.sender, mac_key(mac(SPEAKER, OURS)));
}

fn address() -> impl Strategy<Value = (Address, Address)> {
    let v4 = any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (mapped(a), mapped(b)));
    let is_v6 = |address: &Address| IpAddr::from(*address).to_canonical().is_ipv6();
    let v6 = any::<(Address, Address)>().prop_filter("IPv6", move |(a, b)| is_v6(a) && is_v6(b));
    prop_oneof![v4, v6]
}

prop_compose! {
    fn any_probe()(
        (source, destination) in address(),
        sender: u32,
        receiver: u32,
        source_port in 49_152_u16..,
        diagnostic in 0_u8..32,
        state in 0_u8..4,
        poll: bool,
        detect_multiplier in 1_u8..,
        my_discriminator in 1_u32..,
        your_discriminator: u32,
        desired_min_tx_us: u32,
        required_min_rx_us: u32,
        required_min_echo_rx_us: u32,
    ) -> Probe {
        let flags = if poll { Flags::DEMAND.with(Flags::POLL) } else { Flags::DEMAND };
        Probe {
            sender: mac(SPEAKER, sender),
            receiver: mac(SPEAKER, receiver),
            source,
            destination,
            source_port,
            control: Control {
                diagnostic,
                state: State::from_bits(state),
                flags,
                detect_multiplier,
                my_discriminator,
                your_discriminator,
                desired_min_tx_us,
                required_min_rx_us,
                required_min_echo_rx_us,
            },
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(probe in any_probe(), padding in 0_usize..1_500) {
        let frame = written(&probe, probe.min_length() + padding);
        prop_assert!(checksums_hold(&frame));
        let packet = parsed(&frame).expect("a probe");
        prop_assert_eq!(packet.control, probe.control);
        prop_assert_eq!(packet.source, probe.source);
        prop_assert_eq!(packet.role, Role::Initiator);
    }

    #[test]
    fn checksums_follow_what_changes(probe in any_probe(), padding in 0_usize..100, rx: u32, down: bool) {
        let frame = written(&probe, probe.min_length() + padding);
        let state = if down { State::AdminDown } else { State::Up };
        let answer = reflected(&frame, Reflector { state, required_min_rx_us: rx, ..REFLECTOR });
        prop_assert!(checksums_hold(&answer));
        let udp_checksum = if probe.is_v4() { 40 } else { 60 };
        prop_assert_ne!(&answer[udp_checksum..udp_checksum + 2], &[0, 0]);
    }

    #[test]
    fn random_bytes_never_panic(frame in prop::collection::vec(any::<u8>(), 0..200), length: u32) {
        let _ = parsed(&frame);
        let _ = checksums_hold(&frame);
        if let Some(head) = frame.first_chunk() {
            let _ = parse::<HEAD_V4>(head, length);
        }
        if let Some(head) = frame.first_chunk() {
            let _ = parse::<HEAD_V6>(head, length);
        }
    }

    #[test]
    fn a_probe_with_changed_bytes_never_panics(
        probe in any_probe(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let mut frame = written(&probe, probe.min_length());
        for (at, value) in changes {
            let at = at.index(frame.len());
            frame[at] = value;
        }
        if let Some(packet) = parsed(&frame)
            && packet.role == Role::Initiator
        {
            let answer = reflected(&frame, REFLECTOR);
            prop_assert_eq!(answer.len(), frame.len());
        }
        let _ = checksums_hold(&frame);
    }
}

#[test]
fn mapped_addresses_are_ipv4() {
    let v4 = Ipv4Addr::new(192, 0, 2, 1);
    assert!(probe(mapped(v4.octets()), mapped(v4.octets())).is_v4());
    assert!(!probe_v6().is_v4());
}
