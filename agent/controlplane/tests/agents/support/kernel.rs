//! A kernel that is none: it keeps what the forwarder port promises of one, and counts.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use ipnet::IpNet;
use nsm_controlplane::{
    ports::{Forwarder, ForwarderError, Mended, Plan, PodNetns, Prober, Underlay},
    transport::unix::Passed,
};
use nsm_core::{
    identity::UserNamespace,
    link::{
        LinkAlias, LinkSpec,
        admission::{Holding, HoldingKind},
    },
    mechanism::TunnelKey,
    net::NetnsUrl,
};

use tokio::sync::Notify;

use super::prober::FakeProber;

/// The refusal of a VNI that another tunnel has.
pub(crate) fn taken(vni: u32) -> ForwarderError {
    ForwarderError::KeyTaken(TunnelKey::Vni(vni.try_into().expect("a VNI")))
}

/// The port of tunnels in these tests.
pub(crate) const PORT: u16 = 4789;

/// The links of one connection: what the kernel's tables have of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Standing {
    /// VNI and port, once on a node.
    pub(crate) tunnel: Option<(u32, u16)>,
    /// Namespace and interface name, once in a namespace.
    pub(crate) names: BTreeSet<(String, String)>,
    /// As it was asked for last.
    pub(crate) plan: Plan,
}

#[derive(Debug, Default)]
struct Table {
    /// By alias.
    standing: BTreeMap<String, Standing>,
    /// VNIs that something else on the node has.
    foreign: HashSet<u32>,
    /// VNIs that were refused because they are foreign.
    refused: Vec<u32>,
    faults: VecDeque<ForwarderError>,
    blind: bool,
    /// What pods have beside connections.
    holdings: Vec<Holding>,
    /// Namespaces whose descriptor was asked for.
    opened: Vec<NetnsUrl>,
    ups: usize,
    downs: usize,
    /// What the links lack.
    lacking: Option<String>,
    /// What the next looks at links end with.
    refusals: VecDeque<ForwarderError>,
    /// Links that somebody may have changed.
    changed: VecDeque<LinkAlias>,
    repairs: usize,
}

/// The dataplane of one node.
#[derive(Debug)]
pub(crate) struct FakeKernel {
    ip: IpAddr,
    mtu: u32,
    table: Mutex<Table>,
    /// Held while nothing may be deleted.
    deleting: tokio::sync::Mutex<()>,
    /// Held while nothing may be made.
    making: tokio::sync::Mutex<()>,
    /// Times that links were asked for.
    asked: AtomicUsize,
    changes: Notify,
    prober: Option<FakeProber>,
    /// Whether the prober has started.
    is_probing: AtomicBool,
}

impl FakeKernel {
    pub(crate) fn new(ip: IpAddr, mtu: u32, probes: bool) -> Self {
        Self {
            ip,
            mtu,
            table: Mutex::default(),
            deleting: tokio::sync::Mutex::default(),
            making: tokio::sync::Mutex::default(),
            asked: AtomicUsize::new(0),
            changes: Notify::new(),
            prober: probes.then(|| FakeProber::of(ip)),
            is_probing: AtomicBool::new(true),
        }
    }

    /// Probes nothing until [`Self::start_probing`].
    pub(crate) fn probing_late(self) -> Self {
        self.is_probing.store(false, Ordering::SeqCst);
        self
    }

    /// Starts the prober.
    pub(crate) fn start_probing(&self) {
        self.is_probing.store(true, Ordering::SeqCst);
    }

    /// What watches its paths.
    pub(crate) fn paths(&self) -> &FakeProber {
        self.prober.as_ref().expect("it probes")
    }

    /// Which connections watch which paths.
    pub(crate) fn watched(&self) -> BTreeMap<IpAddr, BTreeSet<String>> {
        let prober = self.prober.as_ref();
        prober.map(FakeProber::watched).unwrap_or_default()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder panics")
    }

    /// The links that stand, by their alias.
    pub(crate) fn links(&self) -> BTreeMap<String, Standing> {
        self.table().standing.clone()
    }

