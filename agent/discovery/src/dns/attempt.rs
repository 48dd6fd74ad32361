//! One question to one server, asked by hickory, and what came of it.
//!
//! Hickory's connections own the sockets, ids, source ports, matching, retransmission and EDNS. Its
//! `Resolver` and `NameServerPool` stand above them and are not used, because they lose what an
//! operator and our rules need (0.26): a pool reports a refused or unroutable server as "no
//! connections available", and for a service record whose owner is an alias the resolver asks for
//! the SRV records of the target and reports that there are none, which would lead to default ports
//! that the domain did not name. Aliases are followed in `answer`.
//!
//! A connection serves one question. Kept for reuse, a TCP connection that died silently
//! would fail every question until the kernel gives it up.

use std::{fmt, io, net::SocketAddr, time::Duration};

use hickory_resolver::{
    ConnectionProvider as _, PoolContext, TlsConfig,
    config::{ConnectionConfig, ResolverOpts},
    net::{
        NetError,
        runtime::TokioRuntimeProvider,
        xfer::{DnsHandle as _, FirstAnswer as _},
    },
    proto::op::{DnsRequestOptions, DnsResponse, Query, ResponseCode},
};

use super::answer::{Answer, Question};

/// One way to ask.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) server: SocketAddr,
    pub(super) transport: Transport,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// And TCP when the answer is truncated.
    Udp,
    Tcp,
}

/// Why one server gave no usable answer.
#[derive(Clone, Debug)]
pub(super) enum Cause {
    /// It answered with an error code.
    Code(ResponseCode),
    /// Nothing came back. By UDP that includes a host that refuses.
    Silent,
    /// The host or its network refused.
    Unreachable(String),
    /// Something came back that is no answer.
    Bad(String),
}

/// What hickory needs besides the server; `timeout` bounds each step of a question.
pub(super) fn context(timeout: Duration) -> PoolContext {
    let mut options = ResolverOpts::default();
    options.timeout = timeout;
    let tls =
        TlsConfig::new().expect("hickory is built without TLS: nothing is read that can fail");
    PoolContext::new(options, tls)
}

impl Attempt {
    /// Asks and, when the answer does not fit UDP, asks by TCP.
    pub(super) async fn ask(
        self,
        context: &PoolContext,
        question: &Question,
    ) -> Result<Answer, Cause> {
        let by = |connection| self.exchange(connection, context, question);
        let response = match self.transport {
            Transport::Udp => by(ConnectionConfig::udp()).await?,
            Transport::Tcp => by(ConnectionConfig::tcp()).await?,
        };
        let response = if response.metadata.truncation && self.transport == Transport::Udp {
            by(ConnectionConfig::tcp()).await?
        } else {
            response
        };
        match response.metadata.response_code {
            ResponseCode::NoError | ResponseCode::NXDomain => {
                Ok(Answer::read(question, response.into_message()))
            }
            code => Err(Cause::Code(code)),
        }
    }

    async fn exchange(
        self,
        mut connection: ConnectionConfig,
        context: &PoolContext,
        question: &Question,
    ) -> Result<DnsResponse, NetError> {
        connection.port = self.server.port();
        let provider = TokioRuntimeProvider::default();
        let handle = provider
            .new_connection(self.server.ip(), &connection, context)?
            .await?;
        let query = Query::query(question.name.clone(), question.kind);
        let lookup = handle.lookup(query, DnsRequestOptions::default());
        lookup.first_answer().await
    }
}

impl From<NetError> for Cause {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Timeout => Self::Silent,
            // It took the connection, so it is there.
            error if error.is_connection_closed() => Self::Bad(error.to_string()),
            NetError::Io(error) if error.kind() == io::ErrorKind::TimedOut => Self::Silent,
            NetError::Io(error) => Self::Unreachable(error.to_string()),
            error => Self::Bad(error.to_string()),
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Udp => "UDP",
            Transport::Tcp => "TCP",
        };
        write!(f, "{} by {transport}", self.server)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(ResponseCode::ServFail) => f.write_str("SERVFAIL"),
            Self::Code(ResponseCode::Refused) => f.write_str("REFUSED"),
            Self::Code(code) => write!(f, "error code {} ({code})", u16::from(*code)),
            Self::Silent => f.write_str("no answer"),
            Self::Unreachable(why) => write!(f, "cannot be reached: {why}"),
            Self::Bad(why) => write!(f, "no usable answer: {why}"),
        }
    }
}
