//! The health plane of a node: is the way to each peer's public address, and back, good right now?
//!
//! [`Health`] keeps one S-BFD session (RFC 7880) a peer ([`PathId`]), however many connections there are to it, and reflects the peers' own
//! probes. Probes travel through the management link, a VXLAN device of the management VNI (RFC 8971): the same sockets,
//! port, firewalls, NAT and underlay as data, in both directions.
//!
//! Two threads of its own, so that neither the agent's runtime nor a slow answer of the kernel is ever in the way of a probe:
//!
//! - `nsm-prober` sends, reads the stamps, and runs the sessions' machines ([`nsm_core::liveness::sbfd`]); at real-time priority where
//!   that is allowed. Nothing in it waits but for the next deadline.
//! - `nsm-peers` does what the kernel may take its time for: links, forwarding entries, BPF maps; it counts who uses a peer.
//!
//! With BPF, reflector and stamps are programs on the management link; they go on when the agent does not, also after
//! `kill -9`, and the next agent finds discriminator, sessions and stamps where they were. Without BPF rights the prober's
//! thread does the same in user space ([`Plane::UserSpace`]), slower and only while it runs.
//!
//! How it fails: a peer that cannot be watched is an error of [`Health::join`]; what a session finds is told as [`Event`]s
//! and in [`Report`]s, never as an error.

mod error;
mod left;
mod peers;
mod preflight;
mod prober;
mod random;
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

pub use self::{error::HealthError, preflight::Preflights};
use self::{
    peers::Request,
    preflight::PeerCell,
    prober::{Command, Commands},
    surroundings::Drops,
};
use crate::{
    bpf::{Bpf, ForeignVni},
    netns::Netns,
};

/// How a health plane is set up.
#[derive(Debug, Clone)]
pub struct HealthConfig {
    /// The agent's domain: it marks the management links as ours.
    pub domain: String,
    /// The management VNI of this node.
    pub vni: Vni,
    /// The UDP port of this node's tunnels.
    pub port: u16,
    /// The address that tunnels leave from; `None`: each by its route.
    pub local: Option<IpAddr>,
    /// The pace of the sessions.
    pub timing: Timing,
    /// The node's network namespace; `None`: that of the calling thread.
    pub namespace: Option<Netns>,
    /// How long a session of an earlier agent is kept for connections that come back.
    pub orphan_grace: Duration,
}

/// Where probes are stamped and reflected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// By BPF programs on the management link.
    Bpf,
    /// By the prober's thread.
    UserSpace,
}

/// What is known of one peer.
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
    /// Our probes that left, and the answers to them, since the session began.
    pub probes: u64,
    /// The answers.
    pub answers: u64,
    /// The peer's probes that we answered.
    pub reflected: u64,
    /// How long the last of those answers took on this node, from ingress to egress of the management link; `None`: there was none,
    /// or it is the agent that answers.
    pub reflection: Option<Duration>,
    /// Whether the peer's reflector goes on without its agent (the C flag of its last answer); `None`: no answer yet.
    pub peer_is_independent: Option<bool>,
    /// Packets of the management VNI at each stage between this node and the peer, since the session began. Management link and
    /// card count the same packets: the card's less than the link's, or the link's less than the card's, were lost on this node.
    pub stages: Stages,
    /// The same at most 0.1 s and a probe before the session was not up any more; all zero before it was.
    pub stages_when_up: Stages,
    /// There are other ways to the peer's node, and its own probes are booked to another: that none come in here says nothing.
    pub peer_probes_elsewhere: bool,
}

impl Report {
    /// The stages since the session was up last.
    #[must_use]
    pub fn stages_since_up(&self) -> Stages {
        self.stages.since(&self.stages_when_up)
    }
}

/// News.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A session changed.
    Session {
        /// How.
        change: Change,
        /// The peer as it is now.
        report: Box<Report>,
    },
    /// Packets of a VNI that is not ours came from a peer: told when they first come, and again when more came, each
    /// [`FOREIGN_INTERVAL`].
    ForeignVni(ForeignVni),
}

/// How often foreign VNIs are looked at.
pub const FOREIGN_INTERVAL: Duration = Duration::from_millis(500);

/// How long the session with a peer goes on after its last connection. The two sides of a connection do not close it at the same
/// moment: the one that is later must not find the other's reflector gone. And a client that comes back finds the path proved.
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
    plane: Plane,
    realtime: bool,
    drops: Arc<Drops>,
    preflights: preflight::Count,
    uncounted: Arc<Mutex<BTreeMap<IpAddr, Uncounted>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Threads that have ended need no word.
        let _ = self.requests.send(Request::Abandon);
    }
}

/// Packets to a peer that leave where nothing counts them: what is lost on this node is not told from what is lost later.
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

/// Receives what a health plane has to tell.
pub type Events = tokio_mpsc::UnboundedReceiver<Event>;