    /// The one connection that has links here.
    pub(crate) fn only(&self) -> Standing {
        let links = self.links();
        assert_eq!(links.len(), 1, "{links:#?}");
        links.into_values().next().expect("one")
    }

    /// Successful changes up and down so far.
    pub(crate) fn changes(&self) -> (usize, usize) {
        let table = self.table();
        (table.ups, table.downs)
    }

    /// Gives a VNI to something else on the node.
    pub(crate) fn occupy(&self, vni: u32) {
        self.table().foreign.insert(vni);
    }

    /// Loses all links, as a node that was started again.
    pub(crate) fn forget(&self) {
        self.table().standing.clear();
    }

    /// VNIs asked for that something else had.
    pub(crate) fn refused_vnis(&self) -> Vec<u32> {
        self.table().refused.clone()
    }

    /// Somebody changes the links, so that they lack this; nothing: makes them right.
    pub(crate) fn change_links(&self, lacking: Option<&str>) {
        let aliases: Vec<_> = {
            let mut table = self.table();
            table.lacking = lacking.map(str::to_owned);
            let links = table.standing.values().flat_map(|it| it.plan.links());
            links.map(|(_, link)| link.alias.of_connection()).collect()
        };
        self.table().changed.extend(aliases);
        self.changes.notify_one();
    }

    /// As [`Self::change_links`], and the next look at a link ends so.
    pub(crate) fn refuse_links(&self, refusal: ForwarderError) {
        self.table().refusals.push_back(refusal);
        self.change_links(Some("it is gone"));
    }

    /// How often links were repaired.
    pub(crate) fn repairs(&self) -> usize {
        self.table().repairs
    }

    /// Lets the next `up` fail.
    pub(crate) fn fail_next_up(&self, error: ForwarderError) {
        self.table().faults.push_back(error);
    }

    /// Deletes no link until what it returns is dropped.
    pub(crate) async fn keep_links(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.deleting.lock().await
    }

    /// Makes no link until what it returns is dropped.
    pub(crate) async fn make_no_links(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.making.lock().await
    }

    /// How often links were asked for so far.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Gives every pod something beside its connections.
    pub(crate) fn give(&self, holding: Holding) {
        self.table().holdings.push(holding);
    }

    /// Namespaces of which a descriptor was asked for, to be given to a peer.
    pub(crate) fn opened(&self) -> Vec<NetnsUrl> {
        self.table().opened.clone()
    }

    /// Lets every question for the underlay fail.
    pub(crate) fn lose_underlay(&self) {
        self.table().blind = true;
    }
}

#[tonic::async_trait]
impl Forwarder for FakeKernel {
    async fn underlay(&self, _: Option<IpAddr>) -> Result<Underlay, ForwarderError> {
        if self.table().blind {
            return Err(ForwarderError::Kernel("no route to the peer".to_owned()));
        }
        Ok(Underlay {
            ip: self.ip,
            port: PORT,
            mtu: self.mtu,
        })
    }

    async fn holdings(
        &self,
        pod: &PodNetns,
        alias: &LinkAlias,
    ) -> Result<Vec<Holding>, ForwarderError> {
        let table = self.table();
        let connections = table
            .standing
            .values()
            .flat_map(|standing| standing.plan.links());
        let others = connections.filter(|(netns, link)| *netns == pod && link.alias != *alias);
        let of_link = |(_, link): (_, &LinkSpec)| {
            let held = |prefix, kind| Holding {
                prefix,
                kind,
                link: link.name.to_string(),
                is_connection: true,
            };
            let addresses = link.addresses.iter();
            let routes = link.routes.iter();
            addresses
                .map(|net| held(net.addr().into(), HoldingKind::Address))
                .chain(routes.map(|route| held(route.prefix, HoldingKind::Route)))
                .collect::<Vec<_>>()
        };
        let mut holdings: Vec<Holding> = others.flat_map(of_link).collect();
        holdings.extend(table.holdings.iter().cloned());
        Ok(holdings)
    }

    async fn own_addresses(&self) -> Result<Arc<[IpNet]>, ForwarderError> {
        Ok(Arc::new([IpNet::from(self.ip)]))
    }

