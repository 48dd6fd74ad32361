//! The parts of a Request that make links: what stands before goes, what cannot stand is undone.

use std::net::IpAddr;

use nsm_core::{
    mechanism::{Vxlan, lower_mtu, vxlan_mtu},
    net::Vni,
};
use nsm_proto::{connection::Mechanism, connectioncontext::ConnectionContext};

use super::{
    MAX_VNIS,
    messages::{bad_answer, is_same_link, reflector},
};
use crate::{
    call::{
        Calls,
        case::{Ends, Tunnel, interface, tunnel_mtu},
        pod::Pod,
    },
    connection::model::Established,
    error::RequestError,
    liveness::{JoinedPath, Remote},
    ports::{ForwarderError, Plan, Underlay},
    route::router::Route,
};

/// The server's end of a tunnel that stands.
pub(super) struct Answered {
    /// What the client is told.
    pub(super) mechanism: Mechanism,
    pub(super) plan: Plan,
    pub(super) vni: Vni,
    pub(super) path: JoinedPath,
    pub(super) agreed_mtu: u32,
}

impl Calls {
    /// The server's end of a tunnel: chooses the VNI (again, when the kernel says that something
    /// else on this node has it) and answers with our address. A client whose tunnel stands from
    /// before this agent was started has one already, which its link and ours on this node have.
    #[allow(
        clippy::too_many_arguments,
        reason = "one connection's facts, used once and together"
    )]
    pub(super) async fn answer_tunnel(
        &self,
        id: &str,
        asked: &Vxlan,
        mechanism: &Mechanism,
        endpoint: &Pod,
        context: &mut ConnectionContext,
        route: &Route,
        prior: Option<&Established>,
    ) -> Result<Answered, RequestError> {
        let remote = asked
            .src_ip
            .ok_or(RequestError::Missing("src_ip in its VXLAN mechanism"))?;
        let underlay = self.forwarder()?.underlay(Some(remote)).await?;
        let agreed_mtu = tunnel_mtu(context, &underlay, asked.mtu);
        // Joined before it is answered: the client proves the path as soon as it has the answer.
        let path = self
            .liveness
            .join(
                id,
                Remote {
                    address: remote,
                    port: asked.src_port,
                    reflector: reflector(asked.src_discriminator, asked.sbfd_vni),
                },
                vxlan_mtu(underlay.mtu, underlay.ip),
                prior,
            )
            .await;
        context.mtu = lower_mtu(agreed_mtu, self.liveness.path_mtu(path.watched.as_ref()));
        let made = self.make_end(
            id, asked, mechanism, endpoint, context, route, prior, underlay, remote, agreed_mtu,
        );
        match made.await {
            Ok((mechanism, plan, vni)) => Ok(Answered {
                mechanism,
                plan,
                vni,
                path,
                agreed_mtu,
            }),
            Err(error) => {
                self.liveness.leave(id, &path);
                Err(error)
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one connection's facts, used once and together"
    )]
    async fn make_end(
        &self,
        id: &str,
        asked: &Vxlan,
        mechanism: &Mechanism,
        endpoint: &Pod,
        context: &ConnectionContext,
        route: &Route,
        prior: Option<&Established>,
        underlay: Underlay,
        remote: IpAddr,
        agreed_mtu: u32,
    ) -> Result<(Mechanism, Plan, Vni), RequestError> {
        let ends = Ends::parse(self.alias(id)?, context)
            .map_err(|error| bad_answer(route, error.to_string()))?;
        let name = interface(&endpoint.kernel, id);
        let held = prior.and_then(|prior| prior.vni);
        let public = self.lookup.addresses.public_of(underlay.ip);
        // A proxy on the way may have cleared where the tunnel ends.
        let is_ours = |ip: IpAddr| [underlay.ip, public].contains(&ip);
        let mut kept = held.or_else(|| {
            let standing = asked.vni.filter(|_| asked.dst_ip.is_none_or(is_ours));
            standing.filter(|vni| self.held.vnis.reclaim(*vni, public, remote).is_ok())
        });
        for attempt in 1.. {
            let vni = match kept.take() {
                Some(vni) => vni,
                None => self.held.vnis.allocate(public, remote)?,
            };
            let tunnel = Tunnel {
                vni,
                local: underlay.ip,
                remote,
                port: underlay.port,
            };
            let outcome = match ends.endpoint_tunnel(endpoint, name.clone(), tunnel) {
                Ok(plan) => self.bring_up(&plan, prior).await.map(|()| plan),
                Err(error) => Err(bad_answer(route, error.to_string())),
            };
            match outcome {
                Ok(plan) => {
                    let mut answer = mechanism.clone();
                    let reflector = self.liveness.reflector();
                    Vxlan {
                        dst_ip: Some(underlay.ip),
                        dst_port: underlay.port,
                        vni: Some(vni),
                        mtu: Some(agreed_mtu),
                        dst_discriminator: reflector.map(|it| it.discriminator),
                        sbfd_vni: reflector.map(|it| it.vni),
                        ..asked.clone()
                    }
                    .write(&mut answer.parameters);
                    let addresses = &self.lookup.addresses;
                    addresses.swap_answer(route.crossing, &mut answer);
                    return Ok((answer, plan, vni));
                }
                Err(error) => {
                    self.release_unless(held, vni);
                    let again =
                        matches!(error, RequestError::Forwarder(ForwarderError::VniTaken(_)));
                    if !again || attempt >= MAX_VNIS {
                        return Err(error);
                    }
                }
            }
        }
        unreachable!("the loop above ends by returning")
    }

    pub(super) fn release_unless(&self, held: Option<Vni>, vni: Vni) {
        if held != Some(vni) {
            self.held.vnis.release(vni);
        }
    }

    /// Makes the plan real; what stood before and cannot be changed into it goes first.
    pub(super) async fn bring_up(
        &self,
        plan: &Plan,
        prior: Option<&Established>,
    ) -> Result<(), RequestError> {
        let forwarder = self.forwarder()?;
        let replaced = prior
            .and_then(|prior| prior.plan.as_ref())
            .filter(|old| !is_same_link(old, plan));
        if let Some(old) = replaced {
            forwarder.down(old).await?;
        }
        let outcome = forwarder.up(plan).await;
        if let (Err(_), Some(old)) = (&outcome, replaced)
            && let Err(error) = forwarder.up(old).await
        {
            tracing::error!(%error, "the link that stood before could not be restored");
        }
        Ok(outcome?)
    }
}
