//! The work of one call: observe, plan, apply. It leaves its thread in whatever namespace it was in last.

use std::collections::HashSet;

use netlink_packet_route::{RouteNetlinkMessage, link::LinkAttribute};
use nix::errno::Errno;
use nsm_core::tunnel::{
    Link, LinkAlias, LinkKind, LinkSpec, Operation, VxlanSpec, Wanted, diff, must_create,
};

use super::{LinkError, LinkHolder, LinkStatistics, UpLink, message, observe, port};
use crate::{
    netlink::{Netlink, NetlinkError, Refusal, Request},
    netns::Netns,
};

/// How often a link is changed until it is found as wanted. One round is enough unless something else changes it too.
const ROUNDS: usize = 3;

/// A socket in the namespace; the calling thread stays there.
pub(super) fn open_in(netns: &Netns) -> Result<Netlink, LinkError> {
    netns.enter()?;
    Ok(Netlink::open()?)
}

pub(super) fn up_vxlan(node: &Netns, pod: &Netns, spec: &VxlanSpec) -> Result<UpLink, LinkError> {
    let mut maker = Maker {
        netlink: open_in(node)?,
        node,
    };
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
    let mut maker = Maker {
        netlink: open_in(node)?,
        node,
    };
    let (mut place_a, mut place_b) = (Place::open(a.0, a.1)?, Place::open(b.0, b.1)?);
    let (wanted_a, wanted_b) = (Wanted::Veth(a.1), Wanted::Veth(b.1));
    let (observed_a, observed_b) = (place_a.observe()?, place_b.observe()?);
    let anew = must_create(wanted_a, observed_a.as_ref())
        || must_create(wanted_b, observed_b.as_ref())
        || !is_pair(observed_a.as_ref(), observed_b.as_ref());
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
            Ok((
                place_a.up_link(&end_a, true, operations_a)?,
                place_b.up_link(&end_b, true, operations_b)?,
            ))
        });
    created.inspect_err(|_| place_a.undo())
}

/// Whether the two are ends of one pair, as far as indexes tell.
fn is_pair(a: Option<&Link>, b: Option<&Link>) -> bool {
    let peer = |link: &Link| match link.kind {
        LinkKind::Veth { peer } => peer,
        _ => 0,
    };
    matches!((a, b), (Some(a), Some(b)) if peer(a) == b.index && peer(b) == a.index)
}

/// Where links are created: the node's namespace.
struct Maker<'a> {
    netlink: Netlink,
    node: &'a Netns,
}

impl Maker<'_> {
    fn create_vxlan(&mut self, place: &mut Place<'_>, spec: &VxlanSpec) -> Result<Link, LinkError> {
        let (request, flags) = message::create_vxlan(place.netns, spec);
        if let Err(kernel) = self.netlink.ask(request, flags)? {
            // The kernel says the same of a name and of a VNI.
            return Err(match kernel.errno {
                Errno::EEXIST if place.name_is_free()? => LinkError::VniTaken {
                    vni: spec.vni.get(),
                    port: spec.port,
                    kernel,
                },
                _ => place.create_refused("vxlan", kernel)?,
            });
        }
        place.created = Created::Named;
        place.adopt()
    }

    fn create_veth<'a>(
        &mut self,
        a: &mut Place<'a>,
        b: &mut Place<'a>,
    ) -> Result<(Link, Link), LinkError> {
        let (request, flags) = message::create_veth((a.netns, a.spec), (b.netns, b.spec));
        if let Err(kernel) = self.netlink.ask(request, flags)? {
            let blamed = if a.name_is_free()? { b } else { a };
            return Err(blamed.create_refused("veth", kernel)?);
        }
        (a.created, b.created) = (Created::Named, Created::Named);
        Ok((a.adopt()?, b.adopt()?))
    }
}

/// Where a link is to be: a pod's namespace.
struct Place<'a> {
    netlink: Netlink,
    netns: &'a Netns,
    spec: &'a LinkSpec,
    created: Created,
}

/// What this call created, to be removed when it fails.
enum Created {
    Nothing,
    /// A link with the wanted name, not looked at yet.
    Named,
    /// The link with this index.
    Indexed(u32),
}

