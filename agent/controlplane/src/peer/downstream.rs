//! Listening to what becomes of our connections further down the path.
//!
//! One stream a peer, for all connections that go through it: its selector names our segment with
//! any id. What the peer tells is merged into our own view and told upstream; a stream that breaks
//! means that the peer's part is gone or unreachable, and every connection through it is DOWN
//! until the next Request through that peer succeeds. The metrics of our own segment say so and why
//! where the peer is an agent or another manager: packets pass without it. The last hop of a path is
//! the endpoint itself; without it there is nothing to pass to.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use nsm_core::{
    liveness::health::{LostHop, Published},
    nsm::path::MAX_SEGMENTS,
    text::printable,
};
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use tokio::task::AbortHandle;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, metadata::MetadataValue};

use crate::{
    connection::{
        monitor::SKIP_ANSWERED,
        store::{Established, News, Turn, lock},
    },
    liveness,
    peer::peers::{Peer, root_cause},
    plane::ControlPlane,
};

/// How long a stream outlives the peer's last connection. Clients come and go in quick succession,
/// and a stream for each would cost more than the Request it watches over.
const LINGER: Duration = Duration::from_secs(1);

/// Connections whose news are told together: the first need not wait for thousands of others.
const TOGETHER: usize = 64;

/// The most characters that are kept of why a stream broke: the peer may say much, and each of its connections says it again.
const LONGEST_CAUSE: usize = 200;

/// Starts to watch `peer` until its stream breaks, or some time after its last connection left.
pub(crate) fn watch(plane: ControlPlane, peer: Arc<Peer>) -> AbortHandle {
    tokio::spawn(async move {
        let outcome = tokio::select! {
            outcome = follow(&plane, &peer) => outcome,
            () = idle(&peer) => return,
        };
        let cause = match outcome {
            // An endpoint need not serve monitors; its death is then seen by the next refresh.
            Err(status) if status.code() == Code::Unimplemented => {
                tracing::debug!(peer.url = %peer.url, "the peer serves no monitor");
                return idle(&peer).await;
            }
            Err(status) => root_cause(&status).unwrap_or_else(|| status.message().to_owned()),
            Ok(()) => "the peer ended the stream".to_owned(),
        };
        let cause = printable(&cause, LONGEST_CAUSE);
        let users = peer.monitor_ended();
        if !users.is_empty() {
            tracing::warn!(peer.url = %peer.url, %cause, "lost the peer's monitor stream");
        }
        plane.lost(&peer, users, &cause);
    })
    .abort_handle()
}

/// Returns when the peer has had no connections for a while, and its monitor must end.
async fn idle(peer: &Peer) {
    loop {
        peer.emptied().await;
        tokio::time::sleep(LINGER).await;
        if peer.end_idle_monitor() {
            return;
        }
    }
}

async fn follow(plane: &ControlPlane, peer: &Peer) -> Result<(), Status> {
    let selector = MonitorScopeSelector {
        path_segments: vec![PathSegment {
            name: plane.shared.settings.name.clone(),
            ..PathSegment::default()
        }],
        network_services: Vec::new(),
    };
    let mut client = plane.shared.peers.monitor(peer).await?;
    let mut request = plane.shared.peers.outgoing(selector, None);
    let yes = MetadataValue::from_static("true");
    request.metadata_mut().insert(SKIP_ANSWERED, yes);
    let mut events = client.monitor_connections(request).await?.into_inner();
    while let Some(event) = events.next().await {
        plane.handle_event(&peer.url, event?);
    }
    Ok(())
}

impl ControlPlane {
    /// Takes over what the peer of `url` tells of connections that go through it.
    fn handle_event(&self, url: &str, event: ConnectionEvent) {
        let kind = event.r#type();
        let news = event.connections.into_values().filter_map(|told| {
            let (id, index) = self.own_segment(&told)?;
            let (plane, url) = (self.clone(), url.to_owned());
            let change = move |established: &Established| {
                // A peer speaks for its own connections only.
                if established.route.url != url {
                    return None;
                }
                let heard = match kind {
                    ConnectionEventType::Delete => Default::default(),
                    _ => below(&told, index),
                };
                plane.hear_peer(established, heard);
                merge(established, &told, index, kind)
            };
            let news = match kind {
                ConnectionEventType::Delete => News::Gone(Box::new(change)),
                _ => News::Told(Box::new(change)),
            };
            Some((id, news))
        });
        self.apply_all(news);
    }

    /// The peer of these connections is gone, or cannot be reached. A Request that succeeds
    /// meanwhile has brought another monitor.
    fn lost(&self, peer: &Arc<Peer>, ids: Vec<String>, cause: &str) {
        let reason = format!("the agent of {} is not heard any more ({cause})", peer.url);
        let reason: Arc<str> = reason.into();
        let news = ids.into_iter().map(|id| {
            let (plane, peer) = (self.clone(), Arc::clone(peer));
            let hop = LostHop {
                reason: Arc::clone(&reason),
            };
            let change = move |established: &Established| {
                if peer.is_monitored() {
                    return None;
                }
                plane.hear_peer(established, &[]);
                unheard(established, hop)
            };
            (id, News::Unheard(Box::new(change)))
        });
        self.apply_all(news);
    }

    /// The next hop has the connection no more, and its Request has failed: nothing passes until another succeeds.
    pub(crate) fn tell_gone(&self, turn: &Turn) {
        if let Some(changed) = turn.current().as_deref().and_then(down) {
            let changed = Arc::new(changed);
            turn.set(Some(Arc::clone(&changed)));
            let monitors = &self.shared.monitors;
            monitors.publish(ConnectionEventType::Update, &changed.view);
        }
    }

