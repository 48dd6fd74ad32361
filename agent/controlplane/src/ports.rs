//! What the control plane asks of the node's dataplane: a port, implemented where the daemon is
//! wired, so that this crate knows no netlink and no BPF.
//!
//! A [`Plan`] is the whole of what one connection needs on this node. `up` is all or nothing and
//! idempotent; `down` of a plan that is not up is a success.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use nsm_core::{
    identity::UserNamespace,
    link::{LinkAlias, LinkSpec, PodLinkSpec, VxlanSpec, admission::Holding},
    liveness::{Health, PathEvent, PathId, PeerReport, Reflector},
    mechanism::TunnelKey,
    net::NetnsUrl,
};
use tonic::Code;

use crate::transport::unix::Passed;

/// The node's end of a tunnel towards one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Underlay {
    /// The address our VXLAN packets leave from, as the node's links know it.
    pub ip: IpAddr,
    /// The UDP port of tunnels on this node.
    pub port: u16,
    /// The MTU of the link towards the peer, in bytes.
    pub mtu: u32,
}

/// A pod's network namespace. Two are equal when their owners call them the same.
#[derive(Debug, Clone)]
pub struct PodNetns {
    /// Where it is, as its owner writes it.
    pub url: NetnsUrl,
    /// Its descriptor, where the owner passed one. Works where the agent cannot find the namespace
    /// by its URL, and keeps the namespace alive as long as it is held.
    pub descriptor: Option<Passed>,
}

impl PartialEq for PodNetns {
    fn eq(&self, other: &Self) -> bool {
        self.url == other.url
    }
}

impl From<NetnsUrl> for PodNetns {
    fn from(url: NetnsUrl) -> Self {
        Self {
            url,
            descriptor: None,
        }
    }
}

impl fmt::Display for PodNetns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}

/// The links of one connection on this node.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    /// A link of the client or of the endpoint, and the tunnel of the node behind it.
    Vxlan {
        /// The pod's namespace.
        netns: PodNetns,
        /// The link and the tunnel.
        spec: VxlanSpec,
    },
    /// Client and endpoint are both on this node: a link of each, which lead to each other.
    Pair {
        /// The client's.
        client: PlannedLink,
        /// The endpoint's. Its alias is that of the client's for the endpoint ([`LinkAlias::of_endpoint`]).
        endpoint: PlannedLink,
    },
}

/// One of two links of a connection on this node.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedLink {
    /// The pod's namespace.
    pub netns: PodNetns,
    /// The link, and what the pod may send.
    pub spec: PodLinkSpec,
}

impl Plan {
    /// The links of the plan, each with the pod's namespace: that of the client first, where both pods are on this node.
    pub fn links(&self) -> impl Iterator<Item = (&PodNetns, &LinkSpec)> {
        let (first, second) = match self {
            Self::Vxlan { netns, spec } => ((netns, &spec.link), None),
            Self::Pair { client, endpoint } => (client.link(), Some(endpoint.link())),
        };
        [first].into_iter().chain(second)
    }

    /// Whether the first link of this plan becomes that of `wanted` by changes, and is not made anew. It does so whatever it leads to:
    /// another tunnel, another pod of this node.
    pub(crate) fn keeps_its_link(&self, wanted: &Self) -> bool {
        let place = |plan: &Self| {
            let mut links = plan.links();
            links
                .next()
                .map(|(netns, link)| (netns.url.clone(), link.name.clone()))
        };
        place(self) == place(wanted)
    }

