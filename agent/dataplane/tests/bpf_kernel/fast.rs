//! The fast path on crafted frames: what goes in, what comes out, and who decides.

use aya::maps::{Array, HashMap, PerCpuArray, PerCpuValues};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use nsm_dataplane::bpf::{Bpf, PathsTaken, Slot, now};
use nsm_ebpf_common::{
    Tunnel, TunnelKey, UNSPECIFIED,
    fast::{Hop, LIFETIME_NS, accepted, accepted_place},
    forward::mac_words,
    mapped,
};

use super::{
    forward::{DEVICE, LOCAL, OWN, PEER, POD, REDIRECT, frame, index_of, load, open},
    support::{Frame, Gso, NEXT, Programs, addr, drops, ip, sandbox, vni},
};

const REMOTE: [u8; 4] = [198, 51, 100, 7];
const CARD: &str = "06:00:00:00:00:08";
const CARD_MAC: [u8; 6] = [6, 0, 0, 0, 0, 8];
const GATEWAY: [u8; 6] = [6, 0, 0, 0, 0, 9];
const VNI: u32 = 42;

/// The programs over a node with a pod link, an underlay `card` and a tunnel to [`REMOTE`]. What they learn is of one CPU, so the thread
/// keeps to one.
struct Node {
    bpf: Bpf,
    programs: Programs,
    link: u32,
    card: u32,
    slot: Slot,
}

impl Node {
    fn new() -> Self {
        keep_to_one_cpu();
        ip("link add pod type veth peer name far");
        ip(&format!(
            "link add card address {CARD} type veth peer name gateway"
        ));
        let (link, card) = (index_of("pod"), index_of("card"));
        let (bpf, programs) = load(link, mapped(REMOTE), DEVICE);
        let slot = bpf
            .add_tunnel(vni(VNI), addr("198.51.100.7"))
            .expect("a slot");
        let node = Self {
            bpf,
            programs,
            link,
            card,
            slot,
        };
        node.set_tunnel(tunnel(link));
        node
    }

    fn set_tunnel(&self, mut tunnel: Tunnel) {
        tunnel.slot = self.slot.get();
        let mut tunnels: HashMap<_, TunnelKey, Tunnel> =
            open("TUNNELS").try_into().expect("a hash");
        let key = TunnelKey {
            vni: VNI,
            peer: mapped(REMOTE),
        };
        tunnels.insert(key, tunnel, 0).expect("inserted");
        // Programs may have another entry cached.
        self.bpf
            .add_tunnel(vni(77), addr("198.51.100.9"))
            .expect("a slot");
        self.bpf
            .remove_tunnel(vni(77), addr("198.51.100.9"))
            .expect("removed");
    }

    fn run(&self, program: &str, interface: u32, frame: &[u8]) -> (i32, Vec<u8>) {
        let (run, left) = self
            .programs
            .run_on(program, interface, frame, Gso::default(), 1);
        (run.return_value.cast_signed(), left)
    }

    /// The pod sends a frame that is never simple, and the kernel sends it to the gateway.
    fn kernel_sends(&self, inner: usize) -> Vec<u8> {
        let mut to_all = frame(POD, OWN);
        to_all[..6].fill(0xff);
        to_all.resize(inner, 0);
        assert!(!self.is_fast(&to_all));
        self.leaves(inner)
    }

    /// A packet of the tunnel leaves to the gateway, whoever sends it.
    fn leaves(&self, inner: usize) -> Vec<u8> {
        let sent =
            Frame::new("192.0.2.1", "198.51.100.7", VNI).with(|it| it.inner = vec![0; inner]);
        let mut sent = sent.bytes();
        sent[..6].copy_from_slice(&GATEWAY);
        sent[6..12].copy_from_slice(&CARD_MAC);
        let (action, left) = self.run("underlay_egress", self.card, &sent);
        assert_eq!((action, &left), (NEXT, &sent));
        sent
    }

    fn pod_sends(&self, frame: &[u8]) -> Vec<u8> {
        let (action, left) = self.run("pod_ingress", self.link, frame);
        assert_eq!(action, REDIRECT);
        left
    }

    /// Whether a frame that the pod sends is encapsulated by BPF.
    fn is_fast(&self, frame: &[u8]) -> bool {
        self.pod_sends(frame) != frame
    }

