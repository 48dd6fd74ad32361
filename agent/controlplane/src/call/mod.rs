//! What a call does: Request, Close, and the calls to the registry.

pub(crate) mod admission;
mod case;
mod close;
pub(crate) mod context;
mod ends;
mod enter;
mod matching;
pub(crate) mod mend;
mod next_hop;
pub(crate) mod pod;
pub(crate) mod registrar;
mod request;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ipnet::IpNet;
use nsm_core::{
    identity::{Caller, relay::Source, share::Holder},
    nsm::name::Domain,
};
use nsm_proto::connection::Connection;
use tokio::time::Instant;

use self::{admission::Admission, context::Contexts, mend::Mends};
use crate::{
    connection::Held,
    error::RequestError,
    identity::{
        gate::Shown,
        session::Session,
        token::{Token, TokenSource},
    },
    liveness::Liveness,
    ports::Forwarder,
    route::{
        lookup::Lookup,
        next::Resolution,
        router::{Arrival, Router},
    },
    transport::unix::Descriptors,
};

/// A call as a listener hands it on.
#[derive(Debug)]
pub struct Call<T> {
    /// The message.
    pub message: T,
    /// The listener it came in by.
    pub arrival: Arrival,
    /// Where it comes from.
    pub source: Source,
    /// What the caller passes beside its calls, where its connection can carry descriptors.
    pub descriptors: Option<Arc<Descriptors>>,
    /// Who calls.
    pub caller: Caller,
    /// What both ends of its transport connection have shown; none in plain text.
    pub shown: Option<Arc<Shown>>,
    /// Its TLS connection; none in plain text.
    pub session: Option<Arc<Session>>,
    /// Who is charged for what the call leaves here.
    pub holder: Holder,
    /// The previous hop's token, from the call's metadata.
    pub token: Option<Token>,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// What a Request gives back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The connection, as the previous hop knows it.
    pub connection: Connection,
    /// How the domain was resolved, when it was.
    pub resolution: Option<Arc<Resolution>>,
    /// The type of the mechanism towards the endpoint.
    pub next_mechanism: Option<String>,
    /// The tunnel's VNI, when this node has an end of it.
    pub vni: Option<u32>,
}

/// What is fixed for the life of the agent.
#[derive(Debug)]
pub(crate) struct CallConfig {
    /// The name of our path segments.
    pub(crate) name: String,
    /// The domain of this agent.
    pub(crate) domain: Domain,
    /// How long a Request, and each call it makes, may take.
    pub(crate) request_timeout: Duration,
    /// Whether administrators of the node may name its own network namespaces.
    pub(crate) node_namespace: bool,
    /// What other parties may put into pods.
    pub(crate) admission: Admission,
    /// UDP ports of tunnels that a server may choose beside that of this node.
    pub(crate) peer_ports: Vec<u16>,
    /// Labels of this node for its clients.
    pub(crate) client_info: BTreeMap<String, String>,
}

/// Requests and Closes.
pub(crate) struct Calls {
    pub(crate) config: CallConfig,
    pub(crate) tokens: Arc<TokenSource>,
    pub(crate) forwarder: Option<Arc<dyn Forwarder>>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) router: Router,
    pub(crate) held: Held,
    pub(crate) liveness: Arc<Liveness>,
    pub(crate) contexts: Contexts,
    pub(crate) mends: Mends,
}

impl Calls {
    /// Protects these prefixes of the cluster beside the configured ones.
    pub(crate) fn protect(&self, found: Vec<IpNet>) {
        self.config.admission.protect(found);
    }

    /// Closes what expires and keeps links right, for the life of the agent.
    pub(crate) fn keep_connections(self: &Arc<Self>) {
        tokio::spawn(Arc::clone(self).close_expired());
        tokio::spawn(Arc::clone(self).watch_links());
    }

    fn forwarder(&self) -> Result<&dyn Forwarder, RequestError> {
        self.forwarder
            .as_deref()
            .ok_or(RequestError::NoForwarder("network"))
    }
}

/// Adds labels, but for those whose name is there already.
fn add_missing(labels: &mut BTreeMap<String, String>, more: &BTreeMap<String, String>) {
    for (name, value) in more {
        labels.entry(name.clone()).or_insert_with(|| value.clone());
    }
}
