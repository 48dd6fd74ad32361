//! Who a call on a path comes from, and who has answered it, proved by the tokens of the path's segments.
//!
//! The rules are those of NSM's policies, by their names, and each refuses what NSM's refuses on the same tokens:
//!
//! | rule | holds when | beyond NSM |
//! |---|---|---|
//! | `tokens_valid` | each token can be read | ES256 for every one, sizes, one audience, `sub` and `exp` are there |
//! | `tokens_expired` | none has ended | none ends later than the longest life that is believed |
//! | `tokens_chained` | each is for who made the next one | the last one of a call is for this agent |
//! | `prev_token_signed` | a call's last token is signed with the key of the certificate that the caller shows | and its `sub` is the id in that certificate |
//! | `next_token_signed` | so is the token behind ours of an answer, by the server | likewise |
//!
//! What hops further off claim is proved by nobody here: the hop beside us vouches for it. A caller without a certificate proves
//! nothing, and is not asked.

use std::time::{Duration, SystemTime};

use thiserror::Error;

use super::{
    SpiffeId,
    claims::{Claims, ReadToken, TokenFault},
    es256::{Es256, NotP256, P256Key},
};
use crate::nsm::path::MAX_SEGMENTS;

/// The longest life of a token that is believed where nothing else is configured. NSM's components grant ten minutes.
pub const LONGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Who is at the other end of a transport connection, by the certificate that it has shown there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Certified<'a> {
    /// The SPIFFE id in the certificate.
    pub id: &'a SpiffeId,
    /// The certificate's key; none where it is of another kind, which proves no token.
    pub key: Option<&'a P256Key>,
}

/// When and how tokens are checked.
#[derive(Clone, Copy)]
pub struct Check<'a> {
    /// The time.
    pub now: SystemTime,
    /// The longest life that is believed.
    pub longest: Duration,
    /// Checks signatures.
    pub es256: &'a dyn Es256,
}

/// What the tokens of a path prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proved {
    /// What each segment's token claims, the first one first; there is one at least. The neighbour vouches for those further off.
    pub hops: Vec<Claims>,
}

impl Proved {
    /// The id of the path's first segment: that of the client, or of the registrant.
    #[must_use]
    pub fn first(&self) -> &SpiffeId {
        &self.hops[0].subject
    }

    /// When the first of the tokens ends.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        let ends = self.hops.iter().map(|hop| hop.expires);
        ends.min().expect("a path has a segment")
    }

    /// The ids of the segments, the first one first.
    pub fn subjects(&self) -> impl Iterator<Item = &SpiffeId> {
        self.hops.iter().map(|hop| &hop.subject)
    }
}

/// The rule that refused the tokens of a path.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokensRefused {
    /// More than any real path has, or none.
    #[error(
        "tokens_valid: the path has {0} segments, and 1 to {MAX_SEGMENTS} are read: look for proxies that send to each other in a circle"
    )]
    Segments(usize),
    /// A token cannot be read.
    #[error("tokens_valid: the token of path segment {segment}: {fault}")]
    Unreadable {
        /// The segment's index.
        segment: usize,
        /// What is wrong with its token.
        fault: TokenFault,
    },
    /// A token has ended.
    #[error(
        "tokens_expired: the token of {subject} (path segment {segment}) ended {} s ago: refresh sooner, and compare the clocks",
        .ago.as_secs()
    )]
    Expired {
        /// The segment's index.
        segment: usize,
        /// Who made the token.
        subject: SpiffeId,
        /// How long it is over.
        ago: Duration,
    },
    /// A token lives longer than is believed.
    #[error(
        "tokens_expired: the token of {subject} (path segment {segment}) is valid for {} s more, and {} s are believed: shorten the \
         token lifetime there",
        .left.as_secs(), .longest.as_secs()
    )]
    TooLong {
        /// The segment's index.
        segment: usize,
        /// Who made the token.
        subject: SpiffeId,
        /// How long it is valid.
        left: Duration,
        /// How long one may be.
        longest: Duration,
    },
    /// A token is for another than who made the next one.
    #[error(
        "tokens_chained: the token of {subject} (path segment {segment}) is for {}, and the next hop is {next}: each hop has to send a \
         token that is made for the hop it sends to",
        .audience.as_ref().map_or("nobody", SpiffeId::as_str)
    )]
    Unchained {
        /// The segment's index.
        segment: usize,
        /// Who made the token.
        subject: SpiffeId,
        /// Whom it is for.
        audience: Option<SpiffeId>,
        /// Whom it should be for.
        next: SpiffeId,
    },
    /// A token names another than the certificate.
    #[error(
        "{rule}: the token of path segment {segment} is of {subject}, and the certificate is of {peer}: a hop sends its own token"
    )]
    OfAnother {
        /// `prev_token_signed` or `next_token_signed`.
        rule: &'static str,
        /// The segment's index.
        segment: usize,
        /// Whom the token names.
        subject: SpiffeId,
        /// Whom the certificate names.
        peer: SpiffeId,
    },
    /// A token is not signed with the certificate's key.
    #[error(
        "{rule}: the token of {peer} (path segment {segment}) is not signed with the key of the certificate that this connection has \
         shown: after a rotation, connect anew or sign with the key of the connection"
    )]
    Forged {
        /// `prev_token_signed` or `next_token_signed`.
        rule: &'static str,
        /// The segment's index.
        segment: usize,
        /// Whom the certificate names.
        peer: SpiffeId,
    },
    /// The certificate's key proves no token.
    #[error("{rule}: {peer}: {NotP256}")]
    WrongKey {
        /// `prev_token_signed` or `next_token_signed`.
        rule: &'static str,
        /// Whom the certificate names.
        peer: SpiffeId,
    },
    /// A server answered without a segment of its own.
    #[error(
        "next_token_signed: the answer of {peer} has no path segment behind ours: the server has to add its own, with its token"
    )]
    NoNext {
        /// Whom the certificate names.
        peer: SpiffeId,
    },
}

