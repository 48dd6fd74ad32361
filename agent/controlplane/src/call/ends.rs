//! The two ends of a connection, from the context that both sides agreed on to the links that this node makes.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use nsm_core::{
    identity::policy::End,
    link::{LinkAlias, LinkSpec, PodLinkSpec, VxlanSpec},
    mechanism::{Kernel, TunnelKey},
    net::{IfName, MacAddr},
};
use nsm_proto::connectioncontext::{ConnectionContext, IpContext};
use uuid::Uuid;

use crate::{
    call::pod::Pod,
    convert,
    error::RequestError,
    ports::{Plan, PlannedLink, PodNetns},
};

/// The MTU between two pods of this node where neither end has asked for another.
const PAIR_MTU: u32 = 1500;

/// The MAC address of an end of connection `id`: the same for every refresh, without keeping it.
fn mac(end: End, id: &str) -> MacAddr {
    let end = match end {
        End::Client => "client",
        End::Endpoint => "endpoint",
    };
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{end}/{id}").as_bytes());
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&hash.as_bytes()[..6]);
    MacAddr::local_random(bytes)
}

/// Writes the MAC address of an end of connection `id` into its context.
pub(crate) fn set_mac(context: &mut ConnectionContext, end: End, id: &str) {
    let ethernet = context.ethernet_context.get_or_insert_default();
    let mac = mac(end, id).to_string();
    match end {
        End::Client => ethernet.src_mac = mac,
        End::Endpoint => ethernet.dst_mac = mac,
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

/// The MTU between two pods of this node.
pub(crate) fn pair_mtu(context: &ConnectionContext) -> u32 {
    if context.mtu == 0 {
        PAIR_MTU
    } else {
        context.mtu
    }
}

/// The alias of the endpoint's link, where the client has one on this node too.
pub(crate) fn endpoint_alias(connection: &LinkAlias) -> Result<LinkAlias, RequestError> {
    connection
        .of_endpoint()
        .map_err(|error| RequestError::Field {
            field: "id of our path segment",
            value: connection.connection_id().to_owned(),
            reason: error.to_string(),
        })
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

    /// Checks what is parsed only where it is used, before any call to the next hop.
    pub(crate) fn check(&self) -> Result<(), RequestError> {
        convert::routes("src_routes", &self.ip.src_routes)?;
        convert::routes("dst_routes", &self.ip.dst_routes)?;
        Ok(())
    }

    /// The link of one end.
    fn link(&self, end: End, name: IfName) -> Result<LinkSpec, RequestError> {
        let (mac, addresses, routes, others, others_mac) = match end {
            End::Client => (
                self.src_mac,
                &self.src_addresses,
                convert::routes("src_routes", &self.ip.src_routes)?,
                &self.dst_addresses,
                self.dst_mac,
            ),
            End::Endpoint => (
                self.dst_mac,
                &self.dst_addresses,
                convert::routes("dst_routes", &self.ip.dst_routes)?,
                &self.src_addresses,
                self.src_mac,
            ),
        };
        Ok(LinkSpec {
            alias: self.alias.clone(),
            name,
            mac,
            mtu: self.mtu,
            addresses: addresses.clone(),
            routes,
            neighbours: self.neighbours_of(others, others_mac),
        })
    }

    /// The other end's addresses at its MAC, so that no ARP or neighbour discovery crosses the tunnel; an end without a MAC in the
    /// context is found by them all the same.
    fn neighbours_of(&self, addresses: &[IpNet], mac: Option<MacAddr>) -> Vec<(IpAddr, MacAddr)> {
        let mut neighbours = self.neighbours.clone();
        if let Some(mac) = mac {
            neighbours.extend(addresses.iter().map(|address| (address.addr(), mac)));
        }
        neighbours
    }

    /// One end of a tunnel in a pod.
    pub(crate) fn tunnel(
        &self,
        end: End,
        pod: &Pod,
        name: IfName,
        tunnel: Tunnel,
    ) -> Result<Plan, RequestError> {
        let link = self.link(end, name)?;
        Ok(tunnel.plan(pod.netns.clone(), link, self.sources(end)?))
    }

    /// The addresses that an end may send from: its own, and those that the other end has a route to over this connection.
    fn sources(&self, end: End) -> Result<Vec<IpNet>, RequestError> {
        let (own, routes) = match end {
            End::Client => (
                &self.src_addresses,
                convert::routes("dst_routes", &self.ip.dst_routes)?,
            ),
            End::Endpoint => (
                &self.dst_addresses,
                convert::routes("src_routes", &self.ip.src_routes)?,
            ),
        };
        let own = own.iter().map(|address| address.addr().into());
        let behind = routes.into_iter().map(|route| route.prefix);
        let all: BTreeSet<IpNet> = own.chain(behind).collect();
        let is_covered = |net: &IpNet| all.iter().any(|other| other != net && other.contains(net));
        Ok(all.iter().filter(|net| !is_covered(net)).copied().collect())
    }

    /// The links of `plan`, which stand, as this context has them. A tunnel's MTU stays: it follows what the path carries.
    pub(crate) fn changed(
        &self,
        plan: &Plan,
        is_endpoint_here: bool,
    ) -> Result<Plan, RequestError> {
        let mut changed = plan.clone();
        match &mut changed {
            Plan::Pair { client, endpoint } => {
                let names = [&client, &endpoint].map(|it| it.spec.link.name.clone());
                let [own, others] = names;
                client.spec = self.of_pair(End::Client, own)?;
                endpoint.spec = self.of_pair(End::Endpoint, others)?;
            }
            Plan::Vxlan { spec, .. } => {
                let end = if is_endpoint_here {
                    End::Endpoint
                } else {
                    End::Client
                };
                spec.link = LinkSpec {
                    mtu: spec.link.mtu,
                    ..self.link(end, spec.link.name.clone())?
                };
            }
        }
        Ok(changed)
    }

    /// Both ends on this node.
    pub(crate) fn pair(
        &self,
        client: (&Pod, IfName),
        endpoint: (&Pod, IfName),
    ) -> Result<Plan, RequestError> {
        Ok(Plan::Pair {
            client: PlannedLink {
                netns: client.0.netns.clone(),
                spec: self.of_pair(End::Client, client.1)?,
            },
            endpoint: PlannedLink {
                netns: endpoint.0.netns.clone(),
                spec: self.of_pair(End::Endpoint, endpoint.1)?,
            },
        })
    }

    /// The link of one end where the other end is on this node too.
    fn of_pair(&self, end: End, name: IfName) -> Result<PodLinkSpec, RequestError> {
        let mut link = self.link(end, name)?;
        if end == End::Endpoint {
            link.alias = endpoint_alias(&self.alias)?;
        }
        Ok(PodLinkSpec {
            link,
            sources: self.sources(end)?,
        })
    }
}

/// Where a tunnel goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tunnel {
    pub(crate) key: TunnelKey,
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) port: u16,
}

impl Tunnel {
    /// What makes the tunnel on this node.
    fn plan(self, netns: PodNetns, link: LinkSpec, sources: Vec<IpNet>) -> Plan {
        match self.key {
            TunnelKey::Vni(vni) => Plan::Vxlan {
                netns,
                spec: VxlanSpec {
                    link,
                    sources,
                    vni,
                    local: self.local,
                    remote: self.remote,
                    port: self.port,
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs_follow_from_the_id() {
        let unnamed = Kernel::default();
        let name = interface(&unnamed, "one");
        assert_eq!(name, interface(&unnamed, "one"));
        assert_ne!(name, interface(&unnamed, "two"));
        assert_eq!(name.as_str().len(), 12);
        assert_eq!(mac(End::Client, "one"), mac(End::Client, "one"));
        assert_ne!(mac(End::Client, "one"), mac(End::Endpoint, "one"));
    }
}
