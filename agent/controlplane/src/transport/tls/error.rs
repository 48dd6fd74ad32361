//! Why there is no TLS connection, in words and as the label of a metric.

use std::{error::Error as StdError, io, time::Duration};

use rustls::{CertificateError, Error as RustlsError, PeerIncompatible};

use crate::identity::{certificate::BadCertificate, source::NoIdentity};

/// Why a TLS handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// We have nothing to show yet.
    #[error(transparent)]
    NoIdentity(#[from] NoIdentity),
    /// The other end has no TLS.
    #[error(
        "the other end speaks plain text, and this one TLS only: give the other end an identity (`identity` in its configuration), or set \
         `insecure: true` on both"
    )]
    PlainText,
    /// This end has no TLS.
    #[error(
        "the other end speaks TLS, and this one plain text: give this end an identity (`identity` in the configuration, or \
         --identity-workload-api)"
    )]
    OnlyTls,
    /// The peer's certificate is not believed.
    #[error("the peer's certificate is refused: {0}")]
    Certificate(#[from] BadCertificate),
    /// The peer has shown none.
    #[error(
        "the peer has shown no certificate: TLS is mutual here, so that it needs an X.509-SVID"
    )]
    NoCertificate,
    /// The peer offers TLS 1.1 or less.
    #[error("the peer has neither TLS 1.2 nor 1.3: update it")]
    Version,
    /// The peer has sent an alert.
    #[error(
        "the peer has ended the TLS handshake ({0}): most likely it does not believe our certificate; its log has the reason"
    )]
    RefusedByPeer(String),
    /// The peer was gone before the handshake was done.
    #[error(
        "the peer has closed the connection during the TLS handshake: it may speak plain text, or have no identity yet"
    )]
    Abandoned,
    /// The handshake took too long.
    #[error("the TLS handshake was not done within {0:?}")]
    Late(Duration),
    /// Another breach of TLS.
    #[error("the TLS handshake failed: {0}")]
    Protocol(RustlsError),
    /// The connection broke.
    #[error("the connection broke during the TLS handshake: {0}")]
    Broken(io::Error),
}

impl TlsError {
    /// What came of a handshake, from the error of the stream.
    pub(super) fn of_handshake(error: io::Error) -> Self {
        match tls_error(&error) {
            Some(cause) => Self::of_tls(cause.clone()),
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Abandoned,
            None => Self::Broken(error),
        }
    }

    fn of_tls(error: RustlsError) -> Self {
        match error {
            RustlsError::InvalidCertificate(CertificateError::Other(other)) => {
                match other.0.downcast_ref::<BadCertificate>() {
                    Some(bad) => Self::Certificate(bad.clone()),
                    None => Self::Certificate(BadCertificate::Malformed(other.to_string())),
                }
            }
            RustlsError::InvalidCertificate(other) => {
                Self::Certificate(BadCertificate::Malformed(other.to_string()))
            }
            RustlsError::NoCertificatesPresented => Self::NoCertificate,
            RustlsError::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                // It came with TLS 1.2, and is missing before.
                | PeerIncompatible::SignatureAlgorithmsExtensionRequired,
            ) => Self::Version,
            RustlsError::AlertReceived(alert) => Self::RefusedByPeer(format!("{alert:?}")),
            other => Self::Protocol(other),
        }
    }

    /// The reason as a label: one of a few words.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoIdentity(_) => "no_identity",
            Self::PlainText => "plain_text",
            Self::OnlyTls => "only_tls",
            Self::Certificate(bad) => match bad {
                BadCertificate::Malformed(_) => "malformed",
                BadCertificate::UriNames(_) => "uri_names",
                BadCertificate::Id(_) => "no_spiffe_id",
                BadCertificate::Authority(_) | BadCertificate::MaySign(_) => "authority",
                BadCertificate::UnknownTrustDomain { .. } => "unknown_trust_domain",
                BadCertificate::Expired { .. } => "expired",
                BadCertificate::NotYet { .. } => "not_yet_valid",
                BadCertificate::Untrusted { .. } => "untrusted",
            },
            Self::NoCertificate => "no_certificate",
            Self::Version => "version",
            Self::RefusedByPeer(_) => "refused_by_peer",
            Self::Abandoned => "abandoned",
            Self::Late(_) => "late",
            Self::Protocol(_) => "protocol",
            Self::Broken(_) => "broken",
        }
    }

    /// Whether it is worth a line: what ends early is the network's everyday life, and scanners'.
    pub(super) const fn is_notable(&self) -> bool {
        !matches!(self, Self::Abandoned | Self::Broken(_))
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::ConnectionAborted, error)
    }
}

/// The error of TLS in an error of a stream.
fn tls_error(error: &io::Error) -> Option<&RustlsError> {
    error.get_ref()?.downcast_ref()
}

/// What rustls calls an alert. HTTP/2 keeps the text of a stream's error, and not the error.
const ALERT: &str = "received fatal alert: ";

/// The alert by which a peer has ended a connection, in an error of a call over it. In TLS 1.3 the server judges the client's certificate
/// after the client's handshake is done: the refusal comes to the first call.
#[must_use]
pub fn alert(error: &(dyn StdError + 'static)) -> Option<TlsError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(alert) = error.to_string().strip_prefix(ALERT) {
            return Some(TlsError::RefusedByPeer(alert.to_owned()));
        }
        cause = error.source();
    }
    None
}
