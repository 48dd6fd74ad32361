//! Whom a next hop has to be.

use nsm_core::{
    identity::{SpiffeId, access::Server},
    nsm::name::Domain,
};
use nsm_proto::registry::NetworkServiceEndpoint;

/// Whom a next hop has to be, where it shows a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expected {
    /// A system of our own domain.
    Own,
    /// The proxy of a domain.
    Of(Domain),
    /// A proxy of the trust domain whose workload has registered the endpoint.
    RegisteredBy(SpiffeId),
}

impl Expected {
    /// Of an entry that a registry has with the URL of a proxy; `otherwise` where it does not say who has registered it.
    pub(crate) fn of_entry(endpoint: &NetworkServiceEndpoint, otherwise: Self) -> Self {
        let first = endpoint.path_ids.first();
        let first = first.and_then(|id| id.parse().ok());
        first.map_or(otherwise, Self::RegisteredBy)
    }

    /// As the policy is asked about it.
    pub(crate) const fn server(&self) -> Server<'_> {
        match self {
            Self::Own => Server::Own,
            Self::Of(domain) => Server::Of(domain),
            Self::RegisteredBy(id) => Server::RegisteredBy(id),
        }
    }
}
