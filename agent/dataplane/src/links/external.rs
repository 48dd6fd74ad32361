//! The external device: the VXLAN device of the node that takes VNI and peer of each packet from BPF, and hands them to BPF.
//!
//! There is one for both families of underlay addresses: a device of this mode opens a socket for IPv4 and one for IPv6, and the kernel
//! lets nothing else of VXLAN use its port. It has no address, no ARP and no IPv6 address generation, and is in the same group as the
//! node's ends of pod links: what no program takes is dropped.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
};
use nix::errno::Errno;
use nsm_core::{
    link::{Link, LinkAlias, NODE_GROUP, NodeLink, NodeLinkStep, repair_node_link},
    net::IfName,
};
use rtnetlink::{LinkMessageBuilder, LinkVxlan};

use super::{
    LinkError, PortHolder,
    basics::{delete, take_steps},
    creation::{self, Refused, not_shown},
    message, observe, port,
    probe_link::is_probe_link,
};
use crate::{
    netlink::{Netlink, NetlinkError, Refusal, Request},
    netns::Netns,
};

/// Prefix of the id in the alias of an external device; the port follows. It is part of the adoption by later agents.
const ALIAS: &str = "external-";

/// MTU of the device, bytes: large enough for every probe of the path MTU search (RFC 9764). What a pod may send follows from the MTU
/// of its link.
const MTU: u32 = 16_000;

/// An external device as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExternalSpec {
    /// The agent's domain.
    pub(crate) domain: String,
    /// The UDP port of this node's tunnels. It is part of alias and name: agents that share a namespace have different ports.
    pub(crate) port: u16,
}

/// An external device that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct External {
    /// The device.
    pub(crate) link: NodeLink,
    /// The UDP port of this node's tunnels.
    pub(crate) port: u16,
    /// Whether an earlier agent had made it, with programs that may still be attached.
    pub(crate) adopted: bool,
}

/// What a look at an external device found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// It is as wanted.
    Right,
    /// It was not, and is again, after this many steps.
    Repaired(usize),
    /// It is gone, or another has its name: it is to be made again.
    Gone,
}

impl ExternalSpec {
    fn alias(&self) -> Result<LinkAlias, LinkError> {
        LinkAlias::new(self.domain.as_str(), format!("{ALIAS}{}", self.port))
            .map_err(LinkError::from)
    }

    fn name(&self) -> IfName {
        IfName::try_from(format!("nsm-ext-{}", self.port).as_str())
            .expect("eight letters and a port are a name")
    }
}

/// Whether an alias is that of an external device, which has no connection and is not removed for want of one.
pub(super) fn is_external(alias: &LinkAlias) -> bool {
    let port = alias.connection_id().strip_prefix(ALIAS);
    port.is_some_and(|port| port.parse::<u16>().is_ok())
}

/// Makes the device, or adopts that of an earlier agent, in the namespace of `netlink`, where the calling thread is, too.
pub(crate) fn ensure(netlink: &mut Netlink, spec: &ExternalSpec) -> Result<External, LinkError> {
    let (alias, name) = (spec.alias()?, spec.name());
    if let Some(message) = get(netlink, message::get_link_named(name.as_str()), &name)? {
        let link = node_link(&message, &name)?;
        let is_ours = match &link.alias {
            Some(found) => *found == alias,
            // Of a creation that failed halfway.
            None => link.group == NODE_GROUP,
        };
        if !is_ours {
            return Err(LinkError::NameTaken {
                name: name.to_string(),
                netns: Netns::current()?.id(),
                holder: observe::link_of(RouteNetlinkMessage::NewLink(message))
                    .as_ref()
                    .into(),
            });
        }
        if link.alias.is_some() && fits(&message, spec.port) {
            repair(netlink, &link, &name, spec.port)?;
            return Ok(External {
                link: read(netlink, link.index, &name)?,
                port: spec.port,
                adopted: true,
            });
        }
        delete(netlink, message::delete_link(link.index), name.as_str())?;
    }
    remove_earlier(netlink, spec, &name)?;
    let link = create(netlink, spec, &alias, &name)?;
    Ok(External {
        link,
        port: spec.port,
        adopted: false,
    })
}

/// Looks whether the device is as it was made, and repairs what can be repaired.
pub(crate) fn look(netlink: &mut Netlink, external: &External) -> Result<Look, LinkError> {
    let name = IfName::try_from(external.link.name.as_str())
        .map_err(|error| NetlinkError::Malformed(error.to_string()))?;
    let Some(message) = get(netlink, message::get_link(external.link.index), &name)? else {
        return Ok(Look::Gone);
    };
    let link = node_link(&message, &name)?;
    if link.alias != external.link.alias || !fits(&message, external.port) {
        return Ok(Look::Gone);
    }
    Ok(match repair(netlink, &link, &name, external.port)? {
        0 => Look::Right,
        steps => Look::Repaired(steps),
    })
}

/// Removes the device of this domain and port; a success when there is none.
pub(crate) fn remove(netlink: &mut Netlink, spec: &ExternalSpec) -> Result<(), LinkError> {
    let (alias, name) = (spec.alias()?, spec.name());
    match get(netlink, message::get_link_named(name.as_str()), &name)? {
        Some(message) if node_link(&message, &name)?.alias.as_ref() == Some(&alias) => delete(
            netlink,
            message::delete_link(message.header.index),
            name.as_str(),
        ),
        _ => Ok(()),
    }
}

