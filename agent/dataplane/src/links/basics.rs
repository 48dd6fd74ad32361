//! What every call that changes links needs: a socket in a namespace, and the removal of links.

use std::{collections::HashSet, ops::RangeInclusive};

use netlink_packet_route::{RouteNetlinkMessage, link::LinkAttribute};
use nix::errno::Errno;

use super::{LinkError, message};
use crate::{
    netlink::{Netlink, Refusal, Request},
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
