//! The DNS servers: one question to all of them, one answer back.
//!
//! Each server is a hickory client of its own, so that an answer and a failure have a server's name
//! on them. Servers are asked in their order: the next one as soon as one fails, or when one stays
//! silent for its share of the time; the first usable answer wins. TCP comes after UDP when an
//! answer is truncated, and once more for each server at the end, for a network that lets only
//! TCP pass. Hickory's cache is off: there is one cache, that of the resolver, above this.
//!
//! Answers are used when hickory has matched source, id and question.

use std::{collections::VecDeque, fmt, io, net::SocketAddr, pin::Pin, time::Duration};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use hickory_resolver::{
    Resolver as Hickory,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{
        DnsError, NetError,
        runtime::{RuntimeProvider, TokioRuntimeProvider},
    },
    proto::{
        op::ResponseCode,
        rr::{Name, Record, RecordType},
    },
    system_conf::read_system_conf,
};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use super::error::ResolveError;

/// The servers, in the order in which they are asked.
pub(super) struct Upstream {
    attempts: Vec<Attempt>,
    /// How long the next attempt waits for a silent one.
    stagger: Duration,
    /// Why there are no servers, when there are none.
    none: String,
    timeout: Duration,
}

/// One way to ask.
struct Attempt {
    server: SocketAddr,
    transport: Transport,
    client: Hickory<Connected>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// A question that is asked.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) name: Name,
    pub(super) kind: RecordType,
}

/// A usable answer.
pub(super) enum Reply {
    Records(Records),
    Nothing(Nothing),
}

/// Records that answer the question.
pub(super) struct Records {
    pub(super) answers: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    pub(super) server: SocketAddr,
}

/// The answer that there are no such records.
#[derive(Clone, Copy)]
pub(super) struct Nothing {
    /// False for NXDOMAIN: the name has no records of any type.
    pub(super) exists: bool,
    /// How long the zone says that this holds, where it says so.
    pub(super) ttl: Option<Duration>,
    pub(super) server: SocketAddr,
}

/// No server gave a usable answer: each attempt and what came of it.
pub(super) struct Unanswered(Vec<(SocketAddr, Transport, Cause)>);

/// What came of one attempt that failed.
#[derive(Clone, Debug)]
enum Cause {
    /// The server answered with an error code.
    Code(ResponseCode),
    /// Nothing came back.
    Silent,
    /// The host or its network refused.
    Unreachable(String),
    /// Something came back that is no answer.
    Bad(String),
}

impl Upstream {
    /// The given servers or, when there are none, those of /etc/resolv.conf.
    pub(super) fn new(servers: &[SocketAddr], timeout: Duration) -> Self {
        let (servers, none) = if servers.is_empty() {
            match read_system_conf() {
                Ok((config, _)) => (addresses(&config), "none is configured".to_owned()),
                Err(error) => (Vec::new(), format!("/etc/resolv.conf: {error}")),
            }
        } else {
            (servers.to_vec(), String::new())
        };
        let attempts: Vec<_> = [Transport::Udp, Transport::Tcp]
            .into_iter()
            .flat_map(|transport| servers.iter().map(move |server| (*server, transport)))
            .filter_map(|(server, transport)| Attempt::new(server, transport, timeout))
            .collect();
        let shares = u32::try_from(attempts.len()).unwrap_or(u32::MAX).max(1);
        Self {
            attempts,
            stagger: timeout / shares,
            none,
            timeout,
        }
    }

    /// Asks until one server answers, none is left, or the deadline has come.
    pub(super) async fn ask(
        &self,
        question: &Question,
        deadline: Instant,
    ) -> Result<Reply, Unanswered> {
        let mut waiting: VecDeque<&Attempt> = self.attempts.iter().collect();
        let mut running = FuturesUnordered::new();
        let mut silent: Vec<&Attempt> = Vec::new();
        let mut tried = Vec::new();
        loop {
            if let Some(attempt) = waiting.pop_front() {
                silent.push(attempt);
                running.push(async move { (attempt, attempt.ask(question).await) });
            }
            let turn = if waiting.is_empty() {
                deadline
            } else {
                deadline.min(Instant::now() + self.stagger)
            };
            match timeout_at(turn, running.next()).await {
                Ok(Some((_, Ok(reply)))) => return Ok(reply),
                Ok(Some((attempt, Err(cause)))) => {
                    // Who answers with an error by UDP has no other answer by TCP.
                    if matches!(cause, Cause::Code(_)) {
                        waiting.retain(|other| other.server != attempt.server);
                    }
                    silent.retain(|other| !std::ptr::eq(*other, attempt));
                    tried.push((attempt.server, attempt.transport, cause));
                }
                Ok(None) if waiting.is_empty() => return Err(Unanswered(tried)),
                Err(_) if Instant::now() >= deadline => {
                    tried.extend(
                        silent
                            .iter()
                            .map(|attempt| (attempt.server, attempt.transport, Cause::Silent)),
                    );
                    return Err(Unanswered(tried));
                }
                // The turn of the next attempt has come.
                Ok(None) | Err(_) => {}
            }
        }
    }

