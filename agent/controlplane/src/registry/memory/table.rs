//! One table of named entries with its indices and its watchers.
//!
//! Services and endpoints differ in what a query compares and in nothing else, so both live in a
//! [`Table`]. The invariant that the rest leans on: whatever a query can match is found through
//! its [`Scope`], for entries (`find`) and, the other way round, for watchers (`notify`). A query
//! with a name reads one entry, one with a service the entries of that service; only a query
//! with neither is a scan.
//!
//! A table is plain data behind the registry's lock: no clock, no task.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use prost::Message;
use tokio::sync::mpsc;

use super::Stored;
use crate::{
    places::{NoPlace, Place},
    registry::entry::{Entry, Event},
    sync::lock,
};

/// Names a watcher of one table.
pub(super) type WatcherId = u64;

/// What the table hands to a new watcher.
pub(super) struct Admission<T> {
    pub(super) id: WatcherId,
    /// What matches now, in the order of names.
    pub(super) current: Vec<Arc<T>>,
    pub(super) events: mpsc::Receiver<Event<T>>,
    /// Set when the watcher was dropped because it did not keep up.
    pub(super) lagged: Arc<AtomicBool>,
    pub(super) charged: Charged,
}

struct Watcher<T> {
    query: T,
    events: mpsc::Sender<Event<T>>,
    lagged: Arc<AtomicBool>,
    charged: Charged,
}

/// What a watcher is charged for: the entries that it keeps from being freed. Both ends of its queue share it.
#[derive(Clone)]
pub(super) struct Charged(Arc<Mutex<Place>>);

impl Charged {
    pub(super) fn to(place: Place) -> Self {
        Self(Arc::new(Mutex::new(place)))
    }

    fn keep(&self, entry: &impl Message) -> Result<(), NoPlace> {
        lock(&self.0).grow(entry.encoded_len())
    }

    /// The watcher has taken an entry.
    pub(super) fn release(&self, entry: &impl Message) {
        lock(&self.0).shrink(entry.encoded_len());
    }
}

/// Where the entries are that a query can match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    Name(String),
    Service(String),
    All,
}

impl Scope {
    fn of(query: &impl Entry) -> Self {
        if !query.name().is_empty() {
            return Self::Name(query.name().to_owned());
        }
        match query.services().first() {
            Some(service) => Self::Service(service.clone()),
            None => Self::All,
        }
    }
}

pub(super) struct Table<T> {
    entries: BTreeMap<Arc<str>, Arc<T>>,
    by_service: HashMap<String, BTreeSet<Arc<str>>>,
    watchers: HashMap<WatcherId, Watcher<T>>,
    by_scope: HashMap<Scope, HashSet<WatcherId>>,
    next_watcher: WatcherId,
}

