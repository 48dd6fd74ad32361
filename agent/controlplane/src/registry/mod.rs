//! The registry of one domain: which network services exist and which endpoints offer them.
//!
//! [`DomainRegistry`] is all that the rest of the control plane sees; where the entries are is decided once, by a [`backend::Backend`]:
//!
//! | backend | entries are |
//! |---|---|
//! | [`memory`] | in this process |
//! | [`remote`] | behind another registry, agent or manager, over gRPC |
//!
//! A new backend is a file here and a variant of it.
//!
//! Semantics are those of NSM's registries: a registration under a known name replaces the former one, Unregister of an unknown name
//! succeeds, Find gives what matches, and a watch gives what matches and then every change. Names carry no `@domain` here: the
//! registrar takes it off and puts it back (`call::registrar`).

pub mod backend;
pub mod entry;
mod events;
pub mod memory;
pub mod path_header;
pub mod remote;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::time::SystemTime;

use nsm_core::identity::{Caller, share::Holder};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::time::Instant;

pub use self::events::Events;
use self::{entry::Entry, path_header::PathHeader};
use crate::error::RequestError;

/// The registry of one domain, wherever its entries are.
pub trait DomainRegistry: Send + Sync {
    /// Its network services. They stay until they are unregistered; one that no endpoint offers may lapse.
    fn services(&self) -> &dyn Entries<NetworkService>;

    /// Its endpoints. Each is gone at its expiry unless it is registered again.
    fn endpoints(&self) -> &dyn Entries<NetworkServiceEndpoint>;

    /// How much this process holds of it; `None` where the entries are elsewhere.
    fn counts(&self) -> Option<Counts> {
        None
    }

    /// Ends the watches that this process serves and refuses new registrations, so that they do not hold up the agent's end.
    fn close(&self) {}
}

/// The entries of one kind in a registry.
///
/// Cancellation: a call that is dropped leaves the registry as it was, or with the whole change made; which of the two only a Find
/// shows. Each call can be repeated.
///
/// Timeouts: every call returns by its deadline. A watch has none once it stands.
///
/// # Errors
///
/// Each call fails with [`RequestError::Registry`] where the entry breaks a limit, and with [`RequestError::Dial`],
/// [`RequestError::Refused`] or [`RequestError::Silent`] where the registry is elsewhere and cannot be reached, refuses, or does not
/// answer in time.
#[tonic::async_trait]
pub trait Entries<E: Entry>: Send + Sync {
    /// Registers an entry, or replaces the one of that name. Gives the entry as it is registered: its name, payload and expiry may be
    /// others than asked for.
    async fn register(&self, entry: E, terms: Terms) -> Result<E, RequestError>;

    /// Removes the entry of that name; a success where there is none.
    async fn unregister(&self, entry: E, terms: Terms) -> Result<(), RequestError>;

    /// The entries that match `query` now, in the order of their names. The stream ends after the last, or with an error.
    async fn find(&self, query: E, deadline: Instant) -> Result<Events<E>, RequestError>;

    /// The entries that match `query` now, and then every change. The stream ends with an error when the registry is lost or this
    /// watcher does not keep up, and without one when the registry closes. A stream that is dropped leaves no watcher behind.
    ///
    /// Returns before the registry has answered where that may take long: a refusal is then the first item.
    async fn watch(&self, query: E, asker: Asker) -> Result<Events<E>, RequestError>;
}

/// Who watches.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// Who is charged for what waits to be read.
    pub holder: Holder,
    /// When the caller stops waiting for the watch to stand.
    pub deadline: Instant,
}

/// What a registration has beside the entry.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Who calls. A registry that sees its callers keeps what one has registered from the others.
    pub caller: Caller,
    /// Who is charged for the entry.
    pub holder: Holder,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// The owner: the tokens of the hops that the call came through, where the caller sent any. A registry that guards names takes the
    /// registrant's identity from them.
    pub owner: Option<PathHeader>,
    /// When the caller's own token ends: the registration ends then at the latest.
    pub expires: Option<SystemTime>,
}

/// How much a registry holds in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Network services.
    pub services: usize,
    /// Endpoints that have not expired.
    pub endpoints: usize,
    /// Open watches of both kinds.
    pub watchers: usize,
}
