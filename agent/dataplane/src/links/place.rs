//! The two namespaces of a call that makes a link: the node's, where it is created, and the pod's, where it will be.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use nsm_core::link::{Link, LinkSpec, Operation, diff};

use super::{
    LinkError, LinkHolder, UpLink,
    basics::{delete, open_in},
    message, observe,
};
use crate::{
    netlink::{Netlink, NetlinkError, Refusal, Request},
    netns::Netns,
};

/// How often a link is changed until it is found as wanted. One round is enough unless something else changes it too.
const ROUNDS: usize = 3;

/// How long the kernel's link watch may take to activate a link: it runs at once unless another
/// event came within the last second, and then within that second.
const CARRIER_TIMEOUT: Duration = Duration::from_millis(1_200);

/// The settings of links for IPv6; there are none where the kernel has no IPv6.
const IPV6_SETTINGS: &str = "/proc/sys/net/ipv6/conf";

/// How often that is checked: a check costs some 10 µs.
const CARRIER_INTERVAL: Duration = Duration::from_micros(200);

/// Where links are created: the node's namespace.
pub(super) struct Maker<'a> {
    pub(super) netlink: Netlink,
    pub(super) node: &'a Netns,
}

impl<'a> Maker<'a> {
    pub(super) fn open(node: &'a Netns) -> Result<Self, LinkError> {
        Ok(Self {
            netlink: open_in(node)?,
            node,
        })
    }
}

/// Where a link is to be: a pod's namespace.
pub(super) struct Place<'a> {
    netlink: Netlink,
    netns: &'a Netns,
    spec: &'a LinkSpec,
    /// The index of the link, where something better than its alias shows that it is ours.
    index: Option<u32>,
}

impl<'a> Place<'a> {
    pub(super) fn open(netns: &'a Netns, spec: &'a LinkSpec) -> Result<Self, LinkError> {
        Ok(Self {
            netlink: open_in(netns)?,
            netns,
            spec,
            index: None,
        })
    }

