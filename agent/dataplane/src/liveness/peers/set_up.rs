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
    },
    Orphan, Peers, Started, adopt,
};
use crate::{
    bpf::{Bpf, PinnedSessions, Sessions as _},
    forward::TunnelDevices,
    netlink::Netlink,
};

/// Starts both threads.
pub(in crate::liveness) fn start(
    config: HealthConfig,
    devices: Arc<TunnelDevices>,
    events: tokio_mpsc::UnboundedSender<Event>,
) -> Result<Started, HealthError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let spawned = thread::Builder::new()
        .name("nsm-peers".to_owned())
        .spawn(move || match Peers::set_up(config, devices, events) {
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

/// A prober's thread, which gives back the sessions.
type SessionsThread = thread::JoinHandle<Option<Box<PinnedSessions>>>;

/// The prober's thread before it has a prober. It ends without one when this is dropped.
struct WaitingThread {
    prober: mpsc::SyncSender<Prober>,
    realtime: mpsc::Receiver<io::Result<()>>,
    handle: SessionsThread,
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
    fn run(self, prober: Prober) -> Result<(SessionsThread, bool), Box<Prober>> {
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

/// The sessions, with this node's discriminator: the one that an earlier agent left, or `drawn`.
fn take_sessions(
    config: &HealthConfig,
    bpf: &Bpf,
    drawn: Discriminator,
) -> Result<(Box<PinnedSessions>, Vec<Orphan>, Discriminator), HealthError> {
    let mut sessions = bpf.take_sessions().ok_or(HealthError::InUse)?;
    let orphans = match adopt::adopt(config, &mut sessions) {
        Ok(orphans) => orphans,
        Err(error) => {
            bpf.return_sessions(sessions);
            return Err(error);
        }
    };
    let node = sessions.node();
    let own = Discriminator::new(node.discriminator.load() as u32).unwrap_or(drawn);
    node.discriminator.store(own.get().into());
    node.state.store(State::Up.bits().into());
    Ok((Box::new(sessions), orphans, own))
}

impl Peers {
    fn set_up(
        config: HealthConfig,
        devices: Arc<TunnelDevices>,
        events: tokio_mpsc::UnboundedSender<Event>,
    ) -> Result<(Self, mpsc::Receiver<Request>, Started), HealthError> {
        if let Some(node) = &config.namespace {
            node.enter()?;
        }
        let netlink = Netlink::open().map_err(system("open a netlink socket"))?;
        let drawn = random::discriminator().map_err(system("draw a discriminator"))?;
        let kit = Kit::new().map_err(system("set up the prober"))?;
        let thread = WaitingThread::spawn().map_err(system("start the prober"))?;
        let counters = devices.bpf().counter_reader()?;
        let (sessions, orphans, discriminator) = take_sessions(&config, devices.bpf(), drawn)?;
        // From here on an error must give the sessions back.
        let (requests, receiver) = mpsc::channel();
        let (prober, commands) = Prober::new(
            kit,
            sessions,
            counters,
            config.timing,
            events.clone(),
            requests.clone(),
        );
        let mut peers = Self {
            config,
            devices,
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
            peers.give_up(prober.into_sessions());
            return Err(error);
        }
        let (handle, realtime) = match thread.run(prober) {
            Ok(running) => running,
            Err(prober) => {
                peers.give_up(prober.into_sessions());
                return Err(HealthError::Closed);
            }
        };
        peers.prober = Some(handle);
        let started = Started {
            requests,
            commands,
            discriminator,
            realtime,
            uncounted: Arc::clone(&peers.uncounted),
        };
        Ok((peers, receiver, started))
    }

    /// Removes underlay entries of peers that have no session any more.
    pub(super) fn forget_strays(&self) {
        for peer in self.bpf().peers() {
            if !self.is_known(peer)
                && let Err(error) = self.bpf().remove_peer(peer)
            {
                tracing::warn!(%error, peer.ip = %peer, "a peer of an earlier agent stays");
            }
        }
    }

    /// Removes what was made, after a failure. What an earlier agent left stays.
    fn give_up(&mut self, sessions: Box<PinnedSessions>) {
        self.links.retain(|_, link| !link.adopted);
        if let Err(error) = self.remove_links() {
            tracing::error!(%error, "a probe link that could not be completed stays");
        }
        self.bpf().return_sessions(*sessions);
    }
}
