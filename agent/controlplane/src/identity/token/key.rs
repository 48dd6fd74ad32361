//! The keys that tokens are signed with.

use std::{
    io,
    path::{Path, PathBuf},
};

use jsonwebtoken::{Algorithm, EncodingKey};
use p256::{
    SecretKey,
    pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _},
};

/// Where the key of ES256 comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Es256Key {
    /// Drawn when the agent starts. Nobody knows its public half, so nobody can check it.
    Generated,
    /// A PEM file, PKCS #8 or SEC 1, as SPIFFE's helpers write an SVID's. Read again for each new
    /// token, for SVIDs are rotated.
    File(PathBuf),
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key of tokens {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file holds no such key.
    #[error(
        "{0} holds no private key of the curve P-256 in PEM (PKCS #8 or SEC 1), which ES256 needs"
    )]
    NoKey(PathBuf),
}

/// A key, and how it signs.
pub(super) struct SigningKey {
    pub(super) algorithm: Algorithm,
    pub(super) encoding: EncodingKey,
    file: Option<PathBuf>,
}

impl SigningKey {
    /// A shared secret.
    pub(super) fn secret(secret: &[u8]) -> Self {
        Self {
            algorithm: Algorithm::HS256,
            encoding: EncodingKey::from_secret(secret),
            file: None,
        }
    }

    /// A private key of the curve P-256.
    pub(super) fn es256(source: Es256Key) -> Result<Self, KeyError> {
        let (encoding, file) = match source {
            Es256Key::Generated => (generated(), None),
            Es256Key::File(path) => (read(&path)?, Some(path)),
        };
        Ok(Self {
            algorithm: Algorithm::ES256,
            encoding,
            file,
        })
    }

    /// Takes over what the file holds now. One that cannot be read leaves the key that was: it may be
    /// in the middle of being written.
    pub(super) fn reload(&mut self) {
        let Some(file) = &self.file else { return };
        match read(file) {
            Ok(encoding) => self.encoding = encoding,
            Err(error) => tracing::warn!(%error, "tokens are signed with the key that was"),
        }
    }
}

fn read(path: &Path) -> Result<EncodingKey, KeyError> {
    let text = std::fs::read_to_string(path).map_err(|cause| KeyError::Read {
        path: path.to_owned(),
        cause,
    })?;
    let key = SecretKey::from_pkcs8_pem(&text).or_else(|_| SecretKey::from_sec1_pem(&text));
    let key = key.map_err(|_| KeyError::NoKey(path.to_owned()))?;
    Ok(encoding(&key))
}

fn generated() -> EncodingKey {
    loop {
        // All but one of 2^32 draws are a scalar of the curve.
        let drawn: [u8; 32] = rand::random();
        if let Ok(key) = SecretKey::from_slice(&drawn) {
            return encoding(&key);
        }
    }
}

fn encoding(key: &SecretKey) -> EncodingKey {
    let der = key
        .to_pkcs8_der()
        .expect("a key of a named curve can be written");
    EncodingKey::from_ec_der(der.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        let error = || {
            SigningKey::es256(Es256Key::File(file.clone()))
                .err()
                .unwrap()
                .to_string()
        };
        assert!(error().contains("No such file"), "{}", error());
        std::fs::write(&file, "no key").unwrap();
        assert!(error().contains("curve P-256"), "{}", error());
    }
}
