//! The next hops of our connections: one HTTP/2 connection and one monitor stream for each URL,
//! whatever the number of NSM connections that go there.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_core::{
    identity::{Process, SpiffeId},
    liveness::PathId,
    net::{PeerPlace, PeerUrl},
};
use nsm_proto::connection::monitor_connection_client::MonitorConnectionClient;
use tokio::{
    sync::{Notify, OnceCell},
    task::AbortHandle,
    time::{Instant, timeout},
};
use tonic::{Code, transport::Channel};

use crate::{
    error::RequestError,
    identity::{gate::Gate, session::Session, token::TokenSource},
    places::Place,
    sync::lock,
    transport::{
        dial::{self, DialError, Link, Rules},
        guard::DialGuard,
        tls::Tls,
        unix::{Descriptors, Passed},
    },
};

/// Peers without connections that are kept for the next Request before the oldest go.
const IDLE_PEERS: usize = 256;

/// The monitor stream from a peer.
#[derive(Debug)]
struct Monitor {
    /// What follows the stream; none before the first connection, and after the stream has ended.
    task: Option<AbortHandle>,
    /// When the stream began or ended.
    since: Instant,
}

impl Monitor {
    fn is_running(&self) -> bool {
        self.task.as_ref().is_some_and(|task| !task.is_finished())
    }

    fn set(&mut self, task: Option<AbortHandle>) {
        *self = Self {
            task,
            since: Instant::now(),
        };
    }
}

/// What came of the last calls to a peer.
#[derive(Debug, Default)]
struct PeerState {
    unreached: AtomicBool,
    doubtful: AtomicBool,
}

impl PeerState {
    /// Whether the last try to connect failed.
    fn is_unreached(&self) -> bool {
        self.unreached.load(Ordering::Relaxed)
    }

    fn set_unreached(&self, is_unreached: bool) {
        self.unreached.store(is_unreached, Ordering::Relaxed);
    }

    /// Whether the channel may be broken: its next error may be an old one.
    fn is_doubtful(&self) -> bool {
        self.doubtful.load(Ordering::Relaxed)
    }

    fn set_doubtful(&self, is_doubtful: bool) {
        self.doubtful.store(is_doubtful, Ordering::Relaxed);
    }
}

/// A peer that carries connections, for showing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerView {
    /// Its URL.
    pub url: String,
    /// Connections through it.
    pub connections: usize,
    /// Whether its monitor stream is open. Where it is lost, no report of the connections comes until the next Request through it.
    pub is_monitored: bool,
    /// Since when the stream is open or lost.
    pub since: Instant,
    /// Who it is by the certificate that it has shown last; none in plain text.
    pub spiffe_id: Option<SpiffeId>,
}

/// A next hop.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) url: PeerUrl,
    /// The socket behind an `inode://` URL. As long as it is held no other file has its inode.
    socket: Option<PassedSocket>,
    /// What the peer passes beside its answers, and what we pass it.
    pub(crate) descriptors: Arc<Descriptors>,
    /// Another one after a failure: a channel may answer with the error of an earlier try to connect. Another one also before the
    /// certificates of a TLS connection end.
    link: Mutex<Arc<OnceCell<Link>>>,
    /// What came of the last calls.
    state: PeerState,
    users: Mutex<HashSet<String>>,
    monitor: Mutex<Monitor>,
    /// Notified when the last connection has left.
    emptied: Notify,
    /// What is watched of where tunnels to it went last.
    tunnel: Mutex<Option<PathId>>,
    pub(super) max_message_bytes: usize,
    guard: Arc<DialGuard>,
    tls: Option<Arc<Tls>>,
}

impl Peer {
    /// The link, dialled by the first caller. A caller that waits for another's attempt waits no
    /// longer than for its own, so that callers of a dead peer do not queue up behind each other.
    async fn link(&self, dial_timeout: Duration, budget: Duration) -> Result<Link, RequestError> {
        let place = self.place();
        // Boxed: dialling is rare, and its state would make every call's future larger.
        let dialling = place.get_or_try_init(|| Box::pin(self.dial(dial_timeout)));
        let dialled = match timeout(budget, dialling).await {
            Ok(dialled) => dialled.cloned(),
            Err(_) => Err(DialError::Timeout {
                url: self.url.clone(),
                timeout: budget,
            }),
        };
        self.state.set_unreached(dialled.is_err());
        Ok(dialled?)
    }

    /// Where the link is, or the next one will be.
    fn place(&self) -> Arc<OnceCell<Link>> {
        let mut place = lock(&self.link);
        if place
            .get()
            .is_some_and(|link| link.is_spent(SystemTime::now()))
        {
            *place = Arc::default();
        }
        Arc::clone(&place)
    }

