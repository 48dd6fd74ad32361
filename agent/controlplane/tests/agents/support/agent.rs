//! A whole agent in this process: control plane, listeners, a kernel that is none.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use ipnet::IpNet;
use nsm_controlplane::{
    api::listener::{ListenerLimits, Socket, serve},
    identity::{gate::Gate, token::TokenSource},
    liveness::Reachability,
    places::{self, Budget},
    plane::{ControlPlane, Settings},
    ports::Forwarder,
    registry::{
        backend::Backend,
        memory::{Limits, Memory},
    },
    transport::clients::Clients,
};
use nsm_core::{
    identity::{access, relay::Relays, share::Limit},
    link::admission::Rules,
    mechanism::vni_pool::VniPool,
    nsm::name::Domain,
};
use nsm_discovery::dns::{Resolver, ResolverConfig};
use tempfile::TempDir;
use tonic::service::Routes;

use super::{GLANCE, kernel::FakeKernel, process::Process};

/// How an agent differs from the usual one.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) name: String,
    pub(crate) domain: String,
    /// Tunnel address and MTU; none: no forwarder.
    pub(crate) kernel: Option<(IpAddr, u32)>,
    pub(crate) request_timeout: Duration,
    pub(crate) dial_timeout: Duration,
    pub(crate) limits: places::Limits,
    pub(crate) token_lifetime: Duration,
    pub(crate) reachability: Reachability,
    /// Whether the node has a prober.
    pub(crate) probes: bool,
    /// Whether it starts later.
    pub(crate) probes_late: bool,
    /// The first agent of the world has the registry.
    pub(crate) shares_registry: bool,
    /// The URL of another agent that has the domain's registry.
    pub(crate) registry: Option<String>,
    /// What others may put into pods.
    pub(crate) admission: Rules,
    /// What those may do that show certificates.
    pub(crate) policy: access::Rules,
    /// Who may relay over the network: by default everybody on loopback, where all agents of these tests are.
    pub(crate) relays: Relays,
    /// What is dialled although it is of this node: loopback.
    pub(crate) dial_inside: Vec<IpNet>,
    /// Ports of tunnels beside the usual one.
    pub(crate) peer_ports: Vec<u16>,
    /// Labels of the node.
    pub(crate) client_info: BTreeMap<String, String>,
}

impl Setup {
    pub(crate) fn new(name: &str, domain: &str, ip: &str) -> Self {
        Self {
            name: name.to_owned(),
            domain: domain.to_owned(),
            kernel: Some((ip.parse().expect("an address"), 1500)),
            request_timeout: Duration::from_secs(10),
            dial_timeout: Duration::from_secs(2),
            limits: places::Limits::wide(),
            token_lifetime: Duration::from_secs(600),
            reachability: Reachability::default(),
            probes: true,
            probes_late: false,
            shares_registry: false,
            registry: None,
            admission: Rules::default(),
            policy: access::Rules::default(),
            relays: Relays {
                relay_for: vec![loopback()],
                registrants: Vec::new(),
            },
            dial_inside: vec![loopback()],
            peer_ports: Vec::new(),
            client_info: BTreeMap::new(),
        }
    }

    pub(crate) fn reachability(mut self, policy: Reachability) -> Self {
        self.reachability = policy;
        self
    }

    /// No caller of the network may relay.
    pub(crate) fn without_relays(mut self) -> Self {
        self.relays = Relays::default();
        self
    }

    /// Loopback is dialled only where the configuration leads there.
    pub(crate) fn dialling_outside_only(mut self) -> Self {
        self.dial_inside.clear();
        self
    }

    pub(crate) fn policy(mut self, rules: access::Rules) -> Self {
        self.policy = rules;
        self
    }

    pub(crate) fn client_info(mut self, labels: BTreeMap<String, String>) -> Self {
        self.client_info = labels;
        self
    }

    pub(crate) fn without_prober(mut self) -> Self {
        self.probes = false;
        self
    }

    pub(crate) fn probing_late(mut self) -> Self {
        self.probes_late = true;
        self
    }

    pub(crate) fn without_forwarder(mut self) -> Self {
        self.kernel = None;
        self
    }

    pub(crate) fn mtu(mut self, mtu: u32) -> Self {
        let (_, own) = self.kernel.as_mut().expect("a forwarder");
        *own = mtu;
        self
    }

    pub(crate) fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    pub(crate) fn dial_timeout(mut self, timeout: Duration) -> Self {
        self.dial_timeout = timeout;
        self
    }

    pub(crate) fn token_lifetime(mut self, lifetime: Duration) -> Self {
        self.token_lifetime = lifetime;
        self
    }

    pub(crate) fn max_connections(mut self, limit: usize) -> Self {
        self.limits.connections = Limit {
            all: limit,
            of_one: limit,
        };
        self
    }

    /// Uses the registry of the first agent of the world.
    pub(crate) fn sharing_the_registry(mut self) -> Self {
        self.shares_registry = true;
        self
    }
}

/// The addresses of all agents of these tests.
pub(crate) fn loopback() -> IpNet {
    "127.0.0.0/8".parse().expect("a prefix")
}

