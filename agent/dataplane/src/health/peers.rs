//! The thread that keeps the peers: who uses them, and what the kernel must know of them.
//!
//! Whatever may wait in the kernel is done here, one request after the other: management links, their forwarding entries, the
//! hooks, the entries of the underlay programs. The prober's thread is told when it is done.
//!
//! A peer is entered from the outside in (forwarding entry, underlay, session) and leaves the other way round, so that no probe
//! is sent that could not arrive, and none reflected that could not be sent.

mod adopt;
mod links;
mod set_up;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map},
    net::IpAddr,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use nsm_core::{sbfd::Discriminator, tunnel::MacAddr};
use nsm_ebpf_common::sbfd::frame::{SPEAKER, mac};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::{
    Event, FOREIGN_INTERVAL, Health, HealthConfig, HealthError, LINGER, Peer, PeerSpec, Report,
    preflight::PeerCell,
    prober::{Command, Commands},
    session::Entry,
    surroundings::{Drops, Memory},
};
use crate::{
    bpf::Bpf,
    links::{
        Family,
        management::{self, Forwarding, ManagementLink},
        source_address,
    },
    netlink::Netlink,
};

pub(super) use self::set_up::start;

/// What is asked of this thread.
pub(super) enum Request {
    /// Use a peer.
    Join {
        peer: PeerSpec,
        health: Health,
        reply: oneshot::Sender<Result<Peer, HealthError>>,
    },
    /// Use it no more.
    Leave(IpAddr),
    /// Report on one peer or all.
    Reports {
        peer: Option<IpAddr>,
        reply: oneshot::Sender<Vec<Report>>,
    },
    /// Remove everything and end.
    Close {
        reply: oneshot::Sender<Result<(), HealthError>>,
    },
}

/// A health plane that runs.
pub(super) struct Started {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) commands: Commands,
    pub(super) discriminator: Discriminator,
    pub(super) realtime: bool,
    pub(super) drops: Arc<Drops>,
}

/// A peer that is known to the kernel.
struct Known {
    /// As the prober has it; `None`: an earlier agent's, and nobody has joined it yet.
    spec: Option<PeerSpec>,
    discriminator: u32,
    mac: [u8; 6],
    users: usize,
    /// When it is forgotten, while nobody uses it.
    expires: Option<Instant>,
    cell: Arc<PeerCell>,
}

struct Peers {
    config: HealthConfig,
    bpf: Option<Arc<Bpf>>,
    netlink: Netlink,
    links: BTreeMap<Family, ManagementLink>,
    known: HashMap<IpAddr, Known>,
    commands: Commands,
    prober: Option<thread::JoinHandle<Option<Memory>>>,
    discriminator: u32,
    events: tokio_mpsc::UnboundedSender<Event>,
    /// Packets of foreign VNIs that were told.
    foreign: HashMap<(u32, IpAddr), u64>,
    /// Links that are gone and could not be made again yet.
    broken: BTreeSet<Family>,
}

