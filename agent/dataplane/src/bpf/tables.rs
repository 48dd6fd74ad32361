//! The maps as plain values: tunnels, peers, counters, drops, ports.
//!
//! What the programs see changes in an order that leaves no wrong state in between: a slot is zeroed before its tunnel
//! appears, a VNI is marked as ours only while it has a tunnel, and what the programs remember of TUNNELS is disowned after
//! each change and before a slot is given to another. An agent that died between two steps left at worst a missing or
//! a stale marker, which [`Tables::adopt`] repairs.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use nsm_core::{
    clock::Monotonic,
    link::{Count, Traffic},
};
use nsm_ebpf_common::{
    Address, Counters, Foreign, LAYOUT, MAX_SLOTS, PEER_MARKER, Reason, Tunnel, TunnelKey,
    UNSPECIFIED, forward::tunnel_flags, mapped, port_bit,
};

use super::{BpfError, ForeignVni, KnownTunnel, Slot, slots::Slots};

pub(super) struct Tables {
    tunnels: BpfHashMap<MapData, TunnelKey, Tunnel>,
    counters: PerCpuArray<MapData, Counters>,
    drops: PerCpuArray<MapData, u64>,
    ports: Array<MapData, u64>,
    generation: Array<MapData, u64>,
    foreign: BpfHashMap<MapData, TunnelKey, Foreign>,
    /// What TUNNELS holds, markers aside.
    known: HashMap<TunnelKey, u32>,
    /// The peers: those with an entry of the management VNI in `known`, and its slot.
    peers: HashMap<Address, u32>,
    /// How many tunnels each VNI has.
    vnis: HashMap<u32, u32>,
    slots: Slots,
    /// The slots of `known`, and those of pod links that are joined with each other.
    used: HashSet<u32>,
    cpus: usize,
}

