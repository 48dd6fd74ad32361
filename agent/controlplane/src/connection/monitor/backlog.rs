//! What waits for a subscriber.
//!
//! Changes wait as the ids of connections, each once, and are read as the connections are then: a slow reader gets each as it is when it
//! reads, and all that waits for it is bounded by the number of connections. DELETE events wait whole, 1,024 at most.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    task::Waker,
};

use nsm_proto::connection::Connection;

/// DELETE events that may wait for a subscriber before it is cut off, some 2 KiB each.
pub(super) const BACKLOG: usize = 1024;

/// An event that waits.
#[derive(Debug)]
pub(super) enum Item {
    /// The connection of this id has changed.
    Changed(Arc<str>),
    /// This one is gone.
    Gone(Box<Connection>),
}

/// What waits for a subscriber.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    items: VecDeque<Item>,
    /// Those that wait as [`Item::Changed`], with no [`Item::Gone`] after it.
    changed: HashSet<Arc<str>>,
    /// How many wait as [`Item::Gone`].
    gone: usize,
    /// Nothing comes after what is here.
    pub(super) is_ended: bool,
    pub(super) reader: Option<Waker>,
}

impl Backlog {
    pub(super) fn change(&mut self, id: &str) {
        if !self.changed.contains(id) {
            let id = Arc::<str>::from(id);
            self.changed.insert(Arc::clone(&id));
            self.items.push_back(Item::Changed(id));
        }
    }

    /// False: too many wait already.
    pub(super) fn end(&mut self, connection: &Connection) -> bool {
        if self.gone >= BACKLOG {
            return false;
        }
        // A later change of this id comes after its end.
        self.changed.remove(connection.id.as_str());
        self.gone += 1;
        self.items
            .push_back(Item::Gone(Box::new(connection.clone())));
        true
    }

    pub(super) fn take(&mut self) -> Option<Item> {
        let item = self.items.pop_front()?;
        match &item {
            Item::Changed(id) => drop(self.changed.remove(id)),
            Item::Gone(_) => self.gone -= 1,
        }
        Some(item)
    }

    /// The next that has changed, unless the end of another comes first.
    pub(super) fn take_changed(&mut self) -> Option<Arc<str>> {
        match self.items.front()? {
            Item::Gone(_) => None,
            Item::Changed(_) => match self.take()? {
                Item::Changed(id) => Some(id),
                Item::Gone(_) => None,
            },
        }
    }

    pub(super) fn put_back(&mut self, id: Arc<str>) {
        if self.changed.insert(Arc::clone(&id)) {
            self.items.push_front(Item::Changed(id));
        }
    }
}
