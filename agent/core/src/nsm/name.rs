//! Names of services and endpoints, and the domains behind their `@`.
//!
//! An interdomain name is `target@domain`. The domain is a DNS name, which is resolved by SRV records, or an address, which is used as
//! it is. Both are checked here, before a resolver or a peer gets them: a name that cannot exist fails at once with a reason, and not
//! by a timeout.
//!
//! Text is kept as written, with domains in lower case: answers carry the name of the question, and peers compare it.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// The longest DNS name in text, without the trailing dot (RFC 1035 section 2.3.4).
const MAX_NAME: usize = 253;

/// The longest DNS label (RFC 1035 section 2.3.4).
const MAX_LABEL: usize = 63;

/// Why a text is no [`Domain`] or no [`InterdomainName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("the name is empty: write `service` or `service@domain`")]
    Empty,
    /// Nothing before the `@`.
    #[error("`{0}` has nothing before the `@`: write `service@domain`")]
    MissingTarget(String),
    /// Nothing after the `@`.
    #[error(
        "`{0}` has nothing after the `@`: write `service@domain`, or `service` alone for a service of this domain"
    )]
    MissingDomain(String),
    /// More than one `@`.
    #[error("`{0}` has more than one `@`: write `service@domain`, one domain only")]
    SecondAt(String),
    /// The part before the `@` is too long.
    #[error("`{}…` before the `@` has {} bytes, at most {MAX_NAME} are allowed: use a shorter name", head(.0), .0.len())]
    TargetTooLong(String),
    /// The part before the `@` has a character that no registry can hold.
    #[error(
        "`{target}` has the character {bad:?}: a name is printable ASCII without spaces, `/` and `@`"
    )]
    TargetCharacter {
        /// The whole part before the `@`.
        target: String,
        /// Its first bad character.
        bad: char,
    },
    /// The domain is too long for DNS.
    #[error("domain `{}…` has {} bytes, at most {MAX_NAME} are allowed (RFC 1035): use a shorter domain", head(.0), .0.len())]
    DomainTooLong(String),
    /// Two dots in a row, a dot in front, or only dots.
    #[error(
        "domain `{0}` has an empty label: write labels with single dots between, such as `cluster-2.example`"
    )]
    EmptyLabel(String),
    /// A label is too long for DNS.
    #[error("domain `{domain}`: label `{label}` has {} bytes, at most {MAX_LABEL} are allowed (RFC 1035)", .label.len())]
    LabelTooLong {
        /// The whole domain.
        domain: String,
        /// The label that is too long.
        label: String,
    },
    /// A label has a character that host names do not have.
    #[error(
        "domain `{domain}`: label `{label}` has the character {bad:?}: letters, digits and inner hyphens are allowed, and one `_` in front"
    )]
    LabelCharacter {
        /// The whole domain.
        domain: String,
        /// The label.
        label: String,
        /// Its first bad character.
        bad: char,
    },
    /// Only digits and dots, but no IPv4 address.
    #[error(
        "domain `{0}` looks like an IPv4 address and is none: write an address such as `192.0.2.1`, or a name with letters"
    )]
    NoAddress(String),
    /// A scheme that is not spoken.
    #[error(
        "domain `{0}` has an unknown scheme: write `tcp://address:port`, or the address and port alone"
    )]
    UnknownScheme(String),
    /// A port, or a URL, with something that is no address.
    #[error(
        "domain `{0}` has a port or a scheme but no literal address: write `192.0.2.1:5005` or `[2001:db8::1]:5005`; a name takes its port from its SRV record"
    )]
    PortOfName(String),
    /// Port zero.
    #[error("domain `{0}` has port 0: write the port of the registry proxy, 5005 by default")]
    PortZero(String),
    /// An address that no host has: unspecified or multicast.
    #[error("domain `{0}` is no address of a host: write the peer's unicast address")]
    NotUnicast(String),
}

/// The first characters of a text that is too long to be shown.
fn head(text: &str) -> &str {
    let end = text.char_indices().nth(40).map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// Where the domain of a name is to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainTarget<'a> {
    /// This address serves the registry and the proxy; DNS is not asked.
    Socket(SocketAddr),
    /// This address, with the default ports; DNS is not asked.
    Ip(IpAddr),
    /// This name is resolved: SRV records, else its address with the default ports.
    Name(&'a str),
}

/// The domain of an interdomain name: a DNS name, an address, an address with port, or a `tcp://` or `http://` URL of such an address.
///
/// A DNS name is held in lower case without its trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Socket(SocketAddr),
    Ip(IpAddr),
    Name,
}

