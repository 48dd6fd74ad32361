//! The control plane's forwarder port on this node's kernel: links by rtnetlink, tunnels known to
//! the BPF programs before their first packet.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use nsm_controlplane::{
    plane::ControlPlane,
    ports::{Forwarder, ForwarderError, Plan, PodNetns, Prober, Underlay},
    transport::unix::Passed,
};
use nsm_core::{
    link::{LinkAlias, VxlanSpec},
    net::{NetnsUrl, Vni},
    nsm::name::Domain,
};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig, BpfError, Hook, Slot},
    links::{LinkError, LinkStatistics, Links},
    liveness::{Preflights, Report},
    netns::{Netns, NetnsError},
};
use nsm_proto::admin;

use super::{admin::no_bpf, namespaces::Namespaces, prober::NodeProber, probing::Probing};
use crate::config::{self, Config};

/// The underlay's MTU towards a peer whose address nobody knows yet, bytes. What the peer answers
/// and the route to it lower the connection's MTU before a link is made.
const USUAL_MTU: u32 = 1500;

/// Namespaces that are asked at one time for what their links have counted: each takes a thread of those that Requests need.
const AT_ONCE: usize = 4;

/// The dataplane of this node.
pub(crate) struct NodeForwarder {
    links: Links,
    namespaces: Namespaces,
    /// Gone once the agent has let the programs go.
    bpf: Mutex<Option<Arc<Bpf>>>,
    /// What proves paths, where that is possible and wanted.
    pub(super) probing: Probing,
    tunnel: config::Tunnel,
    pin_path: String,
    degraded: Vec<String>,
    /// Where the programs count each of our VNIs.
    slots: Mutex<HashMap<Vni, Slot>>,
}

impl NodeForwarder {
    /// Opens netlink and loads the BPF programs; without the rights for BPF it goes on without.
    ///
    /// # Errors
    /// Netlink cannot be opened.
    pub(crate) async fn start(config: &Config) -> anyhow::Result<Self> {
        let links = Links::new()?;
        let mut degraded = Vec::new();
        let bpf = if config.bpf.enabled {
            match load_bpf(config).await {
                Ok(bpf) => {
                    if bpf.hook() == Hook::Clsact && config.bpf.hook == config::Hook::Auto {
                        degraded.push(
                            "this kernel has no tcx (Linux 6.6): the BPF programs are hooked by clsact"
                                .to_owned(),
                        );
                    }
                    Some(Arc::new(bpf))
                }
                Err(error) => {
                    degraded.push(format!(
                        "no BPF: {error}; tunnels work, sources are not checked, and counters are those of the links"
                    ));
                    None
                }
            }
        } else {
            degraded.push(
                "BPF is switched off (`bpf.enabled`): counters are those of the links".to_owned(),
            );
            None
        };
        let probing = Probing::start(config, bpf.clone()).await;
        degraded.extend(probing.degraded());
        Ok(Self {
            links,
            namespaces: Namespaces::default(),
            bpf: Mutex::new(bpf),
            probing,
            tunnel: config.tunnel.clone(),
            pin_path: config.bpf.pin_dir.display().to_string(),
            degraded,
            slots: Mutex::default(),
        })
    }

    /// What works less well than it could.
    pub(crate) fn degraded(&self) -> &[String] {
        &self.degraded
    }

    /// The address our tunnels leave from.
    pub(crate) async fn tunnel_ip(&self) -> Result<IpAddr, ForwarderError> {
        match self.tunnel.ip {
            Some(ip) => Ok(ip),
            None => self.links.default_source().await.map_err(refusal),
        }
    }

    /// Facts for `status`.
    pub(crate) fn bpf_facts(&self) -> admin::Bpf {
        self.with_bpf(|bpf| admin::Bpf {
            hook: bpf.hook().to_string(),
            object_sha256: Bpf::object_sha256().to_owned(),
            pin_path: self.pin_path.clone(),
            interfaces: bpf.interfaces(),
        })
        .unwrap_or_else(no_bpf)
    }

