//! Whether what the stages of a peer count can be believed, and hooks where its packets leave.

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
    /// Looks at the links, routes and hooks that a peer's packets meet, mends what can be mended, and tells the prober what it found.
    pub(super) fn look(&mut self, spec: PathId) {
        let found = Look {
            link: !self.mend_links().contains(&Family::of(spec.address)),
            card: self.hook_way_to(spec.address),
        };
        self.commands.send(Command::Looked(spec, found));
    }

    /// Hooks the programs to the interface that packets to a peer leave by; whether they hung there.
    fn hook_way_to(&mut self, address: IpAddr) -> bool {
        let Some(bpf) = &self.bpf else { return false };
        let interface = match outgoing_interface(&mut self.netlink, address) {
            Ok(interface) => interface,
            Err(error) => {
                // Then nothing leaves, and the counts are right.
                tracing::debug!(%error, peer.ip = %address, "no way to a peer");
                return true;
            }
        };
        let cause = match bpf.hook_underlay(&interface) {
            Ok(Hooked::Before) => None,
            Ok(Hooked::Now) => {
                tracing::info!(interface, peer.ip = %address, "packets to a peer leave here: counted from now on");
                self.uncounted().remove(&address);
                return false;
            }
            Ok(Hooked::Never) => Some("add it to `bpf.interfaces`".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let hung = cause.is_none();
        self.tell_uncounted(address, interface, cause);
        hung
    }

    /// Keeps for `status` where packets to a peer leave uncounted, and why.
    fn tell_uncounted(&self, peer: IpAddr, interface: String, cause: Option<String>) {
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
