//! The endpoint of the load: grants everything at once, and counts what it holds.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, MonitorScopeSelector, PathSegment,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, transport::Server};

/// A running endpoint.
pub(crate) struct Endpoint {
    pub(crate) url: String,
    held: Held,
}

type Held = Arc<Mutex<HashSet<String>>>;

impl Endpoint {
    /// Connections that were asked for and not closed.
    pub(crate) fn holds(&self) -> u64 {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u64
    }
}

#[derive(Clone)]
struct Service {
    held: Held,
}

/// Starts the endpoint on a free port of loopback.
pub(crate) async fn start() -> anyhow::Result<Endpoint> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("tcp://{}", listener.local_addr()?);
    let held = Held::default();
    let service = Service {
        held: Arc::clone(&held),
    };
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    });
    tokio::spawn(
        Server::builder()
            .add_service(NetworkServiceServer::new(service.clone()))
            .add_service(MonitorConnectionServer::new(service))
            .serve_with_incoming(incoming),
    );
    Ok(Endpoint { url, held })
}

#[tonic::async_trait]
impl NetworkService for Service {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let message = request.into_inner();
        let mut connection = message.connection.unwrap_or_default();
        let preferred = message.mechanism_preferences.into_iter().next();
        let path = connection.path.get_or_insert_default();
        let next = path.index as usize + 1;
        path.path_segments.truncate(next);
        path.path_segments.push(PathSegment {
            name: "load-endpoint".to_owned(),
            id: format!("{}-endpoint", connection.id),
            ..PathSegment::default()
        });
        if let Some(mut mechanism) = preferred {
            mechanism
                .parameters
                .extend([("dst_ip", "127.0.0.1"), ("vni", "7")].map(|(k, v)| (k.into(), v.into())));
            connection.mechanism = Some(mechanism);
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(connection.id.clone());
        Ok(Response::new(connection))
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let id = request.into_inner().id;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&id);
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl MonitorConnection for Service {
    type MonitorConnectionsStream = tokio_stream::Pending<Result<ConnectionEvent, Status>>;

    async fn monitor_connections(
        &self,
        _: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }
}
