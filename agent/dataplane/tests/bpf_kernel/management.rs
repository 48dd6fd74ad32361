//! The programs for probes on crafted frames: what they answer, note, and drop.

use std::mem::offset_of;

use aya::maps::{Array, HashMap, Map, MapData};
use nsm_dataplane::bpf::{Bpf, Direction};
use nsm_ebpf_common::{
    Address, UNSPECIFIED,
    forward::{Device, ProbePath, key_halves},
    management::{PROBES_AT_ONCE, REQUIRED_MIN_RX_US, Session, words},
    mapped,
    sbfd::{
        Control, Flags, Reflector, State,
        frame::{
            HEAD_V4, HEAD_V6, Packet, Probe, Role, SPEAKER, checksums_hold, mac, parse, session_key,
        },
        interval_with_sequence,
    },
};

use super::support::{DROP, Gso, PIN_DIR, Programs, drops, load_detached, programs, sandbox};

/// TC_ACT_REDIRECT.
const REDIRECT: i32 = 7;

const NODE: u32 = 0x0a0b_0c0d;
const PEER: u32 = 0x1020_3040;
const LOCAL: u32 = 77;
const PORT: u16 = 50_000;

/// A session as the numbers that it is.
type Words = [u64; size_of::<Session>() / 8];

fn open(name: &str) -> Map {
    let map = MapData::from_pin(format!("{PIN_DIR}/{name}")).expect("a pinned map");
    Map::from_map_data(map).expect("a map")
}

fn sessions() -> Array<MapData, Words> {
    open("SESSIONS").try_into().expect("an array")
}

fn read(field: usize) -> u64 {
    sessions().get(&0, 0).expect("a session")[field / 8]
}

/// Programs that know the node and one peer, as an agent would have written them.
fn load(address: Address) -> (Bpf, Programs) {
    let bpf = load_detached().expect("loaded");
    let mut node: Array<_, [u64; 4]> = open("NODE").try_into().expect("an array");
    let state = [NODE.into(), State::Up.bits().into(), 1, 1];
    node.set(0, state, 0).expect("set");
    let [high, low] = words(&address);
    let mut session = [0; size_of::<Session>() / 8];
    let mut write = |field: usize, value| session[field / 8] = value;
    write(offset_of!(Session, local_discriminator), LOCAL.into());
    write(offset_of!(Session, peer_discriminator), PEER.into());
    write(offset_of!(Session, peer_address), high);
    write(offset_of!(Session, peer_address) + 8, low);
    write(offset_of!(Session, source_port), PORT.into());
    sessions().set(0, session, 0).expect("set");
    let mut index: HashMap<_, u64, u32> = open("SESSION_INDEX").try_into().expect("a hash");
    let is_v4 = std::net::IpAddr::from(address).to_canonical().is_ipv4();
    let key = session_key(is_v4, mac(SPEAKER, PEER));
    index.insert(key, 0, 0).expect("inserted");
    let mut devices: Array<_, Device> = open("DEVICES").try_into().expect("an array");
    let device = Device {
        index: 1,
        port: 4789,
    };
    devices.set(0, device, 0).expect("set");
    let mut paths: HashMap<_, u64, ProbePath> = open("PROBE_PATHS").try_into().expect("a hash");
    let path = ProbePath {
        key: key_halves(key),
        device: 0,
        vni: 1,
        port: 4789,
        local: UNSPECIFIED,
        remote: address,
    };
    paths.insert(key, path, 0).expect("inserted");
    (bpf, programs())
}

/// Us and the peer, over IPv4 and IPv6.
fn families() -> [[Address; 2]; 2] {
    let v6 = |text: &str| {
        text.parse::<std::net::Ipv6Addr>()
            .expect("address")
            .octets()
    };
    [
        [mapped([10, 1, 0, 1]), mapped([10, 2, 0, 1])],
        [v6("fd00:1::1"), v6("fd00:2::1")],
    ]
}

/// What the peer's prober sends us.
fn peers_probe([us, peer]: [Address; 2]) -> Probe {
    Probe {
        sender: mac(SPEAKER, PEER),
        receiver: mac(SPEAKER, NODE),
        source: peer,
        destination: us,
        source_port: 51_000,
        control: Control {
            diagnostic: 1,
            state: State::Down,
            flags: Flags::DEMAND.with(Flags::POLL),
            detect_multiplier: 3,
            my_discriminator: 999,
            your_discriminator: NODE,
            desired_min_tx_us: interval_with_sequence(50_000, 0x155),
            required_min_rx_us: 0,
            required_min_echo_rx_us: 0,
        },
    }
}

