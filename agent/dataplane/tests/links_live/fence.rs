//! The fence: what it drops, and that it comes back.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    process::Command,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use nsm_dataplane::{
    bpf::DEFAULT_PIN_DIR,
    fence::{Dropped, Fence, FenceError, Look},
    links::{Links, PodLink},
    netns::Netns,
};
use nsm_ebpf_common::TUNNEL_MARK;

use crate::support::{
    add_foreign_vxlan, eventually, in_thread, inside, ip, ip_tool, link, mac, net, netns, route,
    two_nodes, veth,
};

const PORT: u16 = 4789;

fn raise(node: &Netns) -> Fence {
    let fence = inside(node, || Fence::raise(Path::new(DEFAULT_PIN_DIR)).unwrap());
    fence.guard(PORT).unwrap();
    fence
}

/// Runs `nft` in a namespace, as a person would.
fn nft(netns: &Netns, command: &str) -> String {
    let output = inside(netns, || Command::new("nft").arg(command).output().unwrap());
    assert!(output.status.success(), "nft {command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn table(node: &Netns) -> String {
    nft(node, "list table inet proxy-nsmgr")
}

#[test]
#[ignore = "needs root: makes network namespaces and nftables"]
fn stands_until_it_is_removed() {
    let node = netns();
    nft(&node, "add table inet other");
    let fence = raise(&node);
    let shown = table(&node);
    for part in [
        "hook prerouting priority -450",
        "hook postrouting priority -450",
        "hook output priority -450",
        "hook input priority -450",
        "hook forward priority -450",
        "udp dport 4789 counter packets 0 bytes 0 drop",
        "udp sport 4789 counter packets 0 bytes 0 drop",
        "udp dport 4789 meta iiftype != loopback meta mark & 0x00003057 != 0x00003057 fib saddr . iif oif missing counter packets 0 bytes 0 drop",
        "udp dport 4789 meta mark != 0x00003057 counter packets 0 bytes 0 drop",
        "meta mark set 0x00000000",
        "docs/operations.md",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert_eq!(fence.look().unwrap(), Look::Stands);

    // Another agent takes it over, and leaves it as it is.
    drop(fence);
    let next = inside(&node, || Fence::raise(Path::new(DEFAULT_PIN_DIR)).unwrap());
    assert_eq!(table(&node), shown);
    assert_eq!(next.look().unwrap(), Look::Stands);
    next.guard(4790).unwrap();
    assert!(table(&node).contains("udp dport 4790"), "{}", table(&node));
    let both = inside(&node, || Fence::raise(Path::new(DEFAULT_PIN_DIR)).unwrap());
    both.release(4790).unwrap();
    assert_eq!(table(&node), shown);
    both.release(PORT).unwrap();
    assert!(!table(&node).contains("udp dport"), "{}", table(&node));
    assert_eq!(both.look().unwrap(), Look::Stands);
    // Somebody else's change, to the agent before.
    assert_eq!(next.look().unwrap(), Look::PutBack);
    next.release(4790).unwrap();
    assert_eq!(table(&node), shown);

    next.guard_only([4791]).unwrap();
    assert!(!table(&node).contains("udp dport 4789"), "{}", table(&node));
    next.remove().unwrap();
    next.remove().unwrap();
    assert_eq!(nft(&node, "list tables"), "table inet other\n");
}

#[test]
#[ignore = "needs root: makes network namespaces and nftables"]
fn whatever_becomes_of_it_is_put_back() {
    let node = netns();
    let fence = raise(&node);
    let shown = table(&node);
    for change in [
        "flush ruleset",
        "delete table inet proxy-nsmgr",
        "flush table inet proxy-nsmgr",
        "add table inet proxy-nsmgr { flags dormant; }",
        "insert rule inet proxy-nsmgr incoming accept",
        "add rule inet proxy-nsmgr outgoing accept",
        "insert rule inet proxy-nsmgr sending udp dport 4789 accept",
        "flush chain inet proxy-nsmgr incoming; delete chain inet proxy-nsmgr incoming; \
         add chain inet proxy-nsmgr incoming { type filter hook prerouting priority 0; }",
    ] {
        nft(&node, change);
        assert_eq!(fence.look().unwrap(), Look::PutBack, "{change}");
        assert_eq!(fence.look().unwrap(), Look::Stands, "{change}");
        assert_eq!(table(&node), shown, "{change}");
    }

    // The rules of others are none of its business.
    nft(&node, "add table inet other");
    assert_eq!(fence.look().unwrap(), Look::Stands);
}

#[test]
#[ignore = "needs root: makes network namespaces and nftables"]
fn without_rights_it_says_what_is_missing() {
    let node = netns();
    let error = inside(&node, || {
        in_thread(|| {
            drop_capabilities();
            Fence::raise(Path::new(DEFAULT_PIN_DIR))
                .map(drop)
                .unwrap_err()
        })
    });
    assert!(matches!(error, FenceError::NotPermitted { .. }), "{error}");
}

/// Leaves the calling thread without capabilities.
fn drop_capabilities() {
    const NOBODY: u32 = 65_534;
    // SAFETY: the call takes a number. Unlike the C library's function, it changes the calling thread alone.
    let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setuid, NOBODY) };
    assert_eq!(changed, 0);
}

