//! What is looked up in a registry before a route is chosen: a service, and the endpoints that serve it.

use std::sync::Arc;

use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::time::Instant;

use crate::{error::RequestError, registry::DomainRegistry};

/// Entries read from one Find of another registry. One that sends more than this is not searched to its end:
/// a choice among a thousand endpoints needs no more, and a hostile registry must not fill our memory.
const MAX_FOUND: usize = 1024;

/// What is wanted, without its domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) service: &'a str,
    /// Empty when any endpoint of the service will do.
    pub(crate) endpoint: &'a str,
}

/// What a registry has of it.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) service: Option<Arc<NetworkService>>,
    pub(crate) endpoints: Vec<Arc<NetworkServiceEndpoint>>,
}

impl Wanted<'_> {
    /// Looks it up in `registry`.
    pub(crate) async fn find_in(
        &self,
        registry: &dyn DomainRegistry,
        deadline: Instant,
    ) -> Result<Found, RequestError> {
        let services = async {
            let query = self.service_query();
            let found = registry.services().find(query, deadline).await?;
            found.collect(MAX_FOUND).await
        };
        let endpoints = async {
            let query = self.endpoint_query();
            let found = registry.endpoints().find(query, deadline).await?;
            found.collect(MAX_FOUND).await
        };
        let (services, mut endpoints) = tokio::try_join!(services, endpoints)?;
        // A registry may understand names more loosely than they are meant.
        endpoints.retain(|found| self.endpoint.is_empty() || found.name == self.endpoint);
        let is_wanted = |found: &Arc<NetworkService>| found.name == self.service;
        Ok(Found {
            service: services.into_iter().find(is_wanted),
            endpoints,
        })
    }

    fn service_query(&self) -> NetworkService {
        NetworkService {
            name: self.service.to_owned(),
            ..NetworkService::default()
        }
    }

    fn endpoint_query(&self) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: self.endpoint.to_owned(),
            network_service_names: Some(self.service.to_owned())
                .filter(|service| !service.is_empty())
                .into_iter()
                .collect(),
            ..NetworkServiceEndpoint::default()
        }
    }
}
