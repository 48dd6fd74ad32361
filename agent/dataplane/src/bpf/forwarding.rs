//! The maps of forwarding: which pod link belongs to which tunnel or other pod link, the external devices, the ways of probes.
//!
//! The order of writes leaves no frame without its checks: a tunnel can be received before the pod can send into it, and it is taken from
//! the pod first.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, MapData, PerCpuArray},
};
use ipnet::IpNet;
use nsm_core::{
    link::{LinkSpec, Traffic, VxlanSpec},
    net::{MacAddr, Vni},
};
use nsm_ebpf_common::{
    Address, Counters, MAX_SLOTS, Tunnel, UNSPECIFIED,
    forward::{
        Device, Forward, MAX_DEVICES, MAX_SOURCES, Prefix, ProbePath, key_halves, mac_words,
        tunnel_flags,
    },
};

use super::{
    Bpf, BpfError, Slot, State,
    tables::{address, forgiving_of, ip_addr, of_map, read, take},
};

pub(super) struct ForwardingTables {
    forward: BpfHashMap<MapData, u32, Forward>,
    devices: Array<MapData, Device>,
    links: PerCpuArray<MapData, Counters>,
    probe_paths: BpfHashMap<MapData, u64, ProbePath>,
    /// The slots of pod links that are joined with each other, by link: their entries in FORWARD are all that there is of them.
    paired: HashMap<u32, Slot>,
}

/// The ends of a pod link, as the programs need them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodEnds {
    /// The interface index of the node's end.
    pub(crate) node: u32,
    /// The Ethernet address of the pod's end.
    pub(crate) mac: MacAddr,
    /// Whether the pod's namespace is the node's own.
    pub(crate) same_namespace: bool,
}

/// One of two pod links that are joined with each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairedEnd<'a> {
    pub(crate) ends: PodEnds,
    /// Addresses that its pod may send from. Empty: any.
    pub(crate) sources: &'a [IpNet],
}

/// A pod link that the maps have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connected {
    /// The interface index of the node's end.
    pub(crate) node: u32,
    pub(crate) slot: Slot,
    pub(crate) to: LeadsTo,
}

/// Where the frames of a pod link go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeadsTo {
    /// Through a tunnel.
    Tunnel { vni: u32, remote: IpAddr },
    /// To the link whose node's end has this interface index.
    Link(u32),
}

/// Where probes and answers to an Ethernet address go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProbeRoute {
    pub(crate) remote: IpAddr,
    /// The UDP port of the peer's tunnels.
    pub(crate) port: u16,
    /// The peer's probe VNI.
    pub(crate) vni: Vni,
    /// The address that they leave from; `None`: by the route.
    pub(crate) local: Option<IpAddr>,
}