    /// The kernel accepts a packet of the peer, so long ago.
    fn kernel_accepted(&self, ago_ns: u64) {
        let peer = u32::from_ne_bytes(REMOTE);
        let mut all: Array<_, u64> = open("ACCEPTED").try_into().expect("an array");
        let value = accepted(peer, now().as_nanos() - ago_ns);
        all.set(accepted_place(peer), value, 0).expect("set");
    }

    fn taken(&self) -> PathsTaken {
        self.bpf.paths_taken().expect("counted")
    }
}

fn keep_to_one_cpu() {
    let all = sched_getaffinity(Pid::from_raw(0)).expect("own CPUs");
    let first = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(first.expect("a CPU")).expect("a CPU");
    sched_setaffinity(Pid::from_raw(0), &one).expect("kept");
}

fn tunnel(link: u32) -> Tunnel {
    Tunnel {
        link,
        mac: mac_words(POD),
        peer_mac: mac_words(PEER),
        local: u32::from_ne_bytes(LOCAL),
        own_v4: u32::from_ne_bytes(OWN),
        own_v6: [0xfd; 16],
        ..Tunnel::counted(0)
    }
}

/// Whether the kernel lets BPF take IPv6 out of a tunnel over IPv4: since 6.3.
fn takes_v6_in() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

/// What the peer's pod sends to ours, in a packet of the tunnel as [`Frame`] builds it but for its checksum.
fn from_peer(inner: &[u8], change: impl FnOnce(&mut Frame)) -> Vec<u8> {
    let mut frame = Frame::new("198.51.100.7", "192.0.2.1", VNI);
    frame.inner = inner.to_vec();
    change(&mut frame);
    let mut bytes = frame.bytes();
    bytes[..6].copy_from_slice(&CARD_MAC);
    let sum = bytes[14..34]
        .chunks(2)
        .map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])));
    let sum: u32 = sum.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn to_pod() -> Vec<u8> {
    let mut inner = frame(PEER, [172, 16, 1, 1]);
    inner[..6].copy_from_slice(&POD);
    inner[30..34].copy_from_slice(&OWN);
    inner
}

fn to_pod_v6() -> Vec<u8> {
    let mut inner = [POD, PEER].concat();
    inner.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 44, 17, 64]);
    inner.extend([0xfc; 16]);
    inner.extend([0xfd; 16]);
    inner.resize(98, 3);
    inner
}