/// Whether what is fixed for the life of the device is as wanted.
fn fits(message: &LinkMessage, port: u16) -> bool {
    let data = vxlan_data(message);
    [
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::Port(port),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPZeroCsumRX(true),
    ]
    .iter()
    .all(|wanted| data.contains(wanted))
}

/// What a VXLAN device has of its own; nothing of another link.
fn vxlan_data(message: &LinkMessage) -> &[InfoVxlan] {
    let infos = message.attributes.iter().find_map(|it| match it {
        LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
        _ => None,
    });
    let data = infos.unwrap_or_default().iter().find_map(|it| match it {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data.as_slice()),
        _ => None,
    });
    data.unwrap_or_default()
}

fn create(
    netlink: &mut Netlink,
    spec: &ExternalSpec,
    alias: &LinkAlias,
    name: &IfName,
) -> Result<NodeLink, LinkError> {
    let outcome = creation::create(netlink, name, alias, |index| creation(index, spec, name))?;
    outcome.map_err(|refused| match refused {
        Refused::Creation(kernel) => match kernel.errno {
            // Another device of the namespace has the port in this mode.
            Errno::EEXIST => port_taken(netlink, spec.port, kernel),
            Errno::EOPNOTSUPP => LinkError::Unsupported {
                kind: "vxlan",
                kernel,
            },
            _ => LinkError::refused(format!("make the external device `{name}`"), kernel),
        },
        Refused::Up(kernel) => not_up(netlink, name, spec.port, kernel),
        Refused::Other(error) => error,
    })
}

fn creation(index: u32, spec: &ExternalSpec, name: &IfName) -> Request {
    // Without a VNI: packets bring theirs.
    let link = LinkMessageBuilder::<LinkVxlan>::new(name.as_str())
        .collect_metadata(true)
        .port(spec.port)
        .learning(false)
        // A peer may leave out the checksum over IPv6 (RFC 6935).
        .udp_zero_csum6_rx(true)
        .index(index)
        .link_group(NODE_GROUP)
        .mtu(MTU)
        .arp(false);
    (
        RouteNetlinkMessage::NewLink(link.build()),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

fn repair(
    netlink: &mut Netlink,
    link: &NodeLink,
    name: &IfName,
    port: u16,
) -> Result<usize, LinkError> {
    let steps = repair_node_link(name, Some(MTU), link);
    take_steps(netlink, link.index, name, &steps)?.map_err(|(step, kernel)| match step {
        NodeLinkStep::SetUp => not_up(netlink, name, port, kernel),
        step => LinkError::refused(
            format!("repair ({step:?}) the external device `{name}`"),
            kernel,
        ),
    })?;
    Ok(steps.len())
}

fn not_up(netlink: &mut Netlink, name: &IfName, port: u16, kernel: Refusal) -> LinkError {
    match kernel.errno {
        Errno::EADDRINUSE => port_taken(netlink, port, kernel),
        _ => LinkError::refused(format!("take the external device `{name}` up"), kernel),
    }
}

fn port_taken(netlink: &mut Netlink, port: u16, kernel: Refusal) -> LinkError {
    let foreign = vxlan_devices(netlink, port).ok().and_then(|found| {
        let other = found.into_iter().find(|link| link.alias.is_none());
        other.map(|link| PortHolder::Vxlan { name: link.name })
    });
    LinkError::PortTaken {
        port,
        holder: foreign.unwrap_or_else(|| port::holder(port)),
        kernel,
    }
}

/// The VXLAN devices of this port in the namespace, ours and others'.
fn vxlan_devices(netlink: &mut Netlink, port: u16) -> Result<Vec<Link>, LinkError> {
    let links = netlink.dump(&message::get_links(false))?;
    let of_port = links.into_iter().filter(|message| match message {
        RouteNetlinkMessage::NewLink(link) => vxlan_data(link).contains(&InfoVxlan::Port(port)),
        _ => false,
    });
    Ok(of_port.filter_map(observe::link_of).collect())
}

/// Removes what an earlier version of the agent has on the port: it probed by VXLAN devices of this domain.
fn remove_earlier(
    netlink: &mut Netlink,
    spec: &ExternalSpec,
    name: &IfName,
) -> Result<(), LinkError> {
    for link in vxlan_devices(netlink, spec.port)? {
        let is_ours = link
            .alias
            .as_ref()
            .is_some_and(|alias| alias.domain() == spec.domain && is_probe_link(alias));
        if is_ours && link.name != name.as_str() {
            tracing::info!(
                interface = link.name,
                "removing the probe link of an earlier version"
            );
            delete(netlink, message::delete_link(link.index), &link.name)?;
        }
    }
    Ok(())
}

fn get(
    netlink: &mut Netlink,
    (request, flags): Request,
    name: &IfName,
) -> Result<Option<LinkMessage>, LinkError> {
    match netlink.ask(request, flags)? {
        Ok(found) => Ok(found.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })),
        Err(kernel) if kernel.errno == Errno::ENODEV => Ok(None),
        Err(kernel) => Err(LinkError::refused(
            format!("look at the external device `{name}`"),
            kernel,
        )),
    }
}

fn read(netlink: &mut Netlink, index: u32, name: &IfName) -> Result<NodeLink, LinkError> {
    let message = get(netlink, message::get_link(index), name)?.ok_or_else(|| not_shown(name))?;
    node_link(&message, name)
}

fn node_link(message: &LinkMessage, name: &IfName) -> Result<NodeLink, LinkError> {
    observe::node_link_of(&RouteNetlinkMessage::NewLink(message.clone()))
        .ok_or_else(|| not_shown(name))
}

#[cfg(test)]
mod tests;
