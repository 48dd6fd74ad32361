//! The services of NSM v1, on a Unix socket for this node, and on TCP for everyone else.
//!
//! All listeners serve the same services; what differs is the [`Arrival`], and with it what a caller may
//! ask. A stream or message beyond its limit is refused by HTTP/2 itself.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::StreamExt as _;
use nsm_core::identity::{
    Caller, Process,
    access::Ask,
    claims::ReadToken,
    policy::{Action, decide},
    relay::Source,
    share::Holder,
};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, MonitorScopeSelector, Path,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
    registry::{
        NetworkService as Service, NetworkServiceEndpoint as Endpoint, NetworkServiceEndpointQuery,
        NetworkServiceQuery,
        network_service_endpoint_registry_server::{
            NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer,
        },
        network_service_registry_server::{NetworkServiceRegistry, NetworkServiceRegistryServer},
    },
};
use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::{
    Request, Response, Status,
    metadata::{AsciiMetadataValue, MetadataMap},
    service::Routes,
};

use super::listener::ListenerLimits;
use crate::{
    call::{Answer, Call, Calls, registrar::Registrar},
    connection::monitor::{Monitors, Reader},
    error::RequestError,
    identity::{
        gate::{Gate, Shown},
        session::Session,
        token::{self, TokenError, TokenSource},
    },
    metrics::CallMetrics,
    peer::stream::SKIP_ANSWERED,
    registry::{path_header::PathHeader, wire::Answers},
    route::router::Arrival,
    transport::unix::NodePeer,
};

/// Metadata of a Request's answer for people: what happened behind the agent. Real NSM clients
/// ignore keys they do not know.
pub mod facts {
    /// The domain of the name asked for.
    pub const DOMAIN: &str = "nsm-domain";
    /// The DNS question that resolved it.
    pub const DNS_QUESTION: &str = "nsm-dns-question";
    /// The answer to it.
    pub const DNS_ANSWER: &str = "nsm-dns-answer";
    /// The type of the mechanism towards the endpoint.
    pub const REMOTE_MECHANISM: &str = "nsm-remote-mechanism";
    /// The VNI of the tunnel.
    pub const VNI: &str = "nsm-vni";
}

/// What calls are handed on to.
pub(crate) struct Services {
    pub(crate) calls: Arc<Calls>,
    pub(crate) registrar: Registrar,
    pub(crate) monitors: Monitors,
    pub(crate) metrics: CallMetrics,
    pub(crate) tokens: Arc<TokenSource>,
    /// How long a call may take.
    pub(crate) request_timeout: Duration,
}

/// The services as one listener serves them.
#[derive(Clone)]
pub struct Front {
    services: Arc<Services>,
    arrival: Arrival,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Front").field(&self.arrival).finish()
    }
}

impl Front {
    pub(crate) fn new(services: Arc<Services>, arrival: Arrival) -> Self {
        Self { services, arrival }
    }

    /// The NSM v1 services of this front, beside what is in `routes`.
    #[must_use]
    pub fn add_to(self, routes: Routes, limits: &ListenerLimits) -> Routes {
        let size = limits.max_message_bytes;
        let routes = routes
            .add_service(NetworkServiceServer::new(self.clone()).max_decoding_message_size(size))
            .add_service(
                MonitorConnectionServer::new(self.clone()).max_decoding_message_size(size),
            );
        if self.arrival == Arrival::Forwarder {
            // A forwarder is asked for connections only.
            return routes;
        }
        routes
            .add_service(
                NetworkServiceRegistryServer::new(self.clone()).max_decoding_message_size(size),
            )
            .add_service(
                NetworkServiceEndpointRegistryServer::new(self).max_decoding_message_size(size),
            )
    }
}

/// The caller of a request that came in by one of this node's sockets.
#[must_use]
pub fn node_caller<T>(request: &Request<T>) -> Caller {
    Caller::on_node(peer_process(request))
}

/// What both ends of the request's transport connection have shown; none in plain text.
fn shown<T>(request: &Request<T>) -> Option<Arc<Shown>> {
    let extensions = request.extensions();
    let session = extensions.get::<Arc<Session>>();
    let shown = session.map(|session| Arc::clone(session.shown()));
    // Tests call without a listener, and give the ids as a listener would have verified them.
    shown.or_else(|| extensions.get::<Arc<Shown>>().cloned())
}

fn peer_process<T>(request: &Request<T>) -> Process {
    let peer = request.extensions().get::<NodePeer>();
    peer.map_or_else(Process::unknown, |peer| peer.process.look())
}

