//! A Close: idempotent, it always frees what the Request made, whether or not the next hop can be reached.

use std::{sync::Arc, time::Duration};

use nsm_core::{identity::access::Ask, nsm::expiry::CLOSE_TIME};
use nsm_proto::connection::{Connection, ConnectionEventType};
use tokio::time::Instant;

use crate::{
    call::{
        Call, Calls,
        enter::{Entered, Entering},
        next_hop::downstream_view,
    },
    connection::{model::Established, store::Turn},
    error::RequestError,
    peer::peers::Peer,
    route::router::Arrival,
};

/// How long a next hop may take to answer a Close. What it holds ends with its token anyway; the
/// client that closes should not wait for a dead peer longer than a person would.
const CLOSE_TIMEOUT: Duration = CLOSE_TIME;

/// How many connections are closed at the same time when the policy has changed.
const CLOSED_TOGETHER: usize = 64;

/// Why a connection is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The previous hop has asked for it, and gets the answer.
    Asked,
    /// This agent has decided it.
    Own,
}

impl Calls {
    /// Closes a connection; one that is not there is closed already.
    ///
    /// # Errors
    /// Only for a message that breaks the path rules, for the connection of another, or when an earlier event of the connection is
    /// still at work at the deadline.
    pub(crate) async fn close(
        self: &Arc<Self>,
        call: Call<Connection>,
    ) -> Result<(), RequestError> {
        let calls = Arc::clone(self);
        // Boxed: see `request`.
        tokio::spawn(Box::pin(async move {
            let mut connection = call.message;
            let entering = Entering {
                token: call.token,
                arrival: call.arrival,
                shown: call.shown,
                session: call.session,
            };
            let entered = calls.enter(&mut connection, entering)?;
            let caller = entered.name(call.caller);
            if let (Arrival::Network, Some(guest)) = (call.arrival, &entered.guest) {
                let gate = &calls.lookup.gate;
                gate.admit(&guest.shown, Ask::Follow)?;
            }
            let Entered { path, hop, .. } = entered;
            let turn = calls
                .held
                .connections
                .admit_known(&hop.id, call.deadline)
                .await?;
            if let Some(turn) = turn {
                if let Some(current) = turn.current() {
                    current.is_open_to(&caller, &path)?;
                }
                // However long it waited for its turn, the next hop has its full time.
                let deadline = Instant::now() + CLOSE_TIMEOUT;
                calls.tear_down(&turn, deadline, Cause::Asked).await;
            }
            Ok(())
        }))
        .await
        .unwrap_or(Err(RequestError::Internal))
    }

    /// Closes what is not refreshed, for the life of the agent.
    pub(crate) async fn close_expired(self: Arc<Self>) {
        loop {
            let id = self.held.expiries.next().await;
            tracing::info!(connection.id = %id, "the connection is not refreshed and the previous hop's token expires: closing");
            let calls = Arc::clone(&self);
            tokio::spawn(async move {
                let deadline = Instant::now() + calls.config.request_timeout;
                calls.close_one_expired(&id, deadline).await;
            });
        }
    }

