//! The BPF programs on the underlay for as long as the agent has them, and where they count each tunnel.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nsm_core::{
    link::{Traffic, VxlanSpec},
    net::Vni,
};
use nsm_dataplane::bpf::{Bpf, BpfConfig, BpfError, Hook, KnownTunnel, Slot};

use crate::config::{self, Config};

/// The programs of one agent, or their absence.
pub(crate) struct Programs {
    /// None without rights or by configuration, and once the agent has released the programs.
    bpf: Mutex<Option<Arc<Bpf>>>,
    slots: Mutex<HashMap<Vni, Slot>>,
    /// Tunnels whose port is not the usual one: BPF forgets a port with its last tunnel.
    peer_ports: Mutex<HashMap<Vni, u16>>,
    /// The tunnels' own port, which the programs know from the start.
    port: u16,
    pin_dir: String,
    degraded: Option<String>,
    /// What was wrong with the hooks at the start.
    hook_faults: Vec<String>,
}

/// Facts about the programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// How they are attached; none where nothing is.
    pub(crate) hook: Option<Hook>,
    pub(crate) object_sha256: &'static str,
    pub(crate) pin_dir: String,
    pub(crate) interfaces: Vec<String>,
}

impl Programs {
    /// Loads and attaches the programs; without the rights for BPF the agent goes on without.
    pub(crate) async fn load(config: &Config) -> Self {
        let (bpf, hook_faults, degraded) = if !config.bpf.enabled {
            let reason = "BPF is switched off (`bpf.enabled`): counters are those of the links";
            (None, Vec::new(), Some(reason.to_owned()))
        } else {
            match load(bpf_config(config)).await {
                // Hooked by clsact where the kernel has no tcx, which is as good: `bpf.hook` of `status` shows which it is.
                Ok((bpf, faults)) => (Some(bpf), faults, None),
                Err(error) => {
                    let reason = format!(
                        "no BPF: {}; tunnels work, sources are not checked, and counters are those of the links",
                        sentence(error)
                    );
                    (None, Vec::new(), Some(reason))
                }
            }
        };
        Self {
            bpf: Mutex::new(bpf.map(Arc::new)),
            slots: Mutex::default(),
            peer_ports: Mutex::default(),
            port: config.tunnel.port,
            pin_dir: config.bpf.pin_dir.display().to_string(),
            degraded,
            hook_faults,
        }
    }

    /// What works less well than it could, as it was at the start.
    pub(crate) fn degraded(&self) -> impl Iterator<Item = &String> {
        self.degraded.iter().chain(&self.hook_faults)
    }

    /// What was wrong with the hooks at the start; part of [`Self::degraded`].
    pub(super) fn hook_faults(&self) -> &[String] {
        &self.hook_faults
    }

    /// The programs, while the agent has them.
    pub(crate) fn bpf(&self) -> Option<Arc<Bpf>> {
        let bpf = self.bpf.lock().unwrap_or_else(PoisonError::into_inner);
        bpf.clone()
    }

    /// What is attached, and where.
    pub(crate) fn facts(&self) -> Facts {
        let attached = self.with(|bpf| Facts {
            hook: Some(bpf.hook()),
            object_sha256: Bpf::object_sha256(),
            pin_dir: self.pin_dir.clone(),
            interfaces: bpf.interfaces(),
        });
        attached.unwrap_or_else(|| Facts {
            hook: None,
            object_sha256: "",
            pin_dir: String::new(),
            interfaces: Vec::new(),
        })
    }

