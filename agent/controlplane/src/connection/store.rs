//! The connections of this agent, and the rule that one event at a time works on each.
//!
//! A [`Slot`] is found by the id of our own path segment. Its queue admits one Request, Close or
//! expiry at a time, in order of arrival; readers (status, monitors) look at the established state
//! without queueing. A slot without an established connection and without a waiter is forgotten,
//! so refused Requests leave nothing behind.
//!
//! A slot holds the place of its connection, and the bytes of what is established in it. A Request brings bytes for the largest
//! connection that it may lead to, so that what the next hop has granted always finds room.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nsm_core::{identity::share::Holder, link::admission::MAX_CONNECTION, liveness::PathId};
use nsm_proto::connection::MonitorScopeSelector;
use prost::Message as _;
use tokio::{sync::OwnedMutexGuard, time::Instant};

use crate::{
    connection::{
        index::{ConnectionId, Indexes, Number},
        model::Established,
    },
    error::RequestError,
    places::{Budget, Place, Places},
    sync::lock,
};

/// What a connection takes beside its bytes on the wire: its place in the indexes, the names of its route, the plan of its links. Measured
/// with ten thousand of them.
const FIXED: usize = 2 << 10;

/// What an event makes of an established connection; `None` when it changes nothing.
pub(crate) type Change = Box<dyn FnOnce(&Established) -> Option<Established> + Send>;

/// What happened to a connection elsewhere.
pub(crate) enum News {
    /// The next hop has published an update of it.
    Reported(Change),
    /// The next hop has published its end.
    Gone(Change),
    /// The monitor stream from the next hop is lost.
    StreamLost(Change),
    /// The health of its path may have changed. That is checked in the connection's turn whatever the news.
    Path,
}

/// One connection's place in the store.
pub(crate) struct Slot {
    queue: Arc<tokio::sync::Mutex<()>>,
    current: Mutex<Current>,
    /// The news that came while a Request or Close was at work, at most one: see [`Connections::on_event`].
    missed: Mutex<Option<News>>,
    _place: Place,
}

/// What is established in a slot.
#[derive(Debug, Default)]
struct Current {
    established: Option<Arc<Established>>,
    /// Its number in the indexes.
    number: Option<Number>,
    /// What it is charged.
    bytes: Option<Place>,
}

impl Slot {
    fn new(place: Place) -> Self {
        Self {
            queue: Arc::default(),
            current: Mutex::default(),
            missed: Mutex::default(),
            _place: place,
        }
    }

    /// What is established now.
    pub(crate) fn current(&self) -> Option<Arc<Established>> {
        lock(&self.current).established.clone()
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot")
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

/// A use of a slot. The last one to go forgets a slot in which nothing is established, whether it
/// finished its work, timed out in the queue or was cancelled.
#[derive(Debug)]
struct SlotUse {
    id: ConnectionId,
    /// There until the use is dropped.
    slot: Option<Arc<Slot>>,
    store: Arc<Store>,
}

impl SlotUse {
    fn slot(&self) -> &Arc<Slot> {
        self.slot
            .as_ref()
            .expect("a use has its slot until it is dropped")
    }
}

impl Drop for SlotUse {
    fn drop(&mut self) {
        let mut slots = lock(&self.store.slots);
        // Let go under the lock: of two uses that end at once, the second then sees the map alone.
        drop(self.slot.take());
        let is_last = slots
            .get(&self.id)
            .is_some_and(|slot| Arc::strong_count(slot) == 1 && slot.current().is_none());
        if is_last {
            slots.remove(&self.id);
        }
    }
}

/// The right to work on one connection; dropped, the next event may.
#[derive(Debug)]
pub(crate) struct Turn {
    _queue: OwnedMutexGuard<()>,
    held: SlotUse,
    /// Bytes for what a Request establishes.
    reserved: Mutex<Option<Place>>,
}

impl Turn {
    /// The id of our segment.
    pub(crate) fn id(&self) -> &str {
        &self.held.id
    }

    /// What is established now.
    pub(crate) fn current(&self) -> Option<Arc<Established>> {
        self.held.slot().current()
    }

    /// Whether what is established is charged so many bytes or more.
    fn is_charged(&self, bytes: usize) -> bool {
        let current = lock(&self.held.slot().current);
        current
            .bytes
            .as_ref()
            .is_some_and(|place| place.amount() >= bytes + FIXED)
    }

    fn of(queue: OwnedMutexGuard<()>, held: SlotUse) -> Self {
        Self {
            _queue: queue,
            held,
            reserved: Mutex::default(),
        }
    }

    /// Replaces what is established.
    pub(crate) fn set(&self, established: Option<Arc<Established>>) {
        let SlotUse { id, store, .. } = &self.held;
        let mut indexes = lock(&store.indexes);
        let mut current = lock(&self.held.slot().current);
        let Current {
            established: old,
            number,
            bytes,
        } = &mut *current;
        match (&established, &mut *lock(&self.reserved)) {
            (None, _) => *bytes = None,
            (Some(new), Some(reserved)) => {
                // Given back first: a connection that is refreshed is not charged twice.
                *bytes = None;
                *bytes = Some(reserved.split(new.view.encoded_len() + FIXED));
            }
            (Some(_), None) => {}
        }
        indexes.replace(id, number, old.as_deref(), established.as_deref());
        // What was before is dropped without the locks.
        let old = std::mem::replace(old, established);
        drop((current, indexes));
        drop(old);
    }
}

#[derive(Debug, Default)]
struct Store {
    slots: Mutex<HashMap<ConnectionId, Arc<Slot>>>,
    indexes: Mutex<Indexes>,
    draining: AtomicBool,
}

/// All connections of this agent.
#[derive(Debug, Clone)]
pub(crate) struct Connections {
    store: Arc<Store>,
    places: Places,
    bytes: Places,
}

/// What asks for a turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim {
    /// Who asks.
    pub(crate) holder: Holder,
    /// The bytes of the connection in the call.
    pub(crate) bytes: usize,
    /// When the caller stops waiting.
    pub(crate) deadline: Instant,
}

impl Connections {
    /// An empty store.
    pub(crate) fn new(budget: &Budget) -> Self {
        Self {
            store: Arc::default(),
            places: budget.connections.clone(),
            bytes: budget.bytes.clone(),
        }
    }

