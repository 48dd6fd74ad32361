//! What every call that changes links needs: a socket in a namespace, and the removal of links.

use std::{collections::HashSet, ops::RangeInclusive};

use netlink_packet_route::{RouteNetlinkMessage, link::LinkAttribute};
use nix::errno::Errno;
use nsm_core::{link::NodeLinkStep, net::IfName};

use super::{LinkError, message};
use crate::{
    netlink::{Netlink, NetlinkError, Refusal, Request},
    netns::Netns,
};

/// A socket in the namespace. The calling thread stays there.
pub(super) fn open_in(netns: &Netns) -> Result<Netlink, LinkError> {
    netns.enter()?;
    Ok(Netlink::open()?)
}

/// Deletes a link; a success when it is gone already.
pub(super) fn delete(
    netlink: &mut Netlink,
    (request, flags): Request,
    name: &str,
) -> Result<(), LinkError> {
    match netlink.ask(request, flags)? {
        Ok(_)
        | Err(Refusal {
            errno: Errno::ENODEV,
            ..
        }) => Ok(()),
        Err(kernel) => Err(LinkError::refused(format!("delete link `{name}`"), kernel)),
    }
}

/// Takes steps on a link of ours on the node. The inner error: the first step that the kernel refused. A kernel without IPv6 refuses to
/// switch off its addresses, and does not need it.
pub(super) fn take_steps(
    netlink: &mut Netlink,
    index: u32,
    name: &IfName,
    steps: &[NodeLinkStep],
) -> Result<Result<(), (NodeLinkStep, Refusal)>, NetlinkError> {
    let requests = steps
        .iter()
        .map(|step| message::node_link_step(index, name, *step))
        .collect();
    let answers = netlink.transact(requests)?;
    let mut refused = steps.iter().zip(answers).filter_map(|(step, answer)| {
        let is_needed = *step != NodeLinkStep::DisableAddresses;
        answer
            .err()
            .filter(|_| is_needed)
            .map(|kernel| (*step, kernel))
    });
    Ok(refused.next().map_or(Ok(()), Err))
}

/// Switches IPv6 off on a link of the calling thread's namespace, which is not up yet. Netlink has no such message. It spares the kernel
/// more than the 15 µs that it takes: no route for multicast is made when the link is taken up. Where it cannot be done (/proc/sys is
/// read-only), the link has no address all the same, and the fence drops what comes in.
pub(super) fn disable_ipv6(name: &IfName) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::debug!(%error, path, "IPv6 stays switched on for a link without IPv6 address");
    }
}

/// Deletes links, each an index and a name, by a group that they alone have: the kernel waits once for its readers, some 20 ms, instead of once a link.
pub(super) fn delete_together(
    netlink: &mut Netlink,
    links: &[(u32, String)],
    taken: &HashSet<u32>,
    mut groups: RangeInclusive<u32>,
) -> Result<(), LinkError> {
    // Another agent may choose the same at the same moment; what it puts there is doomed as well.
    let first = *groups.start();
    let group = groups.find(|group| !taken.contains(group)).unwrap_or(first);
    let requests = links
        .iter()
        .map(|(index, _)| message::set_group(*index, group))
        .collect();
    let mut grouped = 0;
    for ((_, name), answer) in links.iter().zip(netlink.transact(requests)?) {
        match answer {
            Ok(_) => grouped += 1,
            Err(Refusal {
                errno: Errno::ENODEV,
                ..
            }) => {}
            Err(kernel) => {
                return Err(LinkError::refused(
                    format!("group link `{name}` for deletion"),
                    kernel,
                ));
            }
        }
    }
    if grouped == 0 {
        return Ok(());
    }
    delete(
        netlink,
        message::delete_group(group),
        &format!("group {group}"),
    )
}

/// The group of the link that a message describes.
pub(super) fn group_of(message: &RouteNetlinkMessage) -> Option<u32> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Group(group) => Some(*group),
            _ => None,
        })
}
