//! The server's end of a tunnel: its path is joined, its key chosen, its link made, and the answer to the client written.

use nsm_core::{
    identity::policy::End,
    mechanism::{Parameters, TunnelKey, lower_mtu},
};
use nsm_proto::{connection::Mechanism, connectioncontext::ConnectionContext};

use super::{
    MAX_KEYS,
    accept::{Made, MadeTunnel},
    ask::Attempt,
    offer::tunnel_mtu,
};
use crate::{
    call::{
        Calls,
        case::Terminated,
        ends::{Ends, Tunnel, interface, set_mac},
        pod::Pod,
    },
    error::RequestError,
    ports::{Plan, Underlay},
};

/// The server's end of a tunnel, before it has a key.
struct ServerEnd<'a> {
    attempt: &'a Attempt<'a>,
    tunnel: &'a Terminated,
    endpoint: Pod,
    underlay: Underlay,
    agreed_mtu: u32,
}

impl Calls {
    /// Makes the server's end of a tunnel to the endpoint that has granted the Request.
    pub(super) async fn terminate(
        &self,
        attempt: &Attempt<'_>,
        tunnel: &Terminated,
        granted: &Parameters,
        context: &mut ConnectionContext,
    ) -> Result<Made, RequestError> {
        let id = attempt.id();
        let endpoint = self.endpoint_pod(attempt.route, granted).await?;
        let client = tunnel.asked.client;
        let around = self.around(&endpoint.netns, &self.alias(id)?).await?;
        self.admit_endpoint(&attempt.terms(), context, &around, Some(client.address))?;
        set_mac(context, End::Endpoint, id);
        let underlay = self.forwarder()?.underlay(Some(client.address)).await?;
        let agreed_mtu = tunnel_mtu(tunnel.remote, context, &underlay, tunnel.asked.mtu);
        let own_mtu = tunnel.remote.mtu(underlay.mtu, underlay.ip);
        // Joined before it is answered: the client proves the path as soon as it has the answer.
        let path = self.liveness.join(id, client, own_mtu, attempt.prior).await;
        context.mtu = lower_mtu(agreed_mtu, self.liveness.path_mtu(path.watched.as_ref()));
        let end = ServerEnd {
            attempt,
            tunnel,
            endpoint,
            underlay,
            agreed_mtu,
        };
        match self.make_server_end(&end, context).await {
            Ok((mechanism, plan, key)) => Ok(Made {
                mechanism: Some(mechanism),
                plan: Some(plan),
                tunnel: Some(MadeTunnel {
                    key,
                    path,
                    agreed_mtu,
                }),
            }),
            Err(error) => {
                self.liveness.leave(id, &path);
                Err(error)
            }
        }
    }

    /// Makes the link with a key that nothing else on this node has: the kernel refuses one that is in use, and another is chosen.
    async fn make_server_end(
        &self,
        end: &ServerEnd<'_>,
        context: &ConnectionContext,
    ) -> Result<(Mechanism, Plan, TunnelKey), RequestError> {
        let ends = Ends::parse(self.alias(end.attempt.id())?, context)
            .map_err(|error| end.attempt.bad_answer(error))?;
        let prior = end.attempt.prior;
        let held = prior.and_then(|prior| prior.key);
        let mut standing = held.or_else(|| self.standing_key(end));
        let mut tries = 1;
        loop {
            let key = match standing.take() {
                Some(key) => key,
                None => self.choose_key(end)?,
            };
            let made = async {
                let plan = end.plan(&ends, key)?;
                let answer = self.answer_client(end, key)?;
                self.bring_up(&plan, prior).await?;
                Ok::<_, RequestError>((answer, plan, key))
            };
            let error = match made.await {
                Ok(made) => return Ok(made),
                Err(error) => error,
            };
            self.held.keys.release_unless_held(key, held);
            if !error.is_key_taken() || tries >= MAX_KEYS {
                return Err(error);
            }
            tries += 1;
        }
    }

    fn choose_key(&self, end: &ServerEnd<'_>) -> Result<TunnelKey, RequestError> {
        let public = self.lookup.addresses.public_of(end.underlay.ip);
        let client = end.tunnel.asked.client.address;
        Ok(self.held.keys.choose(end.tunnel.remote, public, client)?)
    }

    /// The key of a client's tunnel that stands from before this agent was started: its link and ours on this node have it already.
    fn standing_key(&self, end: &ServerEnd<'_>) -> Option<TunnelKey> {
        let (key, server) = end.tunnel.asked.standing?;
        let own = end.underlay.ip;
        let public = self.lookup.addresses.public_of(own);
        // A proxy on the way may have cleared where the tunnel ends.
        if server.is_some_and(|ip| ip != own && ip != public) {
            return None;
        }
        let client = end.tunnel.asked.client.address;
        self.held.keys.reclaim(key, public, client).ok()?;
        Some(key)
    }

    /// The previous hop's mechanism with our end of the tunnel in it.
    fn answer_client(
        &self,
        end: &ServerEnd<'_>,
        key: TunnelKey,
    ) -> Result<Mechanism, RequestError> {
        let mut answer = end.tunnel.mechanism.clone();
        let own = self.own_end(&end.underlay);
        end.tunnel
            .remote
            .answer(&mut answer.parameters, &own, key, end.agreed_mtu)?;
        let crossing = end.attempt.route.crossing;
        self.lookup.addresses.swap_answer(crossing, &mut answer);
        Ok(answer)
    }
}

impl ServerEnd<'_> {
    fn plan(&self, ends: &Ends, key: TunnelKey) -> Result<Plan, RequestError> {
        let name = interface(&self.endpoint.kernel, self.attempt.id());
        let tunnel = Tunnel {
            key,
            local: self.underlay.ip,
            remote: self.tunnel.asked.client.address,
            port: self.underlay.port,
        };
        ends.tunnel(End::Endpoint, &self.endpoint, name, tunnel)
            .map_err(|error| self.attempt.bad_answer(error))
    }
}