impl Health {
    /// Makes the IPv4 management link, that for IPv6 when [`HealthConfig::local`] is such an address, hooks the programs to it,
    /// and starts the threads.
    ///
    /// Blocks for some 30 ms: the kernel waits for its readers.
    ///
    /// # Errors
    ///
    /// The link or its socket cannot be made, the programs cannot be attached, another health plane uses `bpf`.
    pub fn start(
        config: HealthConfig,
        bpf: Option<Arc<Bpf>>,
    ) -> Result<(Self, Events), HealthError> {
        let plane = match &bpf {
            Some(_) => Plane::Bpf,
            None => Plane::UserSpace,
        };
        let vni = config.vni;
        let (events, receiver) = tokio_mpsc::unbounded_channel();
        let started = peers::start(config, bpf, events)?;
        let shared = Shared {
            requests: started.requests,
            commands: started.commands,
            discriminator: started.discriminator,
            vni,
            plane,
            realtime: started.realtime,
            drops: started.drops,
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

    /// Removes what an earlier agent's health plane left, where none is to run any more: its reflector would go on answering.
    ///
    /// # Errors
    ///
    /// Something could not be removed; everything else is.
    pub fn remove_left(config: &HealthConfig, bpf: Option<&Bpf>) -> Result<(), HealthError> {
        left::remove(config, bpf)
    }

    /// The discriminator of this node's reflector, for the peers.
    #[must_use]
    pub fn discriminator(&self) -> Discriminator {
        self.shared.discriminator
    }

    /// The management VNI of this node, for the peers.
    #[must_use]
    pub fn vni(&self) -> Vni {
        self.shared.vni
    }

    /// Where probes are stamped and reflected.
    #[must_use]
    pub fn plane(&self) -> Plane {
        self.shared.plane
    }

    /// Whether the prober has real-time priority (SCHED_FIFO). Without it a busy node's probes come late, which is no false
    /// alarm, but makes detection slower.
    #[must_use]
    pub fn has_realtime(&self) -> bool {
        self.shared.realtime
    }

    /// How often each [`nsm_ebpf_common::Reason`] occurred on the management link, by name, where this process looks at its packets
    /// ([`Plane::UserSpace`]). What the programs drop is in [`Bpf::drops`].
    #[must_use]
    pub fn drops(&self) -> BTreeMap<&'static str, u64> {
        self.shared.drops.by_name()
    }

    /// How the proofs that were asked for went.
    #[must_use]
    pub fn preflights(&self) -> Preflights {
        self.shared.preflights.now()
    }

    /// Peers to whom packets leave uncounted, as was found when their counts stood still, ordered by address.
    #[must_use]
    pub fn uncounted(&self) -> Vec<Uncounted> {
        let uncounted = self.shared.uncounted.lock();
        let uncounted = uncounted.unwrap_or_else(PoisonError::into_inner);
        uncounted.values().cloned().collect()
    }

    /// Watches a peer, or joins those who do. The session ends [`LINGER`] after the last [`Peer`] of it is dropped.
    ///
    /// Another port, VNI or discriminator at an address is another peer, with a session of its own.
    ///
    /// # Errors
    ///
    /// The address is no host's, the discriminator is this node's own or has as many ways as can be told apart, all sessions are taken,
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

    /// All peers that are watched, ordered by address.
    ///
    /// # Errors
    ///
    /// The plane was closed.
    pub async fn reports(&self) -> Result<Vec<Report>, HealthError> {
        self.ask(|reply| Request::Reports { peer: None, reply })
            .await
    }

    /// Lets the reflector answer AdminDown, so that peers neither probe fast nor take our end for a loss; or Up again.
    ///
    /// # Errors
    ///
    /// The plane was closed.
    pub async fn set_admin_down(&self, down: bool) -> Result<(), HealthError> {
        let state = if down { State::AdminDown } else { State::Up };
        self.command(|reply| Command::State(state, reply)).await
    }

    /// Ends all sessions, removes the management links, and ends the threads. Peers whose sessions are up take it for a loss:
    /// [`Self::set_admin_down`] some time before is kinder.
    ///
    /// # Errors
    ///
    /// Something could not be removed; everything else is.
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

/// A watched peer, as one of those who use its session. Dropped, it leaves.
#[derive(Debug)]
pub struct Peer {
    spec: PathId,
    health: Health,
    cell: Arc<PeerCell>,
    /// The session began with this, and nobody has asked for a proof yet: its first probes are those of that proof.
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

    /// Who it is.
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
                // The answer was there before the question.
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
    /// below `smallest`. Told by [`Change::PathMtu`] and [`Snapshot::path_mtu`].
    pub fn want_mtu(&self, smallest: u16, wanted: u16) {
        // A plane that was closed wants nothing.
        self.health.shared.commands.send(Command::WantMtu {
            peer: self.spec,
            smallest,
            wanted,
        });
    }

    /// What is known of it.
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
        // A plane that was closed has nobody to leave.
        let _ = self.health.shared.requests.send(Request::Leave(self.spec));
    }
}
