//! Who wants to hear of which connections.
//!
//! Subscribers are indexed by the first segment id their selector names, so that an event costs
//! what its own listeners cost, not what all listeners of the agent cost.
//!
//! What waits for a subscriber are the ids of connections that have changed, each once, which are
//! put into words when they are read: one that reads slowly hears of each as it is then, and all
//! that waits for it is bounded by the number of connections. Only the ends of connections wait as
//! they were; a subscriber that lets too many of them lie is cut off: it asks again and gets the
//! whole state anew.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use nsm_core::nsm::path::selector_matches;
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector,
};
use prost::Message as _;
use tonic::Status;

use crate::{connection::store::Connections, sync::lock};

/// Ends of connections that may wait for a subscriber before it is cut off, some 2 KiB each.
const BACKLOG: usize = 1024;

/// How much of connections one event tells, bytes: some 2 KiB each, and no message is to come near the limits of those who read it
/// (1 MiB is an agent's, 4 MiB that of gRPC in Go).
const TOGETHER: usize = 64 << 10;

/// What is still to be told.
#[derive(Debug)]
enum Item {
    /// How the connection of this id is now.
    Changed(Arc<str>),
    /// That this one is gone.
    Gone(Box<Connection>),
}

/// What waits for a subscriber.
#[derive(Debug, Default)]
struct Backlog {
    items: VecDeque<Item>,
    /// Those that wait as [`Item::Changed`], with nothing after it that says they are gone.
    changed: HashSet<Arc<str>>,
    /// How many wait as [`Item::Gone`].
    gone: usize,
    /// Nothing comes after what is here.
    is_ended: bool,
    reader: Option<Waker>,
}

impl Backlog {
    fn change(&mut self, id: &str) {
        if !self.changed.contains(id) {
            let id = Arc::<str>::from(id);
            self.changed.insert(Arc::clone(&id));
            self.items.push_back(Item::Changed(id));
        }
    }

    /// False: too many wait already.
    fn end(&mut self, connection: &Connection) -> bool {
        if self.gone >= BACKLOG {
            return false;
        }
        // What becomes of this id after it is told after it.
        self.changed.remove(connection.id.as_str());
        self.gone += 1;
        self.items
            .push_back(Item::Gone(Box::new(connection.clone())));
        true
    }

    fn take(&mut self) -> Option<Item> {
        let item = self.items.pop_front()?;
        match &item {
            Item::Changed(id) => drop(self.changed.remove(id)),
            Item::Gone(_) => self.gone -= 1,
        }
        Some(item)
    }

    /// The next that has changed, unless the end of another comes first.
    fn take_changed(&mut self) -> Option<Arc<str>> {
        match self.items.front()? {
            Item::Gone(_) => None,
            Item::Changed(_) => match self.take()? {
                Item::Changed(id) => Some(id),
                Item::Gone(_) => None,
            },
        }
    }

    fn put_back(&mut self, id: Arc<str>) {
        if self.changed.insert(Arc::clone(&id)) {
            self.items.push_front(Item::Changed(id));
        }
    }
}

#[derive(Debug)]
struct Subscriber {
    /// The hop that hears of its own Requests and Closes by their answers.
    hop: Option<String>,
    selector: MonitorScopeSelector,
    backlog: Arc<Mutex<Backlog>>,
}

