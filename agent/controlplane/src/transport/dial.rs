//! Dialing of peers by their URL, and of sockets whose descriptor was passed.
//!
//! [`dial`] gives a channel that is connected, so that a peer which is not
//! there is an error here, with the URL and the cause in it, and not one of a later call. A channel
//! reconnects by itself when its connection breaks.

use std::{
    error::Error as StdError,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::uri::{Authority, Uri};
use hyper_util::rt::TokioIo;
use nsm_core::{
    identity::Process,
    net::{PeerPlace, PeerUrl, PeerUrlError},
};
use socket2::TcpKeepalive;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream, lookup_host},
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    identity::session::Session,
    sync::lock,
    transport::{
        coalesce::Coalesced,
        guard::DialGuard,
        stagger,
        tls::{self, Secured, Tls},
        unix::{Descriptors, Passed, UnixStream},
    },
};

/// How long a TCP connection may be silent before the kernel probes it. A peer that
/// vanished is noticed after this and [`PROBES`] times [`PROBE_INTERVAL`], long
/// before the shortest token (a minute for an endpoint's registration) expires.
///
/// The probes are TCP's, not HTTP/2's: a gRPC server in Go, as every real NSM component is, ends a
/// connection whose client sends PINGs more often than every five minutes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);

/// Time between two such probes: over any WAN an answer takes a fraction of it.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// Probes without an answer that end the connection.
const PROBES: u32 = 3;

/// How long what was sent may stay unacknowledged (RFC 5482). Without it a peer that dies with data
/// on the way is noticed when the kernel gives up retransmitting, after a quarter of an hour.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// The largest segment of TCP connections between agents, bytes: no packet of theirs is longer than the 1,280 bytes that every path
/// carries (RFC 8200 section 5). Where larger ones are dropped silently the kernel would send them again and again, and no Request came
/// through to build the tunnel whose MTU then follows the path.
pub(crate) const MAX_SEGMENT: u32 = 1220;

/// Why a peer could not be dialed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The URL is none.
    #[error(transparent)]
    Url(#[from] PeerUrlError),
    /// The peer refused, cannot be reached, or its name does not resolve.
    #[error("cannot connect to {url}: {cause}")]
    Connect {
        /// What was dialed.
        url: PeerUrl,
        /// The innermost causes, as the kernel or resolver names them.
        cause: String,
    },
    /// The peer was known by a descriptor of its socket, and has not registered again.
    #[error("the socket {0} is not known any more: its endpoint must register again")]
    Released(PeerUrl),
    /// None of several addresses of one service can be connected to.
    #[error("none of the {} addresses can be connected to: {}", .0.len(), .0.join("; "))]
    All(Vec<String>),
    /// The peer did not take the connection in time.
    #[error("cannot connect to {url}: no answer within {timeout:?}")]
    Timeout {
        /// What was dialed.
        url: PeerUrl,
        /// How long was waited.
        timeout: Duration,
    },
}

/// What a Unix connection's HTTP/2 requests call the other end, as gRPC does.
const UNIX_AUTHORITY: &str = "http://localhost";

/// A connection to a peer.
#[derive(Debug, Clone)]
pub struct Link {
    /// What calls go over.
    pub channel: Channel,
    state: Arc<LinkState>,
}

/// What is known of the stream below a channel.
#[derive(Debug, Default)]
struct LinkState {
    /// Of the stream that was made last; none in plain text.
    session: Mutex<Option<Arc<Session>>>,
    /// Whether the stream in TLS is gone.
    ended: Arc<AtomicBool>,
}

impl Link {
    /// What both ends have shown each other; none in plain text.
    #[must_use]
    pub fn session(&self) -> Option<Arc<Session>> {
        lock(&self.state.session).clone()
    }

    /// Whether the next call needs another link: this one's TLS connection has ended, or its certificates soon will.
    #[must_use]
    pub fn is_spent(&self, now: SystemTime) -> bool {
        match &*lock(&self.state.session) {
            Some(session) => self.state.ended.load(Ordering::Relaxed) || session.is_due(now),
            None => false,
        }
    }
}