impl<T: Stored> Table<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            by_service: HashMap::new(),
            watchers: HashMap::new(),
            by_scope: HashMap::new(),
            next_watcher: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.entries.get(name)
    }

    /// Adds or replaces an entry and notifies its watchers.
    pub(super) fn put(&mut self, entry: Arc<T>) {
        let name: Arc<str> = Arc::from(entry.name());
        let before = self.entries.insert(Arc::clone(&name), Arc::clone(&entry));
        if let Some(before) = &before {
            self.unindex(before);
        }
        for service in entry.services() {
            self.by_service
                .entry(service.clone())
                .or_default()
                .insert(Arc::clone(&name));
        }
        self.notify(before.as_ref(), Some(&entry));
    }

    /// Takes an entry out and notifies its watchers.
    pub(super) fn remove(&mut self, name: &str) -> Option<Arc<T>> {
        let before = self.entries.remove(name)?;
        self.unindex(&before);
        self.notify(Some(&before), None);
        Some(before)
    }

    /// Every entry that `query` matches, in the order of names.
    pub(super) fn find(&self, query: &T) -> Vec<Arc<T>> {
        let matching = |entry: &&Arc<T>| query.matches(entry);
        match Scope::of(query) {
            Scope::Name(name) => self
                .get(&name)
                .into_iter()
                .filter(matching)
                .cloned()
                .collect(),
            Scope::Service(service) => self
                .by_service
                .get(&service)
                .into_iter()
                .flatten()
                .filter_map(|name| self.entries.get(name))
                .filter(matching)
                .cloned()
                .collect(),
            Scope::All => self.entries.values().filter(matching).cloned().collect(),
        }
    }

    /// Admits a watcher whose queue holds `depth` events; what matches now is in the answer, and
    /// every later change will be in its queue.
    ///
    /// # Errors
    /// What matches now is more than the watcher may hold.
    pub(super) fn watch(
        &mut self,
        query: T,
        depth: usize,
        charged: Charged,
    ) -> Result<Admission<T>, NoPlace> {
        let current = self.find(&query);
        for entry in &current {
            charged.keep(&**entry)?;
        }
        let (sender, events) = mpsc::channel(depth);
        let lagged = Arc::new(AtomicBool::new(false));
        let id = self.next_watcher;
        self.next_watcher += 1;
        self.by_scope
            .entry(Scope::of(&query))
            .or_default()
            .insert(id);
        self.watchers.insert(
            id,
            Watcher {
                query,
                events: sender,
                lagged: Arc::clone(&lagged),
                charged: charged.clone(),
            },
        );
        Ok(Admission {
            id,
            current,
            events,
            lagged,
            charged,
        })
    }

    /// Forgets a watcher; one that is unknown is forgotten already.
    pub(super) fn unwatch(&mut self, id: WatcherId) {
        let Some(watcher) = self.watchers.remove(&id) else {
            return;
        };
        let scope = Scope::of(&watcher.query);
        if let Some(ids) = self.by_scope.get_mut(&scope) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_scope.remove(&scope);
            }
        }
    }

    /// Ends every watch.
    pub(super) fn unwatch_all(&mut self) {
        self.watchers.clear();
        self.by_scope.clear();
    }

    /// How many watch.
    pub(super) fn watchers(&self) -> usize {
        self.watchers.len()
    }

    /// The entries of a service.
    pub(super) fn of_service(&self, service: &str) -> impl Iterator<Item = &Arc<str>> {
        self.by_service.get(service).into_iter().flatten()
    }

    #[cfg(test)]
    pub(super) fn scopes(&self) -> usize {
        self.by_scope.len()
    }

    #[cfg(test)]
    pub(super) fn indexed_services(&self) -> usize {
        self.by_service.len()
    }

    fn unindex(&mut self, entry: &T) {
        for service in entry.services() {
            if let Some(names) = self.by_service.get_mut(service) {
                names.remove(entry.name());
                if names.is_empty() {
                    self.by_service.remove(service);
                }
            }
        }
    }

    /// Queues for each watcher what the change from `before` to `now` means for its query: a match is
    /// a change, a match that is no more is a deletion, anything else is no event.
    fn notify(&mut self, before: Option<&Arc<T>>, now: Option<&Arc<T>>) {
        if self.watchers.is_empty() {
            return;
        }
        let mut too_slow = Vec::new();
        for id in self.concerned(before, now) {
            let Some(watcher) = self.watchers.get(&id) else {
                continue;
            };
            let matching = |entry: &&Arc<T>| watcher.query.matches(entry);
            let event = match (before.filter(matching), now.filter(matching)) {
                (_, Some(entry)) => Event::present(Arc::clone(entry)),
                (Some(entry), None) => Event {
                    entry: Arc::clone(entry),
                    deleted: true,
                },
                (None, None) => continue,
            };
            let is_full = match watcher.events.try_reserve() {
                Ok(permit) => {
                    let kept = watcher.charged.keep(&*event.entry);
                    if kept.is_ok() {
                        permit.send(event);
                        continue;
                    }
                    true
                }
                Err(error) => matches!(error, mpsc::error::TrySendError::Full(())),
            };
            watcher.lagged.store(is_full, Ordering::Release);
            too_slow.push(id);
        }
        for id in too_slow {
            self.unwatch(id);
        }
    }

    /// The watchers whose scope holds the entry before or after the change, each once.
    fn concerned(&self, before: Option<&Arc<T>>, now: Option<&Arc<T>>) -> BTreeSet<WatcherId> {
        let mut scopes = HashSet::from([Scope::All]);
        for entry in before.into_iter().chain(now) {
            scopes.insert(Scope::Name(entry.name().to_owned()));
            scopes.extend(entry.services().iter().cloned().map(Scope::Service));
        }
        scopes
            .iter()
            .filter_map(|scope| self.by_scope.get(scope))
            .flatten()
            .copied()
            .collect()
    }
}
