//! Hashes as people compare them.

use sha2::{Digest as _, Sha256};

/// The SHA-256 of the bytes, in lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_has_two_digits() {
        assert_eq!(hex(&[0, 0xab, 0x0f]), "00ab0f");
        assert!(sha256(b"").starts_with("e3b0c44298fc1c14"));
    }
}
