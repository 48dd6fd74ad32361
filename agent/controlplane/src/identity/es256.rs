//! Signatures by ES256, checked.

use std::{collections::HashSet, fmt, mem, sync::Mutex};

use nsm_core::identity::{
    claims::Signature,
    es256::{Es256, P256Key},
};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};

use crate::sync::lock;

/// How many signatures of one generation are remembered. A hop hands a token out until half of its life is over, so that most calls show
/// one that was checked before; with 32 bytes each, both generations take half a megabyte.
const REMEMBERED: usize = 8192;

/// Checks signatures, and keeps those that were good: a look-up costs a fiftieth of a check.
#[derive(Default)]
pub(super) struct Verifier {
    good: Mutex<Generations>,
}

/// What was good lately, and before that. A full generation becomes the older one, so that what is used stays.
#[derive(Default)]
struct Generations {
    recent: HashSet<[u8; 32]>,
    older: HashSet<[u8; 32]>,
}

impl Generations {
    fn has(&mut self, key: &[u8; 32]) -> bool {
        if self.recent.contains(key) {
            return true;
        }
        let is_older = self.older.remove(key);
        if is_older {
            self.add(*key);
        }
        is_older
    }

    fn add(&mut self, key: [u8; 32]) {
        if self.recent.len() >= REMEMBERED {
            self.older = mem::take(&mut self.recent);
        }
        self.recent.insert(key);
    }
}

impl Es256 for Verifier {
    fn verifies(&self, key: &P256Key, message: &[u8], signature: &Signature) -> bool {
        let known = Sha256::new()
            .chain_update(key.point())
            .chain_update(signature)
            .chain_update(message)
            .finalize()
            .into();
        if lock(&self.good).has(&known) {
            return true;
        }
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.point());
        let is_good = public.verify(message, signature).is_ok();
        if is_good {
            lock(&self.good).add(known);
        }
        is_good
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use p256::ecdsa::{self, SigningKey, signature::Signer as _};

    use super::*;

    fn signed(message: &[u8]) -> (P256Key, Signature) {
        let pair = rcgen::KeyPair::generate().unwrap();
        let secret = p256::pkcs8::DecodePrivateKey::from_pkcs8_der(&pair.serialize_der()).unwrap();
        let signing = SigningKey::from(&p256::SecretKey::clone(&secret));
        let signature: ecdsa::Signature = signing.sign(message);
        let key = P256Key::from_point(pair.public_key_raw()).unwrap();
        (key, signature.to_bytes().into())
    }

    #[test]
    fn a_signature_is_of_one_key_and_one_message() {
        let verifier = Verifier::default();
        let (key, signature) = signed(b"message");
        let (other, _) = signed(b"message");
        // The second time it is remembered.
        for _ in 0..2 {
            assert!(verifier.verifies(&key, b"message", &signature));
            assert!(!verifier.verifies(&key, b"messagf", &signature));
            assert!(!verifier.verifies(&other, b"message", &signature));
            let mut changed = signature;
            changed[40] ^= 1;
            assert!(!verifier.verifies(&key, b"message", &changed));
            assert!(!verifier.verifies(&key, b"message", &[0; 64]));
        }
        let off_the_curve = P256Key::from_point(&[4; P256Key::LENGTH]).unwrap();
        assert!(!verifier.verifies(&off_the_curve, b"message", &signature));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_is_used_stays() {
        let mut generations = Generations::default();
        let key = |n: usize| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&n.to_be_bytes());
            key
        };
        for n in 0..4 * REMEMBERED {
            generations.add(key(n));
            assert!(generations.has(&key(0)), "{n}");
        }
        assert!(!generations.has(&key(1)));
        assert!(generations.recent.len() + generations.older.len() <= 2 * REMEMBERED);
    }
}