    /// Packets of the underlay that were dropped or passed uncounted, by reason.
    pub(crate) fn drops(&self) -> BTreeMap<&'static str, u64> {
        let drops = self.with(|bpf| bpf.drops().ok()).flatten();
        drops.unwrap_or_default()
    }

    /// What was counted of a tunnel at the cards; none where nothing counts it.
    pub(crate) fn traffic(&self, vni: Vni) -> Option<Traffic> {
        let slot = self.slots().get(&vni).copied()?;
        self.with(|bpf| bpf.counters(slot).ok())?
    }

    /// Whether a tunnel of this VNI has been counted in.
    pub(crate) fn counts(&self, vni: Vni) -> bool {
        self.slots().contains_key(&vni)
    }

    /// Counts a tunnel from now on: the programs must know it before its first packet. Without a free slot the tunnel works all the
    /// same, uncounted.
    pub(crate) fn count(&self, spec: &VxlanSpec) {
        let added = self.with(|bpf| {
            // The peer chooses its port, among those that are configured.
            if spec.port != self.port {
                self.peer_ports().insert(spec.vni, spec.port);
                bpf.add_port(spec.port)?;
            }
            bpf.add_tunnel(spec.vni, spec.remote)
        });
        match added {
            None => {}
            Some(Ok(slot)) => {
                self.slots().insert(spec.vni, slot);
            }
            Some(Err(error)) => {
                tracing::warn!(tunnel.vni = spec.vni.get(), %error, "the tunnel is not counted");
            }
        }
    }

    /// Counts a tunnel no longer.
    pub(crate) fn uncount(&self, spec: &VxlanSpec) {
        self.slots().remove(&spec.vni);
        let is_left = {
            let mut ports = self.peer_ports();
            let port = ports.remove(&spec.vni);
            port.is_some_and(|port| !ports.values().any(|other| *other == port))
        };
        let removed = self.with(|bpf| {
            if is_left {
                bpf.remove_port(spec.port)?;
            }
            bpf.remove_tunnel(spec.vni, spec.remote)
        });
        if let Some(Err(error)) = removed {
            tracing::warn!(tunnel.vni = spec.vni.get(), %error, "the tunnel's slot is not freed");
        }
    }

    /// Tunnels that the pinned maps hold.
    pub(crate) fn tunnels(&self) -> Vec<KnownTunnel> {
        self.with(Bpf::tunnels).unwrap_or_default()
    }

    /// Removes those of `left` that have not been counted in since.
    pub(crate) fn remove_orphans(&self, left: Vec<KnownTunnel>) {
        for tunnel in left {
            if let Ok(vni) = Vni::try_from(tunnel.vni)
                && !self.counts(vni)
            {
                let _ = self.with(|bpf| bpf.remove_tunnel(vni, tunnel.peer));
            }
        }
    }

    /// Detaches the programs and removes everything that is pinned.
    pub(crate) fn release(&self) {
        let mut bpf = self.bpf.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bpf) = bpf.take()
            && let Err(error) = bpf.detach_and_unpin()
        {
            tracing::warn!(%error, "the BPF programs stay behind");
        }
    }

    fn with<T>(&self, use_it: impl FnOnce(&Bpf) -> T) -> Option<T> {
        let bpf = self.bpf.lock().unwrap_or_else(PoisonError::into_inner);
        bpf.as_deref().map(use_it)
    }

    fn peer_ports(&self) -> MutexGuard<'_, HashMap<Vni, u16>> {
        let ports = self.peer_ports.lock();
        ports.unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Vni, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads and attaches; with what is wrong with the hooks. It takes 8 to 16 ms an interface and direction, so it has a thread of its own.
async fn load(config: BpfConfig) -> Result<(Bpf, Vec<String>), BpfError> {
    let load = move || {
        let bpf = Bpf::load(&config)?;
        let faults = hook_faults(&bpf);
        Ok((bpf, faults))
    };
    tokio::task::spawn_blocking(load)
        .await
        .expect("loading BPF programs does not panic")
}

fn bpf_config(config: &Config) -> BpfConfig {
    let interfaces = config.bpf.interfaces.iter();
    BpfConfig {
        pin_dir: config.bpf.pin_dir.clone(),
        interfaces: interfaces.map(ToString::to_string).collect(),
        tunnel_addresses: config.tunnel.ip.into_iter().collect(),
        ports: vec![config.tunnel.port],
        hook: match config.bpf.hook {
            config::Hook::Auto => None,
            config::Hook::Tcx => Some(Hook::Tcx),
            config::Hook::Clsact => Some(Hook::Clsact),
        },
        ..BpfConfig::default()
    }
}

/// What is wrong with the hooks and cannot be mended, a sentence each. Takes system calls.
pub(crate) fn hook_faults(bpf: &Bpf) -> Vec<String> {
    bpf.look_after_hooks().into_iter().map(sentence).collect()
}

/// An error with its causes.
fn sentence(error: BpfError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}
