//! The admin service: what `proxy-nsmgr status` shows, gathered when it is asked for.

use std::{collections::BTreeMap, time::SystemTime};

use nsm_controlplane::{
    forwarder::{self, Forwarder as _, Plan},
    plane::ConnectionView,
};
use nsm_proto::admin::{
    Bpf, ConnectionStatus, Counters, Listener, Peer, Status as AgentStatus, StatusRequest, Tunnel,
    admin_server::{Admin, AdminServer},
};
use tonic::{Request, Response, Status};

use super::{Told, forwarder::NodeForwarder};
use crate::config::Config;

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
    async fn get_status(&self, _: Request<StatusRequest>) -> Result<Response<AgentStatus>, Status> {
        let Told {
            plane,
            forwarder,
            public_address,
            readiness,
        } = &self.told;
        let waiting_for = readiness.waiting();
        let forwarder = forwarder.as_deref();
        let lost = plane.unmonitored_peers();
        let mut connections = Vec::new();
        for view in plane.connections() {
            connections.push(connection(&view, forwarder).await);
        }
        Ok(Response::new(AgentStatus {
            name: self.name.clone(),
            domain: self.domain.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: waiting_for.is_empty(),
            waiting_for,
            degraded: readiness.degradations(),
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

async fn connection(view: &ConnectionView, forwarder: Option<&NodeForwarder>) -> ConnectionStatus {
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
        tunnel: match view.plan() {
            Some(plan) => tunnel(plan, forwarder).await,
            None => None,
        },
        health: None,
    }
}

async fn tunnel(plan: &Plan, forwarder: Option<&NodeForwarder>) -> Option<Tunnel> {
    let Plan::Vxlan { netns, spec } = plan else {
        return None;
    };
    let (counters, link) = match forwarder {
        Some(forwarder) => (
            forwarder.counters(plan).await,
            forwarder.link_counters(plan).await,
        ),
        None => (None, None),
    };
    Some(Tunnel {
        vni: spec.vni.get(),
        port: u32::from(spec.port),
        local: spec.local.to_string(),
        remote: spec.remote.to_string(),
        interface: spec.link.name.to_string(),
        netns: netns.to_string(),
        counters: counters.map(told),
        link: link.map(told),
    })
}

fn told(counters: forwarder::Counters) -> Counters {
    Counters {
        tx_packets: counters.tx_packets,
        tx_bytes: counters.tx_bytes,
        rx_packets: counters.rx_packets,
        rx_bytes: counters.rx_bytes,
    }
}

/// Nothing is attached.
pub(crate) fn no_bpf() -> Bpf {
    Bpf {
        hook: "none".to_owned(),
        ..Bpf::default()
    }
}
