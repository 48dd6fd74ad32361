//! A connection as this agent holds it: the view that monitors get, the next hop, the links on this node, and what is known of its path.
//!
//! Four things decide a connection's state, and any of them that is bad makes it DOWN: the verdict on its path, a peer that has no
//! tunnel for its VNI, the link of its pod on this node, and what the next hop reports. A next hop whose monitor stream is lost makes it DOWN too, and so does a refresh
//! that is refused; both are published beside the path's health, because packets pass without the agents and the client may keep the
//! tunnel.
//!
//! A connection that was granted although its path was known to be down (`prefer`) is UP until the path has been up once: DOWN would
//! only trigger a retry that changes nothing, and the metrics carry the health.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use nsm_core::{
    identity::{Caller, Owner, policy},
    liveness::{BadLink, ForeignVnis, Health, LostHop, PathId, Published},
    mechanism::TunnelKey,
    net::Vni,
    nsm::path::Path,
};
use nsm_proto::connection::{Connection, Mechanism, PathSegment, State};
use tokio::time::Instant;

use crate::{
    identity::gate::Shown,
    ports::Plan,
    route::{next::Route, router::Arrival},
};

/// A connection that a Request made and a Close or its expiry will take away.
#[derive(Debug, Clone)]
pub(crate) struct Established {
    /// Our own view, as monitors get it: `id` and `path.index` are those of our segment, names and mechanism are the client's.
    pub(crate) view: Connection,
    /// Whose it is.
    pub(crate) owner: Owner,
    /// What the caller has shown that made or refreshed it last; none in plain text.
    pub(crate) shown: Option<Arc<Shown>>,
    /// The listener that the caller came by.
    pub(crate) arrival: Arrival,
    /// The next hop, and the names it knows the connection by.
    pub(crate) route: Route,
    /// The mechanism agreed with the next hop, with the addresses of this node's own view.
    pub(crate) next_mechanism: Option<Mechanism>,
    /// The links of this node that belong to it. Boxed: a proxy's connections have none, and a plan is a third of this.
    pub(crate) plan: Option<Box<Plan>>,
    /// The key of its tunnel, which is held for it.
    pub(crate) key: Option<TunnelKey>,
    /// When the previous hop's token ends, and with it the connection.
    pub(crate) expires: SystemTime,
    /// When the Request that made or refreshed it was granted.
    pub(crate) committed: Instant,
    /// What is known of the path that its packets take.
    pub(crate) path: PathState,
}

/// What is known of the path that a connection's packets take.
#[derive(Debug, Clone)]
pub(crate) struct PathState {
    /// The path that is watched for it; none where nothing is, or cannot be.
    pub(crate) watched: Option<PathId>,
    /// The path that would be watched for it if this node probed.
    pub(crate) watchable: Option<PathId>,
    /// The health of the path to the other end of its tunnel; none where there is no tunnel, or nothing is probed.
    pub(crate) health: Option<Health>,
    /// The state that the next hop reported last.
    pub(crate) reported: State,
    /// Set while the monitor stream from the next hop is lost.
    pub(crate) lost_hop: Option<LostHop>,
    /// Set after a refresh was refused, until a Request succeeds: events of the next hop may be older than the refusal.
    pub(crate) refused: Option<LostHop>,
    /// Set while the link of its pod is not as it must be, until it is or a Request succeeds.
    pub(crate) bad_link: Option<BadLink>,
    /// It was granted although the path was down.
    pub(crate) granted_down: bool,
    /// The MTU that both sides agreed on, whatever the path carries.
    pub(crate) agreed_mtu: u32,
}

impl Default for PathState {
    fn default() -> Self {
        Self {
            watched: None,
            watchable: None,
            health: None,
            reported: State::Up,
            lost_hop: None,
            refused: None,
            bad_link: None,
            granted_down: false,
            agreed_mtu: 0,
        }
    }
}

impl Established {
    /// Decides whether `caller`, which shows `path`, may refresh, change or close it.
    pub(crate) fn is_open_to(&self, caller: &Caller, path: &Path) -> Result<(), policy::Refusal> {
        let segments = self.view.path.iter().flat_map(|path| &path.path_segments);
        let first = segments.map(|it| (it.name.as_str(), it.id.as_str())).next();
        let shown = path.segments.first();
        let connection = policy::Connection {
            owner: self.owner,
            first,
            shown: shown.map(|it| (it.name.as_str(), it.id.as_str())),
        };
        policy::decide(caller, policy::Action::Change(connection))
    }

    /// The VNI of its tunnel.
    pub(crate) fn vni(&self) -> Option<Vni> {
        self.key.and_then(TunnelKey::vni)
    }

