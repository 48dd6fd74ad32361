//! A connection lasts as long as the matches of its network service allow it: each service is watched while connections use it, and
//! one that does not meet the matches any more is closed, so that its client asks again (NSM `netsvcmonitor`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

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
        lookup::{Matched, RegistryAt, Rules, ServiceAt},
        router::is_match,
    },
};

/// Times between tries to watch a service at a registry that is away.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Endpoints that are read from one answer of another registry, which must not fill our memory.
const MAX_FOUND: usize = 1024;

impl Calls {
    /// Watches the service of a connection that stands now, in the place of its former one. Matches that have changed since its endpoint
    /// was chosen are applied to it.
    pub(super) fn join_service(
        self: &Arc<Self>,
        id: &str,
        prior: Option<&Established>,
        now: &Arc<Established>,
    ) {
        let former = prior.and_then(|prior| prior.route.matched.as_ref());
        let matched = now.route.matched.as_ref();
        let service = matched.map(|matched| &matched.service);
        if let Some(former) = former
            && Some(&former.service) != service
        {
            self.held.services.leave(&former.service, id);
        }
        let Some(Matched { service, rules }) = matched else {
            return;
        };
        let start = |service| self.watch_service(service);
        let seen = self.held.services.join(service, id, start);
        if let Some(seen) = seen.filter(|seen| Rules::of(seen) != *rules) {
            let (calls, service, id) = (Arc::clone(self), Arc::clone(service), id.to_owned());
            tokio::spawn(async move {
                if let Err(error) = calls.apply_to(&service, &seen, [id]).await {
                    tracing::debug!(service = %service.name, %error, "the endpoints of a network service cannot be looked up");
                }
            });
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
            if event.entry.name == service.name && !event.deleted {
                let users = self.held.services.see(service, &event.entry);
                self.apply_to(service, &event.entry, users).await?;
            }
            backoff.reset();
        }
        Ok(())
    }

    /// Closes those of the connections `ids` whose endpoints were chosen by other matches and do not meet these.
    async fn apply_to(
        self: &Arc<Self>,
        service: &ServiceAt,
        registered: &Arc<NetworkService>,
        ids: impl IntoIterator<Item = String>,
    ) -> Result<(), RequestError> {
        let rules = Rules::of(registered);
        let is_of_others = |current: &Arc<Established>| {
            let matched = current.route.matched.as_ref();
            matched.is_some_and(|matched| *matched.service == *service && matched.rules != rules)
        };
        let mut by_endpoint: BTreeMap<String, Vec<(String, Arc<Established>)>> = BTreeMap::new();
        for id in ids {
            let current = self.held.connections.current(&id);
            if let Some(current) = current.filter(is_of_others) {
                let endpoint = name_in(&service.registry, &current.route.endpoint);
                by_endpoint.entry(endpoint).or_default().push((id, current));
            }
        }
        if by_endpoint.is_empty() {
            return Ok(());
        }
        let registry = self.lookup.open(&service.registry).await?;
        for (name, connections) in by_endpoint {
            // One that is not registered now may be away: its connections end by themselves.
            let Some(endpoint) = self.endpoint(&*registry, name).await? else {
                continue;
            };
            for (id, current) in connections {
                if !is_match(registered, &current.view.labels, &endpoint) {
                    let calls = Arc::clone(self);
                    tokio::spawn(async move { calls.close_unmatched(&id, &current).await });
                }
            }
        }
        Ok(())
    }

    /// The endpoint of exactly this name.
    async fn endpoint(
        &self,
        registry: &dyn DomainRegistry,
        name: String,
    ) -> Result<Option<Arc<NetworkServiceEndpoint>>, RequestError> {
        let deadline = Instant::now() + self.config.request_timeout;
        let query = NetworkServiceEndpoint {
            name: name.clone(),
            ..NetworkServiceEndpoint::default()
        };
        let found = registry.endpoints().find(query, deadline).await?;
        let mut endpoints = found.collect(MAX_FOUND).await?.into_iter();
        Ok(endpoints.find(|found| found.name == name))
    }

    /// Closes the connection of our segment `id` unless a Request has changed it meanwhile.
    async fn close_unmatched(&self, id: &str, unmatched: &Arc<Established>) {
        let is_same = |current: Arc<Established>| {
            current.route.is_to_same(&unmatched.route)
                && current.view.labels == unmatched.view.labels
        };
        loop {
            let deadline = Instant::now() + self.config.request_timeout;
            match self.held.connections.admit_known(id, deadline).await {
                Ok(Some(turn)) if turn.current().is_some_and(is_same) => {
                    tracing::info!(
                        connection.id = %id, service = %unmatched.view.network_service,
                        endpoint = %unmatched.view.network_service_endpoint_name,
                        "the matches of the network service have changed and do not give the client this endpoint any more: closing"
                    );
                    return self.tear_down(&turn, deadline, Cause::Own).await;
                }
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(connection.id = %id, %error, "could not close; trying again");
                }
            }
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