impl Tables {
    /// Takes the maps out of a loaded object, with what an earlier agent left in them. `used` are the slots that FORWARD has for itself.
    pub(super) fn adopt(ebpf: &mut Ebpf, mut used: HashSet<u32>) -> Result<Self, BpfError> {
        let mut layout: Array<_, u32> = take(ebpf, "LAYOUT")?;
        layout
            .set(0, LAYOUT, 0)
            .map_err(of_map("LAYOUT", "write"))?;
        let mut tunnels: BpfHashMap<_, TunnelKey, Tunnel> = take(ebpf, "TUNNELS")?;

        let mut entries = Vec::new();
        for entry in tunnels.iter() {
            entries.push(entry.map_err(of_map("TUNNELS", "read"))?);
        }
        let mut known = HashMap::new();
        let mut vnis: HashMap<u32, u32> = HashMap::new();
        let (peers, entries): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|(key, _)| key.vni == PEER_MARKER);
        let (markers, rest): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|(key, _)| key.peer == UNSPECIFIED);
        for (key, tunnel) in rest {
            if tunnel.slot < MAX_SLOTS && used.insert(tunnel.slot) {
                known.insert(key, tunnel.slot);
                *vnis.entry(key.vni).or_default() += 1;
            } else {
                tunnels.remove(&key).map_err(of_map("TUNNELS", "clean"))?;
            }
        }
        for (key, _) in &markers {
            if !vnis.contains_key(&key.vni) {
                tunnels.remove(key).map_err(of_map("TUNNELS", "clean"))?;
            }
        }
        let mut known_peers = HashMap::new();
        for (key, tunnel) in peers {
            let of_peer =
                |(known, slot): (&TunnelKey, &u32)| known.peer == key.peer && *slot == tunnel.slot;
            if known.iter().any(of_peer) {
                known_peers.insert(key.peer, tunnel.slot);
            } else {
                tunnels.remove(&key).map_err(of_map("TUNNELS", "clean"))?;
            }
        }
        let marked: HashSet<u32> = markers.iter().map(|(key, _)| key.vni).collect();
        let mut tables = Self {
            tunnels,
            counters: take(ebpf, "COUNTERS")?,
            drops: take(ebpf, "DROPS")?,
            ports: take(ebpf, "PORTS")?,
            generation: take(ebpf, "GENERATION")?,
            foreign: take(ebpf, "FOREIGN")?,
            peers: known_peers,
            slots: Slots::new(MAX_SLOTS, |slot| used.contains(&slot)),
            used,
            known,
            vnis,
            cpus: nr_cpus().map_err(|(file, source)| BpfError::Cpus {
                file: file.to_owned(),
                source,
            })?,
        };
        let unmarked: Vec<(u32, u32)> = tables
            .known
            .iter()
            .filter(|(key, _)| !marked.contains(&key.vni))
            .map(|(key, slot)| (key.vni, *slot))
            .collect();
        for (vni, slot) in unmarked {
            tables.mark(vni, slot)?;
        }
        tables.disown_recent()?;
        Ok(tables)
    }

    /// Makes the programs look up anew what they remember of TUNNELS.
    ///
    /// Twice: where loads overtake each other (arm64), a program that runs at this moment may read the first new number and, before, the
    /// old entry. No load is overtaken for as long as two system calls take.
    fn disown_recent(&mut self) -> Result<(), BpfError> {
        for _ in 0..2 {
            let generation = self
                .generation
                .get(&0, 0)
                .map_err(of_map("GENERATION", "read"))?;
            self.generation
                .set(0, generation.wrapping_add(1), 0)
                .map_err(of_map("GENERATION", "write"))?;
        }
        Ok(())
    }

    /// Enters a tunnel, or changes where it leads; `tunnel` is its entry for a slot. A known one keeps its slot and its counters.
    pub(super) fn add_tunnel(
        &mut self,
        vni: u32,
        peer: IpAddr,
        tunnel: impl FnOnce(u32) -> Tunnel,
    ) -> Result<Slot, BpfError> {
        let peer = peer.to_canonical();
        if peer.is_unspecified() || peer.is_multicast() {
            return Err(BpfError::NotAPeer { vni, peer });
        }
        let key = TunnelKey {
            vni,
            peer: address(peer),
        };
        if let Some(slot) = self.known.get(&key).copied() {
            let changed = self.tunnels.insert(key, tunnel(slot), 0);
            changed.map_err(of_map("TUNNELS", "change"))?;
            self.disown_recent()?;
            return Ok(Slot(slot));
        }
        let slot = self.slots.take().ok_or(BpfError::SlotsExhausted {
            vni,
            peer,
            capacity: MAX_SLOTS,
        })?;
        if let Err(error) = self.insert(key, tunnel(slot)) {
            self.slots.free(slot);
            return Err(error);
        }
        self.known.insert(key, slot);
        self.used.insert(slot);
        *self.vnis.entry(vni).or_default() += 1;
        Ok(Slot(slot))
    }

    fn insert(&mut self, key: TunnelKey, tunnel: Tunnel) -> Result<(), BpfError> {
        let zero =
            PerCpuValues::try_from(vec![Counters::default(); self.cpus]).map_err(|source| {
                BpfError::Map {
                    map: "COUNTERS",
                    action: "zero",
                    source: source.into(),
                }
            })?;
        self.counters
            .set(tunnel.slot, zero, 0)
            .map_err(of_map("COUNTERS", "zero"))?;
        self.tunnels
            .insert(key, tunnel, 0)
            .map_err(of_map("TUNNELS", "add to"))?;
        let marked = if self.vnis.contains_key(&key.vni) {
            Ok(())
        } else {
            self.mark(key.vni, tunnel.slot)
        };
        // Programs may remember that there was no such tunnel, and no such VNI.
        let inserted = marked.and_then(|()| self.disown_recent());
        if inserted.is_err() {
            // The error that counts is the first one.
            let _ = self.tunnels.remove(&key);
            let _ = self.disown_recent();
        }
        inserted
    }

    /// Marks a VNI as ours. The programs ask only whether the marker is there.
    fn mark(&mut self, vni: u32, slot: u32) -> Result<(), BpfError> {
        self.tunnels
            .insert(vni_marker(vni), Tunnel::counted(slot), 0)
            .map_err(of_map("TUNNELS", "add to"))
    }

    pub(super) fn remove_tunnel(&mut self, vni: u32, peer: IpAddr) -> Result<bool, BpfError> {
        let key = TunnelKey {
            vni,
            peer: address(peer.to_canonical()),
        };
        let Some(slot) = self.known.get(&key).copied() else {
            return Ok(false);
        };
        let last = self.vnis.get(&vni) == Some(&1);
        if last {
            forgiving(self.tunnels.remove(&vni_marker(vni)))?;
        }
        forgiving(self.tunnels.remove(&key))?;
        self.disown_recent()?;
        if last {
            self.vnis.remove(&vni);
        } else if let Some(count) = self.vnis.get_mut(&vni) {
            *count -= 1;
        }
        self.known.remove(&key);
        self.used.remove(&slot);
        self.slots.free(slot);
        Ok(true)
    }

    /// Enters a peer: an entry of the management VNI, which counts and checks what comes over it, and the marker by which a VNI
    /// that is not ours is noted when it comes from there.
    pub(super) fn add_peer(&mut self, vni: u32, peer: IpAddr) -> Result<Slot, BpfError> {
        let slot = self.add_tunnel(vni, peer, |slot| Tunnel {
            flags: tunnel_flags::PROBES,
            ..Tunnel::counted(slot)
        })?;
        let (marker, address) = peer_marker(peer);
        let marked = self.tunnels.insert(marker, Tunnel::counted(slot.0), 0);
        let marked = marked.map_err(of_map("TUNNELS", "add to"));
        // Programs may remember that it was nobody.
        if let Err(error) = marked.and_then(|()| self.disown_recent()) {
            // The error that counts is the first one.
            let _ = self.remove_tunnel(vni, peer);
            return Err(error);
        }
        self.peers.insert(address, slot.0);
        Ok(slot)
    }

    /// Forgets a peer; one that is not known is fine.
    pub(super) fn remove_peer(&mut self, peer: IpAddr) -> Result<(), BpfError> {
        let (marker, address) = peer_marker(peer);
        forgiving(self.tunnels.remove(&marker))?;
        self.disown_recent()?;
        let Some(slot) = self.peers.remove(&address) else {
            return Ok(());
        };
        let key = self
            .known
            .iter()
            .find(|(key, known)| key.peer == address && **known == slot)
            .map(|(key, _)| *key);
        match key {
            Some(key) => self.remove_tunnel(key.vni, peer).map(drop),
            None => Ok(()),
        }
    }

    /// The peers, also those that an earlier agent left.
    pub(super) fn peers(&self) -> Vec<IpAddr> {
        self.peers.keys().copied().map(ip_addr).collect()
    }

    pub(super) fn foreign(&self) -> Result<Vec<ForeignVni>, BpfError> {
        let mut all = Vec::new();
        for entry in self.foreign.iter() {
            let (key, seen) = match entry {
                Ok(entry) => entry,
                // It gave way to another while we looked.
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(of_map("FOREIGN", "read")(error)),
            };
            all.push(ForeignVni {
                vni: key.vni,
                peer: ip_addr(key.peer),
                packets: seen.packets,
                last: Monotonic::from_nanos(seen.last_ns),
            });
        }
        Ok(all)
    }

    pub(super) fn tunnels(&self) -> Vec<KnownTunnel> {
        let mut all: Vec<KnownTunnel> = self
            .known
            .iter()
            .filter(|(key, slot)| self.peers.get(&key.peer) != Some(slot))
            .map(|(key, slot)| KnownTunnel {
                vni: key.vni,
                peer: ip_addr(key.peer),
                slot: Slot(*slot),
            })
            .collect();
        all.sort_by_key(|tunnel| tunnel.slot);
        all
    }

    pub(super) fn slots_in_use(&self) -> usize {
        self.used.len()
    }

    /// Takes a slot for a pod link that has no tunnel.
    pub(super) fn take_slot(&mut self) -> Result<Slot, BpfError> {
        let slot = self.slots.take().ok_or(BpfError::PairSlotsExhausted {
            capacity: MAX_SLOTS,
        })?;
        self.used.insert(slot);
        Ok(Slot(slot))
    }

    /// Gives a slot back that [`Self::take_slot`] gave, now or to an earlier agent.
    pub(super) fn free_slot(&mut self, slot: Slot) {
        if self.used.remove(&slot.0) {
            self.slots.free(slot.0);
        }
    }

    /// The slot of a tunnel that is known.
    pub(super) fn slot(&self, vni: u32, peer: IpAddr) -> Option<Slot> {
        let peer = address(peer.to_canonical());
        self.known.get(&TunnelKey { vni, peer }).copied().map(Slot)
    }

    pub(super) fn is_used(&self, slot: Slot) -> bool {
        self.used.contains(&slot.0)
    }

    pub(super) fn counters(&self, slot: Slot) -> Result<Traffic, BpfError> {
        if !self.is_used(slot) {
            return Err(BpfError::NoSlot(slot));
        }
        read("COUNTERS", &self.counters, slot)
    }

    pub(super) fn drops(&self) -> Result<BTreeMap<&'static str, u64>, BpfError> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let cpus = self
                    .drops
                    .get(&(*reason as u32), 0)
                    .map_err(of_map("DROPS", "read"))?;
                Ok((reason.name(), cpus.iter().sum()))
            })
            .collect()
    }

    pub(super) fn add_port(&mut self, port: u16) -> Result<(), BpfError> {
        self.change_port(port, |word, mask| word | mask)
    }

    pub(super) fn remove_port(&mut self, port: u16) -> Result<(), BpfError> {
        self.change_port(port, |word, mask| word & !mask)
    }

    fn change_port(&mut self, port: u16, change: fn(u64, u64) -> u64) -> Result<(), BpfError> {
        let (word, mask) = port_bit(port);
        let old = self.ports.get(&word, 0).map_err(of_map("PORTS", "read"))?;
        self.ports
            .set(word, change(old, mask), 0)
            .map_err(of_map("PORTS", "write"))
    }
}