#[test]
#[ignore = "needs root: BPF"]
fn a_pods_frame_leaves_as_the_kernel_sent_the_last_one() {
    sandbox(|| {
        let node = Node::new();
        let own = frame(POD, OWN);
        assert!(!node.is_fast(&own), "nothing is known of the way");
        node.leaves(own.len() + 1);
        assert!(!node.is_fast(&own), "what others send teaches nothing");
        let sent = node.kernel_sends(own.len());
        let left = node.pod_sends(&own);
        assert_eq!(left[50..], own);
        assert_eq!(left[..14], sent[..14], "to the same gateway");
        assert_eq!(left[26..34], sent[26..34], "between the same addresses");
        assert_eq!(left[22], sent[22], "TTL");
        assert_eq!(left[36..40], sent[36..40], "UDP port and length");
        assert_eq!(left[42..50], sent[42..50], "the VXLAN header");
        let port = u16::from_be_bytes([left[34], left[35]]);
        assert!((32_768..=60_999).contains(&port), "{port}");

        // What leaves is counted at the underlay, and nothing is learned from it.
        let before = node.bpf.counters(node.slot).expect("counters").sent;
        node.run("underlay_egress", node.card, &left);
        let after = node.bpf.counters(node.slot).expect("counters").sent;
        assert_eq!(after.packets - before.packets, 1);
        assert_eq!(after.bytes - before.bytes, left.len() as u64);
        let expected = PathsTaken {
            fast_out: 1,
            slow_out: 3,
            ..PathsTaken::default()
        };
        assert_eq!(node.taken(), expected);
        assert_eq!(drops(&node.bpf), []);
        node.bpf.detach_and_unpin().expect("unpinned");
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn what_is_larger_older_or_not_simple_asks_the_kernel() {
    sandbox(|| {
        let node = Node::new();
        let own = frame(POD, OWN);
        node.kernel_sends(own.len());
        let mut longer = own.clone();
        longer.push(0);
        assert!(!node.is_fast(&longer), "larger than what was seen to pass");
        node.kernel_sends(longer.len());
        assert!(node.is_fast(&longer) && node.is_fast(&own));
        let mut fragment = own.clone();
        fragment[20] = 0x20;
        let mut to_all = own.clone();
        to_all[..6].fill(0xff);
        let mut options = own.clone();
        options[14] = 0x46;
        for slow in [fragment, to_all, options] {
            assert!(!node.is_fast(&slow));
        }

        let mut hops: PerCpuArray<_, Hop> = open("HOPS").try_into().expect("an array");
        let place = nsm_ebpf_common::fast::hop_place(u32::from_ne_bytes(REMOTE));
        let change = |hops: &mut PerCpuArray<_, Hop>, change: &dyn Fn(&mut Hop)| {
            let mut all: Vec<Hop> = hops.get(&place, 0).expect("read").iter().copied().collect();
            all.iter_mut().for_each(change);
            let all = PerCpuValues::try_from(all).expect("of each CPU");
            hops.set(place, all, 0).expect("set");
        };
        change(&mut hops, &|hop| {
            hop.learned_ns = hop.learned_ns.saturating_sub(LIFETIME_NS);
        });
        assert!(!node.is_fast(&own), "too long ago");
        node.kernel_sends(own.len());
        assert!(node.is_fast(&own));
        change(&mut hops, &|hop| hop.local ^= 1);
        assert!(!node.is_fast(&own), "the kernel sends from another address");
        node.bpf.detach_and_unpin().expect("unpinned");
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_peers_frame_comes_out_as_it_was_once_the_kernel_has_accepted_one() {
    sandbox(|| {
        let node = Node::new();
        let inner = to_pod();
        let whole = from_peer(&inner, |_| {});
        let comes = |frame: &[u8]| node.run("underlay_ingress", node.card, frame);
        assert_eq!(
            comes(&whole),
            (NEXT, whole.clone()),
            "the kernel was not asked yet"
        );
        node.kernel_accepted(0);
        assert_eq!(comes(&whole), (REDIRECT, inner.clone()));
        let v6 = to_pod_v6();
        let whole_v6 = from_peer(&v6, |_| {});
        let (expected, fast) = if takes_v6_in() {
            ((REDIRECT, v6), 2)
        } else {
            ((NEXT, whole_v6.clone()), 1)
        };
        assert_eq!(comes(&whole_v6), expected);
        let counted = node.bpf.counters(node.slot).expect("counters").received;
        assert_eq!(counted.packets, 3, "at the underlay on either path");
        assert_eq!(node.taken().fast_in, fast);
        node.kernel_accepted(2 * LIFETIME_NS);
        assert_eq!(comes(&whole).0, NEXT, "too long ago");
        assert_eq!(drops(&node.bpf), []);
        node.bpf.detach_and_unpin().expect("unpinned");
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn what_only_the_kernel_may_judge_is_left_to_it() {
    sandbox(|| {
        let node = Node::new();
        node.kernel_accepted(0);
        let comes = |frame: &[u8]| node.run("underlay_ingress", node.card, frame).0;
        let good = from_peer(&to_pod(), |_| {});
        assert_eq!(comes(&good), REDIRECT);
        // The card's address, the traffic class with congestion, the header's checksum, a UDP checksum, a reserved flag of VXLAN; inside: both
        // Ethernet addresses, a fragment, and who gets it.
        for (at, value) in [
            (5, 0x77),
            (15, 3),
            (24, good[24] ^ 1),
            (40, 1),
            (42, 0x88),
            (55, 0x77),
            (61, 0x77),
            (70, 0x20),
            (83, 0x77),
        ] {
            let mut frame = good.clone();
            frame[at] = value;
            if at == 15 {
                // With the right checksum.
                frame[25] = frame[25].wrapping_sub(3);
            }
            assert_eq!(comes(&frame), NEXT, "{at}");
        }
        assert_eq!(
            comes(&from_peer(&to_pod(), |it| it.options = vec![1; 4])),
            NEXT
        );
        let mut padded = good.clone();
        padded.push(0);
        assert_eq!(comes(&padded), NEXT, "longer than it says");

        for other in [
            Tunnel {
                local: 0,
                ..tunnel(node.link)
            },
            Tunnel {
                own_v4: 0,
                own_v6: UNSPECIFIED,
                ..tunnel(node.link)
            },
            Tunnel {
                link: 0,
                ..tunnel(node.link)
            },
            Tunnel {
                flags: 2,
                ..tunnel(node.link)
            },
        ] {
            node.set_tunnel(other);
            assert_eq!(comes(&good), NEXT, "{other:?}");
        }
        node.set_tunnel(tunnel(node.link));
        assert_eq!(comes(&good), REDIRECT);
        node.bpf.detach_and_unpin().expect("unpinned");
    });
}