impl ForwardingTables {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        let mut tables = Self {
            forward: take(ebpf, "FORWARD")?,
            devices: take(ebpf, "DEVICES")?,
            links: take(ebpf, "LINKS")?,
            probe_paths: take(ebpf, "PROBE_PATHS")?,
            paired: HashMap::new(),
        };
        let mut used = HashSet::new();
        for (link, forward) in tables.entries()? {
            if forward.pod.link == 0 {
                continue;
            }
            if forward.slot < MAX_SLOTS && used.insert(forward.slot) {
                tables.paired.insert(link, Slot(forward.slot));
            } else {
                forgiving_of("FORWARD", tables.forward.remove(&link))?;
            }
        }
        Ok(tables)
    }

    /// The slots that are in use and not a tunnel's.
    pub(super) fn slots(&self) -> HashSet<u32> {
        self.paired.values().map(|slot| slot.get()).collect()
    }

    fn entries(&self) -> Result<Vec<(u32, Forward)>, BpfError> {
        let entries = self.forward.iter().collect::<Result<_, _>>();
        entries.map_err(of_map("FORWARD", "read"))
    }

    fn insert(&mut self, forward: Forward) -> Result<(), BpfError> {
        let inserted = self.forward.insert(forward.link, forward, 0);
        inserted.map_err(of_map("FORWARD", "add to"))
    }

    /// The place of a port in DEVICES, or the first free one.
    fn place(&self, port: u16) -> Result<u32, BpfError> {
        let mut free = None;
        for place in 0..MAX_DEVICES {
            let device = self.device(place)?;
            if device.port == u32::from(port) {
                return Ok(place);
            }
            if device.port == 0 && free.is_none() {
                free = Some(place);
            }
        }
        free.ok_or(BpfError::DevicesExhausted {
            port,
            capacity: MAX_DEVICES,
        })
    }

    fn device(&self, place: u32) -> Result<Device, BpfError> {
        let device = self.devices.get(&place, 0);
        device.map_err(of_map("DEVICES", "read"))
    }

    fn set_device(&mut self, place: u32, device: Device) -> Result<(), BpfError> {
        let set = self.devices.set(place, device, 0);
        set.map_err(of_map("DEVICES", "write"))
    }

    fn zero(&mut self, slot: u32) -> Result<(), BpfError> {
        let cpus = self
            .links
            .get(&slot, 0)
            .map_err(of_map("LINKS", "read"))?
            .len();
        let zero = vec![Counters::default(); cpus].try_into();
        let zero = zero.map_err(|source: std::io::Error| BpfError::Map {
            map: "LINKS",
            action: "zero",
            source: source.into(),
        })?;
        let set = self.links.set(slot, zero, 0);
        set.map_err(of_map("LINKS", "zero"))
    }
}

impl Bpf {
    /// Lets the programs send through an external device to its UDP port, instead of the one that they used before.
    pub(crate) fn set_device(&self, port: u16, index: u32) -> Result<(), BpfError> {
        let tables = &mut self.state().forwarding;
        let place = tables.place(port)?;
        let port = port.into();
        tables.set_device(place, Device { index, port })
    }

    /// The external device of a port, as the programs know it.
    pub(crate) fn devices(&self) -> Result<Vec<(u16, u32)>, BpfError> {
        let tables = &self.state().forwarding;
        let mut devices = Vec::new();
        for place in 0..MAX_DEVICES {
            let Device { index, port } = tables.device(place)?;
            devices.extend(
                u16::try_from(port)
                    .ok()
                    .filter(|port| *port != 0)
                    .map(|port| (port, index)),
            );
        }
        Ok(devices)
    }

    /// Lets the programs send nothing to a port.
    pub(crate) fn forget_device(&self, port: u16) -> Result<(), BpfError> {
        let tables = &mut self.state().forwarding;
        let place = tables.place(port)?;
        tables.set_device(place, Device::default())
    }

    /// Joins a pod link and a tunnel, whose port has a device. What the link had before is replaced, but for the entries of another tunnel
    /// and of another link: see [`Self::disconnect_link`] and [`Self::disconnect_tunnel`].
    ///
    /// # Errors
    ///
    /// When all slots are taken, when the peer cannot be a tunnel's end, when the kernel refuses.
    pub(crate) fn connect(&self, ends: &PodEnds, spec: &VxlanSpec) -> Result<Slot, BpfError> {
        let state = &mut *self.state();
        let device = state.forwarding.place(spec.port)?;
        let was_known = state.tables.slot(spec.vni.get(), spec.remote).is_some();
        let own = Own::of(&spec.link);
        let tunnel = |slot| Tunnel {
            peer_mac: mac_words(peer_mac(&spec.link)),
            local: in_packet(spec.local).unwrap_or(0),
            own_v4: own.v4,
            own_v6: own.v6,
            ..ends.pod(Slot(slot))
        };
        let slot = state
            .tables
            .add_tunnel(spec.vni.get(), spec.remote, tunnel)?;
        if !was_known {
            state.forwarding.zero(slot.get())?;
        }
        let forward = Forward {
            device,
            vni: spec.vni.get(),
            local: address(spec.local),
            remote: address(spec.remote),
            ..ends.forward(slot, &spec.sources, Tunnel::counted(0))
        };
        if let Err(error) = state.forwarding.insert(forward) {
            if !was_known {
                // The error that counts is the first one.
                let _ = state.tables.remove_tunnel(spec.vni.get(), spec.remote);
            }
            return Err(error);
        }
        state.unpair(ends.node);
        Ok(slot)
    }