/// A pod link without a program, and an address of the node that the pod tries to reach by it.
struct World {
    node: Netns,
    pod: Netns,
    link: PodLink,
}

const NODE: [&str; 2] = ["10.99.0.1", "fd99::1"];

impl World {
    async fn new() -> Self {
        let (node, pod) = (netns(), netns());
        for (address, length) in NODE.into_iter().zip(["32", "128"]) {
            let address = format!("{address}/{length}");
            ip_tool(&node, &["address", "add", &address, "dev", "lo", "nodad"]);
        }
        let links = Links::in_namespace(node.clone());
        let mut spec = link(1, 2);
        spec.addresses = vec![net("10.98.0.2/32"), net("fd98::2/128")];
        spec.routes = NODE
            .iter()
            .map(|address| route(&format!("{}", net_of(ip(address))), None))
            .collect();
        let made = links.up_pod_link(&pod, &spec).await.unwrap();
        // The pod addresses the node's end itself.
        spec.neighbours = NODE.map(|address| (ip(address), made.node.mac)).into();
        links.up_pod_link(&pod, &spec).await.unwrap();
        Self {
            node,
            pod,
            link: made,
        }
    }

    /// Sends from the pod to an address of the node.
    fn send(&self, to: SocketAddr) {
        inside(&self.pod, || {
            let any: IpAddr = if to.is_ipv4() {
                ip("0.0.0.0")
            } else {
                ip("::")
            };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.send_to(b"x", to).unwrap();
        });
    }
}

fn net_of(address: IpAddr) -> ipnet::IpNet {
    address.into()
}

fn listen(netns: &Netns, address: SocketAddr) -> UdpSocket {
    let socket = inside(netns, || UdpSocket::bind(address).unwrap());
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    socket
}

fn received(socket: &UdpSocket) -> bool {
    socket.recv(&mut [0; 8]).is_ok()
}

/// The link's program is missing: what the pod sends does not enter the node's stack, neither to the node nor through it.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn nothing_enters_the_node_by_a_link_without_a_program() {
    let world = World::new().await;
    let fence = raise(&world.node);
    // Somebody has switched IPv6 on again, so that nothing but the fence is left.
    let switch = format!(
        "/proc/sys/net/ipv6/conf/{}/disable_ipv6",
        world.link.node.name
    );
    inside(&world.node, || std::fs::write(switch, "0").unwrap());
    let mut before = fence.dropped().unwrap().incoming;
    for address in NODE {
        let socket = listen(&world.node, (ip(address), 7).into());
        let to = socket.local_addr().unwrap();
        world.send(to);
        eventually("the fence counts", || match fence.dropped().unwrap() {
            Dropped { incoming, .. } if incoming > before => Ok(()),
            dropped => Err(format!("{dropped:?}")),
        });
        socket.set_nonblocking(true).unwrap();
        assert!(!received(&socket), "{to}");
        socket.set_nonblocking(false).unwrap();

        // Only the fence stops it.
        fence.remove().unwrap();
        world.send(to);
        assert!(received(&socket), "{to}");
        assert_eq!(fence.look().unwrap(), Look::PutBack);
        before = fence.dropped().unwrap().incoming;
    }
}

