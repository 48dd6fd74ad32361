//! The prober's thread: one loop that sends, reads stamps, and sleeps until the next deadline.
//!
//! Deadlines are rounded up to [`GRAIN`], so that the sessions of many peers share wake-ups: the cost of a node grows with its
//! peers and not by a wake-up a probe. An answer wakes the thread only while a proof waits for it.

use std::{
    collections::HashMap,
    io,
    os::fd::AsFd as _,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};
use nsm_core::{
    clock::Monotonic,
    liveness::{
        Look, PathId,
        sbfd::{Proof, Seq, Timing},
    },
};
use nsm_ebpf_common::{
    management::MAX_SESSIONS,
    sbfd::{
        SOURCE_PORT_MIN, State,
        frame::{SPEAKER, mac, session_key},
    },
};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::{
    Event, HealthError, Report,
    random::{self, Jitter},
    request::Request,
    session::{Entry, Names, PeerSession},
    socket::PacketSocket,
    surroundings::{Sockets, Surroundings, now_ns},
};
use crate::{
    bpf::{CounterReader, PinnedSessions, Sessions as _},
    links::Family,
};

/// The grid of wake-ups. It delays a verdict by as much at most.
const GRAIN: Duration = Duration::from_millis(2);

/// The longest sleep: a bound on the effect of a wrong deadline.
const MAX_SLEEP: Duration = Duration::from_secs(1);

/// The largest frame that is sent or received.
const MAX_FRAME: usize = 16 * 1024;

/// Frames that are read from a link in one turn: a flood must not keep probes from leaving.
const FRAMES_A_TURN: usize = 128;

/// How long the thread sleeps after as many: at its priority it would take the whole processor. Packets of the flood that do not fit
/// the queue meanwhile are lost.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

/// Real-time priority: above all threads without one, below the kernel's own (50).
const PRIORITY: libc::c_int = 10;

/// A command to the prober's thread.
pub(super) enum Command {
    /// Use this socket on the probe link of a family, which has this index.
    Link(Family, u32, PacketSocket),
    /// Probe a path; the reply is its slot.
    Enter(Box<Entry>, mpsc::SyncSender<Result<u32, HealthError>>),
    /// Send the probes of a slot's session to another Ethernet address of the same node. The index entry of the old one stays.
    Rename {
        slot: u32,
        mac: [u8; 6],
        reply: mpsc::SyncSender<Result<(), HealthError>>,
    },
    /// Count packets from an Ethernet address, given as [`session_key`], to a slot's session.
    IndexSession {
        key: u64,
        slot: u32,
        reply: mpsc::SyncSender<Result<(), HealthError>>,
    },
    /// End the session of a slot.
    Forget(u32),
    /// Prove a path.
    Prove(PathId, oneshot::Sender<Proof>),
    /// Search a path's MTU.
    WantMtu {
        peer: PathId,
        smallest: u16,
        wanted: u16,
    },
    /// The result of a check of a path's routes and hooks.
    Checked(PathId, Look),
    /// Report on one path or all, with the number of users of each.
    Reports {
        peer: Option<PathId>,
        users: HashMap<PathId, usize>,
        reply: oneshot::Sender<Vec<Report>>,
    },
    /// The state in the reflector's answers.
    State(State, oneshot::Sender<()>),
    /// End.
    Stop,
}

/// The sender of commands.
#[derive(Debug, Clone)]
pub(super) struct Commands {
    sender: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    /// False: the thread has ended.
    pub(super) fn send(&self, command: Command) -> bool {
        let sent = self.sender.send(command).is_ok();
        // A full counter wakes the thread, too.
        let _ = self.wake.write(1);
        sent
    }
}

/// System resources of a prober.
pub(super) struct Kit {
    wake: Arc<EventFd>,
    jitter: Jitter,
}

impl Kit {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            wake: Arc::new(EventFd::from_value_and_flags(0, flags)?),
            jitter: Jitter::new(random::number()?),
        })
    }
}

/// The thread's state.
pub(super) struct Prober {
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    sessions: Box<PinnedSessions>,
    /// A reader of its own: the shared one is locked while a program is being attached.
    counters: CounterReader,
    requests: mpsc::Sender<Request>,
    sockets: Sockets,
    peers: HashMap<PathId, PeerSession>,
    timing: Timing,
    jitter: Jitter,
    events: tokio_mpsc::UnboundedSender<Event>,
    frame: Vec<u8>,
    free: Vec<u32>,
}

impl Prober {
    /// A prober that does not run yet, and the sender of its commands. This cannot fail, so the memory is never lost.
    pub(super) fn new(
        kit: Kit,
        sessions: Box<PinnedSessions>,
        counters: CounterReader,
        timing: Timing,
        events: tokio_mpsc::UnboundedSender<Event>,
        requests: mpsc::Sender<Request>,
    ) -> (Self, Commands) {
        let Kit { wake, jitter } = kit;
        let (sender, commands) = mpsc::channel();
        let is_free = |slot: &u32| sessions.slot(*slot).peer_discriminator.load() == 0;
        let free = (0..MAX_SESSIONS).rev().filter(is_free).collect();
        let prober = Self {
            commands,
            wake: wake.clone(),
            sessions,
            counters,
            requests,
            sockets: Sockets::default(),
            peers: HashMap::new(),
            timing,
            jitter,
            events,
            frame: vec![0; MAX_FRAME],
            free,
        };
        (prober, Commands { sender, wake })
    }

