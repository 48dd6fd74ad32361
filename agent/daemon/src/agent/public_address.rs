//! This node's addresses, the one of its tunnels and the public one: found when the agent starts, each minute, and when an address or
//! default route of the node or the IP map changes; shown in `status`, and set in the control plane.

use std::{
    future,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::StreamExt as _;
use nsm_controlplane::plane::ControlPlane;
use nsm_core::address::public::{
    Decision, Firmware, Known, Outcome, Provider, Source, Tracker, is_globally_routable,
};
use nsm_dataplane::{
    addresses::{self, AddressEvents},
    links::LinkError,
};
use nsm_discovery::public_address::{
    BaseUrl, HTTP_TIMEOUT, IN_CLUSTER_ACCOUNT, KubernetesNode, Lookup, LookupConfig,
};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    advertised::Advertised, forwarder::NodeForwarder, ip_map::IpMaps, readiness::Readiness,
};
use crate::config::{self, Config, KubernetesApi, MetadataServices};

/// What readiness waits for: before, peers might get an address that they cannot reach.
pub(crate) const GUARD: &str = "the public address";

/// What is degraded where nothing says at which address others can dial this node. Requests to others work all the same.
const NO_ADDRESS: &str = "this node has no address at which others could dial it: give it a default route, or set `tunnel.ip` or `advertise_url`";

/// The shortest time between two rounds. A CNI adds an address a pod, and hosts renew IPv6 addresses all the time: a burst of changes is
/// one round, and no change waits longer than a person would.
const PAUSE: Duration = Duration::from_secs(2);

/// Where Linux shows the firmware's fields.
const FIRMWARE: &str = "/sys/class/dmi/id";

/// What is known, for `status`. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct PublicAddress {
    known: Arc<Mutex<Findings>>,
}

/// The answers of all sources, and the decision.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings {
    /// The address that tunnels leave from.
    pub(crate) local: Option<IpAddr>,
    pub(crate) decision: Decision,
    /// Every source that is asked, the most trusted first.
    pub(crate) sources: Vec<(Source, Known)>,
}

/// All that the rounds need.
struct Watch {
    known: PublicAddress,
    configured: Option<IpAddr>,
    interval: Duration,
    tunnel_ip: Option<IpAddr>,
    forwarder: Option<Arc<NodeForwarder>>,
    maps: Arc<IpMaps>,
    plane: ControlPlane,
    readiness: Readiness,
    lookup: Arc<Lookup>,
    advertised: Advertised,
    tracker: Tracker,
}

impl PublicAddress {
    /// Asks for ever.
    pub(crate) fn watch(
        self,
        config: &Config,
        forwarder: Option<Arc<NodeForwarder>>,
        maps: Arc<IpMaps>,
        plane: ControlPlane,
        readiness: Readiness,
    ) -> impl Future<Output = ()> + Send + use<> {
        let watch = Watch {
            known: self,
            configured: config.public_address.ip,
            interval: config.public_address.interval,
            tunnel_ip: config.tunnel.ip,
            forwarder,
            maps,
            plane,
            readiness,
            lookup: Arc::new(Lookup::new(lookup_config(config))),
            advertised: Advertised::of(config),
            tracker: Tracker::default(),
        };
        watch.run()
    }

    /// What is known now.
    pub(crate) fn findings(&self) -> Findings {
        self.state().clone()
    }