/// What the node's stack would send into a link of ours, such as the reports of multicast groups.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn nothing_of_the_nodes_stack_leaves_by_a_link() {
    let world = World::new().await;
    let fence = raise(&world.node);
    let before = fence.dropped().unwrap().outgoing;
    let name = world.link.node.name.clone();
    inside(&world.node, || {
        let socket = UdpSocket::bind((ip(NODE[0]), 0)).unwrap();
        socket.set_broadcast(true).unwrap();
        setsockopt(&socket, sockopt::BindToDevice, &name.into()).unwrap();
        let refused = socket.send_to(b"x", "255.255.255.255:7").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EPERM));
    });
    assert!(fence.dropped().unwrap().outgoing > before);
}

/// The node asks and answers no ARP on a link, and has no IPv6 address there.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pod_finds_no_neighbour_on_the_node() {
    let world = World::new().await;
    let name = world.link.node.name.as_str();
    let shown = inside(&world.node, || {
        let arguments = ["address", "show", "dev", name];
        Command::new("ip").args(arguments).output().unwrap()
    });
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(!shown.contains("inet"), "{shown}");
    ip_tool(
        &world.pod,
        &["neighbour", "flush", "dev", "nsm-1", "nud", "permanent"],
    );
    world.send((ip(NODE[0]), 7).into());
    eventually("the pod gives up", || {
        let shown = inside(&world.pod, || {
            Command::new("ip").arg("neighbour").output().unwrap()
        });
        let shown = String::from_utf8(shown.stdout).unwrap();
        if shown.contains("FAILED") {
            Ok(())
        } else {
            Err(shown)
        }
    });
}

/// Who sends to the tunnels' port: a program of the node, one that has the mark, and a pod by a VXLAN device of its own.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn nobody_else_sends_to_the_tunnels_port() {
    let (one, two) = two_nodes();
    let peer = listen(&two, (ip("192.0.2.2"), PORT).into());
    let fence = raise(&one);
    let send = |mark: u32| {
        inside(&one, || {
            let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
            setsockopt(&socket, sockopt::Mark, &mark).unwrap();
            socket.send_to(b"x", "192.0.2.2:4789")
        })
    };
    assert!(send(0).is_err() && send(1).is_err());
    assert_eq!(fence.dropped().unwrap().foreign, 2);
    send(TUNNEL_MARK).unwrap();
    assert!(received(&peer));

    // Its packets enter the node's namespace without the mark that their sender gave them.
    let pod = netns();
    add_foreign_vxlan(&one, &pod, (4789, 4790));
    ip_tool(&pod, &["address", "add", "172.16.1.1/24", "dev", "vxlan0"]);
    let neighbour = ["172.16.1.2", "lladdr", "02:00:00:00:00:02", "dev", "vxlan0"];
    ip_tool(
        &pod,
        &[&["neighbour", "replace"], neighbour.as_slice()].concat(),
    );
    let before = fence.dropped().unwrap().foreign;
    inside(&pod, || {
        let socket = UdpSocket::bind("172.16.1.1:0").unwrap();
        setsockopt(&socket, sockopt::Mark, &TUNNEL_MARK).unwrap();
        // The sender may get an error for the drop or none.
        let _ = socket.send_to(b"x", "172.16.1.2:7");
    });
    assert!(fence.dropped().unwrap().foreign > before);

    // Beside a foreign VXLAN device that has the port.
    fence.release(PORT).unwrap();
    send(0).unwrap();
    assert!(received(&peer));
}

