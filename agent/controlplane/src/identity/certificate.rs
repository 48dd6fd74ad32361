//! X.509-SVIDs: what is read of a certificate, and which certificates of peers are believed ("The X.509 SPIFFE Verifiable Identity
//! Document", sections 3 to 5).
//!
//! The verdicts are those of go-spiffe (`svid/x509svid`), by which all NSM components decide: the names of hosts play no part, the
//! authorities are those of the leaf's own trust domain, and extended key usages are not looked at.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nsm_core::identity::{SpiffeId, SpiffeIdError, TrustDomain, es256::P256Key};
use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, TrustAnchor, UnixTime},
};
use webpki::{
    EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, anchor_from_trusted_cert,
};
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, time::ASN1Time,
};

/// Why a certificate is not believed, or is no SVID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCertificate {
    /// It is no certificate.
    #[error("it is no X.509 certificate ({0})")]
    Malformed(String),
    /// An SVID has one URI name.
    #[error("it has {0} URI names, and an SVID has exactly one")]
    UriNames(usize),
    /// The URI name is no SPIFFE id.
    #[error("its URI name is none of SPIFFE's: {0}")]
    Id(#[from] SpiffeIdError),
    /// A signing authority's certificate is no SVID of a workload.
    #[error("`{0}` shows the certificate of a signing authority (CA), and a workload has none")]
    Authority(SpiffeId),
    /// The same, by its key usage.
    #[error(
        "`{0}` shows a certificate that may sign others (keyCertSign or cRLSign), and a workload's may not"
    )]
    MaySign(SpiffeId),
    /// No bundle.
    #[error(
        "`{id}` is of the trust domain {trust_domain}, of which there is no bundle here: federate with it (`federatesWith` of SPIRE's \
         entries), or name its bundle in `identity.bundles`",
        trust_domain = id.trust_domain()
    )]
    UnknownTrustDomain {
        /// Whose certificate it is.
        id: SpiffeId,
    },
    /// Its time is over.
    #[error(
        "the certificate of `{id}` ended {ago:?} ago: check that it is renewed, and the clocks of both nodes"
    )]
    Expired {
        /// Whose certificate it is.
        id: SpiffeId,
        /// How long ago.
        ago: Duration,
    },
    /// Its time has not come.
    #[error("the certificate of `{id}` begins in {left:?}: check the clocks of both nodes")]
    NotYet {
        /// Whose certificate it is.
        id: SpiffeId,
        /// When it begins.
        left: Duration,
    },
    /// No chain leads to an authority of the bundle.
    #[error(
        "the certificate of `{id}` is not signed by an authority in the bundle of its trust domain ({cause}): one of both is out of date, \
         or it is forged"
    )]
    Untrusted {
        /// Whose certificate it claims to be.
        id: SpiffeId,
        /// What path building found.
        cause: String,
    },
}

/// What is read of a certificate of a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its only URI name.
    pub id: SpiffeId,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// The public key where it is one of the curve P-256: tokens are checked with it.
    pub key: Option<P256Key>,
}

impl Leaf {
    /// Reads a certificate. Whether it is believed is for [`Bundles::verify`].
    ///
    /// # Errors
    /// It is no certificate of a workload with one SPIFFE id.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, BadCertificate> {
        let malformed = |error: &dyn ToString| BadCertificate::Malformed(error.to_string());
        let (rest, certificate) =
            X509Certificate::from_der(certificate).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"there is more behind its end"));
        }
        let id = spiffe_id(&certificate)?;
        let constraints = certificate.basic_constraints();
        let constraints = constraints.map_err(|error| malformed(&error))?;
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(BadCertificate::Authority(id));
        }
        let usage = certificate.key_usage().map_err(|error| malformed(&error))?;
        if usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()) {
            return Err(BadCertificate::MaySign(id));
        }
        let validity = certificate.validity();
        Ok(Self {
            id,
            not_before: time(validity.not_before),
            not_after: time(validity.not_after),
            key: P256Key::from_spki(certificate.public_key().raw).ok(),
        })
    }
}

fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, BadCertificate> {
    let names = certificate.subject_alternative_name();
    let names = names.map_err(|error| BadCertificate::Malformed(error.to_string()))?;
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(uri.parse()?),
        (first, others) => Err(BadCertificate::UriNames(
            usize::from(first.is_some()) + others,
        )),
    }
}

fn time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// An authority of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Authority {
    anchor: TrustAnchor<'static>,
    not_after: SystemTime,
}

/// The authorities of each trust domain that is believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bundles(BTreeMap<TrustDomain, Vec<Authority>>);

impl Bundles {
    /// Adds the bundle of a trust domain, in place of one that is there.
    ///
    /// # Errors
    /// A certificate cannot be parsed, or there is none.
    pub fn insert<'a>(
        &mut self,
        trust_domain: TrustDomain,
        certificates: impl IntoIterator<Item = CertificateDer<'a>>,
    ) -> Result<(), BadCertificate> {
        let authorities = certificates
            .into_iter()
            .map(|certificate| authority(&certificate));
        let authorities = authorities.collect::<Result<Vec<_>, _>>()?;
        if authorities.is_empty() {
            let cause = format!("the bundle of {trust_domain} holds no certificate");
            return Err(BadCertificate::Malformed(cause));
        }
        self.0.insert(trust_domain, authorities);
        Ok(())
    }

    /// The trust domains that are believed, with the number of their authorities.
    pub fn domains(&self) -> impl Iterator<Item = (&TrustDomain, usize)> {
        self.0
            .iter()
            .map(|(trust_domain, authorities)| (trust_domain, authorities.len()))
    }

    /// Decides whether the chain `leaf`, `intermediates` is believed at `now`, with signatures of `algorithms`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: SystemTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<Leaf, BadCertificate> {
        let read = Leaf::read(leaf)?;
        let id = &read.id;
        let Some(authorities) = self.0.get(id.trust_domain()) else {
            return Err(BadCertificate::UnknownTrustDomain { id: id.clone() });
        };
        if let Ok(ago) = now.duration_since(read.not_after)
            && !ago.is_zero()
        {
            return Err(BadCertificate::Expired {
                id: id.clone(),
                ago,
            });
        }
        if let Ok(left) = read.not_before.duration_since(now)
            && !left.is_zero()
        {
            return Err(BadCertificate::NotYet {
                id: id.clone(),
                left,
            });
        }
        let untrusted = |cause: webpki::Error| BadCertificate::Untrusted {
            id: id.clone(),
            cause: cause.to_string(),
        };
        // An authority that has ended vouches for nobody, as in Go; path building does not ask an anchor's times.
        let anchors: Vec<_> = authorities
            .iter()
            .filter(|authority| now <= authority.not_after)
            .map(|authority| authority.anchor.clone())
            .collect();
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let certificate = EndEntityCert::try_from(leaf).map_err(untrusted)?;
        certificate
            .verify_for_usage(
                algorithms.all,
                &anchors,
                intermediates,
                UnixTime::since_unix_epoch(since_epoch),
                AnyUsage,
                None,
                None,
            )
            .map_err(untrusted)?;
        Ok(read)
    }
}

fn authority(certificate: &CertificateDer<'_>) -> Result<Authority, BadCertificate> {
    let malformed = |error: &dyn ToString| BadCertificate::Malformed(error.to_string());
    let anchor = anchor_from_trusted_cert(certificate).map_err(|error| malformed(&error))?;
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| malformed(&error))?;
    Ok(Authority {
        anchor: anchor.to_owned(),
        not_after: time(parsed.validity().not_after),
    })
}

/// Extended key usages are of no account: an SVID is shown by clients and servers alike.
struct AnyUsage;

impl ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