/// A way of its own to the counters, for a thread that must not wait for others.
pub(crate) struct CounterReader(PerCpuArray<MapData, Counters>);

impl CounterReader {
    pub(super) fn new(counters: MapData) -> Result<Self, BpfError> {
        let map = Map::from_map_data(counters).and_then(PerCpuArray::try_from);
        map.map(Self).map_err(of_map("COUNTERS", "open"))
    }

    /// As [`super::Bpf::counters`]; of a slot that is not in use, what its last tunnel had.
    pub(crate) fn read(&self, slot: Slot) -> Result<Traffic, BpfError> {
        read("COUNTERS", &self.0, slot)
    }
}

pub(super) fn read(
    map: &'static str,
    counters: &PerCpuArray<MapData, Counters>,
    slot: Slot,
) -> Result<Traffic, BpfError> {
    let cpus = counters.get(&slot.0, 0).map_err(of_map(map, "read"))?;
    let mut sum = Counters::default();
    for cpu in cpus.iter() {
        sum.in_packets += cpu.in_packets;
        sum.in_bytes += cpu.in_bytes;
        sum.out_packets += cpu.out_packets;
        sum.out_bytes += cpu.out_bytes;
        sum.last_in_ns = sum.last_in_ns.max(cpu.last_in_ns);
        sum.last_out_ns = sum.last_out_ns.max(cpu.last_out_ns);
    }
    let count = |packets, bytes, last_ns: u64| Count {
        packets,
        bytes,
        last: (last_ns != 0).then(|| Monotonic::from_nanos(last_ns)),
    };
    Ok(Traffic {
        sent: count(sum.out_packets, sum.out_bytes, sum.last_out_ns),
        received: count(sum.in_packets, sum.in_bytes, sum.last_in_ns),
    })
}