/// A pod of the node with these addresses, on a link as a CNI makes it, that leads to one other address.
fn cni_pod(node: &Netns, addresses: &[&str], reaches: &str) -> Netns {
    let pod = netns();
    veth((node, "cni0"), (&pod, "cni0"));
    let [node_mac, pod_mac] = [21, 22].map(|last| mac(last).to_string());
    ip_tool(node, &["link", "set", "cni0", "address", &node_mac]);
    ip_tool(&pod, &["link", "set", "cni0", "address", &pod_mac]);
    ip_tool(node, &["address", "add", "10.1.0.1/32", "dev", "cni0"]);
    ip_tool(node, &["route", "add", "10.1.0.2/32", "dev", "cni0"]);
    for address in addresses {
        ip_tool(&pod, &["address", "add", address, "dev", "cni0"]);
    }
    ip_tool(&pod, &["route", "add", reaches, "dev", "cni0"]);
    let gateway = [reaches, "lladdr", &node_mac, "dev", "cni0"];
    ip_tool(
        &pod,
        &[&["neighbour", "replace"], gateway.as_slice()].concat(),
    );
    pod
}

/// A pod's packets leave with the node's address, as on most networks of clusters.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pod_is_not_forwarded_as_the_node() {
    let (one, two) = two_nodes();
    let fence = raise(&one);
    let pod = cni_pod(&one, &["10.1.0.2/32"], "192.0.2.2");
    inside(&one, || {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
    })
    .unwrap();
    nft(
        &one,
        "add table ip cni; add chain ip cni post { type nat hook postrouting priority 100; }; \
         add rule ip cni post ip saddr 10.1.0.2 masquerade",
    );

    let other = listen(&two, (ip("192.0.2.2"), 7000).into());
    let tunnels = listen(&two, (ip("192.0.2.2"), PORT).into());
    let send = |own: u16, port: u16| {
        inside(&pod, || {
            let socket = UdpSocket::bind((ip("10.1.0.2"), own)).unwrap();
            socket.send_to(b"x", (ip("192.0.2.2"), port)).unwrap();
        });
    };
    // To the peer as the node, and as who would get the peer's answers.
    send(0, PORT);
    send(PORT, 7000);
    eventually("the fence counts", || match fence.dropped().unwrap() {
        Dropped { forwarded: 2, .. } => Ok(()),
        dropped => Err(format!("{dropped:?}")),
    });
    // All else passes, and nothing was before it.
    send(7001, 7000);
    let (_, source) = other.recv_from(&mut [0; 8]).unwrap();
    assert_eq!(source, (ip("192.0.2.1"), 7001).into());

    fence.release(PORT).unwrap();
    send(0, PORT);
    assert!(received(&tunnels));
}

/// A pod of the node, on a link of its network, sends with the address of a peer.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pod_cannot_send_as_a_peer() {
    let (one, two) = two_nodes();
    let fence = raise(&one);
    let pod = cni_pod(&one, &["10.1.0.2/32", "192.0.2.2/32"], "192.0.2.1");

    let node = listen(&one, (ip("192.0.2.1"), PORT).into());
    let send = |from: &Netns, address: &str| {
        inside(from, || {
            let socket = UdpSocket::bind((ip(address), 0)).unwrap();
            setsockopt(&socket, sockopt::Mark, &TUNNEL_MARK).unwrap();
            socket.send_to(b"x", "192.0.2.1:4789").unwrap();
        });
    };
    send(&pod, "192.0.2.2");
    eventually("the fence counts", || match fence.dropped().unwrap() {
        Dropped { astray: 1, .. } => Ok(()),
        dropped => Err(format!("{dropped:?}")),
    });
    // The peer itself, the pod under its own name, and the node.
    for (from, address) in [(&two, "192.0.2.2"), (&pod, "10.1.0.2"), (&one, "192.0.2.1")] {
        send(from, address);
        let (_, source) = node.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(source.ip(), ip(address));
    }
    assert_eq!(fence.dropped().unwrap().astray, 1);

    fence.release(PORT).unwrap();
    send(&pod, "192.0.2.2");
    assert!(received(&node));
}
