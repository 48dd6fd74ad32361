//! Connections through the tunnels of two nodes: pod links, programs, external devices and fences as an agent has them.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use nsm_core::link::{LinkAlias, LinkSpec, VxlanSpec, vxlan_overhead};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig},
    forward::{Forwarding, TunnelDevices},
    links::Links,
    netns::Netns,
};
use tokio::runtime::Runtime;

use crate::support::{
    add_foreign_vxlan, domain, eventually, inside, ip, ip_tool, link, link_names, netns, two_nodes,
};

pub(crate) const PORT: u16 = 4789;

/// Runs a test in a mount namespace with a BPF filesystem of its own, where every pin goes with it.
pub(crate) fn sandbox(test: impl FnOnce(&Runtime) + Send) {
    crate::support::in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, private, none).unwrap();
        let bpffs = Some("bpf");
        mount(bpffs, "/sys/fs/bpf", bpffs, MsFlags::empty(), none).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        test(&runtime.unwrap());
    });
}

/// A node with an agent's dataplane, and a pod.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) pod: Netns,
    pub(crate) spec: VxlanSpec,
    forwarding: Forwarding,
    pub(crate) bpf: Arc<Bpf>,
}

impl Node {
    pub(crate) fn start(runtime: &Runtime, netns: &Netns, spec: VxlanSpec, pod: Netns) -> Self {
        Self::start_with(runtime, netns, spec, pod, false)
    }

    /// With or without a fast path.
    fn start_with(
        runtime: &Runtime,
        netns: &Netns,
        spec: VxlanSpec,
        pod: Netns,
        slow_only: bool,
    ) -> Self {
        let config = BpfConfig {
            pin_dir: format!("/sys/fs/bpf/{}", netns.inode()).into(),
            interfaces: vec!["eth0".to_owned()],
            mount_bpffs: false,
            slow_only,
            ..BpfConfig::default()
        };
        let bpf = Arc::new(inside(netns, || Bpf::load(&config).unwrap()));
        let links = Links::in_namespace(netns.clone());
        let devices = TunnelDevices::new(Arc::clone(&bpf), domain());
        let domain = domain();
        let started = Forwarding::start(links, Arc::new(devices), &domain);
        Self {
            netns: netns.clone(),
            pod,
            spec,
            forwarding: runtime.block_on(started).unwrap(),
            bpf,
        }
    }

    pub(crate) fn up(&self, runtime: &Runtime) -> nsm_dataplane::links::PodLink {
        let up = self.forwarding.up(&self.pod, &self.spec);
        runtime.block_on(up).unwrap()
    }

    /// One more connection.
    pub(crate) fn add(&self, runtime: &Runtime, pod: &Netns, spec: &VxlanSpec) {
        runtime.block_on(self.forwarding.up(pod, spec)).unwrap();
    }

    pub(crate) fn remove(&self, runtime: &Runtime, alias: &LinkAlias) {
        runtime.block_on(self.forwarding.down(alias)).unwrap();
    }

    pub(crate) fn close(&self, runtime: &Runtime) {
        let down = self.forwarding.down(&self.spec.link.alias);
        runtime.block_on(down).unwrap();
        runtime.block_on(self.forwarding.close()).unwrap();
        self.bpf.detach_and_unpin().unwrap();
        assert_eq!(link_names(&self.netns), ["eth0"]);
        assert_eq!(link_names(&self.pod), [""; 0]);
        let tables = inside(&self.netns, || {
            let nft = &mut std::process::Command::new("nft");
            nft.args(["list", "tables"]).output().unwrap().stdout
        });
        assert_eq!(String::from_utf8(tables).unwrap(), "");
    }
}

/// A connection of one side's pod, by the last byte of its addresses.
pub(crate) fn spec(own: u8, other: u8, local: &str, remote: &str) -> VxlanSpec {
    VxlanSpec {
        link: LinkSpec {
            mtu: 1500 - vxlan_overhead(ip(remote)),
            ..link(own, other)
        },
        sources: vec![],
        vni: 77.try_into().unwrap(),
        local: ip(local),
        remote: ip(remote),
        port: PORT,
    }
}

/// Two nodes that are joined, and a connection between their pods that is up.
pub(crate) fn joined(runtime: &Runtime, local: [&str; 2]) -> (Node, Node) {
    joined_with(runtime, local, false)
}

/// Likewise, with or without a fast path.
pub(crate) fn joined_with(runtime: &Runtime, local: [&str; 2], slow_only: bool) -> (Node, Node) {
    let nodes = two_nodes();
    let [near, far] = local;
    let start = |node, spec| Node::start_with(runtime, node, spec, netns(), slow_only);
    let one = start(&nodes.0, spec(1, 2, near, far));
    let two = start(&nodes.1, spec(2, 1, far, near));
    assert!(one.up(runtime).pod.created && two.up(runtime).pod.created);
    (one, two)
}

/// Many segments, so that what the kernel offloads is used; each byte is compared.
pub(crate) fn stream(from: &Netns, to: &Netns, address: &str) {
    const LENGTH: usize = 4 << 20;
    let data: Vec<u8> = (0..LENGTH)
        .map(|at| (at * 31 + at / 251).to_le_bytes()[0])
        .collect();
    let listener = inside(to, || TcpListener::bind(address).unwrap());
    let receiver = thread::spawn(move || {
        let mut received = Vec::new();
        let (mut socket, _) = listener.accept().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket.read_to_end(&mut received).unwrap();
        received
    });
    let mut socket = inside(from, || TcpStream::connect(address).unwrap());
    socket.write_all(&data).unwrap();
    drop(socket);
    assert!(receiver.join().unwrap() == data, "other bytes came");
}

