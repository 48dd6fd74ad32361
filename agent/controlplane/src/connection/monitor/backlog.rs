//! What waits for a subscriber.
//!
//! Changes wait as the ids of connections, each once, and are read as the connections are then: a slow reader gets each as it is when it
//! reads, and all that waits for it is bounded by the number of connections. DELETE events wait whole, 1,024 at most. All that waits is
//! charged to who has opened the stream, and so is the event that was read last: the transport keeps it until the reader has room for it.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    task::Waker,
};

use nsm_proto::connection::{Connection, ConnectionEvent};
use prost::Message as _;

use crate::places::{NoPlace, Place};

/// DELETE events that may wait for a subscriber before it is cut off, some 2 KiB each.
pub(super) const BACKLOG: usize = 1024;

/// What a stream takes while nothing waits: those of HTTP/2 and of gRPC, and its place in the indexes.
pub(super) const STREAM: usize = 4 << 10;

/// What an event takes beside its bytes on the wire.
const EVENT: usize = 256;

/// How much the transport collects before it sends (tonic's buffer of a stream).
const TOGETHER_SENT: usize = 32 << 10;

/// Why a stream ends before its reader ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum CutOff {
    /// More DELETE events than may wait.
    #[error(
        "the monitor was cut off because {BACKLOG} events of ended connections wait to be read: monitor again, and read faster"
    )]
    Slow,
    /// What waits is more than its owner may hold.
    #[error("the monitor was cut off because its events are not read: {0}")]
    NoPlace(#[from] NoPlace),
}

/// An event that waits.
#[derive(Debug)]
pub(super) enum Waiting {
    /// The connection of this id has changed.
    Changed(Arc<str>),
    /// This one is gone.
    Gone(Box<Connection>),
}

/// What waits for a subscriber.
#[derive(Debug)]
pub(super) struct Backlog {
    items: VecDeque<Waiting>,
    /// Those that wait as [`Waiting::Changed`], with no [`Waiting::Gone`] after it.
    changed: HashSet<Arc<str>>,
    /// How many wait as [`Waiting::Gone`].
    gone: usize,
    /// Nothing comes after what is here.
    pub(super) is_ended: bool,
    /// Why, where that is no ordinary end. Given once.
    pub(super) cut_off: Option<CutOff>,
    pub(super) reader: Option<Waker>,
    /// What is charged for all of it.
    bytes: Place,
    /// What was read and may not be sent yet, as a part of that.
    unsent: usize,
}

impl Backlog {
    /// Nothing waits; `bytes` is what the stream itself is charged.
    pub(super) fn new(bytes: Place) -> Self {
        Self {
            items: VecDeque::new(),
            changed: HashSet::new(),
            gone: 0,
            is_ended: false,
            cut_off: None,
            reader: None,
            bytes,
            unsent: 0,
        }
    }

    pub(super) fn change(&mut self, id: &str) -> Result<(), NoPlace> {
        if !self.changed.contains(id) {
            self.bytes.grow(id.len() + EVENT)?;
            let id = Arc::<str>::from(id);
            self.changed.insert(Arc::clone(&id));
            self.items.push_back(Waiting::Changed(id));
        }
        Ok(())
    }

    pub(super) fn end(&mut self, connection: &Connection) -> Result<(), CutOff> {
        if self.gone >= BACKLOG {
            return Err(CutOff::Slow);
        }
        self.bytes.grow(charge_of(connection))?;
        // A later change of this id comes after its end.
        self.changed.remove(connection.id.as_str());
        self.gone += 1;
        self.items
            .push_back(Waiting::Gone(Box::new(connection.clone())));
        Ok(())
    }

    pub(super) fn take(&mut self) -> Option<Waiting> {
        let item = self.items.pop_front()?;
        match &item {
            Waiting::Changed(id) => {
                self.changed.remove(id);
                self.bytes.shrink(id.len() + EVENT);
            }
            Waiting::Gone(gone) => {
                self.gone -= 1;
                self.bytes.shrink(charge_of(gone));
            }
        }
        Some(item)
    }

    /// The next that has changed, unless the end of another comes first.
    pub(super) fn take_changed(&mut self) -> Option<Arc<str>> {
        match self.items.front()? {
            Waiting::Gone(_) => None,
            Waiting::Changed(_) => match self.take()? {
                Waiting::Changed(id) => Some(id),
                Waiting::Gone(_) => None,
            },
        }
    }

    /// What was taken a moment ago is not read yet.
    pub(super) fn put_back(&mut self, id: Arc<str>) -> Result<(), NoPlace> {
        if self.changed.insert(Arc::clone(&id)) {
            self.bytes.grow(id.len() + EVENT)?;
            self.items.push_front(Waiting::Changed(id));
        }
        Ok(())
    }

    /// Charges an event that is handed to the transport; the reader has taken what was handed over before that.
    pub(super) fn hand_over(&mut self, event: &ConnectionEvent) -> Result<(), NoPlace> {
        if self.unsent >= TOGETHER_SENT {
            self.bytes.shrink(self.unsent);
            self.unsent = 0;
        }
        let bytes = event.encoded_len();
        self.bytes.grow(bytes)?;
        self.unsent += bytes;
        Ok(())
    }

    /// All that was handed over is sent: the transport asks for more, and there is none.
    pub(super) fn is_sent(&mut self) {
        self.bytes.shrink(self.unsent);
        self.unsent = 0;
    }
}

fn charge_of(gone: &Connection) -> usize {
    gone.encoded_len() + EVENT
}
