//! Pod links that are to go: deleted together, without anybody who waits for it.
//!
//! The kernel takes some 20 ms to delete a link, and as long for many at once. Nobody needs to wait for that: a link whose tunnel is gone
//! passes nothing. So the links of closed connections wait here while the kernel is busy, and then go in one step. A link holds the
//! turn of its connection until it is gone, so a new Request of that connection finds none.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nsm_core::link::LinkAlias;
use tokio::sync::watch;

use super::{LinkError, pod_link, pool::Pool, turns::Turn};
use crate::netns::Netns;

/// The queue of one node. A clone is the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Doomed {
    queue: Arc<Mutex<Queue>>,
    /// How many are left, those that are being deleted included.
    left: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: HashMap<LinkAlias, Turn>,
    /// Those that the kernel is deleting.
    going: Vec<LinkAlias>,
    is_running: bool,
}

impl Doomed {
    /// Has a connection's pod link deleted. The turn is the connection's.
    pub(super) fn add(
        &self,
        alias: &LinkAlias,
        turn: Turn,
        pool: &Pool,
        node: &Netns,
    ) -> Result<(), LinkError> {
        let mut queue = self.queue();
        queue.waiting.insert(alias.clone(), turn);
        self.left.send_modify(|left| *left += 1);
        if queue.is_running {
            return Ok(());
        }
        let (doomed, node) = (self.clone(), node.clone());
        let started = pool.run(Box::new(move || doomed.delete_all(&node)));
        queue.is_running = started.is_ok();
        started.map_err(|error| {
            queue.waiting.remove(alias);
            self.left.send_modify(|left| *left -= 1);
            LinkError::Thread(error)
        })
    }

    /// Whether a connection's link is to go.
    pub(super) fn has(&self, alias: &LinkAlias) -> bool {
        let queue = self.queue();
        queue.waiting.contains_key(alias) || queue.going.contains(alias)
    }

    /// The connections whose links are to go.
    pub(super) fn aliases(&self) -> HashSet<LinkAlias> {
        let queue = self.queue();
        queue.waiting.keys().chain(&queue.going).cloned().collect()
    }

    /// Waits until the links of these connections are gone.
    pub(super) async fn are_gone(&self, aliases: &HashSet<LinkAlias>) {
        let mut left = self.left.subscribe();
        // The sender lives as long as this.
        while aliases.iter().any(|alias| self.has(alias)) && left.changed().await.is_ok() {}
    }

    /// Waits until there is none left.
    pub(super) async fn none_left(&self) {
        // The sender lives as long as this.
        let _ = self.left.subscribe().wait_for(|left| *left == 0).await;
    }

    fn delete_all(&self, node: &Netns) {
        loop {
            let turns = {
                let mut queue = self.queue();
                queue.is_running = !queue.waiting.is_empty();
                if !queue.is_running {
                    return;
                }
                let waiting = mem::take(&mut queue.waiting);
                queue.going = waiting.keys().cloned().collect();
                waiting
            };
            let aliases: Vec<LinkAlias> = turns.keys().cloned().collect();
            if let Err(error) = pod_link::down(node, &aliases) {
                tracing::error!(%error, count = aliases.len(), first = %aliases[0], "links of closed connections stay until the next start");
            }
            self.queue().going.clear();
            drop(turns);
            self.left.send_modify(|left| *left -= aliases.len());
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
