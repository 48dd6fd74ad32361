//! What the scenarios are made of: whole agents on loopback, each in a runtime of its own as if it
//! were a process, with a kernel that only keeps the books, and peers that do as they are told.

mod agent;
mod client;
mod connected;
mod dns;
mod endpoint;
mod kernel;
mod prober;
mod process;
mod proven;
mod registry;
mod silence;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nsm_controlplane::{
    plane::Holdings,
    registry::{Counts, memory::Memory},
};
use nsm_core::nsm::name::Domain;
use nsm_discovery::dns::{HostEntry, HostTarget, ResolverConfig};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use tokio::time::Instant;
use tonic::{Code, Status};

pub(crate) use self::{
    agent::{Agent, MAX_MESSAGE, Setup},
    client::{Client, Granted, Watch, mechanism, names, parameter, stamp},
    connected::{Connected, SERVICE},
    dns::Zone,
    endpoint::{Endpoint, Twist},
    kernel::{PORT, Standing, taken},
    prober::Path,
    process::apart,
    proven::{AGENT, Chain, Pod, id},
    silence::Silence,
    wire::Wire,
};

/// Nothing in a test takes as long as this unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often a condition is looked at.
const GLANCE: Duration = Duration::from_millis(2);

/// A number that no other test of this process has.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Awaits what must not hang.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it does not hang")
}

/// Waits until `look` sees what is expected, and shows what it saw instead.
pub(crate) async fn eventually<T: PartialEq + Debug>(expected: T, mut look: impl FnMut() -> T) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look();
        if seen == expected {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "still {seen:#?}\ninstead of {expected:#?}"
        );
        tokio::time::sleep(GLANCE).await;
    }
}

/// Checks code and words of a refusal.
pub(crate) fn assert_refusal(status: &Status, code: Code, words: &[&str]) {
    assert_eq!(status.code(), code, "{status:?}");
    for word in words {
        assert!(
            status.message().contains(word),
            "`{word}` is not in `{}`",
            status.message()
        );
    }
}

/// Agents that can find each other, and everything that may leak.
pub(crate) struct World {
    agents: Vec<Agent>,
    endpoints: Mutex<Vec<Arc<Endpoint>>>,
    hosts: Mutex<BTreeMap<Domain, HostEntry>>,
    dns: SocketAddr,
}

/// What is held everywhere.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Held {
    agents: Vec<Option<AgentHolds>>,
    /// Connections of each endpoint.
    endpoints: Vec<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq)]
struct AgentHolds {
    holdings: Holdings,
    links: Vec<String>,
    registry: Counts,
    peers: Vec<(String, usize)>,
    /// Connections that watch a path, by the other end of it.
    watched: BTreeMap<IpAddr, BTreeSet<String>>,
}

impl Held {
    /// Whether the agents hold the same, whatever endpoints there are.
    pub(crate) fn resembles(&self, other: &Self) -> bool {
        self.agents == other.agents
    }
}

impl World {
    /// Two domains of one agent each: a client's and an endpoint's.
    pub(crate) async fn two() -> Self {
        Self::of([client_side(), endpoint_side()]).await
    }

    /// These agents; a domain is reached at its first agent.
    pub(crate) async fn of(setups: impl IntoIterator<Item = Setup>) -> Self {
        Self::with_dns(setups, Zone::default()).await
    }

    /// These agents, with DNS for names that are not theirs.
    pub(crate) async fn with_dns(setups: impl IntoIterator<Item = Setup>, zone: Zone) -> Self {
        let mut agents: Vec<Agent> = Vec::new();
        for mut setup in setups {
            if setup.shares_registry {
                setup.registry = Some(agents[0].url.clone());
            }
            agents.push(Agent::start(setup).await);
        }
        let mut hosts = BTreeMap::new();
        for agent in &agents {
            hosts
                .entry(agent.domain.clone())
                .or_insert_with(|| HostTarget::Socket(agent.address).into());
        }
        let world = Self {
            agents,
            endpoints: Mutex::default(),
            hosts: Mutex::new(hosts),
            dns: zone.serve().await,
        };
        world.tell_hosts();
        world
    }

    /// The agents, in the order of their setups.
    pub(crate) fn agents<const N: usize>(&self) -> [&Agent; N] {
        let agents: Vec<&Agent> = self.agents.iter().collect();
        agents.try_into().unwrap_or_else(|_| panic!("{N} agents"))
    }

    /// Lets all agents find `domain` at `url`.
    pub(crate) fn publish(&self, domain: &str, url: &str) {
        let address = url.strip_prefix("tcp://").expect("a TCP URL");
        let address = HostTarget::Socket(address.parse().expect("an address"));
        self.hosts
            .lock()
            .expect("not poisoned")
            .insert(domain.parse().expect("a domain"), address.into());
        self.tell_hosts();
    }

