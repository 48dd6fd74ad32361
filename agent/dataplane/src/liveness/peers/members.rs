//! Entering a path into the kernel and the prober, and removing it.
//!
//! A path is entered from the outside in (way of its probes, underlay, session) and removed in the opposite order: no probe is sent
//! before its answer could arrive, and none is reflected whose answer could not be sent.

use std::{
    net::IpAddr,
    sync::{Arc, mpsc},
    time::Instant,
};

use nsm_core::liveness::PathId;
use nsm_ebpf_common::sbfd::frame::{SPEAKER, mac};
use tokio::sync::oneshot;

use super::{Known, NodeOnLink, Orphan, Peers};
use crate::{
    bpf::Slot,
    links::source_address,
    liveness::{Health, HealthError, Peer, preflight::PeerCell, prober::Command, session::Entry},
};

impl Peers {
    pub(super) fn join(
        &mut self,
        spec: PathId,
        health: Health,
        reply: oneshot::Sender<Result<Peer, HealthError>>,
    ) {
        let begins = !self.known.contains_key(&spec);
        let entered = match begins {
            true => self.enter_or_evict(spec),
            false => Ok(()),
        };
        let joined = entered.and_then(|()| {
            let known = self.known.get_mut(&spec).ok_or(HealthError::Closed)?;
            known.users += 1;
            known.expires = None;
            Ok(Peer::new(spec, health, known.cell.clone(), begins))
        });
        // If the caller has given up, dropping the guard leaves the path.
        let _ = reply.send(joined);
    }

    /// Enters a path. Where all sessions are taken, one without users ends for it.
    fn enter_or_evict(&mut self, spec: PathId) -> Result<(), HealthError> {
        match self.enter(spec) {
            Err(full @ HealthError::TooManyPeers { .. }) => {
                let lingering = self.known.iter();
                let lingering = lingering.filter_map(|(spec, known)| Some((known.expires?, *spec)));
                let (_, oldest) = lingering.min_by_key(|(expires, _)| *expires).ok_or(full)?;
                self.forget(oldest);
                self.enter(spec)
            }
            entered => entered,
        }
    }

    /// Enters a path without users. After an error everything is as before.
    fn enter(&mut self, spec: PathId) -> Result<(), HealthError> {
        let address = spec.address;
        if address.is_unspecified() || address.is_multicast() {
            return Err(HealthError::NotAPeer(address));
        }
        let node = NodeOnLink::of(&spec);
        let adopted = self.orphans.iter().position(|orphan| orphan.is(&spec));
        let orphan = adopted.map(|at| &self.orphans[at]);
        let (slot, is_answer_path) = match orphan {
            Some(orphan) => (Some(orphan.slot), orphan.is_answer_path),
            None => (None, false),
        };
        let mac = match orphan {
            Some(orphan) => orphan.mac,
            None => self.free_mac(node, address)?,
        };
        self.ensure_link(node.family)?;
        let source = match self.config.local {
            Some(local) if local.is_ipv4() == address.is_ipv4() => local,
            _ => source_address(&mut self.netlink, address)?,
        };
        self.set_route(mac, spec)?;
        let counters = match self.count(spec) {
            Ok(counters) => counters,
            Err(error) => {
                self.undo_enter(node, address, mac, adopted.is_some());
                return Err(error);
            }
        };
        let cell = Arc::<PeerCell>::default();
        let is_answer_path = is_answer_path || mac == node.mac();
        let entry = Entry {
            spec,
            slot,
            mac,
            is_answer_path,
            source,
            counters,
            counts_out: spec.reflector.vni == self.config.vni,
            cell: cell.clone(),
        };
        let entered = self.ask_prober(|reply| Command::Enter(Box::new(entry), reply));
        let slot = entered.inspect_err(|_| {
            self.undo_enter(node, address, mac, adopted.is_some());
        })?;
        if let Some(at) = adopted {
            self.orphans.swap_remove(at);
        }
        self.entered += 1;
        let known = Known {
            slot,
            mac,
            is_answer_path,
            joined: self.entered,
            users: 0,
            expires: None,
            cell,
        };
        if is_answer_path && mac != node.mac() {
            self.set_answer_route(node, spec);
        }
        self.known.insert(spec, known);
        if let Err(error) = self.choose_answer_path(node) {
            tracing::warn!(%error, peer.ip = %address, "a peer's probes are answered on another path");
        }
        Ok(())
    }

    /// Enters a path into the underlay's map: its slot there.
    fn count(&self, spec: PathId) -> Result<Slot, HealthError> {
        // Tunnels use the port, too: it is never removed.
        self.bpf().add_port(spec.port)?;
        Ok(self.bpf().add_peer(self.config.vni, spec.address)?)
    }

