//! Connections whose links somebody may have changed, until they are looked at.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nsm_core::link::LinkAlias;
use tokio::sync::Notify;

/// A queue in which a connection is once, so that it never has more entries than there are connections.
#[derive(Debug, Default)]
pub(super) struct ChangedLinks {
    waiting: Mutex<HashSet<LinkAlias>>,
    came: Notify,
}

impl ChangedLinks {
    pub(super) fn extend(&self, links: impl IntoIterator<Item = LinkAlias>) {
        let mut waiting = self.waiting();
        waiting.extend(links);
        if !waiting.is_empty() {
            self.came.notify_one();
        }
    }

    /// Waits for one, and takes it. One caller at a time.
    pub(super) async fn next(&self) -> LinkAlias {
        loop {
            let next = self.take();
            match next {
                Some(link) => return link,
                None => self.came.notified().await,
            }
        }
    }

    fn take(&self) -> Option<LinkAlias> {
        let mut waiting = self.waiting();
        let next = waiting.iter().next()?.clone();
        waiting.take(&next)
    }

    fn waiting(&self) -> MutexGuard<'_, HashSet<LinkAlias>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_waits_once() {
        let alias = |id| LinkAlias::new("test.example", id).unwrap();
        let changed = ChangedLinks::default();
        changed.extend([alias("one"), alias("two")]);
        changed.extend([alias("one")]);
        let mut came = [changed.next().await, changed.next().await];
        came.sort();
        assert_eq!(came, [alias("one"), alias("two")]);
        assert_eq!(changed.take(), None);
        let (next, ()) = tokio::join!(changed.next(), async {
            changed.extend([alias("three")]);
        });
        assert_eq!(next, alias("three"));
    }
}
