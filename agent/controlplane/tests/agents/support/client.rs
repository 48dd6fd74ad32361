//! A client that speaks the wire API, and says what it likes.

use std::time::{Duration, SystemTime};

use nsm_controlplane::{identity::token::TokenSource, transport::dial::dial};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, Path,
        PathSegment, State, monitor_connection_client::MonitorConnectionClient,
    },
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    registry::{
        NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
        NetworkServiceEndpointResponse, NetworkServiceQuery,
        network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
        network_service_registry_client::NetworkServiceRegistryClient,
    },
};
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, transport::Channel};

use super::{agent::Agent, unique, within};

/// A client of one agent.
pub(crate) struct Client {
    name: String,
    netns: String,
    channel: Channel,
    /// How long the token of a call lives; none: calls carry no token.
    pub(crate) lifetime: Option<Duration>,
}

/// What a Request got.
#[derive(Debug, Clone)]
pub(crate) struct Granted {
    pub(crate) connection: Connection,
    pub(crate) facts: MetadataMap,
}

impl Granted {
    /// A fact of the answer's metadata.
    pub(crate) fn fact(&self, key: &str) -> &str {
        self.facts
            .get(key)
            .unwrap_or_else(|| panic!("no {key} in {:?}", self.facts))
            .to_str()
            .expect("text")
    }

    /// The id of the agent's segment.
    pub(crate) fn agent_id(&self) -> String {
        self.connection.path.as_ref().expect("a path").path_segments[1]
            .id
            .clone()
    }
}

impl Client {
    /// On the agent's node, by its Unix socket.
    pub(crate) async fn on_node(agent: &Agent) -> Self {
        Self::at(&agent.node_url).await
    }

    /// Somewhere else, by the agent's TCP port.
    pub(crate) async fn over_network(agent: &Agent) -> Self {
        Self::at(&agent.url).await
    }

