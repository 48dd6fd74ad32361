//! The BPF programs for as long as the agent has them.

use std::{collections::BTreeMap, sync::Arc};

use nsm_dataplane::bpf::{Bpf, BpfConfig, BpfError, Hook, PathsTaken};

use super::handover::when_free;
use crate::config::{self, Config};

/// The programs of one agent.
pub(crate) struct Programs {
    bpf: Arc<Bpf>,
    pin_dir: String,
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
    /// Frames by the path that they took; none where the kernel does not show them.
    pub(crate) taken: Option<PathsTaken>,
}

impl Programs {
    /// Loads and attaches the programs.
    ///
    /// # Errors
    /// Why there are none, as a degradation: without them there is no dataplane.
    pub(crate) async fn load(config: &Config) -> Result<Self, String> {
        if !config.bpf.enabled {
            return Err("BPF is switched off (`bpf.enabled`): no pod is connected on this node, and Requests are only passed on".to_owned());
        }
        let is_taken = |error: &BpfError| matches!(error, BpfError::InUse { .. });
        let load = async || load(bpf_config(config)).await;
        let loaded = when_free("the pin directory", is_taken, load).await;
        let (bpf, hook_faults) = loaded.map_err(|error| {
            format!(
                "no BPF: {}; no pod is connected on this node, and Requests are only passed on",
                sentence(error)
            )
        })?;
        Ok(Self {
            bpf: Arc::new(bpf),
            pin_dir: config.bpf.pin_dir.display().to_string(),
            hook_faults,
        })
    }

    /// What was wrong with the hooks at the start.
    pub(super) fn hook_faults(&self) -> &[String] {
        &self.hook_faults
    }

    /// The programs.
    pub(crate) const fn bpf(&self) -> &Arc<Bpf> {
        &self.bpf
    }

    /// What is attached, and where.
    pub(crate) fn facts(&self) -> Facts {
        Facts {
            hook: Some(self.bpf.hook()),
            object_sha256: Bpf::object_sha256(),
            pin_dir: self.pin_dir.clone(),
            interfaces: self.bpf.interfaces(),
            taken: self.bpf.paths_taken().ok(),
        }
    }

    /// Packets that were dropped or passed uncounted, by reason.
    pub(crate) fn drops(&self) -> BTreeMap<&'static str, u64> {
        self.bpf.drops().unwrap_or_default()
    }

    /// Detaches the programs and removes everything that is pinned.
    pub(crate) fn release(&self) {
        if let Err(error) = self.bpf.detach_and_unpin() {
            tracing::warn!(%error, "the BPF programs stay behind");
        }
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
        slow_only: config.tunnel.respect_host_firewall,
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
