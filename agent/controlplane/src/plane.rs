//! The control plane of one agent: it owns the parts, hands each what it needs, and is imported by no part.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use nsm_core::{
    address::ipmap::IpMap,
    identity::{
        access::{self, BadRules},
        relay::Relays,
    },
    link::admission,
    liveness::{Health, PathId},
    mechanism::vni_pool::VniPool,
    net::PeerUrl,
    nsm::name::Domain,
};
use nsm_discovery::dns::Resolver;
use nsm_proto::connection::Connection;
use tokio::sync::watch;

use crate::{
    api::server::{Front, Services},
    call::{
        CallConfig, Calls, admission::Admission, context::Contexts, mend::Mends,
        registrar::Registrar,
    },
    connection::{Held, model::Established},
    identity::{gate::Gate, token::TokenSource},
    liveness::{Liveness, LivenessConfig, Reachability},
    metrics::CallMetrics,
    peer::peers::Peers,
    places::Budget,
    ports::{Forwarder, Plan},
    registry::{Counts, backend::Backend},
    route::{
        addresses::Addresses,
        bypass::Bypass,
        local::LocalEndpoints,
        lookup::Lookup,
        router::{Arrival, Router, RouterConfig},
        upstream::{ForwarderEntry, Upstream},
    },
    transport::{guard::DialGuard, tls::Tls},
};

pub use crate::{connection::DownReason, peer::peers::PeerView};

/// What an agent is called and how long it waits; fixed for its life.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of our path segments.
    pub name: String,
    /// The domain this agent belongs to.
    pub domain: Domain,
    /// The URL that agents and registries of our own domain know us by at first, `tcp://address:port`; others too, until
    /// [`ControlPlane::set_public_url`] says otherwise. None: the node has no address yet.
    pub advertise_url: Option<String>,
    /// The NSMgr that this agent's forwarder works for, when that is not this agent itself.
    pub upstream_nsmgr_url: Option<PeerUrl>,
    /// The registry proxy that is asked for names of other domains; this agent is its own without.
    pub registry_proxy_url: Option<PeerUrl>,
    /// How long a Request, and each call it makes, may take.
    pub request_timeout: Duration,
    /// How long a connection to a peer may take to stand.
    pub dial_timeout: Duration,
    /// What callers may hold; what they ask for beyond that is refused.
    pub budget: Budget,
    /// The largest message that is read, in bytes.
    pub max_message_bytes: usize,
    /// Whether paths are proved before connections are granted.
    pub reachability: Reachability,
    /// Whether administrators of the node may have links in its own network namespaces.
    pub node_namespace: bool,
    /// What other parties may put into pods.
    pub admission: admission::Rules,
    /// UDP ports of tunnels that other nodes may choose beside this node's own.
    pub peer_ports: Vec<u16>,
    /// What decides on callers and servers that show certificates.
    pub gate: Arc<Gate>,
    /// Which callers of the network may use this agent to reach others.
    pub relays: Relays,
    /// Ranges of loopback, link-local and own addresses that may be dialled although others named them.
    pub dial_inside: Vec<IpNet>,
    /// Labels of this node (`nodeName`, `podName`, `clusterName`), which its clients and endpoints get where they have none of that name.
    pub client_info: BTreeMap<String, String>,
    /// What peers are dialled with; plain text without.
    pub tls: Option<Arc<Tls>>,
}

impl Settings {
    fn router(&self) -> RouterConfig {
        RouterConfig {
            domain: self.domain.clone(),
            upstream_nsmgr_url: self.upstream_nsmgr_url.clone(),
            registry_proxy_url: self.registry_proxy_url.clone(),
        }
    }

    /// What the operator has named is dialled, wherever it leads.
    fn guard(&self, registry: &Backend) -> DialGuard {
        let urls = [&self.upstream_nsmgr_url, &self.registry_proxy_url];
        let configured = urls.into_iter().flatten().chain(registry.url());
        DialGuard::new(self.dial_inside.clone(), configured.cloned())
    }

    fn peers(&self, tokens: &Arc<TokenSource>, registry: &Backend) -> Peers {
        Peers::connecting_with(
            Arc::clone(tokens),
            self.dial_timeout,
            self.max_message_bytes,
        )
        .guarded_by(self.guard(registry))
        .gated_by(Arc::clone(&self.gate))
        .secured_by(self.tls.clone())
    }

    fn liveness(&self) -> LivenessConfig {
        LivenessConfig {
            policy: self.reachability,
            own_name: self.name.clone(),
            patience: 2 * self.request_timeout,
        }
    }

    fn calls(&self) -> CallConfig {
        CallConfig {
            name: self.name.clone(),
            domain: self.domain.clone(),
            request_timeout: self.request_timeout,
            node_namespace: self.node_namespace,
            admission: Admission::new(self.admission.clone()),
            peer_ports: self.peer_ports.clone(),
            client_info: self.client_info.clone(),
        }
    }
}

/// The control plane of one agent. Cheap to clone; all clones are the same plane.
#[derive(Clone)]
pub struct ControlPlane {
    parts: Arc<Parts>,
}

