//! Connections and the paths that their packets take: proof before commit, and what becomes of a connection when its path does.
//!
//! The node's [`Prober`] keeps one session a peer. Each connection that has a tunnel joins one, and a change of the path is published
//! to the monitors of every connection that takes it. `connection::model` says what decides a connection's state.

mod downstream;
mod foreign;
mod mtu;
mod path;
mod peer;
mod policy;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use nsm_core::liveness::{ForeignVnis, Health, PathEvent, PathId, Published, Reason, Reflector};
use nsm_proto::connection::ConnectionEventType;
use tokio::time::Instant;

pub(crate) use self::downstream::TakeContext;
use self::foreign::Foreign;
pub(crate) use self::path::JoinedPath;
pub use self::policy::{Reachability, ReachabilityError};
use crate::{
    connection::{
        Held,
        model::{Established, below},
        store::News,
    },
    ports::{Forwarder, PeerSpec, Prober},
    sync::lock,
};

/// Connections whose news are published together: the first need not wait for thousands of others.
const TOGETHER: usize = 64;

/// What is fixed for the life of the agent.
#[derive(Debug)]
pub(crate) struct LivenessConfig {
    pub(crate) policy: Reachability,
    /// The name of our path segments.
    pub(crate) own_name: String,
    /// How long an event may wait for the Request or Close that is at work on its connection.
    pub(crate) patience: Duration,
}

/// The paths of this agent's connections.
pub(crate) struct Liveness {
    config: LivenessConfig,
    forwarder: Option<Arc<dyn Forwarder>>,
    held: Held,
    /// VNIs that peers send with and that have no tunnel here.
    foreign: Mutex<Foreign>,
}

