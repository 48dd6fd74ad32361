//! What a token of a path says, before anything of it is proved.
//!
//! A token is a JWT of three parts (RFC 7515, section 3.1), made as NSM's `spiffejwt` makes it: ES256, `sub` the id of the hop that made
//! it, `aud` an array with the id of the hop that it is for, `exp` in whole seconds. What is read here names nobody yet: see
//! [`chain`](super::chain).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, de::IgnoredAny};
use thiserror::Error;

use super::{SpiffeId, SpiffeIdError};
use crate::text::printable;

/// The longest token that is read, in bytes: two ids of the greatest length, written in base64, leave room for a signature.
pub const LONGEST_TOKEN: usize = 8 * 1024;

/// The algorithm of every token of a mesh with identities (RFC 7518, section 3.4).
pub const ALGORITHM: &str = "ES256";

/// The bytes of a signature by ES256: two numbers of 32.
pub const SIGNATURE: usize = 64;

/// A signature by ES256: two numbers of 32 bytes, big-endian (RFC 7518, section 3.4).
pub type Signature = [u8; SIGNATURE];

/// The latest time that a token may name, in seconds: the end of the year 9999, as protobuf's timestamps have it.
const LATEST: u64 = 253_402_300_799;

/// How much of a foreign value an error shows.
const SHOWN: usize = 80;

/// Why a text is no token of a path.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenFault {
    /// There is no token.
    #[error(
        "it is missing: a caller with a certificate sends one with each call, in the metadata nsm-client-token"
    )]
    Missing,
    /// It is longer than any real one.
    #[error("it has {0} bytes, at most {LONGEST_TOKEN} are read")]
    TooLong(usize),
    /// It does not consist of three parts.
    #[error("it is no JWT: header, claims and signature with dots between")]
    Parts,
    /// A part is not base64url without padding.
    #[error("its {0} is not base64url")]
    Encoding(&'static str),
    /// A part is not the JSON that it should be.
    #[error("its {part} cannot be read: {cause}")]
    Json {
        /// Which part.
        part: &'static str,
        /// What the parser says, shortened.
        cause: String,
    },
    /// It is not signed with a key of the elliptic curve; `none` is one of these.
    #[error("it is signed by `{0}`, and tokens are signed by {ALGORITHM} with the key of an SVID")]
    Algorithm(String),
    /// Its header demands what is not understood (RFC 7515, section 4.1.11).
    #[error("its header has critical extensions, which no token of a path has")]
    Critical,
    /// The signature has another length.
    #[error("its signature has {0} bytes, one by {ALGORITHM} has {SIGNATURE}")]
    Signature(usize),
    /// A claim is missing.
    #[error("it has no claim `{0}`")]
    NoClaim(&'static str),
    /// A claim names no SPIFFE id.
    #[error("its claim `{claim}`: {cause}")]
    Id {
        /// Which claim.
        claim: &'static str,
        /// What is wrong.
        cause: SpiffeIdError,
    },
    /// It is for several.
    #[error("it is for {0} parties, and a token of a path is for one")]
    Audiences(usize),
    /// The time is none that a message could hold.
    #[error("its claim `exp` is no time before the year 10000")]
    Expiry,
}

/// What a token claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Who made it.
    pub subject: SpiffeId,
    /// Whom it is for. The token of a path's last hop may be for nobody.
    pub audience: Option<SpiffeId>,
    /// When it ends. The claim counts seconds and the node's clock of the day is compared with it, without tolerance, as NSM does.
    pub expires: SystemTime,
}

/// A token that was read: its claims, and what its signature covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadToken<'a> {
    /// What it claims.
    pub claims: Claims,
    signed: &'a str,
    signature: Signature,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    crit: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Payload {
    sub: Option<String>,
    #[serde(default)]
    aud: Vec<String>,
    exp: Option<serde_json::Number>,
}

impl<'a> ReadToken<'a> {
    /// Reads a token.
    ///
    /// # Errors
    /// What is wrong with it. Foreign text in it is shortened and shown without control characters.
    pub fn read(token: &'a str) -> Result<Self, TokenFault> {
        match token.len() {
            0 => return Err(TokenFault::Missing),
            length if length > LONGEST_TOKEN => return Err(TokenFault::TooLong(length)),
            _ => {}
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenFault::Parts)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenFault::Parts)?;
        if payload.contains('.') {
            return Err(TokenFault::Parts);
        }
        let Header { alg, crit } = json(header, "header")?;
        if alg != ALGORITHM {
            return Err(TokenFault::Algorithm(printable(&alg, SHOWN)));
        }
        if crit.is_some() {
            return Err(TokenFault::Critical);
        }
        let claims = claims(json(payload, "claims")?)?;
        let signature = decoded(signature, "signature")?;
        let signature = signature
            .try_into()
            .map_err(|other: Vec<u8>| TokenFault::Signature(other.len()))?;
        Ok(Self {
            claims,
            signed,
            signature,
        })
    }

    /// What the signature covers: header and claims as they are written.
    #[must_use]
    pub const fn signed(&self) -> &'a str {
        self.signed
    }

    /// The signature.
    #[must_use]
    pub const fn signature(&self) -> &Signature {
        &self.signature
    }
}

fn decoded(part: &str, name: &'static str) -> Result<Vec<u8>, TokenFault> {
    URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| TokenFault::Encoding(name))
}

fn json<T: for<'de> Deserialize<'de>>(part: &str, name: &'static str) -> Result<T, TokenFault> {
    let bytes = decoded(part, name)?;
    serde_json::from_slice(&bytes).map_err(|error| TokenFault::Json {
        part: name,
        cause: printable(&error.to_string(), SHOWN),
    })
}

fn claims(payload: Payload) -> Result<Claims, TokenFault> {
    let id = |text: &str, claim| {
        text.parse()
            .map_err(|cause| TokenFault::Id { claim, cause })
    };
    let subject = payload.sub.ok_or(TokenFault::NoClaim("sub"))?;
    let audience = match payload.aud.as_slice() {
        [] => None,
        [one] => Some(id(one, "aud")?),
        several => return Err(TokenFault::Audiences(several.len())),
    };
    Ok(Claims {
        subject: id(&subject, "sub")?,
        audience,
        expires: time(&payload.exp.ok_or(TokenFault::NoClaim("exp"))?)?,
    })
}

/// A numeric date (RFC 7519, section 2). A fraction of a second is cut off: the token ends sooner, not later.
fn time(number: &serde_json::Number) -> Result<SystemTime, TokenFault> {
    let seconds = match number.as_u64() {
        Some(seconds) => seconds,
        None => whole_seconds(number.as_f64()).ok_or(TokenFault::Expiry)?,
    };
    if seconds > LATEST {
        return Err(TokenFault::Expiry);
    }
    UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .ok_or(TokenFault::Expiry)
}

fn whole_seconds(number: Option<f64>) -> Option<u64> {
    let duration = Duration::try_from_secs_f64(number?).ok()?;
    Some(duration.as_secs())
}
