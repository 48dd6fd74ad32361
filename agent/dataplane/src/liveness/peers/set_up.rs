//! The start of the two threads: the memory of the sessions, the probe links and their programs.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::{Arc, mpsc},
    thread,
};

use nsm_core::liveness::sbfd::Discriminator;
use nsm_ebpf_common::sbfd::State;
use tokio::sync::mpsc as tokio_mpsc;

use super::{
    super::{
        Event, HealthConfig, HealthError,
        prober::{self, Kit, Prober},
        random,
        request::Request,
        surroundings::Memory,
    },
    Orphan, Peers, Started, adopt, give_back,
};
use crate::{
    bpf::{Bpf, LocalSessions},
    netlink::Netlink,
};

/// Starts both threads.
pub(in crate::liveness) fn start(
    config: HealthConfig,
    bpf: Option<Arc<Bpf>>,
    events: tokio_mpsc::UnboundedSender<Event>,
) -> Result<Started, HealthError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let spawned = thread::Builder::new()
        .name("nsm-peers".to_owned())
        .spawn(move || match Peers::set_up(config, bpf, events) {
            Ok((peers, requests, started)) => {
                // The starting thread waits for it.
                let _ = sender.send(Ok(started));
                peers.run(&requests);
            }
            Err(error) => {
                let _ = sender.send(Err(error));
            }
        });
    spawned.map_err(system("start the thread of the peers"))?;
    receiver.recv().map_err(|_| HealthError::Closed)?
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> HealthError {
    move |source| HealthError::System { action, source }
}

/// The prober's thread before it has a prober. It ends without one when this is dropped.
struct WaitingThread {
    prober: mpsc::SyncSender<Prober>,
    realtime: mpsc::Receiver<io::Result<()>>,
    handle: thread::JoinHandle<Option<Memory>>,
}

impl WaitingThread {
    fn spawn() -> io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel::<Prober>(1);
        let (priority, realtime) = mpsc::sync_channel(1);
        let handle = thread::Builder::new()
            .name("nsm-prober".to_owned())
            .spawn(move || {
                let prober = receiver.recv().ok()?;
                let _ = priority.send(prober::set_realtime());
                Some(prober.run())
            })?;
        Ok(Self {
            prober: sender,
            realtime,
            handle,
        })
    }

    /// Lets the prober run: the thread, and whether it has real-time priority.
    fn run(
        self,
        prober: Prober,
    ) -> Result<(thread::JoinHandle<Option<Memory>>, bool), Box<Prober>> {
        self.prober
            .send(prober)
            .map_err(|unsent| Box::new(unsent.0))?;
        let realtime = self.realtime.recv();
        if let Ok(Err(error)) = &realtime {
            tracing::info!(%error, "the prober has no real-time priority: probes of a busy node are sent late");
        }
        Ok((self.handle, matches!(realtime, Ok(Ok(())))))
    }
}

/// The memory of the sessions, with this node's discriminator in it: the one that an earlier agent left, or `drawn`.
fn take_memory(
    config: &HealthConfig,
    bpf: Option<&Bpf>,
    drawn: Discriminator,
) -> Result<(Memory, Vec<Orphan>, Discriminator), HealthError> {
    let mut memory = match bpf {
        Some(bpf) => Memory::Pinned(Box::new(bpf.take_sessions().ok_or(HealthError::InUse)?)),
        None => Memory::Local(LocalSessions::new()),
    };
    let orphans = match adopt::adopt(config, memory.sessions_mut()) {
        Ok(orphans) => orphans,
        Err(error) => {
            give_back(bpf, Some(memory));
            return Err(error);
        }
    };
    let node = memory.sessions().node();
    let own = Discriminator::new(node.discriminator.load() as u32).unwrap_or(drawn);
    node.discriminator.store(own.get().into());
    node.state.store(State::Up.bits().into());
    Ok((memory, orphans, own))
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
        let netlink = Netlink::open().map_err(system("open a netlink socket"))?;
        let drawn = random::discriminator().map_err(system("draw a discriminator"))?;
        let kit = Kit::new().map_err(system("set up the prober"))?;
        let thread = WaitingThread::spawn().map_err(system("start the prober"))?;
        let counters = bpf.as_ref().map(|bpf| bpf.counter_reader()).transpose()?;
        let (memory, orphans, discriminator) = take_memory(&config, bpf.as_deref(), drawn)?;
        // From here on an error must give the memory back.
        let (requests, receiver) = mpsc::channel();
        let (prober, commands) = Prober::new(
            kit,
            memory,
            counters,
            config.timing,
            events.clone(),
            requests.clone(),
        );
        let mut peers = Self {
            config,
            bpf,
            netlink,
            links: BTreeMap::new(),
            known: HashMap::new(),
            orphans,
            entered: 0,
            commands: commands.clone(),
            prober: None,
            discriminator: discriminator.get(),
            events,
            foreign: HashMap::new(),
            broken: BTreeSet::new(),
            uncounted: Arc::default(),
        };
        if let Err(error) = peers.make_first_links() {
            peers.give_up(prober.into_memory());
            return Err(error);
        }
        let drops = prober.drops();
        let (handle, realtime) = match thread.run(prober) {
            Ok(running) => running,
            Err(prober) => {
                peers.give_up(prober.into_memory());
                return Err(HealthError::Closed);
            }
        };
        peers.prober = Some(handle);
        let started = Started {
            requests,
            commands,
            discriminator,
            realtime,
            drops,
            uncounted: Arc::clone(&peers.uncounted),
        };
        Ok((peers, receiver, started))
    }

    /// Removes underlay entries of peers that have no session any more.
    pub(super) fn forget_strays(&self) {
        let Some(bpf) = &self.bpf else { return };
        for peer in bpf.peers() {
            if !self.is_known(peer)
                && let Err(error) = bpf.remove_peer(peer)
            {
                tracing::warn!(%error, peer.ip = %peer, "a peer of an earlier agent stays");
            }
        }
    }

    /// Removes what was made, after a failure. What an earlier agent left stays.
    fn give_up(&mut self, memory: Memory) {
        self.links.retain(|_, link| !link.adopted);
        if let Err(error) = self.remove_links() {
            tracing::error!(%error, "a probe link that could not be completed stays");
        }
        give_back(self.bpf.as_deref(), Some(memory));
    }
}
