//! The registry of a domain that has no agent: NSM v1's two registry services over one in memory.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use nsm_controlplane::{
    error::RegistryError,
    registry::{
        entry::Event,
        memory::{Memory, Store, Stored},
    },
};
use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceQuery, NetworkServiceResponse,
    network_service_endpoint_registry_server::NetworkServiceEndpointRegistry,
    network_service_registry_server::NetworkServiceRegistry,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

/// The services of a registry.
#[derive(Clone)]
pub(crate) struct Served(pub(crate) Memory);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What matches now and, with `watch`, every change.
fn found<E: Stored + Default, T: Send + 'static>(
    store: &Store<E>,
    query: Option<E>,
    watch: bool,
    answer: fn(Event<E>) -> T,
) -> Result<Response<Answers<T>>, Status> {
    let query = query.unwrap_or_default();
    if watch {
        let events = store.watch(query).map_err(status)?;
        let answers = events.map(move |event| event.map(answer).map_err(status));
        return Ok(Response::new(Box::pin(answers)));
    }
    let entries = store.find(&query).into_iter();
    let answers: Vec<_> = entries
        .map(|entry| Event {
            entry,
            deleted: false,
        })
        .map(|event| Ok(answer(event)))
        .collect();
    Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
}

fn status(error: RegistryError) -> Status {
    Status::new(error.code(), error.to_string())
}

#[tonic::async_trait]
impl NetworkServiceRegistry for Served {
    type FindStream = Answers<NetworkServiceResponse>;

    async fn register(
        &self,
        request: Request<NetworkService>,
    ) -> Result<Response<NetworkService>, Status> {
        let services = &self.0.services;
        let registered = services.register(request.into_inner(), SystemTime::now(), &[]);
        Ok(Response::new(registered.map_err(status)?))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let query = request.into_inner();
        found(
            &self.0.services,
            query.network_service,
            query.watch,
            |event| NetworkServiceResponse {
                network_service: Some(Arc::unwrap_or_clone(event.entry)),
                deleted: event.deleted,
            },
        )
    }

    async fn unregister(&self, request: Request<NetworkService>) -> Result<Response<()>, Status> {
        self.0.services.unregister(&request.get_ref().name);
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Served {
    type FindStream = Answers<NetworkServiceEndpointResponse>;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        let endpoints = &self.0.endpoints;
        let registered = endpoints.register(request.into_inner(), SystemTime::now(), &[]);
        Ok(Response::new(registered.map_err(status)?))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let query = request.into_inner();
        let wanted = query.network_service_endpoint;
        found(&self.0.endpoints, wanted, query.watch, |event| {
            NetworkServiceEndpointResponse {
                network_service_endpoint: Some(Arc::unwrap_or_clone(event.entry)),
                deleted: event.deleted,
            }
        })
    }

    async fn unregister(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<()>, Status> {
        self.0.endpoints.unregister(&request.get_ref().name);
        Ok(Response::new(()))
    }
}
