//! The work of one call: observe, plan, apply. The thread stays in the namespace that it entered last.

use std::collections::HashMap;

use netlink_packet_route::RouteNetlinkMessage;
use nsm_core::link::{Count, Link, LinkAlias, Traffic};

use super::{
    LinkError, LinkReading,
    basics::{delete, open_in},
    external::is_external,
    message, observe,
    probe_link::is_probe_link,
};
use crate::netns::Netns;

/// Whether there was a link with this alias.
pub(super) fn down(pod: &Netns, alias: &LinkAlias) -> Result<bool, LinkError> {
    let mut netlink = open_in(pod)?;
    let links = observe::links(&mut netlink)?;
    let ours = links
        .into_iter()
        .find(|link| link.alias.as_ref() == Some(alias));
    let Some(link) = ours else { return Ok(false) };
    delete(&mut netlink, message::delete_link(link.index), &link.name)?;
    Ok(true)
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
            link.alias.as_ref().is_some_and(|alias| {
                alias.domain() == domain && !is_probe_link(alias) && !is_external(alias)
            })
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