    /// Joins two pod links of this node. What they had before is replaced, but for the entries of tunnels: see [`Self::disconnect_tunnel`].
    /// A link that is joined already keeps its slot and its counters. After an error, links that were not joined before are not.
    ///
    /// # Errors
    ///
    /// When all slots are taken, when the kernel refuses.
    pub(crate) fn connect_pair(
        &self,
        [one, other]: [PairedEnd<'_>; 2],
    ) -> Result<[Slot; 2], BpfError> {
        let state = &mut *self.state();
        let known = [one, other].map(|end| state.forwarding.paired.contains_key(&end.ends.node));
        let joined = state.pair(one, other);
        if joined.is_err() {
            for (end, was_known) in [one, other].iter().zip(known) {
                if !was_known {
                    // The error that counts is the first one. An entry of before, which leads into a tunnel, stays.
                    let _ = state.forget_pair(end.ends.node);
                }
            }
        }
        joined
    }

    /// Forgets where a pod link's frames go. They are dropped from now on.
    pub(crate) fn disconnect_link(&self, node: u32) -> Result<(), BpfError> {
        let state = &mut *self.state();
        forgiving_of("FORWARD", state.forwarding.forward.remove(&node))?;
        state.unpair(node);
        Ok(())
    }

    /// Forgets a tunnel and frees its slot; whether there was one.
    pub(crate) fn disconnect_tunnel(&self, vni: Vni, remote: IpAddr) -> Result<bool, BpfError> {
        self.state().tables.remove_tunnel(vni.get(), remote)
    }

    /// The connections that the programs know, among them those of an earlier agent.
    pub(crate) fn connected(&self) -> Result<Vec<Connected>, BpfError> {
        let entries = self.state().forwarding.entries()?;
        let connected = |(node, forward): (u32, Forward)| Connected {
            node,
            slot: Slot(forward.slot),
            to: match forward.pod.link {
                0 => LeadsTo::Tunnel {
                    vni: forward.vni,
                    remote: ip_addr(forward.remote),
                },
                link => LeadsTo::Link(link),
            },
        };
        Ok(entries.into_iter().map(connected).collect())
    }

    /// What passed the pod link of a slot: "received" is what the pod got.
    ///
    /// # Errors
    ///
    /// When the slot is not in use.
    pub fn link_counters(&self, slot: Slot) -> Result<Traffic, BpfError> {
        let state = self.state();
        if !state.tables.is_used(slot) {
            return Err(BpfError::NoSlot(slot));
        }
        read("LINKS", &state.forwarding.links, slot)
    }

    /// Lets probes and answers to an Ethernet address (as [`nsm_ebpf_common::sbfd::frame::session_key`] has it) go to a peer.
    pub(crate) fn set_probe_route(&self, key: u64, route: &ProbeRoute) -> Result<(), BpfError> {
        let tables = &mut self.state().forwarding;
        let path = ProbePath {
            key: key_halves(key),
            device: tables.place(route.port)?,
            vni: route.vni.get(),
            port: route.port.into(),
            local: route.local.map_or(UNSPECIFIED, address),
            remote: address(route.remote),
        };
        let inserted = tables.probe_paths.insert(key, path, 0);
        inserted.map_err(of_map("PROBE_PATHS", "add to"))
    }

    /// Lets them go nowhere; a success when there is no such entry.
    pub(crate) fn remove_probe_route(&self, key: u64) -> Result<(), BpfError> {
        forgiving_of(
            "PROBE_PATHS",
            self.state().forwarding.probe_paths.remove(&key),
        )
    }

    /// All ways of probes, among them those of an earlier agent.
    pub(crate) fn probe_routes(&self) -> Result<Vec<(u64, ProbeRoute)>, BpfError> {
        let state = self.state();
        let mut all = Vec::new();
        for entry in state.forwarding.probe_paths.iter() {
            let (key, path) = entry.map_err(of_map("PROBE_PATHS", "read"))?;
            let (Ok(vni), Ok(port)) = (Vni::try_from(path.vni), u16::try_from(path.port)) else {
                continue;
            };
            let local = Some(ip_addr(path.local)).filter(|local| !local.is_unspecified());
            let remote = ip_addr(path.remote);
            all.push((
                key,
                ProbeRoute {
                    remote,
                    port,
                    vni,
                    local,
                },
            ));
        }
        Ok(all)
    }
}

impl PodEnds {
    /// What the programs need to bring frames to the pod.
    fn pod(&self, slot: Slot) -> Tunnel {
        let flags = if self.same_namespace {
            tunnel_flags::SAME_NAMESPACE
        } else {
            0
        };
        Tunnel {
            slot: slot.get(),
            link: self.node,
            flags,
            mac: mac_words(self.mac.octets()),
            ..Tunnel::counted(slot.get())
        }
    }

