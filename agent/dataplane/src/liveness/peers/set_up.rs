//! How the two threads begin: the memory of the sessions, the links and what hangs on them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
        surroundings::Memory,
    },
    Peers, Request, Started, adopt, give_back,
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
        let system = |action| move |source| HealthError::System { action, source };
        let drawn = random::discriminator().map_err(system("draw a discriminator"))?;
        let kit = Kit::new().map_err(system("set up the prober"))?;
        // Without a prober, as after any error below, it ends at once.
        let (hand, handed) = mpsc::sync_channel::<Prober>(1);
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("nsm-prober".to_owned())
            .spawn(move || {
                let prober = handed.recv().ok()?;
                let realtime = prober::set_realtime();
                let _ = tell.send(realtime);
                Some(prober.run())
            })
            .map_err(system("start the prober"))?;

        let counters = bpf.as_ref().map(|bpf| bpf.counter_reader()).transpose()?;
        let mut memory = match &bpf {
            Some(bpf) => Memory::Pinned(Box::new(bpf.take_sessions().ok_or(HealthError::InUse)?)),
            None => Memory::Local(LocalSessions::new()),
        };
        let orphans = match adopt::adopt(&config, memory.sessions_mut()) {
            Ok(orphans) => orphans,
            Err(error) => {
                give_back(bpf.as_deref(), Some(memory));
                return Err(error);
            }
        };
        let node = memory.sessions().node();
        let before = Discriminator::new(node.discriminator.load() as u32);
        let own = before.map_or(drawn, Discriminator::get);
        node.discriminator.store(own.into());
        node.state.store(State::Up.bits().into());
        let (requests, receiver) = mpsc::channel();
        let (prober, commands) = Prober::new(
            kit,
            memory,
            counters,
            config.timing,
            events.clone(),
            requests.clone(),
        );
        let uncounted = Arc::default();

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
            discriminator: own,
            events,
            foreign: HashMap::new(),
            broken: BTreeSet::new(),
            uncounted: Arc::clone(&uncounted),
        };
        let linked = peers.make_first_links().and_then(|()| {
            // Drawn or found, it is not 0.
            Discriminator::new(own).ok_or(HealthError::Closed)
        });
        let discriminator = match linked {
            Ok(discriminator) => discriminator,
            Err(error) => {
                peers.give_up(prober.into_memory());
                return Err(error);
            }
        };
        let drops = prober.drops();
        if let Err(mpsc::SendError(prober)) = hand.send(prober) {
            peers.give_up(prober.into_memory());
            return Err(HealthError::Closed);
        }
        peers.prober = Some(thread);
        let realtime = match told.recv() {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::info!(%error, "the prober has no real-time priority: probes of a busy node come late");
                false
            }
            Err(_) => false,
        };
        let started = Started {
            requests,
            commands,
            discriminator,
            realtime,
            drops,
            uncounted,
        };
        Ok((peers, receiver, started))
    }

    /// Underlay entries of peers that have no session any more.
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

    /// Removes what was made, after a failure that is the error to tell. What an earlier agent left stays.
    fn give_up(&mut self, memory: Memory) {
        self.links.retain(|_, link| !link.adopted);
        if let Err(error) = self.remove_links() {
            tracing::error!(%error, "a management link that could not be completed stays");
        }
        give_back(self.bpf.as_deref(), Some(memory));
    }
}