    /// Says why `domain` cannot be resolved.
    pub(super) fn explain(
        &self,
        domain: &str,
        question: &Question,
        Unanswered(tried): &Unanswered,
    ) -> ResolveError {
        let domain = domain.to_owned();
        if tried.is_empty() && self.attempts.is_empty() {
            return ResolveError::NoServers {
                domain,
                reason: self.none.clone(),
            };
        }
        let question = question.to_string();
        let causes = || tried.iter().map(|(_, _, cause)| cause);
        let text = tried
            .iter()
            .map(|(server, transport, cause)| format!("{server} by {transport}: {cause}"))
            .collect::<Vec<_>>()
            .join("; ");
        // The most telling cause names the error; the text holds them all.
        if causes().any(|cause| matches!(cause, Cause::Code(_))) {
            return ResolveError::ServerFailed {
                domain,
                question,
                tried: text,
            };
        }
        if causes().any(|cause| matches!(cause, Cause::Bad(_))) {
            return ResolveError::BadAnswer {
                domain,
                question,
                tried: text,
            };
        }
        if causes().all(|cause| matches!(cause, Cause::Unreachable(_))) && !tried.is_empty() {
            return ResolveError::Unreachable {
                domain,
                question,
                tried: text,
            };
        }
        ResolveError::Timeout {
            domain,
            question,
            tried: text,
            waited: self.timeout,
        }
    }
}

impl Attempt {
    /// None when hickory refuses its own defaults, which it does only with TLS.
    fn new(server: SocketAddr, transport: Transport, timeout: Duration) -> Option<Self> {
        let connections = match transport {
            Transport::Udp => vec![ConnectionConfig::udp(), ConnectionConfig::tcp()],
            Transport::Tcp => vec![ConnectionConfig::tcp()],
        };
        let connections = connections
            .into_iter()
            .map(|mut connection| {
                connection.port = server.port();
                connection
            })
            .collect();
        let config = ResolverConfig::from_name_servers(vec![NameServerConfig::new(
            server.ip(),
            true,
            connections,
        )]);
        let mut builder = Hickory::builder_with_config(config, Connected::default());
        let options: &mut ResolverOpts = builder.options_mut();
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.timeout = timeout;
        options.attempts = 0;
        Some(Self {
            server,
            transport,
            client: builder.build().ok()?,
        })
    }

    async fn ask(&self, question: &Question) -> Result<Reply, Cause> {
        let server = self.server;
        let nothing = |exists, ttl: Option<u32>| {
            Ok(Reply::Nothing(Nothing {
                exists,
                ttl: ttl.map(|seconds| Duration::from_secs(seconds.into())),
                server,
            }))
        };
        match self
            .client
            .lookup(question.name.clone(), question.kind)
            .await
        {
            Ok(lookup) => {
                let wanted = |record: &Record| record.record_type() == question.kind;
                if !lookup.answers().iter().any(wanted) {
                    return nothing(true, None);
                }
                Ok(Reply::Records(Records {
                    answers: lookup.answers().to_vec(),
                    additionals: lookup.additionals().to_vec(),
                    server,
                }))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => nothing(
                none.response_code != ResponseCode::NXDomain,
                none.negative_ttl,
            ),
            Err(NetError::Dns(DnsError::ResponseCode(code))) => Err(Cause::Code(code)),
            Err(NetError::Timeout) => Err(Cause::Silent),
            Err(NetError::Io(error)) if error.kind() == io::ErrorKind::TimedOut => {
                Err(Cause::Silent)
            }
            Err(NetError::Io(error)) => Err(Cause::Unreachable(error.to_string())),
            Err(error) => Err(Cause::Bad(error.to_string())),
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.to_ascii();
        write!(f, "{} {}", self.kind, name.trim_end_matches('.'))
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
        })
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

fn addresses(config: &ResolverConfig) -> Vec<SocketAddr> {
    config
        .name_servers()
        .iter()
        .map(|server| {
            let port = server.connections.first().map_or(53, |first| first.port);
            SocketAddr::new(server.ip, port)
        })
        .collect()
}

/// Hickory's tokio runtime, with UDP sockets that are connected to their server: the kernel then
/// reports an ICMP refusal at once instead of letting the question time out, and drops what others
/// send. Linux lets a connected socket `sendto` its own peer, which is what hickory does.
#[derive(Clone, Default)]
struct Connected(TokioRuntimeProvider);

impl RuntimeProvider for Connected {
    type Handle = <TokioRuntimeProvider as RuntimeProvider>::Handle;
    type Timer = <TokioRuntimeProvider as RuntimeProvider>::Timer;
    type Udp = UdpSocket;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.0.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        self.0.connect_tcp(server, bind, timeout)
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<UdpSocket>>>> {
        Box::pin(async move {
            let socket = UdpSocket::bind(local).await?;
            socket.connect(server).await?;
            Ok(socket)
        })
    }
}
