//! What this node's public address is: asked for when the agent starts, each minute, and when an address of the node or the IP map
//! changes; shown in `status`, and made known to the control plane.

use std::{
    future,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::StreamExt as _;
use nsm_controlplane::plane::ControlPlane;
use nsm_core::address::public::{
    Decision, Finding, Firmware, Known, Outcome, Provider, Source, Tracker, is_globally_routable,
};
use nsm_dataplane::addresses::AddressEvents;
use nsm_discovery::public_address::{
    BaseUrl, HTTP_TIMEOUT, IN_CLUSTER_ACCOUNT, KubernetesNode, Lookup, LookupConfig,
};
use nsm_proto::admin;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{forwarder::NodeForwarder, ip_map::IpMaps, readiness::Readiness};
use crate::config::{self, Config, KubernetesApi, ListenUrl, MetadataServices};

/// What readiness waits for: whoever asks before gets an address that peers may not reach.
pub(crate) const GUARD: &str = "the public address";

/// The shortest time between two rounds. A CNI adds an address a pod, and hosts renew IPv6 addresses all the time: a burst of changes is
/// one round, and no change waits longer than a person would.
const PAUSE: Duration = Duration::from_secs(2);

/// Where Linux shows what the machine's firmware says.
const FIRMWARE: &str = "/sys/class/dmi/id";

/// What is known, for `status`. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct PublicAddress {
    known: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    local: Option<IpAddr>,
    decision: Decision,
    sources: Vec<(Source, Known)>,
}

/// All that the rounds need.
struct Watch {
    told: PublicAddress,
    configured: Option<IpAddr>,
    interval: Duration,
    tunnel_ip: Option<IpAddr>,
    forwarder: Option<Arc<NodeForwarder>>,
    maps: Arc<IpMaps>,
    plane: ControlPlane,
    readiness: Readiness,
    lookup: Arc<Lookup>,
    /// The proxy's listener, where other domains are told to dial the public address at its port.
    proxy: Option<SocketAddr>,
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
            told: self,
            configured: config.public_address.ip,
            interval: config.public_address.interval,
            tunnel_ip: config.tunnel.ip,
            forwarder,
            maps,
            plane,
            readiness,
            lookup: Arc::new(Lookup::new(lookup_config(config))),
            proxy: match (&config.advertise_url, &config.listen.proxy) {
                (None, ListenUrl::Tcp(address)) => Some(*address),
                _ => None,
            },
            tracker: Tracker::default(),
        };
        watch.run()
    }

    /// How many sources disagree with the one that holds.
    pub(crate) fn conflicts(&self) -> usize {
        self.state().decision.conflicts.len()
    }

    /// What is known now, as `status` shows it.
    pub(crate) fn facts(&self) -> admin::PublicAddress {
        let state = self.state();
        let text = |address: Option<IpAddr>| address.map_or_else(String::new, |ip| ip.to_string());
        let chosen = state.decision.chosen.as_ref();
        admin::PublicAddress {
            address: text(chosen.map(|finding| finding.address)),
            source: chosen.map_or_else(String::new, |finding| finding.source.to_string()),
            local: text(state.local),
            conflicts: state.decision.conflicts.iter().map(fact).collect(),
            sources: state
                .sources
                .iter()
                .map(|(source, known)| admin::AddressFinding {
                    source: source.to_string(),
                    address: text(known.address),
                    trouble: known.trouble.clone().unwrap_or_default(),
                })
                .collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fact(finding: &Finding) -> admin::AddressFinding {
    admin::AddressFinding {
        source: finding.source.to_string(),
        address: finding.address.to_string(),
        trouble: String::new(),
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

    /// Asks everybody, and takes over what follows: what is there after [`HTTP_TIMEOUT`], and each later answer when it comes, for nobody
    /// waits for a service that is slow. Conflicts are told once all have answered, so that an address that moves is none between those
    /// that were asked before and after.
    async fn round(&mut self, started: Instant) {
        let local = match (self.tunnel_ip, &self.forwarder) {
            (Some(ip), _) => Some(ip),
            (None, Some(forwarder)) => forwarder.tunnel_ip().await.ok(),
            (None, None) => None,
        };
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
            let decision = decision.before_the_rest(&self.told.state().decision);
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

    fn observe(&mut self, source: Source, outcome: Outcome) {
        if let Outcome::Failed(trouble) = &outcome {
            // Another cloud's metadata service never answers: no reason to worry anybody.
            tracing::debug!(%source, trouble, "no public address from this source");
        }
        self.tracker.observe(source, outcome, SystemTime::now());
    }

    fn conclude(&self, local: Option<IpAddr>, decision: Decision) {
        self.apply(local, decision);
        let sources = self.tracker.sources();
        self.told.state().sources = sources
            .map(|(source, known)| (source.clone(), known.clone()))
            .collect();
    }

    /// Makes a decision known: to the log when it is another than before, to the IP map, and to other domains.
    fn apply(&self, local: Option<IpAddr>, decision: Decision) {
        let before = {
            let mut state = self.told.state();
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
                "no source knows the public address any more: peers are told the tunnels' own"
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
                    "two sources say different public addresses: the first holds; mend the other, or set `public_address.ip`"
                );
            }
        }
        let own = local.zip(public).filter(|(local, public)| local != public);
        if let Err(error) = self.maps.set_own(own) {
            tracing::warn!(%error, "the public address cannot be taken into the IP map");
        }
        self.plane.set_public_url(
            self.proxy
                .zip(public)
                .filter(|(listen, _)| listen.ip().is_unspecified() || Some(listen.ip()) == local)
                .map(|(listen, public)| {
                    format!("tcp://{}", SocketAddr::new(public, listen.port()))
                }),
        );
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

/// What the kernel shows of the firmware; nothing where it has none to show, as on many ARM boards.
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
    }
}

/// The node as its cluster knows it; none outside of one.
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
    fn nobody_is_asked_unbidden_but_the_cloud_that_the_firmware_names() {
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
        // What the operator says holds as it is.
        let said = vec![(Provider::Gcp, url)];
        assert_eq!(asked(&MetadataServices::These(said.clone())), said);
        assert_eq!(asked(&MetadataServices::These(Vec::new())), []);
    }
}