    /// The sessions of a prober that never ran.
    pub(super) fn into_sessions(self) -> Box<PinnedSessions> {
        self.sessions
    }

    /// Runs until [`Command::Stop`] or until all senders are gone; gives back the sessions.
    pub(super) fn run(mut self) -> Box<PinnedSessions> {
        let mut ready = true;
        loop {
            let received = if ready { self.receive() } else { 0 };
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                        return self.sessions;
                    }
                    Ok(command) => self.handle(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                }
            }
            let now = Monotonic::from_nanos(now_ns());
            self.turn(now, received > 0);
            if received >= FRAMES_A_TURN {
                thread::sleep(FLOOD_PAUSE);
            }
            ready = self.sleep();
        }
    }

    /// Runs the sessions that are due; after a frame, all that wait for an answer, too.
    fn turn(&mut self, now: Monotonic, woken: bool) {
        let (mut around, peers) = self.parts();
        for peer in peers.values_mut() {
            let waits = || around.sessions.slot(peer.slot).wake.load() != 0;
            if peer.due <= now || woken && waits() {
                peer.turn(now, &mut around);
            }
        }
    }

    /// The sessions, and what their turns need.
    fn parts(&mut self) -> (Surroundings<'_>, &mut HashMap<PathId, PeerSession>) {
        let around = Surroundings {
            sessions: &*self.sessions,
            jitter: &mut self.jitter,
            events: &self.events,
            sockets: &self.sockets,
            counters: &self.counters,
            requests: &self.requests,
            frame: &mut self.frame,
        };
        (around, &mut self.peers)
    }

    /// Sleeps until a session is due, or a command or frame has arrived; true for a frame.
    fn sleep(&self) -> bool {
        let now_ns = now_ns();
        let grain = GRAIN.as_nanos() as u64;
        let due = self.peers.values().map(|peer| peer.due).min();
        let until = due.map_or(u64::MAX, |due| {
            due.as_nanos().div_ceil(grain).saturating_mul(grain)
        });
        let sleep = Duration::from_nanos(until.saturating_sub(now_ns)).min(MAX_SLEEP);
        let readable = PollFlags::POLLIN;
        let mut fds = vec![PollFd::new(self.wake.as_fd(), readable)];
        fds.extend(
            self.sockets
                .all()
                .map(|socket| PollFd::new(socket.as_fd(), readable)),
        );
        // After an error the loop runs once more.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(sleep)), None);
        if fds[0].any() == Some(true) {
            let _ = self.wake.read();
        }
        fds[1..].iter().any(|fd| fd.any() == Some(true))
    }

    /// Receives frames: how many. The programs have processed them already.
    fn receive(&mut self) -> usize {
        let mut received = 0;
        for socket in self.sockets.all() {
            for _ in 0..FRAMES_A_TURN {
                if !socket.receive(&mut self.frame) {
                    break;
                }
                received += 1;
            }
        }
        received
    }

    fn handle(&mut self, command: Command) {
        let now = Monotonic::from_nanos(now_ns());
        match command {
            Command::Stop => {}
            Command::Link(family, index, socket) => self.use_link(family, index, socket),
            Command::Enter(entry, reply) => {
                // The channel has room, and the caller waits.
                let _ = reply.send(self.enter(*entry, now));
            }
            Command::Rename { slot, mac, reply } => {
                let _ = reply.send(self.rename(slot, mac));
            }
            Command::IndexSession { key, slot, reply } => {
                let _ = reply.send(self.index_session(key, slot));
            }
            Command::Forget(slot) => self.forget(slot),
            Command::Prove(peer, reply) => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.prove(reply, now);
                }
            }
            Command::WantMtu {
                peer,
                smallest,
                wanted,
            } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.want_mtu(smallest, wanted, now);
                }
            }
            Command::Checked(peer, found) => {
                let (around, peers) = self.parts();
                if let Some(peer) = peers.get_mut(&peer) {
                    peer.handle_look(found, &around);
                }
            }
            Command::Reports { peer, users, reply } => {
                let _ = reply.send(self.reports(peer, &users, now));
            }
            Command::State(state, reply) => {
                let node = self.sessions.node();
                node.state.store(u64::from(state.bits()));
                let _ = reply.send(());
            }
        }
    }

    /// The programs hand answers to the link, on which the socket receives them.
    fn use_link(&mut self, family: Family, index: u32, socket: PacketSocket) {
        let [v4, v6] = &self.sessions.node().links;
        let (link, place) = match family {
            Family::V4 => (v4, &mut self.sockets.v4),
            Family::V6 => (v6, &mut self.sockets.v6),
        };
        *place = Some(socket);
        link.store(index.into());
    }

    /// After an error nothing has changed.
    fn enter(&mut self, entry: Entry, now: Monotonic) -> Result<u32, HealthError> {
        let spec = entry.spec;
        let system = |source| HealthError::System {
            action: "draw a discriminator",
            source,
        };
        let drawn = random::number().map_err(system)?;
        let local = random::discriminator().map_err(system)?.get();
        let first = Seq::from_low_bits(random::number().map_err(system)? as u32);
        let sessions = &mut *self.sessions;
        let node = sessions.node().discriminator.load() as u32;
        let adopted = entry.slot;
        let slot = match adopted {
            Some(slot) => slot,
            None => self
                .free
                .pop()
                .ok_or(HealthError::TooManyPeers { peer: spec.address })?,
        };
        let session = sessions.slot(slot);
        let kept = adopted.and_then(|_| Names::read(node, &entry, session));
        // The numbers go on where an earlier agent ended: repeated ones are no evidence to the peer.
        let last = kept.and_then(|_| session.last_sequence());
        let first = last.map_or(first, |last| Seq::from_low_bits(last + 1));
        let names = kept.unwrap_or_else(|| {
            let ports = u64::from(u16::MAX - SOURCE_PORT_MIN) + 1;
            let names = Names {
                node,
                local,
                source_port: SOURCE_PORT_MIN + (drawn % ports) as u16,
            };
            names.write(&entry, session);
            names
        });
        if adopted.is_none()
            && let Err(error) = sessions.index(entry.key(), slot)
        {
            sessions.slot(slot).clear();
            self.free.push(slot);
            return Err(error.into());
        }
        let mut session = PeerSession::new(entry, slot, names, self.timing, first, now);
        let (around, peers) = self.parts();
        session.begin(&around);
        peers.insert(spec, session);
        self.note_neighbours(spec);
        Ok(slot)
    }

    fn index_session(&mut self, key: u64, slot: u32) -> Result<(), HealthError> {
        self.sessions.index(key, slot)?;
        for peer in self.peers.values_mut() {
            let speaker = mac(SPEAKER, peer.entry.spec.reflector.discriminator.get());
            if session_key(peer.is_v4(), speaker) == key {
                peer.set_answer_path(peer.slot == slot);
            }
        }
        Ok(())
    }

    fn rename(&mut self, slot: u32, mac: [u8; 6]) -> Result<(), HealthError> {
        let peer = self.peers.values_mut().find(|peer| peer.slot == slot);
        if let Some(peer) = peer {
            let key = session_key(peer.is_v4(), mac);
            self.sessions.index(key, slot)?;
            peer.rename(mac);
        }
        Ok(())
    }

    fn forget(&mut self, slot: u32) {
        let gone: Vec<PathId> = self
            .peers
            .extract_if(|_, peer| peer.slot == slot)
            .map(|(spec, peer)| {
                peer.entry.cell.clear();
                spec
            })
            .collect();
        for spec in gone {
            self.note_neighbours(spec);
        }
        let sessions = &mut *self.sessions;
        // Neither cleared nor free while the index may have it: the next session there would be found under both.
        let indexed = match sessions.indexed() {
            Ok(indexed) => indexed,
            Err(error) => {
                tracing::warn!(%error, "the session with a peer stays");
                return;
            }
        };
        for (key, _) in indexed.into_iter().filter(|(_, led)| *led == slot) {
            if let Err(error) = sessions.forget(key) {
                tracing::warn!(%error, "the session with a peer stays");
                return;
            }
        }
        sessions.slot(slot).clear();
        self.free.push(slot);
    }

    /// Notes which paths share an address, and which share a node. The card counts by address: where several paths have one, its count
    /// is no evidence on any of them.
    fn note_neighbours(&mut self, of: PathId) {
        let here = |spec: &PathId| spec.address == of.address;
        let node = |spec: &PathId| {
            spec.reflector.discriminator == of.reflector.discriminator
                && spec.address.is_ipv4() == of.address.is_ipv4()
        };
        let at_address = self.peers.keys().filter(|spec| here(spec)).count();
        let of_node = self.peers.keys().filter(|spec| node(spec)).count();
        for (spec, peer) in &mut self.peers {
            if here(spec) {
                peer.share_card(at_address > 1);
            }
            if node(spec) {
                peer.note_siblings(of_node > 1);
            }
        }
    }

    fn reports(
        &mut self,
        peer: Option<PathId>,
        users: &HashMap<PathId, usize>,
        now: Monotonic,
    ) -> Vec<Report> {
        let (around, peers) = self.parts();
        let mut reports: Vec<Report> = peers
            .iter()
            .filter(|(spec, _)| peer.is_none_or(|peer| peer == **spec))
            .map(|(spec, peer)| Report {
                users: users.get(spec).copied().unwrap_or(0),
                ..peer.report(now, &around)
            })
            .collect();
        reports.sort_by_key(|report| report.path);
        reports
    }
}

/// Gives the calling thread real-time priority; children that it starts have none.
pub(super) fn set_realtime() -> io::Result<()> {
    let parameters = libc::sched_param {
        sched_priority: PRIORITY,
    };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: reads the parameters; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
