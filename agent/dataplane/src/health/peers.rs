//! The thread that keeps the peers: who uses them, and what the kernel must know of them.
//!
//! Whatever may wait in the kernel is done here, one request after the other: management links, their forwarding entries, the
//! hooks, the entries of the underlay programs. The prober's thread is told when it is done.
//!
//! A peer is entered from the outside in (forwarding entry, underlay, session) and leaves the other way round, so that no probe
//! is sent that could not arrive, and none reflected that could not be sent.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use nsm_core::{sbfd::Discriminator, tunnel::MacAddr};
use nsm_ebpf_common::sbfd::{
    State,
    frame::{SPEAKER, mac, mac_key},
};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::{
    Event, FOREIGN_INTERVAL, Health, HealthConfig, HealthError, LINGER, Peer, PeerCell, PeerSpec,
    Report,
    prober::{self, Command, Commands, Drops, Joining, Memory, Prober},
    random,
    session::{Entry, peer_address},
    socket::PacketSocket,
};
use crate::{
    bpf::{Bpf, LocalSessions},
    links::{
        self, Family,
        management::{self, Forwarding, ManagementLink, ManagementSpec},
    },
    netlink::Netlink,
};

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
    /// `None`: an earlier agent's, and nobody has joined it yet.
    spec: Option<PeerSpec>,
    discriminator: u32,
    mac: [u8; 6],
    users: usize,
    /// When it is forgotten, while nobody uses it.
    expires: Option<Instant>,
    cell: Arc<PeerCell>,
}

/// Starts both threads.
pub(super) fn start(
    config: HealthConfig,
    bpf: Option<Arc<Bpf>>,
    events: tokio_mpsc::UnboundedSender<Event>,
) -> Result<Started, HealthError> {
    let (tell, told) = mpsc::sync_channel(1);
    let spawned = thread::Builder::new()
        .name("nsm-peers".to_owned())
        .spawn(move || match Peers::set_up(config, bpf, events) {
            Ok((peers, requests, started)) => {
                // Whoever started it waits.
                let _ = tell.send(Ok(started));
                peers.run(&requests);
            }
            Err(error) => {
                let _ = tell.send(Err(error));
            }
        });
    spawned.map_err(|source| HealthError::System {
        action: "start the thread of the peers",
        source,
    })?;
    told.recv().map_err(|_| HealthError::Closed)?
}

struct Peers {
    config: HealthConfig,
    bpf: Option<Arc<Bpf>>,
    netlink: Netlink,
    links: BTreeMap<Family, ManagementLink>,
    known: HashMap<IpAddr, Known>,
    commands: Commands,
    prober: Option<thread::JoinHandle<Memory>>,
    discriminator: u32,
    events: tokio_mpsc::UnboundedSender<Event>,
    /// Packets of foreign VNIs that were told.
    foreign: HashMap<(u32, IpAddr), u64>,
}

