//! The reaction to the loss of a connection.
//!
//! | what is lost | what is done |
//! |---|---|
//! | our own agent | the same Request is repeated until it answers: there is no other agent; then what it cannot reach is waited for |
//! | the control plane behind it, the path is good | the same endpoint is asked for again, within [`PATIENCE`]; traffic goes on meanwhile |
//! | the control plane behind it, nothing is known of the path | the same, within [`BLIND_PATIENCE`] |
//! | the link of a pod on the path | the same endpoint is asked for again, within [`PATIENCE`]: a Request repairs links |
//! | the path | another endpoint is asked for; the old tunnel is kept until the new one exists |
//! | nothing but a refresh, which was refused | the same |
//! | the endpoint | what there was is closed, and another endpoint is asked for |
//!
//! Whatever is asked for again, a tunnel whose packets may pass is not closed before another exists: only the endpoint's own end makes it
//! useless. A refresh that fails proves nothing of the packets.
//!
//! The first loss is repaired at once, and so is that of a connection that was stable ([`STABLE`]); other tries are spaced by
//! [`Backoff`].

use std::time::Duration;

use crate::{backoff::Backoff, clock::Monotonic};

/// The shortest wait before another try: an agent that restarts is back within it.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// The longest: after a repair an operator expects a result.
pub const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A connection that lived so long was stable: its loss is repaired at once. For another one the waits grow, so that two hops that
/// disagree do not spin.
pub const STABLE: Duration = Duration::from_secs(10);

/// How long the same endpoint is asked for while an agent on the path of the connection is lost and the tunnel's path is good. An agent
/// that died is started again at once by systemd, and by Kubernetes after 10, 20 and 40 s when it dies again. Traffic goes on meanwhile,
/// so that waiting costs little; not for ever, since the endpoint's state is unknown while its agent is away.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long where it is unknown whether packets pass: the node may have gone with its agent, and another endpoint is there. An agent that
/// is started again at once is back within it; NSM's own healing waits 15 s.
pub const BLIND_PATIENCE: Duration = Duration::from_secs(10);

/// How long an endpoint may be unknown to an agent that is back: registries inside agents are empty after a restart, and
/// endpoints that lost theirs register every 5 s at least.
pub const REGISTERS_AGAIN: Duration = Duration::from_secs(10);

/// What was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The stream to our own agent is broken; the state of the hops behind it is unknown.
    Agent,
    /// A hop behind our agent is lost, and no hop reports its path down.
    ControlPlane {
        /// Whether the remaining hops report that packets pass.
        is_path_good: bool,
    },
    /// The link of a pod on the path is not as it must be. A Request repairs it, and another endpoint is no better where it is our own.
    Link,
    /// Packets do not pass.
    Path,
    /// A hop refused to go on. Packets may pass all the same.
    Refused,
    /// The endpoint is gone.
    Endpoint,
}

/// Why a Request was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Our own agent cannot be reached.
    Agent,
    /// No answer in time, from our agent or from a hop behind it.
    Silence,
    /// Our agent reports that a hop is unreachable.
    Unavailable,
    /// The registry or endpoint that was asked has no such endpoint.
    Unknown,
    /// Any other refusal, and answers that are none.
    Refused,
}

impl Failure {
    /// What is lost where a refresh fails so and there is no other evidence. An unreachable hop may be reached by the next try, and a
    /// registry that was started again has the endpoint soon.
    #[must_use]
    pub const fn loss(self) -> Loss {
        match self {
            Self::Agent => Loss::Agent,
            Self::Silence | Self::Unavailable | Self::Unknown => Loss::ControlPlane {
                is_path_good: false,
            },
            Self::Refused => Loss::Refused,
        }
    }
}

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The same endpoint under the same id: a refresh.
    Same,
    /// Any endpoint, another one if there is.
    Reselect {
        /// Whether what there was is closed first.
        closes: bool,
    },
}

const fn patience(is_path_good: bool) -> Duration {
    if is_path_good {
        PATIENCE
    } else {
        BLIND_PATIENCE
    }
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Our own agent.
    Agent,
    /// The control plane behind it.
    ControlPlane {
        since: Monotonic,
        until: Monotonic,
        /// Since when answers report the endpoint as unknown.
        unknown: Option<Monotonic>,
    },
    /// An endpoint. Nothing makes the old one wanted again.
    Another { closes: bool },
}

