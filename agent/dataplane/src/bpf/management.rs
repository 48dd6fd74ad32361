//! What the health plane asks of the programs and maps.

use std::net::IpAddr;

use aya::maps::MapData;
use nsm_core::net::Vni;

use super::{
    Bpf, BpfError, CounterReader, ForeignVni, PinnedSessions, Role, Slot, State, tables::of_map,
};

/// How the programs were found on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hooked {
    /// There.
    Before,
    /// Not there, and now they are.
    Now,
    /// Not there, and not wanted: the interfaces are named by the operator, and this is none of them.
    Never,
}

impl Bpf {
    /// Hooks the programs of the underlay to an interface that packets to a peer leave by, unless they hang there, or are not to.
    pub(crate) fn hook_underlay(&self, interface: &str) -> Result<Hooked, BpfError> {
        let state = &mut *self.state();
        let attached = state.attachments.interfaces(Role::Underlay);
        if attached.iter().any(|known| known == interface) {
            let was_gone = state.put_back(interface)?;
            return Ok(if was_gone {
                Hooked::Now
            } else {
                Hooked::Before
            });
        }
        if !self.finds_interfaces {
            return Ok(Hooked::Never);
        }
        let State {
            ebpf,
            attachments,
            pins,
            ..
        } = state;
        attachments.attach(ebpf, pins, Role::Underlay, interface)?;
        Ok(Hooked::Now)
    }

    /// A way to the counters that waits for nobody who uses this value.
    pub(crate) fn counter_reader(&self) -> Result<CounterReader, BpfError> {
        let pin = self.state().pins.map("COUNTERS");
        let map = MapData::from_pin(pin).map_err(of_map("COUNTERS", "open"))?;
        CounterReader::new(map)
    }

    /// Takes off the programs that an earlier agent hooked to its probe links, and forgets its peers.
    pub(crate) fn forget_probes(&self) -> Result<(), BpfError> {
        let routes = self.probe_routes()?.into_iter();
        let removed = routes.map(|(key, _)| self.remove_probe_route(key));
        let removed = removed.fold(Ok(()), Result::and);
        let state = &mut *self.state();
        let links = state.pins.links(Role::Probe);
        let unhooked = links.iter().map(|path| state.pins.remove_link(path));
        let removed = unhooked.fold(removed, Result::and);
        let peers = state.tables.peers().into_iter();
        let forgotten = peers.map(|peer| state.tables.remove_peer(peer));
        forgotten.fold(removed, Result::and)
    }

    /// The sessions' maps. There is one owner: the second call gets `None`.
    pub(crate) fn take_sessions(&self) -> Option<PinnedSessions> {
        self.state().sessions.take()
    }

    /// Gives them back, for the next [`crate::liveness::Health`] of the same programs.
    pub(crate) fn return_sessions(&self, sessions: PinnedSessions) {
        self.state().sessions = Some(sessions);
    }

    /// Lets the programs count and check what a peer sends over the probe VNI, and note its VNIs that are not ours.
    pub(crate) fn add_peer(&self, vni: Vni, peer: IpAddr) -> Result<Slot, BpfError> {
        self.state().tables.add_peer(vni.get(), peer)
    }

    /// Forgets a peer.
    pub(crate) fn remove_peer(&self, peer: IpAddr) -> Result<(), BpfError> {
        self.state().tables.remove_peer(peer)
    }

    /// The peers that the programs know, among them those that an earlier agent left.
    pub(crate) fn peers(&self) -> Vec<IpAddr> {
        self.state().tables.peers()
    }

    /// What peers sent with VNIs that this node does not have: the last [`nsm_ebpf_common::MAX_FOREIGN`] pairs.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn foreign_vnis(&self) -> Result<Vec<ForeignVni>, BpfError> {
        self.state().tables.foreign()
    }
}
