//! How the two threads begin: the memory of the sessions, the links and what hangs on them, and what an earlier agent left.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use nsm_core::sbfd::Discriminator;
use nsm_ebpf_common::sbfd::{
    State,
    frame::{mac, mac_key},
};
use tokio::sync::mpsc as tokio_mpsc;

use super::{
    super::{
        Event, HealthConfig, HealthError,
        prober::{self, Command, Prober},
        random,
        session::peer_address,
        socket::PacketSocket,
        surroundings::Memory,
    },
    Known, Peers, Request, Started,
};
use crate::{
    bpf::{Bpf, LocalSessions},
    links::{
        Family,
        management::{self, ManagementLink, ManagementSpec},
    },
    netlink::Netlink,
};

/// Starts both threads.
pub(in crate::health) fn start(
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
    pub(super) fn link(&mut self, family: Family) -> Result<ManagementLink, HealthError> {
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
