//! The fast path under real traffic: it is taken, what it carries is whole, and it does only what the kernel does at the time.
//!
//! In all of these the nodes do not forward (`ip_forward` is 0 in a new namespace), and nobody acts as an agent while traffic passes.

use std::{fs, net::UdpSocket, time::Duration};

use nsm_core::link::{LinkSpec, VxlanSpec};
use nsm_dataplane::{bpf::PathsTaken, netns::Netns};
use tokio::runtime::Runtime;

use crate::{
    forward::{Node, PORT, echo, joined, joined_with, sandbox, spec, stream},
    support::{alias, eventually, inside, ip_tool, name, netns, route, tool, two_nodes},
};

const UNDERLAY: [&str; 2] = ["192.0.2.1", "192.0.2.2"];

fn taken(node: &Node) -> PathsTaken {
    node.bpf.paths_taken().unwrap()
}

fn drops(node: &Node, reason: &str) -> u64 {
    node.bpf.drops().unwrap()[reason]
}

/// Streams pass between the pods in both directions and families, and the fast path carries them on both nodes.
fn streams_are_fast(one: &Node, two: &Node) {
    let v4 = ["172.16.1.2:7003", "172.16.1.1:7003"];
    let v6 = ["[fd00:1::2]:7004", "[fd00:1::1]:7004"];
    for [there, back] in [v4, v6] {
        for (from, to, address) in [(one, two, there), (two, one, back)] {
            let before = [taken(from), taken(to)];
            stream(&from.pod, &to.pod, address);
            let after = [taken(from), taken(to)];
            let is_fast_in = !address.starts_with('[') || takes_v6_in();
            let of = |taken: &PathsTaken| {
                if is_fast_in {
                    taken.fast_in
                } else {
                    taken.slow_in
                }
            };
            // A stream of 4 MiB has 64 frames at least.
            let counted = [
                after[0].fast_out - before[0].fast_out,
                of(&after[1]) - of(&before[1]),
            ];
            assert!(counted.iter().all(|it| *it > 30), "{address}: {counted:?}");
            let back = [
                after[1].fast_out - before[1].fast_out,
                of(&after[0]) - of(&before[0]),
            ];
            assert!(back.iter().all(|it| *it > 0), "{address}: {back:?}");
        }
    }
}

/// Whether the kernel lets BPF take IPv6 out of a tunnel over IPv4: since 6.3.
fn takes_v6_in() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

/// A datagram and its answer pass, by the fast path out of one node: the way is learned from the first.
fn becomes_fast(one: &Node, two: &Node) {
    eventually("the fast path", || {
        let before = taken(one);
        for _ in 0..5 {
            echo(&one.pod, &two.pod, "172.16.1.2:7000", 100);
        }
        let after = taken(one);
        if after.fast_out > before.fast_out && after.fast_in > before.fast_in {
            Ok(())
        } else {
            Err(format!("{after:?}"))
        }
    });
}