impl Peers {
    fn run(mut self, requests: &mpsc::Receiver<Request>) {
        let mut next = Instant::now() + FOREIGN_INTERVAL;
        loop {
            match requests.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Request::Close { reply }) => {
                    let closed = self.close();
                    let _ = reply.send(closed);
                    return;
                }
                Ok(request) => self.handle(request),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                // The last handle is gone, without a word: everything stays for the next agent.
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let memory = self.stop();
                    give_back(self.bpf.as_deref(), memory);
                    return;
                }
            }
            let now = Instant::now();
            if now >= next {
                next = now + FOREIGN_INTERVAL;
                self.mend_links();
                self.forget_expired(now);
                self.tell_foreign();
            }
        }
    }

    fn handle(&mut self, request: Request) {
        match request {
            Request::Join {
                peer,
                health,
                reply,
            } => {
                // The address as maps and frames have it.
                let spec = PeerSpec {
                    address: peer.address.to_canonical(),
                    ..peer
                };
                self.join(spec, health, reply);
            }
            Request::Leave(peer) => {
                if let Some(known) = self.known.get_mut(&peer) {
                    known.users = known.users.saturating_sub(1);
                    if known.users == 0 {
                        known.expires = Some(Instant::now() + LINGER);
                    }
                }
            }
            Request::Reports { peer, reply } => {
                let users = self.known.iter();
                let users = users.map(|(peer, known)| (*peer, known.users)).collect();
                self.commands.send(Command::Reports { peer, users, reply });
            }
            Request::Close { .. } => {}
        }
    }

    fn join(
        &mut self,
        spec: PeerSpec,
        health: Health,
        reply: oneshot::Sender<Result<Peer, HealthError>>,
    ) {
        let address = spec.address;
        let same = |known: &&mut Known| known.spec == Some(spec);
        if let Some(known) = self.known.get_mut(&address).filter(same) {
            known.users += 1;
            known.expires = None;
            let peer = Peer::new(spec, health, known.cell.clone(), false);
            // Whoever gave up leaves by the guard's end.
            let _ = reply.send(Ok(peer));
            return;
        }
        let joined = self.enter(spec).map(|known| {
            known.users += 1;
            known.expires = None;
            Peer::new(spec, health, known.cell.clone(), true)
        });
        let _ = reply.send(joined);
    }

    /// Makes a peer known to the kernel and to the prober; nobody uses it yet. After an error everything is as before.
    fn enter(&mut self, spec: PeerSpec) -> Result<&mut Known, HealthError> {
        let address = spec.address;
        if address.is_unspecified() || address.is_multicast() {
            return Err(HealthError::NotAPeer(address));
        }
        let mac = self.mac_for(spec)?;
        let link = self.link(Family::of(address))?;
        let source = match self.config.local {
            Some(local) if local.is_ipv4() == address.is_ipv4() => local,
            _ => source_address(&mut self.netlink, address)?,
        };
        let before = self
            .known
            .get(&address)
            .map(|known| (known.mac, known.spec));
        management::set_peer(&mut self.netlink, &link, forwarding(mac, spec))?;
        let cell = match self.enter_behind(spec, mac, source) {
            Ok(cell) => cell,
            Err(error) => {
                self.undo_enter(&link, address, mac, before);
                return Err(error);
            }
        };
        if let Some((old, _)) = before.filter(|(old, _)| *old != mac) {
            self.commands.send(Command::Forget(old));
            let removed = management::remove_peer(&mut self.netlink, &link, MacAddr::new(old));
            if let Err(error) = removed {
                tracing::warn!(%error, peer.ip = %address, "a forwarding entry stays");
            }
        }
        let discriminator = spec.discriminator.get();
        let known = match self.known.entry(address) {
            hash_map::Entry::Occupied(entry) => entry.into_mut(),
            hash_map::Entry::Vacant(entry) => entry.insert(Known {
                spec: None,
                discriminator,
                mac,
                users: 0,
                expires: None,
                cell,
            }),
        };
        known.spec = Some(spec);
        known.discriminator = discriminator;
        known.mac = mac;
        Ok(known)
    }

    /// The underlay, then the prober, which says whether it could.
    fn enter_behind(
        &self,
        spec: PeerSpec,
        mac: [u8; 6],
        source: IpAddr,
    ) -> Result<Arc<PeerCell>, HealthError> {
        let counters = match &self.bpf {
            Some(bpf) => {
                // Ports are tunnels', too, and stay.
                bpf.add_port(spec.port)?;
                Some(bpf.add_peer(self.config.vni, spec.address)?)
            }
            None => None,
        };
        let known = self.known.get(&spec.address);
        let cell = known.map(|known| known.cell.clone()).unwrap_or_default();
        let entry = Entry {
            spec,
            mac,
            source,
            counters,
            counts_out: spec.vni == self.config.vni,
            cell: cell.clone(),
        };
        let (reply, entered) = mpsc::sync_channel(1);
        self.commands.send(Command::Enter(Box::new(entry), reply));
        entered.recv().map_err(|_| HealthError::Closed)??;
        Ok(cell)
    }

    /// Takes back what a peer was entered with that has no session; `before`: what it was known as.
    fn undo_enter(
        &mut self,
        link: &ManagementLink,
        address: IpAddr,
        mac: [u8; 6],
        before: Option<([u8; 6], Option<PeerSpec>)>,
    ) {
        if before.is_none()
            && let Some(bpf) = &self.bpf
            && let Err(error) = bpf.remove_peer(address)
        {
            tracing::warn!(%error, peer.ip = %address, "the underlay goes on counting a peer");
        }
        let undone = match before {
            Some((old, Some(spec))) if old == mac => {
                management::set_peer(&mut self.netlink, link, forwarding(old, spec))
            }
            // Where an earlier agent's peer was reached is not known; what the peer says now is the best guess.
            Some((old, None)) if old == mac => Ok(()),
            _ => management::remove_peer(&mut self.netlink, link, MacAddr::new(mac)),
        };
        if let Err(error) = undone {
            tracing::warn!(%error, peer.ip = %address, "a forwarding entry stays");
        }
    }

    /// The Ethernet address by which a peer is reached: that by which it speaks, or where the same node has another address, too, one
    /// that only we know it by.
    fn mac_for(&self, spec: PeerSpec) -> Result<[u8; 6], HealthError> {
        let discriminator = spec.discriminator.get();
        let taken = |holder: String| HealthError::DiscriminatorTaken {
            discriminator: spec.discriminator,
            peer: spec.address,
            holder,
        };
        if discriminator == self.discriminator {
            return Err(taken("this node".to_owned()));
        }
        let others: Vec<_> = self
            .known
            .iter()
            .filter(|(address, known)| {
                **address != spec.address && known.discriminator == discriminator
            })
            .collect();
        (SPEAKER..=u8::MAX)
            .map(|tag| mac(tag, discriminator))
            .find(|mac| others.iter().all(|(_, known)| known.mac != *mac))
            .ok_or_else(|| taken(format!("{} other addresses", others.len())))
    }

    fn forget_expired(&mut self, now: Instant) {
        let expired = |known: &Known| known.expires.is_some_and(|expires| expires <= now);
        let doomed: Vec<IpAddr> = self
            .known
            .iter()
            .filter(|(_, known)| expired(known))
            .map(|(address, _)| *address)
            .collect();
        for address in doomed {
            self.forget(address);
        }
    }

    fn forget(&mut self, address: IpAddr) {
        let Some(known) = self.known.remove(&address) else {
            return;
        };
        self.commands.send(Command::Forget(known.mac));
        if let Some(bpf) = &self.bpf
            && let Err(error) = bpf.remove_peer(address)
        {
            tracing::warn!(%error, peer.ip = %address, "the underlay goes on counting a peer");
        }
        if let Some(link) = self.links.get(&Family::of(address)) {
            let removed = management::remove_peer(&mut self.netlink, link, MacAddr::new(known.mac));
            if let Err(error) = removed {
                tracing::warn!(%error, peer.ip = %address, "a forwarding entry stays");
            }
        }
        self.succeed(known.discriminator, known.mac);
    }

    /// The same node by another address now is the one whose own probes are answered.
    fn succeed(&mut self, discriminator: u32, gone: [u8; 6]) {
        if gone != mac(SPEAKER, discriminator) {
            return;
        }
        let heir = self
            .known
            .values()
            .find(|known| known.discriminator == discriminator)
            .and_then(|known| known.spec);
        if let Some(spec) = heir {
            // Its users are those it has, and with none it goes when it was to go.
            if let Err(error) = self.enter(spec) {
                tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered");
            }
        }
    }

    fn tell_foreign(&mut self) {
        let Some(bpf) = &self.bpf else { return };
        let found = match bpf.foreign_vnis() {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, "cannot look for foreign VNIs");
                return;
            }
        };
        let mut told = HashMap::with_capacity(found.len());
        for foreign in found {
            let key = (foreign.vni, foreign.peer);
            let before = self.foreign.get(&key).copied().unwrap_or(0);
            told.insert(key, foreign.packets);
            if foreign.packets != before {
                // Nobody listens: they can ask.
                let _ = self.events.send(Event::ForeignVni(foreign));
            }
        }
        self.foreign = told;
    }

    /// Ends the prober's thread.
    fn stop(&mut self) -> Option<Memory> {
        self.commands.send(Command::Stop);
        self.prober.take()?.join().ok()?
    }

    fn close(&mut self) -> Result<(), HealthError> {
        let addresses: Vec<IpAddr> = self.known.keys().copied().collect();
        for address in addresses {
            self.forget(address);
        }
        let memory = self.stop();
        let removed = self.remove_links();
        give_back(self.bpf.as_deref(), memory);
        removed
    }
}

/// Gives the sessions back to the programs' owner, for the next health plane.
fn give_back(bpf: Option<&Bpf>, memory: Option<Memory>) {
    if let (Some(bpf), Some(Memory::Pinned(sessions))) = (bpf, memory) {
        bpf.return_sessions(*sessions);
    }
}

const fn forwarding(mac: [u8; 6], spec: PeerSpec) -> Forwarding {
    Forwarding {
        mac: MacAddr::new(mac),
        remote: spec.address,
        port: spec.port,
        vni: spec.vni,
    }
}
