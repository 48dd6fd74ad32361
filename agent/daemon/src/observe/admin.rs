//! The admin service: the evidence as `proxy-nsmgr status` gets it.

use std::{net::IpAddr, time::Duration};

use nsm_controlplane::api::server::node_caller;
use nsm_core::{
    address::public::Finding,
    clock::Monotonic,
    identity::policy::{Action, decide},
    link::{Count, Traffic},
    liveness::Direction,
    net::Vni,
};
use nsm_dataplane::links::LinkReading;
use nsm_proto::admin::{
    AddressFinding, Bpf, Bundle, ConnectionStatus, Counters, DnsAnswer, DrainRequest,
    DrainResponse, Frames, Identity, Link, Listener, PairedLink, PathHealth, Peer, PublicAddress,
    Status as AgentStatus, StatusRequest, Tunnel, WayHealth,
    admin_server::{Admin, AdminServer},
};
use tonic::{Request, Response, Status};

use super::{
    Observer,
    evidence::{
        ConnectionEvidence, DirectionEvidence, DnsEvidence, Evidence, IdentityEvidence,
        PairedEvidence, PathEvidence, PeerEvidence, TunnelEvidence,
    },
};
use crate::{
    agent::{drains::Drains, programs::Facts, public_address::Findings},
    config::Config,
};

/// The service of one agent.
pub(crate) struct AdminService {
    observer: Observer,
    drains: Drains,
    name: String,
    domain: String,
    listeners: Vec<Listener>,
    is_insecure: bool,
}

/// The admin service of this agent.
pub(crate) fn service(
    config: &Config,
    observer: Observer,
    drains: Drains,
) -> AdminServer<AdminService> {
    let mut listeners = vec![
        ("proxy", &config.listen.proxy),
        ("registry", &config.listen.registry),
    ];
    if config.upstream_nsmgr_url.is_none() {
        listeners.push(("nsmgr", &config.listen.nsmgr));
    }
    if config.is_upstreams_forwarder() {
        listeners.push(("forwarder", &config.listen.forwarder));
    }
    let listener = |(role, url): (&str, &_)| Listener {
        role: role.to_owned(),
        url: ToString::to_string(url),
    };
    AdminServer::new(AdminService {
        observer,
        drains,
        name: config.name.clone(),
        domain: config.domain.to_string(),
        listeners: listeners.into_iter().map(listener).collect(),
        is_insecure: config.insecure,
    })
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<AgentStatus>, Status> {
        decide(&node_caller(&request), Action::Status)
            .map_err(|refusal| Status::permission_denied(refusal.to_string()))?;
        Ok(Response::new(self.status(self.observer.evidence().await)))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<DrainResponse>, Status> {
        decide(&node_caller(&request), Action::Drain)
            .map_err(|refusal| Status::permission_denied(refusal.to_string()))?;
        let drained = self.drains.ask().await;
        let drained = drained.ok_or_else(|| Status::unavailable("the agent is ending already"))?;
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(DrainResponse {
            closed: count(drained.closed),
            left: count(drained.left),
        }))
    }
}

impl AdminService {
    fn identity(&self, evidence: Option<&IdentityEvidence>) -> Identity {
        let plain = || Identity {
            insecure: self.is_insecure,
            ..Identity::default()
        };
        evidence.map_or_else(plain, identity)
    }

    fn status(&self, evidence: Evidence) -> AgentStatus {
        let view = View { at: evidence.at };
        let drops = evidence.drops.into_iter();
        AgentStatus {
            name: self.name.clone(),
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: evidence.waiting_for.is_empty(),
            waiting_for: evidence.waiting_for,
            degraded: [evidence.degraded, evidence.degraded_paths].concat(),
            bpf: evidence.programs.map(bpf),
            connections: evidence
                .connections
                .into_iter()
                .map(|connection| view.connection(connection))
                .collect(),
            peers: evidence
                .peers
                .into_iter()
                .map(|peer| view.peer(peer))
                .collect(),
            drops: drops
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
            listeners: self.listeners.clone(),
            public_address: Some(public_address(&evidence.public_address)),
            identity: Some(self.identity(evidence.identity.as_ref())),
            dns: evidence.dns.into_iter().map(|it| view.dns(it)).collect(),
        }
    }
}

fn identity(evidence: &IdentityEvidence) -> Identity {
    let source = evidence.source.clone();
    let Some(current) = &evidence.current else {
        return Identity {
            source,
            ..Identity::default()
        };
    };
    let bundles = current.bundles.domains();
    let age = evidence.at.duration_since(current.since);
    Identity {
        insecure: false,
        source,
        spiffe_id: current.svid.id().to_string(),
        ends_in_seconds: current.svid.left(evidence.at).as_secs(),
        age_seconds: age.unwrap_or_default().as_secs(),
        generation: current.generation,
        bundles: bundles
            .map(|(trust_domain, authorities)| Bundle {
                trust_domain: trust_domain.to_string(),
                authorities: u32::try_from(authorities).unwrap_or(u32::MAX),
            })
            .collect(),
    }
}

