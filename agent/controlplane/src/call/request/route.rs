//! Step: the next hops of a Request, in the order in which they are tried.

use std::sync::{Arc, LazyLock};

use nsm_proto::connection::Connection;
use tokio::time::Instant;
use tonic::Code;

use super::ask::{Ask, Attempt};
use crate::{
    call::Calls,
    connection::model::Established,
    error::RequestError,
    identity::gate::Guest,
    liveness::Reachability,
    occasional::Occasional,
    route::{next::Route, router::Asked},
};

/// Endpoints tried for one Request. Each may cost a dial timeout; the deadline bounds them all.
const MAX_ENDPOINTS: usize = 4;

impl Calls {
    /// Tries the route it had before, then every endpoint that serves the name: those whose path is known to be lost last.
    pub(super) async fn establish(
        self: &Arc<Self>,
        ask: &Ask,
        prior: Option<&Established>,
    ) -> Result<Established, RequestError> {
        let mut failures = Vec::new();
        let stood = prior.filter(|prior| ask.avoid.is_none() && serves(prior, &ask.connection));
        if let Some(prior) = stood {
            if let Some(Guest { shown, .. }) = &ask.guest {
                let (view, route) = (&prior.view, &prior.route);
                self.router.recheck(shown, ask.arrival, view, route)?;
            }
            let strict = self.liveness.policy() == Reachability::Require;
            let attempt = self.attempt(ask, &prior.route, Some(prior), strict).await?;
            match self.try_route(&attempt).await {
                Err(error) if error.is_about_the_endpoint() => {
                    failures.push(self.as_shown(&attempt, error));
                }
                outcome => return outcome.map_err(|error| self.as_shown(&attempt, error)),
            }
        }
        let asked = Asked {
            arrival: ask.arrival,
            source: ask.source,
            holder: ask.holder,
            guest: ask.guest.as_ref(),
            connection: &ask.connection,
        };
        let routes = self.router.routes(asked, ask.deadline);
        let mut routes = match routes.await {
            Ok(routes) => routes,
            // A registry forgets the endpoints of an agent that is away. The agent is away all the same, and the connection stands.
            Err(error) if error.code() == Code::NotFound => {
                let away = failures.pop();
                return Err(away
                    .filter(|failure| failure.code() == Code::Unavailable)
                    .unwrap_or(error));
            }
            Err(error) => return Err(error),
        };
        routes.sort_by_key(|route| self.doubts(ask, route));
        let has_failed = |route: &Route| {
            prior.is_some_and(|prior| !failures.is_empty() && prior.route.is_to_same(route))
        };
        let untried: Vec<&Route> = routes
            .iter()
            .filter(|route| !has_failed(route))
            .take(MAX_ENDPOINTS)
            .collect();
        self.try_routes(ask, &untried, prior, failures).await
    }

    /// Tries routes until one is taken. `failures` are those of routes that were tried before.
    async fn try_routes(
        self: &Arc<Self>,
        ask: &Ask,
        routes: &[&Route],
        prior: Option<&Established>,
        mut failures: Vec<RequestError>,
    ) -> Result<Established, RequestError> {
        let policy = self.liveness.policy();
        let mut unproven = None;
        for (at, route) in routes.iter().enumerate() {
            if !failures.is_empty() && Instant::now() >= ask.deadline {
                break;
            }
            // As long as there are others, none is taken whose path fails its proof; a peer without a reflector is taken like any other.
            let strict = policy == Reachability::Require
                || policy == Reachability::Prefer && at + 1 < routes.len();
            let attempt = self.attempt(ask, route, prior, strict).await?;
            match self.try_route(&attempt).await {
                Err(error) if error.is_about_the_endpoint() => {
                    tracing::debug!(endpoint = %route.endpoint, %error, "an endpoint failed");
                    if matches!(error, RequestError::Unproven { .. }) {
                        unproven.get_or_insert(*route);
                    }
                    failures.push(self.as_shown(&attempt, error));
                }
                outcome => return outcome.map_err(|error| self.as_shown(&attempt, error)),
            }
        }
        if let Some(route) = unproven.filter(|_| policy == Reachability::Prefer) {
            let attempt = self.attempt(ask, route, prior, false).await?;
            let outcome = self.try_route(&attempt).await;
            return outcome.map_err(|error| self.as_shown(&attempt, error));
        }
        Err(all_failed(&ask.connection.network_service, failures))
    }

    /// A failure as the caller gets it. A stranger learns nothing of what lies behind this agent: anybody may register an endpoint, and
    /// whether something at its URL answers, refuses, stays silent or is no peer at all is one to the stranger. An endpoint on a socket
    /// of this node is one that a process of the node has registered, so that its reasons are shown.
    fn as_shown(&self, attempt: &Attempt<'_>, error: RequestError) -> RequestError {
        if attempt.route.is_local() || !self.lookup.relays.is_stranger(attempt.ask.source) {
            return error;
        }
        static FAILURES: LazyLock<Occasional> = LazyLock::new(Occasional::default);
        if FAILURES.is_due() {
            tracing::info!(%error, "a Request of a caller of another domain failed at the next hop; others within a minute are not logged");
        }
        RequestError::Unreachable
    }

    /// How little is expected of a route: the one whose loss made the client ask again comes last, one whose path is down or that could not be dialled last before it.
    fn doubts(&self, ask: &Ask, route: &Route) -> u8 {
        if ask
            .avoid
            .as_ref()
            .is_some_and(|avoid| avoid.is_to_same(route))
        {
            return 2;
        }
        let peer = self.lookup.peers.get(&route.url);
        let health = peer.tunnel().and_then(|path| self.liveness.health(&path));
        u8::from(peer.is_unreached() || health.is_some_and(|health| health.is_down()))
    }
}

/// Whether the connection goes on where it stands.
fn serves(prior: &Established, asked: &Connection) -> bool {
    let endpoint = &asked.network_service_endpoint_name;
    prior.view.network_service == asked.network_service
        && (endpoint.is_empty() || *endpoint == prior.view.network_service_endpoint_name)
}

fn all_failed(service: &str, mut failures: Vec<RequestError>) -> RequestError {
    match failures.len() {
        1 => failures.remove(0),
        _ => RequestError::AllFailed {
            service: service.to_owned(),
            code: failures
                .last()
                .map_or(Code::Unavailable, RequestError::code),
            causes: failures.iter().map(ToString::to_string).collect(),
        },
    }
}
