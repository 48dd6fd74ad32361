//! What both ends of one TLS connection have shown each other. It does not change while the connection stands, whatever is renewed.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_core::identity::SpiffeId;

use super::{certificate::Leaf, gate::Shown, source::Material, svid::Svid};

/// One TLS connection's identities.
#[derive(Debug)]
pub struct Session {
    own: Arc<Material>,
    peer: Leaf,
    began: SystemTime,
    shown: Arc<Shown>,
}

impl Session {
    /// A connection that has begun at `began`: we have shown `own`, and the peer's certificate is believed.
    pub(crate) fn new(own: Arc<Material>, peer: Leaf, began: SystemTime) -> Self {
        let shown = Arc::new(Shown {
            peer: peer.id.clone(),
            key: peer.key,
            own: own.svid.id().clone(),
        });
        Self {
            own,
            peer,
            began,
            shown,
        }
    }

    /// The ids of both ends, for what decides by them.
    pub(crate) const fn shown(&self) -> &Arc<Shown> {
        &self.shown
    }

    /// Who the peer is.
    #[must_use]
    pub const fn peer(&self) -> &SpiffeId {
        &self.peer.id
    }

    /// What was read of the certificate that the peer has shown.
    #[must_use]
    pub const fn peer_leaf(&self) -> &Leaf {
        &self.peer
    }

    /// What we have shown. Tokens on this connection are signed with its key: the peer compares them with the certificate that it got.
    #[must_use]
    pub fn svid(&self) -> &Svid {
        &self.own.svid
    }

    /// Which generation of our identity that is.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.own.generation
    }

    /// The end of the certificate that ends first. No token on this connection lives longer.
    #[must_use]
    pub fn ends(&self) -> SystemTime {
        self.peer.not_after.min(self.own.svid.not_after())
    }

    /// Whether half of the time is over that was left when the connection began: whoever dials does so again then. The tokens on it live
    /// no longer than its certificates, and SPIRE renews an SVID when half of its life is over.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        let since = |later: SystemTime| later.duration_since(self.began).unwrap_or(Duration::ZERO);
        since(now) >= since(self.ends()) / 2
    }
}
