//! The links of connections: made, changed, removed and read, in the pods' network namespaces.
//!
//! [`Links`] holds the node's namespace; the pod's is an argument of each call. A pair is created from the node's side with each end in its
//! namespace at once: nothing is moved, which would take the kernel a hundred times longer than the creation.
//!
//! Failures: a call that created a link and then failed removes that link. A link that had to be made again under the same name is gone
//! then, too. A call that changed a link in place leaves what it had reached; the next call continues from there.
//!
//! Cancellation: a dropped future does not stop a call that has begun, but what the call creates is then removed. Calls for one alias
//! run one after the other. There is no timeout: a call waits for the calls before it and for the kernel.
//!
//! System calls block, so each call runs in one of a few threads that enter the namespaces (`pool`).

mod basics;
mod creation;
mod doomed;
mod error;
pub(crate) mod external;
mod holdings;
mod message;
mod node_watch;
mod observe;
mod place;
pub(crate) mod pod_link;
mod pod_watch;
mod pool;
mod port;
pub(crate) mod probe_link;
mod session;
mod turns;
mod underlay;

use std::{collections::HashMap, io, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use nix::errno::Errno;
use nsm_core::{
    link::{Link, LinkAlias, LinkFault, LinkSpec, NodeLink, Traffic, admission::Holding, faults},
    net::{IfName, MacAddr},
};
use tokio::sync::oneshot;

use self::turns::{Parcel, Turn, Turns, Undo};
use self::{doomed::Doomed, pool::Pool};
pub use self::{
    error::{LinkError, LinkHolder, PortHolder},
    node_watch::{Changed, Looked, Mended, NodeWatch},
};
pub(crate) use self::{
    pod_watch::{PodEnd, PodEndPlaces, PodWatch},
    probe_link::Family,
    underlay::{
        default_source as default_route_source, interface as outgoing_interface,
        source as source_address,
    },
};
use crate::{
    netlink::Netlink,
    netns::{Netns, NetnsError},
};

/// Threads that make or read links. The kernel does one at a time anyhow (its RTNL lock); more would only wait there.
const WORKERS: usize = 4;

/// Threads that remove links. Each waits some 20 ms in the kernel, without the lock, so many can wait at the same time. They are not
/// the threads that make links, which must not wait for them.
const REMOVERS: usize = 32;

/// Makes, changes, removes and reads links. A clone is the same.
#[derive(Debug, Clone)]
pub struct Links {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Netns,
    turns: Turns,
    workers: Pool,
    removers: Pool,
    doomed: Doomed,
}

/// A link in its wanted state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpLink {
    /// Its index in the pod's namespace.
    pub index: u32,
    /// Its name.
    pub name: IfName,
    /// Its Ethernet address; the kernel's choice when none was wanted.
    pub mac: MacAddr,
    /// Whether this call created it.
    pub created: bool,
    /// How many operations this call needed; 0 when nothing differed.
    pub operations: usize,
}

/// A pod link in its wanted state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLink {
    /// The pod's end.
    pub pod: UpLink,
    /// The node's end. For a client in the node's own namespace, its peer has no other namespace.
    pub node: NodeLink,
}

/// A link of ours as the kernel shows it, without what lies on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkReading {
    /// The link; addresses, routes and neighbours are left out.
    pub link: Link,
    /// Its traffic since it was created: frames with their Ethernet headers, as seen from the pod.
    pub traffic: Traffic,
    /// Received packets that the link dropped.
    pub rx_dropped: u64,
    /// Sent packets that the link dropped.
    pub tx_dropped: u64,
    /// Sent packets that failed, for want of a route on the underlay for one.
    pub tx_errors: u64,
}

impl Links {
    /// Links whose node is the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// /proc is not mounted.
    pub fn new() -> Result<Self, NetnsError> {
        Netns::current().map(Self::in_namespace)
    }

    /// Links whose node is this namespace.
    #[must_use]
    pub fn in_namespace(node: Netns) -> Self {
        Self {
            inner: Arc::new(Inner {
                workers: Pool::new("nsm-links", node.clone(), WORKERS),
                removers: Pool::new("nsm-links-down", node.clone(), REMOVERS),
                turns: Turns::default(),
                doomed: Doomed::default(),
                node,
            }),
        }
    }

    /// Makes a connection's pod link as wanted: creates the pair, or changes what differs on the one that is there, at either end. The
    /// node's end is up first, without address, ARP and IPv6 address generation, in [`nsm_core::link::NODE_GROUP`].
    ///
    /// # Errors
    ///
    /// See [`LinkError`]. Then nothing is left that this call created.
    pub async fn up_pod_link(&self, pod: &Netns, spec: &LinkSpec) -> Result<PodLink, LinkError> {
        let going = self.inner.doomed.aliases();
        let outcome = self.try_up_pod_link(pod, spec).await;
        match &outcome {
            // What is in the way may be of a closed connection.
            Err(LinkError::NameTaken { holder, .. }) => match &holder.alias {
                Some(holder) if self.inner.doomed.has(holder) => {
                    drop(self.inner.turns.take([holder]).await);
                }
                _ => return outcome,
            },
            Err(LinkError::RouteRefused { kernel, .. })
                if kernel.errno == Errno::EEXIST && !going.is_empty() =>
            {
                self.inner.doomed.are_gone(&going).await;
            }
            _ => return outcome,
        }
        self.try_up_pod_link(pod, spec).await
    }

