//! The check whether the counts of a path's stages can be trusted.

use std::{
    collections::{BTreeMap, btree_map},
    net::IpAddr,
    sync::{MutexGuard, PoisonError},
};

use nsm_core::liveness::{Look, PathId};

use super::{Command, Peers};
use crate::{
    bpf::Hooked,
    links::{Family, outgoing_interface},
    liveness::Uncounted,
};

impl Peers {
    /// Checks the links, routes and hooks of a path, repairs what can be repaired, and sends the result to the prober.
    pub(super) fn look(&mut self, spec: PathId) {
        let found = Look {
            link: !self.mend_links().contains(&Family::of(spec.address)) && self.mend_devices(),
            card: self.hook_path_to(spec.address),
        };
        self.commands.send(Command::Checked(spec, found));
    }

    /// Checks again where packets left uncounted: that is mended without a difference in the counts that would lead to a look.
    pub(super) fn look_at_uncounted(&mut self) {
        let peers: Vec<IpAddr> = self.uncounted().keys().copied().collect();
        for peer in peers {
            self.hook_path_to(peer);
        }
    }

    /// Attaches the programs to the interface of the route to a peer; true when they were attached before.
    fn hook_path_to(&mut self, address: IpAddr) -> bool {
        let interface = match outgoing_interface(&mut self.netlink, address) {
            Ok(interface) => interface,
            Err(error) => {
                // Then nothing leaves, and the counts are right.
                tracing::debug!(%error, peer.ip = %address, "no route to a peer");
                return true;
            }
        };
        let cause = match self.bpf().hook_underlay(&interface) {
            Ok(Hooked::Before) => None,
            Ok(Hooked::Now) => {
                tracing::info!(interface, peer.ip = %address, "packets to a peer leave by this interface: they are counted from now on");
                self.uncounted().remove(&address);
                return false;
            }
            Ok(Hooked::Never) => Some("add it to `bpf.interfaces`".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let was_attached = cause.is_none();
        self.note_uncounted(address, interface, cause);
        was_attached
    }

    /// Notes for `status` where packets to a peer leave uncounted, and why.
    fn note_uncounted(&self, peer: IpAddr, interface: String, cause: Option<String>) {
        let mut uncounted = self.uncounted();
        let Some(cause) = cause else {
            uncounted.remove(&peer);
            return;
        };
        let found = Uncounted {
            peer,
            interface,
            cause,
        };
        match uncounted.entry(peer) {
            btree_map::Entry::Occupied(known) if *known.get() == found => {}
            entry => {
                tracing::warn!("{found}");
                entry.insert_entry(found);
            }
        }
    }

    pub(super) fn uncounted(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Uncounted>> {
        self.uncounted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