struct Parts {
    domain: Domain,
    lookup: Arc<Lookup>,
    held: Held,
    liveness: Arc<Liveness>,
    services: Arc<Services>,
    upstream: Upstream,
    budget: Budget,
    /// True once every connection has been closed for the agent's end.
    drained: watch::Sender<bool>,
}

impl ControlPlane {
    /// A control plane that serves nobody yet; see [`crate::api::server`] for its listeners.
    pub fn start(
        settings: Settings,
        tokens: Arc<TokenSource>,
        resolver: Resolver,
        registry: Backend,
        forwarder: Option<Arc<dyn Forwarder>>,
        vnis: VniPool,
    ) -> Self {
        let budget = settings.budget.clone();
        let peers = Arc::new(settings.peers(&tokens, &registry));
        let lookup = Arc::new(Lookup {
            registry: registry.open(&peers),
            resolver,
            questions: budget.questions.clone(),
            peers: Arc::clone(&peers),
            addresses: Addresses::new(settings.advertise_url.clone()),
            gate: Arc::clone(&settings.gate),
            relays: settings.relays.clone(),
            bypass: Bypass::default(),
            local_endpoints: LocalEndpoints::default(),
        });
        let held = Held::new(&budget, vnis);
        let liveness = Liveness::new(settings.liveness(), forwarder.clone(), held.clone());
        let calls = Arc::new(Calls {
            config: settings.calls(),
            tokens: Arc::clone(&tokens),
            forwarder,
            lookup: Arc::clone(&lookup),
            router: Router::new(settings.router(), Arc::clone(&lookup)),
            held: held.clone(),
            liveness: Arc::clone(&liveness),
            contexts: Contexts::default(),
            mends: Mends::default(),
        });
        let drained = watch::Sender::new(false);
        let registrar = Registrar::new(
            settings.domain.clone(),
            settings.registry_proxy_url,
            settings.client_info,
            Arc::clone(&lookup),
            budget.clone(),
            drained.clone(),
        );
        let upstream = Upstream::new(
            settings.upstream_nsmgr_url,
            settings.request_timeout,
            peers,
            Arc::clone(&tokens),
        );
        calls.keep_connections();
        tokio::spawn(Arc::clone(&liveness).watch_paths());
        let services = Arc::new(Services {
            calls,
            registrar,
            monitors: held.monitors.clone(),
            metrics: CallMetrics::default(),
            tokens,
            request_timeout: settings.request_timeout,
        });
        Self {
            parts: Arc::new(Parts {
                domain: settings.domain,
                lookup,
                held,
                liveness,
                services,
                upstream,
                budget,
                drained,
            }),
        }
    }

    /// The services for the clients and endpoints of this node.
    pub fn node_front(&self) -> Front {
        self.front(Arrival::Local)
    }

    /// The services for the NSMgr that our forwarder works for.
    pub fn forwarder_front(&self) -> Front {
        self.front(Arrival::Forwarder)
    }

    /// The services for everyone else.
    pub fn network_front(&self) -> Front {
        self.front(Arrival::Network)
    }

    fn front(&self, arrival: Arrival) -> Front {
        Front::new(Arc::clone(&self.parts.services), arrival)
    }

    /// Keeps `entry` registered with the node's NSMgr until `stopped`, and then takes it out, so that the NSMgr sends no more
    /// Requests. An NSMgr that is gone comes back; one that does not answer at the end delays nothing. `on_change` is called after
    /// each try with whether the entry is registered.
    pub async fn keep_forwarder(
        self,
        entry: ForwarderEntry,
        on_change: impl Fn(bool),
        stopped: impl Future<Output = ()>,
    ) {
        let upstream = &self.parts.upstream;
        upstream.keep_forwarder(entry, on_change, stopped).await;
    }

    /// Replaces the map between internal and public addresses.
    pub fn set_ip_map(&self, map: IpMap) {
        self.parts.lookup.addresses.set_map(map);
    }

    /// Replaces the URL that our own domain dials, in place of [`Settings::advertise_url`]. None: the node has no address, and nothing can
    /// be registered that is reached through it.
    pub fn set_internal_url(&self, url: Option<String>) {
        self.parts.lookup.addresses.set_internal_url(url);
    }

    /// Replaces the URL that other domains dial: behind NAT it is not the one that our own domain dials. None: it is the same.
    pub fn set_public_url(&self, url: Option<String>) {
        let address = url.as_deref().and_then(|url| url.parse::<PeerUrl>().ok());
        let guard = self.parts.lookup.peers.guard();
        guard.set_public(address.and_then(|url| url.address()));
        self.parts.lookup.addresses.set_public_url(url);
    }

    /// Replaces the prefixes of the cluster that no other party may use, beside those of [`Settings::admission`].
    pub fn protect(&self, found: Vec<IpNet>) {
        self.parts.services.calls.protect(found);
    }

    /// Takes other rules of who may do what by a proven id. Connections of callers that they do not allow are closed, one after the
    /// other, after this has returned.
    ///
    /// # Errors
    /// The rules contradict each other; the old ones stay.
    pub fn set_rules(&self, rules: access::Rules) -> Result<(), BadRules> {
        self.parts.lookup.gate.set_rules(rules)?;
        tokio::spawn(Arc::clone(&self.parts.services.calls).close_denied());
        Ok(())
    }

