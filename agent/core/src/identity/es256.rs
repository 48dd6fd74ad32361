//! Keys and signatures of tokens (RFC 7518, section 3.4). This crate has no cryptography of its own.

use thiserror::Error;

use super::claims::Signature;

/// A public key of the curve P-256, which ES256 is checked with: an uncompressed point, 0x04 and two numbers of 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct P256Key([u8; Self::LENGTH]);

/// What stands before the point in a certificate's SubjectPublicKeyInfo of such a key (RFC 5480, section 2). DER has one spelling.
const SPKI_OF_P256: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// A certificate's key is not one that tokens are checked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "the certificate's key is no uncompressed point of the curve P-256: tokens are signed by ES256, so give the SVID such a key"
)]
pub struct NotP256;

impl P256Key {
    /// The bytes of the point.
    pub const LENGTH: usize = 65;

    /// The key in a certificate's SubjectPublicKeyInfo, as DER. Whether the point is on the curve is for who checks signatures.
    ///
    /// # Errors
    /// It is another key.
    pub fn from_spki(der: &[u8]) -> Result<Self, NotP256> {
        let point = der.strip_prefix(&SPKI_OF_P256).ok_or(NotP256)?;
        Self::from_point(point)
    }

    /// The key of a point of that curve, as a certificate's parser gives it.
    ///
    /// # Errors
    /// It is compressed, or of another length.
    pub fn from_point(point: &[u8]) -> Result<Self, NotP256> {
        let point: [u8; Self::LENGTH] = point.try_into().map_err(|_| NotP256)?;
        if point[0] != 4 {
            return Err(NotP256);
        }
        Ok(Self(point))
    }

    /// The point.
    #[must_use]
    pub const fn point(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }
}

/// Checks signatures.
pub trait Es256 {
    /// Whether `signature` is that of `message` by `key`: SHA-256, and the two numbers of 32 bytes one after the other.
    fn verifies(&self, key: &P256Key, message: &[u8], signature: &Signature) -> bool;
}
