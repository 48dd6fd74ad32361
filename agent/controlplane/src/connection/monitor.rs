//! Monitor streams: who gets events of which connections.
//!
//! Only the owner of a connection gets events of it. Over the network that is who asks from the address that the last Request came from:
//! a monitor shows tokens, and its selector proves nothing.
//!
//! Subscribers are indexed by the first segment id of their selector, so that an event costs what its own subscribers cost, not what all
//! subscribers of the agent cost. A new subscriber finds its connections by the store's index of segments. [`backlog`] says what waits
//! for a slow one.

mod backlog;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use nsm_core::{
    identity::{Owner, share::Holder},
    nsm::path::selector_matches,
};
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector,
};
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use prost::Message as _;
use tonic::Status;

use self::backlog::{Backlog, CutOff, STREAM, Waiting};
use crate::{
    connection::{model::Established, store::Connections},
    places::{Budget, NoPlace, Place, Places},
    sync::lock,
};

/// How many bytes of connections one event carries: some 2 KiB each. A message must stay far below the limits of its readers: an agent's
/// is 1 MiB, that of gRPC in Go 4 MiB.
const TOGETHER: usize = 64 << 10;

#[derive(Debug)]
struct Subscriber {
    owner: Owner,
    /// The hop that gets its own Requests and Closes answered, and no event of them.
    hop: Option<String>,
    selector: MonitorScopeSelector,
    backlog: Arc<Mutex<Backlog>>,
}

/// Who opens a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader {
    /// Whose connections it shows.
    pub(crate) owner: Owner,
    /// Who is charged for it.
    pub(crate) holder: Holder,
    /// Whether a hop gets no events of what it is answered.
    pub(crate) skips_answered: bool,
}

impl Subscriber {
    /// Queues an event; whether the subscriber keeps up. One that does not is dropped: its stream ends after what waits, and it subscribes
    /// anew.
    fn queue(&self, kind: ConnectionEventType, connection: &Connection) -> bool {
        let mut backlog = lock(&self.backlog);
        let queued = match kind {
            ConnectionEventType::Delete => backlog.end(connection),
            ConnectionEventType::Update | ConnectionEventType::InitialStateTransfer => {
                backlog.change(&connection.id).map_err(CutOff::from)
            }
        };
        backlog.cut_off = queued.err();
        let reader = backlog.reader.take();
        drop(backlog);
        if let Some(reader) = reader {
            reader.wake();
        }
        queued.is_ok()
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
    streams: Places,
    bytes: Places,
    cut_off: Counter,
}

/// A stream of events; dropped, the subscription is gone.
///
/// What there was when it began comes first: as the initial state as much as one event holds, the rest as updates, for a reader may
/// take another initial state for the whole of it.
#[derive(Debug)]
pub(crate) struct Events {
    initial: Option<ConnectionEventType>,
    owner: Owner,
    selector: MonitorScopeSelector,
    backlog: Arc<Mutex<Backlog>>,
    monitors: Monitors,
    key: (String, u64),
    _place: Place,
}

impl Events {
    /// An event with as many of the changed connections as it may hold, none if there are none. Each is read after it was taken from the
    /// backlog, so that a later change is queued again.
    fn changes(&self, kind: ConnectionEventType) -> Result<ConnectionEvent, NoPlace> {
        let mut connections = BTreeMap::new();
        let mut size = 0;
        loop {
            let Some(id) = lock(&self.backlog).take_changed() else {
                break;
            };
            // The end of a connection that is gone meanwhile is an event of its own, or the answer to a Close.
            let now = self.monitors.connections.current(&id);
            let Some(now) = now.filter(|now| matches(&self.selector, self.owner, now)) else {
                continue;
            };
            size += now.view.encoded_len();
            if size > TOGETHER && !connections.is_empty() {
                lock(&self.backlog).put_back(id)?;
                break;
            }
            connections.insert(now.view.id.clone(), now.view.clone());
        }
        let event = ConnectionEvent {
            r#type: kind.into(),
            connections,
        };
        lock(&self.backlog).hand_over(&event)?;
        Ok(event)
    }

    /// The next event; none as long as nothing happens, and an end.
    fn poll_event(&mut self, context: &Context<'_>) -> Result<Poll<Option<Item>>, NoPlace> {
        if let Some(kind) = self.initial.take() {
            return Ok(Poll::Ready(Some(Ok(self.changes(kind)?))));
        }
        loop {
            let event = self.changes(ConnectionEventType::Update)?;
            if !event.connections.is_empty() {
                return Ok(Poll::Ready(Some(Ok(event))));
            }
            let mut backlog = lock(&self.backlog);
            match backlog.take() {
                Some(Waiting::Gone(gone)) => {
                    let event = ConnectionEvent {
                        r#type: ConnectionEventType::Delete.into(),
                        connections: BTreeMap::from([(gone.id.clone(), *gone)]),
                    };
                    backlog.hand_over(&event)?;
                    return Ok(Poll::Ready(Some(Ok(event))));
                }
                // It was queued a moment ago.
                Some(Waiting::Changed(id)) => backlog.put_back(id)?,
                None if backlog.is_ended => {
                    let cut_off = backlog.cut_off.take();
                    return Ok(Poll::Ready(cut_off.map(|why| Err(why.into()))));
                }
                None => {
                    backlog.is_sent();
                    backlog.reader = Some(context.waker().clone());
                    return Ok(Poll::Pending);
                }
            }
        }
    }
}

type Item = Result<ConnectionEvent, Status>;

impl tokio_stream::Stream for Events {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Item>> {
        match self.poll_event(context) {
            Ok(polled) => polled,
            Err(full) => {
                self.monitors.cut_off.inc();
                self.monitors.remove(&self.key);
                Poll::Ready(Some(Err(CutOff::from(full).into())))
            }
        }
    }
}

impl From<CutOff> for Status {
    fn from(cut_off: CutOff) -> Self {
        Self::resource_exhausted(cut_off.to_string())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.monitors.remove(&self.key);
    }
}

impl Monitors {
    /// Of these connections.
    pub(crate) fn of(connections: Connections, budget: &Budget) -> Self {
        Self {
            subscribers: Arc::default(),
            next: Arc::default(),
            connections,
            streams: budget.streams.clone(),
            bytes: budget.bytes.clone(),
            cut_off: Counter::default(),
        }
    }

