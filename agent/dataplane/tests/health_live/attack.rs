//! What others make up: spoofed, replayed, flooded. Counted, and nothing changes.

use nsm_core::{
    clock::Monotonic,
    liveness::{
        PEER_INSISTS, Verdict,
        sbfd::{Proof, State},
    },
};
use nsm_dataplane::liveness::Peer;
use nsm_ebpf_common::{
    management::{PROBES_AT_ONCE, PROBES_PER_SECOND},
    sbfd::frame::Role,
};

use super::fault::judged;
use super::support::{
    By, Node, OUTER, TCX, Tap, World, addr, discriminator, end, eventually, sandbox, sbfd_in,
    sendable, two_up, up, within,
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
    two_up(&[TCX], async |world, _by, nodes, peers| {
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
        end(nodes).await;
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

/// A probe of node 2 on its way to node 1.
async fn probe_to_node_1(tap: &Tap) -> Vec<u8> {
    tap.find("a probe to node 1", |frame| {
        let to_node_1 = frame.get(OUTER_SOURCE..)?[..4] == [10, 2, 0, 1];
        (to_node_1 && sbfd_in(frame)?.role == Role::Initiator).then(|| sendable(frame))
    })
    .await
}

/// Nothing has changed since both were up.
async fn unmoved(nodes: &mut [Node; 2], peers: &[Peer; 2], since: [Monotonic; 2]) {
    for ((node, peer), since) in nodes.iter_mut().zip(peers).zip(since) {
        assert_eq!(node.state_changes(), [], "node {}", node.number);
        let snapshot = peer.report().await.expect("report").snapshot;
        assert_eq!((snapshot.state, snapshot.since), (State::Up, since));
    }
}

async fn up_since(peers: &[Peer; 2]) -> [Monotonic; 2] {
    let mut since = [Monotonic::default(); 2];
    for (since, peer) in since.iter_mut().zip(peers) {
        *since = peer.report().await.expect("report").snapshot.since;
    }
    since
}

/// What somebody makes up who sees nothing of the path: it is dropped and counted, and neither node takes notice.
#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets"]
fn a_flood_of_guessed_probes_moves_neither_node() {
    const FLOOD: u64 = 30_000;
    two_up(&[TCX], async |world, _by, mut nodes, peers| {
        let since = up_since(&peers).await;
        let tap = Tap::open(&world.router, "to1");
        let probe = probe_to_node_1(&tap).await;
        let before = sent_by(&nodes[0]).0;
        let start = std::time::Instant::now();
        for (wrong, reason) in [
            (YOUR_DISCRIMINATOR, "sbfd_unknown_discriminator"),
            (INNER_SENDER + 3, "sbfd_unknown_peer"),
            (OUTER_SOURCE, "wrong_source"),
        ] {
            let mut forged = probe.clone();
            forged[wrong] ^= 1;
            let dropped = nodes[0].dropped(reason);
            for _ in 0..FLOOD {
                tap.send(&forged);
            }
            counted(&nodes[0], reason, dropped + FLOOD - 1).await;
        }
        // None was answered: the node's own packets are some 60 a second.
        let sent = sent_by(&nodes[0]).0 - before;
        let most = 1_000 * (start.elapsed().as_secs() + 1);
        assert!(sent <= most, "{sent} packets");
        unmoved(&mut nodes, &peers, since).await;
        end(nodes).await;
    });
}

/// A recording of one probe of node 2, replayed: as good as node 2's own but for its number.
#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets"]
fn a_flood_of_replayed_probes_is_answered_at_a_bounded_rate_and_moves_neither_node() {
    const FLOOD: u64 = 100_000;
    two_up(&[TCX], async |world, _by, mut nodes, peers| {
        let since = up_since(&peers).await;
        let tap = Tap::open(&world.router, "to1");
        let probe = probe_to_node_1(&tap).await;
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
        assert!(nodes[0].dropped("sbfd_replayed") >= PROBES_AT_ONCE);
        // Also node 2, whose answers these are: replayed probes take none of them.
        unmoved(&mut nodes, &peers, since).await;
        end(nodes).await;
    });
}

/// While nothing passes any more, a probe that once was node 2's goes on coming in.
async fn replayed(by: By) {
    let world = World::new();
    let (mut nodes, peers) = up(&world, by, 4).await;
    let tap = Tap::open(&world.router, "to1");
    let probe = probe_to_node_1(&tap).await;
    world.drop_between("udp dport 4789");
    nodes[0].becomes(State::Down).await;
    let before = nodes[0].dropped("sbfd_replayed");
    // A peer that insists that all is well is believed after one second.
    let insisted = 2 * PEER_INSISTS;
    eventually("a lasting verdict", async || {
        tap.send(&probe);
        let (health, down_for) = judged(&peers[0]).await;
        assert_eq!(health.verdict(), Verdict::Down, "{health}");
        assert_eq!(health.inward.verdict, Verdict::Down, "{health:?}");
        let replayed = nodes[0].dropped("sbfd_replayed") - before;
        let is_over = down_for > insisted && replayed > 20;
        is_over
            .then_some(())
            .ok_or_else(|| format!("{replayed} in {down_for:?}"))
    })
    .await;
    assert_eq!(nodes[0].state_changes(), []);
    // And the peer itself is heard again.
    world.mend();
    for node in &mut nodes {
        node.becomes(State::Up).await;
    }
    let heard = peers[0].report().await.expect("report").snapshot.peer;
    eventually("node 2 itself", async || {
        let now = peers[0].report().await.expect("report").snapshot.peer;
        let is_later = now.map(|probe| probe.at) > heard.map(|probe| probe.at);
        is_later.then_some(()).ok_or_else(|| format!("{now:?}"))
    })
    .await;
    end(nodes).await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, packet sockets, nftables"]
fn a_replayed_probe_does_not_hide_that_the_path_is_cut() {
    sandbox(|| replayed(TCX));
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
    wrong.reflector.discriminator = discriminator(wrong.reflector.discriminator.get() ^ 1);
    let peer = nodes[0].health.join(wrong).await.expect("joined");
    let proof = peer.prove().await.expect("proof");
    assert!(matches!(proof, Proof::Silent { .. }), "{proof:?}");
    assert!(nodes[1].dropped("sbfd_unknown_discriminator") >= 1);
    assert_eq!(peer.spec().address, addr("10.2.0.1"));
    end(nodes).await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_probe_to_a_reflector_of_another_name_is_dropped_and_counted() {
    sandbox(|| another_name(TCX));
}
