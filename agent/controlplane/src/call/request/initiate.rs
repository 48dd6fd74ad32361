//! The client's end of a tunnel: its path is proved, its key claimed, its link made.

use std::net::IpAddr;

use nsm_core::{
    identity::policy::End,
    mechanism::{DST_IP, DST_PORT, Granted, MechanismError, RemoteMechanism, TunnelEnd, lower_mtu},
};
use nsm_proto::connectioncontext::ConnectionContext;

use super::{
    accept::{Made, MadeTunnel},
    admit::split_default_routes,
    ask::Attempt,
    offer::tunnel_mtu,
};
use crate::{
    call::{
        Calls,
        case::Client,
        ends::{Ends, Tunnel, interface},
    },
    error::RequestError,
    ports::{ForwarderError, Plan},
};

impl Calls {
    /// Makes the client's end of the tunnel that the next hop has granted.
    pub(super) async fn initiate(
        &self,
        attempt: &Attempt<'_>,
        client: &Client,
        remote: RemoteMechanism,
        granted: Granted,
        context: &mut ConnectionContext,
    ) -> Result<Made, RequestError> {
        let id = attempt.id();
        let server = granted.server;
        let (terms, around) = (attempt.terms(), attempt.around_client.as_ref());
        split_default_routes(&terms, around, context);
        self.admit_client(&terms, context, around, Some(server.address))?;
        let underlay = self.forwarder()?.underlay(Some(server.address)).await?;
        self.check_server(&server, underlay.port)
            .and_then(|()| self.check_not_own(DST_IP, server.address, attempt))
            .map_err(|error| attempt.bad_answer(error))?;
        let own_mtu = remote.mtu(underlay.mtu, underlay.ip);
        let agreed_mtu = if granted.watches_path {
            // A server that watches the path agrees in the mechanism; its context has what the path carries now.
            lower_mtu(granted.mtu.unwrap_or(context.mtu), own_mtu)
        } else {
            tunnel_mtu(remote, context, &underlay, granted.mtu)
        };
        let path = self.liveness.join(id, server, own_mtu, attempt.prior).await;
        let end = MadeTunnel {
            key: granted.key,
            path,
            agreed_mtu,
        };
        let tunnel = Tunnel {
            key: granted.key,
            local: underlay.ip,
            remote: server.address,
            port: server.port,
        };
        match self
            .make_client_end(attempt, client, tunnel, end, context)
            .await
        {
            Ok(made) => {
                attempt.peer.set_tunnel(path.watched);
                Ok(made)
            }
            Err(error) => {
                self.liveness.leave(id, &path);
                Err(error)
            }
        }
    }

    /// A tunnel's port is opened on this node, too: only those that the operator has named.
    fn check_server(&self, server: &TunnelEnd, own: u16) -> Result<(), MechanismError> {
        if server.port == own || self.config.peer_ports.contains(&server.port) {
            return Ok(());
        }
        Err(MechanismError::ForeignPort {
            key: DST_PORT,
            value: server.port,
            own,
        })
    }

    fn check_not_own(
        &self,
        key: &'static str,
        address: IpAddr,
        attempt: &Attempt<'_>,
    ) -> Result<(), MechanismError> {
        let around = attempt.around_client.as_ref();
        let addresses = &self.lookup.addresses;
        match around.is_some_and(|around| addresses.is_one_of(&around.node, address)) {
            true => Err(MechanismError::OwnAddress {
                key,
                value: address,
            }),
            false => Ok(()),
        }
    }

    async fn make_client_end(
        &self,
        attempt: &Attempt<'_>,
        client: &Client,
        tunnel: Tunnel,
        end: MadeTunnel,
        context: &mut ConnectionContext,
    ) -> Result<Made, RequestError> {
        let id = attempt.id();
        let path = &end.path;
        let is_other_path = path.is_new || attempt.ask.avoid.is_some();
        if is_other_path || path.is_joined_anew {
            // A peer that has another reflector now is refused no more than one that is as it was.
            let strict = attempt.strict && is_other_path;
            self.liveness
                .prove(attempt.route.url.as_str(), path, strict)
                .await?;
        }
        let carried = self.liveness.path_mtu(path.watched.as_ref());
        context.mtu = lower_mtu(end.agreed_mtu, lower_mtu(context.mtu, carried));
        let name = interface(&client.pod.kernel, id);
        let plan = Ends::parse(self.alias(id)?, context)
            .and_then(|ends| ends.tunnel(End::Client, &client.pod, name.clone(), tunnel))
            .map_err(|error| attempt.bad_answer(error))?;
        self.claim_and_bring_up(attempt, end, &plan).await?;
        Ok(Made {
            mechanism: Some(client.named(&name)),
            plan: Some(plan),
            tunnel: Some(end),
        })
    }

    async fn claim_and_bring_up(
        &self,
        attempt: &Attempt<'_>,
        end: MadeTunnel,
        plan: &Plan,
    ) -> Result<(), RequestError> {
        let held = attempt.prior.and_then(|prior| prior.key);
        if held != Some(end.key) && self.held.keys.claim(end.key).is_err() {
            return Err(ForwarderError::KeyTaken(end.key).into());
        }
        let outcome = self.bring_up(plan, attempt.prior).await;
        outcome.inspect_err(|_| self.held.keys.release_unless_held(end.key, held))
    }
}