    /// The tunnel of the plan; none of a pair of pods.
    pub fn tunnel(&self) -> Option<PlannedTunnel<'_>> {
        match self {
            Self::Vxlan { netns, spec } => Some(PlannedTunnel {
                netns,
                link: &spec.link,
                key: TunnelKey::Vni(spec.vni),
                local: spec.local,
                remote: spec.remote,
                port: spec.port,
            }),
            Self::Pair { .. } => None,
        }
    }

    /// The link of its tunnel, to change it.
    pub(crate) fn tunnel_link_mut(&mut self) -> Option<&mut LinkSpec> {
        match self {
            Self::Vxlan { spec, .. } => Some(&mut spec.link),
            Self::Pair { .. } => None,
        }
    }

    /// The plan as it is kept: a descriptor would keep the namespace of a pod that is gone.
    pub(crate) fn without_descriptors(mut self) -> Self {
        match &mut self {
            Self::Vxlan { netns, .. } => netns.descriptor = None,
            Self::Pair { client, endpoint } => {
                client.netns.descriptor = None;
                endpoint.netns.descriptor = None;
            }
        }
        self
    }
}

impl PlannedLink {
    const fn link(&self) -> (&PodNetns, &LinkSpec) {
        (&self.netns, &self.spec.link)
    }
}

/// One end of a tunnel, whatever its mechanism.
#[derive(Debug, Clone, Copy)]
pub struct PlannedTunnel<'a> {
    /// The pod's namespace.
    pub netns: &'a PodNetns,
    /// The link in it.
    pub link: &'a LinkSpec,
    /// What distinguishes it from the node's other tunnels.
    pub key: TunnelKey,
    /// Our address on the underlay.
    pub local: IpAddr,
    /// The peer's address on the underlay.
    pub remote: IpAddr,
    /// The UDP port of both sides.
    pub port: u16,
}

/// Why the dataplane refused.
#[derive(Debug, thiserror::Error)]
pub enum ForwarderError {
    /// Another tunnel of this node has the key: ask for another key.
    #[error("{0} is in use on this node")]
    KeyTaken(TunnelKey),
    /// The request names something that is not there or not allowed.
    #[error("{0}")]
    Invalid(String),
    /// The agent lacks a capability.
    #[error("{0}")]
    NotPermitted(String),
    /// The agent has no descriptors left, or the machine.
    #[error("{0}: raise the agent's limit of open files (ulimit -n), or close unused connections")]
    Exhausted(String),
    /// The pod is gone, and its link with it.
    #[error("{0}")]
    Gone(String),
    /// The kernel refused; its message is in the text.
    #[error("{0}")]
    Kernel(String),
}

/// What a look at the pods' links of a plan found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mended {
    /// Nothing is missing.
    AsWanted,
    /// They are as wanted again. What was missing: a clause about the link.
    Repaired(String),
    /// This is missing, and was not to be repaired.
    Lacking(String),
}

impl ForwarderError {
    /// The gRPC code the error travels as.
    pub fn code(&self) -> Code {
        match self {
            Self::KeyTaken(_) | Self::Exhausted(_) => Code::ResourceExhausted,
            Self::Invalid(_) | Self::Gone(_) => Code::InvalidArgument,
            Self::NotPermitted(_) | Self::Kernel(_) => Code::FailedPrecondition,
        }
    }
}

