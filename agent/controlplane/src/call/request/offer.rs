//! What the next hop is offered, and the addresses that the proxy swaps on the way there and back.

use nsm_core::mechanism::{
    KERNEL, LOCAL, MTU, REMOTE, SBFD_DISCRIMINATOR_SRC, SBFD_VNI, VXLAN, Vxlan,
};
use nsm_proto::{connection::Mechanism, networkservice::NetworkServiceRequest};

use super::{
    Ask,
    messages::{End, agreed_mtu, set_mac, without_inode},
};
use crate::{
    call::{
        Calls,
        case::{Case, mac, pair_mtu, tunnel_mtu},
    },
    connection::model::Established,
    convert,
    error::RequestError,
    route::router::Route,
};

impl Calls {
    /// The Request to the next hop: names as it knows them, the mechanism we want towards it, and
    /// what this node can promise of the connection's context.
    pub(super) async fn offer(
        &self,
        ask: &Ask,
        route: &Route,
        case: &Case,
        mut standing: Option<Mechanism>,
        prior: Option<&Established>,
    ) -> Result<NetworkServiceRequest, RequestError> {
        let mut connection = ask.connection.clone();
        let agreed = agreed_mtu(ask, prior);
        if let (Some(mtu), Some(context)) = (agreed, connection.context.as_mut()) {
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
        let mut preferences = Vec::new();
        match case {
            Case::PodToPod(..) => {
                let context = connection.context.get_or_insert_default();
                context.mtu = pair_mtu(context);
                set_mac(context, End::Client, &mac(&ask.connection.id, "client"));
                preferences.push(convert::mechanism(LOCAL, KERNEL, [].into()));
            }
            Case::PodToTunnel(..) => {
                let underlay = self.forwarder()?.underlay(route.address()).await?;
                let context = connection.context.get_or_insert_default();
                context.mtu = tunnel_mtu(context, &underlay, None);
                set_mac(context, End::Client, &mac(&ask.connection.id, "client"));
                let mut parameters = [].into();
                let reflector = self.liveness.reflector();
                Vxlan {
                    src_ip: Some(underlay.ip),
                    dst_ip: None,
                    src_port: underlay.port,
                    dst_port: underlay.port,
                    vni: None,
                    mtu: Some(context.mtu),
                    src_discriminator: reflector.map(|it| it.discriminator),
                    dst_discriminator: None,
                    sbfd_vni: reflector.map(|it| it.vni),
                }
                .write(&mut parameters);
                if let Some(standing) = &mut standing {
                    // The side that speaks is ours now, and its answer was the peer's.
                    let ours = [MTU, SBFD_DISCRIMINATOR_SRC, SBFD_VNI];
                    for key in ours {
                        standing.parameters.remove(key);
                        if let Some(value) = parameters.get(key) {
                            standing.parameters.insert(key.to_owned(), value.clone());
                        }
                    }
                }
                preferences.push(convert::mechanism(REMOTE, VXLAN, parameters));
            }
            Case::TunnelToPod(vxlan, _) => {
                let underlay = self.forwarder()?.underlay(vxlan.src_ip).await?;
                let context = connection.context.get_or_insert_default();
                context.mtu = tunnel_mtu(context, &underlay, vxlan.mtu);
                set_mac(context, End::Endpoint, &mac(&ask.connection.id, "endpoint"));
                preferences.push(convert::mechanism(LOCAL, KERNEL, [].into()));
            }
            Case::Through => preferences.clone_from(&ask.preferences),
        }
        if !matches!(case, Case::Through) {
            connection.mechanism = match route.is_local() {
                true => standing.map(without_inode),
                false => standing,
            };
        }
        self.lookup.addresses.swap_request(
            route.crossing,
            connection.mechanism.iter_mut().chain(&mut preferences),
        );
        Ok(NetworkServiceRequest {
            connection: Some(connection),
            mechanism_preferences: preferences,
        })
    }
}
