//! The choice of a registry.

use std::sync::Arc;

use nsm_core::net::PeerUrl;

use super::{DomainRegistry, memory::Memory, remote::Remote};
use crate::peer::peers::Peers;

/// Where the entries of this agent's own domain are.
#[derive(Clone)]
pub enum Backend {
    /// In this process.
    Memory(Memory),
    /// In another registry, by URL.
    Remote(PeerUrl),
}

impl Backend {
    /// Where it is, if it is another.
    pub(crate) fn url(&self) -> Option<&PeerUrl> {
        match self {
            Self::Memory(_) => None,
            Self::Remote(url) => Some(url),
        }
    }

    /// The registry behind it; `peers` dials one that is elsewhere.
    pub(crate) fn open(self, peers: &Arc<Peers>) -> Arc<dyn DomainRegistry> {
        match self {
            Self::Memory(memory) => Arc::new(memory),
            Self::Remote(url) => Arc::new(Remote::at(peers, [url])),
        }
    }
}