/// The dataplane of this node.
///
/// Calls are awaited to their end: a future is dropped only when the agent ends, so an implementation need not undo what a dropped call
/// has begun. None has a timeout of its own: the kernel answers in milliseconds. Calls for one connection come one after the other, those
/// for different connections at the same time.
#[tonic::async_trait]
pub trait Forwarder: Send + Sync + 'static {
    /// Our end of a tunnel towards `remote`, or towards anywhere when it is not known yet.
    ///
    /// # Errors
    /// No route leads there, or the node's links cannot be read.
    async fn underlay(&self, remote: Option<IpAddr>) -> Result<Underlay, ForwarderError>;

    /// The addresses and routes that a pod has on links which are not of the connection `alias`.
    ///
    /// # Errors
    /// The namespace cannot be opened or read.
    async fn holdings(
        &self,
        pod: &PodNetns,
        alias: &LinkAlias,
    ) -> Result<Vec<Holding>, ForwarderError>;

    /// The node's own addresses, each with the length of its network.
    ///
    /// # Errors
    /// They cannot be read.
    async fn own_addresses(&self) -> Result<Arc<[IpNet]>, ForwarderError>;

    /// Makes the plan real. What stands of the connection is changed: links that the plan does not have go, and a link whose alias, namespace and
    /// name it has stays. Later calls may name the same namespaces without their descriptors.
    ///
    /// # Errors
    /// [`ForwarderError::KeyTaken`] where another tunnel has the key. After any error nothing stands that this call made; what stood before may be
    /// changed in part, and another call with its plan restores it.
    async fn up(&self, plan: &Plan) -> Result<(), ForwarderError>;

    /// Takes the plan's links away; a success when they are not there.
    ///
    /// # Errors
    /// The kernel keeps a link. It is removed when an agent starts again.
    async fn down(&self, plan: &Plan) -> Result<(), ForwarderError>;

    /// A descriptor of the namespace, where it can be found.
    async fn netns(&self, url: &NetnsUrl) -> Option<Passed>;

    /// The user namespaces that a passed network namespace belongs to: its owner, that one's parent, and so on as far as the agent sees.
    /// Answers at once. Empty where the descriptor is of something else.
    fn owners(&self, netns: &Passed) -> Vec<UserNamespace>;

    /// The next link that somebody may have changed or removed, by its alias: [`Self::mend`] shows whether it lacks something. One caller
    /// at a time.
    async fn next_changed_link(&self) -> LinkAlias {
        std::future::pending().await
    }

    /// Looks at the pods' links of a plan that is up, and makes them as wanted where `repairs` is set. An IPv6 address that the pod's
    /// kernel cannot have is not missed.
    ///
    /// # Errors
    /// As [`Self::up`]; [`ForwarderError::Gone`] where the pod is gone.
    async fn mend(&self, plan: &Plan, repairs: bool) -> Result<Mended, ForwarderError>;

    /// Whether a network namespace is that of process 1, for an agent that does not see process 1; none where that cannot be found out.
    async fn is_of_process_1(&self, netns: &PodNetns) -> Option<bool>;

    /// What proves and watches the paths to other nodes; `None` where nothing does.
    fn prober(&self) -> Option<&dyn Prober> {
        None
    }
}

/// A peer whose path is to be watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerSpec {
    /// The path to it.
    pub path: PathId,
    /// The MTU that tunnels to it would like to have, bytes.
    pub mtu: u32,
}

/// Why a peer cannot be watched.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the path to {peer} cannot be watched: {cause}")]
pub struct WatchError {
    /// The peer's address.
    pub peer: IpAddr,
    /// What is in the way, and what can be done.
    pub cause: String,
}

/// The node's sessions with other nodes: one a path, shared by all connections that take it.
///
/// Any call may be dropped: what it began goes on or ends by itself. [`Self::prove`] is bounded by the prober, some seconds at most; the
/// others answer at once, but for the first [`Self::join`] of a path, which makes its session.
#[tonic::async_trait]
pub trait Prober: Send + Sync + 'static {
    /// This node's own reflector.
    fn reflector(&self) -> Reflector;

    /// Counts connection `user` in as one that needs the path to `peer` watched; idempotent. When this returns, probes of the
    /// peer are answered.
    ///
    /// # Errors
    /// There can be no session, as [`WatchError`] explains. The connection works all the same.
    async fn join(&self, user: &str, peer: &PeerSpec) -> Result<(), WatchError>;

    /// Counts the connection out; a success when it is not counted.
    fn leave(&self, user: &str, path: &PathId);

    /// Proves a path that a connection has joined: at once when it is up already, else by a few probes. Returns its health after that;
    /// `None` for a path without a session.
    async fn prove(&self, path: &PathId) -> Option<Health>;

    /// The health of a path that a connection has joined.
    fn health(&self, path: &PathId) -> Option<Health>;

    /// Takes the peer's report on the path, which connection `user` has brought just now; `None` withdraws it. A report counts only
    /// while its connection is counted in.
    fn report(&self, user: &str, path: &PathId, report: Option<PeerReport>);

    /// The next event. One caller at a time.
    async fn next_event(&self) -> PathEvent;
}