/// How the streams of a channel are made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    /// What each stream is secured with; none is plain text.
    pub(crate) tls: Option<Arc<Tls>>,
    /// What admits the addresses that are connected to; none admits all.
    pub(crate) guard: Option<Arc<DialGuard>>,
    /// Whether a channel in TLS has one connection in its life: what is signed for a call must fit the certificates that the call goes
    /// by, and a channel that connects again would show others.
    pub(crate) is_once: bool,
}

/// Makes the streams of one channel.
#[derive(Debug, Clone)]
struct Maker {
    rules: Rules,
    /// What is dialled, as logs name it.
    peer: Arc<str>,
    state: Arc<LinkState>,
}

impl Maker {
    fn new(rules: Rules, url: &PeerUrl) -> Self {
        Self {
            rules,
            peer: url.to_string().into(),
            state: Arc::default(),
        }
    }

    /// A stream, secured where it has to be.
    async fn secure<S>(&self, stream: S) -> io::Result<Secured<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let secured = tls::dialled(self.rules.tls.as_deref(), stream, &self.peer).await?;
        let Some(session) = secured.session() else {
            return Ok(secured);
        };
        *lock(&self.state.session) = Some(Arc::clone(session));
        self.state.ended.store(false, Ordering::Relaxed);
        Ok(secured.noting_its_end(Arc::clone(&self.state.ended)))
    }

    /// Whether another stream may be made.
    fn check(&self) -> io::Result<()> {
        if self.rules.is_once && lock(&self.state.session).is_some() {
            let what = "the TLS connection has ended; the next call makes another";
            return Err(io::Error::new(io::ErrorKind::NotConnected, what));
        }
        Ok(())
    }

    fn link(self, channel: Channel) -> Link {
        Link {
            channel,
            state: self.state,
        }
    }
}

/// Connects to `url` in plain text within `dial_timeout`.
///
/// # Errors
///
/// The peer cannot be connected to in time.
pub async fn dial(url: &PeerUrl, dial_timeout: Duration) -> Result<Channel, DialError> {
    let link = dial_with(url, &Arc::default(), None, dial_timeout).await?;
    Ok(link.channel)
}

/// Connects to `url` within `dial_timeout`, by `tls` where there is any; descriptors travel beside the calls by way of `descriptors`,
/// where the connection can carry any. The link connects again by itself.
///
/// # Errors
///
/// The peer cannot be connected to in time.
pub async fn dial_with(
    url: &PeerUrl,
    descriptors: &Arc<Descriptors>,
    tls: Option<&Arc<Tls>>,
    dial_timeout: Duration,
) -> Result<Link, DialError> {
    let rules = Rules {
        tls: tls.cloned(),
        ..Rules::default()
    };
    dial_by(rules, url, descriptors, dial_timeout).await
}

/// As [`dial_with`], by rules.
///
/// # Errors
///
/// The peer cannot be connected to in time, or the guard does not admit where it is.
pub(crate) async fn dial_by(
    rules: Rules,
    url: &PeerUrl,
    descriptors: &Arc<Descriptors>,
    dial_timeout: Duration,
) -> Result<Link, DialError> {
    match url.place() {
        PeerPlace::Unix(path) => {
            let peer = UnixPeer::At(path.clone());
            dial_unix(rules, peer, descriptors, url, dial_timeout).await
        }
        PeerPlace::Tcp { host, port } => dial_tcp(rules, url, (host, *port), dial_timeout).await,
        PeerPlace::Passed { .. } => Err(DialError::Released(url.clone())),
    }
}

/// Connects to the socket that `socket` is a descriptor of, wherever its path may be; `url` is what it is called.
///
/// Where there is a `registrant`, it or one of its pod must listen there. The agent may connect to sockets that the registrant may not,
/// and a descriptor shows only that its file could be looked up; the agent's own socket could be passed, too.
pub(crate) async fn dial_passed(
    rules: Rules,
    socket: &Passed,
    registrant: Option<Process>,
    url: &PeerUrl,
    descriptors: &Arc<Descriptors>,
    dial_timeout: Duration,
) -> Result<Link, DialError> {
    let peer = UnixPeer::Passed(socket.clone(), registrant);
    dial_unix(rules, peer, descriptors, url, dial_timeout).await
}