/// A running agent.
pub(crate) struct Agent {
    setup: Setup,
    pub(crate) plane: ControlPlane,
    pub(crate) registry: Memory,
    pub(crate) domain: Domain,
    pub(crate) address: SocketAddr,
    /// What other agents dial.
    pub(crate) url: String,
    /// What clients and endpoints of its node dial.
    pub(crate) node_url: String,
    /// The folder of its socket and of its endpoints'.
    pub(crate) folder: TempDir,
    kernel: Option<Arc<FakeKernel>>,
    process: Mutex<Option<Process>>,
}

/// The largest message that agents of these tests read.
pub(crate) const MAX_MESSAGE: usize = 256 << 10;

impl Agent {
    pub(crate) async fn start(setup: Setup) -> Self {
        let kernel = setup
            .kernel
            .map(|(ip, mtu)| FakeKernel::new(ip, mtu, setup.probes))
            .map(|kernel| match setup.probes_late {
                true => kernel.probing_late(),
                false => kernel,
            })
            .map(Arc::new);
        Self::start_at(setup, kernel, "127.0.0.1:0".parse().expect("an address")).await
    }

    /// The next life of an agent that was killed: at its address, on the links that it left.
    pub(crate) async fn start_again(&self) -> Self {
        assert!(!self.is_alive());
        Self::start_at(self.setup.clone(), self.kernel.clone(), self.address).await
    }

    async fn start_at(setup: Setup, kernel: Option<Arc<FakeKernel>>, address: SocketAddr) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("nsm.sock");
        let running = run(setup.clone(), socket.clone(), kernel.clone(), address);
        let (process, (plane, registry, address)) = Process::start(running).await;
        Self {
            plane,
            registry,
            domain: setup.domain.parse().expect("a domain"),
            address,
            url: format!("tcp://{address}"),
            node_url: format!("unix://{}", socket.display()),
            folder,
            kernel,
            process: Mutex::new(Some(process)),
            setup,
        }
    }

    pub(crate) fn kernel(&self) -> &FakeKernel {
        self.kernel.as_deref().expect("it has a forwarder")
    }

    pub(crate) fn has_kernel(&self) -> bool {
        self.kernel.is_some()
    }

    /// `kill -9`.
    pub(crate) fn kill(&self) {
        self.process.lock().expect("not poisoned").take();
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.process.lock().expect("not poisoned").is_some()
    }

    /// Takes another resolver configuration.
    pub(crate) fn resolve_by(&self, config: ResolverConfig) {
        self.plane.resolver().reload(config);
    }
}

async fn run(
    setup: Setup,
    socket: PathBuf,
    kernel: Option<Arc<FakeKernel>>,
    address: SocketAddr,
) -> (ControlPlane, Memory, SocketAddr) {
    let network = loop {
        match Socket::tcp(address).await {
            // An earlier life of it is not quite gone.
            Err(error) if error.kind() == ErrorKind::AddrInUse => tokio::time::sleep(GLANCE).await,
            bound => break bound.expect("a port"),
        }
    };
    let Socket::Tcp(listener) = &network else {
        unreachable!("made as TCP")
    };
    let address = listener.local_addr().expect("bound");
    let node = Socket::unix(&socket).expect("a socket");
    let budget = Budget::new(&setup.limits);
    let registry = Memory::charging(Limits::default(), &budget);
    let plane = ControlPlane::start(
        Settings {
            name: setup.name.clone(),
            domain: setup.domain.parse().expect("a domain"),
            advertise_url: Some(format!("tcp://{address}")),
            upstream_nsmgr_url: None,
            registry_proxy_url: None,
            request_timeout: setup.request_timeout,
            dial_timeout: setup.dial_timeout,
            budget: budget.clone(),
            max_message_bytes: MAX_MESSAGE,
            reachability: setup.reachability,
            node_namespace: false,
            admission: setup.admission.clone(),
            gate: Arc::new(
                Gate::new(
                    setup.domain.parse().expect("a domain"),
                    setup.policy.clone(),
                )
                .expect("the rules hold together"),
            ),
            relays: setup.relays.clone(),
            dial_inside: setup.dial_inside.clone(),
            peer_ports: setup.peer_ports.clone(),
            client_info: setup.client_info.clone(),
            tls: None,
        },
        Arc::new(TokenSource::hs256(
            &format!("spiffe://{}/{}", setup.domain, setup.name),
            b"of the tests",
            setup.token_lifetime,
        )),
        Resolver::new(ResolverConfig {
            servers: vec![address],
            ..ResolverConfig::default()
        }),
        match &setup.registry {
            Some(url) => Backend::Remote(url.parse().expect("a URL")),
            None => Backend::Memory(registry.clone()),
        },
        kernel.map(|kernel| kernel as Arc<dyn Forwarder>),
        VniPool::default(),
    );
    let limits = ListenerLimits {
        clients: Clients::of_all(budget.clients, setup.relays.clone()),
        messages: budget.messages,
        max_message_bytes: MAX_MESSAGE,
        max_streams: 1000,
        tls: None,
    };
    let fronts = [(network, plane.network_front()), (node, plane.node_front())];
    for (socket, front) in fronts {
        let limits = limits.clone();
        let routes = front.add_to(Routes::default(), &limits);
        tokio::spawn(async move { serve(socket, routes, &limits, std::future::pending()).await });
    }
    (plane, registry, address)
}