impl Domain {
    /// Where to ask for this domain.
    #[must_use]
    pub fn target(&self) -> DomainTarget<'_> {
        match self.kind {
            Kind::Socket(address) => DomainTarget::Socket(address),
            Kind::Ip(address) => DomainTarget::Ip(address),
            Kind::Name => DomainTarget::Name(&self.text),
        }
    }

    fn literal(text: String, ip: IpAddr, port: Option<u16>) -> Result<Self, NameError> {
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(NameError::NotUnicast(text));
        }
        let kind = match port {
            Some(0) => return Err(NameError::PortZero(text)),
            Some(port) => Kind::Socket(SocketAddr::new(ip, port)),
            None => Kind::Ip(ip),
        };
        Ok(Self { text, kind })
    }

    /// The text, as [`Display`](fmt::Display) writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Domain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.to_ascii_lowercase();
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.contains('@') {
            return Err(NameError::SecondAt(text));
        }
        if let Some((scheme, authority)) = text.split_once("://") {
            return match (scheme, literal(authority)) {
                ("tcp" | "http", Some((ip, port))) => Self::literal(text, ip, port),
                ("tcp" | "http", None) => Err(NameError::PortOfName(text)),
                _ => Err(NameError::UnknownScheme(text)),
            };
        }
        if let Some((ip, port)) = literal(&text) {
            return Self::literal(text, ip, port);
        }
        if text.contains(':') {
            return Err(NameError::PortOfName(text));
        }
        let name = text.strip_suffix('.').unwrap_or(&text);
        check_dns_name(name)?;
        Ok(Self {
            text: name.to_owned(),
            kind: Kind::Name,
        })
    }
}

/// An address with or without port. A zone (`fe80::1%2`) is refused: it means nothing on another node.
fn literal(text: &str) -> Option<(IpAddr, Option<u16>)> {
    if let Ok(ip) = text.parse() {
        return Some((ip, None));
    }
    if let Ok(socket) = text.parse() {
        return match socket {
            SocketAddr::V6(socket) if socket.scope_id() != 0 => None,
            socket => Some((socket.ip(), Some(socket.port()))),
        };
    }
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    inner.parse::<Ipv6Addr>().ok().map(|ip| (ip.into(), None))
}

/// Checks a host name as RFC 1123 section 2.1 writes it, with a leading underscore allowed as service labels have it (RFC 2782).
fn check_dns_name(name: &str) -> Result<(), NameError> {
    if name.len() > MAX_NAME {
        return Err(NameError::DomainTooLong(name.to_owned()));
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err(NameError::EmptyLabel(name.to_owned()));
        }
        if label.len() > MAX_LABEL {
            return Err(NameError::LabelTooLong {
                domain: name.to_owned(),
                label: label.to_owned(),
            });
        }
        if let Some(bad) = bad_in_label(label) {
            return Err(NameError::LabelCharacter {
                domain: name.to_owned(),
                label: label.to_owned(),
                bad,
            });
        }
    }
    // An IPv4 address with a slip in it must not become a DNS question.
    if name
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err(NameError::NoAddress(name.to_owned()));
    }
    Ok(())
}

fn bad_in_label(label: &str) -> Option<char> {
    let body = label.strip_prefix('_').unwrap_or(label);
    if body.is_empty() {
        return Some('_');
    }
    if body.starts_with('-') || body.ends_with('-') {
        return Some('-');
    }
    body.chars()
        .find(|&c| !(c.is_ascii_alphanumeric() || c == '-'))
}

impl TryFrom<&str> for Domain {
    type Error = NameError;

    fn try_from(text: &str) -> Result<Self, NameError> {
        text.parse()
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl AsRef<str> for Domain {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

/// A service or endpoint name, with the domain it belongs to when one is given: `target@domain` or `target`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InterdomainName {
    target: String,
    domain: Option<Domain>,
}

impl InterdomainName {
    /// Puts a name together.
    ///
    /// # Errors
    /// The target is empty, too long, or has a character that a name cannot have.
    pub fn new(target: &str, domain: Option<Domain>) -> Result<Self, NameError> {
        check_target(target)?;
        Ok(Self {
            target: target.to_owned(),
            domain,
        })
    }

    /// What the domain is asked for: the part before the `@`.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The domain, when the name has one.
    #[must_use]
    pub fn domain(&self) -> Option<&Domain> {
        self.domain.as_ref()
    }
}

/// The names of real services and endpoints hold letters, digits, `-`, `_`, `.`, `:` and more, so only what breaks something is
/// refused: `/` (names become URL paths and link aliases), spaces and control characters (they become log lines), `@`.
fn check_target(target: &str) -> Result<(), NameError> {
    if target.is_empty() {
        return Err(NameError::Empty);
    }
    if target.len() > MAX_NAME {
        return Err(NameError::TargetTooLong(target.to_owned()));
    }
    match target
        .chars()
        .find(|&c| !c.is_ascii_graphic() || c == '/' || c == '@')
    {
        Some(bad) => Err(NameError::TargetCharacter {
            target: target.to_owned(),
            bad,
        }),
        None => Ok(()),
    }
}

impl FromStr for InterdomainName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((target, domain)) = text.split_once('@') else {
            return Self::new(text, None);
        };
        if target.is_empty() {
            return Err(NameError::MissingTarget(text.to_owned()));
        }
        if domain.is_empty() {
            return Err(NameError::MissingDomain(text.to_owned()));
        }
        if domain.contains('@') {
            return Err(NameError::SecondAt(text.to_owned()));
        }
        Self::new(target, Some(domain.parse()?))
    }
}

impl fmt::Display for InterdomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.domain {
            Some(domain) => write!(f, "{}@{domain}", self.target),
            None => f.write_str(&self.target),
        }
    }
}
