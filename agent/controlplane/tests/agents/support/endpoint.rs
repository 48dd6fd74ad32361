//! The other side of an agent: an endpoint on a Unix socket, or another domain's proxy on TCP.
//! Both answer by the rules, until a test gives them a [`Twist`].

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::SystemTime,
};

use nsm_controlplane::registry::memory::{Limits, Memory};
use nsm_core::mechanism;
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, Mechanism, MonitorScopeSelector, PathSegment,
        monitor_connection_server::{MonitorConnection, MonitorConnectionServer},
    },
    connectioncontext::Route,
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
    registry::{
        network_service_endpoint_registry_server::NetworkServiceEndpointRegistryServer,
        network_service_registry_server::NetworkServiceRegistryServer,
    },
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, watch},
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, transport::Server};

use super::{eventually, process::Process, registry::Served};

/// What becomes of a right answer before it is sent.
pub(crate) type Twist = fn(Connection) -> Result<Connection, Status>;

/// Counts pairs of addresses: no two endpoints have one in common, so that a pod can use both.
static NEXT_ADDRESS: AtomicU32 = AtomicU32::new(0);

type Events = mpsc::Sender<Result<ConnectionEvent, Status>>;

/// An endpoint, or what an agent takes for the proxy of another domain.
pub(crate) struct Endpoint {
    pub(crate) name: String,
    pub(crate) url: String,
    /// Its registry, when it is a whole domain.
    pub(crate) registry: Option<Memory>,
    state: Arc<State>,
    process: Mutex<Process>,
}

struct State {
    name: String,
    netns: String,
    serves_monitors: bool,
    /// Requests and Closes wait while it is false.
    open: watch::Sender<bool>,
    /// One after the other, in the order of their arrival.
    queue: tokio::sync::Mutex<()>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    standing: BTreeMap<String, Connection>,
    requests: Vec<NetworkServiceRequest>,
    closes: Vec<Connection>,
    closed_at: Option<SystemTime>,
    vnis: VecDeque<u32>,
    twist: Option<Twist>,
    monitors: Vec<Events>,
    mtu: u32,
}

impl Endpoint {
    /// An endpoint on a Unix socket in `folder`.
    pub(crate) async fn on_node(
        folder: &std::path::Path,
        name: &str,
        serves_monitors: bool,
    ) -> Self {
        let socket = folder.join(format!("{name}.sock"));
        let url = format!("unix://{}", socket.display());
        let state = Arc::new(State::new(name, serves_monitors));
        let serving = Arc::clone(&state);
        let (process, ()) = Process::start(async move {
            let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("a socket"));
            let mut server =
                Server::builder().add_service(NetworkServiceServer::from_arc(Arc::clone(&serving)));
            if serving.serves_monitors {
                server = server.add_service(MonitorConnectionServer::from_arc(serving));
            }
            tokio::spawn(server.serve_with_incoming(incoming));
        })
        .await;
        Self::of(name, url, None, state, process)
    }

    /// A domain on TCP: a registry and a proxy on one port of loopback.
    pub(crate) async fn domain(name: &str) -> Self {
        let state = Arc::new(State::new(name, true));
        let serving = Arc::clone(&state);
        let (process, (url, registry)) = Process::start(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let url = format!("tcp://{}", listener.local_addr().expect("bound"));
            let registry = Memory::new(Limits::default());
            let server = Server::builder()
                .add_service(NetworkServiceServer::from_arc(Arc::clone(&serving)))
                .add_service(MonitorConnectionServer::from_arc(serving))
                .add_service(NetworkServiceRegistryServer::new(Served(registry.clone())))
                .add_service(NetworkServiceEndpointRegistryServer::new(Served(
                    registry.clone(),
                )));
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
            (url, registry)
        })
        .await;
        Self::of(name, url, Some(registry), state, process)
    }

    fn of(
        name: &str,
        url: String,
        registry: Option<Memory>,
        state: Arc<State>,
        process: Process,
    ) -> Self {
        Self {
            name: name.to_owned(),
            url,
            registry,
            state,
            process: Mutex::new(process),
        }
    }

    /// Answers wrongly from now on.
    pub(crate) fn twist(&self, twist: Twist) {
        self.state.table().twist = Some(twist);
    }

    /// Answers by the rules again.
    pub(crate) fn mend(&self) {
        self.state.table().twist = None;
    }

    /// The VNIs to choose, one a Request; then 7001 and up.
    pub(crate) fn choose_vnis(&self, vnis: impl IntoIterator<Item = u32>) {
        self.state.table().vnis.extend(vnis);
    }

    /// The MTU it can do.
    pub(crate) fn limit_mtu(&self, mtu: u32) {
        self.state.table().mtu = mtu;
    }

    /// Lets Requests wait without an answer, or answers them.
    pub(crate) fn hold(&self, hold: bool) {
        self.state.open.send_replace(!hold);
    }

    /// Ends all monitor streams.
    pub(crate) fn end_monitors(&self) {
        self.state.table().monitors.clear();
    }

    /// Tells all monitors.
    pub(crate) async fn tell(&self, event: ConnectionEvent) {
        let monitors = self.state.table().monitors.clone();
        for monitor in monitors {
            let _ = monitor.send(Ok(event.clone())).await;
        }
    }

    /// The ids of its connections.
    pub(crate) fn standing(&self) -> Vec<String> {
        self.state.table().standing.keys().cloned().collect()
    }

    /// Takes a connection out of the books of a dead endpoint.
    pub(crate) fn forget(&self, id: &str) {
        self.state.table().standing.remove(id);
    }

    /// Every Request so far.
    pub(crate) fn requests(&self) -> Vec<NetworkServiceRequest> {
        self.state.table().requests.clone()
    }

    /// Every Close so far.
    /// When the first Close came, once one has.
    pub(crate) async fn closed_at(&self) -> SystemTime {
        eventually(true, || self.state.table().closed_at.is_some()).await;
        self.state.table().closed_at.expect("it was closed")
    }

    pub(crate) fn closes(&self) -> Vec<Connection> {
        self.state.table().closes.clone()
    }

    /// Open monitor streams.
    pub(crate) fn monitors(&self) -> usize {
        let mut table = self.state.table();
        table.monitors.retain(|monitor| !monitor.is_closed());
        table.monitors.len()
    }

    /// `kill -9`.
    pub(crate) fn kill(&self) {
        self.process.lock().expect("not poisoned").kill();
        self.state.table().monitors.clear();
    }
}

