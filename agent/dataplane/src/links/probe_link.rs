//! The probe link: the VXLAN device of the probe VNI (the management VNI of RFC 8971) in the node's namespace, one for each family of
//! underlay addresses. It has one forwarding entry for each path.
//!
//! On the underlay it is like the tunnels: same UDP port, same `df`, no learning. It has no addresses, and no frame is ever sent to its
//! own Ethernet address: the kernel treats each frame as one for another host and passes none to its IP stack, whatever programs are
//! attached.

use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::VxlanDf,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
};
use nix::errno::Errno;
use nsm_core::{
    link::{Link, LinkAlias, LinkKind},
    net::{MacAddr, Vni},
};
use rtnetlink::{LinkUnspec, LinkVxlan};

use super::{LinkError, basics::delete, message, observe, port};
use crate::netlink::{Netlink, NetlinkError, Refusal};

/// Prefixes of the ids in the aliases of probe links; the port follows. They are part of the adoption by later agents.
const ALIAS_V4: &str = "management-";
const ALIAS_V6: &str = "management-ipv6-";

/// MTU of the link, bytes: large enough for every probe of the path MTU search (RFC 9764).
const MTU: u32 = 16_000;

/// The family of underlay addresses of a probe link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// A probe link as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeLinkSpec {
    /// The agent's domain.
    pub(crate) domain: String,
    pub(crate) family: Family,
    /// The probe VNI.
    pub(crate) vni: Vni,
    /// The UDP port of this node's tunnels.
    pub(crate) port: u16,
    /// The address that tunnels leave from; `None`: each by its route.
    pub(crate) local: Option<IpAddr>,
}

/// Whether an alias is that of a probe link, which has no connection and is not removed for want of one.
pub(super) fn is_probe_link(alias: &LinkAlias) -> bool {
    let id = alias.connection_id();
    let port = id
        .strip_prefix(ALIAS_V6)
        .or_else(|| id.strip_prefix(ALIAS_V4));
    port.is_some_and(|port| port.parse::<u16>().is_ok())
}

fn alias(domain: &str, family: Family, port: u16) -> Result<LinkAlias, LinkError> {
    let id = match family {
        Family::V4 => ALIAS_V4,
        Family::V6 => ALIAS_V6,
    };
    LinkAlias::new(domain, format!("{id}{port}")).map_err(LinkError::from)
}

impl ProbeLinkSpec {
    /// The port is part of alias and name: agents that share a namespace have different ports, in one domain or not.
    fn alias(&self) -> Result<LinkAlias, LinkError> {
        alias(&self.domain, self.family, self.port)
    }

    fn name(&self) -> String {
        match self.family {
            Family::V4 => format!("nsm-mgmt4-{}", self.port),
            Family::V6 => format!("nsm-mgmt6-{}", self.port),
        }
    }

    fn fits(&self, link: &Link) -> bool {
        let wanted = LinkKind::Vxlan {
            vni: self.vni.get(),
            local: self.local,
            remote: None,
            port: self.port,
        };
        link.kind == wanted && link.name == self.name() && link.mtu == MTU
    }
}

/// A probe link that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeLink {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// The UDP port of this node's tunnels.
    pub(crate) port: u16,
    /// Whether an earlier agent had made it: its forwarding entries are still there.
    pub(crate) adopted: bool,
}

/// Makes the link, or adopts the same link of an earlier agent. `anew`: replaces that one with its programs and entries.
pub(crate) fn ensure(
    netlink: &mut Netlink,
    spec: &ProbeLinkSpec,
    anew: bool,
) -> Result<ProbeLink, LinkError> {
    let (alias, name) = (spec.alias()?, spec.name());
    for link in observe::links(netlink)? {
        if link.alias.as_ref() == Some(&alias) {
            if !anew && spec.fits(&link) {
                up(netlink, link.index, &name, spec.port)?;
                return Ok(ProbeLink {
                    index: link.index,
                    name: link.name,
                    port: spec.port,
                    adopted: true,
                });
            }
            delete(netlink, message::delete_link(link.index), &link.name)?;
        } else if link.name == name {
            return Err(LinkError::refused(
                format!("make probe link `{name}`"),
                Refusal {
                    errno: Errno::EEXIST,
                    text: Some("there is a link of this name that is not ours".to_owned()),
                },
            ));
        }
    }
    let index = create(netlink, spec, &name)?;
    let marked = (|| {
        let (request, flags) = message::set_alias(&name, &alias.to_string());
        netlink
            .ask(request, flags)?
            .map_err(|kernel| LinkError::refused(format!("mark link `{name}` as ours"), kernel))?;
        // A kernel without IPv6 refuses, and does not need it.
        let (request, flags) = message::no_addresses(LinkUnspec::new_with_index(index));
        let _ = netlink.ask(request, flags)?;
        up(netlink, index, &name, spec.port)
    })();
    if let Err(error) = marked {
        remove(netlink, index, &name)?;
        return Err(error);
    }
    Ok(ProbeLink {
        index,
        name,
        port: spec.port,
        adopted: false,
    })
}

