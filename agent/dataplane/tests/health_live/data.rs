//! Connections between pods on the two nodes: through pod links, programs and the external devices, beside the probes or without them.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use nsm_core::{
    link::{LinkAlias, LinkSpec, VxlanSpec},
    net::MacAddr,
};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig},
    forward::{ForwardError, Forwarding, TunnelDevices},
    links::Links,
    netns::Netns,
};

use super::support::{
    By, CLSACT, TCX, World, addr, eventually, ip, link_names, netns, pin_dir, run, sandbox, within,
};

pub(super) const DOMAIN: &str = "test.example";

/// The port on which pods echo.
const ECHO: u16 = 7000;

/// The dataplane of one node, without probes.
pub(super) struct Dataplane {
    pub(super) number: usize,
    pub(super) netns: Netns,
    pub(super) bpf: Arc<Bpf>,
    pub(super) forwarding: Forwarding,
}

impl Dataplane {
    pub(super) async fn start(world: &World, number: usize, by: By) -> Self {
        let netns = world.nodes[number - 1].clone();
        let config = BpfConfig {
            pin_dir: pin_dir(number),
            mount_bpffs: false,
            hook: Some(by),
            ..BpfConfig::default()
        };
        let bpf = Arc::new(within(&netns, || Bpf::load(&config)).expect("BPF"));
        let devices = Arc::new(TunnelDevices::new(bpf.clone(), DOMAIN));
        let links = Links::in_namespace(netns.clone());
        let forwarding = Forwarding::start(links, devices, DOMAIN);
        Self {
            number,
            netns,
            bpf,
            forwarding: forwarding.await.expect("forwarding"),
        }
    }

    /// Removes everything, and checks that it is gone.
    pub(super) async fn end(self) {
        for alias in self.forwarding.connections() {
            self.forwarding.down(&alias).await.expect("down");
            let second = alias.of_endpoint().expect("an alias");
            self.forwarding.down(&second).await.expect("down");
        }
        self.forwarding.close().await.expect("closed");
        assert_eq!(self.bpf.tunnels(), []);
        assert_eq!(self.bpf.slots_in_use(), 0);
        assert_eq!(link_names(&self.netns), ["eth0"]);
        within(&self.netns, || self.bpf.detach_and_unpin()).expect("unpinned");
    }

    pub(super) fn dropped(&self, reason: &str) -> u64 {
        self.bpf.drops().expect("drops")[reason]
    }
}

/// A connection's end on a node. Pods of node 1 are 172.16.1.1, those of node 2 are 172.16.1.2.
pub(super) fn spec(node: &Dataplane, id: &str, vni: u32, family: u8) -> VxlanSpec {
    let (own, other) = (node.number, 3 - node.number);
    let mac = |number: usize| MacAddr::new([2, 0, 0, 0, 0, number as u8]);
    let underlay = |number: usize| match family {
        4 => addr(&format!("10.{number}.0.1")),
        _ => addr(&format!("fd00:{number}::1")),
    };
    let inner = |number: usize| {
        [
            format!("172.16.1.{number}/32"),
            format!("fd00:9::{number}/128"),
        ]
    };
    let parse = |texts: [String; 2]| texts.map(|text| text.parse().expect("a prefix"));
    let (addresses, others) = (parse(inner(own)), parse(inner(other)));
    VxlanSpec {
        link: LinkSpec {
            alias: LinkAlias::new(DOMAIN, id).expect("an alias"),
            name: "nsm-1".parse().expect("a name"),
            mac: Some(mac(own)),
            mtu: 1430,
            addresses: addresses.to_vec(),
            routes: others
                .map(|prefix| nsm_core::link::RouteSpec { prefix, via: None })
                .to_vec(),
            neighbours: others.map(|prefix| (prefix.addr(), mac(other))).to_vec(),
        },
        sources: addresses.to_vec(),
        vni: vni.try_into().expect("a VNI"),
        local: underlay(own),
        remote: underlay(other),
        port: 4789,
    }
}

/// A pod that sends back each datagram.
pub(super) struct Echo {
    pub(super) pod: Netns,
    socket: UdpSocket,
}

impl Echo {
    pub(super) fn start(pod: Netns) -> Self {
        let socket = within(&pod, || UdpSocket::bind(("::", ECHO))).expect("bound");
        socket.set_nonblocking(true).expect("set");
        Self { pod, socket }
    }

