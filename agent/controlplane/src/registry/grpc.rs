//! The registry as the two NSM v1 services, and the pieces of them that a listener which decides
//! between registries puts together itself.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceQuery, NetworkServiceResponse,
    network_service_endpoint_registry_server::NetworkServiceEndpointRegistry,
    network_service_registry_server::NetworkServiceRegistry,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{Event, Registry};

/// What Find answers for network services.
pub type ServiceStream = Pin<Box<dyn Stream<Item = Result<NetworkServiceResponse, Status>> + Send>>;

/// What Find answers for endpoints.
pub type EndpointStream =
    Pin<Box<dyn Stream<Item = Result<NetworkServiceEndpointResponse, Status>> + Send>>;

impl From<Event<NetworkService>> for NetworkServiceResponse {
    fn from(event: Event<NetworkService>) -> Self {
        Self {
            network_service: Some(Arc::unwrap_or_clone(event.entry)),
            deleted: event.deleted,
        }
    }
}

impl From<Event<NetworkServiceEndpoint>> for NetworkServiceEndpointResponse {
    fn from(event: Event<NetworkServiceEndpoint>) -> Self {
        Self {
            network_service_endpoint: Some(Arc::unwrap_or_clone(event.entry)),
            deleted: event.deleted,
        }
    }
}

impl Registry {
    /// Find for network services as the wire has it: with `watch` a stream without an end, else
    /// one that ends after what matches now. Nothing that matches is an empty stream.
    ///
    /// # Errors
    ///
    /// As [`Registry::watch_services`].
    pub fn service_stream(&self, query: NetworkServiceQuery) -> Result<ServiceStream, Status> {
        let wanted = query.network_service.unwrap_or_default();
        if query.watch {
            return Ok(Box::pin(self.watch_services(wanted)?.map(answer)));
        }
        Ok(Box::pin(once_each(self.find_services(&wanted))))
    }

    /// Find for endpoints as the wire has it: with `watch` a stream without an end, else one that
    /// ends after what matches now. Nothing that matches is an empty stream.
    ///
    /// # Errors
    ///
    /// As [`Registry::watch_endpoints`].
    pub fn endpoint_stream(
        &self,
        query: NetworkServiceEndpointQuery,
    ) -> Result<EndpointStream, Status> {
        let wanted = query.network_service_endpoint.unwrap_or_default();
        if query.watch {
            return Ok(Box::pin(self.watch_endpoints(wanted)?.map(answer)));
        }
        Ok(Box::pin(once_each(self.find_endpoints(&wanted))))
    }
}

#[tonic::async_trait]
impl NetworkServiceRegistry for Registry {
    type FindStream = ServiceStream;

    async fn register(
        &self,
        request: Request<NetworkService>,
    ) -> Result<Response<NetworkService>, Status> {
        Ok(Response::new(self.register_service(request.into_inner())?))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceQuery>,
    ) -> Result<Response<ServiceStream>, Status> {
        Ok(Response::new(self.service_stream(request.into_inner())?))
    }

    async fn unregister(&self, request: Request<NetworkService>) -> Result<Response<()>, Status> {
        self.unregister_service(&request.get_ref().name);
        Ok(Response::new(()))
    }
}

/// Without token bounds: those are known to the listener that reads the tokens.
#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Registry {
    type FindStream = EndpointStream;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        let registered = self.register_endpoint(request.into_inner(), SystemTime::now(), &[])?;
        Ok(Response::new(registered))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<EndpointStream>, Status> {
        Ok(Response::new(self.endpoint_stream(request.into_inner())?))
    }

    async fn unregister(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<()>, Status> {
        self.unregister_endpoint(&request.get_ref().name);
        Ok(Response::new(()))
    }
}

fn answer<T, R: From<Event<T>>>(
    event: Result<Event<T>, super::RegistryError>,
) -> Result<R, Status> {
    Ok(event?.into())
}

fn once_each<T, R: From<Event<T>>>(entries: Vec<Arc<T>>) -> impl Stream<Item = Result<R, Status>> {
    tokio_stream::iter(entries).map(|entry| {
        Ok(Event {
            entry,
            deleted: false,
        }
        .into())
    })
}
