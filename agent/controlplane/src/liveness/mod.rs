//! Connections and the paths that their packets take: proof before commit, and what becomes of a connection when its path does.
//!
//! The node's [`Prober`] keeps one session a peer. Here each connection that has a tunnel joins it, so that a change of the path
//! is told to the monitors of every connection that goes there: state DOWN or UP, with the health in our own path segment's
//! metrics. Three things decide a connection's state, and any of them that is bad makes it DOWN: the path, the peer's word that it
//! has no such VNI, and what the next hop tells.
//!
//! A next hop that is not heard any more makes it DOWN too, and is told beside the path's health: whoever asked may then keep the
//! tunnel, whose packets pass without the agents.
//!
//! A connection that was granted although its path was known to be down (`prefer`) is UP until the path has been up once: whoever
//! asked has been told in the metrics, and would only ask again for what there is.

mod foreign;
mod mtu;
mod told;

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use nsm_core::liveness::health::{ForeignVnis, Health, LostHop, Published, Reason, Verdict};
use nsm_proto::connection::{Connection, PathSegment, State};

use crate::{
    connection::store::{Established, News, lock},
    error::RequestError,
    plane::ControlPlane,
    ports::{PathEvent, PathId, PeerSpec, Plan, Prober, Reflector},
    route::router::Route,
};

pub(crate) use self::foreign::Foreign;

/// Whether a path must be proved before a connection is granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reachability {
    /// A Request whose path cannot be proved is refused, with the evidence.
    Require,
    /// An endpoint whose path is proved comes first; without one the connection is granted, and its health says what is known.
    #[default]
    Prefer,
    /// No probes are sent and no peer's are answered.
    Off,
}

impl Reachability {
    /// As it is configured.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::Prefer => "prefer",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Reachability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no reachability policy: write require, prefer or off")]
pub struct ReachabilityError(pub String);

impl FromStr for Reachability {
    type Err = ReachabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Require, Self::Prefer, Self::Off]
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| ReachabilityError(text.to_owned()))
    }
}

/// What is known of the way that a connection's packets take.
#[derive(Debug, Clone)]
pub(crate) struct PathState {
    /// What is watched for it; none where nothing is, or cannot be.
    pub(crate) watched: Option<PathId>,
    /// The health of the path to the other end of its tunnel; none where there is no tunnel, or nothing is probed.
    pub(crate) health: Option<Health>,
    /// What the next hop tells.
    pub(crate) told: State,
    /// The next hop is not heard any more, and does not tell anything.
    pub(crate) lost_hop: Option<LostHop>,
    /// It was granted although the path was down.
    pub(crate) granted_down: bool,
    /// The MTU that both sides agreed on, whatever the path carries.
    pub(crate) agreed_mtu: u32,
}

impl Default for PathState {
    fn default() -> Self {
        Self {
            watched: None,
            health: None,
            told: State::Up,
            lost_hop: None,
            granted_down: false,
            agreed_mtu: 0,
        }
    }
}

/// A path that a Request joins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JoinedPath {
    /// The other end of the tunnel.
    pub(crate) remote: IpAddr,
    /// The UDP port of its tunnels.
    pub(crate) port: u16,
    /// What is watched: none where nothing is.
    pub(crate) watched: Option<PathId>,
    /// What is known without a session: that there can be none.
    pub(crate) unverified: Option<Health>,
    /// Whether it is a way that the connection did not have before.
    pub(crate) is_new: bool,
    /// Whether the connection watched another path before, or none: the peer there may have another reflector now.
    pub(crate) is_joined_anew: bool,
}

impl Established {
    /// The other end of the tunnel.
    pub(crate) fn remote(&self) -> Option<(IpAddr, u16)> {
        match self.plan.as_ref()? {
            Plan::Vxlan { spec, .. } => Some((spec.remote, spec.port)),
            Plan::Veth { .. } => None,
        }
    }

    /// Whether packets are known not to pass.
    pub(crate) fn path_is_down(&self) -> bool {
        self.path.health.is_some_and(|health| health.is_down())
    }

    /// Whether the path is lost by our own word or that of a hop behind us, which may notice it first.
    pub(crate) fn path_is_told_down(&self) -> bool {
        let told = |hop: &PathSegment| Published::read(&hop.metrics).is_down();
        self.path_is_down() || below(&self.view).iter().any(told)
    }