fn close(runtime: &Runtime, nodes: [&Node; 2]) {
    for node in nodes {
        node.close(runtime);
    }
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn streams_take_the_fast_path_both_ways_with_offloads_and_without() {
    sandbox(|runtime| {
        let (one, two) = joined(runtime, UNDERLAY);
        let forwards = |netns: &Netns| {
            inside(netns, || {
                fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap()
            })
        };
        assert_eq!(
            [&one, &two].map(|node| forwards(&node.netns)),
            ["0\n", "0\n"]
        );
        streams_are_fast(&one, &two);
        let off = "tx off rx off sg off tso off gso off gro off";
        let offload = |netns: &Netns, interface: &str| {
            tool(netns, "ethtool", &format!("-K {interface} {off}"));
        };
        for node in [&one, &two] {
            offload(&node.netns, "eth0");
        }
        streams_are_fast(&one, &two);
        for node in [&one, &two] {
            offload(&node.pod, "nsm-1");
        }
        streams_are_fast(&one, &two);
        assert_eq!(one.bpf.drops().unwrap().values().sum::<u64>(), 0);
        close(runtime, [&one, &two]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn the_fast_path_follows_a_neighbour_that_changes_its_address() {
    sandbox(|runtime| {
        let (one, two) = joined(runtime, UNDERLAY);
        becomes_fast(&one, &two);
        inside(&two.netns, || {
            fs::write("/proc/sys/net/ipv4/conf/eth0/arp_notify", "1").unwrap();
        });
        // It says so to its neighbours, as a gateway that takes over does.
        ip_tool(
            &two.netns,
            &["link", "set", "eth0", "address", "06:00:00:00:00:77"],
        );
        becomes_fast(&one, &two);
        streams_are_fast(&one, &two);
        close(runtime, [&one, &two]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn rules_of_the_host_hold_for_what_takes_the_fast_path() {
    sandbox(|runtime| {
        let (one, two) = joined(runtime, UNDERLAY);
        for (node, hook) in [(&two, "input"), (&one, "output")] {
            becomes_fast(&one, &two);
            let nft = |words: &str| tool(&node.netns, "nft", words);
            nft("add table inet host");
            nft(&format!(
                "add chain inet host c {{ type filter hook {hook} priority 0 ; }}"
            ));
            nft("add rule inet host c udp dport 4789 counter drop");
            let dropped = || {
                let shown = nft("list chain inet host c");
                let count = shown.split("packets ").nth(1).unwrap();
                count.split(' ').next().unwrap().parse::<u64>().unwrap()
            };
            let (client, _server) = sockets(&one, &two);
            eventually("the rule meets every packet", || {
                let fast =
                    || [taken(&one).fast_out, taken(&two).fast_in][usize::from(hook == "input")];
                let before = (dropped(), fast());
                for _ in 0..10 {
                    client.send(b"x").unwrap();
                }
                let after = (dropped(), fast());
                if after.0 >= before.0 + 10 && after.1 == before.1 {
                    Ok(())
                } else {
                    Err(format!("{before:?} {after:?}"))
                }
            });
            nft("delete table inet host");
        }
        streams_are_fast(&one, &two);
        close(runtime, [&one, &two]);
    });
}

/// A socket of the first pod, connected to one of the second, which waits as long as a packet takes on a busy machine.
fn sockets(one: &Node, two: &Node) -> (UdpSocket, UdpSocket) {
    let server = inside(&two.pod, || UdpSocket::bind("172.16.1.2:0").unwrap());
    server
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let client = inside(&one.pod, || UdpSocket::bind("172.16.1.1:0").unwrap());
    client.connect(server.local_addr().unwrap()).unwrap();
    (client, server)
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn an_agent_that_respects_the_firewall_has_no_fast_path() {
    sandbox(|runtime| {
        let (one, two) = joined_with(runtime, UNDERLAY, true);
        stream(&one.pod, &two.pod, "172.16.1.2:7003");
        stream(&two.pod, &one.pod, "[fd00:1::1]:7004");
        for node in [&one, &two] {
            let taken = taken(node);
            assert_eq!((taken.fast_out, taken.fast_in), (0, 0));
            assert!(taken.slow_out > 30 && taken.slow_in > 30, "{taken:?}");
        }
        close(runtime, [&one, &two]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn a_small_underlay_carries_what_fits() {
    sandbox(|runtime| {
        let nodes = two_nodes();
        for netns in [&nodes.0, &nodes.1] {
            ip_tool(netns, &["link", "set", "eth0", "mtu", "1280"]);
        }
        let of = |own, other, local, remote| {
            let mut spec = spec(own, other, local, remote);
            spec.link.mtu = 1230;
            // IPv6 takes 1280.
            spec.link.addresses.retain(|it| it.addr().is_ipv4());
            spec.link.routes.retain(|it| it.prefix.addr().is_ipv4());
            spec.link.neighbours.retain(|it| it.0.is_ipv4());
            spec
        };
        let (one, two) = (
            Node::start(
                runtime,
                &nodes.0,
                of(1, 2, UNDERLAY[0], UNDERLAY[1]),
                netns(),
            ),
            Node::start(
                runtime,
                &nodes.1,
                of(2, 1, UNDERLAY[1], UNDERLAY[0]),
                netns(),
            ),
        );
        one.up(runtime);
        two.up(runtime);
        // A full packet, and one that the pod cuts.
        echo(&one.pod, &two.pod, "172.16.1.2:7001", 1230 - 28);
        echo(&one.pod, &two.pod, "172.16.1.2:7002", 5000);
        becomes_fast(&one, &two);
        // A pod that does not keep to its MTU: the kernel refuses what does not fit the underlay, and the rest passes.
        ip_tool(&one.pod, &["link", "set", "nsm-1", "mtu", "1500"]);
        let (client, server) = sockets(&one, &two);
        client.send(&[1; 1300]).unwrap();
        client.send(b"x").unwrap();
        let mut buffer = [0; 1500];
        assert_eq!(server.recv(&mut buffer).unwrap(), 1);
        becomes_fast(&one, &two);
        close(runtime, [&one, &two]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn a_plain_vxlan_device_is_a_peer() {
    sandbox(|runtime| {
        for checksum in ["noudpcsum", "udpcsum"] {
            let nodes = two_nodes();
            let own = spec(1, 2, UNDERLAY[0], UNDERLAY[1]);
            let one = Node::start(runtime, &nodes.0, own, netns());
            one.up(runtime);
            let peer = &nodes.1;
            let device = format!(
                "link add vx address 02:00:00:00:00:02 type vxlan id 77 local 192.0.2.2 remote 192.0.2.1 dstport {PORT} {checksum}"
            );
            for words in [
                device.as_str(),
                "link set vx mtu 1450 up",
                "address add 172.16.1.2/24 dev vx",
                "address add fd00:1::2/64 dev vx nodad",
                "neighbour replace 172.16.1.1 lladdr 02:00:00:00:00:01 dev vx nud permanent",
                "neighbour replace fd00:1::1 lladdr 02:00:00:00:00:01 dev vx nud permanent",
            ] {
                tool(peer, "ip", words);
            }
            stream(&one.pod, peer, "172.16.1.2:7003");
            stream(peer, &one.pod, "172.16.1.1:7003");
            stream(peer, &one.pod, "[fd00:1::1]:7004");
            echo(&one.pod, peer, "172.16.1.2:7002", 20_000);
            let passed = taken(&one);
            assert!(passed.fast_out > 60, "{passed:?}");
            if checksum == "noudpcsum" {
                assert!(passed.fast_in > 60, "{passed:?}");
            } else {
                // Over a cable of the kernel nobody has checked it yet.
                assert!(passed.slow_in > 60, "{passed:?}");
            }

            // Another station behind the peer, and routes that the peer would give.
            assert_eq!(drops(&one, "tunnel_router_advertisement"), 0);
            advertise(peer);
            eventually("the advertisement is dropped", || {
                match drops(&one, "tunnel_router_advertisement") {
                    0 => Err("not yet".to_owned()),
                    _ => Ok(()),
                }
            });
            let before = drops(&one, "tunnel_wrong_source_mac");
            tool(peer, "ip", "link set vx address 02:00:00:00:00:66");
            let client = inside(peer, || UdpSocket::bind("172.16.1.2:0").unwrap());
            eventually("what another station sends is dropped", || {
                client.send_to(b"x", "172.16.1.1:9").unwrap();
                match drops(&one, "tunnel_wrong_source_mac") > before {
                    true => Ok(()),
                    false => Err("not yet".to_owned()),
                }
            });
            one.close(runtime);
        }
    });
}

/// Sends a router advertisement (RFC 4861, section 4.2) to all nodes of the link `vx`.
fn advertise(peer: &Netns) {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, socket,
    };
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    inside(peer, || {
        let index = nix::net::if_::if_nametoindex("vx").unwrap();
        let to = std::net::SocketAddrV6::new("ff02::1".parse().unwrap(), 0, 0, index);
        let raw = socket(
            AddressFamily::Inet6,
            SockType::Raw,
            SockFlag::empty(),
            SockProtocol::IcmpV6,
        )
        .unwrap();
        let raw_fd = std::os::fd::AsRawFd::as_raw_fd(&raw);
        sendto(
            raw_fd,
            &advertisement,
            &SockaddrIn6::from(to),
            MsgFlags::empty(),
        )
        .unwrap();
    });
}

/// A pod with two links passes on what comes by one of them by the other: decapsulated, and encapsulated again.
#[test]
#[ignore = "needs root: makes network namespaces, links and BPF programs"]
fn a_pod_that_routes_between_two_links_passes_streams_on() {
    sandbox(|runtime| {
        let nodes = two_nodes();
        // 1 and 3 are on the first node, the router on the second has 2 towards 1, and 4 towards 3.
        let [far, near] = UNDERLAY;
        let end =
            |own: u8, other: u8, local: &str, remote: &str, vni: u32, interface: &str| VxlanSpec {
                link: LinkSpec {
                    alias: alias(),
                    name: name(interface),
                    ..spec(own, other, local, remote).link
                },
                vni: vni.try_into().unwrap(),
                ..spec(own, other, local, remote)
            };
        let via = |mut spec: VxlanSpec, own: u8, other: u8| {
            spec.link.routes.push(route(
                &format!("172.16.1.{own}/32"),
                Some(&format!("172.16.1.{other}")),
            ));
            spec
        };
        let one = Node::start(
            runtime,
            &nodes.0,
            via(end(1, 2, far, near, 77, "nsm-1"), 3, 2),
            netns(),
        );
        let router = Node::start(
            runtime,
            &nodes.1,
            end(2, 1, near, far, 77, "nsm-1"),
            netns(),
        );
        one.up(runtime);
        router.up(runtime);
        let third = netns();
        let (to_router, from_router) = (
            via(end(3, 4, far, near, 78, "nsm-1"), 1, 4),
            end(4, 3, near, far, 78, "nsm-2"),
        );
        one.add(runtime, &third, &to_router);
        router.add(runtime, &router.pod, &from_router);
        inside(&router.pod, || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        });

        let before = [taken(&one), taken(&router)];
        stream(&one.pod, &third, "172.16.1.3:7005");
        stream(&third, &one.pod, "172.16.1.1:7006");
        let after = [taken(&one), taken(&router)];
        assert!(after[0].fast_out > before[0].fast_out + 60, "{after:?}");
        assert!(after[0].fast_in > before[0].fast_in + 60, "{after:?}");
        // What the router passes on is not its own: the kernel takes it out of the tunnel, and BPF puts it into the other.
        assert!(after[1].slow_in > before[1].slow_in + 60, "{after:?}");
        assert!(after[1].fast_out > before[1].fast_out + 60, "{after:?}");
        one.remove(runtime, &to_router.link.alias);
        router.remove(runtime, &from_router.link.alias);
        close(runtime, [&one, &router]);
    });
}