impl Front {
    fn caller<T>(&self, request: &Request<T>) -> Caller {
        let caller = match self.arrival {
            Arrival::Local => node_caller(request),
            Arrival::Forwarder => Caller::nsmgr(peer_process(request)),
            Arrival::Network => Caller::from_address(request.remote_addr().map(|at| at.ip())),
        };
        caller.with_id(shown(request).map(|shown| shown.peer.clone()))
    }

    fn gate(&self) -> &Gate {
        &self.services.calls.lookup.gate
    }

    /// Whose connections a caller follows.
    fn follower<T>(&self, request: &Request<T>) -> Result<Caller, RequestError> {
        let caller = self.caller(request);
        let Some(shown) = shown(request) else {
            return Ok(caller);
        };
        if self.arrival != Arrival::Network {
            self.gate().admit_on_node(&shown, None)?;
            return Ok(caller);
        }
        self.gate().admit(&shown, Ask::Follow)?;
        // A monitor call has no path: it gets the events of all that its station has made, whichever the first segment is.
        Ok(caller.with_workload(self.gate().workload(&shown, &shown.peer)))
    }

    /// When a follower of the network loses what it follows by, its station among it: its stream ends then.
    fn until_unfollowed<T>(
        &self,
        request: &Request<T>,
        caller: &Caller,
    ) -> Option<impl Future<Output = ()> + Send + 'static> {
        let workload = caller.workload?;
        let shown = shown(request)?;
        let gate = Arc::clone(&self.services.calls.lookup.gate);
        Some(gate.until_not(move |gate| {
            gate.admit(&shown, Ask::Follow).is_ok()
                && gate.workload(&shown, &shown.peer) == workload
        }))
    }

    fn holder(&self, caller: &Caller) -> Holder {
        Holder::of(caller, &self.services.calls.lookup.relays)
    }

    /// The call of a request that the policy admits. What depends on the message is decided where the message is read.
    fn admit<T>(&self, request: Request<T>, action: Action<'_>) -> Result<Call<T>, RequestError> {
        let call = self.call(request)?;
        decide(&call.caller, action)?;
        Ok(call)
    }

    fn call<T>(&self, request: Request<T>) -> Result<Call<T>, RequestError> {
        let caller = self.caller(&request);
        let peer = request.extensions().get::<NodePeer>();
        let descriptors = peer.map(|peer| Arc::clone(&peer.descriptors));
        let source = match self.arrival {
            Arrival::Local | Arrival::Forwarder => Source::Node,
            Arrival::Network => match shown(&request) {
                Some(shown) => Source::Proven {
                    is_own: self.gate().is_own(&shown),
                },
                None => Source::Network(request.remote_addr().map(|it| it.ip())),
            },
        };
        let token = token::read(request.metadata()).map(Some).or_else(|error| {
            if matches!(error, TokenError::Missing(_)) {
                Ok(None)
            } else {
                Err(error)
            }
        })?;
        let limit = self.services.request_timeout;
        let timeout = caller_timeout(request.metadata()).map_or(limit, |asked| asked.min(limit));
        Ok(Call {
            arrival: self.arrival,
            source,
            descriptors,
            holder: self.holder(&caller),
            caller,
            shown: shown(&request),
            session: request.extensions().get::<Arc<Session>>().cloned(),
            token,
            deadline: Instant::now() + timeout,
            message: request.into_inner(),
        })
    }

    async fn serve_request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let call = self.admit(request, Action::Request)?;
        let session = call.session.clone();
        let mut answer = self
            .services
            .calls
            .request(call)
            .await
            .inspect_err(|error| {
                tracing::info!(%error, "refused a Request");
            })?;
        if let (Some(session), Some(path)) = (session, answer.connection.path.as_mut()) {
            self.sign(&session, path);
        }
        Ok(with_facts(answer))
    }

    /// Puts a token into our segment of an answer that the caller can check: the next hop left the one there that it got from us, signed
    /// with the key of that connection, which after a renewal is another. The index is the caller's.
    fn sign(&self, session: &Session, path: &mut Path) {
        let own = path.index as usize + 1;
        let next = path.path_segments.get(own + 1);
        let next = next.and_then(|next| ReadToken::read(&next.token).ok());
        let next = next.map_or_else(|| session.peer().clone(), |next| next.claims.subject);
        if let Some(segment) = path.path_segments.get_mut(own) {
            let tokens = &self.services.tokens;
            let token = tokens.token_to(&next, session, SystemTime::now());
            segment.token = token.text;
        }
    }

    async fn serve_close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let call = self.admit(request, Action::Close)?;
        self.services.calls.close(call).await?;
        Ok(Response::new(()))
    }

    fn registry_call<T>(
        &self,
        request: Request<T>,
    ) -> Result<(Call<T>, Option<PathHeader>), RequestError> {
        let metadata = request.metadata().clone();
        let call = self.call(request)?;
        let session = call.session.as_deref();
        let own = self.services.tokens.token_for(session, SystemTime::now());
        let previous = call.token.as_ref().map(|token| token.text.as_str());
        let path = PathHeader::descend(&metadata, previous, &own.text)?;
        Ok((call, path))
    }
}