    /// Closes the connection of our segment `id` because its expiry has come.
    async fn close_one_expired(&self, id: &str, deadline: Instant) {
        match self.held.connections.admit_known(id, deadline).await {
            Ok(Some(turn)) => {
                // A refresh that was ahead in the queue has set another expiry: it has won.
                if !self.held.expiries.has(id) {
                    self.tear_down(&turn, deadline, Cause::Own).await;
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(connection.id = %id, %error, "could not close; trying again");
                self.held.expiries.set_if_none(id, CLOSE_TIMEOUT);
            }
        }
    }

    /// Closes the connections of callers that the rules do not allow any more: many at the same time, for a peer that was shut out need
    /// not answer.
    pub(crate) async fn close_denied(self: Arc<Self>) {
        let mut closing = tokio::task::JoinSet::new();
        for id in self.held.connections.ids() {
            if closing.len() >= CLOSED_TOGETHER {
                closing.join_next().await;
            }
            let calls = Arc::clone(&self);
            closing.spawn(async move { calls.close_one_denied(&id).await });
        }
        closing.join_all().await;
    }

    /// Closes the connection of our segment `id` if the rules do not allow it.
    async fn close_one_denied(&self, id: &str) {
        let deadline = Instant::now() + self.config.request_timeout;
        // One at work is looked at when it is done: it may have been admitted by the rules before.
        match self.held.connections.admit_known(id, deadline).await {
            Ok(Some(turn)) if let Some(denied) = self.denied(&turn) => {
                tracing::warn!(connection.id = %id, %denied, "the policy does not allow the connection any more: closing");
                self.tear_down(&turn, deadline, Cause::Own).await;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::error!(connection.id = %id, %error, "could not look at the connection with the new policy: its next refresh is decided by it");
            }
        }
    }

    /// Why a connection is not allowed; none where it is.
    fn denied(&self, turn: &Turn) -> Option<RequestError> {
        let current = turn.current()?;
        let shown = current.shown.as_ref()?;
        let (view, route) = (&current.view, &current.route);
        let checked = self.router.recheck(shown, current.arrival, view, route);
        checked.err()
    }

    /// Refuses new connections, then closes all that are left. Returns when all are gone or `grace` is over.
    pub(crate) async fn drain(self: &Arc<Self>, grace: Duration) {
        self.held.connections.drain();
        let deadline = Instant::now() + grace;
        let mut closing = tokio::task::JoinSet::new();
        // Those at work too: a Request that was admitted before may finish, and is closed then.
        for id in self.held.connections.ids() {
            let calls = Arc::clone(self);
            closing.spawn(async move { calls.close_drained(&id, deadline).await });
        }
        closing.join_all().await;
    }

    /// Closes the connection of our segment `id` because the agent goes.
    async fn close_drained(&self, id: &str, deadline: Instant) {
        match self.held.connections.admit_known(id, deadline).await {
            Ok(Some(turn)) => self.tear_down(&turn, deadline, Cause::Own).await,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(connection.id = %id, %error, "could not close before the end");
            }
        }
    }

    /// Takes an established connection away, here and at the next hop at the same time: deleting a
    /// link takes the kernel tens of milliseconds, on either side.
    pub(crate) async fn tear_down(&self, turn: &Turn, deadline: Instant, cause: Cause) {
        let Some(established) = turn.current() else {
            return;
        };
        self.held.expiries.remove(turn.id());
        let peer = self.lookup.peers.get(&established.route.url);
        // While our own handle of the namespace is still there.
        let returned = self.returned_netns(&peer, &established).await;
        let deadline = deadline.min(Instant::now() + CLOSE_TIMEOUT);
        let view = downstream_view(&established);
        tokio::join!(
            self.tear_down_here(turn, &established, &peer, cause),
            self.close_at(&peer, view, returned, deadline),
        );
    }

    async fn tear_down_here(
        &self,
        turn: &Turn,
        established: &Established,
        peer: &Peer,
        cause: Cause,
    ) {
        let id = turn.id();
        if let (Some(plan), Ok(forwarder)) = (&established.plan, self.forwarder())
            && let Err(error) = forwarder.down(plan).await
        {
            tracing::error!(
                connection.id = %id, %error,
                "a link could not be deleted; it is collected when the agent starts again"
            );
        }
        self.liveness.leave_with(id, established);
        if let Some(key) = established.key {
            self.held.keys.release(key);
        }
        if let Some(matched) = &established.route.matched {
            self.held.services.leave(&matched.service, id);
        }
        turn.set(None);
        peer.leave(id);
        let monitors = &self.held.monitors;
        match cause {
            Cause::Asked => monitors.publish_answered(ConnectionEventType::Delete, established),
            Cause::Own => monitors.publish(ConnectionEventType::Delete, established),
        }
    }
}
