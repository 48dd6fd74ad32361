//! A process of ours, and the agent it speaks to.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use nix::sys::signal::{Signal, kill};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector,
        PathSegment, State,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
    connectioncontext::{ConnectionContext, IpContext},
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
    registry::{
        self, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
        NetworkServiceQuery, NetworkServiceResponse,
        network_service_endpoint_registry_server::{
            NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer,
        },
        network_service_registry_server::{NetworkServiceRegistry, NetworkServiceRegistryServer},
    },
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines},
    net::UnixListener,
    process::{Child, ChildStdout, Command},
    sync::mpsc,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, metadata::MetadataMap};

/// Longer than anything here takes; a test that waits so long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(done) => done,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// A `proxy-nsmgr` process, killed when dropped.
pub(crate) struct Tool {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Tool {
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next line of standard output, as JSON.
    pub(crate) async fn event(&mut self) -> Value {
        let line = soon("an event", self.lines.next_line()).await.unwrap();
        serde_json::from_str(&line.expect("one more event")).unwrap()
    }

    /// The next event, which is of this kind.
    pub(crate) async fn expect(&mut self, kind: &str) -> Value {
        let event = self.event().await;
        assert_eq!(event["event"], kind, "{event}");
        event
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    /// The exit code, and what was on standard error.
    pub(crate) async fn end(mut self) -> (i32, String) {
        let mut text = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        let status = soon("the process to end", async {
            stderr.read_to_string(&mut text).await.unwrap();
            self.child.wait().await.unwrap()
        })
        .await;
        (status.code().expect("no signal ended it"), text)
    }
}

/// The program with these words and nothing of NSM in its environment.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxy-nsmgr"));
    command.args(args);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("NSM_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs to the end: exit code, standard output, standard error.
pub(crate) async fn run(args: &[&str]) -> (i32, String, String) {
    let output = soon("the process to end", command(args).output())
        .await
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// What the agent was asked.
#[derive(Debug)]
pub(crate) enum Call {
    Request(NetworkServiceRequest),
    Close(Connection),
    Monitor(MonitorScopeSelector),
    RegisterService(registry::NetworkService),
    Register(NetworkServiceEndpoint),
    Watch(NetworkServiceEndpointQuery),
    Unregister(NetworkServiceEndpoint),
}

/// What the agent answers to a Request, or to a registration.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Yes, for this long.
    Grant(Duration),
    /// A connection that is another's.
    GrantOther,
    Refuse(Status),
    Silence,
}

type Events<T> = mpsc::Sender<Result<T, Status>>;

#[derive(Default)]
struct Script {
    replies: VecDeque<Reply>,
    monitors: Vec<Events<ConnectionEvent>>,
    watches: Vec<Events<NetworkServiceEndpointResponse>>,
    services: BTreeMap<String, registry::NetworkService>,
}

/// An agent that does what the test says; a Request without a word of the test is granted for ten minutes.
#[derive(Clone)]
pub(crate) struct FakeAgent {
    script: Arc<Mutex<Script>>,
    calls: mpsc::UnboundedSender<(Call, MetadataMap)>,
}

/// The test's side of it.
pub(crate) struct Stage {
    pub(crate) agent: FakeAgent,
    pub(crate) url: String,
    calls: mpsc::UnboundedReceiver<(Call, MetadataMap)>,
    _dir: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Stage {
    pub(crate) fn new(replies: impl IntoIterator<Item = Reply>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nsm.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, calls) = mpsc::unbounded_channel();
        let agent = FakeAgent {
            script: Arc::default(),
            calls: sender,
        };
        agent.script.lock().unwrap().replies.extend(replies);
        let serving = tonic::transport::Server::builder()
            .add_service(NetworkServiceServer::new(agent.clone()))
            .add_service(MonitorConnectionServer::new(agent.clone()))
            .add_service(NetworkServiceRegistryServer::new(agent.clone()))
            .add_service(NetworkServiceEndpointRegistryServer::new(agent.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener));
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self {
            agent,
            url: format!("unix://{}", path.display()),
            calls,
            _dir: dir,
            server,
        }
    }

    /// The next call.
    pub(crate) async fn call(&mut self) -> (Call, MetadataMap) {
        soon("a call", self.calls.recv()).await.unwrap()
    }

    /// The next call, which is a Request.
    pub(crate) async fn request(&mut self) -> NetworkServiceRequest {
        match self.call().await.0 {
            Call::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    /// The next call, which is a Close.
    pub(crate) async fn close(&mut self) -> Connection {
        match self.call().await.0 {
            Call::Close(connection) => connection,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the client listens.
    pub(crate) async fn monitor(&mut self) -> MonitorScopeSelector {
        match self.call().await.0 {
            Call::Monitor(selector) => selector,
            other => panic!("{other:?}"),
        }
    }

    /// Nothing was asked that the test did not look at.
    pub(crate) fn nothing_more(&mut self) {
        if let Ok((call, _)) = self.calls.try_recv() {
            panic!("one call more: {call:?}");
        }
    }
}

impl FakeAgent {
    /// Tells the clients that listen.
    pub(crate) fn tell(&self, kind: ConnectionEventType, connection: &Connection, state: State) {
        let mut connection = connection.clone();
        connection.set_state(state);
        let event = ConnectionEvent {
            r#type: kind.into(),
            connections: BTreeMap::from([("agent-id".to_owned(), connection)]),
        };
        for monitor in &self.script.lock().unwrap().monitors {
            let _ = monitor.try_send(Ok(event.clone()));
        }
    }

    /// Ends all streams, as a restart does.
    pub(crate) fn end_streams(&self) {
        let mut script = self.script.lock().unwrap();
        script.monitors.clear();
        script.watches.clear();
    }

    /// Registers a network service.
    pub(crate) fn has_service(&self, service: registry::NetworkService) {
        let services = &mut self.script.lock().unwrap().services;
        services.insert(service.name.clone(), service);
    }

    /// Forgets the network services.
    pub(crate) fn forget_services(&self) {
        self.script.lock().unwrap().services.clear();
    }

    fn reply(&self) -> Reply {
        let reply = self.script.lock().unwrap().replies.pop_front();
        reply.unwrap_or(Reply::Grant(Duration::from_secs(600)))
    }

    fn note<T>(&self, request: Request<T>, call: impl FnOnce(T) -> Call) {
        let metadata = request.metadata().clone();
        // The test may have seen enough.
        let _ = self.calls.send((call(request.into_inner()), metadata));
    }
}

/// What an agent and an endpoint behind it make of a Request.
pub(crate) fn granted(request: NetworkServiceRequest, lifetime: Duration) -> Connection {
    let mut connection = request.connection.unwrap();
    let parameters = request.mechanism_preferences[0].parameters.clone();
    connection.mechanism = Some(Mechanism {
        cls: "LOCAL".to_owned(),
        r#type: "KERNEL".to_owned(),
        parameters,
    });
    connection.context = Some(ConnectionContext {
        ip_context: Some(IpContext {
            src_ip_addrs: vec!["172.16.1.2/32".to_owned()],
            dst_ip_addrs: vec!["172.16.1.1/32".to_owned()],
            ..IpContext::default()
        }),
        mtu: 1450,
        ..ConnectionContext::default()
    });
    connection.network_service_endpoint_name = "nse".to_owned();
    connection.set_state(State::Up);
    let segments = &mut connection.path.as_mut().unwrap().path_segments;
    segments.truncate(1);
    for name in ["agent", "nse"] {
        segments.push(PathSegment {
            name: name.to_owned(),
            id: format!("{name}-id"),
            expires: Some((SystemTime::now() + lifetime).into()),
            ..PathSegment::default()
        });
    }
    connection
}

#[tonic::async_trait]
impl NetworkService for FakeAgent {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let message = request.get_ref().clone();
        let reply = self.reply();
        self.note(request, Call::Request);
        match reply {
            Reply::Grant(lifetime) => {
                let mut response = Response::new(granted(message, lifetime));
                for (key, value) in [
                    ("nsm-domain", "cluster-2.example"),
                    (
                        "nsm-dns-question",
                        "SRV registry.nsm-system.cluster-2.example",
                    ),
                    ("nsm-dns-answer", "203.0.113.2:5005"),
                    ("nsm-remote-mechanism", "VXLAN"),
                    ("nsm-vni", "7"),
                ] {
                    response.metadata_mut().insert(key, value.parse().unwrap());
                }
                Ok(response)
            }
            Reply::GrantOther => {
                let mut connection = granted(message, Duration::from_secs(600));
                connection.id = "other".to_owned();
                Ok(Response::new(connection))
            }
            Reply::Refuse(status) => Err(status),
            Reply::Silence => std::future::pending().await,
        }
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        self.note(request, Call::Close);
        Ok(Response::new(()))
    }
}

type Streaming<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl MonitorConnection for FakeAgent {
    type MonitorConnectionsStream = Streaming<ConnectionEvent>;

    async fn monitor_connections(
        &self,
        request: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        let (sender, events) = mpsc::channel(16);
        self.script.lock().unwrap().monitors.push(sender);
        self.note(request, Call::Monitor);
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}

#[tonic::async_trait]
impl NetworkServiceRegistry for FakeAgent {
    type FindStream = Streaming<NetworkServiceResponse>;

    async fn register(
        &self,
        request: Request<registry::NetworkService>,
    ) -> Result<Response<registry::NetworkService>, Status> {
        let service = request.get_ref().clone();
        self.has_service(service.clone());
        self.note(request, Call::RegisterService);
        Ok(Response::new(service))
    }

    async fn find(
        &self,
        request: Request<NetworkServiceQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let wanted = request.into_inner().network_service.unwrap();
        let services = self.script.lock().unwrap().services.clone();
        let found = services
            .into_values()
            // As NSM's registry, which understands a name as a part of one.
            .filter(move |service| service.name.contains(&wanted.name))
            .map(|service| {
                Ok(NetworkServiceResponse {
                    network_service: Some(service),
                    deleted: false,
                })
            });
        Ok(Response::new(Box::pin(tokio_stream::iter(found))))
    }

    async fn unregister(
        &self,
        _: Request<registry::NetworkService>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("services stay"))
    }
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for FakeAgent {
    type FindStream = Streaming<NetworkServiceEndpointResponse>;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        let mut endpoint = request.get_ref().clone();
        let reply = self.reply();
        self.note(request, Call::Register);
        match reply {
            Reply::Grant(lifetime) => {
                endpoint.expiration_time = Some((SystemTime::now() + lifetime).into());
                Ok(Response::new(endpoint))
            }
            Reply::Refuse(status) => Err(status),
            other => panic!("{other:?} is no answer of a registry"),
        }
    }

    async fn find(
        &self,
        request: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let (sender, events) = mpsc::channel(16);
        self.script.lock().unwrap().watches.push(sender);
        self.note(request, Call::Watch);
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn unregister(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<()>, Status> {
        self.note(request, Call::Unregister);
        Ok(Response::new(()))
    }
}