    /// Queues for the connection, making its slot when it has none.
    ///
    /// # Errors
    /// When there is no place for the connection, when the agent drains and nothing is established, or when the queue
    /// did not move until the deadline.
    pub(crate) async fn admit(&self, id: &str, claim: Claim) -> Result<Turn, RequestError> {
        let reserved = self.bytes.take(claim.holder, MAX_CONNECTION + FIXED);
        let held = {
            let mut slots = lock(&self.store.slots);
            let known = slots.get_key_value(id);
            let (id, slot) = match known {
                Some((id, slot)) => (Arc::clone(id), Arc::clone(slot)),
                None if self.is_draining() => return Err(RequestError::Draining),
                None => {
                    if let Err(full) = reserved {
                        return Err(full.into());
                    }
                    let place = self.places.take(claim.holder, 1)?;
                    let (id, slot) = (ConnectionId::from(id), Arc::new(Slot::new(place)));
                    slots.insert(Arc::clone(&id), Arc::clone(&slot));
                    (id, slot)
                }
            };
            self.hold(id, slot)
        };
        let mut turn = queue(held, claim.deadline).await?;
        turn.reserved = match reserved {
            Ok(place) => Mutex::new(Some(place)),
            // A connection that stands is refreshed all the same, as long as it does not grow.
            Err(_) if turn.is_charged(claim.bytes) => Mutex::default(),
            Err(full) => return Err(full.into()),
        };
        // The drain was ahead in the queue: what it closed does not come back.
        if self.is_draining() && turn.current().is_none() {
            return Err(RequestError::Draining);
        }
        Ok(turn)
    }

    /// Queues for a connection that exists; `None` when it does not.
    ///
    /// # Errors
    /// When the queue did not move until `deadline`.
    pub(crate) async fn admit_known(
        &self,
        id: &str,
        deadline: Instant,
    ) -> Result<Option<Turn>, RequestError> {
        let Some(held) = self.hold_known(id) else {
            return Ok(None);
        };
        queue(held, deadline).await.map(Some)
    }

    fn hold_known(&self, id: &str) -> Option<SlotUse> {
        let slots = lock(&self.store.slots);
        let (id, slot) = slots.get_key_value(id)?;
        Some(self.hold(Arc::clone(id), Arc::clone(slot)))
    }

    fn hold(&self, id: ConnectionId, slot: Arc<Slot>) -> SlotUse {
        SlotUse {
            id,
            slot: Some(slot),
            store: Arc::clone(&self.store),
        }
    }

    /// Calls `apply` with the turn of a connection and news of it: at once, or after the Request or Close that is at work on it.
    ///
    /// Of the news that come meanwhile the last one counts, so that a peer that reports much keeps one waiting at most. News of the
    /// path never replace a report, and a lost stream never replaces the report that the connection is gone.
    pub(crate) fn on_event(
        &self,
        id: &str,
        patience: Duration,
        news: News,
        apply: impl FnOnce(&Turn, News) + Send + 'static,
    ) {
        let Some(held) = self.hold_known(id) else {
            return;
        };
        if let Ok(guard) = Arc::clone(&held.slot().queue).try_lock_owned() {
            let turn = Turn::of(guard, held);
            apply(&turn, news);
            return;
        }
        let is_first = {
            let mut missed = lock(&held.slot().missed);
            let is_first = missed.is_none();
            let counts = match (&*missed, &news) {
                (None, _) => true,
                // A report that the connection is gone stays true when the stream that brought it ends.
                (Some(News::Gone(_)), News::StreamLost(_)) | (Some(_), News::Path) => false,
                (Some(_), News::Reported(_) | News::Gone(_) | News::StreamLost(_)) => true,
            };
            if counts {
                *missed = Some(news);
            }
            is_first
        };
        if !is_first {
            return;
        }
        tokio::spawn(async move {
            let queue = Arc::clone(&held.slot().queue);
            let guard = tokio::time::timeout(patience, queue.lock_owned()).await;
            let missed = lock(&held.slot().missed).take();
            if let (Ok(guard), Some(news)) = (guard, missed) {
                let turn = Turn::of(guard, held);
                apply(&turn, news);
            }
        });
    }

