//! What a pod has beside a connection, and what the node has, its own namespace among that: a connection must leave it alone.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;
use nix::errno::Errno;
use nsm_core::{
    link::{
        Link, LinkAlias,
        admission::{Holding, HoldingKind},
    },
    net::special::of_address,
};

use super::{LinkError, basics::open_in, message, observe};
use crate::{
    netlink::{Netlink, NetlinkError, Request},
    netns::Netns,
};

/// The addresses and routes of a pod's links other than those with these aliases. Special ranges are left out: each link has link-local
/// addresses, and no connection gets any of them.
pub(super) fn of_pod(pod: &Netns, without: &HashSet<LinkAlias>) -> Result<Vec<Holding>, LinkError> {
    let mut netlink = open_in(pod)?;
    let links: HashMap<u32, Link> = observe::links(&mut netlink)?
        .into_iter()
        .filter(|link| {
            link.alias
                .as_ref()
                .is_none_or(|alias| !without.contains(alias))
        })
        .map(|link| (link.index, link))
        .collect();
    let mut holdings = Vec::new();
    let mut add = |index: u32, prefix: IpNet, kind: HoldingKind| {
        if let Some(link) = links.get(&index) {
            holdings.push(Holding {
                prefix,
                kind,
                link: link.name.clone(),
                is_connection: link.alias.is_some(),
            });
        }
    };
    for (index, address) in addresses(&mut netlink)? {
        add(index, address.addr().into(), HoldingKind::Address);
    }
    let routes = netlink.dump(&message::get_routes(None))?;
    for (index, route) in routes.into_iter().filter_map(observe::any_route) {
        let prefix = route.spec.prefix;
        if prefix.prefix_len() == 0 || of_address(prefix.addr()).is_none() {
            add(index, prefix, HoldingKind::Route);
        }
        if let Some(via) = route.spec.via.filter(|via| of_address(*via).is_none()) {
            add(index, via.into(), HoldingKind::Gateway);
        }
    }
    Ok(holdings)
}

/// The addresses of the node, with the lengths of their networks. Those on links of connections are not the node's, also where a
/// connection ends in the node's own namespace.
pub(super) fn own_addresses(netlink: &mut Netlink) -> Result<Vec<IpNet>, LinkError> {
    let found = addresses(netlink)?;
    // Read after the addresses: no connection's address is then without its link.
    let connections: HashSet<u32> = observe::links(netlink)?
        .into_iter()
        .filter(|link| link.alias.is_some())
        .map(|link| link.index)
        .collect();
    Ok(found
        .into_iter()
        .filter(|(index, _)| !connections.contains(index))
        .map(|(_, address)| address)
        .collect())
}

/// Whether a namespace has the number that the kernel gives to the one of process 1. Numbers are given once, and stay.
pub(super) fn is_of_process_1(netlink: &mut Netlink, netns: &Netns) -> Result<bool, LinkError> {
    const FIRST: u32 = 1;
    let refused = |kernel| {
        let action = "number the network namespace of process 1".to_owned();
        LinkError::refused(action, kernel)
    };
    let number = |netlink: &mut Netlink, (request, flags): Request| {
        let answer = netlink.ask(request, flags)?;
        let answer = answer.map(|all| all.iter().find_map(observe::netns_id_of));
        Ok::<_, LinkError>(answer)
    };
    let first = message::get_netns_id_of_process(FIRST);
    let mut wanted = number(netlink, first.clone())?.map_err(refused)?;
    if wanted.is_none() {
        let (request, flags) = message::number_netns_of_process(FIRST);
        // Another one may have given it one meanwhile.
        if let Err(kernel) = netlink.ask(request, flags)?
            && kernel.errno != Errno::EEXIST
        {
            return Err(refused(kernel));
        }
        wanted = number(netlink, first)?.map_err(refused)?;
    }
    let Some(wanted) = wanted else {
        let missing = "the network namespace of process 1 has no number".to_owned();
        return Err(NetlinkError::Malformed(missing).into());
    };
    let found = number(netlink, message::get_netns_id(netns))?.map_err(refused)?;
    Ok(found == Some(wanted))
}

/// Every address outside of special ranges, with the index of its link.
fn addresses(netlink: &mut Netlink) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
    let found = netlink.dump(&message::get_addresses(0))?;
    Ok(found
        .into_iter()
        .filter_map(observe::any_address)
        .filter(|(_, address)| of_address(address.addr()).is_none())
        .collect())
}
