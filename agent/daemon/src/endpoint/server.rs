//! The endpoint's gRPC services over its book of connections.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use nsm_controlplane::{
    api::listener::{ListenerLimits, Socket, serve},
    identity::{
        session::Session,
        token::{self, TokenSource},
    },
    transport::tls::Tls,
};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, MonitorScopeSelector,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use tokio::{net::UnixListener, sync::Notify};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, service::Routes};

use super::{
    book::Book,
    report::{Reason, Reporter},
};
use crate::view::{Facts, View};

/// The endpoint as its agent sees it.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    book: Mutex<Book>,
    tokens: TokenSource,
    reporter: Reporter,
    /// An expiry may have moved.
    moved: Notify,
}

impl Endpoint {
    /// An endpoint without connections.
    pub(crate) fn new(book: Book, tokens: TokenSource, reporter: Reporter) -> Self {
        Self {
            shared: Arc::new(Shared {
                book: Mutex::new(book),
                tokens,
                reporter,
                moved: Notify::new(),
            }),
        }
    }

    /// Serves on `listener`, by TLS where there is any, until `stopped` is done; open calls are answered first.
    ///
    /// # Errors
    ///
    /// The listener breaks.
    pub(crate) async fn serve(
        &self,
        listener: UnixListener,
        tls: Option<Arc<Tls>>,
        stopped: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let routes = Routes::new(NetworkServiceServer::new(self.clone()))
            .add_service(MonitorConnectionServer::new(self.clone()));
        let limits = ListenerLimits::of_one_agent(tls);
        serve(Socket::Unix(listener), routes, &limits, stopped).await
    }

    /// Closes each connection whose caller does not refresh it. Never ends.
    pub(crate) async fn expire(&self) {
        loop {
            let next = self.book().next_expiry();
            let wait = match next {
                None => Duration::MAX,
                Some(at) => at.duration_since(SystemTime::now()).unwrap_or_default(),
            };
            tokio::select! {
                () = self.shared.moved.notified() => continue,
                () = tokio::time::sleep(wait) => {}
            }
            for connection in self.book().close_expired(SystemTime::now()) {
                self.shared.reporter.closed(&connection, Reason::Expired);
            }
        }
    }

    /// Closes all connections, ends their monitors, and grants nothing any more.
    pub(crate) fn end(&self) {
        self.book().end();
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.shared
            .book
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl NetworkService for Endpoint {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let now = SystemTime::now();
        let theirs = token::read(request.metadata())
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        let session = request.extensions().get::<Arc<Session>>().map(Arc::as_ref);
        let ours = self.shared.tokens.token_for(session, now);
        let granted = self.book().grant(request.into_inner(), theirs, ours, now)?;
        self.shared.moved.notify_one();
        if granted.is_new {
            let view = View::of(&granted.answer, &Facts::default());
            self.shared.reporter.connected(&view);
        }
        Ok(Response::new(granted.answer))
    }

    /// Needs no token: what is closed is known by an id that only its path knows, and a caller whose
    /// token is over must be able to close.
    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let connection = request.into_inner();
        let closed = self.book().close(&connection.id);
        if let Some(closed) = closed {
            self.shared.reporter.closed(&closed, Reason::Asked);
        }
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl MonitorConnection for Endpoint {
    type MonitorConnectionsStream =
        Pin<Box<dyn Stream<Item = Result<ConnectionEvent, Status>> + Send>>;

    async fn monitor_connections(
        &self,
        request: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        let events = self.book().watch(request.into_inner());
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}
