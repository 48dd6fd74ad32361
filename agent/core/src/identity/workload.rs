//! Whose something is that a workload with a proven id has made, and ids that only their owner can show.
//!
//! An owner is two digests: so a connection holds 32 bytes for it, and nobody's id stays in memory. Pods of some roles are replaced under
//! another name; what such a pod made belongs to the role in its trust domain together with the client at the head of the path.

use sha2::{Digest as _, Sha256};

use super::{SpiffeId, TrustDomain};
use crate::nsm::name::Domain;

type Key = [u8; 16];

/// Whose something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Who sends the calls: a role in a trust domain, or one id.
    station: Key,
    /// Who has begun the path.
    first: Key,
}

impl Workload {
    /// The things that a role's pods of one domain make for `first`, whichever of them it is.
    #[must_use]
    pub fn of_role(
        trust_domain: &TrustDomain,
        domain: &Domain,
        role: &str,
        first: &SpiffeId,
    ) -> Self {
        let domain = domain.to_string();
        Self {
            station: key(&["role", trust_domain.as_str(), &domain, role]),
            first: key(&["first", first.as_str()]),
        }
    }

    /// The things of one id.
    #[must_use]
    pub fn of_id(id: &SpiffeId, first: &SpiffeId) -> Self {
        Self {
            station: key(&["id", id.as_str()]),
            first: key(&["first", first.as_str()]),
        }
    }

    /// Whether both come by the same role or id, whoever has begun the path. A monitor follows what its own station has made.
    #[must_use]
    pub fn is_of_station(&self, other: &Self) -> bool {
        self.station == other.station
    }

    /// An id for a connection of this owner, of `seed`: a UUID of version 8 (RFC 9562, section 5.8). The first half is of the seed, the
    /// second follows from it and the owner, so that [`owns`](Self::owns) recognises it without any state, also after a restart.
    #[must_use]
    pub fn bound_id(&self, seed: u128) -> u128 {
        let half = (seed >> 64) as u64 & !(0xf << 12) | 8 << 12;
        u128::from(half) << 64 | u128::from(self.seal(half))
    }

    /// Whether the id was made for this owner.
    #[must_use]
    pub fn owns(&self, id: u128) -> bool {
        let (half, seal) = ((id >> 64) as u64, id as u64);
        is_bound(id) && seal == self.seal(half)
    }

    /// 62 bits of a digest behind the variant of RFC 9562. To find an id that another owner's is would take that many tries.
    fn seal(&self, half: u64) -> u64 {
        let digest = Sha256::new()
            .chain_update(b"nsm bound id")
            .chain_update(self.station)
            .chain_update(self.first)
            .chain_update(half.to_be_bytes())
            .finalize();
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        u64::from_be_bytes(bytes) >> 2 | 1 << 63
    }
}

/// Whether an id is of that kind, whoever owns it.
#[must_use]
pub const fn is_bound(id: u128) -> bool {
    (id >> 76) & 0xf == 8 && (id >> 62) & 3 == 2
}

/// The first half of the digest of texts, each behind its length.
fn key(texts: &[&str]) -> Key {
    let mut digest = Sha256::new();
    for text in texts {
        digest.update((text.len() as u64).to_be_bytes());
        digest.update(text);
    }
    let mut key = Key::default();
    key.copy_from_slice(&digest.finalize()[..16]);
    key
}
