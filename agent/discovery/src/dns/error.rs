//! Why a domain could not be resolved: which question, which server, what to do.

use std::time::Duration;

use thiserror::Error;

/// Why a domain could not be resolved.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResolveError {
    /// The domain does not exist (NXDOMAIN).
    #[error(
        "domain {domain} does not exist: {server} answered NXDOMAIN to {question}; check the \
         spelling, publish the record, or name the domain in the resolver's hosts"
    )]
    NoDomain {
        /// The domain.
        domain: String,
        /// The question that decided: type and name.
        question: String,
        /// The server that answered.
        server: String,
    },
    /// The name exists, but has neither service records nor an address.
    #[error(
        "domain {domain} has no address: {server} has no records for {question}; publish SRV, A or \
         AAAA records, or name the domain in the resolver's hosts"
    )]
    NoAddress {
        /// The domain.
        domain: String,
        /// The question that decided: type and name.
        question: String,
        /// The server that answered.
        server: String,
    },
    /// By the service record there is no such service (RFC 2782: target `.`).
    #[error(
        "domain {domain} offers no registry: {server} answered {question} with the target \".\", \
         which means that the service is not available there"
    )]
    NotOffered {
        /// The domain.
        domain: String,
        /// The question: type and name.
        question: String,
        /// The server that answered.
        server: String,
    },
    /// A server answered with an error code such as SERVFAIL or REFUSED.
    #[error(
        "domain {domain}: {question} was refused ({tried}); look at the logs of that server or name \
         another one in the resolver's servers"
    )]
    ServerFailed {
        /// The domain.
        domain: String,
        /// The question: type and name.
        question: String,
        /// Each server asked, and what came of it.
        tried: String,
    },
    /// No server answered in time.
    #[error(
        "domain {domain}: no answer to {question} within {} ms ({tried}); check that the server is \
         up and that port 53 is open in both directions, or name another server",
        waited.as_millis()
    )]
    Timeout {
        /// The domain.
        domain: String,
        /// The question: type and name.
        question: String,
        /// Each server asked, and what came of it.
        tried: String,
        /// How long an answer was waited for.
        waited: Duration,
    },
    /// No server can be reached.
    #[error(
        "domain {domain}: no server can be asked {question} ({tried}); check the resolver's servers \
         and the route to them"
    )]
    Unreachable {
        /// The domain.
        domain: String,
        /// The question: type and name.
        question: String,
        /// Each server asked, and what came of it.
        tried: String,
    },
    /// What a server answered is no DNS message or does not answer the question.
    #[error(
        "domain {domain}: the answer to {question} cannot be used ({tried}); check that a DNS \
         server listens there"
    )]
    BadAnswer {
        /// The domain.
        domain: String,
        /// The question: type and name.
        question: String,
        /// Each server asked, and what came of it.
        tried: String,
    },
    /// There is no server to ask.
    #[error(
        "domain {domain}: no DNS server is known ({reason}); name servers in the configuration or in \
         /etc/resolv.conf"
    )]
    NoServers {
        /// The domain.
        domain: String,
        /// Why none is known.
        reason: String,
    },
    /// Too many domains are being resolved at once.
    #[error(
        "domain {domain}: {limit} other domains are being resolved, the limit; ask again in a moment"
    )]
    Busy {
        /// The domain.
        domain: String,
        /// The limit.
        limit: usize,
    },
    /// The agent stopped while the question was in flight.
    #[error("domain {domain}: the question was given up because the agent stops")]
    Interrupted {
        /// The domain.
        domain: String,
    },
}

impl ResolveError {
    /// Whether it says nothing about the domain: another try may get an answer.
    pub(super) const fn is_passing(&self) -> bool {
        match self {
            Self::NoDomain { .. } | Self::NoAddress { .. } | Self::NotOffered { .. } => false,
            Self::ServerFailed { .. }
            | Self::Timeout { .. }
            | Self::Unreachable { .. }
            | Self::BadAnswer { .. }
            | Self::NoServers { .. }
            | Self::Busy { .. }
            | Self::Interrupted { .. } => true,
        }
    }
}
