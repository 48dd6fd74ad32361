//! Forwarding: pod links and tunnels, or two pod links, joined by BPF.
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
//! Where both pods of a connection are on this node, `pod_ingress` redirects from the one pod's link into the other pod.
//!
//! The state is in the kernel: the pinned maps FORWARD (node's end → tunnel, or the other node's end) and TUNNELS ((VNI, peer) → node's
//! end), and the aliases of the links (link → connection). A new agent reads it back ([`Forwarding::start`]); programs and maps work on
//! meanwhile. A change of tunnel, or between a tunnel and a pair, is a write to the maps, and the client's link stays.
//!
//! It fails closed. A frame without an entry is dropped and counted by a program; where a program is missing, a table of nftables drops
//! what comes in by our links.
//!
//! Cancellation: a dropped future leaves what its call has reached, but no tunnel that is taken for nothing; the next call for the connection
//! goes on from there, and [`Forwarding::down`] removes it.

mod adopt;
mod changed;
mod devices;
mod error;
mod joined;
mod pair;
mod watch;

use std::{
    slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use nsm_core::link::{LinkAlias, LinkFault, LinkSpec, Traffic, VxlanSpec};

use self::{
    changed::ChangedLinks,
    joined::{Connection, Joined, Joint, Reserved, To, Written},
    watch::Watch,
};
pub use self::{devices::TunnelDevices, error::ForwardError};
use crate::{
    bpf::{Bpf, PodEnds},
    fence::Dropped,
    links::{Links, PodEnd, PodLink},
    netlink::Netlink,
    netns::Netns,
};

/// What a pod link has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// At the pod's link: "sent" is what the pod sent and the program accepted, "received" what the pod got.
    pub link: Traffic,
    /// At the underlay; none where the other pod is on this node.
    pub wire: Option<Traffic>,
}

/// The connections of a node.
pub struct Forwarding {
    links: Links,
    devices: Arc<TunnelDevices>,
    joined: Arc<Mutex<Joined>>,
    watch: Arc<Mutex<Watch>>,
    changed: Arc<ChangedLinks>,
}

