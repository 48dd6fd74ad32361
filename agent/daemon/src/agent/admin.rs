//! The admin service: what `proxy-nsmgr status` shows, gathered when it is asked for.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use nsm_controlplane::{
    api::server::node_caller,
    plane::ConnectionView,
    ports::{PathId, Plan},
};
use nsm_core::{
    clock::Monotonic,
    identity::policy::{Action, decide},
    link::LinkAlias,
    liveness::health::{Direction, Health},
};
use nsm_dataplane::liveness::Report;
use nsm_proto::admin::{
    Bpf, ConnectionStatus, Counters, Listener, PathHealth, Peer, Status as AgentStatus,
    StatusRequest, Tunnel, WayHealth,
    admin_server::{Admin, AdminServer},
};
use tonic::{Request, Response, Status};

use super::{Told, forwarder::NodeForwarder, prober};
use crate::config::Config;

/// Connections that are looked at before others may work: a few microseconds each, and there may be ten thousand.
const BETWEEN_OTHERS: usize = 64;

/// The service of one agent.
pub(crate) struct AdminService {
    told: Told,
    name: String,
    domain: String,
    listeners: Vec<Listener>,
}

/// The admin service of this agent.
pub(crate) fn service(config: &Config, told: Told) -> AdminServer<AdminService> {
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
    AdminServer::new(AdminService {
        told,
        name: config.name.clone(),
        domain: config.domain.to_string(),
        listeners: listeners
            .into_iter()
            .map(|(role, url)| Listener {
                role: role.to_owned(),
                url: url.to_string(),
            })
            .collect(),
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
        let Told {
            plane,
            forwarder,
            public_address,
            readiness,
        } = &self.told;
        let waiting_for = readiness.waiting();
        let forwarder = forwarder.as_deref();
        let lost = plane.unmonitored_peers();
        let paths = match forwarder {
            Some(forwarder) => forwarder.path_reports().await,
            None => Vec::new(),
        };
        let mut degraded = readiness.degradations();
        degraded.extend(
            forwarder
                .iter()
                .flat_map(|forwarder| forwarder.degraded_paths()),
        );
        let views = plane.connections();
        let links = match forwarder {
            Some(forwarder) => {
                let plans = views.iter().filter_map(ConnectionView::plan);
                forwarder.link_counters(plans).await
            }
            None => HashMap::new(),
        };
        let mut connections = Vec::with_capacity(views.len());
        for views in views.chunks(BETWEEN_OTHERS) {
            connections.extend(views.iter().map(|view| {
                let health = plane.health_now(view);
                ConnectionStatus {
                    down_reason: plane.down_reason(view).unwrap_or_default(),
                    tunnel: view.plan().and_then(|plan| tunnel(plan, forwarder, &links)),
                    health: health.map(|health| path_health(&health, view.watched(), &paths)),
                    ..connection(view)
                }
            }));
            tokio::task::yield_now().await;
        }
        Ok(Response::new(AgentStatus {
            name: self.name.clone(),
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: waiting_for.is_empty(),
            waiting_for,
            degraded,
            bpf: forwarder.map(NodeForwarder::bpf_facts),
            connections,
            peers: plane
                .peers()
                .into_iter()
                .map(|(url, connections)| Peer {
                    state: if lost.contains(&url) {
                        "lost"
                    } else {
                        "watched"
                    }
                    .to_owned(),
                    url,
                    connections: u32::try_from(connections).unwrap_or(u32::MAX),
                })
                .collect(),
            drops: forwarder.map_or_else(BTreeMap::new, NodeForwarder::drops),
            listeners: self.listeners.clone(),
            public_address: Some(public_address.facts()),
        }))
    }
}

/// A connection without its tunnel and what is known of its path.
fn connection(view: &ConnectionView) -> ConnectionStatus {
    let wire = view.connection();
    let ip = wire
        .context
        .as_ref()
        .and_then(|context| context.ip_context.clone())
        .unwrap_or_default();
    ConnectionStatus {
        id: view.id().to_owned(),
        network_service: wire.network_service.clone(),
        endpoint: wire.network_service_endpoint_name.clone(),
        state: wire.state().as_str_name().to_owned(),
        path: wire
            .path
            .iter()
            .flat_map(|path| &path.path_segments)
            .map(|segment| segment.name.clone())
            .collect(),
        expires_in_seconds: view
            .expires()
            .duration_since(SystemTime::now())
            .unwrap_or_default()
            .as_secs(),
        client_mechanism: wire
            .mechanism
            .as_ref()
            .map(|mechanism| mechanism.r#type.clone())
            .unwrap_or_default(),
        endpoint_mechanism: view.next_mechanism().to_owned(),
        src_addresses: ip.src_ip_addrs,
        dst_addresses: ip.dst_ip_addrs,
        mtu: wire.context.as_ref().map_or(0, |context| context.mtu),
        tunnel: None,
        health: None,
        down_reason: String::new(),
    }
}

/// What is known of a connection's path, with what its session has measured: that of the whole path, for the same address may have
/// several reflectors.
pub(super) fn path_health(
    health: &Health,
    watched: Option<PathId>,
    paths: &[Report],
) -> PathHealth {
    let watched = watched.map(|path| prober::known_as(&path));
    let report = watched.and_then(|path| {
        let mut sessions = paths.iter();
        sessions.find(|report| prober::path_of(&report.peer) == path)
    });
    let measured = report.map(|report| report.statistics);
    let nanos = |time: Option<Duration>| {
        time.map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
    };
    let now = prober::now();
    let ago = |at: Option<Monotonic>| {
        at.map(|at| u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX))
    };
    let answered = report.and_then(|report| report.snapshot.last_answer);
    let heard = report.and_then(|report| report.snapshot.peer.map(|probe| probe.at));
    let way = |direction, last_heard| WayHealth {
        state: health.way(direction).verdict.to_string(),
        reason: health.sentence(direction),
        last_heard_ms: ago(last_heard),
    };
    PathHealth {
        state: health.verdict().to_string(),
        peer: health.peer.to_string(),
        port: health.port.into(),
        r#in: Some(way(Direction::In, answered.max(heard))),
        out: Some(way(Direction::Out, answered)),
        round_trip_p50_ns: nanos(measured.and_then(|it| it.rtt_p50)),
        round_trip_p99_ns: nanos(measured.and_then(|it| it.rtt_p99)),
        loss: measured.filter(|it| it.probes > 0).map(|it| it.loss()),
        path_mtu: health.path_mtu.map(u32::from),
    }
}

fn tunnel(
    plan: &Plan,
    forwarder: Option<&NodeForwarder>,
    links: &HashMap<LinkAlias, Counters>,
) -> Option<Tunnel> {
    let Plan::Vxlan { netns, spec } = plan else {
        return None;
    };
    let link = links.get(&spec.link.alias).copied();
    let underlay = forwarder.and_then(|forwarder| forwarder.underlay_counters(spec));
    Some(Tunnel {
        vni: spec.vni.get(),
        port: u32::from(spec.port),
        local: spec.local.to_string(),
        remote: spec.remote.to_string(),
        interface: spec.link.name.to_string(),
        netns: netns.to_string(),
        counters: underlay.or(link),
        link,
    })
}

/// Nothing is attached.
pub(crate) fn no_bpf() -> Bpf {
    Bpf {
        hook: "none".to_owned(),
        ..Bpf::default()
    }
}