    async fn up(&self, plan: &Plan) -> Result<(), ForwarderError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _making = self.making.lock().await;
        let mut table = self.table();
        if let Some(fault) = table.faults.pop_front() {
            return Err(fault);
        }
        let (alias, wanted) = standing(plan);
        for (_, link) in plan.links() {
            if !(68..=65_535).contains(&link.mtu) {
                return Err(ForwarderError::Kernel(format!("mtu {} invalid", link.mtu)));
            }
        }
        if let Some((vni, _)) = wanted.tunnel
            && table.foreign.contains(&vni)
        {
            table.refused.push(vni);
            return Err(taken(vni));
        }
        for (other, theirs) in &table.standing {
            if *other == alias {
                // What the first link leads to is changed in place.
                if theirs.first() != wanted.first() {
                    return Err(ForwarderError::Kernel(format!(
                        "File exists: {alias} has other links: {theirs:?}"
                    )));
                }
                continue;
            }
            if let Some((vni, _)) = wanted.tunnel
                && wanted.tunnel == theirs.tunnel
            {
                return Err(taken(vni));
            }
            if let Some((netns, name)) = wanted.names.intersection(&theirs.names).next() {
                return Err(ForwarderError::Invalid(format!(
                    "interface `{name}` exists in {netns}"
                )));
            }
        }
        table.standing.insert(alias, wanted);
        table.ups += 1;
        Ok(())
    }

    async fn down(&self, plan: &Plan) -> Result<(), ForwarderError> {
        let _deleting = self.deleting.lock().await;
        let mut table = self.table();
        let (alias, gone) = standing(plan);
        if table
            .standing
            .get(&alias)
            .is_some_and(|it| it.names == gone.names)
        {
            table.standing.remove(&alias);
        }
        table.downs += 1;
        Ok(())
    }

    async fn next_changed_link(&self) -> LinkAlias {
        loop {
            let next = self.table().changed.pop_front();
            match next {
                Some(alias) => return alias,
                None => self.changes.notified().await,
            }
        }
    }

    async fn mend(&self, _: &Plan, repairs: bool) -> Result<Mended, ForwarderError> {
        let mut table = self.table();
        if let Some(refusal) = table.refusals.pop_front() {
            return Err(refusal);
        }
        match table.lacking.clone() {
            None => Ok(Mended::AsWanted),
            Some(what) if repairs => {
                table.lacking = None;
                table.repairs += 1;
                Ok(Mended::Repaired(what))
            }
            Some(what) => Ok(Mended::Lacking(what)),
        }
    }

    fn owners(&self, _: &Passed) -> Vec<UserNamespace> {
        Vec::new()
    }

    async fn is_of_process_1(&self, _: &PodNetns) -> Option<bool> {
        Some(false)
    }

    async fn netns(&self, url: &NetnsUrl) -> Option<Passed> {
        self.table().opened.push(url.clone());
        None
    }

    fn prober(&self) -> Option<&dyn Prober> {
        let started = self.prober.as_ref();
        let started = started.filter(|_| self.is_probing.load(Ordering::SeqCst));
        started.map(|prober| prober as &dyn Prober)
    }
}

impl Standing {
    /// Namespace and name of the first link.
    fn first(&self) -> Option<(String, String)> {
        places(&self.plan).next()
    }
}

/// Namespace and name of each link.
fn places(plan: &Plan) -> impl Iterator<Item = (String, String)> {
    let place = |(netns, link): (&PodNetns, &LinkSpec)| (netns.to_string(), link.name.to_string());
    plan.links().map(place)
}

fn standing(plan: &Plan) -> (String, Standing) {
    let (_, first) = plan.links().next().expect("a plan has a link");
    let alias = first.alias.to_string();
    let tunnel = match plan {
        Plan::Vxlan { spec, .. } => Some((spec.vni.get(), spec.port)),
        Plan::Pair { .. } => None,
    };
    (
        alias,
        Standing {
            tunnel,
            names: places(plan).collect(),
            plan: plan.clone(),
        },
    )
}
