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
    /// Looks it up in `registry`. A client that names an endpoint alone gets its first service.
    pub(crate) async fn find_in(
        &self,
        registry: &dyn DomainRegistry,
        deadline: Instant,
    ) -> Result<Found, RequestError> {
        let service = service_of(registry, self.service, deadline);
        let endpoints = async {
            let query = self.endpoint_query();
            let found = registry.endpoints().find(query, deadline).await?;
            found.collect(MAX_FOUND).await
        };
        let (service, mut endpoints) = tokio::try_join!(service, endpoints)?;
        // A registry may understand names more loosely than they are meant.
        endpoints.retain(|found| self.endpoint.is_empty() || found.name == self.endpoint);
        let mut found = Found { service, endpoints };
        let of_endpoint = found.endpoints.first().cloned();
        if let (true, Some(endpoint)) = (self.service.is_empty(), of_endpoint) {
            let name = endpoint.network_service_names.first();
            found.service = service_of(registry, name.map_or("", String::as_str), deadline).await?;
        }
        Ok(found)
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

/// The service of exactly this name; none where the name is empty.
async fn service_of(
    registry: &dyn DomainRegistry,
    name: &str,
    deadline: Instant,
) -> Result<Option<Arc<NetworkService>>, RequestError> {
    if name.is_empty() {
        return Ok(None);
    }
    let query = NetworkService {
        name: name.to_owned(),
        ..NetworkService::default()
    };
    let found = registry.services().find(query, deadline).await?;
    let mut services = found.collect(MAX_FOUND).await?.into_iter();
    Ok(services.find(|found| found.name == name))
}