    /// Packets by reason, for `status`.
    pub(crate) fn drops(&self) -> BTreeMap<String, u64> {
        self.with_bpf(|bpf| bpf.drops().ok())
            .flatten()
            .unwrap_or_default()
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect()
    }

    /// What BPF has counted of a tunnel on the cards; none where it does not.
    pub(crate) fn underlay_counters(&self, spec: &VxlanSpec) -> Option<admin::Counters> {
        let slot = self.slots().get(&spec.vni).copied()?;
        let counted = self.with_bpf(|bpf| bpf.counters(slot).ok())??;
        Some(admin::Counters {
            tx_packets: counted.tx_packets,
            tx_bytes: counted.tx_bytes,
            rx_packets: counted.rx_packets,
            rx_bytes: counted.rx_bytes,
        })
    }

    /// What the links of tunnels have counted. Each namespace is entered once, however many links it has: that takes a fraction of a
    /// millisecond, and an agent may have thousands of pods.
    pub(crate) async fn link_counters(
        &self,
        plans: impl Iterator<Item = &Plan>,
    ) -> HashMap<LinkAlias, admin::Counters> {
        let mut places = HashMap::new();
        for plan in plans {
            if let Plan::Vxlan { netns, spec } = plan {
                places
                    .entry(&netns.url)
                    .or_insert_with(|| (netns.clone(), spec.link.alias.clone()));
            }
        }
        let places: Vec<_> = places.into_values().collect();
        let counted: Vec<_> = stream::iter(places)
            .map(|(pod, alias)| async move {
                let netns = self.namespaces.open(&pod, &alias).await.ok()?;
                self.links.statistics(&netns).await.ok()
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let told = |(alias, counted): (LinkAlias, LinkStatistics)| {
            let counters = admin::Counters {
                tx_packets: counted.tx_packets,
                tx_bytes: counted.tx_bytes,
                rx_packets: counted.rx_packets,
                rx_bytes: counted.rx_bytes,
            };
            (alias, counters)
        };
        counted.into_iter().flatten().flatten().map(told).collect()
    }

    /// What every session has measured.
    pub(crate) async fn path_reports(&self) -> Vec<Report> {
        match self.probing.prober() {
            Some(prober) => prober.reports().await,
            None => Vec::new(),
        }
    }

    /// How the proofs of paths went; none where nothing is probed.
    pub(crate) fn preflights(&self) -> Option<Preflights> {
        self.probing.prober().map(NodeProber::preflights)
    }

    /// What works less well than it could for some peers, at the moment.
    pub(crate) fn degraded_paths(&self) -> Vec<String> {
        let prober = self.probing.prober().into_iter();
        prober.flat_map(NodeProber::uncounted).collect()
    }

    /// Lets peers know that this node goes.
    pub(crate) async fn leave_paths(&self) {
        if let Some(prober) = self.probing.prober() {
            prober.leave_all().await;
        }
    }

    /// Ends the sessions and lets the programs go, with everything that is pinned.
    pub(crate) async fn close(&self) {
        self.probing.close().await;
        let bpf = self
            .bpf
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(bpf) = bpf
            && let Err(error) = bpf.detach_and_unpin()
        {
            tracing::warn!(%error, "the BPF programs stay behind");
        }
    }

    /// The programs must know a tunnel before its first packet. Without a free slot the tunnel
    /// works all the same, uncounted.
    fn count(&self, spec: &VxlanSpec) {
        let added = self.with_bpf(|bpf| {
            // The peer chooses its port; ours is known from the start.
            if spec.port != self.tunnel.port {
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

    fn uncount(&self, spec: &VxlanSpec) {
        self.slots().remove(&spec.vni);
        let removed = self.with_bpf(|bpf| bpf.remove_tunnel(spec.vni, spec.remote));
        if let Some(Err(error)) = removed {
            tracing::warn!(tunnel.vni = spec.vni.get(), %error, "the tunnel's slot is not freed");
        }
    }

    /// The programs, while the agent has them.
    pub(super) fn bpf(&self) -> Option<Arc<Bpf>> {
        let bpf = self.bpf.lock().unwrap_or_else(PoisonError::into_inner);
        bpf.clone()
    }

    fn with_bpf<T>(&self, use_it: impl FnOnce(&Bpf) -> T) -> Option<T> {
        let bpf = self.bpf.lock().unwrap_or_else(PoisonError::into_inner);
        bpf.as_deref().map(use_it)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Vni, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(&self, pod: &PodNetns, alias: &LinkAlias) -> Result<Netns, ForwarderError> {
        let opened = self.namespaces.open(pod, alias).await;
        opened.map_err(|error| namespace(&error))
    }

    async fn down_in(&self, pod: &PodNetns, alias: &LinkAlias) -> Result<(), ForwarderError> {
        match self.namespaces.open(pod, alias).await {
            // The kernel has taken the link along with its namespace.
            Err(error) if error.is_gone() => Ok(()),
            Err(error) => Err(namespace(&error)),
            Ok(netns) => {
                self.links.down(&netns, alias).await.map_err(refusal)?;
                self.namespaces.unlinked(pod, alias);
                Ok(())
            }
        }
    }
}

#[tonic::async_trait]
impl Forwarder for NodeForwarder {
    async fn underlay(&self, remote: Option<IpAddr>) -> Result<Underlay, ForwarderError> {
        let ip = match (self.tunnel.ip, remote) {
            (Some(ip), _) => ip,
            (None, Some(remote)) => self.links.source_address(remote).await.map_err(refusal)?,
            (None, None) => self.links.default_source().await.map_err(refusal)?,
        };
        let mtu = match (self.tunnel.mtu, remote) {
            (0, Some(remote)) => self.links.underlay_mtu(remote).await.map_err(refusal)?,
            (0, None) => USUAL_MTU,
            (mtu, _) => mtu,
        };
        Ok(Underlay {
            ip,
            port: self.tunnel.port,
            mtu,
        })
    }

    async fn up(&self, plan: &Plan) -> Result<(), ForwarderError> {
        match plan {
            Plan::Vxlan { netns: pod, spec } => {
                let alias = &spec.link.alias;
                let netns = self.open(pod, alias).await?;
                let was_known = self.slots().contains_key(&spec.vni);
                self.count(spec);
                let up = self.links.up_vxlan(&netns, spec);
                let (outcome, in_sight) = tokio::join!(up, self.namespaces.is_in_sight(pod));
                if outcome.is_err() && !was_known {
                    self.uncount(spec);
                }
                outcome.map_err(refusal)?;
                if !in_sight {
                    self.namespaces.keep(pod, alias, netns);
                }
                Ok(())
            }
            Plan::Veth { client, endpoint } => {
                let client_netns = self.open(&client.0, &client.1.alias).await?;
                let endpoint_netns = self.open(&endpoint.0, &endpoint.1.alias).await?;
                let up = self
                    .links
                    .up_veth((&client_netns, &client.1), (&endpoint_netns, &endpoint.1));
                let (outcome, client_in_sight, endpoint_in_sight) = tokio::join!(
                    up,
                    self.namespaces.is_in_sight(&client.0),
                    self.namespaces.is_in_sight(&endpoint.0),
                );
                outcome.map_err(refusal)?;
                for ((pod, link), netns, in_sight) in [
                    (client, client_netns, client_in_sight),
                    (endpoint, endpoint_netns, endpoint_in_sight),
                ] {
                    if !in_sight {
                        self.namespaces.keep(pod, &link.alias, netns);
                    }
                }
                Ok(())
            }
        }
    }

    async fn down(&self, plan: &Plan) -> Result<(), ForwarderError> {
        match plan {
            Plan::Vxlan { netns, spec } => {
                let outcome = self.down_in(netns, &spec.link.alias).await;
                self.uncount(spec);
                outcome
            }
            Plan::Veth { client, endpoint } => {
                // Either end takes the other along; both are tried, for either namespace may be gone.
                let first = self.down_in(&client.0, &client.1.alias).await;
                let second = self.down_in(&endpoint.0, &endpoint.1.alias).await;
                first.and(second)
            }
        }
    }

    async fn netns(&self, url: &NetnsUrl) -> Option<Passed> {
        let netns = self.namespaces.find(url).await.ok()?;
        Some(Passed::new(netns.as_fd().try_clone_to_owned().ok()?))
    }

    fn prober(&self) -> Option<&dyn Prober> {
        self.probing.prober().map(|prober| prober as &dyn Prober)
    }
}

/// Deletes what an earlier life of this agent left: links and tunnels that no connection has taken
/// over within `grace`, the longest time that a client may take until it refreshes.
pub(crate) async fn collect_orphans(
    forwarder: Arc<NodeForwarder>,
    plane: ControlPlane,
    domain: Domain,
    grace: Duration,
) {
    let found = match forwarder.links.find_ours(domain.as_str()).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "cannot look for links of an earlier agent");
            Vec::new()
        }
    };
    let left_tunnels = forwarder.with_bpf(Bpf::tunnels).unwrap_or_default();
    if found.is_empty() && left_tunnels.is_empty() {
        return;
    }
    tracing::info!(
        links = found.len(), tunnels = left_tunnels.len(), grace = ?grace,
        "an earlier agent left links: those that nobody refreshes are deleted"
    );
    tokio::time::sleep(grace).await;
    for (netns, link) in found {
        // Looked at anew for each: a deletion takes up to 20 ms, and clients come back meanwhile.
        let orphan = link
            .alias
            .filter(|alias| !plane.holds(alias.connection_id()));
        let Some(alias) = orphan else { continue };
        match forwarder.links.down(&netns, &alias).await {
            Ok(_) => tracing::info!(link = %link.name, %alias, "deleted an orphan"),
            Err(error) => tracing::warn!(link = %link.name, %error, "an orphan stays"),
        }
    }
    for tunnel in left_tunnels {
        let Ok(vni) = Vni::try_from(tunnel.vni) else {
            continue;
        };
        if !forwarder.slots().contains_key(&vni) {
            let _ = forwarder.with_bpf(|bpf| bpf.remove_tunnel(vni, tunnel.peer));
        }
    }
}

/// Loads and attaches: 8 to 16 ms an interface and direction, so on a thread of its own.
async fn load_bpf(config: &Config) -> Result<Bpf, BpfError> {
    let bpf_config = BpfConfig {
        pin_dir: config.bpf.pin_dir.clone(),
        interfaces: config
            .bpf
            .interfaces
            .iter()
            .map(ToString::to_string)
            .collect(),
        tunnel_addresses: config.tunnel.ip.into_iter().collect(),
        ports: vec![config.tunnel.port],
        hook: match config.bpf.hook {
            config::Hook::Auto => None,
            config::Hook::Tcx => Some(Hook::Tcx),
            config::Hook::Clsact => Some(Hook::Clsact),
        },
        ..BpfConfig::default()
    };
    tokio::task::spawn_blocking(move || Bpf::load(&bpf_config))
        .await
        .expect("loading BPF programs does not panic")
}

fn namespace(error: &NetnsError) -> ForwarderError {
    match error {
        NetnsError::OpenDenied { .. } | NetnsError::EnterDenied { .. } => {
            ForwarderError::NotPermitted(error.to_string())
        }
        NetnsError::Failed { .. } => ForwarderError::Kernel(error.to_string()),
        _ => ForwarderError::Invalid(error.to_string()),
    }
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
fn refusal(error: LinkError) -> ForwarderError {
    match &error {
        LinkError::VniTaken { vni, .. } => ForwarderError::VniTaken(*vni),
        LinkError::Namespace(cause) => namespace(cause),
        LinkError::NotPermitted { .. } => ForwarderError::NotPermitted(error.to_string()),
        LinkError::NameTaken { .. }
        | LinkError::AddressRefused { .. }
        | LinkError::RouteRefused { .. }
        | LinkError::NeighbourRefused { .. }
        | LinkError::SameAlias { .. } => ForwarderError::Invalid(error.to_string()),
        _ => ForwarderError::Kernel(error.to_string()),
    }
}
