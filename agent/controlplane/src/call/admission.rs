//! The rules of what other parties may put into pods, as they hold now: the configured ones, and the cluster's prefixes as they are found.

use std::sync::{Arc, PoisonError, RwLock};

use ipnet::IpNet;
use nsm_core::link::admission::Rules;

/// The rules.
#[derive(Debug)]
pub(crate) struct Admission {
    configured: Rules,
    now: RwLock<Arc<Rules>>,
}

impl Admission {
    /// The configured rules.
    pub(crate) fn new(configured: Rules) -> Self {
        Self {
            now: RwLock::new(Arc::new(configured.clone())),
            configured,
        }
    }

    /// Protects these prefixes beside the configured ones.
    pub(crate) fn protect(&self, found: impl IntoIterator<Item = IpNet>) {
        let mut rules = self.configured.clone();
        rules.protected.extend(found);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// The rules that hold now.
    pub(crate) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }
}
