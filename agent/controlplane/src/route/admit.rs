//! What a caller with a certificate may ask the router for.

use std::sync::Arc;

use nsm_core::{
    identity::{
        Owner, SpiffeId,
        access::{Ask, Denied},
    },
    nsm::name::{Domain, InterdomainName},
};

use super::router::{Arrival, Asked, Router, parse};
use crate::{
    error::RequestError,
    identity::gate::{Guest, Shown},
};

/// A Request as the policy decides on it.
struct Wanted<'a> {
    arrival: Arrival,
    domain: Option<&'a Domain>,
    /// The service, without its domain.
    service: &'a str,
    /// The endpoint as it is named.
    endpoint: &'a str,
    /// The id of the path's first segment.
    first: &'a SpiffeId,
}

impl Router {
    /// Decides whether the node's NSMgr may ask its forwarder. What for is its own decision.
    pub(super) fn admit_nsmgr(&self, guest: Option<&Guest>) -> Result<(), RequestError> {
        if let Some(Guest { shown, .. }) = guest {
            self.lookup.gate.admit_on_node(shown, None)?;
        }
        Ok(())
    }

    /// Decides whether the caller may ask for a service of a domain, by the certificate that it has shown. A caller without one is not
    /// decided on here.
    pub(super) fn admit(
        &self,
        asked: Asked<'_>,
        domain: Option<&Domain>,
        service: &str,
    ) -> Result<(), RequestError> {
        let Some(guest) = asked.guest else {
            return Ok(());
        };
        let wanted = Wanted {
            arrival: asked.arrival,
            domain,
            service,
            endpoint: &asked.connection.network_service_endpoint_name,
            first: &guest.first,
        };
        self.decide(&guest.shown, &wanted)
    }

    /// Decides again on what a caller once asked for and was given.
    ///
    /// # Errors
    /// The rule that would deny it now.
    pub(crate) fn recheck(
        &self,
        shown: &Arc<Shown>,
        owner: Owner,
        service: &str,
        endpoint: &str,
    ) -> Result<(), RequestError> {
        let name = parse(service)?;
        let arrival = match owner {
            Owner::Workload(_) => Arrival::Network,
            _ => Arrival::Local,
        };
        let wanted = Wanted {
            arrival,
            domain: name.as_ref().and_then(InterdomainName::domain),
            service: name.as_ref().map_or("", InterdomainName::target),
            endpoint,
            // Whose client it is was decided when it came, and no rule changes that.
            first: &shown.peer,
        };
        self.decide(shown, &wanted)
    }

    /// A service that the caller does not see is as one that does not exist.
    fn decide(&self, shown: &Shown, wanted: &Wanted<'_>) -> Result<(), RequestError> {
        let gate = &self.lookup.gate;
        let own = &self.config.domain;
        if wanted.arrival != Arrival::Network {
            let other = wanted.domain.filter(|domain| *domain != own);
            return Ok(gate.admit_on_node(shown, other)?);
        }
        // Any other domain means us, under whatever name the caller has for it.
        let way = self.way(wanted.endpoint);
        let is_relayed = way.is_some_and(|way| !way.registered_here);
        let ask = Ask::Request {
            service: wanted.service,
            domain: wanted.domain.filter(|_| is_relayed),
            first: wanted.first,
        };
        gate.admit(shown, ask).map_err(|denied| match denied {
            Denied::Service { service, .. } => RequestError::NoService {
                service,
                domain: own.to_string(),
            },
            other => other.into(),
        })
    }
}
