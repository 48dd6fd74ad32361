//! What next hops report of our connections, merged into our own view and published upstream.
//!
//! A monitor stream that breaks means that the peer's part is gone or unreachable: every connection through it is DOWN until the next
//! Request through that peer succeeds. The metrics of our own segment carry that and the reason where the peer is an agent or another
//! manager: packets pass without it. The last hop of a path is the endpoint itself; without it there is nothing to pass to.

use std::sync::Arc;

use nsm_core::{
    liveness::{LostHop, Published},
    net::PeerUrl,
    nsm::path::MAX_SEGMENTS,
};
use nsm_proto::{
    connection::{Connection, ConnectionEvent, ConnectionEventType, PathSegment, State},
    connectioncontext::ConnectionContext,
};
use tokio::time::Instant;

use super::Liveness;
use crate::{
    connection::{
        model::{Established, after, below},
        store::News,
    },
    peer::{peers::Peer, stream::Report},
};

/// The context that a connection has after its next hop reported one; `None` where that changes nothing here and now.
pub(crate) type TakeContext =
    dyn Fn(&Established, &ConnectionContext) -> Option<ConnectionContext> + Send + Sync;

impl Liveness {
    /// Takes over what the stream from a next hop brings.
    pub(crate) fn on_report(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        report: Report,
        contexts: &Arc<TakeContext>,
    ) {
        match report {
            Report::Event(event) => self.on_event(&peer.url, event, contexts),
            Report::Lost { users, cause } => self.on_lost(peer, users, &cause),
        }
    }

    /// Takes over what the peer of `url` publishes of connections that go through it.
    fn on_event(
        self: &Arc<Self>,
        url: &PeerUrl,
        event: ConnectionEvent,
        contexts: &Arc<TakeContext>,
    ) {
        let at = Instant::now();
        let kind = event.r#type();
        let news = event.connections.into_values().filter_map(|reported| {
            let (id, index) = self.own_segment(&reported)?;
            let (liveness, url) = (Arc::clone(self), url.clone());
            let contexts = Arc::clone(contexts);
            let change = move |established: &Established| {
                // A peer reports its own connections only.
                if established.route.url != url {
                    return None;
                }
                let hops = match kind {
                    ConnectionEventType::Delete => Default::default(),
                    _ => after(&reported, index),
                };
                liveness.report_evidence(established, hops);
                let merged = merge(established, &reported, index, kind);
                // A Request that was committed later has brought what is newer.
                let is_newer = kind != ConnectionEventType::Delete && established.committed <= at;
                let context = reported.context.as_ref().filter(|_| is_newer);
                let context = context.and_then(|context| contexts(established, context));
                let Some(context) = context else {
                    return merged;
                };
                let mut changed = merged.unwrap_or_else(|| established.clone());
                changed.view.context = Some(context);
                Some(changed)
            };
            let news = match kind {
                ConnectionEventType::Delete => News::Gone(Box::new(change)),
                _ => News::Reported(Box::new(change)),
            };
            Some((id, news))
        });
        self.apply_all(news);
    }

    /// The peer of these connections is gone, or cannot be reached. A Request that succeeds meanwhile has opened another stream.
    fn on_lost(self: &Arc<Self>, peer: &Arc<Peer>, ids: Vec<String>, cause: &str) {
        let reason = format!("the agent of {} is not heard any more ({cause})", peer.url);
        let reason: Arc<str> = reason.into();
        let news = ids.into_iter().map(|id| {
            let (liveness, peer) = (Arc::clone(self), Arc::clone(peer));
            let hop = LostHop {
                reason: Arc::clone(&reason),
            };
            let change = move |established: &Established| {
                if peer.is_monitored() {
                    return None;
                }
                liveness.report_evidence(established, &[]);
                lose_hop(established, hop)
            };
            (id, News::StreamLost(Box::new(change)))
        });
        self.apply_all(news);
    }

    /// The id and index of our segment in a connection that the next hop reports: the next hop's own segment is ours or the one
    /// after it.
    pub(crate) fn own_segment(&self, reported: &Connection) -> Option<(String, u32)> {
        let path = reported.path.as_ref()?;
        [path.index.checked_sub(1), Some(path.index)]
            .into_iter()
            .flatten()
            .find_map(|index| {
                let segment = path.path_segments.get(index as usize)?;
                (segment.name == self.config.own_name).then(|| (segment.id.clone(), index))
            })
    }
}

/// The connection when the stream from the next hop is lost; `None` where that hop had reported DOWN itself.
fn lose_hop(established: &Established, hop: LostHop) -> Option<Established> {
    let mut changed = established.with_reported(State::Down)?;
    let is_endpoint = below(&changed.view).len() <= 1;
    changed.set_lost_hop(Some(hop).filter(|_| !is_endpoint));
    Some(changed)
}

/// Our view with what the next hop reports in it; `None` when that is nothing new. Fresh tokens alone are no news: every refresh
/// brings them down the path by itself. Health is.
fn merge(
    established: &Established,
    reported: &Connection,
    index: u32,
    kind: ConnectionEventType,
) -> Option<Established> {
    let view = &established.view;
    if view.path.as_ref().map(|path| path.index) != Some(index) {
        return None;
    }
    let state = match kind {
        ConnectionEventType::Delete => State::Down,
        _ => reported.state(),
    };
    // The segments above are ours and our callers' to change.
    let hops = after(reported, index);
    let known = below(view);
    let same_path = ids(hops).eq(ids(known))
        && hops
            .iter()
            .zip(known)
            .all(|(hop, known)| Published::is_same(&hop.metrics, &known.metrics));
    let is_monitored = established.path.lost_hop.is_none();
    if hops.len() + index as usize >= MAX_SEGMENTS
        || (state == established.path.reported && same_path && is_monitored)
    {
        return None;
    }
    let mut changed = established
        .with_reported(state)
        .unwrap_or_else(|| established.clone());
    changed.set_lost_hop(None);
    if !same_path && let Some(path) = &mut changed.view.path {
        path.path_segments.truncate(index as usize + 1);
        path.path_segments.extend_from_slice(hops);
    }
    Some(changed)
}

fn ids(segments: &[PathSegment]) -> impl Iterator<Item = (&str, &str)> {
    segments
        .iter()
        .map(|segment| (segment.name.as_str(), segment.id.as_str()))
}
