//! What others make up: spoofed, replayed, flooded. Counted, and nothing changes.

use nsm_core::sbfd::{Proof, State};
use nsm_ebpf_common::{
    management::{PROBES_AT_ONCE, PROBES_PER_SECOND},
    sbfd::frame::Role,
};

use super::support::{
    By, Node, OUTER, TCX, Tap, World, addr, both_up, discriminator, eventually, pair, sandbox,
    sbfd_in, sendable, within,
};

/// Where things are in an inner frame over IPv4.
const INNER_SOURCE: usize = OUTER + 14 + 12;
const CONTROL: usize = OUTER + 14 + 20 + 8;
const YOUR_DISCRIMINATOR: usize = CONTROL + 8;
const INNER_SENDER: usize = OUTER + 6;
const OUTER_SOURCE: usize = 14 + 12;

async fn counted(node: &Node, reason: &str, more_than: u64) {
    eventually(reason, async || {
        let count = node.dropped(reason);
        if count > more_than {
            Ok(())
        } else {
            Err(format!("{:?}", node.drops()))
        }
    })
    .await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets"]
fn answers_that_are_made_up_change_nothing() {
    sandbox(|| async {
        let world = World::new();
        let (mut nodes, peers) = pair(&world, TCX, 4).await;
        both_up(&mut nodes, &peers).await;
        // On the wire to node 1, where an attacker could be who sees everything.
        let tap = Tap::open(&world.router, "to1");
        let answer = tap
            .find("an answer to node 1", |frame| {
                let to_node_1 = frame.get(OUTER_SOURCE..)?[..4] == [10, 2, 0, 1];
                (to_node_1 && sbfd_in(frame)?.role == Role::Reflector).then(|| sendable(frame))
            })
            .await;
        let answered = nodes[0].health.reports().await.expect("reports")[0].answers;
        let node = &nodes[0];
        let before = |reason| node.dropped(reason);

        let stale = before("sbfd_stale");
        tap.send(&answer);
        counted(node, "sbfd_stale", stale).await;

        let mut forged = answer.clone();
        forged[OUTER_SOURCE..OUTER_SOURCE + 4].copy_from_slice(&[10, 9, 9, 9]);
        let wrong = before("wrong_source");
        tap.send(&forged);
        counted(node, "wrong_source", wrong).await;

        let mut forged = answer.clone();
        forged[INNER_SOURCE..INNER_SOURCE + 4].copy_from_slice(&[10, 9, 9, 9]);
        let wrong = before("sbfd_wrong_source");
        tap.send(&forged);
        counted(node, "sbfd_wrong_source", wrong).await;

        let mut forged = answer.clone();
        forged[YOUR_DISCRIMINATOR] ^= 1;
        let unknown = before("sbfd_unknown_discriminator");
        tap.send(&forged);
        counted(node, "sbfd_unknown_discriminator", unknown).await;

        let mut forged = answer.clone();
        forged[INNER_SENDER + 3] ^= 1;
        let unknown = before("sbfd_unknown_peer");
        tap.send(&forged);
        counted(node, "sbfd_unknown_peer", unknown).await;

        let mut forged = answer;
        forged[CONTROL] = 0;
        let malformed = before("sbfd_malformed");
        tap.send(&forged);
        counted(node, "sbfd_malformed", malformed).await;

        let report = peers[0].report().await.expect("report");
        assert_eq!(report.snapshot.state, State::Up);
        assert!(report.answers >= answered && report.answers <= report.probes);
        for node in nodes {
            node.end().await;
        }
    });
}

/// Packets and bytes that an interface has sent.
fn sent_by(node: &Node) -> (u64, u64) {
    let table = within(&node.netns, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").expect("table")
    });
    let line = table.lines().find(|line| line.trim().starts_with("eth0:"));
    let (_, numbers) = line.and_then(|line| line.split_once(':')).expect("eth0");
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .map(|number| number.parse().expect("a number"))
        .collect();
    (numbers[9], numbers[8])
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets"]
fn a_flood_of_probes_is_answered_at_a_bounded_rate() {
    const FLOOD: u64 = 100_000;
    sandbox(|| async {
        let world = World::new();
        let (mut nodes, peers) = pair(&world, TCX, 4).await;
        both_up(&mut nodes, &peers).await;
        let tap = Tap::open(&world.router, "to1");
        let probe = tap
            .find("a probe to node 1", |frame| {
                let to_node_1 = frame.get(OUTER_SOURCE..)?[..4] == [10, 2, 0, 1];
                (to_node_1 && sbfd_in(frame)?.role == Role::Initiator).then(|| sendable(frame))
            })
            .await;
        let (packets, bytes) = sent_by(&nodes[0]);
        let start = std::time::Instant::now();
        for _ in 0..FLOOD {
            tap.send(&probe);
        }
        let limited = FLOOD - PROBES_AT_ONCE - PROBES_PER_SECOND * (start.elapsed().as_secs() + 1);
        counted(&nodes[0], "sbfd_rate_limited", limited).await;
        let seconds = start.elapsed().as_secs() + 1;
        let (packets, bytes) = {
            let (now_packets, now_bytes) = sent_by(&nodes[0]);
            (now_packets - packets, now_bytes - bytes)
        };
        // Answers to the flood, and what the node says of its own: far less than it got.
        let most = PROBES_AT_ONCE + (PROBES_PER_SECOND + 400) * (seconds + 1);
        assert!(packets <= most, "{packets} packets in {seconds} s");
        assert!(bytes <= most * probe.len() as u64, "{bytes} bytes");
        assert!(bytes <= FLOOD * probe.len() as u64);
        // The flood takes the peer's share of answers, and no more: the session comes back by itself.
        let peer = &peers[0];
        eventually("up", async || match peer.is_up() {
            true => Ok(()),
            false => Err("down".to_owned()),
        })
        .await;
        for node in nodes {
            node.end().await;
        }
    });
}

async fn another_name(by: By) {
    let world = World::new();
    let nodes = [1, 2].map(|number| Node::start(&world, number, by));
    let _known = nodes[1]
        .health
        .join(nodes[0].spec(4))
        .await
        .expect("joined");
    let mut wrong = nodes[1].spec(4);
    wrong.discriminator = discriminator(wrong.discriminator.get() ^ 1);
    let peer = nodes[0].health.join(wrong).await.expect("joined");
    let proof = peer.prove().await.expect("proof");
    assert!(matches!(proof, Proof::Silent { .. }), "{proof:?}");
    assert!(nodes[1].dropped("sbfd_unknown_discriminator") >= 1);
    assert_eq!(peer.spec().address, addr("10.2.0.1"));
    for node in nodes {
        node.end().await;
    }
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_probe_to_a_reflector_of_another_name_is_dropped_and_counted() {
    sandbox(|| another_name(TCX));
}

#[test]
#[ignore = "needs root: namespaces, VXLAN, packet sockets"]
fn a_probe_to_a_reflector_of_another_name_is_dropped_and_counted_without_bpf() {
    sandbox(|| another_name(By::UserSpace));
}