impl Phase {
    fn wait(is_path_good: bool, now: Monotonic) -> Self {
        Self::ControlPlane {
            since: now,
            until: now + patience(is_path_good),
            unknown: None,
        }
    }

    fn begin(loss: Loss, now: Monotonic) -> Self {
        match loss {
            Loss::Agent => Self::Agent,
            Loss::ControlPlane { is_path_good } => Self::wait(is_path_good, now),
            Loss::Link => Self::wait(true, now),
            Loss::Path | Loss::Refused => Self::Another { closes: false },
            Loss::Endpoint => Self::Another { closes: true },
        }
    }

    fn after(self, failure: Failure, now: Monotonic) -> Self {
        match (self, failure) {
            (Self::Another { .. }, _) => self,
            (Self::Agent, Failure::Agent | Failure::Silence) => self,
            (Self::Agent | Self::ControlPlane { .. }, Failure::Refused) => {
                Self::begin(Loss::Refused, now)
            }
            // It is back, and what was lost with it may be on its way.
            (Self::Agent, _) => {
                let is_path_good = false;
                Self::begin(Loss::ControlPlane { is_path_good }, now).after(failure, now)
            }
            (
                Self::ControlPlane {
                    since,
                    until,
                    unknown,
                },
                _,
            ) => {
                let unknown = (failure == Failure::Unknown).then(|| unknown.unwrap_or(now));
                let is_forgotten = unknown.is_some_and(|first| now.since(first) >= REGISTERS_AGAIN);
                if is_forgotten || now >= until {
                    Self::Another { closes: false }
                } else {
                    Self::ControlPlane {
                        since,
                        until,
                        unknown,
                    }
                }
            }
        }
    }

    /// What is known of the path has changed while the control plane is waited for.
    fn look_again(&mut self, is_path_good: bool, now: Monotonic) {
        if let Self::ControlPlane { since, until, .. } = self {
            let patience = patience(is_path_good);
            *until = match is_path_good {
                true => *since + patience,
                false => (*until).min(now + patience),
            };
        }
    }

    const fn step(self) -> Step {
        match self {
            Self::Agent | Self::ControlPlane { .. } => Step::Same,
            Self::Another { closes } => Step::Reselect { closes },
        }
    }
}

/// The healing of one connection.
#[derive(Debug, Clone)]
pub struct Healer {
    backoff: Backoff,
    phase: Option<Phase>,
}

impl Default for Healer {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(SHORTEST_WAIT, LONGEST_WAIT),
            phase: None,
        }
    }
}

impl Healer {
    /// A connection that lived for `lived` is lost: what to ask for, and after how long. `random` is uniform in 0..1.
    pub fn handle_loss(
        &mut self,
        loss: Loss,
        lived: Duration,
        now: Monotonic,
        random: f64,
    ) -> (Step, Duration) {
        let phase = Phase::begin(loss, now);
        let is_first = self.phase.replace(phase).is_none();
        if is_first || lived >= STABLE {
            self.backoff.reset();
            return (phase.step(), Duration::ZERO);
        }
        (phase.step(), self.backoff.next(random))
    }

    /// More is lost while the same endpoint is asked for: what to ask for at once; `None` where that makes no difference.
    pub fn handle_news(&mut self, loss: Loss, now: Monotonic) -> Option<Step> {
        if let (Some(phase), Loss::ControlPlane { is_path_good }) = (&mut self.phase, loss) {
            phase.look_again(is_path_good, now);
        }
        let is_more = matches!(self.phase, Some(Phase::ControlPlane { .. }))
            && matches!(loss, Loss::Path | Loss::Refused | Loss::Endpoint);
        is_more.then(|| self.phase.insert(Phase::begin(loss, now)).step())
    }

    /// A try failed, for this reason: what to ask for next, and after how long.
    pub fn handle_failure(
        &mut self,
        failure: Failure,
        now: Monotonic,
        random: f64,
    ) -> (Step, Duration) {
        let phase = self.phase.unwrap_or(Phase::begin(failure.loss(), now));
        let phase = self.phase.insert(phase.after(failure, now));
        (phase.step(), self.backoff.next(random))
    }

    /// What was granted has a path that is known to be down: how long to wait until a better one is looked for.
    pub fn handle_bad_grant(&mut self, now: Monotonic, random: f64) -> Duration {
        self.phase.get_or_insert(Phase::begin(Loss::Path, now));
        self.backoff.next(random)
    }
}
