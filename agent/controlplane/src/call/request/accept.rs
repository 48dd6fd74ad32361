//! Step: the next hop's reply is checked, and this node's part of the connection is made real.

use std::sync::Arc;

use nsm_core::{
    identity::policy::End,
    mechanism::{Kernel, Parameters, TunnelKey},
    net::IfName,
};
use nsm_proto::{
    connection::{Connection, Mechanism, State},
    connectioncontext::ConnectionContext,
};
use tokio::time::Instant;

use super::{
    admit::{restore_exclusions, split_default_routes},
    ask::Attempt,
    reply::check,
};
use crate::{
    call::{
        Calls,
        case::{Case, Client},
        ends::{Ends, endpoint_alias, interface, set_mac},
    },
    connection::model::Established,
    error::RequestError,
    liveness::JoinedPath,
    ports::Plan,
};

/// This node's part of a connection, as it stands.
#[derive(Default)]
pub(super) struct Made {
    /// The mechanism for the previous hop.
    pub(super) mechanism: Option<Mechanism>,
    pub(super) plan: Option<Plan>,
    pub(super) tunnel: Option<MadeTunnel>,
}

/// The end of a tunnel that is this node's part.
#[derive(Clone, Copy)]
pub(super) struct MadeTunnel {
    pub(super) key: TunnelKey,
    pub(super) path: JoinedPath,
    /// The MTU that both sides agreed on, whatever the path carries.
    pub(super) agreed_mtu: u32,
}

impl Calls {
    /// Checks the next hop's reply, proves the path that it needs, and makes this node's part of it real. A reply that is not taken
    /// keeps its path and mechanism, by which it is undone. `sent_source` is the source address of the offer before it was swapped.
    pub(super) async fn accept(
        &self,
        attempt: &Attempt<'_>,
        reply: &mut Connection,
        sent_source: Option<&str>,
    ) -> Result<Established, RequestError> {
        check(attempt, reply)?;
        let mut next_mechanism = reply.mechanism.clone();
        if let Some(mechanism) = &mut next_mechanism {
            let addresses = &self.lookup.addresses;
            addresses.swap_reply(attempt.route.crossing, mechanism, sent_source);
        }
        let none = Parameters::new();
        let granted = next_mechanism
            .as_ref()
            .map_or(&none, |mechanism| &mechanism.parameters);
        restore_exclusions(attempt, reply);
        let context = reply.context.get_or_insert_default();
        let made = match &attempt.case {
            Case::Through => {
                self.admit_passing(&attempt.terms(), context)?;
                self.pass_through(attempt, next_mechanism.clone()).await?
            }
            Case::LocalPair(client) => self.make_pair(attempt, client, granted, context).await?,
            Case::Initiate(client, remote) => {
                let granted = remote.granted(granted);
                let granted = granted.map_err(|error| attempt.bad_answer(error))?;
                self.initiate(attempt, client, *remote, granted, context)
                    .await?
            }
            Case::Terminate(tunnel) => self.terminate(attempt, tunnel, granted, context).await?,
        };
        let view = std::mem::take(reply);
        let mut established = self.established(attempt, view, next_mechanism, made);
        self.liveness.settle(&mut established);
        Ok(established)
    }

    /// Mechanisms pass; a link that stood here goes.
    async fn pass_through(
        &self,
        attempt: &Attempt<'_>,
        mechanism: Option<Mechanism>,
    ) -> Result<Made, RequestError> {
        if let Some(plan) = attempt.prior.and_then(|prior| prior.plan.as_deref()) {
            self.forwarder()?.down(plan).await?;
        }
        Ok(Made {
            mechanism,
            ..Made::default()
        })
    }

    /// The links of two pods of this node, which lead to each other.
    async fn make_pair(
        &self,
        attempt: &Attempt<'_>,
        client: &Client,
        granted: &Parameters,
        context: &mut ConnectionContext,
    ) -> Result<Made, RequestError> {
        let id = attempt.id();
        let endpoint = self.endpoint_pod(attempt.route, granted).await?;
        let terms = attempt.terms();
        split_default_routes(&terms, attempt.around_client.as_ref(), context);
        self.admit_client(&terms, context, attempt.around_client.as_ref(), None)?;
        let alias = endpoint_alias(&self.alias(id)?)?;
        let around = self.around(&endpoint.netns, &alias).await?;
        self.admit_endpoint(&terms, context, &around, None)?;
        set_mac(context, End::Endpoint, id);
        let name = interface(&client.pod.kernel, id);
        let endpoint_name = interface(&endpoint.kernel, id);
        let plan = Ends::parse(self.alias(id)?, context)
            .and_then(|ends| ends.pair((&client.pod, name.clone()), (&endpoint, endpoint_name)))
            .map_err(|error| attempt.bad_answer(error))?;
        self.bring_up(&plan, attempt.prior).await?;
        Ok(Made {
            mechanism: Some(client.named(&name)),
            plan: Some(plan),
            tunnel: None,
        })
    }

    /// The connection that stands now.
    fn established(
        &self,
        attempt: &Attempt<'_>,
        mut view: Connection,
        next_mechanism: Option<Mechanism>,
        made: Made,
    ) -> Established {
        let (ask, route) = (attempt.ask, attempt.route);
        view.id.clone_from(&ask.connection.id);
        view.network_service
            .clone_from(&ask.connection.network_service);
        view.network_service_endpoint_name
            .clone_from(&route.endpoint_answered);
        // They are the client's, and what it may have follows from them.
        view.labels.clone_from(&ask.connection.labels);
        view.mechanism = made.mechanism;
        view.set_state(State::Up);
        let path = self.liveness.path_state(
            made.tunnel.as_ref().map(|tunnel| &tunnel.path),
            made.tunnel.map_or(0, |tunnel| tunnel.agreed_mtu),
            attempt.prior.filter(|_| ask.avoid.is_none()),
        );
        Established {
            view,
            owner: ask.owner,
            shown: ask.guest.as_ref().map(|guest| Arc::clone(&guest.shown)),
            arrival: ask.arrival,
            route: route.clone(),
            next_mechanism,
            plan: made.plan.map(|plan| Box::new(plan.without_descriptors())),
            key: made.tunnel.map(|tunnel| tunnel.key),
            expires: ask.expires,
            committed: Instant::now(),
            path,
        }
    }
}

impl Client {
    /// Its mechanism with the interface's name in it.
    pub(super) fn named(&self, name: &IfName) -> Mechanism {
        let mut mechanism = self.mechanism.clone();
        Kernel {
            name: Some(name.clone()),
            ..self.pod.kernel.clone()
        }
        .write(&mut mechanism.parameters);
        mechanism
    }
}