impl Subscriber {
    /// Whether the subscriber keeps up. One that does not is dropped: after what waits its stream ends, and it asks anew.
    fn tell(&self, kind: ConnectionEventType, connection: &Connection) -> bool {
        let mut backlog = lock(&self.backlog);
        let keeps_up = match kind {
            ConnectionEventType::Delete => backlog.end(connection),
            ConnectionEventType::Update | ConnectionEventType::InitialStateTransfer => {
                backlog.change(&connection.id);
                true
            }
        };
        let reader = backlog.reader.take();
        drop(backlog);
        if let Some(reader) = reader {
            reader.wake();
        }
        if !keeps_up {
            tracing::debug!("a monitor does not read its events: cut off");
        }
        keeps_up
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let mut backlog = lock(&self.backlog);
        backlog.is_ended = true;
        let reader = backlog.reader.take();
        drop(backlog);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

#[derive(Debug, Default)]
struct Subscribers {
    /// By the first concrete segment id of the selector; "" holds those that name none.
    by_segment: HashMap<String, BTreeMap<u64, Subscriber>>,
}

/// The agent's monitors.
#[derive(Debug, Clone)]
pub(crate) struct Monitors {
    subscribers: Arc<Mutex<Subscribers>>,
    next: Arc<AtomicU64>,
    connections: Connections,
}

/// A stream of events; dropped, the subscription is gone.
///
/// What there was when it began comes first: as the initial state as much as one event holds, the rest as updates, for a reader may
/// take another initial state for the whole of it.
#[derive(Debug)]
pub struct Events {
    initial: Option<ConnectionEventType>,
    selector: MonitorScopeSelector,
    backlog: Arc<Mutex<Backlog>>,
    monitors: Monitors,
    key: (String, u64),
}

impl Events {
    /// An event with as many of the connections that have changed as it may hold, none if there are none. Each is looked at after it
    /// was taken, so that what changes later is told again.
    fn changes(&self, kind: ConnectionEventType) -> ConnectionEvent {
        let mut connections = BTreeMap::new();
        let mut size = 0;
        loop {
            let Some(id) = lock(&self.backlog).take_changed() else {
                break;
            };
            // One that is gone meanwhile is told to be so, or was by the answer to whoever closed it.
            let now = self.monitors.connections.current(&id);
            let Some(now) = now.filter(|now| matches(&self.selector, &now.view)) else {
                continue;
            };
            size += now.view.encoded_len();
            if size > TOGETHER && !connections.is_empty() {
                lock(&self.backlog).put_back(id);
                break;
            }
            connections.insert(now.view.id.clone(), now.view.clone());
        }
        ConnectionEvent {
            r#type: kind.into(),
            connections,
        }
    }
}

impl tokio_stream::Stream for Events {
    type Item = Result<ConnectionEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(kind) = self.initial.take() {
            return Poll::Ready(Some(Ok(self.changes(kind))));
        }
        loop {
            let event = self.changes(ConnectionEventType::Update);
            if !event.connections.is_empty() {
                return Poll::Ready(Some(Ok(event)));
            }
            let mut backlog = lock(&self.backlog);
            match backlog.take() {
                Some(Item::Gone(gone)) => {
                    return Poll::Ready(Some(Ok(ConnectionEvent {
                        r#type: ConnectionEventType::Delete.into(),
                        connections: BTreeMap::from([(gone.id.clone(), *gone)]),
                    })));
                }
                // It has come just now.
                Some(Item::Changed(id)) => backlog.put_back(id),
                None if backlog.is_ended => return Poll::Ready(None),
                None => {
                    backlog.reader = Some(context.waker().clone());
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.monitors.remove(&self.key);
    }
}

impl Monitors {
    /// Of these connections.
    pub(crate) fn of(connections: Connections) -> Self {
        Self {
            subscribers: Arc::default(),
            next: Arc::default(),
            connections,
        }
    }

    /// Subscribes, with the matching connections that there are as the first events.
    ///
    /// They are looked up while nobody tells anything, so nothing falls between them and what follows.
    pub(crate) fn subscribe(&self, selector: MonitorScopeSelector, skip_answered: bool) -> Events {
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
        let backlog = Arc::<Mutex<Backlog>>::default();
        let mut subscribers = lock(&self.subscribers);
        {
            let mut backlog = lock(&backlog);
            for established in self.connections.all() {
                if matches(&selector, &established.view) {
                    backlog.change(&established.view.id);
                }
            }
        }
        subscribers
            .by_segment
            .entry(key.0.clone())
            .or_default()
            .insert(
                key.1,
                Subscriber {
                    hop,
                    selector: selector.clone(),
                    backlog: Arc::clone(&backlog),
                },
            );
        drop(subscribers);
        Events {
            initial: Some(ConnectionEventType::InitialStateTransfer),
            selector,
            backlog,
            monitors: self.clone(),
            key,
        }
    }

    /// Tells everyone who asked for it what became of `connection`.
    pub(crate) fn publish(&self, kind: ConnectionEventType, connection: &Connection) {
        self.publish_but_to(None, kind, connection);
    }

    /// Tells everyone who asked for it how these connections are now, many of them in one event.
    pub(crate) fn publish_all(&self, ids: &[String]) {
        let changed = ids.iter().filter_map(|id| self.connections.current(id));
        let changed: Vec<_> = changed.collect();
        for established in changed {
            self.publish(ConnectionEventType::Update, &established.view);
        }
    }

    /// Tells everyone but the previous hop, which has asked for the change and hears of it by the
    /// answer. Only a stream that was opened so is passed over ([`crate::peer::stream::SKIP_ANSWERED`]): through it
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
                subscriber.tell(kind, connection)
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
    use std::time::{Duration, SystemTime};

    use nsm_proto::connection::{Path, PathSegment, State};
    use tokio::time::Instant;
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::{
        connection::model::{Established, PathState},
        route::{addresses::Crossing, router::Route},
    };

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
                url: "tcp://192.0.2.1:5006".parse().unwrap(),
                registrant: nsm_core::identity::Caller::over_network(),
                crossing: Crossing::Inside,
                service: String::new(),
                endpoint: String::new(),
                endpoint_answered: String::new(),
                payload: String::new(),
                resolution: None,
                _socket: None,
            },
            next_mechanism: None,
            plan: None,
            vni: None,
            expires: SystemTime::UNIX_EPOCH,
            path: PathState::default(),
        })
    }

