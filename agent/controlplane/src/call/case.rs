//! What this node does for a connection: which of the two sides is a pod here, which is a tunnel.
//!
//! | previous hop | next hop | here |
//! |---|---|---|
//! | a client's pod | an endpoint's pod | a veth pair |
//! | a client's pod | another node | the client's end of a VXLAN tunnel |
//! | another node | an endpoint's pod | the endpoint's end, which chooses the VNI |
//! | another node | another node | nothing: mechanisms pass through |

use std::net::IpAddr;

use ipnet::IpNet;
use nsm_core::{
    link::{LinkAlias, LinkSpec, VxlanSpec},
    mechanism::{KERNEL, Kernel, LOCAL, REMOTE, VXLAN, Vxlan, choose, lower_mtu, vxlan_mtu},
    net::{IfName, MacAddr, Vni},
};
use nsm_proto::{
    connection::{Connection, Mechanism},
    connectioncontext::{ConnectionContext, IpContext},
};
use uuid::Uuid;

use crate::{
    call::pod::{PassedNetns, Pod},
    convert,
    error::RequestError,
    ports::{Plan, Underlay},
    route::router::{Arrival, Route},
};

/// The MTU of a veth pair for which nobody asked for another.
const VETH_MTU: u32 = 1500;

/// What this node does for a connection.
#[derive(Debug, Clone)]
pub(crate) enum Case {
    /// Client and endpoint are pods of this node.
    PodToPod(Pod, Mechanism),
    /// The client is a pod of this node.
    PodToTunnel(Pod, Mechanism),
    /// The endpoint is a pod of this node.
    TunnelToPod(Vxlan, Mechanism),
    /// Neither is.
    Through,
}

impl Case {
    /// Decides, and parses the previous hop's mechanism where this node acts on it.
    pub(crate) fn of(
        arrival: Arrival,
        has_forwarder: bool,
        connection: &Connection,
        preferences: &[Mechanism],
        passed: &PassedNetns,
        route: &Route,
    ) -> Result<Self, RequestError> {
        if !has_forwarder {
            return Ok(Self::Through);
        }
        match arrival {
            Arrival::Local => {
                let mechanism = agreed(connection, preferences, &[(LOCAL, KERNEL)])?;
                let client = Pod::of_client(&mechanism, passed)?;
                Ok(if route.is_local() {
                    Self::PodToPod(client, mechanism)
                } else {
                    Self::PodToTunnel(client, mechanism)
                })
            }
            // What its NSMgr asks for tells whether the client is a pod of this node.
            Arrival::Forwarder => {
                let mechanism =
                    agreed(connection, preferences, &[(LOCAL, KERNEL), (REMOTE, VXLAN)])?;
                if mechanism.r#type == VXLAN {
                    return match route.is_local() {
                        true => Self::tunnel_to_pod(mechanism),
                        false => Ok(Self::Through),
                    };
                }
                let client = Pod::of_client(&mechanism, passed)?;
                Ok(if route.is_local() {
                    Self::PodToPod(client, mechanism)
                } else {
                    Self::PodToTunnel(client, mechanism)
                })
            }
            Arrival::Network if route.is_local() => {
                Self::tunnel_to_pod(agreed(connection, preferences, &[(REMOTE, VXLAN)])?)
            }
            Arrival::Network => Ok(Self::Through),
        }
    }
}

impl Case {
    fn tunnel_to_pod(mechanism: Mechanism) -> Result<Self, RequestError> {
        let vxlan = Vxlan::parse(&mechanism.parameters)?;
        if vxlan.src_ip.is_none() {
            return Err(RequestError::Missing("src_ip in its VXLAN mechanism"));
        }
        Ok(Self::TunnelToPod(vxlan, mechanism))
    }
}

