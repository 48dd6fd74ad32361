//! Dialing of `unix://` and `tcp://` URLs, and of sockets whose descriptor was passed.
//!
//! NSM names its peers by such URLs in registrations, configuration and mechanisms. A [`DialUrl`]
//! is one that was parsed; [`dial`] gives a channel that is connected, so that a peer which is not
//! there is an error here, with the URL and the cause in it, and not one of a later call. A channel
//! reconnects by itself when its connection breaks.

use std::{
    error::Error as StdError,
    fmt, io,
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use http::uri::{Authority, Uri};
use hyper_util::rt::TokioIo;
use socket2::TcpKeepalive;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tonic::transport::{Channel, Endpoint};

use crate::transport::{
    coalesce::Coalesced,
    unix::{Descriptors, Passed, UnixStream},
};

/// How long a TCP connection may be silent before the kernel asks for a sign of life. A peer that
/// went away without a word is noticed after this and [`PROBES`] times [`PROBE_INTERVAL`], long
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
/// carries (RFC 8200 section 5). Where larger ones vanish without a word the kernel would send them again and again, and no Request came
/// through to build the tunnel whose MTU then follows the path.
pub(crate) const MAX_SEGMENT: u32 = 1220;

/// Where a peer listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DialUrl {
    /// `unix:///path` or `unix:path`: a socket on this machine.
    Unix(PathBuf),
    /// `tcp://host:port`; the host is a name or an address, without the brackets of IPv6.
    Tcp {
        /// A host name or an address.
        host: String,
        /// A TCP port, never 0.
        port: u16,
    },
}

/// Why a text is no URL that can be dialed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialUrlError {
    /// Neither `unix:` nor `tcp://`.
    #[error("{0:?} is no URL of a peer: expected unix:///path or tcp://host:port")]
    Scheme(String),
    /// `unix://` without a path.
    #[error("{0:?} names no socket: expected unix:///path")]
    NoPath(String),
    /// The host is missing or is not one.
    #[error("{0:?} names no host: expected tcp://host:port, an IPv6 address in brackets")]
    Host(String),
    /// The port is missing, 0 or above 65535.
    #[error("{0:?} names no port between 1 and 65535: expected tcp://host:port")]
    Port(String),
}

/// Why a peer could not be dialed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The URL is none.
    #[error(transparent)]
    Url(#[from] DialUrlError),
    /// The peer refused, cannot be reached, or its name does not resolve.
    #[error("cannot connect to {url}: {cause}")]
    Connect {
        /// What was dialed.
        url: DialUrl,
        /// The innermost causes, in the kernel's or resolver's words.
        cause: String,
    },
    /// The peer was known by a descriptor of its socket, and has not registered again.
    #[error("the socket {0} is not known any more: its endpoint must register again")]
    Released(String),
    /// The peer did not take the connection in time.
    #[error("cannot connect to {url}: no answer within {timeout:?}")]
    Timeout {
        /// What was dialed.
        url: DialUrl,
        /// How long was waited.
        timeout: Duration,
    },
}

/// What a Unix connection's HTTP/2 requests call the other end, as gRPC does.
const UNIX_AUTHORITY: &str = "http://localhost";

/// Connects to `url` (`unix:///path` or `tcp://host:port`) within `dial_timeout`.
///
/// # Errors
///
/// The URL is none, or the peer cannot be connected to in time.
pub async fn dial(url: &str, dial_timeout: Duration) -> Result<Channel, DialError> {
    dial_with(url, &Arc::default(), dial_timeout).await
}

/// Connects to `url`; descriptors travel beside the calls by way of `descriptors`, where the
/// connection can carry any.
pub(crate) async fn dial_with(
    url: &str,
    descriptors: &Arc<Descriptors>,
    dial_timeout: Duration,
) -> Result<Channel, DialError> {
    let url = url.parse::<DialUrl>()?;
    url.connect_with(descriptors, dial_timeout).await
}

/// Connects to the socket that `socket` is a descriptor of, wherever its path may be.
pub(crate) async fn dial_passed(
    socket: &Passed,
    descriptors: &Arc<Descriptors>,
    dial_timeout: Duration,
) -> Result<Channel, DialError> {
    let shown = DialUrl::Unix(socket.path().into());
    let peer = UnixPeer::Passed(socket.clone());
    dial_unix(peer, descriptors, shown, dial_timeout).await
}