    fn state(&self) -> MutexGuard<'_, Findings> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    async fn run(mut self) {
        let mut events = AddressEvents::open()
            .inspect_err(|error| {
                tracing::warn!(%error, interval = ?self.interval, "changes of this node's addresses are noticed late");
            })
            .ok();
        loop {
            let started = Instant::now();
            self.round(started).await;
            let next = started + self.interval;
            tokio::select! {
                () = sleep_until(next) => {}
                () = changed(&mut events) => sleep_until((started + PAUSE).min(next)).await,
                () = self.maps.file_changed() => {}
            }
        }
    }

    /// Asks every source and applies what follows: after [`HTTP_TIMEOUT`] the answers so far, then each later answer when it comes, because
    /// a slow service must not hold the agent up. Conflicts are reported once all sources have answered: an address that moves is no
    /// conflict between sources that were asked before and after.
    async fn round(&mut self, started: Instant) {
        let local = self.local().await;
        let internal = self.advertised.internal(local);
        let degraded = internal.is_none().then(|| NO_ADDRESS.to_owned());
        self.readiness
            .replace_degradations(&[NO_ADDRESS.to_owned()], degraded.into_iter().collect());
        self.plane.set_internal_url(internal);
        let now = SystemTime::now();
        if let Some(ip) = self.configured {
            self.tracker
                .observe(Source::Configuration, Outcome::Address(ip), now);
        }
        if let Some(local) = local {
            let or_none = |ip: Option<IpAddr>| ip.map_or(Outcome::None, Outcome::Address);
            let mapped = or_none(self.maps.of_file(local));
            self.tracker.observe(Source::IpMap, mapped, now);
            let own = or_none(Some(local).filter(|ip| is_globally_routable(*ip)));
            self.tracker.observe(Source::Route, own, now);
        }
        let lookup = Arc::clone(&self.lookup);
        let mut asked = lookup.ask(local);
        let patience = started + HTTP_TIMEOUT;
        while let Ok(Some((source, outcome))) = timeout_at(patience, asked.next()).await {
            self.observe(source, outcome);
        }
        loop {
            let decision = self.tracker.decide(local);
            let decision = decision.before_the_rest(&self.known.state().decision);
            self.conclude(local, decision);
            self.plane.set_public_address_known(true);
            self.readiness.arrived(GUARD);
            let Some((source, outcome)) = asked.next().await else {
                break;
            };
            self.observe(source, outcome);
        }
        self.conclude(local, self.tracker.decide(local));
    }

    /// The address that tunnels leave from, and that our own domain dials. Where the kernel cannot be asked it is the one that was known.
    async fn local(&self) -> Option<IpAddr> {
        let found = match (self.tunnel_ip, &self.forwarder) {
            (Some(ip), _) => return Some(ip),
            (None, Some(forwarder)) => forwarder.default_source().await,
            (None, None) => addresses::default_source(),
        };
        match found {
            Ok(ip) => Some(ip),
            Err(LinkError::NoDefaultRoute) => None,
            Err(error) => {
                tracing::warn!(%error, "the address of this node cannot be looked up: the one that was known holds");
                self.known.state().local
            }
        }
    }

    fn observe(&mut self, source: Source, outcome: Outcome) {
        if let Outcome::Failed(trouble) = &outcome {
            // Another cloud's metadata service never answers: that is no fault.
            tracing::debug!(%source, trouble, "no public address from this source");
        }
        self.tracker.observe(source, outcome, SystemTime::now());
    }

    fn conclude(&self, local: Option<IpAddr>, decision: Decision) {
        self.apply(local, decision);
        let sources = self.tracker.sources();
        self.known.state().sources = sources
            .map(|(source, known)| (source.clone(), known.clone()))
            .collect();
    }

    /// Makes a decision known: to the log when it is another than before, to the IP map, and to other domains.
    fn apply(&self, local: Option<IpAddr>, decision: Decision) {
        let before = {
            let mut state = self.known.state();
            let is_same = state.local == local && state.decision == decision;
            state.local = local;
            let before = std::mem::replace(&mut state.decision, decision.clone());
            (!is_same).then_some(before)
        };
        let Some(before) = before else { return };
        let public = decision.chosen.as_ref().map(|finding| finding.address);
        match (&before.chosen, &decision.chosen) {
            (old, Some(new)) if old.as_ref().map(|old| old.address) != public => {
                let old = old.as_ref().map(tracing::field::display);
                tracing::info!(address = %new.address, source = %new.source, before = old, "the public address");
            }
            (Some(old), None) => tracing::warn!(
                before = %old,
                "no source has the public address any more: peers get the tunnels' own"
            ),
            _ => {}
        }
        if let Some(chosen) = &decision.chosen {
            for finding in decision
                .conflicts
                .iter()
                .filter(|finding| !before.conflicts.contains(finding))
            {
                tracing::warn!(
                    address = %chosen.address, source = %chosen.source,
                    other.address = %finding.address, other.source = %finding.source,
                    "two sources have different public addresses: the first holds; mend the other, or set `public_address.ip`"
                );
            }
        }
        let own = local.zip(public).filter(|(local, public)| local != public);
        if let Err(error) = self.maps.set_own(own) {
            tracing::warn!(%error, "the public address cannot be taken into the IP map");
        }
        self.plane
            .set_public_url(self.advertised.public(local, public));
    }
}