/// The mechanism the previous hop has, or the first it prefers that we support.
fn agreed(
    connection: &Connection,
    preferences: &[Mechanism],
    supported: &[(&str, &str)],
) -> Result<Mechanism, RequestError> {
    let offered: Vec<&Mechanism> = connection
        .mechanism
        .iter()
        .filter(|mechanism| !mechanism.r#type.is_empty())
        .chain(preferences)
        .collect();
    let at = choose(
        offered
            .iter()
            .map(|mechanism| (mechanism.cls.as_str(), mechanism.r#type.as_str())),
        supported,
    )?;
    Ok(offered[at].clone())
}

/// The MAC address of our end of connection `id`: the same for every refresh, without keeping it.
pub(crate) fn mac(id: &str, end: &str) -> MacAddr {
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{end}/{id}").as_bytes());
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&hash.as_bytes()[..6]);
    MacAddr::local_random(bytes)
}

/// The MTU our tunnel can carry, and not more than the connection's so far.
pub(crate) fn tunnel_mtu(
    context: &ConnectionContext,
    underlay: &Underlay,
    asked: Option<u32>,
) -> u32 {
    let own = vxlan_mtu(underlay.mtu, underlay.ip);
    lower_mtu(lower_mtu(context.mtu, asked.unwrap_or(0)), own)
}

/// Both ends of a connection as its context describes them.
#[derive(Debug)]
pub(crate) struct Ends {
    src_addresses: Vec<IpNet>,
    dst_addresses: Vec<IpNet>,
    src_mac: Option<MacAddr>,
    dst_mac: Option<MacAddr>,
    neighbours: Vec<(IpAddr, MacAddr)>,
    mtu: u32,
    alias: LinkAlias,
    ip: IpContext,
}

impl Ends {
    /// Parses the context both sides agreed on.
    pub(crate) fn parse(
        alias: LinkAlias,
        context: &ConnectionContext,
    ) -> Result<Self, RequestError> {
        let ip = context.ip_context.clone().unwrap_or_default();
        let ethernet = context.ethernet_context.clone().unwrap_or_default();
        let mut neighbours = Vec::new();
        for neighbour in &ip.ip_neighbors {
            let address = neighbour.ip.parse().map_err(|_| RequestError::Field {
                field: "ip_neighbors",
                value: neighbour.ip.clone(),
                reason: "write an address".to_owned(),
            })?;
            if let Some(mac) = convert::mac("ip_neighbors", &neighbour.hardware_address)? {
                neighbours.push((address, mac));
            }
        }
        Ok(Self {
            src_addresses: convert::addresses("src_ip_addrs", &ip.src_ip_addrs)?,
            dst_addresses: convert::addresses("dst_ip_addrs", &ip.dst_ip_addrs)?,
            src_mac: convert::mac("src_mac", &ethernet.src_mac)?,
            dst_mac: convert::mac("dst_mac", &ethernet.dst_mac)?,
            neighbours,
            mtu: context.mtu,
            alias,
            ip,
        })
    }

    /// Checks what is parsed only where it is used, before anybody is asked.
    pub(crate) fn check(&self) -> Result<(), RequestError> {
        convert::routes("src_routes", &self.ip.src_routes)?;
        convert::routes("dst_routes", &self.ip.dst_routes)?;
        Ok(())
    }

    fn client(&self, name: IfName) -> Result<LinkSpec, RequestError> {
        Ok(LinkSpec {
            alias: self.alias.clone(),
            name,
            mac: self.src_mac,
            mtu: self.mtu,
            addresses: self.src_addresses.clone(),
            routes: convert::routes("src_routes", &self.ip.src_routes)?,
            neighbours: self.neighbours_of(&self.dst_addresses, self.dst_mac),
        })
    }

    fn endpoint(&self, name: IfName) -> Result<LinkSpec, RequestError> {
        Ok(LinkSpec {
            alias: self.alias.clone(),
            name,
            mac: self.dst_mac,
            mtu: self.mtu,
            addresses: self.dst_addresses.clone(),
            routes: convert::routes("dst_routes", &self.ip.dst_routes)?,
            neighbours: self.neighbours_of(&self.src_addresses, self.src_mac),
        })
    }

    /// The other end's addresses at its MAC, so that no ARP or neighbour discovery crosses the
    /// tunnel; an end that does not tell its MAC is found by them all the same.
    fn neighbours_of(&self, addresses: &[IpNet], mac: Option<MacAddr>) -> Vec<(IpAddr, MacAddr)> {
        let mut neighbours = self.neighbours.clone();
        if let Some(mac) = mac {
            neighbours.extend(addresses.iter().map(|address| (address.addr(), mac)));
        }
        neighbours
    }

    /// The client's end of a tunnel.
    pub(crate) fn client_tunnel(
        &self,
        client: &Pod,
        name: IfName,
        tunnel: Tunnel,
    ) -> Result<Plan, RequestError> {
        Ok(Plan::Vxlan {
            netns: client.netns.clone(),
            spec: tunnel.spec(self.client(name)?),
        })
    }

    /// The endpoint's end of a tunnel.
    pub(crate) fn endpoint_tunnel(
        &self,
        endpoint: &Pod,
        name: IfName,
        tunnel: Tunnel,
    ) -> Result<Plan, RequestError> {
        Ok(Plan::Vxlan {
            netns: endpoint.netns.clone(),
            spec: tunnel.spec(self.endpoint(name)?),
        })
    }

    /// Both ends on this node.
    pub(crate) fn pair(
        &self,
        client: (&Pod, IfName),
        endpoint: (&Pod, IfName),
    ) -> Result<Plan, RequestError> {
        Ok(Plan::Veth {
            client: (client.0.netns.clone(), self.client(client.1)?),
            endpoint: (endpoint.0.netns.clone(), self.endpoint(endpoint.1)?),
        })
    }
}

/// Where a tunnel goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tunnel {
    pub(crate) vni: Vni,
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) port: u16,
}

impl Tunnel {
    fn spec(self, link: LinkSpec) -> VxlanSpec {
        VxlanSpec {
            link,
            vni: self.vni,
            local: self.local,
            remote: self.remote,
            port: self.port,
        }
    }
}

