//! Who wants to hear of which connections.
//!
//! Subscribers are indexed by the first segment id their selector names, so that an event costs
//! what its own listeners cost, not what all listeners of the agent cost. A subscriber that does
//! not read is cut off: it asks again and gets the whole state anew, and memory stays bounded.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use nsm_core::path::selector_matches;
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector,
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::connections::{Established, lock};

/// Events a subscriber may lag behind before it is cut off. A node's worst burst is one event for
/// each of its connections of one peer; the subscriber of a single connection never comes near.
const BACKLOG: usize = 1024;

/// Connections that are told of in one event: some 2 KiB each, and no message is to come near the limits of those who read it.
const TOGETHER: usize = 32;

type Sender = mpsc::Sender<Result<ConnectionEvent, Status>>;

/// Metadata of MonitorConnections by which the hop that its selector names says: what I asked for
/// myself I need not be told. Agents say so to each other; an NSM component that does not know the
/// key tells everything.
pub(crate) const SKIP_ANSWERED: &str = "nsm-skip-answered";

#[derive(Debug)]
struct Subscriber {
    /// The hop that hears of its own Requests and Closes by their answers.
    hop: Option<String>,
    selector: MonitorScopeSelector,
    sender: Sender,
}

#[derive(Debug, Default)]
struct Subscribers {
    /// By the first concrete segment id of the selector; "" holds those that name none.
    by_segment: HashMap<String, BTreeMap<u64, Subscriber>>,
}

/// The agent's monitors.
#[derive(Debug, Clone, Default)]
pub(crate) struct Monitors {
    subscribers: Arc<Mutex<Subscribers>>,
    next: Arc<AtomicU64>,
}

/// A stream of events; dropped, the subscription is gone.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Result<ConnectionEvent, Status>>,
    monitors: Monitors,
    key: (String, u64),
}

impl tokio_stream::Stream for Events {
    type Item = Result<ConnectionEvent, Status>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.monitors.remove(&self.key);
    }
}

impl Monitors {
    /// Subscribes, with the matching connections of `now` as the first event.
    ///
    /// `now` is asked for after the subscription stands, so nothing falls between the two.
    pub(crate) fn subscribe(
        &self,
        selector: MonitorScopeSelector,
        skip_answered: bool,
        now: impl FnOnce() -> Vec<Arc<Established>>,
    ) -> Events {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let segment = selector
            .path_segments
            .iter()
            .map(|segment| segment.id.as_str())
            .find(|id| !id.is_empty())
            .unwrap_or_default()
            .to_owned();
        let hop = match selector.path_segments.as_slice() {
            [hop] if skip_answered => Some(hop.name.clone()),
            _ => None,
        };
        let key = (segment, self.next.fetch_add(1, Ordering::Relaxed));
        let first = sender.clone();
        {
            let mut subscribers = lock(&self.subscribers);
            subscribers
                .by_segment
                .entry(key.0.clone())
                .or_default()
                .insert(
                    key.1,
                    Subscriber {
                        hop,
                        selector: selector.clone(),
                        sender,
                    },
                );
            let connections = now()
                .iter()
                .map(|established| &established.view)
                .filter(|view| matches(&selector, view))
                .map(|view| (view.id.clone(), view.clone()))
                .collect();
            // The channel is empty and larger than one event: this cannot fail.
            let _ = first.try_send(Ok(ConnectionEvent {
                r#type: ConnectionEventType::InitialStateTransfer.into(),
                connections,
            }));
        }
        Events {
            receiver,
            monitors: self.clone(),
            key,
        }
    }

    /// Tells everyone who asked for it what became of `connection`.
    pub(crate) fn publish(&self, kind: ConnectionEventType, connection: &Connection) {
        self.publish_but_to(None, kind, connection);
    }

    /// Tells everyone who asked for it what became of many connections at once: in as few events as messages may be large, for a
    /// subscriber that follows thousands of connections would be cut off by as many events.
    pub(crate) fn publish_all(&self, kind: ConnectionEventType, connections: &[Connection]) {
        let mut subscribers = lock(&self.subscribers);
        let mut news: BTreeMap<(String, u64), Vec<&Connection>> = BTreeMap::new();
        for connection in connections {
            for segment in segments(connection) {
                let Some(listeners) = subscribers.by_segment.get(segment) else {
                    continue;
                };
                for (number, subscriber) in listeners {
                    if matches(&subscriber.selector, connection) {
                        let key = (segment.to_owned(), *number);
                        news.entry(key).or_default().push(connection);
                    }
                }
            }
        }
        for ((segment, number), connections) in news {
            let Some(listeners) = subscribers.by_segment.get_mut(&segment) else {
                continue;
            };
            let reads = listeners.get(&number).is_some_and(|subscriber| {
                connections.chunks(TOGETHER).all(|chunk| {
                    let connections = chunk.iter().map(|it| (it.id.clone(), (*it).clone()));
                    send(
                        subscriber,
                        ConnectionEvent {
                            r#type: kind.into(),
                            connections: connections.collect(),
                        },
                    )
                })
            });
            if !reads {
                listeners.remove(&number);
                if listeners.is_empty() {
                    subscribers.by_segment.remove(&segment);
                }
            }
        }
    }

