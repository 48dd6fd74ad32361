//! The health plane of a node: whether each path to a peer works now.
//!
//! [`Health`] keeps one S-BFD session (RFC 7880) for each path ([`PathId`]), whatever the number of its connections, and answers the
//! peers' own probes. Probes are sent on the probe link, whose program puts them into the probe VNI (RFC 8971) of the external device: the
//! same device, port, firewalls, NAT and underlay as data, in both directions.
//!
//! The plane has two threads, so that neither the agent's runtime nor a slow system call delays a probe:
//!
//! - `nsm-prober` sends, reads the stamps, and runs the sessions' machines ([`nsm_core::liveness::sbfd`]), at real-time priority where
//!   that is allowed. It blocks only until its next deadline.
//! - `nsm-peers` makes the system calls that may block: links, BPF maps.
//!
//! Reflector and stamps are BPF programs. They work on after the end of the agent, also after `kill -9`, and the next agent adopts
//! discriminator, sessions and stamps.
//!
//! [`Paths`] lets the connections of the node use the plane: it counts the users of each path, judges it, and reports what changes.
//!
//! Failures: a path that cannot be watched is an error of [`Health::join`]. The state of a session is reported by [`Event`]s and
//! [`Report`]s, never as an error.
//!
//! Cancellation and time: a dropped future of [`Health`] or [`Peer`] leaves nothing behind. A request that was sent is carried out, and
//! a [`Peer`] without a receiver leaves its path at once. The calls have no timeout of their own. Those to `nsm-peers` wait for its
//! system calls, some 30 ms each at most; [`Peer::prove`] waits for probes, 0.6 s on a silent path.

mod error;
mod leftover;
mod paths;
mod peers;
mod preflight;
mod prober;
mod random;
mod request;
mod session;
mod socket;
mod surroundings;

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use nsm_core::{
    liveness::{
        PathId, Stages,
        sbfd::{Change, Discriminator, Proof, Snapshot, Statistics, Timing},
    },
    net::Vni,
};
use nsm_ebpf_common::sbfd::State;
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

pub use self::{error::HealthError, paths::Paths, preflight::Preflights};
use self::{
    preflight::PeerCell,
    prober::{Command, Commands},
    request::Request,
};
use crate::{
    bpf::{Bpf, ForeignVni},
    forward::TunnelDevices,
    netns::Netns,
};

/// The configuration of a health plane.
#[derive(Debug, Clone)]
pub struct HealthConfig {
    /// The agent's domain: it marks the probe links as ours.
    pub domain: String,
    /// The probe VNI of this node.
    pub vni: Vni,
    /// The UDP port of this node's tunnels.
    pub port: u16,
    /// The address that tunnels leave from; `None`: each by its route.
    pub local: Option<IpAddr>,
    /// The pace of the sessions.
    pub timing: Timing,
    /// The node's network namespace; `None`: that of the calling thread.
    pub namespace: Option<Netns>,
    /// How long a session of an earlier agent is kept for connections that return.
    pub orphan_grace: Duration,
}

/// The state and counters of one session.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The path.
    pub path: PathId,
    /// Connections that use the session.
    pub users: usize,
    /// The session.
    pub snapshot: Snapshot,
    /// Its last minute.
    pub statistics: Statistics,
    /// Our probes that left since the session began.
    pub probes: u64,
    /// The answers to them.
    pub answers: u64,
    /// The peer's probes that we answered.
    pub reflected: u64,
    /// How long the last of those answers took on this node. `None`: there was none.
    pub reflection: Option<Duration>,
    /// Whether the peer's reflector works on without its agent (the C flag of its last answer); `None`: no answer yet.
    pub peer_is_independent: Option<bool>,
    /// Packets of the path at each stage of this node since the session began. Probe link and card count the same packets; the
    /// difference was lost on this node.
    pub stages: Stages,
    /// The same at most 0.1 s and a probe before the session was not up any more; all zero before it was.
    pub stages_when_up: Stages,
    /// The peer's own probes are counted on another path to its node.
    pub peer_probes_elsewhere: bool,
}

impl Report {
    /// The stages since the session was up last.
    #[must_use]
    pub fn stages_since_up(&self) -> Stages {
        self.stages.since(&self.stages_when_up)
    }
}

/// A change that the plane reports.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A session changed.
    Session {
        /// How.
        change: Change,
        /// The peer as it is now.
        report: Box<Report>,
    },
    /// Packets of a foreign VNI arrived from a peer: reported at the first ones, and at each [`FOREIGN_INTERVAL`] in which more arrived.
    ForeignVni(ForeignVni),
}

