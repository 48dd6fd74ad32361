//! The registry in this process: what an agent is for its domain when it is not pointed at another.
//!
//! Invariants:
//! - An endpoint is gone at its expiry, to the tick: every call first drops what is due, so that
//!   the timer task only serves the watchers of a quiet registry. There is one such task for each kind, not one
//!   an entry; it ends with the last handle. A network service stays while an endpoint offers it, and a day after.
//! - Expiry is granted in wall-clock time (that is what the wire carries) and kept in monotonic
//!   time, so that a step of the clock does not empty the registry.
//! - Nothing grows without bound: the size of an entry and the queue of a watcher have limits ([`Limits`]), and who registers or
//!   watches is charged for it ([`Budget`]). A watcher that does not keep up is dropped, with an error.
//! - An entry is shared, not copied: Find and every watcher hold the same `Arc`.

mod admission;
mod ownership;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::SystemTime,
};

use nsm_core::identity::{
    Owner,
    policy::{Action, Name, Refusal, decide},
    share::Holder,
};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::{sync::Notify, time::Instant};

pub use self::{
    admission::{DEFAULT_PAYLOAD, Limits, Stored},
    watch::Watch,
};
use self::{
    ownership::Registered,
    table::{Charged, Table},
};
use super::{Asker, Counts, DomainRegistry, Entries, Events, Terms};
use crate::{
    deadlines::Deadlines,
    error::{RegistryError, RequestError},
    places::{Budget, Limits as Wide, NoPlace},
};

/// What an entry takes beside its bytes on the wire: its places in the indexes, its deadline and its owner.
const FIXED: usize = 512;

/// What a watch takes while nothing waits in it: its queue, and the stream behind it.
pub(crate) const STREAM: usize = 4 << 10;

/// A registry in this process; clones share it.
#[derive(Clone)]
pub struct Memory {
    /// The network services.
    pub services: Store<NetworkService>,
    /// The endpoints.
    pub endpoints: Store<NetworkServiceEndpoint>,
}

/// The entries of one kind; clones share them.
pub struct Store<E> {
    inner: Arc<Inner<E>>,
}

struct Inner<E> {
    limits: Arc<Limits>,
    /// Wakes the expiry task: the earliest deadline moved, or the last handle is gone.
    wake: Arc<Notify>,
    budget: Budget,
    /// Where the endpoints are that offer what is here.
    offered_by: Option<Weak<Inner<NetworkServiceEndpoint>>>,
    state: Mutex<State<E>>,
}

struct State<E> {
    table: Table<E>,
    /// When each entry expires.
    deadlines: Deadlines,
    /// Who registered each entry.
    registered: HashMap<String, Registered>,
    is_closed: bool,
}

impl Memory {
    /// Starts an empty registry and the task that expires its endpoints.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self::charging(limits, &Budget::new(&Wide::wide()))
    }

    /// The same, with what its callers may hold of the agent.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn charging(limits: Limits, budget: &Budget) -> Self {
        let limits = Arc::new(limits.with_ceiling());
        let endpoints = Store::new(&limits, budget, None);
        let offered_by = Arc::downgrade(&endpoints.inner);
        let services = Store::new(&limits, budget, Some(offered_by));
        services.keep_time();
        endpoints.keep_time();
        Self {
            services,
            endpoints,
        }
    }

    /// What the registry holds now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let (services, of_services) = self.services.counts();
        let (endpoints, of_endpoints) = self.endpoints.counts();
        Counts {
            services,
            endpoints,
            watchers: of_services + of_endpoints,
        }
    }

    /// Ends every watch and refuses new registrations and watches, so that a draining server is
    /// not held open by them. What is registered can still be found.
    pub fn close(&self) {
        self.services.close();
        self.endpoints.close();
    }
}

impl DomainRegistry for Memory {
    fn services(&self) -> &dyn Entries<NetworkService> {
        &self.services
    }

    fn endpoints(&self) -> &dyn Entries<NetworkServiceEndpoint> {
        &self.endpoints
    }

    fn counts(&self) -> Option<Counts> {
        Some(self.counts())
    }

    fn close(&self) {
        self.close();
    }
}

#[tonic::async_trait]
impl<E: Stored> Entries<E> for Store<E> {
    async fn register(&self, entry: E, terms: Terms) -> Result<E, RequestError> {
        let bounds = terms.expires.as_slice();
        let now = SystemTime::now();
        Ok(self.register_for(Some(&terms), entry, now, bounds)?)
    }