    pub(super) const fn netns(&self) -> &'a Netns {
        self.netns
    }

    /// The pod's end of a pod link, with what lies on it; or a link with the alias that has the wanted name, for want of such an end.
    pub(super) fn observe_end(&mut self, index: Option<u32>) -> Result<Option<Link>, LinkError> {
        self.index = index;
        let named = self.named()?;
        let is_ours = |link: &Link| {
            Some(link.index) == index || link.alias.as_ref() == Some(&self.spec.alias)
        };
        if let Some(holder) = named.as_ref().filter(|link| !is_ours(link)) {
            return Err(self.name_taken(holder.into()));
        }
        match index {
            Some(_) => self.observe(),
            None => Ok(named),
        }
    }

    /// The link that has the index, else the alias, with what lies on it.
    pub(super) fn observe(&mut self) -> Result<Option<Link>, LinkError> {
        if let Some(index) = self.index {
            let mut link = self.get(message::get_link(index))?;
            if let Some(link) = &mut link {
                observe::contents(&mut self.netlink, link)?;
            }
            return Ok(link);
        }
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
    pub(super) fn remove(&mut self, observed: Option<Link>) -> Result<(), LinkError> {
        match observed {
            Some(link) => delete(
                &mut self.netlink,
                message::delete_link(link.index),
                &link.name,
            ),
            None => Ok(()),
        }
    }

    pub(super) fn name_is_free(&mut self) -> Result<bool, LinkError> {
        Ok(self.named()?.is_none())
    }

    fn named(&mut self) -> Result<Option<Link>, LinkError> {
        self.get(message::get_link_named(self.spec.name.as_str()))
    }

    /// The link that a request asks for.
    fn get(&mut self, (request, flags): Request) -> Result<Option<Link>, LinkError> {
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
    pub(super) fn create_refused(
        &mut self,
        kind: &'static str,
        kernel: Refusal,
    ) -> Result<LinkError, LinkError> {
        if kernel.errno == Errno::EEXIST
            && let Some(holder) = self.named()?
        {
            return Ok(self.name_taken((&holder).into()));
        }
        let name = self.spec.name.as_str();
        Ok(LinkError::create_refused(
            kind,
            name,
            self.netns.id(),
            kernel,
        ))
    }

    /// Takes the link with this index, which was just created, for ours: marks it.
    pub(super) fn adopt_at(&mut self, index: u32) -> Result<Link, LinkError> {
        self.index = Some(index);
        let requests = vec![
            message::set_alias_at(index, &self.spec.alias.to_string()),
            message::get_link(index),
        ];
        let mut answers = self.netlink.transact(requests)?.into_iter();
        let (marked, found) = (answers.next(), answers.next());
        let name = self.spec.name.as_str();
        let refused = |kernel| LinkError::refused(format!("mark link `{name}` as ours"), kernel);
        marked.transpose().map_err(refused)?;
        let found = found.and_then(Result::ok).into_iter().flatten();
        found.filter_map(observe::link_of).next().ok_or_else(|| {
            NetlinkError::Malformed(format!("link `{name}` is not shown after it was created"))
                .into()
        })
    }

    /// Lays on a link that was just created what is wanted there. How many operations it took, the creation included.
    pub(super) fn fill(&mut self, link: &Link) -> Result<usize, LinkError> {
        let plan = self.possible(diff(self.spec, None));
        let rest: Vec<Operation> = plan
            .iter()
            .filter(|operation| **operation != Operation::Create)
            .cloned()
            .collect();
        self.refuse_advertisements()?;
        self.apply(link.index, &rest)?;
        Ok(plan.len())
    }

    /// Has the pod take no address, route or DNS server from what the other end sends by itself, IPv6 router advertisements and redirects
    /// (RFC 4861): what a connection gives a pod has been admitted, and by these a peer would give it more. The link is not up yet. The
    /// calling thread stays in the pod's namespace.
    fn refuse_advertisements(&self) -> Result<(), LinkError> {
        self.netns.enter()?;
        for key in ["accept_ra", "accept_redirects"] {
            let path = format!("{IPV6_SETTINGS}/{}/{key}", self.spec.name);
            match std::fs::write(&path, "0") {
                // A kernel or a pod without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(%error, path, "a pod takes what its peer advertises by IPv6");
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Changes a link in place until it is as wanted.
    pub(super) fn converge(&mut self, mut observed: Option<Link>) -> Result<UpLink, LinkError> {
        let mut operations = 0;
        for _ in 0..ROUNDS {
            let plan = self.possible(diff(self.spec, observed.as_ref()));
            let Some(link) = observed else { break };
            if plan.is_empty() {
                return self.up_link(&link, false, operations);
            }
            self.apply(link.index, &plan)?;
            operations += plan.len();
            observed = self.observe()?;
        }
        let rest = self.possible(diff(self.spec, observed.as_ref()));
        match (rest.first(), observed) {
            (None, Some(link)) => self.up_link(&link, false, operations),
            (rest, _) => Err(LinkError::Unstable {
                name: self.spec.name.to_string(),
                rest: format!("{rest:?}"),
            }),
        }
    }

    /// The operations of a plan that the kernel can do. One without IPv6 carries the IPv4 part of a connection that has one; of another the
    /// first operation is refused.
    pub(super) fn possible(&self, plan: Vec<Operation>) -> Vec<Operation> {
        let has_ipv4 = self.spec.addresses.iter().any(|it| it.addr().is_ipv4());
        if !has_ipv4 || !plan.iter().any(is_of_ipv6) || Path::new(IPV6_SETTINGS).exists() {
            return plan;
        }
        let name = self.spec.name.as_str();
        tracing::warn!(
            link = name,
            "the kernel has no IPv6: the connection has its IPv4 addresses and routes only"
        );
        let is_possible = |operation: &Operation| !is_of_ipv6(operation);
        plan.into_iter().filter(is_possible).collect()
    }

    /// Switches IPv6 on for the link, where the pod has it off for all: the connection was agreed with IPv6. The calling thread stays in the
    /// pod's namespace.
    fn enable_ipv6(&self) -> Result<(), LinkError> {
        self.netns.enter()?;
        let path = format!("{IPV6_SETTINGS}/{}/disable_ipv6", self.spec.name);
        let is_off = std::fs::read_to_string(&path).is_ok_and(|value| value.trim() != "0");
        if is_off && let Err(error) = std::fs::write(&path, "0") {
            tracing::warn!(%error, path, "IPv6 stays switched off for a pod's link");
        }
        Ok(())
    }

    /// Sends all operations, then reads the answers in order: the first refusal is the cause of the later ones.
    fn apply(&mut self, index: u32, plan: &[Operation]) -> Result<(), LinkError> {
        if plan.iter().any(is_of_ipv6) {
            self.enable_ipv6()?;
            // The kernel forgets that where it has dropped IPv6 from the link meanwhile, for an MTU below 1,280 bytes or by a switch.
            self.refuse_advertisements()?;
        }
        let requests = plan
            .iter()
            .filter_map(|operation| request(index, operation))
            .collect();
        let answers = self.netlink.transact(requests)?;
        for (operation, answer) in plan.iter().zip(answers) {
            let Err(kernel) = answer else { continue };
            if !self.is_harmless(index, operation, &kernel)? {
                return Err(self.operation_refused(operation, kernel));
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

    fn operation_refused(&self, operation: &Operation, kernel: Refusal) -> LinkError {
        let name = self.spec.name.to_string();
        if kernel.errno == Errno::EPERM {
            return LinkError::refused(format!("change link `{name}`"), kernel);
        }
        match *operation {
            Operation::AddAddress(address) | Operation::RemoveAddress(address) => {
                LinkError::AddressRefused {
                    address,
                    name,
                    kernel,
                }
            }
            Operation::AddRoute(route) | Operation::RemoveRoute(route) => LinkError::RouteRefused {
                route,
                name,
                kernel,
            },
            Operation::SetNeighbour(ip, _) | Operation::RemoveNeighbour(ip) => {
                LinkError::NeighbourRefused { ip, name, kernel }
            }
            Operation::SetUp => LinkError::refused(format!("take link `{name}` up"), kernel),
            Operation::SetMtu(mtu) => {
                LinkError::refused(format!("set the MTU of link `{name}` to {mtu}"), kernel)
            }
            Operation::SetMac(mac) => LinkError::refused(
                format!("set the Ethernet address of link `{name}` to {mac}"),
                kernel,
            ),
            Operation::Create | Operation::Delete => {
                LinkError::refused(format!("make link `{name}`"), kernel)
            }
        }
    }

    pub(super) fn up_link(
        &self,
        link: &Link,
        created: bool,
        operations: usize,
    ) -> Result<UpLink, LinkError> {
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
}

/// Whether an operation gives the link something of IPv6.
fn is_of_ipv6(operation: &Operation) -> bool {
    match operation {
        Operation::AddAddress(address) => address.addr().is_ipv6(),
        Operation::AddRoute(route) => route.prefix.addr().is_ipv6(),
        Operation::SetNeighbour(ip, _) => ip.is_ipv6(),
        _ => false,
    }
}

/// Waits until the link passes packets. The end of a pair that is taken up first has no carrier
/// then; a worker of the kernel activates it after the second, and until then it drops what it
/// is given. A link that stays without carrier is no failure of this call.
pub(super) fn await_running(
    netlink: &mut Netlink,
    index: u32,
    name: &str,
) -> Result<(), LinkError> {
    let deadline = Instant::now() + CARRIER_TIMEOUT;
    while Instant::now() < deadline {
        let (request, flags) = message::get_link(index);
        let answer = netlink.ask(request, flags)?;
        if answer.is_ok_and(|found| found.iter().any(observe::is_running)) {
            return Ok(());
        }
        std::thread::sleep(CARRIER_INTERVAL);
    }
    tracing::warn!(link = name, "the link has no carrier yet");
    Ok(())
}

/// The request of an operation on a link that exists.
fn request(index: u32, operation: &Operation) -> Option<Request> {
    Some(match *operation {
        Operation::Create | Operation::Delete => return None,
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