fn bpf(facts: Facts) -> Bpf {
    Bpf {
        hook: facts
            .hook
            .map_or_else(|| "none".to_owned(), |hook| hook.to_string()),
        object_sha256: facts.object_sha256.to_owned(),
        pin_path: facts.pin_dir,
        interfaces: facts.interfaces,
        frames: facts.taken.map(|taken| Frames {
            fast_out: taken.fast_out,
            slow_out: taken.slow_out,
            fast_in: taken.fast_in,
            slow_in: taken.slow_in,
        }),
    }
}

/// Evidence as messages, with the ages of its parts.
struct View {
    /// When the evidence was gathered.
    at: Monotonic,
}

impl View {
    /// How long ago something was.
    fn age(&self, then: Monotonic) -> u64 {
        millis(self.at.since(then))
    }

    fn peer(&self, evidence: PeerEvidence) -> Peer {
        let state = if evidence.is_lost { "lost" } else { "watched" };
        Peer {
            url: evidence.url,
            state: state.to_owned(),
            connections: u32::try_from(evidence.connections).unwrap_or(u32::MAX),
            state_for_ms: self.age(evidence.since),
            spiffe_id: evidence
                .spiffe_id
                .map_or_else(String::new, |id| id.to_string()),
        }
    }

    fn dns(&self, evidence: DnsEvidence) -> DnsAnswer {
        let answer = DnsAnswer {
            domain: evidence.domain.to_string(),
            age_ms: self.age(evidence.answered),
            expires_in_ms: millis(evidence.expires.since(self.at)),
            ..DnsAnswer::default()
        };
        match evidence.outcome {
            Ok(resolved) => DnsAnswer {
                question: resolved.question.clone(),
                answer: resolved.answer.clone(),
                server: resolved.server.clone(),
                ..answer
            },
            Err(error) => DnsAnswer {
                trouble: error.to_string(),
                ..answer
            },
        }
    }

    fn connection(&self, evidence: ConnectionEvidence) -> ConnectionStatus {
        let ConnectionEvidence {
            inward, outward, ..
        } = &evidence;
        let down_reason = evidence.down_reason.as_ref();
        let tunnel = evidence.tunnel.as_ref();
        let path = evidence.path.as_ref();
        ConnectionStatus {
            tunnel: tunnel.map(|it| self.tunnel(it, inward, outward)),
            pair: evidence.pair.iter().map(|it| self.paired(it)).collect(),
            health: path.map(|it| self.path(it, inward, outward)),
            down_reason: down_reason.map_or_else(String::new, ToString::to_string),
            id: evidence.id,
            network_service: evidence.service,
            endpoint: evidence.endpoint,
            state: evidence.state.as_str_name().to_owned(),
            path: evidence.hops,
            expires_in_seconds: evidence.token_expires.since(self.at).as_secs(),
            client_mechanism: evidence.client_mechanism,
            endpoint_mechanism: evidence.endpoint_mechanism,
            src_addresses: evidence.src_addresses,
            dst_addresses: evidence.dst_addresses,
            mtu: evidence.mtu,
        }
    }

    fn tunnel(
        &self,
        evidence: &TunnelEvidence,
        inward: &DirectionEvidence,
        outward: &DirectionEvidence,
    ) -> Tunnel {
        let link = self.counters(inward.link, outward.link);
        Tunnel {
            vni: evidence.key.vni().map_or(0, Vni::get),
            port: evidence.port.into(),
            local: evidence.local.to_string(),
            remote: evidence.remote.to_string(),
            interface: evidence.interface.to_string(),
            netns: evidence.netns.clone(),
            counters: self.counters(inward.card, outward.card).or(link),
            observed: evidence.observed.as_ref().map(observed),
            link,
        }
    }

    fn paired(&self, evidence: &PairedEvidence) -> PairedLink {
        let (received, sent) = match evidence.passed {
            Some(Traffic { received, sent }) => (Some(received), Some(sent)),
            None => (None, None),
        };
        PairedLink {
            interface: evidence.interface.to_string(),
            netns: evidence.netns.clone(),
            counters: self.counters(received, sent),
            observed: evidence.observed.as_ref().map(observed),
        }
    }