    /// Whether its packets may still pass although it is DOWN, or it stands in case they do again: the path is lost, or an agent on
    /// the way is. Its tunnel stays until another stands.
    pub(crate) fn is_left_standing(&self) -> bool {
        let told = |hop: &PathSegment| LostHop::read(&hop.metrics).is_some();
        self.path_is_told_down()
            || self.path.lost_hop.is_some()
            || below(&self.view).iter().any(told)
    }

    /// Says in our own segment's metrics that the next hop is lost, or heard again.
    pub(crate) fn set_lost_hop(&mut self, lost: Option<LostHop>) {
        self.path.lost_hop = lost;
        if let Some(own) = own_segment_mut(&mut self.view) {
            LostHop::write(self.path.lost_hop.as_ref(), &mut own.metrics);
        }
    }

    /// Why it is DOWN, as a sentence, its path being known to be so now; none where it is not DOWN.
    pub(crate) fn down_reason(&self, path: Option<Health>) -> Option<String> {
        if self.view.state() != State::Down {
            return None;
        }
        if let Some(health) = path.filter(Health::is_down) {
            return Some(health.to_string());
        }
        if let Some(lost) = &self.path.lost_hop {
            let path = match path.map(|health| health.verdict()) {
                Some(Verdict::Up) => "the path is good",
                _ => "of the path nothing is known",
            };
            return Some(format!("{}; {path}", lost.reason));
        }
        let told = below(&self.view).iter().find_map(|hop| {
            let down = Some(Published::read(&hop.metrics)).filter(Published::is_down);
            let lost = || Some(LostHop::read(&hop.metrics)?.reason.to_string());
            Some((&hop.name, down.and_then(|it| it.reason).or_else(lost)?))
        });
        Some(match told {
            Some((name, reason)) => format!("{name} says: {reason}"),
            None => format!("{} says so, or has it no more", self.route.url),
        })
    }

    /// Makes the view say what is known: the state, and the metrics of our own segment.
    pub(crate) fn settle(&mut self, foreign: &ForeignVnis) {
        let is_down = self.path_is_down();
        self.path.granted_down &= is_down;
        let state = if is_down && !self.path.granted_down {
            State::Down
        } else {
            self.path.told
        };
        self.view.set_state(state);
        if let Some(own) = own_segment_mut(&mut self.view) {
            Published::write(self.path.health.as_ref(), foreign, &mut own.metrics);
            LostHop::write(self.path.lost_hop.as_ref(), &mut own.metrics);
        }
    }
}

fn own_segment(view: &Connection) -> Option<&PathSegment> {
    let path = view.path.as_ref()?;
    path.path_segments.get(path.index as usize)
}

fn own_segment_mut(view: &mut Connection) -> Option<&mut PathSegment> {
    let path = view.path.as_mut()?;
    path.path_segments.get_mut(path.index as usize)
}

/// The hops behind ours.
pub(crate) fn below(view: &Connection) -> &[PathSegment] {
    view.path
        .as_ref()
        .and_then(|path| path.path_segments.get(path.index as usize + 1..))
        .unwrap_or_default()
}

impl ControlPlane {
    /// What proves paths, unless that is switched off.
    pub(crate) fn prober(&self) -> Option<&dyn Prober> {
        match self.shared.settings.reachability {
            Reachability::Off => None,
            Reachability::Require | Reachability::Prefer => {
                self.shared.forwarder.as_deref()?.prober()
            }
        }
    }

    /// Our own reflector, for a peer.
    pub(crate) fn reflector(&self) -> Option<Reflector> {
        self.prober().map(Prober::reflector)
    }