    /// The other end of the tunnel: address and UDP port.
    pub(crate) fn remote(&self) -> Option<(IpAddr, u16)> {
        let tunnel = self.plan.as_ref()?.tunnel()?;
        Some((tunnel.remote, tunnel.port))
    }

    /// Whether packets are known not to pass.
    pub(crate) fn path_is_down(&self) -> bool {
        self.path.health.is_some_and(|health| health.is_down())
    }

    /// Whether its packets may still pass although it is DOWN, or may pass again later: its path is down by our verdict or by that of
    /// a hop behind us (which may notice first), the link of a pod is bad, an agent on the path is lost, or a refresh was refused. Its tunnel stays until another
    /// one stands.
    pub(crate) fn is_left_standing(&self) -> bool {
        let is_reported = |hop: &PathSegment| {
            Published::read(&hop.metrics).is_down()
                || BadLink::read(&hop.metrics).is_some()
                || LostHop::read(&hop.metrics).is_some()
        };
        self.path_is_down()
            || self.path.bad_link.is_some()
            || self.missed_hop().is_some()
            || below(&self.view).iter().any(is_reported)
    }

    /// Why the next hop takes no part in it, although packets may pass: it is lost, or it refused the last Request and has not
    /// reported the connection's end.
    pub(crate) fn missed_hop(&self) -> Option<&LostHop> {
        let path = &self.path;
        let refused = path.refused.as_ref();
        path.lost_hop
            .as_ref()
            .or(refused.filter(|_| path.reported != State::Down))
    }

    /// Writes into our own segment's metrics that the next hop is lost, or is back.
    pub(crate) fn set_lost_hop(&mut self, lost: Option<LostHop>) {
        self.path.lost_hop = lost;
        self.write_missed_hop();
    }

    fn write_missed_hop(&mut self) {
        let missed = self.missed_hop().cloned();
        if let Some(own) = own_segment_mut(&mut self.view) {
            LostHop::write(missed.as_ref(), &mut own.metrics);
        }
    }

    /// The connection after a refresh of it was refused.
    pub(crate) fn with_refused(&self, refused: LostHop) -> Self {
        let mut changed = self.clone();
        changed.path.refused = Some(refused);
        changed.view.set_state(changed.state());
        changed.write_missed_hop();
        changed
    }

    /// The connection with the link of its pod bad, or right again; `None` when that is known.
    pub(crate) fn with_link(&self, bad: Option<BadLink>) -> Option<Self> {
        if self.path.bad_link == bad {
            return None;
        }
        let mut changed = self.clone();
        changed.path.bad_link = bad;
        changed.view.set_state(changed.state());
        changed.write_link();
        Some(changed)
    }

    fn write_link(&mut self) {
        let bad = self.path.bad_link.clone();
        if let Some(own) = own_segment_mut(&mut self.view) {
            BadLink::write(bad.as_ref(), &mut own.metrics);
        }
    }

    /// What is published of its state.
    fn state(&self) -> State {
        // A path that is down stays so, whatever is reported.
        let is_down = self.path_is_down() && !self.path.granted_down;
        if is_down || self.path.refused.is_some() || self.path.bad_link.is_some() {
            State::Down
        } else {
            self.path.reported
        }
    }

    /// The connection with another state reported by the next hop; `None` when that changes nothing.
    pub(crate) fn with_reported(&self, state: State) -> Option<Self> {
        if self.path.reported == state {
            return None;
        }
        let mut changed = self.clone();
        changed.path.reported = state;
        changed.view.set_state(changed.state());
        Some(changed)
    }

    /// Brings the view up to date: the state, and the metrics of our own segment.
    pub(crate) fn settle(&mut self, foreign: &ForeignVnis) {
        self.path.granted_down &= self.path_is_down();
        self.view.set_state(self.state());
        if let Some(own) = own_segment_mut(&mut self.view) {
            Published::write(self.path.health.as_ref(), foreign, &mut own.metrics);
        }
        self.write_missed_hop();
        self.write_link();
    }

    /// Whether `other` publishes the same state and the same health. Another kind of reason is another health: it may name the
    /// firewall that is to blame.
    pub(crate) fn publishes_same(&self, other: &Self) -> bool {
        self.view.state() == other.view.state()
            && match (own_segment(&self.view), own_segment(&other.view)) {
                (Some(one), Some(other)) => Published::is_same(&one.metrics, &other.metrics),
                (None, None) => true,
                _ => false,
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

/// The segments of the hops behind the one at `path.index`.
pub(crate) fn below(view: &Connection) -> &[PathSegment] {
    let index = view.path.as_ref().map_or(0, |path| path.index);
    after(view, index)
}

/// The segments after the one at `index`.
pub(crate) fn after(view: &Connection, index: u32) -> &[PathSegment] {
    view.path
        .as_ref()
        .and_then(|path| path.path_segments.get(index as usize + 1..))
        .unwrap_or_default()
}