    /// What the programs need of what the pod sends, without a tunnel.
    fn forward(&self, slot: Slot, sources: &[IpNet], pod: Tunnel) -> Forward {
        let (checked, sources) = checked_sources(sources);
        Forward {
            link: self.node,
            device: 0,
            vni: 0,
            slot: slot.get(),
            checked,
            local: UNSPECIFIED,
            remote: UNSPECIFIED,
            mac: mac_words(self.mac.octets()),
            reserved: 0,
            sources,
            pod,
        }
    }
}

impl State {
    fn pair(&mut self, one: PairedEnd<'_>, other: PairedEnd<'_>) -> Result<[Slot; 2], BpfError> {
        let slots = [
            self.pair_slot(one.ends.node)?,
            self.pair_slot(other.ends.node)?,
        ];
        let [own, others] = slots;
        let back = other.ends.forward(others, other.sources, one.ends.pod(own));
        let forth = one.ends.forward(own, one.sources, other.ends.pod(others));
        // The way back first: who is answered finds it.
        self.forwarding.insert(back)?;
        self.forwarding.insert(forth)?;
        Ok(slots)
    }

    /// The slot of a link that is, or is about to be, joined with another link.
    fn pair_slot(&mut self, node: u32) -> Result<Slot, BpfError> {
        if let Some(slot) = self.forwarding.paired.get(&node) {
            return Ok(*slot);
        }
        let slot = self.tables.take_slot()?;
        self.forwarding.paired.insert(node, slot);
        self.forwarding.zero(slot.get())?;
        Ok(slot)
    }

    /// Removes the entry of a link that leads to another link, and frees its slot.
    fn forget_pair(&mut self, node: u32) -> Result<(), BpfError> {
        let leads_to_link = self.forwarding.forward.get(&node, 0);
        if leads_to_link.is_ok_and(|it| it.pod.link != 0) {
            forgiving_of("FORWARD", self.forwarding.forward.remove(&node))?;
        }
        self.unpair(node);
        Ok(())
    }