    /// A Request has failed and what stood before stands: whoever asked is alive, and it ends with the token of that Request.
    pub(crate) fn outlive(&self, turn: &Turn, expires: SystemTime) {
        let Some(current) = turn.current().filter(|current| current.expires < expires) else {
            return;
        };
        let mut changed = (*current).clone();
        changed.expires = expires;
        turn.set(Some(Arc::new(changed)));
        self.shared.expiries.set(turn.id(), expires);
    }

    /// The id and index of our segment in a connection that the next hop tells of: the next hop's
    /// own segment is ours or the one after it.
    fn own_segment(&self, told: &Connection) -> Option<(String, u32)> {
        let path = told.path.as_ref()?;
        [path.index.checked_sub(1), Some(path.index)]
            .into_iter()
            .flatten()
            .find_map(|index| {
                let segment = path.path_segments.get(index as usize)?;
                (segment.name == self.shared.settings.name).then(|| (segment.id.clone(), index))
            })
    }

    /// Changes the views of connections and tells the monitors what is new, of many together.
    pub(crate) fn apply_all(&self, news: impl Iterator<Item = (String, News)>) {
        let mut news = news.peekable();
        while news.peek().is_some() {
            self.apply_together(news.by_ref().take(TOGETHER));
        }
    }

    /// Does so at once, but for connections at work, which follow in their turn.
    fn apply_together(&self, news: impl Iterator<Item = (String, News)>) {
        let together = Arc::new(Mutex::new(Some(Vec::new())));
        for (id, news) in news {
            let monitors = self.shared.monitors.clone();
            let together = Arc::clone(&together);
            self.apply(&id, news, move |view| match lock(&together).as_mut() {
                Some(changed) => changed.push(view.id.clone()),
                None => monitors.publish(ConnectionEventType::Update, view),
            });
        }
        let changed = lock(&together).take().unwrap_or_default();
        self.shared.monitors.publish_all(&changed);
    }

    /// Changes the view of a connection and lets `tell` tell it, if there is something to tell: in the connection's turn, so that what
    /// is told last is what holds. Peers tell each Request that succeeds too, so their last word is true whatever ours was
    /// meanwhile. What is known of the path is looked at each time: the word that it has changed may have gone when something else
    /// waited.
    fn apply(&self, id: &str, news: News, tell: impl FnOnce(&Connection) + Send + 'static) {
        let plane = self.clone();
        let patience = 2 * self.shared.settings.request_timeout;
        let connections = &self.shared.connections;
        connections.on_event(id, patience, news, move |turn, news| {
            let Some(current) = turn.current() else {
                return;
            };
            let changed = match news {
                News::Told(change) | News::Gone(change) | News::Unheard(change) => change(&current),
                News::Path => None,
            };
            let settled = plane.with_health(changed.as_ref().unwrap_or(&current));
            if let Some(changed) = settled.or(changed) {
                let changed = Arc::new(changed);
                turn.set(Some(Arc::clone(&changed)));
                tell(&changed.view);
            }
        });
    }
}

fn down(established: &Established) -> Option<Established> {
    told(established, State::Down)
}

/// The connection when the next hop is not heard any more. One that said itself that the connection is down is taken at its word.
fn unheard(established: &Established, hop: LostHop) -> Option<Established> {
    let mut changed = down(established)?;
    let is_endpoint = liveness::below(&changed.view).len() <= 1;
    changed.set_lost_hop(Some(hop).filter(|_| !is_endpoint));
    Some(changed)
}

/// The connection when the next hop tells this of it; `None` when that is nothing new.
fn told(established: &Established, state: State) -> Option<Established> {
    if established.path.told == state {
        return None;
    }
    let mut changed = established.clone();
    changed.path.told = state;
    // A path that is down stays so, whatever is told.
    if !changed.path_is_down() || changed.path.granted_down {
        changed.view.set_state(state);
    }
    Some(changed)
}

/// Our view with what the next hop tells in it; `None` when that is nothing new. Fresh tokens
/// alone are no news: every refresh brings them down the path by itself. Health is.
fn merge(
    established: &Established,
    news: &Connection,
    index: u32,
    kind: ConnectionEventType,
) -> Option<Established> {
    let view = &established.view;
    if view.path.as_ref().map(|path| path.index) != Some(index) {
        return None;
    }
    let state = match kind {
        ConnectionEventType::Delete => State::Down,
        _ => news.state(),
    };
    // What is above is ours and our callers' to say.
    let below = below(news, index);
    let known = self::below(view, index);
    let same_path = ids(below).eq(ids(known))
        && below
            .iter()
            .zip(known)
            .all(|(told, known)| Published::is_same(&told.metrics, &known.metrics));
    let is_heard = established.path.lost_hop.is_none();
    if below.len() + index as usize >= MAX_SEGMENTS
        || (state == established.path.told && same_path && is_heard)
    {
        return None;
    }
    let mut changed = told(established, state).unwrap_or_else(|| established.clone());
    changed.set_lost_hop(None);
    if !same_path && let Some(path) = &mut changed.view.path {
        path.path_segments.truncate(index as usize + 1);
        path.path_segments.extend_from_slice(below);
    }
    Some(changed)
}

/// The segments after the one at `index`.
fn below(connection: &Connection, index: u32) -> &[PathSegment] {
    connection
        .path
        .as_ref()
        .and_then(|path| path.path_segments.get(index as usize + 1..))
        .unwrap_or_default()
}

fn ids(segments: &[PathSegment]) -> impl Iterator<Item = (&str, &str)> {
    segments
        .iter()
        .map(|segment| (segment.name.as_str(), segment.id.as_str()))
}