    /// Sets whether this node's public address is known as far as it can be: until then Requests from and to other domains wait a
    /// little, because their tunnels end at the address that they carry. It counts as known until this is called.
    pub fn set_public_address_known(&self, is_known: bool) {
        self.parts.lookup.addresses.set_known(is_known);
    }

    /// The domain this agent belongs to.
    pub fn domain(&self) -> &Domain {
        &self.parts.domain
    }

    /// The resolver of domains, to reload its configuration.
    pub fn resolver(&self) -> &Resolver {
        &self.parts.lookup.resolver
    }

    /// Every established connection, as `status` shows it.
    pub fn connections(&self) -> Vec<ConnectionView> {
        let established = self.parts.held.connections.all().into_iter();
        let mut views: Vec<_> = established
            .map(|established| ConnectionView { established })
            .collect();
        views.sort_by(|a, b| a.id().cmp(b.id()));
        views
    }

    /// The health of a connection's path now: [`ConnectionView::health`] is what was published last, and how long a silence lasts is
    /// not published.
    pub fn health_now(&self, view: &ConnectionView) -> Option<Health> {
        self.parts.liveness.health_of(&view.established)
    }

    /// Why a connection is DOWN; none where it is not.
    pub fn down_reason(&self, view: &ConnectionView) -> Option<DownReason> {
        view.established.down_reason(self.health_now(view))
    }

    /// Every peer that carries connections, ordered by URL.
    pub fn peers(&self) -> Vec<PeerView> {
        let mut peers = self.parts.lookup.peers.in_use();
        peers.sort_by(|a, b| a.url.cmp(&b.url));
        peers
    }

    /// Whether the connection of our segment `id` is established or at work.
    pub fn holds(&self, id: &str) -> bool {
        self.parts.held.connections.has(id)
    }

    /// What the registry of this agent holds; none where another one is the domain's.
    pub fn registry_counts(&self) -> Option<Counts> {
        self.parts.lookup.registry.counts()
    }

    /// Adds what the control plane counts to a metrics registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.parts.services.metrics.register(registry);
        self.parts.budget.register_metrics(registry);
        self.parts.lookup.gate.register_metrics(registry);
        self.parts.held.monitors.register_metrics(registry);
        self.parts.lookup.resolver.register_metrics(registry);
    }

    /// What callers may hold.
    pub fn budget(&self) -> &Budget {
        &self.parts.budget
    }

    /// What is held now, to compare before and after.
    pub fn holdings(&self) -> Holdings {
        let held = &self.parts.held;
        Holdings {
            connections: held.connections.len(),
            vnis: held.keys.in_use(),
            monitors: held.monitors.len(),
        }
    }

    /// Follows the node's prober, for the life of the plane; returns at once when there is none. Where a prober starts later, this is
    /// called then.
    pub async fn watch_paths(self) {
        Arc::clone(&self.parts.liveness).watch_paths().await;
    }

    /// Ends watches and monitors, so that their listeners can end. All connections stay as they are: on this node, at the next hops and in
    /// the kernel.
    pub fn end_streams(&self) {
        self.parts.held.monitors.end_all();
        self.parts.lookup.registry.close();
        self.parts.drained.send_replace(true);
    }

    /// Refuses new connections, then closes all that are left: towards the endpoints, on this
    /// node, and for the monitors. Returns when all is gone or `grace` is over.
    pub async fn drain(&self, grace: Duration) {
        self.parts.services.calls.drain(grace).await;
        self.end_streams();
    }
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("domain", &self.parts.domain)
            .finish_non_exhaustive()
    }
}

/// Numbers of things that must be gone when the last connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    /// Connections, established or at work.
    pub connections: usize,
    /// VNIs in use.
    pub vnis: usize,
    /// Open monitor streams.
    pub monitors: usize,
}

/// An established connection, for showing.
#[derive(Debug, Clone)]
pub struct ConnectionView {
    established: Arc<Established>,
}

impl ConnectionView {
    /// The id of our segment.
    pub fn id(&self) -> &str {
        &self.established.view.id
    }

    /// The connection as monitors of this agent see it.
    pub fn connection(&self) -> &Connection {
        &self.established.view
    }

    /// The type of the mechanism towards the endpoint, empty when there is none.
    pub fn next_mechanism(&self) -> &str {
        self.established
            .next_mechanism
            .as_ref()
            .map_or("", |mechanism| mechanism.r#type.as_str())
    }

    /// What stands on this node for it.
    pub fn plan(&self) -> Option<&Plan> {
        self.established.plan.as_deref()
    }

    /// The health of the path that its packets take, as it was published last; none where there is no tunnel, or nothing is probed.
    pub fn health(&self) -> Option<&Health> {
        self.established.path.health.as_ref()
    }

    /// The path that is watched for it; none where none is.
    pub fn watched(&self) -> Option<PathId> {
        self.established.path.watched
    }

    /// When it is closed unless it is refreshed.
    pub fn expires(&self) -> SystemTime {
        self.established.expires
    }
}
