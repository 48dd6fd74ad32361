//! The probe links: made, hooked, repaired, removed.

use std::collections::BTreeSet;

use nsm_core::{
    liveness::{PathId, Reflector, sbfd::Discriminator},
    net::MacAddr,
};

use super::{
    super::{HealthError, prober::Command, socket::PacketSocket},
    NodeOnLink, Peers, forwarding,
};
use crate::links::{
    Family,
    probe_link::{self, Condition, Forwarding, ProbeLink, ProbeLinkSpec},
};

impl Peers {
    /// Makes the links that are needed from the start: that of the address of this node's tunnels, else IPv4, and those of sessions of
    /// an earlier agent, whose probes are answered without a gap.
    pub(super) fn make_first_links(&mut self) -> Result<(), HealthError> {
        let first = self.config.local.map_or(Family::V4, Family::of);
        let orphans = self.orphans.iter();
        let mut families: Vec<Family> = orphans.map(|it| Family::of(it.address)).collect();
        families.push(first);
        families.sort_unstable();
        families.dedup();
        for family in families {
            if let Err(error) = self.make_link(family) {
                if family == first {
                    return Err(error);
                }
                tracing::warn!(%error, ?family, "peers of an earlier agent are not reflected");
            }
        }
        self.recognise_orphans();
        self.hook_links()?;
        self.forget_strays();
        // What an earlier agent counted is not reported again.
        if let Some(bpf) = &self.bpf {
            let seen = bpf.foreign_vnis()?.into_iter();
            self.foreign = seen.map(|vni| ((vni.vni, vni.peer), vni.packets)).collect();
        }
        Ok(())
    }

    /// Reads the paths of orphans from the forwarding entries of adopted links.
    fn recognise_orphans(&mut self) {
        for (family, link) in &self.links {
            if !link.adopted {
                continue;
            }
            let entries = match probe_link::forwardings(&mut self.netlink, link, self.config.vni) {
                Ok(entries) => entries,
                Err(error) => {
                    tracing::warn!(%error, "peers of an earlier agent are known by their addresses only");
                    continue;
                }
            };
            for orphan in &mut self.orphans {
                let of_orphan = |entry: &&Forwarding| {
                    entry.mac == MacAddr::new(orphan.mac) && entry.remote == orphan.address
                };
                if Family::of(orphan.address) == *family
                    && let Some(entry) = entries.iter().find(of_orphan)
                    && let Some(discriminator) = Discriminator::new(orphan.discriminator)
                {
                    orphan.at = Some(PathId {
                        address: entry.remote,
                        port: entry.port,
                        reflector: Reflector {
                            discriminator,
                            vni: entry.vni,
                        },
                    });
                }
            }
        }
    }

    /// Makes or adopts the link of a family, and gives the prober a socket on it.
    fn make_link(&mut self, family: Family) -> Result<(), HealthError> {
        let spec = ProbeLinkSpec {
            domain: self.config.domain.clone(),
            family,
            vni: self.config.vni,
            port: self.config.port,
            local: self.config.local.filter(|ip| Family::of(*ip) == family),
        };
        // Without BPF, programs of an earlier agent would take the packets that this one needs.
        let anew = self.bpf.is_none();
        let link = probe_link::ensure(&mut self.netlink, &spec, anew)?;
        match PacketSocket::open(link.index, &link.name, family) {
            Ok(socket) => {
                self.commands.send(Command::Link(family, socket));
                if link.adopted {
                    self.forget_stray_entries(family, &link);
                }
                self.links.insert(family, link);
                Ok(())
            }
            Err(error) => {
                // The reflector of an earlier agent answers on its link without any socket.
                if !link.adopted {
                    probe_link::remove(&mut self.netlink, link.index, &link.name)?;
                }
                Err(error)
            }
        }
    }

    /// Removes forwarding entries without session: the link may outlive the memory of the sessions.
    fn forget_stray_entries(&mut self, family: Family, link: &ProbeLink) {
        let known = self.known.iter();
        let known = known.map(|(spec, it)| (NodeOnLink::of(spec), it.mac, it.is_answer_path));
        let orphans = self.orphans.iter();
        let orphans = orphans.map(|it| (it.node(), it.mac, it.is_answer_path));
        let wanted: BTreeSet<[u8; 6]> = known
            .chain(orphans)
            .filter(|(node, ..)| node.family == family)
            .flat_map(|(node, mac, is_answer_path)| [Some(mac), is_answer_path.then(|| node.mac())])
            .flatten()
            .collect();
        let forgotten = probe_link::peers(&mut self.netlink, link).and_then(|found| {
            found
                .iter()
                .filter(|mac| !wanted.contains(&mac.octets()))
                .try_for_each(|mac| probe_link::remove_peer(&mut self.netlink, link, *mac))
        });
        if let Err(error) = forgotten {
            tracing::warn!(%error, interface = link.name, "a forwarding entry of an earlier agent stays");
        }
    }

