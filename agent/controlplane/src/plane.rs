//! The control plane of one agent: everything its roles share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_core::{address::ipmap::IpMap, mechanism::vni_pool::VniPool, nsm::name::Domain};
use nsm_discovery::dns::Resolver;
use tokio::{sync::watch, time::Instant};

use crate::{
    connection::{
        expiry::Expiries,
        monitor::Monitors,
        store::{Connections, Established, lock},
    },
    identity::token::TokenSource,
    liveness::{Foreign, Reachability},
    metrics::CallMetrics,
    peer::peers::{Peer, Peers},
    ports::Forwarder,
    route::{bypass::Bypass, directory::Directory},
};

/// What an agent is called and how long it waits; fixed for its life.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of our path segments.
    pub name: String,
    /// The domain this agent belongs to.
    pub domain: Domain,
    /// The URL that agents and registries of our own domain know us by, `tcp://address:port`; others too, until
    /// [`ControlPlane::set_public_url`] says otherwise.
    pub advertise_url: String,
    /// The NSMgr that this agent's forwarder works for, when that is not this agent itself.
    pub upstream_nsmgr_url: Option<String>,
    /// The registry proxy that is asked for names of other domains; this agent is its own without.
    pub registry_proxy_url: Option<String>,
    /// How long a Request, and each call it makes, may take.
    pub request_timeout: Duration,
    /// How long a connection to a peer may take to stand.
    pub dial_timeout: Duration,
    /// Connections at one time; more are refused.
    pub max_connections: usize,
    /// The largest message that is read, in bytes.
    pub max_message_bytes: usize,
    /// Whether paths are proved before connections are granted.
    pub reachability: Reachability,
}

/// Where this agent looks up its own domain.
#[derive(Clone)]
pub enum OwnRegistry {
    /// The registry role of this agent.
    Here(crate::registry::Registry),
    /// A registry of this domain somewhere else, by URL.
    At(String),
}

/// The control plane of one agent. Cheap to clone; all clones are the same plane.
#[derive(Clone)]
pub struct ControlPlane {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) tokens: Arc<TokenSource>,
    pub(crate) resolver: Resolver,
    pub(crate) directory: Directory,
    pub(crate) peers: Peers,
    pub(crate) connections: Connections,
    pub(crate) expiries: Expiries,
    pub(crate) monitors: Monitors,
    pub(crate) bypass: Bypass,
    pub(crate) calls: CallMetrics,
    /// Endpoints that registered on this node's socket, by name.
    pub(crate) local_endpoints: Mutex<HashMap<String, LocalEndpoint>>,
    pub(crate) forwarder: Option<Arc<dyn Forwarder>>,
    pub(crate) vnis: Mutex<VniPool>,
    /// VNIs of peers that came in and are no tunnels here.
    pub(crate) foreign: Mutex<Foreign>,
    ip_map: RwLock<Arc<IpMap>>,
    public_urls: RwLock<PublicUrls>,
    /// Whether the IP map has what there is to be known of this node's public address.
    public_address_known: watch::Sender<bool>,
    turn: AtomicU64,
    /// True once every connection has been closed for the agent's end.
    drained: watch::Sender<bool>,
}

/// An endpoint of this node.
#[derive(Debug, Clone)]
pub(crate) struct LocalEndpoint {
    /// Its own URL; the registry holds ours in its place.
    pub(crate) url: String,
    /// Whether it registered as root: only then may it name a network namespace.
    pub(crate) trusted: bool,
    /// The user whose process registered it: nobody else may take its name.
    pub(crate) uid: Option<u32>,
    /// When its registration lapses.
    pub(crate) expires: SystemTime,
    /// Keeps the descriptor of its socket, when it has passed one in the place of a path.
    pub(crate) _socket: Option<Arc<Peer>>,
}

/// How long a Request waits for the public address of an agent that has just started: those who may know it have a second to answer.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(3);

/// Public URLs that are remembered after they have changed: what was registered with them is refreshed, with the new one, within the
/// life of a token; in that time an address hardly changes twice.
const EARLIER_URLS: usize = 4;

/// What other domains have been told to dial.
#[derive(Debug, Default)]
struct PublicUrls {
    now: Option<String>,
    /// The latest last.
    earlier: Vec<String>,
}

impl PublicUrls {
    fn replace(&mut self, url: Option<String>) {
        if self.now == url {
            return;
        }
        self.earlier.retain(|earlier| Some(earlier) != url.as_ref());
        self.earlier.extend(std::mem::replace(&mut self.now, url));
        if self.earlier.len() > EARLIER_URLS {
            self.earlier.remove(0);
        }
    }

