//! The parts of a Request that make links: what stands before goes, what cannot stand is undone.

use std::time::SystemTime;

use nsm_core::{mechanism::Vxlan, vni::Vni};
use nsm_proto::{connection::Mechanism, connectioncontext::ConnectionContext};

use super::{
    MAX_VNIS,
    messages::{bad_answer, is_same_link},
};
use crate::{
    case::{Ends, Tunnel, interface, tunnel_mtu},
    connections::{Established, lock},
    error::RequestError,
    forwarder::{ForwarderError, Plan},
    plane::ControlPlane,
    pod::Pod,
    route::{Crossing, Route},
};

impl ControlPlane {
    /// The server's end of a tunnel: chooses the VNI (again, when the kernel says that something
    /// else on this node has it) and answers with our address.
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
    ) -> Result<(Mechanism, Plan, Vni), RequestError> {
        let remote = asked
            .src_ip
            .ok_or(RequestError::Missing("src_ip in its VXLAN mechanism"))?;
        let underlay = self.forwarder()?.underlay(Some(remote)).await?;
        context.mtu = tunnel_mtu(context, &underlay, asked.mtu);
        let ends = Ends::parse(self.alias(id)?, context)
            .map_err(|error| bad_answer(route, error.to_string()))?;
        let name = interface(&endpoint.kernel, id);
        let held = prior.and_then(|prior| prior.vni);
        let mut kept = held;
        for attempt in 1.. {
            let vni = match kept.take() {
                Some(vni) => vni,
                None => lock(&self.shared.vnis).allocate(
                    self.shared.ip_map().external(underlay.ip),
                    remote,
                    SystemTime::now(),
                    rand::random,
                )?,
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
                    Vxlan {
                        dst_ip: Some(underlay.ip),
                        dst_port: underlay.port,
                        vni: Some(vni),
                        mtu: Some(context.mtu),
                        ..asked.clone()
                    }
                    .write(&mut answer.parameters);
                    if route.crossing == Crossing::In {
                        self.shared.ip_map().reply_out(&mut answer.parameters);
                    }
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
            lock(&self.shared.vnis).release(vni, SystemTime::now());
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