    fn hook_links(&self) -> Result<(), HealthError> {
        let Some(bpf) = &self.bpf else { return Ok(()) };
        let names: Vec<String> = self.links.values().map(|link| link.name.clone()).collect();
        Ok(bpf.attach_management(&names)?)
    }

    /// The link of a family. It is made when the first path needs it.
    pub(super) fn link(&mut self, family: Family) -> Result<ProbeLink, HealthError> {
        if !self.links.contains_key(&family) {
            self.make_link(family)?;
            if let Err(error) = self.hook_links() {
                if let Some(link) = self.links.remove(&family).filter(|link| !link.adopted) {
                    probe_link::remove(&mut self.netlink, link.index, &link.name)?;
                }
                return Err(error);
            }
        }
        self.links.get(&family).cloned().ok_or(HealthError::Closed)
    }

    /// Repairs links that were removed, taken down, or lost their programs: without them no probes are sent or answered. Gives the
    /// families whose link is, or was, broken.
    pub(super) fn mend_links(&mut self) -> BTreeSet<Family> {
        let links: Vec<(Family, ProbeLink)> = self
            .links
            .iter()
            .map(|(family, link)| (*family, link.clone()))
            .collect();
        let mut amiss = BTreeSet::new();
        for (family, link) in links {
            match self.mend(family, &link) {
                Ok(None) => {
                    self.broken.remove(&family);
                }
                Ok(Some(found)) => {
                    amiss.insert(family);
                    self.broken.remove(&family);
                    tracing::warn!(?family, found, "a probe link was repaired");
                }
                Err(error) => {
                    amiss.insert(family);
                    if self.broken.insert(family) {
                        tracing::error!(%error, ?family, "a probe link is broken: peers are neither probed nor answered until it is repaired");
                    } else {
                        tracing::debug!(%error, ?family, "a probe link stays broken");
                    }
                }
            }
        }
        amiss
    }

    /// Repairs a link: what was wrong with it.
    fn mend(
        &mut self,
        family: Family,
        link: &ProbeLink,
    ) -> Result<Option<&'static str>, HealthError> {
        let condition = probe_link::look(&mut self.netlink, link)?;
        if condition == Condition::Gone {
            self.mend_link(family)?;
            return Ok(Some("gone"));
        }
        // Programs first: no packet may arrive on a link without them.
        let was_unhooked = match &self.bpf {
            Some(bpf) => bpf.mend_management(&link.name)?,
            None => false,
        };
        if condition == Condition::Down {
            probe_link::take_up(&mut self.netlink, link)?;
            return Ok(Some("down"));
        }
        Ok(was_unhooked.then_some("without its programs"))
    }

    /// Makes a removed link again.
    fn mend_link(&mut self, family: Family) -> Result<(), HealthError> {
        self.make_link(family)?;
        let Some(link) = self.links.get(&family).cloned() else {
            return Ok(());
        };
        let hooked = match &self.bpf {
            Some(bpf) => bpf.attach_management(std::slice::from_ref(&link.name)),
            None => Ok(()),
        };
        if let Err(error) = hooked {
            // No link has its index any more, so the next check repairs it again.
            probe_link::remove(&mut self.netlink, link.index, &link.name)?;
            return Err(error.into());
        }
        let known = self.known.iter();
        let known = known.map(|(spec, known)| (*spec, known.mac, known.is_answer_path));
        let orphans = self.orphans.iter();
        let orphans =
            orphans.filter_map(|orphan| Some((orphan.at?, orphan.mac, orphan.is_answer_path)));
        for (spec, mac, is_answer_path) in known.chain(orphans) {
            let node = NodeOnLink::of(&spec);
            if node.family != family {
                continue;
            }
            let speaker = Some(node.mac()).filter(|speaker| is_answer_path && *speaker != mac);
            for mac in [Some(mac), speaker].into_iter().flatten() {
                let entered = probe_link::set_peer(&mut self.netlink, &link, forwarding(mac, spec));
                if let Err(error) = entered {
                    tracing::warn!(%error, peer.ip = %spec.address, "a peer is not reachable any more");
                }
            }
        }
        Ok(())
    }

    pub(super) fn remove_links(&mut self) -> Result<(), HealthError> {
        let mut result = Ok(());
        for link in std::mem::take(&mut self.links).into_values() {
            let detached = self
                .bpf
                .as_ref()
                .map_or(Ok(()), |bpf| bpf.detach_management(&link.name));
            let removed = probe_link::remove(&mut self.netlink, link.index, &link.name);
            result = result
                .and(detached.map_err(HealthError::from))
                .and(removed.map_err(HealthError::from));
        }
        result
    }
}