    /// What both have shown each other last; none in plain text.
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        lock(&self.link).get()?.session()
    }

    /// Whether there is a channel, which was good when it was used last.
    pub(super) fn is_reached(&self) -> bool {
        lock(&self.link).initialized() && !self.state.is_unreached()
    }

    /// Whether the last try to connect failed.
    pub(crate) fn is_unreached(&self) -> bool {
        self.state.is_unreached()
    }

    /// Takes note of what came of a call.
    pub(crate) fn note<T>(&self, outcome: &Result<T, RequestError>) {
        let is_unreached = matches!(outcome, Err(RequestError::Dial(_)));
        if is_unreached {
            *lock(&self.link) = Arc::default();
        }
        self.state.set_unreached(is_unreached);
        let is_doubtful = matches!(outcome, Err(error) if error.code() == Code::Unavailable)
            || matches!(outcome, Err(RequestError::Silent { .. }));
        self.state.set_doubtful(is_doubtful);
    }

    /// Whether the last call may have been answered with the error of an earlier try to connect.
    pub(super) fn is_doubtful(&self) -> bool {
        self.state.is_doubtful()
    }

    async fn dial(&self, dial_timeout: Duration) -> Result<Link, DialError> {
        let guard = Some(&self.guard).filter(|guard| !guard.is_configured(&self.url));
        let rules = Rules {
            tls: self.tls.clone(),
            guard: guard.cloned(),
            is_once: true,
        };
        match &self.socket {
            Some(socket) => {
                let dialed = dial::dial_passed(
                    rules,
                    &socket.socket,
                    socket.registrant,
                    &self.url,
                    &self.descriptors,
                    dial_timeout,
                );
                dialed.await
            }
            None => dial::dial_by(rules, &self.url, &self.descriptors, dial_timeout).await,
        }
    }

    /// Whether a process may register the socket that was passed for this peer; none is one that may connect anywhere.
    pub(crate) fn is_open_to(&self, process: Option<&Process>) -> bool {
        let socket = self.socket.as_ref();
        socket.is_some_and(|socket| socket.is_open_to(process))
    }

    /// Whether it is an endpoint of this node.
    pub(crate) fn is_local(&self) -> bool {
        self.url.is_local()
    }

    /// Tunnels to it take this path.
    pub(crate) fn set_tunnel(&self, path: Option<PathId>) {
        *lock(&self.tunnel) = path;
    }

    /// Which path they took last, if that is watched.
    pub(crate) fn tunnel(&self) -> Option<PathId> {
        *lock(&self.tunnel)
    }

    /// How many of our connections go through this peer.
    pub(crate) fn user_count(&self) -> usize {
        lock(&self.users).len()
    }

    /// Counts a connection in, and starts the monitor with the first one or when it has ended.
    pub(crate) fn join(&self, id: &str, start_monitor: impl FnOnce() -> AbortHandle) {
        let mut users = lock(&self.users);
        users.insert(id.to_owned());
        let mut monitor = lock(&self.monitor);
        if !monitor.is_running() {
            monitor.set(Some(start_monitor()));
        }
    }

    /// The monitor stream has broken. Returns the connections that it watched over; the next one that joins starts another stream.
    pub(crate) fn monitor_ended(&self) -> Vec<String> {
        self.state.set_doubtful(true);
        let users = lock(&self.users);
        lock(&self.monitor).set(None);
        users.iter().cloned().collect()
    }

    /// Whether a monitor watches over the connections.
    pub(crate) fn is_monitored(&self) -> bool {
        lock(&self.monitor).is_running()
    }

    /// Counts a connection out. The monitor ends some time after the last one.
    pub(crate) fn leave(&self, id: &str) {
        let mut users = lock(&self.users);
        users.remove(id);
        if users.is_empty() {
            self.emptied.notify_one();
        }
    }

    /// Returns when the last connection has left.
    pub(crate) async fn emptied(&self) {
        self.emptied.notified().await;
    }

    /// Whether the monitor watches over no connection; it must end then, and the next connection starts another.
    pub(crate) fn end_idle_monitor(&self) -> bool {
        let users = lock(&self.users);
        if users.is_empty() {
            lock(&self.monitor).set(None);
        }
        users.is_empty()
    }
}

/// A socket whose descriptor was passed.
#[derive(Debug)]
pub(crate) struct PassedSocket {
    pub(crate) socket: Passed,
    /// Who passed it, and alone may listen there; none where that is who may connect anywhere.
    pub(crate) registrant: Option<Process>,
    /// The open files that it costs, of those of who passed it; none of our own NSMgr's.
    pub(crate) _place: Option<Place>,
}