impl Liveness {
    /// Nothing is followed until [`Self::watch_paths`] runs.
    pub(crate) fn new(
        config: LivenessConfig,
        forwarder: Option<Arc<dyn Forwarder>>,
        held: Held,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            forwarder,
            held,
            foreign: Mutex::default(),
        })
    }

    /// What a Request does about a path that cannot be proved.
    pub(crate) fn policy(&self) -> Reachability {
        self.config.policy
    }

    /// What proves paths, unless that is switched off.
    fn prober(&self) -> Option<&dyn Prober> {
        match self.config.policy {
            Reachability::Off => None,
            Reachability::Require | Reachability::Prefer => self.forwarder.as_deref()?.prober(),
        }
    }

    /// Our own reflector, for a peer.
    pub(crate) fn reflector(&self) -> Option<Reflector> {
        self.prober().map(Prober::reflector)
    }

    /// The health of a path that a connection has joined.
    pub(crate) fn health(&self, path: &PathId) -> Option<Health> {
        self.prober()?.health(path)
    }

    /// What a path is known to carry, 0 when it is not known.
    pub(crate) fn path_mtu(&self, watched: Option<&PathId>) -> u32 {
        let health = watched.and_then(|path| self.health(path));
        let known = health.and_then(|health| health.path_mtu);
        known.map_or(0, u32::from)
    }

    /// Brings the view of a connection that is about to be committed up to date with what is known of its path.
    pub(crate) fn settle(&self, established: &mut Established) {
        self.report_evidence(established, below(&established.view));
        let Some((remote, _)) = established.remote() else {
            established.settle(&ForeignVnis::default());
            return;
        };
        let foreign = {
            let mut foreign = lock(&self.foreign);
            if let Some(vni) = established.vni() {
                foreign.forget(remote, vni);
            }
            foreign.of(remote)
        };
        established.settle(&foreign);
    }

    /// The health of a connection's path now, by the session and by the reports of the hops behind us.
    pub(crate) fn health_of(&self, established: &Established) -> Option<Health> {
        let stored = established.path.health;
        let Some(((remote, port), prober)) = established.remote().zip(self.prober()) else {
            return stored;
        };
        let watched = established.path.watched;
        let known = watched.and_then(|watched| prober.health(&watched));
        if let Some(vni) = established.vni()
            && below(&established.view)
                .iter()
                .any(|hop| Published::read(&hop.metrics).foreign.contains(vni))
        {
            let unknown = Health::unverified(remote, port, Reason::NoReflector);
            return Some(known.or(stored).unwrap_or(unknown).without_tunnel(vni));
        }
        let is_over = |stale: Health| matches!(stale.outward.reason, Reason::ForeignVni { .. });
        if known.is_none() && stored.is_some_and(is_over) {
            return Some(Health::unverified(remote, port, Reason::NoReflector));
        }
        known.or(stored)
    }

    /// The connection with the health of its path now; `None` when that changes nothing that is published.
    fn with_health(&self, established: &Established) -> Option<Established> {
        let (remote, _) = established.remote()?;
        self.prober()?;
        let mut changed = established.clone();
        changed.path.health = self.health_of(established);
        changed.settle(&lock(&self.foreign).of(remote));
        (!changed.publishes_same(established)).then_some(changed)
    }

    /// Follows the node's prober, for the life of the agent; returns at once when there is none. Where a prober starts later, this is
    /// called then: the connections that were made before join it.
    pub(crate) async fn watch_paths(self: Arc<Self>) {
        let Some(prober) = self.prober() else {
            return;
        };
        for established in self.held.connections.all() {
            if established.path.watched.is_none() && established.path.watchable.is_some() {
                tokio::spawn(Arc::clone(&self).join_late(established.view.id.clone()));
            }
        }
        loop {
            match prober.next_event().await {
                PathEvent::Changed { path, health } => self.on_health(path, health),
                PathEvent::ForeignVni { peer, vni } => self.on_foreign_vni(peer, vni),
            }
        }
    }

    /// Has the path of a connection watched that was made while this node did not probe. The peer has our reflector from the next Request
    /// on; its own answers us already.
    async fn join_late(self: Arc<Self>, id: String) {
        let patience = Instant::now() + self.config.patience;
        let turn = match self.held.connections.admit_known(&id, patience).await {
            Ok(Some(turn)) => turn,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(connection.id = %id, %error, "its path is watched from its next refresh on");
                return;
            }
        };
        let (Some(current), Some(prober)) = (turn.current(), self.prober()) else {
            return;
        };
        let (None, Some(path)) = (current.path.watched, current.path.watchable) else {
            return;
        };
        let mtu = current.path.agreed_mtu;
        if let Err(error) = prober.join(&id, &PeerSpec { path, mtu }).await {
            tracing::warn!(connection.id = %id, %error, "a path is not watched");
            return;
        }
        let mut changed = (*current).clone();
        changed.path.watched = Some(path);
        changed.path.health = None;
        let changed = self.with_health(&changed).unwrap_or(changed);
        let changed = Arc::new(changed);
        turn.set(Some(Arc::clone(&changed)));
        drop(turn);
        self.held
            .monitors
            .publish(ConnectionEventType::Update, &changed);
        self.follow_mtu(&changed);
    }

    fn on_health(self: &Arc<Self>, path: PathId, health: Health) {
        let concerned = self.held.connections.on_path(path);
        let was_down = concerned.iter().any(|it| it.path_is_down());
        match (was_down, health.is_down()) {
            (_, true) => tracing::warn!(peer.ip = %health.peer, "{health}"),
            (true, false) => tracing::info!(peer.ip = %health.peer, "{health}"),
            (false, false) => tracing::debug!(peer.ip = %health.peer, "{health}"),
        }
        self.publish_path(&concerned);
        if health.path_mtu.is_some() {
            for established in &concerned {
                self.follow_mtu(established);
            }
        }
    }

    /// Checks the path of a connection that was committed a moment ago: a change between its proof and the commit was published for
    /// the connections of that time only.
    pub(crate) fn catch_up(self: &Arc<Self>, established: &Arc<Established>) {
        if established.remote().is_none() {
            return;
        }
        self.follow_mtu(established);
        if self.health_of(established) != established.path.health {
            let news = (established.view.id.clone(), News::Path);
            self.apply_all(std::iter::once(news));
        }
    }

    /// Publishes what is new of their path, for connections that it concerns.
    fn publish_path(self: &Arc<Self>, concerned: &[Arc<Established>]) {
        let news = concerned.iter().map(|it| (it.view.id.clone(), News::Path));
        self.apply_all(news);
    }

    /// Changes the views of connections and publishes what is new, of many together.
    fn apply_all(self: &Arc<Self>, news: impl Iterator<Item = (String, News)>) {
        let mut news = news.peekable();
        while news.peek().is_some() {
            self.apply_together(news.by_ref().take(TOGETHER));
        }
    }

    /// Does so at once, except for connections at work, which follow in their turn.
    fn apply_together(self: &Arc<Self>, news: impl Iterator<Item = (String, News)>) {
        let together = Arc::new(Mutex::new(Some(Vec::new())));
        for (id, news) in news {
            let monitors = self.held.monitors.clone();
            let together = Arc::clone(&together);
            self.apply(&id, news, move |changed| match lock(&together).as_mut() {
                Some(all) => all.push(changed.view.id.clone()),
                None => monitors.publish(ConnectionEventType::Update, changed),
            });
        }
        let changed = lock(&together).take().unwrap_or_default();
        self.held.monitors.publish_all(&changed);
    }

    /// Changes the view of a connection, and calls `publish` where that is something new. It happens in the connection's turn, so that
    /// the last report holds: peers publish each Request that succeeds too, so their last report is true whatever our state was
    /// meanwhile. The path is checked each time: [`News::Path`] may have been dropped while a report waited.
    fn apply(
        self: &Arc<Self>,
        id: &str,
        news: News,
        publish: impl FnOnce(&Established) + Send + 'static,
    ) {
        let liveness = Arc::clone(self);
        let patience = self.config.patience;
        self.held
            .connections
            .on_event(id, patience, news, move |turn, news| {
                let Some(current) = turn.current() else {
                    return;
                };
                let changed = match news {
                    News::Reported(change) | News::Gone(change) | News::StreamLost(change) => {
                        change(&current)
                    }
                    News::Path => None,
                };
                let settled = liveness.with_health(changed.as_ref().unwrap_or(&current));
                if let Some(changed) = settled.or(changed) {
                    let changed = Arc::new(changed);
                    turn.set(Some(Arc::clone(&changed)));
                    publish(&changed);
                }
            });
    }
}
