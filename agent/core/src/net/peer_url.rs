//! URLs of peers: where an agent, manager, registry or endpoint listens.

use std::{
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use super::NetnsUrl;
use crate::text::port_number;

/// Why a text is no URL of a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerUrlError {
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
    /// An inode URL without two numbers.
    #[error(
        "{0:?} names no socket that was passed: write inode://<device>/<inode>, both decimal, as stat shows them"
    )]
    Inode(String),
}

/// Where a peer listens, parsed. It is shown, compared and hashed by its text. A URL from the wire keeps the text that it was parsed from,
/// because other components compare URLs as texts; a [configured](Self::configured) one has the canonical text. Cheap to clone.
#[derive(Clone)]
pub struct PeerUrl(Arc<Parsed>);

struct Parsed {
    text: String,
    place: PeerPlace,
}

/// What a [`PeerUrl`] names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerPlace {
    /// `unix:///path` or `unix:path`: a socket on this node.
    Unix(PathBuf),
    /// `tcp://host:port`.
    Tcp {
        /// A host name or an address, without the brackets of IPv6.
        host: String,
        /// A TCP port, never 0.
        port: u16,
    },
    /// `inode://<device>/<inode>`: a socket on this node whose descriptor was passed (NSM `grpcfd`).
    Passed {
        /// The device number of the socket's file.
        device: u64,
        /// Its inode number.
        inode: u64,
    },
}

impl PeerUrl {
    /// The socket at `path`.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        let text = format!("unix://{}", path.display());
        Self::new(text, PeerPlace::Unix(path.to_owned()))
    }

    /// Reads a URL that an operator wrote. Its text is the canonical one of the place, so that all spellings of a place are one URL.
    ///
    /// # Errors
    ///
    /// The text is no URL, or names a passed socket: only the connection that passes the socket gives its URL a meaning.
    pub fn configured(text: &str) -> Result<Self, PeerUrlError> {
        match parse(text)? {
            PeerPlace::Unix(path) => Ok(Self::unix(&path)),
            PeerPlace::Tcp { host, port } => Ok(match host.parse::<IpAddr>() {
                Ok(ip) => SocketAddr::new(ip, port).into(),
                Err(_) => Self::new(
                    format!("tcp://{host}:{port}"),
                    PeerPlace::Tcp { host, port },
                ),
            }),
            PeerPlace::Passed { .. } => Err(PeerUrlError::Scheme(text.to_owned())),
        }
    }

    fn new(text: String, place: PeerPlace) -> Self {
        Self(Arc::new(Parsed { text, place }))
    }

    /// Its text: the one that it was parsed from, or the canonical one of a configured URL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// What it names.
    #[must_use]
    pub fn place(&self) -> &PeerPlace {
        &self.0.place
    }

    /// The path of a socket that is named by its path.
    #[must_use]
    pub fn socket_path(&self) -> Option<&Path> {
        match self.place() {
            PeerPlace::Unix(path) => Some(path),
            PeerPlace::Tcp { .. } | PeerPlace::Passed { .. } => None,
        }
    }

    /// Whether it names a socket of this node.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(self.place(), PeerPlace::Unix(_) | PeerPlace::Passed { .. })
    }

    /// The IP address, where the host is one.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        match self.place() {
            PeerPlace::Tcp { host, .. } => host.parse().ok(),
            PeerPlace::Unix(_) | PeerPlace::Passed { .. } => None,
        }
    }
}

impl From<SocketAddr> for PeerUrl {
    fn from(address: SocketAddr) -> Self {
        let place = PeerPlace::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        };
        Self::new(format!("tcp://{address}"), place)
    }
}

impl FromStr for PeerUrl {
    type Err = PeerUrlError;

    fn from_str(text: &str) -> Result<Self, PeerUrlError> {
        Ok(Self::new(text.to_owned(), parse(text)?))
    }
}

fn parse(text: &str) -> Result<PeerPlace, PeerUrlError> {
    if let Some(rest) = text.strip_prefix("unix:") {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        return if path.is_empty() || path.contains('\0') {
            Err(PeerUrlError::NoPath(text.to_owned()))
        } else {
            Ok(PeerPlace::Unix(path.into()))
        };
    }
    if text.starts_with("inode:") {
        return match text.parse() {
            Ok(NetnsUrl::Inode { dev: device, inode }) => Ok(PeerPlace::Passed { device, inode }),
            _ => Err(PeerUrlError::Inode(text.to_owned())),
        };
    }
    let Some(authority) = text.strip_prefix("tcp://") else {
        return Err(PeerUrlError::Scheme(text.to_owned()));
    };
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let Some((host, port)) = authority.rsplit_once(':') else {
        return Err(PeerUrlError::Port(text.to_owned()));
    };
    let port = port_number(port).ok_or_else(|| PeerUrlError::Port(text.to_owned()))?;
    let host = host_name(host).ok_or_else(|| PeerUrlError::Host(text.to_owned()))?;
    Ok(PeerPlace::Tcp {
        host: host.to_owned(),
        port,
    })
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

impl fmt::Display for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl PartialEq for PeerUrl {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.as_str() == other.as_str()
    }
}

impl Eq for PeerUrl {}

impl Hash for PeerUrl {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}
