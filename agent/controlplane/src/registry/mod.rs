//! The registry of one domain: which network services exist and which endpoints offer them.
//!
//! It lives in the process and is called directly or, through [`grpc`], as the two NSM v1
//! registry services. Semantics are those of NSM's memory registry: a registration under a known
//! name replaces the former one, Unregister of an unknown name succeeds, Find streams what
//! matches and, with `watch`, every later change.
//!
//! Invariants:
//! - An endpoint is gone at its expiry, to the tick: every call first drops what is due, so that
//!   the timer task only serves the watchers of a quiet registry. There is one such task, not one
//!   an entry; it ends with the last handle.
//! - Expiry is granted in wall-clock time (that is what the wire carries) and kept in monotonic
//!   time, so that a step of the clock does not empty the registry.
//! - Nothing grows without bound: entries, their sizes, watchers and each watcher's queue have
//!   limits ([`Limits`]). A watcher that does not keep up is dropped and told so.
//! - An entry is shared, not copied: Find and every watcher hold the same `Arc`.
//!
//! Path tokens, authorisation and names with `@` are the listener's business, not the registry's.

mod deadlines;
mod error;
pub mod grpc;
mod matching;
pub(crate) mod path_header;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use nsm_core::nsm::expiry::granted_expiry;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use prost::Message;
use tokio::{sync::Notify, time::Instant};

use self::{deadlines::Deadlines, table::Table, watch::Kind};
pub use self::{error::RegistryError, table::Event, watch::Watch};

/// A watch on network services.
pub type ServiceWatch = Watch<NetworkService>;

/// A watch on network service endpoints.
pub type EndpointWatch = Watch<NetworkServiceEndpoint>;

/// What a network service carries when it does not say (NSM `setpayload`).
pub const DEFAULT_PAYLOAD: &str = "IP";

/// No limit on expiry is above this: sums of times stay far from overflow.
const EXPIRY_CEILING: Duration = Duration::from_secs(366 * 24 * 3600);

const SERVICE: &str = "network service";
const ENDPOINT: &str = "network service endpoint";

/// Bounds of one registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest time an endpoint stays without being registered again.
    pub max_expiry: Duration,
    /// How many network services there may be.
    pub services: usize,
    /// How many endpoints there may be.
    pub endpoints: usize,
    /// How many watches may be open, of both kinds together.
    pub watchers: usize,
    /// How many events wait for one watcher before it is dropped.
    pub watch_depth: usize,
    /// The longest name, in bytes.
    pub name_bytes: usize,
    /// How many network services one endpoint may list.
    pub services_per_endpoint: usize,
    /// The largest entry, encoded, in bytes: bounds labels, matches and path ids.
    pub entry_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // NSM's own bound: a dead endpoint is not offered for longer than a minute.
            max_expiry: Duration::from_secs(60),
            services: 16_384,
            endpoints: 65_536,
            watchers: 16_384,
            // A burst of a thousand changes between two polls of a reader is not its fault.
            watch_depth: 1024,
            name_bytes: 512,
            services_per_endpoint: 256,
            entry_bytes: 64 << 10,
        }
    }
}

/// A handle on the registry; clones share it.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

/// What the registry holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Network services.
    pub services: usize,
    /// Endpoints that have not expired.
    pub endpoints: usize,
    /// Open watches of both kinds.
    pub watchers: usize,
}

pub(crate) struct Inner {
    limits: Limits,
    /// Wakes the expiry task: the earliest deadline moved, or the last handle is gone.
    wake: Arc<Notify>,
    state: Mutex<State>,
}

struct State {
    services: Table<NetworkService>,
    endpoints: Table<NetworkServiceEndpoint>,
    /// When each endpoint expires: as many as there are endpoints.
    deadlines: Deadlines,
    closed: bool,
}

