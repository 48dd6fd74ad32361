//! The programs of forwarding on crafted frames: what of a pod's frames leaves, and that nothing passes without an entry.

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use nsm_dataplane::bpf::Bpf;
use nsm_ebpf_common::{
    Counters, Tunnel, UNSPECIFIED,
    forward::{Device, Forward, MAX_SOURCES, Prefix, mac_words, tunnel_flags},
    mapped,
};

use super::support::{DROP, Gso, PIN_DIR, Programs, drops, ip, load_detached, programs, sandbox};

/// TC_ACT_REDIRECT.
pub(crate) const REDIRECT: i32 = 7;

pub(crate) const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const OWN: [u8; 4] = [172, 16, 1, 2];
pub(crate) const LOCAL: [u8; 4] = [192, 0, 2, 1];

pub(crate) fn open(name: &str) -> Map {
    let map = MapData::from_pin(format!("{PIN_DIR}/{name}")).expect("a pinned map");
    Map::from_map_data(map).expect("a map")
}

/// Programs whose maps have the pod link with this index, whose frames go through a tunnel.
pub(crate) fn load(link: u32, remote: [u8; 16], device: Device) -> (Bpf, Programs) {
    load_with(link, remote, Tunnel::counted(0), device)
}

/// Likewise, with the pod of this node to which they go.
fn load_with(link: u32, remote: [u8; 16], pod: Tunnel, device: Device) -> (Bpf, Programs) {
    let bpf = load_detached().expect("loaded");
    let mut sources = [Prefix::default(); MAX_SOURCES];
    sources[0] = Prefix::new(mapped(OWN), 128);
    let entry = Forward {
        link,
        device: 3,
        vni: 42,
        slot: 7,
        checked: 1,
        local: mapped(LOCAL),
        remote,
        mac: mac_words(POD),
        reserved: 0,
        sources,
        pod,
    };
    let mut forward: HashMap<_, u32, Forward> = open("FORWARD").try_into().expect("a hash");
    forward.insert(link, entry, 0).expect("inserted");
    let mut devices: Array<_, Device> = open("DEVICES").try_into().expect("an array");
    devices.set(3, device, 0).expect("set");
    (bpf, programs())
}

pub(crate) const DEVICE: Device = Device {
    index: 1,
    port: 4789,
};

pub(crate) fn frame(source_mac: [u8; 6], source: [u8; 4]) -> Vec<u8> {
    let mut frame = [PEER, source_mac].concat();
    frame.extend([0x08, 0x00, 0x45, 0, 0, 84, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(source);
    frame.extend([172, 16, 1, 1]);
    frame.resize(98, 0);
    frame
}

/// Runs a program on a frame that came in by the interface with this index.
fn run(programs: &Programs, program: &str, link: u32, frame: &[u8]) -> i32 {
    let (run, left) = programs.run_on(program, link, frame, Gso::default(), 1);
    assert_eq!(left, frame, "the frame itself stays as it is");
    run.return_value.cast_signed()
}

/// Frames and bytes at the pod link of a slot, in and out.
fn counted(slot: u32) -> [(u64, u64); 2] {
    let links: PerCpuArray<_, Counters> = open("LINKS").try_into().expect("an array");
    let cpus = links.get(&slot, 0).expect("a slot");
    let sum = |value: fn(&Counters) -> (u64, u64)| {
        let values = cpus.iter().map(value);
        values.fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1))
    };
    [
        sum(|it| (it.in_packets, it.in_bytes)),
        sum(|it| (it.out_packets, it.out_bytes)),
    ]
}

pub(crate) fn index_of(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).expect("a link")
}

#[test]
#[ignore = "needs root: BPF"]
fn a_pods_own_frames_leave_through_its_tunnel_and_no_others() {
    sandbox(|| {
        ip("link add pod type veth peer name far");
        let link = index_of("pod");
        let six = "fd00:2::1".parse::<std::net::Ipv6Addr>().expect("address");
        for remote in [mapped([198, 51, 100, 7]), six.octets()] {
            let (bpf, programs) = load(link, remote, DEVICE);
            let sends = |frame: &[u8]| run(&programs, "pod_ingress", link, frame);
            assert_eq!(sends(&frame(POD, OWN)), REDIRECT);
            assert_eq!(drops(&bpf), []);
            assert_eq!(sends(&frame(PEER, OWN)), DROP);
            assert_eq!(sends(&frame(POD, [172, 16, 1, 3])), DROP);
            assert_eq!(drops(&bpf), [("pod_wrong_mac", 1), ("pod_wrong_source", 1)]);
            bpf.detach_and_unpin().expect("unpinned");
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_pods_own_frames_reach_the_pod_of_its_connection_and_no_other() {
    sandbox(|| {
        ip("link add pod type veth peer name far");
        let link = index_of("pod");
        for flags in [0, tunnel_flags::SAME_NAMESPACE] {
            let pod = Tunnel {
                link: index_of("far"),
                flags,
                mac: mac_words(PEER),
                ..Tunnel::counted(8)
            };
            // No device: none is needed.
            let (bpf, programs) = load_with(link, UNSPECIFIED, pod, Device::default());
            let sends = |frame: &[u8]| run(&programs, "pod_ingress", link, frame);
            assert_eq!(sends(&frame(POD, OWN)), REDIRECT);
            assert_eq!(counted(7), [(0, 0), (1, 98)], "sent by the one pod");
            assert_eq!(counted(8), [(1, 98), (0, 0)], "received by the other");
            let elsewhere = [&[2, 0, 0, 0, 0, 3][..], &frame(POD, OWN)[6..]].concat();
            let to_all = [&[0xff; 6][..], &frame(POD, OWN)[6..]].concat();
            assert_eq!(sends(&to_all), REDIRECT);
            assert_eq!(sends(&elsewhere), DROP);
            assert_eq!(sends(&frame(PEER, OWN)), DROP);
            assert_eq!(sends(&frame(POD, [172, 16, 1, 3])), DROP);
            let reasons = ["pod_wrong_destination", "pod_wrong_mac", "pod_wrong_source"];
            assert_eq!(drops(&bpf), reasons.map(|reason| (reason, 1)));
            assert_eq!(counted(7), [(0, 0), (2, 196)], "nothing that was dropped");
            bpf.detach_and_unpin().expect("unpinned");
        }
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn what_has_no_entry_goes_nowhere() {
    sandbox(|| {
        ip("link add pod type veth peer name far");
        let (link, other) = (index_of("pod"), index_of("far"));
        let (bpf, programs) = load(link, mapped([198, 51, 100, 7]), Device::default());
        let own = frame(POD, OWN);
        assert_eq!(run(&programs, "pod_ingress", other, &own), DROP);
        assert_eq!(run(&programs, "pod_ingress", link, &own), DROP, "no device");
        assert_eq!(
            run(&programs, "external_ingress", link, &own),
            DROP,
            "of no tunnel"
        );
        assert_eq!(
            drops(&bpf),
            [
                ("not_encapsulated", 1),
                ("pod_unknown_link", 1),
                ("tunnel_unknown", 1)
            ]
        );
        bpf.detach_and_unpin().expect("unpinned");
    });
}