async fn dial_tcp(
    rules: Rules,
    url: &PeerUrl,
    (host, port): (&str, u16),
    dial_timeout: Duration,
) -> Result<Link, DialError> {
    let authority = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let endpoint = Endpoint::from_shared(format!("http://{authority}"));
    let endpoint = endpoint.map_err(|error| DialError::Connect {
        url: url.clone(),
        cause: root_cause(&error),
    })?;
    let endpoint = endpoint.connect_timeout(dial_timeout);
    let maker = Maker::new(rules, url);
    let connecting = endpoint.connect_with_connector(tower::service_fn({
        let maker = maker.clone();
        move |uri| connect_tcp(uri, maker.clone())
    }));
    let channel = in_time(url, dial_timeout, connecting).await?;
    Ok(maker.link(channel))
}

/// A socket to connect to, and to connect to again.
#[derive(Clone)]
enum UnixPeer {
    At(PathBuf),
    /// Held as long as the channel, so that its number means no other file. And who alone may listen there.
    Passed(Passed, Option<Process>),
}

impl UnixPeer {
    async fn connect(&self, descriptors: Arc<Descriptors>) -> io::Result<UnixStream> {
        match self {
            Self::At(path) => UnixStream::connect(path, descriptors).await,
            Self::Passed(socket, registrant) => {
                let path = socket.path();
                let stream =
                    UnixStream::connect(Path::new(&path), Arc::clone(&descriptors)).await?;
                let listener = descriptors.peer();
                match registrant {
                    Some(registrant) if !listener.is_fellow_of(registrant) => Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        "the process that listens there is not of the user and pod that registered it: serve the endpoint from the pod that registers it",
                    )),
                    _ => Ok(stream),
                }
            }
        }
    }
}

async fn dial_unix(
    rules: Rules,
    peer: UnixPeer,
    descriptors: &Arc<Descriptors>,
    url: &PeerUrl,
    dial_timeout: Duration,
) -> Result<Link, DialError> {
    let maker = Maker::new(rules, url);
    let (making, descriptors) = (maker.clone(), Arc::clone(descriptors));
    let connector = tower::service_fn(move |_: Uri| {
        let (peer, descriptors, maker) = (peer.clone(), Arc::clone(&descriptors), making.clone());
        async move {
            maker.check()?;
            let stream = peer.connect(descriptors).await?;
            let stream = maker.secure(stream).await?;
            Ok::<_, io::Error>(TokioIo::new(match stream.session() {
                Some(_) => Coalesced::new(stream),
                None => Coalesced::direct(stream),
            }))
        }
    });
    let endpoint = Endpoint::from_static(UNIX_AUTHORITY).connect_timeout(dial_timeout);
    let connecting = endpoint.connect_with_connector(connector);
    let channel = in_time(url, dial_timeout, connecting).await?;
    Ok(maker.link(channel))
}

async fn in_time(
    url: &PeerUrl,
    dial_timeout: Duration,
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
) -> Result<Channel, DialError> {
    match tokio::time::timeout(dial_timeout, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) if !is_elapsed(&error) => Err(DialError::Connect {
            url: url.clone(),
            cause: root_cause(&error),
        }),
        Ok(Err(_)) | Err(_) => Err(DialError::Timeout {
            url: url.clone(),
            timeout: dial_timeout,
        }),
    }
}

/// A TCP connection on which a dead peer is noticed by the kernel.
async fn connect_tcp(uri: Uri, maker: Maker) -> io::Result<TokioIo<Coalesced<Secured<TcpStream>>>> {
    maker.check()?;
    let authority = uri.authority().map(Authority::as_str).unwrap_or_default();
    let stream = connect_to_one(authority, maker.rules.guard.as_deref()).await?;
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(PROBE_INTERVAL)
            .with_retries(PROBES),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(TokioIo::new(Coalesced::new(maker.secure(stream).await?)))
}

