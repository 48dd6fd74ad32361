//! Connections between two pods of one node: two pod links that BPF joins, and switches between them and a tunnel.

use nsm_core::link::{LinkAlias, LinkSpec, PodLinkSpec};
use nsm_dataplane::{links::PodLink, netns::Netns};

use super::{
    data::{DOMAIN, Dataplane, Echo, comes_back, end, spec, towards, two_nodes},
    support::{
        By, CLSACT, TCX, Tap, World, eventually, ip, link_names, netns, run, sandbox, within,
    },
};

/// The address of every endpoint.
const ENDPOINT: &str = "172.16.1.2";

fn alias(id: &str) -> LinkAlias {
    LinkAlias::new(DOMAIN, id).expect("an alias")
}

/// Client and endpoint of a connection on node 1: the client is as one of node 1, the endpoint as one of node 2.
fn pair(nodes: &[Dataplane; 2], id: &str) -> [PodLinkSpec; 2] {
    let [client, mut endpoint] = [0, 1].map(|at| {
        let spec = spec(&nodes[at], id, 77, 4);
        PodLinkSpec {
            link: spec.link,
            sources: spec.sources,
        }
    });
    endpoint.link.alias = alias(id).of_endpoint().expect("an alias");
    [client, endpoint]
}

async fn up(node: &Dataplane, specs: &[PodLinkSpec; 2], pods: [&Netns; 2]) -> [PodLink; 2] {
    let [client, endpoint] = specs;
    let up = node
        .forwarding
        .up_pair((pods[0], client), (pods[1], endpoint));
    up.await.expect("up")
}

async fn first_packet(socket: &std::net::UdpSocket, echo: &Echo) {
    eventually("the first packet", async || {
        let came = comes_back(socket, &[echo], 1);
        came.then_some(()).ok_or_else(|| "lost".to_owned())
    })
    .await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn pods_of_one_node_talk_over_either_family_and_are_counted() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let world = World::new();
            let nodes = two_nodes(&world, by).await;
            let node = &nodes[0];
            let (client, echo) = (netns(), Echo::start(netns()));
            let made = up(node, &pair(&nodes, "one"), [&client, &echo.pod]).await;
            assert!(made.iter().all(|link| link.pod.created));
            for (target, largest) in [(ENDPOINT, 1430 - 28), ("fd00:9::2", 1430 - 48)] {
                let socket = towards(&client, target);
                first_packet(&socket, &echo).await;
                for size in [1, 100, largest, 20_000] {
                    let came = comes_back(&socket, &[&echo], size);
                    assert!(came, "{size} bytes to {target}, {by}");
                }
            }
            let ends = [alias("one"), alias("one").of_endpoint().expect("an alias")];
            let passed = ends.map(|end| node.forwarding.passed(&end).expect("counted"));
            assert!(passed.iter().all(|end| end.wire.is_none()));
            let [near, far] = passed.map(|end| end.link);
            assert!(near.sent.packets > 10, "{near:?}");
            assert_eq!(near.sent.packets, far.received.packets);
            assert_eq!(near.sent.bytes, far.received.bytes);
            assert_eq!(far.sent.packets, near.received.packets);
            // No tunnel, no external device; the fence stands all the same.
            assert_eq!(link_names(&node.netns).len(), 3);
            assert!(node.forwarding.fenced().is_some());
            end(nodes).await;
        }
    });
}