#[tonic::async_trait]
impl NetworkService for Front {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let running = self.services.metrics.request();
        running.done(self.serve_request(request).await)
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let running = self.services.metrics.close();
        running.done(self.serve_close(request).await)
    }
}

#[tonic::async_trait]
impl MonitorConnection for Front {
    type MonitorConnectionsStream = Followed;

    async fn monitor_connections(
        &self,
        request: Request<MonitorScopeSelector>,
    ) -> Result<Response<Followed>, Status> {
        let caller = self.follower(&request)?;
        let denied = self.until_unfollowed(&request, &caller);
        decide(&caller, Action::Monitor).map_err(RequestError::from)?;
        let reader = Reader {
            owner: caller.owner(),
            holder: self.holder(&caller),
            skips_answered: request.metadata().contains_key(SKIP_ANSWERED),
        };
        let events = self
            .services
            .monitors
            .subscribe(reader, request.into_inner());
        let events = events.map_err(RequestError::from)?;
        Ok(Response::new(match denied {
            Some(denied) => Box::pin(events.take_until(Box::pin(denied))),
            None => Box::pin(events),
        }))
    }
}

/// The events of a monitor.
type Followed = Pin<Box<dyn Stream<Item = Result<ConnectionEvent, Status>> + Send>>;

#[tonic::async_trait]
impl NetworkServiceRegistry for Front {
    type FindStream = Answers<Service>;

    async fn register(&self, request: Request<Service>) -> Result<Response<Service>, Status> {
        let (call, path) = self.registry_call(request)?;
        let registered = self
            .services
            .registrar
            .register_service(call, path.clone())
            .await?;
        Ok(with_path(registered, path))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let call = self.admit(request, Action::Find)?;
        Ok(Response::new(
            self.services.registrar.find_services(call).await?,
        ))
    }

    async fn unregister(&self, request: Request<Service>) -> Result<Response<()>, Status> {
        let (call, path) = self.registry_call(request)?;
        self.services
            .registrar
            .unregister_service(call, path.clone())
            .await?;
        Ok(with_path((), path))
    }
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Front {
    type FindStream = Answers<Endpoint>;

    async fn register(&self, request: Request<Endpoint>) -> Result<Response<Endpoint>, Status> {
        let (call, path) = self.registry_call(request)?;
        let registered = self
            .services
            .registrar
            .register_endpoint(call, path.clone())
            .await?;
        Ok(with_path(registered, path))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let call = self.admit(request, Action::Find)?;
        Ok(Response::new(
            self.services.registrar.find_endpoints(call).await?,
        ))
    }

    async fn unregister(&self, request: Request<Endpoint>) -> Result<Response<()>, Status> {
        let (call, path) = self.registry_call(request)?;
        self.services
            .registrar
            .unregister_endpoint(call, path.clone())
            .await?;
        Ok(with_path((), path))
    }
}

fn with_path<T>(message: T, path: Option<PathHeader>) -> Response<T> {
    let mut response = Response::new(message);
    if let Some(path) = path {
        path.echo(response.metadata_mut());
    }
    response
}

fn with_facts(answer: Answer) -> Response<Connection> {
    let mut response = Response::new(answer.connection);
    let metadata = response.metadata_mut();
    let mut put = |key: &'static str, value: &str| {
        if let Ok(value) = AsciiMetadataValue::try_from(value) {
            metadata.insert(key, value);
        }
    };
    if let Some(resolution) = answer.resolution {
        put(facts::DOMAIN, &resolution.domain);
        put(facts::DNS_QUESTION, &resolution.question);
        put(facts::DNS_ANSWER, &resolution.answer);
    }
    if let Some(mechanism) = answer.next_mechanism {
        put(facts::REMOTE_MECHANISM, &mechanism);
    }
    if let Some(vni) = answer.vni {
        put(facts::VNI, &vni.to_string());
    }
    response
}

/// The caller's `grpc-timeout`: digits and a unit (gRPC over HTTP/2, "Timeout").
fn caller_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_read_and_a_bad_one_is_none() {
        let read = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().expect("ASCII"));
            caller_timeout(&metadata)
        };
        assert_eq!(read("15S"), Some(Duration::from_secs(15)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "15", "-1S", "123456789S", "1x"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