async fn changed(events: &mut Option<AddressEvents>) {
    if let Some(listening) = events {
        match listening.changed().await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(%error, "changes of this node's addresses are noticed late");
                *events = None;
            }
        }
    }
    future::pending().await
}

fn lookup_config(config: &Config) -> LookupConfig {
    LookupConfig {
        metadata: metadata(&config.public_address.metadata, Path::new(FIRMWARE)),
        kubernetes: kubernetes(&config.public_address, &config.name),
        stun: config.public_address.stun.clone(),
    }
}

/// The services to ask: by default that of the cloud which the firmware, shown in `folder`, names.
fn metadata(services: &MetadataServices, folder: &Path) -> Vec<(Provider, BaseUrl)> {
    let provider = match services {
        MetadataServices::These(services) => return services.clone(),
        MetadataServices::Auto => firmware(folder).cloud(),
    };
    let with_place = |provider: Provider| Some((provider, provider.base_url().parse().ok()?));
    provider.and_then(with_place).into_iter().collect()
}

/// The firmware's fields as the kernel shows them; empty where it shows none, as on many ARM boards.
fn firmware(folder: &Path) -> Firmware {
    let field = |name| {
        let text = std::fs::read(folder.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&text).trim().to_owned()
    };
    Firmware {
        system_vendor: field("sys_vendor"),
        product: field("product_name"),
        board_vendor: field("board_vendor"),
        asset_tag: field("chassis_asset_tag"),
        bios_version: field("bios_version"),
        product_uuid: field("product_uuid"),
        product_serial: field("product_serial"),
    }
}

/// The node's entry in its cluster; none outside of one.
fn kubernetes(config: &config::PublicAddress, agent: &str) -> Option<KubernetesNode> {
    let api: BaseUrl = match &config.kubernetes {
        KubernetesApi::Off => return None,
        KubernetesApi::At(api) => api.clone(),
        KubernetesApi::Auto => {
            let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
            let host = variable("KUBERNETES_SERVICE_HOST")?;
            let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host
            };
            format!("https://{host}:{port}").parse().ok()?
        }
    };
    let account = Path::new(IN_CLUSTER_ACCOUNT);
    if config.kubernetes == KubernetesApi::Auto && !account.exists() {
        return None;
    }
    Some(KubernetesNode {
        api,
        name: config.node_name.clone().unwrap_or_else(|| agent.to_owned()),
        account: account.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cloud_that_the_firmware_names_is_asked_by_default() {
        let folder = tempfile::tempdir().unwrap();
        let asked = |services: &MetadataServices| metadata(services, folder.path());
        assert_eq!(asked(&MetadataServices::Auto), []);
        std::fs::write(folder.path().join("sys_vendor"), "Amazon EC2\n").unwrap();
        std::fs::write(folder.path().join("product_name"), "m5.large\n").unwrap();
        let url: BaseUrl = "http://169.254.169.254".parse().unwrap();
        assert_eq!(
            asked(&MetadataServices::Auto),
            [(Provider::Aws, url.clone())]
        );
        // The operator's list is taken as it is.
        let said = vec![(Provider::Gcp, url)];
        assert_eq!(asked(&MetadataServices::These(said.clone())), said);
        assert_eq!(asked(&MetadataServices::These(Vec::new())), []);
    }
}
