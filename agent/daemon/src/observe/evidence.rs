//! What is known of an agent, its connections and their two directions at one moment: gathered once, typed, and shown by views.
//!
//! `status` ([`super::admin`]) and metrics ([`super::metrics`]) are such views: sentences and units are made there. All times are of the
//! clock of [`Evidence::at`], so the age of each part is `at` less its time, and what expires has a time after `at`.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_controlplane::{
    identity::source::Material,
    plane::{ConnectionView, DownReason},
    ports::Plan,
    registry::Counts,
};
use nsm_core::{
    clock::Monotonic,
    identity::SpiffeId,
    link::{Count, LinkAlias, Traffic},
    liveness::{Health, PathId, sbfd::Statistics},
    mechanism::TunnelKey,
    net::IfName,
    nsm::name::{Domain, InterdomainName},
};
use nsm_dataplane::{
    forward::Passed,
    links::LinkReading,
    liveness::{Preflights, Report},
};
use nsm_discovery::dns::Outcome;
use nsm_proto::connection::State;

use crate::agent::{forwarder::LinkReadings, programs::Facts, public_address::Findings};

/// What is known of one agent.
pub(crate) struct Evidence {
    /// When it was gathered.
    pub(crate) at: Monotonic,
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
    /// The answers of DNS that are remembered.
    pub(crate) dns: Vec<DnsEvidence>,
    /// Packets of the underlay that were dropped or passed uncounted, by reason.
    pub(crate) drops: BTreeMap<&'static str, u64>,
    pub(crate) public_address: Findings,
    /// What the own registry holds; none where another is the domain's.
    pub(crate) registry: Option<Counts>,
    /// How the proofs of paths went; none where nothing is probed.
    pub(crate) preflights: Option<Preflights>,
    /// None in plain text.
    pub(crate) identity: Option<IdentityEvidence>,
}

/// One peer that carries connections.
pub(crate) struct PeerEvidence {
    pub(crate) url: String,
    pub(crate) connections: usize,
    /// Whether its monitor stream broke, and no Request through it has succeeded since.
    pub(crate) is_lost: bool,
    /// Since when its monitor stream is open or lost.
    pub(crate) since: Monotonic,
    /// Who it is by its certificate; none in plain text.
    pub(crate) spiffe_id: Option<SpiffeId>,
}

/// Who the agent is in TLS.
#[derive(Debug)]
pub(crate) struct IdentityEvidence {
    /// Where SVID and bundles come from.
    pub(crate) source: String,
    /// None where there is no SVID yet.
    pub(crate) current: Option<Arc<Material>>,
    /// When this was gathered, by the clock that certificates go by.
    pub(crate) at: SystemTime,
}

impl IdentityEvidence {
    /// How long the SVID lives; none where there is none.
    pub(crate) fn left(&self) -> Option<Duration> {
        Some(self.current.as_ref()?.svid.left(self.at))
    }
}

/// What DNS answered about one domain.
pub(crate) struct DnsEvidence {
    pub(crate) domain: Domain,
    pub(crate) outcome: Outcome,
    /// When the answer came.
    pub(crate) answered: Monotonic,
    /// Until when the answer is used.
    pub(crate) expires: Monotonic,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct ConnectionEvidence {
    /// The id of our segment.
    pub(crate) id: String,
    pub(crate) service: String,
    /// The domain of the service.
    pub(crate) domain: Domain,
    pub(crate) endpoint: String,
    pub(crate) state: State,
    /// Why it is DOWN.
    pub(crate) down_reason: Option<DownReason>,
    /// Names of the path's segments.
    pub(crate) hops: Vec<String>,
    /// When the previous hop's token expires, and with it the connection.
    pub(crate) token_expires: Monotonic,
    pub(crate) client_mechanism: String,
    pub(crate) endpoint_mechanism: String,
    pub(crate) src_addresses: Vec<String>,
    pub(crate) dst_addresses: Vec<String>,
    pub(crate) mtu: u32,
    /// Its tunnel, where one ends on this node.
    pub(crate) tunnel: Option<TunnelEvidence>,
    /// The client's link and the endpoint's, where both pods are on this node.
    pub(crate) pair: Vec<PairedEvidence>,
    /// The path of the tunnel, where it is watched.
    pub(crate) path: Option<PathEvidence>,
    /// From the peer to this node.
    pub(crate) inward: DirectionEvidence,
    /// From this node to the peer.
    pub(crate) outward: DirectionEvidence,
}

/// A tunnel that ends on this node.
#[derive(Debug)]
pub(crate) struct TunnelEvidence {
    /// What distinguishes it from the node's other tunnels.
    pub(crate) key: TunnelKey,
    pub(crate) port: u16,
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    /// The link in the pod, as it was made.
    pub(crate) interface: IfName,
    pub(crate) netns: String,
    /// The link in the pod as the kernel shows it at [`Evidence::at`]; none where it is not there.
    pub(crate) observed: Option<LinkReading>,
}

/// One of two links of this node that lead to each other.
#[derive(Debug)]
pub(crate) struct PairedEvidence {
    /// The link in the pod, as it was made.
    pub(crate) interface: IfName,
    pub(crate) netns: String,
    /// The link in the pod as the kernel shows it at [`Evidence::at`]; none where it is not there.
    pub(crate) observed: Option<LinkReading>,
    /// What passed it; none where it leads nowhere.
    pub(crate) passed: Option<Traffic>,
}

/// The path between this node and a tunnel's peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PathEvidence {
    /// Both directions, each with its reason.
    pub(crate) health: Health,
    /// What its session measured in the last minute; none where there is no session.
    pub(crate) measured: Option<Statistics>,
}