/// How often foreign VNIs are read from their map.
pub const FOREIGN_INTERVAL: Duration = Duration::from_millis(500);

/// How long a session goes on after its last connection. The two sides of a connection do not close it at the same moment: the later
/// one still needs the other's reflector. A client that comes back within this time needs no new proof.
pub const LINGER: Duration = Duration::from_secs(5);

/// The health plane. A clone is the same; with the last one, and the last [`Peer`], its threads end.
#[derive(Debug, Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    requests: mpsc::Sender<Request>,
    commands: Commands,
    discriminator: Discriminator,
    vni: Vni,
    realtime: bool,
    preflights: preflight::Count,
    uncounted: Arc<Mutex<BTreeMap<IpAddr, Uncounted>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Threads that have ended need no request.
        let _ = self.requests.send(Request::Abandon);
    }
}

/// Packets to a peer leave by an interface where nothing counts them. A loss on this node cannot be distinguished from a later one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uncounted {
    /// The peer's address.
    pub peer: IpAddr,
    /// The interface.
    pub interface: String,
    /// Why the programs are not there.
    pub cause: String,
}

impl fmt::Display for Uncounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            peer,
            interface,
            cause,
        } = self;
        write!(
            f,
            "packets to {peer} leave by `{interface}`, where nothing counts them: {cause}"
        )
    }
}

/// The receiver of a health plane's events.
pub type Events = tokio_mpsc::UnboundedReceiver<Event>;

impl Health {
    /// Makes the external device of [`HealthConfig::port`] and the IPv4 probe link, or the IPv6 one when [`HealthConfig::local`] is such an
    /// address, attaches the programs, and starts the threads.
    ///
    /// Blocks for some 30 ms: the kernel waits for its readers.
    ///
    /// # Errors
    ///
    /// A device, the link or its socket cannot be made, the programs cannot be attached, another health plane uses them.
    pub fn start(
        config: HealthConfig,
        devices: Arc<TunnelDevices>,
    ) -> Result<(Self, Events), HealthError> {
        let vni = config.vni;
        let (events, receiver) = tokio_mpsc::unbounded_channel();
        let started = peers::start(config, devices, events)?;
        let shared = Shared {
            requests: started.requests,
            commands: started.commands,
            discriminator: started.discriminator,
            vni,
            realtime: started.realtime,
            preflights: preflight::Count::default(),
            uncounted: started.uncounted,
        };
        Ok((
            Self {
                shared: Arc::new(shared),
            },
            receiver,
        ))
    }

    /// Removes what an earlier agent's health plane left on a node that is to have none: its reflector would go on answering.
    ///
    /// # Errors
    ///
    /// Something could not be removed; everything else was.
    pub fn remove_left(config: &HealthConfig, bpf: &Bpf) -> Result<(), HealthError> {
        leftover::remove(config, bpf)
    }

    /// The discriminator of this node's reflector, for the peers.
    #[must_use]
    pub fn discriminator(&self) -> Discriminator {
        self.shared.discriminator
    }

    /// The probe VNI of this node, for the peers.
    #[must_use]
    pub fn vni(&self) -> Vni {
        self.shared.vni
    }

    /// Whether the prober has real-time priority (SCHED_FIFO). Without it a busy node's probes come late, which is no false
    /// alarm, but makes detection slower.
    #[must_use]
    pub fn has_realtime(&self) -> bool {
        self.shared.realtime
    }

    /// The counts of proofs by outcome.
    #[must_use]
    pub fn preflights(&self) -> Preflights {
        self.shared.preflights.now()
    }

    /// Peers to which packets leave uncounted, ordered by address. This is found when the counts of a path differ.
    #[must_use]
    pub fn uncounted(&self) -> Vec<Uncounted> {
        let uncounted = self.shared.uncounted.lock();
        let uncounted = uncounted.unwrap_or_else(PoisonError::into_inner);
        uncounted.values().cloned().collect()
    }

    /// Joins the session of a path, which begins with the first join. It ends [`LINGER`] after the last [`Peer`] of it is dropped.
    ///
    /// # Errors
    ///
    /// The address is no host's, the discriminator is this node's own or has as many paths as there are tags, all sessions are in use,
    /// the kernel refuses, the plane was closed.
    pub async fn join(&self, peer: PathId) -> Result<Peer, HealthError> {
        let health = self.clone();
        self.ask(|reply| Request::Join {
            peer,
            health,
            reply,
        })
        .await?
    }

