//! The probe links: made, hooked, repaired, removed.

use std::collections::BTreeSet;

use super::{
    super::{HealthError, prober::Command, socket::PacketSocket},
    Peers,
};
use crate::{
    bpf::Own,
    links::{
        Family,
        probe_link::{self, Condition, ProbeLink, ProbeLinkSpec},
    },
};

impl Peers {
    /// Makes the links that are needed from the start: that of the address of this node's tunnels, else IPv4, and those of sessions of
    /// an earlier agent, whose probes are answered without a gap.
    pub(super) fn make_first_links(&mut self) -> Result<(), HealthError> {
        self.devices.ensure(&mut self.netlink, self.config.port)?;
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
        self.bpf().unhook_own_strays(Own::Probe);
        self.recognise_orphans()?;
        self.forget_strays();
        // What an earlier agent counted is not reported again.
        let seen = self.bpf().foreign_vnis()?.into_iter();
        self.foreign = seen.map(|vni| ((vni.vni, vni.peer), vni.packets)).collect();
        Ok(())
    }

    /// Makes or adopts the link of a family with its program, and gives the prober a socket on it.
    fn make_link(&mut self, family: Family) -> Result<(), HealthError> {
        let spec = ProbeLinkSpec {
            domain: self.config.domain.clone(),
            family,
            port: self.config.port,
        };
        let link = probe_link::ensure(&mut self.netlink, &spec)?;
        let hooked = self.bpf().hook_own(Own::Probe, &link.name);
        let socket = hooked
            .map_err(HealthError::from)
            .and_then(|_| PacketSocket::open(link.index, &link.name, family));
        match socket {
            Ok(socket) => {
                self.commands
                    .send(Command::Link(family, link.index, socket));
                self.links.insert(family, link);
                Ok(())
            }
            Err(error) => {
                if !link.adopted {
                    probe_link::remove(&mut self.netlink, link.index, &link.name)?;
                }
                Err(error)
            }
        }
    }

    /// Makes the link of a family when the first path needs it.
    pub(super) fn ensure_link(&mut self, family: Family) -> Result<(), HealthError> {
        match self.links.contains_key(&family) {
            true => Ok(()),
            false => self.make_link(family),
        }
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
            self.make_link(family)?;
            return Ok(Some("gone"));
        }
        let was_unhooked = self.bpf().hook_own(Own::Probe, &link.name)?;
        if condition == Condition::Down {
            probe_link::take_up(&mut self.netlink, link)?;
            return Ok(Some("down"));
        }
        Ok(was_unhooked.then_some("without its program"))
    }

    /// Repairs the external devices; false: one is broken.
    pub(super) fn mend_devices(&mut self) -> bool {
        let faults = self.devices.mend(&mut self.netlink);
        for error in &faults {
            tracing::debug!(%error, "an external device is broken");
        }
        faults.is_empty()
    }

    pub(super) fn remove_links(&mut self) -> Result<(), HealthError> {
        let mut result = Ok(());
        for link in std::mem::take(&mut self.links).into_values() {
            let detached = self.bpf().unhook_own(Own::Probe, &link.name);
            let removed = probe_link::remove(&mut self.netlink, link.index, &link.name);
            result = result
                .and(detached.map_err(HealthError::from))
                .and(removed.map_err(HealthError::from));
        }
        result
    }
}
