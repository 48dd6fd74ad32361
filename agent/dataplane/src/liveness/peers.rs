//! The thread that keeps the peers: who uses them, and what the kernel must know of them.
//!
//! Whatever may wait in the kernel is done here, one request after the other: management links, their forwarding entries, the
//! hooks, the entries of the underlay programs. The prober's thread is told when it is done.
//!
//! # Whose session is it?
//!
//! A session belongs to what a peer told of itself, all of it: address, port, management VNI, discriminator ([`PathId`]). Who
//! names any of these otherwise gets a session of its own beside those that stand, and takes nobody's away: what one domain says
//! of another's address is not believed, but probed. Nothing is ever replaced, so there is nothing to restore when a Request fails.
//! A peer that has started anew is proved at once under its new discriminator; the session of the old one is down after its
//! detection time, and ends when those who used it have asked again or are gone. Two nodes behind one address, told apart
//! by their ports, are two peers.
//!
//! The rest is in [`ways`] (how a peer is entered, and leaves) and [`speaker`] (on which of several ways a node's own probes are
//! answered).

mod adopt;
mod links;
mod look;
mod set_up;
mod speaker;
mod ways;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Instant,
};

use nsm_core::{
    liveness::{PathId, sbfd::Discriminator},
    net::MacAddr,
};
use nsm_ebpf_common::sbfd::frame::{SPEAKER, mac};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::{
    Event, FOREIGN_INTERVAL, Health, HealthConfig, HealthError, LINGER, Peer, Report, Uncounted,
    preflight::PeerCell,
    prober::{Command, Commands},
    surroundings::{Drops, Memory},
};
use crate::{
    bpf::Bpf,
    links::{
        Family,
        management::{Forwarding, ManagementLink},
    },
    netlink::Netlink,
};

pub(super) use self::set_up::start;

/// What is asked of this thread.
pub(super) enum Request {
    /// Use a peer.
    Join {
        peer: PathId,
        health: Health,
        reply: oneshot::Sender<Result<Peer, HealthError>>,
    },
    /// Use it no more.
    Leave(PathId),
    /// Report on one peer or all.
    Reports {
        peer: Option<PathId>,
        reply: oneshot::Sender<Vec<Report>>,
    },
    /// A peer's probes begin to be answered or not: look which way to its node is the best now.
    Choose(PathId),
    /// The counts of a peer's stages seem to say something: look whether they can be believed.
    Look(PathId),
    /// The last handle is gone, without a word: end, and leave everything for the next agent.
    Abandon,
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
    pub(super) uncounted: Arc<Mutex<BTreeMap<IpAddr, Uncounted>>>,
}

/// A peer that is watched.
struct Known {
    /// Where its session is.
    slot: u32,
    /// The Ethernet address that our probes to it have.
    mac: [u8; 6],
    /// Whether the probes of its node, which come from [`SPEAKER`], are booked here and answered where it is.
    speaks: bool,
    /// Larger than that of all that were joined before.
    joined: u64,
    users: usize,
    /// When it is forgotten, while nobody uses it.
    expires: Option<Instant>,
    cell: Arc<PeerCell>,
}

/// An earlier agent's, that nobody has joined yet.
struct Orphan {
    address: IpAddr,
    discriminator: u32,
    /// All that it was reached by, where the link still has its forwarding entry; else only the address is known.
    at: Option<PathId>,
    slot: u32,
    mac: [u8; 6],
    speaks: bool,
    /// When it is forgotten.
    expires: Instant,
}

/// A node as one link knows it: all ways to it have Ethernet addresses that differ in the tag only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct NodeOnLink {
    discriminator: u32,
    family: Family,
}

impl NodeOnLink {
    const fn of(spec: &PathId) -> Self {
        Self {
            discriminator: spec.reflector.discriminator.get(),
            family: Family::of(spec.address),
        }
    }

    /// The Ethernet address that its own probes come from, and their answers go to.
    const fn speaker(self) -> [u8; 6] {
        mac(SPEAKER, self.discriminator)
    }
}

impl Orphan {
    const fn node(&self) -> NodeOnLink {
        NodeOnLink {
            discriminator: self.discriminator,
            family: Family::of(self.address),
        }
    }

    /// Whether it is what a peer tells of itself. Who names an address with another port or VNI is somebody else.
    fn is(&self, spec: &PathId) -> bool {
        match self.at {
            Some(at) => at == *spec,
            None => {
                self.address == spec.address
                    && self.discriminator == spec.reflector.discriminator.get()
            }
        }
    }

    /// Whether its node's probes are answered on it, as far as can be known: nobody probes it.
    const fn answers(&self) -> bool {
        self.speaks && self.at.is_some()
    }
}

struct Peers {
    config: HealthConfig,
    bpf: Option<Arc<Bpf>>,
    netlink: Netlink,
    links: BTreeMap<Family, ManagementLink>,
    known: HashMap<PathId, Known>,
    orphans: Vec<Orphan>,
    /// How often a peer was entered.
    entered: u64,
    commands: Commands,
    prober: Option<thread::JoinHandle<Option<Memory>>>,
    discriminator: u32,
    events: tokio_mpsc::UnboundedSender<Event>,
    /// Packets of foreign VNIs that were told.
    foreign: HashMap<(u32, IpAddr), u64>,
    /// Links that are gone and could not be made again yet.
    broken: BTreeSet<Family>,
    uncounted: Arc<Mutex<BTreeMap<IpAddr, Uncounted>>>,
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
                Ok(Request::Abandon) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let memory = self.stop();
                    give_back(self.bpf.as_deref(), memory);
                    return;
                }
                Ok(request) => self.handle(request),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            if now >= next {
                next = now + FOREIGN_INTERVAL;
                self.mend_links();
                self.forget_expired(now);
                self.choose_speakers();
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
                self.join(peer.canonical(), health, reply);
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
            Request::Choose(peer) => self.choose_or_tell(NodeOnLink::of(&peer)),
            Request::Look(peer) => self.look(peer),
            Request::Abandon | Request::Close { .. } => {}
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
        let specs: Vec<PathId> = self.known.keys().copied().collect();
        for spec in specs {
            self.forget(spec);
        }
        for orphan in std::mem::take(&mut self.orphans) {
            self.forget_orphan(&orphan);
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

const fn forwarding(mac: [u8; 6], spec: PathId) -> Forwarding {
    Forwarding {
        mac: MacAddr::new(mac),
        remote: spec.address,
        port: spec.port,
        vni: spec.reflector.vni,
    }
}