/// A frame to the other pod, but for the last bytes of its Ethernet addresses and for its source.
fn frame(destination: u8, source: u8, address: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, destination, 2, 0, 0, 0, 0, source, 8, 0];
    frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(address);
    frame.extend([172, 16, 1, 2, 0, 9, 0, 9, 0, 8, 0, 0]);
    frame
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_pod_sends_as_itself_to_the_other_pod_and_nothing_else() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let node = &nodes[0];
        let (client, echo) = (netns(), Echo::start(netns()));
        up(node, &pair(&nodes, "one"), [&client, &echo.pod]).await;
        let socket = towards(&client, ENDPOINT);
        first_packet(&socket, &echo).await;
        let (raw, own) = (Tap::open(&client, "nsm-1"), [172, 16, 1, 1]);
        for (frame, reason) in [
            (frame(2, 9, own), "pod_wrong_mac"),
            (frame(2, 1, [172, 16, 1, 9]), "pod_wrong_source"),
            (frame(9, 1, own), "pod_wrong_destination"),
        ] {
            let count = node.dropped(reason);
            raw.send(&frame);
            assert_eq!(node.dropped(reason), count + 1, "{reason}");
        }
        assert!(comes_back(&socket, &[&echo], 100));
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn the_nodes_own_namespace_may_be_either_pod() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let node = &nodes[0];
        for own in [0, 1] {
            let other = netns();
            let (client, endpoint) = match own {
                0 => (&node.netns, &other),
                _ => (&other, &node.netns),
            };
            up(node, &pair(&nodes, "one"), [client, endpoint]).await;
            let echo = Echo::start(endpoint.clone());
            let socket = towards(client, ENDPOINT);
            first_packet(&socket, &echo).await;
            assert!(comes_back(&socket, &[&echo], 1400), "{own}");
            for end in [alias("one"), alias("one").of_endpoint().expect("an alias")] {
                node.forwarding.down(&end).await.expect("down");
            }
        }
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_connection_is_switched_between_a_tunnel_and_a_pair_without_a_lost_packet() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let world = World::new();
            let nodes = two_nodes(&world, by).await;
            let [near, far] = [netns(), netns()].map(Echo::start);
            let there = spec(&nodes[1], "far", 77, 4);
            nodes[1].forwarding.up(&far.pod, &there).await.expect("up");
            let client = netns();
            let (tunnel, both) = (spec(&nodes[0], "one", 77, 4), pair(&nodes, "one"));
            let made = nodes[0].forwarding.up(&client, &tunnel).await.expect("up");
            let socket = towards(&client, ENDPOINT);
            first_packet(&socket, &far).await;
            for turn in 0..20 {
                // Each endpoint answers alone: what went to the other one would be lost.
                let echo = if turn % 2 == 0 {
                    let [kept, _] = up(&nodes[0], &both, [&client, &near.pod]).await;
                    assert_eq!((kept.pod.index, kept.pod.operations), (made.pod.index, 0));
                    assert_eq!(nodes[0].bpf.tunnels(), []);
                    &near
                } else {
                    let kept = nodes[0].forwarding.up(&client, &tunnel).await.expect("up");
                    assert_eq!((kept.pod.index, kept.pod.operations), (made.pod.index, 0));
                    &far
                };
                for _ in 0..10 {
                    assert!(comes_back(&socket, &[echo], 64), "turn {turn}, {by}");
                }
            }
            assert_eq!(nodes[0].bpf.slots_in_use(), 1);
            // The endpoint's link goes a moment after the switch.
            eventually("the endpoint's link to go", async || {
                let left = link_names(&near.pod);
                if left.is_empty() {
                    Ok(())
                } else {
                    Err(format!("{left:?}"))
                }
            })
            .await;
            end(nodes).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn the_next_agent_takes_a_pair_over_without_a_lost_packet() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let world = World::new();
            let [one, two] = two_nodes(&world, by).await;
            let nodes = [one, two];
            let (client, echo) = (netns(), Echo::start(netns()));
            let both = pair(&nodes, "one");
            up(&nodes[0], &both, [&client, &echo.pod]).await;
            // Of another connection the client's link goes while there is no agent.
            let others = [netns(), netns()];
            let half = pair(&nodes, "half");
            up(&nodes[0], &half, [&others[0], &others[1]]).await;
            let socket = towards(&client, ENDPOINT);
            first_packet(&socket, &echo).await;
            let flows = |what: &str| {
                for _ in 0..20 {
                    assert!(comes_back(&socket, &[&echo], 64), "{what}, {by}");
                }
            };
            let [one, two] = nodes;
            drop(one);
            within(&others[0], || ip("link del nsm-1"));
            flows("without an agent");
            let one = Dataplane::start(&world, 1, by).await;
            flows("with the next one");
            assert_eq!(one.forwarding.connections(), [alias("one")]);
            assert_eq!(one.bpf.slots_in_use(), 2, "those of the half are free");
            assert_eq!(link_names(&others[1]), [""; 0], "the half itself is gone");
            let ends = [alias("one"), alias("one").of_endpoint().expect("an alias")];
            for end in ends {
                let passed = one.forwarding.passed(&end).expect("counted");
                assert!(passed.link.sent.packets >= 40, "they go on: {passed:?}");
            }
            let again = up(&one, &both, [&client, &echo.pod]).await;
            assert!(again.iter().all(|link| link.pod.operations == 0));
            flows("refreshed");
            end([one, two]).await;
        }
    });
}

