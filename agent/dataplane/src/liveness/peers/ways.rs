//! How a peer becomes known to the kernel and to the prober, and how it leaves.
//!
//! It is entered from the outside in (forwarding entry, underlay, session) and leaves the other way round, so that no probe is
//! sent that could not arrive, and none reflected that could not be sent.

use std::{
    net::IpAddr,
    sync::{Arc, mpsc},
    time::Instant,
};

use nsm_core::{liveness::PathId, net::MacAddr};
use nsm_ebpf_common::sbfd::frame::{SPEAKER, mac};
use tokio::sync::oneshot;

use super::{Known, NodeOnLink, Orphan, Peers, forwarding};
use crate::{
    links::{
        management::{self, ManagementLink},
        source_address,
    },
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
            true => self.enter_somewhere(spec),
            false => Ok(()),
        };
        let joined = entered.and_then(|()| {
            let known = self.known.get_mut(&spec).ok_or(HealthError::Closed)?;
            known.users += 1;
            known.expires = None;
            Ok(Peer::new(spec, health, known.cell.clone(), begins))
        });
        // Whoever gave up leaves by the guard's end.
        let _ = reply.send(joined);
    }

    /// Enters a peer, where all places are taken in that of one that only lingers.
    fn enter_somewhere(&mut self, spec: PathId) -> Result<(), HealthError> {
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

    /// Makes a peer known to the kernel and to the prober; nobody uses it yet. After an error everything is as before.
    fn enter(&mut self, spec: PathId) -> Result<(), HealthError> {
        let address = spec.address;
        if address.is_unspecified() || address.is_multicast() {
            return Err(HealthError::NotAPeer(address));
        }
        let node = NodeOnLink::of(&spec);
        let adopted = self.orphans.iter().position(|orphan| orphan.is(&spec));
        let orphan = adopted.map(|at| &self.orphans[at]);
        let (slot, speaks) = match orphan {
            Some(orphan) => (Some(orphan.slot), orphan.speaks),
            None => (None, false),
        };
        let mac = match orphan {
            Some(orphan) => orphan.mac,
            None => self.free_mac(node, address)?,
        };
        let link = self.link(node.family)?;
        let source = match self.config.local {
            Some(local) if local.is_ipv4() == address.is_ipv4() => local,
            _ => source_address(&mut self.netlink, address)?,
        };
        management::set_peer(&mut self.netlink, &link, forwarding(mac, spec))?;
        let cell = Arc::<PeerCell>::default();
        let speaks = speaks || mac == node.speaker();
        let entry = Entry {
            spec,
            slot,
            mac,
            speaks,
            source,
            counters: None,
            counts_out: spec.reflector.vni == self.config.vni,
            cell: cell.clone(),
        };
        let slot = match self.enter_behind(entry) {
            Ok(slot) => slot,
            Err(error) => {
                // Where an earlier agent's peer was reached is not known; what the peer says now is the best guess.
                if adopted.is_none() {
                    self.undo_enter(&link, address, mac);
                }
                return Err(error);
            }
        };
        if let Some(at) = adopted {
            self.orphans.swap_remove(at);
        }
        self.entered += 1;
        let known = Known {
            slot,
            mac,
            speaks,
            joined: self.entered,
            users: 0,
            expires: None,
            cell,
        };
        if speaks && mac != node.speaker() {
            self.answer_at(&link, node, spec);
        }
        self.known.insert(spec, known);
        if let Err(error) = self.choose_speaker(node) {
            tracing::warn!(%error, peer.ip = %address, "a peer's probes are answered elsewhere");
        }
        Ok(())
    }

    /// The underlay, then the prober, which says whether it could.
    fn enter_behind(&self, mut entry: Entry) -> Result<u32, HealthError> {
        if let Some(bpf) = &self.bpf {
            // Ports are tunnels', too, and stay.
            bpf.add_port(entry.spec.port)?;
            entry.counters = Some(bpf.add_peer(self.config.vni, entry.spec.address)?);
        }
        self.ask_prober(|reply| Command::Enter(Box::new(entry), reply))
    }

    /// Takes back what a peer was entered with that has no session.
    fn undo_enter(&mut self, link: &ManagementLink, address: IpAddr, mac: [u8; 6]) {
        self.forget_address(address);
        self.remove_forwarding(link, address, mac);
    }

    /// An Ethernet address for a way to a peer's node: that by which the node speaks, or where that is taken by another way, one that
    /// only we know it by.
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
            let is_speaker = known.speaks.then_some(node.speaker());
            (NodeOnLink::of(spec), [Some(known.mac), is_speaker])
        });
        let orphans = self.orphans.iter().map(|orphan| {
            let is_speaker = orphan.speaks.then_some(node.speaker());
            (orphan.node(), [Some(orphan.mac), is_speaker])
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
            .ok_or_else(|| taken(format!("{} other ways", used.len())))
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
            if orphan.speaks {
                // Before its session goes, as in `forget`.
                self.choose_or_tell(orphan.node());
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
        let handed = known.speaks
            && self.choose_speaker(node).unwrap_or_else(|error| {
                tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered");
                false
            });
        self.forget_session(known.slot, spec.address);
        let Some(link) = self.links.get(&node.family).cloned() else {
            return;
        };
        let speaker = node.speaker();
        if known.mac != speaker {
            self.remove_forwarding(&link, spec.address, known.mac);
        }
        if known.speaks && !handed {
            self.remove_forwarding(&link, spec.address, speaker);
        }
    }

    /// Likewise one that is not in the list any more. Whoever has its place as speaker has it already.
    pub(super) fn forget_orphan(&mut self, orphan: &Orphan) {
        self.forget_session(orphan.slot, orphan.address);
        let node = orphan.node();
        let Some(link) = self.links.get(&node.family).cloned() else {
            return;
        };
        let mut ways = self.known.iter();
        let is_succeeded = ways.any(|(spec, known)| NodeOnLink::of(spec) == node && known.speaks);
        if orphan.mac != node.speaker() {
            self.remove_forwarding(&link, orphan.address, orphan.mac);
        }
        if orphan.speaks && !is_succeeded {
            self.remove_forwarding(&link, orphan.address, node.speaker());
        }
    }

    fn forget_session(&mut self, slot: u32, address: IpAddr) {
        self.commands.send(Command::Forget(slot));
        self.forget_address(address);
    }

    /// The underlay need not know an address any more at which nobody is.
    fn forget_address(&self, address: IpAddr) {
        if self.is_known(address) {
            return;
        }
        self.uncounted().remove(&address);
        if let Some(bpf) = &self.bpf
            && let Err(error) = bpf.remove_peer(address)
        {
            tracing::warn!(%error, peer.ip = %address, "the underlay goes on counting a peer");
        }
    }

    /// Whether somebody is at this address.
    pub(super) fn is_known(&self, address: IpAddr) -> bool {
        self.known.keys().any(|spec| spec.address == address)
            || self.orphans.iter().any(|orphan| orphan.address == address)
    }

    pub(super) fn remove_forwarding(
        &mut self,
        link: &ManagementLink,
        address: IpAddr,
        mac: [u8; 6],
    ) {
        let removed = management::remove_peer(&mut self.netlink, link, MacAddr::new(mac));
        if let Err(error) = removed {
            tracing::warn!(%error, peer.ip = %address, "a forwarding entry stays");
        }
    }

    /// Has the prober do what may fail, and waits.
    pub(super) fn ask_prober<T>(
        &self,
        command: impl FnOnce(mpsc::SyncSender<Result<T, HealthError>>) -> Command,
    ) -> Result<T, HealthError> {
        let (reply, done) = mpsc::sync_channel(1);
        self.commands.send(command(reply));
        done.recv().map_err(|_| HealthError::Closed)?
    }
}
