//! Looking services and endpoints up: in our own domain's registry, or in another domain's.

use std::sync::Arc;

use nsm_discovery::dns::Resolved;
use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceQuery,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_registry_client::NetworkServiceRegistryClient,
};
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::{Code, Streaming, transport::Channel};

use crate::{
    error::RequestError,
    peer::peers::{Peers, call, refused},
    registry::Registry,
};

/// Entries read from one Find. A registry that sends more than this is not searched to its end:
/// nobody chooses among a thousand endpoints, and a hostile one must not fill our memory.
const MAX_FOUND: usize = 1024;

/// What is looked for, without its domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) service: &'a str,
    /// Empty when any endpoint of the service will do.
    pub(crate) endpoint: &'a str,
}

/// What a registry knows about it.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) service: Option<NetworkService>,
    pub(crate) endpoints: Vec<NetworkServiceEndpoint>,
}

/// The registry of our own domain.
#[derive(Clone)]
pub enum Directory {
    /// The registry role of this agent.
    Here(Registry),
    /// A registry of this domain somewhere else, by URL.
    At(String),
}

impl Wanted<'_> {
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

impl Directory {
    /// Looks `wanted` up in our own domain.
    pub(crate) async fn find(
        &self,
        peers: &Peers,
        wanted: Wanted<'_>,
        deadline: Instant,
    ) -> Result<Found, RequestError> {
        match self {
            Self::Here(registry) => Ok(Found {
                service: registry
                    .find_services(&wanted.service_query())
                    .into_iter()
                    .find(|service| service.name == wanted.service)
                    .map(Arc::unwrap_or_clone),
                endpoints: registry
                    .find_endpoints(&wanted.endpoint_query())
                    .into_iter()
                    .filter(|endpoint| {
                        wanted.endpoint.is_empty() || endpoint.name == wanted.endpoint
                    })
                    .map(Arc::unwrap_or_clone)
                    .collect(),
            }),
            Self::At(url) => Box::pin(find_at(peers, url, wanted, deadline)).await,
        }
    }
}

/// Looks `wanted` up in the registry of another domain; of several addresses the first that can be reached is asked.
pub(crate) async fn find_in(
    peers: &Peers,
    resolved: &Resolved,
    wanted: Wanted<'_>,
    deadline: Instant,
) -> Result<Found, RequestError> {
    let mut last = None;
    for address in &resolved.registry {
        let url = format!("tcp://{address}");
        match Box::pin(find_at(peers, &url, wanted, deadline)).await {
            Ok(found) => return Ok(found),
            // A registry that was dialled before fails in the call, not in the dial.
            Err(error) if error.code() == Code::Unavailable => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or(RequestError::Missing("registry address")))
}

pub(crate) async fn find_at(
    peers: &Peers,
    url: &str,
    wanted: Wanted<'_>,
    deadline: Instant,
) -> Result<Found, RequestError> {
    let channel = peers.channel(url, deadline).await?;
    let services = async {
        let mut client = NetworkServiceRegistryClient::new(channel.clone());
        let query = NetworkServiceQuery {
            network_service: Some(wanted.service_query()),
            watch: false,
        };
        let request = peers.outgoing(query, Some(deadline));
        let stream = call(url, FIND_SERVICE, deadline, client.find(request)).await?;
        collect(url, FIND_SERVICE, deadline, stream.into_inner()).await
    };
    let endpoints = async {
        let mut client = endpoint_client(channel.clone());
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(wanted.endpoint_query()),
            watch: false,
        };
        let request = peers.outgoing(query, Some(deadline));
        let stream = call(url, FIND_ENDPOINT, deadline, client.find(request)).await?;
        collect(url, FIND_ENDPOINT, deadline, stream.into_inner()).await
    };
    let (services, endpoints) = tokio::try_join!(services, endpoints)?;
    Ok(Found {
        service: services
            .into_iter()
            .filter_map(|answer| answer.network_service)
            .find(|service| service.name == wanted.service),
        endpoints: endpoints
            .into_iter()
            .filter_map(|answer| answer.network_service_endpoint)
            .filter(|endpoint| wanted.endpoint.is_empty() || endpoint.name == wanted.endpoint)
            .collect(),
    })
}

const FIND_SERVICE: &str = "Find of the network service";
const FIND_ENDPOINT: &str = "Find of its endpoints";

fn endpoint_client(channel: Channel) -> NetworkServiceEndpointRegistryClient<Channel> {
    NetworkServiceEndpointRegistryClient::new(channel)
}

async fn collect<T>(
    url: &str,
    method: &'static str,
    deadline: Instant,
    mut stream: Streaming<T>,
) -> Result<Vec<T>, RequestError> {
    let began = Instant::now();
    let mut found = Vec::new();
    while found.len() < MAX_FOUND {
        match tokio::time::timeout_at(deadline, stream.next()).await {
            Ok(Some(Ok(answer))) => found.push(answer),
            Ok(Some(Err(status))) => return Err(refused(url, method, &status)),
            Ok(None) => break,
            Err(_) => {
                return Err(RequestError::Silent {
                    url: url.to_owned(),
                    method,
                    after: began.elapsed(),
                });
            }
        }
    }
    Ok(found)
}
