//! What the proxy has learnt about endpoints of other domains: name to the URL that serves it.
//!
//! A registry call passes through the proxy before the Request does, and the reply names the
//! proxy itself as the endpoint's URL; the true one is kept here (NSM `interdomainbypass`). An
//! entry is refreshed by every Find and Register, and lapses when nobody asks any more.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::connections::lock;

/// Longer than the longest life of a path token (10 minutes): a connection that is refreshed
/// without a new Find keeps its route.
const LIFE: Duration = Duration::from_secs(30 * 60);

/// Names kept at one time; beyond it the entry that lapses first makes room.
const CAPACITY: usize = 65_536;

#[derive(Debug, Default)]
pub(crate) struct Bypass {
    urls: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    url: String,
    lapses: Instant,
}

impl Bypass {
    /// Learns where the endpoint `name` (with its domain) is served.
    pub(crate) fn learn(&self, name: &str, url: &str) {
        let now = Instant::now();
        let mut urls = lock(&self.urls);
        if urls.len() >= CAPACITY && !urls.contains_key(name) {
            urls.retain(|_, entry| entry.lapses > now);
            let first = urls
                .iter()
                .min_by_key(|(_, entry)| entry.lapses)
                .map(|(name, _)| name.clone());
            if urls.len() >= CAPACITY
                && let Some(first) = first
            {
                urls.remove(&first);
            }
        }
        urls.insert(
            name.to_owned(),
            Entry {
                url: url.to_owned(),
                lapses: now + LIFE,
            },
        );
    }

    /// Where the endpoint is served; asking keeps the entry.
    pub(crate) fn url(&self, name: &str) -> Option<String> {
        let now = Instant::now();
        let mut urls = lock(&self.urls);
        let entry = urls.get_mut(name).filter(|entry| entry.lapses > now)?;
        entry.lapses = now + LIFE;
        Some(entry.url.clone())
    }

    /// Forgets the endpoint.
    pub(crate) fn forget(&self, name: &str) {
        lock(&self.urls).remove(name);
    }
}
