//! Forwarding: pod links and tunnels, joined by BPF.
//!
//! A connection has a pod link ([`crate::links`]): a veth pair, one end in the pod, the other on the node. The tunnel is on the node, where
//! no pod can change it: one external VXLAN device for each UDP port, which takes VNI and addresses of each packet from a program.
//!
//! ```text
//!   pod               node
//!   nsm-1 ══ veth ══ node's end ── pod_ingress ─▶ external device ─▶ UDP 4789 ─▶ underlay
//!     ▲                                                │
//!     └─────────── bpf_redirect_peer ◀─ external_ingress ◀─ UDP 4789 ◀─ underlay
//! ```
//!
//! The state is in the kernel: the pinned maps FORWARD (node's end → tunnel) and TUNNELS ((VNI, peer) → node's end), and the aliases of the
//! links (link → connection). A new agent reads it back ([`Forwarding::start`]); programs and maps work on meanwhile. A change of tunnel
//! is a write to both maps, and the pod's link stays.
//!
//! It fails closed. A frame without an entry is dropped and counted by a program; where a program is missing, a table of nftables drops
//! what comes in by our links.
//!
//! Cancellation: a dropped future leaves what its call has reached, but no tunnel that is taken for nothing; the next call for the connection
//! goes on from there, and [`Forwarding::down`] removes it.

mod devices;
mod error;
mod joined;
mod watch;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nsm_core::{
    link::{LinkAlias, NodeLink, Traffic, VxlanSpec},
    net::Vni,
};

pub use self::{devices::TunnelDevices, error::ForwardError};
use self::{
    joined::{Connection, Joined, Reserved, Written},
    watch::Watch,
};
use crate::{
    bpf::{Bpf, PodEnds},
    fence::Dropped,
    links::{Links, PodLink},
    netns::Netns,
};

/// What a connection has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelTraffic {
    /// At the pod's link: "sent" is what the pod sent and the program accepted, "received" what the pod got.
    pub link: Traffic,
    /// At the underlay.
    pub wire: Traffic,
}

/// The connections of a node whose other end is elsewhere.
pub struct Forwarding {
    links: Links,
    devices: Arc<TunnelDevices>,
    joined: Arc<Mutex<Joined>>,
    watch: Arc<Mutex<Watch>>,
}

impl Forwarding {
    /// Adopts what an earlier agent of this domain left: its links whose tunnel is in the maps. The rest of the maps is cleaned.
    ///
    /// # Errors
    ///
    /// The node's links or the maps cannot be read, or the program cannot be put in place of the earlier one.
    pub async fn start(
        links: Links,
        devices: Arc<TunnelDevices>,
        domain: &str,
    ) -> Result<Self, ForwardError> {
        let ends = links.pod_links(domain).await?;
        let forwarding = Self {
            links,
            devices,
            joined: Arc::default(),
            watch: Arc::default(),
        };
        let adopted = Arc::clone(&forwarding.devices);
        let ports: Vec<u16> = adopted
            .bpf()
            .devices()?
            .into_iter()
            .map(|it| it.0)
            .collect();
        forwarding
            .links
            .on_node_of(move |netlink| {
                adopted.bpf().replace_on_pod_links(netlink)?;
                // A port that others have by now is reported when a connection needs it.
                for port in ports {
                    if let Err(error) = adopted.ensure(netlink, port) {
                        tracing::warn!(%error, port, "an external device of an earlier agent is not taken over");
                    }
                }
                // A kernel without nftables is reported when a connection needs it.
                if let Err(error) = adopted.guard_present() {
                    tracing::warn!(%error, "there is no fence around the links of connections");
                }
                Ok::<_, ForwardError>(())
            })
            .await?;
        forwarding.adopt(ends)?;
        Ok(forwarding)
    }

