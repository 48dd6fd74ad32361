//! The VNIs that connections of this node hold.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use nsm_core::{
    mechanism::vni_pool::{VniPool, VniPoolError},
    net::Vni,
};

use crate::sync::lock;

/// The VNIs of this node. Cheap to clone; clones are the same VNIs.
#[derive(Debug, Clone)]
pub(crate) struct Vnis(Arc<Mutex<VniPool>>);

impl Vnis {
    /// Those that `pool` holds free.
    pub(crate) fn of(pool: VniPool) -> Self {
        Self(Arc::new(Mutex::new(pool)))
    }

    /// Chooses one for a tunnel between two addresses; see [`VniPool::allocate`].
    pub(crate) fn allocate(&self, local: IpAddr, remote: IpAddr) -> Result<Vni, VniPoolError> {
        lock(&self.0).allocate(local, remote, SystemTime::now(), rand::random)
    }

    /// Takes the one that a server chose; see [`VniPool::claim`].
    pub(crate) fn claim(&self, vni: Vni) -> Result<(), VniPoolError> {
        lock(&self.0).claim(vni, SystemTime::now())
    }

    /// Takes the one of a tunnel that stands since before this agent started; see [`VniPool::reclaim`].
    pub(crate) fn reclaim(
        &self,
        vni: Vni,
        local: IpAddr,
        remote: IpAddr,
    ) -> Result<(), VniPoolError> {
        lock(&self.0).reclaim(vni, local, remote, SystemTime::now())
    }

    /// Gives one back.
    pub(crate) fn release(&self, vni: Vni) {
        lock(&self.0).release(vni, SystemTime::now());
    }

    /// Whether one was released a moment ago.
    pub(crate) fn is_quarantined(&self, vni: Vni) -> bool {
        lock(&self.0).is_quarantined(vni, SystemTime::now())
    }

    /// How many are held.
    pub(crate) fn in_use(&self) -> usize {
        lock(&self.0).in_use()
    }
}