    fn counters(&self, received: Option<Count>, sent: Option<Count>) -> Option<Counters> {
        let (rx, tx) = received.zip(sent)?;
        Some(Counters {
            tx_packets: tx.packets,
            tx_bytes: tx.bytes,
            rx_packets: rx.packets,
            rx_bytes: rx.bytes,
            tx_idle_ms: tx.last.map(|last| self.age(last)),
            rx_idle_ms: rx.last.map(|last| self.age(last)),
        })
    }

    fn path(
        &self,
        PathEvidence { health, measured }: &PathEvidence,
        inward: &DirectionEvidence,
        outward: &DirectionEvidence,
    ) -> PathHealth {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let way = |direction, evidence: &DirectionEvidence| {
            let finding = health.finding(direction);
            Some(WayHealth {
                state: finding.verdict.to_string(),
                reason: health.sentence(direction),
                reason_code: finding.reason.code().to_owned(),
                last_heard_ms: evidence.proved.map(|proved| self.age(proved)),
            })
        };
        PathHealth {
            state: health.verdict().to_string(),
            peer: health.peer.to_string(),
            port: health.port.into(),
            r#in: way(Direction::In, inward),
            out: way(Direction::Out, outward),
            round_trip_p50_ns: measured.and_then(|it| it.rtt_p50).map(nanos),
            round_trip_p99_ns: measured.and_then(|it| it.rtt_p99).map(nanos),
            loss: measured.and_then(|it| it.loss()),
            path_mtu: health.path_mtu.map(u32::from),
        }
    }
}

fn observed(reading: &LinkReading) -> Link {
    Link {
        name: reading.link.name.clone(),
        kind: reading.link.kind.as_str().to_owned(),
        mtu: reading.link.mtu,
        up: reading.link.up,
        rx_dropped: reading.rx_dropped,
        tx_dropped: reading.tx_dropped,
        tx_errors: reading.tx_errors,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn public_address(findings: &Findings) -> PublicAddress {
    let text = |address: Option<IpAddr>| address.map_or_else(String::new, |ip| ip.to_string());
    let conflict = |finding: &Finding| AddressFinding {
        source: finding.source.to_string(),
        address: finding.address.to_string(),
        trouble: String::new(),
    };
    let decision = &findings.decision;
    let chosen = decision.chosen.as_ref();
    let sources = findings.sources.iter();
    PublicAddress {
        address: text(chosen.map(|finding| finding.address)),
        source: chosen.map_or_else(String::new, |finding| finding.source.to_string()),
        local: text(findings.local),
        conflicts: decision.conflicts.iter().map(conflict).collect(),
        sources: sources
            .map(|(source, known)| AddressFinding {
                source: source.to_string(),
                address: text(known.address),
                trouble: known.trouble.clone().unwrap_or_default(),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use nsm_discovery::dns::ResolveError;

    use super::*;

    const VIEW: View = View {
        at: Monotonic::from_nanos(10_000_000_000),
    };

    fn ago(millis: u64) -> Monotonic {
        VIEW.at - Duration::from_millis(millis)
    }

    #[test]
    fn counters_have_the_time_since_the_last_packet() {
        let count = |packets, last| Count {
            packets,
            bytes: 100 * packets,
            last,
        };
        let shown = VIEW.counters(Some(count(3, Some(ago(1500)))), Some(count(0, None)));
        let expected = Counters {
            rx_packets: 3,
            rx_bytes: 300,
            rx_idle_ms: Some(1500),
            ..Counters::default()
        };
        assert_eq!(shown, Some(expected));
        assert_eq!(VIEW.counters(Some(count(3, None)), None), None);
    }

    #[test]
    fn a_peer_is_shown_with_the_age_of_its_state() {
        let peer = |is_lost| {
            VIEW.peer(PeerEvidence {
                url: "tcp://192.0.2.2:5006".to_owned(),
                connections: 2,
                is_lost,
                since: ago(61_000),
                spiffe_id: None,
            })
        };
        // A stream that is older than the clock began with it.
        assert_eq!(
            (peer(true).state.as_str(), peer(true).state_for_ms),
            ("lost", 10_000)
        );
        assert_eq!(peer(false).state, "watched");
    }

    #[test]
    fn a_refusal_of_dns_is_shown_with_its_cause_and_expiry() {
        let error = ResolveError::Interrupted {
            domain: "cluster-2.example".to_owned(),
        };
        let cause = error.to_string();
        let shown = VIEW.dns(DnsEvidence {
            domain: "cluster-2.example".parse().unwrap(),
            outcome: Err(error),
            answered: ago(250),
            expires: VIEW.at + Duration::from_millis(750),
        });
        assert_eq!((shown.age_ms, shown.expires_in_ms), (250, 750));
        assert_eq!((shown.trouble, shown.answer), (cause, String::new()));
    }
}
