//! Pod links: one veth pair a connection, whose other end stays in the node's namespace for BPF.
//!
//! The node's end is what a pod link is found by: its name follows from the alias, and what is its other end is ours, whatever the pod
//! has made of that end's alias. So no call reads all links of a namespace, and no search for links enters a pod.
//!
//! A node's end without an alias, but with the name and the group, is of a creation that failed halfway; it is replaced.

use std::{collections::HashSet, iter::zip};

use nix::errno::Errno;
use nsm_core::{
    link::{
        Link, LinkAlias, LinkSpec, NODE_GROUPS, NodeLink, Operation, VethPeer, diff, must_create,
        node_end_name, repair_node_link,
    },
    net::IfName,
};

use super::{
    LinkError, PodLink,
    basics::{delete, delete_together, group_of, open_in, take_steps},
    creation::{self, Refused},
    external::is_external,
    message, observe,
    place::{Maker, Place},
    probe_link::is_probe_link,
};
use crate::{
    netlink::{Netlink, NetlinkError, Refusal},
    netns::Netns,
};

pub(super) fn up(node: &Netns, pod: &Netns, spec: &LinkSpec) -> Result<PodLink, LinkError> {
    let mut side = NodeSide::open(node, &spec.alias)?;
    let end = side.find()?;
    let peer = side.peer_in(pod, end.as_ref())?;
    let mut place = Place::open(pod, spec)?;
    let observed = place.observe_end(peer)?;
    let is_other_end = |index: &u32| observed.as_ref().is_some_and(|link| link.index == *index);
    match (end, peer.filter(is_other_end)) {
        (Some(end), Some(peer)) if !must_create(spec, observed.as_ref()) => {
            let mut steps = side.repair(&end, Some(spec.mtu))?;
            if observed.as_ref().and_then(|link| link.alias.as_ref()) != Some(&spec.alias) {
                place.adopt_at(peer)?;
                steps += 1;
            }
            let mut up = place.converge(observed)?;
            up.operations += steps;
            Ok(PodLink {
                pod: up,
                node: side.read(end.index)?,
            })
        }
        (end, _) => {
            if let Some(end) = end {
                // The pod's end goes with it.
                side.remove(end.index)?;
            }
            place.remove(observed)?;
            side.create(place, spec)
        }
    }
}

/// What would make the pod's end as wanted.
pub(super) fn lacks(
    node: &Netns,
    pod: &Netns,
    spec: &LinkSpec,
) -> Result<Vec<Operation>, LinkError> {
    let mut side = NodeSide::open(node, &spec.alias)?;
    let end = side.find()?;
    let peer = side.peer_in(pod, end.as_ref())?;
    let mut place = Place::open(pod, spec)?;
    let observed = place.observe_end(peer)?;
    // Without the node's end in its place, the link is no pod link.
    Ok(place.possible(diff(spec, observed.as_ref().filter(|_| peer.is_some()))))
}

/// How many of the connections had a pod link, all of which are deleted now.
pub(super) fn down(node: &Netns, aliases: &[LinkAlias]) -> Result<usize, LinkError> {
    let mut netlink = open_in(node)?;
    let requests = aliases
        .iter()
        .map(|alias| message::get_link_named(node_end_name(alias).as_str()))
        .collect();
    let mut doomed = Vec::new();
    for (alias, answer) in zip(aliases, netlink.transact(requests)?) {
        let found = answer.into_iter().flatten();
        let mut ends = found.filter_map(|message| observe::node_link_of(&message));
        doomed.extend(
            ends.find(|end| end.alias.as_ref() == Some(alias))
                .map(|end| (end.index, end.name)),
        );
    }
    match doomed.as_slice() {
        [] => {}
        [(index, name)] => delete(&mut netlink, message::delete_link(*index), name)?,
        links => {
            let all = netlink.dump(&message::get_links(false))?;
            let taken: HashSet<u32> = all.iter().filter_map(group_of).collect();
            delete_together(&mut netlink, links, &taken, message::DOOMED_GROUPS)?;
        }
    }
    Ok(doomed.len())
}

/// The node's ends of all pod links of this domain.
pub(crate) fn list(netlink: &mut Netlink, domain: &str) -> Result<Vec<NodeLink>, LinkError> {
    let links = netlink.dump(&message::get_links(false))?;
    let ends = links.iter().filter_map(observe::node_link_of);
    Ok(ends.filter(|end| is_node_end(end, domain)).collect())
}

/// Whether this is the node's end of a pod link. A pod's end in the node's own namespace has the same alias.
fn is_node_end(end: &NodeLink, domain: &str) -> bool {
    let Some(alias) = &end.alias else {
        return false;
    };
    alias.domain() == domain
        && end.peer.is_some()
        && !is_probe_link(alias)
        && !is_external(alias)
        && (NODE_GROUPS.contains(&end.group) || end.name == node_end_name(alias).as_str())
}

/// The node's side of one pod link.
struct NodeSide<'a> {
    maker: Maker<'a>,
    alias: &'a LinkAlias,
    name: IfName,
}

impl<'a> NodeSide<'a> {
    fn open(node: &'a Netns, alias: &'a LinkAlias) -> Result<Self, LinkError> {
        Ok(Self {
            maker: Maker::open(node)?,
            alias,
            name: node_end_name(alias),
        })
    }

    fn netlink(&mut self) -> &mut Netlink {
        &mut self.maker.netlink
    }