    fn adopt(&self, ends: Vec<NodeLink>) -> Result<(), ForwardError> {
        let mut ends: HashMap<u32, NodeLink> = ends.into_iter().map(|it| (it.index, it)).collect();
        let mut joined = self.joined();
        for known in self.bpf().connected()? {
            let end = ends.remove(&known.node);
            let alias = end.as_ref().and_then(|end| end.alias.clone());
            match (end, alias, Vni::try_from(known.vni)) {
                (Some(node), Some(alias), Ok(vni))
                    if joined.reserve((vni, known.remote), &alias) =>
                {
                    let connection = Connection {
                        vni,
                        peer: known.remote,
                        slot: known.slot,
                        node: node.index,
                        written: None,
                    };
                    joined.join(&alias, connection, node);
                }
                _ => self.bpf().disconnect_link(known.node)?,
            }
        }
        for tunnel in self.bpf().tunnels() {
            if let Ok(vni) = Vni::try_from(tunnel.vni)
                && !joined.has_tunnel((vni, tunnel.peer))
            {
                self.bpf().disconnect_tunnel(vni, tunnel.peer)?;
            }
        }
        Ok(())
    }

    /// The connections that are joined, among them those that were adopted.
    #[must_use]
    pub fn connections(&self) -> Vec<LinkAlias> {
        self.joined().aliases().cloned().collect()
    }

    /// Makes a connection as wanted: its pod link, and the tunnel behind it. One that is there is changed in place.
    ///
    /// # Errors
    ///
    /// See [`ForwardError`]; [`ForwardError::Taken`] asks for another VNI. A connection that this call made is removed, and one that was
    /// there before keeps its tunnel.
    pub async fn up(&self, pod: &Netns, spec: &VxlanSpec) -> Result<PodLink, ForwardError> {
        let alias = &spec.link.alias;
        let tunnel = (spec.vni, spec.remote.to_canonical());
        let _reserved = Reserved::take(&self.joined, tunnel, alias)?;
        let (devices, port) = (Arc::clone(&self.devices), spec.port);
        self.links
            .on_node_of(move |netlink| devices.ensure(netlink, port))
            .await?;
        let link = self.links.up_pod_link(pod, &spec.link).await?;
        if let Err(error) = self.join(&link, spec).await {
            if link.pod.created {
                self.disconnect(alias)?;
                let links = std::slice::from_ref(alias);
                self.links.down_pod_links(links).await?;
            }
            return Err(error);
        }
        Ok(link)
    }

    /// Puts the program on a link, then joins the link and its tunnel in the maps. After an error the maps are as before. Nothing is done
    /// where nothing has changed.
    async fn join(&self, link: &PodLink, spec: &VxlanSpec) -> Result<(), ForwardError> {
        let alias = &spec.link.alias;
        let ends = PodEnds {
            node: link.node.index,
            mac: link.pod.mac,
            same_namespace: link.node.peer.is_none_or(|peer| peer.netns.is_none()),
        };
        let written = Written::of(&ends, spec);
        let is_same = |known: &Connection| known.written.as_ref() == Some(&written);
        if self.joined().get(alias).is_some_and(is_same) {
            return Ok(());
        }
        let (devices, node) = (Arc::clone(&self.devices), link.node.index);
        self.links
            .on_node_of(move |netlink| {
                let hooked = devices.bpf().hook_pod_link(netlink, node);
                hooked.map_err(ForwardError::from)
            })
            .await?;
        let connection = Connection {
            vni: spec.vni,
            peer: spec.remote.to_canonical(),
            slot: self.bpf().connect(&ends, spec)?,
            node: link.node.index,
            written: Some(written),
        };
        let now = connection.tunnel();
        let before = self.joined().join(alias, connection, link.node.clone());
        let Some(before) = before else { return Ok(()) };
        if before.node != link.node.index {
            self.bpf().disconnect_link(before.node)?;
        }
        if before.tunnel() != now {
            self.bpf().disconnect_tunnel(before.vni, before.peer)?;
        }
        Ok(())
    }

