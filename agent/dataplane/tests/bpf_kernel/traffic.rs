//! The programs under real traffic: two nodes joined by a cable, a VXLAN tunnel between them.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process, thread,
    time::{Duration, Instant},
};

use super::support::{Frame, addr, config, drops, for_each_hook, ip, run, sandbox, vni};
use nix::sched::{CloneFlags, setns, unshare};
use nsm_core::link::{Count, Traffic};
use nsm_dataplane::bpf::{Bpf, BpfConfig, Hook, Slot, now};

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
    fn counters(&self) -> Traffic {
        self.bpf.counters(self.slot).expect("counters")
    }
}

/// Two nodes, 10.0.0.1 and 10.0.0.2 on the cable `up0`, 172.16.0.1 and 172.16.0.2 in the tunnel with VNI 42.
fn nodes(hook: Hook) -> [Node; 2] {
    prepared_nodes(hook, || {})
}

/// Likewise, after something was done to both cables' ends.
fn prepared_nodes(hook: Hook, prepare: impl Fn()) -> [Node; 2] {
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
            prepare();
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
        let both = |count: Count| (count.packets, count.bytes);
        let sent = [both(a.sent), both(b.sent)];
        let received = [both(b.received), both(a.received)];
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

/// The tunnel carries pings of its peer, and none of another host on the cable: what that one sends is dropped and counted.
fn wrong_source_is_dropped(nodes: [Node; 2]) {
    let ping = || {
        nodes[0].netns.within(|| {
            process::Command::new("ping")
                .args(["-q", "-c", "3", "-i", "0.01", "-W", "1", "172.16.0.2"])
                .output()
                .expect("ping")
        })
    };
    assert!(ping().status.success(), "the peer's own");
    assert_eq!(drops(&nodes[1].bpf), []);
    nodes[0].netns.within(|| {
        ip("addr add 10.0.0.9/24 dev up0");
        ip("link set vx0 type vxlan id 42 local 10.0.0.9");
    });
    let before = nodes[1].counters();
    assert!(!ping().status.success(), "the tunnel must not carry it");
    let dropped = nodes[1].bpf.drops().expect("drops")["wrong_source"];
    assert!(dropped >= 3, "{dropped}");
    assert_eq!(nodes[1].counters().received, before.received);
    remove(nodes);
}

fn remove(nodes: [Node; 2]) {
    for node in nodes {
        node.netns
            .within(|| node.bpf.detach_and_unpin())
            .expect("removed");
    }
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn what_a_ping_through_a_tunnel_sends_is_counted() {
    for_each_hook(|hook| {
        let nodes = nodes(hook);
        nodes[0]
            .netns
            .within(|| run("ping", "-q -c 5 -i 0.01 -w 5 172.16.0.2"));
        assert_balanced(&nodes);
        let counters = nodes[0].counters();
        // Five echoes and an ARP request or two.
        assert!((6..=8).contains(&counters.sent.packets), "{counters:?}");
        assert_eq!(counters.sent.packets, counters.received.packets);
        let last = counters.received.last.expect("heard of");
        assert!(
            last <= now() && now().since(last) < Duration::from_secs(5),
            "{last:?}"
        );
        assert_eq!(drops(&nodes[0].bpf), []);
        remove(nodes);
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_host_that_claims_our_vni_does_not_get_through() {
    for_each_hook(|hook| wrong_source_is_dropped(nodes(hook)));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn the_source_is_checked_behind_an_ingress_qdisc_too() {
    sandbox(|| {
        let nodes = prepared_nodes(Hook::Clsact, || {
            run("tc", "qdisc add dev up0 ingress");
        });
        wrong_source_is_dropped(nodes);
    });
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
    for_each_hook(|hook| {
        let nodes = nodes(hook);
        // As it comes: super-packets pass both hooks unsegmented.
        transfer(&nodes, BYTES);
        assert_balanced(&nodes);
        let whole = nodes[0].counters();
        let segments = BYTES as u64 / 1398;
        assert!(
            whole.sent.packets > segments,
            "{whole:?}: at least {segments} segments"
        );
        assert!(
            whole.sent.bytes > BYTES as u64 + segments * 104,
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
        remove(nodes);
    });
}

/// Lets the kernel segment before the cable, so that single packets cross it.
fn segment_in_software(interface: &str) {
    // gso_max_segs of one: nothing larger is handed to the device, and what comes is segmented above it.
    ip(&format!("link set {interface} gso_max_segs 1"));
}

/// Sends a frame out of an interface with only its Ethernet header in the linear part of the kernel's buffer.
fn send_scattered(interface: &str, frame: &[u8]) {
    use nix::libc::{
        AF_PACKET, SOCK_RAW, SOL_PACKET, sendto, setsockopt, sockaddr_ll, socket, socklen_t,
    };
    const PACKET_VNET_HDR: i32 = 15;
    // struct virtio_net_hdr: flags, gso_type, then hdr_len: how much is to be linear. The kernel honours that from a page on.
    const ETHERNET_ONLY: [u8; 10] = [0, 0, 14, 0, 0, 0, 0, 0, 0, 0];
    assert!(frame.len() > 4096);

    // SAFETY: takes no pointers.
    let raw = unsafe { socket(AF_PACKET, SOCK_RAW, 0) };
    assert!(
        raw >= 0,
        "packet socket: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let on = 1_i32;
    // SAFETY: the option is an int, which outlives the call.
    let set = unsafe {
        let value = (&raw const on).cast();
        let length = size_of::<i32>() as socklen_t;
        setsockopt(
            socket.as_raw_fd(),
            SOL_PACKET,
            PACKET_VNET_HDR,
            value,
            length,
        )
    };
    assert_eq!(
        set,
        0,
        "PACKET_VNET_HDR: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: plain integers, for which zero is a value.
    let mut to: sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = AF_PACKET as u16;
    to.sll_protocol = u16::from_ne_bytes([frame[12], frame[13]]);
    to.sll_ifindex = nix::net::if_::if_nametoindex(interface)
        .expect("the interface")
        .cast_signed();
    let message = [&ETHERNET_ONLY, frame].concat();
    // SAFETY: message and address outlive the call, with the lengths given.
    let sent = unsafe {
        let to_length = size_of::<sockaddr_ll>() as socklen_t;
        let to = (&raw const to).cast();
        sendto(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
            to,
            to_length,
        )
    };
    assert_eq!(
        sent,
        message.len() as isize,
        "{}",
        std::io::Error::last_os_error()
    );
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn headers_outside_the_linear_part_are_read() {
    const US: [&str; 2] = ["192.0.2.1", "2001:db8:1::1"];
    const PEER: [&str; 2] = ["198.51.100.7", "2001:db8:2::7"];
    sandbox(|| {
        ip("link add a0 mtu 9000 type veth peer name b0 mtu 9000");
        for name in ["a0", "b0"] {
            ip(&format!("link set {name} addrgenmode none"));
            ip(&format!("link set {name} up"));
        }
        let bpf = Bpf::load(&config(&["a0", "b0"])).expect("load");
        for (us, peer) in US.into_iter().zip(PEER) {
            let slot = bpf.add_tunnel(vni(42), addr(peer)).expect("a slot");
            let scattered = |source, destination| {
                Frame::new(source, destination, 42)
                    .with(|f| f.inner = vec![0; 5000])
                    .bytes()
            };
            // To the peer: counted on its way out, and nobody's where it comes in.
            let frame = scattered(us, peer);
            send_scattered("a0", &frame);
            let counters = bpf.counters(slot).expect("counters");
            assert_eq!(
                (counters.sent.packets, counters.sent.bytes),
                (1, frame.len() as u64)
            );
            // From the peer: the other way round.
            send_scattered("a0", &scattered(peer, us));
            let deadline = Instant::now() + Duration::from_secs(5);
            while bpf.counters(slot).expect("counters").received.packets == 0 {
                assert!(Instant::now() < deadline, "{:?}", drops(&bpf));
                thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(
                bpf.counters(slot).expect("counters").received.bytes,
                frame.len() as u64
            );
        }
        assert_eq!(drops(&bpf), [("wrong_destination", 2), ("wrong_source", 2)]);
    });
}