impl<'a> Place<'a> {
    fn open(netns: &'a Netns, spec: &'a LinkSpec) -> Result<Self, LinkError> {
        Ok(Self {
            netlink: open_in(netns)?,
            netns,
            spec,
            created: Created::Nothing,
        })
    }

    /// The link that has the alias, with what lies on it.
    fn observe(&mut self) -> Result<Option<Link>, LinkError> {
        let links = observe::links(&mut self.netlink)?;
        let is_ours = |link: &&Link| link.alias.as_ref() == Some(&self.spec.alias);
        let name = self.spec.name.as_str();
        if let Some(holder) = links
            .iter()
            .find(|link| link.name == name && !is_ours(link))
        {
            return Err(self.name_taken(holder.into()));
        }
        let mut link = links.into_iter().find(|link| is_ours(&link));
        if let Some(link) = &mut link {
            observe::contents(&mut self.netlink, link)?;
        }
        Ok(link)
    }

    fn name_taken(&self, holder: LinkHolder) -> LinkError {
        LinkError::NameTaken {
            name: self.spec.name.to_string(),
            netns: self.netns.id(),
            holder,
        }
    }

    /// Removes the link that was observed; gone already is as good.
    fn remove(&mut self, observed: Option<Link>) -> Result<(), LinkError> {
        match observed {
            Some(link) => delete(
                &mut self.netlink,
                message::delete_link(link.index),
                &link.name,
            ),
            None => Ok(()),
        }
    }

    fn name_is_free(&mut self) -> Result<bool, LinkError> {
        Ok(self.named()?.is_none())
    }

    fn named(&mut self) -> Result<Option<Link>, LinkError> {
        let (request, flags) = message::get_link_named(self.spec.name.as_str());
        match self.netlink.ask(request, flags)? {
            Ok(found) => Ok(found.into_iter().find_map(observe::link_of)),
            Err(Refusal {
                errno: Errno::ENODEV,
                ..
            }) => Ok(None),
            Err(kernel) => Err(LinkError::refused(
                format!("look for link `{}`", self.spec.name),
                kernel,
            )),
        }
    }

    /// Why a link could not be created.
    fn create_refused(
        &mut self,
        kind: &'static str,
        kernel: Refusal,
    ) -> Result<LinkError, LinkError> {
        Ok(match kernel.errno {
            Errno::EEXIST => match self.named()? {
                Some(holder) => self.name_taken((&holder).into()),
                None => self.cannot_create(kind, kernel),
            },
            Errno::EOPNOTSUPP => LinkError::Unsupported { kind, kernel },
            _ => self.cannot_create(kind, kernel),
        })
    }

    fn cannot_create(&self, kind: &str, kernel: Refusal) -> LinkError {
        LinkError::refused(
            format!(
                "create {kind} link `{}` in network namespace {}",
                self.spec.name,
                self.netns.id()
            ),
            kernel,
        )
    }

    /// Takes a link that was just created for ours: learns its index, marks it.
    fn adopt(&mut self) -> Result<Link, LinkError> {
        let name = self.spec.name.as_str();
        let requests = vec![
            message::get_link_named(name),
            message::set_alias(name, &self.spec.alias.to_string()),
        ];
        let mut answers = self.netlink.transact(requests)?.into_iter();
        let refused = |kernel| LinkError::refused(format!("mark link `{name}` as ours"), kernel);
        let (found, marked) = (answers.next(), answers.next());
        let found = found
            .and_then(Result::ok)
            .into_iter()
            .flatten()
            .find_map(observe::link_of);
        if let Some(link) = &found {
            self.created = Created::Indexed(link.index);
        }
        marked.transpose().map_err(refused)?;
        found.ok_or_else(|| {
            NetlinkError::Malformed(format!("link `{name}` is not shown after it was created"))
                .into()
        })
    }

    /// Lays on a link that was just created what is wanted there. How many operations it took, the creation included.
    fn fill(
        &mut self,
        maker: &Maker<'_>,
        wanted: Wanted<'_>,
        link: &Link,
    ) -> Result<usize, LinkError> {
        let plan = diff(wanted, None);
        let rest: Vec<Operation> = plan
            .iter()
            .filter(|operation| **operation != Operation::Create)
            .cloned()
            .collect();
        self.apply(maker, wanted, link.index, &rest)?;
        Ok(plan.len())
    }