    /// Joins the session with the other end of connection `id`'s tunnel, `peer` being what it told of itself.
    pub(crate) async fn join_path(
        &self,
        id: &str,
        (remote, port): (IpAddr, u16),
        reflector: Option<Reflector>,
        mtu: u32,
        prior: Option<&Established>,
    ) -> JoinedPath {
        let unverified = |reason| Some(Health::unverified(remote, port, reason));
        let path = reflector.map(|reflector| PathId {
            address: remote,
            port,
            reflector,
        });
        let unverified = match (self.prober(), path) {
            (None, _) => match self.shared.settings.reachability {
                Reachability::Require => unverified(Reason::NotProbing),
                Reachability::Prefer | Reachability::Off => None,
            },
            (Some(_), None) => unverified(Reason::NoReflector),
            (Some(prober), Some(path)) => {
                let peer = PeerSpec { path, mtu };
                match prober.join(id, &peer).await {
                    Ok(()) => None,
                    Err(error) => {
                        tracing::warn!(connection.id = %id, peer.ip = %remote, %error, "a path is not watched");
                        unverified(Reason::NotProbing)
                    }
                }
            }
        };
        let before = prior.and_then(|prior| prior.path.watched);
        let watched = path.filter(|_| self.prober().is_some() && unverified.is_none());
        JoinedPath {
            remote,
            port,
            watched,
            unverified,
            is_new: prior.and_then(Established::remote).map(|(ip, _)| ip) != Some(remote)
                || before.is_some_and(|before| before.port != port),
            is_joined_anew: before != watched,
        }
    }

    /// A Request has failed: it needs the path no more, unless the connection had it before.
    pub(crate) fn leave_path(&self, id: &str, path: &JoinedPath) {
        if path.is_joined_anew {
            self.unwatch(id, path.watched.as_ref());
        }
    }

    fn unwatch(&self, id: &str, watched: Option<&PathId>) {
        if let (Some(prober), Some(path)) = (self.prober(), watched) {
            prober.leave(id, path);
        }
    }

    /// A connection goes on as `established`, and needs what it had before no more.
    pub(crate) fn exchange_path(&self, id: &str, prior: &Established, established: &Established) {
        if prior.path.watched != established.path.watched {
            self.unwatch(id, prior.path.watched.as_ref());
        }
        if prior.remote().map(|(ip, _)| ip) != established.remote().map(|(ip, _)| ip) {
            self.forget_foreign_of(id, prior);
        }
    }

    /// A connection, or its old tunnel, is gone.
    pub(crate) fn leave_path_of(&self, id: &str, established: &Established) {
        self.unwatch(id, established.path.watched.as_ref());
        self.forget_foreign_of(id, established);
    }

    fn forget_foreign_of(&self, id: &str, established: &Established) {
        let Some((remote, _)) = established.remote() else {
            return;
        };
        if lock(&self.shared.foreign).has(remote)
            && self.connections_to(remote).all(|it| it.view.id == id)
        {
            lock(&self.shared.foreign).forget_peer(remote);
        }
    }