impl Registry {
    /// Starts an empty registry and the task that expires its endpoints.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(mut limits: Limits) -> Self {
        limits.max_expiry = limits.max_expiry.min(EXPIRY_CEILING);
        let wake = Arc::new(Notify::new());
        let inner = Arc::new(Inner {
            limits,
            wake: Arc::clone(&wake),
            state: Mutex::new(State {
                services: Table::new(),
                endpoints: Table::new(),
                deadlines: Deadlines::default(),
                closed: false,
            }),
        });
        tokio::spawn(expire(Arc::downgrade(&inner), wake));
        Self { inner }
    }
    /// Registers a network service or replaces the one of that name. Answers what is registered:
    /// the service with [`DEFAULT_PAYLOAD`] where it named none.
    ///
    /// # Errors
    ///
    /// Without a name, over a limit, or when the registry is closing.
    pub fn register_service(
        &self,
        mut service: NetworkService,
    ) -> Result<NetworkService, RegistryError> {
        if service.payload.is_empty() {
            DEFAULT_PAYLOAD.clone_into(&mut service.payload);
        }
        let limits = &self.inner.limits;
        limits.check(SERVICE, &service.name, &service)?;
        let mut state = self.inner.open()?;
        let known = state.services.get(&service.name).is_some();
        if !known && state.services.len() >= limits.services {
            return Err(RegistryError::Full {
                kind: SERVICE,
                name: service.name,
                limit: limits.services,
            });
        }
        state.services.put(Arc::new(service.clone()));
        Ok(service)
    }

    /// Removes a network service. True when it was there; a repeated call is no error.
    pub fn unregister_service(&self, name: &str) -> bool {
        self.inner.lock().services.remove(name).is_some()
    }

    /// Registers an endpoint or replaces the one of that name. Answers what is registered: its
    /// expiry is the earliest of what it asks, every bound (the expirations of the tokens on its
    /// path) and `now` plus [`Limits::max_expiry`]; its initial registration time is that of its
    /// first registration.
    ///
    /// # Errors
    ///
    /// Without a name, when it has expired already, over a limit, or when the registry is closing.
    pub fn register_endpoint(
        &self,
        mut endpoint: NetworkServiceEndpoint,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<NetworkServiceEndpoint, RegistryError> {
        let limits = &self.inner.limits;
        limits.check(ENDPOINT, &endpoint.name, &endpoint)?;
        if endpoint.network_service_names.len() > limits.services_per_endpoint {
            return Err(RegistryError::TooManyServices {
                count: endpoint.network_service_names.len(),
                name: endpoint.name,
                limit: limits.services_per_endpoint,
            });
        }
        let asked = endpoint.expiration_time.map(from_timestamp);
        let expiry = granted_expiry(now, asked, bounds, limits.max_expiry);
        let lifetime = expiry.duration_since(now).unwrap_or_default();
        if lifetime.is_zero() {
            let earliest = bounds.iter().copied().chain(asked).min();
            return Err(RegistryError::expired(
                endpoint.name,
                earliest.unwrap_or(now),
                now,
            ));
        }
        endpoint.expiration_time = Some(expiry.into());

        let mut state = self.inner.open()?;
        let known = state.endpoints.get(&endpoint.name);
        if known.is_none() && state.endpoints.len() >= limits.endpoints {
            return Err(RegistryError::Full {
                kind: ENDPOINT,
                name: endpoint.name,
                limit: limits.endpoints,
            });
        }
        endpoint.initial_registration_time = known
            .and_then(|known| known.initial_registration_time)
            .or(endpoint.initial_registration_time)
            .or_else(|| Some(now.into()));
        let earliest = state.deadlines.next();
        state
            .deadlines
            .set(&endpoint.name, Instant::now() + lifetime);
        if state.deadlines.next() != earliest {
            self.inner.wake.notify_one();
        }
        state.endpoints.put(Arc::new(endpoint.clone()));
        Ok(endpoint)
    }

    /// Removes an endpoint. True when it was there; a repeated call is no error.
    pub fn unregister_endpoint(&self, name: &str) -> bool {
        let mut state = self.inner.lock();
        state.deadlines.clear(name);
        state.endpoints.remove(name).is_some()
    }

    /// The network services that match, in the order of their names. An empty query matches all.
    #[must_use]
    pub fn find_services(&self, query: &NetworkService) -> Vec<Arc<NetworkService>> {
        self.inner.lock().services.find(query)
    }

    /// The endpoints that match, in the order of their names. An empty query matches all.
    #[must_use]
    pub fn find_endpoints(
        &self,
        query: &NetworkServiceEndpoint,
    ) -> Vec<Arc<NetworkServiceEndpoint>> {
        self.inner.lock().endpoints.find(query)
    }

    /// Watches network services: those that match now, then every change.
    ///
    /// # Errors
    ///
    /// When too many watches are open or the registry is closing.
    pub fn watch_services(&self, query: NetworkService) -> Result<ServiceWatch, RegistryError> {
        let depth = self.inner.limits.watch_depth;
        let mut state = self.inner.open_for_watch()?;
        let admission = state.services.watch(query, depth);
        Ok(Watch::new(&self.inner, Kind::Service, depth, admission))
    }

    /// Watches endpoints: those that match now, then every change.
    ///
    /// # Errors
    ///
    /// When too many watches are open or the registry is closing.
    pub fn watch_endpoints(
        &self,
        query: NetworkServiceEndpoint,
    ) -> Result<EndpointWatch, RegistryError> {
        let depth = self.inner.limits.watch_depth;
        let mut state = self.inner.open_for_watch()?;
        let admission = state.endpoints.watch(query, depth);
        Ok(Watch::new(&self.inner, Kind::Endpoint, depth, admission))
    }

    /// What the registry holds now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.inner.lock();
        Counts {
            services: state.services.len(),
            endpoints: state.endpoints.len(),
            watchers: state.watchers(),
        }
    }

    /// How many watches are open.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.counts().watchers
    }

    /// Ends every watch and refuses new registrations and watches, so that a draining server is
    /// not held open by them. What is registered can still be found.
    pub fn close(&self) {
        let mut state = self.inner.lock();
        state.closed = true;
        state.services.unwatch_all();
        state.endpoints.unwatch_all();
    }
}