    /// Counts how often a stream was cut off.
    pub(crate) fn register_metrics(&self, registry: &mut Registry) {
        registry.register(
            "monitors_cut_off",
            "Monitor streams that were ended because their events were not read",
            self.cut_off.clone(),
        );
    }

    /// Subscribes, with the matching connections that there are as the first events.
    ///
    /// They are found while no event can be published, so nothing is missed between them and the events that follow.
    ///
    /// # Errors
    /// The holder has as many streams, or as many bytes, as it may.
    pub(crate) fn subscribe(
        &self,
        reader: Reader,
        selector: MonitorScopeSelector,
    ) -> Result<Events, NoPlace> {
        let Reader { owner, holder, .. } = reader;
        let place = self.streams.take(holder, 1)?;
        // The selector is kept twice: for the events that come, and for what is read.
        let bytes = self
            .bytes
            .take(holder, 2 * selector.encoded_len() + STREAM)?;
        let segment = selector
            .path_segments
            .iter()
            .map(|segment| segment.id.as_str())
            .find(|id| !id.is_empty())
            .unwrap_or_default()
            .to_owned();
        let hop = match selector.path_segments.as_slice() {
            [hop] if reader.skips_answered => Some(hop.name.clone()),
            _ => None,
        };
        let key = (segment, self.next.fetch_add(1, Ordering::Relaxed));
        let backlog = Arc::new(Mutex::new(Backlog::new(bytes)));
        let mut subscribers = lock(&self.subscribers);
        {
            let mut backlog = lock(&backlog);
            for established in self.connections.candidates(&selector) {
                if matches(&selector, owner, &established) {
                    backlog.change(&established.view.id)?;
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
                    owner,
                    hop,
                    selector: selector.clone(),
                    backlog: Arc::clone(&backlog),
                },
            );
        drop(subscribers);
        Ok(Events {
            initial: Some(ConnectionEventType::InitialStateTransfer),
            owner,
            selector,
            backlog,
            monitors: self.clone(),
            key,
            _place: place,
        })
    }

    /// Publishes what became of a connection.
    pub(crate) fn publish(&self, kind: ConnectionEventType, established: &Established) {
        self.publish_but_to(None, kind, established);
    }

    /// Publishes how these connections are now, many of them in one event.
    pub(crate) fn publish_all(&self, ids: &[String]) {
        let changed = ids.iter().filter_map(|id| self.connections.current(id));
        let changed: Vec<_> = changed.collect();
        for established in changed {
            self.publish(ConnectionEventType::Update, &established);
        }
    }

    /// Publishes to everyone but the previous hop, which has asked for the change and gets the
    /// answer. Only a stream that was opened so is passed over ([`crate::peer::stream::SKIP_ANSWERED`]): through it
    /// would go an event for each Request and Close, of no news to anybody.
    pub(crate) fn publish_answered(&self, kind: ConnectionEventType, established: &Established) {
        let previous = established.view.path.as_ref().and_then(|path| {
            let at = path.index.checked_sub(1)?;
            path.path_segments.get(at as usize)
        });
        self.publish_but_to(
            previous.map(|segment| segment.name.as_str()),
            kind,
            established,
        );
    }

    fn publish_but_to(
        &self,
        answered: Option<&str>,
        kind: ConnectionEventType,
        established: &Established,
    ) {
        let connection = &established.view;
        let mut subscribers = lock(&self.subscribers);
        if subscribers.by_segment.is_empty() {
            return;
        }
        for segment in segments(connection) {
            let Some(of_segment) = subscribers.by_segment.get_mut(segment) else {
                continue;
            };
            of_segment.retain(|_, subscriber| {
                let has_the_answer =
                    subscriber.hop.is_some() && subscriber.hop.as_deref() == answered;
                if has_the_answer || !matches(&subscriber.selector, subscriber.owner, established) {
                    return true;
                }
                let keeps_up = subscriber.queue(kind, connection);
                if !keeps_up {
                    self.cut_off.inc();
                }
                keeps_up
            });
            if of_segment.is_empty() {
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
        if let Some(of_segment) = subscribers.by_segment.get_mut(segment) {
            of_segment.remove(number);
            if of_segment.is_empty() {
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

fn matches(selector: &MonitorScopeSelector, owner: Owner, established: &Established) -> bool {
    owner.may_follow(&established.owner) && selects(selector, &established.view)
}

fn selects(selector: &MonitorScopeSelector, connection: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&connection.network_service) {
        return false;
    }
    // Most selectors name one connection by an id, which is cheaper to compare than the whole path.
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
mod tests;
