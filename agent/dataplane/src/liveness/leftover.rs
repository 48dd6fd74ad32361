//! Removal of an earlier agent's health plane on a node that is to have none.

use std::{panic, thread};

use nsm_ebpf_common::management::MAX_SESSIONS;

use super::{HealthConfig, HealthError};
use crate::{
    bpf::{Bpf, Sessions},
    links::probe_link,
    netlink::Netlink,
};

/// Removes the programs, links and sessions of the domain's earlier agent on this port. After an error the rest is removed all the same.
pub(super) fn remove(config: &HealthConfig, bpf: &Bpf) -> Result<(), HealthError> {
    // The reflector first.
    let unhooked = bpf.forget_probes();
    let forgotten = forget_sessions(bpf);
    // Only a thread of its own may change its namespace.
    let links = thread::scope(|scope| match scope.spawn(|| remove_links(config)).join() {
        Ok(removed) => removed,
        Err(cause) => panic::resume_unwind(cause),
    });
    unhooked
        .map_err(HealthError::from)
        .and(forgotten)
        .and(links)
}

fn remove_links(config: &HealthConfig) -> Result<(), HealthError> {
    if let Some(node) = &config.namespace {
        node.enter()?;
    }
    let mut netlink = Netlink::open().map_err(|source| HealthError::System {
        action: "open a netlink socket",
        source,
    })?;
    let removed = probe_link::remove_left(&mut netlink, &config.domain, config.port);
    Ok(removed?)
}

fn forget_sessions(bpf: &Bpf) -> Result<(), HealthError> {
    let mut sessions = bpf.take_sessions().ok_or(HealthError::InUse)?;
    let forgotten = sessions.indexed().and_then(|indexed| {
        for (key, slot) in indexed {
            sessions.forget(key)?;
            if slot < MAX_SESSIONS {
                sessions.slot(slot).clear();
            }
        }
        Ok(())
    });
    bpf.return_sessions(sessions);
    Ok(forgotten?)
}
