//! The control plane's forwarder port on this node's kernel: links by rtnetlink, tunnels by BPF.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use ipnet::IpNet;
use nix::errno::Errno;
use nsm_controlplane::{
    ports::{Forwarder, ForwarderError, Mended, Plan, PlannedLink, PodNetns, Prober, Underlay},
    transport::unix::{Passed, sees_process_1},
};
use nsm_core::{
    identity::UserNamespace,
    link::{LinkAlias, LinkSpec, admission::Holding},
    mechanism::TunnelKey,
    net::NetnsUrl,
};
use nsm_dataplane::{
    forward::{ForwardError, Forwarding, Passed as PassedTraffic, TunnelDevices},
    links::{LinkError, LinkReading, Links},
    liveness::{Preflights, Report},
    netns::{Netns, NetnsError},
};
use tokio::sync::Mutex;

use super::{
    namespaces::Namespaces,
    prober::NodeProber,
    probing::Probing,
    programs::{Facts, Programs},
    readiness::Readiness,
    underlays::Underlays,
};
use crate::config::{self, Config};

/// The underlay's MTU towards a peer whose address is not known yet, bytes. The peer's answer
/// and the route to it lower the connection's MTU before a link is made.
const USUAL_MTU: u32 = 1500;

/// Namespaces whose links' counters are read at one time: each takes a thread of those that Requests need.
const AT_ONCE: usize = 4;

/// How long the node's own addresses are taken as they were read: connections come by the thousand, addresses by the day.
const OWN_ADDRESSES_LIFE: Duration = Duration::from_secs(1);

/// The pods' links as the kernel shows them.
pub(crate) type LinkReadings = HashMap<LinkAlias, LinkReading>;

/// The dataplane of this node.
pub(crate) struct NodeForwarder {
    links: Links,
    namespaces: Namespaces,
    programs: Arc<Programs>,
    forwarding: Arc<Forwarding>,
    /// What proves paths, where that is possible and wanted.
    probing: Arc<Probing>,
    tunnel: config::Tunnel,
    underlays: Underlays,
    /// The node's addresses, and when they were read.
    own_addresses: Mutex<Option<(Instant, Arc<[IpNet]>)>>,
}

impl NodeForwarder {
    /// Opens netlink, loads the BPF programs, adopts what an earlier agent left, and starts probing. None where this agent makes no links,
    /// because it is not to or because there is no BPF, which is a degradation; so is what cannot be had of probes.
    ///
    /// # Errors
    /// Netlink cannot be opened, or what an earlier agent left cannot be read.
    pub(crate) async fn build(
        config: &Config,
        readiness: &Readiness,
    ) -> anyhow::Result<Option<Arc<Self>>> {
        if !config.forwarder {
            return Ok(None);
        }
        let links = Links::new()?;
        let programs = match Programs::load(config).await {
            Ok(programs) => Arc::new(programs),
            Err(reason) => {
                tracing::warn!(reason, "degraded");
                readiness.degraded(reason);
                return Ok(None);
            }
        };
        let domain = config.domain.to_string();
        let bpf = Arc::clone(programs.bpf());
        let devices = Arc::new(TunnelDevices::new(bpf, domain.as_str()));
        let forwarding = Forwarding::start(links.clone(), Arc::clone(&devices), &domain).await?;
        let probing = Arc::new(Probing::start(config, devices).await);
        let faults = programs.hook_faults().iter().cloned();
        let faults = faults.chain(probing.degraded());
        for reason in faults.chain(unknown_node(&links).await) {
            tracing::warn!(reason, "degraded");
            readiness.degraded(reason);
        }
        Ok(Some(Arc::new(Self {
            links,
            namespaces: Namespaces::default(),
            programs,
            forwarding: Arc::new(forwarding),
            probing,
            tunnel: config.tunnel.clone(),
            underlays: Underlays::default(),
            own_addresses: Mutex::default(),
        })))
    }

    /// The links of this node.
    pub(super) fn links(&self) -> &Links {
        &self.links
    }

