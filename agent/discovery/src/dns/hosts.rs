//! Domains that the configuration names itself.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use nsm_core::{
    nsm::name::{Domain, DomainTarget, NameError},
    text::port_number,
};
use thiserror::Error;

/// Where a domain is; DNS is not asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// Where its registry is.
    pub registry: HostTarget,
    /// Where its proxy NSMgr is.
    pub proxy: HostTarget,
}

/// An address, with or without a port, or a host that DNS is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostTarget {
    /// The default port of the service at this address.
    Ip(IpAddr),
    /// This address and port.
    Socket(SocketAddr),
    /// The address of this host, with the default port where none is given.
    Name {
        /// A DNS name.
        name: String,
        /// Its port.
        port: Option<u16>,
    },
}

/// Why a text is no [`HostTarget`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HostError {
    /// The host is no address and no name.
    #[error(transparent)]
    Host(#[from] NameError),
    /// What follows the colon is no port.
    #[error("`{text}`: `{port}` is no port: write a number from 1 to 65535 after the host")]
    Port {
        /// The whole text.
        text: String,
        /// What follows the colon.
        port: String,
    },
}

/// Where a target leads once the default port is known.
pub(super) enum Place<'a> {
    /// No question is needed.
    Known(SocketAddr),
    /// This host is asked for and reached on this port.
    Host(&'a str, u16),
}

impl HostTarget {
    pub(super) fn place(&self, default_port: u16) -> Place<'_> {
        match self {
            Self::Ip(ip) => Place::Known(SocketAddr::new(*ip, default_port)),
            Self::Socket(address) => Place::Known(*address),
            Self::Name { name, port } => Place::Host(name, port.unwrap_or(default_port)),
        }
    }
}

impl From<IpAddr> for HostEntry {
    /// Registry and proxy at one address, on the default ports.
    fn from(ip: IpAddr) -> Self {
        HostTarget::Ip(ip).into()
    }
}

impl From<HostTarget> for HostEntry {
    /// Registry and proxy at one place.
    fn from(target: HostTarget) -> Self {
        Self {
            registry: target.clone(),
            proxy: target,
        }
    }
}

impl FromStr for HostTarget {
    type Err = HostError;

    /// Reads `192.0.2.1`, `192.0.2.1:5005`, `[2001:db8::1]:5005`, `gw.example` or `gw.example:5005`.
    fn from_str(text: &str) -> Result<Self, HostError> {
        let named = |domain: &Domain, port| Self::Name {
            name: domain.as_str().to_owned(),
            port,
        };
        match text.parse::<Domain>() {
            Ok(domain) => Ok(match domain.target() {
                DomainTarget::Socket(address) => Self::Socket(address),
                DomainTarget::Ip(ip) => Self::Ip(ip),
                DomainTarget::Name(_) => named(&domain, None),
            }),
            Err(NameError::PortOfName(_)) if !text.contains("://") => {
                let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
                let domain: Domain = host.parse()?;
                match (domain.target(), port_number(port)) {
                    (DomainTarget::Name(_), Some(port)) => Ok(named(&domain, Some(port))),
                    _ => Err(HostError::Port {
                        text: text.to_owned(),
                        port: port.to_owned(),
                    }),
                }
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Display for HostTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Socket(address) => address.fmt(f),
            Self::Name { name, port: None } => f.write_str(name),
            Self::Name {
                name,
                port: Some(port),
            } => write!(f, "{name}:{port}"),
        }
    }
}