/// Until no connection is joined.
async fn is_noticed(node: &Dataplane) {
    eventually("the loss to be noticed", async || {
        node.forwarding.look_after().await.expect("looked");
        match node.forwarding.connections().as_slice() {
            [] => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await;
    assert_eq!(node.bpf.slots_in_use(), 0);
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_client_keeps_its_link_when_its_endpoint_goes() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let node = &nodes[0];
        assert_eq!(node.forwarding.look_after().await.expect("looked"), [""; 0]);
        let client = netns();
        let both = pair(&nodes, "one");
        let gone = netns();
        let [made, _] = up(node, &both, [&client, &gone]).await;
        drop(gone);
        is_noticed(node).await;
        let echo = Echo::start(netns());
        let [kept, other] = up(node, &both, [&client, &echo.pod]).await;
        assert_eq!((kept.pod.index, kept.pod.created), (made.pod.index, false));
        assert!(other.pod.created);
        assert!(comes_back(&towards(&client, ENDPOINT), &[&echo], 64));
        // Another endpoint, while the first is there: its link goes, the client's stays.
        let next = Echo::start(netns());
        let [kept, _] = up(node, &both, [&client, &next.pod]).await;
        assert_eq!((kept.pod.index, kept.pod.created), (made.pod.index, false));
        assert_eq!(link_names(&echo.pod), [""; 0]);
        assert!(comes_back(&towards(&client, ENDPOINT), &[&next], 64));
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn what_is_left_of_a_pair_goes_when_the_connection_takes_a_tunnel() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let node = &nodes[0];
        assert_eq!(node.forwarding.look_after().await.expect("looked"), [""; 0]);
        let pods = [netns(), netns()];
        up(node, &pair(&nodes, "one"), [&pods[0], &pods[1]]).await;
        within(&pods[0], || ip("link del nsm-1"));
        is_noticed(node).await;
        let tunnel = spec(node, "one", 77, 4);
        let made = node.forwarding.up(&pods[0], &tunnel).await.expect("up");
        assert!(made.pod.created);
        eventually("the endpoint's link to go", async || {
            let left = link_names(&pods[1]);
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn a_pair_that_cannot_be_made_leaves_what_was_there() {
    sandbox(|| async {
        let world = World::new();
        let nodes = two_nodes(&world, TCX).await;
        let (client, endpoint) = (netns(), netns());
        let far = Echo::start(netns());
        let there = spec(&nodes[1], "far", 77, 4);
        nodes[1].forwarding.up(&far.pod, &there).await.expect("up");
        let tunnel = spec(&nodes[0], "one", 77, 4);
        nodes[0].forwarding.up(&client, &tunnel).await.expect("up");
        let socket = towards(&client, ENDPOINT);
        first_packet(&socket, &far).await;
        within(&endpoint, || ip("link add nsm-1 type veth peer name other"));
        let [near, other] = pair(&nodes, "one");
        let up = nodes[0]
            .forwarding
            .up_pair((&client, &near), (&endpoint, &other));
        let error = up.await.expect_err("the name is taken").to_string();
        assert!(error.contains("nsm-1"), "{error}");
        assert!(comes_back(&socket, &[&far], 64), "the tunnel works on");
        // Of a new connection nothing is left.
        let [near, other] = pair(&nodes, "two");
        let near = PodLinkSpec {
            link: LinkSpec {
                name: "nsm-2".parse().expect("a name"),
                ..near.link
            },
            ..near
        };
        let pod = netns();
        let up = nodes[0]
            .forwarding
            .up_pair((&pod, &near), (&endpoint, &other));
        up.await.expect_err("the name is taken");
        assert_eq!(link_names(&pod), [""; 0]);
        assert_eq!(link_names(&endpoint), ["nsm-1", "other"]);
        end(nodes).await;
    });
}

/// What somebody does to an end of a pair on the node is found and undone.
async fn is_mended(by: By, harm: impl Fn(&str)) {
    let world = World::new();
    let nodes = two_nodes(&world, by).await;
    let node = &nodes[0];
    let (client, echo) = (netns(), Echo::start(netns()));
    let made = up(node, &pair(&nodes, "one"), [&client, &echo.pod]).await;
    let socket = towards(&client, ENDPOINT);
    first_packet(&socket, &echo).await;
    for end in &made {
        assert_eq!(node.forwarding.look_after().await.expect("looked"), [""; 0]);
        within(&node.netns, || harm(&end.node.name));
        assert_eq!(node.forwarding.look_after().await.expect("looked"), [""; 0]);
        first_packet(&socket, &echo).await;
    }
    end(nodes).await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, links"]
fn either_end_of_a_pair_is_mended() {
    sandbox(|| async {
        is_mended(TCX, |end| ip(&format!("link set {end} down"))).await;
        is_mended(CLSACT, |end| {
            run("tc", &["qdisc", "del", "dev", end, "clsact"]);
        })
        .await;
    });
}
