//! Trust domains of tests: their signing authorities, and the SVIDs of workloads, good ones and such as nobody should believe.
#![forbid(unsafe_code)]

pub mod workload;

use std::{fs, io, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The chain in DER, leaf first.
    pub chain: Vec<Vec<u8>>,
    /// The key, PKCS #8 in DER.
    pub key: Vec<u8>,
    /// The chain in PEM.
    pub chain_pem: String,
    /// The key in PEM.
    pub key_pem: String,
}

impl Issued {
    /// Writes `<name>.pem` and `<name>_key.pem` into a folder: the key first, and each at once, so that nobody reads half of a file.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, folder: &Path, name: &str) -> io::Result<()> {
        replace(&folder.join(format!("{name}_key.pem")), &self.key_pem)?;
        replace(&folder.join(format!("{name}.pem")), &self.chain_pem)
    }
}

/// Replaces a file at once.
///
/// # Errors
/// The folder cannot be written.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, text)?;
    fs::rename(fresh, path)
}

/// What a certificate of a workload is to be; by default a good SVID of an hour.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its URI names.
    pub uris: Vec<String>,
    /// Whether it is flagged as that of an authority.
    pub is_authority: bool,
    /// Whether its key usages allow to sign others.
    pub may_sign: bool,
    /// Seconds from now until it begins; below zero, it has begun.
    pub begins: i64,
    /// Seconds from now until it ends; below zero, it has ended.
    pub ends: i64,
}

impl Wanted {
    /// A good SVID.
    #[must_use]
    pub fn of(id: &str) -> Self {
        Self {
            uris: vec![id.to_owned()],
            is_authority: false,
            may_sign: false,
            begins: -60,
            ends: 3600,
        }
    }

    fn parameters(&self) -> CertificateParams {
        let mut parameters = CertificateParams::default();
        let names = self.uris.iter().map(|uri| {
            let uri = uri.as_str().try_into().expect("an ASCII text");
            SanType::URI(uri)
        });
        parameters.subject_alt_names = names.collect();
        parameters.is_ca = match self.is_authority {
            true => IsCa::Ca(BasicConstraints::Unconstrained),
            false => IsCa::ExplicitNoCa,
        };
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if self.may_sign {
            parameters.key_usages.push(KeyUsagePurpose::KeyCertSign);
        }
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let now = OffsetDateTime::now_utc();
        parameters.not_before = now + Duration::seconds(self.begins);
        parameters.not_after = now + Duration::seconds(self.ends);
        parameters.use_authority_key_identifier_extension = true;
        parameters
    }
}

/// The signing authority of a trust domain.
#[derive(Debug)]
pub struct Authority {
    trust_domain: String,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority, with a key of its own.
    ///
    /// # Panics
    /// The name cannot stand in a certificate.
    #[must_use]
    pub fn of(trust_domain: &str) -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let id = format!("spiffe://{trust_domain}");
        let uri = id.as_str().try_into().expect("an ASCII text");
        parameters.subject_alt_names = vec![SanType::URI(uri)];
        // Two authorities of one trust domain must have two names: their certificates are looked up by them.
        let key = KeyPair::generate().expect("a key of the curve P-256");
        let number: Vec<u8> = key
            .public_key_raw()
            .iter()
            .skip(1)
            .take(8)
            .copied()
            .collect();
        let common_name = format!("{trust_domain} {number:02x?}");
        parameters
            .distinguished_name
            .push(DnType::CommonName, common_name);
        parameters.serial_number = Some(SerialNumber::from(number));
        let issuer = CertifiedIssuer::self_signed(parameters, key).expect("a certificate");
        Self {
            trust_domain: trust_domain.to_owned(),
            issuer,
        }
    }

    /// Its trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Its certificate in PEM: the bundle of its trust domain.
    #[must_use]
    pub fn bundle_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Its certificate in DER.
    #[must_use]
    pub fn bundle(&self) -> Vec<u8> {
        self.issuer.der().to_vec()
    }

    /// The id of a workload of this trust domain.
    #[must_use]
    pub fn id(&self, path: &str) -> String {
        format!("spiffe://{}/{path}", self.trust_domain)
    }

    /// A good SVID of a workload, of an hour.
    #[must_use]
    pub fn svid(&self, path: &str) -> Issued {
        self.issue(&Wanted::of(&self.id(path)))
    }

    /// A certificate that this authority signs, with a key of its own.
    ///
    /// # Panics
    /// A name cannot stand in a certificate.
    #[must_use]
    pub fn issue(&self, wanted: &Wanted) -> Issued {
        let key = KeyPair::generate().expect("a key of the curve P-256");
        let signed = wanted.parameters().signed_by(&key, &self.issuer);
        issued(&signed.expect("a certificate"), &key)
    }
}

/// A certificate that its own key signs.
///
/// # Panics
/// A name cannot stand in a certificate.
#[must_use]
pub fn self_signed(wanted: &Wanted) -> Issued {
    let key = KeyPair::generate().expect("a key of the curve P-256");
    let signed = wanted.parameters().self_signed(&key);
    issued(&signed.expect("a certificate"), &key)
}

fn issued(certificate: &rcgen::Certificate, key: &KeyPair) -> Issued {
    Issued {
        chain: vec![certificate.der().to_vec()],
        key: key.serialize_der(),
        chain_pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    }
}