    pub(crate) async fn at(url: &str) -> Self {
        let number = unique();
        Self {
            name: format!("client-{number}"),
            netns: format!("inode://4/{}", 1_000_000 + number),
            channel: dial(&url.parse().expect("a URL"), Duration::from_secs(5))
                .await
                .expect("reachable"),
            lifetime: Some(Duration::from_secs(600)),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The URL of the client's network namespace.
    pub(crate) fn netns(&self) -> &str {
        &self.netns
    }

    /// A first Request as a good client makes it, with an id of its own.
    pub(crate) fn request_for(&self, service: &str) -> NetworkServiceRequest {
        let id = format!("{}-{}", self.name, unique());
        NetworkServiceRequest {
            mechanism_preferences: vec![self.kernel(&format!("nsm{}", unique()))],
            connection: Some(Connection {
                path: Some(Path {
                    index: 0,
                    path_segments: vec![PathSegment {
                        name: self.name.clone(),
                        id: id.clone(),
                        ..PathSegment::default()
                    }],
                }),
                id,
                network_service: service.to_owned(),
                ..Connection::default()
            }),
        }
    }

    /// A KERNEL mechanism in the client's namespace.
    pub(crate) fn kernel(&self, interface: &str) -> Mechanism {
        mechanism(
            "LOCAL",
            "KERNEL",
            &[("inodeURL", &self.netns), ("name", interface)],
        )
    }

    /// Puts the call's metadata on.
    pub(crate) fn call<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(lifetime) = self.lifetime {
            TokenSource::hs256("spiffe://tests/client", b"secret", lifetime)
                .apply(request.metadata_mut());
        }
        request
    }

    /// Sends a Request as it is.
    pub(crate) async fn send(&self, request: NetworkServiceRequest) -> Result<Granted, Status> {
        self.send_call(self.call(request)).await
    }

    /// Sends a call as it is.
    pub(crate) async fn send_call(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Granted, Status> {
        let mut client = NetworkServiceClient::new(self.channel.clone());
        let (facts, connection, _) = within(client.request(request)).await?.into_parts();
        Ok(Granted { connection, facts })
    }

    /// Asks for a service; it must be granted.
    pub(crate) async fn ask(&self, service: &str) -> Granted {
        self.send(self.request_for(service))
            .await
            .unwrap_or_else(|status| panic!("{service}: {status:?}"))
    }

    /// Asks for a service; it must be refused.
    pub(crate) async fn refused(&self, request: NetworkServiceRequest) -> Status {
        self.send(request).await.expect_err("it is refused")
    }

    /// Asks again with what was answered.
    pub(crate) async fn refresh(&self, granted: &Granted) -> Result<Granted, Status> {
        self.send(NetworkServiceRequest {
            connection: Some(granted.connection.clone()),
            mechanism_preferences: Vec::new(),
        })
        .await
    }

    pub(crate) async fn close(&self, connection: &Connection) -> Result<(), Status> {
        let mut client = NetworkServiceClient::new(self.channel.clone());
        within(client.close(self.call(connection.clone()))).await?;
        Ok(())
    }

    /// Closes, and waits no longer than this for an answer.
    pub(crate) async fn close_within(
        &self,
        connection: &Connection,
        patience: Duration,
    ) -> Result<(), Status> {
        let mut client = NetworkServiceClient::new(self.channel.clone());
        let mut call = self.call(connection.clone());
        // Not by `set_timeout`: this side would give up first, and the answer would be its own.
        let timeout = format!("{}m", patience.as_millis());
        let timeout = timeout.parse().expect("ASCII");
        call.metadata_mut().insert("grpc-timeout", timeout);
        within(client.close(call)).await?;
        Ok(())
    }

    /// What asks for another endpoint in place of the granted one, as NSM's healing does.
    pub(crate) fn reselect(&self, granted: &Granted) -> NetworkServiceRequest {
        let mut connection = granted.connection.clone();
        connection.set_state(State::ReselectRequested);
        connection.network_service_endpoint_name.clear();
        connection.mechanism = None;
        connection.context = None;
        NetworkServiceRequest {
            connection: Some(connection),
            mechanism_preferences: vec![self.kernel("nsm-1")],
        }
    }

    /// The events of the client's connections from now on: what stands has come already.
    pub(crate) async fn watch(&self) -> Watch {
        let mut watch = self.monitor().await;
        watch.one(ConnectionEventType::InitialStateTransfer).await;
        watch
    }

    /// Follows the connections that pass this client, under whatever id.
    pub(crate) async fn monitor(&self) -> Watch {
        self.monitor_selected(MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: self.name.clone(),
                ..PathSegment::default()
            }],
            network_services: Vec::new(),
        })
        .await
    }

    /// Follows what the selector selects.
    pub(crate) async fn monitor_selected(&self, selector: MonitorScopeSelector) -> Watch {
        let mut client = MonitorConnectionClient::new(self.channel.clone());
        let events = within(client.monitor_connections(self.call(selector)))
            .await
            .expect("monitored")
            .into_inner();
        Watch { events }
    }

    /// Registers an endpoint and the services that it offers, as real ones do.
    pub(crate) async fn offer(
        &self,
        endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Status> {
        for name in endpoint.network_service_names.clone() {
            let service = NetworkService {
                name,
                ..NetworkService::default()
            };
            self.register_service(service).await?;
        }
        self.register(endpoint).await
    }

    pub(crate) async fn register(
        &self,
        endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Status> {
        self.register_call(self.call(endpoint)).await
    }

    /// Sends a registration as it is.
    pub(crate) async fn register_call(
        &self,
        call: Request<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Status> {
        let mut client = NetworkServiceEndpointRegistryClient::new(self.channel.clone());
        Ok(within(client.register(call)).await?.into_inner())
    }

    pub(crate) async fn unregister(&self, endpoint: NetworkServiceEndpoint) -> Result<(), Status> {
        let mut client = NetworkServiceEndpointRegistryClient::new(self.channel.clone());
        within(client.unregister(self.call(endpoint))).await?;
        Ok(())
    }

    pub(crate) async fn register_service(
        &self,
        service: NetworkService,
    ) -> Result<Response<NetworkService>, Status> {
        let mut client = NetworkServiceRegistryClient::new(self.channel.clone());
        within(client.register(self.call(service))).await
    }

    /// Finds the endpoints of a service.
    pub(crate) async fn find(&self, service: &str) -> Result<Vec<NetworkServiceEndpoint>, Status> {
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(NetworkServiceEndpoint {
                network_service_names: vec![service.to_owned()],
                ..NetworkServiceEndpoint::default()
            }),
            watch: false,
        };
        let mut client = NetworkServiceEndpointRegistryClient::new(self.channel.clone());
        let found = within(client.find(self.call(query))).await?.into_inner();
        let found: Vec<_> = within(found.collect::<Vec<_>>()).await;
        found
            .into_iter()
            .map(|answer| Ok(answer?.network_service_endpoint.expect("an endpoint")))
            .collect()
    }

    /// Watches the endpoints of a service.
    pub(crate) async fn watch_endpoints(
        &self,
        service: &str,
    ) -> Watch<NetworkServiceEndpointResponse> {
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(NetworkServiceEndpoint {
                network_service_names: vec![service.to_owned()],
                ..NetworkServiceEndpoint::default()
            }),
            watch: true,
        };
        let mut client = NetworkServiceEndpointRegistryClient::new(self.channel.clone());
        let events = within(client.find(self.call(query)))
            .await
            .expect("watched")
            .into_inner();
        Watch { events }
    }

    /// Finds a network service.
    pub(crate) async fn find_service(&self, name: &str) -> Result<Vec<NetworkService>, Status> {
        let query = NetworkServiceQuery {
            network_service: Some(NetworkService {
                name: name.to_owned(),
                ..NetworkService::default()
            }),
            watch: false,
        };
        let mut client = NetworkServiceRegistryClient::new(self.channel.clone());
        let found = within(client.find(self.call(query))).await?.into_inner();
        let found: Vec<_> = within(found.collect::<Vec<_>>()).await;
        found
            .into_iter()
            .map(|answer| Ok(answer?.network_service.expect("a service")))
            .collect()
    }
}