impl State {
    fn new(name: &str, serves_monitors: bool) -> Self {
        Self {
            name: name.to_owned(),
            netns: format!("inode://4/{}", 2_000_000 + super::unique()),
            serves_monitors,
            open: watch::Sender::new(true),
            queue: tokio::sync::Mutex::default(),
            table: Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder panics")
    }

    async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        let turn = self.queue.lock().await;
        let mut open = self.open.subscribe();
        let _ = open.wait_for(|open| *open).await;
        turn
    }

    /// The answer by the rules of NSM.
    fn grant(&self, request: NetworkServiceRequest) -> Result<(String, Connection), Status> {
        let mut reply = request
            .connection
            .ok_or_else(|| Status::invalid_argument("no connection"))?;
        let path = reply.path.get_or_insert_default();
        let own = path.index as usize + 1;
        match path.path_segments.get_mut(own) {
            Some(segment) if segment.name == self.name => {}
            _ => {
                path.path_segments.truncate(own);
                path.path_segments.push(PathSegment {
                    name: self.name.clone(),
                    id: uuid::Uuid::new_v4().to_string(),
                    token: "the endpoint's".to_owned(),
                    ..PathSegment::default()
                });
            }
        }
        let id = path.path_segments[own].id.clone();
        let mut mechanism = reply
            .mechanism
            .take()
            .filter(|mechanism| !mechanism.r#type.is_empty())
            .or_else(|| request.mechanism_preferences.first().cloned())
            .ok_or_else(|| Status::invalid_argument("no mechanism"))?;
        let context = reply.context.get_or_insert_default();
        let mut table = self.table();
        self.fill(&mut table, &mut mechanism);
        if table.mtu != 0 {
            context.mtu = table.mtu;
        }
        let ip = context.ip_context.get_or_insert_default();
        if let (true, Some(standing)) = (ip.src_ip_addrs.is_empty(), table.standing.get(&id)) {
            let standing = standing.context.clone().unwrap_or_default().ip_context;
            *ip = standing.unwrap_or_default();
        }
        if ip.src_ip_addrs.is_empty() {
            let n = NEXT_ADDRESS.fetch_add(1, Ordering::Relaxed);
            let (hi, lo) = (n / 100, n % 100);
            ip.src_ip_addrs = vec![format!("172.16.{hi}.{}/32", 2 * lo + 1)];
            ip.dst_ip_addrs = vec![format!("172.16.{hi}.{}/32", 2 * lo)];
            let route = |text: &String| Route {
                prefix: text.clone(),
                next_hop: String::new(),
            };
            ip.src_routes = ip.dst_ip_addrs.iter().map(route).collect();
            ip.dst_routes = ip.src_ip_addrs.iter().map(route).collect();
        }
        reply.mechanism = Some(mechanism);
        Ok((id, reply))
    }

    fn fill(&self, table: &mut Table, mechanism: &mut Mechanism) {
        let parameters = &mut mechanism.parameters;
        if mechanism.r#type == mechanism::VXLAN {
            let vni = table.vnis.pop_front();
            let vni = vni.or_else(|| parameters.get(mechanism::VNI)?.parse().ok());
            let vni =
                vni.unwrap_or_else(|| 7001 + u32::try_from(table.requests.len()).unwrap_or(0));
            parameters.insert(mechanism::VNI.to_owned(), vni.to_string());
            parameters.insert(mechanism::DST_IP.to_owned(), "192.0.2.99".to_owned());
        } else {
            parameters.insert(mechanism::INODE_URL.to_owned(), self.netns.clone());
        }
    }
}

#[tonic::async_trait]
impl NetworkService for State {
    async fn request(
        &self,
        request: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        let request = request.into_inner();
        self.table().requests.push(request.clone());
        let _turn = self.turn().await;
        let (id, reply) = self.grant(request)?;
        let mut table = self.table();
        let sent = table
            .twist
            .map_or(Ok(reply.clone()), |twist| twist(reply.clone()));
        // A wrong answer is an answer all the same: what it granted must be closed.
        if sent.is_ok() {
            table.standing.insert(id, reply);
        }
        sent.map(Response::new)
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let connection = request.into_inner();
        let _turn = self.turn().await;
        let mut table = self.table();
        let path = connection.path.clone().unwrap_or_default();
        if let Some(own) = path.path_segments.get(path.index as usize + 1) {
            table.standing.remove(&own.id);
        } else {
            // Closed by somebody who never read our answer: we know it by the hop before us.
            table.standing.retain(|_, ours| ours.id != connection.id);
        }
        table.closed_at.get_or_insert_with(SystemTime::now);
        table.closes.push(connection);
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl MonitorConnection for State {
    type MonitorConnectionsStream =
        Pin<Box<dyn Stream<Item = Result<ConnectionEvent, Status>> + Send>>;

    async fn monitor_connections(
        &self,
        _: Request<MonitorScopeSelector>,
    ) -> Result<Response<Self::MonitorConnectionsStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let _ = sender.try_send(Ok(ConnectionEvent::default()));
        self.table().monitors.push(sender);
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
