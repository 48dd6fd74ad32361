//! What a Find or a watch gives.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    vec,
};

use tokio_stream::{Stream, StreamExt as _};

use super::entry::Event;
use crate::{error::RequestError, places::Place};

type Item<E> = Result<Event<E>, RequestError>;

/// A stream of entries: those at hand first, then what arrives later. Entries at hand cost no allocation each.
pub struct Events<E> {
    at_hand: vec::IntoIter<Arc<E>>,
    later: Option<Pin<Box<dyn Stream<Item = Item<E>> + Send>>>,
    _held: Vec<Place>,
}

impl<E: Send + Sync + 'static> Events<E> {
    /// These entries and no more.
    pub(super) fn at_hand(entries: Vec<Arc<E>>) -> Self {
        Self {
            at_hand: entries.into_iter(),
            later: None,
            _held: Vec::new(),
        }
    }

    /// What arrives.
    pub(super) fn arriving(later: impl Stream<Item = Item<E>> + Send + 'static) -> Self {
        Self {
            at_hand: Vec::new().into_iter(),
            later: Some(Box::pin(later)),
            _held: Vec::new(),
        }
    }

    /// The entries that are here already.
    pub(crate) fn here(&self) -> &[Arc<E>] {
        self.at_hand.as_slice()
    }

    /// The same, which holds these places as long as it is read.
    pub(crate) fn holding(mut self, places: impl IntoIterator<Item = Place>) -> Self {
        self._held.extend(places);
        self
    }

    /// The same, until `end` resolves.
    pub(crate) fn until(self, end: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::arriving(futures_util::StreamExt::take_until(self, Box::pin(end)))
    }

    /// The entries of a Find: all that are at hand, for they are in memory already, and the first `limit` of those that arrive.
    ///
    /// # Errors
    /// The first error of the stream.
    pub async fn collect(mut self, limit: usize) -> Result<Vec<Arc<E>>, RequestError> {
        let mut found: Vec<_> = self.at_hand.by_ref().collect();
        let most = found.len().saturating_add(limit);
        while found.len() < most
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_limit_is_for_what_arrives() {
        let entries = || (0..20).map(Arc::new).collect::<Vec<Arc<u32>>>();
        let at_hand = Events::at_hand(entries()).collect(10).await;
        assert_eq!(at_hand.expect("no error").len(), 20);
        let later = tokio_stream::iter(entries()).map(|entry| Ok(Event::present(entry)));
        let arrived = Events::arriving(later).collect(10).await;
        assert_eq!(arrived.expect("no error").len(), 10);
    }
}