/// The key of the entry that marks a VNI as ours.
const fn vni_marker(vni: u32) -> TunnelKey {
    TunnelKey {
        vni,
        peer: UNSPECIFIED,
    }
}

/// The key of a peer's marker, and the peer's address.
fn peer_marker(peer: IpAddr) -> (TunnelKey, Address) {
    let peer = address(peer.to_canonical());
    let key = TunnelKey {
        vni: PEER_MARKER,
        peer,
    };
    (key, peer)
}

/// Takes a map of a known type out of the object.
pub(super) fn take<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, BpfError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf
        .take_map(name)
        .ok_or(BpfError::NoSuchMap { map: name })?;
    M::try_from(map).map_err(of_map(name, "open"))
}

pub(super) fn of_map(map: &'static str, action: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map {
        map,
        action,
        source,
    }
}

/// A removal that finds nothing has nothing to do.
fn forgiving(removed: Result<(), MapError>) -> Result<(), BpfError> {
    forgiving_of("TUNNELS", removed)
}

/// Likewise, of a map with this name.
pub(super) fn forgiving_of(
    map: &'static str,
    removed: Result<(), MapError>,
) -> Result<(), BpfError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other.map_err(of_map(map, "remove from")),
    }
}

pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub(crate) fn ip_addr(address: Address) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(address)).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::{address, ip_addr};

    #[test]
    fn addresses_of_both_families_survive_the_map() {
        for text in ["192.0.2.1", "2001:db8::1"] {
            let ip = text.parse().unwrap();
            assert_eq!(ip_addr(address(ip)), ip);
        }
    }
}
