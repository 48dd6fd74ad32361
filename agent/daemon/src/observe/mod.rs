//! What can be seen of a running agent: [`Observer`] gathers the evidence, `status` and metrics are views of it.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use nsm_controlplane::{
    plane::{ConnectionView, ControlPlane, PeerView},
    transport::tls::Tls,
};
use nsm_core::{clock::Monotonic, nsm::name::Domain};
use nsm_dataplane::{bpf, liveness::Report};
use nsm_discovery::dns::Remembered;
use tokio::time::Instant;

use self::evidence::{
    ConnectionEvidence, DnsEvidence, Evidence, IdentityEvidence, PeerEvidence, Sources,
};
use crate::agent::{
    forwarder::{LinkReadings, NodeForwarder},
    public_address::PublicAddress,
    readiness::Readiness,
};

pub(crate) mod admin;
mod evidence;
pub(crate) mod metrics;
pub(crate) mod status;

/// Connections that are gathered before other tasks run: a few microseconds each, and there may be ten thousand.
const BETWEEN_OTHERS: usize = 64;

/// Gathers what the parts of an agent know. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Observer {
    pub(crate) plane: ControlPlane,
    pub(crate) forwarder: Option<Arc<NodeForwarder>>,
    pub(crate) public_address: PublicAddress,
    pub(crate) readiness: Readiness,
    /// None in plain text.
    pub(crate) tls: Option<Arc<Tls>>,
}

impl Observer {
    /// What is known now. It is gathered when a view needs it: nothing runs in between, and nothing goes stale.
    pub(crate) async fn evidence(&self) -> Evidence {
        let forwarder = self.forwarder.as_deref();
        let sessions = match forwarder {
            Some(forwarder) => forwarder.path_reports().await,
            None => Vec::new(),
        };
        let views = self.plane.connections();
        let links = match forwarder {
            Some(forwarder) => {
                let plans = views.iter().filter_map(ConnectionView::plan);
                forwarder.link_readings(plans).await
            }
            None => HashMap::new(),
        };
        let at = bpf::now();
        let mut connections = Vec::with_capacity(views.len());
        for views in views.chunks(BETWEEN_OTHERS) {
            let of = |view| self.connection(view, &links, &sessions, at);
            connections.extend(views.iter().map(of));
            tokio::task::yield_now().await;
        }
        Evidence {
            at,
            waiting_for: self.readiness.waiting(),
            degraded: self.readiness.degradations(),
            degraded_paths: forwarder
                .map(NodeForwarder::degraded_paths)
                .unwrap_or_default(),
            programs: forwarder.map(NodeForwarder::program_facts),
            connections,
            sessions,
            peers: self.peers(at),
            dns: self.dns(at),
            drops: forwarder.map(NodeForwarder::drops).unwrap_or_default(),
            public_address: self.public_address.findings(),
            registry: self.plane.registry_counts(),
            preflights: forwarder.and_then(NodeForwarder::preflights),
            identity: self.identity(),
        }
    }

    fn identity(&self) -> Option<IdentityEvidence> {
        let identity = self.tls.as_ref()?.identity();
        Some(IdentityEvidence {
            source: identity.origin().to_owned(),
            current: identity.current().ok(),
            at: SystemTime::now(),
        })
    }

    fn connection(
        &self,
        view: &ConnectionView,
        links: &LinkReadings,
        sessions: &[Report],
        at: Monotonic,
    ) -> ConnectionEvidence {
        let forwarder = self.forwarder.as_ref();
        ConnectionEvidence::of(Sources {
            view,
            health: self.plane.health_now(view),
            down_reason: self.plane.down_reason(view),
            own_domain: self.domain(),
            links,
            passed: &|alias| forwarder.and_then(|it| it.passed(alias)),
            sessions,
            at,
        })
    }

    fn peers(&self, at: Monotonic) -> Vec<PeerEvidence> {
        let evidence = |peer: PeerView| PeerEvidence {
            url: peer.url,
            connections: peer.connections,
            is_lost: !peer.is_monitored,
            since: at - peer.since.elapsed(),
            spiffe_id: peer.spiffe_id,
        };
        self.plane.peers().into_iter().map(evidence).collect()
    }

    fn dns(&self, at: Monotonic) -> Vec<DnsEvidence> {
        let evidence = |known: Remembered| DnsEvidence {
            domain: known.domain,
            outcome: known.outcome,
            answered: at - known.answered.elapsed(),
            expires: at + known.expires.saturating_duration_since(Instant::now()),
        };
        let remembered = self.plane.resolver().remembered().into_iter();
        remembered.map(evidence).collect()
    }

    fn domain(&self) -> &Domain {
        self.plane.domain()
    }
}
