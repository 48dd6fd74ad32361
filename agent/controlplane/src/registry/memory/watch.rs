//! A running watch: what matched when it began, then every change.
//!
//! The stream ends when the registry closes. A watcher that does not keep up gets
//! [`RegistryError::Lagged`] as its last item. Dropping the watch takes it out of the registry.

use std::{
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    vec,
};

use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::{
    Inner, Stored,
    table::{Admission, Charged, WatcherId},
};
use crate::{error::RegistryError, registry::entry::Event};

/// A stream of [`Event`]s; see the module.
pub struct Watch<T: Stored> {
    current: vec::IntoIter<Arc<T>>,
    events: mpsc::Receiver<Event<T>>,
    lagged: Arc<AtomicBool>,
    depth: usize,
    charged: Charged,
    _ticket: Ticket<T>,
}

/// Takes the watcher out of its table when dropped.
struct Ticket<T: Stored> {
    store: Weak<Inner<T>>,
    id: WatcherId,
}

impl<T: Stored> Watch<T> {
    pub(super) fn new(store: &Arc<Inner<T>>, depth: usize, admission: Admission<T>) -> Self {
        Self {
            current: admission.current.into_iter(),
            events: admission.events,
            lagged: admission.lagged,
            depth,
            charged: admission.charged,
            _ticket: Ticket {
                store: Arc::downgrade(store),
                id: admission.id,
            },
        }
    }
}

impl<T: Stored> Stream for Watch<T> {
    type Item = Result<Event<T>, RegistryError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(entry) = self.current.next() {
            self.charged.release(&*entry);
            return Poll::Ready(Some(Ok(Event::present(entry))));
        }
        let Some(event) = ready!(self.events.poll_recv(cx)) else {
            // Given once: the end of the stream follows.
            let lagged = self.lagged.swap(false, Ordering::AcqRel);
            let depth = self.depth;
            return Poll::Ready(lagged.then_some(Err(RegistryError::Lagged { depth })));
        };
        self.charged.release(&*event.entry);
        Poll::Ready(Some(Ok(event)))
    }
}

impl<T: Stored> Drop for Ticket<T> {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.lock().table.unwatch(self.id);
        }
    }
}
