//! The connections of this agent: the store, when they expire, who monitors them, and the keys of their tunnels.

mod down;
pub(crate) mod expiry;
mod index;
pub(crate) mod keys;
pub(crate) mod model;
pub(crate) mod monitor;
pub(crate) mod services;
pub(crate) mod store;

use nsm_core::mechanism::vni_pool::VniPool;

pub use self::down::DownReason;
use self::{
    expiry::Expiries, keys::TunnelKeys, monitor::Monitors, services::ServiceUsers,
    store::Connections,
};
use crate::places::Budget;

/// What this agent holds of its connections. Cheap to clone; clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) connections: Connections,
    pub(crate) expiries: Expiries,
    pub(crate) monitors: Monitors,
    pub(crate) keys: TunnelKeys,
    pub(crate) services: ServiceUsers,
}

impl Held {
    /// No connections yet; `vnis` are those of this node.
    pub(crate) fn new(budget: &Budget, vnis: VniPool) -> Self {
        let connections = Connections::new(budget);
        Self {
            monitors: Monitors::of(connections.clone(), budget),
            connections,
            expiries: Expiries::default(),
            keys: TunnelKeys::of(vnis),
            services: ServiceUsers::default(),
        }
    }
}
