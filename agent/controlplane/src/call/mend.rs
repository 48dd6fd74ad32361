//! Links of pods that somebody else has changed: repaired, or DOWN with the reason until they are right.
//!
//! A link is looked at in its connection's turn, like a Request, and repaired by what a refresh does. One task for each connection whose link
//! was changed a short while ago keeps in mind how often it was repaired ([`Repairs`]).

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::FutureExt as _;
use nsm_core::{
    backoff::Backoff,
    link::{LinkAlias, Repairs},
    liveness::BadLink,
};
use nsm_proto::connection::ConnectionEventType;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::{
    call::{Calls, close::Cause},
    connection::{model::Established, store::Turn},
    ports::{Forwarder, ForwarderError, Mended, Plan},
    sync::lock,
};

/// The shortest wait before a link that could not be repaired is tried again: as long as the whole change may go unnoticed.
const SHORTEST_WAIT: Duration = Duration::from_secs(1);

/// The longest: who has removed the obstacle sees the effect.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How long a task stays after its last look, so that repairs are counted.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Connections whose links were changed a short while ago, each with what wakes its task.
#[derive(Debug, Default)]
pub(crate) struct Mends {
    tasks: Mutex<HashMap<String, Arc<Notify>>>,
}

impl Mends {
    /// Wakes the task of a connection. Something: there was none, and this wakes the one that is to be started.
    fn wake(&self, id: &str) -> Option<Arc<Notify>> {
        match lock(&self.tasks).entry(id.to_owned()) {
            Entry::Occupied(running) => {
                running.get().notify_one();
                None
            }
            Entry::Vacant(free) => Some(Arc::clone(free.insert(Arc::default()))),
        }
    }

    /// Ends the task of a connection that is gone.
    fn end(&self, id: &str) {
        lock(&self.tasks).remove(id);
    }

    /// Ends the task of a connection, unless there was a change meanwhile.
    fn try_end(&self, id: &str, again: &Notify) -> bool {
        let mut tasks = lock(&self.tasks);
        let is_over = again.notified().now_or_never().is_none();
        if is_over {
            tasks.remove(id);
        }
        is_over
    }
}

/// What is published of a link that cannot be looked at or repaired: the cause has names of the node, and other domains read this.
const UNREPAIRED: &str =
    "the link of the pod cannot be looked at or repaired: the log of its agent has the cause";

/// Tries that ended with a refusal.
struct Tries {
    backoff: Backoff,
    is_refused: bool,
}

impl Default for Tries {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(SHORTEST_WAIT, LONGEST_WAIT),
            is_refused: false,
        }
    }
}

impl Tries {
    fn again(&mut self) -> Next {
        Next::At(Instant::now() + self.backoff.next(rand::random()))
    }
}

/// When a link is looked at again.
enum Next {
    /// With the next change of it.
    Changed,
    /// With the next change of it, at the latest then.
    At(Instant),
    /// There is no such connection any more.
    Never,
}

impl Calls {
    /// Follows what becomes of the pods' links, for the life of the agent; returns at once where this agent makes none.
    pub(crate) async fn watch_links(self: Arc<Self>) {
        let Some(forwarder) = self.forwarder.clone() else {
            return;
        };
        loop {
            let alias = forwarder.next_changed_link().await;
            self.link_changed(&alias);
        }
    }

    fn link_changed(self: &Arc<Self>, alias: &LinkAlias) {
        let id = alias.connection_id();
        if !self.held.connections.has(id) {
            return;
        }
        if let Some(again) = self.mends.wake(id) {
            tokio::spawn(Arc::clone(self).keep_link(id.to_owned(), again));
        }
    }

