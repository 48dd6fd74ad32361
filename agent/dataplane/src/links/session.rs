//! The work of one call: observe, plan, apply. The thread stays in the namespace that it entered last.

use std::collections::{HashMap, HashSet};

use netlink_packet_route::{RouteNetlinkMessage, link::LinkAttribute};
use nix::errno::Errno;
use nsm_core::link::{Count, Link, LinkAlias, LinkSpec, Traffic, VxlanSpec, Wanted, must_create};

use super::{
    LinkError, LinkReading, UpLink,
    basics::{delete, open_in},
    message, observe,
    place::{Maker, Place},
    probe_link::is_probe_link,
};
use crate::{
    netlink::{Netlink, Refusal},
    netns::Netns,
};

pub(super) fn up_vxlan(node: &Netns, pod: &Netns, spec: &VxlanSpec) -> Result<UpLink, LinkError> {
    let mut maker = Maker::open(node)?;
    let mut place = Place::open(pod, &spec.link)?;
    let wanted = Wanted::Vxlan(spec);
    let observed = place.observe()?;
    if !must_create(wanted, observed.as_ref()) {
        return place.converge(&maker, wanted, observed);
    }
    place.remove(observed)?;
    let created = maker.create_vxlan(&mut place, spec).and_then(|link| {
        place
            .fill(&maker, wanted, &link)
            .map(|operations| (link, operations))
    });
    let (link, operations) = created.inspect_err(|_| place.undo())?;
    place.up_link(&link, true, operations)
}

pub(super) fn up_veth(
    node: &Netns,
    a: (&Netns, &LinkSpec),
    b: (&Netns, &LinkSpec),
) -> Result<(UpLink, UpLink), LinkError> {
    if a.0.id() == b.0.id() && a.1.alias == b.1.alias {
        return Err(LinkError::SameAlias {
            alias: a.1.alias.clone(),
            netns: a.0.id(),
        });
    }
    let mut maker = Maker::open(node)?;
    let (mut place_a, mut place_b) = (Place::open(a.0, a.1)?, Place::open(b.0, b.1)?);
    let (wanted_a, wanted_b) = (Wanted::Veth(a.1), Wanted::Veth(b.1));
    let (observed_a, observed_b) = (place_a.observe()?, place_b.observe()?);
    let anew = must_create(wanted_a, observed_a.as_ref())
        || must_create(wanted_b, observed_b.as_ref())
        || !place_a.is_pair(observed_a.as_ref(), b.0, observed_b.as_ref())?;
    if !anew {
        return Ok((
            place_a.converge(&maker, wanted_a, observed_a)?,
            place_b.converge(&maker, wanted_b, observed_b)?,
        ));
    }
    place_a.remove(observed_a)?;
    // It may have gone with the first.
    place_b.remove(observed_b)?;
    let created = maker
        .create_veth(&mut place_a, &mut place_b)
        .and_then(|(end_a, end_b)| {
            let operations_a = place_a.fill(&maker, wanted_a, &end_a)?;
            let operations_b = place_b.fill(&maker, wanted_b, &end_b)?;
            place_a.await_running(&end_a)?;
            place_b.await_running(&end_b)?;
            Ok((
                place_a.up_link(&end_a, true, operations_a)?,
                place_b.up_link(&end_b, true, operations_b)?,
            ))
        });
    created.inspect_err(|_| place_a.undo())
}

pub(super) fn down(pod: &Netns, aliases: &[LinkAlias]) -> Result<usize, LinkError> {
    let aliases: HashSet<&LinkAlias> = aliases.iter().collect();
    let mut netlink = open_in(pod)?;
    let links = netlink.dump(&message::get_links(false))?;
    let groups = links.iter().filter_map(group_of).collect();
    let is_meant = |link: &Link| {
        link.alias
            .as_ref()
            .is_some_and(|alias| aliases.contains(alias))
    };
    let doomed: Vec<Link> = links
        .into_iter()
        .filter_map(observe::link_of)
        .filter(is_meant)
        .collect();
    match doomed.as_slice() {
        [] => {}
        [link] => delete(&mut netlink, message::delete_link(link.index), &link.name)?,
        links => delete_together(&mut netlink, links, &groups)?,
    }
    Ok(doomed.len())
}

/// Deletes links by a group that they alone have: the kernel waits once for its readers, some 20 ms, instead of once a link.
fn delete_together(
    netlink: &mut Netlink,
    links: &[Link],
    groups: &HashSet<u32>,
) -> Result<(), LinkError> {
    // Another agent may choose the same at the same moment; what it puts there is doomed as well.
    let group = message::DOOMED_GROUPS
        .clone()
        .find(|group| !groups.contains(group))
        .unwrap_or(message::DOOMED_GROUPS.start);
    let requests = links
        .iter()
        .map(|link| message::set_group(link.index, group))
        .collect();
    let mut grouped = 0;
    for (link, answer) in links.iter().zip(netlink.transact(requests)?) {
        match answer {
            Ok(_) => grouped += 1,
            Err(Refusal {
                errno: Errno::ENODEV,
                ..
            }) => {}
            Err(kernel) => {
                return Err(LinkError::refused(
                    format!("group link `{}` for deletion", link.name),
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

fn group_of(message: &RouteNetlinkMessage) -> Option<u32> {
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

pub(super) fn observe(pod: &Netns, alias: &LinkAlias) -> Result<Option<Link>, LinkError> {
    let mut netlink = open_in(pod)?;
    let links = observe::links(&mut netlink)?;
    let mut link = links
        .into_iter()
        .find(|link| link.alias.as_ref() == Some(alias));
    if let Some(link) = &mut link {
        observe::contents(&mut netlink, link)?;
    }
    Ok(link)
}

pub(super) fn readings(pod: &Netns) -> Result<HashMap<LinkAlias, LinkReading>, LinkError> {
    let links = open_in(pod)?.dump(&message::get_links(true))?;
    Ok(links.into_iter().filter_map(reading).collect())
}

fn reading(message: RouteNetlinkMessage) -> Option<(LinkAlias, LinkReading)> {
    let counted = observe::counted(&message)?;
    let link = observe::link_of(message)?;
    let count = |packets, bytes| Count {
        packets,
        bytes,
        last: None,
    };
    let reading = LinkReading {
        traffic: Traffic {
            sent: count(counted.tx_packets, counted.tx_bytes),
            received: count(counted.rx_packets, counted.rx_bytes),
        },
        rx_dropped: counted.rx_dropped,
        tx_dropped: counted.tx_dropped,
        tx_errors: counted.tx_errors,
        link,
    };
    Some((reading.link.alias.clone()?, reading))
}

pub(super) fn find_ours(domain: &str) -> Vec<(Netns, Link)> {
    let mut found = Vec::new();
    for netns in Netns::all() {
        let is_ours = |link: &Link| {
            link.alias
                .as_ref()
                .is_some_and(|alias| alias.domain() == domain && !is_probe_link(alias))
        };
        let ours = || -> Result<Vec<Link>, LinkError> {
            let mut netlink = open_in(&netns)?;
            let mut ours: Vec<Link> = observe::links(&mut netlink)?
                .into_iter()
                .filter(is_ours)
                .collect();
            for link in &mut ours {
                observe::contents(&mut netlink, link)?;
            }
            Ok(ours)
        };
        match ours() {
            Ok(ours) => found.extend(ours.into_iter().map(|link| (netns.clone(), link))),
            Err(error) => {
                tracing::debug!(%error, netns = %netns.id(), "network namespace left out of the search for links")
            }
        }
    }
    found
}
