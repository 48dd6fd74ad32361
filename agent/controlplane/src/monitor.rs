//! Who wants to hear of which connections.
//!
//! Subscribers are indexed by the first segment id their selector names, so that an event costs
//! what its own listeners cost, not what all listeners of the agent cost. A subscriber that does
//! not read is cut off: it asks again and gets the whole state anew, and memory stays bounded.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    iter::Peekable,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    vec,
};

use nsm_core::path::selector_matches;
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;

use crate::connections::{Established, lock};

/// Events a subscriber may lag behind before it is cut off. A node's worst burst is news of all its connections, which are told
/// [`TOGETHER`]; the subscriber of a single connection never comes near.
const BACKLOG: usize = 1024;

/// How much of connections one event tells, bytes: some 2 KiB each, and no message is to come near the limits of those who read it
/// (1 MiB is an agent's, 4 MiB that of gRPC in Go).
const TOGETHER: usize = 64 << 10;

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
///
/// What there was when it began comes first: as the initial state as much as one event holds, the rest as updates, for a reader may
/// take another initial state for the whole of it. It is put into words when it is read, and what has changed meanwhile follows.
#[derive(Debug)]
pub struct Events {
    initial: Option<ConnectionEventType>,
    standing: Peekable<vec::IntoIter<Arc<Established>>>,
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
        let initial = self.initial.take();
        if initial.is_some() || self.standing.peek().is_some() {
            let kind = initial.unwrap_or(ConnectionEventType::Update);
            let event = next_event(kind, &mut self.standing);
            return std::task::Poll::Ready(Some(Ok(event)));
        }
        self.receiver.poll_recv(context)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.monitors.remove(&self.key);
    }
}