/// One direction of a connection whose tunnel ends on this node: each stage that its packets pass, and the last proof of its path.
#[derive(Debug, Default)]
pub(crate) struct DirectionEvidence {
    /// At the link in the pod.
    pub(crate) link: Option<Count>,
    /// At the node's cards.
    pub(crate) card: Option<Count>,
    /// The last proof: in, a packet of the peer; out, an answer to a probe.
    pub(crate) proved: Option<Monotonic>,
}

/// What the parts of an agent know of one connection.
pub(super) struct Sources<'a> {
    pub(super) view: &'a ConnectionView,
    pub(super) health: Option<Health>,
    pub(super) down_reason: Option<DownReason>,
    pub(super) own_domain: &'a Domain,
    /// All links.
    pub(super) links: &'a LinkReadings,
    /// What a link has passed.
    pub(super) passed: &'a dyn Fn(&LinkAlias) -> Option<Passed>,
    /// All sessions.
    pub(super) sessions: &'a [Report],
    pub(super) at: Monotonic,
}

impl ConnectionEvidence {
    pub(super) fn of(sources: Sources<'_>) -> Self {
        let view = sources.view;
        let wire = view.connection();
        let context = wire.context.clone().unwrap_or_default();
        let ip = context.ip_context.unwrap_or_default();
        let name: Option<InterdomainName> = wire.network_service.parse().ok();
        let domain = name.as_ref().and_then(InterdomainName::domain);
        let hops = wire.path.iter().flat_map(|path| &path.path_segments);
        let client_mechanism = wire.mechanism.as_ref();
        let expires_in = view.expires().duration_since(SystemTime::now());
        let (tunnel, pair) = (sources.tunnel(), sources.pair());
        let (inward, outward) = sources.directions();
        Self {
            id: view.id().to_owned(),
            service: wire.network_service.clone(),
            domain: domain.unwrap_or(sources.own_domain).clone(),
            endpoint: wire.network_service_endpoint_name.clone(),
            state: wire.state(),
            hops: hops.map(|segment| segment.name.clone()).collect(),
            token_expires: sources.at + expires_in.unwrap_or_default(),
            client_mechanism: client_mechanism.map_or_else(String::new, |it| it.r#type.clone()),
            endpoint_mechanism: view.next_mechanism().to_owned(),
            src_addresses: ip.src_ip_addrs,
            dst_addresses: ip.dst_ip_addrs,
            mtu: context.mtu,
            path: sources.path(),
            tunnel,
            pair,
            inward,
            outward,
            down_reason: sources.down_reason,
        }
    }
}

impl Sources<'_> {
    fn tunnel(&self) -> Option<TunnelEvidence> {
        let tunnel = self.view.plan()?.tunnel()?;
        Some(TunnelEvidence {
            key: tunnel.key,
            port: tunnel.port,
            local: tunnel.local,
            remote: tunnel.remote,
            interface: tunnel.link.name.clone(),
            netns: tunnel.netns.to_string(),
            observed: self.links.get(&tunnel.link.alias).cloned(),
        })
    }

    fn pair(&self) -> Vec<PairedEvidence> {
        let plan = self.view.plan().filter(|plan| plan.tunnel().is_none());
        let links = plan.into_iter().flat_map(Plan::links);
        links
            .map(|(netns, link)| PairedEvidence {
                interface: link.name.clone(),
                netns: netns.to_string(),
                observed: self.links.get(&link.alias).cloned(),
                passed: (self.passed)(&link.alias).map(|it| it.link),
            })
            .collect()
    }

    /// The session of the connection's very path: one address may have several reflectors.
    fn session(&self) -> Option<&Report> {
        let path: PathId = self.view.watched()?.canonical();
        let mut sessions = self.sessions.iter();
        sessions.find(|report| report.path == path)
    }

    fn path(&self) -> Option<PathEvidence> {
        Some(PathEvidence {
            health: self.health?,
            measured: self.session().map(|report| report.statistics),
        })
    }

    /// Both directions, in and out.
    fn directions(&self) -> (DirectionEvidence, DirectionEvidence) {
        let tunnel = self.view.plan().and_then(Plan::tunnel);
        let passed = tunnel.and_then(|it| (self.passed)(&it.link.alias));
        let (link, card) = (passed.map(|it| it.link), passed.and_then(|it| it.wire));
        let snapshot = self.session().map(|report| &report.snapshot);
        let answered = snapshot.and_then(|snapshot| snapshot.last_answer);
        let probed = snapshot.and_then(|snapshot| snapshot.peer.map(|probe| probe.at));
        let inward = DirectionEvidence {
            link: link.map(|it| it.received),
            card: card.map(|it| it.received),
            proved: answered.max(probed),
        };
        let outward = DirectionEvidence {
            link: link.map(|it| it.sent),
            card: card.map(|it| it.sent),
            proved: answered,
        };
        (inward, outward)
    }
}
