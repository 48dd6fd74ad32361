//! Which name is due when: connections and registrations expire by it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

/// One deadline a name, the earliest at hand.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    by_time: BTreeSet<(Instant, Arc<str>)>,
    by_name: HashMap<Arc<str>, Instant>,
}

impl Deadlines {
    /// Sets or moves the deadline of `name`. True where it is earlier than every other was: a timer must be set anew.
    #[must_use]
    pub(crate) fn set(&mut self, name: &str, at: Instant) -> bool {
        let is_earliest = self.next().is_none_or(|earliest| at < earliest);
        self.clear(name);
        let name: Arc<str> = Arc::from(name);
        self.by_time.insert((at, Arc::clone(&name)));
        self.by_name.insert(name, at);
        is_earliest
    }

    /// Forgets the deadline of `name`, where there is one.
    pub(crate) fn clear(&mut self, name: &str) {
        if let Some((name, at)) = self.by_name.remove_entry(name) {
            self.by_time.remove(&(at, name));
        }
    }

    /// Whether `name` has a deadline that has not been taken.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes one name whose deadline has come.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Arc<str>> {
        if self.next()? > now {
            return None;
        }
        let (_, name) = self.by_time.pop_first()?;
        self.by_name.remove(&name);
        Some(name)
    }

    /// How many names have a deadline.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }
}
