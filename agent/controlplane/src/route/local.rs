//! Endpoints that have registered on this node's socket.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use nsm_core::{
    identity::{Caller, Owner},
    net::PeerUrl,
};

use crate::{peer::peers::Peer, places::Place, sync::lock};

/// An endpoint of this node.
#[derive(Debug, Clone)]
pub(crate) struct LocalEndpoint {
    /// Its own URL; the registry holds ours in its place.
    pub(crate) url: PeerUrl,
    /// Who registered it.
    pub(crate) registrant: Caller,
    /// When its registration lapses.
    pub(crate) expires: SystemTime,
    /// Keeps the descriptor of its socket, where it has passed one in the place of a path.
    pub(crate) _socket: Option<Arc<Peer>>,
    /// Its place among those of its registrant, where that is not the registry's.
    pub(crate) place: Option<Arc<Place>>,
}

/// The endpoints of this node, by name.
#[derive(Debug, Default)]
pub(crate) struct LocalEndpoints(Mutex<HashMap<String, LocalEndpoint>>);

impl LocalEndpoints {
    /// The endpoint of this name.
    pub(crate) fn get(&self, name: &str) -> Option<LocalEndpoint> {
        lock(&self.0).get(name).cloned()
    }

    /// Who has registered the name, where that has not lapsed.
    pub(crate) fn owner(&self, name: &str, now: SystemTime) -> Option<Owner> {
        let endpoints = lock(&self.0);
        let endpoint = endpoints.get(name)?;
        (endpoint.expires > now).then(|| endpoint.registrant.owner())
    }

    /// Keeps an endpoint, in the place of an earlier one of its name.
    pub(crate) fn insert(&self, name: String, endpoint: LocalEndpoint) {
        lock(&self.0).insert(name, endpoint);
    }

    /// Forgets an endpoint.
    pub(crate) fn remove(&self, name: &str) {
        lock(&self.0).remove(name);
    }

    /// Forgets every endpoint that has lapsed.
    pub(crate) fn forget_lapsed(&self, now: SystemTime) {
        lock(&self.0).retain(|_, endpoint| endpoint.expires > now);
    }
}
