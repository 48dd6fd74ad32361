//! The paths that connections use: one session a path, however many connections there are, and what its reports show.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nsm_core::{
    liveness::{Evidence, Health, MtuRange, PathEvent, PathId, PathUsers, PeerReport, Reflector},
    net::Vni,
};
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use super::{Event, Events, Health as HealthPlane, HealthConfig, HealthError, Peer, Report};
use crate::{bpf::now, forward::TunnelDevices};

/// How often paths that are not up are judged again: the peer's probes come and go without a change of the session.
const JUDGE_AGAIN: Duration = Duration::from_millis(250);

/// How long a proof may take. Five probes and the wait for the last answer take 0.6 s. A longer proof is that of a prober without a
/// processor, and a Request does not wait for it.
const LONGEST_PROOF: Duration = Duration::from_secs(2);

/// The paths of this node's connections, on its health plane.
///
/// Any call may be dropped: what it began goes on or ends by itself.
#[derive(Debug)]
pub struct Paths {
    plane: HealthPlane,
    used: Mutex<HashMap<PathId, Used>>,
    inbox: tokio::sync::Mutex<Inbox>,
}

/// A path that connections use.
#[derive(Debug)]
struct Used {
    session: Arc<Peer>,
    users: PathUsers,
}

#[derive(Debug)]
struct Inbox {
    events: Events,
    /// Events that [`Paths::next_event`] returns next.
    pending: VecDeque<PathEvent>,
    judge_again: Interval,
}

impl Paths {
    /// Starts the health plane. Blocks for some 30 ms, in the context of a tokio runtime.
    ///
    /// # Errors
    ///
    /// As [`HealthPlane::start`].
    pub fn start(config: HealthConfig, devices: Arc<TunnelDevices>) -> Result<Self, HealthError> {
        let (plane, events) = HealthPlane::start(config, devices)?;
        let mut judge_again = interval(JUDGE_AGAIN);
        judge_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            plane,
            used: Mutex::default(),
            inbox: tokio::sync::Mutex::new(Inbox {
                events,
                pending: VecDeque::new(),
                judge_again,
            }),
        })
    }

    /// The health plane.
    #[must_use]
    pub const fn plane(&self) -> &HealthPlane {
        &self.plane
    }

    /// This node's own reflector, for the peers.
    #[must_use]
    pub fn reflector(&self) -> Reflector {
        Reflector {
            discriminator: self.plane.discriminator(),
            vni: self.plane.vni(),
        }
    }

    /// Adds a connection to the users of a path, on which it would like to have this MTU; idempotent. When this returns, probes of the
    /// peer are answered.
    ///
    /// # Errors
    ///
    /// As [`HealthPlane::join`].
    pub async fn join(&self, user: &str, path: &PathId, mtu: u32) -> Result<(), HealthError> {
        let path = path.canonical();
        if let Some(used) = self.used().get_mut(&path) {
            used.join(user, mtu);
            return Ok(());
        }
        let session = Arc::new(self.plane.join(path).await?);
        // Another connection may have joined meanwhile; then its session is used.
        let mut all = self.used();
        let used = all.entry(path).or_insert_with(|| Used {
            session,
            users: PathUsers::default(),
        });
        used.join(user, mtu);
        Ok(())
    }

    /// Removes a connection from the users of a path; a success when it is none.
    pub fn leave(&self, user: &str, path: &PathId) {
        let path = path.canonical();
        let mut all = self.used();
        let is_unused = all
            .get_mut(&path)
            .is_some_and(|used| used.users.leave(user));
        if is_unused {
            all.remove(&path);
        }
    }

    /// Proves a path that a connection has joined: at once when its session is up, else by a few probes, within seconds. Returns its
    /// health after that; `None` for a path that no connection uses.
    pub async fn prove(&self, path: &PathId) -> Option<Health> {
        let (session, was_up) = {
            let all = self.used();
            let used = all.get(&path.canonical())?;
            (Arc::clone(&used.session), used.users.is_up())
        };
        let proved = timeout(LONGEST_PROOF, session.prove()).await;
        let is_stale = matches!(proved, Ok(Ok(_))) && !(was_up && session.is_up());
        // The session's own event may not have arrived yet.
        if is_stale && let Ok(report) = session.report().await {
            self.judge(&report);
        }
        self.health(path)
    }

    /// The health of a path that a connection has joined, as it was judged last.
    #[must_use]
    pub fn health(&self, path: &PathId) -> Option<Health> {
        self.used().get(&path.canonical())?.users.health()
    }

    /// Takes the report of the peer's agent that a connection has brought just now; `None` withdraws it. The path is judged with it
    /// within 250 ms where it is not up.
    pub fn set_report(&self, user: &str, path: &PathId, report: Option<PeerReport>) {
        if let Some(used) = self.used().get_mut(&path.canonical()) {
            used.users.set_report(user, report, now());
        }
    }

    /// The next event. One caller at a time.
    pub async fn next_event(&self) -> PathEvent {
        let mut inbox = self.inbox.lock().await;
        let Inbox {
            events,
            pending,
            judge_again,
        } = &mut *inbox;
        loop {
            if let Some(event) = pending.pop_front() {
                return event;
            }
            tokio::select! {
                event = events.recv() => match event {
                    Some(Event::Session { report, .. }) => pending.extend(self.judge(&report)),
                    Some(Event::ForeignVni(foreign)) => {
                        let event = |vni| PathEvent::ForeignVni { peer: foreign.peer, vni };
                        pending.extend(Vni::try_from(foreign.vni).ok().map(event));
                    }
                    // The plane ends with the agent.
                    None => std::future::pending().await,
                },
                _ = judge_again.tick() => {
                    if self.has_doubts() {
                        let reports = self.plane.reports().await.unwrap_or_default();
                        pending.extend(reports.iter().filter_map(|report| self.judge(report)));
                    }
                }
            }
        }
    }

    /// Judges a path by a report of its session; an event where the result is new.
    fn judge(&self, report: &Report) -> Option<PathEvent> {
        let path = report.path;
        let evidence = Evidence {
            path,
            at: now(),
            session: report.snapshot,
            stages: report.stages_since_up(),
            peer_probes_elsewhere: report.peer_probes_elsewhere,
            peer_report: None,
        };
        let health = self.used().get_mut(&path)?.users.judge(evidence)?;
        Some(PathEvent::Changed { path, health })
    }

    fn has_doubts(&self) -> bool {
        self.used().values().any(|used| !used.users.is_up())
    }

    fn used(&self) -> MutexGuard<'_, HashMap<PathId, Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Used {
    fn join(&mut self, user: &str, mtu: u32) {
        let peer = self.session.spec().address;
        if let Some(MtuRange { smallest, wanted }) = self.users.join(user, peer, mtu) {
            self.session.want_mtu(smallest, wanted);
        }
    }
}
