//! Metrics of the present state and of the kernel's counters.

use std::{fmt::Debug, hash::Hash, sync::atomic::AtomicU64};

use nsm_core::{link::Count, liveness::Verdict};
use nsm_dataplane::bpf::{Bpf, PathsTaken};
use nsm_proto::connection::State as ConnectionState;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use crate::observe::evidence::{ConnectionEvidence, Evidence, IdentityEvidence, PeerEvidence};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPath {
    path: &'static str,
}

impl From<Verdict> for OfPath {
    fn from(verdict: Verdict) -> Self {
        Self {
            path: verdict.as_str(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfFrames {
    direction: &'static str,
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// One connection. `peer` is the other end of its tunnel, `domain` that of the service asked for; both stay what they are for the
/// connection's life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfConnection {
    pub(super) connection: String,
    pub(super) peer: String,
    pub(super) domain: String,
}

impl OfConnection {
    /// The labels of a connection whose tunnel ends on this node.
    pub(super) fn of(connection: &ConnectionEvidence) -> Option<Self> {
        Some(Self {
            connection: connection.id.clone(),
            peer: connection.tunnel.as_ref()?.remote.to_string(),
            domain: connection.domain.to_string(),
        })
    }
}

/// Adds everything but paths to `registry`.
pub(super) fn register(evidence: &Evidence, registry: &mut Registry) {
    agent(evidence, registry);
    connections(&evidence.connections, registry);
    peers(&evidence.peers, registry);
    let Some(programs) = &evidence.programs else {
        return;
    };
    if let Some(taken) = programs.taken {
        frames(taken, registry);
    }
    tunnels(&evidence.connections, registry);
    pairs(&evidence.connections, registry);
    let drops = Family::<Reason, Counter>::default();
    for (&reason, &packets) in &evidence.drops {
        drops.get_or_create(&Reason { reason }).inc_by(packets);
    }
    registry.register(
        "underlay_drops_packets",
        "Packets of the underlay that were dropped, or passed uncounted, by reason",
        drops,
    );
}

fn frames(taken: PathsTaken, registry: &mut Registry) {
    let frames = Family::<OfFrames, Counter>::default();
    for (direction, path, count) in [
        ("out", "fast", taken.fast_out),
        ("out", "slow", taken.slow_out),
        ("in", "fast", taken.fast_in),
        ("in", "slow", taken.slow_in),
    ] {
        let of = OfFrames { direction, path };
        frames.get_or_create(&of).inc_by(count);
    }
    registry.register(
        "tunnel_frames",
        "Frames of connections by the path that they took: fast by BPF, or slow through the external device",
        frames,
    );
}

fn agent(evidence: &Evidence, registry: &mut Registry) {
    let object = evidence.programs.as_ref().map(|_| Bpf::object_sha256());
    registry.register(
        "build",
        "What is running: the agent's version and its BPF object",
        Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION")),
            ("bpf_object_sha256", object.unwrap_or_default()),
        ]),
    );
    gauge(
        registry,
        "ready",
        "Whether the agent is ready: 1 or 0",
        evidence.waiting_for.is_empty().into(),
    );
    gauge(
        registry,
        "degradations",
        "Reasons for which the agent works less well than it could; `proxy-nsmgr status` lists them",
        evidence.degraded.len(),
    );
    gauge(
        registry,
        "public_address_conflicts",
        "Sources with another public address than the one that holds",
        evidence.public_address.decision.conflicts.len(),
    );
    let identity = evidence.identity.as_ref();
    if let Some(left) = identity.and_then(IdentityEvidence::left) {
        let days = Gauge::<f64, AtomicU64>::default();
        days.set(left.as_secs_f64() / 86_400.0);
        registry.register("svid_days_left", "Days until the agent's SVID ends", days);
    }
    if let Some(counts) = &evidence.registry {
        gauge(
            registry,
            "registry_network_services",
            "Network services in this agent's registry",
            counts.services,
        );
        gauge(
            registry,
            "registry_endpoints",
            "Endpoints in this agent's registry",
            counts.endpoints,
        );
        gauge(
            registry,
            "registry_watches",
            "Open watches of this agent's registry",
            counts.watchers,
        );
    }
}

fn connections(connections: &[ConnectionEvidence], registry: &mut Registry) {
    let by_state = Family::<State, Gauge>::default();
    // Those without a connection, too: a series that comes and goes cannot be added up.
    for state in ["UP", "DOWN"] {
        drop(by_state.get_or_create(&State { state }));
    }
    let unproved = Family::<OfPath, Gauge>::default();
    for path in [Verdict::Down, Verdict::Unknown, Verdict::Unverified] {
        drop(unproved.get_or_create(&OfPath::from(path)));
    }
    for connection in connections {
        let path = connection.path.as_ref().map(|path| path.health.verdict());
        if let Some(path) = path.filter(|path| *path != Verdict::Up)
            && connection.state == ConnectionState::Up
        {
            unproved.get_or_create(&OfPath::from(path)).inc();
        }
        let state = connection.state.as_str_name();
        by_state.get_or_create(&State { state }).inc();
    }
    registry.register("connections", "Connections, by state", by_state);
    registry.register(
        "connections_unproved",
        "Connections that are UP although their path is not proved, by what is known of it",
        unproved,
    );
}

fn peers(all: &[PeerEvidence], registry: &mut Registry) {
    let peers = Family::<State, Gauge>::default();
    for (state, is_lost) in [("watched", false), ("lost", true)] {
        let count = all.iter().filter(|peer| peer.is_lost == is_lost).count();
        peers.get_or_create(&State { state }).set(number(count));
    }
    registry.register(
        "peers",
        "Peers that carry connections, by whether their monitor stream stands",
        peers,
    );
}

/// One of two links of this node that lead to each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPairedLink {
    connection: String,
    domain: String,
    end: &'static str,
}

/// One stage that a connection's packets pass on this node.
struct Stage<L> {
    packets: Family<L, Counter>,
    bytes: Family<L, Counter>,
}

impl<L: Labels> Default for Stage<L> {
    fn default() -> Self {
        Self {
            packets: Family::default(),
            bytes: Family::default(),
        }
    }
}

/// What distinguishes a series.
trait Labels: EncodeLabelSet + Clone + Eq + Hash + Debug + Send + Sync + 'static {}

impl<L: EncodeLabelSet + Clone + Eq + Hash + Debug + Send + Sync + 'static> Labels for L {}

impl<L: Labels> Stage<L> {
    fn add(&self, labels: &L, count: Option<Count>) {
        if let Some(Count { packets, bytes, .. }) = count {
            self.packets.get_or_create(labels).inc_by(packets);
            self.bytes.get_or_create(labels).inc_by(bytes);
        }
    }

