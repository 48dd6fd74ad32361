//! The agent's identity as it is now: an SVID and the bundles of the trust domains that are believed. Both are replaced while the agent
//! runs.

use std::{sync::Arc, time::SystemTime};

use tokio::sync::watch;

use super::{certificate::Bundles, svid::Svid};

/// What is shown to peers, and which peers are believed, at one time.
#[derive(Debug)]
pub struct Material {
    /// Who we are.
    pub svid: Svid,
    /// Whom we believe.
    pub bundles: Bundles,
    /// One more with each change, from 1 on.
    pub generation: u64,
    /// When it was taken over.
    pub since: SystemTime,
}

/// The identity of this process. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Identity {
    current: Arc<watch::Sender<Option<Arc<Material>>>>,
    /// Where it comes from, for errors.
    origin: Arc<str>,
}

/// The source has given no SVID yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no SVID yet: {0} has given none; see the log, and `proxy-nsmgr identity`")]
pub struct NoIdentity(pub Arc<str>);

impl Identity {
    /// An identity that is not there yet; `origin` is where it will come from, for people.
    #[must_use]
    pub fn from_source(origin: &str) -> Self {
        Self {
            current: Arc::new(watch::Sender::new(None)),
            origin: origin.into(),
        }
    }

    /// Takes over what the source has now. Connections that stand keep what they began with.
    pub fn replace(&self, svid: Svid, bundles: Bundles) {
        self.current.send_if_modified(|current| {
            let is_same = |now: &Arc<Material>| now.svid == svid && now.bundles == bundles;
            if current.as_ref().is_some_and(is_same) {
                return false;
            }
            let generation = current.as_ref().map_or(0, |now| now.generation) + 1;
            *current = Some(Arc::new(Material {
                svid,
                bundles,
                generation,
                since: SystemTime::now(),
            }));
            true
        });
    }

    /// What it is now.
    ///
    /// # Errors
    /// The source has given nothing yet.
    pub fn current(&self) -> Result<Arc<Material>, NoIdentity> {
        let current = self.current.borrow().clone();
        current.ok_or_else(|| NoIdentity(Arc::clone(&self.origin)))
    }

    /// Where it comes from.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Returns when there is one, the first time it is there.
    pub async fn arrived(&self) {
        let mut current = self.current.subscribe();
        // The sender is here.
        let _ = current.wait_for(Option::is_some).await;
    }
}