    fn has(&self, url: &str) -> bool {
        self.now
            .iter()
            .chain(&self.earlier)
            .any(|known| known == url)
    }
}

impl ControlPlane {
    /// A control plane that serves nobody yet; see [`crate::api::server`] for its listeners.
    pub fn start(
        settings: Settings,
        tokens: Arc<TokenSource>,
        resolver: Resolver,
        registry: OwnRegistry,
        forwarder: Option<Arc<dyn Forwarder>>,
        vnis: VniPool,
    ) -> Self {
        let tokens_of_peers = Arc::clone(&tokens);
        let connections = Connections::with_limit(settings.max_connections);
        let plane = Self {
            shared: Arc::new(Shared {
                directory: Directory::from(registry),
                peers: Peers::connecting_with(
                    tokens_of_peers,
                    settings.dial_timeout,
                    settings.max_message_bytes,
                ),
                monitors: Monitors::of(connections.clone()),
                connections,
                expiries: Expiries::default(),
                bypass: Bypass::default(),
                calls: CallMetrics::default(),
                local_endpoints: Mutex::default(),
                forwarder,
                vnis: Mutex::new(vnis),
                foreign: Mutex::default(),
                ip_map: RwLock::default(),
                public_urls: RwLock::default(),
                turn: AtomicU64::new(0),
                drained: watch::Sender::new(false),
                public_address_known: watch::Sender::new(true),
                settings,
                tokens,
                resolver,
            }),
        };
        tokio::spawn(plane.clone().watch_expiries());
        tokio::spawn(plane.clone().watch_paths());
        plane
    }

    /// Replaces the map between internal and public addresses.
    pub fn set_ip_map(&self, map: IpMap) {
        *self
            .shared
            .ip_map
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
    }

    /// Replaces the URL that other domains are told to dial: behind NAT it is not the one that our own domain dials. None tells them
    /// [`Settings::advertise_url`] too.
    pub fn set_public_url(&self, url: Option<String>) {
        let mut urls = self
            .shared
            .public_urls
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        urls.replace(url);
    }

    /// Says whether this node's public address is known as far as it can be: until then Requests from and to other domains wait a
    /// little, for what they are told is where their tunnels end. It is, unless somebody says otherwise.
    pub fn set_public_address_known(&self, is_known: bool) {
        self.shared.public_address_known.send_replace(is_known);
    }

    /// Returns when the public address is known, or has been waited for long enough.
    pub(crate) async fn public_address_known(&self, deadline: Instant) {
        let mut known = self.shared.public_address_known.subscribe();
        let deadline = deadline.min(Instant::now() + ADDRESS_PATIENCE);
        // Who may know it is asked for longer than that by nobody: then what is known holds.
        let _ = tokio::time::timeout_at(deadline, known.wait_for(|known| *known)).await;
    }

    /// The domain this agent belongs to.
    pub fn domain(&self) -> &Domain {
        &self.shared.settings.domain
    }

    /// The resolver of domains, to reload its configuration.
    pub fn resolver(&self) -> &Resolver {
        &self.shared.resolver
    }

    /// Every established connection, as `status` shows it.
    pub fn connections(&self) -> Vec<ConnectionView> {
        let mut views: Vec<ConnectionView> = self
            .shared
            .connections
            .all()
            .into_iter()
            .map(|established| ConnectionView { established })
            .collect();
        views.sort_by(|a, b| a.id().cmp(b.id()));
        views
    }

    /// What is known of the path of a connection by now: [`ConnectionView::health`] is what its monitors were told last, and how long
    /// a silence lasts is no news to them.
    pub fn health_now(&self, view: &ConnectionView) -> Option<nsm_core::liveness::health::Health> {
        self.health_of(&view.established)
    }

    /// Why a connection is DOWN, as a sentence; none where it is not.
    pub fn down_reason(&self, view: &ConnectionView) -> Option<String> {
        view.established.down_reason(self.health_now(view))
    }

    /// URL and number of connections of every peer that carries some.
    pub fn peers(&self) -> Vec<(String, usize)> {
        let mut peers = self.shared.peers.in_use();
        peers.sort();
        peers
    }

    /// Whether the connection of our segment `id` is established or at work.
    pub fn holds(&self, id: &str) -> bool {
        self.shared.connections.has(id)
    }

