//! What a Find or a watch gives.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    vec,
};

use tokio_stream::{Stream, StreamExt as _};

use super::entry::Event;
use crate::error::RequestError;

type Item<E> = Result<Event<E>, RequestError>;

/// A stream of entries: those at hand first, then what arrives later. Entries at hand cost no allocation each.
pub struct Events<E> {
    at_hand: vec::IntoIter<Arc<E>>,
    later: Option<Pin<Box<dyn Stream<Item = Item<E>> + Send>>>,
}

impl<E: Send + Sync + 'static> Events<E> {
    /// These entries and no more.
    pub(super) fn at_hand(entries: Vec<Arc<E>>) -> Self {
        Self {
            at_hand: entries.into_iter(),
            later: None,
        }
    }

    /// What arrives.
    pub(super) fn arriving(later: impl Stream<Item = Item<E>> + Send + 'static) -> Self {
        Self {
            at_hand: Vec::new().into_iter(),
            later: Some(Box::pin(later)),
        }
    }

    /// The same, until `end` resolves.
    pub(crate) fn until(self, end: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::arriving(futures_util::StreamExt::take_until(self, Box::pin(end)))
    }

    /// The first `limit` entries of a Find.
    ///
    /// # Errors
    /// The first error of the stream.
    pub async fn collect(mut self, limit: usize) -> Result<Vec<Arc<E>>, RequestError> {
        let mut found: Vec<_> = self.at_hand.by_ref().take(limit).collect();
        while found.len() < limit
            && let Some(event) = self.next().await
        {
            found.push(event?.entry);
        }
        Ok(found)
    }
}

impl<E> Stream for Events<E> {
    type Item = Item<E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Item<E>>> {
        if let Some(entry) = self.at_hand.next() {
            return Poll::Ready(Some(Ok(Event::present(entry))));
        }
        match &mut self.later {
            Some(later) => later.as_mut().poll_next(context),
            None => Poll::Ready(None),
        }
    }
}
