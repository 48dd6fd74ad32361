//! What a caller with a certificate may ask the router for.

use nsm_core::{
    identity::{
        SpiffeId,
        access::{Ask, Denied},
    },
    nsm::name::{Domain, InterdomainName},
};

use nsm_proto::connection::Connection;

use super::{
    addresses::Crossing,
    bypass::Way,
    next::Route,
    router::{Arrival, Asked, Router, common_domain, parse},
};
use crate::{
    error::RequestError,
    identity::gate::{Guest, Shown},
};

/// A Request as the policy decides on it.
struct Wanted<'a> {
    domain: Option<&'a Domain>,
    /// The service, without its domain.
    service: &'a str,
    /// It leads to another domain, by a way that was learnt.
    is_relayed: bool,
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

    /// Decides whether the caller may ask for a service of a domain, by the certificate that it has shown; `way` is the one that is known
    /// to the endpoint. A caller without a certificate is not decided on here.
    pub(super) fn admit(
        &self,
        asked: Asked<'_>,
        domain: Option<&Domain>,
        service: &str,
        way: Option<&Way>,
    ) -> Result<(), RequestError> {
        let Some(Guest { shown, first }) = asked.guest else {
            return Ok(());
        };
        let wanted = Wanted {
            domain,
            service,
            is_relayed: way.is_some_and(|way| !way.registered_here),
            first,
        };
        // What was decided on is a service, and a way leads to an endpoint: it has to serve that one.
        let name = &asked.connection.network_service;
        let serves = |way: &Way| !way.registered_here || way.services.contains(name);
        if !name.is_empty() && !way.is_none_or(serves) {
            return Err(RequestError::NoService {
                service: service.to_owned(),
                domain: domain.unwrap_or(&self.config.domain).to_string(),
            });
        }
        match asked.arrival {
            Arrival::Network => self.decide(shown, &wanted),
            Arrival::Local | Arrival::Forwarder => self.decide_on_node(shown, &wanted),
        }
    }

    /// Decides again on a connection that stands, as it was decided on when it was made: `route` is the way that it has.
    ///
    /// # Errors
    /// The rule that would deny it now.
    pub(crate) fn recheck(
        &self,
        shown: &Shown,
        arrival: Arrival,
        view: &Connection,
        route: &Route,
    ) -> Result<(), RequestError> {
        let service = parse(&view.network_service)?;
        let endpoint = parse(&view.network_service_endpoint_name)?;
        let domain = common_domain(service.as_ref(), endpoint.as_ref())?;
        let wanted = Wanted {
            domain: domain.as_ref(),
            service: service.as_ref().map_or("", InterdomainName::target),
            is_relayed: route.crossing == Crossing::Out,
            // Whose client it is was decided when it came, and no rule changes that.
            first: &shown.peer,
        };
        match arrival {
            Arrival::Forwarder => Ok(self.lookup.gate.admit_on_node(shown, None)?),
            Arrival::Local => self.decide_on_node(shown, &wanted),
            Arrival::Network => self.decide(shown, &wanted),
        }
    }

    fn decide_on_node(&self, shown: &Shown, wanted: &Wanted<'_>) -> Result<(), RequestError> {
        let own = &self.config.domain;
        let other = wanted.domain.filter(|domain| *domain != own);
        Ok(self.lookup.gate.admit_on_node(shown, other)?)
    }

    /// A service that the caller does not see is as one that does not exist.
    fn decide(&self, shown: &Shown, wanted: &Wanted<'_>) -> Result<(), RequestError> {
        let ask = Ask::Request {
            service: wanted.service,
            // Any other domain means us, under whatever name the caller has for it.
            domain: wanted.domain.filter(|_| wanted.is_relayed),
            first: wanted.first,
        };
        let decided = self.lookup.gate.admit(shown, ask);
        decided.map_err(|denied| match denied {
            Denied::Service { service, .. } => RequestError::NoService {
                service,
                domain: self.config.domain.to_string(),
            },
            other => other.into(),
        })
    }
}
