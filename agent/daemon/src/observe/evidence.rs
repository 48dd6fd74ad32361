//! What is known of an agent, its connections and their two directions at one moment: gathered once, typed, and shown by views.
//!
//! `status` ([`super::admin`]) and metrics ([`super::metrics`]) are such views. Nothing here is text that a view would have to parse.

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use nsm_controlplane::{plane::ConnectionView, ports::Plan, registry::Counts};
use nsm_core::{
    clock::Monotonic,
    liveness::{Direction, Health, PathId, Verdict},
    net::{IfName, Vni},
    nsm::name::{Domain, InterdomainName},
};
use nsm_dataplane::liveness::{Preflights, Report};
use nsm_proto::connection::State;
use serde::{Serialize, Serializer};

use crate::agent::{
    forwarder::LinkCounters,
    programs::{Counters, Facts},
    public_address::Findings,
};

/// What is known of one agent.
pub(crate) struct Evidence {
    /// What keeps it from being ready; ready without.
    pub(crate) waiting_for: Vec<String>,
    /// What works less well than it could.
    pub(crate) degraded: Vec<String>,
    /// What works less well for single paths.
    pub(crate) degraded_paths: Vec<String>,
    /// The BPF programs; none where this agent makes no links.
    pub(crate) programs: Option<Facts>,
    pub(crate) connections: Vec<ConnectionEvidence>,
    /// The sessions with peers' reflectors.
    pub(crate) sessions: Vec<Report>,
    /// The peers that carry connections.
    pub(crate) peers: Vec<PeerEvidence>,
    /// Packets of the underlay that were dropped or passed uncounted, by reason.
    pub(crate) drops: BTreeMap<&'static str, u64>,
    pub(crate) public_address: Findings,
    /// What the own registry holds; none where another is the domain's.
    pub(crate) registry: Option<Counts>,
    /// How the proofs of paths went; none where nothing is probed.
    pub(crate) preflights: Option<Preflights>,
}

/// One peer that carries connections.
pub(crate) struct PeerEvidence {
    pub(crate) url: String,
    pub(crate) connections: usize,
    /// Whether its monitor stream broke, and no Request through it has succeeded since.
    pub(crate) is_lost: bool,
}

/// One connection.
#[derive(Debug, Serialize)]
pub(crate) struct ConnectionEvidence {
    /// The id of our segment.
    pub(crate) id: String,
    pub(crate) service: String,
    /// The domain of the service.
    #[serde(serialize_with = "text")]
    pub(crate) domain: Domain,
    pub(crate) endpoint: String,
    #[serde(serialize_with = "state")]
    pub(crate) state: State,
    /// Why it is DOWN.
    pub(crate) down_reason: Option<String>,
    /// Names of the path's segments.
    pub(crate) hops: Vec<String>,
    pub(crate) expires_in: Duration,
    pub(crate) client_mechanism: String,
    pub(crate) endpoint_mechanism: String,
    pub(crate) src_addresses: Vec<String>,
    pub(crate) dst_addresses: Vec<String>,
    pub(crate) mtu: u32,
    /// Its tunnel, where one ends on this node.
    pub(crate) tunnel: Option<TunnelEvidence>,
    /// The path of the tunnel, where it is watched.
    pub(crate) path: Option<PathEvidence>,
    /// From the peer to this node.
    pub(crate) inward: DirectionEvidence,
    /// From this node to the peer.
    pub(crate) outward: DirectionEvidence,
}

/// A tunnel that ends on this node.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TunnelEvidence {
    #[serde(serialize_with = "text")]
    pub(crate) vni: Vni,
    pub(crate) port: u16,
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    /// The link in the pod.
    #[serde(serialize_with = "text")]
    pub(crate) interface: IfName,
    pub(crate) netns: String,
}

/// The path between this node and a tunnel's peer, both directions together.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PathEvidence {
    #[serde(serialize_with = "text")]
    pub(crate) verdict: Verdict,
    pub(crate) peer: IpAddr,
    pub(crate) port: u16,
    /// The largest inner IP packet that it is known to carry, bytes.
    pub(crate) mtu: Option<u16>,
    /// Round trips of the last minute.
    pub(crate) round_trip_p50: Option<Duration>,
    pub(crate) round_trip_p99: Option<Duration>,
    /// The share of the last minute's probes that stayed unanswered, 0 to 1.
    pub(crate) loss: Option<f64>,
}

/// One direction of a connection whose tunnel ends on this node: each stage that its packets pass, and what its path's session proves.
#[derive(Debug, Default, Serialize)]
pub(crate) struct DirectionEvidence {
    /// At the link in the pod.
    pub(crate) link: Option<Count>,
    /// At the node's cards, where BPF counts.
    pub(crate) card: Option<Count>,
    /// What is known of the way.
    pub(crate) way: Option<WayEvidence>,
}