fn create(netlink: &mut Netlink, spec: &ProbeLinkSpec, name: &str) -> Result<u32, LinkError> {
    let mut link = LinkVxlan::new(name, spec.vni.get())
        .port(spec.port)
        .learning(false)
        .df(VxlanDf::Set)
        .link_group(message::LINK_GROUP)
        .mtu(MTU);
    link = match (spec.local, spec.family) {
        (Some(IpAddr::V4(local)), _) => link.local(local),
        (Some(IpAddr::V6(local)), _) => link.local6(local),
        (None, Family::V4) => link,
        // The family follows from an address only. The unspecified one is no default peer.
        (None, Family::V6) => link.remote6(Ipv6Addr::UNSPECIFIED),
    };
    let request = RouteNetlinkMessage::NewLink(link.build());
    if let Err(kernel) = netlink.ask(request, NLM_F_CREATE | NLM_F_EXCL)? {
        return Err(match kernel.errno {
            Errno::EEXIST => LinkError::VniTaken {
                vni: spec.vni,
                port: spec.port,
                kernel,
            },
            Errno::EOPNOTSUPP => LinkError::Unsupported {
                kind: "vxlan",
                kernel,
            },
            _ => LinkError::refused(format!("make probe link `{name}`"), kernel),
        });
    }
    let (request, flags) = message::get_link_named(name);
    netlink
        .ask(request, flags)?
        .ok()
        .into_iter()
        .flatten()
        .find_map(observe::link_of)
        .map(|link| link.index)
        .ok_or_else(|| {
            NetlinkError::Malformed(format!("link `{name}` is not shown after it was created"))
                .into()
        })
}

fn up(netlink: &mut Netlink, index: u32, name: &str, port: u16) -> Result<(), LinkError> {
    let (request, flags) = message::set_up(index);
    netlink.ask(request, flags)?.map(drop).map_err(|kernel| {
        if kernel.errno == Errno::EADDRINUSE {
            LinkError::PortTaken {
                port,
                holder: port::holder(port),
                kernel,
            }
        } else {
            LinkError::refused(format!("take probe link `{name}` up"), kernel)
        }
    })
}

/// The observed state of a probe link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    Up,
    Down,
    /// Or another has its name or index.
    Gone,
}

/// Observes a link.
pub(crate) fn look(netlink: &mut Netlink, link: &ProbeLink) -> Result<Condition, LinkError> {
    let (request, flags) = message::get_link(link.index);
    let found = match netlink.ask(request, flags)? {
        Ok(found) => found.into_iter().find_map(observe::link_of),
        Err(Refusal {
            errno: Errno::ENODEV,
            ..
        }) => None,
        Err(kernel) => {
            return Err(LinkError::refused(
                format!("look at probe link `{}`", link.name),
                kernel,
            ));
        }
    };
    Ok(match found {
        Some(found) if found.name != link.name => Condition::Gone,
        Some(found) if found.up => Condition::Up,
        Some(_) => Condition::Down,
        None => Condition::Gone,
    })
}

/// Takes a link up again. It keeps its forwarding entries while it is down.
pub(crate) fn take_up(netlink: &mut Netlink, link: &ProbeLink) -> Result<(), LinkError> {
    up(netlink, link.index, &link.name, link.port)
}

/// Removes the link; a success when it is gone already.
pub(crate) fn remove(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), LinkError> {
    delete(netlink, message::delete_link(index), name)
}

/// Removes the links that an earlier agent of this domain made for this port.
pub(crate) fn remove_left(netlink: &mut Netlink, domain: &str, port: u16) -> Result<(), LinkError> {
    let ours = [
        alias(domain, Family::V4, port)?,
        alias(domain, Family::V6, port)?,
    ];
    let is_ours = |link: &Link| link.alias.as_ref().is_some_and(|it| ours.contains(it));
    for link in observe::links(netlink)?.iter().filter(|it| is_ours(it)) {
        tracing::info!(
            interface = link.name,
            "removing the probe link of an earlier agent"
        );
        remove(netlink, link.index, &link.name)?;
    }
    Ok(())
}

/// The destination of frames to an Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forwarding {
    pub(crate) mac: MacAddr,
    pub(crate) remote: IpAddr,
    /// UDP port of the peer's tunnels.
    pub(crate) port: u16,
    /// The peer's probe VNI.
    pub(crate) vni: Vni,
}