const PREVIOUS: &str = "prev_token_signed";
const NEXT: &str = "next_token_signed";

impl TokensRefused {
    /// The rule, by the name of NSM's policy. One of five.
    #[must_use]
    pub const fn rule(&self) -> &'static str {
        match self {
            Self::Segments(_) | Self::Unreadable { .. } => "tokens_valid",
            Self::Expired { .. } | Self::TooLong { .. } => "tokens_expired",
            Self::Unchained { .. } => "tokens_chained",
            Self::OfAnother { rule, .. }
            | Self::Forged { rule, .. }
            | Self::WrongKey { rule, .. } => rule,
            Self::NoNext { .. } => NEXT,
        }
    }
}

/// What a server checks of a call: `tokens` are those of the path's segments from the first to the caller's, `own` is this agent's id.
///
/// # Errors
/// The rule that refuses the tokens.
pub fn check_call(
    tokens: &[&str],
    caller: Certified<'_>,
    own: &SpiffeId,
    check: Check<'_>,
) -> Result<Proved, TokensRefused> {
    let read = read_all(tokens)?;
    unexpired(&read, check)?;
    chained(&read)?;
    let last = read.len() - 1;
    is_for(&read[last], last, own)?;
    signed(&read[last], last, caller, PREVIOUS, check)?;
    Ok(proved(read))
}

/// What a client checks of an answer: `tokens` are those of the path's segments from the first to the last, `own` is the index of this
/// agent's.
///
/// # Errors
/// The rule that refuses the tokens.
pub fn check_answer(
    tokens: &[&str],
    own: usize,
    server: Certified<'_>,
    check: Check<'_>,
) -> Result<Proved, TokensRefused> {
    let read = read_all(tokens)?;
    unexpired(&read, check)?;
    chained(&read)?;
    let next = own.saturating_add(1);
    let Some(token) = read.get(next) else {
        let peer = server.id.clone();
        return Err(TokensRefused::NoNext { peer });
    };
    signed(token, next, server, NEXT, check)?;
    Ok(proved(read))
}

fn read_all<'a>(tokens: &[&'a str]) -> Result<Vec<ReadToken<'a>>, TokensRefused> {
    if !(1..=MAX_SEGMENTS).contains(&tokens.len()) {
        return Err(TokensRefused::Segments(tokens.len()));
    }
    let read = tokens.iter().enumerate().map(|(segment, token)| {
        ReadToken::read(token).map_err(|fault| TokensRefused::Unreadable { segment, fault })
    });
    read.collect()
}

fn unexpired(tokens: &[ReadToken<'_>], check: Check<'_>) -> Result<(), TokensRefused> {
    for (segment, ReadToken { claims, .. }) in tokens.iter().enumerate() {
        let subject = || claims.subject.clone();
        match claims.expires.duration_since(check.now) {
            Ok(left) if left.is_zero() => {
                return Err(TokensRefused::Expired {
                    segment,
                    subject: subject(),
                    ago: left,
                });
            }
            Ok(left) if left > check.longest => {
                return Err(TokensRefused::TooLong {
                    segment,
                    subject: subject(),
                    left,
                    longest: check.longest,
                });
            }
            Ok(_) => {}
            Err(over) => {
                return Err(TokensRefused::Expired {
                    segment,
                    subject: subject(),
                    ago: over.duration(),
                });
            }
        }
    }
    Ok(())
}

fn chained(tokens: &[ReadToken<'_>]) -> Result<(), TokensRefused> {
    for (segment, pair) in tokens.windows(2).enumerate() {
        is_for(&pair[0], segment, &pair[1].claims.subject)?;
    }
    Ok(())
}

fn is_for(token: &ReadToken<'_>, segment: usize, next: &SpiffeId) -> Result<(), TokensRefused> {
    let claims = &token.claims;
    if claims.audience.as_ref() == Some(next) {
        return Ok(());
    }
    Err(TokensRefused::Unchained {
        segment,
        subject: claims.subject.clone(),
        audience: claims.audience.clone(),
        next: next.clone(),
    })
}

fn signed(
    token: &ReadToken<'_>,
    segment: usize,
    peer: Certified<'_>,
    rule: &'static str,
    check: Check<'_>,
) -> Result<(), TokensRefused> {
    let id = || peer.id.clone();
    if token.claims.subject != *peer.id {
        return Err(TokensRefused::OfAnother {
            rule,
            segment,
            subject: token.claims.subject.clone(),
            peer: id(),
        });
    }
    let Some(key) = peer.key else {
        return Err(TokensRefused::WrongKey { rule, peer: id() });
    };
    let message = token.signed().as_bytes();
    if check.es256.verifies(key, message, token.signature()) {
        return Ok(());
    }
    let peer = id();
    Err(TokensRefused::Forged {
        rule,
        segment,
        peer,
    })
}

fn proved(tokens: Vec<ReadToken<'_>>) -> Proved {
    Proved {
        hops: tokens.into_iter().map(|token| token.claims).collect(),
    }
}
