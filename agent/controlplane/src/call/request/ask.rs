//! A Request, and a Request on its way to one next hop.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use nsm_core::{
    identity::{Owner, relay::Source, share::Holder},
    mechanism::RemoteMechanism,
    nsm::path::Path,
};
use nsm_proto::connection::{Connection, Mechanism};
use tokio::time::Instant;

use super::around::Around;
use crate::{
    call::{case::Case, pod::NamedNetns},
    connection::{model::Established, store::Turn},
    convert,
    error::RequestError,
    identity::gate::Guest,
    peer::peers::Peer,
    route::{next::Route, router::Arrival},
};

/// A Request in the terms of its next hop's side.
pub(super) struct Ask {
    pub(super) arrival: Arrival,
    pub(super) source: Source,
    /// Who is charged for it.
    pub(super) holder: Holder,
    /// Who will own the connection.
    pub(super) owner: Owner,
    /// Who asks, where it has shown a certificate.
    pub(super) guest: Option<Guest>,
    /// The namespaces that the caller's mechanisms name.
    pub(super) named: NamedNetns,
    /// As it came, but for `id` and `path`, which are those of our segment.
    pub(super) connection: Connection,
    pub(super) path: Path,
    pub(super) preferences: Vec<Mechanism>,
    pub(super) expires: SystemTime,
    pub(super) deadline: Instant,
    /// The path or its control plane was lost and another one is wanted: this route comes last.
    pub(super) avoid: Option<Route>,
    /// The hop at which the connection stands does not have it any more: it granted another endpoint under the same id, and that was
    /// taken back.
    pub(super) is_moved: AtomicBool,
    /// Kept by whatever is still to be undone at a next hop: no later Request of the connection may reach that hop before.
    pub(super) turn: Arc<Turn>,
}

impl Ask {
    pub(super) fn is_moved(&self) -> bool {
        self.is_moved.load(Ordering::Relaxed)
    }

    /// The hops below ours come onto the path as we know them. A client that never got an answer, or sends an older one again, does
    /// not know their ids, and an endpoint that is asked under another id makes another connection.
    pub(super) fn resume(&mut self, view: &Connection) {
        let known = convert::path(view.path.clone().unwrap_or_default());
        let segments = &mut self.path.segments;
        segments.truncate(self.path.index as usize + 1);
        segments.extend(known.segments.into_iter().skip(segments.len()));
    }
}

/// A Request on its way to one next hop.
pub(super) struct Attempt<'a> {
    pub(super) ask: &'a Ask,
    pub(super) route: &'a Route,
    pub(super) peer: Arc<Peer>,
    pub(super) case: Case,
    /// What is around the client's pod, where that is on this node.
    pub(super) around_client: Option<Around>,
    /// What stands of the connection.
    pub(super) prior: Option<&'a Established>,
    /// A path that cannot be proved makes it fail.
    pub(super) strict: bool,
}

impl Attempt<'_> {
    /// The id of our segment.
    pub(super) fn id(&self) -> &str {
        &self.ask.connection.id
    }

    /// Whether this agent is the NSMgr of the client or of the endpoint, and so excludes what its node and cluster use. A proxy between
    /// them does not.
    pub(super) fn excludes(&self) -> bool {
        !matches!(self.case, Case::Through) || self.ask.arrival == Arrival::Local
    }

    /// Whether the connection stands at this hop, for whatever endpoint.
    pub(super) fn is_same_hop(&self) -> bool {
        self.prior
            .is_some_and(|prior| prior.route.url == self.route.url)
    }

    /// Whether the connection stands at this hop for the same endpoint.
    pub(super) fn is_same_route(&self) -> bool {
        self.prior
            .is_some_and(|prior| prior.route.is_to_same(self.route))
    }

    /// The mechanism that stands towards this hop, to be asked for again.
    pub(super) fn standing(&self) -> Option<Mechanism> {
        let prior = self.prior.filter(|_| self.is_same_hop())?;
        let mut standing = prior.next_mechanism.clone()?;
        if !self.is_same_route()
            && let Some(remote) = RemoteMechanism::of_type(&standing.r#type)
        {
            // Its tunnel may end elsewhere.
            remote.forget_grant(&mut standing.parameters);
        }
        Some(standing)
    }

    /// The answer of this hop breaks the protocol.
    pub(super) fn bad_answer(&self, fault: impl std::fmt::Display) -> RequestError {
        RequestError::bad_answer(&self.route.url, fault)
    }
}
