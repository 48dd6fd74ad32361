//! The programs on the devices that the agent itself makes: external devices, probe links, pod links.

use std::collections::HashSet;

use super::{Bpf, BpfError, State, attach, attach::BlockFound, role::Role};
use crate::netlink::Netlink;

/// A kind of device that the agent makes, and that has programs by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// An external VXLAN device.
    External,
    /// A probe link.
    Probe,
}

impl Own {
    const fn role(self) -> Role {
        match self {
            Self::External => Role::External,
            Self::Probe => Role::Probe,
        }
    }
}

impl Bpf {
    /// Hooks the program to a device, unless it hangs there; whether it had to.
    pub(crate) fn hook_own(&self, own: Own, interface: &str) -> Result<bool, BpfError> {
        let State {
            ebpf,
            pins,
            attachments,
            ..
        } = &mut *self.state();
        let is_known = attachments
            .interfaces(own.role())
            .iter()
            .any(|known| known == interface);
        if is_known && attachments.hangs(ebpf, own.role(), interface)? {
            return Ok(false);
        }
        attachments.attach(ebpf, pins, own.role(), interface)?;
        Ok(true)
    }

    /// Takes the program off a device, which may be gone already.
    pub(crate) fn unhook_own(&self, own: Own, interface: &str) -> Result<(), BpfError> {
        let state = &mut *self.state();
        state.attachments.detach(&state.pins, own.role(), interface)
    }

    /// Takes the programs off all devices of a kind but those that were hooked: an earlier agent's.
    pub(crate) fn unhook_own_strays(&self, own: Own) {
        let state = &mut *self.state();
        state.attachments.remove_strays(&state.pins, own.role());
    }

    /// Puts the node's end of a pod link under the program; one that is there already stays.
    pub(crate) fn hook_pod_link(&self, netlink: &mut Netlink, link: u32) -> Result<(), BpfError> {
        let State { ebpf, block, .. } = &mut *self.state();
        block.attach(netlink, attach::classifier(ebpf, attach::POD_INGRESS), link)
    }

    /// Puts the program in place of an earlier agent's on all pod links.
    pub(crate) fn replace_on_pod_links(&self, netlink: &mut Netlink) -> Result<(), BpfError> {
        let State { ebpf, block, .. } = &mut *self.state();
        block.replace(netlink, attach::classifier(ebpf, attach::POD_INGRESS))
    }

    /// Those of `links` that are not under the program.
    pub(crate) fn bare_pod_links(
        &self,
        netlink: &mut Netlink,
        links: impl IntoIterator<Item = u32>,
    ) -> Result<Vec<u32>, BpfError> {
        let State { ebpf, block, .. } = &mut *self.state();
        let program = attach::classifier(ebpf, attach::POD_INGRESS).info();
        let program = program.map_err(|error| BpfError::PodLink {
            link: 0,
            source: std::io::Error::other(error),
        })?;
        let BlockFound {
            has_program,
            links: hooked,
        } = block.look(netlink, program.id())?;
        let hooked = if has_program { hooked } else { HashSet::new() };
        Ok(links
            .into_iter()
            .filter(|link| !hooked.contains(link))
            .collect())
    }
}