/// The interface's name: as asked, else from the connection's id.
pub(crate) fn interface(kernel: &Kernel, id: &str) -> IfName {
    kernel.name.clone().unwrap_or_else(|| {
        let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, id.as_bytes())
            .simple()
            .to_string();
        format!("nsm-{}", &hash[..8])
            .parse()
            .expect("twelve characters of letters, digits and a hyphen name an interface")
    })
}

/// The MTU of a veth pair.
pub(crate) fn pair_mtu(context: &ConnectionContext) -> u32 {
    if context.mtu == 0 {
        VETH_MTU
    } else {
        context.mtu
    }
}

#[cfg(test)]
mod tests {
    use nsm_core::identity::{Caller, User};

    use super::*;
    use crate::route::addresses::Crossing;

    fn route(url: &str) -> Route {
        Route {
            url: url.parse().unwrap(),
            registrant: Caller::over_network(),
            crossing: Crossing::Inside,
            service: "svc".to_owned(),
            endpoint: "nse".to_owned(),
            endpoint_answered: "nse".to_owned(),
            payload: String::new(),
            resolution: None,
            _socket: None,
        }
    }

    fn of(
        (arrival, caller): (Arrival, Caller),
        offered: Mechanism,
        url: &str,
    ) -> Result<Case, RequestError> {
        Case::of(
            arrival,
            true,
            &Connection::default(),
            &[offered],
            &PassedNetns::none_of(caller),
            &route(url),
        )
    }

    fn kernel(url: &str) -> Mechanism {
        let parameters = [("inodeURL".to_owned(), url.to_owned())].into();
        convert::mechanism(LOCAL, KERNEL, parameters)
    }

    fn vxlan(source: &str) -> Mechanism {
        let parameters = [("src_ip".to_owned(), source.to_owned())].into();
        convert::mechanism(REMOTE, VXLAN, parameters)
    }

    const ROOT: (Arrival, Caller) = (Arrival::Local, Caller::on_node(User::Privileged(0)));
    const NETWORK: (Arrival, Caller) = (Arrival::Network, Caller::over_network());
    const ENDPOINT: &str = "unix:///run/nse.sock";
    const PEER: &str = "tcp://192.0.2.2:5006";

    #[test]
    fn what_stands_on_either_side_decides() {
        let pod = || kernel("inode://4/4026531840");
        assert!(matches!(of(ROOT, pod(), ENDPOINT), Ok(Case::PodToPod(..))));
        assert!(matches!(of(ROOT, pod(), PEER), Ok(Case::PodToTunnel(..))));
        let tunnel = || vxlan("192.0.2.1");
        assert!(matches!(
            of(NETWORK, tunnel(), ENDPOINT),
            Ok(Case::TunnelToPod(..))
        ));
        assert!(matches!(of(NETWORK, tunnel(), PEER), Ok(Case::Through)));
        // Without a forwarder nothing is this node's business.
        let through = Case::of(
            Arrival::Local,
            false,
            &Connection::default(),
            &[],
            &PassedNetns::none_of(Caller::on_node(User::Other(1000))),
            &route(ENDPOINT),
        );
        assert!(matches!(through, Ok(Case::Through)));
    }

    #[test]
    fn what_the_nsmgr_asks_its_forwarder_for_decides() {
        let nsmgr = (Arrival::Forwarder, Caller::on_node(User::Privileged(0)));
        let pod = || kernel("inode://4/4026531840");
        let tunnel = || vxlan("192.0.2.1");
        for socket in [ENDPOINT, "inode://65024/7"] {
            assert!(matches!(of(nsmgr, pod(), socket), Ok(Case::PodToPod(..))));
            assert!(matches!(
                of(nsmgr, tunnel(), socket),
                Ok(Case::TunnelToPod(..))
            ));
        }
        assert!(matches!(of(nsmgr, pod(), PEER), Ok(Case::PodToTunnel(..))));
        assert!(matches!(of(nsmgr, tunnel(), PEER), Ok(Case::Through)));
        let error = of(nsmgr, vxlan(""), ENDPOINT).unwrap_err().to_string();
        assert!(error.contains("src_ip"), "{error}");
        // An NSMgr that is not root passes descriptors as everybody.
        let nsmgr = (Arrival::Forwarder, Caller::on_node(User::Other(1000)));
        let error = of(nsmgr, pod(), PEER).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied);
    }

    #[test]
    fn each_side_takes_its_own_mechanisms_only() {
        for (arrival, offered, url) in [
            (NETWORK, kernel("file:///run/netns/pod"), ENDPOINT),
            (ROOT, vxlan("192.0.2.1"), PEER),
        ] {
            let error = of(arrival, offered, url).unwrap_err().to_string();
            assert!(error.contains("no common mechanism"), "{error}");
        }
    }

    #[test]
    fn names_and_macs_follow_from_the_id() {
        let unnamed = Kernel::default();
        let name = interface(&unnamed, "one");
        assert_eq!(name, interface(&unnamed, "one"));
        assert_ne!(name, interface(&unnamed, "two"));
        assert_eq!(name.as_str().len(), 12);
        assert_eq!(mac("one", "client"), mac("one", "client"));
        assert_ne!(mac("one", "client"), mac("one", "endpoint"));
    }
}
