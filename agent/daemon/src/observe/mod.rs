//! What can be seen of a running agent: [`Observer`] gathers the evidence, `status` and metrics are views of it.

use std::{collections::HashMap, sync::Arc};

use nsm_controlplane::{
    plane::{ConnectionView, ControlPlane},
    ports::Plan,
};
use nsm_core::nsm::name::Domain;
use nsm_dataplane::bpf;

use self::evidence::{ConnectionEvidence, Evidence, PeerEvidence, Sources};
use crate::agent::{
    forwarder::{LinkCounters, NodeForwarder},
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
                forwarder.link_counters(plans).await
            }
            None => HashMap::new(),
        };
        let mut connections = Vec::with_capacity(views.len());
        for views in views.chunks(BETWEEN_OTHERS) {
            connections.extend(
                views
                    .iter()
                    .map(|view| self.connection(view, &links, &sessions)),
            );
            tokio::task::yield_now().await;
        }
        Evidence {
            waiting_for: self.readiness.waiting(),
            degraded: self.readiness.degradations(),
            degraded_paths: forwarder
                .map(NodeForwarder::degraded_paths)
                .unwrap_or_default(),
            programs: forwarder.map(NodeForwarder::program_facts),
            connections,
            sessions,
            peers: self.peers(),
            drops: forwarder.map(NodeForwarder::drops).unwrap_or_default(),
            public_address: self.public_address.findings(),
            registry: self.plane.registry_counts(),
            preflights: forwarder.and_then(NodeForwarder::preflights),
        }
    }

    fn connection(
        &self,
        view: &ConnectionView,
        links: &LinkCounters,
        sessions: &[nsm_dataplane::liveness::Report],
    ) -> ConnectionEvidence {
        let card = match (view.plan(), &self.forwarder) {
            (Some(Plan::Vxlan { spec, .. }), Some(forwarder)) => forwarder.card_counters(spec),
            _ => None,
        };
        ConnectionEvidence::of(Sources {
            view,
            health: self.plane.health_now(view),
            down_reason: self.plane.down_reason(view),
            own_domain: self.domain(),
            links,
            card,
            sessions,
            now: bpf::now(),
        })
    }

    fn peers(&self) -> Vec<PeerEvidence> {
        let lost = self.plane.unmonitored_peers();
        let peers = self.plane.peers().into_iter();
        let evidence = |(url, connections)| PeerEvidence {
            is_lost: lost.contains(&url),
            url,
            connections,
        };
        peers.map(evidence).collect()
    }

    fn domain(&self) -> &Domain {
        self.plane.domain()
    }
}
