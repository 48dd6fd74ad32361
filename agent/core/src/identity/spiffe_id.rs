//! SPIFFE ids and trust domains, as "The SPIFFE Identity and Verifiable Identity Document", section 2, has them.
//!
//! An id names a workload; the trust domain in it is the authority that vouches for the name. Two ids are the same where their texts
//! are: scheme and trust domain are lower case, and nothing is escaped, so that no id has two spellings.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

use crate::text::printable;

/// Why a text is no SPIFFE id, or no trust domain. Foreign text in it is shortened, and shown without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpiffeIdError {
    /// The text is longer than every implementation has to take.
    #[error("a SPIFFE id has at most {max} bytes; this one has {0}", max = SpiffeId::LONGEST)]
    TooLong(usize),
    /// Another scheme, none, or one in capitals.
    #[error("`{0}` is no SPIFFE id: it does not begin with spiffe://")]
    Scheme(String),
    /// No trust domain, or one that is too long.
    #[error(
        "`{0}` is no trust domain: it has 1 to {max} characters, such as cluster-1.example",
        max = TrustDomain::LONGEST
    )]
    TrustDomainLength(String),
    /// A character that a trust domain cannot have. A port or a user is none of it, either.
    #[error(
        "`{0}` is no trust domain: it has lower-case letters, digits, dots, hyphens and underscores, and nothing else"
    )]
    TrustDomainCharacter(String),
    /// Two slashes, or one at the end.
    #[error("the SPIFFE id `{0}` has an empty path segment: take the superfluous slash out")]
    EmptySegment(String),
    /// `.` or `..`.
    #[error("the SPIFFE id `{0}` has a relative path segment (. or ..): write the whole path")]
    RelativeSegment(String),
    /// A character that a path cannot have, also in a query, a fragment or an escape.
    #[error(
        "the SPIFFE id `{0}` has a character that its path cannot have: letters, digits, dots, hyphens and underscores are all there is"
    )]
    PathCharacter(String),
}

/// How much of a foreign text an error shows.
const SHOWN: usize = 120;

fn shown(text: &str) -> String {
    printable(text, SHOWN)
}

/// The name of a trust domain, without scheme: `cluster-1.example`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The longest name in bytes (section 2.1).
    pub const LONGEST: usize = 255;

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(name: &str) -> Result<Self, SpiffeIdError> {
        if !(1..=Self::LONGEST).contains(&name.len()) {
            return Err(SpiffeIdError::TrustDomainLength(shown(name)));
        }
        if !name.bytes().all(is_of_trust_domain) {
            return Err(SpiffeIdError::TrustDomainCharacter(shown(name)));
        }
        Ok(Self(name.into()))
    }
}

const fn is_of_trust_domain(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')
}

const fn is_of_path(byte: u8) -> bool {
    is_of_trust_domain(byte) || byte.is_ascii_uppercase()
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE id: `spiffe://<trust domain>/<path>`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// The longest id in bytes (section 2.3).
    pub const LONGEST: usize = 2048;

    /// What every id begins with.
    pub const SCHEME: &str = "spiffe://";

    /// The whole id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain that vouches for it.
    #[must_use]
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash; empty where the id is that of the trust domain itself, as a signing authority's is.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text[Self::SCHEME.len() + self.trust_domain.0.len()..]
    }

    /// The path, segment by segment.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.path().split('/').skip(1)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > Self::LONGEST {
            return Err(SpiffeIdError::TooLong(text.len()));
        }
        let Some(rest) = text.strip_prefix(Self::SCHEME) else {
            return Err(SpiffeIdError::Scheme(shown(text)));
        };
        let (trust_domain, path) = match rest.find('/') {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        let trust_domain = trust_domain.parse()?;
        for segment in path.into_iter().flat_map(|path| path.split('/')) {
            check_segment(segment, text)?;
        }
        Ok(Self {
            text: text.into(),
            trust_domain,
        })
    }
}

fn check_segment(segment: &str, id: &str) -> Result<(), SpiffeIdError> {
    match segment {
        "" => Err(SpiffeIdError::EmptySegment(shown(id))),
        "." | ".." => Err(SpiffeIdError::RelativeSegment(shown(id))),
        _ if !segment.bytes().all(is_of_path) => Err(SpiffeIdError::PathCharacter(shown(id))),
        _ => Ok(()),
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

/// Both are text where they are serialised, and are checked when they are read.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

as_text!(TrustDomain);
as_text!(SpiffeId);