    /// Frees the slot of a link that is not joined with another link any more.
    fn unpair(&mut self, node: u32) {
        if let Some(slot) = self.forwarding.paired.remove(&node) {
            self.tables.free_slot(slot);
        }
    }
}

/// The addresses of a pod's end, the first of each family: what is for them takes the fast path.
struct Own {
    v4: u32,
    v6: Address,
}

impl Own {
    fn of(link: &LinkSpec) -> Self {
        let addresses = || link.addresses.iter().map(IpNet::addr);
        Self {
            v4: addresses().find_map(in_packet).unwrap_or(0),
            v6: addresses()
                .find(IpAddr::is_ipv6)
                .map_or(UNSPECIFIED, address),
        }
    }
}

/// An IPv4 address as it lies in a packet; none of another family.
fn in_packet(address: IpAddr) -> Option<u32> {
    match address.to_canonical() {
        IpAddr::V4(v4) => Some(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(_) => None,
    }
}

/// The Ethernet address of the peer's pod, all zero where it is not known: the one that all neighbours of the link have.
fn peer_mac(link: &LinkSpec) -> [u8; 6] {
    match link.neighbours.split_first() {
        Some(((_, mac), others)) if others.iter().all(|(_, other)| other == mac) => mac.octets(),
        _ => [0; 6],
    }
}

/// The source prefixes that the programs check. Where they cannot hold all, neighbouring ones are joined by the prefix that has both.
fn checked_sources(wanted: &[IpNet]) -> (u32, [Prefix; MAX_SOURCES]) {
    let mut sources = [Prefix::default(); MAX_SOURCES];
    let wanted = joined(wanted.iter().map(IpNet::trunc).collect());
    for (place, net) in sources.iter_mut().zip(&wanted) {
        let mapped_bits = if net.addr().is_ipv4() { 96 } else { 0 };
        *place = Prefix::new(
            address(net.addr()),
            mapped_bits + u32::from(net.prefix_len()),
        );
    }
    (wanted.len() as u32, sources)
}

/// At most [`MAX_SOURCES`] prefixes that have all of these, as narrow as joining neighbours leaves them.
fn joined(mut nets: Vec<IpNet>) -> Vec<IpNet> {
    nets.sort();
    nets.dedup();
    while nets.len() > MAX_SOURCES {
        let pairs = nets.windows(2).enumerate();
        let joined = pairs.filter_map(|(at, pair)| Some((at, both(pair[0], pair[1])?)));
        // Two of one family are neighbours: there are more than two.
        let Some((at, net)) = joined.max_by_key(|(_, net)| net.prefix_len()) else {
            break;
        };
        nets[at] = net;
        nets.remove(at + 1);
    }
    nets
}

/// The narrowest prefix that has both; none for those of two families.
fn both(one: IpNet, other: IpNet) -> Option<IpNet> {
    if one.addr().is_ipv4() != other.addr().is_ipv4() {
        return None;
    }
    let mut net = one;
    while !net.contains(&other) {
        net = net.supernet()?;
    }
    Some(net)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_both_families_are_checked_as_far_as_there_is_room() {
        let nets = |texts: &[&str]| -> Vec<IpNet> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let (checked, sources) = checked_sources(&nets(&["172.16.1.2/32", "fd00::/64"]));
        assert_eq!(checked, 2);
        assert!(sources[0].contains(&address("172.16.1.2".parse().unwrap())));
        assert!(!sources[0].contains(&address("172.16.1.3".parse().unwrap())));
        assert!(sources[1].contains(&address("fd00::7".parse().unwrap())));
        assert!(!sources[1].contains(&address("172.16.1.2".parse().unwrap())));
        // More than there is room for: none is refused that is allowed, and strangers are.
        let many = nets(&[
            "10.1.0.0/24",
            "172.16.1.2/32",
            "10.1.1.0/24",
            "192.168.0.0/16",
            "fd00::/64",
            "10.1.2.0/24",
        ]);
        let (checked, sources) = checked_sources(&many);
        assert_eq!(checked as usize, MAX_SOURCES);
        let is_allowed = |text: &str| {
            let address = address(text.parse().unwrap());
            sources.iter().any(|prefix| prefix.contains(&address))
        };
        for net in &many {
            assert!(is_allowed(&net.addr().to_string()), "{net}");
        }
        for stranger in [
            "10.2.0.1",
            "172.16.1.3",
            "192.169.0.1",
            "fd01::1",
            "8.8.8.8",
        ] {
            assert!(!is_allowed(stranger), "{stranger}");
        }
    }
}