    /// Changes a link in place until it is as wanted.
    fn converge(
        &mut self,
        maker: &Maker<'_>,
        wanted: Wanted<'_>,
        mut observed: Option<Link>,
    ) -> Result<UpLink, LinkError> {
        let mut operations = 0;
        for _ in 0..ROUNDS {
            let plan = diff(wanted, observed.as_ref());
            let Some(link) = observed else { break };
            if plan.is_empty() {
                return self.up_link(&link, false, operations);
            }
            self.apply(maker, wanted, link.index, &plan)?;
            operations += plan.len();
            observed = self.observe()?;
        }
        let rest = diff(wanted, observed.as_ref());
        match (rest.first(), observed) {
            (None, Some(link)) => self.up_link(&link, false, operations),
            (rest, _) => Err(LinkError::Unstable {
                name: self.spec.name.to_string(),
                rest: format!("{rest:?}"),
            }),
        }
    }

    /// Sends all operations, then looks at the answers in order: the first refusal is the cause, what follows its consequence.
    fn apply(
        &mut self,
        maker: &Maker<'_>,
        wanted: Wanted<'_>,
        index: u32,
        plan: &[Operation],
    ) -> Result<(), LinkError> {
        let requests = plan
            .iter()
            .filter_map(|operation| request(index, operation))
            .collect();
        let answers = self.netlink.transact(requests)?;
        for (operation, answer) in plan.iter().zip(answers) {
            let Err(kernel) = answer else { continue };
            if !self.is_harmless(index, operation, &kernel)? {
                return Err(self.operation_refused(maker, wanted, operation, kernel));
            }
        }
        Ok(())
    }

    /// Whether the operation was refused because there is nothing to do.
    fn is_harmless(
        &mut self,
        index: u32,
        operation: &Operation,
        kernel: &Refusal,
    ) -> Result<bool, LinkError> {
        Ok(match operation {
            Operation::RemoveRoute(_)
            | Operation::RemoveNeighbour(_)
            | Operation::RemoveAddress(_) => {
                matches!(
                    kernel.errno,
                    Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL
                )
            }
            // There already, or another one that is not ours?
            Operation::AddRoute(route) if kernel.errno == Errno::EEXIST => {
                observe::routes(&mut self.netlink, index)?
                    .iter()
                    .any(|there| there.spec == *route)
            }
            _ => false,
        })
    }

    fn operation_refused(
        &self,
        maker: &Maker<'_>,
        wanted: Wanted<'_>,
        operation: &Operation,
        kernel: Refusal,
    ) -> LinkError {
        let name = self.spec.name.to_string();
        match (operation, wanted) {
            _ if kernel.errno == Errno::EPERM => {
                LinkError::refused(format!("change link `{name}`"), kernel)
            }
            (Operation::SetUp, Wanted::Vxlan(spec)) if kernel.errno == Errno::EADDRINUSE => {
                // The socket would have been the node's.
                let holder = maker
                    .node
                    .enter()
                    .map_or(super::PortHolder::Unknown, |()| port::holder(spec.port));
                LinkError::PortTaken {
                    port: spec.port,
                    holder,
                    kernel,
                }
            }
            (&(Operation::AddAddress(address) | Operation::RemoveAddress(address)), _) => {
                LinkError::AddressRefused {
                    address,
                    name,
                    kernel,
                }
            }
            (&(Operation::AddRoute(route) | Operation::RemoveRoute(route)), _) => {
                LinkError::RouteRefused {
                    route,
                    name,
                    kernel,
                }
            }
            (&(Operation::SetNeighbour(ip, _) | Operation::RemoveNeighbour(ip)), _) => {
                LinkError::NeighbourRefused { ip, name, kernel }
            }
            (Operation::SetUp, _) => LinkError::refused(format!("take link `{name}` up"), kernel),
            (Operation::SetMtu(mtu), _) => {
                LinkError::refused(format!("set the MTU of link `{name}` to {mtu}"), kernel)
            }
            (Operation::SetMac(mac), _) => LinkError::refused(
                format!("set the Ethernet address of link `{name}` to {mac}"),
                kernel,
            ),
            (Operation::SetEndpoints { local, remote }, _) => LinkError::refused(
                format!("set the tunnel addresses of link `{name}` to {local} and {remote}"),
                kernel,
            ),
            (Operation::Create | Operation::Delete, _) => {
                LinkError::refused(format!("make link `{name}`"), kernel)
            }
        }
    }