/// What ours sends it.
fn our_probe([us, peer]: [Address; 2], sequence: u32) -> Probe {
    Probe {
        sender: mac(SPEAKER, NODE),
        receiver: mac(SPEAKER, PEER),
        source: us,
        destination: peer,
        source_port: PORT,
        control: Control {
            my_discriminator: LOCAL,
            your_discriminator: PEER,
            flags: Flags::DEMAND,
            desired_min_tx_us: interval_with_sequence(50_000, sequence),
            ..peers_probe([us, peer]).control
        },
    }
}

fn frame(probe: &Probe, padding: usize) -> Vec<u8> {
    let mut frame = vec![0; probe.min_length() + padding];
    probe.write(&mut frame).expect("a frame");
    frame
}

fn parsed(frame: &[u8]) -> Option<Packet> {
    let length = frame.len() as u32;
    match frame[12] {
        0x08 => parse::<HEAD_V4>(frame.first_chunk()?, length),
        _ => parse::<HEAD_V6>(frame.first_chunk()?, length),
    }
}

/// The peer's reflector's answer to a probe of ours.
fn answer_to(probe: &Probe) -> Vec<u8> {
    let mut frame = frame(probe, 0);
    let reflector = Reflector {
        state: State::Up,
        flags: Flags::default(),
        required_min_rx_us: 1,
    };
    if probe.is_v4() {
        let head = frame.first_chunk_mut::<HEAD_V4>().expect("a head");
        nsm_ebpf_common::sbfd::frame::reflect(head, &probe.control, reflector);
    } else {
        let head = frame.first_chunk_mut::<HEAD_V6>().expect("a head");
        nsm_ebpf_common::sbfd::frame::reflect(head, &probe.control, reflector);
    }
    frame
}

fn run(programs: &Programs, direction: Direction, frame: &[u8]) -> (i32, Vec<u8>) {
    let name = format!("probe_{direction}");
    let (run, frame) = programs.run(&name, frame, Gso::default(), 1);
    (run.return_value.cast_signed(), frame)
}