    /// Monitors of connections that stand.
    async fn standing(connections: &[Arc<Established>]) -> Monitors {
        let monitors = Monitors::of(Connections::with_limit(10_000));
        for established in connections {
            set(&monitors, established, Some(Arc::clone(established))).await;
        }
        monitors
    }

    async fn set(monitors: &Monitors, which: &Established, to: Option<Arc<Established>>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let turn = monitors.connections.admit(&which.view.id, deadline).await;
        turn.expect("nobody else is at work").set(to);
    }

    fn follow(monitors: &Monitors, skip_answered: bool) -> Events {
        let selector = MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: "client".to_owned(),
                ..PathSegment::default()
            }],
            network_services: Vec::new(),
        };
        monitors.subscribe(selector, skip_answered)
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

    fn kinds(events: &[ConnectionEvent]) -> Vec<ConnectionEventType> {
        events.iter().map(ConnectionEvent::r#type).collect()
    }

    #[tokio::test]
    async fn many_connections_are_told_in_events_that_can_be_read() {
        use ConnectionEventType::{InitialStateTransfer, Update};
        let mut connections: Vec<_> = (0..200).map(|number| established(number, 2000)).collect();
        // One alone is larger than what is told together.
        connections.insert(100, established(1000, 2 * TOGETHER));
        let monitors = standing(&connections).await;
        let mut events = follow(&monitors, false);
        let ids: Vec<_> = connections.iter().map(|it| it.view.id.clone()).collect();
        let mut all = Vec::new();
        let mut count = 0;
        while count < 2 * connections.len() {
            if count == connections.len() {
                monitors.publish_all(&ids);
            }
            let event = events.next().await.expect("more").expect("an event");
            count += event.connections.len();
            all.push(event);
        }
        assert_eq!(told(&monitors, events).await, []);
        let kinds = kinds(&all);
        assert_eq!(kinds[0], InitialStateTransfer);
        assert!(kinds[1..].iter().all(|kind| *kind == Update));
        assert!(all.len() < 40, "{}", all.len());
        for event in all {
            let size = event.encoded_len();
            assert!(size < TOGETHER * 3 / 2 || event.connections.len() == 1);
        }
    }

    /// One that reads nothing for a while hears of each connection once, as it is when it is read.
    #[tokio::test]
    async fn a_slow_reader_is_not_cut_off_by_changes() {
        // Each in an event of its own, of which there are more than may wait.
        let before: Vec<_> = (0..1100)
            .map(|number| established(number, TOGETHER / 2))
            .collect();
        let monitors = standing(&before).await;
        let mut events = follow(&monitors, false);
        let first = events.next().await.expect("more").expect("an event");
        let ids: Vec<_> = before.iter().map(|it| it.view.id.clone()).collect();
        for _ in 0..5 {
            monitors.publish_all(&ids);
        }
        for changed in &before {
            let mut now = (**changed).clone();
            now.view.set_state(State::Down);
            set(&monitors, changed, Some(Arc::new(now))).await;
        }
        monitors.publish_all(&ids);
        let told = told(&monitors, events).await;
        assert_eq!((first.connections.len(), told.len()), (1, before.len()));
        let told: Vec<_> = told.into_iter().flat_map(|it| it.connections).collect();
        assert!(told.iter().all(|(_, it)| it.state() == State::Down));
        let told: BTreeSet<_> = told.into_iter().map(|(id, _)| id).collect();
        assert_eq!(told.len(), before.len());
    }

    /// A hop that is not told what it asked for itself is not told later how that was before.
    #[tokio::test]
    async fn what_stood_at_first_is_told_as_it_is_when_it_is_read() {
        let before: Vec<_> = (0..3).map(|number| established(number, TOGETHER)).collect();
        let monitors = standing(&before).await;
        let mut events = follow(&monitors, true);
        let first = events.next().await.expect("more").expect("an event");
        let (first, _) = first.connections.first_key_value().expect("one");
        let left: Vec<_> = before.iter().filter(|it| it.view.id != *first).collect();
        let mut now = (**left[0]).clone();
        now.view.set_state(State::Down);
        let now = Arc::new(now);
        set(&monitors, left[0], Some(Arc::clone(&now))).await;
        monitors.publish_answered(ConnectionEventType::Update, &now.view);
        set(&monitors, left[1], None).await;
        monitors.publish_answered(ConnectionEventType::Delete, &left[1].view);
        let told = told(&monitors, events).await;
        assert_eq!(kinds(&told), [ConnectionEventType::Update]);
        let only = (now.view.id.clone(), now.view.clone());
        assert_eq!(told[0].connections, [only].into());
    }

    /// Its Close has been told, or will be when this is done.
    #[tokio::test]
    async fn a_connection_that_has_gone_is_not_told_to_stand() {
        use ConnectionEventType::{Delete, Update};
        let (gone, changed) = (established(1, 0), established(2, 0));
        let monitors = standing(&[Arc::clone(&gone), Arc::clone(&changed)]).await;
        let mut events = follow(&monitors, false);
        let first = events.next().await.expect("one").expect("an event");
        assert_eq!(first.connections.len(), 2);
        monitors.publish(Update, &gone.view);
        set(&monitors, &gone, None).await;
        monitors.publish(Delete, &gone.view);
        let now = established(2, 7);
        set(&monitors, &changed, Some(Arc::clone(&now))).await;
        monitors.publish_all(&[&gone, &changed].map(|it| it.view.id.clone()));
        // It comes again after it was gone: that is told last.
        set(&monitors, &gone, Some(Arc::clone(&gone))).await;
        monitors.publish(Update, &gone.view);
        let told = told(&monitors, events).await;
        let of = |which: &Established, kind| {
            let is_it = |event: &&ConnectionEvent| event.r#type() == kind;
            let told = told.iter().filter(is_it);
            let last = told.rev().find_map(|it| it.connections.get(&which.view.id));
            last.cloned()
        };
        assert_eq!(of(&gone, Delete), Some(gone.view.clone()));
        assert_eq!(of(&changed, Update), Some(now.view.clone()));
        assert_eq!(kinds(&told).last(), Some(&Update));
        assert!(
            told.last()
                .is_some_and(|it| it.connections.contains_key(&gone.view.id))
        );
    }

    /// What is gone cannot be looked at any more: it waits as it was, within a bound.
    #[tokio::test]
    async fn who_lets_too_many_ends_lie_is_cut_off() {
        let gone = established(1, 0);
        let monitors = standing(&[]).await;
        let events = follow(&monitors, false);
        for _ in 0..BACKLOG {
            monitors.publish(ConnectionEventType::Delete, &gone.view);
        }
        assert_eq!(monitors.len(), 1);
        monitors.publish(ConnectionEventType::Delete, &gone.view);
        assert_eq!(monitors.len(), 0);
        let events: Vec<_> = events.collect().await;
        assert_eq!(events.len(), 1 + BACKLOG);
    }
}
