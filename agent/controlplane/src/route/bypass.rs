//! What the proxy has learnt about endpoints of other domains: name to the URL that serves it.
//!
//! A registry call passes through the proxy before the Request does, and the reply names the
//! proxy itself as the endpoint's URL; the true one is kept here (NSM `interdomainbypass`). An
//! entry is refreshed by every Find and Register, and lapses when no call asks for it any more. One that
//! registered through us ends with its registration.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nsm_core::{
    identity::{Caller, Owner},
    net::PeerUrl,
};

use crate::{peer::peers::Peer, places::Place, route::expected::Expected, sync::lock};

/// Longer than the longest life of a path token (10 minutes): a connection that is refreshed
/// without a new Find keeps its route.
const LIFE: Duration = Duration::from_secs(30 * 60);

/// How often lapsed entries are removed: a walk over all entries would be too much for every Find.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Names kept at one time; beyond it the entry that lapses first makes room.
const CAPACITY: usize = 65_536;

/// The longest name with its domain, in bytes: names have 512 in our registry, and domains 253 (RFC 1035).
const LONGEST_NAME: usize = 768;

#[derive(Debug, Default)]
pub(crate) struct Bypass {
    /// By the name with its domain in lower case: the same domain in every spelling.
    ways: Mutex<Ways>,
}

#[derive(Debug, Default)]
struct Ways {
    by_name: HashMap<String, Entry>,
    /// When lapsed entries were removed last.
    swept: Option<Instant>,
}

impl Ways {
    fn sweep(&mut self, now: Instant) {
        self.by_name.retain(|_, entry| entry.lapses > now);
        self.swept = Some(now);
    }
}

/// Where an endpoint is served.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// The URL to dial.
    pub(crate) url: PeerUrl,
    /// Whom its server has to be.
    pub(crate) expected: Expected,
    /// The endpoint registered through us: what is asked of it comes in, what we found leaves.
    pub(crate) registered_here: bool,
    /// The services that it was registered for through us, with their domain; none where we found it.
    pub(crate) services: Vec<String>,
    /// Who registered it through us; the network where we found it.
    pub(crate) registrant: Caller,
    /// Keeps the descriptor of its socket, when it has passed one in the place of a path.
    pub(crate) _socket: Option<Arc<Peer>>,
    /// Its place among those of its registrant; none where we found it.
    pub(crate) place: Option<Arc<Place>>,
}

#[derive(Debug)]
struct Entry {
    way: Way,
    lapses: Instant,
    /// When the registration ends, asked for or not; `None` where it is not registered through us.
    ends: Option<Instant>,
}

impl Entry {
    fn refresh(&mut self, now: Instant) {
        let lapses = now + LIFE;
        self.lapses = self.ends.map_or(lapses, |ends| ends.min(lapses));
    }
}

impl Bypass {
    /// Learns where the endpoint `name` (with its domain) is served, until `ends` at most. What another registry answers under a name that
    /// none of ours would have is not kept.
    pub(crate) fn learn(&self, name: &str, way: Way, ends: Option<Instant>, now: Instant) {
        if name.len() > LONGEST_NAME {
            return;
        }
        let name = key(name);
        let mut ways = lock(&self.ways);
        let is_registered = |known: &Entry| known.way.registered_here && known.lapses > now;
        if !way.registered_here && ways.by_name.get(&name).is_some_and(is_registered) {
            // What another registry answers takes nothing from who has registered here.
            return;
        }
        let is_due = ways.swept.is_none_or(|swept| now >= swept + SWEEP_INTERVAL);
        let is_full =
            |ways: &Ways| ways.by_name.len() >= CAPACITY && !ways.by_name.contains_key(&name);
        if is_due || is_full(&ways) {
            ways.sweep(now);
        }
        if is_full(&ways) {
            let first = ways
                .by_name
                .iter()
                .min_by_key(|(_, entry)| entry.lapses)
                .map(|(name, _)| name.clone());
            if let Some(first) = first {
                ways.by_name.remove(&first);
            }
        }
        let mut entry = Entry {
            way,
            lapses: now,
            ends,
        };
        entry.refresh(now);
        ways.by_name.insert(name, entry);
    }

    /// Where the endpoint is served; asking keeps the entry.
    pub(crate) fn way(&self, name: &str, now: Instant) -> Option<Way> {
        let mut ways = lock(&self.ways);
        let entry = ways
            .by_name
            .get_mut(&key(name))
            .filter(|entry| entry.lapses > now)?;
        entry.refresh(now);
        Some(entry.way.clone())
    }

    /// Who has registered the endpoint through us, when somebody has.
    pub(crate) fn owner(&self, name: &str, now: Instant) -> Option<Owner> {
        let ways = lock(&self.ways);
        let entry = ways.by_name.get(&key(name))?;
        let is_registered = entry.way.registered_here && entry.lapses > now;
        is_registered.then(|| entry.way.registrant.owner())
    }

    /// Forgets the endpoint.
    pub(crate) fn forget(&self, name: &str) {
        lock(&self.ways).by_name.remove(&key(name));
    }

    /// Forgets every entry that has lapsed, and lets go of its socket.
    pub(crate) fn forget_lapsed(&self, now: Instant) {
        lock(&self.ways).sweep(now);
    }
}

fn key(name: &str) -> String {
    match name.split_once('@') {
        Some((target, domain)) => format!("{target}@{}", domain.to_ascii_lowercase()),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(registered_here: bool) -> Way {
        Way {
            url: "tcp://192.0.2.1:5006".parse().expect("a URL"),
            expected: Expected::Own,
            registered_here,
            services: Vec::new(),
            registrant: Caller::over_network(),
            _socket: None,
            place: None,
        }
    }

    #[test]
    fn what_has_lapsed_is_let_go_of() {
        let bypass = Bypass::default();
        let start = Instant::now();
        let minute = Duration::from_secs(60);
        bypass.learn("found@one.example", way(false), None, start);
        let ends = Some(start + minute);
        bypass.learn("nse@two.example", way(true), ends, start);
        assert!(bypass.way("nse@TWO.example", start + minute / 2).is_some());
        assert!(bypass.way("found@one.example", start + minute).is_some());
        // Asking does not keep what is no longer registered.
        assert!(bypass.way("nse@two.example", start + minute).is_none());
        bypass.learn("other@one.example", way(false), None, start + minute);
        assert_eq!(lock(&bypass.ways).by_name.len(), 2);
        bypass.forget_lapsed(start + 2 * LIFE);
        assert!(lock(&bypass.ways).by_name.is_empty());
    }
}
