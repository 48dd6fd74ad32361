//! What the programs do with crafted frames, by BPF_PROG_TEST_RUN, and what the maps hold afterwards.

use super::support::{
    DROP, Frame, Gso, NEXT, Programs, addr, drops, load_detached, programs, sandbox, verdict, vni,
};
use nix::{
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use nsm_core::link::Traffic;
use nsm_dataplane::bpf::{Bpf, Direction, Slot};

const US: &str = "192.0.2.1";
const PEER: &str = "198.51.100.7";
const STRANGER: &str = "203.0.113.9";

const US6: &str = "2001:db8:1::1";
const PEER6: &str = "2001:db8:2::7";
const STRANGER6: &str = "2001:db8:3::9";

/// Programs that know VNI 42 to PEER and VNI 43 to PEER6.
fn world() -> (Bpf, Programs, Slot, Slot) {
    let bpf = load_detached().expect("load");
    let v4 = bpf.add_tunnel(vni(42), addr(PEER)).expect("a slot");
    let v6 = bpf.add_tunnel(vni(43), addr(PEER6)).expect("a slot");
    (bpf, programs(), v4, v6)
}

fn counted(bpf: &Bpf, slot: Slot) -> [u64; 4] {
    let Traffic { sent, received } = bpf.counters(slot).expect("counters");
    for count in [sent, received] {
        assert_eq!(count.last.is_some(), count.packets > 0);
    }
    [sent.packets, sent.bytes, received.packets, received.bytes]
}

/// Each of these is attributed to the tunnel, whatever surrounds its VXLAN header.
fn variants(source: &str, destination: &str, vni: u32) -> Vec<(&'static str, Frame)> {
    let plain = Frame::new(source, destination, vni);
    let mut all = vec![
        ("plain", plain.clone()),
        (
            "one VLAN tag",
            plain.clone().with(|f| f.vlan_tags = vec![0x8100]),
        ),
        (
            "two VLAN tags",
            plain.clone().with(|f| f.vlan_tags = vec![0x88a8, 0x8100]),
        ),
        (
            "empty payload",
            plain.clone().with(|f| f.inner = Vec::new()),
        ),
        (
            "length for segmentation",
            plain.clone().with(|f| f.udp_length = Some(0)),
        ),
        ("all flags", plain.clone().with(|f| f.vxlan_flags = 0xff)),
    ];
    if plain.source.is_ipv4() {
        all.extend([
            (
                "4 bytes of options",
                plain.clone().with(|f| f.options = vec![1; 4]),
            ),
            (
                "40 bytes of options",
                plain.clone().with(|f| f.options = vec![1; 40]),
            ),
            (
                "don't fragment",
                plain.clone().with(|f| f.fragment = 0x4000),
            ),
            (
                "first fragment",
                plain.clone().with(|f| f.fragment = 0x2000),
            ),
        ]);
    } else {
        let options = vec![0, 0, 0, 0, 0, 0, 0];
        all.extend([
            (
                "hop by hop",
                plain
                    .clone()
                    .with(|f| f.extensions = vec![(0, options.clone())]),
            ),
            (
                "a long destination option",
                plain.clone().with(|f| {
                    f.extensions = vec![(60, [vec![31], vec![0; 254]].concat())];
                }),
            ),
            (
                "authentication",
                plain
                    .clone()
                    .with(|f| f.extensions = vec![(51, [vec![4], vec![0; 22]].concat())]),
            ),
            (
                "first fragment",
                plain
                    .clone()
                    .with(|f| f.extensions = vec![(44, vec![0, 0, 1, 0, 0, 0, 9])]),
            ),
            (
                "atomic fragment",
                plain
                    .clone()
                    .with(|f| f.extensions = vec![(44, vec![0, 0, 0, 0, 0, 0, 9])]),
            ),
            (
                "eight headers",
                plain
                    .clone()
                    .with(|f| f.extensions = vec![(60, options.clone()); 8]),
            ),
        ]);
    }
    all
}

#[test]
#[ignore = "needs root: BPF"]
fn tunnel_traffic_is_counted_in_both_directions() {
    sandbox(|| {
        let (bpf, programs, v4, v6) = world();
        for (slot, us, peer, vni) in [(v4, US, PEER, 42), (v6, US6, PEER6, 43)] {
            let mut expected = [0; 4];
            for (what, frame) in variants(us, peer, vni) {
                let frame = frame.bytes();
                assert_eq!(verdict(&programs, Direction::Out, &frame), NEXT, "{what}");
                expected[0] += 1;
                expected[1] += frame.len() as u64;
                assert_eq!(counted(&bpf, slot), expected, "{what}");
            }
            for (what, frame) in variants(peer, us, vni) {
                let frame = frame.bytes();
                assert_eq!(verdict(&programs, Direction::In, &frame), NEXT, "{what}");
                expected[2] += 1;
                expected[3] += frame.len() as u64;
                assert_eq!(counted(&bpf, slot), expected, "{what}");
            }
        }
        assert_eq!(drops(&bpf), []);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn our_vni_from_a_wrong_source_is_dropped_and_counted() {
    sandbox(|| {
        let (bpf, programs, v4, v6) = world();
        let mut count = 0;
        for (slot, us, stranger, vni) in [(v4, US, STRANGER, 42), (v6, US6, STRANGER6, 43)] {
            // The unspecified address marks VNIs in the map; as a source it is a stranger's like any other.
            let nobody = Frame::new(if slot == v4 { "0.0.0.0" } else { "::" }, us, vni);
            assert_eq!(verdict(&programs, Direction::In, &nobody.bytes()), DROP);
            count += 1;
            for (what, frame) in variants(stranger, us, vni).into_iter().take(5) {
                assert_eq!(
                    verdict(&programs, Direction::In, &frame.bytes()),
                    DROP,
                    "{what}"
                );
                count += 1;
                assert_eq!(drops(&bpf), [("wrong_source", count)], "{what}");
                assert_eq!(counted(&bpf, slot), [0; 4], "{what}");
            }
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn what_is_not_ours_passes() {
    sandbox(|| {
        let (bpf, programs, v4, v6) = world();
        let mut expected: Vec<(&str, u64)> = Vec::new();
        let mut pass = |direction, frame: &[u8], reason: Option<&'static str>| {
            assert_eq!(verdict(&programs, direction, frame), NEXT, "{reason:?}");
            if let Some(reason) = reason {
                match expected.iter_mut().find(|(name, _)| *name == reason) {
                    Some((_, count)) => *count += 1,
                    None => expected.push((reason, 1)),
                }
                expected.sort();
            }
            assert_eq!(drops(&bpf), expected, "{direction} {reason:?}");
        };
        use Direction::{In, Out};
        for (us, peer, stranger, ours) in [(US, PEER, STRANGER, 42), (US6, PEER6, STRANGER6, 43)] {
            let from_peer = Frame::new(peer, us, ours);
            let to_peer = Frame::new(us, peer, ours);
            pass(
                In,
                &Frame::new(peer, us, 99).bytes(),
                Some("foreign_vni_in"),
            );
            pass(
                Out,
                &Frame::new(us, peer, 99).bytes(),
                Some("foreign_vni_out"),
            );
            pass(
                Out,
                &Frame::new(us, stranger, ours).bytes(),
                Some("wrong_destination"),
            );
            for (direction, frame) in [(In, from_peer), (Out, to_peer)] {
                let other_port = frame.clone().with(|f| f.port = 4790);
                pass(direction, &other_port.bytes(), None);
                let tcp = frame.clone().with(|f| f.protocol = 6);
                pass(direction, &tcp.bytes(), None);
                let no_flag = frame.clone().with(|f| f.vxlan_flags = 0xf7);
                pass(direction, &no_flag.bytes(), Some("malformed"));
                let short = frame.clone().with(|f| f.udp_length = Some(15));
                pass(direction, &short.bytes(), Some("malformed"));
                let three_tags = frame.clone().with(|f| f.vlan_tags = vec![0x8100; 3]);
                pass(direction, &three_tags.bytes(), None);
                let later = frame.clone().with(|f| {
                    f.fragment = 0x2001;
                    f.extensions = vec![(44, vec![0, 0, 8, 0, 0, 0, 9])];
                });
                pass(direction, &later.bytes(), Some("fragment"));
            }
        }
        let mut arp = vec![0xff; 12];
        arp.extend([0x08, 0x06]);
        arp.extend([0; 28]);
        pass(In, &arp, None);
        assert_eq!([counted(&bpf, v4), counted(&bpf, v6)], [[0; 4]; 2]);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_frame_cut_at_any_byte_is_never_counted_to_a_tunnel() {
    sandbox(|| {
        let (bpf, programs, v4, v6) = world();
        for (peer, us, vni) in [(PEER, US, 42), (PEER6, US6, 43)] {
            let plain = Frame::new(peer, us, vni).with(|f| f.inner = Vec::new());
            let whole = plain.bytes();
            let udp = whole.len() - 16;
            // The kernel takes no shorter frame for a test; the parser's own tests do.
            for cut in udp..whole.len() {
                let malformed = bpf.drops().unwrap()["malformed"];
                assert_eq!(
                    verdict(&programs, Direction::In, &whole[..cut]),
                    NEXT,
                    "cut at {cut}"
                );
                let more = bpf.drops().unwrap()["malformed"] - malformed;
                assert_eq!(more, u64::from(cut >= udp + 6), "cut at {cut}");
            }
        }
        assert_eq!([counted(&bpf, v4), counted(&bpf, v6)], [[0; 4]; 2]);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn what_could_hide_our_vni_is_dropped_on_the_way_in_only() {
    sandbox(|| {
        let (bpf, programs, ..) = world();
        // The VXLAN header would come with the second fragment, where nobody could check it.
        let tiny4 = Frame::new(STRANGER, US, 42)
            .with(|f| f.fragment = 0x2000)
            .bytes();
        let tiny4 = &tiny4[..14 + 20 + 8];
        let tiny6 = Frame::new(STRANGER6, US6, 43)
            .with(|f| f.extensions = vec![(44, vec![0, 0, 1, 0, 0, 0, 9])])
            .bytes();
        let tiny6 = &tiny6[..14 + 40 + 8 + 8];
        let options = (60, vec![0; 7]);
        let long = Frame::new(STRANGER6, US6, 43)
            .with(|f| f.extensions = vec![options; 9])
            .bytes();
        for frame in [tiny4, tiny6, &long] {
            assert_eq!(verdict(&programs, Direction::Out, frame), NEXT);
        }
        assert_eq!(drops(&bpf), []);
        for frame in [tiny4, tiny6, &long] {
            assert_eq!(verdict(&programs, Direction::In, frame), DROP);
        }
        assert_eq!(
            drops(&bpf),
            [("extension_headers", 1), ("tiny_fragment", 2)]
        );
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn ports_can_be_added_and_removed() {
    sandbox(|| {
        let (bpf, programs, v4, _) = world();
        let frame = Frame::new(PEER, US, 42).with(|f| f.port = 8472).bytes();
        let packets = |bpf: &Bpf| {
            assert_eq!(verdict(&programs, Direction::In, &frame), NEXT);
            counted(bpf, v4)[2]
        };
        assert_eq!(packets(&bpf), 0);
        bpf.add_port(8472).unwrap();
        assert_eq!(packets(&bpf), 1);
        bpf.remove_port(8472).unwrap();
        assert_eq!(packets(&bpf), 1);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_frame_to_be_segmented_counts_as_its_segments() {
    // Inner Ethernet, IPv4 and TCP with 12 bytes of options.
    let mut tcp = vec![0; 12];
    tcp.extend([0x08, 0x00, 0x45]);
    tcp.resize(14 + 9, 0);
    tcp.push(6);
    tcp.resize(14 + 20 + 12, 0);
    tcp.push(0x80);
    tcp.resize(14 + 20 + 32, 0);
    let headers = 14 + 20 + 8 + 8 + tcp.len() as u64;
    tcp.resize(tcp.len() + 3 * 1000 + 1, 0);
    sandbox(move || {
        let (bpf, programs, v4, _) = world();
        let frame = Frame::new(US, PEER, 42).with(|f| f.inner = tcp).bytes();
        let length = frame.len() as u64;
        for (round, segs) in [(1, 4), (2, 0)] {
            let gso = Gso { segs, size: 1000 };
            let (run, _) = programs.run("underlay_egress", &frame, gso, 1);
            assert_eq!(run.return_value.cast_signed(), NEXT);
            let expected = [round * 4, round * (length + 3 * headers), 0, 0];
            assert_eq!(counted(&bpf, v4), expected, "gso_segs {segs}");
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn tunnels_come_and_go() {
    sandbox(|| {
        let (bpf, programs, v4, v6) = world();
        assert_ne!(v4, v6);
        assert_eq!(bpf.slots_in_use(), 2);
        assert_eq!(
            verdict(&programs, Direction::In, &Frame::new(PEER, US, 42).bytes()),
            NEXT
        );
        // Asked again, it stays what it is.
        assert_eq!(bpf.add_tunnel(vni(42), addr(PEER)).unwrap(), v4);
        assert_eq!(
            bpf.add_tunnel(vni(42), addr("::ffff:198.51.100.7"))
                .unwrap(),
            v4
        );
        assert_eq!(counted(&bpf, v4)[2], 1);

        // A second peer in the same VNI; then the first one goes, and the VNI stays ours.
        bpf.add_tunnel(vni(42), addr(STRANGER)).unwrap();
        assert_eq!(
            verdict(
                &programs,
                Direction::In,
                &Frame::new(STRANGER, US, 42).bytes()
            ),
            NEXT
        );
        assert!(bpf.remove_tunnel(vni(42), addr(PEER)).unwrap());
        assert!(!bpf.remove_tunnel(vni(42), addr(PEER)).unwrap());
        assert!(bpf.counters(v4).is_err());
        assert_eq!(
            verdict(&programs, Direction::In, &Frame::new(PEER, US, 42).bytes()),
            DROP
        );

        assert!(bpf.remove_tunnel(vni(42), addr(STRANGER)).unwrap());
        assert_eq!(
            verdict(&programs, Direction::In, &Frame::new(PEER, US, 42).bytes()),
            NEXT
        );
        assert_eq!(drops(&bpf), [("foreign_vni_in", 1), ("wrong_source", 1)]);
        assert_eq!(bpf.tunnels().len(), 1);

        for nobody in ["0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
            let error = bpf.add_tunnel(vni(44), addr(nobody)).unwrap_err();
            assert!(error.to_string().contains(nobody), "{error}");
        }
        assert_eq!(bpf.slots_in_use(), 1);
    });
}

/// The programs remember what they have looked up, each CPU for itself: on one CPU every answer below would be remembered.
#[test]
#[ignore = "needs root: BPF"]
fn what_was_looked_up_before_a_change_is_forgotten() {
    sandbox(|| {
        let mut one = CpuSet::new();
        one.set(sched_getcpu().unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        let bpf = load_detached().unwrap();
        let programs = programs();
        let frame = Frame::new(PEER, US, 42).bytes();
        let pass = || verdict(&programs, Direction::In, &frame);
        let mut slots = Vec::new();
        for round in 1..=2 {
            assert_eq!([pass(), pass()], [NEXT; 2]);
            assert_eq!(drops(&bpf), [("foreign_vni_in", 2 * round)]);
            let slot = bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
            assert_eq!([pass(), pass()], [NEXT; 2]);
            assert_eq!(counted(&bpf, slot)[2], 2);
            bpf.remove_tunnel(vni(42), addr(PEER)).unwrap();
            slots.push(slot);
        }
        // The second tunnel's packets were not counted to the first one's slot.
        assert_ne!(slots[0], slots[1]);

        bpf.add_tunnel(vni(42), addr(STRANGER)).unwrap();
        assert_eq!([pass(), pass()], [DROP; 2]);
        bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        assert_eq!(pass(), NEXT);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn all_slots_can_be_used_and_used_again() {
    sandbox(|| {
        let bpf = load_detached().unwrap();
        let programs = programs();
        for n in 0..16_384 {
            assert_eq!(bpf.add_tunnel(vni(n + 1), addr(PEER)).unwrap().get(), n);
        }
        let error = bpf.add_tunnel(vni(20_000), addr(PEER)).unwrap_err();
        assert!(error.to_string().contains("16384"), "{error}");
        assert_eq!(
            verdict(&programs, Direction::In, &Frame::new(PEER, US, 8).bytes()),
            NEXT
        );
        assert!(bpf.remove_tunnel(vni(8), addr(PEER)).unwrap());
        let slot = bpf.add_tunnel(vni(20_000), addr(PEER)).unwrap();
        assert_eq!(
            (slot.get(), counted(&bpf, slot)),
            (7, [0; 4]),
            "freed, and zeroed"
        );
    });
}
