//! What breaks, and what the sessions and the stages say of it.

use std::time::Duration;

use nsm_core::liveness::{
    Direction, Evidence, Health, judge,
    sbfd::{Change, Proof, State},
};
use nsm_dataplane::{
    bpf,
    liveness::{Event, Peer, Report},
};

use super::support::{
    Node, OUTER, PATIENCE, TCX, Tap, World, addr, both_up, end, eventually, join, nft, sandbox,
    sbfd_in, sendable, two_up, up, within,
};

/// Drops the packets of node 1 on their way. Node 2 hears nothing any more, and answers nothing; node 1 goes on hearing node 2.
async fn one_way(family: u8, from: &str) {
    let world = World::new();
    let (mut nodes, peers) = up(&world, TCX, family).await;

    world.drop_between(from);
    for node in &mut nodes {
        node.becomes(State::Down).await;
    }
    let heard = |report: &Report| report.snapshot.peer.map(|probe| probe.at);
    let before = [report(&peers[0]).await, report(&peers[1]).await];
    let told = eventually("node 1 hears node 2 say that it is down", async || {
        let report = report(&peers[0]).await;
        match report.snapshot.peer {
            Some(probe) if probe.state as u8 == 1 && heard(&report) > heard(&before[0]) => {
                Ok(probe.diagnostic)
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(told, 1, "control detection time expired");
    let after = report(&peers[1]).await;
    assert_eq!(heard(&after), heard(&before[1]), "node 2 hears nothing");
    assert_eq!(after.stages.card_in, before[1].stages.card_in);

    world.mend();
    for node in &mut nodes {
        node.becomes(State::Up).await;
    }
    end(nodes).await;
}

/// What the evidence of a path says now, and since when its session is as it is.
pub(crate) async fn judged(peer: &Peer) -> (Health, Duration) {
    let report = report(peer).await;
    let now = bpf::now();
    let evidence = Evidence {
        path: report.path,
        at: now,
        session: report.snapshot,
        stages: report.stages_since_up(),
        peer_probes_elsewhere: report.peer_probes_elsewhere,
        peer_report: None,
    };
    (judge(&evidence), now.since(report.snapshot.since))
}

/// Why one way of the path is as it is, by the name of the reason.
pub(crate) async fn reason(peer: &Peer, direction: Direction) -> String {
    let (health, _) = judged(peer).await;
    let name = format!("{:?}", health.finding(direction).reason);
    name.split([' ', '{']).next().unwrap_or_default().to_owned()
}

/// Waits for a reason: what the stages say is told once somebody has looked at routes and hooks.
pub(crate) async fn becomes_reason(peer: &Peer, direction: Direction, wanted: &str) {
    eventually(wanted, async || match reason(peer, direction).await {
        reason if reason == wanted => Ok(()),
        other => Err(other),
    })
    .await;
}

async fn report(peer: &Peer) -> Report {
    peer.report().await.expect("report")
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_loss_one_way_is_told_apart_by_who_is_heard() {
    sandbox(|| one_way(4, "ip saddr 10.1.0.1"));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_loss_the_other_way_over_ipv6_is_told_apart_by_who_is_heard() {
    sandbox(|| one_way(6, "ip6 saddr fd00:1::1"));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn the_own_firewall_is_seen_between_card_and_link() {
    two_up(&[TCX], async |world, _by, mut nodes, peers| {
        within(&world.nodes[1], || {
            nft("add table inet fw; \
                 add chain inet fw input { type filter hook input priority 0; }; \
                 add rule inet fw input udp dport 4789 drop");
        });
        for node in &mut nodes {
            node.becomes(State::Down).await;
        }
        becomes_reason(&peers[1], Direction::In, "OwnInputDrops").await;
        within(&world.nodes[1], || nft("delete table inet fw"));
        nodes[1].becomes(State::Up).await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn the_own_output_filter_is_seen_between_link_and_card() {
    two_up(&[TCX], async |world, _by, mut nodes, peers| {
        within(&world.nodes[0], || {
            nft("add table inet fw; \
                 add chain inet fw output { type filter hook output priority 0; }; \
                 add rule inet fw output udp dport 4789 drop");
        });
        nodes[0].becomes(State::Down).await;
        becomes_reason(&peers[0], Direction::Out, "OwnOutputDrops").await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables with conntrack"]
fn a_firewall_that_lets_only_replies_in_is_no_good_path() {
    sandbox(|| async {
        let world = World::new();
        let nodes = [1, 2].map(|number| Node::start(&world, number, TCX));
        within(&world.nodes[0], || {
            nft("add table inet fw; \
                 add chain inet fw input { type filter hook input priority 0; }; \
                 add rule inet fw input ct state established accept; \
                 add rule inet fw input udp dport 4789 drop");
        });
        let peers = join(&nodes, 4).await;
        let proof = peers[0].prove().await.expect("proof");
        assert!(
            matches!(proof, Proof::Silent { probes: 1.., .. }),
            "{proof:?}"
        );
        let report = report(&peers[0]).await;
        // The answers are new flows to port 4789, as data is. They come to the card and no further.
        assert!(report.stages.card_in > Some(0), "{report:?}");
        assert_eq!(report.stages.link_in, 0, "{report:?}");
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_vni_that_is_not_ours_is_told_when_a_peer_sends_it() {
    two_up(&[TCX], async |world, _by, mut nodes, _peers| {
        let tap = Tap::open(&world.nodes[1], "eth0");
        let mut frame = tap
            .find("what node 2 sends", |frame| {
                let is_own = frame.get(26..30)? == [10, 2, 0, 1];
                sbfd_in(frame).filter(|_| is_own).map(|_| sendable(frame))
            })
            .await;
        frame[OUTER - 2] = 77;
        tap.send(&frame);
        let told = async {
            loop {
                if let Some(Event::ForeignVni(foreign)) = nodes[0].events.recv().await
                    && foreign.vni == 77
                {
                    return foreign;
                }
            }
        };
        let told = tokio::time::timeout(PATIENCE, told).await.expect("told");
        assert_eq!(told.peer, addr("10.2.0.1"));
        assert!(told.packets >= 1);
        end(nodes).await;
    });
}

/// What a path of 1,280 bytes carries inside: less outer IPv4, UDP and VXLAN headers and the inner Ethernet header.
const INNER_OF_1280: u16 = 1280 - 20 - 8 - 8 - 14;

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_black_hole_for_large_packets_is_found() {
    two_up(&[TCX], async |world, _by, mut nodes, peers| {
        peers[0].want_mtu(1200, 1450);
        path_mtu(&mut nodes[0], |mtu| mtu == 1450).await;

        // The path shrinks, and says nothing.
        world.drop_between("meta length > 1280");
        path_mtu(&mut nodes[0], |mtu| mtu <= INNER_OF_1280).await;
        assert!(peers[0].is_up(), "small packets pass");
        // It is then found how large they may be.
        let found = eventually("the largest size", async || {
            let mtu = report(&peers[0]).await.snapshot.path_mtu;
            match mtu {
                Some(mtu) if mtu > 1200 && mtu <= INNER_OF_1280 => Ok(mtu),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        assert!(found > 1200);
        end(nodes).await;
    });
}

async fn path_mtu(node: &mut Node, wanted: impl Fn(u16) -> bool) {
    let found = async {
        loop {
            if let Some(Event::Session {
                change: Change::PathMtu { to, .. },
                ..
            }) = node.events.recv().await
                && wanted(to)
            {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .expect("a path MTU");
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn probes_that_cannot_leave_are_no_loss() {
    two_up(&[TCX], async |world, _by, mut nodes, _peers| {
        // Before the stamp: this hook comes first.
        within(&world.nodes[0], || {
            nft("add table netdev kept; \
                 add chain netdev kept back \
                 { type filter hook egress device \"nsm-mgmt4-4789\" priority 0; policy drop; }");
        });
        nodes[0].becomes(State::Unknown).await;
        within(&world.nodes[0], || nft("delete table netdev kept"));
        nodes[0].becomes(State::Up).await;
        end(nodes).await;
    });
}

/// What goes to such a peer has its VNI, which is not counted here: its absence at the card says nothing.
#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_loss_to_a_peer_of_another_management_vni_is_not_our_own_output() {
    sandbox(|| async {
        let world = World::new();
        let vni = nsm_core::net::Vni::try_from(7).expect("a VNI");
        let mut nodes = [
            Node::start(&world, 1, TCX),
            Node::start_with(&world, 2, TCX, |config| config.vni = vni),
        ];
        let mut spec = nodes[1].spec(4);
        spec.reflector.vni = vni;
        let peers = [
            nodes[0].health.join(spec).await.expect("joined"),
            nodes[1]
                .health
                .join(nodes[0].spec(4))
                .await
                .expect("joined"),
        ];
        both_up(&mut nodes, &peers).await;
        world.drop_between("udp dport 4789");
        nodes[0].becomes(State::Down).await;
        assert_ne!(reason(&peers[0], Direction::Out).await, "OwnOutputDrops");
        let stages = peers[0].report().await.expect("report").stages;
        assert_eq!(stages.card_out, None);
        assert!(
            stages.card_in.is_some_and(|packets| packets > 0),
            "{stages:?}"
        );
        end(nodes).await;
    });
}