impl Monitors {
    /// Subscribes, with the matching connections of `now` as the first events.
    ///
    /// `now` is asked for while nobody tells anything, so nothing falls between it and what follows.
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
        let mut subscribers = lock(&self.subscribers);
        let mut standing = now();
        standing.retain(|established| matches(&selector, &established.view));
        subscribers
            .by_segment
            .entry(key.0.clone())
            .or_default()
            .insert(
                key.1,
                Subscriber {
                    hop,
                    selector,
                    sender,
                },
            );
        drop(subscribers);
        Events {
            initial: Some(ConnectionEventType::InitialStateTransfer),
            standing: standing.into_iter().peekable(),
            receiver,
            monitors: self.clone(),
            key,
        }
    }

    /// Tells everyone who asked for it what became of `connection`.
    pub(crate) fn publish(&self, kind: ConnectionEventType, connection: &Connection) {
        self.publish_but_to(None, kind, connection);
    }

    /// Tells everyone who asked for it how many connections are now: in as few events as messages may be large, for a subscriber
    /// that follows thousands of connections would be cut off by as many events.
    ///
    /// `now` looks at each by its id while nobody else tells anything, so that what was told meanwhile is not taken back: the last
    /// word on a connection that is gone is that it is, and on one that has changed again how it is now.
    pub(crate) fn publish_all(
        &self,
        ids: &[String],
        now: impl Fn(&str) -> Option<Arc<Established>>,
    ) {
        let mut subscribers = lock(&self.subscribers);
        if subscribers.by_segment.is_empty() {
            return;
        }
        let mut news: BTreeMap<(String, u64), Vec<Arc<Established>>> = BTreeMap::new();
        for established in ids.iter().filter_map(|id| now(id)) {
            let view = &established.view;
            for segment in segments(view) {
                let Some(listeners) = subscribers.by_segment.get(segment) else {
                    continue;
                };
                for (number, subscriber) in listeners {
                    if matches(&subscriber.selector, view) {
                        let key = (segment.to_owned(), *number);
                        news.entry(key).or_default().push(Arc::clone(&established));
                    }
                }
            }
        }
        for ((segment, number), news) in news {
            let Some(listeners) = subscribers.by_segment.get_mut(&segment) else {
                continue;
            };
            let mut news = news.into_iter().peekable();
            let reads = listeners.get(&number).is_some_and(|subscriber| {
                let mut reads = true;
                while reads && news.peek().is_some() {
                    let event = next_event(ConnectionEventType::Update, &mut news);
                    reads = send(subscriber, event);
                }
                reads
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

/// An event with as many of the next connections as it may hold: one at least, unless there is none.
fn next_event(
    kind: ConnectionEventType,
    left: &mut Peekable<vec::IntoIter<Arc<Established>>>,
) -> ConnectionEvent {
    let mut connections = BTreeMap::new();
    let mut size = 0;
    while let Some(next) = left.next_if(|next| {
        size += next.view.encoded_len();
        size <= TOGETHER || connections.is_empty()
    }) {
        connections.insert(next.view.id.clone(), next.view.clone());
    }
    ConnectionEvent {
        r#type: kind.into(),
        connections,
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use nsm_proto::connection::{Path, PathSegment};
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::route::{Crossing, Route};

    fn established(number: usize, labels: usize) -> Arc<Established> {
        let segment = |name: &str| PathSegment {
            name: name.to_owned(),
            id: format!("{name}-{number}"),
            ..PathSegment::default()
        };
        Arc::new(Established {
            view: Connection {
                id: format!("agent-{number}"),
                labels: [("text".to_owned(), "x".repeat(labels))].into(),
                path: Some(Path {
                    index: 1,
                    path_segments: vec![segment("client"), segment("agent")],
                }),
                ..Connection::default()
            },
            route: Route {
                url: String::new(),
                trusted: false,
                crossing: Crossing::Inside,
                service: String::new(),
                endpoint: String::new(),
                endpoint_told: String::new(),
                payload: String::new(),
                resolution: None,
                _socket: None,
            },
            next_mechanism: None,
            plan: None,
            vni: None,
            expires: SystemTime::UNIX_EPOCH,
            path: crate::health::PathState::default(),
        })
    }

    fn follow(monitors: &Monitors, now: Vec<Arc<Established>>) -> Events {
        let selector = MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: "client".to_owned(),
                ..PathSegment::default()
            }],
            network_services: Vec::new(),
        };
        monitors.subscribe(selector, false, || now)
    }

    /// What is told until the stream ends.
    async fn told(monitors: &Monitors, events: Events) -> Vec<ConnectionEvent> {
        monitors.end_all();
        let events: Vec<_> = events.collect().await;
        events
            .into_iter()
            .map(|event| event.expect("an event"))
            .collect()
    }

    #[tokio::test]
    async fn many_connections_are_told_in_events_that_can_be_read() {
        let monitors = Monitors::default();
        let mut connections: Vec<_> = (0..200).map(|number| established(number, 2000)).collect();
        // One alone is larger than what is told together.
        connections.insert(100, established(1000, 2 * TOGETHER));
        let events = follow(&monitors, connections.clone());
        let ids: Vec<_> = connections.iter().map(|it| it.view.id.clone()).collect();
        let by_id = |id: &str| connections.iter().find(|it| it.view.id == id).cloned();
        monitors.publish_all(&ids, by_id);
        let told = told(&monitors, events).await;
        let kinds: Vec<_> = told.iter().map(ConnectionEvent::r#type).collect();
        assert_eq!(kinds[0], ConnectionEventType::InitialStateTransfer);
        assert!(
            kinds[1..]
                .iter()
                .all(|kind| *kind == ConnectionEventType::Update)
        );
        let count: usize = told.iter().map(|event| event.connections.len()).sum();
        assert_eq!(count, 2 * connections.len(), "at first, and then");
        assert!(told.len() < 40, "{}", told.len());
        for event in told {
            let size = event.encoded_len();
            assert!(size < TOGETHER * 3 / 2 || event.connections.len() == 1);
        }
    }

    /// Its Close has been told, or will be when this is done.
    #[tokio::test]
    async fn a_connection_that_has_gone_is_not_told_to_stand() {
        let monitors = Monitors::default();
        let (gone, changed) = (established(1, 0), established(2, 0));
        let mut events = follow(&monitors, vec![gone.clone(), changed.clone()]);
        assert_eq!(
            events
                .next()
                .await
                .expect("one")
                .expect("an event")
                .connections
                .len(),
            2
        );
        monitors.publish(ConnectionEventType::Delete, &gone.view);
        let now = established(2, 7);
        let ids = [&gone, &changed].map(|it| it.view.id.clone());
        monitors.publish_all(&ids, |id| (id == changed.view.id).then(|| now.clone()));
        let told = told(&monitors, events).await;
        let kinds: Vec<_> = told.iter().map(ConnectionEvent::r#type).collect();
        assert_eq!(
            kinds,
            [ConnectionEventType::Delete, ConnectionEventType::Update]
        );
        assert_eq!(
            told[1].connections,
            [(changed.view.id.clone(), now.view.clone())].into()
        );
    }
}