impl Forwarding {
    /// Adopts what an earlier agent of this domain left: its links that lead somewhere by the maps. The rest of the maps is cleaned, and the
    /// links of endpoints are removed whose client has none.
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
            changed: Arc::default(),
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
        let halves = forwarding.adopt(ends)?;
        forwarding.links.down_pod_links(&halves).await?;
        Ok(forwarding)
    }

    /// The connections that are joined, among them those that were adopted.
    #[must_use]
    pub fn connections(&self) -> Vec<LinkAlias> {
        self.joined().aliases().cloned().collect()
    }

    /// Makes a connection through a tunnel as wanted: its pod link, and the tunnel behind it. One that is there is changed in place; of a
    /// pair, the link with the alias stays, and the endpoint's goes.
    ///
    /// # Errors
    ///
    /// See [`ForwardError`]; [`ForwardError::Taken`] asks for another VNI. A connection that this call made is removed, and one that was
    /// there before keeps its tunnel.
    pub async fn up(&self, pod: &Netns, spec: &VxlanSpec) -> Result<PodLink, ForwardError> {
        let alias = &spec.link.alias;
        let tunnel = (spec.vni, spec.remote.to_canonical());
        let since = Instant::now();
        let _reserved = Reserved::take(&self.joined, tunnel, alias)?;
        let (devices, port) = (Arc::clone(&self.devices), spec.port);
        self.links
            .on_node_of(move |netlink| devices.ensure(netlink, port))
            .await?;
        let link = self.links.up_pod_link(pod, &spec.link).await?;
        if let Err(error) = self.join(&link, spec, since).await {
            if link.pod.created {
                self.disconnect(alias)?;
                self.links.down_pod_links(slice::from_ref(alias)).await?;
            }
            return Err(error);
        }
        self.remove_half(alias).await?;
        Ok(link)
    }

    /// Puts the program on a link, then joins the link and its tunnel in the maps. After an error the maps are as before. Nothing is done
    /// where nothing has changed.
    async fn join(
        &self,
        link: &PodLink,
        spec: &VxlanSpec,
        since: Instant,
    ) -> Result<(), ForwardError> {
        let alias = &spec.link.alias;
        let ends = ends_of(link);
        let written = Written::tunnel(&ends, spec);
        let is_same = |known: &Connection| known.written.as_ref() == Some(&written);
        if self.joined().get(alias).is_some_and(is_same) {
            return Ok(());
        }
        self.hook([link.node.index]).await?;
        let slot = self.bpf().connect(&ends, spec)?;
        let connection = Connection {
            link: Joint {
                node: link.node.index,
                slot,
            },
            to: To::Tunnel((spec.vni, spec.remote.to_canonical())),
            written: Some(written),
        };
        self.note(alias, connection, [link], since)
    }

    /// Puts the program on pod links.
    async fn hook<const N: usize>(&self, nodes: [u32; N]) -> Result<(), ForwardError> {
        let devices = Arc::clone(&self.devices);
        let hook = move |netlink: &mut Netlink| {
            let mut hooked = nodes
                .map(|node| devices.bpf().hook_pod_link(netlink, node))
                .into_iter();
            Ok(hooked.try_for_each(|outcome| outcome)?)
        };
        self.links.on_node_of(hook).await
    }

    /// Notes what the maps have of a connection now, and removes from them what it had before. `since`: when the call began that made it so.
    fn note<const N: usize>(
        &self,
        alias: &LinkAlias,
        connection: Connection,
        links: [&PodLink; N],
        since: Instant,
    ) -> Result<(), ForwardError> {
        let (now, tunnel) = (links.map(|link| link.node.index), connection.tunnel());
        let before = {
            let joined = &mut *self.joined();
            let ends = links.map(|link| link.node.clone());
            let before = joined.join(alias, connection, ends);
            for link in links {
                joined.note_pod(pod_end(link, since));
            }
            if N == 1 && before.as_ref().is_some_and(|it| it.second().is_some()) {
                joined.halve(alias);
            }
            before
        };
        let Some(before) = before else { return Ok(()) };
        for node in before.nodes().filter(|node| !now.contains(node)) {
            self.bpf().disconnect_link(node)?;
        }
        if let Some((vni, peer)) = before.tunnel().filter(|freed| Some(*freed) != tunnel) {
            self.bpf().disconnect_tunnel(vni, peer)?;
        }
        Ok(())
    }

    /// Removes a connection and its link with this alias; a success when there is none. The maps are empty of it then: what its pods send is
    /// dropped. The link itself goes a moment later. Of a pair, each link is removed by its own alias.
    ///
    /// # Errors
    ///
    /// The kernel refused. What could not be removed is tried again by the next call.
    pub async fn down(&self, alias: &LinkAlias) -> Result<(), ForwardError> {
        self.disconnect(alias)?;
        Ok(self.links.down_pod_link_soon(alias).await?)
    }

    fn disconnect(&self, alias: &LinkAlias) -> Result<(), ForwardError> {
        let connection = {
            let joined = &mut *self.joined();
            let connection = alias.of_connection();
            joined.was_halved(&connection);
            joined.leave(&connection)
        };
        match connection {
            Some(connection) => empty_maps(self.bpf(), &connection),
            None => Ok(()),
        }
    }

    /// Removes the endpoint's link of a connection that had two and has one now.
    async fn remove_half(&self, alias: &LinkAlias) -> Result<(), ForwardError> {
        let was_halved = self.joined().was_halved(alias);
        if let (true, Ok(second)) = (was_halved, alias.of_endpoint()) {
            self.links.down_pod_link_soon(&second).await?;
        }
        Ok(())
    }

    /// What the link with this alias has passed; None: it is not joined.
    #[must_use]
    pub fn passed(&self, alias: &LinkAlias) -> Option<Passed> {
        let (link, has_tunnel) = {
            let joined = self.joined();
            let connection = joined.get(&alias.of_connection())?;
            let second = connection.second();
            let link = if alias.is_of_endpoint() {
                second?
            } else {
                connection.link
            };
            (link, second.is_none())
        };
        let wire = if has_tunnel {
            Some(self.bpf().counters(link.slot).ok()?)
        } else {
            None
        };
        Some(Passed {
            link: self.bpf().link_counters(link.slot).ok()?,
            wire,
        })
    }

    /// Whether a connection is joined: the nodes' ends of its links were there at the last look.
    #[must_use]
    pub fn has(&self, alias: &LinkAlias) -> bool {
        self.joined().get(&alias.of_connection()).is_some()
    }

    /// Waits for the next connection one of whose pod links somebody may have changed or removed, by the alias of its first link:
    /// [`Self::lacks`] shows whether one lacks something. They are found by [`Self::look_after`]. One caller at a time.
    pub async fn next_changed(&self) -> LinkAlias {
        self.changed.next().await
    }

    /// What a pod link lacks in the pod; empty where it is as wanted.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered or read, or the name is another link's.
    pub async fn lacks(
        &self,
        pod: &Netns,
        spec: &LinkSpec,
    ) -> Result<Vec<LinkFault>, ForwardError> {
        let lacking = self.links.lacks(pod, spec).await?;
        // The maps have nothing of a connection whose links were gone for a moment.
        let is_lost = lacking.is_empty() && !self.has(&spec.alias);
        Ok(if is_lost {
            vec![LinkFault::gone()]
        } else {
            lacking
        })
    }

    /// Repairs devices and the nodes' ends of links that somebody changed, and programs that were taken off; notices pods' ends that may
    /// have changed, for [`Self::next_changed`]. What cannot be repaired is returned, a sentence each. To be called regularly; it takes
    /// microseconds where nothing has changed.
    ///
    /// # Errors
    ///
    /// The node's links cannot be read.
    pub async fn look_after(&self) -> Result<Vec<String>, ForwardError> {
        let (devices, joined, watch, changed) = (
            Arc::clone(&self.devices),
            Arc::clone(&self.joined),
            Arc::clone(&self.watch),
            Arc::clone(&self.changed),
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
                            match forget(&joined, devices.bpf(), link) {
                                Ok(lost) => changed.extend(lost),
                                Err(error) => faults.push(error),
                            }
                        }
                    }
                    Err(error) => faults.push(format!("the links of connections: {error}")),
                }
                let pods = lock(&joined).pods();
                match watch.suspects(&pods) {
                    Ok(suspects) => changed.extend(lock(&joined).of_nodes(suspects)),
                    Err(error) => faults.push(format!("the links in pods: {error}")),
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

/// The pod's end of a link, made by a call that began then.
fn pod_end(link: &PodLink, since: Instant) -> PodEnd {
    PodEnd {
        node: link.node.index,
        name: link.pod.name.clone(),
        mac: link.pod.mac,
        since,
        noted: Instant::now(),
    }
}

/// The ends of a pod link, as the programs need them.
fn ends_of(link: &PodLink) -> PodEnds {
    PodEnds {
        node: link.node.index,
        mac: link.pod.mac,
        same_namespace: link.node.peer.is_none_or(|peer| peer.netns.is_none()),
    }
}

/// Removes what the maps have of a connection: the pods' side first, so that nothing is sent whose answer would be dropped.
fn empty_maps(bpf: &Bpf, connection: &Connection) -> Result<(), ForwardError> {
    let unlinked = connection.nodes().map(|node| bpf.disconnect_link(node));
    // Each is tried.
    let unlinked: Vec<_> = unlinked.collect();
    let freed = match connection.tunnel() {
        Some((vni, peer)) => bpf.disconnect_tunnel(vni, peer).map(drop),
        None => Ok(()),
    };
    let outcome = unlinked
        .into_iter()
        .chain([freed])
        .collect::<Result<_, _>>();
    outcome.map_err(ForwardError::from)
}

/// Empties the maps of a connection whose link is gone, with its pod or by the pod's own doing: which connection that is.
fn forget(joined: &Mutex<Joined>, bpf: &Bpf, link: u32) -> Result<Option<LinkAlias>, String> {
    let Some((alias, connection)) = lock(joined).lose(link) else {
        return Ok(None);
    };
    tracing::info!(%alias, "a pod link is gone");
    empty_maps(bpf, &connection).map_err(|error| format!("the connection of {alias}: {error}"))?;
    Ok(Some(alias))
}
