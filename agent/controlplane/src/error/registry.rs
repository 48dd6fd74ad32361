//! What the registry in this process refuses.

use std::time::SystemTime;

use nsm_core::identity::policy::Refusal;
use thiserror::Error;
use tonic::Code;

use crate::places::NoPlace;

/// Why the registry refused a call or ended a watch.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegistryError {
    /// The policy refuses the call.
    #[error(transparent)]
    Forbidden(#[from] Refusal),
    /// An entry without a name cannot be found again.
    #[error("a {kind} needs a name; the one given is empty")]
    NoName {
        /// `network service` or `network service endpoint`.
        kind: &'static str,
    },
    /// A name over the limit.
    #[error("the name of a {kind} has {length} bytes, more than the {limit} allowed: {start}…")]
    NameTooLong {
        /// `network service` or `network service endpoint`.
        kind: &'static str,
        /// Its first characters.
        start: String,
        /// Its length in bytes.
        length: usize,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// More service names on one endpoint than the limit.
    #[error(
        "endpoint {name} lists {count} network services, more than the {limit} allowed; register \
         several endpoints"
    )]
    TooManyServices {
        /// The endpoint.
        name: String,
        /// How many it lists.
        count: usize,
        /// What is allowed.
        limit: usize,
    },
    /// An entry whose labels, matches or path ids are too large.
    #[error(
        "{kind} {name} has {size} bytes, more than the {limit} allowed; give it fewer labels or \
         matches"
    )]
    TooLarge {
        /// `network service` or `network service endpoint`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Its encoded size in bytes.
        size: usize,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// The endpoint would be gone before it is there.
    #[error(
        "endpoint {name} asks to expire, or carries a token that expires, {ago_ms} ms ago; compare \
         the clocks of both hosts"
    )]
    Expired {
        /// The endpoint.
        name: String,
        /// How long ago, in milliseconds.
        ago_ms: u128,
    },
    /// A limit is reached.
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    /// The watcher did not take its events in time and was dropped.
    #[error(
        "the watcher was dropped because it does not read its events, of which {depth} may wait, or fewer where its source holds much \
         already; watch again and read faster"
    )]
    Lagged {
        /// How many events wait at most.
        depth: usize,
    },
    /// The agent is going away.
    #[error("the registry is closing because the agent stops; ask again when it is back")]
    Closed,
}

impl RegistryError {
    /// The gRPC code the error travels as.
    pub fn code(&self) -> Code {
        match self {
            Self::NoName { .. }
            | Self::NameTooLong { .. }
            | Self::TooManyServices { .. }
            | Self::TooLarge { .. }
            | Self::Expired { .. } => Code::InvalidArgument,
            Self::NoPlace(_) | Self::Lagged { .. } => Code::ResourceExhausted,
            Self::Closed => Code::Unavailable,
            Self::Forbidden(_) => Code::PermissionDenied,
        }
    }

    pub(crate) fn expired(name: String, expiry: SystemTime, now: SystemTime) -> Self {
        let ago = now.duration_since(expiry).unwrap_or_default();
        Self::Expired {
            name,
            ago_ms: ago.as_millis(),
        }
    }
}
