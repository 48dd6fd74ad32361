//! The programs under real traffic: two nodes joined by a cable, a VXLAN tunnel between them.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    process, thread,
    time::{Duration, Instant},
};

use super::support::{addr, config, drops, ip, run, sandbox, vni};
use nix::sched::{CloneFlags, setns, unshare};
use nsm_dataplane::bpf::{Bpf, BpfConfig, Hook, Slot, TunnelCounters, now};

/// A network namespace; gone with the last descriptor.
struct Netns(File);

impl Netns {
    fn current() -> Self {
        Self(File::open("/proc/thread-self/ns/net").expect("own namespace"))
    }

    fn new() -> Self {
        let outer = Self::current();
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
        let new = Self::current();
        ip("link set lo up");
        setns(&outer.0, CloneFlags::CLONE_NEWNET).expect("back");
        new
    }

    fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        let outer = Self::current();
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("into");
        let result = act();
        setns(&outer.0, CloneFlags::CLONE_NEWNET).expect("back");
        result
    }

    /// A path that child processes can use.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.0.as_raw_fd())
    }
}

struct Node {
    netns: Netns,
    bpf: Bpf,
    slot: Slot,
}

impl Node {
    fn counters(&self) -> TunnelCounters {
        self.bpf.counters(self.slot).expect("counters")
    }
}

/// Two nodes, 10.0.0.1 and 10.0.0.2 on the cable `up0`, 172.16.0.1 and 172.16.0.2 in the tunnel with VNI 42.
fn nodes(hook: Hook) -> [Node; 2] {
    let namespaces = [Netns::new(), Netns::new()];
    namespaces[0].within(|| {
        ip(&format!(
            "link add up0 type veth peer name up0 netns {}",
            namespaces[1].path()
        ));
    });
    let mut number = 0_usize;
    namespaces.map(|netns| {
        number += 1;
        let (own, other) = (number, 3 - number);
        netns.within(|| {
            ip(&format!("addr add 10.0.0.{own}/24 dev up0"));
            ip("link set up0 up");
            ip(&format!(
                "link add vx0 type vxlan id 42 local 10.0.0.{own} remote 10.0.0.{other} dstport 4789 nolearning"
            ));
            ip(&format!("addr add 172.16.0.{own}/24 dev vx0"));
            // IPv6 would speak up by itself, and be counted.
            ip("link set vx0 addrgenmode none");
            ip("link set vx0 up");
        });
        let bpf = netns.within(|| {
            Bpf::load(&BpfConfig {
                pin_dir: format!("/sys/fs/bpf/node{own}").into(),
                hook: Some(hook),
                ..config(&["up0"])
            })
        });
        let bpf = bpf.expect("load");
        let slot = bpf.add_tunnel(vni(42), addr(&format!("10.0.0.{other}"))).expect("a slot");
        Node { netns, bpf, slot }
    })
}

/// Both directions between both nodes count the same, once what is on its way has arrived.
fn assert_balanced(nodes: &[Node; 2]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let [a, b] = [nodes[0].counters(), nodes[1].counters()];
        let sent = [(a.tx_packets, a.tx_bytes), (b.tx_packets, b.tx_bytes)];
        let received = [(b.rx_packets, b.rx_bytes), (a.rx_packets, a.rx_bytes)];
        if sent == received {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "sent {sent:?}, received {received:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn ping_is_counted(hook: Hook) {
    let nodes = nodes(hook);
    nodes[0]
        .netns
        .within(|| run("ping", "-q -c 5 -i 0.01 -w 5 172.16.0.2"));
    assert_balanced(&nodes);
    let counters = nodes[0].counters();
    // Five echoes and an ARP request or two.
    assert!((6..=8).contains(&counters.tx_packets), "{counters:?}");
    assert_eq!(counters.tx_packets, counters.rx_packets);
    let last = counters.last_rx.expect("heard of");
    assert!(
        last <= now() && now() - last < Duration::from_secs(5),
        "{last:?}"
    );
    assert_eq!(drops(&nodes[0].bpf), []);

    // Another host on the cable claims our VNI.
    let mut events = nodes[1].bpf.take_events().expect("the reader");
    nodes[0].netns.within(|| {
        ip("addr add 10.0.0.9/24 dev up0");
        ip("link set vx0 type vxlan id 42 local 10.0.0.9");
    });
    let before = nodes[1].counters();
    let lost = nodes[0].netns.within(|| {
        process::Command::new("ping")
            .args(["-q", "-c", "3", "-i", "0.01", "-W", "1", "172.16.0.2"])
            .output()
            .expect("ping")
    });
    assert!(!lost.status.success(), "the tunnel must not carry it");
    assert!(nodes[1].bpf.drops().expect("drops")["wrong_source"] >= 3);
    assert_eq!(nodes[1].counters().rx_packets, before.rx_packets);
    let event = events.next().expect("an event");
    assert_eq!((event.vni, event.source), (42, addr("10.0.0.9")));
    assert_eq!(event.expected, addr("10.0.0.1"));
    for node in nodes {
        node.netns
            .within(|| node.bpf.detach_and_unpin())
            .expect("removed");
    }
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn ping_through_a_tunnel_is_counted_by_tcx() {
    sandbox(|| ping_is_counted(Hook::Tcx));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn ping_through_a_tunnel_is_counted_by_clsact() {
    sandbox(|| ping_is_counted(Hook::Clsact));
}

/// Sends so many bytes over TCP from the first node to the second.
fn transfer(nodes: &[Node; 2], bytes: usize) {
    let listener = nodes[1]
        .netns
        .within(|| TcpListener::bind("172.16.0.2:7000"))
        .expect("bind");
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("read");
        all.len()
    });
    let stream = nodes[0]
        .netns
        .within(|| TcpStream::connect("172.16.0.2:7000"));
    let mut stream = stream.expect("connect");
    stream.write_all(&vec![7; bytes]).expect("write");
    drop(stream);
    assert_eq!(reader.join().expect("reader"), bytes);
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn large_packets_count_as_what_the_wire_sees() {
    const BYTES: usize = 4_000_000;
    sandbox(|| {
        let nodes = nodes(Hook::Tcx);
        // As it comes: super-packets pass both hooks unsegmented.
        transfer(&nodes, BYTES);
        assert_balanced(&nodes);
        let whole = nodes[0].counters();
        let segments = BYTES as u64 / 1398;
        assert!(
            whole.tx_packets > segments,
            "{whole:?}: at least {segments} segments"
        );
        assert!(
            whole.tx_bytes > BYTES as u64 + segments * 104,
            "{whole:?}: and their headers"
        );

        // The cable segments: the sender's hook sees super-packets, the receiver's what is on the wire. They must agree.
        for node in &nodes {
            node.netns.within(|| {
                segment_in_software("up0");
            });
        }
        transfer(&nodes, BYTES);
        assert_balanced(&nodes);
        for node in nodes {
            node.netns
                .within(|| node.bpf.detach_and_unpin())
                .expect("removed");
        }
    });
}

/// Lets the kernel segment before the cable, so that single packets cross it.
fn segment_in_software(interface: &str) {
    // gso_max_segs of one: nothing larger is handed to the device, and what comes is segmented above it.
    ip(&format!("link set {interface} gso_max_segs 1"));
}