impl PassedSocket {
    /// Whether `other` may register the socket too.
    fn is_open_to(&self, other: Option<&Process>) -> bool {
        match (&self.registrant, other) {
            (Some(registrant), Some(other)) => registrant.is_fellow_of(other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
}

/// Every peer of this agent.
#[derive(Debug)]
pub(crate) struct Peers {
    peers: Mutex<HashMap<PeerUrl, Arc<Peer>>>,
    /// Those whose socket was passed: as long as they are registered or carry connections.
    passed: Mutex<HashMap<PeerUrl, Weak<Peer>>>,
    dial_timeout: Duration,
    max_message_bytes: usize,
    pub(super) tokens: Arc<TokenSource>,
    pub(super) gate: Option<Arc<Gate>>,
    guard: Arc<DialGuard>,
    tls: Option<Arc<Tls>>,
}

impl Peers {
    /// No peers yet.
    pub(crate) fn connecting_with(
        tokens: Arc<TokenSource>,
        dial_timeout: Duration,
        max_message_bytes: usize,
    ) -> Self {
        Self {
            peers: Mutex::default(),
            passed: Mutex::default(),
            dial_timeout,
            max_message_bytes,
            tokens,
            gate: None,
            guard: Arc::default(),
            tls: None,
        }
    }

    /// Asks `gate` about servers that show certificates.
    pub(crate) fn gated_by(mut self, gate: Arc<Gate>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// Speaks TLS with every peer; plain text without.
    pub(crate) fn secured_by(mut self, tls: Option<Arc<Tls>>) -> Self {
        self.tls = tls;
        self
    }

    /// Dials only what this guard admits.
    pub(crate) fn guarded_by(mut self, guard: DialGuard) -> Self {
        self.guard = Arc::new(guard);
        self
    }

    /// What decides on the addresses that are dialled.
    pub(crate) fn guard(&self) -> &DialGuard {
        &self.guard
    }

    /// The peer behind `url`.
    pub(crate) fn get(&self, url: &PeerUrl) -> Arc<Peer> {
        if matches!(url.place(), PeerPlace::Passed { .. }) {
            // One that is gone cannot be dialled: the dial is what fails.
            return self
                .known_passed(url)
                .unwrap_or_else(|| self.fresh(url, None));
        }
        let mut peers = lock(&self.peers);
        if peers.len() >= IDLE_PEERS && !peers.contains_key(url) {
            peers.retain(|_, peer| Arc::strong_count(peer) > 1 || peer.user_count() > 0);
        }
        let peer = peers
            .entry(url.clone())
            .or_insert_with(|| self.fresh(url, None));
        Arc::clone(peer)
    }

    /// The peer behind `url`, where there is one already.
    pub(super) fn known(&self, url: &PeerUrl) -> Option<Arc<Peer>> {
        lock(&self.peers).get(url).cloned()
    }

    /// The peer whose socket was passed under the name `url` before, if it is still held.
    pub(crate) fn known_passed(&self, url: &PeerUrl) -> Option<Arc<Peer>> {
        lock(&self.passed).get(url).and_then(Weak::upgrade)
    }

    /// The peer whose socket was passed under the name `url`: there as long as the caller holds it.
    pub(crate) fn get_passed(&self, url: &PeerUrl, socket: PassedSocket) -> Arc<Peer> {
        let mut passed = lock(&self.passed);
        if let Some(known) = passed.get(url).and_then(Weak::upgrade) {
            return known;
        }
        passed.retain(|_, peer| peer.strong_count() > 0);
        let peer = self.fresh(url, Some(socket));
        passed.insert(url.clone(), Arc::downgrade(&peer));
        peer
    }

    fn fresh(&self, url: &PeerUrl, socket: Option<PassedSocket>) -> Arc<Peer> {
        Arc::new(Peer {
            url: url.clone(),
            socket,
            descriptors: Arc::default(),
            link: Mutex::default(),
            state: PeerState::default(),
            users: Mutex::default(),
            monitor: Mutex::new(Monitor {
                task: None,
                since: Instant::now(),
            }),
            emptied: Notify::new(),
            tunnel: Mutex::default(),
            max_message_bytes: self.max_message_bytes,
            guard: Arc::clone(&self.guard),
            tls: self.tls.clone(),
        })
    }

    /// Every peer that carries connections.
    pub(crate) fn in_use(&self) -> Vec<PeerView> {
        let all = self.all().into_iter();
        let views = all.map(|peer| {
            let connections = peer.user_count();
            let monitor = lock(&peer.monitor);
            PeerView {
                url: peer.url.to_string(),
                connections,
                is_monitored: monitor.is_running(),
                since: monitor.since,
                spiffe_id: peer.session().map(|session| session.peer().clone()),
            }
        });
        views.filter(|view| view.connections > 0).collect()
    }

    fn all(&self) -> Vec<Arc<Peer>> {
        let mut all: Vec<_> = lock(&self.peers).values().cloned().collect();
        all.extend(lock(&self.passed).values().filter_map(Weak::upgrade));
        all
    }

    pub(super) async fn link_to(
        &self,
        peer: &Peer,
        deadline: Instant,
    ) -> Result<Link, RequestError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let budget = self.dial_timeout.min(left);
        peer.link(self.dial_timeout, budget).await
    }

    /// A monitor client of the peer, and the link that it uses.
    pub(crate) async fn monitor(
        &self,
        peer: &Peer,
    ) -> Result<(MonitorConnectionClient<Channel>, Link), RequestError> {
        let link = peer.link(self.dial_timeout, self.dial_timeout).await?;
        let client = MonitorConnectionClient::new(link.channel.clone());
        let client = client.max_decoding_message_size(peer.max_message_bytes);
        Ok((client, link))
    }
}
