//! Why a peer cannot be watched.

use std::{io, net::IpAddr};

use nsm_ebpf_common::management::MAX_SESSIONS;

use crate::{bpf::BpfError, forward::ForwardError, links::LinkError, netns::NetnsError};

/// What can go wrong with the health plane.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// The node's namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// An external device cannot be had.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A probe link cannot be made.
    #[error("probe link: {0}")]
    Link(#[from] LinkError),
    /// The BPF programs of the probe link.
    #[error("probe link: {0}")]
    Bpf(#[from] BpfError),
    /// Another health plane uses these BPF programs.
    #[error("the BPF programs are in use by another health plane of this process")]
    InUse,
    /// The prober's packet socket cannot be opened.
    #[error(
        "cannot {action} the prober's packet socket on `{interface}` ({source}): run the agent as root, or with CAP_NET_RAW"
    )]
    Socket {
        /// What was tried.
        action: &'static str,
        /// On which link.
        interface: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A thread cannot be started, or the kernel gives no random numbers.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The address is not that of a host.
    #[error("{0} cannot be watched: a peer has the address of one host")]
    NotAPeer(IpAddr),
    /// The discriminator is this node's own, or its node has as many paths as there are tags.
    #[error(
        "discriminator {discriminator} of peer {peer} is that of {holder} already: one of the two must restart its agent \
         with fresh BPF maps"
    )]
    DiscriminatorTaken {
        /// The discriminator.
        discriminator: u32,
        /// The peer that was to be watched.
        peer: IpAddr,
        /// The holder: this node itself, or so many other paths.
        holder: String,
    },
    /// All sessions are in use.
    #[error("peer {peer} cannot be watched: all {MAX_SESSIONS} sessions of this node are in use")]
    TooManyPeers {
        /// The peer.
        peer: IpAddr,
    },
    /// The session has ended during a request.
    #[error("peer {peer} is not watched any more")]
    NotWatched {
        /// The peer.
        peer: IpAddr,
    },
    /// The health plane was closed.
    #[error("the health plane of this node is closed")]
    Closed,
}

impl HealthError {
    /// Whether the next try fails likewise, whatever changes on the node: a running process gains no rights.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        match self {
            Self::Link(LinkError::NotPermitted { .. })
            | Self::Forward(ForwardError::Link(LinkError::NotPermitted { .. }))
            | Self::Closed => true,
            Self::Socket { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            _ => false,
        }
    }
}
