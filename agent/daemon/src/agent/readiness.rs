//! Whether the agent is ready, and what it still waits for: shown by gRPC health and by `status`.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nsm_controlplane::transport::{dial::dial_with, tls::Tls};
use nsm_core::net::PeerUrl;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, HealthService},
};

/// The names under which NSM components ask for health.
const SERVICES: [&str; 5] = [
    "",
    "networkservice.NetworkService",
    "connection.MonitorConnection",
    "registry.NetworkServiceRegistry",
    "registry.NetworkServiceEndpointRegistry",
];

/// How long to wait before a registry that does not answer is asked again.
const REGISTRY_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    waiting: BTreeSet<String>,
    degraded: Vec<String>,
}

/// Ready when nothing is waited for. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Readiness {
    state: Arc<Mutex<State>>,
    reporter: HealthReporter,
}

impl Readiness {
    /// Not ready until all of `guards` have arrived.
    pub(crate) fn waiting_for<'a>(guards: impl IntoIterator<Item = &'a str>) -> Self {
        let waiting = guards.into_iter().map(str::to_owned).collect();
        Self {
            state: Arc::new(Mutex::new(State {
                waiting,
                degraded: Vec::new(),
            })),
            reporter: HealthReporter::new(),
        }
    }

    /// One more thing to wait for.
    pub(crate) fn wait_for(&self, guard: impl Into<String>) {
        self.state().waiting.insert(guard.into());
        self.report();
    }

    /// One thing less to wait for.
    pub(crate) fn arrived(&self, guard: &str) {
        self.state().waiting.remove(guard);
        self.report();
    }

    /// What works less well than it could.
    pub(crate) fn degraded(&self, reason: String) {
        self.state().degraded.push(reason);
    }

    /// What is `old` holds no longer, and this does.
    pub(crate) fn replace_degradations(&self, old: &[String], now: Vec<String>) {
        let mut state = self.state();
        state.degraded.retain(|reason| !old.contains(reason));
        state.degraded.extend(now);
    }

    /// What keeps the agent from being ready.
    pub(crate) fn waiting(&self) -> Vec<String> {
        self.state().waiting.iter().cloned().collect()
    }

    /// What works less well than it could.
    pub(crate) fn degradations(&self) -> Vec<String> {
        self.state().degraded.clone()
    }

    /// gRPC health of all services.
    pub(crate) fn health_service(&self) -> HealthServer<impl Health + use<>> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }

    /// Sets gRPC health to the state at the time when the task runs: whatever the order of several tasks, the last sets the newest.
    fn report(&self) {
        let readiness = self.clone();
        tokio::spawn(async move {
            for service in SERVICES {
                let status = if readiness.waiting().is_empty() {
                    ServingStatus::Serving
                } else {
                    ServingStatus::NotServing
                };
                readiness.reporter.set_service_status(service, status).await;
            }
        });
    }

    /// Not ready until an upstream registry can be reached, from this call on.
    pub(crate) fn until_registry_answers(
        self,
        url: PeerUrl,
        tls: Option<Arc<Tls>>,
        dial_timeout: Duration,
    ) -> impl Future<Output = ()> + Send + use<> {
        let guard = format!("the registry {url}");
        self.wait_for(guard.clone());
        async move {
            while let Err(error) =
                dial_with(&url, &Arc::default(), tls.as_ref(), dial_timeout).await
            {
                tracing::warn!(registry.url = %url, %error, "the registry does not answer yet");
                tokio::time::sleep(REGISTRY_PAUSE).await;
            }
            self.arrived(&guard);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