/// Connects to the first of a name's addresses that takes the connection. A segment's size is a matter of the handshake, so it is
/// said before.
async fn connect_to_one(authority: &str, guard: Option<&DialGuard>) -> io::Result<TcpStream> {
    let addresses = lookup_host(authority).await?;
    let attempts = addresses.map(|address| connect_to(address, guard));
    let nowhere = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    stagger::first(attempts)
        .await
        .map_err(|mut failures| failures.pop().unwrap_or_else(nowhere))
}

async fn connect_to(address: SocketAddr, guard: Option<&DialGuard>) -> io::Result<TcpStream> {
    if let Some(guard) = guard {
        guard.check(address)?;
    }
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket2::SockRef::from(&socket).set_tcp_mss(MAX_SEGMENT)?;
    socket.connect(address).await
}

/// Whether a try to connect ended by the channel's own limit. The kernel's limits, which end connections too, have no inner error.
fn is_elapsed(error: &(dyn StdError + 'static)) -> bool {
    is_caused_by(error, |cause| {
        let inner = cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        inner.is_some_and(|inner| inner.is::<tokio::time::error::Elapsed>())
    })
}

/// Whether a channel could not connect, now or by an earlier call: nothing of this call was sent.
pub(crate) fn is_unsent(error: &(dyn StdError + 'static)) -> bool {
    is_elapsed(error) || is_caused_by(error, |cause| cause.is::<tonic::ConnectError>())
}

fn is_caused_by(
    error: &(dyn StdError + 'static),
    is_it: impl Fn(&(dyn StdError + 'static)) -> bool,
) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if is_it(error) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The innermost cause: tonic's own text is "transport error", the reason lies below it.
fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_is_not_there_is_named_with_the_cause() {
        // Bound and dropped: nothing listens there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = dial(&url.parse().unwrap(), Duration::from_secs(5)).await;
        let text = error.unwrap_err().to_string();
        assert!(text.contains(&url) && text.contains("refused"), "{text}");

        let nowhere = "unix:///nowhere/nsm.sock".parse().unwrap();
        let error = dial(&nowhere, Duration::from_secs(5)).await;
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("unix:///nowhere/nsm.sock") && text.contains("No such file"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_passed_socket_is_only_dialled_where_its_registrant_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let accepting = tokio::spawn(async move {
            loop {
                let accepted = listener.accept().await;
                drop(accepted);
            }
        });
        let own = tokio::net::UnixStream::pair().unwrap().0;
        let own = crate::transport::unix::PeerProcess::of(&own).look();
        let other = Process {
            user: own.user.map(|user| user + 1),
            ..own
        };
        let at = |registrant| {
            let flags = rustix::fs::OFlags::PATH;
            let socket = rustix::fs::open(&path, flags, rustix::fs::Mode::empty());
            UnixPeer::Passed(Passed::new(socket.unwrap()), registrant)
        };
        for (registrant, wanted) in [(None, true), (Some(own), true), (Some(other), false)] {
            let connected = at(registrant).connect(Arc::default()).await;
            assert_eq!(connected.is_ok(), wanted, "{registrant:?}");
        }
        accepting.abort();
    }

    #[tokio::test]
    async fn both_kinds_connect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.sock");
        let unix = tokio::net::UnixListener::bind(&path).unwrap();
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp_url = PeerUrl::from(tcp.local_addr().unwrap());
        let unix_url = PeerUrl::unix(&path);
        let accept = tokio::spawn(async move { (unix.accept().await, tcp.accept().await) });
        let timeout = Duration::from_secs(5);
        let _unix = dial(&unix_url, timeout).await.unwrap();
        let _tcp = dial(&tcp_url, timeout).await.unwrap();
        let (unix, tcp) = accept.await.unwrap();
        unix.unwrap();
        tcp.unwrap();
    }
}
