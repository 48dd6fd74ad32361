//! A good path: proved, watched, measured, by every way of stamping and over both families.

use nsm_core::liveness::sbfd::{Proof, State};

use super::support::{By, CLSACT, TCX, World, end, eventually, sandbox, up};

async fn watch_each_other(by: By, family: u8) {
    let world = World::new();
    let (nodes, peers) = up(&world, by, family).await;
    for peer in &peers {
        let report = eventually("a few answers", async || {
            let report = peer.report().await.expect("report");
            if report.answers >= 10 {
                Ok(report)
            } else {
                Err(format!("{report:?}"))
            }
        })
        .await;
        assert_eq!(report.snapshot.state, State::Up);
        assert_eq!(report.users, 1);
        // The first ones may come before their sender is known there, and one may be on its way.
        assert!(report.probes - report.answers <= 6, "{report:?}");
        assert!(report.stages_when_up.link_out > 0, "{report:?}");
        assert!(report.snapshot.peer.is_some(), "the peer's own probes");
        assert_eq!(report.peer_is_independent, Some(true));
        assert!(report.statistics.rtt_p50.is_some());
        let stages = report.stages;
        // Read one after the other, with packets between.
        let (came, arrived) = (stages.card_in.expect("in"), stages.link_in);
        assert!(came.abs_diff(arrived) <= 2, "{stages:?}");
        let (left, out) = (stages.link_out, stages.card_out.expect("out"));
        assert!(left.abs_diff(out) <= 2, "{stages:?}");
        // Up, a proof needs no probe.
        assert_eq!(peer.prove().await.expect("proof"), Proof::Reached);
    }
    for node in &nodes {
        // The first probes may come before their sender is known here.
        let early = ["foreign_vni_in", "tunnel_unknown", "wrong_source"];
        let mut drops = node.drops();
        drops.retain(|(reason, _)| !early.contains(reason));
        assert_eq!(drops, [], "node {}", node.number);
    }
    end(nodes).await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn two_nodes_watch_each_other_by_tcx() {
    sandbox(|| watch_each_other(TCX, 4));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn two_nodes_watch_each_other_over_ipv6() {
    sandbox(|| watch_each_other(TCX, 6));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn two_nodes_watch_each_other_by_clsact() {
    sandbox(|| watch_each_other(CLSACT, 4));
}
