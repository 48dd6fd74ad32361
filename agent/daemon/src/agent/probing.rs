//! The sessions' plane, from the start or as soon as it can be had: its obstacle, such as another program on the tunnels' port, may go.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use nsm_controlplane::{liveness::Reachability, plane::ControlPlane};
use nsm_core::backoff::Backoff;
use nsm_dataplane::{forward::TunnelDevices, liveness::HealthError};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{prober::NodeProber, readiness::Readiness};
use crate::config::Config;

/// The shortest wait before another try: whoever frees the port can watch it being used.
const SHORTEST_WAIT: Duration = Duration::from_secs(1);

/// The longest: a try makes and removes a link on the node.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What proves paths, where that is possible and wanted.
pub(crate) struct Probing {
    config: Config,
    devices: Arc<TunnelDevices>,
    prober: OnceLock<NodeProber>,
    /// Why there was none at the start.
    failure: Option<HealthError>,
    /// Held while a health plane is started; true: the agent ends, and none is started any more.
    is_closed: Arc<Mutex<bool>>,
}

impl Probing {
    /// Starts the health plane, if one is wanted and can be had.
    pub(crate) async fn start(config: &Config, devices: Arc<TunnelDevices>) -> Self {
        let mut probing = Self {
            config: config.clone(),
            devices: Arc::clone(&devices),
            prober: OnceLock::new(),
            failure: None,
            is_closed: Arc::default(),
        };
        let is_off = config.reachability == Reachability::Off;
        let config = config.clone();
        if is_off {
            let remove = move || NodeProber::remove_left(&config, devices.bpf());
            let removed = tokio::task::spawn_blocking(remove).await.expect(NO_PANIC);
            if let Err(error) = removed {
                tracing::warn!(%error, "a part of an earlier agent's health plane stays: it may go on answering probes");
            }
            return probing;
        }
        let started = tokio::task::spawn_blocking(move || NodeProber::start(&config, devices));
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

    /// Where the health plane could not be started, tries again until it can; then the control plane follows it.
    pub(crate) async fn until_it_probes(
        self: Arc<Self>,
        plane: ControlPlane,
        readiness: Readiness,
    ) {
        let Some(failure) = &self.failure else {
            return;
        };
        let mut reported = self.degraded();
        let mut is_for_good = failure.is_for_good();
        let mut backoff = Backoff::new(SHORTEST_WAIT, LONGEST_WAIT);
        while !is_for_good {
            tokio::time::sleep(backoff.next(rand::random())).await;
            let Some(guard) = self.may_start().await else {
                return;
            };
            let now = match self.start_late(guard).await {
                Ok(()) => self.degraded(),
                Err(error) => {
                    is_for_good = error.is_for_good();
                    vec![no_probes(&error)]
                }
            };
            if now != reported {
                for reason in &now {
                    tracing::warn!(reason, "degraded");
                }
                readiness.replace_degradations(&reported, now.clone());
                reported = now;
            }
            if self.prober().is_some() {
                tracing::info!("paths are watched from now on");
                return plane.watch_paths().await;
            }
        }
    }

    /// Starts the health plane on a thread of its own: the calling task may be ended meanwhile, and [`Self::close`] then finds what was
    /// started.
    async fn start_late(self: &Arc<Self>, guard: OwnedMutexGuard<bool>) -> Result<(), HealthError> {
        let starting = Arc::clone(self);
        let started = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            NodeProber::start(&starting.config, Arc::clone(&starting.devices)).map(|prober| {
                // There is none yet: the guard keeps others from starting one.
                let _ = starting.prober.set(prober);
            })
        });
        started.await.expect(NO_PANIC)
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