    /// The node's end of the connection.
    fn find(&mut self) -> Result<Option<NodeLink>, LinkError> {
        let (request, flags) = message::get_link_named(self.name.as_str());
        let found = match self.netlink().ask(request, flags)? {
            Ok(found) => found,
            Err(kernel) if kernel.errno == Errno::ENODEV => return Ok(None),
            Err(kernel) => return Err(self.refused("look for", kernel)),
        };
        let end = found.iter().find_map(observe::node_link_of);
        let is_ours = |end: &NodeLink| {
            let is_marked = match &end.alias {
                Some(alias) => alias == self.alias,
                None => NODE_GROUPS.contains(&end.group),
            };
            is_marked && end.peer.is_some()
        };
        match end.filter(is_ours) {
            Some(end) => Ok(Some(end)),
            None => Err(self.name_taken(found.into_iter().find_map(observe::link_of))),
        }
    }

    /// The index of the other end, where that is in the pod.
    fn peer_in(&mut self, pod: &Netns, end: Option<&NodeLink>) -> Result<Option<u32>, LinkError> {
        match end.and_then(|end| end.peer.filter(|_| end.alias.is_some())) {
            Some(peer) if self.is_in(pod, peer)? => Ok(Some(peer.index)),
            _ => Ok(None),
        }
    }

    fn name_taken(&self, holder: Option<Link>) -> LinkError {
        LinkError::NameTaken {
            name: self.name.to_string(),
            netns: self.maker.node.id(),
            holder: holder.as_ref().into(),
        }
    }

    /// The link with this index, when it is an end of a veth pair.
    fn look(&mut self, index: u32) -> Result<Option<NodeLink>, LinkError> {
        let (request, flags) = message::get_link(index);
        match self.netlink().ask(request, flags)? {
            Ok(found) => Ok(found.iter().find_map(observe::node_link_of)),
            Err(kernel) if kernel.errno == Errno::ENODEV => Ok(None),
            Err(kernel) => Err(self.refused("look at", kernel)),
        }
    }

    fn read(&mut self, index: u32) -> Result<NodeLink, LinkError> {
        self.look(index)?.ok_or_else(|| {
            let name = &self.name;
            NetlinkError::Malformed(format!("link `{name}` is not shown any more")).into()
        })
    }

    /// Whether the other end is in this namespace.
    fn is_in(&mut self, pod: &Netns, peer: VethPeer) -> Result<bool, LinkError> {
        let Some(id) = peer.netns else {
            return Ok(pod.id() == self.maker.node.id());
        };
        let (request, flags) = message::get_netns_id(pod);
        let known = self.netlink().ask(request, flags)?.unwrap_or_default();
        Ok(known
            .iter()
            .any(|answer| observe::netns_id_of(answer) == Some(id)))
    }

    /// Puts the node's end right. How many steps that took.
    fn repair(&mut self, end: &NodeLink, mtu: Option<u32>) -> Result<usize, LinkError> {
        let steps = repair_node_link(&self.name, mtu, end);
        take_steps(&mut self.maker.netlink, end.index, &self.name, &steps)?
            .map_err(|(step, kernel)| self.refused(&format!("repair ({step:?})"), kernel))?;
        Ok(steps.len())
    }

    fn remove(&mut self, index: u32) -> Result<(), LinkError> {
        let name = self.name.to_string();
        delete(self.netlink(), message::delete_link(index), &name)
    }

    /// Makes the pair, and lays on the pod's end what is wanted there.
    fn create(&mut self, mut place: Place<'_>, spec: &LinkSpec) -> Result<PodLink, LinkError> {
        let node = self.create_pair(&mut place, spec)?;
        let filled = self.fill(&mut place, &node);
        if filled.is_err()
            && let Err(error) = self.remove(node.index)
        {
            tracing::error!(%error, link.name = %self.name, "a link that could not be completed stays");
        }
        Ok(PodLink { pod: filled?, node })
    }

    /// Makes the pair; the node's end is complete and up then.
    fn create_pair(
        &mut self,
        place: &mut Place<'_>,
        spec: &LinkSpec,
    ) -> Result<NodeLink, LinkError> {
        // For what netlink does not do.
        self.maker.node.enter()?;
        let (name, pod) = (&self.name, place.netns());
        let creation = |index| message::create_pod_link(index, name, pod, spec);
        match creation::create(&mut self.maker.netlink, name, self.alias, creation)? {
            Ok(end) => Ok(end),
            Err(Refused::Creation(kernel)) => Err(self.creation_refused(place, kernel)?),
            Err(Refused::Up(kernel)) => Err(self.refused("take up", kernel)),
            Err(Refused::Other(error)) => Err(error),
        }
    }

    /// Why the pair could not be created.
    fn creation_refused(
        &mut self,
        place: &mut Place<'_>,
        kernel: Refusal,
    ) -> Result<LinkError, LinkError> {
        if kernel.errno == Errno::EEXIST && place.name_is_free()? {
            let (request, flags) = message::get_link_named(self.name.as_str());
            let found = self.netlink().ask(request, flags)?.unwrap_or_default();
            return Ok(self.name_taken(found.into_iter().find_map(observe::link_of)));
        }
        place.create_refused("veth", kernel)
    }

    fn fill(&mut self, place: &mut Place<'_>, node: &NodeLink) -> Result<super::UpLink, LinkError> {
        let peer = node.peer.ok_or_else(|| {
            NetlinkError::Malformed(format!("link `{}` is shown without its peer", node.name))
        })?;
        let link = place.adopt_at(peer.index)?;
        let operations = place.fill(&link)?;
        if peer.netns.is_none() {
            // Packets to the pod's end pass through the queue of this one; elsewhere BPF puts them behind it.
            super::place::await_running(self.netlink(), node.index, &node.name)?;
        }
        place.up_link(&link, true, operations)
    }

    fn refused(&self, action: &str, kernel: Refusal) -> LinkError {
        let Self { name, alias, .. } = self;
        let id = alias.connection_id();
        LinkError::refused(
            format!("{action} link `{name}`, the node's end of connection {id}"),
            kernel,
        )
    }
}