    /// Removes a connection; a success when there is none. The maps are empty of it then: what the pod sends is dropped. The link itself goes
    /// a moment later.
    ///
    /// # Errors
    ///
    /// The kernel refused. What could not be removed is tried again by the next call.
    pub async fn down(&self, alias: &LinkAlias) -> Result<(), ForwardError> {
        self.disconnect(alias)?;
        Ok(self.links.down_pod_link_soon(alias).await?)
    }

    fn disconnect(&self, alias: &LinkAlias) -> Result<(), ForwardError> {
        let connection = self.joined().leave(alias);
        match connection {
            Some(connection) => empty_maps(self.bpf(), &connection),
            None => Ok(()),
        }
    }

    /// What a connection has passed; None: it is not joined.
    #[must_use]
    pub fn passed(&self, alias: &LinkAlias) -> Option<TunnelTraffic> {
        let slot = self.joined().get(alias)?.slot;
        Some(TunnelTraffic {
            link: self.bpf().link_counters(slot).ok()?,
            wire: self.bpf().counters(slot).ok()?,
        })
    }

    /// Repairs devices and links that somebody changed, and programs that were taken off. What cannot be repaired is returned, a sentence
    /// each. To be called regularly; it takes microseconds where nothing has changed.
    ///
    /// # Errors
    ///
    /// The node's links cannot be read.
    pub async fn look_after(&self) -> Result<Vec<String>, ForwardError> {
        let (devices, joined, watch) = (
            Arc::clone(&self.devices),
            Arc::clone(&self.joined),
            Arc::clone(&self.watch),
        );
        self.links
            .on_node_of(move |netlink| {
                let mut faults: Vec<String> = devices
                    .mend(netlink)
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                let mut watch = lock(&watch);
                // Connections come and go while the kernel is asked.
                let made = lock(&joined).nodes();
                let looked = watch.look(netlink, devices.bpf(), &made);
                match looked {
                    Ok(looked) => {
                        faults.extend(looked.faults);
                        for link in looked.gone {
                            faults.extend(forget(&joined, devices.bpf(), link).err());
                        }
                    }
                    Err(error) => faults.push(format!("the links of connections: {error}")),
                }
                Ok(faults)
            })
            .await
    }

    /// Packets that the fence has dropped.
    #[must_use]
    pub fn fenced(&self) -> Option<Dropped> {
        self.devices.fenced()
    }

    /// Waits until the links of removed connections are gone, then removes the external devices and the fence. Connections are removed one
    /// by one before: see [`Self::down`].
    ///
    /// # Errors
    ///
    /// The kernel keeps a device; the others are removed.
    pub async fn close(&self) -> Result<(), ForwardError> {
        self.links.settled().await;
        let devices = Arc::clone(&self.devices);
        self.links
            .on_node_of(move |netlink| devices.remove(netlink))
            .await
    }

    fn bpf(&self) -> &Bpf {
        self.devices.bpf()
    }

    fn joined(&self) -> MutexGuard<'_, Joined> {
        lock(&self.joined)
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what the maps have of a connection: the pod's side first, so that nothing is sent whose answer would be dropped.
fn empty_maps(bpf: &Bpf, connection: &Connection) -> Result<(), ForwardError> {
    let unlinked = bpf.disconnect_link(connection.node);
    let freed = bpf.disconnect_tunnel(connection.vni, connection.peer);
    unlinked.and(freed.map(drop)).map_err(ForwardError::from)
}

/// Empties the maps of a connection whose link is gone, with its pod or by the pod's own doing. The next Request for the connection makes
/// both anew.
fn forget(joined: &Mutex<Joined>, bpf: &Bpf, link: u32) -> Result<(), String> {
    let Some((alias, connection)) = lock(joined).lose(link) else {
        return Ok(());
    };
    tracing::warn!(%alias, "a pod link is gone: its tunnel leads nowhere until the client asks again");
    empty_maps(bpf, &connection).map_err(|error| format!("the tunnel of {alias}: {error}"))
}