    fn tell_hosts(&self) {
        self.agents
            .iter()
            .for_each(|agent| self.tell_hosts_to(agent));
    }

    /// Lets an agent that was started again find the domains.
    pub(crate) fn tell_hosts_to(&self, agent: &Agent) {
        agent.resolve_by(ResolverConfig {
            servers: vec![self.dns],
            hosts: self.hosts.lock().expect("not poisoned").clone(),
            timeout: Duration::from_millis(1500),
            ..ResolverConfig::default()
        });
    }

    /// The DNS server of this world.
    pub(crate) fn dns(&self) -> SocketAddr {
        self.dns
    }

    /// An endpoint on the agent's node, registered for a service.
    pub(crate) async fn endpoint(&self, agent: &Agent, name: &str, service: &str) -> Arc<Endpoint> {
        self.labelled_endpoint(agent, name, service, &[]).await
    }

    /// An endpoint with labels.
    pub(crate) async fn labelled_endpoint(
        &self,
        agent: &Agent,
        name: &str,
        service: &str,
        labels: &[(&str, &str)],
    ) -> Arc<Endpoint> {
        let endpoint = Endpoint::on_node(agent.folder.path(), name, true).await;
        let endpoint = self.keep(endpoint);
        let registered = Client::on_node(agent)
            .await
            .offer(registration(&endpoint, service, labels))
            .await
            .expect("registered");
        assert_eq!(registered.url, endpoint.url, "it keeps its own URL");
        endpoint
    }

    /// A domain that a test plays itself: registry and proxy, with one endpoint of one service.
    pub(crate) async fn foreign_domain(&self, domain: &str, service: &str) -> Arc<Endpoint> {
        let peer = self.keep(Endpoint::domain("stranger").await);
        let registry = peer.registry.as_ref().expect("a domain");
        offer(registry, registration(&peer, service, &[]));
        self.publish(domain, &peer.url);
        peer
    }

    /// Watches over an endpoint's connections too.
    pub(crate) fn keep(&self, endpoint: Endpoint) -> Arc<Endpoint> {
        let endpoint = Arc::new(endpoint);
        self.endpoints
            .lock()
            .expect("not poisoned")
            .push(Arc::clone(&endpoint));
        endpoint
    }

    /// What is held now; killed agents hold nothing that matters.
    pub(crate) fn held(&self) -> Held {
        Held {
            agents: self
                .agents
                .iter()
                .map(|agent| agent.is_alive().then(|| holds(agent)))
                .collect(),
            endpoints: self
                .endpoints
                .lock()
                .expect("not poisoned")
                .iter()
                .map(|endpoint| endpoint.standing())
                .collect(),
        }
    }

    /// Waits until everything is as it was.
    pub(crate) async fn settles(&self, before: &Held) {
        eventually(before.clone(), || self.held()).await;
    }
}

/// URL and number of connections of each peer that carries some.
pub(crate) fn peers(agent: &Agent) -> Vec<(String, usize)> {
    let peers = agent.plane.peers().into_iter();
    peers.map(|peer| (peer.url, peer.connections)).collect()
}

fn holds(agent: &Agent) -> AgentHolds {
    AgentHolds {
        holdings: agent.plane.holdings(),
        links: if agent.has_kernel() {
            agent.kernel().links().into_keys().collect()
        } else {
            Vec::new()
        },
        registry: agent.registry.counts(),
        peers: peers(agent),
        watched: if agent.has_kernel() {
            agent.kernel().watched()
        } else {
            BTreeMap::new()
        },
    }
}

/// The usual agent of the client's domain.
pub(crate) fn client_side() -> Setup {
    Setup::new("agent-1", "cluster-1.example", "192.0.2.1")
}

/// The usual agent of the endpoint's domain.
pub(crate) fn endpoint_side() -> Setup {
    Setup::new("agent-2", "cluster-2.example", "192.0.2.2")
}

/// What an endpoint registers.
/// Puts an endpoint and the services that it offers into a registry.
pub(crate) fn offer(registry: &Memory, endpoint: NetworkServiceEndpoint) {
    let now = std::time::SystemTime::now();
    for name in endpoint.network_service_names.clone() {
        let service = NetworkService {
            name,
            ..NetworkService::default()
        };
        let registered = registry.services.register(service, now, &[]);
        registered.expect("registered");
    }
    let registered = registry.endpoints.register(endpoint, now, &[]);
    registered.expect("registered");
}

pub(crate) fn registration(
    endpoint: &Endpoint,
    service: &str,
    labels: &[(&str, &str)],
) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels {
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    };
    NetworkServiceEndpoint {
        name: endpoint.name.clone(),
        network_service_names: vec![service.to_owned()],
        network_service_labels: [(service.to_owned(), labels)].into(),
        url: endpoint.url.clone(),
        ..NetworkServiceEndpoint::default()
    }
}
