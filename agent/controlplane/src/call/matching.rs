//! A connection lasts as long as the matches of its network service allow it: each service is watched while connections use it, and
//! one that does not meet the matches any more is closed, so that its client asks again (NSM `netsvcmonitor`).

use std::{sync::Arc, time::Duration};

use nsm_core::{backoff::Backoff, identity::share::Holder, nsm::name::InterdomainName};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::{task::AbortHandle, time::Instant};
use tokio_stream::StreamExt as _;

use crate::{
    call::{Calls, close::Cause},
    connection::model::Established,
    error::RequestError,
    registry::{Asker, DomainRegistry},
    route::{
        lookup::{RegistryAt, ServiceAt},
        router::is_match,
    },
};

/// Times between tries to watch a service at a registry that is away.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Endpoints that are read from one answer of another registry, which must not fill our memory.
const MAX_FOUND: usize = 1024;

impl Calls {
    /// Watches the service of a connection that has been granted, in the place of its former one.
    pub(super) fn join_service(
        self: &Arc<Self>,
        id: &str,
        prior: Option<&Established>,
        now: &Established,
    ) {
        let former = prior.and_then(|prior| prior.route.matched.as_ref());
        if former == now.route.matched.as_ref() {
            return;
        }
        if let Some(former) = former {
            self.held.services.leave(former, id);
        }
        if let Some(service) = &now.route.matched {
            let start = |service| self.watch_service(service);
            self.held.services.join(service, id, start);
        }
    }

    fn watch_service(self: &Arc<Self>, service: Arc<ServiceAt>) -> AbortHandle {
        let calls = Arc::clone(self);
        let watching = tokio::spawn(async move {
            let mut backoff = Backoff::new(SHORTEST_WAIT, LONGEST_WAIT);
            loop {
                let ended = calls.follow_matches(&service, &mut backoff).await;
                if let Err(error) = ended {
                    tracing::debug!(service = %service.name, %error, "a network service is not watched for a moment");
                }
                tokio::time::sleep(backoff.next(rand::random())).await;
            }
        });
        watching.abort_handle()
    }

    /// Applies each change of the service until its registry ends the watch.
    async fn follow_matches(
        self: &Arc<Self>,
        service: &ServiceAt,
        backoff: &mut Backoff,
    ) -> Result<(), RequestError> {
        let registry = self.lookup.open(&service.registry).await?;
        let query = NetworkService {
            name: service.name.clone(),
            ..NetworkService::default()
        };
        let asker = Asker {
            holder: Holder::our_own(),
            deadline: Instant::now() + self.config.request_timeout,
        };
        let mut events = registry.services().watch(query, asker).await?;
        while let Some(event) = events.next().await {
            let event = event?;
            backoff.reset();
            if event.entry.name == service.name && !event.deleted {
                self.apply_matches(service, &*registry, &event.entry)
                    .await?;
            }
        }
        Ok(())
    }

    async fn apply_matches(
        self: &Arc<Self>,
        service: &ServiceAt,
        registry: &dyn DomainRegistry,
        registered: &NetworkService,
    ) -> Result<(), RequestError> {
        if registered.matches.is_empty() {
            return Ok(());
        }
        let query = NetworkServiceEndpoint {
            network_service_names: vec![service.name.clone()],
            ..NetworkServiceEndpoint::default()
        };
        let deadline = Instant::now() + self.config.request_timeout;
        let found = registry.endpoints().find(query, deadline).await?;
        let endpoints = found.collect(MAX_FOUND).await?;
        for id in self.held.services.of(service) {
            let Some(current) = self.held.connections.current(&id) else {
                continue;
            };
            let name = name_in(&service.registry, &current.route.endpoint);
            // One that is not registered now may be away: its connections end by themselves.
            let endpoint = endpoints.iter().find(|found| found.name == name);
            if endpoint.is_some_and(|it| !is_match(registered, &current.view.labels, it)) {
                let calls = Arc::clone(self);
                tokio::spawn(async move { calls.close_unmatched(&id, &current).await });
            }
        }
        Ok(())
    }

    /// Closes the connection of our segment `id` unless a Request has changed it meanwhile.
    async fn close_unmatched(&self, id: &str, unmatched: &Arc<Established>) {
        let deadline = Instant::now() + self.config.request_timeout;
        let turn = match self.held.connections.admit_known(id, deadline).await {
            Ok(Some(turn)) => turn,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(connection.id = %id, %error, "could not close; its next refresh is not bound by the new matches");
                return;
            }
        };
        let is_same = |current: Arc<Established>| {
            current.route.is_to_same(&unmatched.route)
                && current.view.labels == unmatched.view.labels
        };
        if turn.current().is_some_and(is_same) {
            tracing::info!(
                connection.id = %id, service = %unmatched.view.network_service,
                endpoint = %unmatched.view.network_service_endpoint_name,
                "the matches of the network service have changed and do not give the client this endpoint any more: closing"
            );
            self.tear_down(&turn, deadline, Cause::Own).await;
        }
    }
}

/// An endpoint's name as a registry has it.
fn name_in(registry: &RegistryAt, endpoint: &str) -> String {
    match registry {
        RegistryAt::Url(_) => endpoint.to_owned(),
        RegistryAt::Own | RegistryAt::Domain(_) => endpoint
            .parse::<InterdomainName>()
            .map_or_else(|_| endpoint.to_owned(), |name| name.target().to_owned()),
    }
}
