//! An identity in PEM files, as SPIFFE's helpers write them: a chain, a key, and a bundle for each trust domain.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use nsm_core::identity::TrustDomain;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{
    certificate::{BadCertificate, Bundles},
    svid::{BadSvid, Svid},
};

/// The longest file that is read, in bytes: a thousand authorities fit.
const LONGEST: u64 = 4 << 20;

/// The files of an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemFiles {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// The leaf's key.
    pub key: PathBuf,
    /// The authorities of each trust domain that is believed.
    pub bundles: BTreeMap<TrustDomain, PathBuf>,
}

/// The bytes of the files; what is the same has not changed.
#[derive(Clone, PartialEq, Eq)]
pub struct PemTexts {
    certificate: Vec<u8>,
    key: Vec<u8>,
    bundles: BTreeMap<TrustDomain, (PathBuf, Vec<u8>)>,
}

/// Why the files are no identity.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// A file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// A file is no PEM, or lacks what it should hold.
    #[error("{} holds no {wanted} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
    /// Chain and key are no SVID.
    #[error("{} and {} are no SVID: {cause}", certificate.display(), key.display())]
    Svid {
        /// The chain's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        cause: BadSvid,
    },
    /// A bundle holds something else.
    #[error("{} is no bundle: {cause}", path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: BadCertificate,
    },
}

impl PemFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn read(&self) -> Result<PemTexts, PemError> {
        let bundles = self
            .bundles
            .iter()
            .map(|(trust_domain, path)| Ok((trust_domain.clone(), (path.clone(), read(path)?))));
        Ok(PemTexts {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
            bundles: bundles.collect::<Result<_, PemError>>()?,
        })
    }

    /// What the files say.
    ///
    /// # Errors
    /// They are no identity: also for the moment between the writing of a chain and that of its key.
    pub fn parse(&self, texts: &PemTexts) -> Result<(Svid, Bundles), PemError> {
        let chain = certificates(&self.certificate, &texts.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&texts.key).map_err(|_| PemError::Pem {
            path: self.key.clone(),
            wanted: "private key",
        })?;
        let svid = Svid::new(chain, &key).map_err(|cause| PemError::Svid {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            cause,
        })?;
        let mut bundles = Bundles::default();
        for (trust_domain, (path, text)) in &texts.bundles {
            let authorities = certificates(path, text)?;
            let added = bundles.insert(trust_domain.clone(), authorities);
            added.map_err(|cause| PemError::Bundle {
                path: path.clone(),
                cause,
            })?;
        }
        Ok((svid, bundles))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, PemError> {
    let failed = |cause| PemError::Read {
        path: path.to_owned(),
        cause,
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > LONGEST {
        return Err(failed(io::Error::other(format!(
            "it is longer than {LONGEST} bytes"
        ))));
    }
    std::fs::read(path).map_err(failed)
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let missing = || PemError::Pem {
        path: path.to_owned(),
        wanted: "certificate",
    };
    let certificates = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|_| missing())?;
    if certificates.is_empty() {
        return Err(missing());
    }
    Ok(certificates)
}