    /// Keeps the link of a connection right, until it has been so for a while or the connection is closed.
    async fn keep_link(self: Arc<Self>, id: String, again: Arc<Notify>) {
        let mut repairs = Repairs::default();
        let mut tries = Tries::default();
        loop {
            let next = self.mend_link(&id, &mut repairs, &mut tries).await;
            let is_over = repairs.is_over(Instant::now().into_std());
            let until = match next {
                Next::Never => return self.mends.end(&id),
                Next::Changed if is_over => {
                    if self.mends.try_end(&id, &again) {
                        return;
                    }
                    continue;
                }
                // Until it is: repairs are remembered for a minute, those of a fight for longer.
                Next::Changed => Instant::now() + REMEMBERED,
                Next::At(at) => at,
            };
            let _ = timeout_at(until, again.notified()).await;
        }
    }

    /// Looks at a link once, in the turn of its connection.
    async fn mend_link(
        self: &Arc<Self>,
        id: &str,
        repairs: &mut Repairs,
        tries: &mut Tries,
    ) -> Next {
        let patience = Instant::now() + 2 * self.config.request_timeout;
        let turn = match self.held.connections.admit_known(id, patience).await {
            Ok(Some(turn)) => turn,
            Ok(None) => return Next::Never,
            Err(error) => {
                tracing::debug!(connection.id = %id, %error, "its link is looked at later");
                return tries.again();
            }
        };
        let established = turn.current();
        let plan = established.as_ref().and_then(|it| it.plan.as_deref());
        let (Some(established), Some(plan), Ok(forwarder)) = (&established, plan, self.forwarder())
        else {
            return Next::Never;
        };
        match look(forwarder, plan, repairs).await {
            Ok(None) => {
                self.publish_link(&turn, established, None);
                *tries = Tries::default();
                Next::Changed
            }
            Ok(Some((reason, until))) => {
                self.publish_link(&turn, established, Some(reason));
                Next::At(until)
            }
            Err(ForwarderError::Gone(reason)) => {
                tracing::info!(connection.id = %id, reason, "the pod is gone: closing its connection");
                let deadline = Instant::now() + self.config.request_timeout;
                self.tear_down(&turn, deadline, Cause::Own).await;
                Next::Never
            }
            Err(error) => {
                tracing::warn!(connection.id = %id, %error, "the link of a pod cannot be looked at or repaired");
                // Once, it may be of this moment, and nothing is known of the link.
                if std::mem::replace(&mut tries.is_refused, true) {
                    self.publish_link(&turn, established, Some(UNREPAIRED.to_owned()));
                }
                tries.again()
            }
        }
    }

    /// Takes over that the link of a connection is bad, or right, and publishes what is new.
    fn publish_link(&self, turn: &Turn, current: &Arc<Established>, reason: Option<String>) {
        let id = turn.id();
        let bad = reason.map(|reason| BadLink {
            reason: reason.into(),
        });
        let Some(changed) = current.with_link(bad) else {
            return;
        };
        match &changed.path.bad_link {
            Some(bad) => {
                tracing::warn!(connection.id = %id, reason = %bad.reason, "the link of a pod is bad");
            }
            None => tracing::info!(connection.id = %id, "the link of a pod is right again"),
        }
        let changed = Arc::new(changed);
        turn.set(Some(Arc::clone(&changed)));
        if !changed.publishes_same(current) {
            let monitors = &self.held.monitors;
            monitors.publish(ConnectionEventType::Update, &changed);
        }
    }
}

/// Looks at the links of a plan, and repairs them unless they are undone again and again. Something: what is bad, and when they are repaired
/// next.
async fn look(
    forwarder: &dyn Forwarder,
    plan: &Plan,
    repairs: &mut Repairs,
) -> Result<Option<(String, Instant)>, ForwarderError> {
    let now = Instant::now().into_std();
    let next = repairs.next(now);
    match forwarder.mend(plan, next <= now).await? {
        Mended::AsWanted => Ok(None),
        Mended::Repaired(what) => {
            repairs.made(now);
            tracing::warn!(what, "the link of a pod was changed, and is right again");
            Ok(None)
        }
        Mended::Lacking(what) => {
            let reason = format!(
                "{what}; it was repaired and undone again several times: find what changes it in the pod, or request the connection again"
            );
            Ok(Some((reason, next.into())))
        }
    }
}