    /// The BPF programs.
    pub(crate) fn programs(&self) -> &Arc<Programs> {
        &self.programs
    }

    /// The connections of this node.
    pub(crate) fn forwarding(&self) -> &Arc<Forwarding> {
        &self.forwarding
    }

    /// What proves paths.
    pub(crate) fn probing(&self) -> &Arc<Probing> {
        &self.probing
    }

    /// The address our tunnels leave from where none is configured.
    pub(crate) async fn default_source(&self) -> Result<IpAddr, LinkError> {
        self.links.default_source().await
    }

    /// What is attached, and where.
    pub(crate) fn program_facts(&self) -> Facts {
        self.programs.facts()
    }

    /// Packets that were dropped or passed uncounted, by reason.
    pub(crate) fn drops(&self) -> BTreeMap<&'static str, u64> {
        let mut drops = self.programs.drops();
        if let Some(fenced) = self.forwarding.fenced() {
            drops.insert("fence_in", fenced.incoming);
            drops.insert("fence_out", fenced.outgoing);
            drops.insert("fence_foreign_sender", fenced.foreign);
            drops.insert("fence_astray", fenced.astray);
            drops.insert("fence_forwarded", fenced.forwarded);
        }
        drops
    }

    /// What passed the link with this alias; none where it leads nowhere.
    pub(crate) fn passed(&self, alias: &LinkAlias) -> Option<PassedTraffic> {
        self.forwarding.passed(alias)
    }

    /// The pods' links as the kernel shows them. Each namespace is entered once, however many links it has: that takes a fraction of
    /// a millisecond, and an agent may have thousands of pods.
    pub(crate) async fn link_readings(&self, plans: impl Iterator<Item = &Plan>) -> LinkReadings {
        let mut places = HashMap::new();
        for (netns, link) in plans.flat_map(Plan::links) {
            places
                .entry(&netns.url)
                .or_insert_with(|| (netns.clone(), link.alias.clone()));
        }
        let places: Vec<_> = places.into_values().collect();
        let read: Vec<_> = stream::iter(places)
            .map(|(pod, alias)| async move {
                let netns = self.namespaces.open(&pod, &alias).await.ok()?;
                self.links.readings(&netns).await.ok()
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        read.into_iter().flatten().flatten().collect()
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

    /// Signals to peers that this node goes.
    pub(crate) async fn leave_paths(&self) {
        if let Some(prober) = self.probing.prober() {
            prober.leave_all().await;
        }
    }

    /// Ends the sessions and releases the programs, with everything that is pinned. What is left of an earlier agent's connections, which
    /// no client has taken over, goes too.
    pub(crate) async fn close(&self) {
        self.probing.close().await;
        for alias in self.forwarding.connections() {
            if let Err(error) = self.forwarding.down(&alias).await {
                tracing::warn!(%alias, %error, "a link of an earlier agent stays behind");
            }
        }
        if let Err(error) = self.forwarding.close().await {
            tracing::warn!(%error, "an external device stays behind");
        }
        self.programs.release();
    }

    async fn open(&self, pod: &PodNetns, alias: &LinkAlias) -> Result<Netns, ForwarderError> {
        let opened = self.namespaces.open(pod, alias).await;
        opened.map_err(|error| namespace(&error))
    }

    /// What a pod's link lacks: a clause, where it lacks something.
    async fn lacks(
        &self,
        pod: &PodNetns,
        link: &LinkSpec,
    ) -> Result<Option<String>, ForwarderError> {
        let netns = match self.namespaces.open(pod, &link.alias).await {
            Ok(netns) => netns,
            // The link went with it. One that is there keeps the namespace, whatever has become of the way to it.
            Err(error) if error.is_no_namespace() && !self.forwarding.has(&link.alias) => {
                return Err(ForwarderError::Gone(error.to_string()));
            }
            Err(error) => return Err(namespace(&error)),
        };
        let lacking = self.forwarding.lacks(&netns, link).await;
        let lacking = lacking.map_err(not_forwarded)?;
        let clauses: Vec<String> = lacking.iter().map(ToString::to_string).collect();
        let what = || format!("link `{}`: {}", link.name, clauses.join(", "));
        Ok((!clauses.is_empty()).then(what))
    }

    /// Makes the links of two pods of this node.
    async fn up_pair(
        &self,
        client: &PlannedLink,
        endpoint: &PlannedLink,
    ) -> Result<(), ForwarderError> {
        let (client_netns, endpoint_netns) = tokio::try_join!(
            self.open(&client.netns, &client.spec.link.alias),
            self.open(&endpoint.netns, &endpoint.spec.link.alias),
        )?;
        let up = self.forwarding.up_pair(
            (&client_netns, &client.spec),
            (&endpoint_netns, &endpoint.spec),
        );
        let (outcome, client_in_sight, endpoint_in_sight) = tokio::join!(
            up,
            self.namespaces.is_in_sight(&client.netns),
            self.namespaces.is_in_sight(&endpoint.netns),
        );
        outcome.map_err(not_forwarded)?;
        for (link, netns, in_sight) in [
            (client, client_netns, client_in_sight),
            (endpoint, endpoint_netns, endpoint_in_sight),
        ] {
            self.namespaces
                .linked(&link.netns, &link.spec.link.alias, netns, in_sight);
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Forwarder for NodeForwarder {
    async fn underlay(&self, remote: Option<IpAddr>) -> Result<Underlay, ForwarderError> {
        if let Some(underlay) = self.underlays.get(remote, Instant::now()) {
            return Ok(underlay);
        }
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
        let port = self.tunnel.port;
        let underlay = Underlay { ip, port, mtu };
        self.underlays.keep(remote, underlay, Instant::now());
        Ok(underlay)
    }

    async fn holdings(
        &self,
        pod: &PodNetns,
        alias: &LinkAlias,
    ) -> Result<Vec<Holding>, ForwarderError> {
        let netns = self.open(pod, alias).await?;
        self.links.holdings(&netns, alias).await.map_err(refusal)
    }

    async fn own_addresses(&self) -> Result<Arc<[IpNet]>, ForwarderError> {
        let mut known = self.own_addresses.lock().await;
        match &*known {
            Some((read, addresses)) if read.elapsed() < OWN_ADDRESSES_LIFE => {
                Ok(Arc::clone(addresses))
            }
            _ => {
                let addresses: Arc<[IpNet]> =
                    self.links.own_addresses().await.map_err(refusal)?.into();
                *known = Some((Instant::now(), Arc::clone(&addresses)));
                Ok(addresses)
            }
        }
    }

    async fn up(&self, plan: &Plan) -> Result<(), ForwarderError> {
        match plan {
            Plan::Vxlan { netns: pod, spec } => {
                let alias = &spec.link.alias;
                let netns = self.open(pod, alias).await?;
                let up = self.forwarding.up(&netns, spec);
                let (outcome, in_sight) = tokio::join!(up, self.namespaces.is_in_sight(pod));
                outcome.map_err(not_forwarded)?;
                self.namespaces.linked(pod, alias, netns, in_sight);
                // The endpoint's link of a connection that was a pair before is gone.
                if let Ok(second) = alias.of_endpoint() {
                    self.namespaces.unlinked(&second);
                }
                Ok(())
            }
            Plan::Pair { client, endpoint } => self.up_pair(client, endpoint).await,
        }
    }

    async fn down(&self, plan: &Plan) -> Result<(), ForwarderError> {
        // Each is tried.
        let mut outcome = Ok(());
        for (_, link) in plan.links() {
            let down = self.forwarding.down(&link.alias).await;
            outcome = outcome.and(down.map_err(not_forwarded));
            self.namespaces.unlinked(&link.alias);
        }
        outcome
    }

    async fn next_changed_link(&self) -> LinkAlias {
        self.forwarding.next_changed().await
    }

    async fn mend(&self, plan: &Plan, repairs: bool) -> Result<Mended, ForwarderError> {
        let mut lacking = Vec::new();
        for (pod, link) in plan.links() {
            lacking.extend(self.lacks(pod, link).await?);
        }
        if lacking.is_empty() {
            return Ok(Mended::AsWanted);
        }
        let what = lacking.join("; ");
        if !repairs {
            return Ok(Mended::Lacking(what));
        }
        self.up(plan).await?;
        Ok(Mended::Repaired(what))
    }

    async fn is_of_process_1(&self, netns: &PodNetns) -> Option<bool> {
        let opened = match &netns.descriptor {
            Some(descriptor) => Netns::from_fd(descriptor.as_fd()),
            None => self.namespaces.find(&netns.url).await,
        };
        let opened = match opened {
            // Nothing is there, which is refused where the link is to be made.
            Err(error) if error.is_gone() => return Some(false),
            opened => opened.ok()?,
        };
        let asked = self.links.is_of_process_1(&opened).await;
        let known = asked.inspect_err(|error| {
            tracing::warn!(%error, "a namespace that may be the node's own is refused");
        });
        known.ok()
    }

    async fn netns(&self, url: &NetnsUrl) -> Option<Passed> {
        let netns = self.namespaces.find(url).await.ok()?;
        Some(Passed::new(netns.as_fd().try_clone_to_owned().ok()?))
    }

    fn owners(&self, netns: &Passed) -> Vec<UserNamespace> {
        let owners = Netns::from_fd(netns.as_fd()).and_then(|netns| netns.owners());
        owners.unwrap_or_else(|error| {
            tracing::debug!(%error, "a passed namespace has no owner that this agent can see");
            Vec::new()
        })
    }

    fn prober(&self) -> Option<&dyn Prober> {
        self.probing.prober().map(|prober| prober as &dyn Prober)
    }
}

/// Why no pod of this node gets a link, where the agent cannot tell the node's own network namespace from a pod's.
async fn unknown_node(links: &Links) -> Option<String> {
    if sees_process_1() {
        return None;
    }
    let own = Netns::current().map_err(LinkError::from);
    let known = match own {
        Ok(own) => links.is_of_process_1(&own).await,
        Err(error) => Err(error),
    };
    let error = known.err()?;
    Some(format!(
        "no pods: the node's own network namespace is not known, so that none is taken for a pod's. /proc/1/ns cannot be read, and {error}: \
         run the agent as root with CAP_SYS_PTRACE"
    ))
}

fn namespace(error: &NetnsError) -> ForwarderError {
    match error {
        NetnsError::OpenDenied { .. } | NetnsError::EnterDenied { .. } => {
            ForwarderError::NotPermitted(error.to_string())
        }
        NetnsError::Failed {
            errno: Errno::EMFILE | Errno::ENFILE,
            ..
        } => ForwarderError::Exhausted(error.to_string()),
        NetnsError::Failed { .. } => ForwarderError::Kernel(error.to_string()),
        _ => ForwarderError::Invalid(error.to_string()),
    }
}

fn not_forwarded(error: ForwardError) -> ForwarderError {
    match error {
        ForwardError::Taken { vni, .. } => ForwarderError::KeyTaken(TunnelKey::Vni(vni)),
        ForwardError::Link(error) => refusal(error),
        ForwardError::Namespace(error) => namespace(&error),
        ForwardError::Netlink(error) => ForwarderError::Kernel(error.to_string()),
        ForwardError::Fence(error) => ForwarderError::Kernel(error.to_string()),
        ForwardError::Bpf(error) => ForwarderError::Kernel(error.to_string()),
    }
}

fn refusal(error: LinkError) -> ForwarderError {
    match &error {
        LinkError::Namespace(cause) => namespace(cause),
        LinkError::NotPermitted { .. } => ForwarderError::NotPermitted(error.to_string()),
        LinkError::NameTaken { .. }
        | LinkError::AddressRefused { .. }
        | LinkError::RouteRefused { .. }
        | LinkError::NeighbourRefused { .. } => ForwarderError::Invalid(error.to_string()),
        _ => ForwarderError::Kernel(error.to_string()),
    }
}
