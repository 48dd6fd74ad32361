//! Several ways to one node, several nodes at one address, and what others say of both.

use std::sync::Arc;

use nsm_core::liveness::{
    Direction, PathId, Reflector, Verdict,
    sbfd::{Change, Proof, State},
};
use nsm_dataplane::liveness::{Event, Peer};

use super::{
    fault::{judged, reason},
    support::{
        CLSACT, Node, TCX, World, addr, discriminator, end, eventually, ip, two_up, two_up_in,
        within,
    },
};

/// The path is proved, at the latest when both sides know each other.
async fn reached(peer: &Peer) {
    eventually("a proof", async || {
        match peer.prove().await.expect("proof") {
            Proof::Reached => Ok(()),
            other => Err(format!("{:?}: {other:?}", peer.spec())),
        }
    })
    .await;
}

/// The session is up, and goes on being answered.
async fn goes_on(peer: &Peer) {
    let answers = peer.report().await.expect("report").answers;
    eventually("answers", async || {
        let report = peer.report().await.expect("report");
        let is_well = peer.is_up() && report.answers >= answers + 20;
        is_well.then_some(()).ok_or_else(|| format!("{report:?}"))
    })
    .await;
}

async fn is_down(peer: &Peer) {
    eventually("a loss", async || match peer.report().await {
        Ok(report) if report.snapshot.state == State::Down => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

/// A node gets another address in place of its own.
fn move_node(world: &World, number: usize) {
    within(&world.nodes[number - 1], || {
        ip(&format!("addr del 10.{number}.0.1/24 dev eth0"));
        ip(&format!("addr add 10.{number}.0.2/24 dev eth0"));
        ip(&format!("route add default via 10.{number}.0.254"));
    });
}

fn elsewhere(spec: PathId, address: &str) -> PathId {
    PathId {
        address: addr(address),
        ..spec
    }
}

/// Node 2 has a second address, before it starts.
fn second_address(world: &World) {
    within(&world.nodes[1], || ip("addr add 10.2.0.2/24 dev eth0"));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn each_family_of_addresses_is_answered_on_its_own_link() {
    two_up(&[TCX], async |_world, _by, nodes, peers| {
        let six = super::support::join(&nodes, 6).await;
        for peer in &six {
            reached(peer).await;
        }
        for peer in six.iter().chain(&peers) {
            goes_on(peer).await;
            let report = peer.report().await.expect("report");
            assert!(report.reflected > 0, "its probes are its own: {report:?}");
        }
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_node_is_reached_by_two_addresses_at_once() {
    two_up_in(second_address, &[TCX], async |_world, _by, nodes, peers| {
        let second = elsewhere(nodes[1].spec(4), "10.2.0.2");
        let second = nodes[0].health.join(second).await.expect("joined");
        reached(&second).await;
        for peer in peers.iter().chain([&second]) {
            goes_on(peer).await;
        }
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_node_that_moved_is_answered_where_it_is_now() {
    two_up(&[TCX], async |world, _by, nodes, peers| {
        move_node(&world, 2);
        let moved = elsewhere(nodes[1].spec(4), "10.2.0.2");
        let moved = nodes[0].health.join(moved).await.expect("joined");
        reached(&moved).await;
        // Connections to where it was are still there.
        let [before, to_one] = peers;
        is_down(&before).await;
        goes_on(&to_one).await;
        goes_on(&moved).await;
        // The other way goes, and is not missed.
        drop(before);
        eventually("one session", async || {
            let reports = nodes[0].health.reports().await.expect("reports");
            (reports.len() == 1)
                .then_some(())
                .ok_or_else(|| format!("{reports:?}"))
        })
        .await;
        goes_on(&moved).await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn two_nodes_that_moved_at_once_find_each_other() {
    two_up(&[TCX], async |world, _by, nodes, peers| {
        for number in [1, 2] {
            move_node(&world, number);
        }
        for peer in &peers {
            is_down(peer).await;
        }
        let moved = [
            elsewhere(nodes[1].spec(4), "10.2.0.2"),
            elsewhere(nodes[0].spec(4), "10.1.0.2"),
        ];
        let one = nodes[0].health.join(moved[0]).await.expect("joined");
        let two = nodes[1].health.join(moved[1]).await.expect("joined");
        for peer in [&one, &two] {
            reached(peer).await;
        }
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn what_another_says_of_a_peer_takes_nothing_from_it() {
    two_up(&[TCX], async |_world, _by, mut nodes, peers| {
        let spec = nodes[1].spec(4);
        let claims = [
            PathId {
                reflector: Reflector {
                    discriminator: discriminator(0x1234_5678),
                    ..spec.reflector
                },
                ..spec
            },
            PathId { port: 4999, ..spec },
            PathId {
                port: 4999,
                reflector: Reflector {
                    discriminator: discriminator(0x1234_5679),
                    ..spec.reflector
                },
                ..spec
            },
            PathId {
                reflector: Reflector {
                    vni: nsm_core::net::Vni::try_from(77).expect("a VNI"),
                    ..spec.reflector
                },
                ..spec
            },
            // The peer's own name, at an address of somebody else.
            elsewhere(spec, "10.2.0.99"),
        ];
        let mut claimed = Vec::new();
        for claim in claims {
            let peer = nodes[0].health.join(claim).await.expect("joined");
            let proof = peer.prove().await.expect("proof");
            assert!(
                matches!(proof, Proof::Silent { .. }),
                "{claim:?}: {proof:?}"
            );
            claimed.push(peer);
        }
        for peer in &peers {
            goes_on(peer).await;
        }
        let again = nodes[0].health.join(spec).await.expect("joined");
        assert!(again.is_up(), "the session that stood");
        drop(claimed);
        while let Ok(event) = nodes[0].events.try_recv() {
            let Event::Session { change, report } = &event else {
                continue;
            };
            let lost = matches!(
                change,
                Change::State {
                    to: State::Down,
                    ..
                }
            );
            assert!(!lost || report.path != spec, "{event:?}");
        }
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_peer_that_lost_its_name_is_known_by_the_new_one_at_once() {
    two_up(&[TCX], async |world, _by, nodes, peers| {
        let [one, two] = nodes;
        let before = two.health.discriminator();
        let [to_two, to_one] = peers;
        drop(to_one);
        two.end().await;
        let two = Node::start(&world, 2, TCX);
        assert_ne!(two.health.discriminator(), before);
        let to_one = two.health.join(one.spec(4)).await.expect("joined");
        let anew = one.health.join(two.spec(4)).await.expect("joined");
        for peer in [&anew, &to_one] {
            reached(peer).await;
        }
        is_down(&to_two).await;
        for peer in [&anew, &to_one] {
            goes_on(peer).await;
        }
        end([one, two]).await;
    });
}

/// Ends an agent as kill -9 does: nothing is closed in order.
async fn kill(node: Node) {
    let Node {
        bpf,
        devices,
        health,
        events,
        ..
    } = node;
    drop((health, events, devices));
    // The threads end by themselves and let go of the pins' lock.
    eventually("the old agent's end", async || {
        match Arc::strong_count(&bpf) {
            1 => Ok(()),
            count => Err(format!("{count} users")),
        }
    })
    .await;
}

/// The peers that were told lost.
fn lost(node: &mut Node) -> Vec<PathId> {
    std::iter::from_fn(|| node.events.try_recv().ok())
        .filter_map(|event| match event {
            Event::Session {
                change: Change::State {
                    to: State::Down, ..
                },
                report,
            } => Some(report.path),
            _ => None,
        })
        .collect()
}

/// What was answered of the node that this one is at the other end of, goes on being answered.
async fn is_answered_on(peer: &Peer) {
    let reflected = peer.report().await.expect("report").reflected;
    eventually("its probes", async || {
        let report = peer.report().await.expect("report");
        (report.reflected >= reflected + 40)
            .then_some(())
            .ok_or_else(|| format!("{report:?}"))
    })
    .await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn who_comes_back_first_takes_nothing_from_the_way_that_worked_before_a_restart() {
    two_up(&[TCX, CLSACT], async |world, by, nodes, peers| {
        let ([one, mut two], [to_two, to_one]) = (nodes, peers);
        let spec = two.spec(4);
        drop(to_two);
        kill(one).await;

        let mut one = Node::start(&world, 1, by);
        let claims = [elsewhere(spec, "10.2.0.99"), PathId { port: 4999, ..spec }];
        let mut claimed = Vec::new();
        for claim in claims {
            let peer = one.health.join(claim).await.expect("joined");
            let proof = peer.prove().await.expect("proof");
            assert!(
                matches!(proof, Proof::Silent { .. }),
                "{claim:?}: {proof:?}"
            );
            claimed.push(peer);
        }
        goes_on(&to_one).await;
        let to_two = one.health.join(spec).await.expect("joined");
        reached(&to_two).await;
        for peer in [&to_one, &to_two] {
            goes_on(peer).await;
        }
        assert_eq!(one.dropped("wrong_source"), 0);
        assert_eq!(lost(&mut two), []);
        assert!(!lost(&mut one).contains(&spec));
        drop(claimed);
        end([one, two]).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_way_that_is_good_takes_the_place_of_one_of_before_a_restart_and_leaves_it_its_session() {
    two_up_in(second_address, &[TCX], async |world, _by, nodes, peers| {
        let [one, mut two] = nodes;
        let spec = two.spec(4);
        let [to_two, to_one] = peers;
        drop(to_two);
        kill(one).await;

        let one = Node::start(&world, 1, TCX);
        let second = one.health.join(elsewhere(spec, "10.2.0.2")).await;
        let second = second.expect("joined");
        reached(&second).await;
        // The probes of node 2 still come from its first address.
        is_answered_on(&second).await;
        let first = one.health.join(spec).await.expect("joined");
        reached(&first).await;
        for peer in [&first, &second, &to_one] {
            goes_on(peer).await;
        }
        assert_eq!(one.dropped("wrong_source"), 0);
        assert_eq!(lost(&mut two), []);
        end([one, two]).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn one_of_two_ways_breaks_and_the_other_and_the_peer_notice_nothing() {
    two_up_in(
        second_address,
        &[TCX],
        async |world, _by, mut nodes, peers| {
            let spec = nodes[1].spec(4);
            let second = elsewhere(spec, "10.2.0.2");
            let second = nodes[0].health.join(second).await.expect("joined");
            reached(&second).await;
            for peer in peers.iter().chain([&second]) {
                goes_on(peer).await;
            }
            for node in &mut nodes {
                assert_eq!(lost(node), []);
            }

            // The probes of node 2 go on coming from there.
            world.drop_between("ip saddr 10.1.0.1 ip daddr 10.2.0.1");
            is_down(&peers[0]).await;
            // Long enough for somebody to have looked at the hooks.
            is_answered_on(&second).await;
            let (health, _) = judged(&peers[0]).await;
            let verdicts = [health.inward.verdict, health.outward.verdict];
            assert_eq!(verdicts, [Verdict::Unknown, Verdict::Down], "{health:?}");
            assert_eq!(reason(&peers[0], Direction::Out).await, "Unanswered");
            assert_eq!(reason(&peers[0], Direction::In).await, "NoEvidence");
            for peer in [&second, &peers[1]] {
                goes_on(peer).await;
            }
            let [one, two] = &mut nodes;
            assert_eq!(lost(one), [spec]);
            assert_eq!(lost(two), []);

            world.mend();
            reached(&peers[0]).await;
            for peer in peers.iter().chain([&second]) {
                goes_on(peer).await;
            }
            end(nodes).await;
        },
    );
}