/// A socket to connect to, and to connect to again.
#[derive(Clone)]
enum UnixPeer {
    At(PathBuf),
    /// Held as long as the channel, so that its number means no other file.
    Passed(Passed),
}

async fn dial_unix(
    peer: UnixPeer,
    descriptors: &Arc<Descriptors>,
    shown: DialUrl,
    dial_timeout: Duration,
) -> Result<Channel, DialError> {
    let descriptors = Arc::clone(descriptors);
    let connector = tower::service_fn(move |_: Uri| {
        let (peer, descriptors) = (peer.clone(), Arc::clone(&descriptors));
        async move {
            let stream = match &peer {
                UnixPeer::At(path) => UnixStream::connect(path, descriptors).await?,
                UnixPeer::Passed(socket) => {
                    UnixStream::connect(Path::new(&socket.path()), descriptors).await?
                }
            };
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_static(UNIX_AUTHORITY).connect_timeout(dial_timeout);
    let connecting = endpoint.connect_with_connector(connector);
    in_time(&shown, dial_timeout, connecting).await
}

async fn in_time(
    url: &DialUrl,
    dial_timeout: Duration,
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
) -> Result<Channel, DialError> {
    match tokio::time::timeout(dial_timeout, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(DialError::Connect {
            url: url.clone(),
            cause: root_cause(&error),
        }),
        Err(_) => Err(DialError::Timeout {
            url: url.clone(),
            timeout: dial_timeout,
        }),
    }
}

impl DialUrl {
    /// Connects within `dial_timeout`.
    ///
    /// # Errors
    ///
    /// The peer cannot be connected to in time.
    pub async fn connect(&self, dial_timeout: Duration) -> Result<Channel, DialError> {
        self.connect_with(&Arc::default(), dial_timeout).await
    }

    /// Connects within `dial_timeout`; descriptors travel beside the calls by way of `descriptors`,
    /// where the connection can carry any.
    ///
    /// # Errors
    ///
    /// The peer cannot be connected to in time.
    pub async fn connect_with(
        &self,
        descriptors: &Arc<Descriptors>,
        dial_timeout: Duration,
    ) -> Result<Channel, DialError> {
        if let Self::Unix(path) = self {
            let peer = UnixPeer::At(path.clone());
            return dial_unix(peer, descriptors, self.clone(), dial_timeout).await;
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", self.authority()));
        let endpoint = endpoint.map_err(|error| DialError::Connect {
            url: self.clone(),
            cause: root_cause(&error),
        })?;
        let endpoint = endpoint.connect_timeout(dial_timeout);
        let connecting = endpoint.connect_with_connector(tower::service_fn(connect_tcp));
        in_time(self, dial_timeout, connecting).await
    }

    /// What stands behind `tcp://`, an IPv6 address in brackets; the path of a socket.
    fn authority(&self) -> String {
        match self {
            Self::Unix(path) => path.display().to_string(),
            Self::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } => format!("{host}:{port}"),
        }
    }
}

/// A TCP connection on which a dead peer is noticed by the kernel.
async fn connect_tcp(uri: Uri) -> io::Result<TokioIo<Coalesced<TcpStream>>> {
    let authority = uri.authority().map(Authority::as_str).unwrap_or_default();
    let stream = connect_to_one(authority).await?;
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(PROBE_INTERVAL)
            .with_retries(PROBES),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(TokioIo::new(Coalesced::new(stream)))
}

/// Connects to the first of a name's addresses that takes the connection. A segment's size is a matter of the handshake, so it is
/// said before.
async fn connect_to_one(authority: &str) -> io::Result<TcpStream> {
    let mut refused = None;
    for address in lookup_host(authority).await? {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket2::SockRef::from(&socket).set_tcp_mss(MAX_SEGMENT)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => refused = Some(error),
        }
    }
    let nowhere = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    Err(refused.unwrap_or_else(nowhere))
}

impl fmt::Display for DialUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self {
            Self::Unix(_) => "unix",
            Self::Tcp { .. } => "tcp",
        };
        write!(f, "{scheme}://{}", self.authority())
    }
}

