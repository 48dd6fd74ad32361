//! The control plane's prober port on this node's health plane: who needs which path, and what the sessions' reports mean.
//!
//! One guard a peer is held here, however many connections there are: the health plane keeps sessions, we keep their users.

use std::{
    collections::{HashMap, VecDeque},
    mem::discriminant,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nsm_controlplane::ports::{PathEvent, PeerSpec, Prober, WatchError};
use nsm_core::{
    clock::Monotonic,
    liveness::{
        Evidence, Finding, Health, PathId, PeerReport, ReceivedReport, Reflector, Verdict, judge,
        sbfd::Timing,
    },
    net::Vni,
};
use nsm_dataplane::{
    bpf::Bpf,
    liveness as plane,
    liveness::{Event, Events, Health as HealthPlane, HealthConfig, HealthError, Plane, Report},
};
use tokio::time::{MissedTickBehavior, interval};

use crate::config::Config;

/// How often the evidence on paths that are not up is looked at again: the peer's probes come and go without changing the session.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// How long a proof may take. Five probes and the wait for the last answer take 0.6 s; what takes longer is a prober without a processor,
/// and a Request does not wait for that.
const LONGEST_PROOF: Duration = Duration::from_secs(2);

/// The least that every IPv4 path is taken to carry (RFC 1122 section 3.3.2), bytes.
const SMALLEST_V4: u16 = 576;

/// The least that every IPv6 path carries (RFC 8200 section 5), bytes.
const SMALLEST_V6: u16 = 1280;

/// A peer that connections go to.
#[derive(Debug)]
struct Watched {
    mtu: u32,
    guard: Arc<plane::Peer>,
    /// With the report of the peer's agent that each brought.
    users: HashMap<String, Option<ReceivedReport>>,
    /// As it was judged last.
    known: Option<Health>,
}

impl Watched {
    /// A connection uses it, and would like to have this MTU.
    fn count_in(&mut self, user: &str, mtu: u32) {
        self.users.entry(user.to_owned()).or_default();
        if self.mtu != mtu {
            self.mtu = mtu;
            let smallest = if self.guard.spec().address.is_ipv4() {
                SMALLEST_V4
            } else {
                SMALLEST_V6
            };
            let wanted = u16::try_from(mtu).unwrap_or(u16::MAX);
            self.guard.want_mtu(smallest, wanted);
        }
    }

    /// The last report of the peer's agent that arrived on an open stream.
    fn peer_report(&self) -> Option<ReceivedReport> {
        self.users
            .values()
            .copied()
            .flatten()
            .max_by_key(|report| report.at)
    }
}

/// What is still to be told.
#[derive(Debug)]
struct Inbox {
    events: Events,
    pending: VecDeque<PathEvent>,
    look_again: tokio::time::Interval,
}

/// This node's sessions with others.
#[derive(Debug)]
pub(crate) struct NodeProber {
    plane: HealthPlane,
    reflector: Reflector,
    watched: Mutex<HashMap<PathId, Watched>>,
    inbox: tokio::sync::Mutex<Inbox>,
}

impl NodeProber {
    /// Starts the health plane, which takes some 30 ms: for a thread of the runtime that may block.
    ///
    /// # Errors
    /// It cannot be had; tunnels work all the same.
    pub(crate) fn start(config: &Config, bpf: Option<Arc<Bpf>>) -> Result<Self, HealthError> {
        let (plane, events) = HealthPlane::start(plane_config(config), bpf)?;
        let mut look_again = interval(LOOK_AGAIN);
        look_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            reflector: Reflector {
                discriminator: plane.discriminator(),
                vni: plane.vni(),
            },
            plane,
            watched: Mutex::default(),
            inbox: tokio::sync::Mutex::new(Inbox {
                events,
                pending: VecDeque::new(),
                look_again,
            }),
        })
    }

    /// Removes what an earlier agent left that watched paths: this one does not. Blocks as [`Self::start`] does.
    ///
    /// # Errors
    /// Something stays.
    pub(crate) fn remove_left(config: &Config, bpf: Option<&Bpf>) -> Result<(), HealthError> {
        HealthPlane::remove_left(&plane_config(config), bpf)
    }

    /// What works less well than it could.
    pub(crate) fn degraded(&self) -> Vec<String> {
        let mut degraded = Vec::new();
        if self.plane.plane() == Plane::UserSpace {
            degraded.push(
                "no BPF: probes of peers are answered by the agent's own thread, and only while it runs"
                    .to_owned(),
            );
        }
        if !self.plane.has_realtime() {
            degraded.push(
                "the prober has no real-time priority (CAP_SYS_NICE): a busy node notices the loss of a path later"
                    .to_owned(),
            );
        }
        degraded
    }

    /// Peers to whom packets leave where nothing counts them, a sentence each.
    pub(crate) fn uncounted(&self) -> impl Iterator<Item = String> {
        self.plane
            .uncounted()
            .into_iter()
            .map(|uncounted| uncounted.to_string())
    }

    /// What every session has measured, for `status` and metrics.
    pub(crate) async fn reports(&self) -> Vec<Report> {
        self.plane.reports().await.unwrap_or_default()
    }

    /// How the proofs that Requests asked for went.
    pub(crate) fn preflights(&self) -> plane::Preflights {
        self.plane.preflights()
    }

    /// Lets peers know that this node goes: its silence is no loss.
    pub(crate) async fn leave_all(&self) {
        if let Err(error) = self.plane.set_admin_down(true).await {
            tracing::warn!(%error, "peers are not told that this node goes");
        }
    }

    /// Ends all sessions.
    pub(crate) async fn close(&self) {
        if let Err(error) = self.plane.close().await {
            tracing::warn!(%error, "a part of the health plane stays behind");
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<PathId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guard(&self, path: &PathId) -> Option<Arc<plane::Peer>> {
        self.watched()
            .get(&path.canonical())
            .map(|watched| Arc::clone(&watched.guard))
    }

    /// Judges a report; an event if the health is something new.
    fn note(&self, report: &Report) -> Option<PathEvent> {
        let mut watched = self.watched();
        let one = watched.get_mut(&report.path)?;
        let evidence = Evidence {
            path: report.path,
            at: now(),
            session: report.snapshot,
            stages: report.stages_since_up(),
            peer_probes_elsewhere: report.peer_probes_elsewhere,
            peer_report: one.peer_report(),
        };
        let health = judge(&evidence);
        let is_news = one.known.is_none_or(|known| !is_same(&known, &health));
        one.known = Some(health);
        let path = report.path;
        is_news.then_some(PathEvent::Changed { path, health })
    }

    /// Asks a session for what it has, so that what is known is not behind.
    async fn look(&self, guard: &plane::Peer) {
        if let Ok(report) = guard.report().await {
            self.note(&report);
        }
    }

    fn has_doubts(&self) -> bool {
        self.watched().values().any(|watched| {
            watched
                .known
                .is_none_or(|known| known.verdict() != Verdict::Up)
        })
    }
}

#[tonic::async_trait]
impl Prober for NodeProber {
    fn reflector(&self) -> Reflector {
        self.reflector
    }

    async fn join(&self, user: &str, peer: &PeerSpec) -> Result<(), WatchError> {
        let path = peer.path.canonical();
        if let Some(watched) = self.watched().get_mut(&path) {
            watched.count_in(user, peer.mtu);
            return Ok(());
        }
        let refused = |error: HealthError| WatchError {
            peer: path.address,
            cause: error.to_string(),
        };
        let guard = Arc::new(self.plane.join(path).await.map_err(refused)?);
        // Somebody else may have come first.
        let mut watched = self.watched();
        let one = watched.entry(path).or_insert_with(|| Watched {
            mtu: 0,
            guard,
            users: HashMap::new(),
            known: None,
        });
        one.count_in(user, peer.mtu);
        Ok(())
    }

    fn leave(&self, user: &str, path: &PathId) {
        let path = path.canonical();
        let mut watched = self.watched();
        if let Some(one) = watched.get_mut(&path) {
            one.users.remove(user);
            if one.users.is_empty() {
                watched.remove(&path);
            }
        }
    }

    async fn prove(&self, path: &PathId) -> Option<Health> {
        let guard = self.guard(path)?;
        let was_known_up = self
            .health(path)
            .is_some_and(|known| known.verdict() == Verdict::Up);
        let proved = tokio::time::timeout(LONGEST_PROOF, guard.prove()).await;
        if !matches!(proved, Ok(Ok(_))) {
            return self.health(path);
        }
        // The session's own event may still be on its way to us.
        if !(was_known_up && guard.is_up()) {
            self.look(&guard).await;
        }
        self.health(path)
    }

    fn health(&self, path: &PathId) -> Option<Health> {
        self.watched().get(&path.canonical())?.known
    }

    fn report(&self, user: &str, path: &PathId, report: Option<PeerReport>) {
        let mut watched = self.watched();
        let user = watched
            .get_mut(&path.canonical())
            .and_then(|one| one.users.get_mut(user));
        if let Some(known) = user {
            // It is judged when the path is looked at next, which is soon where there are doubts.
            *known = report.map(|report| ReceivedReport { report, at: now() });
        }
    }

    async fn next_event(&self) -> PathEvent {
        let mut inbox = self.inbox.lock().await;
        let Inbox {
            events,
            pending,
            look_again,
        } = &mut *inbox;
        loop {
            if let Some(event) = pending.pop_front() {
                return event;
            }
            tokio::select! {
                event = events.recv() => match event {
                    Some(Event::Session { report, .. }) => {
                        pending.extend(self.note(&report));
                    }
                    Some(Event::ForeignVni(foreign)) => {
                        if let Ok(vni) = Vni::try_from(foreign.vni) {
                            pending.push_back(PathEvent::ForeignVni { peer: foreign.peer, vni });
                        }
                    }
                    // The plane has ended, and with it the agent will.
                    None => std::future::pending().await,
                },
                _ = look_again.tick() => {
                    if self.has_doubts() {
                        let reports = self.reports().await;
                        pending.extend(reports.iter().filter_map(|report| self.note(report)));
                    }
                }
            }
        }
    }
}

fn plane_config(config: &Config) -> HealthConfig {
    HealthConfig {
        domain: config.domain.to_string(),
        vni: config.tunnel.management_vni,
        port: config.tunnel.port,
        local: config.tunnel.ip,
        timing: Timing::default(),
        namespace: None,
        orphan_grace: config.max_token_lifetime,
    }
}

/// Whether two say the same; what they measured meanwhile may differ.
fn is_same(one: &Health, other: &Health) -> bool {
    let same = |one: &Finding, other: &Finding| {
        one.verdict == other.verdict && discriminant(&one.reason) == discriminant(&other.reason)
    };
    same(&one.inward, &other.inward)
        && same(&one.outward, &other.outward)
        && one.path_mtu == other.path_mtu
}

/// The clock of the kernel's stamps.
pub(crate) fn now() -> Monotonic {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has a monotonic clock");
    let nanos = Duration::from(time).as_nanos();
    Monotonic::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