    /// URLs of peers that carry connections and whose monitor stream has broken: what they would
    /// tell is not heard until the next Request through them.
    pub fn unmonitored_peers(&self) -> Vec<String> {
        self.shared.peers.unmonitored()
    }

    /// What the registry of this agent holds; none where another one is the domain's.
    pub fn registry_counts(&self) -> Option<crate::registry::Counts> {
        match &self.shared.directory {
            Directory::Here(registry) => Some(registry.counts()),
            Directory::At(_) => None,
        }
    }

    /// Puts what the control plane counts into a metrics registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.shared.calls.register(registry);
        self.shared.resolver.register_metrics(registry);
    }

    /// What is held now, to compare before and after.
    pub fn holdings(&self) -> Holdings {
        Holdings {
            connections: self.shared.connections.len(),
            vnis: lock(&self.shared.vnis).in_use(),
            monitors: self.shared.monitors.len(),
        }
    }

    /// Refuses new connections, then closes all that are left: towards the endpoints, on this
    /// node, and for the monitors. Returns when all is gone or `grace` is over.
    pub async fn drain(&self, grace: Duration) {
        self.shared.connections.drain();
        let deadline = Instant::now() + grace;
        let mut closing = tokio::task::JoinSet::new();
        // Those at work too: a Request that was admitted before is let finish, and closed.
        for id in self.shared.connections.ids() {
            let plane = self.clone();
            closing.spawn(async move { plane.close_drained(&id, deadline).await });
        }
        closing.join_all().await;
        self.shared.monitors.end_all();
        if let Directory::Here(registry) = &self.shared.directory {
            registry.close();
        }
        self.shared.drained.send_replace(true);
    }

    /// A task for the life of the plane: closes what nobody refreshed.
    async fn watch_expiries(self) {
        loop {
            let id = self.shared.expiries.next().await;
            tracing::info!(connection.id = %id, "the previous hop's token has expired: closing");
            let plane = self.clone();
            tokio::spawn(async move {
                let deadline = Instant::now() + plane.shared.settings.request_timeout;
                plane.close_expired(&id, deadline).await;
            });
        }
    }
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("settings", &self.shared.settings)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn ip_map(&self) -> Arc<IpMap> {
        Arc::clone(&self.ip_map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns when the drain has closed all connections: what else is open is to end now.
    pub(crate) fn until_drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut drained = self.drained.subscribe();
        async move {
            let _ = drained.wait_for(|is_drained| *is_drained).await;
        }
    }

    /// What other domains are told to dial.
    pub(crate) fn public_url(&self) -> String {
        let urls = self
            .public_urls
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let url = urls.now.as_ref();
        url.unwrap_or(&self.settings.advertise_url).clone()
    }

    /// Whether the URL is one that we have told others to dial.
    pub(crate) fn is_own_url(&self, url: &str) -> bool {
        url == self.settings.advertise_url
            || self
                .public_urls
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .has(url)
    }

    /// A number that grows with every use, for spreading load.
    pub(crate) fn turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
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
    pub fn connection(&self) -> &nsm_proto::connection::Connection {
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
    pub fn plan(&self) -> Option<&crate::ports::Plan> {
        self.established.plan.as_ref()
    }

    /// The health of the path that its packets take, as it was told last; none where there is no tunnel, or nothing is probed.
    pub fn health(&self) -> Option<&nsm_core::liveness::health::Health> {
        self.established.path.health.as_ref()
    }

    /// The path that is watched for it; none where none is.
    pub fn watched(&self) -> Option<crate::ports::PathId> {
        self.established.path.watched
    }

    /// When it is closed unless it is refreshed.
    pub fn expires(&self) -> SystemTime {
        self.established.expires
    }
}

#[cfg(test)]
mod tests {
    use super::{EARLIER_URLS, PublicUrls};

    #[test]
    fn earlier_public_urls_are_still_ours_for_a_while() {
        let mut urls = PublicUrls::default();
        let url = |number: usize| format!("tcp://192.0.2.{number}:5006");
        for number in 0..=EARLIER_URLS {
            urls.replace(Some(url(number)));
        }
        assert!((0..=EARLIER_URLS).all(|number| urls.has(&url(number))));
        urls.replace(Some(url(EARLIER_URLS)));
        assert!(urls.has(&url(0)), "nothing changed");
        urls.replace(None);
        assert!(!urls.has(&url(0)) && urls.has(&url(EARLIER_URLS)));
        urls.replace(Some(url(1)));
        assert_eq!(
            urls.earlier.len(),
            EARLIER_URLS - 1,
            "one that came back counts once"
        );
    }
}
