//! Which name is due when.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

/// One deadline a name, the earliest at hand.
#[derive(Default)]
pub(super) struct Deadlines {
    by_time: BTreeSet<(Instant, Arc<str>)>,
    by_name: HashMap<Arc<str>, Instant>,
}

impl Deadlines {
    /// Sets or moves the deadline of `name`.
    pub(super) fn set(&mut self, name: &str, at: Instant) {
        self.clear(name);
        let name: Arc<str> = Arc::from(name);
        self.by_time.insert((at, Arc::clone(&name)));
        self.by_name.insert(name, at);
    }

    /// Forgets the deadline of `name`, where there is one.
    pub(super) fn clear(&mut self, name: &str) {
        if let Some((name, at)) = self.by_name.remove_entry(name) {
            self.by_time.remove(&(at, name));
        }
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes one name whose deadline has come.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Arc<str>> {
        if self.next()? > now {
            return None;
        }
        let (_, name) = self.by_time.pop_first()?;
        self.by_name.remove(&name);
        Some(name)
    }
}
