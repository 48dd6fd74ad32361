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
    Inner, RegistryError,
    table::{Admission, Event, WatcherId},
};

/// A stream of [`Event`]s; see the module.
pub struct Watch<T> {
    current: vec::IntoIter<Arc<T>>,
    events: mpsc::Receiver<Event<T>>,
    lagged: Arc<AtomicBool>,
    depth: usize,
    _ticket: Ticket,
}

/// Which table a watcher is in.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Service,
    Endpoint,
}

/// Takes the watcher out of its table when dropped.
struct Ticket {
    registry: Weak<Inner>,
    kind: Kind,
    id: WatcherId,
}

impl<T> Watch<T> {
    pub(super) fn new(
        registry: &Arc<Inner>,
        kind: Kind,
        depth: usize,
        admission: Admission<T>,
    ) -> Self {
        Self {
            current: admission.current.into_iter(),
            events: admission.events,
            lagged: admission.lagged,
            depth,
            _ticket: Ticket {
                registry: Arc::downgrade(registry),
                kind,
                id: admission.id,
            },
        }
    }
}

impl<T> Stream for Watch<T> {
    type Item = Result<Event<T>, RegistryError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(entry) = self.current.next() {
            return Poll::Ready(Some(Ok(Event {
                entry,
                deleted: false,
            })));
        }
        let Some(event) = ready!(self.events.poll_recv(cx)) else {
            // Told once: the end of the stream follows.
            let lagged = self.lagged.swap(false, Ordering::AcqRel);
            let depth = self.depth;
            return Poll::Ready(lagged.then_some(Err(RegistryError::Lagged { depth })));
        };
        Poll::Ready(Some(Ok(event)))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Some(registry) = self.registry.upgrade() else {
            return;
        };
        let mut state = registry.lock();
        match self.kind {
            Kind::Service => state.services.unwatch(self.id),
            Kind::Endpoint => state.endpoints.unwatch(self.id),
        }
    }
}
