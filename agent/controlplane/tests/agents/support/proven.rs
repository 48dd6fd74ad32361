//! Callers with certificates: their calls come to an agent's services as the listener hands them on, with the ids that the transport has
//! verified and tokens that are signed with real keys.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nsm_controlplane::identity::gate::Shown;
use nsm_core::identity::{SpiffeId, es256::P256Key};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, MonitorScopeSelector, Path, PathSegment,
        monitor_connection_server::MonitorConnection as _,
    },
    networkservice::{NetworkServiceRequest, network_service_server::NetworkService as _},
    registry::{
        NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
        network_service_endpoint_registry_server::NetworkServiceEndpointRegistry as _,
    },
};
use rcgen::{KeyPair, SigningKey as _};
use serde_json::json;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Status};

use super::{Agent, mechanism, unique, within};

/// The id of every agent that is called so.
pub(crate) const AGENT: &str = "td-2/ns/nsm-system/pod/proxy-nsmgr-x";

/// An id, without its scheme.
pub(crate) fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().expect("an id")
}

/// A workload with a key of its own.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) id: SpiffeId,
    key: Arc<KeyPair>,
}

impl Pod {
    pub(crate) fn new(text: &str) -> Self {
        Self {
            id: id(text),
            key: Arc::new(KeyPair::generate().expect("a key")),
        }
    }

    /// Its token for another, for ten minutes.
    fn token(&self, audience: &SpiffeId) -> String {
        let expires = SystemTime::now() + Duration::from_secs(600);
        let expires = expires.duration_since(UNIX_EPOCH).expect("after 1970");
        let encoded = |part: &[u8]| base64_url(part);
        let header = json!({"alg": "ES256", "typ": "JWT"}).to_string();
        let claims = json!({"sub": self.id, "aud": [audience], "exp": expires.as_secs()});
        let signed = format!(
            "{}.{}",
            encoded(header.as_bytes()),
            encoded(claims.to_string().as_bytes())
        );
        let signature = self.key.sign(signed.as_bytes()).expect("it signs");
        let signature = p256::ecdsa::Signature::from_der(&signature).expect("of DER");
        format!("{signed}.{}", encoded(&signature.to_bytes()))
    }
}

fn base64_url(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    URL_SAFE_NO_PAD.encode(bytes)
}

/// What a watch gives.
type Found = Result<NetworkServiceEndpointResponse, Status>;

/// The hops that a call comes through; the last one sends it.
#[derive(Clone)]
pub(crate) struct Chain {
    pub(crate) pods: Vec<Pod>,
}

impl Chain {
    pub(crate) fn of(pods: &[&Pod]) -> Self {
        Self {
            pods: pods.iter().map(|pod| (*pod).clone()).collect(),
        }
    }

    fn sender(&self) -> &Pod {
        self.pods.last().expect("a chain has a hop")
    }

    /// The tokens of its hops, each for the next one, and the last for the agent.
    fn tokens(&self) -> Vec<String> {
        let mut audiences: Vec<SpiffeId> = self.pods.iter().map(|pod| pod.id.clone()).collect();
        audiences.push(id(AGENT));
        let next = audiences.iter().skip(1);
        self.pods
            .iter()
            .zip(next)
            .map(|(pod, next)| pod.token(next))
            .collect()
    }

    /// A call with the sender's token, over a connection on which it has shown its certificate.
    pub(crate) fn call<T>(&self, message: T) -> Request<T> {
        let sender = self.sender();
        let mut call = Request::new(message);
        let token = sender.token(&id(AGENT));
        let metadata = call.metadata_mut();
        metadata.insert("nsm-client-token", token.parse().expect("ASCII"));
        let expires = prost_types::Timestamp::from(SystemTime::now() + Duration::from_secs(600));
        let expires = expires.to_string().parse().expect("ASCII");
        metadata.insert("nsm-client-token-expires", expires);
        let path = json!({
            "Index": self.pods.len() - 1,
            "PathSegments": self.tokens().iter().map(|token| json!({"token": token})).collect::<Vec<_>>(),
        });
        metadata.insert("path", path.to_string().parse().expect("ASCII"));
        call.extensions_mut().insert(Arc::new(Shown {
            peer: sender.id.clone(),
            key: P256Key::from_point(sender.key.public_key_raw()).ok(),
            own: id(AGENT),
        }));
        call
    }