/// Packets and bytes that passed a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Count {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// One way between this node and a peer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct WayEvidence {
    #[serde(serialize_with = "text")]
    pub(crate) verdict: Verdict,
    /// Why, and what to do, as a sentence.
    pub(crate) reason: String,
    /// Since its last proof: in, a packet of the peer; out, an answer to a probe.
    pub(crate) proved_ago: Option<Duration>,
}

/// What the parts of an agent know of one connection.
pub(super) struct Sources<'a> {
    pub(super) view: &'a ConnectionView,
    pub(super) health: Option<Health>,
    pub(super) down_reason: Option<String>,
    pub(super) own_domain: &'a Domain,
    /// Of all links.
    pub(super) links: &'a LinkCounters,
    /// At the cards.
    pub(super) card: Option<Counters>,
    /// Of all sessions.
    pub(super) sessions: &'a [Report],
    pub(super) now: Monotonic,
}

impl ConnectionEvidence {
    pub(super) fn of(sources: Sources<'_>) -> Self {
        let view = sources.view;
        let wire = view.connection();
        let ip = wire
            .context
            .as_ref()
            .and_then(|context| context.ip_context.clone());
        let ip = ip.unwrap_or_default();
        let name: Option<InterdomainName> = wire.network_service.parse().ok();
        let domain = name.as_ref().and_then(InterdomainName::domain);
        let hops = wire.path.iter().flat_map(|path| &path.path_segments);
        let client_mechanism = wire
            .mechanism
            .as_ref()
            .map(|mechanism| mechanism.r#type.clone());
        let (inward, outward) = sources.directions();
        Self {
            id: view.id().to_owned(),
            service: wire.network_service.clone(),
            domain: domain.unwrap_or(sources.own_domain).clone(),
            endpoint: wire.network_service_endpoint_name.clone(),
            state: wire.state(),
            hops: hops.map(|segment| segment.name.clone()).collect(),
            expires_in: view
                .expires()
                .duration_since(SystemTime::now())
                .unwrap_or_default(),
            client_mechanism: client_mechanism.unwrap_or_default(),
            endpoint_mechanism: view.next_mechanism().to_owned(),
            src_addresses: ip.src_ip_addrs,
            dst_addresses: ip.dst_ip_addrs,
            mtu: wire.context.as_ref().map_or(0, |context| context.mtu),
            tunnel: view.plan().and_then(TunnelEvidence::of),
            path: sources.path(),
            inward,
            outward,
            down_reason: sources.down_reason,
        }
    }
}

impl TunnelEvidence {
    fn of(plan: &Plan) -> Option<Self> {
        let Plan::Vxlan { netns, spec } = plan else {
            return None;
        };
        Some(Self {
            vni: spec.vni,
            port: spec.port,
            local: spec.local,
            remote: spec.remote,
            interface: spec.link.name.clone(),
            netns: netns.to_string(),
        })
    }
}

impl Sources<'_> {
    /// The session of the connection's very path: one address may have several reflectors.
    fn session(&self) -> Option<&Report> {
        let path: PathId = self.view.watched()?.canonical();
        let mut sessions = self.sessions.iter();
        sessions.find(|report| report.path == path)
    }

    fn path(&self) -> Option<PathEvidence> {
        let health = self.health.as_ref()?;
        let measured = self.session().map(|report| report.statistics);
        Some(PathEvidence {
            verdict: health.verdict(),
            peer: health.peer,
            port: health.port,
            mtu: health.path_mtu,
            round_trip_p50: measured.and_then(|it| it.rtt_p50),
            round_trip_p99: measured.and_then(|it| it.rtt_p99),
            loss: measured.filter(|it| it.probes > 0).map(|it| it.loss()),
        })
    }

    /// Both directions, in and out.
    fn directions(&self) -> (DirectionEvidence, DirectionEvidence) {
        let link = match self.view.plan() {
            Some(Plan::Vxlan { spec, .. }) => self.links.get(&spec.link.alias).copied(),
            _ => None,
        };
        let snapshot = self.session().map(|report| &report.snapshot);
        let answered = snapshot.and_then(|snapshot| snapshot.last_answer);
        let probed = snapshot.and_then(|snapshot| snapshot.peer.map(|probe| probe.at));
        let way = |direction, proved: Option<Monotonic>| {
            let health = self.health.as_ref()?;
            Some(WayEvidence {
                verdict: health.finding(direction).verdict,
                reason: health.sentence(direction),
                proved_ago: proved.map(|at| self.now.since(at)),
            })
        };
        let inward = DirectionEvidence {
            link: link.map(Counters::received),
            card: self.card.map(Counters::received),
            way: way(Direction::In, answered.max(probed)),
        };
        let outward = DirectionEvidence {
            link: link.map(Counters::sent),
            card: self.card.map(Counters::sent),
            way: way(Direction::Out, answered),
        };
        (inward, outward)
    }
}

impl Counters {
    fn received(self) -> Count {
        Count {
            packets: self.rx_packets,
            bytes: self.rx_bytes,
        }
    }

    fn sent(self) -> Count {
        Count {
            packets: self.tx_packets,
            bytes: self.tx_bytes,
        }
    }
}

fn text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn state<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.as_str_name())
}