    async fn unregister(&self, entry: E, terms: Terms) -> Result<(), RequestError> {
        let mut state = self.inner.lock();
        let name = entry.name();
        let owner = self.inner.owner(&state, name);
        decide(
            &terms.caller,
            Action::Unregister(Name { full: name, owner }),
        )?;
        state.remove(name);
        Ok(())
    }

    async fn find(&self, query: E, _: Instant) -> Result<Events<E>, RequestError> {
        Ok(Events::at_hand(self.find(&query)))
    }

    async fn watch(&self, query: E, asker: Asker) -> Result<Events<E>, RequestError> {
        let watch = self.watch_for(asker.holder, query)?;
        Ok(Events::arriving(tokio_stream::StreamExt::map(
            watch,
            |event| Ok(event?),
        )))
    }
}

impl<E: Stored> Store<E> {
    fn new(
        limits: &Arc<Limits>,
        budget: &Budget,
        offered_by: Option<Weak<Inner<NetworkServiceEndpoint>>>,
    ) -> Self {
        let state = State {
            table: Table::new(),
            deadlines: Deadlines::default(),
            registered: HashMap::new(),
            is_closed: false,
        };
        Self {
            inner: Arc::new(Inner {
                limits: Arc::clone(limits),
                wake: Arc::default(),
                budget: budget.clone(),
                offered_by,
                state: Mutex::new(state),
            }),
        }
    }

    /// Starts the task that drops entries as they expire.
    fn keep_time(&self) {
        let wake = Arc::clone(&self.inner.wake);
        tokio::spawn(expire(Arc::downgrade(&self.inner), wake));
    }

    /// How many entries there are, and how many watch them.
    fn counts(&self) -> (usize, usize) {
        let state = self.inner.lock();
        (state.table.len(), state.table.watchers())
    }

    /// Registers an entry or replaces the one of that name. Gives what is registered, completed by [`Stored::admit`]: `bounds` are
    /// the expirations of the tokens on its path.
    ///
    /// # Errors
    ///
    /// Without a name, when it has expired already, over a limit, or when the registry is closing.
    pub fn register(
        &self,
        entry: E,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<E, RegistryError> {
        self.register_for(None, entry, now, bounds)
    }

    /// The same for a caller, who then owns the entry and is charged for it.
    fn register_for(
        &self,
        terms: Option<&Terms>,
        mut entry: E,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<E, RegistryError> {
        let limits = &self.inner.limits;
        limits.check(&entry)?;
        let mut state = self.inner.open()?;
        if let Some(present) = self.inner.as_another_has_it(&state, &entry, terms)? {
            return Ok(present);
        }
        entry.succeed(state.table.get(entry.name()).map(Arc::as_ref), now);
        let life = entry.admit(limits, now, bounds)?;
        if let Some(terms) = terms {
            self.inner.charge(&mut state, &entry, terms)?;
        }
        if state.deadlines.set(entry.name(), Instant::now() + life) {
            self.inner.wake.notify_one();
        }
        state.table.put(Arc::new(entry.clone()));
        Ok(entry)
    }

    /// Removes an entry. True when it was there; a repeated call is no error.
    pub fn unregister(&self, name: &str) -> bool {
        self.inner.lock().remove(name)
    }

    /// The entries that match, in the order of their names. An empty query matches all.
    #[must_use]
    pub fn find(&self, query: &E) -> Vec<Arc<E>> {
        self.inner.lock().table.find(query)
    }

    /// Watches entries: those that match now, then every change.
    ///
    /// # Errors
    ///
    /// When too many watches are open or the registry is closing.
    pub fn watch(&self, query: E) -> Result<Watch<E>, RegistryError> {
        self.watch_for(Holder::our_own(), query)
    }

    fn watch_for(&self, holder: Holder, query: E) -> Result<Watch<E>, RegistryError> {
        let depth = self.inner.limits.watch_depth;
        let bytes = &self.inner.budget.bytes;
        let bytes = bytes.take(holder, STREAM + query.encoded_len())?;
        let mut state = self.inner.open()?;
        let admission = state.table.watch(query, depth, Charged::to(bytes))?;
        Ok(Watch::new(&self.inner, depth, admission))
    }

    fn close(&self) {
        let mut state = self.inner.lock();
        state.is_closed = true;
        state.table.unwatch_all();
    }
}

impl<E: Stored> State<E> {
    fn remove(&mut self, name: &str) -> bool {
        self.deadlines.clear(name);
        self.registered.remove(name);
        self.table.remove(name).is_some()
    }
}

impl State<NetworkServiceEndpoint> {
    /// Who has registered endpoints of a service, who has for longest first.
    fn offering(&self, service: &str) -> Vec<Owner> {
        let names = self.table.of_service(service);
        let mut offering: Vec<_> = names
            .filter_map(|name| self.registered.get(&**name))
            .collect();
        offering.sort_by_key(|registered| registered.first);
        offering.iter().map(|registered| registered.owner).collect()
    }
}

impl<E: Stored> Inner<E> {
    /// The state, without what has expired. Who holds the state of the services may lock that of the endpoints, not the reverse.
    fn lock(&self) -> MutexGuard<'_, State<E>> {
        // A panic under the lock leaves at worst a stale index entry, which every reader tolerates.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.drop_expired(&mut state, Instant::now());
        state
    }

    fn open(&self) -> Result<MutexGuard<'_, State<E>>, RegistryError> {
        let state = self.lock();
        if state.is_closed {
            return Err(RegistryError::Closed);
        }
        Ok(state)
    }

