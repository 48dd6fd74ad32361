//! When connections end because they were not refreshed: one timer for all.
//!
//! The wall clock is read once, when an expiry is set; what is left until then runs on the
//! monotonic clock, so that a clock which is set moves no connection's end.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use nsm_core::nsm::expiry::close_after;

use crate::{deadlines::Deadlines, sync::lock};

/// What a token that never ends comes to: sums of times stay far from overflow.
const FOR_EVER: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// The expiry of every connection, earliest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expiries {
    deadlines: Arc<Mutex<Deadlines>>,
    changed: Arc<Notify>,
}

impl Expiries {
    /// Sets or moves the expiry of `id`: the end of a token, before which the connection must be closed.
    pub(crate) fn set(&self, id: &str, at: SystemTime) {
        let left = at.duration_since(SystemTime::now()).unwrap_or_default();
        self.put(lock(&self.deadlines), id, close_after(left));
    }

    /// Sets the expiry of `id` to `left` from now, unless it has one.
    pub(crate) fn set_if_none(&self, id: &str, left: Duration) {
        let deadlines = lock(&self.deadlines);
        if !deadlines.has(id) {
            self.put(deadlines, id, left);
        }
    }

    /// Whether `id` has an expiry that is still to come.
    pub(crate) fn has(&self, id: &str) -> bool {
        lock(&self.deadlines).has(id)
    }

    fn put(&self, mut deadlines: MutexGuard<'_, Deadlines>, id: &str, left: Duration) {
        let is_earliest = deadlines.set(id, Instant::now() + left.min(FOR_EVER));
        drop(deadlines);
        if is_earliest {
            self.changed.notify_one();
        }
    }

    /// Forgets `id`.
    pub(crate) fn remove(&self, id: &str) {
        lock(&self.deadlines).clear(id);
    }

    /// Waits for the next expiry, and forgets it.
    pub(crate) async fn next(&self) -> Arc<str> {
        loop {
            let wait = {
                let mut deadlines = lock(&self.deadlines);
                if let Some(id) = deadlines.pop_due(Instant::now()) {
                    return id;
                }
                deadlines.next()
            };
            match wait {
                None => self.changed.notified().await,
                Some(at) => {
                    let _ = timeout_at(at, self.changed.notified()).await;
                }
            }
        }
    }

    /// How many connections have an expiry.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.deadlines).len()
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
        assert_eq!(&*expiries.next().await, "late");
        assert_eq!(expiries.len(), 1);
    }

    /// A wall clock that is set after an expiry was moves nothing, and an expiry beyond all
    /// bounds is no fault.
    #[tokio::test(start_paused = true)]
    async fn what_is_left_runs_on_the_monotonic_clock() {
        let expiries = Expiries::default();
        let began = Instant::now();
        expiries.set("soon", SystemTime::now() + Duration::from_secs(600));
        expiries.set("never", SystemTime::now() + Duration::from_secs(1 << 40));
        expiries.set_if_none("soon", Duration::ZERO);
        expiries.set_if_none("sooner", Duration::from_secs(3));
        assert_eq!(&*expiries.next().await, "sooner");
        assert!(expiries.has("soon") && !expiries.has("sooner"));
        // The paused clock jumps to the deadline; the wall clock has not moved.
        assert_eq!(&*expiries.next().await, "soon");
        assert!(began.elapsed() >= Duration::from_secs(596));
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
        assert_eq!(&*waiter.await.expect("the waiter ends"), "near");
    }
}
