//! One call at a time for each alias, and results that are undone when the caller is gone.
//!
//! A Request can be given up while the kernel works for it, and come again at once. What the first one made must then go, but not
//! under the feet of the second: so a call holds its aliases until its result is taken or undone.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use nsm_core::link::LinkAlias;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// The aliases that are being worked on. A clone is the same.
#[derive(Clone, Default)]
pub(super) struct Turns {
    busy: Arc<Mutex<HashMap<LinkAlias, Weak<AsyncMutex<()>>>>>,
}

/// The right to work on some aliases, until dropped.
pub(super) struct Turn {
    held: Vec<(LinkAlias, OwnedMutexGuard<()>)>,
    turns: Turns,
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let aliases = self.held.iter().map(|(alias, _)| alias);
        f.debug_set().entries(aliases).finish()
    }
}

impl Turns {
    /// Waits until no other call holds one of the aliases.
    pub(super) async fn take<'a>(&self, aliases: impl IntoIterator<Item = &'a LinkAlias>) -> Turn {
        let mut aliases: Vec<&LinkAlias> = aliases.into_iter().collect();
        // In one order, so that two calls never wait for each other.
        aliases.sort();
        aliases.dedup();
        let mut turn = Turn {
            held: Vec::with_capacity(aliases.len()),
            turns: self.clone(),
        };
        for alias in aliases {
            let lock = self.lock_of(alias);
            turn.held.push((alias.clone(), lock.lock_owned().await));
        }
        turn
    }

    fn lock_of(&self, alias: &LinkAlias) -> Arc<AsyncMutex<()>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let known = busy.get(alias).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let lock = Arc::default();
            busy.insert(alias.clone(), Arc::downgrade(&lock));
            lock
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut busy = self
            .turns
            .busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (alias, guard) in self.held.drain(..) {
            drop(guard);
            if busy
                .get(&alias)
                .is_some_and(|lock| lock.strong_count() == 0)
            {
                busy.remove(&alias);
            }
        }
    }
}

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(busy.keys()).finish()
    }
}

/// A result on its way to the caller. Dropped unopened, the work behind it is undone, in a thread of its own.
pub(super) struct Parcel<T: Send + 'static> {
    contents: Option<(T, Undo<T>, Turn)>,
}

/// How to undo a result.
pub(super) type Undo<T> = Box<dyn FnOnce(T) + Send>;

impl<T: Send + 'static> Parcel<T> {
    pub(super) fn new(result: T, undo: Undo<T>, turn: Turn) -> Self {
        Self {
            contents: Some((result, undo, turn)),
        }
    }

    pub(super) fn open(mut self) -> T {
        let (result, _, _) = self
            .contents
            .take()
            .expect("contents stay until the parcel is opened or dropped");
        result
    }
}

impl<T: Send + 'static> Drop for Parcel<T> {
    fn drop(&mut self) {
        let Some((result, undo, turn)) = self.contents.take() else {
            return;
        };
        let run = move || {
            undo(result);
            drop(turn);
        };
        if let Err(error) = std::thread::Builder::new()
            .name("nsm-undo".to_owned())
            .spawn(run)
        {
            tracing::error!(%error, "a link without caller stays until the next start: no thread to remove it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn alias(id: &str) -> LinkAlias {
        LinkAlias::new("d", id).unwrap()
    }

    #[tokio::test]
    async fn one_at_a_time_and_nothing_stays() {
        let turns = Turns::default();
        let (a, b, c) = (alias("a"), alias("b"), alias("c"));
        let first = turns.take([&a, &b]).await;
        let free = turns.take([&c]).await;
        let mut second = Box::pin(turns.take([&b, &a]));
        assert!(futures_poll(&mut second).await.is_none());
        drop(first);
        drop(second.await);
        drop(free);
        assert_eq!(format!("{turns:?}"), "{}");
    }

    #[tokio::test]
    async fn giving_up_the_queue_leaves_nothing() {
        let turns = Turns::default();
        let a = alias("a");
        let first = turns.take([&a]).await;
        {
            let mut second = Box::pin(turns.take([&a]));
            assert!(futures_poll(&mut second).await.is_none());
        }
        drop(first);
        assert_eq!(format!("{turns:?}"), "{}");
    }

    #[tokio::test]
    async fn an_unopened_parcel_undoes_before_the_next_turn() {
        let turns = Turns::default();
        let a = alias("a");
        let (sender, receiver) = mpsc::channel();
        let undo: Undo<u32> = Box::new(move |result| sender.send(result).unwrap());
        drop(Parcel::new(7, undo, turns.take([&a]).await));
        drop(turns.take([&a]).await);
        assert_eq!(receiver.try_recv(), Ok(7));
    }

    #[tokio::test]
    async fn an_opened_parcel_is_kept() {
        let turns = Turns::default();
        let (sender, receiver) = mpsc::channel();
        let undo: Undo<u32> = Box::new(move |result| sender.send(result).unwrap());
        assert_eq!(
            Parcel::new(7, undo, turns.take([&alias("a")]).await).open(),
            7
        );
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
    }

    /// Polls once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
                std::task::Poll::Ready(output) => Some(output),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
