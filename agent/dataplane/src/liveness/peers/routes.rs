//! The ways of probes: where frames to an Ethernet address go, as the programs have it in PROBE_PATHS.

use std::collections::HashSet;

use nsm_core::liveness::{PathId, Reflector, sbfd::Discriminator};
use nsm_ebpf_common::sbfd::frame::session_key;

use super::{super::HealthError, NodeOnLink, Peers};
use crate::{bpf::ProbeRoute, links::Family};

/// The key of an Ethernet address on the link of a family.
fn key(family: Family, mac: [u8; 6]) -> u64 {
    session_key(family == Family::V4, mac)
}

impl Peers {
    /// Lets frames to an Ethernet address go by a path.
    pub(super) fn set_route(&mut self, mac: [u8; 6], spec: PathId) -> Result<(), HealthError> {
        self.devices.ensure(&mut self.netlink, spec.port)?;
        let family = Family::of(spec.address);
        let route = ProbeRoute {
            remote: spec.address,
            port: spec.port,
            vni: spec.reflector.vni,
            local: self.config.local.filter(|ip| Family::of(*ip) == family),
        };
        Ok(self.bpf().set_probe_route(key(family, mac), &route)?)
    }

    /// Lets them go nowhere.
    pub(super) fn remove_route(&self, family: Family, mac: [u8; 6]) {
        if let Err(error) = self.bpf().remove_probe_route(key(family, mac)) {
            tracing::warn!(%error, ?family, "a way of probes stays");
        }
    }

    /// Finds the paths of orphans by their ways, and forgets the ways that belong to no session.
    pub(super) fn recognise_orphans(&mut self) -> Result<(), HealthError> {
        let routes = self.bpf().probe_routes()?;
        for orphan in &mut self.orphans {
            let own = key(Family::of(orphan.address), orphan.mac);
            let route = routes
                .iter()
                .find(|(key, route)| *key == own && route.remote == orphan.address);
            if let Some((_, route)) = route
                && let Some(discriminator) = Discriminator::new(orphan.discriminator)
            {
                orphan.at = Some(PathId {
                    address: route.remote,
                    port: route.port,
                    reflector: Reflector {
                        discriminator,
                        vni: route.vni,
                    },
                });
            }
        }
        let ports: HashSet<u16> = self
            .orphans
            .iter()
            .filter_map(|it| Some(it.at?.port))
            .collect();
        for port in ports {
            if let Err(error) = self.devices.ensure(&mut self.netlink, port) {
                tracing::warn!(%error, port, "peers of an earlier agent are not reflected");
            }
        }
        let wanted: HashSet<u64> = self
            .orphans
            .iter()
            .flat_map(|orphan| {
                let node: NodeOnLink = orphan.node();
                let speaker = orphan.is_answer_path.then(|| key(node.family, node.mac()));
                [Some(key(node.family, orphan.mac)), speaker]
            })
            .flatten()
            .collect();
        for (stray, _) in routes.iter().filter(|(key, _)| !wanted.contains(key)) {
            self.bpf().remove_probe_route(*stray)?;
        }
        Ok(())
    }
}
