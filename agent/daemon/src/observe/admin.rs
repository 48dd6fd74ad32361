//! The admin service: the evidence as `proxy-nsmgr status` gets it.

use std::{net::IpAddr, time::Duration};

use nsm_controlplane::api::server::node_caller;
use nsm_core::{
    address::public::Finding,
    identity::policy::{Action, decide},
};
use nsm_proto::admin::{
    AddressFinding, Bpf, ConnectionStatus, Counters, Listener, PathHealth, Peer, PublicAddress,
    Status as AgentStatus, StatusRequest, Tunnel, WayHealth,
    admin_server::{Admin, AdminServer},
};
use tonic::{Request, Response, Status};

use super::{
    Observer,
    evidence::{
        ConnectionEvidence, Count, DirectionEvidence, PathEvidence, PeerEvidence, TunnelEvidence,
        WayEvidence,
    },
};
use crate::{
    agent::{programs::Facts, public_address::Findings},
    config::Config,
};

/// The service of one agent.
pub(crate) struct AdminService {
    observer: Observer,
    name: String,
    domain: String,
    listeners: Vec<Listener>,
}

/// The admin service of this agent.
pub(crate) fn service(config: &Config, observer: Observer) -> AdminServer<AdminService> {
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
        name: config.name.clone(),
        domain: config.domain.to_string(),
        listeners: listeners.into_iter().map(listener).collect(),
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
        let evidence = self.observer.evidence().await;
        let drops = evidence.drops.into_iter();
        Ok(Response::new(AgentStatus {
            name: self.name.clone(),
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: evidence.waiting_for.is_empty(),
            waiting_for: evidence.waiting_for,
            degraded: [evidence.degraded, evidence.degraded_paths].concat(),
            bpf: evidence.programs.map(bpf),
            connections: evidence.connections.into_iter().map(connection).collect(),
            peers: evidence.peers.into_iter().map(peer).collect(),
            drops: drops
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
            listeners: self.listeners.clone(),
            public_address: Some(public_address(&evidence.public_address)),
        }))
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
    }
}

fn peer(evidence: PeerEvidence) -> Peer {
    let state = if evidence.is_lost { "lost" } else { "watched" };
    Peer {
        url: evidence.url,
        state: state.to_owned(),
        connections: u32::try_from(evidence.connections).unwrap_or(u32::MAX),
    }
}

fn connection(evidence: ConnectionEvidence) -> ConnectionStatus {
    let ConnectionEvidence {
        inward, outward, ..
    } = &evidence;
    ConnectionStatus {
        tunnel: evidence
            .tunnel
            .as_ref()
            .map(|it| tunnel(it, inward, outward)),
        health: evidence.path.as_ref().map(|it| path(it, inward, outward)),
        id: evidence.id,
        network_service: evidence.service,
        endpoint: evidence.endpoint,
        state: evidence.state.as_str_name().to_owned(),
        path: evidence.hops,
        expires_in_seconds: evidence.expires_in.as_secs(),
        client_mechanism: evidence.client_mechanism,
        endpoint_mechanism: evidence.endpoint_mechanism,
        src_addresses: evidence.src_addresses,
        dst_addresses: evidence.dst_addresses,
        mtu: evidence.mtu,
        down_reason: evidence.down_reason.unwrap_or_default(),
    }
}

fn tunnel(
    evidence: &TunnelEvidence,
    inward: &DirectionEvidence,
    outward: &DirectionEvidence,
) -> Tunnel {
    let link = counters(inward.link, outward.link);
    Tunnel {
        vni: evidence.vni.get(),
        port: evidence.port.into(),
        local: evidence.local.to_string(),
        remote: evidence.remote.to_string(),
        interface: evidence.interface.to_string(),
        netns: evidence.netns.clone(),
        counters: counters(inward.card, outward.card).or(link),
        link,
    }
}

fn counters(received: Option<Count>, sent: Option<Count>) -> Option<Counters> {
    let (rx, tx) = received.zip(sent)?;
    Some(Counters {
        tx_packets: tx.packets,
        tx_bytes: tx.bytes,
        rx_packets: rx.packets,
        rx_bytes: rx.bytes,
    })
}

fn path(
    evidence: &PathEvidence,
    inward: &DirectionEvidence,
    outward: &DirectionEvidence,
) -> PathHealth {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let way = |evidence: &WayEvidence| WayHealth {
        state: evidence.verdict.to_string(),
        reason: evidence.reason.clone(),
        last_heard_ms: evidence
            .proved_ago
            .map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
    };
    PathHealth {
        state: evidence.verdict.to_string(),
        peer: evidence.peer.to_string(),
        port: evidence.port.into(),
        r#in: inward.way.as_ref().map(way),
        out: outward.way.as_ref().map(way),
        round_trip_p50_ns: evidence.round_trip_p50.map(nanos),
        round_trip_p99_ns: evidence.round_trip_p99.map(nanos),
        loss: evidence.loss,
        path_mtu: evidence.mtu.map(u32::from),
    }
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
