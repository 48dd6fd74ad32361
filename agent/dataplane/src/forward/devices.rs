//! The external VXLAN devices of the node, one for each UDP port, with the program that takes what they decapsulate, and the fence around
//! them and the pod links.

use std::{
    collections::BTreeMap,
    panic,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::ForwardError;
use crate::{
    bpf::{Bpf, Own},
    fence::{self, Dropped, Fence},
    links::{
        LinkError,
        external::{self, External, ExternalSpec, Look},
        pod_link,
    },
    netlink::{Netlink, NetlinkError},
    netns::Netns,
};

/// The external devices of one agent. Data and probes share them.
pub struct TunnelDevices {
    bpf: Arc<Bpf>,
    domain: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Raised before the first device.
    fence: Option<Fence>,
    devices: BTreeMap<u16, External>,
}

impl TunnelDevices {
    /// No devices yet: each is made when it is needed first.
    #[must_use]
    pub fn new(bpf: Arc<Bpf>, domain: impl Into<String>) -> Self {
        Self {
            bpf,
            domain: domain.into(),
            state: Mutex::default(),
        }
    }

    /// The programs.
    #[must_use]
    pub const fn bpf(&self) -> &Arc<Bpf> {
        &self.bpf
    }

    /// Makes or adopts the device of a port, in the namespace of `netlink`, which must be the calling thread's. One that is known is taken
    /// to be there: see [`Self::mend`].
    pub(crate) fn ensure(&self, netlink: &mut Netlink, port: u16) -> Result<(), ForwardError> {
        let state = &mut *self.state();
        if state.devices.contains_key(&port) {
            return Ok(());
        }
        let fence = raised(&mut state.fence, &self.bpf)?;
        let made = self.make(netlink, port);
        guard(fence, port, &made)?;
        state.devices.insert(port, made?);
        Ok(())
    }

    /// Has the fence, which may be an earlier agent's, guard the ports of the present devices and no others.
    pub(crate) fn guard_present(&self) -> Result<(), ForwardError> {
        let State { fence, devices } = &mut *self.state();
        let fence = raised(fence, &self.bpf)?;
        Ok(fence.guard_only(devices.keys().copied())?)
    }

    /// Raises the fence where there is none yet: before the first link of a connection that needs no device.
    pub(crate) fn ensure_fence(&self) -> Result<(), ForwardError> {
        raised(&mut self.state().fence, &self.bpf).map(drop)
    }

    /// Packets that the fence has dropped.
    #[must_use]
    pub fn fenced(&self) -> Option<Dropped> {
        self.state().fence.as_ref()?.dropped().ok()
    }

    fn make(&self, netlink: &mut Netlink, port: u16) -> Result<External, ForwardError> {
        let spec = self.spec(port);
        let device = external::ensure(netlink, &spec)?;
        // Without its program the device hands frames to the node, which drops them by the link group.
        let hooked = self
            .bpf
            .hook_own(Own::External, &device.link.name)
            .and_then(|_| self.bpf.add_port(port))
            .and_then(|()| self.bpf.set_device(port, device.link.index));
        if let Err(error) = hooked {
            if !device.adopted {
                external::remove(netlink, &spec)?;
            }
            return Err(error.into());
        }
        Ok(device)
    }

    /// Repairs the fence, and devices that were changed, removed, or lost their program. What cannot be repaired is returned.
    pub(crate) fn mend(&self, netlink: &mut Netlink) -> Vec<ForwardError> {
        let state = &mut *self.state();
        let mut faults = Vec::new();
        match state.fence.as_ref().map(Fence::look) {
            None | Some(Ok(fence::Look::Stands)) => {}
            Some(Ok(fence::Look::PutBack)) => {
                tracing::warn!(
                    "the fence around the links of connections was changed, and stands again"
                );
            }
            Some(Err(error)) => faults.push(error.into()),
        }
        for (port, device) in &mut state.devices {
            let mended = self.mend_one(netlink, *port, device);
            let fence = state.fence.as_ref();
            let guarded = fence.map_or(Ok(()), |fence| guard(fence, *port, &mended));
            faults.extend(guarded.err());
            match mended {
                Ok(None) => {}
                Ok(Some(found)) => {
                    tracing::warn!(
                        interface = device.link.name,
                        found,
                        "an external device was repaired"
                    );
                }
                Err(error) => faults.push(error),
            }
        }
        faults
    }

    /// What was wrong, and is not any more.
    fn mend_one(
        &self,
        netlink: &mut Netlink,
        port: u16,
        device: &mut External,
    ) -> Result<Option<&'static str>, ForwardError> {
        let looked = external::look(netlink, device)?;
        if looked == Look::Gone {
            *device = self.make(netlink, port)?;
            return Ok(Some("gone"));
        }
        if self.bpf.hook_own(Own::External, &device.link.name)? {
            return Ok(Some("without its program"));
        }
        Ok(match looked {
            Look::Repaired(_) => Some("changed"),
            Look::Right | Look::Gone => None,
        })
    }

    /// As [`super::Forwarding::close`], for who has probes only. `node` is the namespace where the devices are.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered, or the kernel keeps something.
    pub fn close(&self, node: &Netns) -> Result<(), ForwardError> {
        // Only a thread of its own may change its namespace.
        thread::scope(|scope| {
            let removed = scope.spawn(|| {
                node.enter()?;
                self.remove(&mut Netlink::open().map_err(NetlinkError::from)?)
            });
            removed
                .join()
                .unwrap_or_else(|cause| panic::resume_unwind(cause))
        })
    }

    /// Removes all devices, in the namespace of `netlink`, and the fence where nothing is left that needs it. After an error the rest is
    /// removed all the same.
    pub(crate) fn remove(&self, netlink: &mut Netlink) -> Result<(), ForwardError> {
        let State { fence, devices } = std::mem::take(&mut *self.state());
        let removed = devices.into_iter().map(|(port, device)| {
            // The device first: without its program it would hand frames to the node.
            external::remove(netlink, &self.spec(port))?;
            self.bpf.forget_device(port)?;
            self.bpf.unhook_own(Own::External, &device.link.name)?;
            Ok(())
        });
        // Each is tried.
        let removed: Vec<Result<(), ForwardError>> = removed.collect();
        removed.into_iter().collect::<Result<(), _>>()?;
        if let Some(fence) = fence
            && pod_link::list(netlink, &self.domain)?.is_empty()
        {
            fence.remove()?;
        }
        Ok(())
    }

    fn spec(&self, port: u16) -> ExternalSpec {
        ExternalSpec {
            domain: self.domain.clone(),
            port,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fence, raised where there is none.
fn raised<'a>(fence: &'a mut Option<Fence>, bpf: &Bpf) -> Result<&'a mut Fence, ForwardError> {
    match fence {
        Some(fence) => Ok(fence),
        none => Ok(none.insert(Fence::raise(&bpf.pin_dir())?)),
    }
}

/// Guards the port of a device that is there. One that another program has taken is left to that program.
fn guard<T>(
    fence: &Fence,
    port: u16,
    outcome: &Result<T, ForwardError>,
) -> Result<(), ForwardError> {
    let guarded = match outcome {
        Ok(_) => fence.guard(port),
        Err(ForwardError::Link(LinkError::PortTaken { .. })) => fence.release(port),
        Err(_) => Ok(()),
    };
    Ok(guarded?)
}
