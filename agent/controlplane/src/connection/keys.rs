//! The keys of this node's tunnels: each is held by one connection.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use nsm_core::{
    mechanism::{
        RemoteMechanism, TunnelKey,
        vni_pool::{VniPool, VniPoolError},
    },
    net::Vni,
};

use crate::sync::lock;

/// What the tunnels of this node hold. Cheap to clone; clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct TunnelKeys {
    vnis: Arc<Mutex<VniPool>>,
}

impl TunnelKeys {
    /// The keys that the pools of each mechanism have free.
    pub(crate) fn of(vnis: VniPool) -> Self {
        Self {
            vnis: Arc::new(Mutex::new(vnis)),
        }
    }

    /// Chooses a key for a tunnel that this node serves, between two addresses; see [`VniPool::allocate`].
    pub(crate) fn choose(
        &self,
        mechanism: RemoteMechanism,
        local: IpAddr,
        remote: IpAddr,
    ) -> Result<TunnelKey, VniPoolError> {
        match mechanism {
            RemoteMechanism::Vxlan => lock(&self.vnis)
                .allocate(local, remote, SystemTime::now(), rand::random)
                .map(TunnelKey::Vni),
        }
    }

    /// Takes the key that a server chose; see [`VniPool::claim`].
    pub(crate) fn claim(&self, key: TunnelKey) -> Result<(), VniPoolError> {
        let TunnelKey::Vni(vni) = key;
        lock(&self.vnis).claim(vni, SystemTime::now())
    }

    /// Takes the key of a tunnel that stands since before this agent started; see [`VniPool::reclaim`].
    pub(crate) fn reclaim(
        &self,
        key: TunnelKey,
        local: IpAddr,
        remote: IpAddr,
    ) -> Result<(), VniPoolError> {
        let TunnelKey::Vni(vni) = key;
        lock(&self.vnis).reclaim(vni, local, remote, SystemTime::now())
    }

    /// Gives a key back.
    pub(crate) fn release(&self, key: TunnelKey) {
        let TunnelKey::Vni(vni) = key;
        lock(&self.vnis).release(vni, SystemTime::now());
    }

    /// Gives back what was taken for a Request that failed: `key`, unless the connection held it before.
    pub(crate) fn release_unless_held(&self, key: TunnelKey, held: Option<TunnelKey>) {
        if held != Some(key) {
            self.release(key);
        }
    }

    /// Whether a VNI was given back a moment ago.
    pub(crate) fn is_quarantined(&self, vni: Vni) -> bool {
        lock(&self.vnis).is_quarantined(vni, SystemTime::now())
    }

    /// How many keys are held.
    pub(crate) fn in_use(&self) -> usize {
        lock(&self.vnis).in_use()
    }
}