    async fn try_up_pod_link(&self, pod: &Netns, spec: &LinkSpec) -> Result<PodLink, LinkError> {
        let turn = self.inner.turns.take([&spec.alias]).await;
        let (node, pod, spec) = (self.inner.node.clone(), pod.clone(), spec.clone());
        let undo = undo_pod_link(&node, &spec.alias);
        self.work(
            &self.inner.workers,
            turn,
            move || pod_link::up(&node, &pod, &spec),
            undo,
        )
        .await
    }

    /// Removes the pod links of these connections, in one step of the kernel, by their ends on the node: no pod is entered. How many
    /// there were.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn down_pod_links(&self, aliases: &[LinkAlias]) -> Result<usize, LinkError> {
        let turn = self.inner.turns.take(aliases).await;
        let (node, aliases) = (self.inner.node.clone(), aliases.to_vec());
        self.work(
            &self.inner.removers,
            turn,
            move || pod_link::down(&node, &aliases),
            nothing_to_undo(),
        )
        .await
    }

    /// Has a connection's pod link removed, without waiting for it: with others, as soon as the kernel has time. What the connection does
    /// next with its link comes after that; a link of its name in the pod, or with one of its routes, is made when this one is gone.
    ///
    /// # Errors
    ///
    /// There is no thread to do it. A refusal of the kernel is logged.
    pub async fn down_pod_link_soon(&self, alias: &LinkAlias) -> Result<(), LinkError> {
        let turn = self.inner.turns.take([alias]).await;
        let Inner { removers, node, .. } = &*self.inner;
        self.inner.doomed.add(alias, turn, removers, node)
    }

    /// Waits until every pod link is gone that is to be removed soon.
    pub async fn settled(&self) {
        self.inner.doomed.none_left().await;
    }

    /// The node's ends of all pod links of this domain's agents: what there is to adopt after a restart. Pods are not entered, and the
    /// links of a pod that is gone are gone.
    ///
    /// # Errors
    ///
    /// The node's links cannot be read.
    pub async fn pod_links(&self, domain: &str) -> Result<Vec<NodeLink>, LinkError> {
        let domain = domain.to_owned();
        self.on_node(move |netlink| pod_link::list(netlink, &domain))
            .await
    }

    /// Removes the pod's link with exactly this alias, and the other end with it. False: there was none.
    ///
    /// The links of a pod are gone with its namespace: opening the namespace then fails with [`NetnsError::is_gone`].
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered, or the kernel refused.
    pub async fn down(&self, pod: &Netns, alias: &LinkAlias) -> Result<bool, LinkError> {
        let turn = self.inner.turns.take([alias]).await;
        let (pod, alias) = (pod.clone(), alias.clone());
        self.work(
            &self.inner.removers,
            turn,
            move || session::down(&pod, &alias),
            nothing_to_undo(),
        )
        .await
    }

    /// The pod's link with this alias and what lies on it; None when there is none.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered or read.
    pub async fn observe(&self, pod: &Netns, alias: &LinkAlias) -> Result<Option<Link>, LinkError> {
        let (pod, alias) = (pod.clone(), alias.clone());
        self.read(move || session::observe(&pod, &alias)).await
    }

    /// What a connection's pod link lacks in the pod.
    ///
    /// # Errors
    ///
    /// A namespace cannot be entered or read, or the name is another link's.
    pub(crate) async fn lacks(
        &self,
        pod: &Netns,
        spec: &LinkSpec,
    ) -> Result<Vec<LinkFault>, LinkError> {
        let turn = self.inner.turns.take([&spec.alias]).await;
        let (node, pod, spec) = (self.inner.node.clone(), pod.clone(), spec.clone());
        let look = move || Ok(faults(&pod_link::lacks(&node, &pod, &spec)?));
        self.work(&self.inner.workers, turn, look, nothing_to_undo())
            .await
    }

    /// The addresses and routes of the pod's links, but for the link with this alias and those that are to be removed soon: what a new
    /// connection may not take from it.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered or read.
    pub async fn holdings(
        &self,
        pod: &Netns,
        alias: &LinkAlias,
    ) -> Result<Vec<Holding>, LinkError> {
        let (pod, alias) = (pod.clone(), alias.clone());
        // What a closed connection had is free again, also while its link is still there.
        let mut without = self.inner.doomed.aliases();
        without.insert(alias.clone());
        self.read(move || holdings::of_pod(&pod, &without)).await
    }

    /// The node's own addresses, each with the length of its network; those of loopback, of single links and of connections are left out.
    ///
    /// # Errors
    ///
    /// They cannot be read.
    pub async fn own_addresses(&self) -> Result<Vec<IpNet>, LinkError> {
        self.on_node(holdings::own_addresses).await
    }

    /// Whether a network namespace is that of process 1, whether or not this process may look at process 1.
    ///
    /// # Errors
    ///
    /// The kernel does not number the namespace of process 1.
    pub async fn is_of_process_1(&self, netns: &Netns) -> Result<bool, LinkError> {
        let netns = netns.clone();
        self.on_node(move |netlink| holdings::is_of_process_1(netlink, &netns))
            .await
    }

    /// Each of our links in the pod's namespace, with its traffic. All are read at once: a pod may have thousands, and finding one takes
    /// as long as reading all.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered or read.
    pub async fn readings(
        &self,
        pod: &Netns,
    ) -> Result<HashMap<LinkAlias, LinkReading>, LinkError> {
        let pod = pod.clone();
        self.read(move || session::readings(&pod)).await
    }

    /// Every connection's link of this domain's agents in all namespaces that can be found, each with where it is: after a restart, links
    /// without connection are to be removed.
    ///
    /// Namespaces that cannot be entered are left out, with a log line. The handles keep their namespaces alive: drop them soon.
    ///
    /// # Errors
    ///
    /// No thread could be started.
    pub async fn find_ours(&self, domain: &str) -> Result<Vec<(Netns, Link)>, LinkError> {
        let domain = domain.to_owned();
        self.read(move || Ok(session::find_ours(&domain))).await
    }

    /// The largest packet that goes to the peer without being fragmented, as far as is known on this node, bytes: the route's MTU, one
    /// learnt from the path, or that of the interface.
    ///
    /// # Errors
    ///
    /// No route leads there.
    pub async fn underlay_mtu(&self, remote: IpAddr) -> Result<u32, LinkError> {
        self.on_node(move |netlink| underlay::mtu(netlink, remote))
            .await
    }

    /// The address that this node uses towards the peer.
    ///
    /// # Errors
    ///
    /// No route leads there.
    pub async fn source_address(&self, remote: IpAddr) -> Result<IpAddr, LinkError> {
        self.on_node(move |netlink| underlay::source(netlink, remote))
            .await
    }

    /// The address that this node uses towards the rest of the world: that of the default route, IPv4 before IPv6.
    ///
    /// # Errors
    ///
    /// There is no default route.
    pub async fn default_source(&self) -> Result<IpAddr, LinkError> {
        self.on_node(underlay::default_source).await
    }

    /// As [`Self::on_node`], for a job with errors of its own.
    pub(crate) async fn on_node_of<T, E>(
        &self,
        job: impl FnOnce(&mut Netlink) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<LinkError> + Send + 'static,
    {
        self.on_node(move |netlink| Ok(job(netlink))).await?
    }

    async fn on_node<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Netlink) -> Result<T, LinkError> + Send + 'static,
    ) -> Result<T, LinkError> {
        let node = self.inner.node.clone();
        self.read(move || job(&mut basics::open_in(&node)?)).await
    }

    async fn read<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, LinkError> + Send + 'static,
    ) -> Result<T, LinkError> {
        let turn = self.inner.turns.take([]).await;
        self.work(&self.inner.workers, turn, job, nothing_to_undo())
            .await
    }

    /// Runs a job in a thread of the pool. When the caller is gone, the result is undone.
    async fn work<T: Send + 'static>(
        &self,
        pool: &Pool,
        turn: Turn,
        job: impl FnOnce() -> Result<T, LinkError> + Send + 'static,
        undo: Undo<T>,
    ) -> Result<T, LinkError> {
        let (sender, receiver) = oneshot::channel();
        let run = move || {
            let result = job().map(|result| Parcel::new(result, undo, turn));
            // A caller that gave up drops the parcel, wherever it is.
            let _ = sender.send(result);
        };
        pool.run(Box::new(run)).map_err(LinkError::Thread)?;
        match receiver.await {
            Ok(result) => result.map(Parcel::open),
            Err(_) => Err(LinkError::Thread(io::Error::other(
                "the worker thread ended during the call: see the log for the cause",
            ))),
        }
    }
}

/// Removes a pod link that a call created.
fn undo_pod_link(node: &Netns, alias: &LinkAlias) -> Undo<PodLink> {
    let (node, alias) = (node.clone(), alias.clone());
    Box::new(move |link| {
        if link.pod.created {
            log_undo(&alias, pod_link::down(&node, std::slice::from_ref(&alias)));
        }
    })
}

fn log_undo(alias: &LinkAlias, outcome: Result<usize, LinkError>) {
    match outcome {
        Ok(_) => {
            tracing::debug!(link.alias = %alias, "removed the link of a request that was given up")
        }
        Err(error) => {
            tracing::error!(%error, link.alias = %alias, "the link of a request that was given up stays")
        }
    }
}

fn nothing_to_undo<T: 'static>() -> Undo<T> {
    Box::new(drop)
}
