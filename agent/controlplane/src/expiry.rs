//! When connections end because nobody refreshed them: one timer for all.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use tokio::sync::Notify;

use crate::connections::lock;

#[derive(Debug, Default)]
struct Deadlines {
    order: BTreeSet<(SystemTime, String)>,
    by_id: HashMap<String, SystemTime>,
}

/// The expiry of every connection, earliest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expiries {
    deadlines: Arc<Mutex<Deadlines>>,
    changed: Arc<Notify>,
}

impl Expiries {
    /// Sets or moves the expiry of `id`.
    pub(crate) fn set(&self, id: &str, at: SystemTime) {
        let mut deadlines = lock(&self.deadlines);
        if let Some(old) = deadlines.by_id.insert(id.to_owned(), at) {
            deadlines.order.remove(&(old, id.to_owned()));
        }
        deadlines.order.insert((at, id.to_owned()));
        let is_first = deadlines
            .order
            .first()
            .is_some_and(|(_, first)| first == id);
        drop(deadlines);
        if is_first {
            self.changed.notify_one();
        }
    }

    /// Forgets `id`.
    pub(crate) fn remove(&self, id: &str) {
        let mut deadlines = lock(&self.deadlines);
        if let Some(old) = deadlines.by_id.remove(id) {
            deadlines.order.remove(&(old, id.to_owned()));
        }
    }

    /// Waits for the next expiry, and forgets it.
    pub(crate) async fn next(&self) -> String {
        loop {
            let wait = {
                let mut deadlines = lock(&self.deadlines);
                match deadlines.order.first() {
                    None => None,
                    Some((at, _)) => match at.duration_since(SystemTime::now()) {
                        Ok(left) if !left.is_zero() => Some(left),
                        _ => {
                            let (_, id) = deadlines
                                .order
                                .pop_first()
                                .expect("the set was not empty under the same lock");
                            deadlines.by_id.remove(&id);
                            return id;
                        }
                    },
                }
            };
            match wait {
                None => self.changed.notified().await,
                Some(left) => {
                    let _ = tokio::time::timeout(left, self.changed.notified()).await;
                }
            }
        }
    }

    /// How many connections have an expiry.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.deadlines).by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_earliest_expires_first_and_a_refresh_moves_it() {
        let expiries = Expiries::default();
        let now = SystemTime::now();
        expiries.set("refreshed", now - Duration::from_secs(1));
        expiries.set("late", now + Duration::from_millis(20));
        expiries.set("refreshed", now + Duration::from_secs(3600));
        expiries.set("closed", now - Duration::from_secs(1));
        expiries.remove("closed");
        assert_eq!(expiries.next().await, "late");
        assert_eq!(expiries.len(), 1);
    }

    #[tokio::test]
    async fn an_earlier_deadline_wakes_the_waiter() {
        let expiries = Expiries::default();
        expiries.set("far", SystemTime::now() + Duration::from_secs(3600));
        let waiter = tokio::spawn({
            let expiries = expiries.clone();
            async move { expiries.next().await }
        });
        tokio::task::yield_now().await;
        expiries.set("near", SystemTime::now());
        assert_eq!(waiter.await.expect("the waiter ends"), "near");
    }
}