    fn register(self, registry: &mut Registry, name: &str, of: &str, what: &str) {
        registry.register(
            format!("{name}_packets"),
            format!("Packets of {of} that {what}"),
            self.packets,
        );
        registry.register_with_unit(
            name,
            format!("Bytes of packets of {of} that {what}"),
            Unit::Bytes,
            self.bytes,
        );
    }
}

fn tunnels(connections: &[ConnectionEvidence], registry: &mut Registry) {
    let [link_tx, link_rx, underlay_tx, underlay_rx] = [(); 4].map(|()| Stage::default());
    for connection in connections {
        let Some(labels) = OfConnection::of(connection) else {
            continue;
        };
        let ConnectionEvidence {
            inward, outward, ..
        } = connection;
        link_tx.add(&labels, outward.link);
        underlay_tx.add(&labels, outward.card);
        underlay_rx.add(&labels, inward.card);
        link_rx.add(&labels, inward.link);
    }
    let mut register = |stage: Stage<_>, name: &str, what: &str| {
        stage.register(registry, &format!("tunnel_{name}"), "a tunnel", what);
    };
    register(link_tx, "link_transmit", "left the link in the pod");
    register(underlay_tx, "underlay_transmit", "left the node's card");
    register(underlay_rx, "underlay_receive", "came to the node's card");
    register(link_rx, "link_receive", "came to the link in the pod");
}

fn pairs(connections: &[ConnectionEvidence], registry: &mut Registry) {
    let [transmit, receive] = [(); 2].map(|()| Stage::default());
    for connection in connections {
        for (end, link) in ["client", "endpoint"].into_iter().zip(&connection.pair) {
            let labels = OfPairedLink {
                connection: connection.id.clone(),
                domain: connection.domain.to_string(),
                end,
            };
            transmit.add(&labels, link.passed.map(|it| it.sent));
            receive.add(&labels, link.passed.map(|it| it.received));
        }
    }
    let of = "a connection between two pods of this node";
    transmit.register(
        registry,
        "pair_link_transmit",
        of,
        "left the link in the pod",
    );
    receive.register(
        registry,
        "pair_link_receive",
        of,
        "came to the link in the pod",
    );
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: usize) {
    let gauge = Gauge::<i64>::default();
    gauge.set(number(value));
    registry.register(name, help, gauge);
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