    /// A first Request for a service, for a tunnel to another node.
    pub(crate) fn request_for(&self, service: &str) -> NetworkServiceRequest {
        let number = unique();
        let segments: Vec<PathSegment> = self
            .pods
            .iter()
            .enumerate()
            .map(|(at, pod)| PathSegment {
                name: pod.id.segments().last().unwrap_or_default().to_owned(),
                id: format!("hop-{at}-{number}"),
                ..PathSegment::default()
            })
            .collect();
        let mut request = NetworkServiceRequest {
            mechanism_preferences: vec![mechanism("REMOTE", "VXLAN", &[("src_ip", "192.0.2.50")])],
            connection: Some(Connection {
                id: segments.last().expect("a hop").id.clone(),
                path: Some(Path {
                    index: segments.len() as u32 - 1,
                    path_segments: segments,
                }),
                network_service: service.to_owned(),
                ..Connection::default()
            }),
        };
        self.sign(request.connection.as_mut().expect("one"));
        request
    }

    /// Puts fresh tokens of its hops into a connection's path.
    pub(crate) fn sign(&self, connection: &mut Connection) {
        let path = connection.path.as_mut().expect("a path");
        for (segment, token) in path.path_segments.iter_mut().zip(self.tokens()) {
            segment.token = token;
        }
    }

    /// Sends a Request as it is.
    pub(crate) async fn send(
        &self,
        agent: &Agent,
        request: NetworkServiceRequest,
    ) -> Result<Connection, Status> {
        let front = agent.plane.network_front();
        Ok(within(front.request(self.call(request)))
            .await?
            .into_inner())
    }

    /// Asks for a service.
    pub(crate) async fn ask(&self, agent: &Agent, service: &str) -> Result<Connection, Status> {
        self.send(agent, self.request_for(service)).await
    }

    /// Asks again with what somebody was answered.
    pub(crate) async fn refresh(
        &self,
        agent: &Agent,
        connection: &Connection,
    ) -> Result<Connection, Status> {
        let mut connection = connection.clone();
        self.sign(&mut connection);
        let request = NetworkServiceRequest {
            connection: Some(connection),
            mechanism_preferences: Vec::new(),
        };
        self.send(agent, request).await
    }

    pub(crate) async fn close(&self, agent: &Agent, connection: &Connection) -> Result<(), Status> {
        let mut connection = connection.clone();
        self.sign(&mut connection);
        let front = agent.plane.network_front();
        within(front.close(self.call(connection))).await?;
        Ok(())
    }

    /// The ids in the first event of a monitor that selects everything.
    pub(crate) async fn follows(&self, agent: &Agent) -> Result<Vec<String>, Status> {
        let mut events = self.monitor(agent).await?;
        let first = within(events.next()).await.expect("an event")?;
        Ok(first.connections.into_keys().collect())
    }

    /// Follows all that it may.
    pub(crate) async fn monitor(
        &self,
        agent: &Agent,
    ) -> Result<impl Stream<Item = Result<ConnectionEvent, Status>> + Unpin + use<>, Status> {
        let front = agent.plane.network_front();
        let call = self.call(MonitorScopeSelector::default());
        Ok(within(front.monitor_connections(call)).await?.into_inner())
    }

    /// Watches the endpoints of a service.
    pub(crate) async fn watch(
        &self,
        agent: &Agent,
        service: &str,
    ) -> Result<impl Stream<Item = Found> + Unpin + use<>, Status> {
        let query = NetworkServiceEndpoint {
            network_service_names: vec![service.to_owned()],
            ..NetworkServiceEndpoint::default()
        };
        self.watch_by(agent, query).await
    }

    /// Watches endpoints.
    pub(crate) async fn watch_by(
        &self,
        agent: &Agent,
        query: NetworkServiceEndpoint,
    ) -> Result<impl Stream<Item = Found> + Unpin + use<>, Status> {
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(query),
            watch: true,
        };
        let front = agent.plane.network_front();
        Ok(within(front.find(self.call(query))).await?.into_inner())
    }

    pub(crate) async fn register(
        &self,
        agent: &Agent,
        endpoint: NetworkServiceEndpoint,
    ) -> Result<NetworkServiceEndpoint, Status> {
        let front = agent.plane.network_front();
        Ok(within(front.register(self.call(endpoint)))
            .await?
            .into_inner())
    }

    pub(crate) async fn unregister(
        &self,
        agent: &Agent,
        endpoint: NetworkServiceEndpoint,
    ) -> Result<(), Status> {
        let front = agent.plane.network_front();
        within(front.unregister(self.call(endpoint))).await?;
        Ok(())
    }

    /// Finds endpoints.
    pub(crate) async fn find(
        &self,
        agent: &Agent,
        query: NetworkServiceEndpoint,
    ) -> Result<Vec<NetworkServiceEndpoint>, Status> {
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(query),
            watch: false,
        };
        let front = agent.plane.network_front();
        let found = within(front.find(self.call(query))).await?.into_inner();
        let found: Vec<_> = within(found.collect::<Vec<_>>()).await;
        let entries = found.into_iter().map(|answer| {
            let answer: NetworkServiceEndpointResponse = answer?;
            Ok(answer.network_service_endpoint.expect("an endpoint"))
        });
        entries.collect()
    }
}