    fn up_link(&self, link: &Link, created: bool, operations: usize) -> Result<UpLink, LinkError> {
        // After a change, what was observed before it may be out of date; what was wanted is not.
        let mac = self.spec.mac.or(link.mac);
        let mac = mac.ok_or_else(|| {
            NetlinkError::Malformed(format!("link `{}` has no Ethernet address", link.name))
        })?;
        Ok(UpLink {
            index: link.index,
            name: self.spec.name.clone(),
            mac,
            created,
            operations,
        })
    }

    /// Removes what this call created, after a failure; that one is the error to report.
    fn undo(&mut self) {
        let name = self.spec.name.as_str();
        let request = match std::mem::replace(&mut self.created, Created::Nothing) {
            Created::Nothing => return,
            Created::Named => message::delete_link_named(name),
            Created::Indexed(index) => message::delete_link(index),
        };
        if let Err(error) = delete(&mut self.netlink, request, name) {
            tracing::error!(%error, link.name = name, "a link that could not be completed stays");
        }
    }
}

/// The request of an operation on a link that exists.
fn request(index: u32, operation: &Operation) -> Option<Request> {
    Some(match *operation {
        Operation::Create | Operation::Delete => return None,
        Operation::SetEndpoints { local, remote } => message::set_endpoints(index, local, remote),
        Operation::SetMtu(mtu) => message::set_mtu(index, mtu),
        Operation::SetMac(mac) => message::set_mac(index, mac),
        Operation::SetUp => message::set_up(index),
        Operation::RemoveRoute(route) => message::remove_route(index, route),
        Operation::RemoveNeighbour(ip) => message::remove_neighbour(index, ip),
        Operation::RemoveAddress(address) => message::remove_address(index, address),
        Operation::AddAddress(address) => message::add_address(index, address),
        Operation::SetNeighbour(ip, mac) => message::set_neighbour(index, ip, mac),
        Operation::AddRoute(route) => message::add_route(index, route),
    })
}

/// Deletes a link; gone already is as good.
fn delete(netlink: &mut Netlink, (request, flags): Request, name: &str) -> Result<(), LinkError> {
    match netlink.ask(request, flags)? {
        Ok(_)
        | Err(Refusal {
            errno: Errno::ENODEV,
            ..
        }) => Ok(()),
        Err(kernel) => Err(LinkError::refused(format!("delete link `{name}`"), kernel)),
    }
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

pub(super) fn statistics(
    pod: &Netns,
    alias: &LinkAlias,
) -> Result<Option<LinkStatistics>, LinkError> {
    let mut netlink = open_in(pod)?;
    let alias = alias.to_string();
    let is_it = |attributes: &[LinkAttribute]| {
        attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::IfAlias(text) if *text == alias))
    };
    let links = netlink.dump(&message::get_links(true))?;
    Ok(links.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) if is_it(&link.attributes) => {
            link.attributes.into_iter().find_map(statistics_of)
        }
        _ => None,
    }))
}

fn statistics_of(attribute: LinkAttribute) -> Option<LinkStatistics> {
    let LinkAttribute::Stats64(kernel) = attribute else {
        return None;
    };
    Some(LinkStatistics {
        rx_packets: kernel.rx_packets,
        rx_bytes: kernel.rx_bytes,
        tx_packets: kernel.tx_packets,
        tx_bytes: kernel.tx_bytes,
        rx_dropped: kernel.rx_dropped,
        tx_dropped: kernel.tx_dropped,
        tx_errors: kernel.tx_errors,
    })
}

pub(super) fn find_ours(domain: &str) -> Vec<(Netns, Link)> {
    let mut found = Vec::new();
    for netns in Netns::all() {
        let is_ours = |link: &Link| {
            link.alias
                .as_ref()
                .is_some_and(|alias| alias.domain() == domain)
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
