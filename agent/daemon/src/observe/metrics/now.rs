//! Metrics of what is there now, and of what the kernel counts.

use nsm_controlplane::{plane::ConnectionView, ports::Plan};
use nsm_core::{liveness::health::Verdict, nsm::name::InterdomainName};
use nsm_dataplane::bpf::Bpf;
use nsm_proto::connection::State as ConnectionState;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use crate::agent::Told;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: String,
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
struct Reason {
    reason: String,
}

/// One connection. `peer` is the other end of its tunnel, `domain` that of the service asked for; both stay what they are for the
/// connection's life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfConnection {
    pub(super) connection: String,
    pub(super) peer: String,
    pub(super) domain: String,
}

/// Gathers everything and puts it into `registry`.
pub(super) async fn register(told: &Told, registry: &mut Registry) {
    agent(told, registry);
    connections(told, registry);
    tunnels(told, registry).await;
    if let Some(forwarder) = &told.forwarder {
        let drops = Family::<Reason, Counter>::default();
        for (reason, packets) in forwarder.drops() {
            drops.get_or_create(&Reason { reason }).inc_by(packets);
        }
        registry.register(
            "underlay_drops_packets",
            "Packets of the underlay that were dropped, or passed uncounted, by reason",
            drops,
        );
    }
}

fn agent(told: &Told, registry: &mut Registry) {
    let object = told.forwarder.as_ref().map(|_| Bpf::object_sha256());
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
        told.readiness.waiting().is_empty().into(),
    );
    gauge(
        registry,
        "degradations",
        "Reasons for which the agent works less well than it could; `proxy-nsmgr status` says which",
        told.readiness.degradations().len(),
    );
    gauge(
        registry,
        "public_address_conflicts",
        "Sources that say another public address than the one that holds",
        told.public_address.conflicts(),
    );
    if let Some(counts) = told.plane.registry_counts() {
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

fn connections(told: &Told, registry: &mut Registry) {
    let by_state = Family::<State, Gauge>::default();
    // Those that nobody has now too: a series that comes and goes cannot be added up.
    for state in ["UP", "DOWN"] {
        let state = state.to_owned();
        drop(by_state.get_or_create(&State { state }));
    }
    let unproved = Family::<OfPath, Gauge>::default();
    for path in [Verdict::Down, Verdict::Unknown, Verdict::Unverified] {
        drop(unproved.get_or_create(&OfPath::from(path)));
    }
    for view in told.plane.connections() {
        let state = view.connection().state();
        let path = told.plane.health_now(&view).map(|health| health.verdict());
        if let Some(path) = path.filter(|path| *path != Verdict::Up && state == ConnectionState::Up)
        {
            unproved.get_or_create(&OfPath::from(path)).inc();
        }
        let state = state.as_str_name().to_owned();
        by_state.get_or_create(&State { state }).inc();
    }
    registry.register("connections", "Connections, by state", by_state);
    registry.register(
        "connections_unproved",
        "Connections that are UP although their path is not proved, by what is known of it",
        unproved,
    );

    let peers = Family::<State, Gauge>::default();
    let lost = told.plane.unmonitored_peers();
    for state in ["watched", "lost"] {
        let count = told
            .plane
            .peers()
            .iter()
            .filter(|(url, _)| lost.contains(url) == (state == "lost"))
            .count();
        peers
            .get_or_create(&State {
                state: state.to_owned(),
            })
            .set(number(count));
    }
    registry.register(
        "peers",
        "Peers that carry connections, by whether their monitor stream stands",
        peers,
    );
}

/// One stage that a tunnel's packets pass on this node.
#[derive(Default)]
struct Stage {
    packets: Family<OfConnection, Counter>,
    bytes: Family<OfConnection, Counter>,
}

impl Stage {
    fn add(&self, labels: &OfConnection, packets: u64, bytes: u64) {
        self.packets.get_or_create(labels).inc_by(packets);
        self.bytes.get_or_create(labels).inc_by(bytes);
    }

    fn register(self, registry: &mut Registry, name: &str, what: &str) {
        registry.register(
            format!("tunnel_{name}_packets"),
            format!("Packets of a tunnel that {what}"),
            self.packets,
        );
        registry.register_with_unit(
            format!("tunnel_{name}"),
            format!("Bytes of a tunnel's packets that {what}"),
            Unit::Bytes,
            self.bytes,
        );
    }
}

async fn tunnels(told: &Told, registry: &mut Registry) {
    let Some(forwarder) = &told.forwarder else {
        return;
    };
    let views = told.plane.connections();
    let links = forwarder
        .link_counters(views.iter().filter_map(ConnectionView::plan))
        .await;
    let [link_tx, link_rx, underlay_tx, underlay_rx] = [(); 4].map(|()| Stage::default());
    for view in &views {
        let (Some(Plan::Vxlan { spec, .. }), Some(labels)) = (view.plan(), labels(told, view))
        else {
            continue;
        };
        let link = links.get(&spec.link.alias).copied();
        let underlay = forwarder.underlay_counters(spec);
        for (counters, tx, rx) in [
            (link, &link_tx, &link_rx),
            (underlay, &underlay_tx, &underlay_rx),
        ] {
            if let Some(counters) = counters {
                tx.add(&labels, counters.tx_packets, counters.tx_bytes);
                rx.add(&labels, counters.rx_packets, counters.rx_bytes);
            }
        }
    }
    link_tx.register(registry, "link_transmit", "left the link in the pod");
    underlay_tx.register(registry, "underlay_transmit", "left the node's card");
    underlay_rx.register(registry, "underlay_receive", "came to the node's card");
    link_rx.register(registry, "link_receive", "came to the link in the pod");
}

/// The labels of a connection whose tunnel ends on this node.
pub(super) fn labels(told: &Told, view: &ConnectionView) -> Option<OfConnection> {
    let Plan::Vxlan { spec, .. } = view.plan()? else {
        return None;
    };
    let service: Option<InterdomainName> = view.connection().network_service.parse().ok();
    let named = service.as_ref().and_then(InterdomainName::domain);
    let domain = named.unwrap_or(told.plane.domain()).to_string();
    Some(OfConnection {
        connection: view.id().to_owned(),
        peer: spec.remote.to_string(),
        domain,
    })
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: usize) {
    let gauge = Gauge::<i64>::default();
    gauge.set(number(value));
    registry.register(name, help, gauge);
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
