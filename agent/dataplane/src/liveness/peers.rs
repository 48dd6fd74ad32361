//! The thread of the peers: the users of each path, and its entries in the kernel.
//!
//! All system calls that may block are made here, one request after the other: probe links, hooks, the ways of probes, the entries of the
//! underlay programs. The prober's thread gets the results as commands.
//!
//! # Sessions and claims
//!
//! A session belongs to a [`PathId`]: address, port, probe VNI and discriminator, all as the peer stated them. A peer that states one
//! of them differently gets another session, and the existing ones stay: what one domain states about the address of another is
//! probed, not believed. Nothing is ever replaced, so nothing has to be restored when a Request fails. A peer that has restarted is
//! proved at once under its new discriminator; the session of the old one is down after its detection time, and ends when the
//! connections that used it have asked again or are gone. Two nodes behind one address, on different ports, are two peers.
//!
//! [`members`] enters and removes paths, [`answer_path`] chooses on which of several paths a node's own probes are answered.

mod adopt;
mod answer_path;
mod links;
mod look;
mod members;
mod routes;
mod set_up;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Instant,
};

use nsm_core::liveness::{PathId, sbfd::Discriminator};
use nsm_ebpf_common::sbfd::frame::{SPEAKER, mac};
use tokio::sync::mpsc as tokio_mpsc;

use super::{
    Event, FOREIGN_INTERVAL, HealthConfig, HealthError, LINGER, Uncounted,
    preflight::PeerCell,
    prober::{Command, Commands},
    request::Request,
};
use crate::{
    bpf::{Bpf, PinnedSessions},
    forward::TunnelDevices,
    links::{Family, probe_link::ProbeLink},
    netlink::Netlink,
};

pub(super) use self::set_up::start;

/// A health plane that runs.
pub(super) struct Started {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) commands: Commands,
    pub(super) discriminator: Discriminator,
    pub(super) realtime: bool,
    pub(super) uncounted: Arc<Mutex<BTreeMap<IpAddr, Uncounted>>>,
}

/// A path with a session.
struct Known {
    /// The slot of its session.
    slot: u32,
    /// The destination Ethernet address of our probes.
    mac: [u8; 6],
    /// Whether the probes of its node, which come from tag [`SPEAKER`], are counted and answered on this path.
    is_answer_path: bool,
    /// A number that grows with each path that is entered.
    joined: u64,
    users: usize,
    /// When it is removed, while it has no users.
    expires: Option<Instant>,
    cell: Arc<PeerCell>,
}

/// A session of an earlier agent that no connection has joined yet.
struct Orphan {
    address: IpAddr,
    discriminator: u32,
    /// Its path, where the maps still have the way of its probes; otherwise only the address is known.
    at: Option<PathId>,
    slot: u32,
    mac: [u8; 6],
    is_answer_path: bool,
    /// When it is removed.
    expires: Instant,
}

/// A node on one probe link: the Ethernet addresses of all paths to it differ in the tag only.
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

    /// The source Ethernet address of its own probes, and the destination of their answers.
    const fn mac(self) -> [u8; 6] {
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

    /// Whether this is the session of a path. The same address with another port or VNI is another path.
    fn is(&self, spec: &PathId) -> bool {
        match self.at {
            Some(at) => at == *spec,
            None => {
                self.address == spec.address
                    && self.discriminator == spec.reflector.discriminator.get()
            }
        }
    }

    /// Whether its node's probes are answered on it. It is not probed, so this is assumed.
    const fn answers(&self) -> bool {
        self.is_answer_path && self.at.is_some()
    }
}

struct Peers {
    config: HealthConfig,
    devices: Arc<TunnelDevices>,
    netlink: Netlink,
    links: BTreeMap<Family, ProbeLink>,
    known: HashMap<PathId, Known>,
    orphans: Vec<Orphan>,
    /// How many paths were entered so far.
    entered: u64,
    commands: Commands,
    prober: Option<thread::JoinHandle<Option<Box<PinnedSessions>>>>,
    discriminator: u32,
    events: tokio_mpsc::UnboundedSender<Event>,
    /// Packets of foreign VNIs that were reported.
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
                    self.stop_and_give_back();
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
                self.choose_answer_paths();
                self.report_foreign();
                self.look_at_uncounted();
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
            Request::Choose(peer) => self.choose_or_log(NodeOnLink::of(&peer)),
            Request::Check(peer) => self.look(peer),
            Request::Abandon | Request::Close { .. } => {}
        }
    }

    fn report_foreign(&mut self) {
        let found = match self.bpf().foreign_vnis() {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, "cannot look for foreign VNIs");
                return;
            }
        };
        let mut reported = HashMap::with_capacity(found.len());
        for foreign in found {
            let key = (foreign.vni, foreign.peer);
            let before = self.foreign.get(&key).copied().unwrap_or(0);
            reported.insert(key, foreign.packets);
            if foreign.packets != before {
                // Without a receiver there is nothing to report.
                let _ = self.events.send(Event::ForeignVni(foreign));
            }
        }
        self.foreign = reported;
    }

    fn bpf(&self) -> &Bpf {
        self.devices.bpf()
    }

    /// Ends the prober's thread, and returns the sessions to their owner, for the next health plane.
    fn stop_and_give_back(&mut self) {
        self.commands.send(Command::Stop);
        let ended = self.prober.take().and_then(|prober| prober.join().ok());
        if let Some(sessions) = ended.flatten() {
            self.bpf().return_sessions(*sessions);
        }
    }

    fn close(&mut self) -> Result<(), HealthError> {
        let specs: Vec<PathId> = self.known.keys().copied().collect();
        for spec in specs {
            self.forget(spec);
        }
        for orphan in std::mem::take(&mut self.orphans) {
            self.forget_orphan(&orphan);
        }
        let removed = self.remove_links();
        self.stop_and_give_back();
        removed
    }
}