    /// Answers what has come.
    fn turn(&self) {
        let mut buffer = [0; 65_536];
        while let Ok((length, from)) = self.socket.recv_from(&mut buffer) {
            let _ = self.socket.send_to(&buffer[..length], from);
        }
    }
}

/// A socket in a pod, towards the echo of the other.
pub(super) fn towards(pod: &Netns, target: &str) -> UdpSocket {
    let any = if target.contains(':') {
        "::"
    } else {
        "0.0.0.0"
    };
    let socket = within(pod, || UdpSocket::bind((any, 0))).expect("bound");
    socket
        .connect(SocketAddr::new(addr(target), ECHO))
        .expect("connected");
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("set");
    socket
}

/// Whether one datagram of this size comes back.
pub(super) fn comes_back(socket: &UdpSocket, echoes: &[&Echo], size: usize) -> bool {
    let sent: Vec<u8> = (0..size).map(|at| at as u8).collect();
    if socket.send(&sent).is_err() {
        return false;
    }
    let mut buffer = vec![0; 65_536];
    socket.set_nonblocking(true).expect("set");
    for _ in 0..200 {
        echoes.iter().for_each(|echo| echo.turn());
        if let Ok(length) = socket.recv(&mut buffer) {
            return buffer[..length] == sent;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// A connection with a pod at each end.
struct Connected {
    pods: [Netns; 2],
    echo: Echo,
}

async fn connect(nodes: &[Dataplane; 2], id: &str, vni: u32, family: u8) -> Connected {
    let pods = [netns(), netns()];
    for (node, pod) in nodes.iter().zip(&pods) {
        let made = node.forwarding.up(pod, &spec(node, id, vni, family)).await;
        assert!(made.expect("up").pod.created);
    }
    let echo = Echo::start(pods[1].clone());
    Connected { pods, echo }
}

pub(super) async fn two_nodes(world: &World, by: By) -> [Dataplane; 2] {
    [
        Dataplane::start(world, 1, by).await,
        Dataplane::start(world, 2, by).await,
    ]
}

pub(super) async fn end(nodes: [Dataplane; 2]) {
    for node in nodes {
        node.end().await;
    }
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn pods_talk_over_either_family_and_are_counted() {
    sandbox(|| async {
        for (by, family) in [(TCX, 4), (CLSACT, 4), (TCX, 6)] {
            let world = World::new();
            let nodes = two_nodes(&world, by).await;
            let connected = connect(&nodes, "one", 77, family).await;
            for (target, largest) in [("172.16.1.2", 1430 - 28), ("fd00:9::2", 1430 - 48)] {
                let socket = towards(&connected.pods[0], target);
                // The kernel may take a moment for a link that is new.
                eventually("the first packet", async || {
                    let came = comes_back(&socket, &[&connected.echo], 1);
                    came.then_some(()).ok_or_else(|| "lost".to_owned())
                })
                .await;
                for size in [1, 100, largest] {
                    let came = comes_back(&socket, &[&connected.echo], size);
                    assert!(came, "{size} bytes to {target} over {family}, {by}");
                }
            }
            for node in &nodes {
                let alias = &node.forwarding.connections()[0];
                let passed = node.forwarding.passed(alias).expect("counted");
                let wire = passed.wire.expect("a tunnel");
                for count in [
                    passed.link.sent,
                    passed.link.received,
                    wire.sent,
                    wire.received,
                ] {
                    assert!(count.packets >= 6, "{passed:?}");
                }
                assert_eq!(node.dropped("pod_wrong_source"), 0);
                // What a pod's kernel says by itself may come before the other end is there.
                assert!(node.dropped("tunnel_unknown") <= 4);
                assert_eq!(node.dropped("tunnel_wrong_mac"), 0);
            }
            end(nodes).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn the_nodes_own_namespace_may_be_the_pod() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let pod = netns();
        let own = spec(&nodes[0], "one", 77, 4);
        let (node, other) = (&nodes[0], spec(&nodes[1], "one", 77, 4));
        node.forwarding.up(&node.netns, &own).await.expect("up");
        nodes[1].forwarding.up(&pod, &other).await.expect("up");
        let echo = Echo::start(pod);
        let socket = towards(&node.netns, "172.16.1.2");
        assert!(comes_back(&socket, &[&echo], 100));
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_tunnel_has_one_connection() {
    sandbox(|| async {
        let world = World::new();
        let node = Dataplane::start(&world, 1, TCX).await;
        let (pod, other) = (netns(), netns());
        let first = spec(&node, "one", 77, 4);
        node.forwarding.up(&pod, &first).await.expect("up");
        let second = VxlanSpec {
            link: LinkSpec {
                alias: LinkAlias::new(DOMAIN, "two").expect("an alias"),
                ..first.link.clone()
            },
            ..first.clone()
        };
        let refused = node.forwarding.up(&other, &second).await;
        assert!(
            matches!(refused, Err(ForwardError::Taken { .. })),
            "{refused:?}"
        );
        assert_eq!(link_names(&other), [] as [&str; 0]);
        // The same VNI towards another peer is another tunnel.
        let elsewhere = VxlanSpec {
            remote: addr("10.2.0.9"),
            ..second.clone()
        };
        node.forwarding.up(&other, &elsewhere).await.expect("up");
        // A refresh changes nothing, and a tunnel is free once its connection is gone.
        let again = node.forwarding.up(&pod, &first).await.expect("up");
        assert_eq!((again.pod.created, again.pod.operations), (false, 0));
        node.forwarding.down(&first.link.alias).await.expect("down");
        node.forwarding.up(&other, &second).await.expect("up");
        node.end().await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_connection_is_switched_to_another_tunnel_without_a_lost_packet() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        // Two endpoints with the same address, each behind a tunnel of its own.
        let pods = [netns(), netns()];
        for (pod, (id, vni)) in pods.iter().zip([("a", 10), ("b", 11)]) {
            let spec = spec(&nodes[1], id, vni, 4);
            nodes[1].forwarding.up(pod, &spec).await.expect("up");
        }
        let echoes = pods.map(Echo::start);
        let echoes: Vec<&Echo> = echoes.iter().collect();
        let pod = netns();
        let client = |vni| spec(&nodes[0], "client", vni, 4);
        let made = nodes[0].forwarding.up(&pod, &client(10)).await.expect("up");
        let socket = towards(&pod, "172.16.1.2");
        for turn in 0..20 {
            for _ in 0..10 {
                assert!(comes_back(&socket, &echoes, 64), "turn {turn}");
            }
            let spec = client(10 + (turn + 1) % 2);
            let again = nodes[0].forwarding.up(&pod, &spec).await.expect("up");
            assert_eq!((again.pod.index, again.pod.operations), (made.pod.index, 0));
        }
        assert_eq!(nodes[0].bpf.tunnels().len(), 1);
        assert!(echoes[1].pod.id() != echoes[0].pod.id());
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn the_next_agent_takes_connections_over_without_a_lost_packet() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let world = World::new();
            let [one, two] = two_nodes(&world, by).await;
            let nodes = [one, two];
            let connected = connect(&nodes, "one", 77, 4).await;
            let gone = netns();
            let orphan = VxlanSpec {
                remote: addr("10.2.0.9"),
                ..spec(&nodes[0], "gone", 78, 4)
            };
            nodes[0].forwarding.up(&gone, &orphan).await.expect("up");
            let socket = towards(&connected.pods[0], "172.16.1.2");
            let flows = |what: &str| {
                for _ in 0..20 {
                    assert!(comes_back(&socket, &[&connected.echo], 64), "{what}, {by}");
                }
            };
            flows("before");
            // As after kill -9: nothing is closed in order.
            let [one, two] = nodes;
            drop(one);
            flows("without an agent");
            // A pod goes meanwhile, and with it its link.
            drop(gone);
            let node = &world.nodes[0];
            eventually("one pod link", async || {
                let names = link_names(node);
                match names.len() {
                    3 => Ok(()),
                    _ => Err(format!("{names:?}")),
                }
            })
            .await;
            let one = Dataplane::start(&world, 1, by).await;
            flows("with the next one");
            let alias = LinkAlias::new(DOMAIN, "one").expect("an alias");
            assert_eq!(one.forwarding.connections(), std::slice::from_ref(&alias));
            assert_eq!(
                one.bpf.tunnels().len(),
                1,
                "that of the pod that is gone is free"
            );
            let passed = one.forwarding.passed(&alias).expect("counted");
            assert!(
                passed.link.sent.packets >= 60,
                "the counters go on: {passed:?}"
            );
            let again = one
                .forwarding
                .up(&connected.pods[0], &spec(&one, "one", 77, 4))
                .await;
            assert_eq!(again.expect("up").pod.operations, 0);
            flows("refreshed");
            end([one, two]).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_link_that_its_pod_deletes_frees_its_tunnel_and_is_made_anew() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let connected = connect(&nodes, "one", 77, 4).await;
        let node = &nodes[0];
        assert_eq!(node.forwarding.look_after().await.expect("looked"), [""; 0]);
        within(&connected.pods[0], || ip("link del nsm-1"));
        eventually("the loss to be noticed", async || {
            node.forwarding.look_after().await.expect("looked");
            match node.forwarding.connections().as_slice() {
                [] => Ok(()),
                left => Err(format!("{left:?}")),
            }
        })
        .await;
        assert_eq!(node.bpf.tunnels(), []);
        let again = spec(node, "one", 77, 4);
        let made = node.forwarding.up(&connected.pods[0], &again).await;
        assert!(made.expect("up").pod.created);
        let socket = towards(&connected.pods[0], "172.16.1.2");
        assert!(comes_back(&socket, &[&connected.echo], 64));
        end(nodes).await;
    });
}

/// What somebody does to node 1, and that it is found and undone while packets flow or soon after.
async fn is_mended(harm: impl Fn(&Netns)) {
    let world = World::new();
    let nodes = two_nodes(&world, TCX).await;
    let connected = connect(&nodes, "one", 77, 4).await;
    let socket = towards(&connected.pods[0], "172.16.1.2");
    assert!(comes_back(&socket, &[&connected.echo], 64));
    assert_eq!(
        nodes[0].forwarding.look_after().await.expect("looked"),
        [""; 0]
    );
    harm(&world.nodes[0]);
    assert_eq!(
        nodes[0].forwarding.look_after().await.expect("looked"),
        [""; 0]
    );
    eventually("packets to pass again", async || {
        match comes_back(&socket, &[&connected.echo], 64) {
            true => Ok(()),
            false => Err("lost".to_owned()),
        }
    })
    .await;
    end(nodes).await;
}

/// The node's end of the only pod link.
fn node_end(node: &Netns) -> String {
    let names: BTreeSet<String> = link_names(node).into_iter().collect();
    let others = ["eth0", "nsm-ext-4789"].map(str::to_owned);
    let ends: Vec<_> = names.difference(&others.into()).cloned().collect();
    assert_eq!(ends.len(), 1, "{names:?}");
    ends[0].clone()
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn an_external_device_that_is_taken_away_is_made_again() {
    sandbox(|| is_mended(|node| within(node, || ip("link del nsm-ext-4789"))));
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_nodes_end_that_is_taken_down_is_taken_up_again() {
    sandbox(|| {
        is_mended(|node| {
            let end = node_end(node);
            within(node, || ip(&format!("link set {end} down")));
        })
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_pod_link_without_its_program_gets_it_again() {
    sandbox(|| {
        is_mended(|node| {
            let end = node_end(node);
            within(node, || run("tc", &["qdisc", "del", "dev", &end, "clsact"]));
        })
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn without_a_program_nothing_of_a_pod_enters_the_node() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let connected = connect(&nodes, "one", 77, 4).await;
        let socket = towards(&connected.pods[0], "172.16.1.2");
        assert!(comes_back(&socket, &[&connected.echo], 64));
        let node = &world.nodes[0];
        let end_name = node_end(node);
        within(node, || {
            run("tc", &["qdisc", "del", "dev", &end_name, "clsact"])
        });
        // To the node's end itself: the kernel takes no other frame for one to the node.
        let shown = within(node, || {
            run("ip", &["-o", "link", "show", "dev", &end_name])
        });
        let mac = shown
            .split("link/ether ")
            .nth(1)
            .expect("an Ethernet address");
        let mac = mac.split(' ').next().expect("a word").to_owned();
        within(&connected.pods[0], || {
            ip(&format!("neigh replace 172.16.1.2 lladdr {mac} dev nsm-1"));
        });
        let fenced = || nodes[0].forwarding.fenced().expect("a fence").incoming;
        let before = fenced();
        for _ in 0..3 {
            assert!(!comes_back(&socket, &[&connected.echo], 64));
        }
        assert!(fenced() >= before + 3);
        end(nodes).await;
    });
}
