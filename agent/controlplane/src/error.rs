//! Why a Request, Close or registry call was refused, and the gRPC code each cause travels as.
//!
//! One variant a cause. The text goes to the client and, through it, to a person: it says what
//! failed, on what, and what can be done about it.

mod registry;

use std::time::Duration;

use nsm_core::{
    identity::{access::Denied, chain::TokensRefused, policy::Refusal, relay::NotServed},
    link::admission::Inadmissible,
    mechanism::{MechanismError, TunnelKey, vni_pool::VniPoolError},
    net::PeerUrl,
    nsm::{name::NameError, path::PathError},
    text::Shown,
};
use nsm_discovery::dns::ResolveError;
use tonic::{Code, Status};

pub use self::registry::RegistryError;
use crate::{places::NoPlace, ports::ForwarderError, transport::dial::DialError};

/// The longest text of a refusal, in bytes. It travels in an HTTP/2 header, where each byte may
/// become three: headers of more than 16 KiB make the other side close the whole connection, and
/// with it everything else that goes over it.
const MAX_TEXT: usize = 2048;

/// Why the control plane refused a call.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A service or endpoint name cannot be parsed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The path of the connection breaks NSM's rules.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A mechanism's parameters cannot be parsed, or there is no common mechanism.
    #[error(transparent)]
    Mechanism(#[from] MechanismError),
    /// A field of the message cannot be parsed.
    #[error("{field} `{value}` is not valid: {reason}")]
    Field {
        /// The field's name in the message.
        field: &'static str,
        /// What it held.
        value: String,
        /// What it should have held.
        reason: String,
    },
    /// A field that must be there is not.
    #[error("the request has no {0}: set it and ask again")]
    Missing(&'static str),
    /// The token of the previous hop has expired.
    #[error(
        "the token of path segment `{segment}` expired {ago:?} ago: refresh the token, and check the clocks of both nodes"
    )]
    Expired {
        /// The segment's name.
        segment: String,
        /// How long ago.
        ago: Duration,
    },
    /// The token metadata of the call cannot be read.
    #[error(transparent)]
    Token(#[from] crate::identity::token::TokenError),
    /// The registry in this process refused.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// There is nothing that could be registered as this node's URL.
    #[error(
        "this node has no address at which others could dial it: give it a default route, or set `tunnel.ip` or `advertise_url`"
    )]
    NoAddress,
    /// The domain of the name cannot be resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// No such service.
    #[error(
        "no network service `{service}` in domain `{domain}`: check the name, and that an endpoint has registered it"
    )]
    NoService {
        /// The service without its domain.
        service: String,
        /// The domain that was asked.
        domain: String,
    },
    /// Endpoints offer the service, and it is not registered itself: there are no matches that decide which clients it is for.
    #[error(
        "network service `{service}` is not registered in domain `{domain}`, though endpoints offer it: register it, with its matches if it has any"
    )]
    Unregistered {
        /// The service without its domain.
        service: String,
        /// The domain that was asked.
        domain: String,
    },
    /// The service exists, its endpoints do not.
    #[error("network service `{service}` in domain `{domain}` has no endpoint now")]
    NoEndpoint {
        /// The service without its domain.
        service: String,
        /// The domain that was asked.
        domain: String,
    },
    /// The named endpoint does not exist.
    #[error("no endpoint `{endpoint}` in domain `{domain}`")]
    NoSuchEndpoint {
        /// The endpoint without its domain.
        endpoint: String,
        /// The domain that was asked.
        domain: String,
    },
    /// The service's matches leave no endpoint for the labels of the client.
    #[error(
        "none of the {count} endpoints of network service `{service}` in domain `{domain}` matches the client's labels {labels:?}"
    )]
    NoMatch {
        /// The service without its domain.
        service: String,
        /// The domain that was asked.
        domain: String,
        /// Endpoints that were considered.
        count: usize,
        /// The labels of the client.
        labels: Vec<String>,
    },
    /// The peer cannot be dialled.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer answered with an error.
    #[error("{url} refused {method}: {message}")]
    Refused {
        /// The peer's URL.
        url: String,
        /// The gRPC method.
        method: &'static str,
        /// The code of its answer, passed on.
        code: Code,
        /// Its message.
        message: String,
    },
    /// The peer did not answer in time.
    #[error(
        "{url} accepted {method} and did not answer within {after:?}: check that agent's load and log"
    )]
    Silent {
        /// The peer's URL.
        url: String,
        /// The gRPC method.
        method: &'static str,
        /// The time it had.
        after: Duration,
    },
    /// The peer's answer breaks the protocol.
    #[error("{url} answered {method} wrongly: {fault}")]
    BadAnswer {
        /// The peer's URL.
        url: String,
        /// The gRPC method.
        method: &'static str,
        /// What was wrong.
        fault: String,
    },
    /// The peer's answer would put something into a pod that is not admitted there.
    #[error("{url} granted the connection, but {refusal}")]
    Inadmissible {
        /// The peer's URL.
        url: String,
        /// The rule that refused it.
        refusal: Inadmissible,
    },
    /// The caller's connection is more than one may be, or asks for what is not admitted.
    #[error("the connection is refused: {0}")]
    Excessive(#[from] Inadmissible),
    /// Every endpoint that was tried failed.
    #[error("all {} endpoints of `{service}` failed: {}", causes.len(), causes.join("; "))]
    AllFailed {
        /// The service asked for.
        service: String,
        /// One sentence an endpoint.
        causes: Vec<String>,
        /// The code of the last failure.
        code: Code,
    },
    /// The path of the tunnel's packets to the peer could not be proved, and the policy wants it proved.
    #[error(
        "{url} granted the connection, but {evidence}; `reachability: require` refuses it then"
    )]
    Unproven {
        /// The peer's URL.
        url: String,
        /// What was seen.
        evidence: String,
    },
    /// The dataplane could not do its part.
    #[error(transparent)]
    Forwarder(#[from] ForwarderError),
    /// This agent has no forwarder and the request needs one.
    #[error(
        "this agent's forwarder role is switched off, and the request needs a {0} link on this node: set `forwarder: true`"
    )]
    NoForwarder(&'static str),
    /// No VNI could be had.
    #[error(transparent)]
    Vni(#[from] VniPoolError),
    /// The servers kept choosing keys of tunnels that are taken here.
    #[error(
        "{url} chose {key}, which is in use on this node, {tries} times in a row: close unused tunnels, or ask again"
    )]
    KeyTaken {
        /// The peer's URL.
        url: String,
        /// The last key.
        key: TunnelKey,
        /// How often we asked.
        tries: u32,
    },
    /// A limit is reached.
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    /// An earlier event of the same connection takes too long.
    #[error("an earlier Request or Close of connection `{id}` is still at work after {after:?}")]
    Busy {
        /// The connection's id here.
        id: String,
        /// How long this one waited.
        after: Duration,
    },
    /// The agent is draining.
    #[error("this agent is shutting down: ask another, or again in a moment")]
    Draining,
    /// The caller may not use this agent for that. One text for all reasons: the log has them.
    #[error(
        "this agent does not serve that for you: its own domain's names are for everybody, the rest is for callers that its operator \
         has named (`relay_for`, `registrants`); the agent's log has the reason"
    )]
    NotServed(#[from] NotServed),
    /// A next hop has failed, and the caller may not know why.
    #[error(
        "the endpoint cannot be reached now: the log of the agent of its domain has the reason"
    )]
    Unreachable,
    /// The policy refuses the call.
    #[error(transparent)]
    Forbidden(#[from] Refusal),
    /// The tokens of the path prove nothing.
    #[error(transparent)]
    Tokens(#[from] TokensRefused),
    /// The policy denies the call to the id in the certificate, or the answer to the server's.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A task of the agent died; its log has the panic.
    #[error("internal fault: the request's task ended early, see the agent's log")]
    Internal,
}

impl RequestError {
    /// The answer to a Request that the next hop at `url` gave breaks the protocol.
    pub(crate) fn bad_answer(url: &PeerUrl, fault: impl std::fmt::Display) -> Self {
        Self::BadAnswer {
            url: url.to_string(),
            method: "Request",
            fault: fault.to_string(),
        }
    }

    /// Whether the error is that this node has another tunnel with the key.
    pub(crate) fn is_key_taken(&self) -> bool {
        matches!(self, Self::Forwarder(ForwarderError::KeyTaken(_)))
    }

    /// The gRPC code the error travels as.
    pub fn code(&self) -> Code {
        match self {
            Self::Name(_)
            | Self::Path(_)
            | Self::Field { .. }
            | Self::Missing(_)
            | Self::Token(_)
            | Self::Excessive(_)
            | Self::Mechanism(_) => Code::InvalidArgument,
            Self::Expired { .. } => Code::Unauthenticated,
            Self::Registry(error) => error.code(),
            Self::Resolve(error) => resolve_code(error),
            Self::Dial(_)
            | Self::Unreachable
            | Self::Draining
            | Self::NoAddress
            | Self::Unproven { .. } => Code::Unavailable,
            Self::NoService { .. }
            | Self::Unregistered { .. }
            | Self::NoEndpoint { .. }
            | Self::NoSuchEndpoint { .. }
            | Self::NoMatch { .. } => Code::NotFound,
            Self::Refused { code, .. } | Self::AllFailed { code, .. } => *code,
            Self::Silent { .. } | Self::Busy { .. } => Code::DeadlineExceeded,
            Self::BadAnswer { .. } | Self::Internal => Code::Internal,
            Self::Forwarder(error) => error.code(),
            Self::NoForwarder(_) | Self::Inadmissible { .. } => Code::FailedPrecondition,
            Self::Vni(_) | Self::KeyTaken { .. } | Self::NoPlace(_) => Code::ResourceExhausted,
            // As NSM's own policies refuse.
            Self::Forbidden(_) | Self::NotServed(_) | Self::Tokens(_) | Self::Denied(_) => {
                Code::PermissionDenied
            }
        }
    }

    /// Whether the peer may have done what it was asked, and only its answer is missing or cannot
    /// be read. A broken stream, an answer over the limit and one that is no message come to us
    /// under codes that a peer's own refusal can have too: a Close of what is not there is harmless.
    pub(crate) fn may_have_been_granted(&self) -> bool {
        match self {
            Self::Silent { .. } => true,
            Self::Refused { code, .. } => matches!(
                code,
                Code::Unavailable
                    | Code::OutOfRange
                    | Code::Internal
                    | Code::Unknown
                    | Code::Cancelled
            ),
            _ => false,
        }
    }

    /// Whether another endpoint of the same service may do better.
    pub(crate) fn is_about_the_endpoint(&self) -> bool {
        match self {
            Self::Dial(_)
            | Self::Unreachable
            | Self::BadAnswer { .. }
            | Self::Inadmissible { .. }
            | Self::KeyTaken { .. }
            | Self::Unproven { .. } => true,
            Self::Refused { code, .. } => !matches!(
                code,
                Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated
            ),
            _ => false,
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        // It has text of other parties in it, and callers print it.
        let mut text = Shown(&error.to_string()).to_string();
        if text.len() > MAX_TEXT {
            text.truncate(text.floor_char_boundary(MAX_TEXT));
            text.push('…');
        }
        Status::new(error.code(), text)
    }
}

/// What another try would not change is `NotFound`; the rest may pass.
const fn resolve_code(error: &ResolveError) -> Code {
    match error {
        ResolveError::NoDomain { .. }
        | ResolveError::NoAddress { .. }
        | ResolveError::NotOffered { .. } => Code::NotFound,
        ResolveError::Busy { .. } => Code::ResourceExhausted,
        ResolveError::ServerFailed { .. }
        | ResolveError::Timeout { .. }
        | ResolveError::Unreachable { .. }
        | ResolveError::BadAnswer { .. }
        | ResolveError::NoServers { .. }
        | ResolveError::Interrupted { .. } => Code::Unavailable,
    }
}