    /// Proves a path before the connection is granted.
    ///
    /// # Errors
    /// It could not be proved, and that is required (`strict`: by the policy, or since another endpoint may do better).
    pub(crate) async fn prove_path(
        &self,
        route: &Route,
        path: &JoinedPath,
        strict: bool,
    ) -> Result<(), RequestError> {
        let proved = match (path.watched, self.prober()) {
            // No answer is no proof: the session went, or the prober did.
            (Some(watched), Some(prober)) => Some(prober.prove(&watched).await.unwrap_or(
                Health::unverified(path.remote, path.port, Reason::NotProbing),
            )),
            // Nobody asks for a proof where nobody could give one.
            _ => path.unverified,
        };
        let verdict = proved.map_or(Verdict::Up, |health| health.verdict());
        let is_good = match self.shared.settings.reachability {
            Reachability::Require => verdict == Verdict::Up,
            // A peer that offers no proof is as good as another.
            _ => matches!(verdict, Verdict::Up | Verdict::Unverified),
        };
        match proved {
            Some(health) if !is_good && strict => Err(RequestError::Unproven {
                url: route.url.clone(),
                evidence: health.to_string(),
            }),
            Some(health) if !is_good => {
                tracing::warn!(peer.url = %route.url, %health, "granted although the path is not proved");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What is known of a joined path now. `refreshed`: the connection goes on as it was, and its monitors have been told.
    pub(crate) fn path_state(
        &self,
        joined: Option<&JoinedPath>,
        agreed_mtu: u32,
        refreshed: Option<&Established>,
    ) -> PathState {
        let health = joined.and_then(|path| {
            let known = path
                .watched
                .and_then(|watched| self.prober()?.health(&watched));
            known.or(path.unverified)
        });
        let is_down = health.is_some_and(|health| health.is_down());
        let was_granted_so = match (joined, refreshed) {
            (Some(path), Some(prior)) if !path.is_new => prior.path.granted_down,
            _ => true,
        };
        PathState {
            watched: joined.and_then(|path| path.watched),
            health,
            told: State::Up,
            lost_hop: None,
            granted_down: is_down && was_granted_so,
            agreed_mtu,
        }
    }

    /// Makes a connection that is about to be committed say what is known of its path.
    pub(crate) fn settle(&self, established: &mut Established) {
        self.hear_peer(established, below(&established.view));
        let Some((remote, _)) = established.remote() else {
            established.settle(&ForeignVnis::default());
            return;
        };
        let foreign = {
            let mut foreign = lock(&self.shared.foreign);
            if let Some(vni) = established.vni {
                foreign.forget(remote, vni);
            }
            foreign.of(remote)
        };
        established.settle(&foreign);
    }

    /// What is known of a connection's path now, by the session and by the word of the hops behind us.
    pub(crate) fn health_of(&self, established: &Established) -> Option<Health> {
        let stored = established.path.health;
        let Some(((remote, port), prober)) = established.remote().zip(self.prober()) else {
            return stored;
        };
        let watched = established.path.watched;
        let known = watched.and_then(|watched| prober.health(&watched));
        if let Some(vni) = established.vni
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

    /// The connection with what is known of its path now; `None` when that is nothing new. Another kind of reason is: it may name
    /// the firewall that is to blame.
    pub(crate) fn with_health(&self, established: &Established) -> Option<Established> {
        let (remote, _) = established.remote()?;
        self.prober()?;
        let mut changed = established.clone();
        changed.path.health = self.health_of(established);
        changed.settle(&lock(&self.shared.foreign).of(remote));
        let is_news = changed.view.state() != established.view.state()
            || !same_health(&changed.view, &established.view);
        is_news.then_some(changed)
    }

    /// Follows the node's prober, for the life of the plane; returns at once when there is none. Who gets one later calls it then:
    /// connections join it when they are refreshed, for only then does the peer learn of our reflector.
    pub async fn watch_paths(self) {
        let Some(prober) = self.prober() else {
            return;
        };
        loop {
            match prober.next_event().await {
                PathEvent::Changed(health) => self.handle_path(health),
                PathEvent::ForeignVni { peer, vni } => self.handle_foreign(peer, vni),
            }
        }
    }

    fn handle_path(&self, health: Health) {
        let was_down = self
            .connections_to(health.peer)
            .filter_map(|it| it.path.health)
            .any(|known| known.is_down() && known.port == health.port);
        match (was_down, health.is_down()) {
            (_, true) => tracing::warn!(peer.ip = %health.peer, "{health}"),
            (true, false) => tracing::info!(peer.ip = %health.peer, "{health}"),
            (false, false) => tracing::debug!(peer.ip = %health.peer, "{health}"),
        }
        self.tell_all(health.peer);
        if health.path_mtu.is_some() {
            self.follow_mtu(health.peer);
        }
    }

    /// Looks again at the path of a connection that has just been committed: what became of it since it was looked at has been told
    /// to those connections only that there were.
    pub(crate) fn catch_up(&self, established: &Arc<Established>) {
        let Some((remote, _)) = established.remote() else {
            return;
        };
        self.follow_mtu_of(established, remote);
        if self.health_of(established) != established.path.health {
            let news = (established.view.id.clone(), News::Path);
            self.apply_all(std::iter::once(news));
        }
    }

    fn connections_to(&self, peer: IpAddr) -> impl Iterator<Item = Arc<Established>> {
        self.shared
            .connections
            .all()
            .into_iter()
            .filter(move |it| it.remote().map(|(ip, _)| ip) == Some(peer))
    }

    /// Tells the monitors of every connection that goes to `peer` what is new of the path.
    fn tell_all(&self, peer: IpAddr) {
        let news = self
            .connections_to(peer)
            .map(|it| (it.view.id.clone(), News::Path));
        self.apply_all(news);
    }
}

/// Whether our segments of two views say the same of health.
fn same_health(one: &Connection, other: &Connection) -> bool {
    match (own_segment(one), own_segment(other)) {
        (Some(one), Some(other)) => Published::is_same(&one.metrics, &other.metrics),
        (None, None) => true,
        _ => false,
    }
}
