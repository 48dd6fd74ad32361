//! The probe link: the device that the prober sends on and receives on, one for each family of underlay addresses.
//!
//! It is one end of a veth pair whose other end leads nowhere: a device of a kind that the agent needs anyhow, and that every kernel
//! with containers has. A BPF program takes what is sent on it and puts it into the tunnel to the peer that the destination address names;
//! another one hands over the answers that the prober waits for.
//!
//! Neither end has addresses, and no frame is ever sent to its own Ethernet address: the kernel treats each frame as one for another host and
//! passes none to its IP stack, whatever programs are attached.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoVeth},
};
use nix::errno::Errno;
use nsm_core::link::{Link, LinkAlias, LinkKind, NODE_GROUP};
use rtnetlink::{LinkUnspec, LinkVeth};

use super::{LinkError, basics::delete, message, observe};
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
    /// The UDP port of this node's tunnels.
    pub(crate) port: u16,
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

    /// The name of the end that leads nowhere.
    fn far_name(&self) -> String {
        match self.family {
            Family::V4 => format!("nsm-mgmx4-{}", self.port),
            Family::V6 => format!("nsm-mgmx6-{}", self.port),
        }
    }

    fn fits(&self, link: &Link) -> bool {
        let is_pair = matches!(
            link.kind,
            LinkKind::Veth {
                peer_netns: None,
                ..
            }
        );
        is_pair && link.name == self.name() && link.mtu == MTU
    }
}

/// A probe link that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeLink {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Whether an earlier agent had made it.
    pub(crate) adopted: bool,
}

/// Makes the link, or adopts the same link of an earlier agent.
pub(crate) fn ensure(netlink: &mut Netlink, spec: &ProbeLinkSpec) -> Result<ProbeLink, LinkError> {
    let (alias, name) = (spec.alias()?, spec.name());
    for link in observe::links(netlink)? {
        if link.alias.as_ref() == Some(&alias) {
            if spec.fits(&link) {
                up(netlink, link.index, &name)?;
                return Ok(ProbeLink {
                    index: link.index,
                    name: link.name,
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
        let far = spec.far_name();
        // A kernel without IPv6 refuses, and does not need it.
        let _ = netlink.transact(vec![
            message::no_addresses(LinkUnspec::new_with_index(index)),
            message::no_addresses(LinkUnspec::new_with_name(&far)),
        ])?;
        let (request, flags) = message::set_up_named(&far);
        netlink
            .ask(request, flags)?
            .map_err(|kernel| LinkError::refused(format!("take link `{far}` up"), kernel))?;
        up(netlink, index, &name)
    })();
    if let Err(error) = marked {
        remove(netlink, index, &name)?;
        return Err(error);
    }
    Ok(ProbeLink {
        index,
        name,
        adopted: false,
    })
}

fn create(netlink: &mut Netlink, spec: &ProbeLinkSpec, name: &str) -> Result<u32, LinkError> {
    let far = spec.far_name();
    // What no program takes arrives there, in the group whose frames never enter the node's IP stack.
    let end = LinkUnspec::new_with_name(&far)
        .link_group(NODE_GROUP)
        .mtu(MTU)
        .arp(false)
        .build();
    let link = LinkVeth::new(name, &far)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(end)))
        .link_group(NODE_GROUP)
        .mtu(MTU)
        .arp(false);
    let request = RouteNetlinkMessage::NewLink(link.build());
    if let Err(kernel) = netlink.ask(request, NLM_F_CREATE | NLM_F_EXCL)? {
        return Err(match kernel.errno {
            Errno::EOPNOTSUPP => LinkError::Unsupported {
                kind: "veth",
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

fn up(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), LinkError> {
    let (request, flags) = message::set_up(index);
    let answer = netlink.ask(request, flags)?;
    answer
        .map(drop)
        .map_err(|kernel| LinkError::refused(format!("take probe link `{name}` up"), kernel))
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

/// Takes a link up again.
pub(crate) fn take_up(netlink: &mut Netlink, link: &ProbeLink) -> Result<(), LinkError> {
    up(netlink, link.index, &link.name)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aliases_of_probe_links_are_recognised_as_such() {
        for family in [Family::V4, Family::V6] {
            let spec = ProbeLinkSpec {
                domain: "cluster-1.example".to_owned(),
                family,
                port: 4789,
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