impl Peers {
    fn set_up(
        config: HealthConfig,
        bpf: Option<Arc<Bpf>>,
        events: tokio_mpsc::UnboundedSender<Event>,
    ) -> Result<(Self, mpsc::Receiver<Request>, Started), HealthError> {
        if let Some(node) = &config.namespace {
            node.enter()?;
        }
        let netlink = Netlink::open().map_err(|source| HealthError::System {
            action: "open a netlink socket",
            source,
        })?;
        let memory = match &bpf {
            Some(bpf) => Memory::Pinned(Box::new(bpf.take_sessions().ok_or(HealthError::InUse)?)),
            None => Memory::Local(LocalSessions::new()),
        };
        let system = |action| move |source| HealthError::System { action, source };
        let node = memory.sessions().node();
        let mut discriminator = node.discriminator.load() as u32;
        if discriminator == 0 {
            discriminator = random::discriminator().map_err(system("draw a discriminator"))?;
            node.discriminator.store(discriminator.into());
        }
        node.state.store(State::Up.bits().into());
        let known = adopt(&config, &memory)?;
        let (prober, commands) = Prober::new(memory, bpf.clone(), config.timing, events.clone())
            .map_err(system("set up the prober"))?;

        let mut peers = Self {
            config,
            bpf,
            netlink,
            links: BTreeMap::new(),
            known,
            commands: commands.clone(),
            prober: None,
            discriminator,
            events,
            foreign: HashMap::new(),
        };
        let linked = peers.make_first_links();
        if let Err(error) = linked {
            peers.give_up(prober.into_memory());
            return Err(error);
        }
        let drops = prober.drops();
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("nsm-prober".to_owned())
            .spawn(move || {
                let realtime = prober::set_realtime();
                let _ = tell.send(realtime);
                prober.run()
            })
            .map_err(system("start the prober"))?;
        peers.prober = Some(thread);
        let realtime = match told.recv() {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::info!(%error, "the prober has no real-time priority: probes of a busy node come late");
                false
            }
            Err(_) => false,
        };
        let (requests, receiver) = mpsc::channel();
        let started = Started {
            requests,
            commands,
            discriminator: Discriminator::new(discriminator).ok_or(HealthError::Closed)?,
            realtime,
            drops,
        };
        Ok((peers, receiver, started))
    }

    /// The links that are there from the start: for the address that tunnels leave from, else IPv4, and for peers of an earlier
    /// agent, who are reflected without a gap.
    fn make_first_links(&mut self) -> Result<(), HealthError> {
        let first = self.config.local.map_or(Family::V4, Family::of);
        let mut families: Vec<Family> = self.known.keys().copied().map(Family::of).collect();
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
        self.hook_links()?;
        self.forget_strays();
        // What an earlier agent saw is not news.
        if let Some(bpf) = &self.bpf {
            let seen = bpf.foreign_vnis()?.into_iter();
            self.foreign = seen.map(|vni| ((vni.vni, vni.peer), vni.packets)).collect();
        }
        Ok(())
    }

    /// Makes the link of a family, or takes it over, with the prober's socket on it.
    fn make_link(&mut self, family: Family) -> Result<(), HealthError> {
        let spec = ManagementSpec {
            domain: self.config.domain.clone(),
            family,
            vni: self.config.vni,
            port: self.config.port,
            local: self.config.local.filter(|ip| Family::of(*ip) == family),
        };
        // Without BPF, programs of an earlier agent would swallow what this one is to see.
        let anew = self.bpf.is_none();
        let link = management::ensure(&mut self.netlink, &spec, anew)?;
        match PacketSocket::open(link.index, &link.name, family) {
            Ok(socket) => {
                self.commands.send(Command::Link(family, socket));
                self.links.insert(family, link);
                Ok(())
            }
            Err(error) => {
                management::remove(&mut self.netlink, link.index, &link.name)?;
                Err(error)
            }
        }
    }

    fn hook_links(&self) -> Result<(), HealthError> {
        let Some(bpf) = &self.bpf else { return Ok(()) };
        let names: Vec<String> = self.links.values().map(|link| link.name.clone()).collect();
        Ok(bpf.attach_management(&names)?)
    }

    /// The link of a family, made when a peer first needs it.
    fn link(&mut self, family: Family) -> Result<ManagementLink, HealthError> {
        if !self.links.contains_key(&family) {
            self.make_link(family)?;
            if let Err(error) = self.hook_links() {
                if let Some(link) = self.links.remove(&family) {
                    management::remove(&mut self.netlink, link.index, &link.name)?;
                }
                return Err(error);
            }
        }
        self.links.get(&family).cloned().ok_or(HealthError::Closed)
    }

    /// Underlay entries of peers that have no session any more.
    fn forget_strays(&self) {
        let Some(bpf) = &self.bpf else { return };
        for peer in bpf.peers() {
            if !self.known.contains_key(&peer)
                && let Err(error) = bpf.remove_peer(peer)
            {
                tracing::warn!(%error, peer.ip = %peer, "a peer of an earlier agent stays");
            }
        }
    }

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
                    self.give_back(memory);
                    return;
                }
            }
            let now = Instant::now();
            if now >= next {
                next = now + FOREIGN_INTERVAL;
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
            let peer = Peer::new(spec, health, known.cell.clone());
            // Whoever gave up leaves by the guard's end.
            let _ = reply.send(Ok(peer));
            return;
        }
        match self.enter(spec) {
            Ok(entry) => {
                let cell = entry.cell.clone();
                let peer = Peer::new(spec, health, cell);
                let joining = Some(Joining { peer, reply });
                self.commands.send(Command::Enter(Box::new(entry), joining));
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Makes a peer known to the kernel, with one user more than before.
    fn enter(&mut self, spec: PeerSpec) -> Result<Entry, HealthError> {
        let address = spec.address;
        if address.is_unspecified() || address.is_multicast() {
            return Err(HealthError::NotAPeer(address));
        }
        let discriminator = spec.discriminator.get();
        let mac = self.mac_for(spec)?;
        let link = self.link(Family::of(address))?;
        let source = match self.config.local {
            Some(local) if local.is_ipv4() == address.is_ipv4() => local,
            _ => links::source_address(&mut self.netlink, address)?,
        };
        let forwarding = Forwarding {
            mac: MacAddr::new(mac),
            remote: address,
            port: spec.port,
            vni: spec.vni,
        };
        let old = self.known.get(&address).map(|known| known.mac);
        if let Some(old) = old.filter(|old| *old != mac) {
            self.commands.send(Command::Forget(old));
            management::remove_peer(&mut self.netlink, &link, MacAddr::new(old))?;
        }
        management::set_peer(&mut self.netlink, &link, forwarding)?;
        let counters = match &self.bpf {
            Some(bpf) => {
                bpf.add_port(spec.port)?;
                Some(bpf.add_peer(self.config.vni, address)?)
            }
            None => None,
        };
        let known = self.known.entry(address).or_insert_with(|| Known {
            spec: None,
            discriminator,
            mac,
            users: 0,
            expires: None,
            cell: Arc::default(),
        });
        known.spec = Some(spec);
        known.discriminator = discriminator;
        known.mac = mac;
        known.users += 1;
        known.expires = None;
        Ok(Entry {
            spec,
            mac,
            source,
            counters,
            cell: known.cell.clone(),
        })
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
            match self.enter(spec) {
                Ok(entry) => {
                    if let Some(known) = self.known.get_mut(&spec.address) {
                        known.users = known.users.saturating_sub(1);
                    }
                    self.commands.send(Command::Enter(Box::new(entry), None));
                }
                Err(error) => {
                    tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered");
                }
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
        self.prober.take()?.join().ok()
    }

    fn close(&mut self) -> Result<(), HealthError> {
        let addresses: Vec<IpAddr> = self.known.keys().copied().collect();
        for address in addresses {
            self.forget(address);
        }
        let memory = self.stop();
        let removed = self.remove_links();
        self.give_back(memory);
        removed
    }

    fn remove_links(&mut self) -> Result<(), HealthError> {
        let mut result = Ok(());
        for link in std::mem::take(&mut self.links).into_values() {
            let detached = self
                .bpf
                .as_ref()
                .map_or(Ok(()), |bpf| bpf.detach_management(&link.name));
            let removed = management::remove(&mut self.netlink, link.index, &link.name);
            result = result
                .and(detached.map_err(HealthError::from))
                .and(removed.map_err(HealthError::from));
        }
        result
    }

    fn give_back(&self, memory: Option<Memory>) {
        if let (Some(bpf), Some(Memory::Pinned(sessions))) = (&self.bpf, memory) {
            bpf.return_sessions(*sessions);
        }
    }

    /// Removes what was made, after a failure that is the error to tell. What an earlier agent left stays.
    fn give_up(&mut self, memory: Memory) {
        self.links.retain(|_, link| !link.adopted);
        if let Err(error) = self.remove_links() {
            tracing::error!(%error, "a management link that could not be completed stays");
        }
        self.give_back(Some(memory));
    }
}

/// The sessions that an earlier agent left. What is not whole is cleared.
fn adopt(config: &HealthConfig, memory: &Memory) -> Result<HashMap<IpAddr, Known>, HealthError> {
    let sessions = memory.sessions();
    let mut known = HashMap::new();
    let expires = Some(Instant::now() + config.orphan_grace);
    for (key, slot) in sessions.indexed()? {
        let session = sessions.slot(slot);
        let discriminator = session.peer_discriminator.load() as u32;
        let [_, _, mac @ ..] = key.to_be_bytes();
        let whole = discriminator != 0 && mac_key(self::mac(mac[1], discriminator)) == key;
        if whole {
            known.insert(
                peer_address(session),
                Known {
                    spec: None,
                    discriminator,
                    mac,
                    users: 0,
                    expires,
                    cell: Arc::default(),
                },
            );
        }
    }
    Ok(known)
}
