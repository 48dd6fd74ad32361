//! This agent as the forwarder of another NSMgr: its entry in that NSMgr's registry.

use nsm_controlplane::{plane::ControlPlane, route::upstream::ForwarderEntry};
use nsm_core::net::PeerUrl;
use tokio::{sync::oneshot, task::JoinHandle};

use super::readiness::Readiness;
use crate::config::{Config, ListenUrl};

/// A registration that is kept.
pub(crate) struct Registration {
    stop: oneshot::Sender<()>,
    keeping: JoinHandle<()>,
}

impl Registration {
    /// Registers this agent's forwarder for as long as it runs; the agent is ready once the NSMgr has the entry. `None`: this agent is
    /// no other NSMgr's forwarder.
    pub(crate) fn keep(
        config: &Config,
        plane: &ControlPlane,
        readiness: &Readiness,
    ) -> Option<Self> {
        let entry = entry(config)?;
        let url = config.upstream_nsmgr_url.as_ref()?;
        let guard = format!("the NSMgr {url}, whose forwarder this agent is");
        readiness.wait_for(guard.clone());
        let readiness = readiness.clone();
        let registered = move |is_registered| match is_registered {
            true => readiness.arrived(&guard),
            false => readiness.wait_for(guard.clone()),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move {
            let _ = stopped.await;
        };
        let keeping = tokio::spawn(plane.clone().keep_forwarder(entry, registered, stopped));
        Some(Self { stop, keeping })
    }

    /// Takes the entry back.
    pub(crate) async fn end(self) {
        drop(self.stop);
        let _ = self.keeping.await;
    }
}

fn entry(config: &Config) -> Option<ForwarderEntry> {
    let ListenUrl::Unix(path) = &config.listen.forwarder else {
        return None;
    };
    config.is_upstreams_forwarder().then(|| ForwarderEntry {
        name: config.name.clone(),
        service: config.forwarder_service.clone(),
        labels: config.forwarder_labels.clone(),
        url: PeerUrl::unix(path),
    })
}
