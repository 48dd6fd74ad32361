//! The health plane, from the start or as soon as it can be had: what is in its way, another program on the tunnels' port before all,
//! may go.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use nsm_controlplane::{liveness::Reachability, plane::ControlPlane};
use nsm_core::backoff::Backoff;
use nsm_dataplane::{bpf::Bpf, liveness::HealthError};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{forwarder::NodeForwarder, prober::NodeProber, readiness::Readiness};
use crate::config::Config;

/// The shortest wait before another try: who has just freed the port wants to see it used.
const SHORTEST_WAIT: Duration = Duration::from_secs(1);

/// The longest: a try costs the node a link that comes and goes.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What proves paths, where that is possible and wanted.
pub(crate) struct Probing {
    prober: OnceLock<NodeProber>,
    /// Why there was none at the start.
    failure: Option<HealthError>,
    /// Held while a health plane is started; true: the agent ends, and none is started any more.
    is_closed: Arc<Mutex<bool>>,
}

impl Probing {
    /// Starts the health plane, if one is wanted and can be had.
    pub(crate) async fn start(config: &Config, bpf: Option<Arc<Bpf>>) -> Self {
        let mut probing = Self {
            prober: OnceLock::new(),
            failure: None,
            is_closed: Arc::default(),
        };
        let is_off = config.reachability == Reachability::Off;
        let config = config.clone();
        if is_off {
            let remove = move || NodeProber::remove_left(&config, bpf.as_deref());
            let removed = tokio::task::spawn_blocking(remove).await.expect(NO_PANIC);
            if let Err(error) = removed {
                tracing::warn!(%error, "a part of an earlier agent's health plane stays: it may go on answering probes");
            }
            return probing;
        }
        let started = tokio::task::spawn_blocking(move || NodeProber::start(&config, bpf));
        match started.await.expect(NO_PANIC) {
            Ok(prober) => probing.prober = OnceLock::from(prober),
            Err(error) => probing.failure = Some(error),
        }
        probing
    }

    /// What proves paths, if it runs.
    pub(crate) fn prober(&self) -> Option<&NodeProber> {
        self.prober.get()
    }

    /// What works less well than it could.
    pub(crate) fn degraded(&self) -> Vec<String> {
        match (self.prober(), &self.failure) {
            (Some(prober), _) => prober.degraded(),
            (None, Some(error)) => vec![no_probes(error)],
            (None, None) => Vec::new(),
        }
    }

    /// Ends the health plane, also one that is just being started.
    pub(crate) async fn close(&self) {
        *self.is_closed.lock().await = true;
        if let Some(prober) = self.prober() {
            prober.close().await;
        }
    }

    /// The right to start a health plane; `None` when the agent ends.
    async fn may_start(&self) -> Option<OwnedMutexGuard<bool>> {
        let guard = Arc::clone(&self.is_closed).lock_owned().await;
        (!*guard).then_some(guard)
    }
}

const NO_PANIC: &str = "starting the health plane, or removing one, does not panic";

fn no_probes(error: &HealthError) -> String {
    format!("no probes: {error}; tunnels work, and the loss of a path is not noticed")
}

/// Where the health plane could not be started, tries again until it can, and then lets the control plane follow it.
pub(crate) async fn until_it_probes(
    config: Config,
    forwarder: Arc<NodeForwarder>,
    plane: ControlPlane,
    readiness: Readiness,
) {
    let Some(failure) = &forwarder.probing.failure else {
        return;
    };
    let mut told = forwarder.probing.degraded();
    let mut is_for_good = failure.is_for_good();
    let mut backoff = Backoff::new(SHORTEST_WAIT, LONGEST_WAIT);
    while !is_for_good {
        tokio::time::sleep(backoff.next(rand::random())).await;
        let Some(guard) = forwarder.probing.may_start().await else {
            return;
        };
        // This task may be ended meanwhile; what was started is then found, and closed, all the same.
        let (starting, config) = (Arc::clone(&forwarder), config.clone());
        let started = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            NodeProber::start(&config, starting.bpf()).map(|prober| {
                // There is none: nobody else starts one.
                let _ = starting.probing.prober.set(prober);
            })
        });
        let now = match started.await.expect(NO_PANIC) {
            Ok(()) => forwarder.probing.degraded(),
            Err(error) => {
                is_for_good = error.is_for_good();
                vec![no_probes(&error)]
            }
        };
        if now != told {
            for reason in &now {
                tracing::warn!(reason, "degraded");
            }
            readiness.replace_degradations(&told, now.clone());
            told = now;
        }
        if forwarder.probing.prober().is_some() {
            tracing::info!("paths are watched from now on");
            return plane.watch_paths().await;
        }
    }
}