    fn drop_expired(&self, state: &mut State<E>, now: Instant) {
        while let Some(name) = state.deadlines.pop_due(now) {
            if self.is_offered(&name) {
                // Whether it is the earliest does not matter: the timer asks for the next one anyway.
                let _ = state.deadlines.set(&name, now + self.limits.service_life);
                continue;
            }
            tracing::debug!(entry.kind = E::KIND, entry.name = %name, "an entry has expired");
            state.registered.remove(&*name);
            state.table.remove(&name);
        }
    }

    /// Whether an endpoint offers the service of this name.
    fn is_offered(&self, service: &str) -> bool {
        let endpoints = self.offered_by.as_ref().and_then(Weak::upgrade);
        endpoints
            .is_some_and(|endpoints| endpoints.lock().table.of_service(service).next().is_some())
    }

    /// Whose an entry is, when somebody has it.
    fn owner(&self, state: &State<E>, name: &str) -> Option<Owner> {
        let registered = state.registered.get(name)?;
        let Some(endpoints) = &self.offered_by else {
            return Some(registered.owner);
        };
        let offering = endpoints.upgrade().map(|it| it.lock().offering(name));
        registered.owner_among(&offering.unwrap_or_default(), Instant::now())
    }

    /// The entry as it is registered, where another has it and this registration would change nothing of it.
    ///
    /// # Errors
    /// It would, and the caller may not.
    fn as_another_has_it(
        &self,
        state: &State<E>,
        entry: &E,
        terms: Option<&Terms>,
    ) -> Result<Option<E>, Refusal> {
        let (name, known) = (entry.name(), state.table.get(entry.name()));
        let (Some(terms), Some(known)) = (terms, known) else {
            return Ok(None);
        };
        let owner = self.owner(state, name);
        let is_anothers = owner.is_some_and(|owner| owner != terms.caller.owner());
        if is_anothers && entry.is_present_as(known) {
            return Ok(Some(E::clone(known)));
        }
        decide(&terms.caller, Action::Register(Name { full: name, owner }))?;
        Ok(None)
    }

    /// Charges the caller for an entry that is registered by it, and makes it the owner.
    fn charge(&self, state: &mut State<E>, entry: &E, terms: &Terms) -> Result<(), NoPlace> {
        let size = entry.encoded_len() + FIXED;
        let (owner, now) = (terms.caller.owner(), Instant::now());
        if let Some(registered) = state.registered.get_mut(entry.name()) {
            let bytes = &mut registered.bytes;
            bytes.grow(size.saturating_sub(bytes.amount()))?;
            bytes.shrink(bytes.amount().saturating_sub(size));
            if registered.owner != owner {
                (registered.owner, registered.first) = (owner, now);
            }
            registered.last = now;
            return Ok(());
        }
        let place = self.budget.entries.take(terms.holder, 1)?;
        let bytes = self.budget.bytes.take(terms.holder, size)?;
        let registered = Registered {
            owner,
            first: now,
            last: now,
            _place: place,
            bytes,
        };
        state.registered.insert(entry.name().to_owned(), registered);
        Ok(())
    }
}

impl<E> Clone for Store<E> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<E> Drop for Inner<E> {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Drops entries as they expire, until the registry is gone.
async fn expire<E: Stored>(store: Weak<Inner<E>>, wake: Arc<Notify>) {
    loop {
        let next = match store.upgrade() {
            Some(store) => store.lock().deadlines.next(),
            None => return,
        };
        match next {
            // Both outcomes mean the same: take the next deadline.
            Some(deadline) => drop(tokio::time::timeout_at(deadline, wake.notified()).await),
            None => wake.notified().await,
        }
    }
}