#[test]
#[ignore = "needs root: BPF"]
fn a_probe_is_turned_round_as_rfc_7880_says() {
    sandbox(|| {
        for ends in families() {
            let (bpf, programs) = load(ends[1]);
            for (number, padding) in (1..).zip([0, 1, 234, 1400]) {
                let mut probe = peers_probe(ends);
                probe.control.desired_min_tx_us += number;
                let sent = frame(&probe, padding);
                let (verdict, answer) = run(&programs, Direction::In, &sent);
                assert_eq!(verdict, REDIRECT);
                assert_eq!(answer.len(), sent.len(), "not a byte more than came");
                assert!(checksums_hold(&answer));
                let packet = parsed(&answer).expect("an answer");
                assert_eq!(packet.role, Role::Reflector);
                assert_eq!(packet.source, ends[0]);
                assert_eq!(packet.sender, session_key(probe.is_v4(), probe.receiver));
                assert_eq!(packet.receiver, session_key(probe.is_v4(), probe.sender));
                assert_eq!(packet.initiator_port, probe.source_port);
                let expected = Control {
                    diagnostic: 0,
                    state: State::Up,
                    flags: Flags::FINAL.with(Flags::CONTROL_PLANE_INDEPENDENT),
                    my_discriminator: NODE,
                    your_discriminator: 999,
                    required_min_rx_us: REQUIRED_MIN_RX_US,
                    ..probe.control
                };
                assert_eq!(packet.control, expected);
            }
            assert_eq!(read(offset_of!(Session, reflected)), 4);
            let head = frame(&peers_probe(ends), 0).len() as u64;
            let bytes = read(offset_of!(Session, reflected_bytes));
            assert_eq!(bytes, 4 * head + 1 + 234 + 1400);
            assert_eq!(drops(&bpf), []);
            // Once more, the last one: answered as before, and no evidence.
            let heard = read(offset_of!(Session, last_probe_ns));
            let mut probe = peers_probe(ends);
            probe.control.desired_min_tx_us += 4;
            let (verdict, _) = run(&programs, Direction::In, &frame(&probe, 0));
            assert_eq!(verdict, REDIRECT);
            assert_eq!(read(offset_of!(Session, last_probe_ns)), heard);
            assert_eq!(drops(&bpf), [("sbfd_replayed", 1)]);
            bpf.detach_and_unpin().expect("unpinned");
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn our_probes_are_stamped_and_their_answers_matched() {
    sandbox(|| {
        for ends in families() {
            let (bpf, programs) = load(ends[1]);
            let probe = our_probe(ends, 0x2ff);
            let answer = answer_to(&probe);
            assert_eq!(run(&programs, Direction::In, &answer).0, DROP, "to nothing");
            assert_eq!(
                run(&programs, Direction::Out, &frame(&probe, 900)).0,
                REDIRECT
            );
            assert_eq!(read(offset_of!(Session, sent)), 1);
            assert_eq!(run(&programs, Direction::In, &answer).0, DROP, "and noted");
            assert_eq!(read(offset_of!(Session, answered)), 1);
            let sent = read(offset_of!(Session, last_sent_ns));
            let came = read(offset_of!(Session, last_answer_ns));
            let round_trip = read(offset_of!(Session, last_round_trip_ns));
            assert!(sent > 0 && came - sent == round_trip && round_trip > 0);
            assert_eq!(run(&programs, Direction::In, &answer).0, DROP, "replayed");
            assert_eq!(read(offset_of!(Session, answered)), 1);
            assert_eq!(drops(&bpf), [("sbfd_stale", 2)]);

            // Somebody waits.
            let mut session = sessions().get(&0, 0).expect("a session");
            session[offset_of!(Session, wake) / 8] = 1;
            sessions().set(0, session, 0).expect("set");
            assert_eq!(
                run(&programs, Direction::Out, &frame(&our_probe(ends, 1), 0)).0,
                REDIRECT
            );
            let answer = answer_to(&our_probe(ends, 1));
            assert_eq!(run(&programs, Direction::In, &answer).0, REDIRECT);
            bpf.detach_and_unpin().expect("unpinned");
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn everything_else_ends_at_the_hook() {
    sandbox(|| {
        let ends = families()[0];
        let (bpf, programs) = load(ends[1]);
        let refused = |change: fn(&mut Vec<u8>), reason| {
            let mut frame = frame(&peers_probe(ends), 0);
            change(&mut frame);
            let count = || bpf.drops().expect("drops")[reason];
            let before = count();
            assert_eq!(run(&programs, Direction::In, &frame).0, DROP, "{reason}");
            assert_eq!(count(), before + 1, "{reason}");
        };
        const CONTROL: usize = HEAD_V4 - 24;
        refused(|frame| frame.truncate(HEAD_V4 - 1), "sbfd_malformed");
        refused(|frame| frame.truncate(40), "sbfd_malformed");
        refused(|frame| frame[13] = 0x06, "sbfd_malformed");
        refused(|frame| frame[22] = 64, "sbfd_malformed");
        refused(|frame| frame[CONTROL] = 0, "sbfd_malformed");
        refused(|frame| frame[CONTROL + 1] ^= 2, "sbfd_malformed");
        refused(
            |frame| frame[CONTROL + 8] ^= 1,
            "sbfd_unknown_discriminator",
        );
        refused(|frame| frame[11] ^= 1, "sbfd_unknown_peer");
        let answer = answer_to(&our_probe(ends, 3));
        let refused = |at: usize, reason| {
            let mut frame = answer.clone();
            frame[at] ^= 1;
            let before = bpf.drops().expect("drops")[reason];
            assert_eq!(run(&programs, Direction::In, &frame).0, DROP, "{reason}");
            assert_eq!(bpf.drops().expect("drops")[reason], before + 1, "{reason}");
        };
        refused(14 + 12, "sbfd_wrong_source");
        refused(CONTROL + 4, "sbfd_unknown_discriminator");
        refused(CONTROL + 8, "sbfd_unknown_discriminator");
        assert_eq!(read(offset_of!(Session, answered)), 0);
        assert_eq!(read(offset_of!(Session, reflected)), 0);

        // What leaves is ours, or does not leave. It is no packet from outside, so it is not counted as one.
        let before = drops(&bpf);
        let mut stranger = frame(&our_probe(ends, 1), 0);
        stranger[5] ^= 1;
        assert_eq!(run(&programs, Direction::Out, &stranger).0, DROP);
        assert_eq!(run(&programs, Direction::Out, &[0xff; 60]).0, DROP);
        // An MLD report, as IPv6 sends on each link by itself.
        let mut report = vec![0; 90];
        report[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 0x16]);
        report[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
        assert_eq!(run(&programs, Direction::Out, &report).0, DROP);
        assert_eq!(drops(&bpf), before);
        bpf.detach_and_unpin().expect("unpinned");
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_flood_gets_back_less_than_it_sent() {
    const FLOOD: u64 = 100_000;
    sandbox(|| {
        let ends = families()[0];
        let (bpf, programs) = load(ends[1]);
        let probe = frame(&peers_probe(ends), 0);
        let (mut answered, mut bytes) = (0, 0);
        for _ in 0..FLOOD {
            let (verdict, answer) = run(&programs, Direction::In, &probe);
            if verdict == REDIRECT {
                answered += 1;
                bytes += answer.len() as u64;
            }
        }
        let limited = bpf.drops().expect("drops")["sbfd_rate_limited"];
        assert_eq!(answered + limited, FLOOD);
        assert!(answered >= PROBES_AT_ONCE);
        assert_eq!(bytes, answered * probe.len() as u64);
        assert_eq!(read(offset_of!(Session, reflected)), answered);
        assert_eq!(read(offset_of!(Session, rate_limited)), limited);
        assert!(limited > FLOOD / 2, "{limited} of {FLOOD}");
        bpf.detach_and_unpin().expect("unpinned");
    });
}
