//! The control plane's prober port on this node's health plane.

use std::sync::Arc;

use nsm_controlplane::ports::{PeerSpec, Prober, WatchError};
use nsm_core::liveness::{Health, PathEvent, PathId, PeerReport, Reflector, sbfd::Timing};
use nsm_dataplane::{
    bpf::Bpf,
    forward::TunnelDevices,
    liveness::{Health as HealthPlane, HealthConfig, HealthError, Paths, Preflights, Report},
};

use crate::config::Config;

/// This node's sessions with others.
#[derive(Debug)]
pub(crate) struct NodeProber(Paths);

impl NodeProber {
    /// Starts the health plane, which takes some 30 ms: for a thread of the runtime that may block.
    ///
    /// # Errors
    /// It cannot be started; tunnels work without it.
    pub(crate) fn start(config: &Config, devices: Arc<TunnelDevices>) -> Result<Self, HealthError> {
        Paths::start(plane_config(config), devices).map(Self)
    }

    /// Removes what an earlier agent left that watched paths: this one does not. Blocks as [`Self::start`] does.
    ///
    /// # Errors
    /// Something stays.
    pub(crate) fn remove_left(config: &Config, bpf: &Bpf) -> Result<(), HealthError> {
        HealthPlane::remove_left(&plane_config(config), bpf)
    }

    /// What works less well than it could.
    pub(crate) fn degraded(&self) -> Vec<String> {
        let plane = self.0.plane();
        let no_realtime = "the prober has no real-time priority (CAP_SYS_NICE): a busy node notices the loss of a path later";
        let is_slow = !plane.has_realtime();
        is_slow
            .then(|| no_realtime.to_owned())
            .into_iter()
            .collect()
    }

    /// Peers to which packets leave uncounted, a sentence each.
    pub(crate) fn uncounted(&self) -> impl Iterator<Item = String> {
        let uncounted = self.0.plane().uncounted().into_iter();
        uncounted.map(|peer| peer.to_string())
    }

    /// What every session has measured, for `status` and metrics.
    pub(crate) async fn reports(&self) -> Vec<Report> {
        self.0.plane().reports().await.unwrap_or_default()
    }

    /// The counts of proofs by outcome.
    pub(crate) fn preflights(&self) -> Preflights {
        self.0.plane().preflights()
    }

    /// Signals to peers that this node goes: its silence is no loss.
    pub(crate) async fn leave_all(&self) {
        if let Err(error) = self.0.plane().set_admin_down(true).await {
            tracing::warn!(%error, "peers take the end of this agent for a loss");
        }
    }

    /// Ends all sessions.
    pub(crate) async fn close(&self) {
        if let Err(error) = self.0.plane().close().await {
            tracing::warn!(%error, "a part of the health plane stays behind");
        }
    }
}

#[tonic::async_trait]
impl Prober for NodeProber {
    fn reflector(&self) -> Reflector {
        self.0.reflector()
    }

    async fn join(&self, user: &str, peer: &PeerSpec) -> Result<(), WatchError> {
        let joined = self.0.join(user, &peer.path, peer.mtu).await;
        joined.map_err(|error| WatchError {
            peer: peer.path.address,
            cause: error.to_string(),
        })
    }

    fn leave(&self, user: &str, path: &PathId) {
        self.0.leave(user, path);
    }

    async fn prove(&self, path: &PathId) -> Option<Health> {
        self.0.prove(path).await
    }

    fn health(&self, path: &PathId) -> Option<Health> {
        self.0.health(path)
    }

    fn report(&self, user: &str, path: &PathId, report: Option<PeerReport>) {
        self.0.set_report(user, path, report);
    }

    async fn next_event(&self) -> PathEvent {
        self.0.next_event().await
    }
}

fn plane_config(config: &Config) -> HealthConfig {
    HealthConfig {
        domain: config.domain.to_string(),
        vni: config.tunnel.management_vni,
        port: config.tunnel.port,
        local: config.tunnel.ip,
        timing: Timing::default(),
        namespace: None,
        orphan_grace: config.max_token_lifetime,
    }
}
