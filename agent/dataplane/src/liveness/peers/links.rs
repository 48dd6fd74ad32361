//! The management links: made, hooked, mended, removed.

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
    management::{self, Condition, Forwarding, ManagementLink, ManagementSpec},
};

impl Peers {
    /// The links that are there from the start: for the address that tunnels leave from, else IPv4, and for peers of an earlier
    /// agent, who are reflected without a gap.
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
        // What an earlier agent saw is not news.
        if let Some(bpf) = &self.bpf {
            let seen = bpf.foreign_vnis()?.into_iter();
            self.foreign = seen.map(|vni| ((vni.vni, vni.peer), vni.packets)).collect();
        }
        Ok(())
    }

    /// Reads from the links that an earlier agent left by what its peers were reached.
    fn recognise_orphans(&mut self) {
        for (family, link) in &self.links {
            if !link.adopted {
                continue;
            }
            let entries = match management::forwardings(&mut self.netlink, link, self.config.vni) {
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

    /// Makes the link of a family, or takes it over, with the prober's socket on it.
    fn make_link(&mut self, family: Family) -> Result<(), HealthError> {
        let spec = ManagementSpec {
            domain: self.config.domain.clone(),
            family,
            vni: self.config.vni,
            port: self.config.port,
            local: self.config.local.filter(|ip| Family::of(*ip) == family),
        };
        // Without BPF, programs of an earlier agent would swallow what this one is to see.
        let anew = self.bpf.is_none();
        let link = management::ensure(&mut self.netlink, &spec, anew)?;
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
                    management::remove(&mut self.netlink, link.index, &link.name)?;
                }
                Err(error)
            }
        }
    }

    /// Forwarding entries of peers that have no session: the link may outlive the memory of the sessions.
    fn forget_stray_entries(&mut self, family: Family, link: &ManagementLink) {
        let known = self.known.iter();
        let known = known.map(|(spec, it)| (NodeOnLink::of(spec), it.mac, it.speaks));
        let orphans = self.orphans.iter();
        let orphans = orphans.map(|it| (it.node(), it.mac, it.speaks));
        let wanted: BTreeSet<[u8; 6]> = known
            .chain(orphans)
            .filter(|(node, ..)| node.family == family)
            .flat_map(|(node, mac, speaks)| [Some(mac), speaks.then(|| node.speaker())])
            .flatten()
            .collect();
        let forgotten = management::peers(&mut self.netlink, link).and_then(|found| {
            found
                .iter()
                .filter(|mac| !wanted.contains(&mac.octets()))
                .try_for_each(|mac| management::remove_peer(&mut self.netlink, link, *mac))
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

    /// The link of a family, made when a peer first needs it.
    pub(super) fn link(&mut self, family: Family) -> Result<ManagementLink, HealthError> {
        if !self.links.contains_key(&family) {
            self.make_link(family)?;
            if let Err(error) = self.hook_links() {
                if let Some(link) = self.links.remove(&family).filter(|link| !link.adopted) {
                    management::remove(&mut self.netlink, link.index, &link.name)?;
                }
                return Err(error);
            }
        }
        self.links.get(&family).cloned().ok_or(HealthError::Closed)
    }

    /// Mends links that somebody has taken away, down, or the programs off: without them no peer is answered, and none is probed. Gives
    /// those where something is, or was, amiss.
    pub(super) fn mend_links(&mut self) -> BTreeSet<Family> {
        let links: Vec<(Family, ManagementLink)> = self
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
                    tracing::warn!(?family, found, "a management link is mended");
                }
                Err(error) => {
                    amiss.insert(family);
                    if self.broken.insert(family) {
                        tracing::error!(%error, ?family, "a management link is broken: peers are not probed, nor answered, until it can be mended");
                    } else {
                        tracing::debug!(%error, ?family, "a management link stays broken");
                    }
                }
            }
        }
        amiss
    }

    /// Mends a link; what was found amiss.
    fn mend(
        &mut self,
        family: Family,
        link: &ManagementLink,
    ) -> Result<Option<&'static str>, HealthError> {
        let condition = management::look(&mut self.netlink, link)?;
        if condition == Condition::Gone {
            self.mend_link(family)?;
            return Ok(Some("gone"));
        }
        // Programs first: nothing may come to a link without.
        let was_unhooked = match &self.bpf {
            Some(bpf) => bpf.mend_management(&link.name)?,
            None => false,
        };
        if condition == Condition::Down {
            management::take_up(&mut self.netlink, link)?;
            return Ok(Some("down"));
        }
        Ok(was_unhooked.then_some("without its programs"))
    }

    /// Makes a link again that is gone.
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
            // Its index is not that of a link any more, so it is mended again.
            management::remove(&mut self.netlink, link.index, &link.name)?;
            return Err(error.into());
        }
        let known = self.known.iter();
        let known = known.map(|(spec, known)| (*spec, known.mac, known.speaks));
        let orphans = self.orphans.iter();
        let orphans = orphans.filter_map(|orphan| Some((orphan.at?, orphan.mac, orphan.speaks)));
        for (spec, mac, speaks) in known.chain(orphans) {
            let node = NodeOnLink::of(&spec);
            if node.family != family {
                continue;
            }
            let speaker = Some(node.speaker()).filter(|speaker| speaks && *speaker != mac);
            for mac in [Some(mac), speaker].into_iter().flatten() {
                let entered = management::set_peer(&mut self.netlink, &link, forwarding(mac, spec));
                if let Err(error) = entered {
                    tracing::warn!(%error, peer.ip = %spec.address, "a peer is not reached any more");
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
            let removed = management::remove(&mut self.netlink, link.index, &link.name);
            result = result
                .and(detached.map_err(HealthError::from))
                .and(removed.map_err(HealthError::from));
        }
        result
    }
}