/// Sends a datagram from one namespace to another and back. Retries, for a datagram may be lost.
pub(crate) fn echo(from: &Netns, to: &Netns, address: &str, size: usize) {
    let address: SocketAddr = address.parse().unwrap();
    let (server, client) = (
        inside(to, || UdpSocket::bind(address).unwrap()),
        inside(from, || {
            UdpSocket::bind(if address.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            })
            .unwrap()
        }),
    );
    for socket in [&server, &client] {
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
    }
    client.connect(address).unwrap();
    let sent: Vec<u8> = (0..size).map(|at| at.to_le_bytes()[0]).collect();
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = vec![0; 65536];
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                if let Ok((length, peer)) = server.recv_from(&mut buffer) {
                    server.send_to(&buffer[..length], peer).unwrap();
                }
            }
        });
        eventually(&format!("the echo of {size} bytes from {address}"), || {
            client.send(&sent).map_err(|error| error.to_string())?;
            let mut buffer = vec![0; 65536];
            let length = client
                .recv(&mut buffer)
                .map_err(|error| error.to_string())?;
            if buffer[..length] == sent {
                Ok(())
            } else {
                Err("another datagram came back".to_owned())
            }
        });
        drop(stop);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn streams_and_full_packets_pass_a_tunnel() {
    sandbox(|runtime| {
        for local in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
            let (one, two) = joined(runtime, local);
            echo(&one.pod, &two.pod, "172.16.1.2:7000", 100);
            echo(&two.pod, &one.pod, "[fd00:1::1]:7000", 100);
            // A full packet fits, and a larger one is cut by the pod.
            let full = one.spec.link.mtu as usize - 28;
            echo(&one.pod, &two.pod, "172.16.1.2:7001", full);
            echo(&one.pod, &two.pod, "172.16.1.2:7002", 20_000);
            stream(&one.pod, &two.pod, "172.16.1.2:7003");
            stream(&two.pod, &one.pod, "[fd00:1::1]:7004");

            let passed = |node: &Node| node.forwarding.passed(&node.spec.link.alias).unwrap();
            assert!(passed(&one).link.sent.packets > 100);
            // The first pod spoke by itself before the second node was there, and what it sends last may still be on its way.
            eventually("what was sent arrives", || {
                let (a, b) = (passed(&one).link, passed(&two).link);
                let both = [(a.sent, b.received), (b.sent, a.received)];
                let arrived = both
                    .iter()
                    .all(|(sent, received)| sent.packets.abs_diff(received.packets) < 10);
                if arrived {
                    Ok(())
                } else {
                    Err(format!("{both:?}"))
                }
            });
            one.close(runtime);
            two.close(runtime);
        }
    });
}

/// A foreign device that comes to have the port is not disturbed, and ours comes back when it goes.
#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn a_port_that_was_lost_comes_back() {
    sandbox(|runtime| {
        let (one, two) = joined(runtime, ["192.0.2.1", "192.0.2.2"]);
        ip_tool(&one.netns, &["link", "delete", "nsm-ext-4789"]);
        let foreign = inside(&one.netns, || UdpSocket::bind("192.0.2.1:4789").unwrap());
        let faults = runtime.block_on(one.forwarding.look_after()).unwrap();
        assert!(
            faults.len() == 1 && faults[0].contains("4789"),
            "{faults:?}"
        );
        foreign.send_to(b"x", "192.0.2.2:4789").unwrap();
        drop(foreign);
        eventually("the port comes back", || {
            let faults = runtime.block_on(one.forwarding.look_after()).unwrap();
            if faults.is_empty() {
                Ok(())
            } else {
                Err(faults.join("; "))
            }
        });
        let refused = inside(&one.netns, || {
            let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
            socket.send_to(b"x", "192.0.2.2:4789").unwrap_err()
        });
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EPERM));
        echo(&one.pod, &two.pod, "172.16.1.2:7000", 100);
        one.close(runtime);
        two.close(runtime);
    });
}

/// As beside a network plugin that has the port: its device was there first.
#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn a_foreign_device_on_the_port_is_named_and_works_on() {
    sandbox(|runtime| {
        let (one, two) = two_nodes();
        add_foreign_vxlan(&one, &one, (PORT, PORT));
        ip_tool(&one, &["address", "add", "172.17.0.1/24", "dev", "vxlan0"]);
        let spec = VxlanSpec {
            link: link(1, 2),
            sources: vec![],
            vni: 77.try_into().unwrap(),
            local: ip("192.0.2.1"),
            remote: ip("192.0.2.2"),
            port: PORT,
        };
        let node = Node::start(runtime, &one, spec, netns());
        let up = node.forwarding.up(&node.pod, &node.spec);
        let error = runtime.block_on(up).unwrap_err().to_string();
        assert!(
            error.contains("`vxlan0` of another program") && error.contains("tunnel.port"),
            "{error}"
        );
        assert_eq!(link_names(&node.pod), [""; 0]);

        let peer = inside(&two, || UdpSocket::bind(("192.0.2.2", PORT)).unwrap());
        peer.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        inside(&one, || {
            let socket = UdpSocket::bind("172.17.0.1:0").unwrap();
            socket.set_broadcast(true).unwrap();
            socket.send_to(b"x", "172.17.0.255:7").unwrap();
        });
        peer.recv(&mut [0; 128]).unwrap();
        runtime.block_on(node.forwarding.close()).unwrap();
    });
}