    /// Tells everyone but the previous hop, which has asked for the change and hears of it by the
    /// answer. Only a stream that was opened so is passed over ([`SKIP_ANSWERED`]): through it
    /// would go an event for each Request and Close, of no news to anybody.
    pub(crate) fn publish_answered(&self, kind: ConnectionEventType, connection: &Connection) {
        let previous = connection.path.as_ref().and_then(|path| {
            let at = path.index.checked_sub(1)?;
            path.path_segments.get(at as usize)
        });
        self.publish_but_to(
            previous.map(|segment| segment.name.as_str()),
            kind,
            connection,
        );
    }

    fn publish_but_to(
        &self,
        answered: Option<&str>,
        kind: ConnectionEventType,
        connection: &Connection,
    ) {
        let mut subscribers = lock(&self.subscribers);
        if subscribers.by_segment.is_empty() {
            return;
        }
        for segment in segments(connection) {
            let Some(listeners) = subscribers.by_segment.get_mut(segment) else {
                continue;
            };
            listeners.retain(|_, subscriber| {
                let has_the_answer =
                    subscriber.hop.is_some() && subscriber.hop.as_deref() == answered;
                if has_the_answer || !matches(&subscriber.selector, connection) {
                    return true;
                }
                send(
                    subscriber,
                    ConnectionEvent {
                        r#type: kind.into(),
                        connections: BTreeMap::from([(connection.id.clone(), connection.clone())]),
                    },
                )
            });
            if listeners.is_empty() {
                subscribers.by_segment.remove(segment);
            }
        }
    }

    /// Streams that are open now.
    pub(crate) fn len(&self) -> usize {
        lock(&self.subscribers)
            .by_segment
            .values()
            .map(BTreeMap::len)
            .sum()
    }

    fn remove(&self, (segment, number): &(String, u64)) {
        let mut subscribers = lock(&self.subscribers);
        if let Some(listeners) = subscribers.by_segment.get_mut(segment) {
            listeners.remove(number);
            if listeners.is_empty() {
                subscribers.by_segment.remove(segment);
            }
        }
    }

    /// Ends every stream, for the drain.
    pub(crate) fn end_all(&self) {
        lock(&self.subscribers).by_segment.clear();
    }
}

/// Whether the subscriber keeps up. One that does not is dropped, and its sender with it: after what is queued its stream ends, and
/// it asks anew.
fn send(subscriber: &Subscriber, event: ConnectionEvent) -> bool {
    let sent = subscriber.sender.try_send(Ok(event));
    if let Err(error) = &sent {
        tracing::debug!(%error, "a monitor does not read its events: cut off");
    }
    sent.is_ok()
}

/// The ids that subscribers of a connection can be found by: each once, also where a path repeats an id or has none.
fn segments(connection: &Connection) -> BTreeSet<&str> {
    connection
        .path
        .iter()
        .flat_map(|path| &path.path_segments)
        .map(|segment| segment.id.as_str())
        .chain(std::iter::once(""))
        .collect()
}

fn matches(selector: &MonitorScopeSelector, connection: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&connection.network_service) {
        return false;
    }
    // Most selectors name one connection: any other is told by its ids alone. An agent with
    // thousands compares each of them with every stream that opens.
    let mut ids = selector.path_segments.iter().map(|segment| &segment.id);
    if let Some(id) = ids.find(|id| !id.is_empty()) {
        let mut path = connection.path.iter().flat_map(|path| &path.path_segments);
        if !path.any(|segment| segment.id == *id) {
            return false;
        }
    }
    let asked: Vec<(&str, &str)> = selector
        .path_segments
        .iter()
        .map(|segment| (segment.name.as_str(), segment.id.as_str()))
        .collect();
    if asked.is_empty() {
        return true;
    }
    let path: Vec<(&str, &str)> = connection
        .path
        .iter()
        .flat_map(|path| &path.path_segments)
        .map(|segment| (segment.name.as_str(), segment.id.as_str()))
        .collect();
    selector_matches(&asked, &path)
}
