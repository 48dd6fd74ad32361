//! Step: the Request to the next hop: names as it knows them, the mechanism we want towards it, and what this node can promise of the
//! connection's context.

use nsm_core::{
    identity::policy::End,
    mechanism::{KERNEL, LOCAL, REMOTE, RemoteMechanism, TunnelEnd, lower_mtu},
};
use nsm_proto::{
    connection::{Connection, Mechanism},
    connectioncontext::ConnectionContext,
    networkservice::NetworkServiceRequest,
};

use super::ask::Attempt;
use crate::{
    call::{
        Calls,
        case::Case,
        ends::{pair_mtu, set_mac},
        next_hop::without_inode,
    },
    convert,
    error::RequestError,
    ports::Underlay,
};

impl Calls {
    /// The Request of an attempt; `standing` is the mechanism towards this hop that stands.
    pub(super) async fn offer(
        &self,
        attempt: &Attempt<'_>,
        standing: Option<Mechanism>,
    ) -> Result<NetworkServiceRequest, RequestError> {
        let mut connection = named_for(attempt);
        let id = attempt.id();
        if attempt.excludes() {
            let context = connection.context.get_or_insert_default();
            self.exclude(attempt, context).await?;
        }
        let context = &mut connection.context;
        let mut standing = standing;
        let mut preferences = match &attempt.case {
            Case::Through => attempt.ask.preferences.clone(),
            Case::LocalPair(_) => {
                let context = context.get_or_insert_default();
                context.mtu = pair_mtu(context);
                set_mac(context, End::Client, id);
                vec![convert::mechanism(LOCAL, KERNEL, [].into())]
            }
            Case::Initiate(_, remote) => {
                let context = context.get_or_insert_default();
                set_mac(context, End::Client, id);
                let standing = standing.as_mut();
                vec![
                    self.offer_tunnel(attempt, *remote, context, standing)
                        .await?,
                ]
            }
            Case::Terminate(tunnel) => {
                let remote = Some(tunnel.asked.client.address);
                let underlay = self.forwarder()?.underlay(remote).await?;
                let context = context.get_or_insert_default();
                context.mtu = tunnel_mtu(tunnel.remote, context, &underlay, tunnel.asked.mtu);
                set_mac(context, End::Endpoint, id);
                vec![convert::mechanism(LOCAL, KERNEL, [].into())]
            }
        };
        if !matches!(attempt.case, Case::Through) {
            connection.mechanism = match attempt.route.is_local() {
                true => standing.map(without_inode),
                false => standing,
            };
        }
        self.lookup.addresses.swap_request(
            attempt.route.crossing,
            connection.mechanism.iter_mut().chain(&mut preferences),
        );
        Ok(NetworkServiceRequest {
            connection: Some(connection),
            mechanism_preferences: preferences,
        })
    }

    /// The client's end of a tunnel, as it is offered to the next hop.
    async fn offer_tunnel(
        &self,
        attempt: &Attempt<'_>,
        remote: RemoteMechanism,
        context: &mut ConnectionContext,
        standing: Option<&mut Mechanism>,
    ) -> Result<Mechanism, RequestError> {
        let underlay = self.forwarder()?.underlay(attempt.route.address()).await?;
        context.mtu = tunnel_mtu(remote, context, &underlay, None);
        let offer = remote.offer(&self.own_end(&underlay), context.mtu);
        if let Some(standing) = standing {
            remote.renew(&mut standing.parameters, &offer);
        }
        Ok(convert::mechanism(REMOTE, remote.wire_type(), offer))
    }

    /// This node's end of a tunnel.
    pub(super) fn own_end(&self, underlay: &Underlay) -> TunnelEnd {
        TunnelEnd {
            address: underlay.ip,
            port: underlay.port,
            reflector: self.liveness.reflector(),
        }
    }
}

/// The connection with the names by which the next hop knows it, and with the MTU that was agreed before.
fn named_for(attempt: &Attempt<'_>) -> Connection {
    let (ask, route) = (attempt.ask, attempt.route);
    let mut connection = ask.connection.clone();
    if let (Some(mtu), Some(context)) = (agreed_mtu(attempt), connection.context.as_mut()) {
        context.mtu = mtu;
    }
    connection.path = Some(convert::wire_path(ask.path.clone()));
    connection.network_service.clone_from(&route.service);
    connection
        .network_service_endpoint_name
        .clone_from(&route.endpoint);
    if connection.payload.is_empty() {
        connection.payload.clone_from(&route.payload);
    }
    connection
}

/// The MTU to ask for again, where the client asks with what its path came to carry meanwhile: what was agreed before.
fn agreed_mtu(attempt: &Attempt<'_>) -> Option<u32> {
    let prior = attempt.prior?;
    let agreed = prior.path.agreed_mtu;
    let now = prior.view.context.as_ref()?.mtu;
    let asked = attempt.ask.connection.context.as_ref()?.mtu;
    (agreed > now && asked == now).then_some(agreed)
}

/// The MTU our tunnel can carry, and not more than the connection's so far.
pub(super) fn tunnel_mtu(
    remote: RemoteMechanism,
    context: &ConnectionContext,
    underlay: &Underlay,
    asked: Option<u32>,
) -> u32 {
    let own = remote.mtu(underlay.mtu, underlay.ip);
    lower_mtu(lower_mtu(context.mtu, asked.unwrap_or(0)), own)
}
