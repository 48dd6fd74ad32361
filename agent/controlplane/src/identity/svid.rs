//! An X.509-SVID of our own: the chain that is shown, and its key.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use jsonwebtoken::EncodingKey;
use nsm_core::identity::SpiffeId;
use p256::{
    SecretKey,
    elliptic_curve::sec1::ToEncodedPoint as _,
    pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _},
};
use rustls::{
    crypto::ring::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::CertifiedKey,
};

use super::certificate::{BadCertificate, Leaf};

/// Why a chain and a key are no SVID that can be shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSvid {
    /// There is no certificate.
    #[error("there is no certificate in it")]
    Empty,
    /// The first certificate is none of a workload.
    #[error("the first certificate cannot be shown as an SVID: {0}")]
    Certificate(#[from] BadCertificate),
    /// The key is another kind, or none.
    #[error(
        "the key is none of the curve P-256 in PKCS #8 or SEC 1, which NSM's tokens are signed with (ES256): issue the SVID with an EC P-256 key"
    )]
    Key,
    /// The key is another certificate's.
    #[error("the key is not that of the certificate of `{0}`: both are written at the same time")]
    OtherKey(SpiffeId),
}

/// An SVID: who we are, and what proves it.
#[derive(Clone)]
pub struct Svid {
    leaf: Leaf,
    certified: Arc<CertifiedKey>,
    signing: EncodingKey,
}

impl Svid {
    /// An SVID of a chain, leaf first, and its key.
    ///
    /// # Errors
    /// The chain or the key is none that can be shown, or they do not belong to each other.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
    ) -> Result<Self, BadSvid> {
        let leaf = Leaf::read(chain.first().ok_or(BadSvid::Empty)?)?;
        let secret = secret_key(key).ok_or(BadSvid::Key)?;
        let signing = secret.to_pkcs8_der().map_err(|_| BadSvid::Key)?;
        // Uncompressed, as certificates have it.
        let public = secret.public_key().to_encoded_point(false);
        if leaf.key.as_ref().map(|key| key.point().as_slice()) != Some(public.as_bytes()) {
            return Err(BadSvid::OtherKey(leaf.id));
        }
        let rustls_key = any_supported_type(key).map_err(|_| BadSvid::Key)?;
        Ok(Self {
            leaf,
            certified: Arc::new(CertifiedKey::new(chain, rustls_key)),
            signing: EncodingKey::from_ec_der(signing.as_bytes()),
        })
    }

    /// Who it names.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// When it ends.
    #[must_use]
    pub const fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// How long it lives from `now` on; nothing once it has ended.
    #[must_use]
    pub fn left(&self, now: SystemTime) -> Duration {
        let left = self.leaf.not_after.duration_since(now);
        left.unwrap_or_default()
    }

    /// Its whole life, from its first second to its last.
    #[must_use]
    pub fn life(&self) -> Duration {
        let life = self.leaf.not_after.duration_since(self.leaf.not_before);
        life.unwrap_or_default()
    }

    /// The key, as tokens are signed with it.
    pub(super) const fn signing(&self) -> &EncodingKey {
        &self.signing
    }

    /// The chain and the key, as TLS shows them.
    pub(crate) const fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl PartialEq for Svid {
    /// Whether both show the same certificates: a certificate has one key.
    fn eq(&self, other: &Self) -> bool {
        self.certified.cert == other.certified.cert
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("Svid")
            .field("id", &self.leaf.id)
            .field("not_after", &self.leaf.not_after)
            .finish_non_exhaustive()
    }
}

fn secret_key(key: &PrivateKeyDer<'_>) -> Option<SecretKey> {
    match key {
        PrivateKeyDer::Pkcs8(der) => SecretKey::from_pkcs8_der(der.secret_pkcs8_der()).ok(),
        PrivateKeyDer::Sec1(der) => SecretKey::from_sec1_der(der.secret_sec1_der()).ok(),
        _ => None,
    }
}