    /// Every established connection.
    pub(crate) fn all(&self) -> Vec<Arc<Established>> {
        lock(&self.store.slots)
            .values()
            .filter_map(|slot| slot.current())
            .collect()
    }

    /// The established connections for which `path` is watched.
    pub(crate) fn on_path(&self, path: PathId) -> Vec<Arc<Established>> {
        let ids = lock(&self.store.indexes).on_path(path);
        self.of(&ids)
    }

    /// The established connections whose tunnel ends at `remote`.
    pub(crate) fn to(&self, remote: IpAddr) -> Vec<Arc<Established>> {
        let ids = lock(&self.store.indexes).to(remote);
        self.of(&ids)
    }

    /// The established connections that a selector may mean, some that it does not mean among them.
    pub(crate) fn candidates(&self, selector: &MonitorScopeSelector) -> Vec<Arc<Established>> {
        let ids = lock(&self.store.indexes).candidates(selector);
        match ids {
            Some(ids) => self.of(&ids),
            None => self.all(),
        }
    }

    fn of(&self, ids: &[ConnectionId]) -> Vec<Arc<Established>> {
        let slots = lock(&self.store.slots);
        let slots = ids.iter().filter_map(|id| slots.get(id));
        slots.filter_map(|slot| slot.current()).collect()
    }

    /// The established connection of this id.
    pub(crate) fn current(&self, id: &str) -> Option<Arc<Established>> {
        lock(&self.store.slots).get(id)?.current()
    }

    /// Whether there is a slot of this id, established or at work.
    pub(crate) fn has(&self, id: &str) -> bool {
        lock(&self.store.slots).contains_key(id)
    }

    /// Ids of all slots, established or at work.
    pub(crate) fn ids(&self) -> Vec<ConnectionId> {
        lock(&self.store.slots).keys().cloned().collect()
    }

    /// Slots in use, established or at work.
    pub(crate) fn len(&self) -> usize {
        lock(&self.store.slots).len()
    }

    /// Refuses new connections from now on; those that exist can still be refreshed and closed.
    pub(crate) fn drain(&self) {
        self.store.draining.store(true, Ordering::Release);
    }

    /// Whether the agent is on its way out.
    pub(crate) fn is_draining(&self) -> bool {
        self.store.draining.load(Ordering::Acquire)
    }
}

async fn queue(held: SlotUse, deadline: Instant) -> Result<Turn, RequestError> {
    let began = Instant::now();
    let queue = Arc::clone(&held.slot().queue);
    match tokio::time::timeout_at(deadline, queue.lock_owned()).await {
        Ok(guard) => Ok(Turn::of(guard, held)),
        Err(_) => Err(RequestError::Busy {
            id: held.id.to_string(),
            after: began.elapsed(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::mem::discriminant;

    use tokio::sync::oneshot;

    use super::*;
    use crate::places::Limits;

    type Make = fn() -> News;

    fn reported() -> News {
        News::Reported(Box::new(|_| None))
    }

    fn gone() -> News {
        News::Gone(Box::new(|_| None))
    }

    fn lost() -> News {
        News::StreamLost(Box::new(|_| None))
    }

    /// While a Request is at work: which of the news is applied after it.
    #[tokio::test]
    async fn the_last_report_counts_but_a_lost_stream_does_not_replace_an_end() {
        let path: Make = || News::Path;
        for (first, then, expected) in [
            (reported as Make, lost as Make, lost as Make),
            (lost, reported, reported),
            (reported, gone, gone),
            (gone, reported, reported),
            (gone, lost, gone),
            (lost, path, lost),
            (path, lost, lost),
        ] {
            let connections = Connections::new(&Budget::new(&Limits::wide()));
            let patience = Duration::from_secs(60);
            let claim = Claim {
                holder: Holder::our_own(),
                bytes: 0,
                deadline: Instant::now() + patience,
            };
            let turn = connections.admit("id", claim).await;
            let turn = turn.expect("nobody else is at work");
            let (sender, applied) = oneshot::channel();
            // The first is the one that waits for the turn.
            connections.on_event("id", patience, first(), move |_, news| {
                assert!(sender.send(news).is_ok());
            });
            connections.on_event("id", patience, then(), |_, _| {
                unreachable!("it is the second")
            });
            drop(turn);
            let applied = applied.await.expect("applied");
            assert_eq!(discriminant(&applied), discriminant(&expected()));
        }
    }
}