impl Limits {
    fn check(
        &self,
        kind: &'static str,
        name: &str,
        entry: &impl Message,
    ) -> Result<(), RegistryError> {
        if name.is_empty() {
            return Err(RegistryError::NoName { kind });
        }
        if name.len() > self.name_bytes {
            return Err(RegistryError::NameTooLong {
                kind,
                start: name.chars().take(32).collect(),
                length: name.len(),
                limit: self.name_bytes,
            });
        }
        let size = entry.encoded_len();
        if size > self.entry_bytes {
            return Err(RegistryError::TooLarge {
                kind,
                name: name.to_owned(),
                size,
                limit: self.entry_bytes,
            });
        }
        Ok(())
    }
}

impl State {
    fn watchers(&self) -> usize {
        self.services.watchers() + self.endpoints.watchers()
    }

    fn drop_expired(&mut self, now: Instant) {
        while let Some(name) = self.deadlines.pop_due(now) {
            tracing::debug!(endpoint.name = %name, "endpoint expired");
            self.endpoints.remove(&name);
        }
    }
}

impl Inner {
    /// The state, without what has expired.
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves at worst a stale index entry, which every reader tolerates.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.drop_expired(Instant::now());
        state
    }

    fn open(&self) -> Result<MutexGuard<'_, State>, RegistryError> {
        let state = self.lock();
        if state.closed {
            return Err(RegistryError::Closed);
        }
        Ok(state)
    }

    fn open_for_watch(&self) -> Result<MutexGuard<'_, State>, RegistryError> {
        let state = self.open()?;
        let limit = self.limits.watchers;
        if state.watchers() >= limit {
            return Err(RegistryError::TooManyWatchers { limit });
        }
        Ok(state)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Drops endpoints as they expire, until the registry is gone.
async fn expire(registry: Weak<Inner>, wake: Arc<Notify>) {
    loop {
        let next = match registry.upgrade() {
            Some(registry) => registry.lock().deadlines.next(),
            None => return,
        };
        match next {
            // Both outcomes mean the same: look again.
            Some(deadline) => drop(tokio::time::timeout_at(deadline, wake.notified()).await),
            None => wake.notified().await,
        }
    }
}

/// A wire timestamp as a time; one out of range is as late or as early as can be told.
fn from_timestamp(timestamp: prost_types::Timestamp) -> SystemTime {
    let seconds = timestamp.seconds;
    SystemTime::try_from(timestamp).unwrap_or(if seconds > 0 {
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(u32::MAX))
    } else {
        SystemTime::UNIX_EPOCH
    })
}
