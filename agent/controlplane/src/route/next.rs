//! The next hop of a connection.

use std::{net::IpAddr, sync::Arc};

use nsm_core::net::PeerUrl;

use crate::{
    peer::peers::Peer,
    route::{addresses::Crossing, expected::Expected, lookup::Matched},
};

/// The next hop of a connection, and the names by which it is asked.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) url: PeerUrl,
    pub(crate) crossing: Crossing,
    /// Whom the next hop has to be.
    pub(crate) expected: Expected,
    /// The service as the next hop is asked for it.
    pub(crate) service: String,
    /// The endpoint as the next hop is asked for it.
    pub(crate) endpoint: String,
    /// The endpoint as the previous hop is answered it.
    pub(crate) endpoint_answered: String,
    /// What the service carries, where the registry has that.
    pub(crate) payload: String,
    pub(crate) resolution: Option<Arc<Resolution>>,
    /// The service whose matches allow the client this endpoint.
    pub(crate) matched: Option<Matched>,
    /// Keeps the descriptor of the next hop's socket, when that was passed in the place of a path.
    pub(crate) _socket: Option<Arc<Peer>>,
}

/// How a domain was resolved, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The domain asked for.
    pub domain: String,
    /// The DNS question, as its name and type.
    pub question: String,
    /// The answer in short.
    pub answer: String,
}

impl Route {
    /// Whether the next hop is an endpoint on this node.
    pub(crate) fn is_local(&self) -> bool {
        self.url.is_local()
    }

    /// Whether another way leads to the same endpoint by the same hop.
    pub(crate) fn is_to_same(&self, other: &Self) -> bool {
        self.url == other.url && self.endpoint == other.endpoint
    }

    /// The next hop's address, when its URL holds one.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.url.address()
    }

    /// A way to an endpoint `nse` of the service `svc`.
    #[cfg(test)]
    pub(crate) fn example(url: &str) -> Self {
        Self {
            url: url.parse().expect("a URL"),
            crossing: Crossing::Inside,
            expected: Expected::Own,
            service: "svc".to_owned(),
            endpoint: "nse".to_owned(),
            endpoint_answered: "nse".to_owned(),
            payload: String::new(),
            resolution: None,
            matched: None,
            _socket: None,
        }
    }
}
