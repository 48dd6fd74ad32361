//! Requests to the thread of the peers.

use nsm_core::liveness::PathId;
use tokio::sync::oneshot;

use super::{Health, HealthError, Peer, Report};

/// A request to the thread of the peers.
pub(super) enum Request {
    /// Join the session of a path.
    Join {
        peer: PathId,
        health: Health,
        reply: oneshot::Sender<Result<Peer, HealthError>>,
    },
    /// Leave it.
    Leave(PathId),
    /// Report on one path, or on all.
    Reports {
        peer: Option<PathId>,
        reply: oneshot::Sender<Vec<Report>>,
    },
    /// The answers of a path began or ended: choose again on which path to its node the node's own probes are answered.
    Choose(PathId),
    /// The stages of a path differ: check whether their counts can be trusted.
    Check(PathId),
    /// The last handle is gone: end, and leave everything for the next agent.
    Abandon,
    /// Remove everything and end.
    Close {
        reply: oneshot::Sender<Result<(), HealthError>>,
    },
}
