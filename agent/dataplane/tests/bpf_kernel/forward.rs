//! The programs of forwarding on crafted frames: what of a pod's frames leaves, and that nothing passes without an entry.

use aya::maps::{Array, HashMap, Map, MapData};
use nsm_dataplane::bpf::Bpf;
use nsm_ebpf_common::{
    UNSPECIFIED,
    forward::{Device, Forward, MAX_SOURCES, Prefix, mac_words},
    mapped,
};

use super::support::{DROP, Gso, PIN_DIR, Programs, drops, ip, load_detached, programs, sandbox};

/// TC_ACT_REDIRECT.
const REDIRECT: i32 = 7;

const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: [u8; 4] = [172, 16, 1, 2];

fn open(name: &str) -> Map {
    let map = MapData::from_pin(format!("{PIN_DIR}/{name}")).expect("a pinned map");
    Map::from_map_data(map).expect("a map")
}

/// Programs that know the pod link with this index.
fn load(link: u32, remote: [u8; 16], device: Device) -> (Bpf, Programs) {
    let bpf = load_detached().expect("loaded");
    let mut sources = [Prefix::default(); MAX_SOURCES];
    sources[0] = Prefix::new(mapped(OWN), 128);
    let entry = Forward {
        link,
        device: 3,
        vni: 42,
        slot: 7,
        checked: 1,
        local: UNSPECIFIED,
        remote,
        mac: mac_words(POD),
        reserved: 0,
        sources,
    };
    let mut forward: HashMap<_, u32, Forward> = open("FORWARD").try_into().expect("a hash");
    forward.insert(link, entry, 0).expect("inserted");
    let mut devices: Array<_, Device> = open("DEVICES").try_into().expect("an array");
    devices.set(3, device, 0).expect("set");
    (bpf, programs())
}

const DEVICE: Device = Device {
    index: 1,
    port: 4789,
};

fn frame(source_mac: [u8; 6], source: [u8; 4]) -> Vec<u8> {
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

fn index_of(name: &str) -> u32 {
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
