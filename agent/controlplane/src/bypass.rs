//! What the proxy has learnt about endpoints of other domains: name to the URL that serves it.
//!
//! A registry call passes through the proxy before the Request does, and the reply names the
//! proxy itself as the endpoint's URL; the true one is kept here (NSM `interdomainbypass`). An
//! entry is refreshed by every Find and Register, and lapses when nobody asks any more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{connections::lock, peers::Peer};

/// Longer than the longest life of a path token (10 minutes): a connection that is refreshed
/// without a new Find keeps its route.
const LIFE: Duration = Duration::from_secs(30 * 60);

/// Names kept at one time; beyond it the entry that lapses first makes room.
const CAPACITY: usize = 65_536;

#[derive(Debug, Default)]
pub(crate) struct Bypass {
    /// By the name with its domain in lower case: the same domain whoever writes it.
    ways: Mutex<HashMap<String, Entry>>,
}

/// Where an endpoint is served.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// The URL to dial.
    pub(crate) url: String,
    /// The endpoint registered through us: what is asked of it comes in, what we found leaves.
    pub(crate) registered_here: bool,
    /// The endpoint runs as root on this node.
    pub(crate) trusted: bool,
    /// Keeps the descriptor of its socket, when it has passed one in the place of a path.
    pub(crate) _socket: Option<Arc<Peer>>,
}

#[derive(Debug)]
struct Entry {
    way: Way,
    lapses: Instant,
}

impl Bypass {
    /// Learns where the endpoint `name` (with its domain) is served.
    pub(crate) fn learn(&self, name: &str, way: Way) {
        let now = Instant::now();
        let name = key(name);
        let mut ways = lock(&self.ways);
        if ways.len() >= CAPACITY && !ways.contains_key(&name) {
            ways.retain(|_, entry| entry.lapses > now);
            let first = ways
                .iter()
                .min_by_key(|(_, entry)| entry.lapses)
                .map(|(name, _)| name.clone());
            if ways.len() >= CAPACITY
                && let Some(first) = first
            {
                ways.remove(&first);
            }
        }
        let lapses = now + LIFE;
        ways.insert(name, Entry { way, lapses });
    }

    /// Where the endpoint is served; asking keeps the entry.
    pub(crate) fn way(&self, name: &str) -> Option<Way> {
        let now = Instant::now();
        let mut ways = lock(&self.ways);
        let entry = ways
            .get_mut(&key(name))
            .filter(|entry| entry.lapses > now)?;
        entry.lapses = now + LIFE;
        Some(entry.way.clone())
    }

    /// Forgets the endpoint.
    pub(crate) fn forget(&self, name: &str) {
        lock(&self.ways).remove(&key(name));
    }
}

fn key(name: &str) -> String {
    match name.split_once('@') {
        Some((target, domain)) => format!("{target}@{}", domain.to_ascii_lowercase()),
        None => name.to_owned(),
    }
}