/// Adds a forwarding entry, or changes its destination.
pub(crate) fn set_peer(
    netlink: &mut Netlink,
    link: &ProbeLink,
    peer: Forwarding,
) -> Result<(), LinkError> {
    let mut message = forwarding_entry(link.index, peer.mac);
    message.header.state = NeighbourState::Permanent;
    message.attributes.extend([
        NeighbourAttribute::Destination(match peer.remote {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        }),
        NeighbourAttribute::Port(peer.port),
        NeighbourAttribute::Vni(peer.vni.get()),
    ]);
    let request = RouteNetlinkMessage::NewNeighbour(message);
    netlink
        .ask(request, NLM_F_CREATE | NLM_F_REPLACE)?
        .map(drop)
        .map_err(|kernel| {
            LinkError::refused(
                format!("enter peer {} into probe link `{}`", peer.remote, link.name),
                kernel,
            )
        })
}

/// Removes a forwarding entry; a success when there is none.
pub(crate) fn remove_peer(
    netlink: &mut Netlink,
    link: &ProbeLink,
    mac: MacAddr,
) -> Result<(), LinkError> {
    let request = RouteNetlinkMessage::DelNeighbour(forwarding_entry(link.index, mac));
    match netlink.ask(request, 0)? {
        Ok(_)
        | Err(Refusal {
            errno: Errno::ENOENT | Errno::ENODEV,
            ..
        }) => Ok(()),
        Err(kernel) => Err(LinkError::refused(
            format!("take peer {mac} off probe link `{}`", link.name),
            kernel,
        )),
    }
}

/// The Ethernet addresses with a forwarding entry.
pub(crate) fn peers(netlink: &mut Netlink, link: &ProbeLink) -> Result<Vec<MacAddr>, LinkError> {
    let entries = entries(netlink, link)?;
    let macs = entries.into_iter().filter_map(|entry| {
        let mac = entry.attributes.iter().find_map(|it| match it {
            NeighbourAttribute::LinkLayerAddress(mac) => Some(mac.as_slice()),
            _ => None,
        });
        mac?.try_into().ok().map(MacAddr::new)
    });
    Ok(macs.collect())
}

/// The forwarding entries of a link. `vni` is the link's own, which entries may leave out.
pub(crate) fn forwardings(
    netlink: &mut Netlink,
    link: &ProbeLink,
    vni: Vni,
) -> Result<Vec<Forwarding>, LinkError> {
    let entries = entries(netlink, link)?.into_iter();
    Ok(entries
        .filter_map(|entry| forwarding_of(entry, link.port, vni))
        .collect())
}

fn entries(netlink: &mut Netlink, link: &ProbeLink) -> Result<Vec<NeighbourMessage>, LinkError> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.header.ifindex = link.index;
    let found = netlink.dump(&RouteNetlinkMessage::GetNeighbour(request))?;
    let of_link = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewNeighbour(entry) if entry.header.ifindex == link.index => {
            Some(entry)
        }
        _ => None,
    });
    Ok(of_link.collect())
}

fn forwarding_of(entry: NeighbourMessage, mut port: u16, mut vni: Vni) -> Option<Forwarding> {
    let (mut mac, mut remote) = (None, None);
    for attribute in entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes).ok().map(MacAddr::new);
            }
            NeighbourAttribute::Destination(address) => remote = ip_of(&address),
            NeighbourAttribute::Port(other) => port = other,
            NeighbourAttribute::Vni(other) => vni = Vni::try_from(other).ok()?,
            _ => {}
        }
    }
    Some(Forwarding {
        mac: mac?,
        remote: remote?,
        port,
        vni,
    })
}

/// The entries are of the bridge family, so the family of the address follows from its length only.
fn ip_of(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some((*ip).into()),
        NeighbourAddress::Inet6(ip) => Some((*ip).into()),
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes.as_slice())
                .ok()
                .map(IpAddr::from),
        },
        _ => None,
    }
}

/// An entry of the device's own table (`bridge fdb … self`).
fn forwarding_entry(index: u32, mac: MacAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aliases_of_probe_links_are_recognised_as_such() {
        for family in [Family::V4, Family::V6] {
            let spec = ProbeLinkSpec {
                domain: "cluster-1.example".to_owned(),
                family,
                vni: Vni::MANAGEMENT,
                port: 4789,
                local: None,
            };
            let alias = spec.alias().expect("an alias");
            assert!(is_probe_link(&alias), "{alias}");
            let other = ProbeLinkSpec { port: 4790, ..spec };
            assert_ne!(other.alias().expect("an alias"), alias);
        }
        for id in [
            "management",
            "management-ipv6-",
            "management-4789-1",
            "5b7f-4c",
        ] {
            let alias = LinkAlias::new("cluster-1.example", id).expect("an alias");
            assert!(!is_probe_link(&alias), "{alias}");
        }
    }
}