    /// All sessions, ordered by path.
    ///
    /// # Errors
    ///
    /// The plane was closed.
    pub async fn reports(&self) -> Result<Vec<Report>, HealthError> {
        self.ask(|reply| Request::Reports { peer: None, reply })
            .await
    }

    /// Lets the reflector answer AdminDown, so that peers neither probe fast nor count our end as a loss; or Up again.
    ///
    /// # Errors
    ///
    /// The plane was closed.
    pub async fn set_admin_down(&self, down: bool) -> Result<(), HealthError> {
        let state = if down { State::AdminDown } else { State::Up };
        self.command(|reply| Command::State(state, reply)).await
    }

    /// Ends all sessions, removes the probe links, and ends the threads. The external devices stay. Peers whose sessions are up count that as a loss, unless
    /// [`Self::set_admin_down`] was called some time before.
    ///
    /// # Errors
    ///
    /// Something could not be removed; everything else was.
    pub async fn close(&self) -> Result<(), HealthError> {
        match self.ask(|reply| Request::Close { reply }).await {
            Ok(closed) => closed,
            Err(HealthError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, HealthError> {
        let (reply, answer) = oneshot::channel();
        self.shared
            .requests
            .send(request(reply))
            .map_err(|_| HealthError::Closed)?;
        answer.await.map_err(|_| HealthError::Closed)
    }

    /// Asks the prober itself.
    async fn command<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, HealthError> {
        let (reply, answer) = oneshot::channel();
        self.shared.commands.send(command(reply));
        answer.await.map_err(|_| HealthError::Closed)
    }
}

/// One use of a session. Dropped, it leaves.
#[derive(Debug)]
pub struct Peer {
    spec: PathId,
    health: Health,
    cell: Arc<PeerCell>,
    /// The session began with this use, and there was no proof so far: the session's first probes are those of that proof.
    unproved: AtomicBool,
}

impl Peer {
    const fn new(spec: PathId, health: Health, cell: Arc<PeerCell>, begins: bool) -> Self {
        Self {
            spec,
            health,
            cell,
            unproved: AtomicBool::new(begins),
        }
    }

    /// Its path.
    #[must_use]
    pub const fn spec(&self) -> &PathId {
        &self.spec
    }

    /// Whether its session is up, without waiting.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.cell.is_up()
    }

    /// Proves the path: at once when the session is up, else by a few probes, and then at the first answer that is enough.
    ///
    /// # Errors
    ///
    /// The plane was closed, and with it the session.
    pub async fn prove(&self) -> Result<Proof, HealthError> {
        let count = &self.health.shared.preflights;
        let begins = self.unproved.swap(false, Ordering::Relaxed);
        if self.is_up() {
            if begins {
                // The answer arrived before the proof was requested.
                count.add(Proof::Reached, self.cell.answers());
            } else {
                count.add_standing();
            }
            return Ok(Proof::Reached);
        }
        let wait = count.wait();
        let (reply, proof) = oneshot::channel();
        let asked = Command::Prove(self.spec, reply);
        if !self.health.shared.commands.send(asked) {
            return Err(HealthError::Closed);
        }
        let proof = proof.await.map_err(|_| self.gone())?;
        wait.end(proof, self.cell.answers());
        Ok(proof)
    }

    /// Lets the session find out whether the path carries inner IP packets of `wanted` bytes, and else how large ones, but not
    /// below `smallest`. The result is in [`Change::PathMtu`] and [`Snapshot::path_mtu`].
    pub fn want_mtu(&self, smallest: u16, wanted: u16) {
        // After the plane's end there is no search.
        self.health.shared.commands.send(Command::WantMtu {
            peer: self.spec,
            smallest,
            wanted,
        });
    }

    /// The state of the session.
    ///
    /// # Errors
    ///
    /// The plane was closed.
    pub async fn report(&self) -> Result<Report, HealthError> {
        let peer = Some(self.spec);
        let mut reports = self
            .health
            .ask(|reply| Request::Reports { peer, reply })
            .await?;
        reports.pop().ok_or_else(|| self.gone())
    }

    const fn gone(&self) -> HealthError {
        HealthError::NotWatched {
            peer: self.spec.address,
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // After the plane's end there is nothing to leave.
        let _ = self.health.shared.requests.send(Request::Leave(self.spec));
    }
}
