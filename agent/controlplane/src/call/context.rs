//! A connection's context that changes at the endpoint: the next hop publishes it, the links on this node follow, and it is published on.
//!
//! What is taken over are the parts that are the endpoint's to choose: addresses, routes and neighbours, DNS, and the extra context. MTU and
//! MAC addresses are the agents' own. A change is decided by the rules of a grant, and one that is not admitted changes nothing.
//!
//! Of changes in quick succession the latest counts, so a peer that publishes much has one task a connection at most.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, LazyLock, Mutex},
};

use nsm_proto::{
    connection::{ConnectionEvent, ConnectionEventType},
    connectioncontext::ConnectionContext,
};
use tokio::time::Instant;

use super::{
    Calls,
    ends::Ends,
    request::admit::{Terms, check_context, split_default_routes},
};
use crate::{
    connection::{model::Established, store::Turn},
    error::RequestError,
    liveness::TakeContext,
    occasional::Occasional,
    peer::peers::Peer,
    ports::Plan,
    sync::lock,
};

/// A context that a next hop has published.
#[derive(Debug)]
struct Reported {
    context: ConnectionContext,
    /// When it came. A Request that was committed later has brought what is newer.
    at: Instant,
}

/// Contexts that wait for their connection's turn, by the id of our segment.
#[derive(Debug, Default)]
pub(crate) struct Contexts(Mutex<HashMap<String, Reported>>);

impl Contexts {
    /// Keeps a context in the place of an earlier one; whether there was none.
    fn put(&self, id: &str, reported: Reported) -> bool {
        match lock(&self.0).entry(id.to_owned()) {
            Entry::Occupied(mut earlier) => {
                earlier.insert(reported);
                false
            }
            Entry::Vacant(place) => {
                place.insert(reported);
                true
            }
        }
    }

    fn take(&self, id: &str) -> Option<Reported> {
        lock(&self.0).remove(id)
    }
}

impl Calls {
    /// What takes over the contexts of connections that have no links on this node: they change with the rest that the event brings.
    pub(crate) fn passing_contexts(self: &Arc<Self>) -> Arc<TakeContext> {
        let calls = Arc::clone(self);
        Arc::new(move |current, reported| {
            let context = with_reported(current, reported).filter(|_| current.plan.is_none())?;
            let admitted = check_context(&context, &current.route)
                .and_then(|()| calls.admit_passing(&Terms::of(current), &context));
            is_taken(current, admitted).then_some(context)
        })
    }

    /// Takes over the contexts in an event of the next hop `peer` for connections that have links on this node, each in its turn.
    pub(crate) fn follow_contexts(self: &Arc<Self>, peer: &Peer, event: &ConnectionEvent) {
        if event.r#type() == ConnectionEventType::Delete {
            return;
        }
        for reported in event.connections.values() {
            let Some((id, _)) = self.liveness.own_segment(reported) else {
                continue;
            };
            let Some(context) = &reported.context else {
                continue;
            };
            let current = self.held.connections.current(&id);
            // A peer reports its own connections only.
            let Some(current) = current.filter(|it| it.route.url == peer.url) else {
                continue;
            };
            if current.plan.is_none() || with_reported(&current, context).is_none() {
                continue;
            }
            let reported = Reported {
                context: context.clone(),
                at: Instant::now(),
            };
            if self.contexts.put(&id, reported) {
                let calls = Arc::clone(self);
                tokio::spawn(async move { calls.follow_context(&id).await });
            }
        }
    }

    async fn follow_context(self: Arc<Self>, id: &str) {
        let deadline = Instant::now() + 2 * self.config.request_timeout;
        let turn = self.held.connections.admit_known(id, deadline).await;
        // After the wait, so that the latest one counts.
        let reported = self.contexts.take(id);
        let (Ok(Some(turn)), Some(reported)) = (turn, reported) else {
            return;
        };
        let Some(current) = turn.current() else {
            return;
        };
        if current.committed > reported.at {
            return;
        }
        let Some(context) = with_reported(&current, &reported.context) else {
            return;
        };
        if let Some(plan) = current.plan.as_deref() {
            let outcome = self.take_over(&turn, &current, plan, context).await;
            is_taken(&current, outcome);
        }
    }

    async fn take_over(
        &self,
        turn: &Turn,
        current: &Established,
        plan: &Plan,
        mut context: ConnectionContext,
    ) -> Result<(), RequestError> {
        check_context(&context, &current.route)?;
        let terms = Terms::of(current);
        self.admit_change(&terms, turn.id(), plan, &mut context)
            .await?;
        if current.view.context.as_ref() == Some(&context) {
            return Ok(());
        }
        let ends = Ends::parse(self.alias(turn.id())?, &context)?;
        let wanted = ends.changed(plan, current.route.is_local())?;
        self.forwarder()?.up(&wanted).await?;
        let mut changed = current.clone();
        changed.plan = Some(Box::new(wanted));
        changed.view.context = Some(context);
        let changed = Arc::new(changed);
        turn.set(Some(Arc::clone(&changed)));
        let monitors = &self.held.monitors;
        monitors.publish(ConnectionEventType::Update, &changed);
        Ok(())
    }

    /// Decides on what the pods of this node would get by a changed context, with the default routes as a pod can have them.
    async fn admit_change(
        &self,
        terms: &Terms<'_>,
        id: &str,
        plan: &Plan,
        context: &mut ConnectionContext,
    ) -> Result<(), RequestError> {
        let alias = self.alias(id)?;
        match plan {
            Plan::Pair { client, endpoint } => {
                let around = self.around(&client.netns, &alias).await?;
                split_default_routes(terms, Some(&around), context);
                self.admit_client(terms, context, Some(&around), None)?;
                let around = self.around(&endpoint.netns, &endpoint.spec.link.alias);
                let around = around.await?;
                self.admit_endpoint(terms, context, &around, None)
            }
            Plan::Vxlan { netns, spec } => {
                let around = self.around(netns, &alias).await?;
                let peer = Some(spec.remote);
                if terms.route.is_local() {
                    self.admit_endpoint(terms, context, &around, peer)
                } else {
                    split_default_routes(terms, Some(&around), context);
                    self.admit_client(terms, context, Some(&around), peer)
                }
            }
        }
    }
}

/// Whether a context is taken over; logs why not, and no flood of it.
fn is_taken(current: &Established, outcome: Result<(), RequestError>) -> bool {
    static REFUSALS: LazyLock<Occasional> = LazyLock::new(Occasional::default);
    let Err(error) = outcome else {
        return true;
    };
    if REFUSALS.is_due() {
        tracing::warn!(
            connection.id = %current.view.id, peer.url = %current.route.url, %error,
            "the next hop has changed the connection's context, and it is not taken over; others within a minute are not logged"
        );
    }
    false
}

/// The connection's context with what the next hop may change of it; `None` when that changes nothing.
fn with_reported(current: &Established, reported: &ConnectionContext) -> Option<ConnectionContext> {
    let now = current.view.context.clone().unwrap_or_default();
    let mut changed = now.clone();
    changed.ip_context.clone_from(&reported.ip_context);
    changed.dns_context.clone_from(&reported.dns_context);
    changed.extra_context.clone_from(&reported.extra_context);
    // What is excluded is the client's, and what the agents on the way have added is theirs.
    let excluded = now.ip_context.as_ref().map(|ip| &ip.excluded_prefixes);
    if let Some(ip) = &mut changed.ip_context {
        ip.excluded_prefixes = excluded.cloned().unwrap_or_default();
    }
    (changed != now).then_some(changed)
}