    /// Undoes the entry of a path without session. That of an earlier agent's session stays: it is not known, and this one is the best guess.
    fn undo_enter(&self, node: NodeOnLink, address: IpAddr, mac: [u8; 6], was_adopted: bool) {
        if !was_adopted {
            self.forget_address(address);
            self.remove_route(node.family, mac);
        }
    }

    /// An Ethernet address for a path: the node's own, or where another path has that, one with another tag.
    pub(super) fn free_mac(&self, node: NodeOnLink, peer: IpAddr) -> Result<[u8; 6], HealthError> {
        let taken = |holder: String| HealthError::DiscriminatorTaken {
            discriminator: node.discriminator,
            peer,
            holder,
        };
        if node.discriminator == self.discriminator {
            return Err(taken("this node".to_owned()));
        }
        let known = self.known.iter().map(|(spec, known)| {
            let node_mac = known.is_answer_path.then_some(node.mac());
            (NodeOnLink::of(spec), [Some(known.mac), node_mac])
        });
        let orphans = self.orphans.iter().map(|orphan| {
            let node_mac = orphan.is_answer_path.then_some(node.mac());
            (orphan.node(), [Some(orphan.mac), node_mac])
        });
        let used: Vec<_> = known
            .chain(orphans)
            .filter(|(other, _)| *other == node)
            .flat_map(|(_, macs)| macs)
            .flatten()
            .collect();
        (SPEAKER..=u8::MAX)
            .map(|tag| mac(tag, node.discriminator))
            .find(|mac| !used.contains(mac))
            .ok_or_else(|| taken(format!("{} other paths", used.len())))
    }

    pub(super) fn forget_expired(&mut self, now: Instant) {
        let doomed: Vec<PathId> = self
            .known
            .iter()
            .filter(|(_, known)| known.expires.is_some_and(|expires| expires <= now))
            .map(|(spec, _)| *spec)
            .collect();
        for spec in doomed {
            self.forget(spec);
        }
        for orphan in self
            .orphans
            .extract_if(.., |orphan| orphan.expires <= now)
            .collect::<Vec<_>>()
        {
            if orphan.is_answer_path {
                // Before its session goes, as in `forget`.
                self.choose_or_log(orphan.node());
            }
            self.forget_orphan(&orphan);
        }
    }

    pub(super) fn forget(&mut self, spec: PathId) {
        let Some(known) = self.known.remove(&spec) else {
            return;
        };
        let node = NodeOnLink::of(&spec);
        // Before its session goes: the node's probes are answered without a gap.
        let handed = known.is_answer_path
            && self.choose_answer_path(node).unwrap_or_else(|error| {
                tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered");
                false
            });
        self.forget_session(known.slot, spec.address);
        let speaker = node.mac();
        if known.mac != speaker {
            self.remove_route(node.family, known.mac);
        }
        if known.is_answer_path && !handed {
            self.remove_route(node.family, speaker);
        }
    }

    /// Removes an orphan that is not in the list any more. Another answer path was chosen before.
    pub(super) fn forget_orphan(&mut self, orphan: &Orphan) {
        self.forget_session(orphan.slot, orphan.address);
        let node = orphan.node();
        let mut paths = self.known.iter();
        let is_succeeded =
            paths.any(|(spec, known)| NodeOnLink::of(spec) == node && known.is_answer_path);
        if orphan.mac != node.mac() {
            self.remove_route(node.family, orphan.mac);
        }
        if orphan.is_answer_path && !is_succeeded {
            self.remove_route(node.family, node.mac());
        }
    }

    fn forget_session(&mut self, slot: u32, address: IpAddr) {
        self.commands.send(Command::Forget(slot));
        self.forget_address(address);
    }

    /// Removes the underlay's entry of an address that no path has.
    fn forget_address(&self, address: IpAddr) {
        if self.is_known(address) {
            return;
        }
        self.uncounted().remove(&address);
        if let Err(error) = self.bpf().remove_peer(address) {
            tracing::warn!(%error, peer.ip = %address, "the underlay still counts a peer");
        }
    }

    /// Whether a path or an orphan has this address.
    pub(super) fn is_known(&self, address: IpAddr) -> bool {
        self.known.keys().any(|spec| spec.address == address)
            || self.orphans.iter().any(|orphan| orphan.address == address)
    }

    /// Sends a command to the prober and waits for its result.
    pub(super) fn ask_prober<T>(
        &self,
        command: impl FnOnce(mpsc::SyncSender<Result<T, HealthError>>) -> Command,
    ) -> Result<T, HealthError> {
        let (reply, done) = mpsc::sync_channel(1);
        self.commands.send(command(reply));
        done.recv().map_err(|_| HealthError::Closed)?
    }
}