/// A stream of events.
pub(crate) struct Watch<T = ConnectionEvent> {
    events: Streaming<T>,
}

impl<T> Watch<T> {
    /// The next event.
    pub(crate) async fn next(&mut self) -> T {
        within(self.events.next())
            .await
            .expect("the stream goes on")
            .expect("an event")
    }

    /// What comes until the stream ends.
    pub(crate) async fn rest(mut self) -> Vec<T> {
        let mut events = Vec::new();
        while let Some(event) = within(self.events.next()).await {
            events.push(event.expect("an event"));
        }
        events
    }
}

impl Watch {
    /// The next updates, of `count` connections in however many events.
    pub(crate) async fn updates(&mut self, count: usize) -> Vec<Connection> {
        let mut found = Vec::new();
        while found.len() < count {
            let event = self.next().await;
            assert_eq!(event.r#type(), ConnectionEventType::Update, "{event:?}");
            found.extend(event.connections.into_values());
        }
        found
    }

    /// The next event, which is of `kind` and tells of one connection.
    pub(crate) async fn one(&mut self, kind: ConnectionEventType) -> Connection {
        let event = self.next().await;
        assert_eq!(event.r#type(), kind, "{event:?}");
        assert_eq!(event.connections.len(), 1, "{event:?}");
        event.connections.into_values().next().expect("one")
    }
}

/// A mechanism as it stands on the wire.
pub(crate) fn mechanism(class: &str, kind: &str, parameters: &[(&str, &str)]) -> Mechanism {
    Mechanism {
        cls: class.to_owned(),
        r#type: kind.to_owned(),
        parameters: parameters
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    }
}

/// A parameter of the mechanism in a connection.
pub(crate) fn parameter<'a>(connection: &'a Connection, key: &str) -> &'a str {
    connection
        .mechanism
        .as_ref()
        .and_then(|mechanism| mechanism.parameters.get(key))
        .map_or("", String::as_str)
}

/// The names on a connection's path.
pub(crate) fn names(connection: &Connection) -> Vec<&str> {
    let path = connection.path.as_ref().expect("a path");
    path.path_segments
        .iter()
        .map(|segment| segment.name.as_str())
        .collect()
}

/// A time on the wire.
pub(crate) fn stamp(time: SystemTime) -> prost_types::Timestamp {
    time.into()
}