impl FromStr for DialUrl {
    type Err = DialUrlError;

    fn from_str(text: &str) -> Result<Self, DialUrlError> {
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            return if path.is_empty() || path.contains('\0') {
                Err(DialUrlError::NoPath(text.to_owned()))
            } else {
                Ok(Self::Unix(Path::new(path).to_owned()))
            };
        }
        let Some(authority) = text.strip_prefix("tcp://") else {
            return Err(DialUrlError::Scheme(text.to_owned()));
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let Some((host, port)) = authority.rsplit_once(':') else {
            return Err(DialUrlError::Port(text.to_owned()));
        };
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|&port| port != 0)
            .ok_or_else(|| DialUrlError::Port(text.to_owned()))?;
        let host = host_name(host).ok_or_else(|| DialUrlError::Host(text.to_owned()))?;
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

/// The host without the brackets of an IPv6 address; `None` where it is no host.
fn host_name(host: &str) -> Option<&str> {
    if let Some(inner) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().is_ok().then_some(inner);
    }
    let is_name = !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    is_name.then_some(host)
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

    fn tcp(host: &str, port: u16) -> DialUrl {
        DialUrl::Tcp {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn urls_are_parsed() {
        for (text, url) in [
            (
                "unix:///run/nsm.sock",
                DialUrl::Unix("/run/nsm.sock".into()),
            ),
            ("unix:/run/nsm.sock", DialUrl::Unix("/run/nsm.sock".into())),
            ("unix:nsm.sock", DialUrl::Unix("nsm.sock".into())),
            ("tcp://192.0.2.1:5006", tcp("192.0.2.1", 5006)),
            ("tcp://[2001:db8::1]:5006", tcp("2001:db8::1", 5006)),
            (
                "tcp://registry.nsm-system:5002/",
                tcp("registry.nsm-system", 5002),
            ),
        ] {
            assert_eq!(text.parse(), Ok(url), "{text}");
        }
    }

    #[test]
    fn a_url_is_written_as_it_is_read() {
        for text in [
            "unix:///run/nsm.sock",
            "tcp://192.0.2.1:5006",
            "tcp://[2001:db8::1]:5006",
        ] {
            assert_eq!(text.parse::<DialUrl>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_url_is_told() {
        let error = |text: &str| text.parse::<DialUrl>().unwrap_err();
        let own = str::to_owned;
        for text in ["", "192.0.2.1:5006", "http://192.0.2.1:5006", "tcp:/x:1"] {
            assert_eq!(error(text), DialUrlError::Scheme(own(text)));
        }
        for text in ["unix:", "unix://", "unix:///a\0b"] {
            assert_eq!(error(text), DialUrlError::NoPath(own(text)));
        }
        for text in [
            "tcp://host",
            "tcp://host:",
            "tcp://host:0",
            "tcp://host:65536",
        ] {
            assert_eq!(error(text), DialUrlError::Port(own(text)));
        }
        for text in [
            "tcp://:5006",
            "tcp://2001:db8::1:5006",
            "tcp://[::1:5006",
            "tcp://[host]:5006",
            "tcp://a b:5006",
            "tcp://user@host:5006",
        ] {
            assert_eq!(error(text), DialUrlError::Host(own(text)), "{text}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_not_there_is_named_with_the_cause() {
        // Bound and dropped: nothing listens there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = dial(&url, Duration::from_secs(5)).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&url) && text.contains("refused"), "{text}");

        let error = dial("unix:///nowhere/nsm.sock", Duration::from_secs(5))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("unix:///nowhere/nsm.sock") && text.contains("No such file"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn both_kinds_connect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.sock");
        let unix = tokio::net::UnixListener::bind(&path).unwrap();
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp_url = format!("tcp://{}", tcp.local_addr().unwrap());
        let unix_url = format!("unix://{}", path.display());
        let accept = tokio::spawn(async move { (unix.accept().await, tcp.accept().await) });
        let timeout = Duration::from_secs(5);
        let _unix = dial(&unix_url, timeout).await.unwrap();
        let _tcp = dial(&tcp_url, timeout).await.unwrap();
        let (unix, tcp) = accept.await.unwrap();
        unix.unwrap();
        tcp.unwrap();
    }
}
