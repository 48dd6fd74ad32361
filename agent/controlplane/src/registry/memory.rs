//! The registry in this process: what an agent is for its domain when it is not pointed at another.
//!
//! Invariants:
//! - An endpoint is gone at its expiry, to the tick: every call first drops what is due, so that
//!   the timer task only serves the watchers of a quiet registry. There is one such task, not one
//!   an entry; it ends with the last handle.
//! - Expiry is granted in wall-clock time (that is what the wire carries) and kept in monotonic
//!   time, so that a step of the clock does not empty the registry.
//! - Nothing grows without bound: entries, their sizes, watchers and each watcher's queue have
//!   limits ([`Limits`]). A watcher that does not keep up is dropped, with an error.
//! - An entry is shared, not copied: Find and every watcher hold the same `Arc`.

mod admission;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use nsm_core::identity::{
    Caller, Owner,
    policy::{Action, Name, decide},
};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::{sync::Notify, time::Instant};

use self::table::{Counted, Table};
pub use self::{
    admission::{DEFAULT_PAYLOAD, Limits, Stored},
    watch::Watch,
};
use super::{Counts, DomainRegistry, Entries, Events, Terms, entry::Entry};
use crate::{
    deadlines::Deadlines,
    error::{RegistryError, RequestError},
};

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
    /// Watches of the whole registry, which share one limit.
    watchers: Arc<AtomicUsize>,
    state: Mutex<State<E>>,
}

struct State<E> {
    table: Table<E>,
    /// When each entry expires that does.
    deadlines: Deadlines,
    /// Who registered each entry that has an owner.
    owners: HashMap<String, Owner>,
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
        let limits = Arc::new(limits.with_ceiling());
        let watchers = Arc::default();
        let memory = Self {
            services: Store::new(&limits, &watchers),
            endpoints: Store::new(&limits, &watchers),
        };
        let endpoints = &memory.endpoints.inner;
        tokio::spawn(expire(
            Arc::downgrade(endpoints),
            Arc::clone(&endpoints.wake),
        ));
        memory
    }

    /// What the registry holds now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            services: self.services.inner.lock().table.len(),
            endpoints: self.endpoints.inner.lock().table.len(),
            watchers: self.services.inner.watchers.load(Ordering::Relaxed),
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
        Ok(self.register_of(Some(&terms.caller), entry, now, bounds)?)
    }

    async fn unregister(&self, entry: E, terms: Terms) -> Result<(), RequestError> {
        let mut state = self.inner.lock();
        let name = entry.name();
        decide(&terms.caller, Action::Unregister(state.name(name)))?;
        state.remove(name);
        Ok(())
    }

    async fn find(&self, query: E, _: Instant) -> Result<Events<E>, RequestError> {
        Ok(Events::at_hand(self.find(&query)))
    }

    async fn watch(&self, query: E, _: Instant) -> Result<Events<E>, RequestError> {
        let watch = self.watch(query)?;
        Ok(Events::arriving(tokio_stream::StreamExt::map(
            watch,
            |event| Ok(event?),
        )))
    }
}

impl<E: Stored> Store<E> {
    fn new(limits: &Arc<Limits>, watchers: &Arc<AtomicUsize>) -> Self {
        let state = State {
            table: Table::new(),
            deadlines: Deadlines::default(),
            owners: HashMap::new(),
            is_closed: false,
        };
        Self {
            inner: Arc::new(Inner {
                limits: Arc::clone(limits),
                wake: Arc::default(),
                watchers: Arc::clone(watchers),
                state: Mutex::new(state),
            }),
        }
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
        self.register_of(None, entry, now, bounds)
    }

    /// The same for a caller, who owns the entry where its kind has owners.
    fn register_of(
        &self,
        caller: Option<&Caller>,
        mut entry: E,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<E, RegistryError> {
        let limits = &self.inner.limits;
        limits.check(&entry)?;
        let life = entry.admit(limits, now, bounds)?;
        let mut state = self.inner.open()?;
        if let Some(caller) = caller {
            decide(caller, Action::Register(state.name(entry.name())))?;
        }
        let known = state.table.get(entry.name());
        if known.is_none() && state.table.len() >= E::limit(limits) {
            return Err(RegistryError::Full {
                kind: E::KIND,
                name: entry.name().to_owned(),
                limit: E::limit(limits),
            });
        }
        entry.succeed(known.map(Arc::as_ref), now);
        if let Some(life) = life
            && state.deadlines.set(entry.name(), Instant::now() + life)
        {
            self.inner.wake.notify_one();
        }
        state.table.put(Arc::new(entry.clone()));
        if let (Some(caller), true) = (caller, E::HAS_OWNER) {
            state.owners.insert(entry.name().to_owned(), caller.owner());
        }
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
        let depth = self.inner.limits.watch_depth;
        let mut state = self.inner.open()?;
        let counted = Counted::one_of(&self.inner.watchers, self.inner.limits.watchers)?;
        let admission = state.table.watch(query, depth, counted);
        Ok(Watch::new(&self.inner, depth, admission))
    }

    fn close(&self) {
        let mut state = self.inner.lock();
        state.is_closed = true;
        state.table.unwatch_all();
    }
}

impl<E: Entry> State<E> {
    /// A name with its owner.
    fn name<'a>(&self, name: &'a str) -> Name<'a> {
        Name {
            full: name,
            owner: self.owners.get(name).copied(),
        }
    }

    fn remove(&mut self, name: &str) -> bool {
        self.deadlines.clear(name);
        self.owners.remove(name);
        self.table.remove(name).is_some()
    }

    fn drop_expired(&mut self, now: Instant) {
        while let Some(name) = self.deadlines.pop_due(now) {
            tracing::debug!(entry.kind = E::KIND, entry.name = %name, "an entry has expired");
            self.owners.remove(&*name);
            self.table.remove(&name);
        }
    }
}

impl<E: Entry> Inner<E> {
    /// The state, without what has expired.
    fn lock(&self) -> MutexGuard<'_, State<E>> {
        // A panic under the lock leaves at worst a stale index entry, which every reader tolerates.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.drop_expired(Instant::now());
        state
    }

    fn open(&self) -> Result<MutexGuard<'_, State<E>>, RegistryError> {
        let state = self.lock();
        if state.is_closed {
            return Err(RegistryError::Closed);
        }
        Ok(state)
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
async fn expire<E: Entry>(store: Weak<Inner<E>>, wake: Arc<Notify>) {
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
